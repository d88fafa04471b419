"""MONAI's SwinUNETR and MedNeXt, with the constructor that nnU-Net calls and its switch for deep supervision.

Name them in a plans file as `nnunet_nmsw.backbones.monai.SwinUNETR` and `nnunet_nmsw.backbones.monai.MedNeXt`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from nnunet_nmsw.errors import UserError, reason

try:
    from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt
    from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
except ImportError as error:
    raise UserError(
        f"the plans name a network of MONAI, which cannot be imported ({reason(error)}): "
        "install it with pip install 'nnunet-nmsw[monai]'"
    ) from error


class SwinUNETR(MonaiSwinUNETR):
    """MONAI's SwinUNETR. It has one output, so training is without deep supervision.

    Args:
        input_channels: of the volume.
        num_classes: channels of the logits.
        deep_supervision: taken because nnU-Net gives it, and ignored.
        **kwargs: MONAI's arguments, such as `feature_size`.
    """

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False, **kwargs: Any) -> None:
        super().__init__(in_channels=input_channels, out_channels=num_classes, **kwargs)

    @property
    def total_stride(self) -> list[int]:
        """What the axes of a volume must be multiples of: patch embedding and four mergings halve them."""
        return [self.patch_size**5] * 3


class MedNeXt(MonaiMedNeXt):
    """MONAI's MedNeXt. With deep supervision it returns a list of logits, the finest first.

    Args:
        input_channels: of the volume.
        num_classes: channels of the logits.
        deep_supervision: whether to return all scales; `decoder.deep_supervision` switches it later.
        **kwargs: MONAI's arguments, such as `init_filters` and `blocks_down`.
    """

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False, **kwargs: Any) -> None:
        # Built with the outputs of all scales in any case: a checkpoint must fit the network of a prediction, too.
        super().__init__(in_channels=input_channels, out_channels=num_classes, deep_supervision=True, **kwargs)
        self.deep_supervision = deep_supervision

    @property
    def decoder(self) -> MedNeXt:
        """Where nnU-Net looks for the switch `deep_supervision`."""
        return self

    @property
    def deep_supervision(self) -> bool:
        """Whether `forward` returns all scales."""
        return self.do_ds

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        self.do_ds = enabled

    @property
    def total_stride(self) -> list[int]:
        """What the axes of a volume must be multiples of: every stage of the encoder halves them."""
        return [2 ** len(self.enc_stages)] * 3

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of shape batch, classes, D, H, W, or a list of them with deep supervision, in evaluation mode, too."""
        if not self.deep_supervision:
            return cast(Tensor, super().forward(x))
        # MONAI's forward returns all scales where the flag of this module says training; its layers keep theirs.
        training = self.training
        self.training = True
        try:
            return list(super().forward(x))
        finally:
            self.training = training
