"""Queries written once with Ibis, run by DuckDB in this process or by Spark on many machines. No torch."""
