"""A sliding window that skips what is empty."""

import itertools

import pytest
import torch
from tiny import build_network, initialized

from nnunet_nmsw.evaluation.shared import Costs, SharedSlidingWindow
from nnunet_nmsw.evaluation.skipping import looked_at


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (4, 5, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_skipped_touches_no_foreground_that_was_found(shape, seed):
    generator, asked = torch.Generator().manual_seed(seed), []
    foreground = torch.rand(shape, generator=generator) < 0.15

    def has_foreground(index):
        asked.append(index)
        return bool(foreground[index])

    seen = looked_at(shape, has_foreground)
    assert sorted(asked) == sorted(seen)  # each once
    for index in itertools.product(*map(range, shape)):
        neighbours = [n for n in seen if max(abs(a - b) for a, b in zip(n, index, strict=True)) <= 1]
        assert neighbours  # nothing is skipped without a look beside it
        assert (index in seen) or not any(foreground[n] for n in neighbours)


def test_all_is_looked_at_where_all_is_foreground_and_an_eighth_where_nothing_is():
    assert len(looked_at((4, 4, 4), lambda index: True)) == 64
    assert len(looked_at((4, 4, 4), lambda index: False)) == 8


def test_the_prediction_is_nnunets_where_it_looks_and_background_elsewhere():
    network = build_network().eval()
    with torch.no_grad():  # foreground where the image is bright
        network.local_branch.decoder.seg_layers[-1].weight.mul_(0.01)
        network.local_branch.decoder.seg_layers[-1].bias.copy_(torch.tensor([1.0, -1.0, -1.0]))
    volume = torch.randn(1, 32, 32, 32)
    predictor = initialized(
        SharedSlidingWindow(Costs(), use_mirroring=False, allow_tqdm=False, device=torch.device("cpu")), network
    )
    predictor.tile_step_size = 1.0
    everything = predictor.predict_logits_from_preprocessed_data(volume).float()
    assert predictor.num_looked_at is None
    predictor.skips_background = True
    skipped = predictor.predict_logits_from_preprocessed_data(volume).float()
    assert predictor.num_looked_at == 8  # of 64
    seen = (skipped - everything).abs().amax(0) < 1e-2
    assert 8 * 8**3 <= seen.sum() < 9 * 8**3
    assert (skipped.argmax(0) == 0).all()
    with torch.no_grad():
        network.local_branch.decoder.seg_layers[-1].bias.copy_(torch.tensor([-1.0, 1.0, -1.0]))
    predictor = initialized(predictor, network)
    skipped = predictor.predict_logits_from_preprocessed_data(volume)
    assert predictor.num_looked_at == 64
    predictor.skips_background = False
    assert torch.equal(skipped, predictor.predict_logits_from_preprocessed_data(volume))
