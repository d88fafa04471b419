"""The number of patches "auto"."""

import json
import shutil

import numpy as np
import old_model
import pytest
import torch
from predictors import nmsw
from tiny import build_network, initialized

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import write_json
from nnunet_nmsw.inference.model_folder import threshold_for
from nnunet_nmsw.selection.budget import budget_of
from nnunet_nmsw.selection.calibration import (
    CALIBRATION_KEY,
    FILE,
    THRESHOLDS,
    calibration_of,
    check_auto,
    threshold_of_folds,
)
from nnunet_nmsw.trainers.checkpoints import keep_calibration


def fold(folder, number, dice, cases=2):
    """A calibration with the same Dice in every case, by threshold."""
    (folder / f"fold_{number}" / "validation").mkdir(parents=True)
    measured = {
        threshold: [(10 - index, np.array([value, np.nan])) for _ in range(cases)]
        for index, (threshold, value) in enumerate(zip(THRESHOLDS, dice, strict=True))
    }
    write_json(folder / f"fold_{number}" / "validation" / FILE, calibration_of([measured]))


def test_the_largest_threshold_within_the_allowed_drop(tmp_path):
    fold(tmp_path, 0, [0.80, 0.81, 0.82, 0.81, 0.5, 0.4, 0.3])
    for max_drop, expected in ((0.0, THRESHOLDS[2]), (0.0101, THRESHOLDS[3]), (1.0, THRESHOLDS[-1])):
        assert threshold_of_folds(tmp_path, [0], max_drop) == expected
    content = json.loads((tmp_path / "fold_0" / "validation" / FILE).read_text())
    assert content["cases"] == 2
    assert content["thresholds"][1] == {"stop_at": THRESHOLDS[1], "mean_dice": 0.81, "patches": [9, 9]}


def test_folds_count_by_their_cases(tmp_path):
    fold(tmp_path, 0, [0.9] + [0.1] * 6, cases=1)
    fold(tmp_path, 1, [0.5, 0.5, 0.5, 0.9, 0.5, 0.5, 0.5], cases=9)
    assert threshold_of_folds(tmp_path, [0, 1], 0.0) == THRESHOLDS[3]
    assert threshold_of_folds(tmp_path, [0], 0.0) == THRESHOLDS[0]


def test_without_a_calibration_the_message_says_how_to_get_it(tmp_path):
    fold(tmp_path, 0, [0.5] * 7)
    with pytest.raises(UserError, match=r"fold_1.*--val"):
        threshold_of_folds(tmp_path, [0, 1], 0.005)


def checkpoint(folder, number):
    return folder / f"fold_{number}" / "checkpoint_final.pth"


def test_auto_is_the_default_where_the_model_is_calibrated(tmp_path, capsys):
    fold(tmp_path, 0, [0.80, 0.81, 0.82, 0.81, 0.5, 0.4, 0.3])
    calibrations = {checkpoint(tmp_path, 0): None}
    for given, own in ((None, "auto"), ("auto", None), ("auto", "10%")):
        assert threshold_for(given, own, calibrations, 0.0) == THRESHOLDS[2]
    for given, own in ((None, "10%"), (None, None), (5, "auto"), ("all", "auto")):
        assert threshold_for(given, own, calibrations, 0.0) is None
    assert capsys.readouterr().out == ""
    calibrations[checkpoint(tmp_path, 1)] = None
    assert threshold_for(None, "auto", calibrations, 0.0) is None
    assert "10% of the windows are taken" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"fold_1.*--val"):
        threshold_for("auto", "auto", calibrations, 0.0)
    assert budget_of("auto", 50) == budget_of("10%", 50)


def test_auto_is_refused_where_scores_predict_no_benefits():
    check_auto("auto", build_network())
    for network in (build_network(score_training="contribution"), build_network().local_branch):
        check_auto(None, network)
        check_auto("10%", network)
        with pytest.raises(UserError, match="percentage"):
            check_auto("auto", network)


def test_the_calibration_in_checkpoints_comes_first(tmp_path):
    fold(tmp_path, 0, [0.80, 0.81, 0.82, 0.81, 0.5, 0.4, 0.3])
    of_checkpoint = {"cases": 2, "thresholds": [{"stop_at": THRESHOLDS[4], "mean_dice": 0.9, "patches": [1, 2]}]}
    assert threshold_for(None, "auto", {checkpoint(tmp_path, 0): of_checkpoint}, 0.0) == THRESHOLDS[4]


def test_the_calibration_travels_in_the_checkpoint(tmp_path):
    model = shutil.copytree(old_model.FOLDER / "model", tmp_path / "model")
    file = checkpoint(model, 0)
    content = torch.load(file, weights_only=False)
    row = {"stop_at": THRESHOLDS[4], "mean_dice": 0.9, "patches": [1, 2]}
    torch.save({**content, CALIBRATION_KEY: {"cases": 2, "thresholds": [row]}}, file)
    shutil.rmtree(model / "fold_0" / "validation")
    predictor = nmsw(num_patches="auto")
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert predictor.threshold == THRESHOLDS[4]
    torch.save({**content, CALIBRATION_KEY: {"cases": 2}}, file)
    nmsw(num_patches=5).initialize_from_trained_model_folder(str(model), (0,))  # which does without
    with pytest.raises(UserError, match=r"checkpoint_final.*nmsw_calibration"):
        predictor.initialize_from_trained_model_folder(str(model), (0,))


def test_checkpoints_with_the_weights_that_were_validated_keep_the_calibration(tmp_path):
    network, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for name, of in (("final", network), ("best", other)):
        torch.save({"network_weights": of.state_dict(), "rest": 1}, tmp_path / f"checkpoint_{name}.pth")
    keep_calibration(tmp_path, network, {"cases": 3})
    final, best = (torch.load(tmp_path / f"checkpoint_{name}.pth") for name in ("final", "best"))
    assert final[CALIBRATION_KEY] == {"cases": 3}
    assert final["rest"] == 1
    assert CALIBRATION_KEY not in best


def test_a_predictor_takes_the_threshold_of_the_model_that_it_loads():
    model = str(old_model.FOLDER / "model")
    predictor = nmsw(num_patches="auto")
    predictor.initialize_from_trained_model_folder(model, (0,))
    assert predictor.threshold in THRESHOLDS
    given = nmsw(num_patches="auto", threshold=0.3)
    given.initialize_from_trained_model_folder(model, (0,))
    assert given.threshold == 0.3
    own = nmsw()  # whose setting is a percentage
    own.initialize_from_trained_model_folder(model, (0,))
    assert own.threshold is None


def test_fewer_windows_where_less_is_gained(tiny_network):
    taken, volume = [], torch.randn(1, 16, 20, 24)
    for threshold in (-1e9, 0.0, 0.01, 1e9):
        predictor = initialized(nmsw(num_patches="auto", threshold=threshold), tiny_network)
        logits, windows = predictor.predict_case_logits({"data": volume})
        assert torch.isfinite(logits).all()
        taken.append(len(windows[0].starts))
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > taken[-1] == 0
