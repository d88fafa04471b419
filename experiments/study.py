"""Trainings that run to their end: arms × folds × datasets, each NMSW arm compared with stock by `nmsw_compare`.

    python experiments/study.py -d 731 -arms stock nmsw context retrofit -epochs 50 -o study -device cpu -jobs 2

Fold S is trained with seed S: a replicate differs in its cases, too, and every case counts once. Arms that start from
a stock model take the one of their own fold. What is there is kept: an interrupted study goes on, a training after its
last whole epoch. `--minutes` stops in time. In the end tables are written into `study.md` of the folder. Needs
nnU-Net's folders and the preprocessed datasets of `ablation.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ablation import DATASETS, Dataset, head, row
from training_run import environment_of, values_of_flags

from nnunet_nmsw.demo.small_plans import write_small_plans

HERE = Path(__file__).resolve().parent
FINAL = "checkpoint_final.pth"
STEPS = 250
"""Of an epoch, as in nnU-Net."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        trainer: its name.
        settings: under `nmsw` in the plans.
        start: the arm whose checkpoint of the same fold is the start.
    """

    trainer: str = "nnUNetTrainerNMSW"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str | None = None


STOCK = "stock"
ARMS = {
    STOCK: Arm("nnUNetTrainer"),
    "paper": Arm("nnUNetTrainerNMSW_paper"),
    "nmsw": Arm(settings={"context_channels": 0}),
    "context": Arm(settings={"context_channels": 4}),
    "retrofit": Arm("nnUNetTrainerNMSW_retrofit", start=STOCK),
    "retrofit_context": Arm("nnUNetTrainerNMSW_retrofit_context", start=STOCK),
}


def plans_of(dataset: Dataset, arm: str) -> str:
    """Name of an arm's plans."""
    return f"nnUNetPlans_{arm}{dataset.variant}"


class Study:
    """The folders and flags of a study.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end = time.monotonic() + 60 * args.minutes if args.minutes else None
        self.results = args.o / "models" / f"{args.epochs}_epochs"
        self.environment = environment_of(self.results, args.jobs)

    def model(self, dataset: Dataset, name: str) -> Path:
        """Folder of an arm's models."""
        return self.results / dataset.name / f"{ARMS[name].trainer}__{plans_of(dataset, name)}__3d_fullres"

    def checkpoint(self, dataset: Dataset, name: str, fold: int) -> Path:
        """Of a training that is done."""
        return self.model(dataset, name) / f"fold_{fold}" / FINAL

    def train(self, dataset_id: int, name: str, fold: int) -> None:
        """One training, unless it is done or what it starts from is not."""
        dataset, arm, args = DATASETS[dataset_id], ARMS[name], self.args
        if self.checkpoint(dataset, name, fold).is_file() or self.is_over():
            return
        command = [sys.executable, str(HERE / "training_run.py"), "-d", str(dataset.number)]
        command += values_of_flags(args, arm.trainer, plans_of(dataset, name), fold, fold)
        command += [] if dataset.mirrors else ["--no_mirroring"]
        if arm.start is not None:
            start = self.checkpoint(dataset, arm.start, fold)
            if not start.is_file():
                print(f"{dataset.folder} {name} fold {fold} waits for {arm.start}", flush=True)
                return
            command += ["-pretrained_weights", str(start)]
        self.call(command, args.o / dataset.folder / f"{args.epochs}_epochs" / f"{name}_fold_{fold}.log")

    def compare(self, dataset_id: int, name: str, folds: list[int]) -> None:
        """The report of an NMSW arm, once all of its folds and stock's are trained."""
        dataset, args = DATASETS[dataset_id], self.args
        needed = [self.checkpoint(dataset, of, fold) for of in (STOCK, name) for fold in folds]
        if self.is_over() or not all(checkpoint.is_file() for checkpoint in needed):
            return
        command = [sys.executable, "-m", "nnunet_nmsw.commands.compare", "-d", str(dataset.number)]
        command += ["-f", *map(str, folds), "-p", plans_of(dataset, name), "-tr", ARMS[name].trainer]
        command += ["-p_baseline", plans_of(dataset, STOCK), "-tr_baseline", ARMS[STOCK].trainer]
        command += ["-k", "5%", "10%", "20%", "auto", "all", "--disable_tta", "-nps", "1", "-timed_cases", "0"]
        command += ["-device", args.device, "-o", str(self.report(dataset, name)), "--disable_progress_bar"]
        self.call(command, self.report(dataset, name).with_suffix(".log"))

    def report(self, dataset: Dataset, name: str) -> Path:
        """Folder of an arm's comparison."""
        folder: Path = self.args.o / dataset.folder / f"{self.args.epochs}_epochs" / f"{name}_compared"
        return folder

    def is_over(self) -> bool:
        """Whether the time is used up."""
        return self.end is not None and time.monotonic() > self.end

    def call(self, command: list[str], log: Path) -> None:
        """Run a command with a log. One that fails is reported, and the others go on."""
        log.parent.mkdir(parents=True, exist_ok=True)
        print(shlex.join(command), flush=True)
        left = None if self.end is None else max(1.0, self.end - time.monotonic())
        with open(log, "a") as file:
            try:
                done = subprocess.run(
                    command, env=self.environment, stdout=file, stderr=file, timeout=left, check=False
                )
                if done.returncode:
                    print(f"failed: {log}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"not finished: {log}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, nargs="+", default=[4, 902, 731], choices=DATASETS, help="datasets")
    parser.add_argument("-arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("-folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-epochs", type=int, required=True, help="of a training")
    parser.add_argument("-steps", type=int, default=STEPS, help="of an epoch")
    parser.add_argument("-jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--minutes", type=float, help="stop after these. The same command goes on where it stopped")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, required=True, help="folder of models, reports and tables")
    args = parser.parse_args()
    study = Study(args)
    for dataset_id in args.d:
        dataset = DATASETS[dataset_id]
        of_network = (dataset.patch_size, dataset.features)
        for name in args.arms:
            plans, settings = plans_of(dataset, name), ARMS[name].settings
            write_small_plans(dataset.number, *of_network, plans, settings, dataset.batch_size, dataset.plans)
    # Fold by fold, so that there is a result early; what others start from comes first.
    for started in (False, True):
        names = [name for name in args.arms if (ARMS[name].start is not None) is started]
        runs = [(d, name, fold) for fold in args.folds for d in args.d for name in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: study.train(*run), runs))
    reports = [(d, name) for d in args.d for name in args.arms if name != STOCK]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda of: study.compare(*of, args.folds), reports))
    text = "\n\n".join(table(study, DATASETS[d], args.arms) for d in args.d)
    (args.o / "study.md").write_text(text + "\n")
    print(text)


