"""Seconds of a patch by PyTorch and by OpenVINO, by precision, for networks of several widths on a CPU.

    python benchmarks/backends.py -o docs/performance/backends.json

nnU-Net's `PlainConvUNet` with random weights. Ways take turns; the minimum of the rounds is what other work disturbs
least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from measuring import write_results
from torch import Tensor, nn

from nnunet_nmsw.inference.openvino_branches import OpenVINOBranch
from nnunet_nmsw.inference.openvino_models import Converted, import_openvino
from nnunet_nmsw.inference.quantized import quantized
from nnunet_nmsw.model.weights import lay_out_
from nnunet_nmsw.volume.precision import mixed_precision

NETWORKS = (
    ([32, 64, 128, 256, 320, 320], 128, 1),
    ([32, 64, 128, 256, 320, 320], 96, 1),
    ([32, 64, 128, 256, 320], 64, 2),
    ([8, 16, 32, 64], 64, 2),
    ([16, 32, 64], 24, 16),
)
"""Features of the stages, voxels of a patch along an axis, patches at a time."""

CPU = torch.device("cpu")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-rounds", type=int, default=4)
    parser.add_argument("-o", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = []
    for features, patch, batch in NETWORKS:
        with tempfile.TemporaryDirectory() as cache:
            rows.append(measured(features, patch, batch, args.rounds, Path(cache)))
        print(rows[-1], flush=True)
    if args.o:
        write_results(args.o, {"rows": rows}, CPU)


def measured(features: list[int], patch: int, batch: int, rounds: int, cache: Path) -> dict[str, Any]:
    """Seconds of a patch by way, and of the conversion."""
    torch.manual_seed(0)
    network = unet(features)
    lay_out_(network, CPU)
    patches_BCDHW = torch.randn(batch, 1, *[patch] * 3)
    float32, bfloat16 = (OpenVINOBranch(network, half, cache) for half in (False, True))
    started = time.perf_counter()
    float32(patches_BCDHW)
    seconds = {"conversion, with the first patches": time.perf_counter() - started}
    started = time.perf_counter()
    OpenVINOBranch(network, False, cache)(patches_BCDHW)
    seconds["from the cache, with the first patches"] = time.perf_counter() - started
    calibrating = list(patches_BCDHW[:1].split(1))
    int8, floating_ends = (
        OpenVINOBranch(network, True, cache, quantized(network, calibrating, ends, cache)) for ends in (False, True)
    )
    two_streams = in_streams(Converted(network, cache), 2, patches_BCDHW[:1])
    ways: dict[str, Callable[[Tensor], Any]] = {
        "PyTorch, float32": lambda x: by_pytorch(network, x, False),
        "PyTorch, bfloat16": lambda x: by_pytorch(network, x, True),
        "OpenVINO, float32": float32,
        "OpenVINO, bfloat16": bfloat16,
        "OpenVINO, int8": int8,
        "OpenVINO, int8 but for the first and last layer": floating_ends,
        "OpenVINO, float32, one by one": lambda x: [float32(one) for one in x.split(1)],
        "OpenVINO, float32, one by one, two streams": lambda x: two_streams([*x.split(1)] * (2 // len(x) or 1)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way(patches_BCDHW)
            patches = max(2, batch) if "streams" in name else batch
            times[name].append((time.perf_counter() - started) / patches)
    seconds |= {name: min(of_way) for name, of_way in times.items()}
    return {"features": features, "patch": patch, "patches_at_once": batch, "seconds": seconds}


def in_streams(converted: Converted, number: int, patch_1CDHW: Tensor) -> Callable[[list[Tensor]], None]:
    """What computes patches, so many at the same time, each by its share of the cores."""
    openvino = import_openvino()
    shape = tuple(patch_1CDHW.shape)
    converted.is_free(shape[1])  # takes the model of all sizes from the cache, where there is one
    model = converted.model(shape)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": number}
    queue = openvino.AsyncInferQueue(openvino.Core().compile_model(model, "CPU", settings), number)

    def compute(patches_1CDHW: list[Tensor]) -> None:
        for patch_1CDHW in patches_1CDHW:
            queue.start_async({0: patch_1CDHW.contiguous().numpy()})
        queue.wait_all()

    return compute


def unet(features: list[int]) -> nn.Module:
    """nnU-Net's network of 3 classes."""
    stages = len(features)
    network = PlainConvUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (stages - 1),
        n_conv_per_stage=2,
        num_classes=3,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True, "eps": 1e-5},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return network.eval()


def by_pytorch(network: nn.Module, patches_BCDHW: Tensor, bfloat16: bool) -> Tensor:
    """As a prediction computes it."""
    with torch.inference_mode(), mixed_precision(CPU, bfloat16):
        logits: Tensor = network(patches_BCDHW.contiguous(memory_format=torch.channels_last_3d))
    return logits


if __name__ == "__main__":
    main()
