"""Branches as models of OpenVINO, converted from PyTorch's and kept in a cache on the disk.

A branch is converted once, with free batch and volume axes where it still gives PyTorch's results at other sizes. A
branch whose layers depend on the size is converted for each size of its input.

Tensor suffixes: B batch, C channels, D H W axes of the input.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.files import remove_leftovers, written_whole
from nnunet_nmsw.inference.device import is_out_of_memory
from nnunet_nmsw.model.strides import UNKNOWN_STRIDE, total_stride
from nnunet_nmsw.model.weights import digest_of_weights

MODEL, WEIGHTS, DIGEST = "model.xml", "model.bin", "sha256"
"""Files of a branch in the cache. The last is there when all are."""

FIXED = "sizes are fixed"
"""In the place of the digest: the axes of this branch cannot be free."""

TOLERANCE = 1e-3
"""Of the largest logit: a branch that differs more from PyTorch at another size was not converted with free axes."""

MOST_SIZES = 16
"""Of a branch whose axes are fixed, in the cache."""

IMPOSSIBLE = (RuntimeError, TypeError, ValueError, AssertionError)
"""What is raised where a branch does not take a size, or OpenVINO does not take a branch."""

Shape = tuple[int, ...]


def is_installed() -> bool:
    """Whether OpenVINO is."""
    return find_spec("openvino") is not None


def import_openvino() -> Any:
    """OpenVINO, without its reports of usage.

    Raises:
        UserError: it is not installed, or does not load.
    """
    # Its Python tools tell Intel that they were imported. Without this package they tell nothing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            f"backend openvino: OpenVINO cannot be imported ({reason(error)}); "
            "install it with pip install 'nnunet-nmsw[openvino]', or take backend pytorch"
        ) from error
    return openvino


def cache_folder() -> Path:
    """Where converted branches are kept: `nnunet_nmsw/openvino` in the user's cache folder."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nnunet_nmsw" / "openvino"


class Converted:
    """A branch as models of OpenVINO: one whose axes are free, or one for each size; from the cache where they are.

    Args:
        branch: in evaluation mode.
        cache: folder of converted branches.
        free: a model that takes all sizes that are asked for, if there is one already.
    """

    def __init__(self, branch: nn.Module, cache: Path, free: Any = None) -> None:
        self.branch, self.cache = branch, cache
        self._free = free
        self._is_fixed = False

    @cached_property
    def name(self) -> str:
        """That no other branch has: a digest of layers and weights, and of the libraries' versions."""
        versions = f"{import_openvino().__version__} {torch.__version__} {self.branch}"
        return digest_of_weights(self.branch.state_dict(), versions)

    def is_free(self, channels: int) -> bool:
        """Whether one model takes all sizes.

        Args:
            channels: of the input.
        """
        if self._free is None and not self._is_fixed:
            folder = self.cache / f"{self.name}_free"
            self._is_fixed, self._free = is_known_as_fixed(folder), read(folder)
            if self._free is None and not self._is_fixed:
                print(f"OpenVINO converts {type(self.branch).__name__}, once for these weights", flush=True)
                self._free = converted_freely(self.branch, channels)
                self._is_fixed = self._free is None
                keep(self._free, folder)
        return not self._is_fixed

    def model(self, shape: Shape) -> Any:
        """For an input of this shape, or for all.

        Raises:
            RuntimeError: it cannot be converted.
        """
        if self._free is not None:
            return self._free
        folder = self.cache / f"{self.name}_{'x'.join(map(str, shape))}"
        model = read(folder)
        if model is None:
            model = converted(self.branch, shape)
            keep(model, folder)
            remove_oldest(self.cache.glob(f"{self.name}_*x*"))
        return model


