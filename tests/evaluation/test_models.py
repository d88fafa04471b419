"""The models of a comparison."""

import json
from pathlib import Path

import pytest
import torch
from untrained import write_image, write_model

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation import run
from nnunet_nmsw.evaluation.methods import build_methods
from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.store import Comparison, began_with_auto
from nnunet_nmsw.files import write_json
from nnunet_nmsw.selection.calibration import CALIBRATION_KEY, FILE, calibration_of


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


def test_a_validation_that_comes_later_is_no_other_training(tmp_path):
    model = Model("nmsw", write_model(tmp_path), "nnUNetTrainerNMSW", "checkpoint_final.pth")
    before = model.fingerprints([0])
    checkpoint = torch.load(model.checkpoint_file(0), weights_only=False)
    torch.save({**checkpoint, CALIBRATION_KEY: {"cases": 1}}, model.checkpoint_file(0))
    assert model.fingerprints([0]) == before
    name, weights = next(iter(checkpoint["network_weights"].items()))
    checkpoint["network_weights"][name] = weights + 1
    torch.save(checkpoint, model.checkpoint_file(0))
    assert model.fingerprints([0]) != before


def timed_comparison(folder: Path, rounds: int) -> Comparison:
    model = Model("nmsw", write_model(folder / "a__b__3d_fullres"), "nnUNetTrainerNMSW", "checkpoint_final.pth")
    write_image(image := folder / "case_0000.nii.gz")
    case, methods = Case("case", 0, (str(image),), "case.nii.gz"), build_methods(False, ["10%"], [False])
    return Comparison(folder, "Dataset", [model], methods, [case], 2.0, "cpu", timed_cases=1, rounds=rounds)


def test_one_machine_measures_a_round(tmp_path, monkeypatch):
    """Times of a round are compared with each other."""
    comparison = timed_comparison(tmp_path, rounds=2)
    measured = []

    def measure(task):
        if len(measured) == interrupted_after:
            raise KeyboardInterrupt
        measured.append((here, task.method.key))
        return []

    monkeypatch.setattr(run, "measure_in_new_process", measure)
    monkeypatch.setattr(run, "machine", lambda device: here)
    number = len(run.timed_methods(comparison.methods, comparison.primary))
    assert number > 1
    here, interrupted_after = "one", number + 1
    with pytest.raises(KeyboardInterrupt):
        run.run_timing(comparison, False)
    here, interrupted_after = "other", None
    run.run_timing(comparison, False)
    rounds = {}
    for file in (tmp_path / "timing").iterdir():
        rounds.setdefault(file.stem[-1], []).append(json.loads(file.read_text())["machine"])
    assert rounds == {"0": number * ["one"], "1": number * ["other"]}
    before = len(measured)
    run.run_timing(comparison, False)
    assert len(measured) == before


def test_what_cannot_be_measured_leaves_the_other_times(tmp_path, monkeypatch, capsys):
    comparison = timed_comparison(tmp_path, rounds=1)
    tried = []

    def measure(task):
        tried.append(task.method.key)
        if len(tried) == 1:
            raise RuntimeError("CUDA out of memory")
        return []

    monkeypatch.setattr(run, "measure_in_new_process", measure)
    failures = run.run_timing(comparison, False)
    assert len(list((tmp_path / "timing").iterdir())) == len(tried) - 1 > 0
    assert "cannot measure the time of" in capsys.readouterr().out
    with pytest.raises(UserError, match="CUDA out of memory"):
        failures.raise_any()


def test_a_comparison_without_auto_stays_without(tmp_path):
    """A fold may be calibrated between two calls of the same command."""
    assert began_with_auto(tmp_path)
    model = Model("nmsw", write_model(tmp_path / "a__b__3d_fullres"), "nnUNetTrainerNMSW", "checkpoint_final.pth")
    case = Case("case", 0, ("case_0000.nii.gz",), "case.nii.gz")
    for num_patches in (["10%"], ["10%", "auto"]):
        folder = tmp_path / str(len(num_patches))
        methods = build_methods(False, num_patches, [False])
        Comparison(folder, "Dataset", [model], methods, [case], 2.0, "cpu").open()
        assert began_with_auto(folder) == ("auto" in num_patches)
