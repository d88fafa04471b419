"""The experiments run on the present code."""

import ablation
import arms
import pytest
import torch
from tiny import build_network
from training import training_step


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
