import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import DATASET_JSON, make_plans

from nnunet_nmsw.inference.preprocessor import NORMALISATIONS, ImagePreprocessor


def images():
    random = np.random.default_rng(0)
    full = random.normal(300, 200, size=(2, 12, 14, 16)).clip(0, 255).astype(np.float32)
    full[0, 3, 4, 5] = 0.5
    yield "no border", full
    holes = full.copy()
    holes[:, :3] = holes[:, :, -4:] = holes[..., :2] = 0
    holes[:, 6:8, 5:7, 5:9] = 0  # filled by nnU-Net
    yield "a border and a hole", holes
    other = holes.copy()
    other[1, 1] = 1  # the border of one channel is not the other's
    yield "channels differ", other
    yield "nothing", np.zeros_like(full)
    yield "integers", holes.astype(np.int16)


@pytest.mark.parametrize("image", [pytest.param(image, id=name) for name, image in images()])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("scheme", sorted(NORMALISATIONS))
def test_images_and_their_properties_are_nnunets(scheme, with_mask, image):
    plans = make_plans()
    plans["transpose_forward"], plans["transpose_backward"] = [2, 0, 1], [1, 2, 0]
    statistics = {"mean": 100.0, "std": 30.0, "percentile_00_5": 10.0, "percentile_99_5": 200.0}
    plans["foreground_intensity_properties_per_channel"] = {"0": statistics, "1": statistics}
    settings = plans["configurations"]["3d_fullres"]
    settings["normalization_schemes"], settings["use_mask_for_norm"] = [scheme] * 2, [False, with_mask]
    manager = PlansManager(plans)
    arguments = (manager, manager.get_configuration("3d_fullres"), DATASET_JSON)
    results = []
    for preprocessor in (DefaultPreprocessor, ImagePreprocessor):
        given, properties = image.copy(), {"spacing": [1.0, 1.5, 0.8]}
        data, _, properties = preprocessor(verbose=False).run_case_npy(given, None, properties, *arguments)
        np.testing.assert_array_equal(given, image)  # left as it was
        results.append((data, properties))
    (expected, of_nnunet), (data, properties) = results
    assert data.dtype == expected.dtype
    np.testing.assert_array_equal(data, expected)
    assert properties == of_nnunet


def test_another_normalisation_gets_its_mask():
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["MyNormalization"]
    manager = PlansManager(plans)
    masks = []

    class Normalising(ImagePreprocessor):
        def _normalize(self, data, seg, *_):
            masks.append(seg)
            return data

    image = np.ones((1, 12, 14, 16), np.float32)
    image[:, :, 0, 0] = 0
    configuration = manager.get_configuration("3d_fullres")
    Normalising(False).run_case_npy(image, None, {"spacing": [1, 1, 1]}, manager, configuration, DATASET_JSON)
    assert masks[0].min() == -1
