"""Seconds and peak memory of each method alone.

Every measurement is a process of its own that loads the model and predicts cases, each once to warm up, from file to
file as `predict_from_files_sequential` does. Methods take turns, in another order each round, so that a machine that
slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_nmsw.console import follow_parent
from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.models import Case as ValidationCase
from nnunet_nmsw.evaluation.models import Model
from nnunet_nmsw.evaluation.yardsticks import WAYS, CaseFacts
from nnunet_nmsw.inference.case_model import Segmented, WithLogits
from nnunet_nmsw.inference.cases import Case
from nnunet_nmsw.inference.device import prepare_device
from nnunet_nmsw.inference.loading import load_model
from nnunet_nmsw.inference.memory import most_memory_of_process
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


class TimedNMSW(NMSWPredictor):
    """NMSW with a clock. Its labels are worked out while the network runs, so both are timed together."""

    network_seconds: float = 0.0

    def predict_case(self, case: Case) -> Segmented:
        """The parent's, timed."""
        start = time.perf_counter()
        segmented = super().predict_case(case)
        self.network_seconds = time.perf_counter() - start
        return segmented

    def predict_case_logits(self, case: Case) -> WithLogits:
        """The parent's, timed."""
        start = time.perf_counter()
        with_logits = super().predict_case_logits(case)
        self.network_seconds = time.perf_counter() - start
        return with_logits


@dataclasses.dataclass(frozen=True)
class TimingTask:
    """What one process measures.

    Attributes:
        method: the method.
        model: its model.
        cases: cases to predict, all of one fold.
        device: name of the device.
    """

    method: Method
    model: Model
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
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, task).result()


def measure(task: TimingTask) -> list[dict[str, Any]]:
    """Predict each case twice, once to warm up, and say what the second took.

    Returns:
        One entry a case: `case`, `network_seconds`, `total_seconds` from file to file, `host_peak_bytes` of the process
        (with the Python interpreter and all libraries; None where the system does not tell) and `device_peak_bytes`
        (None on a CPU).
    """
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt is told of once, by the parent
    device = prepare_device(task.device)
    # nnU-Net tells of every trainer it looks at and of every case; the progress bar is the parent's.
    with contextlib.redirect_stdout(None), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", FutureWarning)
        predictor = _predictor(task, device)
        output = os.path.join(folder, "prediction")
        results = []
        for case in task.cases:
            # Every case has a shape of its own, for which libraries look for their fastest algorithm once.
            predictor.predict_from_files_sequential([list(case.images)], [output])
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            predictor.predict_from_files_sequential([list(case.images)], [output])
            results.append(
                {
                    "case": case.name,
                    "network_seconds": predictor.network_seconds,
                    "total_seconds": time.perf_counter() - start,
                    "host_peak_bytes": most_memory_of_process(),
                    "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                }
            )
    return results


def _predictor(task: TimingTask, device: torch.device) -> TimedSlidingWindow | TimedNMSW:
    method, fold = task.method, task.cases[0].fold
    common: dict[str, Any] = {
        "use_mirroring": method.mirrored,
        "perform_everything_on_device": device.type == "cuda",
        "device": device,
        "allow_tqdm": False,
    }
    of_model = (task.model.folder, [fold], task.model.checkpoint, task.model.trusted)
    if method.selection is None:
        sliding_window = TimedSlidingWindow(tile_step_size=method.tile_step_size, **common)
        load_model(sliding_window, *of_model)
        return sliding_window
    threshold = task.model.threshold(fold) if method.num_patches == "auto" else None
    # A way that decides itself may take as many as there are.
    nmsw = TimedNMSW(method.num_patches or "all", threshold=threshold, backend=method.backend, **common)
    load_model(nmsw, *of_model)
    nmsw.selector = WAYS[method.selection].selector(CaseFacts())
    return nmsw


def timed_cases(cases: Sequence[ValidationCase], number: int) -> tuple[ValidationCase, ...]:
    """Cases to measure on: of the first fold, evenly from the smallest to the largest image file."""
    fold = [case for case in cases if case.fold == cases[0].fold]
    by_size = sorted(fold, key=lambda case: (Path(case.images[0]).stat().st_size, case.name))
    number = min(number, len(by_size))
    positions = [round((i + 0.5) * len(by_size) / number - 0.5) for i in range(number)]
    return tuple(by_size[position] for position in positions)
