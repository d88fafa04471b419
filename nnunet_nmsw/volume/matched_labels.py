"""Classes that two models share by name.

Tensor suffixes: C channels of a model's logits, M matched channels: none of the matched classes, then these classes,
V voxels, any shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_nmsw.volume.labels import LabelEncoding


class MatchedLabels(NamedTuple):
    """The classes of a fine model that a coarse model has, too.

    Attributes:
        coarse: the coarse model's number of each class, increasing.
        fine: the fine model's number of each.
        only_fine: names that the coarse model does not have.
    """

    coarse: tuple[int, ...]
    fine: tuple[int, ...]
    only_fine: tuple[str, ...]

    @classmethod
    def of(cls, coarse: Mapping[str, int], fine: Mapping[str, int]) -> MatchedLabels:
        """Match the plain labels of two models by name.

        Args:
            coarse: numbers by name, as in `dataset.json`.
            fine: the same of the other model.
        """
        classes = {name: number for name, number in fine.items() if is_class(name, number)}
        shared = {name for name, number in coarse.items() if is_class(name, number)}
        pairs = sorted((coarse[name], number) for name, number in classes.items() if name in shared)
        matched = {number for _, number in pairs}
        only_fine = tuple(name for name, number in classes.items() if number not in matched)
        return cls(tuple(number for number, _ in pairs), tuple(number for _, number in pairs), only_fine)

    @property
    def num_channels(self) -> int:
        """Matched channels."""
        return 1 + len(self.coarse)

    @property
    def encoding(self) -> LabelEncoding:
        """Of the matched channels."""
        return LabelEncoding(self.num_channels)

    def of_coarse(self, logits_CV: Tensor) -> Tensor:
        """The coarse model's logits as logits of the matched channels; see `matched_logits`."""
        return matched_logits(logits_CV, self.coarse, 0)

    def of_fine(self, logits_BCV: Tensor) -> Tensor:
        """A batch of the fine model's logits as logits of the matched channels; see `matched_logits`."""
        return matched_logits(logits_BCV, self.fine, 1)


def is_class(name: str, number: int) -> bool:
    """Whether a label stands for something that is segmented: neither background nor ignored voxels."""
    return number != 0 and name != "ignore"


def matched_logits(logits_CV: Tensor, channels: Sequence[int], dimension: int) -> Tensor:
    """Logits of some channels behind a logit of all others together.

    The softmax gives each of these channels its probability of before, and the first one the sum of all others'.

    Args:
        logits_CV: logits; channels are along `dimension`.
        channels: to keep, in the order to keep them in.
        dimension: of the channels.

    Returns:
        float32.
    """
    device = logits_CV.device
    others = sorted(set(range(logits_CV.shape[dimension])) - set(channels))
    kept, rest = (
        logits_CV.index_select(dimension, torch.tensor(some, device=device)).float() for some in (channels, others)
    )
    return torch.cat([rest.logsumexp(dimension, keepdim=True), kept], dimension)
