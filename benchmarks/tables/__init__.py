"""Markdown tables and figures of the documentation, generated from committed CSV files."""
