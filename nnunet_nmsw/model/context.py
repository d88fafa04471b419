"""Context: what the local branch is told of the whole volume, as a few channels beside the image's.

The channels are made by the global branch, at low resolution, and interpolated to the voxels of a window. All of them
are 0 where nothing is known of the volume: under nnU-Net's own sliding window, and in some windows of a training, so
that the local branch can do without.

Tensor suffixes: B windows, C channels of the logits, G channels of the context, I channels of the image, D H W axes of
a window, d h w axes of the low-resolution view, 3 one coordinate per axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunet_nmsw.volume.interpolation import upsample_window
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import Shape

HIDDEN_CHANNELS = 8
"""Of the layers that work out an addition: a percent of what a network of 32 features costs."""

WEIGHTS = "context.of_probabilities.weight"
"""In the state of an NMSW network with context: one row a channel."""


def channels_of_context(weights: Mapping[str, Tensor]) -> int | None:
    """How many channels the context of a trained network has: 0 without context, None of a network that is no NMSW's.

    Args:
        weights: state of the network.
    """
    if not any(name.startswith("global_branch.") for name in weights):
        return None
    return len(weights[WEIGHTS]) if WEIGHTS in weights else 0


class Context(nn.Module):
    """Channels that the local branch gets behind those of the image.

    Args:
        num_image_channels: I.
        num_classes: C.
        num_channels: G, at least 1.
    """

    dropout: ClassVar[float] = 0.2
    """Probability by which a window of a training step is without context."""

    def __init__(self, num_image_channels: int, num_classes: int, num_channels: int) -> None:
        super().__init__()
        self.num_image_channels, self.num_channels = num_image_channels, num_channels
        self.of_probabilities = nn.Conv3d(num_classes, num_channels, 1, bias=False)

    @classmethod
    def channels_of_local_branch(cls, num_image_channels: int, num_channels: int) -> int:
        """How many channels the local branch takes."""
        return num_image_channels + num_channels

    def of_volume(self, output_Gdhw: Tensor, logits_Cdhw: Tensor, encoding: LabelEncoding) -> Tensor:
        """The context of a volume, float32 of shape G, d, h, w.

        The local loss trains what the global branch puts out for the context, and leaves the coarse prediction alone.

        Args:
            output_Gdhw: channels of the global branch that are there for the context.
            logits_Cdhw: coarse logits.
            encoding: of the labels.
        """
        probability_Cdhw = encoding.prediction(logits_Cdhw.detach()).probability_CV
        return output_Gdhw + self.of_probabilities(probability_Cdhw[None])[0].float()

    def of_windows(self, context_Gdhw: Tensor, starts_B3: Tensor, size: Shape, factor: Shape) -> Tensor:
        """The context of windows, float32 of shape B, G, `size`; in training without what is dropped.

        Args:
            context_Gdhw: of the volume.
            starts_B3: first voxels.
            size: voxels of a window by axis.
            factor: voxels of the volume per low-resolution voxel.
        """
        dropped_B = torch.rand(len(starts_B3)) < self.dropout if self.training else torch.zeros(len(starts_B3))
        return torch.stack(
            [
                context_Gdhw.new_zeros(len(context_Gdhw), *size)
                if dropped
                else upsample_window(context_Gdhw, start, size, factor)
                for start, dropped in zip(starts_B3.tolist(), dropped_B.tolist(), strict=True)
            ]
        )

    def forward(self, patches_BIDHW: Tensor) -> Tensor:
        """What the local branch is given.

        Args:
            patches_BIDHW: channels of the image, with or without those of the context behind.
        """
        batch, channels, *size = patches_BIDHW.shape
        if channels > self.num_image_channels:
            return patches_BIDHW
        return torch.cat([patches_BIDHW, patches_BIDHW.new_zeros(batch, self.num_channels, *size)], 1)


class AddedContext(Context):
    """Context as an addition to the image, for a network that was trained without: nothing changes at the start."""

    dropout: ClassVar[float] = 0.0

    def __init__(self, num_image_channels: int, num_classes: int, num_channels: int) -> None:
        super().__init__(num_image_channels, num_classes, num_channels)
        last = nn.Conv3d(HIDDEN_CHANNELS, num_image_channels, 1)
        for weights in (last.weight, last.bias):
            assert weights is not None
            nn.init.zeros_(weights)
        first = nn.Conv3d(num_image_channels + num_channels, HIDDEN_CHANNELS, 3, padding=1)
        self.addition = nn.Sequential(first, nn.LeakyReLU(), last)

    @classmethod
    def channels_of_local_branch(cls, num_image_channels: int, num_channels: int) -> int:
        """The image's."""
        return num_image_channels

    def forward(self, patches_BIDHW: Tensor) -> Tensor:
        """The image, with the addition where there is context; see the parent."""
        if patches_BIDHW.shape[1] == self.num_image_channels:
            return patches_BIDHW
        return patches_BIDHW[:, : self.num_image_channels] + self.addition(patches_BIDHW).to(patches_BIDHW)
