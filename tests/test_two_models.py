"""Two stock models as one: where their grids meet."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nnunet_nmsw.inference.two_models import factor_between, interpolation


@pytest.mark.parametrize(
    ("fine", "coarse", "expected"),
    [
        ((1.0, 1.0, 1.0), (3.1, 2.9, 3.0), (3, 3, 3)),
        ((5.0, 0.7, 0.7), (5.0, 2.0, 2.0), (1, 3, 3)),
        ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0), (1, 1, 1)),
    ],
)
def test_factor(fine, coarse, expected):
    assert factor_between(fine, coarse) == expected


@given(st.integers(1, 12), st.integers(1, 12))
def test_interpolation_is_pytorchs(size, new_size):
    values = torch.rand(size)
    centres = (torch.arange(new_size) + 0.5) / new_size
    expected = F.interpolate(values[None, None], size=new_size, mode="linear", align_corners=False)[0, 0]
    assert torch.allclose(interpolation(centres, size) @ values, expected, atol=1e-5)


def test_interpolation_replicates_edges():
    values = torch.tensor([1.0, 2.0, 4.0])
    assert (interpolation(torch.tensor([-0.7, 0.0, 1.0, 1.4]), 3) @ values).tolist() == [1, 1, 4, 4]
