"""What a demo prints of its result."""

from pathlib import Path

from smes_cli.console import console, errors, report_table, write_report
from smes_cli.demo.demo import DemoResult
from smes_cli.freshness import freshness_table
from smes_cli.task_tables import print_tasks


class Shown:
    """Prints results, the tables once.

    Args:
        report: Where the newest report is written, if anywhere.
    """

    def __init__(self, report: Path | None) -> None:
        self._path, self._tables = report, False

    def all_of(self, result: DemoResult) -> None:
        """Print everything of a result."""
        self._tables = True
        print_tasks(result.report)
        console.print(report_table(result.report))
        if result.report["freshness_ms"]["p50"] is not None:
            console.print(freshness_table(result.report))
        self._checks(result)

    def end(self, result: DemoResult) -> None:
        """Print the last result: what was not printed before."""
        if self._tables:
            self._checks(result)
        else:
            self.all_of(result)

    def _checks(self, result: DemoResult) -> None:
        write_report(result.report, self._path)
        for failure in result.failures:
            errors.print(f"failed: {failure}", style="bold red", highlight=False)
        if not result.failures:
            console.print("conservation: every event that was appended is accounted for", highlight=False)
