"""Local branches in 8-bit integers: made, measured, kept beside the checkpoint, and taken from there."""

import json
import shutil

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from old_model import CASES, FOLDER, read
from predictors import CPU, nmsw
from tiny import build_network, build_retrofit_network, initialized

from nnunet_nmsw.commands.predict import main as predict
from nnunet_nmsw.commands.predict_flags import read_flags
from nnunet_nmsw.commands.quantize import main
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation.quantization import QuantizedFold
from nnunet_nmsw.inference.openvino_branches import OpenVINOBranch
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.quantized import FACTS, WEIGHTS, find_quantized, quantized, read_quantized

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


def test_integers_are_what_computes(preprocessed, model):
    main(["-m", str(model), "--max_drop", "1"])
    volume_CDHW = torch.randn(1, 24, 28, 32, generator=torch.Generator().manual_seed(0))
    logits = {}
    for precision in ("float32", "int8"):
        predictor = nmsw(num_patches="all", backend="openvino", precision=precision)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        logits[precision] = predictor.predict_case_logits({"data": volume_CDHW}).logits_CDHW.float()
    difference = (logits["int8"] - logits["float32"]).abs().mean()
    print("difference", difference, logits["float32"].std())
    assert 0 < difference < 0.2 * logits["float32"].std()


def test_what_does_not_belong_together_is_refused(preprocessed, model):
    main(["-m", str(model), "--max_drop", "1"])
    predictor = nmsw(backend="openvino", precision="int8")
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    weights, branch = predictor.list_of_parameters, predictor.nmsw_network.local_branch
    folders = find_quantized(model, [0], weights)
    assert read_quantized(folders, branch) is not None
    with pytest.raises(UserError, match="loaded from a folder"):
        read_quantized({}, branch)
    with (model / "fold_0" / WEIGHTS).open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(UserError, match=rf"{WEIGHTS} beside it is damaged: run nmsw_quantize"):
        read_quantized(folders, branch)
    other = {name: value + 1 for name, value in weights[0].items()}
    with pytest.raises(UserError, match=rf"{FACTS} was made of other weights .*: run nmsw_quantize -m .* -f 0.*-chk"):
        find_quantized(model, [0], [other])
    (model / "fold_0" / FACTS).write_text("{}")
    with pytest.raises(UserError, match=rf"{FACTS} is broken.*run nmsw_quantize"):
        find_quantized(model, [0], weights)


@pytest.mark.parametrize("build", [build_network, build_retrofit_network])
def test_branches_with_context_are_quantised(preprocessed, build):
    network = build(context_channels=2)
    predictor = initialized(nmsw(num_patches=2), network)
    fold = QuantizedFold(predictor, preprocessed, 0)
    patches = fold.patches(1)
    assert patches
    model = quantized(network.local_branch.eval(), patches, False)
    branch = OpenVINOBranch(network.local_branch, False, preprocessed, model)
    with torch.no_grad():
        expected = network.local_branch(patches[0])
    found = branch(patches[0])
    assert found.shape == expected.shape
    assert np.corrcoef(found.numpy().ravel(), expected.numpy().ravel())[0, 1] > 0.9


def test_a_model_that_loses_too_much_is_not_quantised(preprocessed, model):
    with pytest.raises(UserError, match=r"fold_0: Dice .*in int8, .*first and last layer.*--max_drop -1 allows"):
        main(["-m", str(model), "--max_drop", "-1"])
    assert not list((model / "fold_0").glob("local_branch_int8*"))


def test_what_is_missing_is_said_in_one_line(preprocessed, model, monkeypatch):
    (preprocessed / "splits_final.json").write_text("[]")
    with pytest.raises(UserError, match=r"splits_final.json has no fold 0"):
        main(["-m", str(model)])
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": ["gone"], "val": ["gone"]}]))
    with pytest.raises(UserError, match=r"cannot read a case of .*preprocess it again"):
        main(["-m", str(model)])
    with pytest.raises(UserError, match='there is no dataset "kidneys"'):
        main(["-m", str(model), "-d", "kidneys"])
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
