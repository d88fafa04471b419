import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import DATASET_JSON, build_network, make_plans

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.windows import ChosenWindows, edges_in_image, index_to_world, write_windows

CPU = torch.device("cpu")


def initialized(predictor: nnUNetPredictor, network: torch.nn.Module, folds: int = 1) -> nnUNetPredictor:
    plans = PlansManager(make_plans())
    parameters = [{name: value + 0.01 * fold for name, value in network.state_dict().items()} for fold in range(folds)]
    predictor.manual_initialization(
        network, plans, plans.get_configuration("3d_fullres"), parameters, DATASET_JSON, "nnUNetTrainerNMSW", (0, 1, 2)
    )
    return predictor


def stock(mirrored: bool) -> nnUNetPredictor:
    return nnUNetPredictor(use_mirroring=mirrored, device=CPU, allow_tqdm=False)


def nmsw(mirrored: bool = False, **kwargs) -> NMSWPredictor:
    return NMSWPredictor(use_mirroring=mirrored, device=CPU, allow_tqdm=False, **kwargs)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shape", [(20, 17, 26), (5, 19, 8)])
def test_all_windows_without_the_global_branch_are_the_sliding_window_bit_for_bit(tiny_network, mirrored, shape):
    volume = torch.randn(1, *shape)
    expected = initialized(stock(mirrored), tiny_network).predict_logits_from_preprocessed_data(volume)
    predictor = initialized(nmsw(mirrored, num_patches="all", use_global_branch=False), tiny_network)
    assert torch.equal(predictor.predict_logits_from_preprocessed_data(volume), expected)


@pytest.mark.parametrize("shape", [(20, 17, 26), (5, 19, 8)])
def test_outside_the_windows_the_prediction_is_the_coarse_one(tiny_network, shape):
    volume = torch.randn(1, *shape)
    one = initialized(nmsw(num_patches=1), tiny_network).predict_logits_from_preprocessed_data(volume)
    everything = initialized(nmsw(num_patches="all"), tiny_network).predict_logits_from_preprocessed_data(volume)
    assert one.shape == (3, *shape)
    assert torch.isfinite(one).all()
    assert torch.isfinite(everything).all()
    assert not torch.equal(one, everything)
    weights = tiny_network.fusion_weights  # from here on, patches weigh nothing
    tiny_network.fusion_parameters.data -= torch.stack([weights.patch_C, weights.coarse_C - 1, weights.bias_C]).detach()
    coarse = initialized(nmsw(num_patches="all"), tiny_network).predict_logits_from_preprocessed_data(volume)
    different = (one.float() - coarse.float()).abs().amax(0) > 1e-2
    assert 0 < different.sum() <= 8**3


