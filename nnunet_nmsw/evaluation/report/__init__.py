"""The report of a comparison: tables, plots, pages."""
