import itertools
import math

import pytest
import torch

from nnunet_nmsw.volume.windows import WindowGrid
from nnunet_nmsw.selection.topk import candidate_windows, greedy_benefit, greedy_coverage, sample_windows, top_k, window_entropy


def plackett_luce_inclusion(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Probability of each item to be among k draws without replacement, by enumerating the ordered draws."""
    weights = scores.double().exp()
    inclusion = torch.zeros(len(scores), dtype=torch.float64)
    for draw in itertools.permutations(range(len(scores)), k):
        probability, left = 1.0, weights.sum()
        for item in draw:
            probability *= float(weights[item] / left)
            left = left - weights[item]
        inclusion[list(draw)] += probability
    return inclusion


@pytest.mark.parametrize("k", [1, 2, 3])
def test_inclusion_follows_plackett_luce(k):
    torch.manual_seed(k)
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0, -5.0, 1.0])
    everything = torch.ones(6, dtype=torch.bool)
    draws, counts = 20_000, torch.zeros(6, dtype=torch.float64)
    for _ in range(draws):
        sample = sample_windows(scores, k, everything, 2 / 3)
        assert len(set(sample.indices_K.tolist())) == k
        counts[sample.indices_K] += 1
    expected = plackett_luce_inclusion(scores, k)
    standard_error = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 4 * standard_error + 1e-4).all()


def test_log_probability_is_that_of_the_ordered_draw():
    torch.manual_seed(0)
    scores = torch.randn(5, requires_grad=True)
    candidates = torch.tensor([True, True, False, True, True])
    sample = sample_windows(scores, 3, candidates, 2 / 3)
    left, expected = [0, 1, 3, 4], []
    for index in sample.indices_K.tolist():
        assert index in left
        expected.append(scores.detach()[index] - scores.detach()[left].logsumexp(0))
        left.remove(index)
    torch.testing.assert_close(sample.log_probability_K, torch.stack(expected))
    (gradient,) = torch.autograd.grad(sample.log_probability_K.sum(), scores)
    assert gradient[2] == 0
    assert torch.isfinite(gradient).all()
    assert abs(gradient.sum()) < 1e-5


def test_relaxation_is_the_temperature_softmax_of_what_was_drawn():
    torch.manual_seed(0)
    scores = torch.zeros(4)
    sample = sample_windows(scores, 4, torch.ones(4, dtype=torch.bool), 0.1)
    assert (sample.relaxed_K > 0.25).all()
    assert sample.relaxed_K[-1] == 1


def test_entropy():
    candidates = torch.tensor([True, False, True, True])
    assert window_entropy(torch.zeros(4), candidates).item() == pytest.approx(math.log(3))
    assert window_entropy(torch.tensor([100.0, 500, 0, 0]), candidates).item() == pytest.approx(0, abs=1e-6)


def test_candidates_see_faint_foreground_and_fall_back_to_all():
    grid = WindowGrid((16, 16, 16), (8, 8, 8), (4, 4, 4), 1.0)
    foreground = torch.zeros(4, 4, 4)
    foreground[0, 0, 0] = 0.02
    candidates = candidate_windows(foreground, grid, 0.01, at_least=1)
    assert candidates.tolist() == [True] + [False] * 7
    assert candidate_windows(foreground, grid, 0.01, at_least=2).all()
    assert candidate_windows(torch.zeros(4, 4, 4), grid, 0.01, at_least=1).all()


def test_top_k_takes_candidates_first():
    scores = torch.tensor([5.0, 1.0, 3.0, 2.0])
    candidates = torch.tensor([False, True, False, True])
    assert top_k(scores, candidates, 3).tolist() == [3, 1, 0]
    assert top_k(torch.zeros(4), torch.ones(4, dtype=torch.bool), 4).tolist() == [0, 1, 2, 3]


def test_greedy_coverage_avoids_overlap_and_ends_with_all_windows():
    grid = WindowGrid((8, 8, 24), (8, 8, 8), (2, 2, 2), 0.5)  # five windows in a row, each overlapping its neighbours
    scores = torch.tensor([1.0, 1.1, 1.0, 0.4, 0.5])
    everything = torch.ones(5, dtype=torch.bool)
    assert top_k(scores, everything, 2).tolist() == [1, 0]
    assert greedy_coverage(scores, everything, 2, grid).tolist() == [1, 4]
    assert sorted(greedy_coverage(scores, everything, 5, grid).tolist()) == [0, 1, 2, 3, 4]


def test_greedy_benefit_takes_what_is_left():
    grid = WindowGrid((8, 8, 24), (8, 8, 8), (2, 2, 2), 0.5)  # five windows in a row, each overlapping its neighbours
    benefit = torch.zeros(grid.low_shape)
    benefit[:, :, 2:6] = 1.0  # voxels 4 to 12: all of window 1, half of windows 0 and 2
    benefit[:, :, 8:10] = 0.5  # half of window 3, and of window 4
    benefit[:, :, 10:] = -1.0
    everything = torch.ones(5, dtype=torch.bool)
    assert greedy_benefit(benefit, everything, 2, grid).tolist() == [1, 3]
    assert greedy_benefit(benefit, everything, 5, grid, stop_at=0.0).tolist() == [1, 3]
    no_second = torch.tensor([True, False, True, False, False])
    assert greedy_benefit(benefit, no_second, 3, grid).tolist()[:2] == [0, 2]
    assert sorted(greedy_benefit(benefit, everything, 9, grid).tolist()) == [0, 1, 2, 3, 4]
