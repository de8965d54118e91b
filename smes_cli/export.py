"""``smes export``: a folder with one version, that scores without a store or a server."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smes.errors import SmesError
from smes_cli.command_line import SchemaOfEvents, config_of
from smes_cli.console import console, number
from smes_cli.snapshot_places import CheckpointOption, Lineage, VersionOption

if TYPE_CHECKING:
    from smes_cli.frozen_version import FrozenVersion

_SAMPLE_ROWS = 4096


def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet, or be empty.")],
    version: VersionOption = None,
    lineage: Lineage = None,
    checkpoint: CheckpointOption = None,
    schema: SchemaOfEvents = None,
) -> None:
    """Write one version as a folder: weights, schema, score.py, and the dense part by torch.export, checked equal."""
    config = config_of(context, schema)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already, expected an empty folder or none")
    from smes_cli.frozen_version import frozen_version

    frozen = frozen_version(config, version, lineage, checkpoint)
    console.print(f"export: {frozen.source}; writes it, and checks what was written", highlight=False, soft_wrap=True)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_export(partial, frozen)
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
    except OSError as error:
        raise SmesError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"{frozen.source} in {folder}:", highlight=False, soft_wrap=True)
    for path in sorted(folder.iterdir()):
        console.print(f"  {path.name}  {number(path.stat().st_size)} bytes", highlight=False)


def write_export(folder: Path, frozen: "FrozenVersion") -> None:
    """Write the files of a version into an empty folder, and check them.

    ================== =======================================================================================
    model.safetensors  the weights: ``dense.*``, ``table.keys``, ``table.embedding``, ``table.wide``
    schema.json        :meth:`smes.schema.Schema.to_dict`
    model.json         :meth:`smes.model.config.ModelConfig.to_dict`
    version.json       lineage, version and the schema's hash
    score.py           scores rows with these
    dense.pt2          the dense part (:mod:`smes.model.export`)
    ================== =======================================================================================

    Raises:
        SmesError: What was written does not score as the version does, or ``torch.export`` cannot export it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from smes.model.export import export_dense
    from smes.model.serving import ServingModel

    weights = {name: tensor.contiguous() for name, tensor in frozen.tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"lineage": frozen.lineage})
    for name, value in (
        ("schema", frozen.schema.to_dict()),
        ("model", frozen.model.to_dict()),
        ("version", frozen.described()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("exported_score.py"), folder / "score.py")
    again = load_file(folder / "model.safetensors")
    if again.keys() != weights.keys() or not all(torch.equal(again[name], weights[name]) for name in weights):
        raise SmesError(f"{folder / 'model.safetensors'}: read back, its weights are others than those written")
    model = ServingModel.from_state(frozen.schema, frozen.model, again)
    table = {
        name.removeprefix("table."): rows[:_SAMPLE_ROWS]
        for name, rows in again.items()
        if name in ("table.embedding", "table.wide")
    }
    try:
        program = export_dense(model, table)
    except (RuntimeError, ValueError) as error:
        raise SmesError(f"{frozen.source}: its dense part cannot be exported: {error}") from error
    torch.export.save(program, folder / "dense.pt2")
