"""Batches of a training: loaders of whole volumes, the processes that run them, and what a step makes of a batch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import in_words
from nnunet_nmsw.trainers.augmentation import Augmentation
from nnunet_nmsw.trainers.distributed import Processes
from nnunet_nmsw.trainers.loader import WholeVolumeLoader
from nnunet_nmsw.trainers.views import PreviousStage, TrainingVolume

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux has it."""

CASES_TO_MEASURE = 20
"""For the size of the largest."""

SECONDS_BETWEEN_LOOKS = 0.002
"""Between looks whether a batch is ready."""


class RandomWindows(NamedTuple):
    """RandomWindows that a loader draws at random.

    Attributes:
        patch_size: voxels by axis.
        number: of them.
        with_foreground: how many are centred on foreground; a fraction is the probability of one more.
    """

    patch_size: Sequence[int]
    number: int
    with_foreground: float

    @classmethod
    def oversampled(cls, patch_size: Sequence[int], number: int, share: float) -> RandomWindows:
        """With a share of foreground as in nnU-Net's batches, which round it; one window alone by probability."""
        return cls(patch_size, number, share if number == 1 else number - round(number * (1 - share)))


class LoaderProcesses(NamedTuple):
    """How batches are made.

    Attributes:
        number: of processes that make them; 0 for the training's own.
        seed: of what is drawn, several numbers; None for random draws.
        pinned: pin tensors, for copies to a GPU that do not block.
    """

    number: int
    seed: tuple[int, ...] | None
    pinned: bool


def training_batches(
    dataset: nnUNetBaseDataset, windows: RandomWindows, augmentation: Augmentation, workers: LoaderProcesses
) -> Any:
    """Batches of cases at random."""
    seed = None if workers.seed is None or workers.number == 0 else (*workers.seed, 1)
    return batches(WholeVolumeLoader(dataset, *windows, augmentation, True, seed), workers)


def validation_batches(
    dataset: nnUNetBaseDataset,
    windows: RandomWindows,
    augmentation: Augmentation,
    workers: LoaderProcesses,
    processes: Processes,
) -> Any:
    """Batches of the process's share of the cases, in order."""
    seed = None if workers.seed is None or workers.number == 0 else (*workers.seed, 0)
    loader = WholeVolumeLoader(dataset, *windows, augmentation, False, seed)
    cases = list(dataset.identifiers)
    loader.indices = processes.own_share(cases) or cases
    return batches(loader, workers._replace(number=min(1, workers.number)))


def batches(loader: WholeVolumeLoader, workers: LoaderProcesses) -> Any:
    """An iterator over a loader's batches. Those of a seeded loader come in order."""
    if workers.number == 0:
        return SingleThreadedAugmenter(loader, None)
    loader.is_in_worker = True
    if loader.seed is not None:
        # The batches of its workers come in turns, where the other augmenter takes what is ready first.
        seeds = list(range(workers.number))
        augmenter = MultiThreadedAugmenter(
            loader, None, workers.number, 2, seeds, workers.pinned, wait_time=SECONDS_BETWEEN_LOOKS
        )
    else:
        augmenter = NonDetMultiThreadedAugmenter(
            loader,
            None,
            num_processes=workers.number,
            num_cached=cached_batches(workers.number),
            pin_memory=workers.pinned,
            wait_time=SECONDS_BETWEEN_LOOKS,
        )
    next(augmenter)  # a worker that cannot work fails here and not in the middle of an epoch
    return augmenter


def cached_batches(num_workers: int) -> int:
    """How many batches may wait for an unseeded training, as in nnU-Net."""
    return max(2, num_workers // 2)


def check_shared_memory(dataset: nnUNetBaseDataset, patch_size: Sequence[int], workers: LoaderProcesses) -> None:
    """See that batches fit into the memory through which worker processes send them.

    Containers have little of it. Where it is full, a process dies of a bus error that names no cause.

    Args:
        dataset: of the training.
        patch_size: voxels by axis, to which smaller volumes are padded.
        workers: that make the batches.

    Raises:
        UserError: there is too little.
    """
    if workers.number == 0 or not SHARED_MEMORY.is_dir():
        return
    keys = list(dataset.identifiers)
    largest = max(_bytes_of_batch(dataset, key, patch_size) for key in keys[:: -(-len(keys) // CASES_TO_MEASURE)])
    # In the queues, and one that is received. Pinning copies batches out of this memory as they come.
    in_queues = 2 * workers.number if workers.seed is not None else cached_batches(workers.number)
    number = in_queues + 1 if workers.pinned else 2 * in_queues + 2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if number * largest > free:
        wanted = -(-number * largest // (1 << 30))
        raise UserError(
            f"{SHARED_MEMORY} has {in_words(free)} of shared memory, and the batches of {workers.number} worker "
            f"processes may take {in_words(number * largest)}: start the container with --shm-size={wanted}g or more, "
            "or set the variable nnUNet_n_proc_DA to fewer processes (0 needs none)"
        )


def _bytes_of_batch(dataset: nnUNetBaseDataset, key: str, patch_size: Sequence[int]) -> int:
    """Of a case: the image in half precision, and its labels."""
    data, _, previous, _ = dataset.load_case(key)
    channels, *shape = data.shape
    voxels = math.prod(max(n, p) for n, p in zip(shape, patch_size, strict=True))
    return (2 * channels + 1 + (previous is not None)) * voxels


def check_previous_stage(folder: Path, keys: Sequence[str], stage: str, trainer: str) -> None:
    """See that the cascade's previous stage has predicted every case.

    Args:
        folder: of the predictions.
        keys: of the cases.
        stage: name of its configuration.
        trainer: name of the trainer.

    Raises:
        UserError: it has not.
    """
    predicted = {file.stem for file in folder.glob("*")}  # files of nnU-Net's preprocessed data have one ending
    missing = [key for key in keys if key not in predicted]
    if missing:
        raise UserError(
            f"{folder} has no prediction of {missing[0]} and {len(missing) - 1} more cases: train all folds of "
            f"{stage} first, with -tr {trainer} and the same plans (validation predicts the cases)"
        )


def training_volume(batch: dict[str, Any], augmentation: Augmentation, num_previous: int = 0) -> TrainingVolume:
    """What `WholeVolumeLoader` delivers, as what a step takes.

    Args:
        batch: of the loader.
        augmentation: what is done to views.
        num_previous: number of foreground labels of the cascade's previous stage.
    """
    previous = batch["previous"]
    return TrainingVolume(
        batch["data"],
        batch["target"],
        batch["random_starts"],
        batch["affine"],
        augmentation.of_views,
        batch["seed"],
        None if previous is None else PreviousStage(previous, num_previous, augmentation.of_previous),
    )
