"""Stand-ins for the two libraries of CUDA that PyTorch asks about devices, streams and contexts.

PyTorch's autograd asks for the stream of a device before it computes a gradient there. These stand-ins answer that
there is one device, whose streams have nothing left to do.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import torch

UNKNOWN_ERROR, SUCCESS = 999, 0

DRIVER = {
    "cuDevicePrimaryCtxGetState": "(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }",
    **dict.fromkeys(
        [
            "cuCtxGetCurrent",
            "cuCtxSetCurrent",
            "cuDeviceGet",
            "cuDeviceGetAttribute",
            "cuDevicePrimaryCtxRetain",
            "cuFuncGetAttribute",
            "cuFuncSetAttribute",
            "cuFuncSetCacheConfig",
            "cuGetErrorString",
            "cuLaunchCooperativeKernel",
            "cuLaunchKernel",
            "cuLinkAddData_v2",
            "cuLinkComplete",
            "cuLinkCreate_v2",
            "cuModuleGetFunction",
            "cuModuleLoad",
            "cuModuleLoadData",
            "cuModuleLoadDataEx",
            "cuModuleUnload",
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            "cuPointerGetAttribute",
            "cuTensorMapEncodeTiled",
        ],
        f"(void) {{ return {UNKNOWN_ERROR}; }}",
    ),
}
"""Functions of libcuda, by name."""

RUNTIME = {
    "cudaGetDeviceCount": "(int *number) { *number = 1; return 0; }",
    "cudaGetDevice": "(int *device) { *device = 0; return 0; }",
    "cudaDeviceGetStreamPriorityRange": "(int *least, int *greatest) { *least = 0; *greatest = -1; return 0; }",
    "cudaStreamCreateWithPriority": "(void **stream, unsigned flags, int p) { *stream = (void *)8; return 0; }",
    "cudaEventCreateWithFlags": "(void **event, unsigned flags) { *event = (void *)8; return 0; }",
    "cudaStreamIsCapturing": "(void *stream, int *capturing) { *capturing = 0; return 0; }",
    **dict.fromkeys(
        [
            "cudaDeviceSynchronize",
            "cudaEventDestroy",
            "cudaEventQuery",
            "cudaEventRecord",
            "cudaEventRecordWithFlags",
            "cudaEventSynchronize",
            "cudaGetLastError",
            "cudaPeekAtLastError",
            "cudaSetDevice",
            "cudaStreamQuery",
            "cudaStreamSynchronize",
            "cudaStreamWaitEvent",
            "cudaThreadExchangeStreamCaptureMode",
        ],
        f"(void) {{ return {SUCCESS}; }}",
    ),
}
"""Functions of libcudart, by name."""


def environment(folder: Path) -> dict[str, str]:
    """Variables of the environment with which a new process sees the stand-ins. Needs Linux and a C compiler, `cc`.

    Args:
        folder: where the stand-ins are built.
    """
    driver, runtime, versions = folder / "libcuda.so.1", folder / "runtime.so", folder / "runtime.map"
    major = str(torch.version.cuda).split(".")[0]
    versions.write_text(f"libcudart.so.{major} {{ global: {'; '.join(RUNTIME)}; }};\n")
    _compile(DRIVER, driver, "-Wl,-soname,libcuda.so.1")
    _compile(RUNTIME, runtime, f"-Wl,--version-script={versions}")
    site = Path(sysconfig.get_paths()["purelib"])
    compiler = next((str(file.parent) for file in site.glob("nvidia/**/libnvrtc.so*")), "")
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{compiler}", "LD_PRELOAD": str(runtime)}


def _compile(functions: dict[str, str], target: Path, *flags: str) -> None:
    source = "\n".join(f"int {name}{rest}" for name, rest in functions.items())
    command = ["cc", "-w", "-shared", "-fPIC", *flags, "-x", "c", "-", "-o", target]
    subprocess.run(command, input=source.encode(), check=True)
