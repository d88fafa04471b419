"""Trainings that run to their end: arms × folds × datasets, each NMSW arm compared with stock by `nmsw_compare`.

    python experiments/study.py -d 731 -arms stock nmsw context retrofit -epochs 50 -o study -device cpu -jobs 2

Fold S is trained with seed S: a replicate differs in its cases, too, and every case counts once. Arms that start from
a stock model take the one of their own fold. `lowres` is stock nnU-Net at about the resolution of the global branch;
with `stock` it also makes two stock models without further training. What is there is kept: an interrupted study goes
on, a training after its last whole epoch. `--minutes` stops in time. In the end tables are written into `study.md` of
the folder. Needs nnU-Net's folders and the preprocessed datasets of `ablation.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from backbones import BACKBONES, UNET, write_plans
from grid import DATASETS, Dataset
from study_tables import LOWRES, STOCK, TWO_STOCK, table
from training_run import environment_of, values_of_flags

from nnunet_nmsw.selection.calibration import FILE

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
        is_low: trained at the low resolution of the dataset.
    """

    trainer: str = "nnUNetTrainerNMSW"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str | None = None
    is_low: bool = False


ARMS = {
    STOCK: Arm("nnUNetTrainer"),
    LOWRES: Arm("nnUNetTrainer", is_low=True),
    "paper": Arm("nnUNetTrainerNMSW_paper"),
    "nmsw": Arm(settings={"context_channels": 0}),
    "context": Arm(settings={"context_channels": 4}),
    "retrofit": Arm("nnUNetTrainerNMSW_retrofit", start=STOCK),
    "retrofit_context": Arm("nnUNetTrainerNMSW_retrofit_context", start=STOCK),
}


