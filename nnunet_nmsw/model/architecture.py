"""The architectures of the two branches, in the form in which nnU-Net's plans hold an architecture.

Such an entry is a dictionary of `network_class_name`, `arch_kwargs` (arguments of the class) and `_kw_requires_import`
(those of them that name something to import).
"""

from __future__ import annotations

import inspect
import math
import pydoc
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import dynamic_network_architectures
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_nmsw.errors import UserError, reason

ARCHITECTURE_KEYS = ("network_class_name", "arch_kwargs", "_kw_requires_import")

FIXED_SIZE_ARGUMENTS = ("input_shape", "img_size")
"""Arguments of networks that take volumes of one size only: dynamic_network_architectures' and MONAI's transformers."""

MIN_FEATURE_MAP_SIZE = 4
MIN_FEATURES, MAX_FEATURES = 32, 320
CONVOLUTIONS_PER_STAGE = 2
"""As in nnU-Net's `ExperimentPlanner` for 3D."""


def global_architecture(local: dict[str, Any], setting: dict[str, Any] | None, width: float) -> dict[str, Any]:
    """Architecture of the global branch.

    Args:
        local: that of the plans.
        setting: `global_architecture` of the settings. Where it names another class it stands alone, else what it has
            replaces single arguments of the plans'.
        width: features per stage relative to the plans'.
    """
    setting = setting or {}
    name = setting.get("network_class_name", local["network_class_name"])
    kwargs = deepcopy(setting.get("arch_kwargs", {}))
    if name == local["network_class_name"]:
        kwargs = {**_narrowed(local["arch_kwargs"], width), **kwargs}
    imports = [key for key in local["_kw_requires_import"] if key in kwargs]
    return dict(zip(ARCHITECTURE_KEYS, (name, kwargs, setting.get("_kw_requires_import", imports)), strict=True))


def _narrowed(arch_kwargs: dict[str, Any], width: float) -> dict[str, Any]:
    """The arguments with fewer features, for every class that has them by stage as nnU-Net's U-Nets."""
    narrow = deepcopy(arch_kwargs)
    if "features_per_stage" in narrow:
        narrow["features_per_stage"] = [max(1, round(features * width)) for features in narrow["features_per_stage"]]
    return narrow


def takes_one_size(architecture: dict[str, Any]) -> bool:
    """Whether the network is built for volumes of one size, as transformers with a position embedding are."""
    return any(name in architecture["arch_kwargs"] for name in FIXED_SIZE_ARGUMENTS)


