"""The trainer of `model_set.py`, which names this folder in `nnUNet_extTrainer`, where nnU-Net looks."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.trainers.variants import NoMirroring


class nnUNetTrainer_short(NoMirroring, nnUNetTrainer):
    """Stock nnU-Net with an optimiser that learns organs of different brightness within minutes."""

    def initialize(self) -> None:
        """See the parent."""
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 125, 2
        super().initialize()

    def configure_optimizers(self) -> tuple[Any, Any]:
        """See the parent."""
        optimizer = torch.optim.Adam(self.network.parameters(), 2e-3)
        return optimizer, PolyLRScheduler(optimizer, 2e-3, self.num_epochs)
