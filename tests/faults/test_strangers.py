"""A model from a stranger runs no code, unless it is trusted: a marker file would show that it did."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from tiny import DATASET_JSON
from untrained import write_image, write_model

from nnunet_nmsw import trainers
from nnunet_nmsw.commands.predict import main
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.model.safe_loading import check_origin, read_checkpoint


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Builtin(Code):
    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


class Import(Code):
    def __reduce__(self):
        return pickle.loads, (pickle.dumps(Code(self.marker)),)


PLACES = {
    "beside the weights": lambda c, code: c.update(note=code),
    "in the log": lambda c, code: c["logging"].update(losses=[code]),
    "as weights": lambda c, code: c.update(network_weights=code),
    "among the weights": lambda c, code: c["network_weights"].update(layer=code),
    "in the arguments": lambda c, code: c["init_args"].update(device=code),
}


def poisoned(model: Path, marker: Path, place: str = "beside the weights", code: type[Code] = Code) -> Path:
    """Hide code in a model's checkpoint. Returns the file."""
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    PLACES[place](content, code(marker))
    torch.save(content, file)
    return file


@pytest.mark.parametrize("code", [Code, Builtin, Import])
@pytest.mark.parametrize("place", list(PLACES))
def test_checkpoints_run_no_code(images, tmp_path, place, code):
    marker = tmp_path / "marker"
    model = write_model(tmp_path / "model")
    file = poisoned(model, marker, place, code)
    with pytest.raises(SystemExit, match=r"may run code.*--trust_model"):
        main(["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"])
    with pytest.raises(UserError, match="may run code"):
        NMSWPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(str(model), (0,))
    with pytest.raises(UserError, match="may run code"):
        read_checkpoint(file)  # as -pretrained_weights are
    assert not marker.exists()


def test_a_trusted_model_is_loaded_as_nnunet_does(images, tmp_path):
    marker, model = tmp_path / "marker", write_model(tmp_path / "model")
    poisoned(model, marker)
    flags = ["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu", "--trust_model"]
    main([*flags, "-npp", "0", "-nps", "1"])
    assert marker.exists()
    assert (tmp_path / "out" / "good.nii.gz").is_file()


