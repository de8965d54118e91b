"""Values of a configuration are shown without the passwords that they may hold."""

from typing import Any

import pytest

from smes_io.secrets import shown

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
        ("redis", {"host": "host", "password": SECRET}),
        ("redis", {"auth": {"user": "host", "token": SECRET}}),
    ],
)
def test_a_password_is_hidden_and_the_rest_is_shown(key: str, value: Any) -> None:
    said = shown(key, value)

    assert "***" in said
    assert not any(part in said for part in ("s3", "c#r", "e@t", repr(SECRET)))
    assert "host" in said or key.endswith(("sasl_plain", "PASSWORD"))


@pytest.mark.parametrize("value", ["redis://host:6379/0", "host:9092,host2:9092", 3, None, "12:30", [8, 16], {"a": 1}])
def test_a_value_without_one_is_shown_as_it_is(value: Any) -> None:
    assert shown("event_log.redis_url", value) == repr(value)
