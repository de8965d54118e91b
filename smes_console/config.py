"""Configuration of the console: where it listens, who may act, and what it shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from smes.ranges import check_ranges
from smes_io.secrets import SecretPlace


@dataclass(frozen=True)
class ConsoleConfig:
    """The page of ``smes console``.

    Attributes:
        host: Address to listen on.
        port: TCP port, 0 for any free one.
        hosts: Further names by which browsers reach the console, such as that of a proxy before it. A request for
            another name than these, ``host``, an IP address or ``localhost`` is refused: it may be a page of somebody
            else whose name was made to lead here (DNS rebinding).
        tokens: Where the bearer tokens are that a browser must show to change something, as for ``scorer.tokens``.
            Null: a new one is made at each start, and printed in the console's address.
        private: Whether reading needs a token, too.
        trainer_url: Base URL of the trainer. Null: ``trainer.http.host`` and ``port``, if it has a port.
        scorer_url: Base URL of the scorer. Null: ``scorer.host`` and ``port``.
        trainer_token: Where the token is that the trainer wants. Null: the first of ``trainer.http.tokens``.
        scorer_token: Where the token is that the scorer wants. Null: the first of ``scorer.tokens``.
        history: Folder of a run's metrics over time, for what the trainer is not asked for. Null:
            ``trainer.history.directory``.
        baseline: Folders of other runs' metrics over time, to compare with, each ``name=DIR`` or ``DIR``.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8080
    hosts: tuple[str, ...] = ()
    tokens: SecretPlace | None = None
    private: bool = False
    trainer_url: str | None = None
    scorer_url: str | None = None
    trainer_token: SecretPlace | None = None
    scorer_token: SecretPlace | None = None
    history: Path | None = None
    baseline: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("trainer_url", "scorer_url"):
            url = getattr(self, name)
            if url is not None and not url.lower().startswith(("http://", "https://")):
                raise ValueError(f"ConsoleConfig.{name}: {url!r}, expected http://HOST:PORT or https://HOST:PORT")
