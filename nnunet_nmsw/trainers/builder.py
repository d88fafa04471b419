"""The method by which nnU-Net has a trainer class build its network, in training and at inference."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_nmsw.model.context import Context
from nnunet_nmsw.model.network import Parts, build_network
from nnunet_nmsw.model.plans import settings_of


def network_builder(
    parts: Parts | None = None, freeze_local_branch: bool = False, context: type[Context] = Context
) -> Any:
    """A static method `build_network_architecture` for a trainer class.

    Args:
        parts: sampler and fusion; ours, by the settings in the plans, where None.
        freeze_local_branch: train all but the local branch.
        context: how the local branch is told of the whole volume, in the place of how `parts` tell it.
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
        own = parts or Parts.of(settings_of(configuration_manager.configuration))
        own = own if context is Context else own._replace(context=context)
        network = build_network(configuration_manager, channels, enable_deep_supervision, own)
        if freeze_local_branch:
            network.freeze_local_branch()
        return network

    return staticmethod(build_network_architecture)
