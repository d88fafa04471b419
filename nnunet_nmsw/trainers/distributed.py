"""Training with several processes: on the GPUs of one machine or of several, or on CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class DistributedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a whole volume a process.

    A step's gradient is the mean of the gradients of the processes' volumes. nnU-Net instead splits the plans' batch of
    patches over the processes, and so needs a batch of at least as many; an NMSW step takes one volume whatever the
    plans' batch size is, and its windows, and the share of these with foreground, stay what they are on one GPU. N
    processes are thus a batch of N volumes, with the same learning rate.

    `local_rank` is the rank among all processes, as in nnU-Net, which decides by it who writes files.
    """

    is_ddp: bool
    network: Any
    loss: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp and device.type == "cuda":
            # Chosen by who started the process; nnU-Net's, the rank's number, is none on a second machine.
            self.device = torch.device("cuda", torch.cuda.current_device())
        elif self.is_ddp:
            self.device, self.grad_scaler = device, None

    def initialize(self) -> None:
        """See the parent, whose own distribution splits the batch and takes the GPU that has the rank's number."""
        distributed, self.is_ddp = self.is_ddp, False
        super().initialize()
        self.is_ddp = distributed
        if not distributed:
            return
        if self.device.type == "cuda":  # PyTorch has no other synchronized batch normalisation
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        # The global branch has no deep supervision, so its auxiliary outputs have no gradient.
        self.network = DistributedDataParallel(self.network, find_unused_parameters=True)
        # Now that it is distributed, the coarsest output of the local branch has a weight above zero, and a gradient.
        self.loss = self._build_loss()

    def _build_loss(self) -> nn.Module:
        loss: nn.Module = super()._build_loss()
        for module in loss.modules():
            if isinstance(module, MemoryEfficientSoftDiceLoss):
                # Batch Dice is over the windows of a volume. Other processes may have another number of windows.
                module.ddp = False
        return loss

    @property
    def num_processes(self) -> int:
        """On all machines together."""
        return dist.get_world_size() if self.is_ddp else 1

    def own_share(self, keys: Sequence[str]) -> list[str]:
        """What this process takes of keys that are shared out; nothing where there are too few."""
        return list(keys[self.local_rank :: self.num_processes])

    def wait_for_all(self) -> None:
        """Return when all processes have come here."""
        if self.is_ddp:
            dist.barrier()

    def on_train_start(self) -> None:
        """See the parent. Where there is no split of the cases yet, one process makes it before the others read it."""
        if self.is_ddp and self.local_rank == 0:
            self.do_split()
        self.wait_for_all()
        super().on_train_start()

    def on_train_end(self) -> None:
        """See the parent. Afterwards every process may load the checkpoints that the first one has written."""
        super().on_train_end()
        self.wait_for_all()


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
