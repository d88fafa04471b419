"""Calibration of a set: weights that are known are found, left-out cases are told apart, files are of their models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_sets import case_of, the_set, write_models
from untrained import write_model

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.evaluation.set_calibration import THRESHOLDS, Labelled, Observed, calibrate, fitted
from nnunet_nmsw.inference.model_set import ModelSetPredictor
from nnunet_nmsw.inference.set_calibration import SetCalibration, document_of, read_calibration
from nnunet_nmsw.model.fusion import FusionWeights

COARSE = ("liver", "spleen", "kidney")
FINE = {"one": ("kidney", "liver"), "two": ("spleen",)}


def test_weights_that_made_the_labels_are_found():
    generator = torch.Generator().manual_seed(0)
    patch_VM, coarse_VM = (2 * torch.randn(60_000, 3, generator=generator) for _ in range(2))
    true = FusionWeights(torch.tensor([0.5, 1.2, 0.9]), torch.tensor([0.4, -0.2, 0.1]), torch.tensor([0.3, 0.0, -0.3]))
    probability_VM = (true.patch_C * patch_VM + true.coarse_C * coarse_VM + true.bias_C).softmax(1)
    label_V = torch.multinomial(probability_VM, 1, generator=generator)[:, 0]
    observed = Observed(patch_VM, coarse_VM, label_V, torch.ones(len(label_V)))
    found = fitted(observed, FusionWeights.convex(torch.full((3,), 0.88)))
    for part, expected in zip(found, true, strict=True):
        assert (part - expected).abs().max() < 0.05


def test_voxels_that_stand_for_many_count_as_many():
    generator = torch.Generator().manual_seed(0)
    patch_VM, coarse_VM = (torch.randn(400, 2, generator=generator) for _ in range(2))
    label_V = torch.randint(0, 2, (400,), generator=generator)
    start = FusionWeights.convex(torch.full((2,), 0.88))
    twice = torch.cat([torch.arange(400), torch.arange(100)])
    several = fitted(Observed(patch_VM[twice], coarse_VM[twice], label_V[twice], torch.ones(500)), start)
    share_V = torch.ones(400)
    share_V[:100] = 2
    weighted = fitted(Observed(patch_VM, coarse_VM, label_V, share_V), start)
    torch.testing.assert_close(torch.stack(list(several)), torch.stack(list(weighted)), atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), COARSE, FINE)


def labelled(predictor: ModelSetPredictor, number: int) -> list[Labelled]:
    """Images of noise with a bright box, which is the liver, and a dark one, the spleen."""
    cases = []
    for seed in range(number):
        random = np.random.default_rng(seed)
        image, reference = random.normal(100, 10, (1, 20, 18, 22)).astype(np.float32), np.zeros((20, 18, 22), np.uint8)
        for label, brightness in ((1, 300), (2, -100)):
            start = random.integers(1, 9, 3)
            box = tuple(slice(a, a + 7) for a in start)
            image[(0, *box)] += brightness
            reference[box] = label
        cases.append(Labelled(f"case {seed}", case_of(predictor, image), reference))
    return cases


def test_a_set_is_calibrated_and_the_file_gives_the_same_predictions(models, tmp_path):
    predictor, lines = the_set(models, num_patches="50%"), []
    cases = labelled(predictor, 3)
    found = calibrate(predictor, cases, 0.01, lines.append)
    assert len(found.before) == len(found.left_out) == 3
    assert np.mean(found.left_out) > np.mean(found.before)  # networks at random: nearly everything is better
    assert found.calibration.threshold in THRESHOLDS
    assert sorted(found.reached) == [1, 2, 3]
    assert predictor.num_patches == "50%"
    assert len(lines) == 3 + 3 + len(THRESHOLDS)

    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(document_of(found.calibration, predictor.digest, predictor.fine_models)))
    for num_patches in ("50%", "auto"):
        predictor.num_patches = num_patches
        expected = predictor.predict_case(cases[0].case)
        again = the_set(models, ("two", "one"), num_patches=num_patches, calibration=file)  # in another order
        segmentation, windows = again.predict_case(cases[0].case)
        assert np.array_equal(segmentation, expected.segmentation)
        assert sorted(len(w.starts) for w in windows) == sorted(len(w.starts) for w in expected.windows)
    assert the_set(models, calibration=file).num_patches == "auto"


def test_a_single_case_leaves_none_out(models):
    predictor = the_set(models, num_patches=2)
    assert calibrate(predictor, labelled(predictor, 1), 0.01, lambda _: None).left_out == []


def test_a_calibration_of_other_models_is_refused(models, tmp_path):
    predictor = the_set(models)
    document = document_of(SetCalibration({}, 0.01), predictor.digest, predictor.fine_models)
    file = tmp_path / "calibration.json"
    other = write_model(tmp_path / "other", "nnUNetTrainer", FINE["two"], seed=9)
    for change, says in (
        ({"global_model": "other"}, "of other models"),
        ({"local_models": document["local_models"][:1]}, "of other models"),
        ({"threshold": -1}, "broken at threshold"),
        ({"local_models": [{**row, "bias": [0.0]} for row in document["local_models"]]}, "has other classes"),
    ):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(UserError, match=says):
            the_set(models, calibration=file)
    file.write_text(json.dumps(document))
    assert read_calibration(file, predictor.digest, predictor.fine_models).threshold == 0.01
    with pytest.raises(UserError, match="of other models"):
        the_set({**models, "two": other}, calibration=file)
    file.write_text("[")
    with pytest.raises(UserError, match="make it anew"):
        the_set(models, calibration=file)
    with pytest.raises(UserError, match="needs a calibration"):
        the_set(models, num_patches="auto")
