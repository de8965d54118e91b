"""What ``smes train --examples`` reads in place of the topics of events."""

from smes_cli.config import Config
from smes_cli.schema_changes import declared_changes
from stream.batch_journal import BatchJournal
from stream.dead_letters import DeadLetterWriter
from stream.joined.joined_stream import JoinedStream
from stream.log.event_log import EventLog
from stream.topics import EXAMPLES, IMPRESSIONS


def open_joined(config: Config, log: EventLog, letters: DeadLetterWriter, journal: BatchJournal | None) -> JoinedStream:
    """The stream of joined examples; the topic is made where it is not there yet."""
    log.ensure_topic(EXAMPLES, log.partitions(IMPRESSIONS), exact=False)
    schema = config.schema_file().schema
    return JoinedStream(schema, config.stream, log, letters, changes=declared_changes(config), journal=journal)


def require_trainable_on_examples(*, ranks: int, from_folder: bool, change_schema: bool) -> None:
    """Check that a training on joined examples can begin.

    Raises:
        ValueError: It cannot; the message says which option is in the way.
    """
    if ranks > 1:
        raise ValueError(f"--examples: {ranks} ranks, expected one; several ranks join themselves (without --examples)")
    if from_folder:
        raise ValueError("--examples --from: expected at most one of the two: a log in files primes a join, too")
    if change_schema:
        raise ValueError(
            "--examples --change-schema: expected at most one of the two: a checkpoint on joined examples is not "
            "carried over; begin with --from-snapshot or --anew in another folder"
        )
