"""Whom to believe where fine models meet, by a look at every voxel."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.claims import Claims, Merged, covered, without_windows
from nnunet_nmsw.volume.interpolation import linear_axis
from nnunet_nmsw.volume.labels import LabelEncoding

SHAPE = (3, 4, 5)
CLASSES = ((1, 3), (2,), (3, 4))
"""Of three models; two of them have class 3."""

WHOLE = tuple(slice(0, size) for size in SHAPE)


def random_claims(generator: torch.Generator, num_classes: int) -> Claims:
    """Some of the voxels covered, some of them claimed; few levels of sureness, so that some are equal."""
    covered_ZYX = torch.rand(SHAPE, generator=generator) < 0.6
    labels_ZYX = torch.randint(0, num_classes + 1, SHAPE, generator=generator).to(torch.int16)
    sureness_ZYX = torch.randint(1, 4, SHAPE, generator=generator).half()
    return Claims(WHOLE, covered_ZYX, torch.where(covered_ZYX, labels_ZYX, 0), sureness_ZYX)


def by_voxel(claims: list[Claims], logits_Cdhw: torch.Tensor, voxel: tuple[int, ...]) -> int:
    """The label of a voxel, by the words of the module."""
    claimed = [
        (-float(c.sureness_ZYX[voxel]), classes[int(c.labels_ZYX[voxel]) - 1])
        for c, classes in zip(claims, CLASSES, strict=True)
        if c.labels_ZYX[voxel]
    ]
    if claimed:
        return min(claimed)[1]  # the surest; of equals the smallest label
    denied = {number for c, classes in zip(claims, CLASSES, strict=True) if c.covered_ZYX[voxel] for number in classes}
    logits = {number: float(logits_Cdhw[(number, *voxel)]) for number in range(6) if number not in denied}
    return max(logits, key=lambda number: logits[number])


@given(st.integers(0, 2**32 - 1), st.permutations(range(3)))
@settings(max_examples=25)
def test_every_voxel_gets_the_label_that_the_rule_gives_it_whatever_the_order(seed, order):
    generator = torch.Generator().manual_seed(seed)
    claims = [random_claims(generator, len(classes)) for classes in CLASSES]
    logits_Cdhw = torch.randn(6, *SHAPE, generator=generator)
    merged = Merged(SHAPE, CLASSES)
    for model in order:
        merged.add(model, claims[model])
    labels_ZYX = merged.labels(without_windows(logits_Cdhw, LabelEncoding(6)), [linear_axis(n, n) for n in SHAPE], 4)
    for voxel in itertools.product(*map(range, SHAPE)):
        assert int(labels_ZYX[voxel]) == by_voxel(claims, logits_Cdhw, voxel)


def test_more_models_than_bits_are_refused():
    assert Merged(SHAPE, [(1,)] * 63)._models_ZYX.dtype == torch.int64
    assert Merged(SHAPE, [(1,)] * 8)._models_ZYX.dtype == torch.uint8
    with pytest.raises(UserError, match="give 63 at most"):
        Merged(SHAPE, [(1,)] * 64)


@given(st.lists(st.tuples(*[st.integers(-2, 9)] * 3), max_size=4), st.tuples(*[st.integers(0, 4)] * 3))
@settings(max_examples=30)
def test_covered_voxels(starts, start):
    size, patch_size = (4, 5, 3), (3, 2, 4)
    starts_K3 = torch.tensor(starts, dtype=torch.int64).reshape(-1, 3)
    covered_DHW = covered(starts_K3, patch_size, start, size)
    for voxel in itertools.product(*map(range, size)):
        place = [a + v for a, v in zip(start, voxel, strict=True)]
        expected = any(all(a <= p < a + n for a, p, n in zip(w, place, patch_size, strict=True)) for w in starts)
        assert bool(covered_DHW[voxel]) == expected
