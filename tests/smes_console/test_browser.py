"""The console in a real browser beside a running demo: every page shows what the report and the store say.

And one can act by it, with the token alone, with the keyboard alone, and on a phone. Every test also checks that no
script failed, nothing was written to the browser's console, and nothing was asked of another host.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from feature_store.snapshots import SnapshotStore
from smes.schema import Schema
from smes_cli.config import Config, load_config
from smes_cli.snapshot_places import snapshot_store
from smes_cli.status import deployment_status
from stream.codec.codec import decode, encode_impressions
from stream.dead_letter_reading import StoredLetter, read_entries
from stream.log.event_log import OutRecord
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.running import environment, read_json, start_smes, until, until_log_says
from tests.smes_console.browsing import PAGES, TITLES, Tab, chromium, flat, shows, tab

pytestmark = [pytest.mark.xdist_group("console in a browser"), pytest.mark.timeout(240)]
OTHER_SCHEMA = (("codec", b"json"), ("schema", b"0123456789abcdef"))


@dataclass(frozen=True)
class Demo:
    """A demo whose replay is through and that stays up.

    Attributes:
        console: The console's address, with its token.
        scorer: The scorer's base URL.
        report: As the demo wrote it.
        config: Of its processes.
    """

    console: str
    scorer: str
    report: dict[str, Any]
    config: Config

    @property
    def store(self) -> SnapshotStore:
        return snapshot_store(self.config)

    @property
    def schema(self) -> Schema:
        return self.config.schema_file().schema


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    kept = folder / "kept"
    arguments = ("demo", "--stay", "--limit", "3000", "--rate", "3000", "--codec", "json", "--keep", str(kept))
    env = environment(SMES_TRAINER__SNAPSHOT_INTERVAL_S="0.2")  # some versions in so short a time
    process = start_smes(folder / "demo.log", *arguments, env=env)
    until_log_says(folder / "demo.log", "everything stays up", process)
    addresses = read_json(kept / "addresses.json")
    config = load_config(kept / "smes.yaml", {})
    yield Demo(addresses["console"], addresses["scorer"], read_json(kept / "report.json"), config)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, (folder / "demo.log").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser, demo: Demo) -> Iterator[Tab]:
    with tab(browser, demo.console) as opened:
        yield opened


def test_flow_learning_and_experts_show_what_the_report_says(opened: Tab, demo: Demo) -> None:
    report = flat(demo.report)
    # The report has them of callers and at its time; the pages now, while requests go on.
    changing = ("scorer.", "freshness", "snapshots.", "throughput.")
    for page, least in (
        ("flow", {"events.impressions", "events.trained", "feedback.attached", "feedback.received", "rows.in_use"}),
        ("learning", {"headline.dense.auc", "headline.rare.ne", "tasks.click.positives", "tasks.watch_time.xauc"}),
        ("experts", {"active_experts.mean", "active_experts.max", "routing.dead", "routing.load_skew"}),
    ):
        opened.open(page)
        until(lambda: least <= opened.figures().keys(), f"{page}: {least - opened.figures().keys()}", 20)  # noqa: B023

        def differing() -> dict[str, tuple[str, Any]]:
            shown = {name: value for name, value in opened.figures().items() if not name.startswith(changing)}
            both = shown.keys() & report.keys()
            return {name: (shown[name], report[name]) for name in both if not shows(shown[name], report[name])}

        until(lambda: not differing(), f"{page}: the report's figures, not {differing()}", 20)

    opened.open("flow")
    status = deployment_status(demo.config, demo.scorer)
    opened.wait_for("store.version", status["snapshots"]["version"])
    opened.wait_for("scorer.version", status["scorer"]["version"])
    kept = {topic: status["event log"][topic] for topic in (IMPRESSIONS, FEEDBACK)}
    assert {topic: int(opened.figures()[f"log.{topic}.end"]) for topic in kept} == kept


def test_versions_are_those_of_the_store_and_one_is_pinned_and_unpinned(opened: Tab, demo: Demo) -> None:
    page, store = opened.page, demo.store
    listed = store.list()
    opened.open("versions")
    opened.wait_for("versions.count", len(listed))
    for manifest in listed:
        name = f"{manifest.lineage}:{manifest.version}"
        opened.wait_for(f"version:{name}", manifest.version)
        tasks = manifest.metrics["tasks"]
        dense = [each["auc"] for each in tasks.values() if (each["base_rate"] or 0) >= 0.01 and each["base_rate"] < 1]
        shown = opened.figures()[f"auc:{name}"]
        assert (
            shows(shown, None) if not dense or None in dense else float(shown) == pytest.approx(sum(dense) / len(dense))
        )
    newest, older = listed[-1], listed[-3]
    opened.wait_for("versions.serves", f"{newest.lineage}:{newest.version}")

    row = page.locator("tr.selectable", has=page.locator(f"[data-figure='version:{older.lineage}:{older.version}']"))
    row.click()
    opened.wait_for_text(f"Version {older.lineage}:{older.version}")
    page.locator("dialog").get_by_role("button", name="Pin…").click()
    opened.wait_for_text("stay with it, whatever is published")
    assert store.decisions() == ()
    page.get_by_label("Why").fill("the newest looks worse")
    page.get_by_label("Your name").fill("ann")
    page.get_by_role("button", name="Pin it").click()
    opened.wait_for_text("by ann: the newest looks worse")
    opened.wait_for("versions.serves", f"{older.lineage}:{older.version}")
    [decision] = store.decisions()
    assert (decision.action, decision.version, decision.by) == ("pin", older.version, "ann")
    until(lambda: deployment_status(demo.config, demo.scorer)["scorer"]["version"] == older.version, "what is pinned")

    page.get_by_role("button", name="Unpin…").click()
    page.get_by_label("Why").fill("it was not")
    assert page.get_by_label("Your name").input_value() == "ann"
    page.get_by_role("button", name="Unpin", exact=True).click()
    opened.wait_for("versions.serves", f"{newest.lineage}:{newest.version}")
    assert [each.action for each in store.decisions()] == ["pin", "unpin"]


def test_without_the_token_nothing_is_written_and_with_it_it_is(browser: Browser, demo: Demo) -> None:
    address, _, token = demo.console.partition("#token=")
    before = len(demo.store.decisions())
    with tab(browser, address) as opened:
        opened.expected.append("status of 401")  # the browser's own note
        page = opened.page
        opened.open("versions")
        roll_back = page.get_by_role("button", name="Roll back…").first
        roll_back.click()
        page.get_by_label("Token").fill("a-token-of-nobody")
        page.get_by_role("button", name="Use it").click()
        opened.wait_for_text("not, or no longer, accepted")
        page.get_by_role("button", name="Cancel").click()
        assert len(demo.store.decisions()) == before

        roll_back.click()
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Use it").click()
        page.get_by_label("Why").fill("tried")
        page.get_by_label("Your name").fill("bob")
        page.get_by_role("button", name="Roll back", exact=True).click()
        until(lambda: len(demo.store.decisions()) == before + 1, "the decision")
        opened.wait_for_text("✕ rolled back")
    demo.store.operator.unpin(by="the test")


def refuse_some(demo: Demo) -> int:
    """Append events that the trainer refuses; how many of them are of another schema."""
    with closing(open_event_log(demo.config.event_log)) as log:
        ends = log.end(IMPRESSIONS)
        read = log.read({at: max(0, end - 2) for at, end in ends.items()}, max_records=8, timeout_s=5)
        again = decode(read.records, demo.schema).impressions
        again.impression_id[:] += 10**9
        made = encode_impressions(again, demo.schema, "json", len(ends))
        log.append(IMPRESSIONS, [OutRecord(each.value, OTHER_SCHEMA, each.partition) for each in made])
        log.append(FEEDBACK, [OutRecord(b'{"impression_id": 1', (), 0), OutRecord(b"\xff\x00", (), 1)])
    return len(made)


def letters_of(demo: Demo) -> list[StoredLetter]:
    with closing(open_event_log(demo.config.event_log)) as log:
        return [each for each in read_entries(log) if isinstance(each, StoredLetter)]


def test_letters_are_counted_opened_and_replayed(opened: Tab, demo: Demo) -> None:
    page = opened.page
    opened.open("letters")
    opened.wait_for_text("No dead letters")
    fixable = refuse_some(demo)
    opened.wait_for("dead_letters.letters", fixable + 2)
    letters = letters_of(demo)
    assert len(letters) == fixable + 2
    for reason, topic, partition in {(e.letter.code, e.letter.topic, e.letter.partition) for e in letters}:
        same = [e for e in letters if (e.letter.code, e.letter.topic, e.letter.partition) == (reason, topic, partition)]
        opened.wait_for(f"dead_letters.{reason}.{topic}.{partition}", len(same))
    status = deployment_status(demo.config, demo.scorer)
    assert status["dead letters"]["kept"] == fixable + 2

    [broken] = [each for each in letters if each.letter.payload == b"\xff\x00"]
    page.locator("tr.selectable", has_text=broken.place).click()
    opened.wait_for_text(f"Letter {broken.id}")
    opened.wait_for_text("\\xff")
    page.get_by_role("button", name="Close").click()

    page.get_by_role("button", name="Replay all…").click()
    opened.wait_for_text(f"{fixable} would be refused again: schema_mismatch")
    page.get_by_label("Take for the configured schema").check()
    opened.wait_for_text(f"{fixable} would be appended")
    page.get_by_role("button", name="Replay", exact=True).click()
    opened.wait_for_text(f"{fixable} appended")
    opened.wait_for("dead_letters.replayed", fixable)
    opened.open("flow")
    opened.wait_for("events.impressions", demo.report["events"]["impressions"] + 2 * fixable)
    opened.wait_for("events.dead_lettered", fixable)


def test_an_example_of_the_log_is_scored_as_by_the_scorer_itself(opened: Tab, demo: Demo) -> None:
    page = opened.page
    opened.open("try_it")
    page.get_by_role("button", name="Take an example").click()
    until(lambda: page.get_by_label("User").input_value(), "an example")
    page.get_by_role("button", name="Score").click()
    opened.wait_for_text("features found")
    curl = page.locator("pre").inner_text()
    request = json.loads(curl.partition("-d '")[2].rstrip("'"))
    assert request["context"].keys() == {"tab", "device"}
    answer = httpx.post(f"{demo.scorer}/v1/score", json=request).json()
    shown = opened.figures()
    assert shown["answer.version"] == f"{answer['lineage']}:{answer['version']}"
    for item in answer["items"]:
        for task, score in item["scores"].items():
            assert float(shown[f"score:{item['item_id']}:{task}"]) == score
    assert {name: value for name, value in shown.items() if value == "missing"} == {}
    assert shown["feature:item:item_category"] == "store"
    explained = httpx.post(f"{demo.scorer}/v1/explain", json=request).json()
    first = next(each for each in explained["items"] if each["item_id"] == explained["ranking"][0])
    for task, weights in first["experts"].items():
        said = page.locator(f"[data-figure='experts:{task}']").inner_text()
        assert [f"{expert} · {weight * 100:.0f} %" for expert, weight in weights] == said.splitlines()

    # 64 bits arrive as they were typed; what is not known is missing.
    page.get_by_label("User").fill("9007199254740993")
    page.get_by_label("Items").fill("a-17, 3")
    page.get_by_role("button", name="Score").click()
    opened.wait_for_text("a-17")
    opened.wait_for_text("9007199254740993")
    opened.wait_for("feature:user:user_country", "missing")
    opened.expected.append("status of 422")
    page.get_by_label("Items").fill("1 2 " * 30)
    page.get_by_role("button", name="Score").click()
    opened.wait_for_text("expected at most 50")


_UNREACHED = """() => [...document.querySelectorAll('a, button, input, select, textarea, summary, [tabindex]')]
    .filter(e => !e.disabled && e.tabIndex >= 0 && e.checkVisibility({visibilityProperty: true}) && !e.dataset.reached)
    .map(e => e.outerHTML.slice(0, 200))"""
_REACH = """() => { const e = document.activeElement; const again = e.dataset.reached; e.dataset.reached = 1;
    const style = getComputedStyle(e);
    return [e === document.body, Boolean(again), style.outlineStyle !== 'none' || style.boxShadow !== 'none'] }"""


@pytest.mark.parametrize("page", PAGES)
def test_every_control_is_reached_by_the_keyboard_and_shows_it(opened: Tab, page: str) -> None:
    opened.page.evaluate("document.activeElement.blur()")
    with opened.opening(page):
        opened.press(str(PAGES.index(page) + 1))
    opened.press("p")  # nothing moves meanwhile
    opened.page.evaluate("() => { document.activeElement.blur(); document.querySelector('.skip').focus() }")
    for _ in range(500):
        at_end, again, visible = opened.page.evaluate(_REACH)
        if at_end or again:
            break
        assert visible, opened.focused()
        opened.press("Tab")
    assert opened.page.evaluate(_UNREACHED) == []


def test_the_keyboard_alone_is_enough(opened: Tab, demo: Demo) -> None:
    page = opened.page
    page.evaluate("document.activeElement.blur()")
    opened.press("Tab")
    assert opened.focused() == "Skip to the page"
    opened.press("?")
    opened.wait_for_text("this list")
    opened.press("Escape")
    for digit, title in enumerate(TITLES, 1):
        opened.press(str(digit))
        page.locator("h1", has_text=title).wait_for()
    opened.press("4")
    page.locator("tr.selectable").first.wait_for()
    page.get_by_label("Metrics of").focus()
    while "selectable" not in (page.evaluate("document.activeElement.className") or ""):
        opened.press("Tab")
    newest = opened.focused()
    opened.press("Enter")
    opened.wait_for_text("To load it")
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    opened.press("Escape")
    assert opened.focused() == newest


def test_nothing_is_wider_than_a_phone(browser: Browser, demo: Demo) -> None:
    with tab(browser, demo.console, width=390) as opened:
        for page in PAGES:
            opened.open(page)
            assert opened.overflow() <= 0, page
        opened.open("versions")
        opened.page.locator("tr.selectable").first.click()
        opened.wait_for_text("To load it")
        box = opened.page.locator("dialog").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


def test_the_scorers_own_page_asks_no_other_host(browser: Browser, demo: Demo) -> None:
    with tab(browser, f"{demo.scorer}/docs") as opened:
        opened.wait_for_text("/v1/explain")
        opened.wait_for_text("/v1/score")
