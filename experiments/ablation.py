"""Ablations: arms of settings × seeds on small datasets, with a table and a plot at the end.

    python experiments/ablation.py -d 4 902 -arms stock default paper -seeds 0 1 2 -o ablation -device cpu

Each run trains one arm with one seed for a fixed number of steps and measures every way of choosing windows
(`ablation_run.py`). What is there is kept: an interrupted grid goes on, and so does an interrupted training. Needs
nnU-Net's folders and the preprocessed datasets of `DATASETS`. Arms are settings of NMSW on top of the defaults, or
trainers of `arms.py`. Settings can be given on the spot as NAME='{"setting": value}'. `--document` puts the results
into docs/ablation-tables.md and the folder docs/ablations. Arms that only version 0.1.0 can run keep their rows there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablation_tables import learning_curves, lengths_table, plot, table
from grid import ARMS, DATASETS, SELECTION_ARMS, STOCK, Arm
from markers import replace_between_markers
from training_run import environment_of, values_of_flags

import nnunet_nmsw
from nnunet_nmsw.demo.small_plans import write_small_plans

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, nargs="+", default=[4, 902], choices=DATASETS, help="datasets")
    parser.add_argument("-arms", nargs="+", default=[STOCK, "default"], help=f"of {', '.join(ARMS)}, or NAME=JSON")
    parser.add_argument("-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-epochs", type=int, default=10, help="of a training")
    parser.add_argument("-steps", type=int, default=250, help="of an epoch")
    parser.add_argument("-jobs", type=int, default=1, help="runs at the same time, sharing the processor's cores")
    parser.add_argument("--minutes", type=float, help="stop after these. The same command goes on where it stopped")
    parser.add_argument("--folds", action="store_true", help="train fold S with seed S, and not fold 0 with each seed")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, required=True, help="folder of the results")
    parser.add_argument("--evaluate", action="store_true", help="measure again what is trained, and train nothing")
    parser.add_argument("--document", action="store_true", help="train nothing; put what is there into the docs")
    args = parser.parse_args()
    if args.document:
        document(args.o, args.d)
        return
    args.end = time.monotonic() + 60 * args.minutes if args.minutes else None
    arms = dict(map(parse_arm, args.arms))
    runs = [(d, name, seed) for seed in args.seeds for d in args.d for name in arms]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda run: train_and_evaluate(run[0], run[1], run[2], arms[run[1]], args), runs):
            pass
    (args.o / "table.md").write_text(table(args.o, args.d))
    plot(args.o, args.d, args.o / "dice_by_patches.svg")
    learning_curves(args.o, args.d, args.o / "learning_curves.svg")
    print((args.o / "table.md").read_text())


def document(folder: Path, dataset_ids: list[int]) -> None:
    """Put the tables between the markers of docs/ablation-tables.md and docs/results.md, plots and JSON beside them.

    All under the number of this version: what an arm's name means, and what it learns, changes with versions.
    """
    docs, version = HERE.parent / "docs", nnunet_nmsw.__version__
    of_version = docs / "ablations" / version
    for dataset_id in dataset_ids:
        for file in sorted(folder.glob(f"{DATASETS[dataset_id].folder}/*_epochs/*.json")):
            copy = of_version / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    learning_curves(of_version, dataset_ids, of_version / "learning_curves.svg")
    for dataset_id in dataset_ids:
        replace_between_markers(docs / "results.md", DATASETS[dataset_id].folder, lengths_table(of_version, dataset_id))
    replace_between_markers(docs / "ablation-tables.md", f"results of {version}", table(of_version, dataset_ids))


def parse_arm(text: str) -> tuple[str, Arm]:
    """Name of an arm, and the arm."""
    name, _, settings = text.partition("=")
    return name, Arm(settings=json.loads(settings)) if settings else ARMS[name]


def train_and_evaluate(dataset_id: int, name: str, seed: int, arm: Arm, args: argparse.Namespace) -> None:
    """One run, in a process of its own with a log, unless its results are there."""
    dataset = DATASETS[dataset_id]
    folder = args.o / dataset.folder / f"{args.epochs}_epochs"
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / f"{name}__seed_{seed}.json"
    fold = seed if args.folds else 0
    if results.is_file():
        there, asked = json.loads(results.read_text()).get("run"), {"fold": fold, "steps": args.steps}
        if there not in (None, asked):
            raise SystemExit(f"{results} is a run of {there}, and asked for is {asked}: give another folder with -o")
    if results.is_file() != args.evaluate or (args.end and time.monotonic() > args.end):
        return
    plans = f"nnUNetPlans_{name}_{seed}{dataset.variant}"
    nmsw = {} if name == STOCK else {**arm.settings, "seed": seed}
    of_network = (dataset.patch_size, dataset.features)
    write_small_plans(dataset.number, *of_network, plans, nmsw, dataset.batch_size, dataset.plans)
    results_of_nnunet = args.o / "models" / f"{args.epochs}_epochs"
    environment = environment_of(results_of_nnunet, args.jobs)
    command = [sys.executable, str(HERE / "ablation_run.py"), "-d", str(dataset.number), "-o", str(results)]
    command += values_of_flags(args, arm.trainer, plans, fold, seed)
    command += ["--evaluate"] if args.evaluate else []
    command += [] if name in SELECTION_ARMS else ["--own_selection"]
    command += [] if dataset.mirrors else ["--no_mirroring"]
    print(f"{dataset.folder} {name} seed {seed}", flush=True)
    left = args.end and args.end - time.monotonic()
    with open(results.with_suffix(".log"), "a") as log:
        try:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{dataset.folder} {name} seed {seed} is not finished", flush=True)


if __name__ == "__main__":
    main()
