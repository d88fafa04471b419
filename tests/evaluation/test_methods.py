"""The methods that are compared: what they are called, which windows they pick, what they cost."""

import itertools

import pytest
import torch
from tiny import build_network
from torch import nn
from torch.nn import functional

from nnunet_nmsw.evaluation.methods import build_methods, primary_method, reference_method, timed_methods
from nnunet_nmsw.evaluation.oracle import Oracle, oracle_windows
from nnunet_nmsw.evaluation.shared import PatchStore, count_macs
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts, Entropy, Objects, Random
from nnunet_nmsw.model.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import WindowGrid, window_slices


def test_ways_are_found_by_the_names_of_their_selectors():
    facts = CaseFacts(make_oracle=lambda: Oracle(lambda start: torch.empty(0), None, torch.empty(0), ()))
    assert all(way.selector(facts).name == name for name, way in WAYS.items())


def test_methods_have_names_of_their_own_and_the_reference_is_nnunets_default():
    methods = build_methods(True, ["5%", 10, "all", "auto"], [True, False])
    assert [m.selection for m in methods if m.num_patches == "auto"] == ["greedy_benefit"] * 2
    assert len({m.key for m in methods}) == len({m.name for m in methods}) == len(methods)
    assert reference_method(methods).key == "baseline_sliding_window_step_0.5_mirrored"
    assert [m.model for m in methods] == sorted(m.model for m in methods)
    with_openvino = build_methods(True, ["5%", "auto"], [False], "openvino")
    assert [m.key for m in with_openvino[-2:]] == [f"nmsw_greedy_benefit_{k}_openvino" for k in ("5percent", "auto")]
    assert primary_method(with_openvino, "5%").backend == "pytorch"
    without = build_methods(False, ["5%"], [False])
    assert {m.model for m in without} == {"nmsw"}
    assert reference_method(without).name == "sliding window of the local branch, step 0.5"


def test_the_primary_method_is_the_models_own_k_or_the_smallest_percentage():
    methods = build_methods(False, [5, "20%", "10%", "all"], [False])
    assert primary_method(methods, "20%").num_patches == "20%"
    assert primary_method(methods, "7%").num_patches == "10%"
    assert primary_method(build_methods(False, [5], [False]), "7%").num_patches == 5
    assert primary_method(methods, "10%", "top_k").selection == "top_k"
    for selection in ("greedy_benefit", "top_k", "greedy_coverage"):
        assert primary_method(build_methods(True, ["all"], [False]), "10%", selection).num_patches == "all"


def test_what_is_timed_is_what_somebody_would_deploy():
    methods = build_methods(True, ["5%", "all", "auto"], [False], "openvino")
    timed = [method.key for method in timed_methods(methods, primary_method(methods, "auto"))]
    steps = (0.5, 0.75, 1.0)
    slides = [f"baseline_sliding_window_step_{step}" for step in steps]
    own = [f"nmsw_greedy_benefit_{k}{by}" for by in ("", "_openvino") for k in ("5percent", "all", "auto")]
    assert sorted(timed) == sorted([*slides, *own, "nmsw_global_branch"])
    without = build_methods(False, ["5%"], [False])
    of_top_k = [method.key for method in timed_methods(without, primary_method(without, "5%", "top_k"))]
    of_local_branch = [f"nmsw_sliding_window_step_{step}" for step in steps]
    assert of_top_k == [*of_local_branch, "nmsw_top_k_5percent", "nmsw_global_branch"]


def coarse_of(labels_dhw: torch.Tensor, confidence: float = 5.0) -> CoarsePrediction:
    logits_Cdhw = confidence * functional.one_hot(labels_dhw, 3).movedim(-1, 0).float()
    return CoarsePrediction(logits_Cdhw, torch.zeros(labels_dhw.shape), LabelEncoding(3))


