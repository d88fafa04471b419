"""Make docs/results.md and the table of the README: plan, train what is not trained, compare, and write.

    python benchmarks/results.py -device cpu -o results

Needs nnU-Net's folders and the two raw datasets in nnUNet_raw: Dataset004_Hippocampus of the Medical Segmentation
Decathlon and Dataset901_KiTSPhantom of make_kits_phantom.py (60 training cases). What is there is kept: planned
datasets, trained folds, and the comparisons in the output folder, so that an interrupted run goes on. On a CPU training
runs in bfloat16 (`bfloat16.py`), prediction always as the commands do it. Text outside of the markers in the documents
is left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLANS = "nnUNetPlans_small"
TRAINER, BASELINE = "nnUNetTrainerNMSW_10epochs", "nnUNetTrainer_10epochs"
CHECKPOINT = "checkpoint_final.pth"
README_METHODS = (
    "baseline_sliding_window_step_0.5",
    "baseline_sliding_window_step_1.0",
    "nmsw_greedy_benefit_5percent",
    "nmsw_greedy_benefit_10percent",
    "nmsw_greedy_benefit_all",
    "nmsw_global_branch",
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A dataset, the network for it, and how it is compared."""

    dataset_id: int
    dataset: str
    patch_size: str
    features: str
    folds: str
    flags: str


HIPPOCAMPUS = Experiment(4, "Dataset004_Hippocampus", "16 16 16", "16 32 64", "0 1", "-timed_cases 3 -rounds 3")
EXPERIMENTS = (
    HIPPOCAMPUS,
    Experiment(901, "Dataset901_KiTSPhantom", "32 32 32", "8 16 32 64", "0", "-timed_cases 1 -rounds 2"),
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, required=True, help="folder of the comparisons")
    parser.add_argument("-d", type=int, nargs="+", help="only these datasets")
    parser.add_argument("--no_training", action="store_true", help="only compare what is trained, and write")
    args = parser.parse_args()
    for experiment in EXPERIMENTS:
        if args.d is None or experiment.dataset_id in args.d:
            if not args.no_training:
                train(experiment, args.device)
            report = args.o / experiment.dataset
            run(
                f"nmsw_compare -d {experiment.dataset_id} -f {experiment.folds} -p {PLANS} -tr {TRAINER} "
                f"-tr_baseline {BASELINE} --disable_tta -nps 2 {experiment.flags} -device {args.device} "
                f"-o {shlex.quote(str(report))}"
            )
            write(experiment, report)


def train(experiment: Experiment, device: str) -> None:
    """Plan and train what is not there."""
    plan(experiment)
    for fold in experiment.folds.split():
        for trainer in (BASELINE, TRAINER):
            train_fold(experiment, trainer, int(fold), device)


def plan(experiment: Experiment) -> None:
    """Plan and preprocess, and write the small plans, unless they are there."""
    plans = Path(os.environ["nnUNet_preprocessed"]) / experiment.dataset
    if not (plans / "nnUNetPlans.json").is_file():
        run(f"nnUNetv2_plan_and_preprocess -d {experiment.dataset_id} -c 3d_fullres -np 2")
    if not (plans / f"{PLANS}.json").is_file():
        run(
            f"{shlex.quote(sys.executable)} -m nnunet_nmsw.demo.small_plans -d {experiment.dataset_id} "
            f"--patch_size {experiment.patch_size} --features {experiment.features}"
        )


def train_fold(
    experiment: Experiment, trainer: str, fold: int, device: str, configuration: str = "3d_fullres", flags: str = ""
) -> None:
    """Train, unless that is done."""
    model = Path(os.environ["nnUNet_results"]) / experiment.dataset / f"{trainer}__{PLANS}__{configuration}"
    if not (model / f"fold_{fold}" / CHECKPOINT).is_file():
        prefix = shlex.join([sys.executable, str(ROOT / "benchmarks" / "bfloat16.py")]) + " " if device == "cpu" else ""
        command = f"nnUNetv2_train {experiment.dataset_id} {configuration} {fold} -p {PLANS} -tr {trainer}"
        run(f"{prefix}{command} -device {device} {flags}")


def run(command: str) -> None:
    """Run a command, shown before."""
    print(command, flush=True)
    subprocess.run(shlex.split(command), check=True)


def write(experiment: Experiment, report: Path) -> None:
    """Put a report's tables between its markers in the documents, and its plots and numbers beside them."""
    folder = ROOT / "docs" / "results" / experiment.dataset
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*(report / "plots").glob("*.svg"), report / "results.json"):
        shutil.copy(file, folder)
    text = (report / "report.md").read_text().replace("](plots/", f"](results/{experiment.dataset}/")
    replace_between_markers(ROOT / "docs" / "results.md", experiment.dataset, text)
    results = json.loads((report / "results.json").read_text())
    replace_between_markers(ROOT / "README.md", experiment.dataset, readme_table(results))


def readme_table(results: dict) -> str:
    """A few rows of the report, for the README."""
    lines = [
        f"| {results['dataset']}, {results['cases']} cases | mean Dice | missed objects | patches | × GMAC "
        "| × seconds, file to file |",
        "|---|---|---|---|---|---|",
    ]
    reference = results["methods"][README_METHODS[0]]
    for key in README_METHODS:
        method = results["methods"][key]
        lines.append(
            f"| {method['method']['name']} | {100 * method['mean']['Dice']:.1f} "
            f"| {method['missed_objects']} of {method['objects']} | {method['patches']:.1f} "
            f"| {method['macs'] / reference['macs']:.2f} | {method['cost']['total_ratio']['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def replace_between_markers(file: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: the file has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    content = file.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{file} needs the lines {begin} and {end}, each once")
    before, rest = content.split(begin)
    _, after = rest.split(end)
    file.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


if __name__ == "__main__":
    main()
