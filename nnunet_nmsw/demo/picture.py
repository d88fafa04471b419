"""A picture of the chosen windows over a case, beside both predictions and the reference."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK as sitk

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

# Okabe-Ito, readable for the colour-blind.
COLOURS = {1: "#56B4E9", 2: "#E69F00"}
WINDOW_COLOUR = "#F0E442"


def draw_case(case: str, images: Path, references: Path, nmsw: Path, sliding_window: Path, output: Path) -> None:
    """Draw the axial slice with most lesion of a case: windows and reference, NMSW, sliding window.

    Args:
        case: its name.
        images: folder of images, channel 0 is shown.
        references: folder of reference labels.
        nmsw: folder of NMSW's predictions, with `patches/`.
        sliding_window: folder of the sliding window's predictions.
        output: PNG to write.
    """
    image = _read(images / f"{case}_0000.nii.gz")
    reference = _read(references / f"{case}.nii.gz")
    windows = json.loads((nmsw / "patches" / f"{case}.json").read_text())
    position = int((reference == reference.max()).sum((1, 2)).argmax())
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    for axis, labels, title in (
        (
            axes[0],
            reference,
            f"reference, and the {len(windows['windows'])} of "
            f"{windows['windows_to_choose_from']} windows that were taken",
        ),
        (axes[1], _read(nmsw / f"{case}.nii.gz"), "NMSW"),
        (axes[2], _read(sliding_window / f"{case}.nii.gz"), "sliding window, same model"),
    ):
        axis.imshow(image[position], cmap="gray", vmin=-150, vmax=350)
        _outline(axis, labels[position])
        axis.set_title(title)
        axis.set_axis_off()
    for window in windows["windows"]:
        (x, y, first), (x_last, y_last, last) = window["first_voxel_xyz"], window["last_voxel_xyz"]
        if first <= position <= last:
            size = (x_last - x + 1, y_last - y + 1)
            axes[0].add_patch(Rectangle((x - 0.5, y - 0.5), *size, fill=False, edgecolor=WINDOW_COLOUR, alpha=0.8))
    handles = [Line2D([], [], color=COLOURS[label], label=name) for label, name in ((1, "kidney"), (2, "lesion"))]
    handles.append(Line2D([], [], color=WINDOW_COLOUR, label="window crossing this slice"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{case}, slice {position}")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _outline(axis: Axes, labels: np.ndarray) -> None:
    for label, colour in COLOURS.items():
        if (labels == label).any():
            axis.contour(labels == label, [0.5], colors=colour, linewidths=1.5)


def _read(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array
