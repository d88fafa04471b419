import numpy as np

from nnunet_nmsw.demo.phantom import simulate_case


def test_cases_are_reproducible_and_their_targets_small():
    image, labels = simulate_case(3, size=64)
    again, _ = simulate_case(3, size=64)
    assert np.array_equal(image, again)
    assert image.shape == labels.shape
    assert set(np.unique(labels)) == {0, 1, 2}
    assert (labels > 0).mean() < 0.03
    assert image[labels == 2].mean() > image[labels == 1].mean() + 30
