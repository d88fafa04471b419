"""Ablations: arms of settings × seeds on small datasets, with a table and a plot at the end.

    python experiments/ablation.py -d 4 902 -arms stock default paper -seeds 0 1 2 -o ablation -device cpu

Each run trains one arm with one seed for a fixed number of steps and measures every way of choosing windows
(`ablation_run.py`). What is there is kept: an interrupted grid goes on, and so does an interrupted training. Needs
nnU-Net's folders and the preprocessed datasets of `DATASETS`. Arms are settings of NMSW on top of the defaults, or
trainers of `arms.py`. Settings can be given on the spot as NAME='{"setting": value}'. `--document` puts the results
into docs/ablations.md and the folder docs/ablations. Arms that only version 0.1.0 can run keep their rows there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ablation_run import NUM_PATCHES
from arms import CONTEXTS, PARTS
from matplotlib.figure import Figure
from training_run import environment_of, values_of_flags

import nnunet_nmsw
from nnunet_nmsw.demo.small_plans import write_small_plans
from nnunet_nmsw.trainers.progress import COLOURS

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "benchmarks"))
from results import replace_between_markers  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of the ablations and the network for it.

    Attributes:
        name: of its folder.
        patch_size: voxels by axis.
        features: of the stages, from the finest.
        batch_size: patches of a step.
        plans: whose preprocessed data is taken.
        low_plans: the same of a spacing that is about the global branch's.
        mirrors: whether left and right look alike to the labels. Where not, no arm mirrors.
        variant: tells apart what is made of one dataset.
    """

    name: str
    patch_size: list[int]
    features: list[int]
    batch_size: int = 4
    plans: str = "nnUNetPlans"
    low_plans: str = ""
    mirrors: bool = True
    variant: str = ""

    @property
    def number(self) -> int:
        """nnU-Net's."""
        return int(self.name.removeprefix("Dataset")[:3])

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return self.name + self.variant


