"""Runs every method on every case, each step kept on disk so that an interrupted comparison goes on where it stopped.

REPORT/comparison.json            what is compared: another comparison is refused
REPORT/methods/METHOD/CASE.nii.gz predictions, beside them summary.json as nnU-Net writes it
REPORT/cases/CASE.json, CASE.npz  metrics of all methods on a case; windows and score map for the report
REPORT/timing/METHOD_....json     seconds and memory
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_nmsw.config import PLANS_KEY
from nnunet_nmsw.console import at_end, follow_parent
from nnunet_nmsw.documents import COMPARISON, RECORD, TIMING, read_json
from nnunet_nmsw.errors import Failures, UserError, reason
from nnunet_nmsw.evaluation.methods import Method, primary_method, reference_method
from nnunet_nmsw.evaluation.metrics import case_metrics
from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.prediction import FoldPredictor, Prediction, padded
from nnunet_nmsw.evaluation.timing import TimingTask, measure_in_new_process, measurement_order, timed_cases
from nnunet_nmsw.files import PREFIX, remove_leftovers, write_json, written_whole
from nnunet_nmsw.inference.export import write_logits
from nnunet_nmsw.inference.windows import edges_in_image

SETTINGS_FILE = "comparison.json"

AGAIN = "call the same command again"
ANEW = "delete the folder, or give a new one with -o"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and where its results lie.

    Attributes:
        folder: of the report.
        dataset: nnU-Net's name of it.
        models: the NMSW model, before it the baseline if there is one.
        methods: in the order in which they are run.
        cases: validation cases of all folds.
        tolerance_mm: of the normalised surface Dice.
        device: name of the device.
        timed_cases: how many cases are timed.
        rounds: how often each of them is.
    """

    folder: Path
    dataset: str
    models: Sequence[Model]
    methods: Sequence[Method]
    cases: Sequence[Case]
    tolerance_mm: float
    device: str
    timed_cases: int = 0
    rounds: int = 0

    @property
    def nmsw(self) -> Model:
        """The NMSW model."""
        return self.models[-1]

    @cached_property
    def reference(self) -> Method:
        """The method that all others are compared with."""
        return reference_method(self.methods)

    @cached_property
    def primary(self) -> Method:
        """The method that the report is about."""
        settings = self.nmsw.configuration[PLANS_KEY]
        return primary_method(self.methods, settings["num_patches"], settings["selection"])

    @property
    def is_automatic(self) -> bool:
        """Whether a method takes an automatic number of patches."""
        return any(method.num_patches == "auto" for method in self.methods)

    @cached_property
    def label_names(self) -> dict[str, str]:
        """Name of each evaluated label or region, by nnU-Net's key of it in JSON."""
        names = self.nmsw.json("dataset.json")["labels"]
        by_label = {tuple(v) if isinstance(v, list) else v: name for name, v in names.items()}
        return {label_or_region_to_key(label): by_label[label] for label in self.labels}

    @cached_property
    def labels(self) -> list[int | tuple[int, ...]]:
        """Labels or regions that are evaluated."""
        manager = PlansManager(self.nmsw.json("plans.json")).get_label_manager(self.nmsw.json("dataset.json"))
        return list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)

    def open(self) -> None:
        """Make the folder, or go on in it.

        Folds may be added to a comparison; everything else must be as it was.

        Raises:
            UserError: the folder holds something else, or another comparison.
        """
        settings: dict[str, Any] = {
            "dataset": self.dataset,
            "models": {model.role: model.folder.name for model in self.models},
            "checkpoints": {
                f"{model.role}, fold {fold}": model.fingerprint(fold)
                for model in self.models
                for fold in sorted({case.fold for case in self.cases})
            },
            "methods": [method.key for method in self.methods],
            "tolerance_mm": self.tolerance_mm,
            "device": self.device,
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
        elif self.folder.exists() and not (self.folder.is_dir() and all(map(_is_part, self.folder.iterdir()))):
            raise UserError(f"{self.folder} is there and holds no comparison: give an empty or new folder with -o")
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
        """Time and memory of a method in a round."""
        fold = self.cases[0].fold
        return self.folder / "timing" / f"{method.key}_fold_{fold}_cases_{self.timed_cases}_round_{number}.json"

    def prediction_file(self, case: Case, method: Method) -> Path:
        """Predicted labels."""
        ending = self.nmsw.json("dataset.json")["file_ending"]
        return self.folder / "methods" / method.key / (case.name + ending)

    def run_cases(self, num_parts: int, part_id: int, processes: int, progress: bool) -> None:
        """Predict and measure the cases of one part that are not there yet.

        Raises:
            UserError: cases have failed; all others are done.
        """
        failures = Failures()
        todo = [case for case in self.cases[part_id::num_parts] if not self.record_file(case).is_file()]
        for folder in (*(self.folder / "methods" / method.key for method in self.methods), self.folder / "cases"):
            folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(todo) * len(self.methods), desc="predictions", disable=not progress or not todo)
        context = multiprocessing.get_context("spawn")
        with bar, ProcessPoolExecutor(processes, mp_context=context, initializer=_start_export_process) as pool:
            for fold in sorted({case.fold for case in todo}):
                with contextlib.redirect_stdout(None):  # nnU-Net tells how it searches for a trainer
                    stop_at = self.nmsw.stop_at(fold) if self.is_automatic else None
                    device = torch.device(self.device)
                    predictors = [FoldPredictor(model, fold, device, stop_at) for model in self.models]
                for case in todo:
                    if case.fold != fold:
                        continue
                    try:
                        self._run_case(case, predictors, pool, processes, bar)
                    except BrokenProcessPool as error:
                        raise UserError(
                            f"a process died while it wrote predictions of case {case.name}, perhaps for lack of "
                            "memory: lower -nps; the same command goes on from what is done"
                        ) from error
                    except Exception as error:  # noqa: BLE001 - `Failures` tells apart what is the case's fault
                        failures.add(f"cannot compare case {case.name} of fold {fold}", error)
        failures.raise_any()

    def run_timing(self, progress: bool) -> None:
        """Measure what is not there yet of time and memory."""
        if not self.timed_cases:
            return
        cases = timed_cases(self.cases, self.timed_cases)
        (self.folder / "timing").mkdir(exist_ok=True)
        models = {model.role: model for model in self.models}
        timed = [method for method in self.methods if method.is_timed]
        todo = [
            (file, method)
            for number, method in measurement_order(timed, self.rounds)
            if not (file := self.timing_file(number, method)).is_file()
        ]
        for file, method in tqdm(todo, desc="time and memory", disable=not progress or not todo):
            task = TimingTask(method, models[method.model], cases, self.device)
            write_json(file, {"method": method.key, "cases": measure_in_new_process(task)})

    def missing(self) -> list[Case]:
        """Cases that have not been run, perhaps by other parts."""
        return [case for case in self.cases if not self.record_file(case).is_file()]

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
            f"{method.key}.metrics.{label}"
            for method in self.methods
            if not missing
            for label in self.label_names
            if label not in record["methods"][method.key]["metrics"]
        ]
        if missing:
            raise UserError(f"{file} is broken: it has no methods.{missing[0]}; delete it, and {AGAIN}")
        return record

    def timings(self) -> Iterator[dict[str, Any]]:
        """Time and memory: `method`, `round`, and the keys of `timing.measure`, one entry a case."""
        for number, method in measurement_order(self.methods, self.rounds if self.timed_cases else 0):
            file = self.timing_file(number, method)
            if file.is_file():
                for entry in read_json(file, TIMING, f"delete it, and {AGAIN}")["cases"]:
                    yield {"method": method.key, "round": number, **entry}

    def _run_case(
        self, case: Case, predictors: Sequence[FoldPredictor], pool: ProcessPoolExecutor, processes: int, bar: tqdm
    ) -> None:
        # Exports lag behind predictions by as many logits volumes as there are processes, so that memory is bounded.
        record: dict[str, Any] = {"case": case.name, "fold": case.fold, "methods": {}}
        pending: set[Future[dict[str, Any]]] = set()

        def collect(at_most: int) -> None:
            while len(pending) > at_most:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    pending.discard(future)
                    result = future.result()
                    record["methods"][result.pop("method")] = result
                    bar.update()

        for predictor in predictors:
            methods = [method for method in self.methods if method.model == predictor.role]
            for prediction in predictor.predict(case, methods):
                if prediction.method == self.primary:
                    record |= _for_the_viewer(predictor, prediction, self.record_file(case).with_suffix(".npz"))
                pending.add(pool.submit(export_and_measure, self._export_task(case, predictor, prediction)))
                collect(processes)
        collect(0)
        write_json(self.record_file(case), record)

    def _export_task(self, case: Case, predictor: FoldPredictor, prediction: Prediction) -> ExportTask:
        return ExportTask(
            prediction.method.key,
            prediction.logits_CDHW.numpy(),
            prediction.properties,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.dataset_json,
            str(self.prediction_file(case, prediction.method)),
            case.reference,
            self.labels,
            self.tolerance_mm,
            {
                "patches": prediction.patches,
                "macs": prediction.macs,
                "covered_foreground": prediction.covered_foreground,
            },
        )


