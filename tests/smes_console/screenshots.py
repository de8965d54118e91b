"""Pictures of every page of the console beside a running demo, for the documentation.

    python -P -m tests.smes_console.screenshots DEMO docs/images

DEMO is the folder of a ``smes demo --stay --keep DEMO``. The pictures are ``console-PAGE-WIDTH.png``, 1280 pixels wide
as a desk has it and 390 as a phone. The demo is changed for them: a version is pinned and unpinned, some events are
refused, and some of these are replayed.
"""

import argparse
import io
import json
from contextlib import closing
from pathlib import Path

from PIL import Image

from smes_cli.config import load_config
from smes_cli.dead_letters import replayer_of
from smes_cli.snapshot_places import snapshot_store
from stream.codec.codec import decode, encode_impressions
from stream.dead_letter_reading import LetterFilter, StoredLetter, read_entries
from stream.log.event_log import EventLog, OutRecord
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.running import until
from tests.smes_console.browsing import PAGES, Tab, chromium, tab

WIDTHS = (1280, 390)


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description="Pictures of every page of the console.")
    parser.add_argument("demo", type=Path, help="Folder of a demo that stays up.")
    parser.add_argument("folder", type=Path, help="Where the pictures go.")
    parser.add_argument("--page", action="append", choices=PAGES, help="Only this page; may be given several times.")
    options = parser.parse_args()
    address = json.loads((options.demo / "addresses.json").read_text())["console"]
    options.folder.mkdir(parents=True, exist_ok=True)
    _give_something_to_see(options.demo)
    with chromium() as browser:
        for width in WIDTHS:
            for page in options.page or PAGES:
                with tab(browser, address, width) as opened:
                    opened.open(page)
                    _fill(opened, page)
                    opened.page.wait_for_timeout(2500)  # figures of the last ten seconds, and charts
                    path = options.folder / f"console-{page}-{width}.png"
                    _save(opened.page.screenshot(full_page=True), path)


def _save(png: bytes, path: Path) -> None:
    """With 256 colours: a third of the bytes, and nobody sees it."""
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def _fill(opened: Tab, page: str) -> None:
    if page == "try_it":
        opened.page.get_by_role("button", name="Take an example").click()
        until(lambda: opened.page.get_by_label("User").input_value(), "an example")
        opened.page.get_by_role("button", name="Score").click()
        opened.wait_for_text("features found")


def _give_something_to_see(demo: Path) -> None:
    config = load_config(demo / "smes.yaml", {})
    store = snapshot_store(config)
    with closing(open_event_log(config.event_log)) as log:
        if store.decisions():
            return  # once is enough
        listed = store.list()
        store.operator.pin(listed[-2].version, listed[-2].lineage, why="NE of the newest looked off", by="ann")
        store.operator.unpin(why="it was the dashboard", by="ann")
        schema, ends = config.schema_file().schema, log.end(IMPRESSIONS)
        read = log.read({at: max(0, end - 12) for at, end in ends.items()}, max_records=24, timeout_s=5)
        again = decode(read.records, schema).impressions.take(slice(24))
        again.impression_id[:] += 10**9
        other = (("codec", b"json"), ("schema", b"0123456789abcdef"))
        made = encode_impressions(again, schema, "json", len(ends))
        log.append(IMPRESSIONS, [OutRecord(each.value, other, each.partition) for each in made])
        late = b'{"impression_id": 5, "task": "purchase", "event_time_ms": 1704067300000, "value": 1}'
        named = (("codec", b"json"), ("schema", schema.hash.encode()))
        log.append(FEEDBACK, [OutRecord(late, named, 0), OutRecord(b'{"impression_id": 1', (), 1)])
        until(lambda: _letters(log) >= len(made) + 2, "the letters", 30)
        replayer_of(config, log, adopt_schema=True).run(LetterFilter(partitions=frozenset({0})))


def _letters(log: EventLog) -> int:
    return sum(isinstance(entry, StoredLetter) for entry in read_entries(log))


if __name__ == "__main__":
    main()