ROWS = (
    "nmsw_sliding_window_step_0.5",
    "nmsw_global_branch",
    "nmsw_greedy_benefit_5percent",
    "nmsw_greedy_benefit_10percent",
    "nmsw_greedy_benefit_20percent",
    "nmsw_greedy_benefit_auto",
    "nmsw_greedy_benefit_all",
    "nmsw_entropy_10percent",
    "nmsw_random_10percent",
    "nmsw_objects",
    "nmsw_oracle_10percent",
)
OF_STOCK = (
    "baseline_sliding_window_step_0.5",
    "baseline_sliding_window_step_1.0",
    "baseline_sliding_window_step_1.0_skipping",
)


def table(study: Study, dataset: Dataset, arms: list[str]) -> str:
    """Markdown of what is compared of a dataset."""
    lines = [f"### {dataset.folder}, {study.args.epochs} epochs", ""]
    columns = ("arm", "method", "Dice, %", "difference to stock (95%)", "NSD, %", "missed objects", "patches")
    lines += head(*columns)
    first = True
    for name in arms:
        file = study.report(dataset, name) / "results.json"
        if not file.is_file():
            continue
        methods = json.loads(file.read_text())["methods"]
        for key in OF_STOCK if first else ():
            lines.append(table_row(STOCK, methods[key]))
        lines += [table_row(name, methods[key]) for key in ROWS if key in methods]
        first = False
    return "\n".join(lines)


def table_row(arm: str, method: dict[str, Any]) -> str:
    """A method in the table."""
    mean, difference = method["mean"], method["difference"]
    between = ""
    if difference:
        numbers = (100 * difference[key] for key in ("mean", "low", "high"))
        between = "{:+.1f} ({:+.1f} to {:+.1f})".format(*numbers)
    return row(
        arm,
        method["method"]["name"],
        f"{100 * mean['Dice']:.1f}",
        between,
        f"{100 * mean['NSD']:.1f}",
        f"{method['missed_objects']} of {method['objects']}",
        f"{method['patches']:.1f}",
    )


if __name__ == "__main__":
    main()