def test_predictions_are_deterministic_and_mirroring_changes_them(tiny_network):
    volume = torch.randn(1, 16, 20, 24)
    runs = [
        initialized(nmsw(mirrored, num_patches=3), tiny_network).predict_logits_from_preprocessed_data(volume)
        for mirrored in (False, False, True)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_folds_are_averaged_and_each_chooses_its_own_windows(tiny_network):
    volume = torch.randn(1, 16, 20, 24)
    predictor = initialized(nmsw(num_patches=3), tiny_network, folds=2)
    predictor.predict_logits_from_preprocessed_data(volume)
    assert [len(choice.starts) for choice in predictor.chosen_windows] == [3, 3]


def test_arrays_as_with_the_parent(tiny_network):
    image = np.random.default_rng(0).normal(size=(1, 18, 18, 18)).astype(np.float32)
    labels = initialized(nmsw(num_patches=2), tiny_network).predict_single_npy_array(image, {"spacing": [1, 1, 1]})
    assert labels.shape == (18, 18, 18)
    assert labels.dtype == np.uint8


def test_a_stock_model_is_refused():
    predictor = initialized(nmsw(), build_network().local_branch)
    with pytest.raises(UserError, match="nnUNetv2_predict"):
        predictor.predict_sliding_window_return_logits(torch.randn(1, 8, 8, 8))


def window_case(transpose_forward=(2, 0, 1)):
    """An image of 30 × 20 × 10 voxels (x, y, z), cropped and resampled to half its resolution along two axes."""
    backward = [int(i) for i in np.argsort(transpose_forward)]
    shape_zyx = np.array([10, 20, 30])
    properties = {
        "sitk_stuff": {
            "spacing": (1.0, 2.0, 3.0),
            "origin": (10.0, -5.0, 7.0),
            "direction": (0, -1, 0, 1, 0, 0, 0, 0, 1),
        },
        "spacing": [3.0, 2.0, 1.0],
        "shape_before_cropping": tuple(shape_zyx[list(transpose_forward)]),
        "bbox_used_for_cropping": [[2, 30], [0, 10], [0, 20]],
        "shape_after_cropping_and_before_resampling": (28, 10, 20),
    }
    chosen = ChosenWindows(np.array([[0, 0, 4], [-2, 2, 0]]), np.array([2.0, 1.0]), (4, 5, 6), (14, 10, 10), 77)
    return properties, chosen, backward


def test_windows_are_placed_in_the_image():
    properties, chosen, backward = window_case()
    edges = edges_in_image(chosen, properties, backward)
    # Preprocessed axes are (x, z, y): x is cropped by 2 and halved, z is as it was, y is halved.
    assert edges[0].tolist() == [[0, 8, 2], [5, 20, 10]]
    assert edges[1].tolist() == [[2, 0, -2], [7, 12, 6]]


def test_world_coordinates_are_simpleitks():
    properties, _, _ = window_case()
    image = sitk.Image([30, 20, 10], sitk.sitkUInt8)
    image.SetSpacing(properties["sitk_stuff"]["spacing"])
    image.SetOrigin(properties["sitk_stuff"]["origin"])
    image.SetDirection(properties["sitk_stuff"]["direction"])
    index = (3.5, 4.25, 5.0)
    world = index_to_world(properties) @ [*index, 1]
    np.testing.assert_allclose(world[:3], image.TransformContinuousIndexToPhysicalPoint(index))


def test_written_windows(tmp_path):
    properties, chosen, backward = window_case()
    plans = PlansManager({**make_plans(), "transpose_backward": backward})
    write_windows(str(tmp_path), "case", [chosen], properties, plans, ".nii.gz")
    overlay = sitk.ReadImage(str(tmp_path / "case.nii.gz"))
    assert overlay.GetSize() == (30, 20, 10)
    np.testing.assert_allclose(overlay.GetOrigin(), properties["sitk_stuff"]["origin"])
    values = sitk.GetArrayFromImage(overlay)
    assert (values == 1).sum() == 5 * 12 * 8
    assert values[0, 8, 2] == 1
    assert values[6, 11, 5] == 2
    content = json.loads((tmp_path / "case.json").read_text())
    assert content["windows_to_choose_from"] == 77
    first, second = content["windows"]
    assert (first["rank"], first["score"]) == (1, 2.0)
    assert first["first_voxel_xyz"] == [2, 8, 0]
    assert first["last_voxel_xyz"] == [9, 19, 4]
    assert second["first_voxel_xyz"] == [0, 0, 2]
    centre = overlay.TransformContinuousIndexToPhysicalPoint([5.5, 13.5, 2.0])
    np.testing.assert_allclose(first["centre_mm_lps"], centre, atol=1e-3)


def test_nibabel_images_have_world_coordinates_too():
    affine = np.array([[-2.0, 0, 0, 90], [0, 3, 0, -126], [0, 0, 4, -72], [0, 0, 0, 1]])
    world = index_to_world({"nibabel_stuff": {"original_affine": affine}, "spacing": [4, 3, 2]}) @ [1, 1, 1, 1]
    assert world.tolist() == [-88, 123, -68, 1]
