"""The trainer of the demonstration. `nmsw_demo` names this folder in `nnUNet_extTrainer`, where nnU-Net looks."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.trainers.variants import NoMirroring


class nnUNetTrainer_10epochs_NoMirroring(NoMirroring, nnUNetTrainer):
    """Stock nnU-Net. It mirrors nothing: its last validation slides eight times as long with mirroring.

    Of networks this small an epoch of NMSW takes more than twice as long, so twice the epochs are about equal time.
    """

    def initialize(self) -> None:
        """See the parent."""
        self.num_epochs = 10
        super().initialize()
