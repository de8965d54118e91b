"""A log in its own schema, with two binary tasks and a rating: CSV files and the schema file that describes them."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SCHEMA = """
name: shop
tasks:
  - {name: opened, window_s: 20}
  - {name: bought, window_s: 40}
  - {name: rating, kind: regression, window_s: 60, max_value: 5}
features:
  - {name: plan, source: user}
  - {name: brand, source: item}
  - {name: price, kind: numeric, source: item, transform: log1p}
  - {name: page}
log:
  files: "visits.csv"
  user_id: customer
  item_id: product
  event_time: shown_at
  time_unit: s
  user_features: {files: customers.csv, key: id}
  item_features: {files: products.csv, key: sku}
  features: {page: page_name}
  labels:
    opened: {column: is_open, delay: {median_s: 2, sigma: 0.5}}
    bought: {column: sold, delay: {median_s: 5, sigma: 0.5}}
    rating: {column: stars, delay: {median_s: 10, sigma: 0.5}}
"""


@dataclass(frozen=True)
class Shop:
    """A written log.

    Attributes:
        folder: Folder of the CSV files.
        schema: The schema file.
        visits: Rows without the duplicate.
        feedback: Feedback events of all visits.
        positives: Task name → feedback events.
    """

    folder: Path
    schema: Path
    visits: int
    feedback: int
    positives: dict[str, int]


def write_shop(root: Path, visits: int = 1500) -> Shop:
    """Write visits half a second apart, one of them twice.

    Opening depends on the brand, and buying on the customer's plan.
    """
    rng = np.random.default_rng(0)
    folder = root / "shop"
    folder.mkdir()
    customer, product = rng.integers(0, 60, visits), rng.integers(0, 90, visits)
    opened = rng.random(visits) < np.where(product % 5 == 0, 0.7, 0.2)
    sold = opened & (rng.random(visits) < np.where(customer % 3 == 0, 0.6, 0.1))
    stars = np.where(sold, rng.integers(1, 6, visits), 0)
    pages = rng.choice(["home", "search", "basket"], visits)
    rows = [
        [f"c{c}", p, 1_700_000_000 + i // 2, page, int(o), int(s), star or ""]
        for i, (c, p, page, o, s, star) in enumerate(zip(customer, product, pages, opened, sold, stars, strict=True))
    ]
    # Equal rows of one second would be exact duplicates.
    assert len({tuple(row) for row in rows}) == visits
    names = ["customer", "product", "shown_at", "page_name", "is_open", "sold", "stars"]
    _write(folder / "visits.csv", names, [*rows, rows[7]])
    _write(folder / "customers.csv", ["id", "plan"], [[f"c{c}", ["gold", "basic"][c % 2]] for c in range(60)])
    _write(folder / "products.csv", ["sku", "brand", "price"], [[p, f"b{p % 5}", 10 + p] for p in range(90)])
    schema = root / "shop.yaml"
    schema.write_text(SCHEMA)
    positives = {"opened": int(opened.sum()), "bought": int(sold.sum()), "rating": int((stars > 0).sum())}
    return Shop(folder, schema, visits, sum(positives.values()), positives)


def _write(path: Path, names: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
