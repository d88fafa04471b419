"""What a trained stock nnU-Net is worth as an NMSW model: retrofitted, and beside a 3d_lowres without any training.

    python benchmarks/stock_models.py -device cpu -o stock_models

On fold 0 of Hippocampus and of the phantom at 6 mm (`make_kits_phantom.py --spacing 6 --train 120 --test 0`): trains
stock 3d_fullres and 3d_lowres, and `nnUNetTrainerNMSW_retrofit` around the former, all for ten epochs, unless they are
there; predicts the validation cases from file to file, one after the other, by the stock sliding window and by NMSW at
10% and 20% of the windows, without mirroring; and puts Dice and seconds into docs/results.md. On a CPU training runs in
bfloat16 (`bfloat16.py`), prediction as the commands do it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from results import (
    BASELINE,
    CHECKPOINT,
    HIPPOCAMPUS,
    PLANS,
    ROOT,
    Experiment,
    plan,
    replace_between_markers,
    run,
    train_fold,
)

from nnunet_nmsw.inference.device import prepare_device
from nnunet_nmsw.inference.loading import load_model
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.two_models import TwoModelPredictor

EXPERIMENTS = (
    HIPPOCAMPUS,
    Experiment(902, "Dataset902_KiTSPhantom6mm", "16 16 16", "8 16 32", "0", ""),
)
RETROFIT = "nnUNetTrainerNMSW_retrofit_10epochs"
LOW_RESOLUTION = "3d_lowres"
PERCENTAGES = ("10%", "20%")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-d", type=int, nargs="+", help="only these datasets")
    parser.add_argument("-cases", type=int, help="only so many validation cases, the first ones")
    parser.add_argument("-o", type=Path, required=True, help="folder of predictions and results")
    args = parser.parse_args()
    for experiment in EXPERIMENTS:
        if args.d is None or experiment.dataset_id in args.d:
            models = train(experiment, args.device)
            rows = compare(experiment, models, args.device, args.o / experiment.dataset, args.cases)
            folder = ROOT / "docs" / "results" / experiment.dataset
            folder.mkdir(parents=True, exist_ok=True)
            machine = {"processor": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
            written = {"command": sys.argv, "machine": machine, "methods": rows}
            (folder / "stock_models.json").write_text(json.dumps(written, indent=1))
            replace_between_markers(ROOT / "docs" / "results.md", f"{experiment.dataset} stock models", table(rows))


def train(experiment: Experiment, device: str) -> dict[str, Path]:
    """Train what is not there. Returns the models' folders."""
    plan(experiment)
    add_low_resolution(experiment)
    results = Path(os.environ["nnUNet_results"]) / experiment.dataset
    models = {
        "fine": results / f"{BASELINE}__{PLANS}__3d_fullres",
        "coarse": results / f"{BASELINE}__{PLANS}__{LOW_RESOLUTION}",
        "retrofit": results / f"{RETROFIT}__{PLANS}__3d_fullres",
    }
    checkpoint = models["fine"] / "fold_0" / CHECKPOINT
    train_fold(experiment, BASELINE, 0, device)
    train_fold(experiment, BASELINE, 0, device, LOW_RESOLUTION)
    train_fold(experiment, RETROFIT, 0, device, flags=f"-pretrained_weights {shlex.quote(str(checkpoint))}")
    return models


def add_low_resolution(experiment: Experiment) -> None:
    """Add 3d_lowres of twice the spacing to the small plans, with the same network and patch, and preprocess it."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / experiment.dataset
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    full = plans["configurations"]["3d_fullres"]
    identifier = f"{PLANS}_{LOW_RESOLUTION}"
    plans["configurations"][LOW_RESOLUTION] = {
        "inherits_from": "3d_fullres",
        "data_identifier": identifier,
        "spacing": [2 * axis for axis in full["spacing"]],
        "median_image_size_in_voxels": [n / 2 for n in full["median_image_size_in_voxels"]],
    }
    (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=1))
    if not (folder / identifier).is_dir():
        run(f"nnUNetv2_preprocess -d {experiment.dataset_id} -plans_name {PLANS} -c {LOW_RESOLUTION} -np 2")


def compare(
    experiment: Experiment, models: dict[str, Path], device_name: str, folder: Path, num_cases: int | None
) -> list[dict[str, Any]]:
    """Dice and seconds of each method on the validation cases."""
    raw = Path(os.environ["nnUNet_raw"]) / experiment.dataset
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / experiment.dataset
    keys = json.loads((preprocessed / "splits_final.json").read_text())[0]["val"][:num_cases]
    device = prepare_device(device_name)
    common: dict[str, Any] = {"use_mirroring": False, "device": device, "allow_tqdm": False}
    common["perform_everything_on_device"] = device.type == "cuda"

    def stock(model: Path) -> nnUNetPredictor:
        predictor = nnUNetPredictor(**common)
        load_model(predictor, model, [0], CHECKPOINT)
        return predictor

    def retrofit(num_patches: str) -> nnUNetPredictor:
        predictor = NMSWPredictor(num_patches=num_patches, **common)
        load_model(predictor, models["retrofit"], [0], CHECKPOINT)
        return predictor

    def untrained(num_patches: str) -> nnUNetPredictor:
        predictor = TwoModelPredictor(stock(models["coarse"]), num_patches=num_patches, **common)
        load_model(predictor, models["fine"], [0], CHECKPOINT)
        return predictor

    methods: dict[str, Callable[[], nnUNetPredictor]] = {
        "stock 3d_fullres, sliding window": lambda: stock(models["fine"]),
        "stock 3d_lowres, sliding window": lambda: stock(models["coarse"]),
        **{f"retrofit, K = {k}": lambda k=k: retrofit(k) for k in PERCENTAGES},  # type: ignore[misc]
        **{f"both stock models, not trained further, K = {k}": lambda k=k: untrained(k) for k in PERCENTAGES},  # type: ignore[misc]
    }
    predictors = {name: make() for name, make in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for key in keys:
        images = sorted(str(file) for file in (raw / "imagesTr").glob(f"{key}_0*"))
        for name, predictor in predictors.items():  # in turns: a machine that slows down slows all of them
            output = folder / name.replace(" ", "_") / key
            output.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            predictor.predict_from_files_sequential([images], [str(output)])
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name in methods:
        predicted = folder / name.replace(" ", "_")
        summary = folder / f"{predicted.name}.json"
        compute_metrics_on_folder_simple(str(raw / "labelsTr"), str(predicted), [1, 2], str(summary), 2, chill=True)
        metrics = json.loads(summary.read_text())
        dice = {label: 100 * of_label["Dice"] for label, of_label in metrics["mean"].items()}
        ratios = np.array(seconds[name]) / np.array(seconds[next(iter(methods))])
        rows.append(
            {
                "method": name,
                "cases": len(keys),
                "dice": dice,
                "median_seconds": float(np.median(seconds[name])),
                "median_ratio": float(np.median(ratios)),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    labels = list(rows[0]["dice"])
    lines = [
        f"| {rows[0]['cases']} cases | mean Dice | {' | '.join(f'Dice of {label}' for label in labels)} "
        "| seconds a case, file to file | × stock 3d_fullres |",
        "|---" * (4 + len(labels)) + "|",
    ]
    for row in rows:
        dice = list(row["dice"].values())
        lines.append(
            f"| {row['method']} | {np.mean(dice):.1f} | {' | '.join(f'{value:.1f}' for value in dice)} "
            f"| {row['median_seconds']:.2f} | {row['median_ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
