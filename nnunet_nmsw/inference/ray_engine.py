"""A folder of cases on many machines, with Ray: a predictor for each GPU or for each set of cores.

The machines share the folders of model, images and predictions and have this package; Ray distributes names of files
alone.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.configuration import default_num_processes
from tqdm import tqdm

from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.ray_cases import AT_A_TIME, next_case

ATTEMPTS = 3
"""How often a case is given to a worker that then dies."""

SECONDS_TO_ANSWER = 20
"""For a cluster."""


class Job(NamedTuple):
    """A case to predict.

    Attributes:
        images: files by channel.
        previous_stage: file of the cascade's previous stage.
        output: file to be written, without ending.
        before: when the file there was written before, in nanoseconds; None without one.
    """

    images: list[str]
    previous_stage: str | None
    output: str
    before: int | None


@dataclasses.dataclass(frozen=True)
class Workers:
    """What works for a prediction.

    Attributes:
        make_predictor: makes a predictor with its model, in a worker.
        address: of a running cluster; where None, of the one that Ray finds, and if it finds none, this machine.
        on_gpu: a worker has a GPU.
        cores: of a worker without one; all of a machine where None.
        verbose: print what workers print.
    """

    make_predictor: Callable[[], FilesPredictor]
    address: str | None = None
    on_gpu: bool = False
    cores: int | None = None
    verbose: bool = False


class RayPredictor(FilesPredictor):
    """Predicts files as `nnUNetPredictor` does, with Ray's workers. Needs a model for its plans only.

    Args:
        workers: what works for it.
        **kwargs: those of `nnUNetPredictor`.
    """

    def __init__(self, workers: Workers, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.workers = workers

    def cases_from_files(
        self, images: list[list[str]], previous_stage: list[str] | None, outputs: list[str] | None, num_processes: int
    ) -> list[Job]:
        """See the parent. Workers preprocess."""
        assert outputs is not None, "workers write files"
        previous: list[Any] = previous_stage or [None] * len(images)
        jobs = []
        for files, stage, output in zip(images, previous, outputs, strict=True):
            file = os.path.join(os.getcwd(), output)  # not shortened: a case may be named ".."
            before = written_at(file + self.dataset_json["file_ending"])
            jobs.append(Job(list(map(os.path.abspath, files)), stage and os.path.abspath(stage), file, before))
        return jobs

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Any],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """Have the cases predicted. A case whose worker dies is given to another one.

        Raises:
            UserError: the cluster cannot be reached or has no room for a worker, or there are cases that failed; all
                others are there.
        """
        jobs = list(data_iterator)
        ray = connect(self.workers)
        try:
            failed = run(ray, jobs, self.workers, save_probabilities, self.allow_tqdm)
        finally:
            ray.shutdown()
        if failed:
            raise UserError("; ".join(failed))
        return [None] * len(jobs)


def connect(workers: Workers) -> Any:
    """The module `ray`, connected to a cluster or to one that it starts on this machine.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'nnunet-nmsw[ray]'") from error
    address = workers.address or os.environ.get("RAY_ADDRESS")
    try:
        if address is not None and ":" in address:  # Ray itself would try for minutes
            host, port = address.removeprefix("ray://").rsplit(":", 1)
            socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
        on_termination = signal.getsignal(signal.SIGTERM)
        ray.init(address, log_to_driver=workers.verbose, include_dashboard=None if address else False)
        signal.signal(signal.SIGTERM, on_termination)  # Ray has put its own there
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot reach the Ray cluster at {address or 'this machine'}: {reason(error)}. Give the address of a "
            "running one with --ray_address or RAY_ADDRESS, or neither to use this machine"
        ) from error
    return ray


