"""The models of a comparison."""

import pytest

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation.models import Model
from nnunet_nmsw.files import write_json
from nnunet_nmsw.selection.calibration import FILE, calibration_of


def calibrate(model: Model, fold: int, dice_by_threshold: dict[float, float]) -> None:
    folder = model.folder / f"fold_{fold}" / "validation"
    folder.mkdir(parents=True)
    measured = {threshold: [(1, [dice])] for threshold, dice in dice_by_threshold.items()}
    write_json(folder / FILE, calibration_of([measured]))


def test_the_threshold_of_auto_comes_from_other_folds(tmp_path):
    model = Model("nmsw", tmp_path, "nnUNetTrainerNMSW", "checkpoint_final.pth")
    with pytest.raises(UserError, match="fold_2"):
        model.threshold(2)
    calibrate(model, 2, {0.1: 0.8, 0.2: 0.7})
    assert model.calibrating_folds(2) == [2]
    assert model.threshold(2) == 0.1
    calibrate(model, 0, {0.1: 0.8, 0.2: 0.8})
    assert model.calibrating_folds(2) == [0]
    assert model.threshold(2) == 0.2
    calibrate(model, 1, {0.1: 0.8, 0.2: 0.7})
    assert model.calibrating_folds(2) == [0, 1]
    assert model.threshold(2) == 0.1
