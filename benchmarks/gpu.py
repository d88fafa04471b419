"""The paper's setting on a GPU: 480 × 480 × 384 voxels, patches of 128³, nnU-Net's full width, untrained.

    python benchmarks/gpu.py -classes 3 14 118 -k 5% 10% -rounds 3 -o docs/performance/gpu.json

The network's part of a prediction, from a preprocessed volume on the host to what its export starts from: nnU-Net's
sliding window to logits, NMSW to labels on the same grid, which includes most of its export. Both without mirroring,
and in turns; the first round is not counted. Every call is printed, and written with `-o`, as soon as it has ended.
With `-macs` PyTorch counts multiply-accumulates in a round of their own. Files are `prediction.py`'s matter.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from synthetic import FULL_WIDTH, organs, write_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.volume import Padded, Work, choose, predict_labels
from nnunet_nmsw.volume.interpolation import linear_axis

STOCK = "sliding window"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-classes", type=int, nargs="+", default=[3, 14, 118])
    parser.add_argument("-k", nargs="+", default=["5%", "10%"])
    parser.add_argument("-image", type=int, nargs=3, default=[384, 480, 480], metavar=("Z", "Y", "X"))
    parser.add_argument("-patch", type=int, default=128)
    parser.add_argument("-features", type=int, default=FULL_WIDTH)
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-rounds", type=int, default=3)
    parser.add_argument("-macs", action="store_true", help="count multiply-accumulates, too")
    parser.add_argument("-o", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    content: dict[str, Any] = {"command": sys.argv, "device": name, "torch": torch.__version__, "image": args.image}
    content |= {"calls": [], "rows": []}

    def keep(what: str, entry: dict[str, Any]) -> None:
        content[what].append(entry)
        print(what, entry, flush=True)
        if args.o:
            args.o.write_text(json.dumps(content, indent=1))

    for classes in args.classes:
        for row in measure(classes, args, device, partial(keep, "calls")):
            keep("rows", {"classes": classes, **row})


def measure(
    classes: int, args: argparse.Namespace, device: torch.device, keep: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """A row for each way to predict: seconds (median), GiB of the device, multiply-accumulates in units of 10¹².

    Args:
        classes: with the background.
        args: of the command line.
        device: that computes.
        keep: takes every call's seconds and GiB at once.
    """
    of_both: dict[str, Any] = {"use_mirroring": False, "device": device, "allow_tqdm": False}
    predictors = {STOCK: nnUNetPredictor(**of_both), **{k: NMSWPredictor(k, **of_both) for k in args.k}}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_model(model, args.image, 1.0, args.patch, args.features, classes)
        for predictor in predictors.values():
            predictor.initialize_from_trained_model_folder(str(model), (0,))
    # nnU-Net slides its window with the local branch alone, whose forward takes patches.
    volume = torch.from_numpy(organs(args.image, classes, seed=0)[0]).float()[None] / 500

    def predict(name: str) -> Callable[[], Tensor]:
        predictor = predictors[name]
        if isinstance(predictor, NMSWPredictor):
            return partial(labels_of, predictor, volume)
        return lambda: predictor.predict_sliding_window_return_logits(volume)

    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    gib: dict[str, float] = {}
    for number in range(args.rounds + 1):
        for name in predictors:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            elapsed = timed(predict(name), device)
            gib[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
            keep({"classes": classes, "windows": name, "round": number, "seconds": elapsed, "gib": gib[name]})
            if number:
                seconds[name].append(elapsed)
    rows = []
    for name in predictors:
        median = statistics.median(seconds[name])
        ratio = statistics.median(seconds[STOCK]) / median
        rows.append({"windows": name, "seconds": median, "times_faster": ratio, "gib": gib[name]})
        if args.macs:
            with FlopCounterMode(display=False) as counter:
                predict(name)()
            rows[-1]["tmacs"] = counter.get_total_flops() / 2e12
    return rows


@torch.inference_mode()
def labels_of(predictor: NMSWPredictor, volume_CDHW: Tensor) -> Tensor:
    """Labels of a preprocessed volume on its own grid."""
    padded = Padded.of(volume_CDHW, predictor.nmsw_network.patch_size)
    folds = [choose(fold, padded, predictor.spending) for fold in predictor.folds()]
    axes = [linear_axis(n, n) for n in padded.inside]
    return predict_labels(padded, folds, axes, Work(predictor.share, predictor.device))


def timed(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
