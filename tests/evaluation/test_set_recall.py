"""What the windows of a set reach, against nnU-Net's own sliding window."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_sets import COARSE, FINE, case_of, noise, stock_logits, the_set, write_models

from nnunet_nmsw.evaluation.reached import Reached
from nnunet_nmsw.evaluation.set_recall import reached


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return noise()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_objects_are_counted(seed):
    random = np.random.default_rng(seed)
    own, windows = (random.random((5, 6, 7)) < share for share in (0.1, 0.3))
    found = Reached.of(own, windows)
    left, objects = {tuple(voxel) for voxel in np.argwhere(own)}, []
    while left:
        front, one = [left.pop()], set()
        while front:
            voxel = front.pop()
            one.add(voxel)
            near = {other for other in left if max(abs(a - b) for a, b in zip(voxel, other, strict=True)) == 1}
            left -= near
            front += near
        objects.append(one)
    touched = [one for one in objects if any(windows[voxel] for voxel in one)]
    assert found == Reached(len(objects), len(touched), int(own.sum()), int((own & windows).sum()))


@pytest.mark.parametrize(("num_patches", "explore"), [(1, 0), (2, 2), ("all", 0)])
def test_the_objects_are_those_of_the_models_own_sliding_windows(models, image, num_patches, explore):
    predictor = the_set(models, num_patches=num_patches, explore=explore)
    case = case_of(predictor, image)
    found = reached(predictor, case)
    windows = predictor.predict_case(case).windows
    assert sorted(found) == [1, 3, 4, 5]
    for (name, classes), chosen in zip(FINE.items(), windows, strict=True):
        own = stock_logits(models[name], image).argmax(0).numpy()
        here = np.zeros(own.shape, bool)
        for start in chosen.starts:
            here[tuple(slice(max(0, a), a + 8) for a in start)] = True
        for number, label in enumerate(classes, 1):
            if label not in COARSE:
                continue
            of_class = found[COARSE.index(label) + 1]
            expected = Reached.of(own == number, here)
            # nnU-Net adds its windows up in half precision, which decides on a few voxels of noise.
            assert abs(of_class.objects - expected.objects) <= 1
            assert abs(of_class.reached - expected.reached) <= 1
            assert of_class[2:] == pytest.approx(expected[2:], rel=0.02, abs=3)
            if num_patches == "all":
                assert of_class.reached == of_class.objects
