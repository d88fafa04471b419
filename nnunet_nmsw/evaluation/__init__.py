"""Comparison of NMSW with the sliding window on nnU-Net's cross-validation folds, and its report."""
