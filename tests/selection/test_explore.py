"""Windows over what no window covers: never where one is, and the body is seen in images of any kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_nmsw.selection.explore import body_of, explored
from nnunet_nmsw.selection.interface import WindowChoice
from nnunet_nmsw.volume.windows import WindowGrid

GRID = WindowGrid((24, 24, 24), (8, 8, 8), (2, 2, 2))


def covered_by(starts_K3: torch.Tensor) -> torch.Tensor:
    covered_DHW = torch.zeros(GRID.volume_shape, dtype=torch.bool)
    for d, h, w in starts_K3.tolist():
        covered_DHW[d : d + 8, h : h + 8, w : w + 8] = True
    return covered_DHW


def choice_of(starts: list[tuple[int, ...]]) -> WindowChoice:
    return WindowChoice(torch.tensor(starts, dtype=torch.int64).reshape(-1, 3), torch.zeros(len(starts)))


@given(st.lists(st.tuples(*[st.integers(0, 16)] * 3), max_size=5), st.integers(0, 6))
@settings(max_examples=20)
def test_windows_are_added_where_there_is_none(starts, number):
    windows = choice_of(starts)
    found = explored(windows, torch.ones(GRID.low_shape), GRID, number)
    assert torch.equal(found.starts_K3[: len(starts)], windows.starts_K3)
    assert len(found.starts_K3) == len(found.scores_K) <= len(starts) + number
    for end in range(len(starts), len(found.starts_K3)):
        before, after = covered_by(found.starts_K3[:end]), covered_by(found.starts_K3[: end + 1])
        assert (after & ~before).sum() > 0


def test_twenty_seven_windows_tile_an_empty_volume_and_no_more_are_added():
    found = explored(choice_of([]), torch.ones(GRID.low_shape), GRID, 1000)
    assert len(found.starts_K3) == 27
    assert covered_by(found.starts_K3).all()


def test_nothing_is_added_outside_the_body():
    body_dhw = torch.zeros(GRID.low_shape)
    body_dhw[:4, :4, :4] = 1
    found = explored(choice_of([]), body_dhw, GRID, 10)
    assert found.starts_K3.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("is_cut", [False, True])
def test_the_body_with_its_lungs(is_cut):
    image_DHW = torch.full((20, 20, 20), -1000.0)
    ends = slice(0, 20) if is_cut else slice(4, 16)  # by a scan of the chest alone, through body and lungs
    lungs = slice(0, 20) if is_cut else slice(6, 9)
    image_DHW[ends, 4:16, 4:16] = 40
    image_DHW[lungs, 6:9, 6:9] = -800
    image_DHW += torch.randn(image_DHW.shape, generator=torch.Generator().manual_seed(0))
    expected_DHW = torch.zeros(20, 20, 20)
    expected_DHW[ends, 4:16, 4:16] = 1
    for scale in (1.0, 0.01):
        assert torch.equal(body_of(scale * image_DHW), expected_DHW)


def test_a_body_is_everywhere_in_an_image_of_one_value():
    assert body_of(torch.zeros(3, 3, 3)).all()
    assert body_of(torch.full((3, 3, 3), torch.nan)).all()
