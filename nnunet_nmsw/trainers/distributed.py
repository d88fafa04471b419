"""Training with several processes: on the GPUs of one machine or of several, or on CPUs.

A step's gradient is the mean of the gradients of the processes' volumes. nnU-Net instead splits the plans' batch of
patches over the processes, and so needs a batch of at least as many; an NMSW step takes one volume whatever the plans'
batch size is, and its windows, and the share of these with foreground, stay what they are on one GPU. N processes are
thus a batch of N volumes, with the same learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class Processes(NamedTuple):
    """The processes of a training.

    Attributes:
        rank: of this one among all, on all machines.
        number: of all.
    """

    rank: int = 0
    number: int = 1

    @classmethod
    def of_this_training(cls) -> Processes:
        """As PyTorch says."""
        return cls(dist.get_rank(), dist.get_world_size()) if _distributed() else cls()

    def own_share(self, keys: Sequence[str]) -> list[str]:
        """What this process takes of keys that are shared out; nothing where there are too few."""
        return list(keys[self.rank :: self.number])

    def in_step(self, cases: Iterable[T], total: int, every: int) -> Iterator[T]:
        """Cases of this process, which waits for the others every so many cases.

        A process that waits too long for the others in one operation fails: with NCCL after ten minutes.

        Args:
            cases: of this process, by `own_share`.
            total: cases of all processes.
            every: so many cases of a process.
        """
        of_every_process = total // self.number
        for number, case in enumerate(cases, 1):
            yield case
            if number % every == 0 and number <= of_every_process:
                self.wait()

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.number > 1:
            dist.barrier()


def device_of_process(asked_for: torch.device) -> torch.device:
    """The device of this process: the GPU chosen by who started it. nnU-Net's, the rank's number, is none on a second
    machine."""
    return torch.device("cuda", torch.cuda.current_device()) if asked_for.type == "cuda" else asked_for


def distributed(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The network, its gradients averaged over the processes."""
    if device.type == "cuda":  # PyTorch has no other synchronized batch normalisation
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    # The global branch has no deep supervision, so its auxiliary outputs have no gradient.
    return DistributedDataParallel(network, find_unused_parameters=True)


def over_own_windows_(loss: nn.Module) -> None:
    """Let batch Dice be over the windows of a process's volume: other processes may have another number of windows."""
    for module in loss.modules():
        if isinstance(module, MemoryEfficientSoftDiceLoss):
            module.ddp = False


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of the processes' tensors, of any shape, without gradient; the tensor itself where there is one process.

    All processes have to call this. The device has to be one that their backend can send from.
    """
    if not _distributed():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_processes(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means of the processes' arrays by name, elementwise. All processes have to call this."""
    gathered = gather_over_processes(values)
    return {name: np.mean([of_one[name] for of_one in gathered], 0) for name in values}


def gather_over_processes(value: T) -> list[T]:
    """What each process has, in the order of their ranks. All processes have to call this."""
    if not _distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
