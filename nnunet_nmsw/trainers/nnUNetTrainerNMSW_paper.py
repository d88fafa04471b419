"""The method of the paper: "No More Sliding Window" (Jeon et al., 2025), built from the same parts as ours.

It is what people will compare with. What differs from ours is here and in `selection.paper`; docs/ablations.md compares
the two. The optimiser is nnU-Net's: with AdamW, as in the paper's public code, the prediction is worse.
"""

from __future__ import annotations

from typing import Any, ClassVar

from nnunet_nmsw.model.by_trainer import PARTS
from nnunet_nmsw.trainers.builder import network_builder
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW


class nnUNetTrainerNMSW_paper(nnUNetTrainerNMSW):
    """Trains the paper's method: 4 drawn windows and a random one a step, fused by class weights.

    The optimiser is nnU-Net's, and the loss of the fused prediction is ours, which needs no canvas. The setting
    `score_training` has no say here.
    """

    defaults: ClassVar[dict[str, Any]] = {"sampled_windows": 4, "random_windows": 1}

    build_network_architecture = network_builder(PARTS["nnUNetTrainerNMSW_paper"])
