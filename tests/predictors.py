"""Predictors of a tiny model, for tests."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_nmsw.inference.predictor import NMSWPredictor

CPU = torch.device("cpu")


def stock(mirrored: bool) -> nnUNetPredictor:
    """nnU-Net's."""
    return nnUNetPredictor(use_mirroring=mirrored, device=CPU, allow_tqdm=False)


def nmsw(mirrored: bool = False, **kwargs: Any) -> NMSWPredictor:
    """NMSW's."""
    return NMSWPredictor(use_mirroring=mirrored, device=CPU, allow_tqdm=False, **kwargs)
