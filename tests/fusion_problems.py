"""Volumes with windows on them for the tests of fusion and its loss, and what the definitions make of them."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_nmsw.model.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.trainers.losses.fused import FusedLoss, LowResolution, WindowPredictions, fused_loss
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import WindowGrid, window_slices

CLASSES = 3
REGIONS = ((1, 2, 3), (2, 3), (3,))
ENCODING = LabelEncoding(CLASSES)
ENCODINGS = {
    "labels": ENCODING,
    "ignore": LabelEncoding(4, 3),
    "regions": LabelEncoding(4, None, REGIONS, (1, 2, 3)),
    "regions and ignore": LabelEncoding(5, 4, REGIONS, (1, 2, 3)),
}
"""Kinds of labels with as many channels of logits."""


def loss_of(patch_logits, starts, coarse, labels, counts, weights, factor, encoding, *more, **named) -> FusedLoss:
    """`fused_loss` of loose parts."""
    windows = WindowPredictions(patch_logits, labels, starts)
    return fused_loss(windows, LowResolution(coarse, counts, factor, encoding), weights, *more, **named)


def nnunet_loss(
    logits_CDHW: torch.Tensor, labels_DHW: torch.Tensor, encoding: LabelEncoding = ENCODING
) -> torch.Tensor:
    """nnU-Net's own loss of a whole volume."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": encoding.has_regions, "ddp": False}
    if encoding.has_regions:
        ignore = encoding.ignore_label is not None
        groups = [*encoding.regions, *([(encoding.ignore_label,)] if ignore else [])]
        target = torch.stack([torch.isin(labels_DHW, torch.tensor(group)) for group in groups])
        loss = DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
        return loss(logits_CDHW[None], target[None] if ignore else target[None].float())
    loss = DC_and_CE_loss(dice, {}, ignore_label=encoding.ignore_label, dice_class=MemoryEfficientSoftDiceLoss)
    return loss(logits_CDHW[None], labels_DHW[None, None])


def one_hot(labels_V: torch.Tensor, encoding: LabelEncoding) -> torch.Tensor:
    """float32 of shape L, V."""
    return F.one_hot(labels_V, encoding.num_labels).movedim(-1, 0).float()


def label_manager(encoding: LabelEncoding) -> LabelManager:
    """nnU-Net's, for the same labels."""
    ignore = {} if encoding.ignore_label is None else {"ignore": encoding.ignore_label}
    groups = encoding.regions or range(1, encoding.num_channels)
    labels = {"background": 0, **{f"channel {group}": group for group in groups}, **ignore}
    return LabelManager(labels, encoding.regions_class_order)


def canvas(patch_logits, starts, coarse_volume, weights, volume_shape):
    """Fused logits of a whole volume, built voxel by voxel as the definition says."""
    patch_size = patch_logits.shape[2:]
    gaussian = gaussian_weights(patch_size, torch.device("cpu"))
    blended, total = torch.zeros(CLASSES, *volume_shape), torch.zeros(volume_shape)
    for logits, start in zip(patch_logits, starts.tolist(), strict=True):
        where = window_slices(start, patch_size)
        blended[(slice(None), *where)] += gaussian * logits
        total[where] += gaussian
    inside = total > 0
    blended = torch.where(inside, blended / total.clamp_min(1e-12), 0.0)
    return torch.where(inside, fuse(blended, coarse_volume, weights), coarse_volume), inside


def covered(starts, grid):
    """Voxels under windows."""
    inside = torch.zeros(grid.volume_shape, dtype=torch.bool)
    for start in starts.tolist():
        inside[window_slices(start, grid.patch_size)] = True
    return inside


@st.composite
def problems(draw, overlapping: bool, kinds: tuple[str, ...] = tuple(ENCODINGS)):
    """A volume with labels, a coarse prediction and some windows of an anisotropic patch."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    patch = tuple(draw(st.integers(2, 7)) for _ in range(3))
    volume = tuple(n * draw(st.integers(1, 3)) for n in patch)
    factor = tuple(draw(st.integers(1, 3)) for _ in range(3))
    grid = WindowGrid(volume, patch, factor, 0.5 if overlapping else 1.0)
    chosen = torch.randperm(len(grid))[: draw(st.integers(1, min(4, len(grid))))]
    encoding = ENCODINGS[draw(st.sampled_from(kinds))]
    return {
        "grid": grid,
        "starts": grid.starts_N3[chosen],
        "patch_logits": torch.randn(len(chosen), CLASSES, *patch) * 3,
        "coarse": torch.randn(CLASSES, *grid.low_shape),
        "labels": torch.randint(0, encoding.num_labels, volume),
        "encoding": encoding,
        "weights": FusionWeights(
            torch.tensor([0.9, 0.5, 0.7]), torch.tensor([0.1, 0.6, 0.3]), torch.tensor([0.0, -0.5, 0.2])
        ),
    }
