"""Seconds and peak memory of each method alone.

Every measurement is a process of its own that loads the model and predicts cases, each once to warm up, from file to
file as `predict_from_files_sequential` does. Methods take turns, in another order each round, so that a machine that
slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import random
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_nmsw.console import follow_parent
from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.models import Case as ValidationCase
from nnunet_nmsw.evaluation.models import Model
from nnunet_nmsw.evaluation.stock_models import StockModels
from nnunet_nmsw.evaluation.stock_predictions import spend
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts
from nnunet_nmsw.files import temporary_folder
from nnunet_nmsw.inference.device import prepare_device
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.loading import load_model
from nnunet_nmsw.inference.memory import most_memory_of_process
from nnunet_nmsw.inference.orientation import orient
from nnunet_nmsw.inference.predictor import NMSWPredictor


class TimedSlidingWindow(nnUNetPredictor):
    """nnU-Net's predictor with a clock around what it does between preprocessing and export."""

    network_seconds: float = 0.0

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """The parent's, timed."""
        start = time.perf_counter()
        logits: Tensor = super().predict_logits_from_preprocessed_data(data)  # on the host, so the device is done
        self.network_seconds = time.perf_counter() - start
        return logits


Timed: TypeAlias = TimedSlidingWindow | FilesPredictor


@dataclasses.dataclass(frozen=True)
class TimingTask:
    """What one process measures.

    Attributes:
        method: the method.
        model: its model, or models.
        cases: cases to predict, all of one fold.
        device: name of the device.
    """

    method: Method
    model: Model | StockModels
    cases: tuple[ValidationCase, ...]
    device: str


def measurement_order(methods: Sequence[Method], rounds: int) -> Iterator[tuple[int, Method]]:
    """Round and method, every method once a round, in an order that is drawn anew each round."""
    for number in range(rounds):
        yield from ((number, method) for method in random.Random(number).sample(list(methods), len(methods)))


def measure_in_new_process(task: TimingTask) -> list[dict[str, Any]]:
    """Run `measure` in a process that has done nothing before.

    A fork server that has imported PyTorch and nnU-Net saves their import each time, where the platform has one.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    # The folder is this process's, which removes it where the other one is killed.
    with temporary_folder() as folder, ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, task, folder).result()


def measure(task: TimingTask, folder: Path) -> list[dict[str, Any]]:
    """Predict each case twice, once to warm up, and say what the second took.

    Args:
        task: what is measured.
        folder: empty, for predictions.

    Returns:
        One entry a case: `case`, `network_seconds`, `total_seconds` from file to file, `host_peak_bytes` of the process
        (with the Python interpreter and all libraries; None where the system does not tell) and `device_peak_bytes`
        (None on a CPU).
    """
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt is told of once, by the parent
    device = prepare_device(task.device)
    # nnU-Net tells of every trainer it looks at and of every case; the progress bar is the parent's.
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        output = str(folder / "prediction")
        entries: dict[str, dict[str, Any]] = {}
        for predictor in _predictors(task, device):
            for case in task.cases:
                seconds, network_seconds = _seconds(predictor, case, output, device)
                device_peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                before = entries.get(case.name, {"network_seconds": 0.0, "total_seconds": 0.0, "device_peak_bytes": 0})
                entries[case.name] = {
                    "case": case.name,
                    "network_seconds": before["network_seconds"] + network_seconds,
                    "total_seconds": before["total_seconds"] + seconds,
                    "host_peak_bytes": most_memory_of_process(),
                    "device_peak_bytes": device_peak and max(device_peak, before["device_peak_bytes"]),
                }
            del predictor  # or the next one would be loaded beside it
    return list(entries.values())


def _seconds(predictor: Timed, case: ValidationCase, output: str, device: torch.device) -> tuple[float, float]:
    """Predict a case twice, and say what the second took: from file to file, and for the network."""
    # Every case has a shape of its own, for which libraries look for their fastest algorithm once.
    predictor.predict_from_files_sequential([list(case.images)], [output])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    predictor.predict_from_files_sequential([list(case.images)], [output])
    return time.perf_counter() - start, predictor.network_seconds


def _predictors(task: TimingTask, device: torch.device) -> Iterator[Timed]:
    """What predicts a method's cases, one after the other: every one of several stock models, or a single one."""
    method, model, fold = task.method, task.model, task.cases[0].fold
    common: dict[str, Any] = {
        "use_mirroring": method.mirrored,
        "perform_everything_on_device": device.type == "cuda",
        "device": device,
        "allow_tqdm": False,
    }
    if isinstance(model, StockModels):
        if method.selection is not None:
            predictor = model.make(task.device, method.mirrored, method.backend)
            spend(predictor, method, model.explore)
            yield predictor
            return
        for stock in model.sliding:
            of_stock = TimedSlidingWindow(tile_step_size=method.tile_step_size, **common)
            load_model(of_stock, stock.path, list(stock.folds), model.checkpoint, model.trusted)
            if model.orientation is not None:
                orient(of_stock, model.orientation)
            yield of_stock
            del of_stock
        return
    of_model = (model.folder, [fold], model.checkpoint, model.trusted)
    if method.selection is None:
        sliding_window = TimedSlidingWindow(tile_step_size=method.tile_step_size, **common)
        load_model(sliding_window, *of_model)
        yield sliding_window
        return
    threshold = model.threshold(fold) if method.num_patches == "auto" else None
    # A way that decides itself may take as many as there are.
    nmsw = NMSWPredictor(method.num_patches or "all", threshold=threshold, backend=method.backend, **common)
    load_model(nmsw, *of_model)
    nmsw.selector = WAYS[method.selection].selector(CaseFacts())
    yield nmsw


def timed_cases(cases: Sequence[ValidationCase], number: int) -> tuple[ValidationCase, ...]:
    """Cases to measure on: of the first fold, evenly from the smallest to the largest image file."""
    fold = [case for case in cases if case.fold == cases[0].fold]
    by_size = sorted(fold, key=lambda case: (Path(case.images[0]).stat().st_size, case.name))
    number = min(number, len(by_size))
    positions = [round((i + 0.5) * len(by_size) / number - 0.5) for i in range(number)]
    return tuple(by_size[position] for position in positions)
