"""What a training step costs by multiply-accumulates, against nnU-Net's on the same plans. Computes nothing.

    python benchmarks/step_cost.py -width 0.5 0.75

Networks of nnU-Net's full width for patches of 128³, and its batch of two patches; volumes of several median shapes. A
step of NMSW has as many windows as the batch has patches, and the global branch.
"""

from __future__ import annotations

import argparse

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from synthetic import FULL_WIDTH, plans_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_nmsw.model.plans import settings_of
from nnunet_nmsw.model.strides import total_stride
from nnunet_nmsw.trainers import nnUNetTrainerNMSW
from nnunet_nmsw.volume.windows import low_shape

SHAPES = ([256, 288, 288], [384, 480, 480], [128, 512, 512], [160, 192, 192], [300, 400, 400])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-width", type=float, nargs="+", default=[0.5])
    parser.add_argument("-patch", type=int, default=128)
    args = parser.parse_args()
    print("| median volume | width | factor | global branch, in patches | step, in stock's |\n|---|---|---|---|---|")
    for shape in SHAPES:
        for width in args.width:
            plans = PlansManager(plans_of(shape, 1.0, args.patch, FULL_WIDTH, global_width=width))
            configuration = plans.get_configuration("3d_fullres")
            settings, batch_size = settings_of(configuration.configuration), configuration.batch_size
            with torch.device("meta"):
                network = nnUNetTrainerNMSW.build_network_architecture(plans, configuration, 1, 3, True)
                strides = total_stride(network.global_branch)
                low = low_shape(shape, settings.downsampling_factor)
                padded = [max(2, -(-n // stride)) * stride for n, stride in zip(low, strides, strict=True)]
                ratio = macs(network.global_branch, padded) / macs(network.local_branch, [args.patch] * 3)
            windows = settings.sampled_windows + settings.random_windows
            factor, step = settings.downsampling_factor, (windows + ratio) / batch_size
            print(f"| {' × '.join(map(str, shape))} | {width} | {factor[0]} | {ratio:.2f} | {step:.2f} |", flush=True)


def macs(network: nn.Module, shape: list[int]) -> int:
    """Multiply-accumulates of a forward pass of one volume or patch; backwards they are twice as many for all alike."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *shape))
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    main()
