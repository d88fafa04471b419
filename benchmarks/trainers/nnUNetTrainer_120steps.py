"""The trainer of `model_set.py`, which names this folder in `nnUNet_extTrainer`, where nnU-Net looks."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.trainers.variants import NoMirroring


class nnUNetTrainer_120steps(NoMirroring, nnUNetTrainer):
    """Stock nnU-Net, for networks that are measured and not used."""

    def initialize(self) -> None:
        """See the parent."""
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 120, 2
        super().initialize()
