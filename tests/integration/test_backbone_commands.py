"""Residual, transformer and MONAI networks with the real commands, on the dataset that all commands' tests share."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import DATASET, run
from test_commands import images

pytestmark = pytest.mark.integration

TRAINER = "nnUNetTrainerNMSW_tiny"


def residual(small: dict) -> dict:
    """The small plans' network with residual blocks in its encoder."""
    kwargs = dict(small["arch_kwargs"])
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    return {**small, "network_class_name": name, "arch_kwargs": kwargs}


def mednext(small: dict) -> dict:
    kwargs = {
        "init_filters": 4,
        "kernel_size": 3,
        "blocks_down": [1, 1],
        "blocks_bottleneck": 1,
        "blocks_up": [1, 1],
    }
    name = "nnunet_nmsw.backbones.monai.MedNeXt"
    return {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": []}


def primus(small: dict) -> dict:
    kwargs = {
        "input_shape": [16] * 3,
        "patch_embed_size": [8] * 3,
        "embed_dim": 24,
        "eva_depth": 1,
        "eva_numheads": 2,
    }
    name = "dynamic_network_architectures.architectures.primus.Primus"
    return {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": []}


def write_plans(workspace: Path, name: str, architecture, nmsw: dict) -> None:
    """Plans beside the small ones, with another architecture."""
    folder = workspace / "nnUNet_preprocessed" / DATASET
    plans = json.loads((folder / "nnUNetPlans_small.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration.update(architecture=architecture(configuration["architecture"]), nmsw=nmsw)
    plans["plans_name"] = name
    (folder / f"{name}.json").write_text(json.dumps(plans))


def backbone(name: str, architecture, nmsw: dict):
    mark = pytest.mark.compatibility("backbones", f"{name}: nnUNetv2_train with validation, and nmsw_predict")
    return pytest.param(architecture, nmsw, id=name, marks=mark)


@pytest.mark.parametrize(
    ("architecture", "nmsw"),
    [
        backbone("ResidualEncoderUNet", residual, {"global_width": 0.5}),
        backbone("MONAI's MedNeXt", mednext, {"global_architecture": {"arch_kwargs": {"init_filters": 2}}}),
        backbone("Primus", primus, {}),
    ],
)
def test_train_and_predict(architecture, nmsw, workspace, tmp_path):
    name = f"nnUNetPlans_{architecture.__name__}"
    write_plans(workspace, name, architecture, nmsw)
    # Models of its own, as other tests look at those of the workspace; and as few processes as there may be.
    changes = {"nnUNet_results": str(tmp_path / "results"), "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
    run(f"nnUNetv2_train 998 3d_fullres 0 -p {name} -tr {TRAINER} -device cpu", workspace, **changes)
    model = tmp_path / "results" / DATASET / f"{TRAINER}__{name}__3d_fullres"
    assert json.loads((model / "fold_0" / "validation" / "summary.json").read_text())["mean"]
    logging = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["logging"]
    for part in ("local", "global", "fused"):
        assert np.isfinite(logging[f"nmsw_loss_{part}"]).all(), part

    flags = f"-d 998 -c 3d_fullres -f 0 -p {name} -tr {TRAINER} -device cpu --disable_tta"
    run(f"nmsw_predict -i {images(workspace)} -o {tmp_path / 'nmsw'} {flags} -npp 0 -nps 0 -k 3", workspace, **changes)
    folders = ["nmsw"]
    if architecture is primus:  # no deep supervision, and a global branch of another class
        stock = f"nnUNetv2_predict -i {images(workspace)} -o {tmp_path / 'stock'} {flags} -npp 0 -nps 0"
        run(stock, workspace, **changes)
        folders.append("stock")
    for folder in folders:
        for image in images(workspace).iterdir():
            predicted = sitk.ReadImage(str(tmp_path / folder / image.name.replace("_0000", "")))
            assert predicted.GetSize() == sitk.ReadImage(str(image)).GetSize()
            assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= {0, 1, 2}