# nnUNetPlans4mm: nnUNetv2_plan_experiment -overwrite_target_spacing 4 4 4 -overwrite_plans_name nnUNetPlans4mm
DATASETS = {
    4: Dataset("Dataset004_Hippocampus", [16, 16, 16], [16, 32, 64], low_plans="nnUNetPlans2mm"),
    # make_kits_phantom.py --spacing 6 --train 120 --test 0
    902: Dataset("Dataset902_KiTSPhantom6mm", [16, 16, 16], [8, 16, 32]),
    # make_kits_phantom.py --spacing 3 --train 100 --test 0
    903: Dataset("Dataset903_KiTSPhantom3mm", [24, 24, 24], [16, 32, 64], 2, low_plans="nnUNetPlans12mm"),
    731: Dataset(
        "Dataset731_BTCV", [24, 24, 24], [16, 32, 64], 2, "nnUNetPlans4mm", low_plans="nnUNetPlans12mm", mirrors=False
    ),
    # at nnU-Net's full width: for a GPU
    7313: Dataset(
        "Dataset731_BTCV", [64, 64, 64], [32, 64, 128, 256, 320], 2, "nnUNetPlans3mm", mirrors=False, variant="_3mm"
    ),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        trainer: its name without the length.
        settings: under `nmsw` in the plans.
    """

    trainer: str = "nnUNetTrainerNMSW"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


STOCK = "stock"
ONE_EACH = {"sampled_windows": 1, "random_windows": 1}
BATCH_NORM = {"arch_kwargs": {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}}
ARMS = {
    STOCK: Arm("nnUNetTrainer"),
    # how scores are trained
    "default": Arm(),
    "path_contribution": Arm(settings={"score_training": "contribution"}),
    "paper": Arm("nnUNetTrainerNMSW_paper"),
    "paper_2_2": Arm("nnUNetTrainerNMSW_paper", {"sampled_windows": 2, "random_windows": 2}),
    # the default with one thing changed: trainers of arms.py,
    **{name: Arm(f"nnUNetTrainerNMSW_{name}") for name in PARTS},
    # what the local branch is told of the volume,
    "context": Arm(settings={"context_channels": 4}),
    "context_4": Arm(settings={**ONE_EACH, "context_channels": 4}),
    "context_8": Arm(settings={**ONE_EACH, "context_channels": 8}),
    **{name: Arm(f"nnUNetTrainerNMSW_{name}", {**ONE_EACH, "context_channels": 4}) for name in CONTEXTS},
    # which windows a step looks at, and how often the global branch is trained,
    "windows_1_1": Arm(settings=ONE_EACH),
    "windows_2_0": Arm(settings={"sampled_windows": 2, "random_windows": 0}),
    "windows_1_1_in_turns": Arm("nnUNetTrainerNMSW_global_in_turns", ONE_EACH),
    "windows_1_3": Arm(settings={"sampled_windows": 1, "random_windows": 3}),
    "windows_3_1": Arm(settings={"sampled_windows": 3, "random_windows": 1}),
    # how the view of the global branch is augmented,
    "augmentation_in_mm": Arm("nnUNetTrainerNMSW_augmentation_in_mm"),
    # and the global branch
    "width_075": Arm(settings={"global_width": 0.75}),
    "width_100": Arm(settings={"global_width": 1.0}),
    "factor_2": Arm(settings={"downsampling_factor": [2, 2, 2]}),
    "factor_4": Arm(settings={"downsampling_factor": [4, 4, 4]}),
    "batch_norm": Arm(settings={"global_architecture": BATCH_NORM}),
}
PICKED_BY_TOP_K = ("paper", "paper_adamw", "paper_2_2")
"""Arms whose windows are picked by top-k."""

SELECTION_ARMS = ("default",)
"""Arms with whose networks all ways of picking windows are compared."""


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
    print((args.o / "table.md").read_text())


def document(folder: Path, dataset_ids: list[int]) -> None:
    """Put the tables between the markers of docs/ablations.md, and plot and JSON files into docs/ablations/.

    All under the number of this version: what an arm's name means, and what it learns, changes with versions.
    """
    docs, version = HERE.parent / "docs", nnunet_nmsw.__version__
    of_version = docs / "ablations" / version
    for dataset_id in dataset_ids:
        for file in sorted(folder.glob(f"{DATASETS[dataset_id].folder}/*_epochs/*.json")):
            copy = of_version / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    plot(of_version, dataset_ids, of_version / "dice_by_patches.svg")
    replace_between_markers(docs / "ablations.md", f"results of {version}", table(of_version, dataset_ids))


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
    if results.is_file() != args.evaluate or (args.end and time.monotonic() > args.end):
        return
    plans = f"nnUNetPlans_{name}_{seed}{dataset.variant}"
    nmsw = {} if name == STOCK else {**arm.settings, "seed": seed}
    of_network = (dataset.patch_size, dataset.features)
    write_small_plans(dataset.number, *of_network, plans, nmsw, dataset.batch_size, dataset.plans)
    results_of_nnunet = args.o / "models" / f"{args.epochs}_epochs"
    environment = {**environment_of(results_of_nnunet, args.jobs), "nnUNet_extTrainer": str(HERE)}
    command = [sys.executable, str(HERE / "ablation_run.py"), "-d", str(dataset.number), "-o", str(results)]
    command += values_of_flags(args, arm.trainer, plans, seed if args.folds else 0, seed)
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


KS = tuple(map(str, NUM_PATCHES))
SELECTION_NAMES = {
    "greedy_benefit": "predicted benefit, greedy (default)",
    "top_k": "predicted benefit, top-k",
    "greedy_coverage": "predicted benefit, greedy coverage",
    "entropy": "entropy of the coarse prediction",
    "random": "random, with predicted foreground",
    "oracle": "oracle",
}
Runs = dict[str, list[dict[str, Any]]]


def own_selection(arm: str) -> str:
    """How an arm picks windows at inference."""
    return "top_k" if arm in PICKED_BY_TOP_K else "greedy_benefit"


def load_runs(folder: Path) -> Runs:
    """Results by arm, arms as in `ARMS`, seeds in order."""
    runs: Runs = {}
    for file in sorted(folder.glob("*__seed_*.json")):
        runs.setdefault(file.stem.split("__seed_")[0], []).append(json.loads(file.read_text()))
    order = list(ARMS)
    return dict(sorted(runs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def dice(runs: list[dict[str, Any]], method: str, k: str) -> np.ndarray:
    """Mean Dice of the classes by seed, in per cent."""
    return np.array([100 * np.mean(run["dice"][method][k]) for run in runs if k in run["dice"].get(method, {})])


def cell(values: np.ndarray) -> str:
    """Mean and, of several seeds, standard deviation."""
    if not len(values):
        return ""
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def share_of_oracles_gain(runs: list[dict[str, Any]], method: str, k: str) -> np.ndarray:
    """By seed, in per cent: what windows add to the global branch's Dice, of what the oracle's as many add."""
    alone, oracle = dice(runs, "global branch", "0"), dice(runs, "oracle", k)
    chosen = dice(runs, method, k)
    return 100 * (chosen - alone) / (oracle - alone) if len(chosen) == len(alone) else alone[:0]


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*cells), "|---" * len(cells) + "|"]


def table(folder: Path, dataset_ids: list[int]) -> str:
    """Markdown of all results."""
    lines = [
        "Mean Dice of the foreground classes in per cent, mean ± standard deviation over seeds. Sampled with "
        "foreground: share of the windows drawn in the first and in the last epoch that hold foreground."
    ]
    for dataset_id in dataset_ids:
        for length in sorted((folder / DATASETS[dataset_id].folder).glob("*_epochs")):
            runs = load_runs(length)
            lines += [f"\n### {DATASETS[dataset_id].folder}, {length.name.replace('_', ' ')}\n", *arms_table(runs)]
            for arm in SELECTION_ARMS:
                if arm in runs:
                    lines += [f"\nWays to pick windows with the networks of `{arm}`:\n", *selections_table(runs[arm])]
                    lines += [
                        f"\nAs many windows as have a predicted benefit above a threshold, greedily, `{arm}`:\n",
                        *automatic_table(runs[arm]),
                    ]
    return "\n".join(lines) + "\n"


def arms_table(runs: Runs) -> list[str]:
    """Arms, each with its own way to pick windows."""
    columns = ["arm", "seeds", "sliding window", "global branch", *(f"K = {k}" for k in KS), "all windows"]
    columns += ["oracle, K = 10", "share of its gain, K = 10, %", "sampled with foreground"]
    lines = head(*columns)
    for arm, of_arm in runs.items():
        selection = own_selection(arm)
        drawn = [run["training"]["foreground_share"] for run in of_arm if run["training"]]
        first, last = (100 * np.mean([epochs[epoch] for epochs in drawn]) if drawn else 0 for epoch in (0, -1))
        lines += [
            row(
                f"`{arm}`",
                str(len(of_arm)),
                cell(dice(of_arm, "sliding window", "all")),
                cell(dice(of_arm, "global branch", "0")),
                *(cell(dice(of_arm, selection, k)) for k in KS),
                cell(dice(of_arm, "all windows", "all")),
                cell(dice(of_arm, "oracle", "10")),
                cell(share_of_oracles_gain(of_arm, selection, "10")),
                f"{first:.0f}% → {last:.0f}%" if drawn else "",
            )
        ]
    return lines


def selections_table(of_arm: list[dict[str, Any]]) -> list[str]:
    """Ways to pick windows with the same networks."""
    lines = head("windows by", *(f"K = {k}" for k in KS), "share of the oracle's gain, K = 10, %")
    for selection, name in SELECTION_NAMES.items():
        shares = cell(share_of_oracles_gain(of_arm, selection, "10"))
        lines += [row(name, *(cell(dice(of_arm, selection, k)) for k in KS), shares)]
    return lines


def automatic_table(of_arm: list[dict[str, Any]]) -> list[str]:
    """Dice and number of windows by threshold of the predicted benefit."""
    lines = head("threshold", "windows a case", "mean Dice")
    for threshold in of_arm[0]["automatic_windows"]:
        windows = np.array([run["automatic_windows"][threshold] for run in of_arm])
        lines += [row(threshold, cell(windows), cell(dice(of_arm, "automatic", threshold)))]
    return lines


CURVES = (
    ("default, oracle", "default", "oracle"),
    ("default", "default", "greedy_benefit"),
    ("default, entropy (top-k)", "default", "entropy"),
    ("default, random", "default", "random"),
    ("contribution", "path_contribution", "greedy_benefit"),
    ("the paper's", "paper", "top_k"),
)
"""Label, arm and way to pick windows of the lines in the plot."""


def plot(folder: Path, dataset_ids: list[int], file: Path) -> None:
    """Dice against K of the most telling arms and the stock sliding window, longest training, a panel a dataset."""
    figure = Figure(figsize=(5.5 * len(dataset_ids), 4.6), layout="constrained")
    axes = figure.subplots(1, len(dataset_ids), squeeze=False)[0]
    counts = [k for k in KS if not k.endswith("%")]
    lines: dict[str, Any] = {}
    for axis, dataset_id in zip(axes, dataset_ids, strict=True):
        lengths = (folder / DATASETS[dataset_id].folder).glob("*_epochs")
        for length in sorted(lengths, key=lambda length: int(length.name.split("_")[0]))[-1:]:
            runs = load_runs(length)
            if STOCK in runs:
                level = dice(runs[STOCK], "sliding window", "all").mean()
                lines["stock sliding window"] = axis.axhline(level, color="black", linestyle="--")
            for index, (label, arm, method) in enumerate(CURVES):
                if arm not in runs or not len(dice(runs[arm], method, "10")):
                    continue
                values = [dice(runs[arm], method, k) for k in counts]
                means = [value.mean() for value in values]
                spread = [value.std(ddof=1) if len(value) > 1 else 0 for value in values]
                style = {"color": COLOURS[index % len(COLOURS)], "marker": "osD^vPX*"[index % 8], "capsize": 3}
                lines[label] = axis.errorbar([int(k) for k in counts], means, spread, **style)
        axis.set(title=DATASETS[dataset_id].folder, xlabel="patches a case (K)", ylabel="mean Dice, %", xscale="log")
        axis.set_xticks([int(k) for k in counts], counts)
        axis.minorticks_off()
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    main()
