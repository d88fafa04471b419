"""Ablations: arms of settings × seeds on small datasets, with a table and a plot at the end.

    python benchmarks/ablation.py -d 4 902 -arms stock contribution benefit -seeds 0 1 2 -o ablation -device cpu -jobs 2

Each run trains one arm with one seed for a fixed number of steps and measures every way of choosing windows
(`ablation_run.py`). What is there is kept: an interrupted grid goes on. Needs nnU-Net's folders and the preprocessed
datasets of `DATASETS`. Arms are settings of NMSW on top of the defaults; one can be given on the spot as
NAME='{"setting": value}'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_nmsw.demo.small_plans import write_small_plans

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of the ablations and the network for it."""

    name: str
    patch_size: list[int]
    features: list[int]


DATASETS = {
    4: Dataset("Dataset004_Hippocampus", [16, 16, 16], [16, 32, 64]),
    # make_kits_phantom.py --spacing 6 --train 120 --test 0
    902: Dataset("Dataset902_KiTSPhantom6mm", [16, 16, 16], [8, 16, 32]),
}

STOCK = "stock"
PAPER = {
    "gradient_path": "input",
    "benefit_loss_weight": 0.0,
    "fusion": "class_weights",
    "fuse_random_windows": False,
    "selection": "top_k",
}
"""What every arm starts from: the paper's method but for its loss, which needs no canvas, and its window candidates."""

BENEFIT = {**PAPER, "gradient_path": "none", "benefit_loss_weight": 0.1, "selection": "greedy_benefit"}
FUSED = {**BENEFIT, "fuse_random_windows": True, "fusion": "affine"}
ARMS: dict[str, dict[str, Any]] = {
    STOCK: {},
    # how scores are trained
    "input": PAPER,
    "contribution_logits": {**PAPER, "gradient_path": "contribution_logits"},
    "contribution": {**PAPER, "gradient_path": "contribution"},
    "contribution_baseline": {**PAPER, "gradient_path": "contribution", "gradient_baseline": True},
    "benefit": BENEFIT,
    "benefit_contribution": {**BENEFIT, "gradient_path": "contribution"},
    # how patches are fused, and which windows a step looks at
    "benefit_fused": FUSED,
    "benefit_fused_class_weights": {**FUSED, "fusion": "class_weights"},
    "benefit_fused_1_3": {**FUSED, "sampled_windows": 1, "random_windows": 3},
    "benefit_fused_entropy": {**FUSED, "entropy_prior": 1.0},
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, nargs="+", default=list(DATASETS), choices=DATASETS, help="dataset ids")
    parser.add_argument("-arms", nargs="+", default=[STOCK, "benefit"], help=f"of {', '.join(ARMS)}, or NAME=JSON")
    parser.add_argument("-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-epochs", type=int, default=10, help="of 250 steps: 1, 5, 10, 20, 50, 100 or 250")
    parser.add_argument("-jobs", type=int, default=1, help="runs at the same time, sharing the processor's cores")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    arms = dict(map(parse_arm, args.arms))
    runs = [(d, name, seed) for seed in args.seeds for d in args.d for name in arms]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda run: train_and_evaluate(run[0], run[1], run[2], arms[run[1]], args), runs):
            pass
    (args.o / "table.md").write_text(table(args.o, args.d))
    print((args.o / "table.md").read_text())


def parse_arm(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of an arm."""
    name, _, settings = text.partition("=")
    return name, json.loads(settings) if settings else ARMS[name]


def train_and_evaluate(
    dataset_id: int, arm: str, seed: int, settings: dict[str, Any], args: argparse.Namespace
) -> None:
    """One run, in a process of its own with a log, unless its results are there."""
    dataset = DATASETS[dataset_id]
    folder = args.o / dataset.name / f"{args.epochs}_epochs"
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / f"{arm}__seed_{seed}.json"
    if results.is_file():
        return
    plans = f"nnUNetPlans_{arm}_{seed}"
    nmsw = {} if arm == STOCK else {**settings, "seed": seed}
    write_small_plans(dataset_id, dataset.patch_size, dataset.features, plans, nmsw)
    trainer = "nnUNetTrainer" if arm == STOCK else "nnUNetTrainerNMSW"
    length = "1epoch" if args.epochs == 1 else f"{args.epochs}epochs"
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {
        **os.environ,
        "nnUNet_results": str((args.o / "models").resolve()),
        "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "0"),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, str(HERE / "ablation_run.py"), "-d", str(dataset_id), "-p", plans]
    command += ["-tr", f"{trainer}_{length}", "-seed", str(seed), "-device", args.device, "-o", str(results)]
    print(f"{dataset.name} {arm} seed {seed}", flush=True)
    with open(results.with_suffix(".log"), "w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)


COLUMNS = (
    ("sliding window", "all"),
    ("global branch", "0"),
    *(("top_k", k) for k in ("2", "5", "10", "30", "5%", "10%")),
    *(("greedy_coverage", k) for k in ("2", "5", "10", "30", "5%", "10%")),
    *(("entropy", k) for k in ("2", "10", "10%")),
    *(("random", k) for k in ("2", "10", "10%")),
    *(("oracle", k) for k in ("2", "10", "10%")),
    ("all windows", "all"),
)


def table(folder: Path, dataset_ids: list[int]) -> str:
    """Markdown: a row an arm, mean Dice in per cent, mean and standard deviation over seeds."""
    lines = []
    for dataset_id in dataset_ids:
        for length in sorted((folder / DATASETS[dataset_id].name).iterdir()):
            header = " | ".join(f"{method} {k}" for method, k in COLUMNS)
            lines += [f"\n{DATASETS[dataset_id].name}, {length.name}\n", f"| arm | seeds | {header} |"]
            lines += ["|---" * (len(COLUMNS) + 2) + "|"]
            arms = sorted({file.stem.split("__seed_")[0] for file in length.glob("*.json")})
            for arm in arms:
                runs = [json.loads(file.read_text()) for file in sorted(length.glob(f"{arm}__seed_*.json"))]
                cells = []
                for method, k in COLUMNS:
                    values = [100 * np.mean(run["dice"][method][k]) for run in runs if method in run["dice"]]
                    cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "")
                lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
