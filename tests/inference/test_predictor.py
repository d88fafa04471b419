import json
import resource

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from predictors import nmsw, stock
from tiny import DATASET_JSON, build_network, initialized, make_plans

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import written_whole
from nnunet_nmsw.inference.export import reason_for_logits, write_labels
from nnunet_nmsw.inference.networks import filled_up
from nnunet_nmsw.inference.volume import ChosenWindows, Padded
from nnunet_nmsw.inference.windows import edges_in_image, index_to_world, write_windows
from nnunet_nmsw.inference.writing import Done
from nnunet_nmsw.model.fusion import FusionForm, FusionWeights
from nnunet_nmsw.selection.by_score import TopK
from nnunet_nmsw.volume.windows import crop_windows


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shape", [(20, 17, 26), (5, 19, 8)])
def test_all_windows_without_a_weight_on_the_coarse_prediction_are_the_sliding_window(tiny_network, mirrored, shape):
    volume = torch.randn(1, *shape)
    for layer in tiny_network.local_branch.decoder.seg_layers:
        layer.weight.data *= 10
    expected = initialized(stock(mirrored), tiny_network).predict_logits_from_preprocessed_data(volume)
    patches_alone = FusionWeights(torch.ones(3), torch.zeros(3), torch.zeros(3))
    tiny_network.fusion = FusionForm(3, lambda parameters: patches_alone)
    predictor = initialized(nmsw(mirrored, num_patches="all", selector=TopK()), tiny_network)
    logits = predictor.predict_logits_from_preprocessed_data(volume).float()
    # nnU-Net multiplies with its Gaussian and adds in half precision, in which little is left at the corners.
    inside = (slice(None), *(slice(2, -2) if n > 8 else slice(None) for n in shape))
    torch.testing.assert_close(logits[inside], expected.float()[inside], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(20, 17, 26), (5, 19, 8)])
def test_outside_the_windows_the_prediction_is_the_coarse_one(tiny_network, shape):
    volume = torch.randn(1, *shape)
    tiny_network.global_branch.decoder.seg_layers[-1].bias.data[-1] += 100  # every window promises something
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


@pytest.mark.parametrize("mirrored", [False, True])
def test_in_bfloat16_both_branches_compute_in_it_and_mirrorings_are_added_in_more_digits(tiny_network, mirrored):
    types = {}
    for name in ("global_branch", "local_branch"):
        of_branch = types.setdefault(name, set())
        getattr(tiny_network, name).register_forward_hook(lambda _, __, output, of=of_branch: of.add(output.dtype))
    volume = torch.randn(1, 16, 20, 24)
    settings = {"mirrored": mirrored, "num_patches": 3}
    exact = initialized(nmsw(**settings), tiny_network).predict_logits_from_preprocessed_data(volume).float()
    assert types == {"global_branch": {torch.float32}, "local_branch": {torch.float32}}
    for of_branch in types.values():
        of_branch.clear()
    predictor = initialized(nmsw(**settings, precision="bfloat16"), tiny_network)
    rounded = predictor.predict_logits_from_preprocessed_data(volume).float()
    assert types == {"global_branch": {torch.bfloat16}, "local_branch": {torch.bfloat16}}
    assert 0 < (rounded - exact).abs().mean() < 0.01 * exact.std()
    patch_1CDHW = torch.randn(1, 1, 8, 8, 8)
    assert predictor.folds()[0].patch_logits(patch_1CDHW).dtype == torch.float32


def test_predictions_are_deterministic_and_mirroring_changes_them(tiny_network):
    volume = torch.randn(1, 16, 20, 24)
    runs = [
        initialized(nmsw(mirrored, num_patches=3), tiny_network).predict_logits_from_preprocessed_data(volume)
        for mirrored in (False, False, True)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_each_fold_chooses_its_own_windows(tiny_network):
    volume = torch.randn(1, 16, 20, 24, generator=torch.Generator().manual_seed(0))
    predictor = initialized(nmsw(num_patches=3), tiny_network, folds=2)
    scores_alone = predictor.list_of_parameters[1]  # the last channel of the global branch
    for name in ("weight", "bias"):
        of_layer = scores_alone[f"global_branch.decoder.seg_layers.0.{name}"]
        scores_alone[f"global_branch.decoder.seg_layers.0.{name}"] = of_layer * torch.tensor([1, 1, 1, -1]).view(
            -1, *[1] * (of_layer.ndim - 1)
        )
    both = [choice.starts for choice in predictor.predict_case_logits({"data": volume}).windows]
    assert not np.array_equal(*both)
    all_weights = predictor.list_of_parameters
    for of_fold, starts in zip(all_weights, both, strict=True):
        predictor.list_of_parameters = [of_fold]
        (alone,) = predictor.predict_case_logits({"data": volume}).windows
        np.testing.assert_array_equal(alone.starts, starts)


def test_each_fold_of_an_ensemble_has_its_own_fusion(tiny_network):
    """The folds' weights take turns in one network: what is kept of one must not change with the next."""
    volume, predictor = torch.randn(1, 16, 16, 16), initialized(nmsw(num_patches=4), tiny_network, 2)
    for of_fold, scale in zip(predictor.list_of_parameters, (1.0, -3.0), strict=True):
        of_fold["fusion_parameters"] = scale * torch.ones_like(of_fold["fusion_parameters"])
    both = predictor.predict_logits_from_preprocessed_data(volume)
    all_weights, alone = predictor.list_of_parameters, []
    for of_fold in all_weights:
        predictor.list_of_parameters = [of_fold]
        alone.append(predictor.predict_logits_from_preprocessed_data(volume))
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2, rtol=1e-2, atol=1e-2)


