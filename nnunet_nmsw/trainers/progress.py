"""What a training shows of itself: lines in its log, pictures of what is learned, and of where it looks.

Tensor suffixes: C channels or classes, D H W axes of the volume, d h w axes of the low-resolution view, K windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch import Tensor

from nnunet_nmsw.files import written_whole
from nnunet_nmsw.inference.volume import Padded, Spending, spatial_shape
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.trainers.cases import read_cases
from nnunet_nmsw.volume.interpolation import upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.precision import mixed_precision
from nnunet_nmsw.volume.windows import Shape, downsample

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""


STYLE: list[Any] = ["default", {"text.parse_math": False}]
"""nnU-Net sets seaborn's for the whole process; and names of cases and labels may have dollar signs."""


EPOCHS_BETWEEN_PICTURES = 10
"""Every so many epochs, and after the last one, pictures of two validation cases show where the sampler looks."""


class SampledCase(NamedTuple):
    """A validation case and where the network looks in it.

    Attributes:
        name: of the case.
        image_DHW: the first channel.
        labels_DHW: the reference.
        coarse_logits_Cdhw: coarse prediction.
        score_map_dhw: of the network.
        starts_K3: first voxels of the chosen windows, best first.
        patch_size: voxels of a window by axis.
        factor: voxels of the volume per low-resolution voxel.
    """

    name: str
    image_DHW: Tensor
    labels_DHW: Tensor
    coarse_logits_Cdhw: Tensor
    score_map_dhw: Tensor
    starts_K3: Tensor
    patch_size: Shape
    factor: Shape


def lines(logged: Mapping[str, Sequence]) -> list[str]:
    """What the last epoch was like, for the log.

    Args:
        logged: values by epoch under the names of `step.REPORTED`.
    """
    last = {name: values[-1] for name, values in logged.items()}
    return [
        "NMSW loss local {loss_local:.4f}, global {loss_global:.4f}, fused {loss_fused:.4f}; norm of the gradient "
        "local {gradient_local:.2f}, global {gradient_global:.2f}".format(**last),
        f"NMSW window entropy {last['entropy']:.3f} nats, sampled windows with foreground "
        f"{last['foreground_share']:.1%}, mean benefit of a sampled window {last['benefit']:.2e}, "
        f"fusion weights {np.round(last['fusion_weights'], 3).tolist()}",
    ]


@torch.inference_mode()
def sampled_cases(
    network: NMSWNetwork, dataset: nnUNetBaseDataset, encoding: LabelEncoding, device: torch.device, number: int = 2
) -> list[SampledCase]:
    """Where the network looks in the first cases of a dataset.

    Args:
        network: whose mode is restored.
        dataset: of preprocessed cases.
        encoding: of the labels.
        device: of the network.
        number: of cases.
    """
    training = network.training
    network.eval()
    spending = Spending(network.sampler.at_inference, network.num_patches)
    cases = []
    for case in read_cases(dataset, dataset.identifiers[:number], encoding):
        image = Padded.of(case.volume_CDHW, network.patch_size)
        labels_1DHW = torch.from_numpy(np.asarray(case.segmentation[:1], dtype=np.int16))
        factor = network.settings.downsampling_factor
        low_1Cdhw = downsample(image.volume_CDHW[None].to(device, torch.float32), factor)
        with mixed_precision(device):
            coarse = network.coarse(low_1Cdhw, encoding)
        choice = spending.choose(coarse, network.grid(spatial_shape(image.volume_CDHW)))
        cases.append(
            SampledCase(
                case.key,
                image.volume_CDHW[0],
                Padded.of(labels_1DHW, network.patch_size).volume_CDHW[0],
                coarse.logits_Cdhw.cpu(),
                coarse.score_map_dhw.cpu(),
                choice.starts_K3,
                network.patch_size,
                factor,
            )
        )
    network.train(training)
    return cases


