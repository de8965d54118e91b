"""The journal of batch ends: what a restart reads is what was written before it, up to the first damage."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stream.batch_journal import NAME, BatchJournal


def opened(folder: Path, keep: int = 2) -> BatchJournal:
    return BatchJournal(folder / NAME, keep)


def resumed(folder: Path, ended: int = 0) -> tuple[BatchJournal, list[int]]:
    journal = opened(folder)
    return journal, journal.resume(ended)


def test_a_restart_gets_the_ends_after_its_checkpoint(tmp_path: Path) -> None:
    before = opened(tmp_path)
    for end in (3, 10, 12, 20):
        before.add(end)

    _, ends = resumed(tmp_path, ended=10)

    assert ends == [12, 20]


def test_ends_that_are_repeated_are_not_written_again(tmp_path: Path) -> None:
    before = opened(tmp_path)
    for end in (3, 10, 12):
        before.add(end)
    after, _ = resumed(tmp_path, ended=3)
    for end in (10, 12, 15):
        after.add(end)

    _, ends = resumed(tmp_path)

    assert ends == [3, 10, 12, 15]
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 4


def test_without_a_checkpoint_the_journal_begins_anew(tmp_path: Path) -> None:
    opened(tmp_path).add(3)
    opened(tmp_path).add(2)

    assert resumed(tmp_path)[1] == [2]


def test_no_file_is_an_empty_journal(tmp_path: Path) -> None:
    assert resumed(tmp_path)[1] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text[:-4], [3, 10]),  # the process died while it wrote the last line
        (lambda text: text.replace(b"10 ", b"11 "), [3]),
        (lambda text: text + bytes(40), [3, 10, 12]),  # what a file system may leave after a power cut
        (lambda text: text + text, [3, 10, 12]),
        (lambda text: b"\n" + text, []),
        (lambda text: b"9" * 5000 + b" 00000000\n" + text, []),
    ],
)
def test_reading_stops_at_the_first_damage(
    tmp_path: Path, change: Callable[[bytes], bytes], expected: list[int]
) -> None:
    journal = opened(tmp_path)
    for end in (3, 10, 12):
        journal.add(end)
    path = tmp_path / NAME
    path.write_bytes(change(path.read_bytes()))

    after, ends = resumed(tmp_path)
    after.add(50)

    assert ends == expected
    assert resumed(tmp_path)[1] == [*expected, 50]


def test_damage_is_told_a_line_that_was_cut_off_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = opened(tmp_path)
    for end in (3, 10):
        journal.add(end)
    path = tmp_path / NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    resumed(tmp_path)
    assert caplog.messages == []

    path.write_bytes(whole.replace(b"10 ", b"40 "))
    resumed(tmp_path)

    assert "line 2 is b'40 " in caplog.text
    assert "expected the end of a batch after 3 and its CRC-32" in caplog.text


def test_what_no_kept_checkpoint_repeats_is_removed(tmp_path: Path) -> None:
    journal = opened(tmp_path, keep=2)
    journal.resume(0)
    for end in range(1, 101):
        journal.add(end)
        if end % 10 == 0:
            journal.saved(end - 3)  # batches are ready that were not trained on yet, or the other way round

    journal.add(101)

    assert resumed(tmp_path)[1] == list(range(88, 102))  # the last two checkpoints were of 87 and 97


def test_a_disk_that_refuses_is_told_once_and_loses_no_line_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    journal = opened(folder)
    journal.resume(0)
    journal.add(3)
    journal.add(5)
    assert len(caplog.messages) == 1
    assert "not written: No such file or directory" in caplog.text

    folder.mkdir()
    journal.add(9)

    assert resumed(folder)[1] == [3, 5, 9]
