"""``smes check``: read a log once, print its ledger, and say whether it can be trained on."""

from pathlib import Path

from simulators.logs.ledger import LogLedger, problems
from simulators.logs.reader import open_log
from smes.errors import LogError
from smes_cli.config import Config
from smes_cli.console import console, write_report
from smes_cli.log_tables import print_ledger
from smes_io.clock import wall_clock_ms


def run_check(
    config: Config, log: Path, *, limit: int | None, max_rejected: float | None, report: Path | None
) -> LogLedger:
    """Print the ledger of a log; nothing is trained or appended.

    Args:
        config: Its schema is used.
        log: A folder or file; see :func:`simulators.logs.reader.open_log`.
        limit: Only the first so many impressions; rows are counted in the whole log.
        max_rejected: Largest share of unusable rows; None: the schema file's.
        report: Where to write the ledger as JSON, if anywhere. It is written whether or not the log is fit.

    Raises:
        LogError: The log cannot be read as its schema file says, or its ledger shows that it is unfit.
    """
    schema_file = config.schema_file(log)
    with open_log(log, schema_file, limit=limit, max_rejected=max_rejected) as reader:
        ledger = reader.ledger
        found = problems(ledger, max_rejected=reader.max_rejected, now_ms=wall_clock_ms())
    write_report(ledger.to_dict() | {"problems": found}, report)
    print_ledger(ledger, every_column=True)
    if found:
        raise LogError("; ".join(found))
    console.print("the log is fit to be trained on", highlight=False)
    return ledger
