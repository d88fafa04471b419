"""Trainers that nnU-Net's `-tr` finds."""

from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.nnUNetTrainerNMSW_paper import nnUNetTrainerNMSW_paper
from nnunet_nmsw.trainers.nnUNetTrainerNMSW_retrofit import nnUNetTrainerNMSW_retrofit
from nnunet_nmsw.trainers.nnUNetTrainerNMSW_retrofit_context import nnUNetTrainerNMSW_retrofit_context
from nnunet_nmsw.trainers.variants import VARIANTS

globals().update(VARIANTS)
__all__ = [  # noqa: PLE0604 - the keys are class names
    "nnUNetTrainerNMSW",
    "nnUNetTrainerNMSW_paper",
    "nnUNetTrainerNMSW_retrofit",
    "nnUNetTrainerNMSW_retrofit_context",
    *VARIANTS,
]
