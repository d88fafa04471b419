"""The experiments run on the present code."""

import math

import ablation
import ablation_tables
import arms
import placement
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_network
from training import training_step

from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.selection.calibration import THRESHOLDS
from nnunet_nmsw.volume.windows import WindowGrid


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
    dice = dict(zip(map(str, THRESHOLDS), ([0.5, 0.5], [0.8, 0.6], [0.8, 0.599], [0.5, 0.5], [0.1, 0.2]), strict=True))
    taken = {str(threshold): 10 - number for number, threshold in enumerate(THRESHOLDS)}
    run = {"cases": 2, "dice": {"automatic": dice}, "taken": {"automatic": taken}}
    found = ablation_tables.with_automatic(run)
    assert found["dice"]["automatic"][ablation_tables.CALIBRATED] == [0.8, 0.599]
    assert found["taken"]["automatic"][ablation_tables.CALIBRATED] == 8


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.3, math.inf]), st.sampled_from([None, 0.01]))
def test_each_window_wins_what_it_sees_better_than_the_windows_before_it(seed, bell, threshold):
    grid = WindowGrid((11, 12, 13), (5, 4, 6), (2, 1, 3), 0.25)
    generator = torch.Generator().manual_seed(seed)
    benefit, few = torch.randn(grid.low_shape, generator=generator), torch.rand(len(grid), generator=generator) > 0.95
    taken = placement.well_seen(benefit, few, Budget(12, threshold), grid, bell).tolist()
    of_axes = placement.views(grid, bell)
    views = torch.einsum("ad,bh,cw->abcdhw", *of_axes).reshape(len(grid), *grid.low_shape)
    seen, available = torch.zeros(grid.low_shape), torch.ones(len(grid), dtype=torch.bool)
    for number in range(12):
        won = ((views - seen).clamp_min(0) * benefit).sum((1, 2, 3)) / views.sum((1, 2, 3)).max()
        allowed = available & few if (available & few).any() else available
        best = won[allowed].max()
        if number == len(taken):
            assert threshold is not None
            assert best <= threshold + 1e-5
            break
        assert allowed[taken[number]]
        assert won[taken[number]] >= best - 1e-5
        available[taken[number]] = False
        seen = torch.maximum(seen, views[taken[number]])


def test_the_placement_looks_at_cells_of_large_windows():
    grid = WindowGrid((96, 64, 40), (64, 64, 16), (2, 4, 4), 0.25)
    benefit = torch.rand(grid.low_shape, generator=torch.Generator().manual_seed(0))
    cells_dhw, cells = placement.in_cells(benefit, grid)
    assert cells.downsampling_factor == (8, 8, 4)
    assert cells.low_shape == tuple(cells_dhw.shape) == (12, 8, 10)
    assert cells_dhw[2, 3, 4] == pytest.approx(float(benefit[8:12, 6:8, 4].mean()))
