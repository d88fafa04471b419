"""A number of patches by case."""

import json

import numpy as np
import pytest
import torch
from test_predictor import initialized, nmsw

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.selection.calibration import FILE, STOP_AT, stop_at_of_folds, write_calibration


def fold(folder, number, dice, cases=2):
    """A calibration with the same Dice in every case, by threshold."""
    (folder / f"fold_{number}" / "validation").mkdir(parents=True)
    measured = {
        stop_at: [(10 - index, np.array([value, np.nan])) for _ in range(cases)]
        for index, (stop_at, value) in enumerate(zip(STOP_AT, dice, strict=True))
    }
    write_calibration(folder / f"fold_{number}" / "validation" / FILE, [measured])


def test_the_largest_threshold_within_the_allowed_drop(tmp_path):
    fold(tmp_path, 0, [0.80, 0.81, 0.82, 0.81, 0.5])
    for max_drop, expected in ((0.0, STOP_AT[2]), (0.0101, STOP_AT[3]), (1.0, STOP_AT[4])):
        assert stop_at_of_folds(tmp_path, [0], max_drop) == expected
    content = json.loads((tmp_path / "fold_0" / "validation" / FILE).read_text())
    assert content["cases"] == 2
    assert content["thresholds"][1] == {"stop_at": STOP_AT[1], "mean_dice": 0.81, "patches": [9, 9]}


def test_folds_count_by_their_cases(tmp_path):
    fold(tmp_path, 0, [0.9, 0.1, 0.1, 0.1, 0.1], cases=1)
    fold(tmp_path, 1, [0.5, 0.5, 0.5, 0.9, 0.5], cases=9)
    assert stop_at_of_folds(tmp_path, None, 0.0) == STOP_AT[3]
    assert stop_at_of_folds(tmp_path, [0], 0.0) == STOP_AT[0]


def test_without_a_calibration_the_message_says_how_to_get_it(tmp_path):
    fold(tmp_path, 0, [0.5] * 5)
    with pytest.raises(UserError, match=r"fold_1.*--val"):
        stop_at_of_folds(tmp_path, [0, 1], 0.005)


def test_fewer_windows_where_less_is_gained(tiny_network):
    predictor, taken = initialized(nmsw(num_patches="auto"), tiny_network), []
    volume = torch.randn(1, 16, 20, 24)
    for stop_at in (-1e9, 0.0, 0.01, 1e9):
        predictor.stop_at = stop_at
        assert torch.isfinite(predictor.predict_logits_from_preprocessed_data(volume)).all()
        taken.append(len(predictor.chosen_windows[0].starts))
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > taken[-1] == 0
