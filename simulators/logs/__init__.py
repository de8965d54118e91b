"""Read logged impressions out of text or Parquet files, in event-time order.

The way from a schema file to blocks: :mod:`files` finds the files that ``log.files`` names; :mod:`csv_files` makes text
ready for DuckDB by the rule of :mod:`csv_lines`; :mod:`parts` groups files of equal columns; :mod:`table` checks their
columns and plans how each part is read, and :mod:`sql` writes the expressions of that plan; :mod:`store` runs them in a
temporary DuckDB database (sort, duplicates, feature tables); :mod:`counts` counts what was there for the
:mod:`ledger`; and :mod:`reader` turns Arrow tables into blocks.
"""
