"""What the local branch is told of the whole volume."""

import json
from contextlib import nullcontext

import pytest
import torch
from predictors import nmsw, stock
from tiny import build_network, build_retrofit_network, initialized, make_plans
from torch import Tensor
from training import ENCODING, training_step
from untrained import write_model

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.model_folder import check_model
from nnunet_nmsw.inference.networks import Ensemble
from nnunet_nmsw.inference.volume import Padded
from nnunet_nmsw.model.context import Context, channels_of_context
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.trainers import nnUNetTrainerNMSW_retrofit, nnUNetTrainerNMSW_retrofit_context
from nnunet_nmsw.trainers.checkpoints import settings_of_training
from nnunet_nmsw.trainers.pretrained import load_local_branch, load_pretrained
from nnunet_nmsw.volume.interpolation import upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import crop_windows, downsample

PATCH, FACTOR = (8, 8, 8), (2, 2, 2)


def with_context(channels: int = 2, **settings) -> NMSWNetwork:
    return build_network(PATCH, downsampling_factor=list(FACTOR), context_channels=channels, **settings)


def retrofit() -> NMSWNetwork:
    return build_retrofit_network(PATCH, downsampling_factor=list(FACTOR), context_channels=2)


def coarse_of(network: NMSWNetwork, volume_1CDHW: Tensor, encoding: LabelEncoding = ENCODING):
    return network.coarse(downsample(volume_1CDHW, FACTOR), encoding)


@pytest.mark.parametrize("encoding", [LabelEncoding(3), LabelEncoding(4, None, ((1, 2), (2,), (3,)), (1, 2, 3))])
def test_the_context_of_a_window_is_that_of_the_volume_there(encoding):
    network = with_context().eval()
    volume, starts = torch.randn(1, 1, 17, 12, 16), torch.tensor([[0, 0, 0], [9, 4, 8], [3, 1, 5]])
    coarse = coarse_of(network, volume, encoding)
    probability = coarse.logits_Cdhw.sigmoid() if encoding.has_regions else coarse.logits_Cdhw.softmax(0)
    mixed = torch.einsum("gc,cdhw->gdhw", network.context.of_probabilities.weight[:, :, 0, 0, 0], probability)
    low_shape = downsample(volume, FACTOR).shape[2:]
    output = network.global_branch(torch.nn.functional.pad(downsample(volume, FACTOR), (0, 0, 0, 0, 0, 1)))[0]
    output = output[(slice(None), *(slice(n) for n in low_shape))]
    everywhere = upsample_window(output[4:] + mixed, (0, 0, 0), volume.shape[2:], FACTOR)[None]
    patches = crop_windows(volume, starts, PATCH)
    expected = torch.cat([patches, crop_windows(everywhere, starts, PATCH)], 1)
    torch.testing.assert_close(network.with_context(patches, coarse, starts), expected)


@pytest.mark.parametrize("build", [with_context, retrofit])
def test_nnunets_own_sliding_window_is_that_of_the_image_alone(build):
    network, patches = build().eval(), torch.randn(3, 1, *PATCH)
    alone = network(patches)
    zeros = torch.zeros(3, 2, *PATCH)
    as_trained = torch.cat([patches, zeros], 1) if build is with_context else patches
    assert torch.equal(alone, network.local_branch(as_trained))
    volume = torch.randn(1, 16, 12, 20)
    logits = initialized(stock(False), network).predict_logits_from_preprocessed_data(volume)
    with torch.no_grad():
        network.context.of_probabilities.weight.add_(10)
    assert torch.equal(initialized(stock(False), network).predict_logits_from_preprocessed_data(volume), logits)


def test_windows_are_without_context_by_probability_in_training_and_never_afterwards(monkeypatch):
    network = with_context()
    starts, patches = torch.zeros(200, 3, dtype=torch.int64), torch.zeros(200, 1, *PATCH)
    coarse = coarse_of(network, torch.randn(1, 1, 16, 16, 16))

    def share_without() -> float:
        context = network.with_context(patches, coarse, starts)[:, 1:]
        return float((context == 0).flatten(1).all(1).float().mean())

    for dropout in (0.0, 0.3, 1.0):
        monkeypatch.setattr(Context, "dropout", dropout)
        torch.manual_seed(0)
        assert share_without() == pytest.approx(dropout, abs=0.1)
    network.eval()
    assert share_without() == 0


def test_the_local_loss_trains_the_context_and_not_the_coarse_prediction():
    network = with_context()
    network.context.dropout = 0.0
    volume, starts = torch.randn(1, 1, 16, 16, 16), torch.tensor([[4, 4, 4]])
    patches = network.with_context(crop_windows(volume, starts, PATCH), coarse_of(network, volume), starts)
    network.local(patches).square().sum().backward()
    by_output = network.global_branch.decoder.seg_layers[-1].weight.grad.flatten(1).abs().amax(1)
    assert (by_output[:4] == 0).all()  # three classes and the score map
    assert (by_output[4:] > 0).all()
    assert network.context.of_probabilities.weight.grad.abs().max() > 0


