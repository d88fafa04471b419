"""Branches that OpenVINO computes on a CPU, converted from PyTorch's weights or quantised: the extra `openvino`.

Tensor suffixes: B batch, C channels, D H W axes of the input.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_nmsw.errors import UserError, reason
from nnunet_nmsw.flags import AUTO, BACKENDS, BFLOAT16, INT8, OPENVINO, PRECISIONS, PYTORCH
from nnunet_nmsw.inference.device import lacks_bfloat16
from nnunet_nmsw.inference.openvino_models import (
    IMPOSSIBLE,
    Converted,
    Shape,
    cache_folder,
    import_openvino,
    is_installed,
)
from nnunet_nmsw.inference.quantized import find_quantized, read_quantized
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.strides import total_stride

MOST_PROGRAMS = 4
"""Compiled for different sizes and kept."""


@dataclasses.dataclass(frozen=True)
class OpenVINO:
    """Lets OpenVINO compute the branches of a network, which keeps its fusion and context.

    Attributes:
        bfloat16: compute in it.
        cache: folder of converted branches; `cache_folder` where None.
        int8: take local branches that were quantised.
        quantized: their folders, see `find_quantized`.
    """

    bfloat16: bool = False
    cache: Path | None = None
    int8: bool = False
    quantized: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    def of_folder(self, folder: Path, folds: Sequence[int | str], parameters: Sequence[dict[str, Any]]) -> OpenVINO:
        """The same, for folds of the model in a folder, and their weights.

        Raises:
            UserError: the model was not quantised.
        """
        if not self.int8:
            return self
        return dataclasses.replace(self, quantized=find_quantized(folder, folds, parameters))

    def __call__(self, network: NMSWNetwork) -> NMSWNetwork:
        """Replace the branches of a network.

        Raises:
            UserError: its local branch was not quantised.
        """
        local = read_quantized(self.quantized, network.local_branch) if self.int8 else None
        for name, model in (("global_branch", None), ("local_branch", local)):
            setattr(network, name, self.branch(getattr(network, name), model))
        return network

    def branch(self, network: nn.Module, model: Any = None) -> OpenVINOBranch:
        """A network with one output, as OpenVINO computes it; see `OpenVINOBranch`."""
        return OpenVINOBranch(network, self.bfloat16, self.cache or cache_folder(), model)


class StockNetwork(nn.Module):
    """A network of nnU-Net's predictor, as OpenVINO computes it with the weights that were loaded last.

    Args:
        network: without deep supervision.
        backend: that computes it.
    """

    def __init__(self, network: nn.Module, backend: OpenVINO) -> None:
        super().__init__()
        self._network, self._backend = (network,), backend  # not a submodule, see `OpenVINOBranch`
        self._of_folds: dict[int, tuple[Any, OpenVINOBranch]] = {}
        self._branch: OpenVINOBranch | None = None

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See the parent. Each fold's weights are converted once; nnU-Net loads them for each case."""
        (network,) = self._network
        if id(state_dict) not in self._of_folds:
            of_fold = copy.deepcopy(network)
            of_fold.load_state_dict(state_dict, *args, **kwargs)
            # Weights that are kept have a number that no others get.
            self._of_folds[id(state_dict)] = state_dict, self._backend.branch(of_fold.eval())
        _, self._branch = self._of_folds[id(state_dict)]

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Logits."""
        assert self._branch is not None
        logits: Tensor = self._branch(x_BCDHW)
        return logits


def backend_named(name: str, precision: str, device: torch.device) -> OpenVINO | None:
    """What replaces what computes a network; None for PyTorch.

    Args:
        name: one of `BACKENDS`.
        precision: one of `PRECISIONS`.
        device: to compute on.

    Raises:
        UserError: there is no such backend or precision, not on this device, or it is not installed; or the processor
            does not have the precision.
    """
    for what, given, known in (("backend", name, BACKENDS), ("precision", precision, PRECISIONS)):
        if given not in known:
            raise UserError(f"{what} is {given!r}: give one of {', '.join(known)}")
    if name == AUTO:
        name = OPENVINO if device.type == "cpu" and (is_installed() or precision == INT8) else PYTORCH
    if name == PYTORCH:
        if precision == INT8:
            raise UserError("precision int8 is for backend openvino, on the device cpu")
        if precision == BFLOAT16 and device.type == "cpu" and lacks_bfloat16():
            print("precision bfloat16: this processor does not have it, and is slower with it than with float32")
        return None
    if device.type != "cpu":
        raise UserError(f"backend openvino is for the device cpu, and this is {device.type}: leave it out there")
    openvino = import_openvino()
    has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == BFLOAT16 and not has_bfloat16:
        raise UserError("precision bfloat16: this processor does not have it; compute in float32")
    # What stays floating in a quantised network takes the faster of the two.
    return OpenVINO(precision == BFLOAT16 or (precision == INT8 and has_bfloat16), int8=precision == INT8)


class OpenVINOBranch(nn.Module):
    """A branch as OpenVINO computes it; as PyTorch does where it cannot be converted, which is said in one line.

    Called as the branch is: float32 of shape B, C, D, H, W in, logits of shape B, classes, D, H, W out.

    Args:
        branch: in evaluation mode, with one output.
        bfloat16: compute in it.
        cache: folder of converted branches.
        model: of OpenVINO, for inputs of any number of patches, in the place of a conversion.
    """

    def __init__(self, branch: nn.Module, bfloat16: bool, cache: Path, model: Any = None) -> None:
        super().__init__()
        self.total_stride = total_stride(branch)
        self._branch = (branch,)  # not a submodule: its weights are no longer this network's
        self._converted = Converted(branch, cache, model)
        self._precision = "bf16" if bfloat16 else "f32"
        self._is_refused = False
        self._programs: OrderedDict[Shape | None, Any] = OrderedDict()

    @torch.no_grad()
    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Logits."""
        program = None if self._is_refused else self._program(tuple(x_BCDHW.shape))
        if program is not None:
            found: np.ndarray = program(x_BCDHW.detach().float().contiguous().numpy())[0]
            return torch.from_numpy(found.copy())  # the next call writes there
        (branch,) = self._branch
        with torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16"):
            logits: Tensor = branch(x_BCDHW)
        return logits

    def _program(self, shape: Shape) -> Any:
        """The branch compiled for inputs of this shape; None where it cannot be."""
        try:
            key = None if self._converted.is_free(shape[1]) else shape
            if key not in self._programs:
                self._programs[key] = self._compiled(self._converted.model(shape))
        except IMPOSSIBLE as error:
            self._is_refused = True
            (branch,) = self._branch
            print(f"OpenVINO does not take {type(branch).__name__} ({reason(error)}); PyTorch computes it")
            return None
        self._programs.move_to_end(key)
        if len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return self._programs[key]

    def _compiled(self, model: Any) -> Any:
        settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return import_openvino().Core().compile_model(model, "CPU", settings)
