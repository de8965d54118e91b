"""A small log in a schema of its own: two binary tasks and a rating, text ids, bags, side tables, and blemishes."""

from pathlib import Path

import pytest

from smes_io.schema_file import SchemaFile, load_schema_file

SHOP_SCHEMA = """
name: shop
tasks:
  - {name: opened, window_s: 60}
  - {name: bought, window_s: 3600}
  - {name: rating, kind: regression, window_s: 7200, max_value: 5}
features:
  - {name: plan, source: user}
  - {name: age, kind: numeric, source: user}
  - {name: brand, source: item}
  - {name: labels, kind: bag, max_length: 3, source: item}
  - {name: page}
  - {name: weekday}
log:
  files: "visits*.csv"
  user_id: customer
  item_id: product
  event_time: shown_at
  time_unit: s
  max_rejected: 0.5
  request_id: visit
  user_features: {files: customers.csv, key: id}
  item_features: {files: products.csv, key: sku}
  features:
    labels: {column: words, separator: "|"}
    page: page_name
    weekday: {expr: "(event_time_ms // 86400000 + 3) % 7"}
  labels:
    opened: is_open
    bought: {column: price_paid, threshold: 0.01, delay: {median_s: 300, sigma: 1, at_least: rating}}
    rating: {column: stars, time_column: rated_at}
"""

VISITS_1 = """customer,product,shown_at,visit,page_name,is_open,price_paid,stars,rated_at
c2,11,1000,7,home,1,0,,
c1,12,900.5,6,search,0,0,4,950
c1,11,900.5,6,search,true,19.99,4.5,
c2,11,1000,7,home,1,0,,
"""

VISITS_2 = """customer,product,shown_at,visit,page_name,is_open,price_paid,stars,rated_at
c3,13.0,100,,,false,,5,130
c2,11,1000,7,home,1,0,,
,11,1000,7,home,1,0,,
c1,11,soon,7,home,1,0,,
c1,11,1000,7,home,2,0,,
c1,11,1000,7,home,1,0,99,
"""

CUSTOMERS = """id,plan,age
c1,gold,31
c2,3,
c2,silver,44
"""

PRODUCTS = """sku,brand,words
11,5,red|blue||9|green
12.0,acme,
"""


@pytest.fixture
def shop_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(SHOP_SCHEMA)
    return path


@pytest.fixture
def shop_schema(shop_yaml: Path) -> SchemaFile:
    return load_schema_file(shop_yaml)


@pytest.fixture
def shop_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    for name, text in (
        ("visits_part1.csv", VISITS_1),
        ("visits_part2.csv", VISITS_2),
        ("customers.csv", CUSTOMERS),
        ("products.csv", PRODUCTS),
    ):
        (folder / name).write_text(text)
    return folder
