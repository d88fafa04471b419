"""Trainers that nnU-Net's `-tr` finds."""

from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.variants import TRAINING_LENGTHS

globals().update(TRAINING_LENGTHS)
__all__ = ["nnUNetTrainerNMSW", *TRAINING_LENGTHS]  # noqa: PLE0604 - the keys are class names
