"""A pretended CUDA device: tensors that say `cuda:0`, hold their data on the host, and are computed there.

Autocast and dispatch follow CUDA's rules. An operation on tensors of two devices raises, as on a GPU. What a GPU would
launch and what it would wait for is counted, with the line that asks for it. There is neither speed nor memory.

Made with PyTorch 2.14, on private parts of which it leans; see `stand_ins` for those of CUDA.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

VIEWS = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "is_same_size",
    "lift_fresh",
    "narrow",
    "new_empty",
    "permute",
    "record_stream",
    "select",
    "set_",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
}
"""Operations that launch nothing."""

WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
}
"""Operations whose result the host needs before it goes on."""

INDEXING = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}
MIXING = INDEXING | {"copy_", "_to_copy", "lift_fresh"}
"""Operations that take tensors of two devices."""

MOST_STATISTICS = 4096
"""Values that a layer keeps of what it normalises."""

PACKAGES = ("nnunet_nmsw", "batchgeneratorsv2", "nnunetv2", "dynamic_network_architectures", "scenarios")
"""Whose lines are named."""

launched: Counter[str] = Counter()
"""Operations that launch a kernel, by line."""

waited: Counter[str] = Counter()
"""Waits of the host for the device, by operation and line."""


class OnDevice(Tensor):
    """A tensor that says that it is on the device.

    Args:
        data: on the host.
        requires_grad: as of any tensor.
    """

    data_: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, data: Tensor, requires_grad: bool = False) -> OnDevice:
        tensor: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )
        tensor.data_ = data
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Waits."""
        waited[f"tolist {_line()}"] += 1
        return self.data_.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Raises, as on a GPU."""
        raise TypeError(f"can't convert a CUDA tensor to numpy, at {_line()}")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class _Generator:
    """The device's generator of random numbers."""

    def __init__(self) -> None:
        self.on_host = torch.Generator()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.on_host, name)


def pretend() -> None:
    """Let PyTorch believe that there is the device, in this process and for good. Needs `stand_ins.environment`."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "is_bf16_supported": True,
        "empty_cache": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda *_: 0  # type: ignore[assignment]
    torch.cuda.mem_get_info = lambda *_: (64 << 30, 80 << 30)  # type: ignore[assignment]
    torch.cuda.default_generators = (_Generator(),)  # type: ignore[assignment]
    torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.backends.cudnn.enabled = False  # what cuDNN does is one operation here as there
    torch.autograd.set_multithreading_enabled(False)


@contextlib.contextmanager
def device() -> Iterator[None]:
    """Tensors made for CUDA are on the pretended device."""
    with _Mode():
        yield


def forget() -> None:
    """Count anew."""
    launched.clear()
    waited.clear()


def to_device(network: nn.Module) -> nn.Module:
    """Move a module, in place: `Module.to` cannot put other tensors in the place of parameters."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                on_device = OnDevice(parameter.data)
                module._parameters[name] = nn.Parameter(on_device, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return network


def _line() -> str:
    frame: Any = sys._getframe(1)
    while frame:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if any(package in file for package in PACKAGES):
            return f"{file.split('site-packages/')[-1].split('/main/')[-1]}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return "?"


_composite: dict[str, bool] = {}


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation: checked, counted, computed on the host, and its result where a GPU would have it."""
    name = function.name()
    if name not in _composite:
        _composite[name] = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    if _composite[name]:
        with device():
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    short = function._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    on_host = [x for x in tensors if not isinstance(x, OnDevice)]
    to_device = bool(ours)
    if kwargs.get("device") is not None:
        to_device = torch.device(kwargs["device"]).type == "cuda"
        if short == "_to_copy" and to_device != bool(ours) and not (to_device and kwargs.get("non_blocking")):
            waited[f"copy to the {'device' if to_device else 'host'} {_line()}"] += 1
        kwargs = {**kwargs, "device": CPU}
    if ours and on_host:
        _check_mixed(short, args, on_host)
    if ours or to_device:
        _count(short, args, to_device)
    if isinstance(kwargs.get("generator"), _Generator):
        kwargs = {**kwargs, "generator": kwargs["generator"].on_host}
    result = _on_host(function, short, *tree_map(lambda x: x.data_ if isinstance(x, OnDevice) else x, (args, kwargs)))
    if not to_device:
        return result
    same = {id(x.data_): x for x in ours}  # of operations in place

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, OnDevice):
            return x
        return same[id(x)] if id(x) in same else OnDevice(x)

    return tree_map(wrapped, result)


def _check_mixed(short: str, args: Any, on_host: list[Tensor]) -> None:
    if short == "copy_":
        if not (len(args) > 2 and args[2] and isinstance(args[0], OnDevice)):
            waited[f"copy to the {'device' if isinstance(args[0], OnDevice) else 'host'} {_line()}"] += 1
    elif short in INDEXING and isinstance(args[0], OnDevice):
        if any(x.ndim for x in on_host):
            waited[f"copy of an index {_line()}"] += 1
    elif short not in MIXING and any(x.ndim for x in on_host):  # scalars of the host are allowed
        raise RuntimeError(f"tensors of two devices in {short} at {_line()}: {[tuple(x.shape) for x in on_host]}")


def _count(short: str, args: Any, to_device: bool) -> None:
    if short in WAITING:
        waited[f"{short} {_line()}"] += 1
    if short in INDEXING:
        masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        filled = short != "index" and len(args[1]) == 1 and args[2].numel() == 1
        if masks and not filled:
            waited[f"mask as index {_line()}"] += 1
    if short not in VIEWS and (short != "_to_copy" or to_device):
        launched[_line()] += 1


def _on_host(function: Any, short: str, args: Any, kwargs: Any) -> Any:
    """An operation on the host, in single precision where it has none in half."""
    half = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dtype == torch.float16]
    if short in ("_softmax", "_log_softmax") and args[2]:
        return function(args[0].float(), args[1], False)
    if short in ("_softmax_backward_data", "_log_softmax_backward_data") and args[3] == torch.float16:
        return function(args[0].float(), args[1].float(), args[2], torch.float32).half()
    try:
        return function(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        if not half:
            raise
    single = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x, (args, kwargs))
    result = function(*single[0], **single[1])
    large = 4096  # smaller ones are statistics, which have single precision
    return tree_map(
        lambda x: x.half() if isinstance(x, Tensor) and x.numel() > large and x.is_floating_point() else x, result
    )
