"""The part of the newest checkpoint that is about the stream, for commands that look at it beside a trainer."""

from dataclasses import dataclass

from smes.arrays import Arrays, under
from smes.errors import CheckpointError
from smes_cli.config import Config
from trainer.checkpoints import CheckpointDirectory
from trainer.schemas_before import SchemasBefore

_TRIES = 3  # a running trainer may remove what was listed a moment ago


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a checkpoint says of the stream.

    Attributes:
        lineage, step: Which checkpoint it is.
        arrays: The stream's state; names as in :mod:`stream.partition_state`.
        trained, not_finite: Impressions.
        schemas: From which the lineage was carried over.
    """

    lineage: str
    step: int
    arrays: Arrays
    trained: int
    not_finite: int
    schemas: SchemasBefore


def newest_stream_state(config: Config) -> StreamState | None:
    """From the newest checkpoint; None if there is none. The weights are not read.

    Raises:
        SchemaMismatch, CheckpointError: As :meth:`trainer.checkpoints.CheckpointDirectory.newest`.
    """
    directory = config.trainer.checkpoint.directory
    if directory is None or not directory.is_dir():
        return None
    schema, model = config.schema_file().schema, config.model.to_dict()
    for left in reversed(range(_TRIES)):
        folder = CheckpointDirectory(directory, config.trainer.checkpoint.keep)
        try:
            found = folder.newest(schema=schema, model=model, only=("stream.", "trainer."))
        except CheckpointError:
            if not left:
                raise
            continue
        if found is None:
            return None
        trained, not_finite = found.arrays["trainer.trained"].tolist()
        schemas = SchemasBefore.of(found.arrays["trainer.schemas"])
        return StreamState(found.lineage, found.step, under("stream.", found.arrays), trained, not_finite, schemas)
    raise AssertionError("the last try returns or raises")