def test_entropy_prefers_uncertain_windows_and_random_ones_are_nested():
    grid = WindowGrid((24, 24, 24), (8, 8, 8), (2, 2, 2))
    labels = torch.zeros(grid.low_shape, dtype=torch.int64)
    labels[:4, :4, :4] = 1
    labels[8:, 8:, 8:] = 1
    coarse = coarse_of(labels)
    coarse.logits_Cdhw[:, 8:, 8:, 8:] = torch.tensor([1.0, 1.1, 1.0]).view(3, 1, 1, 1)  # uncertain
    assert Entropy().choose(coarse, grid, Budget(1)).starts_K3.tolist() == [[16, 16, 16]]
    few, many = (Random(3).choose(coarse, grid, Budget(k)).starts_K3.tolist() for k in (4, 9))
    assert many[:4] == few
    assert len({tuple(start) for start in many}) == 9
    assert Random(4).choose(coarse, grid, Budget(9)).starts_K3.tolist() != many


def test_objects_are_centred_in_windows_and_covered_when_larger():
    grid = WindowGrid((32, 32, 32), (8, 8, 8), (2, 2, 2))
    labels = torch.zeros(grid.low_shape, dtype=torch.int64)
    labels[7:9, 7:9, 7:9] = 1  # voxels 14 to 18
    labels[0, 0, 0] = 2  # a corner
    starts = Objects().choose(coarse_of(labels), grid, Budget(len(grid))).starts_K3.tolist()
    assert starts == [[12, 12, 12], [0, 0, 0]]
    labels[9, 9, 9] = 1  # voxels 18 to 20, inside the window of the first and touching its corner
    labels[6, 6, 9] = 1  # an object of its own, inside it, too
    assert Objects().choose(coarse_of(labels), grid, Budget(len(grid))).starts_K3.shape == (2, 3)
    labels[12:, 2:4, 2:4] = 1
    labels[2:, 10:14, 10:14] = 1  # 28 voxels long, 8 wide
    starts = Objects().choose(coarse_of(labels), grid, Budget(len(grid))).starts_K3
    covered = torch.zeros(grid.volume_shape, dtype=torch.bool)
    for start in starts.tolist():
        covered[window_slices(start, grid.patch_size)] = True
        assert all(0 <= s <= 24 for s in start)
    foreground = labels.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2) > 0
    assert covered[foreground].all()
    assert Objects().choose(coarse_of(torch.zeros_like(labels)), grid, Budget(len(grid))).starts_K3.shape == (0, 3)


@pytest.mark.parametrize(
    "encoding",
    [
        LabelEncoding(3),
        LabelEncoding(4, ignore_label=3),
        LabelEncoding(3, regions=((1, 2), (2,)), regions_class_order=(1, 2)),
    ],
    ids=["labels", "ignore label", "regions"],
)
def test_the_oracle_does_what_trying_everything_does(encoding):
    torch.manual_seed(1)
    grid = WindowGrid((6, 6, 8), (4, 4, 4), (1, 1, 1))
    reference = torch.randint(0, encoding.num_labels, grid.volume_shape)
    num_channels = encoding.num_channels
    coarse = torch.randn(num_channels, *grid.low_shape)
    weights = FusionWeights.convex(torch.linspace(0.5, 0.9, num_channels))
    truth = 6 * encoding.membership(torch.device("cpu"))[:, reference] - 3 * encoding.has_regions
    patches = {}
    for window, start in enumerate(grid.starts_N3.tolist()):
        quality = torch.rand(()) * 2 - 0.5  # some windows harm
        cut = truth[(slice(None), *window_slices(start, grid.patch_size))]
        patches[window] = quality * cut + 2 * torch.randn(num_channels, *grid.patch_size)

    def labels_of(logits: torch.Tensor) -> torch.Tensor:
        if not encoding.has_regions:
            return logits.argmax(0)
        return torch.where(logits[1] > 0, 2, torch.where(logits[0] > 0, 1, 0))

    def dice(windows: list[int]) -> float:
        gaussian = gaussian_weights(grid.patch_size, torch.device("cpu"))
        total, weight = torch.zeros_like(coarse), torch.zeros(grid.volume_shape)
        for window in windows:
            box = window_slices(grid.starts_N3[window].tolist(), grid.patch_size)
            total[(slice(None), *box)] += gaussian * patches[window]
            weight[box] += gaussian
        fused = fuse(total / weight.clamp_min(1e-12), coarse, weights)
        labels = torch.where(weight > 0, labels_of(fused), labels_of(coarse))
        counted = reference != encoding.ignore_label
        values = []
        for group in encoding.regions or ((1,), (2,)):
            of_class = torch.tensor(group)
            found, there = torch.isin(labels, of_class) & counted, torch.isin(reference, of_class)
            values.append((2 * (found & there).sum() + 1) / (found.sum() + there.sum() + 1))
        return float(sum(values) / 2)

    asked = oracle_windows(patches.__getitem__, coarse, weights, reference, grid, encoding)
    order, gains = map(list, zip(*asked, strict=True))
    of_nobody = torch.where(reference == 0, 200, reference)  # labels that the dataset does not have
    assert order == [n for n, _ in oracle_windows(patches.__getitem__, coarse, weights, of_nobody, grid, encoding)]
    taken: list[int] = []
    while True:
        best = max((w for w in range(len(grid)) if w not in taken), key=lambda w: dice([*taken, w]), default=None)
        if best is None or dice([*taken, best]) <= dice(taken) + 1e-9:
            break
        taken.append(best)
    assert 0 < len(taken) < len(grid)
    # The canvas is of half precision, which may turn a voxel of these 288.
    assert order[:3] == taken[:3]
    assert dice(order) == pytest.approx(dice(taken), abs=0.01)
    assert gains[0] == pytest.approx(dice(taken[:1]) - dice([]), abs=1e-6)
    assert sum(gains) == pytest.approx(dice(order) - dice([]), abs=0.01)
    best_pair = max(itertools.combinations(range(len(grid)), 2), key=lambda pair: dice(list(pair)))
    assert dice(order[:2]) >= dice([]) + 0.9 * (dice(list(best_pair)) - dice([]))


