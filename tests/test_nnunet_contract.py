"""What this package leans on of nnU-Net's and batchgenerators' private parts.

A failure says what a new version has changed; `nnunet_nmsw/nnunet/` is where it is to be mended. Against the newest
nnU-Net alone: `pip install -U nnunetv2 batchgenerators batchgeneratorsv2 && pytest -m contract`.
"""

import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import DATASET_JSON, build_network, initialized, make_plans

pytestmark = pytest.mark.contract

CPU = torch.device("cpu")


def arguments_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name", "arguments"),
    [
        (nnUNetTrainer, "_do_i_compile", ["self"]),
        (nnUNetTrainer, "_build_loss", ["self"]),
        (nnUNetTrainer, "_get_deep_supervision_scales", ["self"]),
        (
            nnUNetPredictor,
            "_manage_input_and_output_lists",
            [
                "self",
                "list_of_lists_or_source_folder",
                "output_folder_or_list_of_truncated_output_files",
                "folder_with_segs_from_prev_stage",
                "overwrite",
                "part_id",
                "num_parts",
                "save_probabilities",
            ],
        ),
        (
            nnUNetPredictor,
            "_internal_get_data_iterator_from_lists_of_filenames",
            [
                "self",
                "input_list_of_lists",
                "seg_from_prev_stage_files",
                "output_filenames_truncated",
                "num_processes",
            ],
        ),
        (nnUNetPredictor, "_internal_get_sliding_window_slicers", ["self", "image_size"]),
        (
            nnUNetPredictor,
            "_internal_predict_sliding_window_return_logits",
            ["self", "data", "slicers", "do_on_device"],
        ),
        (nnUNetPredictor, "_internal_maybe_mirror_and_predict", ["self", "x"]),
        (GaussianBlurTransform, "_benchmark_wrapper", ["self", "img", "sigma", "dim_to_blur"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_private_methods_are_there_with_their_arguments(owner, name, arguments):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__} has no {name} any more"
    assert arguments_of(method) == arguments, f"{owner.__name__}.{name} takes other arguments"


def stock_trainer() -> nnUNetTrainer:
    plans = {**make_plans(), "continue_training": False}
    return nnUNetTrainer(plans, "3d_fullres", 0, DATASET_JSON, CPU)


@pytest.mark.usefixtures("folders")
def test_initialisation_asks_the_private_methods_and_is_ddp():
    asked = []

    class Watched(nnUNetTrainer):
        def _build_loss(self):
            asked.append(("loss", self.network is not None))
            return super()._build_loss()

        def _get_deep_supervision_scales(self):
            asked.append(("scales", True))
            return super()._get_deep_supervision_scales()

        def _do_i_compile(self):
            asked.append(("compile", True))
            return False

    trainer = Watched({**make_plans(), "continue_training": False}, "3d_fullres", 0, DATASET_JSON, CPU)
    assert trainer.is_ddp is False, "the trainer has no attribute is_ddp any more that says whether it is distributed"
    trainer.initialize()
    names = [name for name, _ in asked]
    assert {"loss", "scales", "compile"} <= set(names), f"initialize asks only for {names}"
    assert ("loss", True) in asked, "the loss is built before the network"


@pytest.mark.usefixtures("folders")
def test_the_logger_takes_more_names():
    trainer = stock_trainer()
    names = trainer.logger.local_logger.my_fantastic_logging
    names.setdefault("nmsw_something", [])
    trainer.logger.log("nmsw_something", 3.0, 0)
    assert trainer.logger.get_value("nmsw_something", step=-1) == 3.0
    assert trainer.logger.get_value("nmsw_something", step=None) == [3.0]


@pytest.mark.usefixtures("folders")
def test_the_loader_keeps_its_dataset():
    dataset = object()
    loader = DataLoader(dataset, 1, 1, None, True, False, True, None)
    assert loader._data is dataset, "batchgenerators' DataLoader keeps its data under another name"


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_sliding_window_asks_for_its_patches_in_the_order_of_its_slicers(tiny_network, mirrored):
    starts, asked = [], []

    class Watched(nnUNetPredictor):
        def _internal_predict_sliding_window_return_logits(self, data, slicers, do_on_device=True):
            starts.extend(tuple(axis.start for axis in slicer[1:]) for slicer in slicers)
            asked.append([data[slicer] for slicer in slicers])
            return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)

        def _internal_maybe_mirror_and_predict(self, x):
            assert torch.equal(x[0].cpu(), asked[0][len(asked) - 1].cpu())
            asked.append(x)
            return super()._internal_maybe_mirror_and_predict(x)

    predictor = initialized(Watched(use_mirroring=mirrored, device=CPU, allow_tqdm=False), tiny_network)
    predictor.predict_logits_from_preprocessed_data(torch.randn(1, 12, 8, 16))
    assert len(asked) - 1 == len(starts) == len(predictor._internal_get_sliding_window_slicers((12, 8, 16)))


def test_mirrorings_are_averaged_in_our_order(tiny_network):
    """`inference.networks.Ensemble` adds them up itself."""
    predictor = initialized(nnUNetPredictor(use_mirroring=True, device=CPU, allow_tqdm=False), tiny_network)
    patch = torch.randn(1, 1, 8, 8, 8)
    from predictors import nmsw

    (fold,) = initialized(nmsw(mirrored=True), tiny_network).folds()
    with torch.inference_mode():
        assert torch.equal(predictor._internal_maybe_mirror_and_predict(patch), fold.patch_logits(patch))


def test_pretrained_weights_are_loaded_through_the_networks_state(tmp_path, monkeypatch):
    """nnU-Net's own loading finds nothing to do in a network with an empty state."""
    from nnunet_nmsw.nnunet.trainer import AlreadyLoaded, pretrained_weights_of_command_line

    file = tmp_path / "checkpoint.pth"
    torch.save({"network_weights": {"weight": torch.zeros(3)}}, file)
    network = build_network()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    load_pretrained_weights.load_pretrained_weights(AlreadyLoaded(network), str(file))
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "4", "3d_fullres", "0", "-pretrained_weights", str(file)])
    assert pretrained_weights_of_command_line() == file
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "4", "3d_fullres", "0", "-p", "nnUNetPlans"])
    assert pretrained_weights_of_command_line() is None


def test_the_gaussian_is_what_patches_are_blended_with():
    from nnunet_nmsw.model.fusion import gaussian_weights

    gaussian = gaussian_weights((8, 8, 8), CPU).numpy()
    assert gaussian.max() == 10
    assert np.unravel_index(gaussian.argmax(), gaussian.shape) == (4, 4, 4)