def converted_freely(branch: nn.Module, channels: int) -> Any:
    """A branch as a model of OpenVINO whose batch and volume axes have any size.

    Args:
        branch: in evaluation mode.
        channels: of the input.

    Returns:
        The model; None where it does not give at two small sizes what PyTorch does.
    """
    stride = total_stride(branch) or [UNKNOWN_STRIDE] * 3
    try:
        model = converted(branch, [1, channels, *(2 * s for s in stride)], [-1, channels, -1, -1, -1])
        program = import_openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for batch, multiples in ((1, (2, 2, 2)), (2, (3, 2, 2))):
            x_BCDHW = random(batch, channels, *(m * s for m, s in zip(multiples, stride, strict=True)))
            expected = branch(x_BCDHW).numpy()
            difference = np.abs(program(x_BCDHW.numpy())[0] - expected).max()
            if not difference <= TOLERANCE * np.abs(expected).max():
                return None
    except IMPOSSIBLE as error:  # by a network of one size, or by a model of one
        if isinstance(error, RuntimeError) and is_out_of_memory(error):  # which says nothing of the network
            raise
        return None
    return model


def converted(branch: nn.Module, shape: Sequence[int], axes: Sequence[int] | None = None) -> Any:
    """A branch as a model of OpenVINO.

    Args:
        branch: in evaluation mode.
        shape: of an example of its input.
        axes: sizes of the model's input, -1 for any; those of the example where None.

    Raises:
        RuntimeError: it cannot be converted.
    """
    openvino = import_openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of sizes that become constants, which `converted_freely` sees
        sizes = list(shape if axes is None else axes)
        try:
            return openvino.convert_model(branch, example_input=random(*shape), input=sizes, verbose=False)
        except conversion_failures() as error:
            told = [line.strip("- ") for line in str(error).splitlines() if line.startswith("--")]
            raise RuntimeError(" ".join(told) or reason(error)) from error


def conversion_failures() -> tuple[type[Exception], ...]:
    """What OpenVINO raises where it does not take a network. They are no RuntimeErrors."""
    frontend = import_openvino().frontend
    return frontend.GeneralFailure, frontend.OpConversionFailure, frontend.NotImplementedFailure


def random(*shape: int) -> Tensor:
    """Always the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def keep(model: Any, folder: Path) -> None:
    """Put a model into the cache, whole or not at all. One that cannot be written is not kept.

    Args:
        model: None where axes cannot be free.
        folder: of its files.
    """
    try:
        remove_leftovers(folder.parent)
        with written_whole(folder, last=DIGEST) as unfinished:
            if model is not None:
                import_openvino().save_model(model, str(unfinished / MODEL), compress_to_fp16=False)
            (unfinished / DIGEST).write_text(FIXED if model is None else digest_of(unfinished))
    except (OSError, RuntimeError) as error:  # OpenVINO's own where it cannot open a file
        print(f"the converted network is not kept in {folder} ({reason(error)})")


def remove_oldest(folders: Iterable[Path]) -> None:
    """Keep the last `MOST_SIZES` of some folders of the cache: each has a copy of the branch's weights."""

    def age(folder: Path) -> float:
        try:
            return -folder.stat().st_mtime
        except OSError:  # another process has just removed it
            return 0.0

    for folder in sorted(folders, key=age)[MOST_SIZES:]:
        shutil.rmtree(folder, ignore_errors=True)


def is_known_as_fixed(folder: Path) -> bool:
    """Whether the cache says that the axes of a branch cannot be free."""
    return _digest_in(folder) == FIXED


def read(folder: Path) -> Any:
    """A model from the cache; None where there is none. A broken one is removed."""
    digest = _digest_in(folder)
    if digest in (None, FIXED):
        return None
    try:
        if digest == digest_of(folder):
            return import_openvino().Core().read_model(str(folder / MODEL))
    except (OSError, RuntimeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _digest_in(folder: Path) -> str | None:
    """What the cache says of a branch; None where it has none, or a cache that this user cannot read."""
    try:
        return (folder / DIGEST).read_text()
    except OSError:
        return None


def digest_of(folder: Path, names: Sequence[str] = (MODEL, WEIGHTS)) -> str:
    """SHA-256 of a model's files."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
