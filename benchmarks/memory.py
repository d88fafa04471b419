"""Host memory and seconds of a prediction against the size of the volume and the number of classes: network and export.

    python benchmarks/memory.py -size 128 256 512 768 -classes 30 -k 10% -o benchmarks/memory.json

A network of few features with random weights, a volume of noise, no resampling; on the CPU. Random logits are the worst
case for labels plane by plane: hardly any neighbours agree. Each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measuring import in_new_process, tell, write_results
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from synthetic import dataset_of, plans_of

from nnunet_nmsw.inference.memory import most_memory_of_process
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.trainers import nnUNetTrainerNMSW

FEATURES = 4


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-size", type=int, nargs="+", default=[128, 256])
    parser.add_argument("-classes", type=int, nargs="+", default=[3, 30])
    parser.add_argument("-patch", type=int, default=64)
    parser.add_argument("-k", default="10%")
    parser.add_argument("-o", type=Path, help="JSON file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        tell(measure(args.size[0], args.classes[0], args.patch, args.k))
        return
    rows = []
    for classes in args.classes:
        for size in args.size:
            flags = ["--one", "-size", str(size), "-classes", str(classes), "-k", args.k, "-patch", str(args.patch)]
            rows.append({"size": size, "classes": classes, **in_new_process(__file__, *flags)})
            print(rows[-1], flush=True)
    if args.o:
        write_results(args.o, {"rows": rows})


def measure(size: int, classes: int, patch: int, num_patches: str) -> dict[str, Any]:
    """GiB of the process at its peak and before, seconds, and patches."""
    torch.manual_seed(0)
    nmsw = {"downsampling_factor": [4, 4, 4], "global_width": 1.0}
    plans = PlansManager(plans_of([size] * 3, 1.0, patch, FEATURES, **nmsw))
    configuration = plans.get_configuration("3d_fullres")
    network = nnUNetTrainerNMSW.build_network_architecture(plans, configuration, 1, classes, False)
    predictor = NMSWPredictor(num_patches, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    dataset = dataset_of(classes)
    predictor.manual_initialization(network, plans, configuration, [network.state_dict()], dataset, "", None)
    shape = (size,) * 3
    properties = {
        "spacing": (1.0,) * 3,
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, size]] * 3,
        "shape_after_cropping_and_before_resampling": shape,
    }
    before = most_memory_of_process() / 2**30
    volume = torch.randn(1, *shape)
    started = time.perf_counter()
    predicted = predictor.predict_case({"data": volume, "data_properties": properties})
    seconds = time.perf_counter() - started
    patches = len(predicted.windows[0].starts)
    return {"gib": most_memory_of_process() / 2**30, "gib_before": before, "seconds": seconds, "patches": patches}


if __name__ == "__main__":
    main()
