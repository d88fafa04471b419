"""Preprocessed cases as a prediction takes them.

Tensor suffixes: C channels, D H W axes of the volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor

from nnunet_nmsw.volume.labels import LabelEncoding


class PreprocessedCase(NamedTuple):
    """A case of nnU-Net's preprocessed dataset.

    Attributes:
        key: its name.
        volume_CDHW: float32, with a channel for each label of the cascade's previous stage, where there is one.
        segmentation: reference as nnU-Net loads it, shape 1, D, H, W, -1 outside of the image.
        properties: nnU-Net's.
    """

    key: str
    volume_CDHW: Tensor
    segmentation: Any
    properties: dict[str, Any]


def read_cases(dataset: nnUNetBaseDataset, keys: Sequence[str], encoding: LabelEncoding) -> Iterator[PreprocessedCase]:
    """Cases of a dataset, read one after the other."""
    for key in keys:
        data, segmentation, previous, properties = dataset.load_case(key)
        volume = np.array(data[:], dtype=np.float32)
        if previous is not None:
            channels = convert_labelmap_to_one_hot(previous[:], encoding.foreground_labels, output_dtype=volume.dtype)
            volume = np.vstack((volume, channels))
        yield PreprocessedCase(key, torch.from_numpy(volume), segmentation, properties)
