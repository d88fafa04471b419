"""Sets of stock models against nnU-Net's own sliding windows, merged voxel by voxel."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_sets import COARSE, FINE, SHAPE, case_of, noise, stock_logits, the_set, write_models
from predictors import stock
from untrained import write_model

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.set_calibration import SetCalibration
from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.volume.matched_labels import MatchedLabels

PATCH_WEIGHT = float(torch.sigmoid(torch.tensor(2.0)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return noise()


def on_image(logits_Cdhw: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits_Cdhw[None], SHAPE, mode="trilinear")[0]


def test_all_windows_are_the_sliding_windows_of_all_models_merged(models, image):
    predictor = the_set(models, num_patches="all")
    found, windows = predictor.predict_case(case_of(predictor, image))
    assert all(len(chosen.starts) == chosen.num_windows for chosen in windows)

    coarse = stock_logits(models["coarse"], image)
    numbers = {"background": 0, **{name: number for number, name in enumerate(COARSE, 1)}}
    scores = {}
    for name, classes in FINE.items():
        own = {"background": 0, **{label: number for number, label in enumerate(classes, 1)}}
        labels = MatchedLabels.of(numbers, own)
        logits = stock_logits(models[name], image)
        rest = [number for number in range(len(own)) if number not in labels.fine]
        fine = torch.cat([logits[rest].amax(0, keepdim=True), logits[list(labels.fine)]])
        fused = PATCH_WEIGHT * fine + (1 - PATCH_WEIGHT) * on_image(labels.of_coarse(coarse))
        for number, of_class in zip(labels.coarse, fused[1:], strict=True):
            scores[number] = of_class - fused[0]
    claimed = torch.stack([scores.get(number, torch.full(SHAPE, -torch.inf)) for number in range(len(numbers))])
    # The spleen alone is nobody's; so is the background.
    left = on_image(coarse)[[0, 2]].argmax(0) * 2
    expected = torch.where(claimed.amax(0) > 0, claimed.argmax(0), left).numpy()

    assert len(set(expected.flat)) > 4
    differ = found != expected
    best = claimed.sort(0).values
    close = (best[-1] - best[-2]).abs().minimum(best[-1].abs()).numpy()
    # nnU-Net adds its windows up in half precision, of which little is left at the border of a volume.
    assert differ.mean() < 0.01
    inside = (slice(2, -2),) * 3
    assert close[inside][differ[inside]].max(initial=0) < 0.01


def test_one_fine_network_is_loaded_at_a_time(models, image, monkeypatch):
    predictor = the_set(models, num_patches="all")
    networks: list[weakref.ref] = []
    alive = []
    for of_one in predictor._fine_predictors:

        def load(*args, of_one=of_one, loading=of_one.initialize_from_trained_model_folder):
            gc.collect()
            alive.append(sum(network() is not None for network in networks))
            loading(*args)
            networks.append(weakref.ref(of_one.network))

        monkeypatch.setattr(of_one, "initialize_from_trained_model_folder", load)
    predictor.predict_case(case_of(predictor, image))
    assert alive == [0] * len(FINE)


def test_where_no_window_is_the_labels_are_the_coarse_models_own(models, image):
    predictor = the_set(models, num_patches=1)
    found, windows = predictor.predict_case(case_of(predictor, image))
    expected = on_image(stock_logits(models["coarse"], image)).argmax(0).numpy()
    outside = np.ones(SHAPE, bool)
    for chosen in windows:
        assert len(chosen.starts) == 1
        outside[tuple(slice(max(0, a), a + 8) for a in chosen.starts[0])] = False
    assert 0.5 < outside.mean() < 1
    assert np.array_equal(found[outside], expected[outside])
    assert not np.array_equal(found, expected)


def test_the_order_of_the_models_makes_no_difference(models, image):
    predictions = []
    for order in (("abdomen", "chest", "bones"), ("bones", "abdomen", "chest")):
        predictor = the_set(models, order, num_patches=3)
        predictions.append(predictor.predict_case(case_of(predictor, image)).segmentation)
    assert np.array_equal(*predictions)


def test_a_model_without_a_class_in_the_image_is_not_loaded(models, image, monkeypatch):
    predictor = the_set(models, num_patches="all")
    case = case_of(predictor, image)
    logits = predictor.predict_logits_from_preprocessed_data(case["data"]).clone()
    logits[[1, 3]] = -100.0  # neither liver nor kidney
    monkeypatch.setattr(predictor, "predict_logits_from_preprocessed_data", lambda _: logits)
    asked = []
    monkeypatch.setattr(predictor, "_predicted", lambda number, *_: iter(asked.append(number) or ()))
    windows = predictor.predict_case(case).windows
    assert asked == [1, 2]
    assert [len(chosen.starts) > 0 for chosen in windows] == [False, True, True]


def test_a_model_explores_where_the_coarse_prediction_has_none_of_its_classes(models, image, monkeypatch):
    predictor = the_set(models, num_patches=2, explore=3)
    case = case_of(predictor, image)
    logits = predictor.predict_logits_from_preprocessed_data(case["data"]).clone()
    logits[[1, 3]] = -100.0
    monkeypatch.setattr(predictor, "predict_logits_from_preprocessed_data", lambda _: logits)
    windows = predictor.predict_case(case).windows
    assert [len(chosen.starts) for chosen in windows] == [3, 5, 5]


def test_an_image_is_resampled_once_for_models_that_see_it_alike(models, image, monkeypatch):
    from nnunet_nmsw.inference import model_set

    seen = []
    original = model_set.preprocessed_array

    def counted(model, *args):
        seen.append(model)
        return original(model, *args)

    monkeypatch.setattr(model_set, "preprocessed_array", counted)
    predictor = the_set(models, num_patches=2)
    predictor.predict_case(case_of(predictor, image))
    assert len(seen) == 1  # for three models


def in_old_plans(folder: Path) -> None:
    """Describe a model's network as nnU-Net did before version 2.4. Public models have such plans."""
    plans = json.loads((folder / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    of_network = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": of_network["features_per_stage"][0],
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": of_network["n_conv_per_stage"],
        "n_conv_per_stage_decoder": of_network["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": of_network["strides"],
        "conv_kernel_sizes": of_network["kernel_sizes"],
    }
    (folder / "plans.json").write_text(json.dumps(plans))


@pytest.mark.compatibility("plans", "stock models with plans of nnU-Net before 2.4, in a set")
def test_models_with_plans_of_old_nnunet(models, image, tmp_path):
    old = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in models.items()}
    for folder in old.values():
        in_old_plans(folder)
    found = []
    for of in (models, old):
        predictor = the_set(of, num_patches=2)
        found.append(predictor.predict_case(case_of(predictor, image)).segmentation)
    assert np.array_equal(*found)


def test_classes_of_one_side_are_reported(models, capsys):
    the_set(models)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "spleen" in line and "stay as" in line]
    assert [line for line in lines if "nodule" in line and "left out" in line]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": ("heart",)}, "no class of --global_model"),
        ({"dataset": {"channel_names": {"0": "T1"}}}, "differ in their channels"),
        ({"patch_size": [8, 8], "spacing": [1.0, 1.0]}, "is a 2D model"),
        ({"trainer": "nnUNetTrainerNMSW"}, "is an NMSW model"),
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        (
            {"dataset": {"labels": {"background": 0, "liver": [1, 2], "tumour": [2]}, "regions_class_order": [1, 2]}},
            "regions",
        ),
        ({"resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 0}}, "resample probabilities"),
    ],
)
def test_models_that_do_not_fit_are_refused_in_a_line(models, tmp_path, change, says):
    other = write_model(tmp_path / "other", **{"trainer": "nnUNetTrainer", "labels": ("liver", "rib"), **change})
    with pytest.raises(UserError, match=says) as refused:
        the_set({**models, "other": other}, ("abdomen", "other"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("order", [("abdomen", "abdomen"), ("coarse",)])
def test_a_model_that_is_named_twice_is_refused(models, order):
    with pytest.raises(UserError, match="is named twice"):
        the_set(models, order)


GEOMETRIES = {
    "smaller than a patch": {"shape": (5, 18, 22)},
    "transposed": {"transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]},
    "cropped": {"border": 3},
    "thick slices": {"spacing": [3.0, 1.0, 1.0], "shape": (9, 20, 20)},
    "transposed thick slices": {
        "transpose_forward": [1, 2, 0],
        "transpose_backward": [2, 0, 1],
        "spacing": [3.0, 1.0, 1.0],
        "shape": (9, 20, 20),
    },
    "of another spacing": {"spacing": [1.7, 0.8, 1.3]},
}


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_labels_are_those_of_stock_models_in_images_of_every_geometry(tmp_path, geometry):
    """By nnU-Net's own way from an array to labels of the image, where no two models claim a voxel."""
    of = {"shape": SHAPE, "border": 0, "spacing": [1.0] * 3, **GEOMETRIES[geometry]}
    models = write_models(tmp_path)
    for folder in models.values():
        plans = json.loads((folder / "plans.json").read_text())
        plans |= {key: of[key] for key in ("transpose_forward", "transpose_backward") if key in of}
        (folder / "plans.json").write_text(json.dumps(plans))
    image = np.zeros((1, *of["shape"]), np.float32)
    inside = (slice(of["border"], n - of["border"]) for n in of["shape"])
    inside = (slice(None), *inside)
    image[inside] = np.random.default_rng(1).normal(100, 30, image[inside].shape)
    properties = {"spacing": of["spacing"]}

    def of_stock(name: str) -> np.ndarray:
        predictor = stock(False)
        predictor.initialize_from_trained_model_folder(str(models[name]), (0,))
        labels: np.ndarray = predictor.predict_single_npy_array(image, dict(properties), None, None, False)
        return labels

    predictor = the_set(models, num_patches="all")
    weights = {
        model.digest: FusionWeights.convex(torch.ones(model.labels.num_shared)) for model in predictor.fine_models
    }
    predictor.calibration = SetCalibration(weights, None)  # patches alone count
    (case,) = predictor.preprocess_arrays([image], [properties], [None], [None], 0)
    found, windows = predictor.predict_case(case)
    assert all(len(chosen.starts) == chosen.num_windows for chosen in windows)
    claims = np.zeros((len(COARSE) + 1, *of["shape"]), bool)
    for name, classes in FINE.items():
        labels = of_stock(name)
        for number, label in enumerate(classes, 1):
            if label in COARSE:
                claims[COARSE.index(label) + 1] |= labels == number
    alone, none = claims.sum(0) == 1, claims.sum(0) == 0
    assert alone.mean() > 0.1
    # nnU-Net adds windows up in half precision, of which little is left at the border of a volume.
    assert (found[alone] == claims.argmax(0)[alone]).mean() > 0.96
    assert np.isin(found[none], [0, 2]).mean() > 0.96  # background, or the spleen, which no fine model has
