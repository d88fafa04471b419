"""Weights to start from, and a frozen local branch."""

import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import build_network, make_plans, make_trainer
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
