"""The parts of `gpu.py`.

Tensor suffixes: C channels, D H W axes of the volume.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_results import WORK, Results, Size
from measuring import in_new_process, synchronize
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from synthetic import organs, write, write_model
from torch import Tensor
from torch import distributed as dist

from nnunet_nmsw.inference.networks import Fold
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.volume import Padded, Spending, Work, choose, predict_labels
from nnunet_nmsw.volume.interpolation import linear_axis

DATASET, TRAINERS = 930, ("nnUNetTrainer", "nnUNetTrainerNMSW")
K = "10%"
SECONDS_BETWEEN_SAMPLES = 0.01
GAPS = 10
FEWEST_CASES = 5
"""That nnU-Net's five folds need."""
MIRRORED_WINDOWS = 4
"""Of nnU-Net's mirrored sliding window, which is timed by some windows: all take minutes."""


# Prediction.


def smoke(results: Results, device: torch.device, size: Size, folder: Path) -> None:
    """Everything once, in small: what crashes?"""
    for classes in size.classes:
        results.tried(f"labels of {classes} classes as on the CPU", partial(same_labels, device, classes))
    with dataset_folders([64, 72, 80], 3):
        for what, flags in {"eager": {}, "compiled": {"nnUNet_compile": "t"}, "distributed": {"NMSW_DDP": "1"}}.items():
            environment = {"nnUNet_compile": "f", **flags}
            results.tried(f"training steps, {what}", partial(in_process, "steps_of", device, **environment))


def same_labels(device: torch.device, classes: int) -> dict[str, Any]:
    """Share of the voxels that have another label than on the CPU, for results on the device and on the host."""
    shape = [72, 80, 88]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "model"), shape, 1.0, 32, 8, classes)
        volume_CDHW = torch.from_numpy(organs(shape, classes, seed=0)[0]).float()[None] / 500

        def labels(of: torch.device, **kwargs: Any) -> Tensor:
            predictor = NMSWPredictor(8, use_mirroring=True, device=of, allow_tqdm=False, **kwargs)
            predictor.initialize_from_trained_model_folder(str(Path(folder, "model")), (0,))
            return labels_of(predictor, predictor.folds(), volume_CDHW)

        expected = labels(torch.device("cpu"))
        return {
            "different": float((labels(device) != expected).float().mean()),
            "different_with_results_on_the_host": float(
                (labels(device, perform_everything_on_device=False) != expected).float().mean()
            ),
        }


def prediction(results: Results, device: torch.device, size: Size, folder: Path) -> None:
    """The paper's setting: the network's part by stages, memory, and files."""
    with tempfile.TemporaryDirectory() as models:
        for classes in size.classes:
            write_model(Path(models, str(classes)), size.image, 1.0, size.patch, size.features, classes)
        for classes in size.classes:
            model = Path(models, str(classes))
            volume_CDHW = torch.from_numpy(organs(size.image, classes, seed=0)[0]).float()[None] / 500
            for mirrored in (False, True):
                measure = partial(by_stages, model, volume_CDHW, mirrored, device, size.rounds)
                results.tried(f"network, NMSW, {classes} classes{', mirrored' * mirrored}", measure)
            if classes == size.classes[0]:
                for mirrored in (True, False):
                    measure = partial(sliding_window, model, volume_CDHW, mirrored, device)
                    results.tried(f"network, sliding window, {classes} classes{', mirrored' * mirrored}", measure)


def files(results: Results, device: torch.device, size: Size, folder: Path) -> None:
    """Commands from file to file, on two images."""
    with tempfile.TemporaryDirectory() as models:
        images = Path(models, "images")
        images.mkdir()
        for case in range(2):
            write(organs(size.image, size.classes[0], seed=case)[0], images / f"case_{case}_0000.nii.gz", 1.0)
        for classes in size.classes:
            model = Path(models, str(classes))
            write_model(model, size.image, 1.0, size.patch, size.features, classes)
            results.tried(f"nmsw_predict, {classes} classes", partial(command, model, images, device, True))
            if classes == size.classes[0]:  # with many, nnU-Net's logits do not fit into the memory of most hosts
                results.tried(f"nnUNetv2_predict, {classes} classes", partial(command, model, images, device, False))


