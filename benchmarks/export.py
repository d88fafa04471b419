"""From logits to labels on the image's grid: nnU-Net's export of a logits volume against labels plane by plane.

    python benchmarks/export.py -classes 3 30 118 -image 240 252 328 -spacing 1.5 -rounds 3 -o benchmarks/export.json

Organs are ellipsoids; a tenth of the windows is fused with the coarse prediction. Stock export gets the fused logits as
nnU-Net's predictor leaves them, in half precision; what is timed is their way to labels on the image's grid. The labels
plane by plane start from patch logits and coarse logits: blending and fusion are timed with them. Each measurement is a
process of its own, the two take turns. Memory is the peak of the process beyond what it held before the export; for
stock, that counts the logits volume it is given. Labels of both are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import in_new_process, tell, write_results
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from torch import Tensor

from nnunet_nmsw.inference.memory import most_memory_of_process
from nnunet_nmsw.inference.networks import MEMORY_OF_PLANES
from nnunet_nmsw.inference.open_windows import FusedModel
from nnunet_nmsw.inference.planes import FusedPrediction, planes_for, segment
from nnunet_nmsw.model.fusion import FusionWeights, fuse, gaussian_weights
from nnunet_nmsw.selection.budget import resolve_num_patches
from nnunet_nmsw.volume.interpolation import linear_axis, upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape, WindowGrid, window_slices

METHODS = ("stock", "planes")
IMAGE_SPACING = 0.8
"""In mm, isotropic."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-classes", type=int, nargs="+", default=[3, 30])
    parser.add_argument("-image", type=int, nargs=3, default=[240, 252, 328], help="voxels by axis, of 0.8 mm")
    parser.add_argument("-spacing", type=float, default=1.5, help="of the network, mm")
    parser.add_argument("-patch", type=int, default=64)
    parser.add_argument("-rounds", type=int, default=3)
    parser.add_argument(
        "-skip_stock_from", type=int, default=1000, help="number of classes that stock has no memory for"
    )
    parser.add_argument("-o", type=Path, help="JSON file")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        tell(measure(args, args.one, args.classes[0]))
        return
    rows = []
    for classes in args.classes:
        methods = [method for method in METHODS if method != "stock" or classes < args.skip_stock_from]
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for _ in range(args.rounds):
            for method in methods:
                runs[method].append(in_process(args, method, classes))
        medians = {
            method: {key: statistics.median(run[key] for run in of_method) for key in ("seconds", "gib")}
            for method, of_method in runs.items()
        }
        row = {"classes": classes, "medians": medians, "runs": runs}
        if "stock" in runs:
            row["ratio_seconds"] = medians["stock"]["seconds"] / medians["planes"]["seconds"]
            row["ratio_memory"] = medians["stock"]["gib"] / medians["planes"]["gib"]
            row["labels_that_differ"] = abs_difference(*(runs[method][0]["volumes"] for method in METHODS))
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "runs"}), flush=True)
    if args.o:
        write_results(args.o, {"rows": rows})


def abs_difference(first: list[int], second: list[int]) -> float:
    """Share of the foreground by which the volumes of the labels differ."""
    total = sum(abs(a - b) for a, b in zip(first, second, strict=True))
    return total / max(1, sum(first[1:]))


def in_process(args: argparse.Namespace, method: str, classes: int) -> dict[str, Any]:
    """Measure in a new process."""
    flags = ["--one", method, "-classes", str(classes), "-spacing", str(args.spacing)]
    return in_new_process(__file__, *flags, "-image", *map(str, args.image), "-patch", str(args.patch))


