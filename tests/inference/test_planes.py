"""Labels without logits volumes, against stock export of the same fused logits."""

import math

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from nnunet_nmsw.inference import planes
from nnunet_nmsw.inference.open_windows import FusedModel
from nnunet_nmsw.inference.planes import FusedPrediction, segment
from nnunet_nmsw.inference.slabs import planes_of_slab, segment_slabs
from nnunet_nmsw.model.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.volume.interpolation import linear_axis, nearest_axis, upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import WindowGrid, low_shape, window_slices

LABELS = LabelEncoding(5)
REGIONS = LabelEncoding(4, regions=((1, 2, 3), (2, 3), (3,)), regions_class_order=(1, 2, 3))


def smooth(shape: tuple[int, ...]) -> torch.Tensor:
    """Random logits that vary slowly, so that neighbours often agree."""
    coarse = torch.randn(shape[0], *(max(1, n // 4) for n in shape[1:]))[None] * 3
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="trilinear")[0] + 0.1 * torch.randn(shape)


def dense_logits(models, patches, patch_size, factor, shape) -> torch.Tensor:
    """Brute force: the fused logits of the whole volume."""
    gaussian, total = gaussian_weights(patch_size, torch.device("cpu")), 0
    for model, of_model in zip(models, patches, strict=True):
        coarse = upsample_window(model.coarse_logits_Cdhw, (0, 0, 0), shape, factor)
        sums, weight = torch.zeros_like(coarse), torch.zeros(shape)
        for start, logits in zip(model.starts_K3.tolist(), of_model, strict=True):
            sums[(slice(None), *window_slices(start, patch_size))] += gaussian * logits.float()
            weight[window_slices(start, patch_size)] += gaussian
        fused = fuse(sums / weight.clamp_min(1e-30), coarse, model.weights)
        total = total + torch.where(weight > 0, fused, coarse)
    return total / len(models)


def differences(labels: torch.Tensor, logits: np.ndarray, encoding: LabelEncoding) -> int:
    """Voxels that differ from what the logits say and are no tie."""
    expected = encoding.decided(torch.from_numpy(logits))
    margin = np.abs(logits).min(0) if encoding.has_regions else -np.diff(np.sort(logits, 0)[-2:][::-1], axis=0)[0]
    return int(((labels != expected).numpy() & (margin > 1e-4)).sum())


AS_IT_IS = {"factor": (2, 2, 2), "num_windows": (3, 2), "separate": None, "planes_at_once": 4, "seed": 1}


@settings(max_examples=40)
@example(inside=(20, 17, 26), target=(20, 17, 26), regions=False, **AS_IT_IS)  # which is not resampled
@example(inside=(20, 17, 26), target=(20, 17, 26), regions=True, **AS_IT_IS)
@example(inside=(20, 17, 26), target=(20, 34, 13), regions=False, **AS_IT_IS)
@example(inside=(20, 17, 26), target=(40, 17, 26), regions=False, **AS_IT_IS)
@given(
    inside=st.tuples(*[st.integers(1, 30)] * 3),
    target=st.tuples(*[st.integers(1, 40)] * 3),
    factor=st.tuples(*[st.integers(1, 4)] * 3),
    num_windows=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    regions=st.booleans(),
    separate=st.sampled_from([None, 0, 2]),
    planes_at_once=st.integers(2, 9),
    seed=st.integers(0, 1000),
)
def test_equals_stock_export(inside, target, factor, num_windows, regions, separate, planes_at_once, seed):
    torch.manual_seed(seed)
    encoding, patch_size = REGIONS if regions else LABELS, (8, 6, 10)
    shape = tuple(max(n, p) for n, p in zip(inside, patch_size, strict=True))
    offset = [(n - i) // 2 for n, i in zip(shape, inside, strict=True)]
    models, patches = [], []
    for number in num_windows[: 1 + seed % 2]:
        starts = torch.stack(
            [torch.randint(0, n - p + 1, (number,)) for n, p in zip(shape, patch_size, strict=True)], 1
        )
        logits = {tuple(s): smooth((encoding.num_channels, *patch_size)).half() for s in starts.tolist()}
        coarse = smooth((encoding.num_channels, *low_shape(shape, factor)))
        weights = FusionWeights(*torch.rand(3, encoding.num_channels))

        def windows(starts_K3, logits=logits):
            return torch.stack([logits[tuple(start)] for start in starts_K3.tolist()])

        models.append(FusedModel(coarse, starts, weights, windows))
        patches.append([logits[tuple(start)] for start in starts.tolist()])
    dense = dense_logits(models, patches, patch_size, factor, shape)
    dense = dense[(slice(None), *window_slices(offset, inside))].numpy()
    # What nnU-Net takes for anisotropic: order 0 along the axis of the largest spacing.
    spacing = [9.0 if axis == separate else 1.0 for axis in range(3)]
    keywords = {"order": 1, "order_z": 0, "force_separate_z": None}
    reference = resample_data_or_seg_to_shape(dense, target, spacing, spacing, **keywords)
    axes = [
        (nearest_axis if axis == separate else linear_axis)(n, m)
        for axis, (n, m) in enumerate(zip(inside, target, strict=True))
    ]
    memory = (math.inf, 0, 2000 * encoding.num_channels)[seed % 3]  # for all windows, for none, for two
    prediction = FusedPrediction(models, WindowGrid(shape, patch_size, factor), encoding, 3, memory)
    labels = segment(prediction, axes, offset, inside, planes_at_once)
    assert differences(labels, reference, encoding) == 0

    prediction = FusedPrediction(models, WindowGrid(shape, patch_size, factor), encoding, 3, memory)
    labels = segment_slabs(prediction, axes, offset, inside, planes_at_once)
    assert differences(labels, reference, encoding) == 0

    prediction = FusedPrediction(models, WindowGrid(shape, patch_size, factor), encoding, 3, memory)
    box = [slice(offset[axis], offset[axis] + inside[axis]) for axis in (1, 2)]
    for first in range(0, inside[0], planes_at_once):
        end = min(inside[0], first + planes_at_once)
        logits = prediction.dense(offset[0] + first, offset[0] + end, box)
        torch.testing.assert_close(logits.numpy(), dense[:, first:end], rtol=1e-3, atol=1e-3)


def test_a_slab_has_as_many_planes_as_fit_into_memory():
    inside, axes = (40, 30, 20), [linear_axis(n, m) for n, m in ((40, 40), (30, 60), (20, 20))]
    of_plane = 6 * 4 * 3 * 60 * 20
    assert planes_of_slab(10 * of_plane, 3, axes, inside) == 10
    assert planes_of_slab(0, 3, axes, inside) == 1
    assert planes_of_slab(1e12, 3, axes, inside) == 128
    axes[0] = linear_axis(40, 80)
    assert planes_of_slab(10 * of_plane, 3, axes, inside) == 5


def test_tiles_and_parts_of_points(monkeypatch):
    monkeypatch.setattr(planes, "TILE", 4)
    monkeypatch.setattr(planes, "MOST_POINTS", 7)
    test_equals_stock_export()


def test_windows_are_asked_for_once_when_their_planes_come_and_dropped_after():
    patch_size, asked, held = (4, 4, 4), [], []
    starts = torch.tensor([[12, 0, 0], [0, 4, 4], [4, 2, 2], [0, 0, 0]])

    def windows(starts_K3):
        asked.extend(starts_K3.tolist())
        return torch.zeros(len(starts_K3), 5, *patch_size)

    model = FusedModel(torch.randn(5, 8, 4, 4), starts, FusionWeights(*torch.ones(3, 5)), windows)
    prediction = FusedPrediction([model], WindowGrid((16, 8, 8), patch_size, (2, 2, 2)), LABELS)
    for first in range(0, 16, 2):
        prediction.planes(first, first + 2, [slice(0, 8), slice(0, 8)])
        held.append((len(asked), len(prediction._open[0].windows)))
    assert asked == sorted(starts.tolist())
    assert held == [(2, 2), (2, 2), (3, 1), (3, 1), (3, 0), (3, 0), (4, 1), (4, 1)]