def test_arrays_as_with_the_parent(tiny_network):
    """nnU-Net's images and labels of arrays have the axes of files: the model's, turned by `transpose_backward`."""
    image = np.random.default_rng(0).normal(size=(1, 14, 18, 22)).astype(np.float32)
    plans = PlansManager({**make_plans(), "transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]})
    predictor = nmsw(num_patches=2)
    predictor.manual_initialization(
        tiny_network, plans, plans.get_configuration("3d_fullres"), [tiny_network.state_dict()], DATASET_JSON, "", None
    )
    labels = predictor.predict_single_npy_array(image, {"spacing": [1, 1, 1]})
    assert labels.dtype == np.uint8
    assert len(np.unique(labels)) > 1
    turned = torch.from_numpy(image.transpose(0, 2, 3, 1).copy())
    normalized = (turned - turned.mean()) / turned.std(correction=0)
    logits = predictor.predict_logits_from_preprocessed_data(normalized).float()
    best = logits.topk(2, dim=0).values
    sure = (best[0] - best[1] > 0.01).numpy().transpose(2, 0, 1)
    assert sure.mean() > 0.9
    expected = logits.argmax(0).numpy().transpose(2, 0, 1)
    np.testing.assert_array_equal(labels[sure], expected[sure])


def test_an_array_is_written_as_it_is_returned(tiny_network, tmp_path):
    image = np.random.default_rng(0).normal(size=(1, 14, 18, 22)).astype(np.float32)
    geometry = {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": (1.0, 0, 0, 0, 1, 0, 0, 0, 1)}
    properties = {"spacing": [1, 1, 1], "sitk_stuff": geometry}
    predictor = initialized(nmsw(num_patches=2), tiny_network)
    labels = predictor.predict_single_npy_array(image, dict(properties))
    assert predictor.predict_single_npy_array(image, dict(properties), None, str(tmp_path / "a.b")) is None
    assert [file.name for file in tmp_path.iterdir()] == ["a.b.nii.gz"]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.b.nii.gz"))), labels)


def test_a_bound_of_memory_has_no_room_for_logits(tiny_network):
    predictor = initialized(nmsw(num_patches=2, max_memory=2**40), tiny_network)
    with pytest.raises(UserError, match="--max_memory cannot be kept with volumes of logits"):
        predictor.predict_from_data_iterator([], save_probabilities=True)


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
    write_windows(tmp_path, "case", [chosen], properties, plans, ".nii.gz")
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


def properties_of(shape: tuple[int, ...], image: tuple[int, ...] = (30, 22, 40)) -> dict:
    """Of a volume that was cropped out of an image and resampled."""
    cropped = tuple(n - 4 for n in image)
    return {
        "spacing": [n / m for n, m in zip(shape, cropped, strict=True)],
        "shape_before_cropping": image,
        "bbox_used_for_cropping": [[1, 1 + n] for n in cropped],
        "shape_after_cropping_and_before_resampling": cropped,
    }


@pytest.mark.parametrize("num_patches", [2, "all"])
@pytest.mark.parametrize("shape", [(20, 17, 26), (5, 19, 8)])
def test_labels_without_a_volume_of_logits_are_those_of_stock_export(tiny_network, shape, num_patches):
    volume, properties = torch.randn(1, *shape), properties_of(shape)
    for branch in (tiny_network.local_branch, tiny_network.global_branch):
        # In nnU-Net's half precision, small logits vanish at the corners of a volume, where Gaussians end.
        branch.decoder.seg_layers[-1].weight.data *= 100
    predictor = initialized(nmsw(mirrored=True, num_patches=num_patches), tiny_network, folds=2)
    case = {"data": volume, "data_properties": properties}
    logits, windows = predictor.predict_case_logits(case)
    arguments = (predictor.plans_manager, predictor.configuration_manager, predictor.label_manager, properties)
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(logits, *arguments)
    labels, windows_of_labels = predictor.predict_case(case)
    assert labels.dtype == expected.dtype
    assert labels.shape == expected.shape
    assert all(np.array_equal(a.starts, b.starts) for a, b in zip(windows, windows_of_labels, strict=True))
    # nnU-Net adds in half precision: what differs is a tie within its rounding.
    spacing = properties["spacing"]
    target = properties["shape_after_cropping_and_before_resampling"]
    resampled = predictor.configuration_manager.resampling_fn_probabilities(logits, target, spacing, spacing)
    first, second = np.sort(resampled.astype(np.float32), axis=0)[[-1, -2]]
    differ = (labels != expected)[1:-3, 1:-3, 1:-3]
    assert not (differ & (first - second > 0.01 * np.abs(resampled).max())).any()
    assert (labels != expected).mean() < 0.02
    assert set(np.unique(labels)) > {0}


def test_probabilities_and_unknown_resampling_take_the_stock_path(tiny_network):
    predictor = initialized(nmsw(), tiny_network)
    configuration = predictor.configuration_manager
    assert reason_for_logits(configuration, False, False) is None
    assert reason_for_logits(configuration, True, False) == "probabilities are asked for"
    configuration.configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
    assert "resample_torch_fornnunet" in reason_for_logits(configuration, False, False)


def test_batches_are_halved_until_they_fit(tiny_network):
    sizes = []

    class TooLarge(torch.nn.Module):
        def forward(self, patches):
            sizes.append(len(patches))
            if len(patches) > 2:
                raise torch.OutOfMemoryError
            return tiny_network.local_branch.original(patches)

    original, volume = tiny_network.local_branch, torch.randn(1, 8, 8, 20)
    starts = torch.tensor([[0, 0, start] for start in range(0, 14, 2)])
    tiny_network.local_branch = TooLarge()
    tiny_network.local_branch.original = original
    (fold,) = initialized(nmsw(), tiny_network).folds()
    with torch.inference_mode():
        padded = Padded.of(volume, (8, 8, 8))
        logits = fold.patches(padded, fold.coarse(padded), starts)
        assert torch.allclose(logits, original(crop_windows(volume[None], starts, (8, 8, 8))), atol=1e-5)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


@pytest.mark.parametrize(("number", "size"), [(1, 1), (3, 4), (5, 8), (16, 16), (20, 20)])
def test_batches_are_filled_up_to_few_sizes(number, size):
    patches = torch.ones(number, 1, 8, 8, 8)
    filled = filled_up(patches)
    assert len(filled) == size
    assert torch.equal(filled[:number], patches)
    assert not filled[number:].any()


def test_a_case_that_cannot_be_written_is_reported_and_the_others_are_there(tiny_network, tmp_path):
    shape = (16, 16, 16)
    geometry = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}
    properties = {**properties_of(shape), "sitk_stuff": geometry}
    (tmp_path / "b.nii.gz").mkdir()  # a folder is in the way
    cases = [{"data": torch.randn(1, *shape), "data_properties": properties, "ofile": str(tmp_path / n)} for n in "abc"]
    predictor = initialized(nmsw(num_patches=1), tiny_network)
    with pytest.raises(UserError, match=r"cannot write .*b\.nii\.gz"):
        predictor.predict_from_data_iterator(iter(cases))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "c.nii.gz")))
    assert np.array_equal(image, predictor.predict_segmentation(cases[2]["data"], properties))


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".gipl"])
def test_a_disk_that_is_full_leaves_no_part_of_a_file(tmp_path, ending):
    geometry = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}
    labels = np.random.default_rng(0).integers(0, 3, (60, 60, 60)).astype(np.uint8)
    arguments = (PlansManager(make_plans()), {"sitk_stuff": geometry})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as a full disk: writing ends with an error
    try:
        with pytest.raises((OSError, RuntimeError)), written_whole(tmp_path) as folder:
            write_labels(labels, folder / f"case{ending}", *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    with written_whole(tmp_path) as folder:
        write_labels(labels, folder / f"case{ending}", *arguments)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"case{ending}"))), labels)


