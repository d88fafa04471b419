"""The experiments run on the present code."""

import ablation
import ablation_tables
import arms
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


def test_the_automatic_number_has_the_threshold_of_a_validation():
    measured = [[0.5, 0.5], [0.8, 0.6], [0.8, 0.599], *[[0.5, 0.5]] * 3, [0.1, 0.2]]
    dice = dict(zip(map(str, THRESHOLDS), measured, strict=True))
    taken = {str(threshold): 10 - number for number, threshold in enumerate(THRESHOLDS)}
    run = {"cases": 2, "dice": {"automatic": dice}, "taken": {"automatic": taken}}
    found = ablation_tables.with_automatic(run)
    assert found["dice"]["automatic"][ablation_tables.CALIBRATED] == [0.8, 0.599]
    assert found["taken"]["automatic"][ablation_tables.CALIBRATED] == 8
