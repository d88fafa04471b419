"""What trainers make of the settings, by their names.

A trained model names its trainer. Its network is built from here: nnU-Net's search for the trainer's class imports all
trainers and what they need, which takes longer than the prediction of a small image.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from nnunet_nmsw.model.context import AddedContext
from nnunet_nmsw.model.fusion import CLASS_WEIGHTS
from nnunet_nmsw.model.network import Parts
from nnunet_nmsw.selection.paper import PaperSampler
from nnunet_nmsw.settings import NMSWSettings

PartsOf = Callable[[NMSWSettings], Parts]
"""What is made of the settings."""


def _of_paper(settings: NMSWSettings) -> Parts:
    return Parts(PaperSampler(), CLASS_WEIGHTS)


def _with_added_context(settings: NMSWSettings) -> Parts:
    return Parts.of(settings)._replace(context=AddedContext)


PARTS: dict[str, PartsOf] = {
    "nnUNetTrainerNMSW": Parts.of,
    "nnUNetTrainerNMSW_paper": _of_paper,
    "nnUNetTrainerNMSW_retrofit": Parts.of,
    "nnUNetTrainerNMSW_retrofit_context": _with_added_context,
}
"""By the trainer's name, without the suffixes of its variants."""

TRAINING_LENGTHS = (1, 5, 10, 20, 50, 100, 250, 500, 2000)
"""In epochs, of the variants of trainers."""

LENGTHS = "|".join(["1epoch", *(f"{length}epochs" for length in TRAINING_LENGTHS)])
VARIANT = re.compile(rf"(?P<name>.+?)(_({LENGTHS}))?(_NoMirroring)?")
"""Names of trainers with the suffixes that `trainers.variants` gives them."""


def predicts_benefits(trainer: str, settings: NMSWSettings) -> bool:
    """Whether a trainer's models predict what windows gain, as the number of patches "auto" needs it.

    Trainers that are not this package's are taken to leave that to the settings.
    """
    parts_of = parts_by_trainer(trainer) or Parts.of
    return parts_of(settings).sampler.measures_benefit


def parts_by_trainer(name: str) -> PartsOf | None:
    """What a trainer makes of the settings; None of a trainer that is not this package's."""
    match = VARIANT.fullmatch(name)
    return PARTS.get(match["name"]) if match else None
