"""The folder of checkpoints: order by sequence number, checksums, what is kept, and who may use it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smes.arrays import Arrays
from smes.errors import CheckpointError
from smes.schema import Schema, Task
from trainer.checkpoint_file import Checkpoint
from trainer.checkpoints import LOCK, CheckpointDirectory

SCHEMA, MODEL = Schema("kept", tasks=(Task("click"),)), {"ranker": "linear"}
_HOUR_NS = 3_600_000_000_000


def checkpoint(step: int, lineage: str = "a") -> Checkpoint:
    weights = np.arange(40, dtype=np.float32) + step
    arrays: Arrays = {"learner.weights": weights, "stream.empty": np.zeros((0, 3), np.int64)}
    return Checkpoint(lineage, step, SCHEMA.to_dict(), SCHEMA.hash, MODEL, arrays)


def newest(directory: CheckpointDirectory) -> Checkpoint:
    found = directory.newest(schema=SCHEMA, model=MODEL)
    assert found is not None
    return found


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints, in the order of their sequence numbers."""
    parts = [path.stem.split("-") for path in folder.glob("*.safetensors")]
    return [int(step) for _, step, _ in sorted(parts, key=lambda part: part[2])]


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    saved = checkpoint(7, "a.b")
    CheckpointDirectory(tmp_path, keep=2).save(saved)

    found = newest(CheckpointDirectory(tmp_path, keep=2))

    assert (found.lineage, found.step, found.schema_hash, found.model) == ("a.b", 7, SCHEMA.hash, MODEL)
    assert found.arrays.keys() == saved.arrays.keys()
    for name, array in saved.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


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

    with pytest.raises(
        CheckpointError, match=r"none can be read: step-0.*002-0.*1\.safetensors \(checksum of array le"
    ):
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