def test_zoom_in_covers_the_objects_of_a_prediction_of_regions():
    grid = WindowGrid((8, 8, 8), (4, 4, 4), (1, 1, 1))
    encoding = LabelEncoding(3, regions=((1, 2), (2,)), regions_class_order=(1, 2))
    logits = -torch.ones(2, *grid.low_shape)
    logits[1] = -0.5  # larger than the other channel, and no object
    coarse = CoarsePrediction(logits, torch.zeros(grid.low_shape), encoding)
    assert len(Objects().choose(coarse, grid, Budget(len(grid))).starts_K3) == 0
    logits[0, 6, 6, 6] = 1
    assert Objects().choose(coarse, grid, Budget(len(grid))).starts_K3.tolist() == [[4, 4, 4]]


def test_multiply_accumulates_of_known_layers():
    network = nn.Sequential(nn.Conv3d(2, 5, 3, padding=1), nn.ConvTranspose3d(5, 4, 2, stride=2), nn.Conv3d(4, 3, 1))
    with torch.inference_mode():
        output, macs = count_macs(lambda: network(torch.zeros(1, 2, 4, 6, 8)))
    voxels = 4 * 6 * 8
    assert output.shape == (1, 3, 8, 12, 16)
    assert macs == voxels * 27 * 2 * 5 + voxels * 8 * 5 * 4 + 8 * voxels * 4 * 3


def test_multiply_accumulates_of_the_tiny_unet():
    network = build_network().eval().local_branch
    expected = 0

    def add(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal expected
        voxels = (inputs[0] if isinstance(module, nn.ConvTranspose3d) else output)[0, 0].numel()
        expected += voxels * module.weight.numel()

    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(add)
    with torch.inference_mode():
        _, macs = count_macs(lambda: network(torch.zeros(1, 1, 8, 8, 8)))
    assert macs == expected > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_patches_come_back_as_they_were(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    patches = {(i, 0, 3): torch.randn(1, 3, 4, 4, 4).to(dtype) for i in range(5)}
    store = PatchStore(patches)
    for position, logits in patches.items():
        store.put(position, logits)
    store.get((3, 0, 3)).zero_()  # what is done to a copy
    store.put((9, 9, 9), patches[3, 0, 3])  # not asked for
    for position, logits in patches.items():
        assert position in store
        assert torch.equal(store.get(position), logits)
    assert (9, 9, 9) not in store
    store.close()
    assert not list(tmp_path.iterdir())
