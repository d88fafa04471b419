"""The method by which nnU-Net has a trainer class build its network, in training and at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_nmsw.model.network import Parts, build_network
from nnunet_nmsw.settings import NMSWSettings


def network_builder(parts_of: Callable[[NMSWSettings], Parts] = Parts.of, freeze_local_branch: bool = False) -> Any:
    """A static method `build_network_architecture` for a trainer class.

    Args:
        parts_of: what is made of the settings.
        freeze_local_branch: train all but the local branch.
    """

    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Both branches, from the plans' architecture and their settings under `nmsw`."""
        channels = (num_input_channels, num_output_channels)
        network = build_network(configuration_manager, channels, enable_deep_supervision, parts_of)
        if freeze_local_branch:
            network.freeze_local_branch()
        return network

    return staticmethod(build_network_architecture)
