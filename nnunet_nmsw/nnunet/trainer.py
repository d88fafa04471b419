"""What is private of nnU-Net's trainer, its logger, its command, and batchgenerators' loader."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchgenerators.dataloading.data_loader import DataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_nmsw.errors import UserError


class TrainerHooks(nnUNetTrainer):
    """nnU-Net's trainer, its private methods that ours has to answer for under public names."""

    num_epochs: int
    grad_scaler: Any

    deep_supervision_scales: list[list[float]] | None = None
    """What stands in for scales from the plans' strides, which only nnU-Net's own U-Nets have."""

    def build_loss(self, of_patches: Callable[[], nn.Module]) -> nn.Module:
        """The loss.

        Args:
            of_patches: builds nnU-Net's.
        """
        raise NotImplementedError

    def compiles(self) -> bool:
        """Whether nnU-Net would compile the network, by its variables of the environment."""
        return bool(super()._do_i_compile())

    _loss_is_built = False

    def _do_i_compile(self) -> bool:
        # The network as a whole depends on data between its branches: these are compiled instead. The loss is not ours.
        return self._loss_is_built and self.compiles()

    def _build_loss(self) -> nn.Module:
        # Called by `initialize`, when the network is there; nnU-Net's loss of patches becomes a part of ours.
        return self.build_loss(self._loss_of_patches)

    def _loss_of_patches(self) -> nn.Module:
        self._loss_is_built = True
        try:
            loss: nn.Module = super()._build_loss()
        finally:
            self._loss_is_built = False
        return loss

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        return self.deep_supervision_scales


def log_under(trainer: nnUNetTrainer, prefix: str, names: Sequence[str]) -> None:
    """Let a trainer log values by epoch under names of a prefix, and no others of it; its logger knows a fixed list.

    A checkpoint of an earlier version may have other names, and nnU-Net plots up to the shortest list. Names that the
    checkpoint lacks get NaN for its epochs.
    """
    logged = trainer.logger.local_logger.my_fantastic_logging
    for name in [name for name in logged if name.startswith(prefix) and name.removeprefix(prefix) not in names]:
        del logged[name]
    epochs = max((len(logged[prefix + name]) for name in names if prefix + name in logged), default=0)
    for name in names:
        logged.setdefault(prefix + name, [math.nan] * epochs)


@contextmanager
def as_one_process(trainer: nnUNetTrainer) -> Iterator[None]:
    """Let a trainer initialise without its own distribution, which splits batches of patches over the GPUs."""
    distributed, trainer.is_ddp = trainer.is_ddp, False
    try:
        yield
    finally:
        trainer.is_ddp = distributed


def load_case(loader: DataLoader, key: str) -> Any:
    """A case of the dataset that a loader was made with. batchgenerators keeps it to itself."""
    return loader._data.load_case(key)


def pretrained_weights_of_command_line(arguments: Sequence[str] | None = None) -> Path | None:
    """The file given with `-pretrained_weights`, which nnU-Net does not pass on to the trainer.

    Args:
        arguments: of the command; this process's where None. Processes that nnU-Net spawns have their parent's.

    Raises:
        UserError: there is no such file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-pretrained_weights", type=Path)
    parser.add_argument("-p")  # or it would be read as short for -pretrained_weights
    file: Path | None = parser.parse_known_args(arguments)[0].pretrained_weights
    if file is not None and not file.is_file():
        raise UserError(f"-pretrained_weights {file}: there is no such file")
    return file


class AlreadyLoaded(nn.Module):
    """Stands in for a network while nnU-Net's own loading of pretrained weights runs, which finds nothing to do.

    nnU-Net wants every weight of the network in the checkpoint, which a stock model's does not have.

    Args:
        network: what `network` gives back.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing."""
        return {}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""
