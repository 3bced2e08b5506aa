"""Where training text comes from: work items and their order, parquet reading, the embedded world."""
