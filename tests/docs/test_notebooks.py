"""The notebooks run, and print what they were saved with."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_read: Any = nbformat.read
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the kernel's client
]


def printed(cell: Any) -> str:
    """A cell's outputs as text without numbers; they differ between machines in their last digits."""
    texts = []
    for output in cell.get("outputs", []):
        assert output["output_type"] != "error", output.get("traceback")
        texts.append(output.get("text") or output["data"].get("text/plain", ""))
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.,]*(e[-+]\d+)?", "0", "".join(texts)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_was_saved_with(path: Path, tmp_path: Path) -> None:
    saved: Any = _read(path, as_version=4)
    run: Any = _read(path, as_version=4)

    NotebookClient(run, timeout=110, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

    for before, after in zip(saved["cells"], run["cells"], strict=True):
        assert printed(before) == printed(after), before["source"]
    assert sum(bool(printed(cell)) for cell in saved["cells"]) >= 4


def test_there_are_two_notebooks_and_their_links_lead_somewhere() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["snapshot_to_scores", "table_to_ranker"]
    for path in NOTEBOOKS:
        notebook: Any = _read(path, as_version=4)
        text = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
        assert len(targets) >= 1
        assert [target for target in targets if not (path.parent / target).exists()] == []
