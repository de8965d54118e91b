"""A learner's state across a change of the schema: what was learned goes on under the new one.

- Inputs that are new have the weight 0 wherever they are read. Right after the change, and until the first training
  step, the tasks that both schemas have are scored by the model before (:mod:`smes.model.before`): no bit of their
  scores changes.
- Tasks that are new begin at their base rate, with heads that give 0. The SMES ranker gives each a router of its own
  over the experts that run for the others (:mod:`smes.rankers.sparse.newcomers`); a new task of the ``home`` ranker
  joins the group of the tasks that the configuration groups it with, or the largest.
- What is gone goes. Routers, groups and experts stay, also where no task reads them any more.
- Rows of ids go on by vocabulary (:mod:`smes.model.carry_table`), weights and optimiser by name
  (:mod:`smes.model.carry_dense`).

Letters: T tasks, W id columns, F numeric features.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smes.arrays import I64, Arrays, prefixed, under
from smes.derive import Derivations, boundary_slices
from smes.model.before import COLUMNS, described
from smes.model.carry_axes import Axes, Axis, DenseChange
from smes.model.carry_dense import carried, carried_moments, carried_weights
from smes.model.carry_table import TableRules, carried_table
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.numeric_moments import NumericMoments
from smes.model.rank_model import build_model, ranker_structure
from smes.model.rows_config import RowsConfig
from smes.quantiles import StreamQuantiles
from smes.rankers.structure import NEWCOMER, Structure, structure_of
from smes.schema import Schema
from smes.schema_change import NEW, SchemaChange


def carry_over(
    state: Mapping[str, Tensor],
    change: SchemaChange,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    seed: int,
    *,
    rows: RowsConfig | None = None,
    was_model: ModelConfig | None = None,
) -> dict[str, Tensor]:
    """The state of a learner of the new schema, from that of one of the schema before. Nothing given is changed.

    Args:
        state: :meth:`smes.model.learner.Learner.state` of the schema before.
        change: From that schema to the new one, without :attr:`~smes.schema_change.SchemaChange.problems`.
        model: The model's configuration for the new schema: that of before, but for the names of tasks.
        optimizer: How the rows learn; gives what the accumulators of new rows and weights begin with.
        seed: Of new weights, ≥ 0.
        rows: The rules for rows; None for the default.
        was_model: The configuration that the state was learned with; None: ``model``.

    Returns:
        What :meth:`smes.model.learner.Learner.load_state` takes.

    Raises:
        ValueError: The change has problems, no task goes on, or the state or the configuration is not that of the
            schema before.
    """
    was_model = was_model or model
    if problems := carry_over_problems(change, model, was_model):
        raise ValueError(f"schema {change.now.name!r}: {problems[0]}")
    inputs = change.inputs
    old_dense = under("dense.", state)
    try:
        was = structure_of(under("structure.", old_dense), change.was.num_tasks)
        was = was or ranker_structure(change.was, was_model)
        now = next_structure(was, change, model)
        dense = DenseChange(inputs, model, was, now)
        weights = _new_weights(change.now, model, seed, now)
        new_dense = carried_weights(old_dense, weights, dense)
        rules = TableRules(model, optimizer, rows or RowsConfig(), seed)
        new_dense["shared_rows_V"] = torch.from_numpy(rules.keys(change.now).shared_rows)
        arrays: Arrays = {n: t.numpy() for n, t in state.items() if n.startswith(("rows.", "table."))}
        table = carried_table(arrays, old_dense["shared_rows_V"].numpy(), inputs, rules)
        for bucket, before in _buckets_that_go_on(change):
            new_dense["boundaries_Q"][bucket.boundaries] = old_dense["boundaries_Q"][before.boundaries]
        if not _reads_the_same(dense):
            new_dense |= prefixed("before.", _before(old_dense, inputs, change, was_model))
        out = prefixed("dense.", new_dense)
        learned = {n: t for n, t in weights.items() if not n.startswith("before.")}
        out |= prefixed("adam.", carried_moments(under("adam.", state), learned, dense))
        out |= prefixed("groups.", _search(under("groups.", state), dense))
        out |= prefixed("probe.", _probe(under("probe.", state), dense))
        out |= prefixed("numerics.", _numerics(under("numerics.", state), inputs))
        out |= prefixed("quantiles.", _quantiles(under("quantiles.", state), change))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"learner state: of another schema or model configuration: {error}") from error
    out |= {name: torch.from_numpy(array) for name, array in table.items()}
    out["step_number"] = state["step_number"].clone()
    return out


def carry_over_problems(change: SchemaChange, model: ModelConfig, was_model: ModelConfig | None = None) -> list[str]:
    """Why a state cannot be carried over, in words; empty if it can.

    Args:
        change: The change.
        model, was_model: As for :func:`carry_over`.
    """
    found = list(change.problems)
    if not change.task_names:
        found.append("no task goes on: expected at least one that both schemas have")
    if _without_names(model) != _without_names(was_model or model):
        found.append("another model configuration: expected the one of before, but for the names of tasks")
    return found


def next_structure(was: Structure, change: SchemaChange, model: ModelConfig) -> Structure:
    """The routers or groups of the tasks after a change: as they are, with the new tasks beside them.

    Args:
        was: Those of the schema before.
        change: The change.
        model: The configuration for the new schema.
    """
    router_T = [NEWCOMER if old == NEW else was.router_T[old] for old in change.tasks]
    own_T = tuple(0 if old == NEW else was.own_T[old] for old in change.tasks)
    if model.ranker == "smes" and NEWCOMER in router_T and not any(r != NEWCOMER for r in router_T):
        router_T[int(np.argmax(np.array(router_T) == NEWCOMER))] = 0  # one task reads a router of the founders'
    if model.ranker != "smes":
        groups = ranker_structure(change.now, model).router_T
        known = [t for t, old in enumerate(change.tasks) if old != NEW]
        for t, old in enumerate(change.tasks):
            if old == NEW:
                alike = [router_T[k] for k in known if groups[k] == groups[t]] or [router_T[k] for k in known]
                router_T[t] = Counter(alike).most_common(1)[0][0]
    return Structure(tuple(router_T), was.group_R, was.weight_R, own_T)


def _new_weights(schema: Schema, model: ModelConfig, seed: int, structure: Structure) -> dict[str, Tensor]:
    """The first weights of a model of this structure, which they name if the configuration does not give it."""
    try:
        if ranker_structure(schema, model) == structure or model.ranker not in ("smes", "home"):
            return dict(build_model(schema, model, seed).state_dict())
    except ValueError:
        pass  # fewer tasks than the configuration needs for a first model
    return dict(build_model(schema, model, seed, prefixed("structure.", structure.tensors())).state_dict())


def _reads_the_same(dense: DenseChange) -> bool:
    """Whether the model computes what it computed before: no input or task came, went or changed its place."""
    change = dense.change
    axes = (
        (dense.columns.was, dense.num_columns_was),
        (change.tasks, change.was.num_tasks),
        (change.id_columns, change.was.id_width),
        (change.numerics, change.was.num_numerics),
    )
    return all(np.array_equal(was, np.arange(length)) for was, length in axes)


def _before(
    old_dense: Mapping[str, Tensor], inputs: SchemaChange, change: SchemaChange, was_model: ModelConfig
) -> dict[str, Tensor]:
    """The weights of the model before, with where its columns are now."""
    maps = zip(
        COLUMNS,
        (inputs.id_columns, inputs.numerics, inputs.tasks),
        (inputs.was.id_width, inputs.was.num_numerics, inputs.was.num_tasks),
        strict=True,
    )
    columns = {name: torch.from_numpy(_inverse(was, length)) for name, was, length in maps}
    own = {name: tensor.clone() for name, tensor in old_dense.items()}
    return columns | {"description": described(change.was, was_model)} | prefixed("model.", own)


def _inverse(was: I64, length: int) -> I64:
    now = np.full(length, NEW, np.int64)
    known = was != NEW
    now[was[known]] = np.flatnonzero(known)
    return now


class _Bucket(NamedTuple):
    """The place of a quantile bucket among those of its schema, and its boundaries within those of all."""

    place: int
    boundaries: slice


def _buckets_that_go_on(change: SchemaChange) -> list[tuple[_Bucket, _Bucket]]:
    """The quantile buckets that both schemas have: now and before. They have as many boundaries in both."""
    was, now = (
        {name: _Bucket(k, at) for k, (name, at) in enumerate(boundary_slices(schema).items())}
        for schema in (change.was, change.now)
    )
    return [(bucket, was[change.derived_names[name]]) for name, bucket in now.items() if name in change.derived_names]


def _quantiles(old: Mapping[str, Tensor], change: SchemaChange) -> dict[str, Tensor]:
    fresh = StreamQuantiles(Derivations(change.now)).state()
    for bucket, before in _buckets_that_go_on(change):
        for key, array in fresh.items():
            array[bucket.place] = old[key].numpy()[before.place]
    return {key: torch.from_numpy(array) for key, array in fresh.items()}


def _numerics(old: Mapping[str, Tensor], inputs: SchemaChange) -> dict[str, Tensor]:
    axis = Axis(inputs.numerics)
    return {
        name: carried(old[name], torch.from_numpy(array), (axis, *[None] * (array.ndim - 1)))
        for name, array in NumericMoments(inputs.now).state().items()
    }


def _search(old: Mapping[str, Tensor], dense: DenseChange) -> dict[str, Tensor]:
    """The search for task groups, if one is going on: it goes on among the tasks that it was for."""
    if not old:
        return {}
    columns, tasks = Axis(dense.columns.was), dense.founders
    axes: dict[str, Axes] = {
        "sum_TCC": (tasks, columns, columns),
        "squares_TCC": (tasks, columns, columns),
        "scale_CC": (columns, columns),
        "noise_T": (tasks,),
    }
    lengths = {tasks: len(tasks.was), columns: len(columns.was)}
    out = {}
    for name, tensor in old.items():
        of = axes.get(name, (columns,) if name.startswith("moments.") else ())
        fresh = torch.full([lengths[axis] for axis in of if axis], _first(name), dtype=tensor.dtype)
        out[name] = carried(tensor, fresh, of) if of else tensor.clone()
    return out


def _probe(old: Mapping[str, Tensor], dense: DenseChange) -> dict[str, Tensor]:
    """Which tasks are on probe: new ones, and those that were. Their probes begin anew, as the columns have changed."""
    were = set(old["tasks"].tolist()) if old else set()
    tasks = [t for t in dense.now.newcomers if int(dense.tasks.was[t]) in {NEW, *were}]
    return {"tasks": torch.tensor(tasks)} if tasks else {}


def _first(name: str) -> float:
    return 1.0 if name == "moments.variance_C" else 0.0


def _without_names(model: ModelConfig) -> object:
    """The configuration without what names tasks, and without the rankers that it does not use."""
    data = model.to_dict()
    own = data[model.ranker] if model.ranker != "linear" else {}
    if model.ranker == "smes":
        own = {**own, "stage_one_weights": None, "groups": {**own["groups"], "declared": None}}
    if model.ranker == "home":
        own = {**own, "groups": None}
    common = ("ranker", "embedding_dim", "wide", "head_dim", "rare")
    return [own, *(data[key] for key in common)]
