"""The model around a ranker: ids, tables, features, heads, and how it learns and serves."""
