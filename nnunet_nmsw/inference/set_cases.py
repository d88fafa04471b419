"""Cases of a set of models: preprocessed for the coarse model, with the image for the fine ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnunet_nmsw.console import printable
from nnunet_nmsw.inference.cases import Case
from nnunet_nmsw.inference.preprocessing import OfPlans, check_names, preprocessed_array, read_images

AS_READ = "image_as_read"
"""Key of a preprocessed case: the image as nnU-Net's reader gives it, and its properties."""

COARSE_LOGITS = "coarse_logits"
"""Key of a preprocessed case: the coarse model's logits, where they are known already, shape C, d, h, w."""


def case_from_files(coarse: OfPlans, images: list[str], output: str | None) -> Case:
    """A case from files; with `error` where they cannot be read or preprocessed.

    Args:
        coarse: the coarse model.
        images: files by channel.
        output: the file to be written, without ending.
    """
    what = printable(f"cannot preprocess {', '.join(images)}")
    try:
        check_names(images, output)
        image, properties = read_images(coarse, images)
    except Exception as error:  # noqa: BLE001 - `Failures` tells apart what is the case's fault
        return {"error": error, "what": what}
    return case_from_array(coarse, image, properties, output, what)


def case_from_array(
    coarse: OfPlans,
    image: np.ndarray,
    properties: dict[str, Any],
    output: str | None,
    what: str = "cannot preprocess an array",
) -> Case:
    """A case from an array as nnU-Net's reader gives it; with `error` where it cannot be preprocessed.

    Args:
        coarse: the coarse model.
        image: shape C, Z, Y, X.
        properties: nnU-Net's of it; not changed.
        output: the file to be written, without ending.
        what: cannot be done, for messages.
    """
    case = preprocessed_array(coarse, image, properties, None, output, what)
    return case if "error" in case else {**case, AS_READ: (image, properties)}
