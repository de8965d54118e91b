"""The folder of checkpoints: order by sequence number, checksums, what is kept, and who may use it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from smes.arrays import Arrays
from smes.errors import CheckpointError
from smes.model.deltas import StateArray, whole
from smes.schema import Schema, Task
from trainer.checkpoint_file import Checkpoint, CheckpointView
from trainer.checkpoint_writer import CheckpointWriter
from trainer.checkpoints import LOCK, CheckpointDirectory

SCHEMA, MODEL = Schema("kept", tasks=(Task("click"),)), {"ranker": "linear"}
_HOUR_NS = 3_600_000_000_000


def state(step: int) -> Arrays:
    return {
        "learner.weights": np.arange(40, dtype=np.float32) + step,
        "learner.flags": np.array([True, False, True]),
        "learner.count": np.array(step),
        "stream.empty": np.zeros((0, 3), np.int64),
    }


def checkpoint(step: int, lineage: str = "a") -> CheckpointView:
    arrays = {name: whole(array) for name, array in state(step).items()}
    return CheckpointView(lineage, step, SCHEMA.to_dict(), SCHEMA.hash, MODEL, arrays)


def newest(directory: CheckpointDirectory) -> Checkpoint:
    found = directory.newest(schema=SCHEMA, model=MODEL)
    assert found is not None
    return found


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints, in the order of their sequence numbers."""
    parts = [path.stem.split("-") for path in folder.glob("*.safetensors")]
    return [int(step) for _, step, _ in sorted(parts, key=lambda part: part[2])]


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    CheckpointDirectory(tmp_path, keep=2).save(checkpoint(7, "a.b"))

    found = newest(CheckpointDirectory(tmp_path, keep=2))

    assert (found.lineage, found.step, found.schema_hash, found.model) == ("a.b", 7, SCHEMA.hash, MODEL)
    assert found.arrays.keys() == state(7).keys()
    for name, array in state(7).items():
        assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found.arrays[name], array)


def test_arrays_in_pieces_are_read_back_whole_and_another_reader_agrees(tmp_path: Path) -> None:
    rows = np.arange(1_000_000, dtype=np.float32).reshape(-1, 10)
    parts = StateArray(rows.dtype, rows.shape, lambda: iter(np.split(rows, [1, 7, 7, 60_000])))
    closed = []
    view = replace(
        checkpoint(1), arrays={**checkpoint(1).arrays, "learner.rows": parts}, close=lambda: closed.append(1)
    )

    path = CheckpointDirectory(tmp_path, keep=2).save(view)

    assert closed == [1]
    np.testing.assert_array_equal(newest(CheckpointDirectory(tmp_path, keep=2)).arrays["learner.rows"], rows)
    with safe_open(path, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("learner.rows"), rows)


def test_training_may_change_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array that is mapped from the file is the reader's own: the file stays as it was."""
    monkeypatch.setattr("trainer.checkpoint_file._LARGE_BYTES", 1)
    CheckpointDirectory(tmp_path, keep=2).save(checkpoint(1))
    found = newest(CheckpointDirectory(tmp_path, keep=2))

    found.arrays["learner.weights"] += 1

    np.testing.assert_array_equal(found.arrays["learner.weights"], state(2)["learner.weights"])
    np.testing.assert_array_equal(
        newest(CheckpointDirectory(tmp_path, keep=2)).arrays["learner.weights"], state(1)["learner.weights"]
    )


def test_what_is_written_beside_the_training_is_of_one_moment_and_one_at_a_time(tmp_path: Path) -> None:
    writer = CheckpointWriter(CheckpointDirectory(tmp_path, keep=5))
    go_on, saved = threading.Event(), []

    def slow() -> Iterator[NDArray[Any]]:
        assert go_on.wait(60)
        yield state(1)["learner.weights"]

    first = checkpoint(1)
    held = StateArray(np.dtype(np.float32), (40,), slow)
    writer.start(replace(first, arrays={**first.arrays, "learner.weights": held}), lambda: saved.append(1))

    assert writer.is_busy
    assert steps(tmp_path) == []
    second = threading.Thread(target=writer.write, args=[checkpoint(2), lambda: saved.append(2)])
    second.start()
    go_on.set()
    second.join(60)

    assert saved == [1, 2]
    assert steps(tmp_path) == [1, 2]
    assert not writer.is_busy


def test_a_disk_that_refuses_is_logged_and_the_view_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CheckpointWriter(CheckpointDirectory(tmp_path / "folder", keep=2))
    (tmp_path / "folder").rmdir()
    closed: list[int] = []

    writer.start(replace(checkpoint(3), close=lambda: closed.append(3)), lambda: closed.append(0))
    writer.wait()

    assert closed == [3]
    assert "not written: No such file or directory; the checkpoint before it stays valid" in caplog.text


