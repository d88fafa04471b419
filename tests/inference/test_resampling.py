import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from nnunet_nmsw.inference.resampling import resample_image

SHAPE = st.tuples(*[st.integers(1, 24)] * 3)


@settings(max_examples=60)
@given(SHAPE, SHAPE, st.sampled_from([0, 1, 3]), st.sampled_from([None, False, True]), st.integers(0, 2**16))
def test_images_are_resampled_as_nnunet_does(shape, new_shape, order, separate, seed):
    random = np.random.default_rng(seed)
    data = random.normal(100, 30, (2, *shape)).astype(np.float32)
    spacing, new_spacing = random.choice([0.7, 1.0, 4.0], 3), random.choice([0.7, 1.0, 4.0], 3)
    keywords = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": separate}
    expected = resample_data_or_seg_to_shape(data, new_shape, spacing, new_spacing, **keywords)
    resampled = resample_image(data, new_shape, spacing, new_spacing, **keywords)
    assert resampled.dtype == expected.dtype
    np.testing.assert_allclose(resampled, expected, atol=2e-4)
