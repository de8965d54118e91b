"""The learner: one thread owns the weights, scores a batch with them as they are, then takes one step.

Letters: B instances, W id columns, U distinct rows of a batch, T tasks, E experts, R rows of the table, D embedding
width, C columns of a table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.arrays import F32, I64
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import RankBatch, open_device
from smes.model.features import FeatureInputs
from smes.model.ids import DistinctRows, IdRows, pool_weights, readers, uniform_rows
from smes.model.rank_model import ModelOutput, build_model
from smes.model.table import Readers, RowTable, read_cells
from smes.rankers.ranker import ExpertLimits, GroupingRanker
from smes.rankers.sparse.groups import GroupFinder
from smes.schema import Schema


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found out; all on the training device, nothing waited for.

    Attributes:
        scores: float32 [B, T], by the weights before the step: probabilities, or values in the label's unit.
        loss: float32 scalar, what the step descended.
        task_losses: float32 [T], mean over the labelled instances.
        active_experts: int64 [B], experts executed; None for a ranker without experts.
        expert_load: int64 [T, E], instances each task sent to each expert; None likewise.
    """

    scores: Tensor
    loss: Tensor
    task_losses: Tensor
    active_experts: Tensor | None
    expert_load: Tensor | None


class Learner:
    """Weights, optimiser state and id table of one lineage.

    Not thread-safe: one thread calls everything. ``prepare`` for the next batch may be called before or after ``step``
    for the current one; on a GPU, after is better, for then the two overlap.

    Args:
        schema: Features and tasks.
        model: Which model.
        optimizer: How it learns.
        device: ``cpu`` or ``cuda``.
        seed: Of the first weights, ≥ 0: of the dense ones, and, with their ids, of the embedding rows.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.schema = schema
        self.config = model
        self.step_number = 0
        self._seed = seed
        self._device = open_device(device)
        self._model = build_model(schema, model, seed).to(self._device.device)
        wide = {n: p for n, p in self._model.named_parameters() if n == "features.wide_numerics"}
        others = {n: p for n, p in self._model.named_parameters() if n not in wide}
        self._dense_names = [*others, *wide]  # in the order in which the optimiser numbers them
        self._dense = dense_optimizer(optimizer, wide.values(), others.values())
        self._rows = IdRows(schema)
        self._distinct = DistinctRows()
        self._finder = self._new_finder()
        self._tables: dict[str, RowTable] = {}
        if model.table_dim:
            self._tables["embedding"] = RowTable(model.table_dim, optimizer.embedding, self._device.device)
        if model.wide:
            self._tables["wide"] = RowTable(schema.num_tasks, optimizer.wide, self._device.device)
        self._append_rows(0)

    @property
    def num_rows(self) -> int:
        """Rows of the id table in use."""
        return len(self._rows)

    @property
    def overlaps_copies(self) -> bool:
        """Whether ``prepare`` for the next batch costs less while a step is under way: on a GPU."""
        return self._device.device.type == "cuda"

    @property
    def expert_limits(self) -> ExpertLimits | None:
        """What the ranker's routing allows; None for a ranker without experts."""
        return self._model.ranker.expert_limits

    def prepare(self, examples: ExampleBlock) -> RankBatch:
        """Look up (and where new, add) the ids of a block, and send its columns to the device.

        Args:
            examples: B ≥ 1 instances.
        """
        if len(examples) == 0:
            raise ValueError("examples: 0 instances, expected at least 1")
        known = len(self._rows)
        rows_BW = self._rows.insert(examples.ids)
        if len(self._rows) > known:
            self._append_rows(known)
        rows_U, cells_BW = self._distinct(rows_BW, len(self._rows))
        pool_BW = pool_weights(self.schema, examples.ids)
        send = self._device.send
        batch = RankBatch(
            rows_U=send(rows_U),
            cells_BW=send(cells_BW),
            readers=self._readers(cells_BW, len(rows_U)),
            pool_BW=None if pool_BW is None else send(pool_BW),
            numerics_BF=send(examples.numerics),
            labels_BT=send(examples.labels),
            mask_BT=send(examples.label_mask),
            weight_B=send(examples.weight),
            user_id=examples.user_id,
            event_time_ms=examples.event_time_ms,
        )
        return replace(batch, ticket=self._device.ticket())

    def step(self, batch: RankBatch) -> StepResult:
        """Score a batch with the weights as they are, then take one optimisation step on it."""
        self._device.receive(batch)
        model = self._model
        leaves = {name: table.gather(batch.rows_U) for name, table in self._tables.items()}
        output = model(_inputs(leaves, batch), self._device.autocast())
        scores = model.tasks.scores(output.logits_BT.detach())
        loss, task_losses = model.tasks.losses(output.logits_BT, batch.labels_BT, batch.mask_BT, batch.weight_B)
        if output.ranker.auxiliary_loss is not None:
            loss = loss + output.ranker.auxiliary_loss
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        self._dense.step()
        self._dense.zero_grad(set_to_none=True)
        total_weight = batch.weight_B.sum()
        for name, table in self._tables.items():
            table.update(batch.rows_U, leaves[name], total_weight)
        model.tasks.observe(batch.labels_BT, batch.mask_BT, batch.weight_B)
        model.features.observe(batch.numerics_BF)
        if self._finder is not None:
            self._find_groups(self._finder, output, batch)
        self.step_number += 1
        stats = output.ranker.stats
        return StepResult(
            scores=scores,
            loss=loss.detach(),
            task_losses=task_losses,
            active_experts=stats.active_B if stats else None,
            expert_load=stats.load_TE if stats else None,
        )

    def choices(self, ids: I64, numerics: F32) -> Tensor | None:
        """The experts that each task would choose for N ≥ 1 instances with the weights as they are; changes nothing.

        Args:
            ids: int64 [N, W]; an id never trained on reads its vocabulary's default row.
            numerics: float32 [N, F].

        Returns:
            int64 [N, T, K] on the training device, experts that run for every instance left out; None for a ranker
            without routing.
        """
        device, table, pool_NW = self._device.device, self._tables.get("embedding"), pool_weights(self.schema, ids)
        with torch.no_grad():
            rows_NW = torch.from_numpy(self._rows.find(ids)).to(device)
            inputs = FeatureInputs(
                embedding_BWD=None if table is None else F.embedding(rows_NW, table.weights),
                wide_BWT=None,
                pool_BW=None if pool_NW is None else torch.from_numpy(pool_NW).to(device),
                numerics_BF=torch.tensor(numerics, dtype=torch.float32, device=device),
            )
            return self._model.choices(inputs, self._device.autocast())

    def serving_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of all that :class:`smes.model.serving.ServingModel` needs.

        ``dense.*`` are the model's weights and running moments, ``table.keys`` int64 [R] the keys by row,
        ``table.embedding`` float32 [R, D] and ``table.wide`` float32 [R, T] the rows in use.
        """
        tensors = {f"dense.{name}": tensor.cpu().clone() for name, tensor in self._model.state_dict().items()}
        tensors["table.keys"] = torch.from_numpy(self._rows.keys().copy())
        tensors.update({f"table.{name}": table.weights.cpu().clone() for name, table in self._tables.items()})
        return tensors

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything from which :meth:`load_state` goes on exactly."""
        tensors = self.serving_state()
        for name, table in self._tables.items():
            tensors[f"accumulators.{name}"] = table.state()["accumulators"]
        for index, moments in self._dense.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"adam.{self._dense_names[index]}.{key}"] = value.cpu().clone()
        if self._finder is not None:
            tensors.update({f"groups.{name}": tensor for name, tensor in self._finder.state().items()})
        tensors["step_number"] = torch.tensor(self.step_number)
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`: on the CPU, bit for bit as the learner that gave it (same number of threads).

        Raises:
            ValueError: A tensor is missing, unknown or of another shape: the state is of another schema or model.
        """
        try:
            self._rows = IdRows(self.schema, state["table.keys"].numpy())
            for name, table in self._tables.items():
                table.load_state({"weights": state[f"table.{name}"], "accumulators": state[f"accumulators.{name}"]})
            self._model.load_state_dict(_under("dense.", state))
            self._load_adam(state)
            self._finder = self._new_finder() if "groups.seen" in state else None
            if self._finder is not None:
                self._finder.load_state(_under("groups.", state))
            self.step_number = int(state["step_number"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"learner state: of another schema or model configuration: {error}") from error

    def _load_adam(self, state: Mapping[str, Tensor]) -> None:
        adam = {
            index: _under(f"adam.{name}.", state)
            for index, name in enumerate(self._dense_names)
            if f"adam.{name}.step" in state
        }
        self._dense.load_state_dict({"state": adam, "param_groups": self._dense.state_dict()["param_groups"]})

    def _new_finder(self) -> GroupFinder | None:
        ranker = self._model.ranker
        finder = ranker.group_finder() if isinstance(ranker, GroupingRanker) else None
        return None if finder is None else finder.to(self._device.device)

    def _find_groups(self, finder: GroupFinder, output: ModelOutput, batch: RankBatch) -> None:
        ranker = self._model.ranker
        assert isinstance(ranker, GroupingRanker), "a ranker that has a finder"
        logits_BT = output.logits_BT.detach()
        residual_BT = self._model.tasks.residuals(logits_BT, batch.labels_BT, batch.mask_BT, batch.weight_B)
        groups = finder.observe(output.x_BI.detach(), residual_BT)
        if groups is not None:
            ranker.regroup(groups)
        if finder.done:
            self._finder = None  # its sums are of no more use

    def _readers(self, cells_BW: I64, num_rows: int) -> Readers | None:
        if self._device.device.type != "cpu":
            return None
        order, start_U = readers(cells_BW, num_rows)
        return Readers(self._device.send(order), self._device.send(start_U))

    def _append_rows(self, start: int) -> None:
        keys = self._rows.keys(start)
        for name, table in self._tables.items():
            scale = self.config.embedding_scale if name == "embedding" else 0.0
            table.append(self._device.host(uniform_rows(keys, table.columns, scale, self._seed)))


def _inputs(leaves: Mapping[str, Tensor], batch: RankBatch) -> FeatureInputs:
    def cells(name: str) -> Tensor | None:
        leaf_UC = leaves.get(name)
        if leaf_UC is None:
            return None
        return read_cells(leaf_UC, batch.cells_BW, batch.readers)

    return FeatureInputs(cells("embedding"), cells("wide"), batch.pool_BW, batch.numerics_BF)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# TODO(merge) was smes.optim: The optimiser of the dense weights: AdamW. (That of the id t


def dense_optimizer(
    config: OptimizerConfig, wide: Iterable[nn.Parameter], others: Iterable[nn.Parameter]
) -> torch.optim.AdamW:
    """AdamW over the dense weights; those of the linear part do not decay."""
    groups: list[dict[str, Any]] = [
        {"params": list(others)},
        {"params": list(wide), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
