"""What a comparison compares, and where its results lie on the disk.

REPORT/comparison.json            what is compared: another comparison is refused
REPORT/methods/METHOD/CASE.nii.gz predictions, beside them summary.json as nnU-Net writes it
REPORT/cases/CASE.json, CASE.npz  metrics of all methods on a case; windows and score map for the report
REPORT/timing/METHOD_....json     seconds and memory
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key

from nnunet_nmsw.console import at_end
from nnunet_nmsw.documents import COMPARISON, RECORD, TIMING, read_json
from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.evaluation.methods import Method, primary_method, reference_method
from nnunet_nmsw.evaluation.metrics import METRICS, Label, evaluated_labels
from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.stock_models import StockModels
from nnunet_nmsw.evaluation.timing import measurement_order
from nnunet_nmsw.files import is_new, remove_leftovers, write_json
from nnunet_nmsw.selection.budget import UNCALIBRATED
from nnunet_nmsw.selection.by_score import GreedyBenefit

SETTINGS_FILE = "comparison.json"

AGAIN = "call the same command again"
ANEW = "delete the folder, or give a new one with -o"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and where its results lie.

    Attributes:
        folder: of the report.
        dataset: nnU-Net's name of it; of stock models what the report calls them.
        models: the NMSW model, before it the baseline if there is one; or stock models in both roles.
        methods: in the order in which they are run.
        cases: validation cases of all folds; of stock models any cases.
        tolerance_mm: of the normalised surface Dice.
        device: name of the device.
        timed_cases: how many cases are timed.
        rounds: how often each of them is.
        about: what is compared, in words.
        remarks: what a reader of the report has to know, as sentences.
        conditions: what else results depend on, by its flag.
    """

    folder: Path
    dataset: str
    models: Sequence[Model] | Sequence[StockModels]
    methods: Sequence[Method]
    cases: Sequence[Case]
    tolerance_mm: float
    device: str
    timed_cases: int = 0
    rounds: int = 0
    about: str = ""
    remarks: tuple[str, ...] = ()
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def nmsw(self) -> Model | StockModels:
        """The NMSW model."""
        return self.models[-1]

    @cached_property
    def reference(self) -> Method:
        """The method that all others are compared with."""
        return reference_method(self.methods)

    @cached_property
    def primary(self) -> Method:
        """The method that the report is about."""
        # Records of earlier versions say nothing of the selection, because there was one.
        own = next(
            (read_json(file, RECORD, f"delete it, and {AGAIN}").get("own_selection") for file in self._record_files()),
            None,
        )
        return self.primary_of(own or GreedyBenefit.name)

    def primary_of(self, own_selection: str) -> Method:
        """The method that the report is about, of a model that chooses windows in this way itself."""
        num_patches = self.nmsw.num_patches
        if num_patches == "auto" and not self.has_auto:
            num_patches = UNCALIBRATED
        return primary_method(self.methods, num_patches, own_selection)

    def _record_files(self) -> Iterator[Path]:
        return (file for case in self.cases if (file := self.record_file(case)).is_file())

    @property
    def has_auto(self) -> bool:
        """Whether a method takes the number of patches "auto"."""
        return any(method.num_patches == "auto" for method in self.methods)

    @property
    def has_reference(self) -> bool:
        """Whether there are reference labels; else the labels of the reference method are taken for them."""
        return all(case.has_reference for case in self.cases)

    @cached_property
    def label_names(self) -> dict[str, str]:
        """Name of each evaluated label or region, by nnU-Net's key of it in JSON."""
        return {label_or_region_to_key(label): name for label, name in self._evaluated.items()}

    @cached_property
    def labels(self) -> list[int | tuple[int, ...]]:
        """Labels or regions that are evaluated."""
        return list(self._evaluated)

    @cached_property
    def _evaluated(self) -> dict[Label, str]:
        dataset_json = self.nmsw.json("dataset.json")
        return evaluated_labels(self.nmsw.plans.get_label_manager(dataset_json), dataset_json)

    def open(self) -> None:
        """Make the folder, or go on in it.

        Folds may be added to a comparison; everything else must be as it was.

        Raises:
            UserError: the folder holds something else, or another comparison.
        """
        folds = sorted({case.fold for case in self.cases})
        settings: dict[str, Any] = {
            "version": version("nnunet-nmsw"),  # predictions change with it
            "dataset": self.dataset,
            "models": {model.role: model.name for model in self.models},
            "checkpoints": {key: digest for model in self.models for key, digest in model.fingerprints(folds).items()},
            "methods": [method.key for method in self.methods],
            "tolerance_mm": self.tolerance_mm,
            "device": self.device,
            **self.conditions,
        }
        file = self.folder / SETTINGS_FILE
        if file.is_file():
            there = read_json(file, COMPARISON, ANEW)
            there_checkpoints = there.pop("checkpoints", {})
            checkpoints = {**there_checkpoints, **settings.pop("checkpoints")}
            different = [key for key in settings if there.get(key) != settings[key]]
            different += [key for key, digest in there_checkpoints.items() if checkpoints[key] != digest]
            if different:
                raise UserError(
                    f"{self.folder} holds another comparison, which differs in {', '.join(different)}: "
                    "give a new folder with -o, or the flags it was made with"
                )
            settings["checkpoints"] = checkpoints
        check_report_folder(self.folder)
        try:
            write_json(file, settings)
            self.remove_leftovers()
        except OSError as error:
            raise UserError(f"-o {self.folder} cannot be written into: {error.strerror or reason(error)}") from error
        at_end.append(self.remove_leftovers)

    def remove_leftovers(self) -> None:
        """Remove what killed calls, or workers of this one, have not finished."""
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / "methods")

    def record_file(self, case: Case) -> Path:
        """Metrics of all methods on a case."""
        return self.folder / "cases" / f"{case.name}.json"

    def timing_file(self, number: int, method: Method) -> Path:
        """Time and memory of a method in a round; of the number "auto" with the threshold that the fold has now."""
        fold = self.cases[0].fold
        of_auto = f"_above_{self.thresholds[fold]}" if method.num_patches == "auto" and self.thresholds else ""
        name = f"{method.key}{of_auto}_fold_{fold}_cases_{self.timed_cases}_round_{number}.json"
        return self.folder / "timing" / name

    def prediction_file(self, case: Case, method: Method) -> Path:
        """Predicted labels."""
        ending = self.nmsw.json("dataset.json")["file_ending"]
        return self.folder / "methods" / method.key / (case.name + ending)

    @cached_property
    def thresholds(self) -> dict[int, float]:
        """Of the number of patches "auto", by fold; see `Model.threshold`. Empty where no method takes it."""
        if not self.has_auto or isinstance(self.nmsw, StockModels):  # whose calibration is one of the conditions
            return {}
        return {fold: self.nmsw.threshold(fold) for fold in {case.fold for case in self.cases}}

    def missing(self) -> list[Case]:
        """Cases that have not been run, perhaps by other parts, or with a threshold that has changed since.

        Folds that are validated later set the thresholds of those before.
        """
        return [case for case in self.cases if not self.is_done(case)]

    def is_done(self, case: Case) -> bool:
        """Whether a case has been run, with the threshold that its fold has now."""
        file = self.record_file(case)
        if not file.is_file():
            return False
        record = read_json(file, RECORD, f"delete it, and {AGAIN}")
        return bool(record.get("threshold") == self.thresholds.get(case.fold))

    def records(self) -> list[dict[str, Any]]:
        """Records of all cases, in their order."""
        return [self.record(case) for case in self.cases]

    def record(self, case: Case) -> dict[str, Any]:
        """What was measured on a case.

        Raises:
            UserError: its file is broken, or lacks a method.
        """
        file = self.record_file(case)
        record: dict[str, Any] = read_json(file, RECORD, f"delete it, and {AGAIN}")
        missing = [method.key for method in self.methods if method.key not in record["methods"]]
        missing += [
            f"{method.key}.metrics.{label}.{name}"
            for method in self.methods
            if not missing
            for label in self.label_names
            for name in METRICS
            if name not in record["methods"][method.key]["metrics"].get(label, {})
        ]
        if missing:
            raise UserError(f"{file} is broken: it has no methods.{missing[0]}; delete it, and {AGAIN}")
        return record

    def measured_on(self, timing_file: Path) -> str | None:
        """The machine of a measurement; None where there is none, or none that says so."""
        if not timing_file.is_file():
            return None
        machine: str | None = read_json(timing_file, TIMING, f"delete it, and {AGAIN}").get("machine")
        return machine

    def timings(self) -> Iterator[dict[str, Any]]:
        """Time and memory: `method`, `round`, `machine`, and the keys of `timing.measure`, one entry a case."""
        for number, method in measurement_order(self.methods, self.rounds if self.timed_cases else 0):
            file = self.timing_file(number, method)
            if file.is_file():
                timing = read_json(file, TIMING, f"delete it, and {AGAIN}")
                for entry in timing["cases"]:
                    yield {"method": method.key, "round": number, "machine": timing.get("machine"), **entry}


def began_with_auto(folder: Path) -> bool:
    """Whether the comparison of a folder has the number of patches "auto", or there is none yet.

    Raises:
        UserError: its settings are broken.
    """
    file = folder / SETTINGS_FILE
    return not file.is_file() or any("_auto" in key for key in read_json(file, COMPARISON, ANEW)["methods"])


def check_report_folder(folder: Path) -> None:
    """See that a folder is new or empty, or holds a comparison.

    Raises:
        UserError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"-o {folder} is a file: give a folder")
    if not (folder / SETTINGS_FILE).is_file() and not is_new(folder):
        raise UserError(f"{folder} is there and holds no comparison: give an empty or new folder with -o")
