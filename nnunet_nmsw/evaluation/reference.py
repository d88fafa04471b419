"""Reference labels of images that stock models predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.files import FilesPredictor
from nnunet_nmsw.inference.preprocessing import read_labels


def reference_labels(predictor: FilesPredictor, file: Path, properties: dict[str, Any]) -> np.ndarray:
    """Labels of an image, int16, in the axis order and shape of nnU-Net's reader.

    Args:
        predictor: of models whose labels they are.
        file: to read.
        properties: nnU-Net's of the preprocessed image.

    Raises:
        UserError: it cannot be read, has another size than the image, or a label that the models do not know.
    """
    shape = properties["shape_before_cropping"]
    (labels,) = read_labels(predictor, str(file), [shape[axis] for axis in predictor.plans_manager.transpose_backward])
    # A region is a list of labels.
    largest = max(max(of) if isinstance(of, list) else of for of in predictor.dataset_json["labels"].values())
    if labels.min() < 0 or labels.max() > largest:
        raise UserError(f"{file} has a label that is none of the models', which are 0 to {largest}")
    converted: np.ndarray = labels.astype(np.int16)
    return converted
