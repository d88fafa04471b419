"""Two stock models of one dataset: the coarse one outside of windows, the fine one in them."""

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_sets import SHAPE, noise, stock_logits
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from predictors import CPU, stock
from untrained import write_model

from nnunet_nmsw.commands.predict import main
from nnunet_nmsw.inference.two_models import TwoModelPredictor


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A coarse model at 2 mm and a fine one at 1 mm."""
    folder = tmp_path_factory.mktemp("two_models")
    low = {"spacing": [2.0] * 3, "data_identifier": "low"}
    return (
        write_model(folder / "coarse", "nnUNetTrainer", seed=7, **low),
        write_model(folder / "fine", "nnUNetTrainer", seed=1),
    )


def predictor_of(models, **kwargs):
    coarse = stock(False)
    coarse.initialize_from_trained_model_folder(str(models[0]), (0,))
    predictor = TwoModelPredictor(coarse, use_mirroring=False, device=CPU, allow_tqdm=False, **kwargs)
    predictor.initialize_from_trained_model_folder(str(models[1]), (0,))
    return predictor


def test_each_model_sees_the_image_at_its_own_spacing(models):
    image = noise()
    coarse = F.interpolate(stock_logits(models[0], image)[None], SHAPE, mode="trilinear")[0]
    fine = stock_logits(models[1], image)
    predictor = predictor_of(models, num_patches=1)
    (case,) = predictor.preprocess_arrays([image], [{"spacing": [1.0] * 3}], [None], [None], 0)
    found, (windows,) = predictor.predict_case(case)
    outside = np.ones(SHAPE, bool)
    outside[tuple(slice(max(0, a), a + 8) for a in windows.starts[0])] = False
    assert outside.sum() == np.prod(SHAPE) - 8**3
    best = coarse.topk(2, dim=0).values
    sure = (best[0] - best[1] > 0.01).numpy() & outside
    assert sure.sum() > 0.9 * outside.sum()
    np.testing.assert_array_equal(found[sure], coarse.argmax(0).numpy()[sure])

    predictor = predictor_of(models, num_patches="all")
    found = predictor.predict_case(case).segmentation
    fused = 0.88 * fine + 0.12 * coarse  # sigmoid of 2, where a training begins
    inside = (slice(2, -2),) * 3  # nnU-Net adds windows up in half precision, of which little is left at the border
    best = fused.topk(2, dim=0).values
    sure = (best[0] - best[1] > 0.05 * fused.std()).numpy()[inside]
    assert sure.mean() > 0.7
    assert (found[inside][sure] == fused.argmax(0).numpy()[inside][sure]).mean() > 0.999


def test_both_models_are_given_the_orientation(models, tmp_path):
    in_ras = noise()[0]
    labels = {}
    for orientation in ("RAS", "PIL"):
        turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
        (tmp_path / orientation).mkdir()
        affine = inv_ornt_aff(turn, in_ras.shape)
        nibabel.save(
            nibabel.Nifti1Image(apply_orientation(in_ras, turn), affine), tmp_path / orientation / "a_0000.nii.gz"
        )
        flags = ["--global_model", str(models[0]), "--local_model", str(models[1]), "--orientation", "RAS"]
        output = tmp_path / f"{orientation} out"
        main(["-i", str(tmp_path / orientation), "-o", str(output), "-device", "cpu", "-k", "3", "-npp", "0", *flags])
        predicted = nibabel.load(output / "a.nii.gz")
        assert "".join(nibabel.aff2axcodes(predicted.affine)) == orientation
        labels[orientation] = np.asarray(nibabel.as_closest_canonical(predicted).dataobj)
    assert len(np.unique(labels["RAS"])) > 1
    np.testing.assert_array_equal(labels["PIL"], labels["RAS"])


def test_the_start_of_the_fusion_is_what_is_assumed_here():
    assert torch.sigmoid(torch.tensor(2.0)).item() == pytest.approx(0.88, abs=1e-3)
