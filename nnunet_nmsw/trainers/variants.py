"""Variants of training length, named as nnU-Net names its own."""

from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW


def with_training_length(base: type[nnUNetTrainerNMSW], num_epochs: int, name: str) -> type[nnUNetTrainerNMSW]:
    """A subclass of `base` that trains for `num_epochs`."""
    return type(
        name, (base,), {"training_length": num_epochs, "__module__": __name__, "__doc__": f"{num_epochs} epochs."}
    )


TRAINING_LENGTHS: dict[str, type[nnUNetTrainerNMSW]] = {
    name: with_training_length(nnUNetTrainerNMSW, num_epochs, name)
    for num_epochs, name in [
        (1, "nnUNetTrainerNMSW_1epoch"),  # as nnU-Net spells it
        *((n, f"nnUNetTrainerNMSW_{n}epochs") for n in (1, 5, 10, 20, 50, 100, 250)),
    ]
}
"""Trainer classes by name."""

globals().update(TRAINING_LENGTHS)
