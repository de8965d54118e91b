"""Draws the learning curves and the heat map of experts for the documentation, from a console that runs.

``smes demo --stay`` prints an address; then::

    python -m tests.smes_console.pictures http://127.0.0.1:PORT docs/images
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser

from tests.smes_console.browsing import chromium

# Name → page of the console, first and last element that the picture shows.
PICTURES = {
    "learning-curve": ("learning?metric=auc", ".legend", ".grid.tasks"),
    "expert-map": ("experts", "h2 >> nth=0", ".heatmap >> nth=1"),
}
_MARGIN = 3
_WIDTH, _HEIGHT = 1280, 2400


def draw(browser: Browser, address: str, name: str, folder: Path) -> None:
    """Write ``NAME.png`` into a folder."""
    page_name, first, last = PICTURES[name]
    context = browser.new_context(viewport={"width": _WIDTH, "height": _HEIGHT}, device_scale_factor=1.5)
    page = context.new_page()
    page.goto(f"{address.partition('#')[0].rstrip('/')}/#/{page_name}")
    page.locator(last).locator("canvas").last.wait_for()
    page.wait_for_timeout(1500)  # uPlot draws in the next frame
    top, bottom = page.locator(first).bounding_box(), page.locator(last).bounding_box()
    assert top is not None, first
    assert bottom is not None, last
    y = top["y"] - _MARGIN
    page.screenshot(
        path=folder / f"{name}.png",
        clip={"x": 0, "y": y, "width": _WIDTH, "height": bottom["y"] + bottom["height"] + _MARGIN - y},
    )
    context.close()


def main() -> None:
    """Draw all pictures."""
    if len(sys.argv) != 3:
        sys.exit(f"{sys.argv[0]}: expected the address of a console and a folder")
    with chromium() as browser:
        for name in PICTURES:
            draw(browser, sys.argv[1], name, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
