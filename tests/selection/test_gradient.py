import gradient_paths
import pytest


@pytest.mark.parametrize("seed", [0, 1])
def test_our_gradient_path_points_where_the_expected_loss_falls(seed, record_property):
    cosines = gradient_paths.cosines(seed, draws=300)
    for path, cosine in cosines.items():
        record_property(f"cosine_{path}", cosine)
        print(f"cosine with the exact gradient, {path}: {cosine:+.3f}")
    assert cosines["contribution"] > 0.8