def run(ray: Any, jobs: list[Job], workers: Workers, save_probabilities: bool, progress_bar: bool) -> list[str]:
    """Have all jobs done.

    Returns:
        A line for each that failed.
    """
    files = [job.images for job in jobs]
    options, number = worker_options(ray, workers)
    worker_class = ray.remote(Worker).options(max_concurrency=AT_A_TIME, **options)
    cores = None if workers.on_gpu else options["num_cpus"]
    waiting, attempts, failed = deque(range(len(jobs))), Counter[int](), []
    # A worker gets cases when it has started: it may wait for a place for ever, as after the loss of a machine.
    starting: dict[Any, Any] = {}
    ready: list[Any] = []
    running: dict[Any, tuple[int, Any]] = {}
    left_to_start = ATTEMPTS * number  # workers that may die before they have a case

    def start() -> None:
        actor = worker_class.remote(workers.make_predictor, files, cores, save_probabilities)
        starting[actor.__ray_ready__.remote()] = actor

    for _ in range(min(number, len(jobs))):
        start()
    with tqdm(total=len(jobs), desc="cases", disable=not progress_bar) as bar:

        def end(case: int, error: str | None) -> None:
            if error is not None:
                failed.append(f"{Path(jobs[case].output).name}: {error}")
                tqdm.write(failed[-1])
            bar.update()

        while waiting or running:
            while pair := next_case(waiting, attempts, ready, list(running.values())):
                case, actor = pair
                waiting.remove(case)
                running[actor.predict.remote(jobs[case], attempts[case])] = pair
            (done,), _ = ray.wait([*running, *starting], num_returns=1)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as raised:
                result = reason(raised.cause)
            except ray.exceptions.RayError as death:  # of the worker, for lack of memory, too
                if done in starting:
                    del starting[done]
                    left_to_start -= 1
                    if left_to_start > 0:
                        start()
                    elif not (ready or starting):
                        while waiting:
                            end(waiting.popleft(), f"no worker starts: {reason(death)}")
                    continue
                case, actor = running.pop(done)
                attempts[case] += 1
                if actor in ready:  # its other case has told of its death already if it is not
                    ready.remove(actor)
                    start()
                if attempts[case] < ATTEMPTS:
                    waiting.append(case)
                else:
                    end(case, f"the worker died {ATTEMPTS} times: {reason(death)}")
                continue
            if done in starting:
                ready.append(starting.pop(done))
            else:
                end(running.pop(done)[0], result)
    return failed


def worker_options(ray: Any, workers: Workers) -> tuple[dict[str, Any], int]:
    """What a worker takes of its machine, in Ray's words, and how many of them there is room for.

    Raises:
        UserError: there is no room for any.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if workers.on_gpu:
        options, number = {"num_gpus": 1}, sum(int(machine.get("GPU", 0)) for machine in machines)
        lacking = "no GPU: give -device cpu"
    else:
        cores = workers.cores or int(min(machine["CPU"] for machine in machines if machine.get("CPU")))
        options, number = {"num_cpus": cores}, sum(int(machine.get("CPU", 0) // cores) for machine in machines)
        lacking = f"no machine with {cores} cores: give fewer with --cores_per_worker"
    if number == 0:
        raise UserError(f"the Ray cluster has {lacking}")
    return options, number


class Worker:
    """A predictor in a process of its own, maybe on another machine.

    Args:
        make_predictor: makes it.
        files: of all cases, by channel, of which it may get any.
        cores: to use; None on a GPU.
        save_probabilities: write probabilities, too.
    """

    def __init__(
        self,
        make_predictor: Callable[[], FilesPredictor],
        files: list[list[str]],
        cores: int | None,
        save_probabilities: bool,
    ) -> None:
        self.save_probabilities = save_probabilities
        self.device = threading.RLock()
        self.unfit: UserError | None = None
        try:
            self.predictor = make_predictor()
            if cores is not None:
                torch.set_num_threads(cores)
            # The next case may be preprocessed while one is predicted.
            self.ahead = self.predictor.bound_memory(files, 1) > 0
        except UserError as error:
            self.unfit = error

    def predict(self, job: Job, attempt: int) -> str | None:
        """Predict a case, unless a worker that died has done so in its last breath.

        Returns:
            What is wrong, in a line.
        """
        if self.unfit is not None:
            return str(self.unfit)
        file = job.output + self.predictor.dataset_json["file_ending"]
        if attempt and written_at(file) != job.before:
            return None
        previous = None if job.previous_stage is None else [job.previous_stage]
        try:
            with nullcontext() if self.ahead else self.device:
                cases = list(self.predictor.preprocess([job.images], previous, [job.output], 0))
                with self.device:
                    self.predictor.predict_from_data_iterator(cases, self.save_probabilities, 1)
        except UserError as error:
            return str(error)
        return None


def written_at(file: str) -> int | None:
    """When a file was written last, in nanoseconds; None if it is not there."""
    return os.stat(file).st_mtime_ns if os.path.exists(file) else None
