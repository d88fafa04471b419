"""Seconds of a patch of the local branch: memory layout, precision, compilation, batches and threads.

    python benchmarks/processor.py -m MODEL -device cpu -o docs/performance/processor.json

Variants take turns on the same patches of a synthetic volume; medians. Disagreement is the share of voxels whose label
is not that of float32, as PyTorch runs it by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from measuring import write_results
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from synthetic import organs
from torch import Tensor, nn

PATCHES = 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, required=True, help="folder of an NMSW model")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-rounds", type=int, default=5)
    parser.add_argument("-o", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    predictor = nnUNetPredictor(device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(args.m), (0,))
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    network = predictor.network.local_branch.to(device).eval()
    network.decoder.deep_supervision = False
    patch = predictor.configuration_manager.patch_size
    classes = predictor.label_manager.num_segmentation_heads
    patches = torch.from_numpy(organs([n * PATCHES if i == 0 else n for i, n in enumerate(patch)], classes, seed=0)[0])
    intensities = predictor.plans_manager.foreground_intensity_properties_per_channel["0"]
    patches = (patches.float() - intensities["mean"]) / intensities["std"]
    patches_KCDHW = patches.view(PATCHES, 1, *patch).to(device)
    variants = variants_of(network, device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    labels: dict[str, Tensor] = {}
    with torch.inference_mode():
        for number in range(args.rounds + 1):
            for name, variant in variants.items():
                started = time.perf_counter()
                logits_KCDHW = variant(patches_KCDHW)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number:  # compilation, and caches that fill
                    seconds[name].append((time.perf_counter() - started) / PATCHES)
                labels[name] = logits_KCDHW.argmax(1)
    first = next(iter(variants))
    rows = []
    for name in variants:
        median = statistics.median(seconds[name])
        faster = statistics.median(seconds[first]) / median
        disagreement = float((labels[name] != labels[first]).float().mean())
        rows.append({"variant": name, "seconds": median, "times_faster": faster, "disagreement": disagreement})
        print(f"{name:60} {median:.3f} s  {faster:.2f} times  {disagreement:.2e}")
    if args.o:
        write_results(args.o, {"rows": rows}, device)


def variants_of(network: nn.Module, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to predict some patches, by name; the first is what the others are compared with."""
    last = deepcopy(network).to(memory_format=torch.channels_last_3d)

    def batches(model: Any, size: int, half: bool = False, channels_last: bool = False) -> Callable[[Tensor], Tensor]:
        def run(patches_KCDHW: Tensor) -> Tensor:
            if channels_last:
                patches_KCDHW = patches_KCDHW.contiguous(memory_format=torch.channels_last_3d)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                return torch.cat([model(some).float() for some in patches_KCDHW.split(size)])

        return run

    def two_threads(patches_KCDHW: Tensor) -> Tensor:
        with threads_by_operation(max(1, torch.get_num_threads() // 2)), ThreadPoolExecutor(2) as threads:

            def one(patch_1CDHW: Tensor) -> Tensor:
                with torch.inference_mode():  # which is of a thread
                    return network(patch_1CDHW)  # type: ignore[no-any-return]

            return torch.cat(list(threads.map(one, patches_KCDHW.split(1))))

    variants = {}
    for half in (False, True):
        for channels_last in (False, True):
            for size in (1, 2, 4, 8):
                name = (
                    f"{'bfloat16' if half else 'float32'}{', channels last' if channels_last else ''}, {size} at once"
                )
                variants[name] = batches(last if channels_last else network, size, half, channels_last)
    variants["float32, compiled, 2 at once"] = batches(torch.compile(deepcopy(network)), 2)
    variants["bfloat16, compiled, 2 at once"] = batches(torch.compile(deepcopy(network)), 2, True)
    if device.type == "cpu":
        variants["float32, 1 at once, two threads with half of the cores each"] = two_threads
    return variants


@contextmanager
def threads_by_operation(number: int) -> Iterator[None]:
    """Let PyTorch use so many threads within an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
