"""The metrics over time: their lines add up to the report, outlive kills, stay bounded, and change no training."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smes.errors import SmesError
from smes_cli.curves_tensorboard import write_tensorboard
from smes_cli.seen import write_history
from stream.log.memory_log import InMemoryLog
from tests.trainer.small_world import fill, make_trainer, open_log, train_to_the_end
from trainer.config import HistoryConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.history import HistoryFiles, read_history
from trainer.loop import Trainer
from trainer.stretches import Stretches

# Of the moment of writing, or of the process.
_PASSING = ("wall_ms", "lineage", "rows", "experts", "lag")
LINE: dict[str, Any] = {
    "stretch": 0,
    "step": 1,
    "lineage": "root",
    "tasks": {},
    "wall_ms": 0,
    "event_time_ms": None,
    "impressions": 0,
    "trained": 0,
    "experts": {},
    "rows": {},
    "lag": None,
}


@pytest.fixture(scope="module")
def log() -> InMemoryLog:
    """4,000 impressions."""
    torch.set_num_threads(1)
    log = open_log()
    fill(log, 4000)
    return log


def make(log: InMemoryLog, checkpoints: Path | None) -> tuple[Trainer, Stretches]:
    made: list[Stretches] = []

    def over_time(evaluation: ProgressiveEvaluation) -> Stretches:
        made.append(Stretches(evaluation, every_examples=300))
        return made[0]

    return make_trainer(log, checkpoints, over_time=over_time), made[0]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in _PASSING} for line in read_history(folder)]


@pytest.fixture(scope="module")
def never_killed(log: InMemoryLog, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Stretches, Path]:
    """A trainer that has trained on everything, and its history."""
    folder = tmp_path_factory.mktemp("never_killed")
    trainer, stretches = make(log, None)
    write_history(HistoryConfig(), folder, trainer, stretches)
    train_to_the_end(trainer)
    trainer.settle()
    stretches.end()
    return trainer, stretches, folder


def test_killed_anywhere_the_lines_are_those_of_one_never_killed(
    log: InMemoryLog, never_killed: tuple[Trainer, Stretches, Path], tmp_path: Path
) -> None:
    wanted = lines_of(never_killed[2])
    assert sum(line["windows"] for line in wanted) > 1
    assert len(wanted) > 6

    chance, lives = random.Random(3), 0
    while True:
        lives += 1
        trainer, stretches = make(log, tmp_path / "checkpoints")
        trainer.restore()
        trainer.checkpoint()
        write_history(HistoryConfig(keep=8), tmp_path / "history", trainer, stretches)
        write_tensorboard(tmp_path / "board", read_history(tmp_path / "history"))  # and again after the next death
        killed = False
        while not killed and (trainer.step() or trainer.stream.poll(0)):
            if chance.random() < 0.25:
                trainer.checkpoint()
            killed = chance.random() < 0.05
        if not killed:
            break
    trainer.settle()
    stretches.end()

    assert lives > 2
    (root,) = write_tensorboard(tmp_path / "board", read_history(tmp_path / "history"))
    board = EventAccumulator(str(tmp_path / "board" / root)).Reload()
    figures: dict[str, Callable[[dict[str, Any]], Any]] = {
        "auc/click": lambda line: line["tasks"]["click"]["auc"],
        "run/trained": lambda line: line["trained"],
    }
    for tag, of in figures.items():
        shown = [(each.step, each.value, each.wall_time) for each in board.Scalars(tag)]
        lines = [line for line in read_history(tmp_path / "history") if of(line) is not None]
        assert [step for step, _, _ in shown] == [line["step"] for line in lines]
        np.testing.assert_allclose([value for _, value, _ in shown], [of(line) for line in lines], rtol=1e-6)
        assert [at for _, _, at in shown] == [line["wall_ms"] / 1000 for line in lines]
    got = lines_of(tmp_path / "history")
    assert got == wanted[-len(got) :]
    assert 8 <= len(got) <= 10, "eight, and less than the oldest file of two"
    assert [line["stretch"] for line in wanted] == list(range(len(wanted)))


def test_lines_add_up_to_the_report(never_killed: tuple[Trainer, Stretches, Path]) -> None:
    trainer, _, folder = never_killed
    lines, report = lines_of(folder), trainer.evaluation.report()

    assert sum(line["impressions"] for line in lines) == trainer.trained == lines[-1]["trained"]
    for name, metrics in report.items():
        tasks = [line["tasks"][name] for line in lines]
        assert sum(task["examples"] for task in tasks) == metrics.examples
        assert sum(task["positives"] for task in tasks) == metrics.positives
        if metrics.gauc_windowed is not None:
            ranked = [(task["ranked"], task["gauc_windowed"]) for task in tasks if task["ranked"]]
            mean = sum(n * gauc for n, gauc in ranked) / sum(n for n, _ in ranked)
            assert mean == pytest.approx(metrics.gauc_windowed, abs=1e-12)
            # Σ prediction = calibration · Σ label, of each stretch and of the run.
            predicted = sum(task["calibration"] * task["positives"] for task in tasks)
            assert predicted == pytest.approx((metrics.calibration or 0) * metrics.positives)
        else:
            assert sum(task["mae"] * task["examples"] for task in tasks) == pytest.approx(
                (metrics.mae or 0) * metrics.examples
            )


def test_the_training_is_the_same_without(log: InMemoryLog, never_killed: tuple[Trainer, Stretches, Path]) -> None:
    watched, plain = never_killed[0], make_trainer(log, None)

    train_to_the_end(plain)
    plain.settle()

    assert plain.evaluation.report() == watched.evaluation.report()
    state = plain.learner.state()
    assert all(torch.equal(state[name], tensor) for name, tensor in watched.learner.state().items())


def test_other_runs_stay_and_torn_lines_go(tmp_path: Path) -> None:
    files = HistoryFiles(tmp_path, keep=100)
    files.begin("other", 0, None)
    for lineage, step, stretch in (
        ("other", 9, 0),
        ("root", 3, 0),
        ("root.fork", 5, 1),
        ("root", 5, 2),
        ("root", 8, 3),
    ):
        files.append({**LINE, "lineage": lineage, "step": step, "stretch": stretch})
    with (tmp_path / "history-000001.jsonl").open("a") as file:
        for name in ("lineage", "step", "stretch", "tasks"):
            file.write(json.dumps({**LINE, name: None}) + "\n")
        file.write('{"lineage": "ro')

    again = HistoryFiles(tmp_path, keep=100)
    again.begin("root.another", 5, 2)
    again.append({**LINE, "lineage": "root.another", "step": 6, "stretch": 2})

    assert [(line["lineage"], line["step"]) for line in read_history(tmp_path)] == [
        ("other", 9),
        ("root", 3),
        ("root.fork", 5),
        ("root.another", 6),
    ]
    assert all(json.loads(line) for path in tmp_path.iterdir() for line in path.read_text().splitlines())


def test_a_line_that_lacks_what_readers_need_is_none(tmp_path: Path) -> None:
    files = HistoryFiles(tmp_path, keep=100)
    for line in (LINE, *({k: v for k, v in LINE.items() if k != name} for name in LINE)):
        files.append(line)
    assert list(read_history(tmp_path)) == [LINE]


def test_tensorboard_that_is_not_there_and_names_that_are_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SmesError, match="a line of lineage '/etc': expected a name of letters and digits"):
        write_tensorboard(tmp_path, [{"lineage": "/etc"}])
    for name in list(sys.modules):
        if name.partition(".")[0] == "tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SmesError, match=r"not installed .*, expected: pip install 'smes-online\[tensorboard\]'"):
        write_tensorboard(tmp_path, [])


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SmesError, match=r"no such folder, expected one of trainer\.history\.directory or --history"):
        list(read_history(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(SmesError, match="cannot be created"):
        HistoryFiles(tmp_path / "file" / "below", keep=1)
