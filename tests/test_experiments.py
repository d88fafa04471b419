"""The experiments run on the present code."""

import ablation
import ablation_run
import arms
import numpy as np
import pytest
import torch
from tiny import build_network
from training import training_step

from nnunet_nmsw.selection.calibration import THRESHOLDS


@pytest.mark.parametrize("name", arms.PARTS)
def test_arms_that_are_no_settings(name):
    network = build_network(trainer=getattr(arms, f"nnUNetTrainerNMSW_{name}"))
    result = training_step(network, (16, 20, 24))
    result.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert (len(network.fusion_parameters) == 1) is (name == "class_weights")


def test_default_arms_are_there():
    names = [ablation.STOCK, *ablation.ARMS]
    assert [ablation.parse_arm(name)[0] for name in names] == names
    assert ablation.parse_arm('mine={"num_patches": 3}')[1].settings == {"num_patches": 3}


def test_the_number_of_windows_of_a_case_is_set_on_the_others():
    by_threshold = {threshold: [0.5, 0.5, 0.5] for threshold in THRESHOLDS}
    by_threshold[THRESHOLDS[1]] = [0.5, 0.6, 0.6]  # best of all but for case 1 and 2 alone
    by_threshold[THRESHOLDS[3]] = [0.9, 0.5, 0.5]
    dice = {str(threshold): [np.array([of, np.nan]) for of in values] for threshold, values in by_threshold.items()}
    taken = {str(threshold): [10 - number] * 3 for number, threshold in enumerate(THRESHOLDS)}
    found, windows = ablation_run.calibrated(dice, taken)
    assert [of[0] for of in found] == [0.5, 0.5, 0.5]
    assert windows == [9, 7, 7]
