"""Classes of two models matched by name, and logits of one model as logits of the matched classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_nmsw.volume.matched_labels import MatchedLabels, matched_logits

COARSE = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "rib": 4}


def test_classes_are_matched_by_name_and_ordered_as_the_coarse_models():
    fine = {"background": 0, "kidney": 1, "lesion": 2, "liver": 3, "ignore": 4}
    labels = MatchedLabels.of(COARSE, fine)
    assert labels == MatchedLabels(coarse=(1, 3), fine=(3, 1), only_fine=("lesion",))
    assert labels.num_channels == labels.encoding.num_channels == 3


@pytest.mark.parametrize("fine", [{"background": 0, "lung": 1}, {"background": 0}, {"background": 0, "ignore": 1}])
def test_nothing_is_matched_without_a_common_class(fine):
    assert not MatchedLabels.of({**COARSE, "ignore": 5}, fine).coarse


@given(st.permutations(range(6)), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_probabilities_stay_and_all_others_are_summed(order, number, seed):
    channels = order[:number]
    logits_CV = 5 * torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
    probabilities_CV = logits_CV.softmax(0)
    matched_MV = matched_logits(logits_CV, channels, 0).softmax(0)
    torch.testing.assert_close(matched_MV[1:], probabilities_CV[channels])
    others = [channel for channel in range(6) if channel not in channels]
    torch.testing.assert_close(matched_MV[0], probabilities_CV[others].sum(0))


def test_logits_of_all_classes_stay_as_they_are():
    logits_CV = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(matched_logits(logits_CV, (1, 2), 0), logits_CV)
