"""The page "Start" as a person follows it, with a shorter log; the installation is what made this environment."""

import json
from pathlib import Path

import pytest

from smes_cli.__main__ import run
from tests.docs.session import assert_prints, follow

Captured = pytest.CaptureFixture[str]
DEMO = "smes demo --keep run --stay\n"
_MEANWHILE = """{demo} --limit 1500 > demo.txt 2>&1 &
until grep -q "everything stays up" demo.txt; do kill -0 %1; sleep 0.2; done
cat demo.txt
"""
REQUEST = """-d '{"user_id": 7, "items": [9, 10], "context": {"tab": 1, "device": 2}}' | python -m json.tool\n"""
_BROWSER = """page=$(python -c "import json; print(json.load(open('run/addresses.json'))['console'].split('/#')[0])")
curl -sf $page/ > page.html
curl -sf $page/api/learning > learning.json
kill -INT %1
wait %1
"""


def test_a_second_demo_in_the_same_folder_is_refused_in_a_line(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    assert run(["demo", "--keep", str(tmp_path / "run"), "--stay"]) == 2

    assert "run: expected a new or an empty folder" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


@pytest.mark.timeout(180)
def test_the_page_as_a_person_follows_it(tmp_path: Path) -> None:
    changes = {DEMO: _MEANWHILE.format(demo=DEMO.strip()), REQUEST: REQUEST + _BROWSER}

    demo, curve, score = follow("docs/start.md", tmp_path, changes, within_s=150)

    for block in (demo, curve, score):
        assert_prints(block)
    assert json.loads(score.printed)["ranking"] in ([9, 10], [10, 9])
    assert "conservation: every event that was appended is accounted for" in (tmp_path / "demo.txt").read_text()
    # The learning curve that the browser draws.
    curves = json.loads((tmp_path / "learning.json").read_text())
    assert "click" in [task["name"] for task in curves["tasks"]]
    assert "<script" in (tmp_path / "page.html").read_text()
