import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import speed, speed_peers
from benchmarks.speed_ours import DenseExecution, blocks, dense_smes, our_contender
from benchmarks.speed_report import draw, table
from benchmarks.speed_setting import Contender, Data, Setting, make_data
from benchmarks.step_breakdown import PARTS, Stopwatch, breakdown, count_flop
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.rankers.sparse.config import ExpertsConfig, RouterConfig, SmesConfig, smes_paper
from smes.rankers.sparse.experts import FullExperts, LowRankExperts, ResidualExperts
from smes.rankers.sparse.packing import dispatch
from smes.rankers.sparse.routing import route

SMALL = Setting(
    num_fields=4, embedding_dim=4, num_tasks=3, expert_dims=(8, 8), batch_size=16, candidates=5, vocabulary=20
)
FAST = replace(SMALL, peer_learning_rate=0.01)
SMES_SMALL = SmesConfig(
    num_group=2,
    encoder_dims=(8,),
    trunk_dims=(8,),
    router=RouterConfig(rank=8),
    experts=ExpertsConfig(num=16, dims=(8,)),
)


@pytest.fixture(scope="module")
def data() -> Data:
    return make_data(SMALL)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FullExperts(8, 16, (24, 8)),
        lambda: LowRankExperts(8, 16, 8, 8),
        lambda: ResidualExperts(8, 16, 8, 8),
    ],
    ids=["full", "low_rank", "residual"],
)
def test_the_dense_execution_gives_the_same_outputs_and_gradients(
    build: Callable[[], FullExperts | LowRankExperts | ResidualExperts],
) -> None:
    torch.manual_seed(0)
    experts = build()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)  # differences start at zero
    h_BD = torch.randn(20, 16)
    plan = dispatch(route(torch.randn(20, 3, 8), torch.full((3,), 1 / 3), 1, 2), trim=True)
    gradients = []
    for execution in (experts, DenseExecution(experts)):
        y_PH = execution(h_BD, plan)
        experts.zero_grad()
        y_PH.square().sum().backward()
        gradients.append([y_PH.detach(), *(p.grad for p in experts.parameters())])
    for grouped, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(grouped, dense, rtol=1e-4, atol=1e-4)


def test_the_dense_smes_learns_as_smes_does(data: Data) -> None:
    config, optimizer = ModelConfig(embedding_dim=4, smes=SMES_SMALL), OptimizerConfig(learning_rate=0.01)
    scores = []

    for execution in (nullcontext(), dense_smes()):
        with execution:
            learner = Learner(SMALL.schema, config, optimizer, device=torch.device("cpu"))
        for block in blocks(SMALL, data):
            result = learner.step(learner.prepare(block))
        scores.append(result.scores)

    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)


def test_operations_are_counted_forward_and_backward() -> None:
    x = torch.randn(10, 16, requires_grad=True)
    stacked = torch.randn(3, 16, 8, requires_grad=True)
    plain = torch.randn(8, 4, requires_grad=True)
    offsets = torch.tensor([2, 2, 10], dtype=torch.int32)

    def work() -> None:
        (F.grouped_mm(x, stacked, offs=offsets) @ plain).square().sum().backward()  # type: ignore[no-untyped-call]

    assert count_flop(work) == 3 * 2 * 10 * (16 * 8 + 8 * 4)


def test_the_stopwatch_counts_each_moment_once() -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 12.0, 20.0])
    watch = Stopwatch(lambda: next(now))
    with watch.part("outer"):  # 0
        with watch.part("inner"):  # 1 … 3
            pass
        watch.wrap("inner", lambda: None)()  # 7 … 12
    assert watch.seconds == {"outer": 1.0 + 4.0 + 8.0, "inner": 2.0 + 5.0}


def test_every_part_of_a_step_is_found(data: Data) -> None:
    config = ModelConfig(embedding_dim=4, smes=SMES_SMALL)
    parts = breakdown(our_contender("smes8", "", config, SMALL, data).train, steps=2)
    assert list(parts) == list(PARTS)
    assert min(parts.values()) > 0, parts


def test_a_run_gives_flat_figures_table_and_plot(data: Data, tmp_path: Path) -> None:
    contenders = speed.build(
        ["smes16", "smes64", "smes256", "dense64", "wide64", "dense_wide64", "mmoe8"], SMES_SMALL, SMALL, data
    )
    figures = speed.run(contenders, SMALL, speed.Effort(repeats=3, steps=2))
    assert json.loads(json.dumps(figures)) == figures
    assert {"latency_vs_dense", "step_e256_vs_e16", "smes64_train_per_s", "smes64_gemm_ms"} <= set(figures)
    assert "train_vs_rechub_mmoe8" not in figures, "it took no part"
    for name in ("smes64_latency_ms", "step_e256_vs_e16"):
        assert 0 < figures[f"{name}_min"] <= figures[name] <= figures[f"{name}_max"]
    assert figures["dense64_step_gflop"] > figures["smes64_step_gflop"] > figures["smes16_step_gflop"]
    text = table(contenders, figures, list(speed.RATIOS))
    assert "`dense64`" in text
    assert "`step_e256_vs_e16`" in text
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: no plot was drawn")
    draw(contenders, figures, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_is_that_of_the_rounds() -> None:
    rounds = {"smes256_step_ms": [2.0, 9.0, 4.0], "smes16_step_ms": [1.0, 3.0, 4.0]}
    assert speed.ratios_of_rounds(rounds) == {"step_e256_vs_e16": [2.0, 3.0, 1.0]}


def test_overrides_are_read_as_yaml() -> None:
    config = speed.smes_config(["experts.dims=[128, 64]", "encoder_dims=[64, 32]", "max_active=null"], "paper")

    paper = smes_paper()
    assert config == replace(paper, encoder_dims=(64, 32), experts=replace(paper.experts, dims=(128, 64)))


@pytest.mark.parametrize("wrong", ["expert=full", "experts", "experts.number=8", "num_group.x=1", "num_shared=-1"])
def test_a_wrong_override_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--smes", wrong, "--contenders", "smes16"]) == 2
    assert "expected" in capsys.readouterr().err


def test_a_missing_peer_is_an_error_that_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main([], peers={"no_such_module": "no-such-package"}) == 2

    message = capsys.readouterr().err
    assert "no-such-package" in message
    assert "make bench" in message


@pytest.mark.parametrize(
    ("module", "build"),
    [
        ("torch_rechub", lambda data: speed_peers.rechub_mmoe(2, FAST, data)),
        ("torch_rechub", lambda data: speed_peers.rechub_ple(FAST, data)),
        ("deepctr_torch", lambda data: speed_peers.deepctr_mmoe(2, FAST, data)),
    ],
    ids=["rechub_mmoe", "rechub_ple", "deepctr_mmoe"],
)
def test_a_peer_learns_and_scores(module: str, build: Callable[[Data], Contender], data: Data) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{speed_peers.PEER_MODULES[module]} is not installed")
    torch.manual_seed(0)
    contender = build(replace(data, batches=data.batches[:1]))
    losses = [contender.train(n) for n in range(60)]
    assert isinstance(losses[0], float)
    assert isinstance(losses[-1], float)
    assert losses[-1] < 0.8 * losses[0]
    scores = contender.score()
    assert isinstance(scores, torch.Tensor)
    assert scores.shape == (SMALL.candidates, SMALL.num_tasks)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert contender.parameters > 2 * (16 * 8 + 8 * 8)
