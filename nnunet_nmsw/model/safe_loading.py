"""Checkpoints and plans that others made: loaded without running their code, and refused where they are damaged."""

from __future__ import annotations

import os
import pickle
import pydoc
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.flags import TRUST_FLAG
from nnunet_nmsw.model.architecture import ARCHITECTURE_KEYS

SAFE_MODULES = ("torch.nn", "dynamic_network_architectures", "monai.networks", "nnunet_nmsw")
"""What plans may name networks and layers from, with the modules within."""


def safe_classes() -> list[Any]:
    """What a checkpoint may be made of beside tensors and plain Python: scalars of NumPy, in which nnU-Net logs."""
    multiarray: Any = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    types = [np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")]
    # NumPy 1 and 2 have the same function under two names.
    names = [(multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [np.dtype, *{type(dtype) for dtype in types}, *names]


@contextmanager
def loading(trust: bool) -> Iterator[None]:
    """Inside, every `torch.load`, nnU-Net's included, unpickles nothing but tensors and `safe_classes`.

    The environment of the process says so to PyTorch, so one thread at a time is inside.

    Args:
        trust: load as nnU-Net does instead, which runs whatever code a checkpoint holds.
    """
    if trust:
        yield
        return
    with _one_at_a_time, _only_safe_classes():
        before = {name: os.environ.pop(name, None) for name in (FORCE_SAFE, FORCE_UNSAFE)}
        os.environ[FORCE_SAFE] = "1"
        try:
            yield
        finally:
            os.environ.pop(FORCE_SAFE, None)
            os.environ.update({name: value for name, value in before.items() if value is not None})


FORCE_SAFE, FORCE_UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Variables by which PyTorch overrules the argument `weights_only`; both at once are an error."""

_one_at_a_time = threading.RLock()


@contextmanager
def _only_safe_classes() -> Iterator[None]:
    """Allow `safe_classes` beside those that the application has allowed itself."""
    allowed = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals(safe_classes()):
        yield
    torch.serialization.add_safe_globals(allowed)  # leaving removes ours, be they the application's or not


def read_checkpoint(file: Path, trust: bool = False, mmap: bool = False, training: bool = False) -> dict[str, Any]:
    """A checkpoint of nnU-Net, on the host, with all of its bytes checked.

    Args:
        file: to read.
        trust: see `loading`.
        mmap: leave tensors on the disk, for a look at the rest.
        training: it is read by a training, whose command has other flags.

    Raises:
        UserError: it cannot be read, is damaged, would run code, or is no checkpoint of nnU-Net.
    """
    is_archive = check_archive(file)
    try:
        with loading(trust):
            checkpoint = torch.load(
                file, map_location="cpu", weights_only=not trust, mmap=(mmap and is_archive) or None
            )
    except Exception as error:  # whatever it is, it is about the file
        raise UserError(explained(file, error, training)) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), dict):
        raise UserError(f"{file} is no checkpoint of nnU-Net: it has no network_weights")
    weights = checkpoint["network_weights"]
    if not mmap:
        check_finite(weights, file)
    return checkpoint


def configuration_of(checkpoint: Mapping[str, Any], file: Path) -> str:
    """The name of the configuration that a checkpoint was trained with.

    Raises:
        UserError: it does not tell, or does not tell its trainer, as nnU-Net's checkpoints do.
    """
    arguments = checkpoint.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, dict) else None
    for key, value in (("init_args.configuration", name), ("trainer_name", checkpoint.get("trainer_name"))):
        if not isinstance(value, str):
            raise UserError(f"{file} is no checkpoint of nnU-Net: it has no {key}")
    assert isinstance(name, str)
    return name


def check_archive(file: Path) -> bool:
    """See that each part of a checkpoint has the checksum that it was written with; PyTorch does not look.

    Returns:
        Whether it has such parts: files of before PyTorch 1.6 do not.

    Raises:
        UserError: it is damaged or cut off.
    """
    try:
        is_archive = zipfile.is_zipfile(file)
        with file.open("rb") as opened:
            is_part = opened.read(2) == b"PK" and not is_archive
        damaged = None
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or reason(error)}") from error
    except Exception as error:  # of the archive's directory, where bytes are wrong
        raise UserError(f"{file} is damaged ({reason(error)}); copy it again") from error
    if is_part:
        raise UserError(f"{file} is cut off: copy it again, or take another checkpoint")
    if damaged is not None:
        raise UserError(f"{file} is damaged: {damaged} in it has a wrong checksum; copy it again")
    return is_archive


def check_finite(weights: Mapping[str, Any], file: Path) -> None:
    """See that a network's weights are numbers.

    Raises:
        UserError: one of them is not.
    """
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise UserError(f"{file} is no checkpoint of nnU-Net: its weight {name} is no tensor")
        if weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(
                f"{file} holds weights that are no numbers ({name}), as a training that diverged leaves them: train "
                "anew, or take another checkpoint"
            )


def explained(file: Path, error: Exception, training: bool = False) -> str:
    """Why a checkpoint cannot be loaded, in one line, and what to do."""
    text = str(error)
    remedy = f"give {TRUST_FLAG} if you trust who made it"
    if training:
        remedy = "if you made it, save its network_weights again without the rest"
    if isinstance(error, pickle.UnpicklingError):
        unsafe = re.search(r"(?:GLOBAL|global) `?([\w.]+)`?", text)
        if unsafe and "weights_only" in text.lower().replace(" ", "_"):
            return f"{file} holds {unsafe[1]}, which no model needs and which may run code: {remedy}"
        what = " ".join(text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].split())
        return f"{file} cannot be loaded without running code ({what}): {remedy}"
    if isinstance(error, ImportError | AttributeError):
        return f"{file} needs code that is not there: {reason(error)}"
    if isinstance(error, RuntimeError | OSError):
        return f"cannot load {file}: {reason(error)}"
    return f"{file} is no checkpoint of PyTorch: copy it again, or take another checkpoint"


def check_origin(architecture: Mapping[str, Any], where: str) -> None:
    """See that an architecture of plans names networks and layers of `SAFE_MODULES` alone. Imports nothing else.

    Args:
        architecture: the entry, with any of nnU-Net's keys for it.
        where: it stands, for the message.

    Raises:
        UserError: it names something else.
    """
    name_key, kwargs_key, imports_key = ARCHITECTURE_KEYS
    kwargs = architecture.get(kwargs_key) or {}
    names = {name_key: architecture.get(name_key)}
    names |= {key: kwargs.get(key) for key in architecture.get(imports_key) or ()}
    for key, name in names.items():
        if name is None:
            continue
        is_network = key == name_key
        if not isinstance(name, str) or not _is_safe(name, is_network):
            raise UserError(
                f"{where}: {key} is {name!r}, and a model may name {'networks' if is_network else 'layers'} of "
                f"{', '.join(SAFE_MODULES)} only: give {TRUST_FLAG} if you trust who made it"
            )


def _is_safe(name: str, is_network: bool) -> bool:
    if not _within(name, SAFE_MODULES):
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return True  # of a module of ours or of a library; building the network says why
    if found is None:
        # nnU-Net looks for networks that have moved in dynamic_network_architectures; a layer ends in its own error.
        return True
    # A module can hold others, `os` for example: what counts is where the class was made.
    module = getattr(found, "__module__", None) or ""
    if not _within(module, SAFE_MODULES):
        return False
    is_module = isinstance(found, type) and issubclass(found, nn.Module)
    return is_module or (is_network and callable(found) and _within(module, ("nnunet_nmsw.backbones",)))


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)
