"""Local branches in 8-bit integers: made, measured, kept beside the checkpoint, and taken from there."""

import json
import shutil

import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from old_model import CASES, FOLDER, read
from predictors import CPU, nmsw

from nnunet_nmsw.commands.predict import main as predict
from nnunet_nmsw.commands.predict_flags import read_flags
from nnunet_nmsw.commands.quantize import main
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.quantized import FACTS, WEIGHTS, read_quantized

for library in ("nncf", "openvino"):
    pytest.importorskip(library)
FLAGS = ["-f", "0", "-device", "cpu", "--disable_progress_bar", "-npp", "1", "-nps", "1"]


@pytest.fixture
def preprocessed(folders):
    """The model's dataset as nnU-Net preprocesses it: a training case and a validation case."""
    predictor = nmsw()
    predictor.initialize_from_trained_model_folder(str(FOLDER / "model"), (0,))
    of_model = (predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    dataset = folders / "nnUNet_preprocessed" / predictor.plans_manager.dataset_name
    cases = dataset / predictor.configuration_manager.data_identifier
    (cases / "case.b2nd").unlink()  # of the fixture
    for name in CASES:
        labels = str(FOLDER / "expected" / "10_percent_plain" / f"{name}.nii.gz")
        case = preprocessor.run_case([str(FOLDER / "images" / f"{name}_0000.nii.gz")], labels, *of_model)
        nnUNetDatasetBlosc2.save_case(*case, str(cases / name))
    (dataset / "splits_final.json").write_text(json.dumps([{"train": [CASES[0]], "val": [CASES[1]]}]))
    return dataset


@pytest.fixture
def model(tmp_path):
    """A copy of the old model."""
    return shutil.copytree(FOLDER / "model", tmp_path / "model")


def test_a_quantised_model_predicts_nearly_the_same(preprocessed, model, tmp_path, capsys):
    main(["-m", str(model), "--max_drop", "0.5"])
    assert "Dice of 1 validation cases" in capsys.readouterr().out
    facts = json.loads((model / "fold_0" / FACTS).read_text())
    assert facts["dice_float32"] - facts["dice_int8"] <= 0.5
    assert facts["calibration_patches"] > 0
    for precision in ("float32", "int8"):
        flags = ["-m", str(model), "-i", str(FOLDER / "images"), "-o", str(tmp_path / precision), *FLAGS]
        predict([*flags, "--precision", precision])
    labels = [[read(tmp_path / precision / f"{name}.nii.gz") for name in CASES] for precision in ("float32", "int8")]
    for floating, integers in zip(*labels, strict=True):
        assert 2 * (integers[floating > 0] > 0).sum() / ((floating > 0).sum() + (integers > 0).sum()) > 0.5


def test_what_does_not_belong_together_is_refused(preprocessed, model):
    main(["-m", str(model), "--max_drop", "1"])
    predictor = nmsw(backend="openvino", precision="int8")
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    branch = predictor.nmsw_network.local_branch
    assert read_quantized(model, branch) is not None
    with (model / "fold_0" / WEIGHTS).open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(UserError, match=rf"{WEIGHTS} beside it is damaged: run nmsw_quantize"):
        read_quantized(model, branch)
    (model / "fold_0" / FACTS).write_text("{}")
    with pytest.raises(UserError, match=rf"{FACTS} cannot be read"):
        read_quantized(model, branch)
    next(branch.parameters()).data += 1
    (model / "fold_0" / FACTS).write_text(json.dumps({"weights": "of another training"}))
    with pytest.raises(UserError, match=r"no fold of .* has a quantised branch of these weights"):
        read_quantized(model, branch)


def test_a_model_that_loses_too_much_is_not_quantised(preprocessed, model):
    with pytest.raises(UserError, match=r"fold_0: Dice .*in int8, .*first and last layer.*--max_drop -1 allows"):
        main(["-m", str(model), "--max_drop", "-1"])
    assert not list((model / "fold_0").glob("local_branch_int8*"))


def test_what_is_missing_is_said_in_one_line(preprocessed, model, monkeypatch):
    (preprocessed / "splits_final.json").write_text("[]")
    with pytest.raises(UserError, match=r"splits_final.json has no fold 0"):
        main(["-m", str(model)])
    with pytest.raises(UserError, match="preprocess the dataset that the model was trained on"):
        main(["-m", str(model), "-d", "Dataset123_Other"])
    with pytest.raises(UserError, match=rf"precision int8 needs .*{FACTS}: run nmsw_quantize -m .* -f 0"):
        nmsw(backend="openvino", precision="int8").initialize_from_trained_model_folder(str(model), (0,))
    with pytest.raises(UserError, match="precision int8 is for backend openvino"):
        NMSWPredictor(precision="int8", device=CPU)
    for flags in (["--backend", "pytorch"], ["-device", "cuda"]):
        with pytest.raises(UserError, match="precision int8"):
            read_flags(["-m", str(model), "-i", "x", "-o", "y", "-device", "cpu", "--precision", "int8", *flags])
    monkeypatch.setattr("nnunet_nmsw.commands.quantize.NEEDED", ("a_library_that_nobody_has",))
    with pytest.raises(UserError, match=r"nmsw_quantize needs a_library.*nnunet-nmsw\[quantize\]"):
        main(["-m", str(model)])
