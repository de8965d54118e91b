"""The learner: it owns the weights, scores every batch with them, and then takes one training step on the batch.

A step whose loss or gradients are not finite is not taken: everything stays as it was before it.

Letters: B and N instances, W id columns and F numeric features of events, T tasks, E experts, K experts that a task
chooses, R rows of the table, D embedding width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from smes.arrays import F32, I64, Arrays, Bool, prefixed, under
from smes.derive import Derivations
from smes.events import ExampleBlock
from smes.joint_batch import Joining, JointBatch, join_parts
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.deltas import FullView, RowDelta, StateView, whole
from smes.model.dense_optimizer import DenseOptimizer
from smes.model.devices import RankBatch, joint_batch, open_device, send_batch
from smes.model.features import FeatureInputs
from smes.model.frozen import FrozenRows, FrozenWeights, KeptState
from smes.model.id_table import IdTable
from smes.model.ids import pool_weights
from smes.model.memory_use import MemoryUse, memory_use
from smes.model.numeric_moments import NumericMoments
from smes.model.probing import Probe, ProbeFinding
from smes.model.rank_model import ModelOutput, build_model, form_of
from smes.model.request_split import LEAST_SAVED_IN_TRAINING, Splits
from smes.model.rows import LocalRows, Rows, ShardedRows
from smes.model.rows_config import RowCounts, RowsConfig
from smes.model.step_result import StepResult
from smes.model.step_watcher import StepWatcher
from smes.model.table import RowGradients
from smes.quantiles import StreamQuantiles
from smes.rankers.ranker import CountingRanker, ExpertLimits, GroupingRanker, GroupSearch, Undo
from smes.rankers.sparse.ranker import SMES
from smes.schema import Schema
from smes.world import ALONE, World


class Learner:
    """Weights, optimiser state and id table of one lineage.

    Not thread-safe: call all methods from one thread. :meth:`prepare` for the next batch may be called before or after
    :meth:`step` for the current one. On a GPU call it after, so that the two run at the same time.

    Args:
        schema: Features and tasks.
        model: Configuration of the model.
        optimizer: Configuration of the optimisers.
        rows: Which ids get a row of the id table, and when a row is given back; None: every id gets one and keeps it.
        device: ``cpu`` or ``cuda``.
        seed: Seed of the first weights, ≥ 0.
        half: As of :func:`smes.model.devices.open_device`.
        world: The ranks that train together, each with a learner. All of them call :meth:`prepare`, :meth:`step` and
            :meth:`observe_closed` in the same order, each with its own examples. A rank's table has the rows that
            :func:`smes.model.shards.owner_of` gives it; so what is said below of all rows is said of these.

    Attributes:
        schema, config: As given.

    Raises:
        ValueError: ``rows`` has rules for a vocabulary that the schema does not have.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        rows: RowsConfig | None = None,
        *,
        device: torch.device,
        seed: int = 0,
        half: bool = False,
        world: World = ALONE,
    ) -> None:
        self.schema = schema
        self._world = world
        self.config = model
        self._steps = 0
        self._unsettled: deque[tuple[Callable[[], bool], int]] = deque()
        self._device = open_device(device, half=half, ranker=model.ranker)
        self._table = IdTable(schema, model, optimizer, rows, self._device.device, seed, world)
        self._rows: Rows = LocalRows(self._table) if world.size == 1 else ShardedRows(self._table, world)
        self._joining = None if world.size == 1 else Joining()
        self._optimizer, self._seed = optimizer, seed
        self._build({})
        self._model.shared_rows_V.copy_(torch.from_numpy(self._table.rows.ids.shared_rows))
        self._numerics = NumericMoments(schema)
        self._derive = Derivations(schema)
        self._splits = Splits(schema, model.table_dim, training=True, least_saved=LEAST_SAVED_IN_TRAINING)
        self._quantiles = StreamQuantiles(self._derive)
        self._finder = self._new_finder()
        self._watcher: StepWatcher | None = None
        self._probe: Probe | None = None

    def _build(self, weights: Mapping[str, Tensor]) -> None:
        """A new model, of the form that these weights need, and its optimiser."""
        self._model = build_model(self.schema, self.config, self._seed, weights)
        self._model.to(self._device.device)
        join_parts(self._model, self._joining)
        self._dense = DenseOptimizer(self._model, self._optimizer)
        assert isinstance(self._model.ranker, torch.nn.Module), "every ranker is one"
        self._undo = Undo(self._model.ranker)

    @property
    def step_number(self) -> int:
        """How many steps were taken, those before a restart included. On a GPU, asking waits for the last step."""
        self._settle(0)
        return self._steps

    @property
    def num_rows(self) -> int:
        """Number of rows of the id table in use."""
        return len(self._table.rows)

    def has_rows(self, keys_N: I64) -> Bool | None:
        """Which keys of :class:`smes.model.ids.IdKeys` have a row of the id table. bool [N].

        None where there are several ranks: others would have to be asked.
        """
        return self._table.rows.has(keys_N) if self._world.size == 1 else None

    @property
    def row_counts(self) -> RowCounts:
        """How many rows ids have, and what became of those that they had."""
        return self._table.rows.counts

    @property
    def memory(self) -> MemoryUse:
        """How much memory its parts take."""
        return memory_use(self._table, self._model.state_dict().values(), self._dense.moments)

    @property
    def overlaps_copies(self) -> bool:
        """Whether ``prepare`` for the next batch runs at the same time as a step: true on a GPU."""
        return self._device.device.type == "cuda"

    @property
    def expert_limits(self) -> ExpertLimits | None:
        """Limits of the ranker's routing; None for a ranker without experts."""
        return self._model.ranker.expert_limits

    def watch(self, watcher: StepWatcher) -> None:
        """Let a watcher see the steps from now on. On a GPU each step then waits until it has ended."""
        self._watcher = watcher

    def prepare(self, examples: ExampleBlock) -> RankBatch:
        """Look up the ids of some examples, and send the columns to the device.

        New ids get rows, and rows are given back, as the configuration says.

        Args:
            examples: B ≥ 1 examples; of several ranks, those of this one, B ≥ 0.

        Raises:
            ValueError: There are no examples, on any rank.
        """
        if len(examples) == 0 and self._world.size == 1:
            raise ValueError("examples: 0 rows, expected at least 1")
        joint = None if self._joining is None else joint_batch(examples, self._world)
        time_ms = examples.event_time_ms
        read = self._derive(examples.ids, examples.numerics, time_ms, self._quantiles.boundaries)
        rows = self._rows.assign(read.ids, int(time_ms.max(initial=0)))
        splits = self._splits if self._shares else None
        return send_batch(examples, read, rows, self.schema, self._device, splits, joint)

    @property
    def _shares(self) -> bool:
        """Whether what the examples of a request share is computed once for them."""
        ranker = self._model.ranker
        on_cpu = self._device.device.type == "cpu"
        return on_cpu and self._model.before is None and isinstance(ranker, SMES) and ranker.trains_split

    def step(self, batch: RankBatch) -> StepResult:
        """Score a batch with the current weights, then take one training step on it.

        With several ranks it is one step on the batches of all of them: whatever it learns from the whole batch is
        summed over them, and they all take it, or none does.

        If loss or gradients are not finite, only the rows of new ids remain of the step. On a GPU the host does not
        wait to learn whether they were: the device leaves its own state as it was, the host takes back what it counted
        when the next step has started, and the moments of the numeric features count the batch all the same.
        """
        batch.receive(self._device)
        if self._model.before is not None:  # the model before scores until a step is known to be taken
            self._settle(0)
        model, joint, own = self._model, batch.joint, len(batch)
        if joint is not None and self._joining is not None:
            self._joining.begin(joint)
        cells, of_requests = self._rows.cells(batch)
        self._undo.save()
        inputs, batch = batch.inputs(cells, of_requests), batch.or_nothing()
        total_weight = batch.weight_B.sum() if joint is None else batch.weight_B.new_tensor(joint.weight)
        output = model(inputs, self._device.autocast())
        scores = model.scores(output, inputs, self._device.autocast())
        delayed = batch.delayed_weights(output.logits_BT)
        labels = (batch.labels_BT, batch.mask_BT, batch.weight_B)
        divisor = None if joint is None else joint.weight
        loss = model.tasks.loss(output.logits_BT, *labels, delayed, divisor)
        if output.ranker.auxiliary_loss is not None:
            loss = loss + output.ranker.auxiliary_loss
        for watcher in self._watchers:
            watcher.before_backward(output)
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        gradients = self._rows.gradients(batch, cells, total_weight, of_requests)
        square = loss.detach() + gradients.square
        sums = self._sum_over_ranks(batch, output, square)
        taken = (square + self._dense.square()).isfinite()  # the optimisers add up squares
        watched = bool(self._watchers) and bool(taken)
        if watched:
            for watcher in self._watchers:
                watcher.after_backward(output, batch)
        known = self._device.tells_at_once
        if not (known and taken):
            self._undo.unless(taken)
        if not known or taken:
            self._learn(batch, output, gradients, None if known else taken, sums)
        self._dense.clear()
        self._steps += 1
        instances = own if joint is None else joint.instances
        self._unsettled.append((self._device.read_later(taken), instances))
        self._settle(0 if known else 1)
        if self._probe is not None and watched:
            self._end_probes(self._probe, instances, joint)
        stats = output.ranker.stats
        return StepResult(
            scores=scores[:own],
            active_experts=stats.active_B[:own] if stats else None,
            expert_load=(stats.load_TE if own else torch.zeros_like(stats.load_TE)) if stats else None,
            finite=taken,
        )

    @property
    def probe_findings(self) -> Mapping[int, ProbeFinding]:
        """What is known of the tasks on probe, by their index; empty where none is (:mod:`smes.model.probing`)."""
        return {} if self._probe is None else self._probe.findings

    @property
    def own_experts(self) -> dict[str, int]:
        """Tasks that came later and got experts of their own, and how many."""
        if not isinstance(self._model.ranker, SMES):
            return {}
        own_T = self._model.ranker.structure.own_T
        return {task.name: own for task, own in zip(self.schema.tasks, own_T, strict=True) if own}

    @property
    def _watchers(self) -> list[StepWatcher]:
        return [watcher for watcher in (self._watcher, self._probe) if watcher is not None]

    def _end_probes(self, probe: Probe, instances: int, joint: JointBatch | None) -> None:
        """Give experts of their own to tasks that the others' do not serve."""
        if tasks := probe.observe(instances, joint):
            self.give_own_experts(tasks)
        if not probe.tasks:
            self._probe = None

    def give_own_experts(self, tasks: Sequence[int]) -> None:
        """Give newcomers of the ``smes`` ranker experts of their own, which give 0 at first: no score changes.

        Args:
            tasks: Their indices.
        """
        before, ranker, moments = _copies(self._model.state_dict()), self._model.ranker, self._dense.state()
        assert isinstance(ranker, SMES), "others have no newcomers"
        own_T = [ranker.pool_size if t in tasks else own for t, own in enumerate(ranker.structure.own_T)]
        structure = prefixed("structure.", replace(ranker.structure, own_T=tuple(own_T)).tensors())
        self._build(before | structure)
        self._model.load_state_dict(self._model.state_dict() | before | structure)
        self._dense.load_state(moments)

    def observe_closed(self, examples: ExampleBlock) -> None:
        """Take in the final labels of impressions that were trained on before these were known.

        They teach which labels come together, which examples of single labels cannot; see
        :meth:`smes.model.task_outputs.TaskOutputs.observe_final`. No weights are trained on them. With several ranks
        all of them call it at one moment; some may have no examples.
        """
        columns = [self._device.send(c) for c in (examples.labels, examples.label_mask, examples.weight)]
        self._device.receive(columns, self._device.ticket())
        labels_BT, mask_BT, weight_B = columns
        self._model.tasks.observe_final(labels_BT, mask_BT, weight_B, self._world)

    def _sum_over_ranks(self, batch: RankBatch, output: ModelOutput, square: Tensor) -> list[Tensor]:
        """Sum over ranks, in place, the gradients of the dense weights, a number, and what parts of the model wait for.

        Returns:
            What the tasks' base rates learn of the batch, summed; nothing where there is one rank.
        """
        if batch.joint is None or self._joining is None:
            return []
        delayed = batch.delayed_weights(output.logits_BT)
        sums = self._model.tasks.sums(batch.joint, batch.labels_BT, batch.mask_BT, batch.weight_B, delayed)
        flat = self._dense.flat(square)
        self._joining.sum(flat, sums)
        self._dense.put_flat(flat, square)
        return sums

    def _learn(
        self, batch: RankBatch, output: ModelOutput, rows: RowGradients, taken: Tensor | None, sums: Sequence[Tensor]
    ) -> None:
        """Change what a step changes; if ``taken`` is false, on the device nothing. None: it is true."""
        self._dense.step(taken)
        self._table.records.update(batch.rows_U, rows, taken, keep_U=batch.keep_U, rate_U=batch.rate_U)
        mask_BT, weight_B = batch.mask_BT, batch.weight_B
        if taken is not None:
            mask_BT, weight_B = mask_BT & taken, torch.where(taken, weight_B, 0.0)
        if batch.joint is None:
            self._model.tasks.observe(batch.labels_BT, mask_BT, weight_B, batch.delayed_weights(output.logits_BT))
        else:
            self._model.tasks.take_in(sums if taken is None else [torch.where(taken, one, 0.0) for one in sums])
        self._numerics.observe(batch.numerics, batch.joint)
        self._model.features.standardise_by(
            {name: self._device.host(array) for name, array in self._numerics.moments.items()}
        )
        if self._quantiles.observe(batch.bucketed_BK, batch.joint):
            self._model.boundaries_Q.copy_(self._device.host(self._quantiles.boundaries), non_blocking=True)
        if self._finder is not None:
            self._find_groups(self._finder, output, batch, taken)

    def _settle(self, left: int) -> None:
        """Take back what was counted for steps that were not taken; the last ``left`` steps may wait."""
        while len(self._unsettled) > left:
            read, instances = self._unsettled.popleft()
            if read():
                self._model.before = None
                continue
            self._steps -= 1
            if isinstance(self._model.ranker, CountingRanker):
                self._model.ranker.forget(instances)
            if self._finder is not None and not self._device.tells_at_once:
                self._finder.forget(instances)

    def choices(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> Tensor | None:
        """Find the experts that each task would choose for N ≥ 1 instances. Changes nothing.

        Args:
            ids: int64 [N, W]. An id that was never trained on counts as missing, and gets no row.
            numerics: float32 [N, F].
            now_ms: As in :meth:`smes.model.serving.ServingModel.score`.

        Returns:
            int64 [N, T, K] on the training device, without the experts that run for every instance; None for a ranker
            without routing.

        Raises:
            ValueError: There are several ranks.
        """
        self._require_all_rows("choices of experts")
        read = self._derive(ids, numerics, now_ms, self._quantiles.boundaries)
        device, pool_NW = self._device.device, pool_weights(self.schema, read.ids)
        with torch.no_grad():
            inputs = FeatureInputs(
                embedding_BWD=self._table.embeddings(read.ids),
                wide_BWT=None,
                pool_BW=None if pool_NW is None else torch.from_numpy(pool_NW).to(device),
                numerics_BF=torch.tensor(read.numerics, dtype=torch.float32, device=device),
            )
            return self._model.choices(inputs, self._device.autocast())

    def serving_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that :class:`smes.model.serving.ServingModel` needs.

        - ``dense.*``: the model's weights and running moments;
        - ``table.keys``: int64 [R], the keys in row order;
        - ``table.embedding``: float32 [R, D], and ``table.wide``: float32 [R, T], the rows in use.
        """
        return {**self.dense_serving_state(), **prefixed("table.", self._table.values())}

    def dense_serving_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of the part of :meth:`serving_state` that is not the table: ``dense.*``."""
        return prefixed("dense.", _copies(self._model.state_dict()))

    def skip_delta(self) -> None:
        """Let :meth:`take_delta` count from now on, without copying what changed before."""
        self._table.skip_delta()

    def take_delta(self) -> RowDelta:
        """What changed in the table since the last call or :meth:`skip_delta`: rows, copied, and keys that went.

        The first call of all gives every row.
        """
        return self._table.take_delta()

    def full_view(self) -> FullView:
        """The weights as they are now, for a reader beside the training. :meth:`take_delta` is not affected."""
        return self._table.full_view(self.dense_serving_state())

    def freeze(self) -> FrozenWeights:
        """The weights as they are now, for scoring with them, on this thread, while training goes on.

        Raises:
            ValueError: There are several ranks.
        """
        self._require_all_rows("frozen weights")
        return FrozenWeights(self.dense_serving_state(), self._table.freeze())

    def thaw(self, state: Arrays) -> FrozenWeights:
        """The weights that a :meth:`FrozenWeights.state` was taken from, in the learner's state of the same moment.

        Raises:
            ValueError: The learner is in another state, or there are several ranks.
        """
        self._require_all_rows("frozen weights")
        dense = {name: torch.from_numpy(array) for name, array in state.items() if name.startswith("dense.")}
        return FrozenWeights(dense, self._table.thaw(under("rows.", state)))

    def keep(self) -> KeptState:
        """The whole state as it is now, for scoring with it while training goes on, and for going back to it.

        Raises:
            ValueError: There are several ranks.
        """
        self._require_all_rows("a kept state")
        arrays, (records, keys) = self._table.state_view()
        dense = self.dense_serving_state()
        own = {name: whole(tensor.numpy()) for name, tensor in self._own_state(dense).items()}
        return KeptState(own | arrays, FrozenWeights(dense, FrozenRows(self._table.rows, keys, records)))

    def keep_again(self, state: Arrays) -> KeptState:
        """What a :meth:`KeptState.state` was taken from, in the learner's state of the same moment.

        Raises:
            ValueError: The learner is in another state, or there are several ranks.
        """
        self._require_all_rows("a kept state")
        keys, records = self._table.views_of(under("then.", state))
        dense = {name: torch.from_numpy(array) for name, array in state.items() if name.startswith("dense.")}
        own = {name: whole(array) for name, array in state.items() if not name.startswith("then.")}
        rows = FrozenRows(self._table.rows, keys, records)
        return KeptState(own | self._table.pieces(keys, records), FrozenWeights(dense, rows))

    def state_view(self) -> StateView:
        """Everything from which :meth:`load_state` continues exactly, for a reader beside the training.

        Copied are the dense part, and what is known of the ids' frequency and age. The rest of the table
        (:meth:`IdTable.state_view`) is read piece by piece.
        """
        own = self._own_state(self.dense_serving_state())
        arrays, views = self._table.state_view()
        return StateView({name: whole(t.numpy()) for name, t in own.items()} | arrays, views)

    def _require_all_rows(self, what: str) -> None:
        if self._world.size > 1:
            rank = f"rank {self._world.rank} of {self._world.size}"
            raise ValueError(f"{what}: this learner has the rows of {rank}, expected one rank, which has all")

    def _own_state(self, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state without the table; ``dense`` is a :meth:`dense_serving_state`."""
        self._settle(0)
        tensors = dict(dense)
        tensors |= prefixed("adam.", _copies(self._dense.state()))
        if self._finder is not None:
            tensors |= prefixed("groups.", self._finder.state())
        if self._probe is not None:
            tensors |= prefixed("probe.", self._probe.state())
        tensors |= prefixed("numerics.", {name: torch.from_numpy(a) for name, a in self._numerics.state().items()})
        tensors |= prefixed("quantiles.", {name: torch.from_numpy(a) for name, a in self._quantiles.state().items()})
        tensors["step_number"] = torch.tensor(self.step_number)
        return tensors

    def state(self) -> dict[str, Tensor]:
        """A :meth:`state_view` as tensors in memory."""
        view = self.state_view()
        tensors = {name: torch.from_numpy(array.read()) for name, array in view.arrays.items()}
        view.close()
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`.

        On the CPU, with the same number of threads, everything from here on is the same bit for bit as in the learner
        that the state was taken from, if it has the same configuration. Rules for rows and rates may be others, except
        for ``shared_rows``.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape: the state is of another schema or model.
        """
        with _of_another_model():
            self._table.load_state(state)
            self._load_dense(state)
            self._dense.load_state(under("adam.", state))
            self._finder = self._new_finder() if "groups.seen" in state else None
            if self._finder is not None:
                self._finder.load_state(under("groups.", state))
            self._probe = None
            if "probe.tasks" in state:
                self._probe = Probe(self.schema, (), self.config, self._optimizer, self._seed)
                self._probe.load_state(under("probe.", state))
            self._unsettled.clear()
            self._steps = int(state["step_number"])

    def load_serving_state(self, state: Mapping[str, Tensor], step_number: int) -> None:
        """Continue from a :meth:`serving_state`: the weights as they serve, the optimisers as if nothing was seen.

        A search for task groups that the serving state does not hold begins anew. The configured number of shared rows
        may differ from that of the state.

        Args:
            state: The copies.
            step_number: Steps behind them.

        Raises:
            ValueError: As :meth:`load_state`.
        """
        with _of_another_model():
            shared_rows: I64 = state["dense.shared_rows_V"].numpy()
            self._table.load_values(under("table.", state), shared_rows)
            self._load_dense({**state, "dense.shared_rows_V": torch.from_numpy(self._table.rows.ids.shared_rows)})
            self._dense.load_state({})
            self._finder, self._probe = self._new_finder(), None
            self._unsettled.clear()
            self._steps = step_number

    def _load_dense(self, state: Mapping[str, Tensor]) -> None:
        weights = under("dense.", state)
        if form_of(weights) or form_of(self._model.state_dict()):
            self._build(weights)
        self._model.load_state_dict(weights)
        self._load_numerics(state)

    def _load_numerics(self, state: Mapping[str, Tensor]) -> None:
        moments = ("count", "mean", "variance")
        self._numerics.load(
            {name: state[f"dense.features.moments.{name}_C"].numpy() for name in moments},
            {name: tensor.numpy() for name, tensor in under("numerics.", state).items()},
        )
        if self._derive.quantiles:
            self._quantiles.load(
                state["dense.boundaries_Q"].numpy(),
                {name: tensor.numpy() for name, tensor in under("quantiles.", state).items()},
            )

    def _new_finder(self) -> GroupSearch | None:
        ranker = self._model.ranker
        finder = ranker.group_finder() if isinstance(ranker, GroupingRanker) else None
        return None if finder is None else finder.to(self._device.device)

    def _find_groups(self, finder: GroupSearch, output: ModelOutput, batch: RankBatch, taken: Tensor | None) -> None:
        ranker = self._model.ranker
        assert isinstance(ranker, GroupingRanker), "a ranker that has a finder"
        logits_BT = output.logits_BT.detach()
        residual_BT = self._model.tasks.residuals(
            logits_BT, batch.labels_BT, batch.mask_BT, batch.weight_B, batch.delayed_weights(logits_BT)
        )
        founders = list(ranker.founders)
        groups = finder.observe(output.x_BI.detach(), residual_BT[:, founders], taken, batch.joint)
        if groups is not None:
            ranker.regroup(groups)
            if self._watcher is not None:
                alone = [(t,) for t in range(self.schema.num_tasks) if t not in founders]
                self._watcher.regroup((*(tuple(founders[i] for i in group) for group in groups), *alone))
        if finder.done:
            self._finder = None


@contextmanager
def _of_another_model() -> Iterator[None]:
    """Say what is wrong with a state if a tensor of it is missing, unknown or of another shape."""
    try:
        yield
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"learner state: of another schema or model configuration: {error}") from error


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}
