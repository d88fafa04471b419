"""Architectures of many kinds, for both branches."""

import copy

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import make_configuration, make_plans
from torch import nn

from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.trainers import nnUNetTrainerNMSW

CPU = torch.device("cpu")
CONFIGURATION = "3d_fullres"
UNETS = "dynamic_network_architectures.architectures.unet"
THREE_STAGES = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [1, 2, 2]],
    "n_conv_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
}
PRIMUS = {
    "network_class_name": "dynamic_network_architectures.architectures.primus.Primus",
    "arch_kwargs": {
        "input_shape": [16, 16, 16],
        "patch_embed_size": [8, 8, 8],
        "embed_dim": 24,
        "eva_depth": 2,
        "eva_numheads": 2,
        "drop_path_rate": 0.2,
        "init_values": 0.1,
        "scale_attn_inner": True,
    },
    "_kw_requires_import": [],
}
MEDNEXT = {
    "network_class_name": "nnunet_nmsw.backbones.monai.MedNeXt",
    "arch_kwargs": {
        "init_filters": 4,
        "kernel_size": 3,
        "blocks_down": [1, 1],
        "blocks_bottleneck": 1,
        "blocks_up": [1, 1],
    },
    "_kw_requires_import": [],
}
SWIN = {
    "network_class_name": "nnunet_nmsw.backbones.monai.SwinUNETR",
    "arch_kwargs": {
        "feature_size": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 2,
        # At 32 voxels the bottleneck is a single one, which an instance norm cannot normalise.
        "norm_name": ["group", {"num_groups": 4}],
    },
    "_kw_requires_import": [],
}


class OneConvolution(nn.Module):
    """As little as nnU-Net's way to build networks asks for: no encoder, no decoder, no deep supervision."""

    total_stride = (1, 1, 1)

    def __init__(self, input_channels, num_classes, kernel_size=3):
        super().__init__()
        self.convolution = nn.Conv3d(input_channels, num_classes, kernel_size, padding="same")

    def forward(self, x):
        return self.convolution(x)


class TwoOutputs(OneConvolution):
    """Several outputs and no switch for them."""

    def forward(self, x):
        return [self.convolution(x), self.convolution(x)[..., ::2]]


def architecture(name, **arch_kwargs):
    return {"network_class_name": f"{__name__}.{name}", "arch_kwargs": arch_kwargs, "_kw_requires_import": []}


def unet(name, without=(), **arch_kwargs):
    """The tiny plans' architecture with three stages."""
    entry = make_configuration()["architecture"]
    kwargs = {**entry["arch_kwargs"], **THREE_STAGES, **arch_kwargs}
    kwargs = {key: value for key, value in kwargs.items() if key not in without}
    return {**entry, "network_class_name": f"{UNETS}.{name}", "arch_kwargs": kwargs}


def resenc(**arch_kwargs):
    return unet("ResidualEncoderUNet", ["n_conv_per_stage"], n_blocks_per_stage=[1, 1, 1], **arch_kwargs)


BACKBONES = {
    "PlainConvUNet": (unet("PlainConvUNet"), 8, 2),
    "ResidualEncoderUNet": (resenc(), 8, 2),
    "MedNeXt": (MEDNEXT, 8, 3),
    "SwinUNETR": (SWIN, 32, None),
    "Primus": (PRIMUS, 16, None),
    "one convolution": (architecture("OneConvolution"), 8, None),
    "PlainConvUNet of two stages": (make_configuration()["architecture"], 8, None),
}
"""Architecture, patch size and number of scales of the deep supervision."""


def plans_with(architecture, patch=8, **nmsw):
    plans = make_plans((patch,) * 3, **nmsw)
    plans["configurations"][CONFIGURATION]["architecture"] = copy.deepcopy(architecture)
    return plans


def settings(architecture, patch=8, **nmsw):
    return settings_of(plans_with(architecture, patch, **nmsw)["configurations"][CONFIGURATION])


def build(plans, deep_supervision=False):
    manager = PlansManager(plans)
    network = nnUNetTrainerNMSW.build_network_architecture(
        manager, manager.get_configuration(CONFIGURATION), 1, 3, deep_supervision
    )
    assert isinstance(network, NMSWNetwork)
    return network