def convolutional_architecture(
    median_shape: Sequence[float], spacing: Sequence[float], downsampling_factor: Sequence[int], width: float
) -> dict[str, Any]:
    """A `PlainConvUNet` that nnU-Net would plan for the downsampled median volume.

    Args:
        median_shape: voxels by axis, before downsampling.
        spacing: mm by axis, before downsampling.
        downsampling_factor: by axis.
        width: features per stage relative to nnU-Net's.
    """
    low_spacing = [s * f for s, f in zip(spacing, downsampling_factor, strict=True)]
    # At least so large that there are two stages.
    low_shape = [
        max(2 * MIN_FEATURE_MAP_SIZE, math.ceil(n / f)) for n, f in zip(median_shape, downsampling_factor, strict=True)
    ]
    _, strides, kernels, _, _ = get_pool_and_conv_props(low_spacing, low_shape, MIN_FEATURE_MAP_SIZE, math.inf)
    stages = len(strides)
    features = [min(MAX_FEATURES, MIN_FEATURES * 2**stage) for stage in range(stages)]
    arch_kwargs = {
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "strides": [list(stride) for stride in strides],
        "n_conv_per_stage": [CONVOLUTIONS_PER_STAGE] * stages,
        "n_conv_per_stage_decoder": [CONVOLUTIONS_PER_STAGE] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": _narrowed(arch_kwargs, width),
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def check_local_architecture(local: dict[str, Any], patch_size: Sequence[int]) -> None:
    """See that the plans' `architecture` is complete, and that a network of one size is one for the patches.

    Raises:
        UserError: it is not, or the network's own patches do not divide these.
    """
    missing = [key for key in ARCHITECTURE_KEYS if key not in local]
    if missing:
        raise UserError(f'"architecture" in the plans has no "{missing[0]}", which nnU-Net needs: add it')
    kwargs = local["arch_kwargs"]
    for name in FIXED_SIZE_ARGUMENTS:
        if name in kwargs and list(kwargs[name]) != list(patch_size):
            raise UserError(
                f'"{name}" in the plans\' arch_kwargs is {kwargs[name]} and "patch_size" is {list(patch_size)}: '
                "make them the same"
            )
    embedded = kwargs.get("patch_embed_size")
    if embedded is not None and any(n % e for n, e in zip(patch_size, embedded, strict=True)):
        raise UserError(
            f'"patch_size" in the plans is {list(patch_size)} and no multiple of "patch_embed_size" {embedded} in '
            "arch_kwargs: change one of them"
        )


def check_architecture(architecture: dict[str, Any], where: str) -> None:
    """See that nnU-Net could build a network, without doing it.

    Args:
        architecture: the entry.
        where: it stands, for the message.

    Raises:
        UserError: the class or something its arguments name cannot be imported, or the arguments are not the class's.
    """
    name, kwargs, imports = (architecture[key] for key in ARCHITECTURE_KEYS)
    network_class = find_network_class(name, where)
    for key in imports:
        if key not in kwargs:
            raise UserError(f'{where}: "_kw_requires_import" has "{key}", which "arch_kwargs" has not: remove it')
        if kwargs[key] is not None and pydoc.locate(kwargs[key]) is None:
            raise UserError(f'{where}: "{key}" in "arch_kwargs" is {kwargs[key]}, which cannot be imported')
    allowed = _constructor_arguments(network_class)
    given = ("input_channels", "num_classes", "deep_supervision")
    unknown = [key for key in kwargs if key in given[:2] or (allowed is not None and key not in allowed)]
    if unknown:
        others = "" if allowed is None else f"; allowed: {', '.join(a for a in allowed if a not in given)}"
        raise UserError(f'{where}: {name} takes no "{unknown[0]}" in "arch_kwargs"{others}')
    try:
        names = given if takes_deep_supervision(architecture) else given[:2]
        inspect.signature(network_class).bind(**{**kwargs, **dict.fromkeys(names)})
    except TypeError as error:
        raise UserError(
            f"{where}: nnU-Net gives input_channels, num_classes and arch_kwargs to a network, and {name} cannot be "
            f"built from them: {reason(error)}"
        ) from error


def takes_deep_supervision(architecture: dict[str, Any]) -> bool:
    """Whether the class has the argument `deep_supervision`, which nnU-Net gives to its own networks."""
    allowed = _constructor_arguments(find_network_class(architecture["network_class_name"], "plans"))
    return allowed is None or "deep_supervision" in allowed


def find_network_class(name: str, where: str) -> Callable[..., Any]:
    """The class of this name, found as nnU-Net finds it. A function that returns a network will do, too.

    Args:
        name: with its module.
        where: the name stands, for the message.

    Raises:
        UserError: there is none, or its module cannot be imported.
    """
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        if isinstance(error.value, UserError):
            raise error.value from error
        raise UserError(f'{where}: "{name}" cannot be imported: {reason(error.value or error)}') from error
    if found is None:
        # nnU-Net looks here for classes that have moved.
        package = "dynamic_network_architectures.architectures"
        folder = str(Path(dynamic_network_architectures.__path__[0], "architectures"))
        found = recursive_find_python_class(folder, name.split(".")[-1], package)
    if not callable(found):
        raise UserError(
            f'{where}: there is no network class "{name}": give module and class, as in '
            "dynamic_network_architectures.architectures.unet.PlainConvUNet"
        )
    return found


def _constructor_arguments(network_class: Callable[..., Any]) -> list[str] | None:
    """Names of the arguments, with those of base classes that keywords are passed on to; None where any will do."""
    names: list[str] = []
    constructors = [network_class]
    if isinstance(network_class, type):
        bases = [base for base in network_class.__mro__ if not base.__module__.startswith("torch.nn.")]
        constructors = [vars(base)["__init__"] for base in bases if "__init__" in vars(base) and base is not object]
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            return [name for name in dict.fromkeys(names) if name != "self"]
    return None