def measure(args: argparse.Namespace, method: str, classes: int) -> dict[str, Any]:
    """Seconds, GiB, and voxels of each label."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image: Shape = tuple(args.image)
    d, h, w = (max(args.patch, round(n * IMAGE_SPACING / args.spacing)) for n in image)
    grid = WindowGrid((d, h, w), (args.patch,) * 3, (3, 3, 3))
    centres = rng.uniform(0.1, 0.9, (classes - 1, 3)) * (d, h, w)
    radii = rng.uniform(0.03, 0.12, (classes - 1, 3)) * (d, h, w)
    coarse_Cdhw = organs(centres / 3, radii / 3, grid.low_shape, (0, 0, 0))
    near = grid.starts_N3.float() + args.patch / 2
    order = torch.cdist(near, torch.from_numpy(centres).float()).amin(1).argsort()
    starts_K3 = grid.starts_N3[order[: resolve_num_patches("10%", len(grid))]]
    weights = FusionWeights.convex(torch.full((classes,), 0.88))

    def windows(starts: Tensor) -> Tensor:
        return torch.stack([organs(centres, radii, grid.patch_size, start).half() for start in starts.tolist()])

    if method == "stock":
        logits_CDHW = fused_volume(windows, starts_K3, coarse_Cdhw, weights, grid)
        size = logits_CDHW.numel() * logits_CDHW.element_size() / 2**30
        before, started = most_memory_of_process() / 2**30, time.perf_counter()
        resampled = resample_data_or_seg_to_shape(
            logits_CDHW, image, [args.spacing] * 3, [IMAGE_SPACING] * 3, order=1, order_z=0, force_separate_z=None
        )
        labels = torch.from_numpy(resampled.argmax(0))
        seconds, gib = time.perf_counter() - started, most_memory_of_process() / 2**30 - before + size
    else:
        patches = {tuple(start): windows(torch.tensor([start]))[0] for start in starts_K3.tolist()}

        def computed(starts: Tensor) -> Tensor:
            return torch.stack([patches.pop(tuple(start)) for start in starts.tolist()])

        before, started = most_memory_of_process() / 2**30, time.perf_counter()
        model = FusedModel(coarse_Cdhw, starts_K3, torch.ones(len(starts_K3)), weights, computed)
        prediction = FusedPrediction([model], grid, LabelEncoding(classes), windows_at_once=4)
        axes = [linear_axis(n, m) for n, m in zip(grid.volume_shape, image, strict=True)]
        planes = planes_for(MEMORY_OF_PLANES, classes, h, w)
        labels = segment(prediction, axes, (0, 0, 0), grid.volume_shape, planes)
        seconds, gib = time.perf_counter() - started, max(most_memory_of_process() / 2**30 - before, 1e-3)
    counts = torch.bincount(labels.flatten().long(), minlength=classes).tolist()
    return {"seconds": seconds, "gib": gib, "volumes": counts}


def organs(centres: np.ndarray, radii: np.ndarray, shape: Shape, start: tuple[int, ...]) -> Tensor:
    """Logits of ellipsoids in a box, float32 of shape C, `shape`; background is 0 everywhere."""
    axes = [torch.arange(n, dtype=torch.float32) + a + 0.5 for a, n in zip(start, shape, strict=True)]
    logits_CDHW = torch.zeros(len(centres) + 1, *shape)
    for logits_DHW, centre, radius in zip(logits_CDHW[1:], centres, radii, strict=True):
        squares = [((x - c) / r).square() for x, c, r in zip(axes, centre.tolist(), radius.tolist(), strict=True)]
        distance_DHW = squares[0][:, None, None] + squares[1][:, None] + squares[2]
        logits_DHW.copy_((5 * (1 - distance_DHW)).clamp_min(-10))
    return logits_CDHW


def fused_volume(
    windows: Any, starts_K3: Tensor, coarse_Cdhw: Tensor, weights: FusionWeights, grid: WindowGrid
) -> Tensor:
    """The fused logits of the volume, half precision."""
    gaussian_DHW = gaussian_weights(grid.patch_size, torch.device("cpu"))
    sums_CDHW = torch.zeros(len(coarse_Cdhw), *grid.volume_shape)
    weight_DHW = torch.zeros(grid.volume_shape)
    for start in starts_K3:
        inside = window_slices(start.tolist(), grid.patch_size)
        sums_CDHW[(slice(None), *inside)] += windows(start[None])[0].float() * gaussian_DHW
        weight_DHW[inside] += gaussian_DHW
    sums_CDHW /= weight_DHW.clamp_min(1e-30)
    covered_DHW = (weight_DHW > 0).float()
    for label, patch_DHW in enumerate(sums_CDHW):
        coarse_1DHW = upsample_window(coarse_Cdhw[label, None], (0, 0, 0), grid.volume_shape, (3, 3, 3))
        patch_DHW.copy_(fuse(patch_DHW[None], coarse_1DHW, weights.of_class(label), covered_DHW)[0])
    return sums_CDHW.half()


if __name__ == "__main__":
    main()