def test_what_goes_wrong_beside_the_training_is_logged_whatever_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def pieces() -> Iterator[NDArray[Any]]:
        raise MemoryError("no room for a block")

    directory = CheckpointDirectory(tmp_path, keep=2)
    writer, saved, closed = CheckpointWriter(directory), [], []
    failing = replace(
        checkpoint(1),
        arrays={"learner.rows": StateArray(np.dtype(np.float32), (7,), pieces)},
        close=lambda: closed.append(1),
    )

    writer.start(failing, lambda: saved.append(1))
    writer.wait()

    assert (saved, closed, list(tmp_path.iterdir())) == ([], [1], [])
    assert "MemoryError: no room for a block" in caplog.text
    assert "; the checkpoint before it stays valid" in caplog.text


def test_a_folder_that_cannot_be_listed_closes_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def glob(path: Path, pattern: str) -> Iterator[Path]:
        raise OSError(5, "Input/output error")

    directory, closed = CheckpointDirectory(tmp_path, keep=2), []
    monkeypatch.setattr(Path, "glob", glob)

    with pytest.raises(CheckpointError, match="not written: Input/output error"):
        directory.save(replace(checkpoint(1), close=lambda: closed.append(1)))

    assert closed == [1]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_with_the_clock_set_back_the_newest_is_kept_and_read(keep: int, tmp_path: Path) -> None:
    """Each file looks an hour older than the one before it; a fork of the lineage also counts its steps anew."""
    directory = CheckpointDirectory(tmp_path, keep)
    for i, step in enumerate([50, 51, 52, 9, 10]):
        path = directory.save(checkpoint(step))
        assert path.exists(), "a save must not remove its own file"
        os.utime(path, ns=(10**18 - i * _HOUR_NS, 10**18 - i * _HOUR_NS))

    assert steps(tmp_path) == [50, 51, 52, 9, 10][-keep:]
    assert newest(CheckpointDirectory(tmp_path, keep)).step == 10


def test_sequence_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    CheckpointDirectory(tmp_path, keep=3).save(checkpoint(5))
    CheckpointDirectory(tmp_path, keep=3).save(checkpoint(4))

    assert steps(tmp_path) == [5, 4]
    assert newest(CheckpointDirectory(tmp_path, keep=3)).step == 4


def test_every_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    directory.save(checkpoint(1))
    path = directory.save(checkpoint(2))
    content = path.read_bytes()

    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        caplog.clear()
        assert newest(directory).step == 1, f"byte {at} of {len(content)}"
        assert f"checkpoint {path} is damaged, trying the one before it" in caplog.text


def test_the_damaged_array_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = CheckpointDirectory(tmp_path, keep=2).save(checkpoint(2))
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"none can be read: step-0.*002-0.*1\.safetensors \(checksum of array "):
        newest(CheckpointDirectory(tmp_path, keep=2))


def test_a_checkpoint_under_the_name_of_another_one_is_refused(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    path = directory.save(checkpoint(2))
    path.rename(path.with_name("step-000000000002-00000009.safetensors"))

    with pytest.raises(CheckpointError, match=r"sequence number in the name: 9, expected 1"):
        newest(directory)


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path: Path) -> None:
    first = CheckpointDirectory(tmp_path, keep=2)
    first.save(checkpoint(1))
    first.save(checkpoint(2)).write_bytes(b"damaged")
    directory = CheckpointDirectory(tmp_path, keep=2)
    assert newest(directory).step == 1

    directory.save(checkpoint(3))
    assert steps(tmp_path) == [1, 2, 3]

    directory.save(checkpoint(4))
    assert steps(tmp_path) == [3, 4]


def test_what_a_killed_trainer_left_half_written_is_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "step-000000000009-00000009.partial").write_bytes(b"half")

    with CheckpointDirectory(tmp_path, keep=2).locked():
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_second_holder_of_the_folder_is_told_who_holds_it(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path, keep=2).locked():
        second = CheckpointDirectory(tmp_path, keep=2)
        with pytest.raises(CheckpointError, match=rf"held by process {os.getpid()} on .* since 20"), second.locked():
            raise AssertionError("not reached")


@pytest.mark.parametrize("text", ["", "junk", "[]", '{"pid": 1, "host": "h", "since": "2020-01-01"}'])
def test_a_lock_file_that_nobody_holds_is_taken_over(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)

    with CheckpointDirectory(tmp_path, keep=2).locked():
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    with CheckpointDirectory(tmp_path, keep=2).locked():
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, trainer.checkpoints as c\n"
        "with c.CheckpointDirectory(pathlib.Path(sys.argv[1]), 2).locked():\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError, match=f"held by process {process.pid}"):
            CheckpointDirectory(tmp_path, keep=2).locked().__enter__()
        process.kill()
        process.wait(60)

    with CheckpointDirectory(tmp_path, keep=2).locked():
        pass
