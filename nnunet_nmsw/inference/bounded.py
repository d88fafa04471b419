"""How much of a prediction goes on at a time: batches of patches, and what a bound on the host's memory allows.

Tensor suffixes: C channels or classes, D H W axes of a patch, K windows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn

from nnunet_nmsw.inference.logits import LogitsPredictor
from nnunet_nmsw.inference.memory import (
    Share,
    in_words,
    memory_of_process,
    most_memory_of_process,
    needs_of,
    share_out,
    size_of,
)
from nnunet_nmsw.inference.streaming import FEWEST_PLANES
from nnunet_nmsw.network import NMSWNetwork

MEMORY_OF_PLANES = 1 << 30
"""Bytes for the logits of the planes that are worked out at a time."""

VOXELS_AT_ONCE, VOXELS_AT_ONCE_ON_CPU = 1 << 21, 1 << 19
"""Voxels of a batch of patches, unless one patch has more. On a CPU larger ones leave its caches: two patches of 64³ at
a time take 59 ms each, eight take 88 (docs/performance.md)."""


class BoundedPredictor(LogitsPredictor):
    """Predicts patches in batches, and knows how much may go on at a time.

    Args:
        max_memory: see `NMSWPredictor`.
        **kwargs: those of `LogitsPredictor`.
    """

    def __init__(self, max_memory: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_memory = max_memory
        self._bounded_share: Share | None = None
        self._bounded_cases: set[str] = set()

    @property
    def share(self) -> Share:
        """What may go on at a time."""
        return self._bounded_share or self._unbounded()

    def bound_memory(self, cases: list[list[str]], num_preprocessing: int) -> int:
        """Keep within `max_memory` with these cases from now on. Predicts a patch to see what that takes.

        Args:
            cases: files by case and channel.
            num_preprocessing: cases to preprocess beside the prediction, if memory allows.

        Returns:
            How many it allows.

        Raises:
            UserError: it is too small for one of the cases.
        """
        if self.max_memory is None:
            return num_preprocessing
        images = {files[0] for files in cases}
        if self._bounded_share is None or not images <= self._bounded_cases:
            self._bounded_share = self._share_out(self.max_memory, cases, num_preprocessing)
            self._bounded_cases = images
        return self._bounded_share.num_preprocessing

    def _unbounded(self, num_preprocessing: int = 0) -> Share:
        """What may go on at a time without a bound on memory."""
        at_once = patches_at_once(self.nmsw_network.patch_size, self.device)
        return Share(num_preprocessing, sys.maxsize, MEMORY_OF_PLANES, sys.maxsize, at_once)

    def _share_out(self, limit: int, cases: list[list[str]], num_preprocessing: int) -> Share:
        """What may go on at a time for these cases. Predicts a patch to see what it takes.

        Raises:
            UserError: the bound is too small for one of them.
        """
        plans, configuration, network = self.plans_manager, self.configuration_manager, self.nmsw_network
        channels = determine_num_input_channels(plans, configuration, self.dataset_json)
        classes, factor = self.label_manager.num_segmentation_heads, network.config.downsampling_factor
        sizes = [size for files in cases if (size := size_of(files, plans, configuration))]
        if not sizes:
            return self._unbounded(num_preprocessing)
        needs = [needs_of(size, configuration, channels, classes, factor) for size in sizes]
        size, largest = max(zip(sizes, needs, strict=True), key=lambda case: sum(case[1][:3]))
        used = memory_of_process()
        with torch.inference_mode():
            self._ready_network()
            self._patch_logits(torch.zeros(1, channels, *network.patch_size))
        patch = max(0, most_memory_of_process() - used)
        if self.device.type == "cpu":  # the global branch sees a volume of its own
            patch = max(patch, patch * math.prod(size.volume) // math.prod(factor) // math.prod(network.patch_size))
        wanted = self._unbounded(num_preprocessing)._replace(num_writers=default_num_processes)
        share = share_out(limit, used, largest, patch, wanted, FEWEST_PLANES, size.case)
        if self.verbose:
            print(f"within {in_words(limit)}: {share}")
        return share

    def _ready_network(self) -> NMSWNetwork:
        """The network on the device, set to predict patches."""
        network = self.nmsw_network.to(self.device)
        network.eval()
        if self.device.type == "cpu":
            to_channels_last_(network.local_branch)
        return network

    def _patch_logits(self, patches_KCDHW: Tensor) -> Tensor:
        """Logits of patches, mirrored where that is on; in halves where the device has too little memory."""
        try:
            patches_KCDHW = patches_KCDHW.to(self.device)
            if self.device.type == "cpu":
                patches_KCDHW = patches_KCDHW.contiguous(memory_format=torch.channels_last_3d)
            logits_KCDHW: Tensor = self._internal_maybe_mirror_and_predict(patches_KCDHW)
        except torch.OutOfMemoryError:
            if len(patches_KCDHW) == 1:
                raise
        else:
            return logits_KCDHW
        empty_cache(self.device)
        half = len(patches_KCDHW) // 2
        return torch.cat([self._patch_logits(part) for part in (patches_KCDHW[:half], patches_KCDHW[half:])])


def to_channels_last_(network: nn.Module) -> None:
    """Keep the weights of 3D convolutions in the layout in which oneDNN is faster. Values are the same."""
    for parameter in network.parameters():
        if parameter.ndim == 5:  # `Module.to` would fail at parameters of four axes
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def patches_at_once(patch_size: Sequence[int], device: torch.device) -> int:
    """Patches of a batch: small ones together, for which the cost of a call is more than that of the computation."""
    voxels = VOXELS_AT_ONCE_ON_CPU if device.type == "cpu" else VOXELS_AT_ONCE
    return max(1, min(16, voxels // math.prod(patch_size)))
