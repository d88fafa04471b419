"""Classes of two models matched by name, and logits of one model as logits of the matched classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_nmsw.volume.matched_labels import MatchedLabels

COARSE = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "rib": 4}


def test_classes_are_matched_by_name_and_ordered_as_the_coarse_models():
    fine = {"background": 0, "kidney": 1, "lesion": 2, "liver": 3, "ignore": 4}
    labels = MatchedLabels.of(COARSE, fine)
    assert labels == MatchedLabels(coarse=(1, 3), fine=(3, 1), only_fine=("lesion",), others=(2,))
    assert (labels.num_shared, labels.num_channels) == (3, 4)


@pytest.mark.parametrize("fine", [{"background": 0, "lung": 1}, {"background": 0}, {"background": 0, "ignore": 1}])
def test_nothing_is_matched_without_a_common_class(fine):
    assert not MatchedLabels.of({**COARSE, "ignore": 5}, fine).coarse


@given(st.permutations(range(1, 6)), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_probabilities_of_the_coarse_model_stay_and_winners_of_the_fine_one(order, number, seed):
    shared, others = tuple(order[:number]), tuple(order[number:])
    labels = MatchedLabels(shared, shared, (), others)
    logits_CV = 5 * torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))

    probabilities_CV = logits_CV.softmax(0)
    of_coarse_MV = labels.of_coarse(logits_CV).softmax(0)
    torch.testing.assert_close(of_coarse_MV[1:], probabilities_CV[list(shared)])
    torch.testing.assert_close(of_coarse_MV[0], probabilities_CV[[0, *others]].sum(0))

    of_fine_FV = labels.of_fine(logits_CV[None])[0]
    assert of_fine_FV.shape == labels.for_fusion(of_coarse_MV).shape
    matched = labels.of_shared(of_fine_FV).argmax(0)
    for winner, channel in zip(logits_CV.argmax(0).tolist(), matched.tolist(), strict=True):
        assert channel == (shared.index(winner) + 1 if winner in shared else 0)


def test_logits_of_all_classes_stay_as_they_are():
    labels = MatchedLabels((1, 2), (1, 2), (), ())
    logits_CV = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(labels.of_coarse(logits_CV), logits_CV)
    assert torch.equal(labels.of_fine(logits_CV[None])[0], logits_CV)
    assert torch.equal(labels.for_fusion(logits_CV), logits_CV)
    assert torch.equal(labels.of_shared(logits_CV), logits_CV)
