"""Everything on the page "Your own service" runs, in order, and gives what the page says."""

import re
from pathlib import Path

import pytest

from smes_cli.demo.local_servers import free_ports
from tests.docs.session import assert_prints, follow

PAGE = "docs/your-own-service.md"


@pytest.mark.timeout(180)
def test_the_page_as_a_person_follows_it(tmp_path: Path) -> None:
    ports = dict(zip(("6379", "8000", "8001", "8080"), map(str, free_ports(4)), strict=True))

    ran = follow(PAGE, tmp_path, ports, within_s=150)

    for block in ran:
        assert_prints(block)
    clicks = [int(found) for found in re.findall(r": (\d+) clicks", ran[2].printed)]
    assert clicks[-1] > 1.2 * clicks[0], "the ranking has not learned"