@dataclasses.dataclass
class ExportTask:
    """A prediction on its way to a process that writes and measures it; `about` goes into its record as it is."""

    method: str
    logits_CDHW: np.ndarray
    properties: dict[str, Any]
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    prediction_file: str
    reference_file: str
    labels: list[int | tuple[int, ...]]
    tolerance_mm: float
    about: dict[str, Any]


def export_and_measure(task: ExportTask) -> dict[str, Any]:
    """Write the labels of a prediction as nnU-Net does, and compare them with the reference."""
    file, of_model = Path(task.prediction_file), (task.plans_manager, task.configuration_manager, task.dataset_json)
    with written_whole(file.parent) as folder:
        name = file.name.removesuffix(task.dataset_json["file_ending"])
        write_logits(task.logits_CDHW, folder, name, *of_model, task.properties)
    metrics = case_metrics(
        task.reference_file,
        task.prediction_file,
        task.plans_manager.image_reader_writer_class(),
        task.labels,
        task.plans_manager.get_label_manager(task.dataset_json).ignore_label,
        task.tolerance_mm,
    )
    return {"method": task.method, **task.about, "metrics": metrics}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("nnunet-nmsw", "nnunetv2", "torch", "monai")}


def _for_the_viewer(predictor: FoldPredictor, prediction: Prediction, file: Path) -> dict[str, Any]:
    """Write the score map; return the windows in voxels of the image, and how the map lies in it.

    Axes are the image's. Voxel i of an axis is in voxel floor((i + 0.5) · scale + shift) of the map.
    """
    nmsw = predictor.nmsw
    assert nmsw is not None
    backward = predictor.plans_manager.transpose_backward
    properties = prediction.properties
    score_map = nmsw.coarse.score_map_dhw.float().cpu().numpy().transpose(backward)
    with written_whole(file.parent) as folder:
        np.savez_compressed(folder / file.name, score_map=score_map.astype(np.float16))
    chosen = nmsw.chosen_windows[0]
    factor = np.array(nmsw.nmsw_network.config.downsampling_factor)
    _, offset = padded(torch.zeros(1, *chosen.volume_shape, dtype=torch.bool), chosen.patch_size)
    cropped = np.array(properties["shape_after_cropping_and_before_resampling"], float)
    scale = np.array(chosen.volume_shape) / cropped
    shift = np.array(offset) - np.array(properties["bbox_used_for_cropping"], float)[:, 0] * scale
    return {
        "windows": edges_in_image(chosen, properties, backward).tolist(),
        "score_map_scale": (scale / factor)[backward].tolist(),
        "score_map_shift": (shift / factor)[backward].tolist(),
    }


def _is_part(file: Path) -> bool:
    """Whether another part of the comparison is writing this file just now."""
    return file.name.startswith(PREFIX)


def _start_export_process() -> None:
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt is told of once, by the parent
    torch.set_num_threads(1)
    # MONAI calls a deprecated part of itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
