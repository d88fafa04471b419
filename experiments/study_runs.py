"""What a study trains and predicts: its arms, its folders, and the commands of each.

`study.py` calls these, and `study_tables.py` reads what they leave.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from backbones import UNET
from grid import DATASETS, STOCK, Dataset
from training_run import environment_of, values_of_flags

from nnunet_nmsw.selection.calibration import FILE

HERE = Path(__file__).resolve().parent
LOWRES = "lowres"
TWO_STOCK = ("5%", "10%", "20%")
"""Numbers of patches of two stock models."""
FINAL = "checkpoint_final.pth"


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