@pytest.mark.parametrize("build", [with_context, retrofit])
@pytest.mark.parametrize("axes", [(), (1,), (0, 1, 2)])
def test_the_context_is_mirrored_with_the_image(build, axes):
    network = build()
    with torch.no_grad():
        for parameter in network.context.parameters():
            parameter.normal_()
    (fold,) = Ensemble(network, [network.state_dict()], ENCODING, torch.device("cpu"), axes).folds()
    padded = Padded.of(torch.randn(1, 16, 14, 18), PATCH)
    with torch.no_grad():
        coarse, starts = fold.coarse(padded), torch.tensor([[0, 3, 5], [8, 6, 10]])
        inputs = network.with_context(crop_windows(padded.volume_CDHW[None], starts, PATCH), coarse, starts)
        flips = [[axis + 2 for number, axis in enumerate(axes) if bits >> number & 1] for bits in range(2 ** len(axes))]
        expected = torch.stack([network(inputs.flip(flip)).flip(flip) for flip in flips]).mean(0)
        torch.testing.assert_close(fold.patches(padded, coarse, starts), expected)
        others = [network.coarse(downsample(padded.volume_CDHW[None].flip(flip), FACTOR), ENCODING) for flip in flips]
        each = [of.context_Gdhw.flip([axis - 1 for axis in flip]) for of, flip in zip(others, flips, strict=True)]
        torch.testing.assert_close(coarse.context_Gdhw, torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)


def test_context_reaches_the_prediction():
    network, volume = with_context().eval(), torch.randn(1, 16, 20, 24)
    before = initialized(nmsw(num_patches=3), network).predict_logits_from_preprocessed_data(volume)
    with torch.no_grad():
        network.context.of_probabilities.weight.add_(10)
    after = initialized(nmsw(num_patches=3), network).predict_logits_from_preprocessed_data(volume)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("windows_at_once", [None, 1])
@pytest.mark.parametrize("trainer", [None, nnUNetTrainerNMSW_retrofit_context])
def test_a_step_trains_every_parameter(trainer, windows_at_once):
    settings = {"trainer": trainer} if trainer else {}
    network = with_context(windows_at_once=windows_at_once, **settings)
    network.context.dropout = 0.0
    with torch.no_grad():
        for parameter in network.context.parameters():
            parameter.normal_()
    training_step(network, (16, 16, 16)).loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_stock_network_with_an_addition_starts_as_it_is():
    network, stock_network = retrofit(), build_network(PATCH).local_branch
    load_local_branch(network, stock_network.state_dict(), "stock.pth")
    volume, starts = torch.randn(1, 1, 16, 16, 16), torch.tensor([[0, 0, 0], [5, 8, 3]])
    patches = crop_windows(volume, starts, PATCH)
    inputs = network.with_context(patches, coarse_of(network, volume), starts)
    assert inputs.shape[1] == 3
    assert torch.equal(network(inputs), stock_network(patches))
    with torch.no_grad():
        network.context.addition[-1].weight.add_(1)
    assert not torch.equal(network(inputs), stock_network(patches))
    assert torch.equal(network(patches), stock_network(patches))


@pytest.mark.parametrize("load", [load_pretrained, load_local_branch])
def test_weights_of_a_network_without_context_ignore_it(load):
    network, other = with_context().eval(), build_network(PATCH, downsampling_factor=list(FACTOR)).local_branch
    load(network, other.state_dict(), "stock.pth")
    patches = torch.randn(2, 3, *PATCH)
    without = torch.cat([patches[:, :1], torch.zeros(2, 2, *PATCH)], 1)
    assert torch.equal(network(patches), network(without))
    if load is load_local_branch:
        torch.testing.assert_close(network(patches), other(patches[:, :1]))


def test_the_state_tells_how_many_channels_there_are():
    assert channels_of_context(build_network().local_branch.state_dict()) is None
    assert channels_of_context(build_network().state_dict()) == 0
    assert channels_of_context(with_context(5).state_dict()) == 5


@pytest.mark.parametrize(
    ("trainer", "channels", "says"),
    [
        (nnUNetTrainerNMSW_retrofit, 4, "is 4; allowed: 0 with nnUNetTrainerNMSW_retrofit"),
        (nnUNetTrainerNMSW_retrofit_context, 0, "is 0; allowed: at least 1 with nnUNetTrainerNMSW_retrofit_context"),
    ],
)
def test_a_retrofit_says_what_it_cannot(trainer, channels, says):
    settings = settings_of(make_plans(context_channels=channels)["configurations"]["3d_fullres"])
    with pytest.raises(UserError, match=says):
        trainer.check_settings(settings)


@pytest.mark.parametrize(("trainer", "refused"), [("nnUNetTrainerNMSW", True), ("nnUNetTrainer", False)])
def test_plans_and_checkpoint_of_a_model_have_the_same_context(trainer, refused, tmp_path):
    model = write_model(tmp_path / "model", trainer)
    check_model(model, [0], "checkpoint_final.pth", False)
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"].setdefault("nmsw", {})["context_channels"] = 4
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match=r"is 4, and .*fold_0.* was trained with 0") if refused else nullcontext():
        check_model(model, [0], "checkpoint_final.pth", False)


def test_a_training_of_an_earlier_version_goes_on_without_context():
    settings = settings_of(make_plans(context_channels=4)["configurations"]["3d_fullres"])
    before = settings.to_dict()
    del before["context_channels"]
    checkpoint = {"init_args": {"plans": {"configurations": {"3d_fullres": {"nmsw": before}}}}}
    goes_on = settings_of_training(checkpoint, "3d_fullres", settings, set(), "fold_0")
    assert goes_on.context_channels == 0
    with pytest.raises(UserError, match='"context_channels" under "nmsw" in the plans is 4, and was 0'):
        settings_of_training(checkpoint, "3d_fullres", settings, {"context_channels"}, "fold_0")
