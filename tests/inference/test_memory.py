import os

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import make_plans

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.flags import parse_memory
from nnunet_nmsw.inference.memory import (
    SLACK,
    Needs,
    Share,
    Size,
    forget_most_memory,
    memory_of_process,
    most_memory_of_process,
    needs_of,
    share_out,
    size_of,
)
from nnunet_nmsw.inference.tensor_file import TensorFile

WANTED = Share(num_preprocessing=3, num_writers=3, planes=1 << 30, windows=1 << 62, patches_at_once=16)
AMOUNT = st.integers(1, 1 << 33)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("8G", 8 << 30), ("500m", 500 << 20), ("1.5 GiB", 3 << 29), ("2TB", 2 << 40), ("4096", 4096), ("7kb", 7 << 10)],
)
def test_amounts_of_memory(text, amount):
    assert parse_memory(text) == amount


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "8 apples", "1G2"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UserError, match="such as 8G"):
        parse_memory(text)


@given(st.integers(1, 1 << 36), AMOUNT, st.tuples(*[AMOUNT] * 5), AMOUNT)
def test_shares_keep_within_the_bound(limit, used, needs, patch):
    needs = Needs(*needs)
    try:
        share = share_out(limit, used, needs, patch, WANTED, 4)
    except UserError:
        prediction = needs.prediction + patch + 4 * needs.plane + 2 * needs.window
        assert used + SLACK + max(prediction, needs.preprocessing) + needs.writing > limit
        return
    predicting = needs.prediction + share.patches_at_once * patch + share.planes + share.windows + 2 * needs.window
    at_a_time = share.num_preprocessing * needs.preprocessing + predicting
    if share.num_preprocessing == 0:
        at_a_time = max(needs.preprocessing, predicting)
    assert used + SLACK + at_a_time + share.num_writers * needs.writing <= limit
    assert 0 <= share.num_preprocessing <= WANTED.num_preprocessing
    assert 1 <= share.num_writers <= WANTED.num_writers
    assert 1 <= share.patches_at_once <= WANTED.patches_at_once
    assert share.planes >= 4 * needs.plane


@given(AMOUNT, st.tuples(*[AMOUNT] * 5), AMOUNT)
def test_with_plenty_of_memory_all_is_as_without_a_bound(used, needs, patch):
    assert share_out(1 << 50, used, Needs(*needs), patch, WANTED, 1)[:2] == WANTED[:2]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_sizes_come_from_headers(tmp_path, ending):
    plans = make_plans()
    plans["transpose_forward"], plans["transpose_backward"] = [1, 0, 2], [1, 0, 2]
    plans = PlansManager(plans)
    image = sitk.GetImageFromArray(np.zeros((4, 30, 10), np.int16))
    image.SetSpacing((0.5, 2.0, 3.0))
    file = str(tmp_path / f"case_0000{ending}")
    sitk.WriteImage(image, file)
    size = size_of([file], plans, plans.get_configuration("3d_fullres"))
    assert size.image == 1200
    assert size.volume == (60, 12, 8)  # transposed, resampled to 1 mm, padded to the patch of 8 voxels


@pytest.mark.parametrize("ending", [".nii.gz", ".png"])
def test_an_image_that_cannot_be_read_has_no_size(tmp_path, ending):
    plans = PlansManager(make_plans())
    file = tmp_path / f"case_0000{ending}"
    file.write_bytes(b"half a file")
    assert size_of([str(file)], plans, plans.get_configuration("3d_fullres")) is None


def test_a_larger_case_needs_more():
    configuration = PlansManager(make_plans()).get_configuration("3d_fullres")
    small, large = (
        needs_of(size_of_cube(n), configuration, channels=1, classes=3, factor=(2, 2, 2)) for n in (100, 200)
    )
    assert large.preprocessing == 8 * small.preprocessing
    assert large.prediction == 8 * small.prediction
    assert large.plane == 4 * small.plane
    assert large.window == small.window == 2 * 3 * 8**3


def size_of_cube(edge):
    return Size("case", edge**3, (edge,) * 3)


def test_memory_of_this_process():
    before = memory_of_process()
    block = np.ones(1 << 26, np.uint8)
    assert memory_of_process() - before > len(block) // 2
    assert most_memory_of_process() >= memory_of_process() * 0.9


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone forgets")
def test_what_was_freed_can_be_forgotten():
    freed = np.ones(1 << 25)
    peak = most_memory_of_process()
    del freed
    forget_most_memory()
    assert most_memory_of_process() < peak - (1 << 27)


def test_tensors_come_back_from_the_file_and_leave_their_places():
    tensors = TensorFile()
    places = [tensors.put(torch.full((2, 3), n, dtype=torch.float16)) for n in range(3)]
    tensors.free(places[1])
    assert tensors.put(torch.full((2, 3), 7, dtype=torch.float16)) == places[1]
    assert tensors.put(torch.full((2, 3), 8, dtype=torch.float16)) not in places
    assert [int(tensors.get(place)[0, 0]) for place in places] == [0, 7, 2]
    tensors.close()
