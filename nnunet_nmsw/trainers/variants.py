"""Variants of training length and augmentation, named as nnU-Net names its own."""

from __future__ import annotations

from typing import Any

from nnunet_nmsw.model.by_trainer import TRAINING_LENGTHS
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.nnUNetTrainerNMSW_paper import nnUNetTrainerNMSW_paper
from nnunet_nmsw.trainers.nnUNetTrainerNMSW_retrofit import nnUNetTrainerNMSW_retrofit
from nnunet_nmsw.trainers.nnUNetTrainerNMSW_retrofit_context import nnUNetTrainerNMSW_retrofit_context


class NoMirroring:
    """Mixin: neither training nor prediction mirrors, for anatomy with a left and a right."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """The parent's, without axes to mirror."""
        rotation, dummy_2d, patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # type: ignore[misc]
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, patch_size, None


def variants_of(base: type[nnUNetTrainerNMSW]) -> dict[str, type[nnUNetTrainerNMSW]]:
    """Subclasses of a trainer by name: of every training length, without mirroring, and both."""
    classes: dict[str, type[nnUNetTrainerNMSW]] = {}
    # nnU-Net spells the first "1epoch"; both spellings are found.
    lengths = [(None, ""), (1, "_1epoch"), *((n, f"_{n}epochs") for n in TRAINING_LENGTHS)]
    for num_epochs, length in lengths:
        for mixins in ((), (NoMirroring,)):
            name = f"{base.__name__}{length}{''.join(f'_{mixin.__name__}' for mixin in mixins)}"
            if name == base.__name__:
                continue
            attributes: dict[str, Any] = {"__module__": __name__, "__doc__": f"Variant of {base.__name__}."}
            if num_epochs is not None:
                attributes["training_length"] = num_epochs
            classes[name] = type(name, (*mixins, base), attributes)
    return classes


BASES = (
    nnUNetTrainerNMSW,
    nnUNetTrainerNMSW_paper,
    nnUNetTrainerNMSW_retrofit,
    nnUNetTrainerNMSW_retrofit_context,
)

VARIANTS = {name: variant for base in BASES for name, variant in variants_of(base).items()}
"""Trainer classes by name."""

globals().update(VARIANTS)
