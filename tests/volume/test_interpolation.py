"""Linear interpolation, one axis after the other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nnunet_nmsw.volume.interpolation import (
    agreed,
    axis_between,
    interpolated,
    interpolated_between,
    linear_axis,
    nearest_axis,
    upsampling_axis,
)


@given(st.integers(1, 12), st.integers(1, 12))
def test_interpolation_is_pytorchs(size, new_size):
    values = torch.rand(size)
    expected = F.interpolate(values[None, None], size=new_size, mode="linear", align_corners=False)[0, 0]
    matrix = linear_axis(size, new_size).matrix(size)
    assert torch.allclose(matrix @ values, expected, atol=1e-5)
    assert torch.allclose(matrix.sum(1), torch.ones(new_size))


def test_edges_are_replicated():
    values = torch.tensor([1.0, 2.0, 4.0])
    axis = axis_between(torch.tensor([-2.6, -0.5, 2.5, 3.7], dtype=torch.float64), 3)
    assert (axis.matrix(3) @ values).tolist() == [1, 1, 4, 4]


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 30), st.integers(1, 20))
def test_voxels_of_the_volume_lie_where_they_do_in_the_low_resolution_view(low, factor, start, size):
    axis = upsampling_axis(low, factor, start, size)
    position = (torch.arange(start, start + size, dtype=torch.float64) + 0.5) / factor - 0.5
    expected = axis_between(position, low)
    assert torch.allclose(axis.matrix(low), expected.matrix(low), atol=1e-6)


def test_a_map_is_interpolated_along_all_axes():
    values = torch.rand(2, 3, 4, 5)
    matrices = [linear_axis(3, 7).matrix(3), None, linear_axis(5, 2).matrix(5)]
    expected = F.interpolate(values[None], size=(7, 4, 2), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(interpolated(values, matrices), expected)
    axes = [linear_axis(3, 7), None, linear_axis(5, 2)]
    torch.testing.assert_close(interpolated_between(values, axes), expected)


def test_an_axis_knows_whether_voxels_stay_where_they_are():
    assert linear_axis(5, 5).is_identity(5)
    assert nearest_axis(5, 5).is_identity(5)
    assert upsampling_axis(5, 1, 0, 5).is_identity(5)
    assert not linear_axis(5, 6).is_identity(5)
    assert not linear_axis(6, 5).is_identity(6)
    assert not upsampling_axis(5, 1, 1, 4).is_identity(5)


@pytest.mark.parametrize("make_axis", [linear_axis, nearest_axis])
def test_agreement_is_exact(make_axis):
    labels = torch.randint(0, 3, (3, 4, 5), dtype=torch.int16).repeat_interleave(3, 0).repeat_interleave(2, 2)
    axes = [make_axis(n, m) for n, m in zip(labels.shape, (7, 9, 13), strict=True)]
    agreed_ZYX, disagree_ZYX = agreed(labels, axes)
    for z, y, x in np.ndindex(*agreed_ZYX.shape):
        sources = [
            {int(a.lower[i]), int(a.upper[i])} if a.weight[i] > 0 else {int(a.lower[i])}
            for a, i in zip(axes, (z, y, x), strict=True)
        ]
        found = {int(labels[i, j, k]) for i in sources[0] for j in sources[1] for k in sources[2]}
        assert bool(disagree_ZYX[z, y, x]) == (len(found) > 1)
        assert len(found) > 1 or int(agreed_ZYX[z, y, x]) in found