@torch.inference_mode()
def labels_of(predictor: NMSWPredictor, folds: Sequence[Fold], volume_CDHW: Tensor) -> Tensor:
    """Labels of a preprocessed volume on its own grid.

    Args:
        predictor: of the model.
        folds: of the predictor, which a run over cases makes once.
        volume_CDHW: the volume.
    """
    device = predictor.device if predictor.perform_everything_on_device else torch.device("cpu")
    padded = Padded.of(volume_CDHW, predictor.nmsw_network.patch_size).on(device)
    chosen = [choose(fold, padded, predictor.spending) for fold in folds]
    axes = [linear_axis(n, n) for n in padded.inside]
    return predict_labels(padded, chosen, axes, Work(predictor.share, device))


def by_stages(model: Path, volume_CDHW: Tensor, mirrored: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of the first call, and medians of the others with their stages; patches, memory."""
    predictor = NMSWPredictor(K, use_mirroring=mirrored, device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    predict = partial(labels_of, predictor, predictor.folds(), volume_CDHW)
    first, _ = timed(predict, device)
    runs, stages = [], []
    with memory_of(device) as memory:
        for _ in range(rounds):
            runs.append(timed(predict, device)[0])
    for _ in range(rounds):
        with stage_seconds(device) as of_stages:
            timed(predict, device)
        stages.append(dict(of_stages))
    patches = int(0.1 * len(predictor.nmsw_network.grid(tuple(volume_CDHW.shape[1:]))) + 1)
    return {
        "first_s": first,
        "seconds": statistics.median(runs),
        "stages_s": {name: statistics.median(of[name] for of in stages) for name in stages[0]},
        "patches": patches,
        **memory(rounds),
    }


def sliding_window(model: Path, volume_CDHW: Tensor, mirrored: bool, device: torch.device) -> dict[str, Any]:
    """Seconds of nnU-Net's sliding window to logits: of all windows, or where mirrored by some of them."""
    predictor = nnUNetPredictor(
        use_mirroring=mirrored, device=device, allow_tqdm=False, perform_everything_on_device=device.type == "cuda"
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    if not mirrored:
        seconds, _ = timed(lambda: predictor.predict_sliding_window_return_logits(volume_CDHW), device)
        return {"seconds": seconds}
    network, patch = predictor.network.to(device).eval(), predictor.configuration_manager.patch_size
    windows = len(predictor._internal_get_sliding_window_slicers(volume_CDHW.shape[1:]))
    patch_1CDHW = torch.randn(1, 1, *patch, device=device)

    @torch.inference_mode()
    def some() -> None:
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            for _ in range(MIRRORED_WINDOWS * 8):
                network(patch_1CDHW)

    timed(some, device)
    seconds, _ = timed(some, device)
    return {"seconds": seconds * windows / MIRRORED_WINDOWS, "by_windows": MIRRORED_WINDOWS, "windows": windows}


def command(model: Path, images: Path, device: torch.device, nmsw: bool) -> dict[str, Any]:
    """Seconds of a command for a folder of images, Python's start included, and for one of the images of it alone."""
    main = "nnunet_nmsw.commands.predict import main"
    if not nmsw:
        main = "nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main"
    seconds = []
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            some = Path(folder, "images")
            some.mkdir()
            for file in sorted(images.iterdir())[:number]:
                shutil.copy(file, some)
            flags = ["-i", some, "-o", Path(folder, "out"), "-m", model, "-f", "0", "-device", device.type]
            flags += ["--disable_tta", *(["-k", K] if nmsw else [])]
            called = f"import sys; from {main}; sys.exit(main())"
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", called, *map(str, flags)], check=True)
            seconds.append(time.perf_counter() - started)
    return {"one_s": seconds[0], "two_s": seconds[1], "each_further_s": seconds[1] - seconds[0]}


# Training.


def training(results: Results, device: torch.device, size: Size, folder: Path) -> None:
    """A step of each trainer on the same plans, compiled and not."""
    with dataset_folders(size.training_image, 14, None if size.patch == 128 else [size.patch] * 3):
        for compiled in ("f", "t"):  # to compile takes a minute or more
            for trainer in TRAINERS:
                measure = partial(in_process, "step_of", device, trainer, str(size.steps), nnUNet_compile=compiled)
                results.tried(f"step of {trainer}, {'compiled' if compiled == 't' else 'eager'}", measure)


def trainer_of(name: str, device: torch.device) -> Any:
    """A trainer that is ready for steps, with its loaders."""
    from nnunetv2.run.run_training import get_trainer_from_args

    if device.type == "cuda":  # as nnU-Net's command does
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(1)
    trainer = get_trainer_from_args(str(DATASET), "3d_fullres", 0, name, os.environ["NMSW_PLANS"], device=device)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    return trainer


def steps_of(device: torch.device) -> dict[str, Any]:
    """Some steps and one of an epoch's validation."""
    if "NMSW_DDP" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:29731", rank=0, world_size=1)
    trainer = trainer_of("nnUNetTrainerNMSW", device)
    losses = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(3)]
    trainer.network.eval()
    with torch.no_grad():
        trainer.validation_step(next(trainer.dataloader_val))
    finish(trainer)
    return {"losses": losses}


def step_of(device: torch.device, name: str, steps: str) -> dict[str, Any]:
    """Seconds a step, share of it waiting for data, and memory."""
    trainer = trainer_of(name, device)
    started = time.perf_counter()
    for _ in range(5):
        trainer.train_step(next(trainer.dataloader_train))
    warm_up, waiting = time.perf_counter() - started, 0.0
    with memory_of(device) as memory:
        seconds = []
        for _ in range(int(steps)):
            started = time.perf_counter()
            batch = next(trainer.dataloader_train)
            waiting += time.perf_counter() - started
            trainer.train_step(batch)  # ends in the loss on the host, hence when the device is done
            seconds.append(time.perf_counter() - started)
    finish(trainer)
    of_all = sum(seconds)
    return {
        "warm_up_s": warm_up,
        "step_s": of_all / len(seconds),
        "median_s": statistics.median(seconds),
        "waiting": waiting / of_all,
        **memory(len(seconds)),
    }


def finish(trainer: Any) -> None:
    """End a trainer's workers."""
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()


@contextmanager
def dataset_folders(shape: list[int], classes: int, patch: list[int] | None = None) -> Iterator[None]:
    """A planned and preprocessed dataset, in nnU-Net's folders.

    Args:
        shape: voxels of a training volume.
        classes: with the background.
        patch: voxels of a patch, for small plans; nnU-Net's own plans where None, unless volumes are small.
    """
    work = WORK / "_".join(map(str, shape))
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
    if not (work / "preprocessed").is_dir():
        flags = ["-d", DATASET, "-classes", classes, "-image", 8, 8, 8, "-training_image", *shape]
        flags += ["-training_cases", FEWEST_CASES]
        python(Path(__file__).parent / "synthetic.py", *flags)
        plan = (
            "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as main"
        )
        python(
            "-c", f"{plan}; main()", "-d", DATASET, "-c", "3d_fullres", "-npfp", 2, "-np", min(8, os.cpu_count() or 1)
        )
    os.environ["NMSW_PLANS"] = "nnUNetPlans"
    if patch is not None or shape[0] <= 64:
        small = ["--patch_size", *(patch or [32] * 3), "--features", 8, 16, 32]
        python("-m", "nnunet_nmsw.demo.small_plans", "-d", DATASET, *small)
        os.environ["NMSW_PLANS"] = "nnUNetPlans_small"
    yield


def python(*arguments: Any) -> None:
    """Run Python with arguments."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def in_process(function: str, device: torch.device, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a function of this file measures in a new process."""
    imports = "import sys, torch, gpu_parts; from measuring import tell; _, device, *rest = sys.argv"
    called = f"{imports}; tell(gpu_parts.{function}(torch.device(device), *rest))"
    return in_new_process("-c", called, device.type, *arguments, **environment)


# Profile.


def profile(results: Results, device: torch.device, size: Size, folder: Path) -> None:
    """Traces and gaps of a prediction and of a step."""
    with tempfile.TemporaryDirectory() as models:
        model = Path(models, "model")
        write_model(model, size.image, 1.0, size.patch, size.features, size.classes[0])
        predictor = NMSWPredictor(K, use_mirroring=False, device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        volume_CDHW = torch.from_numpy(organs(size.image, size.classes[0], seed=0)[0]).float()[None] / 500
        predict = partial(labels_of, predictor, predictor.folds(), volume_CDHW)
        results.tried("prediction", partial(traced, predict, device, folder / "prediction_trace.json.gz"))
    with dataset_folders(size.training_image, 14, None if size.patch == 128 else [size.patch] * 3):
        trace = folder / "step_trace.json.gz"
        results.tried("step", partial(in_process, "traced_step", device, str(trace), nnUNet_compile="f"))


def traced_step(device: torch.device, file: str) -> dict[str, Any]:
    """A step's trace and gaps."""
    trainer = trainer_of("nnUNetTrainerNMSW", device)
    batches = [next(trainer.dataloader_train) for _ in range(4)]
    for batch in batches[:-1]:
        trainer.train_step(batch)
    found = traced(lambda: trainer.train_step(batches[-1]), device, Path(file))
    finish(trainer)
    return found


def traced(call: Callable[[], Any], device: torch.device, file: Path) -> dict[str, Any]:
    """The trace of a call in a file, its kernels by time, and the largest gaps between them, in ms."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, with_stack=device.type == "cuda") as profiler:
        seconds, _ = timed(call, device)
    profiler.export_chrome_trace(str(file))
    kinds = torch.autograd.DeviceType
    kind = kinds.CUDA if device.type == "cuda" else kinds.CPU
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == kind and not event.is_user_annotation
    )
    gaps, busy, end, last = [], 0.0, kernels[0][0], ""
    by_name: Counter[str] = Counter()
    for begin, stop, name in kernels:
        if begin > end:
            gaps.append({"ms": (begin - end) / 1000, "after": last[:80], "before": name[:80]})
        busy += max(0.0, stop - max(begin, end))
        by_name[name[:80]] += (stop - begin) / 1000
        if stop > end:
            end, last = stop, name
    return {
        "seconds": seconds,
        "kernels": len(kernels),
        "busy": busy / (end - kernels[0][0]),
        "largest_gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:GAPS],
        "most_ms": dict(by_name.most_common(GAPS)),
    }


# Time and memory.


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, the device's work included, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result


@contextmanager
def stage_seconds(device: torch.device) -> Iterator[Counter[str]]:
    """Seconds by stage of predictions in the block. The device is waited for between stages."""
    seconds: Counter[str] = Counter()

    def wrapped(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            elapsed, result = timed(partial(method, *args, **kwargs), device)
            seconds[name] += elapsed
            return result

        return called

    started = time.perf_counter()
    with (
        mock.patch.object(Fold, "coarse", wrapped(Fold.coarse, "coarse")),
        mock.patch.object(Spending, "choose", wrapped(Spending.choose, "choice")),
        mock.patch.object(Fold, "patches", wrapped(Fold.patches, "patches")),
        mock.patch.object(Padded, "on", wrapped(Padded.on, "copy")),
    ):
        yield seconds
    seconds["fusion and labels"] = time.perf_counter() - started - sum(seconds.values())


@contextmanager
def memory_of(device: torch.device) -> Iterator[Callable[[int], dict[str, float]]]:
    """The device's memory in the block: the most, and the area under its curve, in GiB and GiB seconds a call."""
    found = {"gib": 0.0, "gib_s": 0.0}
    done = threading.Event()

    def sample() -> None:
        last = time.perf_counter()
        while not done.wait(SECONDS_BETWEEN_SAMPLES):
            now = time.perf_counter()
            found["gib_s"] += torch.cuda.memory_allocated(device) / 2**30 * (now - last)
            last = now

    def of_each(calls: int) -> dict[str, float]:
        return {"gib": found["gib"], "gib_s": found["gib_s"] / calls}

    if device.type != "cuda":
        yield of_each
        return
    torch.cuda.reset_peak_memory_stats(device)
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield of_each
    finally:
        done.set()
        thread.join()
        found["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
