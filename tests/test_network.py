import pytest
import torch
from tiny import build_network

from nnunet_nmsw.settings import SCORE_MAPS, SELECTIONS, NMSWConfig
from nnunet_nmsw.volume.windows import downsample
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.trainers.losses.total import NMSWLoss
from nnunet_nmsw.trainers.views import TrainingVolume


def plain_loss(config: NMSWConfig, num_classes: int = 3) -> NMSWLoss:
    def local_loss(logits, target):
        return torch.nn.functional.cross_entropy(logits, target[:, 0].long())

    return NMSWLoss(local_loss, None, config, LabelEncoding(num_classes))


def training_step(network, shape, num_classes=3):
    volume = torch.randn(1, 1, *shape)
    target = torch.randint(0, num_classes, (1, 1, *shape), dtype=torch.int16)
    starts = torch.tensor([[0, 0, 0], [n - p for n, p in zip(shape, network.patch_size, strict=True)]])
    loss = plain_loss(network.config, num_classes)
    training = TrainingVolume(volume, target, starts)
    output = network(training)
    return loss(output, training), loss, output


def test_a_patch_goes_through_the_local_branch(tiny_network):
    patch = torch.randn(2, 1, 8, 8, 8)
    assert torch.equal(tiny_network(patch), tiny_network.local_branch(patch))


PATHS = (
    {"gradient_path": "none"},
    {"gradient_path": "contribution", "benefit_loss_weight": 0.0},
    {"gradient_path": "contribution", "gradient_baseline": True, "benefit_loss_weight": 0.0},
    {"gradient_path": "contribution_logits", "benefit_loss_weight": 0.0},
    {"gradient_path": "input", "benefit_loss_weight": 0.0},
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: "-".join(map(str, path.values())))
@pytest.mark.parametrize(
    ("patch", "shape"), [((8, 8, 8), (16, 20, 24)), ((4, 8, 8), (4, 9, 31)), ((8, 8, 8), (8, 8, 8))]
)
def test_a_step_trains_every_parameter(path, patch, shape):
    network = build_network(patch, **path, entropy_weight=0.0, downsampling_factor=[1, 2, 2])
    total, loss, output = training_step(network, shape)
    total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    windows = len(network.grid(shape))
    assert len(output.starts) == min(2, windows) + 2
    if windows > 2:
        score_weights = network.global_branch.decoder.seg_layers[-1].weight.grad[-1]
        assert score_weights.abs().max() > 0
    assert 0 <= loss.report["foreground_share"] <= 1


def test_loss_is_the_sum_of_its_parts():
    weights = {"entropy_weight": 0.5, "fused_loss_weight": 2.0, "distillation_weight": 0.3}
    network = build_network(**weights, gradient_path="contribution")
    total, loss, _ = training_step(network, (16, 16, 16))
    r = loss.report
    parts = r["loss_local"] + r["loss_global"] + 2 * r["loss_fused"] + 0.1 * r["benefit_loss"] - 0.5 * r["entropy"]
    parts += 0.3 * r["loss_distillation"]
    torch.testing.assert_close(total.detach(), parts)


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
    total, _, _ = training_step(network, (16, 16, 16))
    assert total.isfinite()


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
            logits = network._local_logits(patches)
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
        training_step(network, shape, classes)[0].backward()
    windows, patch_voxels, volume_voxels = len(network.grid(shape)), 8**3, 32**3
    # Four windows with all classes are the most that may be there.
    assert max(saved) <= 4 * classes * patch_voxels
    assert max(saved) < volume_voxels * classes / 10
    assert max(saved) < windows * patch_voxels


def test_scores_and_sums_stay_in_full_precision_under_autocast():
    network = build_network()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss, output = training_step(network, (16, 16, 16))
    for name in ("loss_global", "loss_fused", "entropy", "benefit", "fusion_weights"):
        assert loss.report[name].dtype == torch.float32, name
    assert output.sample.log_probability_K.dtype == torch.float32
    # In bfloat16 the loss would be a multiple of 2^-8 around 1.
    assert loss.report["loss_fused"].bfloat16() != loss.report["loss_fused"]


def test_the_global_branch_takes_any_shape(tiny_network):
    for shape in [(8, 8, 8), (9, 17, 25), (8, 64, 11)]:
        volume = torch.randn(1, 1, *shape)
        coarse = tiny_network.coarse(downsample(volume, tiny_network.config.downsampling_factor))
        grid = tiny_network.grid(shape)
        assert coarse.logits_Cdhw.shape == (3, *grid.low_shape)
        assert coarse.score_map_dhw.shape == grid.low_shape


def test_the_score_map_is_made_of_the_networks_output_and_the_entropy():
    low = torch.randn(1, 1, 8, 8, 8)
    free, gated, plus, times = (build_network(score_map=form).coarse(low) for form in SCORE_MAPS)
    entropy_dhw = torch.distributions.Categorical(logits=free.logits_Cdhw.movedim(0, -1)).entropy()
    gate_dhw = entropy_dhw / (entropy_dhw + 0.1)
    torch.testing.assert_close(gated.score_map_dhw, free.score_map_dhw * gate_dhw)
    torch.testing.assert_close(plus.score_map_dhw, free.score_map_dhw + entropy_dhw)
    torch.testing.assert_close(times.score_map_dhw, (1 + free.score_map_dhw) * entropy_dhw)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection_is_deterministic_and_of_the_asked_number(tiny_network, selection):
    volume = torch.randn(1, 1, 24, 24, 24)
    grid = tiny_network.grid((24, 24, 24))
    coarse = tiny_network.coarse(downsample(volume, tiny_network.config.downsampling_factor))
    first, second = (tiny_network.select(coarse, grid, 5, selection) for _ in range(2))
    assert torch.equal(first.starts_K3, second.starts_K3)
    assert len(set(map(tuple, first.starts_K3.tolist()))) == 5


def test_deep_supervision_is_switched_where_nnunet_switches_it():
    network = build_network(deep_supervision=True)
    patch = torch.randn(1, 1, 8, 8, 8)
    assert isinstance(network(patch), list | tuple)
    network.decoder.deep_supervision = False
    assert isinstance(network(patch), torch.Tensor)


def test_patches_of_little_promise_change_little():
    scores = torch.tensor([4.0, 1.0, 0.0, -2.0])
    assert build_network().trust(scores).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert build_network().trust(-scores - 1).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert build_network().trust(-scores.abs() - 1).tolist() == [1.0] * 4  # asked for, though only harm is expected
    assert build_network(trust="full").trust(scores).tolist() == [1.0] * 4
    # These scores were trained to draw windows, not to predict what they are worth.
    drawn = build_network(gradient_path="contribution", benefit_loss_weight=0.0)
    assert drawn.trust(scores).tolist() == [1.0] * 4
    assert build_network().trust(scores[:0]).tolist() == []
