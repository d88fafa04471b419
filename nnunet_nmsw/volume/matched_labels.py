"""Classes that two models share by name.

A fine model's fused logits have a channel for its background, one for each class that the coarse model has, too, and
last those for other classes, which nobody asks for. The coarse model has one logit for all that is none of the shared
classes.

Tensor suffixes: B batch, C channels of a model, M channels of the coarse model for the shared classes: none of them,
then each; F channels of the fusion; V voxels, any shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class MatchedLabels(NamedTuple):
    """The classes of a fine model that a coarse model has, too.

    Attributes:
        coarse: the coarse model's number of each class, increasing.
        fine: the fine model's number of each.
        only_fine: names that the coarse model does not have.
        others: the fine model's numbers of these.
    """

    coarse: tuple[int, ...]
    fine: tuple[int, ...]
    only_fine: tuple[str, ...]
    others: tuple[int, ...]

    @classmethod
    def of(cls, coarse: Mapping[str, int], fine: Mapping[str, int]) -> MatchedLabels:
        """Match the plain labels of two models by name.

        Args:
            coarse: numbers by name, as in `dataset.json`.
            fine: the same of the other model.
        """
        shared = {name for name, number in coarse.items() if is_class(name, number)}
        classes = {name: number for name, number in fine.items() if is_class(name, number)}
        pairs = sorted((coarse[name], number) for name, number in classes.items() if name in shared)
        only_fine = {name: number for name, number in classes.items() if name not in shared}
        ours, theirs = (tuple(pair[side] for pair in pairs) for side in (0, 1))
        return cls(ours, theirs, tuple(only_fine), tuple(only_fine.values()))

    @property
    def num_shared(self) -> int:
        """Shared classes, and none of them."""
        return 1 + len(self.coarse)

    @property
    def num_channels(self) -> int:
        """Channels of the fusion."""
        return self.num_shared + len(self.others)

    def of_coarse(self, logits_CV: Tensor) -> Tensor:
        """The coarse model's logits for the shared classes, float32 of shape M, V.

        The softmax gives each class its probability of before, and the first channel the sum of all others'.
        """
        logits_CV = logits_CV.float()
        none_V = logits_CV[0]
        for number in range(1, len(logits_CV)):  # one after the other: a hundred at a time are a lot of memory
            if number not in self.coarse:
                none_V = torch.logaddexp(none_V, logits_CV[number])
        return torch.cat([none_V[None], logits_CV[list(self.coarse)]])

    def of_fine(self, logits_BCV: Tensor) -> Tensor:
        """A batch of the fine model's logits in the order of the fusion's channels."""
        order = torch.tensor([0, *self.fine, *self.others], device=logits_BCV.device)
        return logits_BCV.index_select(1, order)

    def for_fusion(self, of_shared_MV: Tensor) -> Tensor:
        """What shared classes and none of them have, for all channels of the fusion: other classes are none of them."""
        return torch.cat([of_shared_MV, *[of_shared_MV[:1]] * len(self.others)])

    def of_shared(self, fused_FV: Tensor) -> Tensor:
        """Logits of the fusion for the shared classes, shape M, V; the first channel is the largest of all others."""
        others = [0, *range(self.num_shared, self.num_channels)]
        return torch.cat([fused_FV[others].amax(0, keepdim=True), fused_FV[1 : self.num_shared]])


def is_class(name: str, number: int) -> bool:
    """Whether a label stands for something that is segmented: neither background nor ignored voxels."""
    return number != 0 and name != "ignore"
