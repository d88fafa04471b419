"""What trains the scores."""

import pytest
import torch
from training import ENCODING

from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.selection.sampler import BENEFIT_LOSS_WEIGHT, LARGEST_BENEFIT, BenefitMap, BenefitSampler
from nnunet_nmsw.trainers.losses.benefit import SCALE_MEMORY, updated_scale


def test_the_score_map_is_regressed_on_the_benefit_in_units_of_its_scale():
    score_map_dhw = torch.zeros(4, 4, 4, requires_grad=True)
    coarse = CoarsePrediction(torch.zeros(2, 4, 4, 4), score_map_dhw, ENCODING)
    benefit_dhw, weight_dhw = torch.full((4, 4, 4), 6.0), torch.ones(4, 4, 4)
    benefit_dhw[0], benefit_dhw[1] = -6, 1e9
    weight_dhw[2] = 0
    loss = BenefitSampler().score_loss(None, coarse, BenefitMap(benefit_dhw, weight_dhw), torch.tensor(3.0))
    # Planes of targets -2, the largest, 2 without weight, and 2; the score is 0 everywhere.
    assert loss.regression == pytest.approx((4 + LARGEST_BENEFIT**2 + 4) / 3)
    assert loss.loss.item() == pytest.approx(BENEFIT_LOSS_WEIGHT * loss.regression.item())
    (gradient_dhw,) = torch.autograd.grad(loss.loss, score_map_dhw)
    for plane, target in enumerate((-2, LARGEST_BENEFIT, 0, 2)):
        expected = torch.full((4, 4), -2 * BENEFIT_LOSS_WEIGHT * target / 48)
        torch.testing.assert_close(gradient_dhw[plane], expected)


def test_where_all_windows_are_ignored_nothing_is_regressed():
    coarse = CoarsePrediction(torch.zeros(2, 4, 4, 4), torch.ones(4, 4, 4), ENCODING)
    nothing = BenefitMap(torch.zeros(4, 4, 4), torch.zeros(4, 4, 4))
    assert BenefitSampler().score_loss(None, coarse, nothing, torch.tensor(3.0)).loss == 0
    assert updated_scale(torch.tensor(3.0), nothing) == 3


def test_the_scale_is_a_running_root_mean_square_where_windows_are():
    benefit_dhw, weight_dhw = torch.full((2, 2, 2), 2.0), torch.ones(2, 2, 2)
    benefit_dhw[0] = 50
    weight_dhw[0] = 0
    measured = BenefitMap(benefit_dhw, weight_dhw)
    assert updated_scale(torch.tensor(0.0), measured) == 2  # the first step
    expected = (SCALE_MEMORY * 1 + (1 - SCALE_MEMORY) * 4) ** 0.5
    assert updated_scale(torch.tensor(1.0), measured).item() == pytest.approx(expected)
