"""The networks of an ensemble at work: folds that take turns in one module, mirroring, batches of patches.

Tensor suffixes: 1 a batch of one, B batch, C channels or classes, D H W axes of the volume or of a patch, d h w axes of
the low-resolution view, K windows, 3 one coordinate per axis.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor

from nnunet_nmsw.inference.device import is_out_of_memory, unless_out_of_memory, without_trials
from nnunet_nmsw.inference.planes import mean
from nnunet_nmsw.inference.volume import Padded, Share
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.weights import lay_out_
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.precision import mixed_precision
from nnunet_nmsw.volume.windows import Shape, WindowGrid, crop_windows, downsample

MEMORY_OF_PLANES = 1 << 30
"""Bytes for the logits of the planes that are worked out at a time."""

VOXELS_AT_ONCE, VOXELS_AT_ONCE_ON_CPU = 1 << 23, 1 << 19
"""Voxels of a batch of patches, unless one patch has more. On a GPU cuDNN normalises each channel of each patch in one
block of threads, and a single patch leaves most of the device idle: four patches of 128³ take 8.9 ms each, one takes
13.6 (docs/performance.md). On a CPU larger batches leave its caches: two patches of 64³ at a time take 59 ms each,
eight take 88."""


Backend = Callable[[NMSWNetwork], NMSWNetwork]
"""Replaces what computes a network, in place."""


class Ensemble:
    """The folds of a model, whose weights take turns in one network.

    Args:
        network: whose weights are replaced. It is moved to the device.
        parameters: a state dictionary for each fold.
        encoding: of the labels.
        device: to compute on.
        mirror_axes: axes of a volume, 0 to 2, over whose mirrorings predictions are averaged.
        bfloat16: compute in it where the device is a CPU.
        backend: replaces what computes a fold's network, in place; PyTorch computes it where None.
    """

    def __init__(
        self,
        network: NMSWNetwork,
        parameters: Sequence[dict[str, Any]],
        encoding: LabelEncoding,
        device: torch.device,
        mirror_axes: Sequence[int] = (),
        bfloat16: bool = False,
        backend: Backend | None = None,
    ) -> None:
        self.encoding, self.device, self.bfloat16 = encoding, device, bfloat16
        self.backend = backend
        self.mirror_axes = tuple(mirror_axes)
        self.network = network.to(device)
        self.network.eval()
        lay_out_(network.local_branch, device)
        self._parameters = parameters
        self._fold: int | None = None
        self._on_device: dict[int, list[Tensor]] = {}
        self._of_backend: dict[int, NMSWNetwork] = {}

    def folds(self) -> list[Fold]:
        """The folds."""
        return [Fold(self, number) for number in range(len(self._parameters))]

    def with_weights_of(self, fold: int) -> NMSWNetwork:
        """The network with a fold's weights."""
        if self.backend is not None:
            if fold not in self._of_backend:
                network = copy.deepcopy(self.network)
                network.load_state_dict(self._parameters[fold])
                self._of_backend[fold] = self.backend(network)
            return self._of_backend[fold]
        if self._fold != fold:
            if self.device.type == "cpu" or len(self._parameters) == 1:
                self.network.load_state_dict(self._parameters[fold])
            else:
                self._put(fold)
            self._fold = fold
        return self.network

    @torch.inference_mode(False)
    @torch.no_grad()
    def _put(self, fold: int) -> None:
        """Put a fold's weights into the network, which are copied to the device the first time."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        if fold in self._on_device:
            for tensor, weights in zip(tensors, self._on_device[fold], strict=True):
                tensor.data = weights
            return
        self._fold = None  # until all is there
        for tensor in tensors:  # what is there belongs to another fold, or to who gave the network
            tensor.data = tensor.data.clone()  # checkpoints do not have all buffers
        self.network.load_state_dict(self._parameters[fold])
        self._on_device[fold] = [tensor.data for tensor in tensors]

    def mirrored(self, predict: Callable[[Tensor], Tensor], input_BCDHW: Tensor) -> Tensor:
        """The mean of predictions over mirrorings, in nnU-Net's order. Axes before the last three are left alone."""
        axes = [axis - 3 for axis in self.mirror_axes]
        flips = itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1))

        def flipped(flip: tuple[int, ...]) -> Tensor:
            with mixed_precision(self.device, self.bfloat16):
                prediction = predict(input_BCDHW.flip(flip) if flip else input_BCDHW)
            return prediction.flip(flip) if flip else prediction

        return mean(map(flipped, flips))


