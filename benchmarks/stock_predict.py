"""`nnUNetv2_predict_from_modelfolder` with a library's parts in the place of nnU-Net's, for `prediction.py`.

`--monai` slides MONAI's window, `--openvino` computes the network by OpenVINO in float32.
"""

from __future__ import annotations

import argparse

import torch
from monai.inferers import SlidingWindowInferer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_nmsw.inference.openvino_branches import OpenVINO


class MonaiPredictor(nnUNetPredictor):
    """Slides MONAI's window, with nnU-Net's overlap and Gaussian."""

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Logits C, D, H, W of a volume of as many axes."""
        network = self.network.to(self.device)
        network.eval()
        inferer = SlidingWindowInferer(
            self.configuration_manager.patch_size, overlap=0.5, mode="gaussian", sigma_scale=0.125, device="cpu"
        )
        volume = input_image[None].to(self.device)
        logits: Tensor = inferer(volume, self._internal_maybe_mirror_and_predict)
        return logits[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", required=True)
    parser.add_argument("-f", required=True)
    parser.add_argument("-i", required=True)
    parser.add_argument("-o", required=True)
    parser.add_argument("-device", default="cuda")
    parser.add_argument("--monai", action="store_true")
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--disable_tta", action="store_true")
    parser.add_argument("--disable_progress_bar", action="store_true")
    args = parser.parse_args()
    of = MonaiPredictor if args.monai else nnUNetPredictor
    predictor = of(use_mirroring=not args.disable_tta, device=torch.device(args.device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(args.m, (args.f,))
    if args.openvino:
        predictor.network = OpenVINO()(predictor.network.eval())
        predictor.list_of_parameters = [predictor.network.state_dict()]  # without the branches'
    predictor.predict_from_files(args.i, args.o)


if __name__ == "__main__":
    main()
