"""Prediction with NMSW models, from Python and from the command line."""