def test_the_folds_of_a_run_are_made_once(tiny_network):
    predictor, seen = initialized(nmsw(num_patches=2), tiny_network, 2), []
    cases = [{"data": torch.randn(1, 16, 16, 16), "data_properties": {}, "ofile": None} for _ in range(2)]
    predictor.networks_of = lambda case: seen.append(predictor.folds()) or seen[-1]
    predictor._by_labels = lambda case: Done(lambda: predictor.predict_case_logits(case), lambda folder, name: None)
    assert len(predictor.predict_from_data_iterator(cases)) == 2
    assert seen[0] is seen[1]
    assert predictor.folds() is not seen[0]


def test_an_image_without_voxels_at_the_models_spacing_is_refused():
    with pytest.raises(UserError, match="thinner than half a voxel"):
        Padded.of(torch.zeros(1, 0, 9, 9), (8, 8, 8))


def test_files_of_two_axes_have_their_spacing_alone():
    of_file = {"spacing": (0.5, 0.25), "origin": (0.0, 0.0), "direction": (1.0, 0.0, 0.0, 1.0)}
    world = index_to_world({"sitk_stuff": of_file, "spacing": [999.0, 0.25, 0.5]})
    assert np.array_equal(world, np.diag([0.5, 0.25, 999.0, 1.0]))
