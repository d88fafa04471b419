"""The models of a comparison."""

import pytest

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation.methods import build_methods
from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.store import Comparison
from nnunet_nmsw.files import write_json
from nnunet_nmsw.selection.calibration import FILE, calibration_of


def calibrate(model: Model, fold: int | str, dice_by_threshold: dict[float, float]) -> None:
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


def test_fold_all_sets_no_threshold(tmp_path):
    model = Model("nmsw", tmp_path, "nnUNetTrainerNMSW", "checkpoint_final.pth")
    calibrate(model, "all", {0.1: 0.8, 0.2: 0.8})
    assert model.calibrated_folds() == set()
    calibrate(model, 0, {0.1: 0.8, 0.2: 0.7})
    assert model.calibrating_folds(0) == [0]
    assert model.threshold(0) == 0.1


def test_cases_are_done_with_the_threshold_of_their_fold(tmp_path):
    model = Model("nmsw", tmp_path / "model", "nnUNetTrainerNMSW", "checkpoint_final.pth")
    calibrate(model, 0, {0.1: 0.8, 0.2: 0.7})
    case = Case("case", 0, ("case_0000.nii.gz",), "case.nii.gz")

    def comparison(*num_patches: str) -> Comparison:
        return Comparison(tmp_path, "Dataset", [model], build_methods(False, num_patches, [False]), [case], 2.0, "cpu")

    assert comparison("auto").missing() == [case]
    record = {"case": "case", "fold": 0, "methods": {}}
    file = comparison("auto").record_file(case)
    file.parent.mkdir()
    write_json(file, {**record, "threshold": 0.1})
    assert comparison("auto").missing() == []
    auto = next(method for method in comparison("auto").methods if method.num_patches == "auto")
    timed = comparison("auto").timing_file(0, auto)
    calibrate(model, 1, {0.1: 0.8, 0.2: 0.8})  # now another fold sets it
    assert comparison("auto").timing_file(0, auto) != timed
    assert comparison("auto").missing() == [case]
    write_json(file, {**record, "threshold": 0.2})
    assert comparison("auto").missing() == []
    write_json(file, record)
    assert comparison("10%").missing() == []
