"""Secrets are read from their places; values of a configuration are shown without the passwords that they may hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smes_io.secrets import SecretError, SecretPlace, shown

SECRET = "s3/c#r:e@t'"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("event_log.redis_url", f"redis://:{SECRET}@host:6379/0"),
        ("event_log.redis_url", [f"redis://user:{SECRET}@host:6379/0"]),
        ("event_log.redis_url", f"redis://host:6379/0?password={SECRET}"),
        ("event_log.kafka_bootstrap", f"user:{SECRET}@host:9092,host2:9092"),
        ("event_log.kafka.sasl_plain", SECRET),
        ("event_log.kafka.PASSWORD", SECRET),
        ("event_log.kafka_access.pasword", SECRET),
        ("scorer.tokens.path", SECRET),
        ("event_log.kafka_access.password.0", SECRET),
        ("redis", {"host": "host", "password": SECRET}),
        ("redis", {"auth": {"user": "host", "token": SECRET}}),
    ],
)
def test_a_password_is_hidden_and_the_rest_is_shown(key: str, value: Any) -> None:
    said = shown(key, value)

    assert "***" in said
    assert not any(part in said for part in ("s3", "c#r", "e@t", repr(SECRET)))
    assert "host" in said or value == SECRET


@pytest.mark.parametrize("value", ["redis://host:6379/0", "host:9092,host2:9092", 3, None, "12:30", [8, 16], {"a": 1}])
def test_a_value_without_one_is_shown_as_it_is(value: Any) -> None:
    assert shown("event_log.redis_url", value) == repr(value)


@pytest.mark.parametrize("content", [b"s3cret", b"s3cret\n", b"s3cret\r\n"])
def test_a_file_holds_the_secret_and_perhaps_a_line_end(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)

    assert SecretPlace(file=path).read() == "s3cret"


def test_spaces_and_further_line_ends_are_part_of_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b" s3 cret \n\n")

    assert SecretPlace(file=path).read() == " s3 cret \n"


def test_a_secret_is_read_anew_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    places = [SecretPlace(file=path), SecretPlace(env="A_SECRET")]
    for value in ("first", "second"):
        path.write_text(value)
        monkeypatch.setenv("A_SECRET", value)
        assert [place.read() for place in places] == [value, value]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"file .*secret: cannot be read: No such file or directory"),
        (lambda path: path.mkdir(), r"file .*secret: cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b""), r"file .*secret: empty, expected a secret"),
        (lambda path: path.write_bytes(b"\n"), r"file .*secret: empty, expected a secret"),
        (lambda path: path.write_bytes(b"s3cret\xff"), r"file .*secret: expected text in UTF-8"),
        (lambda path: path.write_bytes(b"s3cret" * 20_000), r"file .*secret: over 65536 bytes, expected a secret"),
    ],
    ids=["none", "folder", "empty", "line end", "no UTF-8", "too long"],
)
def test_a_file_without_a_secret_is_named_and_not_quoted(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "secret"
    make(path)

    with pytest.raises(SecretError, match=message) as error:
        SecretPlace(file=path).read()
    assert "s3cret" not in str(error.value)
    assert "s3cret" not in repr(error.value.__cause__)


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(SecretError, match="environment variable NO_SUCH_VARIABLE: not set, expected a secret"):
        SecretPlace(env="NO_SUCH_VARIABLE").read()


@pytest.mark.parametrize("arguments", [{}, {"file": Path("a"), "env": "B"}])
def test_a_secret_has_one_place(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected one of file and env: the place of a secret, not the secret itself"):
        SecretPlace(**arguments)