@style.context(STYLE)
def plot_progress(logged: Mapping[str, Sequence], file: Path) -> None:
    """Losses, what the sampler draws, and the fusion, by epoch.

    Args:
        logged: values by epoch under the names of `step.REPORTED`.
        file: PNG to write; replaced if it is there.
    """
    figure, axes = _figure(2, 2, (12, 7))
    epochs = np.arange(len(logged["loss_local"]))
    for part, colour in zip(("local", "global", "fused"), COLOURS, strict=False):
        axes[0, 0].plot(epochs, logged[f"loss_{part}"], color=colour, label=part)
    axes[0, 0].set(title="Loss (Dice and cross-entropy)", ylabel="loss")
    axes[0, 1].plot(epochs, logged["entropy"], color=COLOURS[0])
    axes[0, 1].set(title="Entropy of the window distribution", ylabel="nats")
    axes[0, 1].set_ylim(bottom=0)
    share, benefit = axes[1, 0], axes[1, 0].twinx()
    share.plot(epochs, np.array(logged["foreground_share"]) * 100, color=COLOURS[0], label="with foreground")
    share.set(title="Sampled windows", ylabel="% with foreground", ylim=(0, 100))
    benefit.plot(epochs, logged["benefit"], color=COLOURS[3], linestyle="--", label="mean benefit (right)")
    benefit.set_ylabel("loss that a window saves")
    share.plot([], [], color=COLOURS[3], linestyle="--", label="mean benefit (right)")
    weights_E3C = np.array(logged["fusion_weights"]).reshape(len(epochs), 3, -1)
    for label in range(weights_E3C.shape[2]):
        colour = COLOURS[label % len(COLOURS)]
        axes[1, 1].plot(epochs, weights_E3C[:, 0, label], color=colour, label=f"class {label}" if label < 8 else None)
        axes[1, 1].plot(epochs, weights_E3C[:, 1, label], color=colour, linestyle="--")
    axes[1, 1].set(title="Fusion weights: patch (solid), coarse (dashed)", ylabel="weight")
    for axis in axes.flat:
        axis.set_xlabel("epoch")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    _save(figure, file)


@style.context(STYLE)
def plot_sampling(cases: Sequence[SampledCase], title: str, file: Path) -> None:
    """One row a case: image with the chosen windows, score map, coarse prediction, reference, in one slice.

    The slice is that with most foreground in the reference. Windows that it does not cut are left out.
    """
    figure, axes = _figure(len(cases), 4, (14, 3.6 * len(cases)))
    for row, case in zip(axes, cases, strict=True):
        depth, height, width = case.labels_DHW.shape
        index = int((case.labels_DHW > 0).flatten(1).sum(1).argmax())
        slab = (index, 0, 0), (1, height, width)
        score_HW = upsample_window(case.score_map_dhw, *slab, case.factor)[0]
        coarse_HW = upsample_window(case.coarse_logits_Cdhw, *slab, case.factor).argmax(0)[0]
        labels_HW = case.labels_DHW[index]
        for axis in row:
            axis.imshow(case.image_DHW[index].numpy(), cmap="gray")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(case.name)
        cut = [start for start in case.starts_K3.tolist() if start[0] <= index < start[0] + case.patch_size[0]]
        for start in cut:
            corner, (_, size_y, size_x) = (start[2] - 0.5, start[1] - 0.5), case.patch_size
            row[0].add_patch(Rectangle(corner, size_x, size_y, fill=False, edgecolor=COLOURS[1]))
        row[0].set_title(f"slice {index} of {depth}: {len(cut)} of {len(case.starts_K3)} windows", fontsize=9)
        shown = row[1].imshow(score_HW.numpy(), cmap="cividis", alpha=0.75)
        figure.colorbar(shown, ax=row[1], fraction=0.045)
        row[1].set_title("score map", fontsize=9)
        num_classes = len(case.coarse_logits_Cdhw)
        for axis, labels, name in ((row[2], coarse_HW, "coarse prediction"), (row[3], labels_HW, "reference")):
            _overlay(axis, labels, num_classes)
            axis.set_title(name, fontsize=9)
    figure.suptitle(title)
    _save(figure, file)


def _overlay(axis: Axes, labels_HW: Tensor, num_classes: int) -> None:
    colours = [COLOURS[1:][label % (len(COLOURS) - 1)] for label in range(num_classes - 1)]
    shown = np.ma.masked_less_equal(labels_HW.numpy(), 0)
    axis.imshow(
        shown, cmap=ListedColormap(colours), vmin=1, vmax=max(2, num_classes - 1), alpha=0.7, interpolation="none"
    )


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, file: Path) -> None:
    with written_whole(file.parent) as unfinished:
        figure.savefig(unfinished / file.name, format="png", dpi=100)
