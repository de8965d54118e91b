"""The id table: look-ups, memory, the table's part of a step, and what budgets and expiry give and cost.

    python -m benchmarks.tables --json tables.json
    python -m benchmarks.tables --parts lookups step --rows 100000          # some parts, at another size
    python -m benchmarks.tables --parts expiry --log KUAIRAND_FOLDER

One thread. ``lookups_m_per_s``: finds in the id map, of ids in random order, all of which are there. What else is
measured, and how, is said where it is: table_step.py (``fused_vs_ops``, ``step_10m_vs_10k``), table_memory.py
(``table_bytes_ratio``, ``budget_rss_growth_pct``), table_expiry.py (``expiry_auc_loss``).
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.figures import save, show
from benchmarks.table_before import IdMapBefore
from benchmarks.table_expiry import expiry_loss
from benchmarks.table_memory import budget_growth, table_bytes
from benchmarks.table_step import compare_steps, compare_table_part
from smes.arrays import I64
from smes.id_map import IdMap
from smes.model.devices import keep_freed_memory

_FOUND_AT_ONCE = 33_792  # the ids of a batch


def lookups(ids: int, rounds: int) -> dict[str, float]:
    """``lookups_m_per_s``, that of the map of before, and how long the longest insertion of a batch took in each."""
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**63), 2**63 - 1, ids)
    asked = [rng.choice(keys, _FOUND_AT_ONCE) for _ in range(50)]
    result: dict[str, float] = {"lookup_ids": ids}
    for name, id_map in (("", IdMap()), ("_before", IdMapBefore())):
        insert, find = id_map.insert, id_map.find
        insert(keys[:1]), find(keys[:1])
        longest_s, begun_s = 0.0, time.perf_counter()
        for start in range(0, ids, _FOUND_AT_ONCE):
            started_s = time.perf_counter()
            insert(keys[start : start + _FOUND_AT_ONCE])
            longest_s = max(longest_s, time.perf_counter() - started_s)
        result[f"inserts_m_per_s{name}"] = ids / (time.perf_counter() - begun_s) / 1e6
        result[f"longest_insert_ms{name}"] = longest_s * 1e3
        rates = [_rate(find, asked) for _ in range(rounds)]
        result[f"lookups_m_per_s{name}"] = median(rates)
        if isinstance(id_map, IdMap):
            result["map_bytes_an_id"] = id_map.nbytes / len(id_map)
    return result


def _rate(find: Callable[[I64], I64], asked: list[I64]) -> float:
    start = time.perf_counter()
    for ids in asked:
        find(ids)
    return len(asked) * _FOUND_AT_ONCE / (time.perf_counter() - start) / 1e6


PARTS = ("lookups", "part", "step", "bytes", "budget", "expiry")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The flat object that ``--json`` writes."""
    result: dict[str, float] = {"rows": options.rows}
    if "lookups" in options.parts:
        result |= lookups(options.rows, options.rounds)
    if "part" in options.parts:
        result |= compare_table_part(options.rows, options.rounds, steps=20)
    if "step" in options.parts:
        result |= compare_steps(options.rows, max(options.rows // 1000, 33), options.rounds, steps=10)
    if "bytes" in options.parts:
        result |= table_bytes(options.rows)
    if "budget" in options.parts:
        result |= budget_growth(2 * options.rows, options.rows // 10)
    if "expiry" in options.parts:
        if not options.log.is_dir():
            raise SystemExit(f"--log {str(options.log)!r}: expected a KuaiRand folder, named here or by KUAIRAND_HOME")
        result |= expiry_loss(options.log, options.limit, options.seeds)
    return result


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the large table; the small one has a 1000th")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--log", type=Path, default=Path(os.environ.get("KUAIRAND_HOME", "")), help="for expiry")
    parser.add_argument("--limit", type=int, help="only the first so many impressions of the log")
    parser.add_argument("--seeds", type=int, default=3, help="for expiry")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result = measure(options)
    show(result)
    save(result, options.json)


if __name__ == "__main__":
    main()
