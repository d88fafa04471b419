"""Networks of many kinds as local and as global branch: built, trained and predicted with in this process."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from architectures import (
    BACKBONES,
    CONFIGURATION,
    CPU,
    MEDNEXT,
    PRIMUS,
    SWIN,
    architecture,
    build,
    plans_with,
    resenc,
    unet,
)
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import DATASET_JSON, make_configuration, make_plans, make_trainer
from torch import nn
from training import ENCODING

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.model.strides import total_stride
from nnunet_nmsw.trainers.step import TrainingStep
from nnunet_nmsw.trainers.views import TrainingVolume


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.compatibility(
                "backbones", f"{name}: a step, the saved plans, NMSWPredictor; in one process"
            ),
        )
        for name in BACKBONES
    ],
)
def test_a_backbone_is_trained_and_predicts(name, folders):
    architecture, patch, scales = BACKBONES[name]
    torch.manual_seed(0)
    # SwinUNETR would do, but in the view of this volume it would see nothing but padding.
    setting = unet("PlainConvUNet") if name == "SwinUNETR" else None
    plans = plans_with(architecture, patch, downsampling_factor=[2, 2, 2], global_architecture=setting)
    trainer = make_trainer(plans)
    trainer.initialize()
    network = trainer.network
    assert trainer.enable_deep_supervision is (scales is not None)
    shape = tuple(patch + extra for extra in (8, 0, 5))
    labels = torch.randint(0, 3, (1, 1, *shape), dtype=torch.int16)
    volume = TrainingVolume(torch.randn(1, 1, *shape), labels, torch.tensor([[0, 0, 0], [8, 0, 5]]))
    step = TrainingStep(volume, trainer.loss)
    local = network.train().local(torch.randn(2, 1, *[patch] * 3))
    assert (len(local) if isinstance(local, list) else None) == scales
    loss = network(step).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    for branch in (network.local_branch, network.global_branch):
        gradients = [p.grad is not None for p in branch.parameters()]
        assert sum(gradients) > len(gradients) / 2
    network.eval()
    assert network(step).loss.isfinite()  # as after an epoch

    trainer.set_deep_supervision_enabled(False)
    patches = torch.randn(2, 1, *[patch] * 3)
    assert network(patches).shape == (2, 3, *[patch] * 3)
    # As a predictor does it: from the plans that training saved, without deep supervision.
    saved = json.loads(json.dumps(trainer.plans_manager.plans))
    loaded = build(saved).eval()
    loaded.load_state_dict(network.state_dict())
    # A training has its weights in another layout, in which sums round otherwise.
    torch.testing.assert_close(loaded(patches), network(patches), rtol=1e-3, atol=1e-4)
    predictor = NMSWPredictor(num_patches=1, use_mirroring=False, device=CPU, allow_tqdm=False)
    manager = PlansManager(saved)
    predictor.manual_initialization(
        loaded,
        manager,
        manager.get_configuration(CONFIGURATION),
        [loaded.state_dict()],
        DATASET_JSON,
        "nnUNetTrainerNMSW",
        None,
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, *shape))
    assert logits.shape == (3, *shape)
    assert logits.isfinite().all()


def test_scales_of_deep_supervision_are_nnunets():
    for entry in (unet("PlainConvUNet"), resenc()):
        network = build(plans_with(entry), deep_supervision=True)
        assert network.deep_supervision_scales(1) == [[1, 1, 1], [0.5, 0.5, 0.5]]
        assert network.training
        network.decoder.deep_supervision = False
        assert network.deep_supervision_scales(1) is None


def test_several_outputs_without_a_switch_are_refused():
    with pytest.raises(UserError, match=r"decoder\.deep_supervision"):
        build(plans_with(architecture("TwoOutputs"))).deep_supervision_scales(1)


def features(branch):
    return list(branch.encoder.output_channels)


@pytest.mark.parametrize("entry", [unet("PlainConvUNet"), resenc()], ids=["plain", "residual"])
def test_the_global_branch_is_narrower(entry):
    network = build(plans_with(entry, global_width=0.5))
    assert features(network.local_branch) == [4, 8, 8]
    assert features(network.global_branch) == [2, 4, 4]
    assert type(network.global_branch) is type(network.local_branch)


def test_single_arguments_of_the_global_branch():
    setting = {"arch_kwargs": {"features_per_stage": [3, 5, 7], "norm_op": "torch.nn.BatchNorm3d"}}
    network = build(plans_with(resenc(), global_width=0.5, global_architecture=setting))
    assert features(network.global_branch) == [3, 5, 7]
    assert features(network.local_branch) == [4, 8, 8]
    kinds = [{type(m) for m in branch.modules()} for branch in (network.global_branch, network.local_branch)]
    assert nn.BatchNorm3d in kinds[0] - kinds[1]


def test_another_class_as_the_global_branch():
    network = build(plans_with(unet("PlainConvUNet"), global_architecture=MEDNEXT))
    assert type(network.global_branch).__name__ == "MedNeXt"
    assert network.coarse(torch.randn(1, 1, 9, 5, 7), ENCODING).logits_Cdhw.shape == (3, 9, 5, 7)
    alone = {"network_class_name": architecture("OneConvolution")["network_class_name"]}
    network = build(plans_with(unet("PlainConvUNet"), global_architecture=alone))
    assert network.global_branch.convolution.kernel_size == (3, 3, 3)


def test_strides_that_networks_tell():
    network = build(plans_with(unet("PlainConvUNet", strides=[1, 2, 2])))
    assert total_stride(network.local_branch) == [4, 4, 4]
    assert total_stride(build(plans_with(unet("PlainConvUNet"))).global_branch) == [2, 4, 4]
    assert total_stride(nn.Identity()) is None


@pytest.mark.parametrize("spacing", [[1.0, 1.0, 1.0], [5.0, 0.7, 0.7]])
@pytest.mark.parametrize("median", [[100, 200, 200], [3, 64, 64], [5, 6, 7]])
def test_networks_of_one_size_get_a_convolutional_global_branch(median, spacing):
    plans = plans_with(PRIMUS, 16, global_width=0.5)
    configuration = plans["configurations"][CONFIGURATION]
    configuration.update(median_image_size_in_voxels=median, spacing=spacing)
    config = settings_of(configuration)
    kwargs = config.global_architecture["arch_kwargs"]
    assert kwargs["features_per_stage"][:2] == [16, 32]
    # What is saved with the results gives the same network again.
    configuration["nmsw"] = json.loads(json.dumps(config.to_dict()))
    assert settings_of(configuration) == config
    network = build(plans)
    assert type(network.global_branch).__name__ == "PlainConvUNet"
    for shape in ((4, 5, 9), (17, 2, 3)):
        assert network.coarse(torch.randn(1, 1, *shape), ENCODING).logits_Cdhw.shape == (3, *shape)


def changed(entry, **arch_kwargs):
    return {**entry, "arch_kwargs": {**entry["arch_kwargs"], **arch_kwargs}}


@pytest.mark.parametrize(
    ("entry", "setting", "says"),
    [
        (architecture("NoSuchNetwork"), None, "NoSuchNetwork"),
        ({**MEDNEXT, "network_class_name": "math.pi"}, None, "no network class"),
        (changed(unet("PlainConvUNet"), widths=3), None, 'no "widths".*features_per_stage'),
        (changed(MEDNEXT, filters=3), None, 'no "filters".*init_filters'),
        (changed(MEDNEXT, num_classes=3), None, 'no "num_classes"'),
        (unet("PlainConvUNet", ["strides"]), None, "missing.*strides"),
        (changed(unet("PlainConvUNet"), norm_op="torch.nn.NoSuchNorm"), None, "NoSuchNorm"),
        ({**MEDNEXT, "_kw_requires_import": ["norm_op"]}, None, '"norm_op"'),
        ({key: MEDNEXT[key] for key in ("network_class_name", "arch_kwargs")}, None, '"_kw_requires_import"'),
        (changed(PRIMUS, input_shape=[16, 16, 24]), None, '"input_shape".*"patch_size"'),
        (changed(PRIMUS, patch_embed_size=[8, 8, 6]), None, '"patch_embed_size"'),
        (SWIN, None, r"multiples of \[32, 32, 32\]"),
        (PRIMUS, {"arch_kwargs": {"embed_dim": 12}}, "global_architecture.*any size"),
        (MEDNEXT, PRIMUS, "global_architecture.*any size"),
        (MEDNEXT, "MedNeXt", "network_class_name.*arch_kwargs"),
        (MEDNEXT, {"arch_kwarg": {}}, "network_class_name.*arch_kwargs"),
        (MEDNEXT, {"arch_kwargs": [1]}, "network_class_name.*arch_kwargs"),
        (MEDNEXT, {"_kw_requires_import": "norm"}, "network_class_name.*arch_kwargs"),
        (MEDNEXT, {"network_class_name": "nowhere.Network"}, "global_architecture.*nowhere.Network"),
        (MEDNEXT, {"arch_kwargs": {"filters": 3}}, 'global_architecture.*no "filters"'),
    ],
)
def test_architectures_that_cannot_be_are_refused_in_one_line(entry, setting, says):
    with pytest.raises(UserError, match=says) as error:
        build(plans_with(entry, 16, global_architecture=setting))
    assert "\n" not in str(error.value)


def test_a_wrong_class_is_refused_before_anything_is_written(folders):
    with pytest.raises(UserError, match="NoSuchNetwork"):
        make_trainer(plans_with(architecture("NoSuchNetwork")))
    assert not (folders / "nnUNet_results").exists()


def test_without_monai_the_message_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "nnunet_nmsw.backbones.monai", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "monai", None)  # importing it raises ImportError
    with pytest.raises(UserError, match=r"nnunet-nmsw\[monai\]"):
        build(plans_with(MEDNEXT))


@pytest.mark.compatibility("plans", "nnUNetPlannerResEncM, L, XL: both branches are built and run on the meta device")
@pytest.mark.parametrize("planner_class", [nnUNetPlannerResEncM, nnUNetPlannerResEncL, nnUNetPlannerResEncXL])
def test_plans_of_the_residual_encoder_planners(planner_class, folders):
    """As planned for CT scans; without memory for weights, so that the largest costs nothing."""
    raw = folders / "nnUNet_raw" / "Dataset998_Tiny"
    (raw / "imagesTr").mkdir(parents=True)
    fingerprint = {"median_relative_size_after_cropping": 1.0}
    for file, content in (
        (raw / "dataset.json", {**DATASET_JSON, "numTraining": 0}),
        (folders / "nnUNet_preprocessed" / "Dataset998_Tiny" / "dataset_fingerprint.json", fingerprint),
    ):
        file.write_text(json.dumps(content))
    with torch.device("meta"):
        planner = planner_class("Dataset998_Tiny")
        planned = planner.get_plans_for_configuration((1.5, 0.8, 0.8), (250, 512, 512), "data", 1e9, {})
        planned["architecture"] = json.loads(json.dumps(planned["architecture"], default=int))
        configuration = {**make_configuration(), **planned}
        config = settings_of(configuration)
        d, h, w = map(int, planned["patch_size"])
        network = NMSWNetwork.from_architecture(configuration["architecture"], (d, h, w), (1, 3), True, config)
        assert type(network.local_branch).__name__ == "ResidualEncoderUNet"
        assert features(network.global_branch) == [round(0.5 * n) for n in features(network.local_branch)]
        stages = len(features(network.local_branch))
        assert len(network.deep_supervision_scales(1)) == stages - 1
        low_shape = [-(-n // f) for n, f in zip((250, 512, 512), config.downsampling_factor, strict=True)]
        assert network.coarse(torch.empty(1, 1, *low_shape), ENCODING).logits_Cdhw.shape == (3, *low_shape)


def documented():
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("number", range(5))
def test_the_documents_examples_build(number):
    examples = documented()
    assert len(examples) == 5
    plans = make_plans((32, 32, 32))
    plans["configurations"][CONFIGURATION].update({**{"architecture": resenc()}, **examples[number]})
    build(plans)
