"""Models as files for other programs: the program of docs/export.md runs them and gives the same prediction."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from old_model import CASES, FOLDER
from predictors import nmsw
from tiny import build_network, initialized, make_plans

from nnunet_nmsw.commands.export import main
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import PREFIX
from nnunet_nmsw.inference import exchange
from nnunet_nmsw.inference.exchange import DESCRIPTION, describe, export_model
from nnunet_nmsw.trainers import nnUNetTrainerNMSW

for name in ("onnx", "onnxruntime", "openvino"):
    pytest.importorskip(name)
PAGE = Path(__file__).parents[2] / "docs" / "export.md"
MODEL = FOLDER / "model"


def program_of_page(folder):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    file = folder / "predict_onnx.py"
    file.write_text(code)
    return file


def predicted_by_page(exported, volume, folder):
    """Labels and first voxels of windows, by the program of the page."""
    np.save(folder / "array.npy", volume)
    files = [folder / name for name in ("array.npy", "labels.npy", "windows.npy")]
    program = [sys.executable, program_of_page(folder), exported, *files]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [np.load(file) for file in files[1:]]


def check_prediction(predictor, exported, volume, folder):
    labels, starts = predicted_by_page(exported, volume, folder)
    logits, (windows,) = predictor.predict_case_logits({"data": torch.from_numpy(volume)})
    assert (starts == windows.starts).all()
    assert (labels != logits.argmax(0).numpy()).mean() < 1e-3  # where two logits are nearly the same
    return labels


@pytest.mark.parametrize("num_patches", ["10%", "auto", "3", "all"])
def test_a_trained_model_predicts_the_same_without_pytorch(tmp_path, num_patches):
    main(["-m", str(MODEL), "-o", str(tmp_path / "exported"), "-f", "0", "-k", num_patches])
    predictor = nmsw(num_patches=num_patches)
    predictor.initialize_from_trained_model_folder(str(MODEL), (0,))
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    of_model = (predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)
    images = [str(FOLDER / "images" / f"{CASES[0]}_0000.nii.gz")]
    volume, _, _ = preprocessor.run_case(images, None, *of_model)
    labels = check_prediction(predictor, tmp_path / "exported", np.asarray(volume), tmp_path)
    assert labels.max() > 0
    description = json.loads((tmp_path / "exported" / DESCRIPTION).read_text())
    assert description["labels"] == predictor.dataset_json["labels"]
    assert description["windows"]["threshold"] == predictor.threshold


@pytest.mark.parametrize("shape", [(16, 20, 24), (7, 17, 9)])  # the second is smaller than a patch
def test_a_model_with_context_predicts_the_same_without_pytorch(tmp_path, shape):
    torch.manual_seed(0)
    predictor = nmsw(num_patches=4)
    initialized(predictor, build_network(context_channels=2), 1)
    exported = tmp_path / "exported"
    exported.mkdir()
    export_model(predictor, [0], exported)
    volume = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    check_prediction(predictor, exported, volume, tmp_path)


def test_an_uncalibrated_model_asks_for_what_is_taken_then():
    predictor = initialized(nmsw(num_patches="auto"), build_network(), 1)
    assert describe(predictor, [2, 2, 2])["windows"]["num_patches"] == "10%"


def test_networks_with_dropout_are_exported(tmp_path):
    """They have to be compared as they predict, without it."""
    plans = make_plans(num_patches=2)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    architecture.update(dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.5})
    manager = PlansManager(plans)
    network = nnUNetTrainerNMSW.build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), 1, 3, False
    )
    export_model(initialized(nmsw(num_patches=2), network, 1), [0], tmp_path)
    assert (tmp_path / DESCRIPTION).is_file()


def test_nothing_is_written_where_something_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="full is there and not empty"):
        main(["-m", str(MODEL), "-o", str(tmp_path / "full")])
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    monkeypatch.setattr(exchange, "TOLERANCE", 0.0)  # of numbers that are never the very same
    with pytest.raises(UserError, match=r"global_branch cannot be exported: its logits differs by"):
        main(["-m", str(MODEL), "-o", str(tmp_path / "new")])
    assert not list((tmp_path / "new").iterdir())
    killed = tmp_path / "new" / f"{PREFIX}_of_a_call_that_was_killed"
    killed.mkdir()
    os.utime(killed, (0, 0))
    with pytest.raises(UserError, match="cannot be exported"):  # and not that the folder is not empty
        main(["-m", str(MODEL), "-o", str(tmp_path / "new")])
    assert not killed.exists()


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_nmsw.commands.export.NEEDED", ("onnx", "a_library_that_nobody_has"))
    with pytest.raises(UserError, match=r"nmsw_export needs a_library.*nnunet-nmsw\[export\]"):
        main(["-m", str(MODEL), "-o", str(tmp_path / "new")])
