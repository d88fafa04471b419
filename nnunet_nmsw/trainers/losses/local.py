"""nnU-Net's loss of patches, with targets made of labels.

Tensor suffixes: B windows, D H W axes of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from torch import Tensor, nn

from nnunet_nmsw.volume.labels import LabelEncoding


class LocalLoss(nn.Module):
    """The loss of the local branch.

    Args:
        loss: nnU-Net's, deep supervision included where `scales` are given.
        scales: nnU-Net's scales of the local outputs; None without deep supervision.
        encoding: of the labels.
    """

    def __init__(self, loss: Callable[..., Tensor], scales: list[list[float]] | None, encoding: LabelEncoding) -> None:
        super().__init__()
        self.loss, self.encoding = loss, encoding
        self.downsample_targets = None if scales is None else DownsampleSegForDSTransform(scales)

    def forward(self, logits: Tensor | Sequence[Tensor], labels_B1DHW: Tensor) -> Tensor:
        """The loss, scalar.

        Args:
            logits: of the windows; with deep supervision a list of scales.
            labels_B1DHW: integer labels.
        """
        if self.downsample_targets is None:
            return self.loss(logits, self.encoding.local_targets(labels_B1DHW[:, 0]))
        # The transform takes one sample with channels; here the batch stands in for them.
        scales: list[Tensor] = self.downsample_targets(segmentation=labels_B1DHW[:, 0])["segmentation"]
        return self.loss(logits, [self.encoding.local_targets(labels_BDHW) for labels_BDHW in scales])