class Study:
    """The folders and flags of a study.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end = time.monotonic() + 60 * args.minutes if args.minutes else None
        self.backbone = "" if args.backbone == UNET else f"_{args.backbone}"
        self.results = args.o / "models" / f"{args.epochs}_epochs"
        self.starts = args.o / "models" / f"{args.start_epochs or args.epochs}_epochs"
        self.environment = environment_of(self.results, args.jobs)

    def plans_of(self, dataset: Dataset, arm: str) -> str:
        """Name of an arm's plans."""
        return f"nnUNetPlans_{arm}{self.backbone}{dataset.variant}"

    def folder(self, dataset: Dataset) -> Path:
        """Folder of a dataset's reports and logs."""
        folder: Path = self.args.o / f"{dataset.folder}{self.backbone}" / f"{self.args.epochs}_epochs"
        return folder

    def trainer(self, name: str) -> str:
        """Name of an arm's trainer. The stock trainer takes nnU-Net's own networks alone."""
        trainer = ARMS[name].trainer
        return "nnUNetTrainer_any_network" if trainer == "nnUNetTrainer" and self.backbone else trainer

    def model(self, dataset: Dataset, name: str) -> Path:
        """Folder of an arm's models."""
        return self.results / dataset.name / f"{self.trainer(name)}__{self.plans_of(dataset, name)}__3d_fullres"

    def checkpoint(self, dataset: Dataset, name: str, fold: int) -> Path:
        """Of a training that is done."""
        return self.model(dataset, name) / f"fold_{fold}" / FINAL

    def train(self, dataset_id: int, name: str, fold: int) -> None:
        """One training, unless it is done or what it starts from is not."""
        dataset, arm, args = DATASETS[dataset_id], ARMS[name], self.args
        if self.checkpoint(dataset, name, fold).is_file() or self.is_over():
            return
        command = [sys.executable, str(HERE / "training_run.py"), "-d", str(dataset.number)]
        command += values_of_flags(args, self.trainer(name), self.plans_of(dataset, name), fold, fold)
        command += [] if dataset.mirrors else ["--no_mirroring"]
        if arm.start is not None:
            start = self.starts / self.checkpoint(dataset, arm.start, fold).relative_to(self.results)
            if not start.is_file():
                print(f"{dataset.folder} {name} fold {fold} waits for {arm.start}", flush=True)
                return
            command += ["-pretrained_weights", str(start)]
        self.call(command, self.folder(dataset) / f"{name}_fold_{fold}.log")

    def compare(self, dataset_id: int, name: str, folds: list[int]) -> None:
        """The report of an NMSW arm, once all of its folds and stock's are trained."""
        dataset, args = DATASETS[dataset_id], self.args
        needed = [self.checkpoint(dataset, of, fold) for of in (STOCK, name) for fold in folds]
        if self.is_over() or not all(checkpoint.is_file() for checkpoint in needed):
            return
        command = [sys.executable, "-m", "nnunet_nmsw.commands.compare", "-d", str(dataset.number)]
        command += ["-f", *map(str, folds), "-p", self.plans_of(dataset, name), "-tr", self.trainer(name)]
        command += ["-p_baseline", self.plans_of(dataset, STOCK), "-tr_baseline", self.trainer(STOCK)]
        calibrated = all((of_fold.parent / "validation" / FILE).is_file() for of_fold in needed[-len(folds) :])
        command += ["-k", "5%", "10%", "20%", *(["auto"] if calibrated else []), "all"]
        command += ["--disable_tta", "-nps", "1", "-timed_cases", "0"]
        command += ["-device", args.device, "-o", str(self.report(dataset, name)), "--disable_progress_bar"]
        self.call(command, self.report(dataset, name).with_suffix(".log"))

    def predict(self, dataset_id: int, name: str, fold: int) -> None:
        """Predict and measure a fold's cases by what no report has, once its models are trained.

        Args:
            dataset_id: number in `DATASETS`.
            name: `LOWRES`, or a number of patches of two stock models.
            fold: the fold.
        """
        dataset, args = DATASETS[dataset_id], self.args
        needed = [self.checkpoint(dataset, of, fold) for of in ((LOWRES,) if name == LOWRES else (LOWRES, STOCK))]
        folder = self.predicted(dataset, name, fold)
        if self.is_over() or (folder / "metrics.csv").is_file() or not all(file.is_file() for file in needed):
            return
        command = [sys.executable, str(HERE / "fold_prediction.py"), "-d", str(dataset.number), "-f", str(fold)]
        command += ["-o", str(folder), "--"]
        if name == LOWRES:
            command += ["nnUNetv2_predict", "-d", str(dataset.number), "-p", self.plans_of(dataset, LOWRES)]
            command += ["-tr", self.trainer(LOWRES), "-c", "3d_fullres"]
        else:
            command += ["nmsw_predict", "--global_model", str(self.model(dataset, LOWRES)), "-k", name]
            command += ["--local_model", str(self.model(dataset, STOCK)), "--backend", "pytorch"]
        command += ["-f", str(fold), "--disable_tta", "-device", args.device, "-npp", "1", "-nps", "1"]
        self.call(command, folder.with_suffix(".log"))

    def predicted(self, dataset: Dataset, name: str, fold: int) -> Path:
        """Folder of a fold's metrics."""
        what = LOWRES if name == LOWRES else f"two_stock_{name.replace('%', 'percent')}"
        return self.folder(dataset) / f"{what}_fold_{fold}"

    def report(self, dataset: Dataset, name: str) -> Path:
        """Folder of an arm's comparison."""
        return self.folder(dataset) / f"{name}_compared"

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
    parser.add_argument("-backbone", default=UNET, choices=BACKBONES, help="network of both branches")
    parser.add_argument("-folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-epochs", type=int, required=True, help="of a training")
    parser.add_argument("-start_epochs", type=int, help="of the models that retrofits start from. Default: -epochs")
    parser.add_argument("-steps", type=int, default=STEPS, help="of an epoch")
    parser.add_argument("-jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--minutes", type=float, help="stop after these. The same command goes on where it stopped")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, required=True, help="folder of models, reports and tables")
    args = parser.parse_args()
    study = Study(args)
    for dataset_id in args.d:
        dataset = DATASETS[dataset_id]
        for name in args.arms:
            source = dataset.low_plans if ARMS[name].is_low else dataset.plans
            write_plans(dataset, study.plans_of(dataset, name), ARMS[name].settings, source, args.backbone)
    # Fold by fold, so that there is a result early; what others start from comes first.
    for started in (False, True):
        names = [name for name in args.arms if (ARMS[name].start is not None) is started]
        runs = [(d, name, fold) for fold in args.folds for d in args.d for name in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: study.train(*run), runs))
    reports = [(d, name) for d in args.d for name in args.arms if name not in (STOCK, LOWRES)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda of: study.compare(of[0], of[1], args.folds), reports))
        others = [(d, name, fold) for fold in args.folds for d in args.d for name in (LOWRES, *TWO_STOCK)]
        list(pool.map(lambda of: study.predict(*of), others))
    text = "\n\n".join(table(study, DATASETS[d], args.arms) for d in args.d)
    (args.o / f"study{study.backbone}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
