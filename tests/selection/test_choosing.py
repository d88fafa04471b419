import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_nmsw.selection.budget import Budget, budget_of
from nnunet_nmsw.selection.by_score import (
    GreedyBenefit,
    GreedyCoverage,
    TopK,
    greedy_benefit,
    greedy_coverage,
    top_k,
)
from nnunet_nmsw.selection.draw import PlackettLuce, sample_windows, window_entropy
from nnunet_nmsw.selection.interface import CoarsePrediction, candidates
from nnunet_nmsw.selection.sampler import BenefitSampler, ContributionSampler
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import WindowGrid

ENCODING = LabelEncoding(2)


def coarse_prediction(shape, seed=0):
    """A random coarse prediction that sees some foreground everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return CoarsePrediction(
        torch.randn(2, *shape, generator=generator), torch.randn(shape, generator=generator), ENCODING
    )


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
    logits = torch.zeros(2, 4, 4, 4)
    logits[0] = 10
    logits[0, 0, 0, 0] = 2  # a foreground of 0.12, which is not the winning class
    coarse = CoarsePrediction(logits, torch.zeros(4, 4, 4), ENCODING)
    assert candidates(coarse, grid).tolist() == [True] + [False] * 7
    assert candidates(coarse, grid, at_least=2).all()
    logits[0] = 10
    assert candidates(coarse, grid).all()


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


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([0.4, 1.0]))
def test_greedy_benefit_takes_the_best_of_what_is_left(seed, discount):
    grid = WindowGrid((11, 12, 13), (5, 4, 6), (2, 1, 3), 0.25)
    left = torch.randn(grid.low_shape, generator=torch.Generator().manual_seed(seed))
    taken = greedy_benefit(left, torch.ones(len(grid), dtype=torch.bool), Budget(20), grid, discount).tolist()
    assert len(set(taken)) == 20
    for number, window in enumerate(taken):
        means = grid.mean(left)
        means[taken[:number]] = -torch.inf
        assert means[window] >= means.max() - 1e-5
        covered, at = torch.zeros(grid.low_shape), grid.touched(torch.tensor(window))
        covered[at] = grid.coverage(torch.tensor(window), at)
        left = left * (1 - discount * covered)


def test_greedy_benefit_takes_what_is_left():
    grid = WindowGrid((8, 8, 24), (8, 8, 8), (2, 2, 2), 0.5)  # five windows in a row, each overlapping its neighbours
    benefit = torch.zeros(grid.low_shape)
    benefit[:, :, 2:6] = 1.0  # voxels 4 to 12: all of window 1, half of windows 0 and 2
    benefit[:, :, 8:10] = 0.5  # half of window 3, and of window 4
    benefit[:, :, 10:] = -1.0
    everything = torch.ones(5, dtype=torch.bool)
    assert greedy_benefit(benefit, everything, Budget(2), grid).tolist() == [1, 3]
    assert greedy_benefit(benefit, everything, Budget(5, threshold=0.0), grid).tolist() == [1, 3]
    no_second = torch.tensor([True, False, True, False, False])
    assert greedy_benefit(benefit, no_second, Budget(3), grid).tolist()[:2] == [0, 2]
    assert sorted(greedy_benefit(benefit, everything, Budget(9), grid).tolist()) == [0, 1, 2, 3, 4]


@settings(max_examples=20)
@given(
    st.integers(0, 2**31),
    st.sampled_from([ENCODING, LabelEncoding(3, None, ((1, 2), (2,)), (1, 2))]),
    st.sampled_from([Budget(6), Budget(30, threshold=0.1)]),
)
def test_a_place_is_worth_more_where_the_coarse_prediction_is_uncertain(seed, encoding, budget):
    grid = WindowGrid((11, 12, 13), (5, 4, 6), (2, 1, 3))
    coarse = coarse_prediction(grid.low_shape, seed)._replace(encoding=encoding)
    in_the_map = coarse.score_map_dhw + 0.7 * encoding.entropy(coarse.logits_Cdhw)
    found = GreedyBenefit(entropy_worth=0.7).choose(coarse, grid, budget)
    expected = GreedyBenefit(entropy_worth=0).choose(coarse._replace(score_map_dhw=in_the_map), grid, budget)
    assert torch.equal(found.starts_K3, expected.starts_K3)
    assert torch.equal(found.scores_K, expected.scores_K)


SELECTORS = (TopK(), GreedyCoverage(), GreedyBenefit())


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: selector.name)
def test_a_choice_is_deterministic_and_of_the_asked_number(selector):
    grid = WindowGrid((24, 24, 24), (8, 8, 8), (2, 2, 2))
    coarse = coarse_prediction(grid.low_shape)
    first, second = (selector.choose(coarse, grid, Budget(5)) for _ in range(2))
    assert torch.equal(first.starts_K3, second.starts_K3)
    assert len(set(map(tuple, first.starts_K3.tolist()))) == 5
    everything = selector.choose(coarse, grid, budget_of("all", len(grid)))
    assert sorted(everything.starts_K3.tolist()) == grid.starts_N3.tolist()


@pytest.mark.parametrize("selector", [TopK(), GreedyBenefit()], ids=lambda selector: selector.name)
def test_a_threshold_is_what_every_window_exceeds(selector):
    grid = WindowGrid((24, 24, 24), (8, 8, 8), (2, 2, 2))
    coarse = coarse_prediction(grid.low_shape)
    taken = [
        len(selector.choose(coarse, grid, budget_of("auto", len(grid), threshold)).starts_K3)
        for threshold in (-1e9, 0.0, 0.1, 1e9)
    ]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == len(grid)
    assert taken[-1] == 0


def test_a_draw_is_a_choice_that_knows_how_it_was_drawn():
    torch.manual_seed(0)
    grid = WindowGrid((24, 24, 24), (8, 8, 8), (2, 2, 2))
    coarse = coarse_prediction(grid.low_shape)
    draw = PlackettLuce(by_spread=False).choose(coarse, grid, Budget(4))
    assert torch.equal(draw.starts_K3, grid.starts_N3[draw.sample.indices_K])
    assert len(set(draw.sample.indices_K.tolist())) == 4
    one = WindowGrid((8, 8, 8), (8, 8, 8), (2, 2, 2))
    assert len(PlackettLuce(by_spread=True).choose(coarse_prediction(one.low_shape), one, Budget(4)).starts_K3) == 1


def test_the_score_map_is_gated_by_the_entropy():
    output, entropy = torch.randn(2, 4, 4, 4).unbind()
    entropy = entropy.abs()
    for sampler in (BenefitSampler(), ContributionSampler()):
        torch.testing.assert_close(sampler.score_map(output, entropy), output * entropy / (entropy + 0.1))
