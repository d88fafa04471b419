"""A trained stock nnU-Net becomes an NMSW model whose patches know where they are."""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim import SGD, Optimizer

from nnunet_nmsw.model.by_trainer import PARTS
from nnunet_nmsw.settings import NMSWSettings, refused
from nnunet_nmsw.trainers.builder import network_builder
from nnunet_nmsw.trainers.nnUNetTrainerNMSW_retrofit import nnUNetTrainerNMSW_retrofit

RATE_OF_LOCAL_BRANCH = 0.1
"""Learning rate of the stock network, relative to that of all else."""

RATE = "relative_rate"
"""Key of an optimiser's group of parameters."""


class RelativePolyLR(PolyLRScheduler):
    """nnU-Net's schedule, times the relative rate of each group of parameters."""

    def step(self, current_step: int | None = None) -> None:
        """See the parent."""
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group[RATE]


class nnUNetTrainerNMSW_retrofit_context(nnUNetTrainerNMSW_retrofit):
    """As `nnUNetTrainerNMSW_retrofit`, and what the global branch knows is added to the image of a patch.

    The addition is nothing at the start. It is trained, and with a low learning rate so is the stock network.
    """

    defaults: ClassVar[dict[str, Any]] = {"context_channels": 4}

    build_network_architecture = network_builder(PARTS["nnUNetTrainerNMSW_retrofit_context"])

    @classmethod
    def check_settings(cls, settings: NMSWSettings) -> None:
        """See the parent.

        Raises:
            UserError: there is no context.
        """
        if not settings.context_channels:
            raise refused("context_channels", settings.context_channels, f"at least 1 with {cls.__name__}")

    def configure_optimizers(self) -> tuple[Optimizer, PolyLRScheduler]:
        """nnU-Net's, with a rate of its own for the local branch."""
        optimizer, _ = super().configure_optimizers()
        of_local = {id(parameter) for parameter in self.nmsw_network.local_branch.parameters()}
        (group,) = optimizer.param_groups
        others, local = ([p for p in group["params"] if (id(p) in of_local) is is_local] for is_local in (False, True))
        groups = [{"params": others, RATE: 1.0}, {"params": local, RATE: RATE_OF_LOCAL_BRANCH}]
        optimizer = SGD(groups, **optimizer.defaults)
        return optimizer, RelativePolyLR(optimizer, self.initial_lr, self.num_epochs)
