"""Weights to start from, and a frozen local branch."""

import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import DATASET_JSON, build_network, make_plans, make_trainer
from torch import nn

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.safe_loading import read_checkpoint
from nnunet_nmsw.nnunet.trainer import AlreadyLoaded, pretrained_weights_of_command_line
from nnunet_nmsw.trainers import nnUNetTrainerNMSW_retrofit
from nnunet_nmsw.trainers.pretrained import load_local_branch, load_pretrained


def other_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state of the same shape that no initialisation gives."""
    return {name: torch.full_like(weight, 0.25) for name, weight in network.state_dict().items()}


def test_stock_weights_go_into_the_local_branch_but_segmentation_layers():
    network = build_network()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    load_pretrained(network, other_weights(network.local_branch), "stock.pth")
    for name, weight in network.state_dict().items():
        is_loaded = name.startswith("local_branch.") and ".seg_layers." not in name
        assert torch.equal(weight, torch.full_like(weight, 0.25) if is_loaded else before[name]), name


def test_nmsw_weights_go_into_both_branches():
    network = build_network(num_classes=3)
    load_pretrained(network, other_weights(build_network(num_classes=5)), "nmsw.pth")
    loaded = {name for name, weight in network.state_dict().items() if (weight == 0.25).all()}
    branches = {n for n in network.state_dict() if n.startswith(("local_branch.", "global_branch."))}
    assert loaded == {name for name in branches if ".seg_layers." not in name}


def test_the_local_branch_is_taken_whole_from_a_stock_or_an_nmsw_model():
    for trained in (build_network().local_branch, build_network()):
        network = build_network()
        load_local_branch(network, other_weights(trained), "model.pth")
        assert all((weight == 0.25).all() for weight in network.local_branch.state_dict().values())


def test_layers_that_differ_are_named():
    network, other = build_network(num_classes=3), build_network(num_classes=4).local_branch.state_dict()
    removed = "encoder.stages.0.0.convs.0.conv.weight"
    del other[removed]
    with pytest.raises(
        UserError, match=r"model.pth does not fit.*decoder.seg_layers.0.bias \(4 there, 3 here\)"
    ) as error:
        load_local_branch(network, other, "model.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"{removed} \(missing there, 4×1×3×3×3 here\)$"):
        load_pretrained(network, other, "model.pth")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", None),
        ("4 3d_fullres 0 -p nnUNetPlans_small -tr X", None),
        ("4 0 -p P -pretrained_weights {file} --npz", "{file}"),
    ],
)
def test_the_flag_is_read_from_the_command_line(flags, expected, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.touch()
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", *flags.format(file=file).split()])
    assert pretrained_weights_of_command_line() == (expected and Path(expected.format(file=file)))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        pretrained_weights_of_command_line(["-pretrained_weights", str(tmp_path / "missing.pth")])
    half = tmp_path / "half.pth"
    half.write_bytes(b"half a file")
    with pytest.raises(UserError, match="no checkpoint of PyTorch"):
        read_checkpoint(half)
    torch.save({"weights": 1}, half)
    with pytest.raises(UserError, match="no network_weights"):
        read_checkpoint(half)


def test_nnunets_own_loading_changes_nothing_afterwards(tmp_path):
    network = build_network()
    file = tmp_path / "stock.pth"
    torch.save({"network_weights": other_weights(network.local_branch)}, file)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    load_pretrained_weights(AlreadyLoaded(network), str(file))
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_a_frozen_local_branch_keeps_no_activations_and_stays_in_evaluation_mode():
    network = build_network(trainer=nnUNetTrainerNMSW_retrofit).train()
    assert network.global_branch.training
    assert not network.local_branch.training
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(name.startswith("local_branch.") for name in trained)
    patches = torch.randn(4, 1, 8, 8, 8)
    for windows_at_once in (None, 1):
        logits = build_network(trainer=nnUNetTrainerNMSW_retrofit, windows_at_once=windows_at_once).local(patches)
        assert not logits.requires_grad
        assert torch.allclose(logits, network.local_branch(patches), atol=1e-5)


@pytest.mark.usefixtures("folders")
def test_the_trainer_loads_them_before_it_compiles_and_trains(tmp_path, monkeypatch):
    file = tmp_path / "stock.pth"
    torch.save({"network_weights": other_weights(build_network().local_branch)}, file)
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "4", "3d_fullres", "0", "-pretrained_weights", str(file)])
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)  # as on a GPU
    trainer = make_trainer(make_plans())
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))  # what nnU-Net does next
    network = trainer.nmsw_network
    assert network.local_branch._compiled_call_impl is not None
    loaded = {name for name, weight in network.state_dict().items() if (weight == 0.25).all()}
    assert {name for name in network.state_dict() if name.startswith("local_branch.encoder.")} <= loaded
    trainer._unwrap_pretrained()
    assert trainer.network is network


def stock_checkpoint(folder, plans=None, **of_dataset):
    """A checkpoint of the tiny stock model, as nnU-Net saves it."""
    dataset = {**DATASET_JSON, **of_dataset}
    init_args = {"plans": plans or make_plans(), "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset}
    file = folder / "stock.pth"
    weights = other_weights(build_network().local_branch)
    content = {"network_weights": weights, "init_args": init_args, "inference_allowed_mirroring_axes": (0,)}
    torch.save({**content, "trainer_name": "nnUNetTrainer"}, file)
    return file


def retrofit(fold=0):
    plans = {**make_plans(), "continue_training": False}
    trainer = nnUNetTrainerNMSW_retrofit(plans, "3d_fullres", fold, DATASET_JSON, torch.device("cpu"))
    trainer.initialize()
    return trainer


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("what", ["labels", "spacing", "normalization_schemes"])
def test_a_retrofit_of_a_model_of_another_task_is_refused(tmp_path, what):
    plans = make_plans()
    changed = {"spacing": [1.0, 1.0, 2.0], "normalization_schemes": ["CTNormalization"]}
    if what in changed:
        plans["configurations"]["3d_fullres"][what] = changed[what]
    labels = {"labels": {"background": 0, "lesion": 1, "organ": 2}} if what == "labels" else {}
    with pytest.raises(UserError, match=f"was trained with other {what.replace('_', ' ')}"):
        retrofit().load_pretrained_weights(stock_checkpoint(tmp_path, plans, **labels))


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("fold", [0, 1])
def test_a_retrofit_mirrors_as_its_stock_model_and_tells_of_another_fold(tmp_path, capsys, fold):
    trainer = retrofit(fold)
    trainer.load_pretrained_weights(stock_checkpoint(tmp_path))
    assert all((weight == 0.25).all() for weight in trainer.nmsw_network.local_branch.state_dict().values())
    *_, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert axes == trainer.inference_allowed_mirroring_axes == (0,)
    assert ("has seen cases that fold 1 validates on" in capsys.readouterr().out) == (fold == 1)
