"""How a training goes: a table on a terminal, a line every few seconds otherwise."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Group
from rich.live import Live
from rich.text import Text

from smes.events import ExampleBlock
from smes_cli.console import console, number
from smes_cli.task_tables import headline_lines, task_tables
from trainer.loop import Trainer
from trainer.observers import Observer, StepFigures
from trainer.report import ledger_line
from trainer.run_report import task_figures
from trainer.task_figures import headline

_TABLE_EVERY_S = 1.0
_LINE_EVERY_S = 5.0


@contextmanager
def show_progress(trainer: Trainer) -> Iterator["TrainProgress"]:
    """An observer that shows how the training goes."""
    if not console.is_terminal or console.quiet:
        yield TrainProgress(trainer, None)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield TrainProgress(trainer, live)


class TrainProgress(Observer):
    """Shows the counts and metrics so far, at most once in a while.

    Args:
        trainer: Whose training.
        live: Where the table is; None: lines are printed.
        monotonic: Seconds of a clock that never goes back.
    """

    def __init__(self, trainer: Trainer, live: Live | None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._trainer, self._live, self._monotonic = trainer, live, monotonic
        self._every_s = _TABLE_EVERY_S if live else _LINE_EVERY_S
        self._last_s, self._last_trained = monotonic(), trainer.trained

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Show if it is time to."""
        self._show_if_due()

    def after_read(self) -> None:
        """Show if it is time to: reads change the counts, too."""
        self._show_if_due()

    def _show_if_due(self) -> None:
        now_s, trainer = self._monotonic(), self._trainer
        if now_s - self._last_s < self._every_s:
            return
        rate = (trainer.trained - self._last_trained) / (now_s - self._last_s)  # since the last time it was shown
        self._last_s, self._last_trained = now_s, trainer.trained
        head = (
            f"step {trainer.learner.step_number:,} · {trainer.trained:,} trained ({rate:,.0f}/s) · "
            f"{trainer.num_rows:,} rows · {ledger_line(trainer.stream.ledger())}"
        )
        tasks = task_figures(trainer.evaluation.report())
        lines = headline_lines(asdict(headline(tasks)))
        if self._live:  # the tables come last: what a low terminal has no room for is their end
            tables = task_tables({name: asdict(task) for name, task in tasks.items()})
            self._live.update(Group(*map(Text, (head, *lines)), *tables), refresh=True)
            return
        aucs = " ".join(f"{name} {number(task.auc, 3)}" for name, task in tasks.items() if task.auc is not None)
        console.print(" · ".join([head, *lines, f"AUC {aucs}"]), highlight=False, soft_wrap=True)