@pytest.mark.parametrize("role", ["--global_model", "--local_model"])
def test_two_stock_models_run_no_code(images, tmp_path, role):
    marker = tmp_path / "marker"
    models = {name: write_model(tmp_path / name[2:], "nnUNetTrainer") for name in ("--global_model", "--local_model")}
    poisoned(models[role], marker)
    flags = [word for name, folder in models.items() for word in (name, str(folder))]
    with pytest.raises(SystemExit, match="may run code"):
        main(["-i", str(images), "-o", str(tmp_path / "out"), "-device", "cpu", *flags])
    assert not marker.exists()


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("trainer", ["nnUNetTrainerNMSW", "nnUNetTrainerNMSW_retrofit"])
def test_pretrained_weights_run_no_code(tmp_path, trainer, monkeypatch):
    """nnU-Net's command loads the file itself as well, afterwards: it does not come to that."""
    marker, model = tmp_path / "marker", write_model(tmp_path / "model", "nnUNetTrainer")
    file = poisoned(model, marker)
    plans = json.loads((model / "plans.json").read_text())
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "1", "3d_fullres", "0", "-pretrained_weights", str(file)])
    trainer_class = getattr(trainers, trainer)
    made = trainer_class({**plans, "continue_training": False}, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    with pytest.raises(UserError, match="may run code"):
        made.initialize()
    assert not marker.exists()


EVIL = {
    "os.system": "nonlin",
    "posix.system": "nonlin",
    "subprocess.call": "conv_op",
    "builtins.exec": "norm_op",
    "evil.Network": "network",
    "evil.PlainConvUNet": "network",
    "torch.load": "nonlin",
    "torch.hub.load": "network",
    "torch.nn.modules.module.torch.load": "nonlin",
    "torch.nn.functional.torch.load": "nonlin",
    "torch.nn.modules.module.warnings.sys.exit": "nonlin",
    "dynamic_network_architectures.architectures.unet.torch.load": "network",
    "nnunet_nmsw.commands.entry_points.predict": "network",
    "nnunet_nmsw.commands.predict.main": "nonlin",
    "torch.nnot.X": "nonlin",
    "monai.networks_evil.X": "network",
    "": "network",
}


@pytest.mark.parametrize("where", ["architecture", "global_architecture"])
@pytest.mark.parametrize("name", list(EVIL))
def test_plans_name_networks_and_layers_alone(images, tmp_path, monkeypatch, name, where):
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = write_model(tmp_path / "model")
    plans = json.loads((model / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]
    if where == "global_architecture":
        architecture = json.loads(json.dumps(architecture))
        configuration["nmsw"]["global_architecture"] = architecture
    if EVIL[name] == "network":
        architecture["network_class_name"] = name
    else:
        architecture["arch_kwargs"][EVIL[name]] = name
        architecture["arch_kwargs"]["nonlin_kwargs"] = {"command": f"touch {marker}"}
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(SystemExit) as error:
        main(["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"])
    assert "--trust_model" in str(error.value)
    assert "plans.json" in str(error.value)
    assert not marker.exists()
    assert "evil" not in sys.modules


PARTS = {
    "the global branch takes what to import from the plans": (
        {},
        {"arch_kwargs": {"nonlin": "os.system", "nonlin_kwargs": {"command": "touch MARKER"}}},
    ),
    "the plans name it and the global branch imports it": (
        {"dropout_op": "os.system", "dropout_op_kwargs": {"command": "touch MARKER"}},
        {"_kw_requires_import": ["conv_op", "norm_op", "nonlin", "dropout_op"]},
    ),
}


@pytest.mark.parametrize("parts", list(PARTS))
def test_parts_of_architectures_are_checked_as_they_are_merged(images, tmp_path, parts):
    marker = tmp_path / "marker"
    local, of_global = json.loads(json.dumps(PARTS[parts]).replace("MARKER", str(marker)))
    model = write_model(tmp_path / "model")
    plans = json.loads((model / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["arch_kwargs"] |= local
    if local:
        configuration["architecture"]["_kw_requires_import"].remove("dropout_op")
    configuration["nmsw"]["global_architecture"] = of_global
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(SystemExit, match=r"os\.system.*--trust_model"):
        main(["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"])
    assert not marker.exists()


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_variables_of_pytorch_change_nothing(images, tmp_path, monkeypatch, variable):
    marker, model = tmp_path / "marker", write_model(tmp_path / "model")
    flags = ["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu", "-npp", "0"]
    bad = write_model(tmp_path / "bad")
    poisoned(bad, marker)
    monkeypatch.setenv(variable, "1")
    main(flags)
    assert os.environ[variable] == "1"
    flags[flags.index(str(model))] = str(bad)
    with pytest.raises(SystemExit, match="may run code"):
        main(flags)
    assert not marker.exists()


def test_networks_that_come_with_the_packages_are_allowed():
    names = [
        "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "dynamic_network_architectures.architectures.primus.Primus",
        "monai.networks.nets.unet.UNet",
        "nnunet_nmsw.backbones.monai.SwinUNETR",
        "nnunet_nmsw.backbones.monai.MedNeXt",
    ]
    for name in names:
        kwargs = {"conv_op": "torch.nn.modules.conv.Conv3d", "dropout_op": None, "nonlin": "torch.nn.LeakyReLU"}
        kwargs["block"] = "dynamic_network_architectures.building_blocks.residual.BasicBlockD"
        check_origin(
            {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": list(kwargs)}, "the plans"
        )


def test_a_network_of_ones_own_is_trusted_by_flag(images, tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "from dynamic_network_architectures.architectures.unet import PlainConvUNet\n"
        "class Mine(PlainConvUNet):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = write_model(tmp_path / "model")
    text = (model / "plans.json").read_text()
    own = text.replace("dynamic_network_architectures.architectures.unet.PlainConvUNet", "my_networks.Mine")
    (model / "plans.json").write_text(own)
    flags = ["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu", "-npp", "0"]
    with pytest.raises(SystemExit, match=r"my_networks\.Mine.*--trust_model"):
        main(flags)
    main([*flags, "--trust_model"])
    assert (tmp_path / "out" / "good.nii.gz").is_file()


def test_checkpoints_of_every_kind_that_nnunet_writes_are_loaded(tmp_path):
    """What nnU-Net's trainer saves beside weights: scalars of NumPy, states of optimizer and scaler, a device."""
    import numpy as np

    file = write_model(tmp_path / "model") / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    layer = torch.nn.Conv3d(1, 1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, nesterov=True)
    layer(torch.ones(1, 1, 2, 2, 2)).sum().backward()
    optimizer.step()
    content |= {
        "network_weights": OrderedDict(content["network_weights"]),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": torch.amp.GradScaler("cpu").state_dict(),
        "logging": {"a": [np.float64(1), np.float32(2), np.int64(3), [np.float64(4)], np.bool_(True), 1.0]},
        "_best_ema": np.float64(0.7),
        "current_epoch": 1000,
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    content["init_args"] |= {"device": torch.device("cpu"), "unpack_dataset": True, "fold": 0}
    torch.save(content, file)
    assert read_checkpoint(file)["_best_ema"] == 0.7
    assert read_checkpoint(file, mmap=True)["logging"]["a"][0] == 1
    other = tmp_path / "other.pth"  # as NumPy 1 writes what NumPy 2 reads, and the other way round
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(other, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):
                names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
                here, there = names if names[0] in data else names[::-1]
                assert here in data
                data = data.replace(here, there)
            copy.writestr(name, data)
    assert read_checkpoint(other)["logging"]["a"][:2] == [1.0, 2.0]
    torch.save(content, file, pickle_protocol=4)  # nnU-Net never does, and PyTorch reads it by full pickle alone
    with pytest.raises(UserError, match=r"without running code.*--trust_model"):
        read_checkpoint(file)
    assert read_checkpoint(file, trust=True)["_best_ema"] == 0.7


def test_a_comparison_runs_no_code(tmp_path):
    """The models of nmsw_compare go through the same door."""
    from nnunet_nmsw.evaluation.models import Model
    from nnunet_nmsw.evaluation.predictions import FoldPredictor

    marker = tmp_path / "marker"
    for role, trainer in (("nmsw", "nnUNetTrainerNMSW"), ("baseline", "nnUNetTrainer")):
        folder = write_model(tmp_path / role, trainer)
        poisoned(folder, marker)
        with pytest.raises(UserError, match="may run code"):
            FoldPredictor(Model(role, folder, trainer, "checkpoint_final.pth"), 0, torch.device("cpu"))
    assert not marker.exists()


def test_the_command_itself(untrained, tmp_path):
    """The installed command, with a good and a poisoned model."""
    images, marker = tmp_path / "images", tmp_path / "marker"
    images.mkdir()
    write_image(images / "a_0000.nii.gz")
    model = tmp_path / "model"
    shutil.copytree(untrained, model)
    poisoned(model, marker)
    command = [os.path.join(os.path.dirname(sys.executable), "nmsw_predict"), "-device", "cpu", "-i", str(images)]
    command += ["-o", str(tmp_path / "out"), "-m", str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "may run code" in result.stderr.strip().splitlines()[-1]
    assert not marker.exists()
