"""The model: two branches and their fusion, built from the plans, and loaded without running strange code."""
