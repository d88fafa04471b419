"""Runs every method on every case. Each step is kept on disk: an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_nmsw.console import follow_parent
from nnunet_nmsw.errors import Failures, UserError
from nnunet_nmsw.evaluation.machine import machine
from nnunet_nmsw.evaluation.methods import Method, timed_methods
from nnunet_nmsw.evaluation.metrics import case_metrics
from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.predicted import Prediction, Shown
from nnunet_nmsw.evaluation.predictions import FoldPredictor
from nnunet_nmsw.evaluation.stock_models import StockModels
from nnunet_nmsw.evaluation.stock_predictions import StockModelsPredictor
from nnunet_nmsw.evaluation.store import Comparison
from nnunet_nmsw.evaluation.timing import TimingTask, measure_in_new_process, measurement_order, timed_cases
from nnunet_nmsw.files import temporary_folder, write_json, written_whole
from nnunet_nmsw.inference.export import write_labels, write_logits


class Exporting(NamedTuple):
    """What writes and measures predictions.

    Attributes:
        pool: of processes.
        processes: their number.
        waiting: folder of the arrays that wait for them.
    """

    pool: ProcessPoolExecutor
    processes: int
    waiting: Path


def run_cases(comparison: Comparison, num_parts: int, part_id: int, processes: int, progress: bool) -> None:
    """Predict and measure the cases of one part that are not there yet.

    Raises:
        UserError: cases have failed; all others are done.
    """
    failures = Failures()
    todo = [case for case in comparison.cases[part_id::num_parts] if not comparison.is_done(case)]
    again = [case.name for case in todo if comparison.record_file(case).is_file()]
    if again:
        print(f"Predicted again, as the threshold of K = auto has changed since they were done: {' '.join(again)}")
    for folder in (
        *(comparison.folder / "methods" / method.key for method in comparison.methods),
        comparison.folder / "cases",
    ):
        folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(todo) * len(comparison.methods), desc="predictions", disable=not progress or not todo)
    context = multiprocessing.get_context("spawn")
    # The processes take the arrays of predictions from files in the folder, and leave nothing there.
    with (
        bar,
        temporary_folder(comparison.folder) as waiting,
        ProcessPoolExecutor(processes, mp_context=context, initializer=_start_export_process) as pool,
    ):
        for fold in sorted({case.fold for case in todo}):
            with contextlib.redirect_stdout(None):  # nnU-Net tells how it searches for a trainer
                predictors = _predictors(comparison, fold)
            for case in todo:
                if case.fold != fold:
                    continue
                try:
                    _run_case(comparison, case, predictors, Exporting(pool, processes, waiting), bar)
                except BrokenProcessPool as error:
                    raise UserError(
                        f"a process died while it wrote predictions of case {case.name}, perhaps for lack of "
                        "memory: lower -nps; the same command goes on from what is done"
                    ) from error
                except Exception as error:  # noqa: BLE001 - `Failures` tells apart what is the case's fault
                    of_fold = "" if isinstance(comparison.nmsw, StockModels) else f" of fold {fold}"
                    failures.add(f"cannot compare case {case.name}{of_fold}", error)
    failures.raise_any()


def run_timing(comparison: Comparison, progress: bool) -> Failures:
    """Measure what is not there yet of time and memory.

    Returns:
        What could not be measured.
    """
    failures = Failures()
    if not comparison.timed_cases:
        return failures
    cases = timed_cases(comparison.cases, comparison.timed_cases)
    (comparison.folder / "timing").mkdir(exist_ok=True)
    models = {model.role: model for model in comparison.models}
    timed = timed_methods(comparison.methods, comparison.primary)
    here = machine(comparison.device)
    todo = _to_measure(comparison, measurement_order(timed, comparison.rounds), here)
    for file, method in tqdm(todo, desc="time and memory", disable=not progress or not todo):
        task = TimingTask(method, models[method.model], cases, comparison.device)
        try:
            measured = measure_in_new_process(task)
        except Exception as error:  # noqa: BLE001 - `Failures` tells apart what is the machine's fault
            failures.add(f"cannot measure the time of {method.name}", error)
            continue
        write_json(file, {"method": method.key, "machine": here, "cases": measured})
    return failures


def _to_measure(comparison: Comparison, order: Iterable[tuple[int, Method]], here: str) -> list[tuple[Path, Method]]:
    """What rounds lack, with their file. The methods of a round are compared, so one machine measures all of them."""
    rounds: dict[int, list[tuple[Path, Method]]] = {}
    for number, method in order:
        rounds.setdefault(number, []).append((comparison.timing_file(number, method), method))
    todo = []
    for of_round in rounds.values():
        if not all(file.is_file() for file, _ in of_round):
            todo += [(file, method) for file, method in of_round if comparison.measured_on(file) != here]
    return todo


def _predictors(comparison: Comparison, fold: int) -> Sequence[FoldPredictor] | Sequence[StockModelsPredictor]:
    device, nmsw = torch.device(comparison.device), comparison.nmsw
    if isinstance(nmsw, StockModels):
        return [StockModelsPredictor(nmsw, comparison.labels, device)]
    threshold = comparison.thresholds.get(fold)
    return [FoldPredictor(model, fold, device, threshold) for model in comparison.models if isinstance(model, Model)]


def _run_case(
    comparison: Comparison,
    case: Case,
    predictors: Sequence[FoldPredictor] | Sequence[StockModelsPredictor],
    exporting: Exporting,
    bar: tqdm,
) -> None:
    """Predict and measure a case by all methods.

    Args:
        comparison: the comparison.
        case: of a fold.
        predictors: of the fold's models.
        exporting: what writes and measures predictions.
        bar: over predictions.
    """
    # Exports lag behind predictions by as many results as there are processes, so that memory is bounded.
    threshold = comparison.thresholds.get(case.fold)
    record: dict[str, Any] = {"case": case.name, "fold": case.fold, "threshold": threshold, "methods": {}}
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
        own = predictor.own_selection
        primary = None if own is None else comparison.primary_of(own)
        methods = [method for method in comparison.methods if method.model in predictor.roles]
        for prediction in predictor.predict(case, methods):
            if prediction.method == primary and prediction.show is not None:
                record |= _for_the_viewer(prediction.show(), comparison.record_file(case).with_suffix(".npz"))
                record["own_selection"] = own
            task = _export_task(comparison, case, predictor, prediction, exporting.waiting)
            pending.add(exporting.pool.submit(export_and_measure, task))
            # Without reference labels, the sliding windows' are the reference of the others.
            is_reference = prediction.method == comparison.reference and not case.has_reference
            collect(0 if is_reference else exporting.processes)
    collect(0)
    write_json(comparison.record_file(case), record)


def _export_task(
    comparison: Comparison,
    case: Case,
    predictor: FoldPredictor | StockModelsPredictor,
    prediction: Prediction,
    waiting: Path,
) -> ExportTask:
    # Not through the pool's pipe: a process that dies beside a full pipe makes older Pythons wait for ever.
    opened, file = tempfile.mkstemp(suffix=".npy", dir=waiting)
    os.close(opened)
    array = prediction.segmentation if prediction.logits_CDHW is None else prediction.logits_CDHW.numpy()
    assert array is not None
    try:
        np.save(file, array)
    except OSError:  # the disk is full, say, and the other cases need the room
        os.unlink(file)
        raise
    return ExportTask(
        prediction.method.key,
        file,
        prediction.logits_CDHW is not None,
        prediction.properties,
        (predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json),
        str(comparison.prediction_file(case, prediction.method)),
        case.reference,
        comparison.labels,
        comparison.tolerance_mm,
        {
            "patches": prediction.patches,
            "macs": prediction.macs,
            "covered_foreground": prediction.covered_foreground,
            "reached": prediction.reached and {label: of._asdict() for label, of in prediction.reached.items()},
        },
    )


@dataclasses.dataclass
class ExportTask:
    """A prediction on its way to a process that writes and measures it.

    `array_file` has its logits, or labels of the image. `about` goes into its record as it is.
    """

    method: str
    array_file: str
    has_logits: bool
    properties: dict[str, Any]
    of_model: tuple[PlansManager, ConfigurationManager, dict[str, Any]]
    prediction_file: str
    reference_file: str
    labels: list[int | tuple[int, ...]]
    tolerance_mm: float
    about: dict[str, Any]


def export_and_measure(task: ExportTask) -> dict[str, Any]:
    """Write the labels of a prediction as its command does, and compare them with the reference."""
    file, (plans, _, dataset) = Path(task.prediction_file), task.of_model
    array = np.load(task.array_file)
    os.unlink(task.array_file)
    with written_whole(file.parent) as folder:
        if task.has_logits:
            name = file.name.removesuffix(dataset["file_ending"])
            write_logits(array, folder, name, *task.of_model, task.properties)
        else:
            write_labels(array, folder / file.name, plans, task.properties)
    metrics = case_metrics(
        task.reference_file,
        task.prediction_file,
        plans.image_reader_writer_class(),
        task.labels,
        plans.get_label_manager(dataset).ignore_label,
        task.tolerance_mm,
    )
    return {"method": task.method, **task.about, "metrics": metrics}


def _for_the_viewer(shown: Shown, file: Path) -> dict[str, Any]:
    """Write the score map, if there is one; return the rest of what is shown, for the record."""
    windows = {"windows": shown.windows, "ranks": list(shown.ranks)}
    if shown.score_map is None:
        return windows
    with written_whole(file.parent) as folder:
        np.savez_compressed(folder / file.name, score_map=shown.score_map)
    return {**windows, "score_map_scale": shown.scale, "score_map_shift": shown.shift}


def _start_export_process() -> None:
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt is told of once, by the parent
    torch.set_num_threads(1)
    # MONAI calls a deprecated part of itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
