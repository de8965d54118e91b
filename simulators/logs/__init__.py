"""Read logged impressions out of CSV or Parquet files, in event-time order.

The way from a schema file to blocks: :mod:`files` finds the files that ``log.files`` names, :mod:`table` checks their
columns and plans how each is read, :mod:`sql` writes the expressions of that plan, :mod:`store` runs them in a
temporary DuckDB database (sort, duplicates, feature tables), and :mod:`reader` turns Arrow tables into blocks.
"""
