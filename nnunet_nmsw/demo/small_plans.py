"""Write a plans file with a small patch and few features beside nnU-Net's, to train on a CPU or to study patches.

    python -m nnunet_nmsw.demo.small_plans -d 4 --patch_size 16 16 16 --features 16 32 64
    nnUNetv2_train 4 3d_fullres 0 -p nnUNetPlans_small -tr nnUNetTrainerNMSW_10epochs

The preprocessed data of `nnUNetPlans`, or of the plans given with `-p`, is used as it is. `--nmsw` sets keys of the
NMSW settings as JSON, and `--name` keeps several such plans apart.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import write_json

PLANS_NAME = "nnUNetPlans_small"

BATCH_SIZE = 4
"""Patches of a step: more than nnU-Net's usual two, as they are small."""


def small_plans(
    plans: dict, patch_size: list[int], features: list[int], name: str, nmsw: dict, batch_size: int = BATCH_SIZE
) -> dict:
    """A copy of `plans` whose 3d_fullres has the given patch and network; nnU-Net decides on kernels and strides."""
    configuration = dict(plans["configurations"]["3d_fullres"])
    _, strides, kernels, patch_size, _ = get_pool_and_conv_props(
        configuration["spacing"], patch_size, 4, len(features) - 1
    )
    stages = len(kernels)
    if stages < 3:
        # With two, the only weight of nnU-Net's deep supervision is 0 / 0, and stock networks end as NaN.
        raise UserError(
            f"a network of {stages} stages cannot be trained: give three --features or more, or larger patches"
        )
    arch_kwargs = {
        **configuration["architecture"]["arch_kwargs"],
        "n_stages": stages,
        "features_per_stage": features[:stages],
        "kernel_sizes": [list(map(int, kernel)) for kernel in kernels],
        "strides": [list(map(int, stride)) for stride in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    configuration["architecture"] = {**configuration["architecture"], "arch_kwargs": arch_kwargs}
    configuration["patch_size"] = [int(n) for n in patch_size]
    configuration["batch_size"] = batch_size
    configuration["nmsw"] = nmsw
    return {**plans, "plans_name": name, "configurations": {"3d_fullres": configuration}}


def write_small_plans(
    dataset: int | str,
    patch_size: list[int],
    features: list[int],
    name: str,
    nmsw: dict,
    batch_size: int = BATCH_SIZE,
    source: str = "nnUNetPlans",
) -> Path:
    """Write the small plans beside the plans `source` of a preprocessed dataset. Returns the file."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / maybe_convert_to_dataset_name(dataset)
    plans = json.loads((folder / f"{source}.json").read_text())
    file = folder / f"{name}.json"
    write_json(file, small_plans(plans, patch_size, features, name, nmsw, batch_size))
    return file


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset name or id")
    parser.add_argument("--patch_size", type=int, nargs=3, required=True)
    parser.add_argument("--features", type=int, nargs="+", required=True, help="of the stages, from the finest")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
    parser.add_argument("-p", default="nnUNetPlans", help="plans whose preprocessed data is used")
    parser.add_argument("--name", default=PLANS_NAME)
    parser.add_argument("--nmsw", type=json.loads, default={}, help='e.g. \'{"num_patches": "5%%"}\'')
    args = parser.parse_args()
    print(write_small_plans(args.d, args.patch_size, args.features, args.name, args.nmsw, args.batch_size, args.p))


if __name__ == "__main__":
    main()
