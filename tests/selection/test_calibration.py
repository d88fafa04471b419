"""The number of patches "auto"."""

import json

import numpy as np
import pytest
import torch
from predictors import nmsw
from tiny import initialized

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.selection.calibration import FILE, THRESHOLDS, threshold_of_folds, write_calibration


def fold(folder, number, dice, cases=2):
    """A calibration with the same Dice in every case, by threshold."""
    (folder / f"fold_{number}" / "validation").mkdir(parents=True)
    measured = {
        threshold: [(10 - index, np.array([value, np.nan])) for _ in range(cases)]
        for index, (threshold, value) in enumerate(zip(THRESHOLDS, dice, strict=True))
    }
    write_calibration(folder / f"fold_{number}" / "validation" / FILE, [measured])


def test_the_largest_threshold_within_the_allowed_drop(tmp_path):
    fold(tmp_path, 0, [0.80, 0.81, 0.82, 0.81, 0.5])
    for max_drop, expected in ((0.0, THRESHOLDS[2]), (0.0101, THRESHOLDS[3]), (1.0, THRESHOLDS[4])):
        assert threshold_of_folds(tmp_path, [0], max_drop) == expected
    content = json.loads((tmp_path / "fold_0" / "validation" / FILE).read_text())
    assert content["cases"] == 2
    assert content["thresholds"][1] == {"stop_at": THRESHOLDS[1], "mean_dice": 0.81, "patches": [9, 9]}


def test_folds_count_by_their_cases(tmp_path):
    fold(tmp_path, 0, [0.9, 0.1, 0.1, 0.1, 0.1], cases=1)
    fold(tmp_path, 1, [0.5, 0.5, 0.5, 0.9, 0.5], cases=9)
    assert threshold_of_folds(tmp_path, None, 0.0) == THRESHOLDS[3]
    assert threshold_of_folds(tmp_path, [0], 0.0) == THRESHOLDS[0]


def test_without_a_calibration_the_message_says_how_to_get_it(tmp_path):
    fold(tmp_path, 0, [0.5] * 5)
    with pytest.raises(UserError, match=r"fold_1.*--val"):
        threshold_of_folds(tmp_path, [0, 1], 0.005)


def test_fewer_windows_where_less_is_gained(tiny_network):
    taken, volume = [], torch.randn(1, 16, 20, 24)
    for threshold in (-1e9, 0.0, 0.01, 1e9):
        predictor = initialized(nmsw(num_patches="auto", threshold=threshold), tiny_network)
        logits, windows = predictor.predict_case_logits({"data": volume})
        assert torch.isfinite(logits).all()
        taken.append(len(windows[0].starts))
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > taken[-1] == 0
