"""A tiny architecture and plans, for tests that need a network but no training."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.trainers import (
    nnUNetTrainerNMSW,
    nnUNetTrainerNMSW_paper,
    nnUNetTrainerNMSW_retrofit_context,
)

DATASET_JSON = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1, "lesion": 2},
    "numTraining": 5,
    "file_ending": ".nii.gz",
}


def make_configuration(patch_size: tuple[int, ...] = (8, 8, 8), **nmsw: Any) -> dict[str, Any]:
    """A 3D configuration of a plans file with a network of two stages."""
    return {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": [24.0] * len(patch_size),
        "spacing": [1.0] * len(patch_size),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * 2,
                "strides": [[1, 1, 1], [2, 2, 2]],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
        **({"nmsw": nmsw} if nmsw else {}),
    }


def make_plans(patch_size: tuple[int, ...] = (8, 8, 8), **nmsw: Any) -> dict[str, Any]:
    """Plans with one configuration, 3d_fullres."""
    return {
        "dataset_name": "Dataset998_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 0.0, "std": 1.0, "percentile_00_5": -3.0, "percentile_99_5": 3.0}
        },
        "configurations": {"3d_fullres": make_configuration(patch_size, **nmsw)},
    }


def build_network(
    patch_size: tuple[int, ...] = (8, 8, 8),
    num_classes: int = 3,
    deep_supervision: bool = False,
    trainer: type[nnUNetTrainerNMSW] = nnUNetTrainerNMSW,
    num_input_channels: int = 1,
    **nmsw: Any,
) -> NMSWNetwork:
    """The network that the trainer builds from `make_plans`."""
    torch.manual_seed(0)
    plans_manager = PlansManager(make_plans(patch_size, **nmsw))
    network = trainer.build_network_architecture(
        plans_manager,
        plans_manager.get_configuration("3d_fullres"),
        num_input_channels,
        num_classes,
        deep_supervision,
    )
    assert isinstance(network, NMSWNetwork)
    return network


def build_paper_network(patch_size: tuple[int, ...] = (8, 8, 8), **nmsw: Any) -> NMSWNetwork:
    """The network of the paper's method."""
    return build_network(patch_size, trainer=nnUNetTrainerNMSW_paper, **nmsw)


def build_retrofit_network(patch_size: tuple[int, ...] = (8, 8, 8), **nmsw: Any) -> NMSWNetwork:
    """The network of a retrofit with context."""
    return build_network(patch_size, trainer=nnUNetTrainerNMSW_retrofit_context, **nmsw)


def make_trainer(plans: dict[str, Any]) -> nnUNetTrainerNMSW:
    """A trainer of plans, in the folders of the fixture `folders`."""
    arguments = ({**plans, "continue_training": False}, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    return nnUNetTrainerNMSW(*arguments)


def initialized(predictor: nnUNetPredictor, network: torch.nn.Module, folds: int = 1) -> nnUNetPredictor:
    """Give a predictor a network and the tiny plans; further folds have slightly different weights."""
    plans = PlansManager(make_plans())
    parameters = [{name: value + 0.01 * fold for name, value in network.state_dict().items()} for fold in range(folds)]
    predictor.manual_initialization(
        network, plans, plans.get_configuration("3d_fullres"), parameters, DATASET_JSON, "nnUNetTrainerNMSW", (0, 1, 2)
    )
    return predictor
