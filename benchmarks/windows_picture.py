"""Draws nnU-Net's windows beside the chosen ones on a coronal slice of one image: docs/pictures/windows.png.

nmsw_predict -m MODEL -f 0 -i IMAGES -o all -k all --save_patches
nmsw_predict -m MODEL -f 0 -i IMAGES -o chosen --save_patches
python benchmarks/windows_picture.py IMAGES/CASE_0000.nii.gz all chosen -o docs/pictures/windows.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ALL, CHOSEN = "#4477aa", "#ee6677"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("all", type=Path, help="predictions with all windows")
    parser.add_argument("chosen", type=Path, help="predictions with chosen windows")
    parser.add_argument("-o", type=Path, required=True, help="PNG file")
    args = parser.parse_args()
    case = args.image.name.partition("_0000")[0]
    image = sitk.ReadImage(str(args.image))
    voxels_zyx, spacing = sitk.GetArrayFromImage(image), image.GetSpacing()
    labels_zyx = sitk.GetArrayFromImage(sitk.ReadImage(str(args.chosen / f"{case}.nii.gz")))
    windows = [json.loads((of / "patches" / f"{case}.json").read_text())["windows"] for of in (args.all, args.chosen)]
    # The slice through most of the chosen windows, and of these the one with most labels.
    through = np.array([sum(crosses(window, y) for window in windows[1]) for y in range(labels_zyx.shape[1])])
    found = (labels_zyx > 0).sum((0, 2))
    y = int(np.lexsort((found, through))[-1])
    figure = Figure(figsize=(6.6, 4.9), layout="constrained")
    titles = ("nnU-Net: {} windows", "NMSW: {} windows")
    colours, widths = (ALL, CHOSEN), (0.6, 1.6)
    panels = zip(figure.subplots(1, 2), windows, titles, colours, widths, strict=True)
    for axes, of_panel, title, colour, width in panels:
        draw(axes, voxels_zyx[:, y], labels_zyx[:, y], spacing)
        for window in of_panel:
            if crosses(window, y):
                outline(axes, window, spacing, colour, width)
        axes.set_title(title.format(len(of_panel)), fontsize=13)
    args.o.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.o, dpi=150)


def crosses(window: dict[str, Any], y: int) -> bool:
    """Whether a window has voxels of a coronal slice."""
    return bool(window["first_voxel_xyz"][1] <= y <= window["last_voxel_xyz"][1])


def draw(axes: Axes, slice_zx: np.ndarray, labels_zx: np.ndarray, spacing: tuple[float, ...]) -> None:
    """The slice, and the labels over it."""
    extent = (0, slice_zx.shape[1] * spacing[0], 0, slice_zx.shape[0] * spacing[2])
    axes.imshow(slice_zx, cmap="gray", origin="lower", extent=extent, interpolation="bilinear")
    coloured = colormaps["tab20"](labels_zx % 20)
    coloured[..., 3] = 0.45 * (labels_zx > 0)
    axes.imshow(coloured, origin="lower", extent=extent, interpolation="nearest")
    axes.set_axis_off()
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])


def outline(axes: Axes, window: dict[str, Any], spacing: tuple[float, ...], colour: str, width: float) -> None:
    """A window's section with the slice."""
    (x, _, z), (last_x, _, last_z) = window["first_voxel_xyz"], window["last_voxel_xyz"]
    corner = (x * spacing[0], z * spacing[2])
    size = ((last_x - x + 1) * spacing[0], (last_z - z + 1) * spacing[2])
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width, clip_on=False))


if __name__ == "__main__":
    main()