class Fold:
    """The networks of one fold; see `volume.Networks`.

    Args:
        ensemble: it belongs to.
        number: in the ensemble.
    """

    def __init__(self, ensemble: Ensemble, number: int) -> None:
        self.ensemble, self.number = ensemble, number

    @property
    def network(self) -> NMSWNetwork:
        """With the weights of this fold, until another fold is asked."""
        return self.ensemble.with_weights_of(self.number)

    @property
    def weights(self) -> FusionWeights:
        """Weights of the fusion."""
        return self.network.fusion_weights.to(self.ensemble.device)

    def grid(self, volume_shape: Shape) -> WindowGrid:
        """The windows of nnU-Net's sliding window over a padded volume."""
        return self.ensemble.network.grid(volume_shape)

    def coarse(self, padded: Padded) -> CoarsePrediction:
        """Coarse prediction of a padded volume, averaged over mirrorings where these are on."""
        network, encoding = self.network, self.ensemble.encoding
        device = self.ensemble.device
        volume_1CDHW = padded.volume_CDHW[None].float()
        low_1Cdhw = downsample(volume_1CDHW, network.settings.downsampling_factor).to(device)

        def predict(low_1Cdhw: Tensor) -> Tensor:
            logits_Cdhw, score_map_dhw, _, context_Gdhw = network.coarse(low_1Cdhw, encoding)
            return torch.cat([logits_Cdhw, score_map_dhw[None], *([] if context_Gdhw is None else [context_Gdhw])])

        def on_host() -> Tensor:
            print("The coarse prediction does not fit on the device; predicting it again with results on the host")
            return self.ensemble.mirrored(lambda low_1Cdhw: predict(low_1Cdhw).cpu(), low_1Cdhw)

        with without_trials():
            output_Cdhw = unless_out_of_memory(lambda: self.ensemble.mirrored(predict, low_1Cdhw), on_host, device)
        classes = encoding.num_channels
        context_Gdhw = output_Cdhw[classes + 1 :] if network.context is not None else None
        return CoarsePrediction(output_Cdhw[:classes], output_Cdhw[classes], encoding, context_Gdhw)

    def patches(self, padded: Padded, coarse: CoarsePrediction, starts_K3: Tensor) -> Tensor:
        """Logits of windows, mirrored where that is on; in halves where the device has too little memory."""
        network, device = self.network, self.ensemble.device
        try:
            patches_KCDHW = crop_windows(padded.volume_CDHW[None], starts_K3, network.patch_size).to(device)
            return self.patch_logits(network.with_context(patches_KCDHW, coarse, starts_K3))
        except RuntimeError as error:
            if len(starts_K3) == 1 or not is_out_of_memory(error):
                raise
        empty_cache(device)
        half = len(starts_K3) // 2
        return torch.cat([self.patches(padded, coarse, part_K3) for part_K3 in (starts_K3[:half], starts_K3[half:])])

    def patch_logits(self, patches_KCDHW: Tensor) -> Tensor:
        """Logits of a batch of patches, with or without context, of shape K, classes, patch size."""
        network, ensemble = self.network, self.ensemble
        patches_KCDHW = patches_KCDHW.to(ensemble.device)
        if ensemble.device.type == "cpu":
            patches_KCDHW = patches_KCDHW.contiguous(memory_format=torch.channels_last_3d)
            return ensemble.mirrored(network, patches_KCDHW)
        return ensemble.mirrored(network, filled_up(patches_KCDHW))[: len(patches_KCDHW)]


def filled_up(patches_KCDHW: Tensor) -> Tensor:
    """A batch of patches with empty ones behind, for a GPU: to a power of two, or as many as go at once.

    Each size of a batch is another program for `torch.compile`, and cuDNN tries its algorithms for each.
    """
    number, *shape = patches_KCDHW.shape
    most = patches_at_once(shape[1:], patches_KCDHW.device)
    wanted = max(number, min(most, 1 << (number - 1).bit_length()))
    return torch.cat([patches_KCDHW, patches_KCDHW.new_zeros(wanted - number, *shape)])


def patches_at_once(patch_size: Sequence[int], device: torch.device) -> int:
    """Patches of a batch: small ones together, for which the cost of a call is more than that of the computation."""
    voxels = VOXELS_AT_ONCE_ON_CPU if device.type == "cpu" else VOXELS_AT_ONCE
    return max(1, min(16, voxels // math.prod(patch_size)))


def unbounded(patch_size: Sequence[int], device: torch.device, num_preprocessing: int = 0) -> Share:
    """What may go on at a time without a bound on memory."""
    return Share(num_preprocessing, sys.maxsize, MEMORY_OF_PLANES, sys.maxsize, patches_at_once(patch_size, device))
