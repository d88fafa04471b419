"""Labels of whole images."""

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import make_plans

from nnunet_nmsw.inference.export import in_image

PROPERTIES = {
    "shape_before_cropping": (4, 5, 6),
    "bbox_used_for_cropping": [[1, 3], [0, 5], [2, 6]],
}


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (254, np.uint8), (255, np.uint16), (300, np.uint16)])
def test_every_label_has_room(classes, dtype):
    labels = LabelManager({"background": 0, **{f"class {number}": number for number in range(1, classes + 1)}}, None)
    decisions = torch.full((2, 5, 4), classes, dtype=torch.int16)
    image = in_image(decisions, PlansManager(make_plans()), labels, PROPERTIES)
    assert image.dtype == dtype
    assert image.shape == (4, 5, 6)
    assert (image[1:3, :, 2:] == classes).all()
    assert (image == classes).sum() == decisions.numel()


def test_of_regions_the_last_one_gives_the_label():
    labels = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    decisions = torch.tensor([0, 1, 2, 1], dtype=torch.int16).expand(2, 5, 4)
    image = in_image(decisions, PlansManager(make_plans()), labels, PROPERTIES)
    assert image[1, 0, 2:].tolist() == [0, 1, 2, 1]
    reversed_order = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [2, 1])
    image = in_image(decisions, PlansManager(make_plans()), reversed_order, PROPERTIES)
    assert image[1, 0, 2:].tolist() == [0, 2, 1, 2]
