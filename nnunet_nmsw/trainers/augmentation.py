"""nnU-Net's augmentation, parted by where it acts.

Tensor suffixes: C channels, D H W axes of a view.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.nnunet.transforms import for_views

TRANSFORMS_OF_PREVIOUS = (
    MoveSegAsOneHotToDataTransform,
    ApplyRandomBinaryOperatorTransform,
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)


class Augmentation(NamedTuple):
    """nnU-Net's transforms, parted by where they act.

    Attributes:
        spatial: rotation and scaling, one affine for the step.
        mirror: flips the volume when it is loaded.
        of_views: everything else, applied to each view with the same draws.
        of_previous: what makes channels of the labels of the cascade's previous stage, and deforms them.
    """

    spatial: SpatialTransform | None
    mirror: MirrorTransform | None
    of_views: list[BasicTransform]
    of_previous: list[BasicTransform]

    @classmethod
    def of(cls, transforms: BasicTransform) -> Augmentation:
        """Part a trainer's transforms.

        Raises:
            NotImplementedError: they deform elastically, which is no affine.
        """
        parts = transforms.transforms if isinstance(transforms, ComposeTransforms) else [transforms]
        spatial, mirror, of_views, of_previous = None, None, [], []
        for part in parts:
            if isinstance(part, SpatialTransform):
                if part.p_elastic_deform > 0:
                    raise NotImplementedError(
                        "NMSW rotates, scales and mirrors volumes; it cannot deform them elastically"
                    )
                spatial = part
            elif isinstance(part, MirrorTransform):
                mirror = part
            elif isinstance(getattr(part, "transform", part), TRANSFORMS_OF_PREVIOUS):
                of_previous.append(for_views(part))
            elif not isinstance(part, Convert3DTo2DTransform | Convert2DTo3DTransform):
                of_views.append(for_views(part))
        return cls(spatial, mirror, of_views, of_previous)

    def draw_affine(self) -> np.ndarray | None:
        """The matrix that takes positions in the augmented volume to positions in the volume, 3 × 3; None for none.

        With nnU-Net's dummy 2D augmentation it leaves the first axis as it is.
        """
        if self.spatial is None:
            return None
        dimensions = len(self.spatial.patch_size)
        affine = self.spatial.get_parameters(image=torch.empty((1,) * (dimensions + 1)))["affine"]
        if affine is None:
            return None
        in_3d = np.eye(3)
        in_3d[3 - dimensions :, 3 - dimensions :] = affine
        return in_3d

    def draw_mirrored_axes(self) -> list[int]:
        """Axes to flip."""
        axes: list[int] = [] if self.mirror is None else self.mirror.get_parameters()["axes"]
        return axes


def augmentations_of(trainer: nnUNetTrainer) -> tuple[Augmentation, Augmentation]:
    """A trainer's transforms for training and for validation, parted."""
    rotation, do_dummy_2d, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    of_cascade = {"is_cascaded": trainer.is_cascaded, "foreground_labels": trainer.label_manager.foreground_labels}
    training = trainer.get_training_transforms(
        # Only the size of what the spatial transform would cut: here it gives its matrix.
        patch_size=(1, 1, 1),
        rotation_for_DA=rotation,
        deep_supervision_scales=None,
        mirror_axes=mirror_axes,
        do_dummy_2d_data_aug=do_dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm,
        **of_cascade,
    )
    validation = trainer.get_validation_transforms(deep_supervision_scales=None, **of_cascade)
    return Augmentation.of(training), Augmentation.of(validation)
