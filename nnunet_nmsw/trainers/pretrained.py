"""Weights to start from: nnU-Net's flag `-pretrained_weights` for a network of two branches.

nnU-Net's own loading wants every weight of the network in the checkpoint, which a stock model's does not have. It never
takes segmentation layers, without which a frozen branch is worth nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.network import NMSWNetwork

LOCAL_BRANCH = "local_branch."
SEGMENTATION_LAYERS = ".seg_layers."
"""What names the layers that nnU-Net does not take from a pretrained model."""

SOURCE_FILE = "local_branch.json"
"""In the folder of a retrofit's fold: which checkpoint the local branch is from."""

MOST_NAMED = 3
"""An error names so many layers that differ."""


def load_pretrained(network: NMSWNetwork, weights: Mapping[str, Tensor], source: str) -> None:
    """Load what nnU-Net would of a pretrained model: all but the segmentation layers and what depends on classes.

    Args:
        network: an NMSW network. A stock model's weights go into its local branch, an NMSW model's into both branches.
        weights: of a stock or an NMSW model.
        source: for the message.

    Raises:
        UserError: a layer is missing or has another shape.
    """
    parts: dict[str, nn.Module] = {LOCAL_BRANCH: network.local_branch}
    if any(name.startswith(LOCAL_BRANCH) for name in weights):
        parts["global_branch."] = network.global_branch
    for prefix, part in parts.items():
        here = part.state_dict()
        of_part = _local_weights(network, weights) if prefix == LOCAL_BRANCH else _without_prefix(weights, prefix)
        # The global branch's last layer has a channel for each class, too, and those of the context.
        taken = {name: of_part.get(name) for name in here if SEGMENTATION_LAYERS not in name}
        _check_fit({name: here[name] for name in taken}, taken, source)
        part.load_state_dict({**here, **taken})


def load_local_branch(network: NMSWNetwork, weights: Mapping[str, Tensor], source: str) -> None:
    """Load all of the local branch, segmentation layers included.

    Args:
        network: an NMSW network.
        weights: of a stock model, or of an NMSW model, whose local branch is taken.
        source: for the message.

    Raises:
        UserError: a layer is missing, has another shape, or is not in the network.
    """
    here, there = network.local_branch.state_dict(), _local_weights(network, weights)
    _check_fit(here, there, source)
    network.local_branch.load_state_dict(there)


def check_same_task(
    checkpoint: Mapping[str, Any], plans: PlansManager, configuration: str, labels: Mapping[str, Any], source: str
) -> None:
    """See that a model's patch predictions mean the same here: labels, spacing, and normalisation.

    Raises:
        UserError: one of them differs.
    """
    arguments = checkpoint["init_args"]
    theirs = PlansManager(arguments["plans"]).get_configuration(arguments["configuration"]).configuration
    ours = plans.get_configuration(configuration).configuration
    pairs = {"labels": (arguments["dataset_json"]["labels"], labels)}
    pairs |= {key: (theirs[key], ours[key]) for key in ("spacing", "normalization_schemes")}
    for what, (there, here) in pairs.items():
        if there != here:
            raise UserError(f"{source} was trained with other {what.replace('_', ' ')}: {there}, here they are {here}")


def _local_weights(network: NMSWNetwork, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a stock model all, of an NMSW model the local branch's.

    Where layers of the network take context and these were trained without, their weights for it are 0.
    """
    there, here = _without_prefix(weights, LOCAL_BRANCH) or dict(weights), network.local_branch.state_dict()
    if network.context is None:
        return there
    images, context = network.context.num_image_channels, network.context.num_channels
    for name, weight in there.items():
        before, *shape = weight.shape[1:] or (0,)
        if before == images and name in here and here[name].shape[1:] == (images + context, *shape):
            there[name] = torch.cat([weight, weight.new_zeros(len(weight), context, *shape)], 1)
    return there


def _without_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _check_fit(here: Mapping[str, Tensor], there: Mapping[str, Tensor | None], source: str) -> None:
    differences = []
    for name in sorted({*here, *there}):
        shapes = [_shape(weights.get(name)) for weights in (there, here)]
        if shapes[0] != shapes[1]:
            differences.append(f"{name} ({shapes[0]} there, {shapes[1]} here)")
    if differences:
        named, more = ", ".join(differences[:MOST_NAMED]), len(differences) - MOST_NAMED
        and_more = f" and {more} more" if more > 0 else ""
        raise UserError(f"{source} does not fit the network of these plans; layers that differ: {named}{and_more}")


def _shape(weight: Tensor | None) -> str:
    return "missing" if weight is None else "×".join(map(str, weight.shape)) or "scalar"
