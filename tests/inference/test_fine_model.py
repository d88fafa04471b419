"""A fine and a coarse model as one: where their grids meet."""

import pytest

from nnunet_nmsw.inference.fine_model import factor_between


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
