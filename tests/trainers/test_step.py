import numpy as np
import pytest
import torch
from tiny import build_network, build_paper_network
from training import ENCODING, a_step, cross_entropy, training_step

from nnunet_nmsw.trainers.step import LARGEST_NORM, REPORTED, means_of_steps, update
from nnunet_nmsw.volume.windows import downsample


def test_a_patch_goes_through_the_local_branch(tiny_network):
    patch = torch.randn(2, 1, 8, 8, 8)
    assert torch.equal(tiny_network(patch), tiny_network.local_branch(patch))


BUILD = {
    "benefit": build_network,
    "contribution": lambda *args, **nmsw: build_network(*args, **nmsw, score_training="contribution"),
    "paper": build_paper_network,
}


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize(
    ("patch", "shape"), [((8, 8, 8), (16, 20, 24)), ((4, 8, 8), (4, 9, 31)), ((8, 8, 8), (8, 8, 8))]
)
def test_a_step_trains_every_parameter(build, patch, shape):
    network = build(patch, downsampling_factor=[1, 2, 2], sampled_windows=2)
    result = training_step(network, shape)
    result.loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    windows = len(network.grid(shape))
    assert len(result.starts_B3) == min(2, windows) + 2
    if windows > 2:
        score_weights = network.global_branch.decoder.seg_layers[-1].weight.grad[-1]
        assert score_weights.abs().max() > 0
    assert 0 <= result.report["foreground_share"] <= 1


@pytest.mark.parametrize(("name", "of_scores"), [("benefit", 0.1), ("contribution", -0.01), ("paper", -0.01)])
def test_loss_is_the_sum_of_its_parts(name, of_scores):
    result = training_step(BUILD[name](), (16, 16, 16))
    r = result.report
    scores = r["benefit_loss"] if name == "benefit" else r["entropy"]
    parts = r["loss_local"] + r["loss_global"] + r["loss_fused"] + of_scores * scores
    torch.testing.assert_close(result.loss.detach(), parts)


def test_a_step_that_overflows_leaves_the_scale_of_benefits_alone():
    network = build_network()
    training_step(network, (16, 16, 16))
    before = network.benefit_scale.clone()
    assert before > 0
    for weight in (torch.inf, torch.nan):
        with torch.no_grad():
            bias = network.local_branch.decoder.seg_layers[-1].bias
            kept = bias.clone()
            bias.fill_(weight)
        training_step(network, (16, 16, 16))
        assert network.benefit_scale == before
        with torch.no_grad():
            bias.copy_(kept)
    assert training_step(network, (16, 16, 16)).loss.isfinite()


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_fewer_windows_at_once_give_the_same_gradients(deep_supervision):
    gradients, saved = [], []
    for at_once in (None, 1, 3):
        network = build_network((8, 8, 8), deep_supervision=deep_supervision, windows_at_once=at_once)
        patches = torch.randn(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = network.local(patches)
        saved.append(sum(sizes))
        logits = logits if deep_supervision else [logits]
        sum(scale.square().mean() for scale in logits).backward()
        gradients.append([parameter.grad for parameter in network.local_branch.parameters()])
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others)
    assert max(saved[1:]) < saved[0] / 10


def test_no_tensor_of_a_step_grows_with_volume_times_classes_or_windows_times_patch():
    """The largest thing kept for the backward pass is a network's own activation, not classes × volume."""
    classes, shape, patch = 40, (32, 32, 32), (8, 8, 8)
    network = build_network(patch, num_classes=classes, downsampling_factor=[4, 4, 4])
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training_step(network, shape, classes).loss.backward()
    windows, patch_voxels, volume_voxels = len(network.grid(shape)), 8**3, 32**3
    # Four windows with all classes are the most that may be there.
    assert max(saved) <= 4 * classes * patch_voxels
    assert max(saved) < volume_voxels * classes / 10
    assert max(saved) < windows * patch_voxels


def test_scores_and_sums_stay_in_full_precision_under_autocast():
    network = build_network()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = training_step(network, (16, 16, 16)).report
    for name in ("loss_global", "loss_fused", "entropy", "benefit", "fusion_weights"):
        assert report[name].dtype == torch.float32, name
    # In bfloat16 the loss would be a multiple of 2^-8 around 1.
    assert report["loss_fused"].bfloat16() != report["loss_fused"]


def test_the_global_branch_takes_any_shape(tiny_network):
    for shape in [(8, 8, 8), (9, 17, 25), (8, 64, 11)]:
        volume = torch.randn(1, 1, *shape)
        coarse = tiny_network.coarse(downsample(volume, tiny_network.settings.downsampling_factor), ENCODING)
        grid = tiny_network.grid(shape)
        assert coarse.logits_Cdhw.shape == (3, *grid.low_shape)
        assert coarse.score_map_dhw.shape == grid.low_shape


def test_deep_supervision_is_switched_where_nnunet_switches_it():
    network = build_network(deep_supervision=True)
    patch = torch.randn(1, 1, 8, 8, 8)
    assert isinstance(network(patch), list | tuple)
    network.decoder.deep_supervision = False
    assert isinstance(network(patch), torch.Tensor)


def test_each_branch_has_its_own_limit_of_the_gradient():
    network = build_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    step = a_step((16, 16, 16))
    step.local_loss.loss = lambda logits, target: 1e6 * cross_entropy(logits, target)
    numbers = update(step, network, optimizer, None)
    parameters = dict(network.named_parameters())
    norms = {
        of_local: torch.stack(
            [p.grad.norm() for n, p in parameters.items() if ("local_branch" in n) == of_local]
        ).norm()
        for of_local in (True, False)
    }
    assert numbers["gradient_local"] > 1000
    torch.testing.assert_close(norms[True], torch.tensor(LARGEST_NORM), rtol=1e-4, atol=0)
    assert 0 < norms[False] < LARGEST_NORM
    assert numbers["gradient_global"] == pytest.approx(float(norms[False]), rel=1e-5)
    assert {*REPORTED, "loss"} == set(numbers)


def test_a_frozen_branch_has_no_gradient():
    network = build_network()
    network.freeze_local_branch()
    numbers = update(a_step((16, 16, 16)), network, torch.optim.SGD(network.parameters(), 0.1), None)
    assert numbers["gradient_local"] == 0
    assert numbers["gradient_global"] > 0


def test_means_are_over_steps_that_did_not_overflow():
    outputs = [{"a": np.float32(1), "b": np.array([1.0, 2])}, {"a": np.float32(np.inf), "b": np.array([3.0, np.nan])}]
    means = means_of_steps(outputs, ["a", "b"])
    assert means["a"].tolist() == [1]
    assert means["b"].tolist() == [1, 2]
    assert np.isnan(means_of_steps([{"a": np.nan}], ["a"])["a"]).all()
