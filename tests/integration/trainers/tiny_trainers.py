"""Trainers for the tests, found by nnU-Net through `nnUNet_extTrainer`: a few steps instead of thousands."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.trainers import nnUNetTrainerNMSW, nnUNetTrainerNMSW_retrofit


class Tiny:
    """Mixin: two epochs of five steps."""

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 5, 2
        super().initialize()


class nnUNetTrainer_tiny(Tiny, nnUNetTrainer):
    """Stock nnU-Net."""


class nnUNetTrainerNMSW_tiny(Tiny, nnUNetTrainerNMSW):
    """NMSW."""


class nnUNetTrainerNMSW_retrofit_tiny(Tiny, nnUNetTrainerNMSW_retrofit):
    """NMSW around a trained stock model."""
