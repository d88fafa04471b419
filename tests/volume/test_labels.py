import pytest
import torch
from fusion_problems import CLASSES, ENCODINGS, label_manager, one_hot
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_nmsw.volume.labels import LabelEncoding


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_the_encoding_is_read_from_nnunets_labels(encoding):
    assert LabelEncoding.of(label_manager(encoding)) == encoding


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_hits_are_those_of_nnunets_validation(encoding):
    torch.manual_seed(0)
    labels, logits = torch.randint(0, encoding.num_labels, (6, 7, 8)), torch.randn(CLASSES, 6, 7, 8)
    prediction = label_manager(encoding).convert_logits_to_segmentation(logits).long()
    counted = torch.ones_like(labels, dtype=torch.bool)
    if encoding.ignore_label is not None:
        counted = labels != encoding.ignore_label
    groups = encoding.regions or [(label,) for label in range(1, CLASSES)]
    for group, *hits in zip(groups, *encoding.hits(labels, prediction), strict=True):
        reference, predicted = (torch.isin(values, torch.tensor(group)) & counted for values in (labels, prediction))
        expected = (reference & predicted, ~reference & predicted, reference & ~predicted)
        assert [int(hit) for hit in hits] == [int(voxels.sum()) for voxels in expected]


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(list(ENCODINGS.values())))
def test_voxels_of_one_label_are_as_their_one_hot_target(seed, encoding):
    torch.manual_seed(seed)
    logits, labels = torch.randn(CLASSES, 4, 5, 6) * 2, torch.randint(0, encoding.num_labels, (4, 5, 6))
    targets, voxels = encoding.targets(one_hot(labels, encoding))
    prediction = encoding.prediction(logits)
    probability = prediction.probability_CV
    cross_entropy = prediction.common_V * voxels - (prediction.log_likelihood_CV * targets).sum(0)
    terms, counted = encoding.voxel_terms(logits, labels), encoding.counted(labels)
    torch.testing.assert_close(terms.probability_CV, probability)
    torch.testing.assert_close(terms.cross_entropy_V[counted], cross_entropy[counted])
    hits = (probability * targets)[:, counted]
    if not encoding.has_regions:
        hits = hits.sum(0, keepdim=True)
    torch.testing.assert_close(terms.hits_XV[:, counted], hits)
    assert all(part.isfinite().all() for part in terms)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_decisions_become_nnunets_labels(encoding):
    logits = torch.randn(CLASSES, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = label_manager(encoding).convert_logits_to_segmentation(logits).long()
    assert torch.equal(encoding.labels_of(encoding.decided(logits)).long(), expected)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_entropy_and_foreground_are_those_of_the_distributions(encoding):
    logits = torch.randn(CLASSES, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    if encoding.has_regions:
        entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum(0)
        foreground = logits.sigmoid().amax(0)
    else:
        entropy = torch.distributions.Categorical(logits=logits.movedim(0, -1)).entropy()
        foreground = logits.softmax(0)[1:].sum(0)
    torch.testing.assert_close(encoding.entropy(logits), entropy)
    torch.testing.assert_close(encoding.foreground_probability(logits), foreground)
