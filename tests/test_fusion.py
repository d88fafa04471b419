import torch
from fusion_problems import CLASSES, canvas, label_manager, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_nmsw.model.fusion import FusionWeights, blended_trust, fuse_volume_, fused_segmentation
from nnunet_nmsw.volume.windows import upsample_window


@settings(max_examples=30, deadline=None)
@given(problems(overlapping=True), st.booleans())
def test_fused_volume_and_its_labels_equal_the_canvas(problem, trusted):
    grid, factor = problem["grid"], problem["grid"].downsampling_factor
    smooth = upsample_window(problem["coarse"], (0, 0, 0), grid.volume_shape, factor)
    expected, inside = canvas(problem["patch_logits"], problem["starts"], smooth, problem["weights"], grid.volume_shape)
    ones = FusionWeights.convex(torch.ones(CLASSES))
    blended, _ = canvas(problem["patch_logits"], problem["starts"], torch.zeros_like(smooth), ones, grid.volume_shape)
    blended[:, ~inside] = torch.nan  # what nnU-Net's sliding window leaves where no window was
    trust = torch.ones(len(problem["starts"])) if trusted else torch.rand(len(problem["starts"]))
    of_windows = trust[:, None, None, None, None].expand(-1, 1, *grid.patch_size)
    one = FusionWeights.convex(torch.ones(1))
    trust_volume, _ = canvas(of_windows, problem["starts"], torch.zeros_like(smooth[:1]), one, grid.volume_shape)
    expected = smooth + trust_volume * (expected - smooth)
    blend = blended_trust(trust, problem["starts"], grid.patch_size, grid.volume_shape, torch.device("cpu"))
    torch.testing.assert_close(blend, trust_volume[0])
    fused = fuse_volume_(blended, problem["coarse"], blend, problem["weights"], (0, 0, 0), factor)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    encoding = problem["encoding"]
    labels = fused_segmentation(
        problem["patch_logits"],
        problem["starts"],
        trust,
        problem["coarse"],
        problem["weights"],
        grid.volume_shape,
        factor,
        encoding,
    )
    best_two = expected.topk(2, 0).values
    clear = expected.abs().amin(0) > 1e-3 if encoding.has_regions else best_two[0] - best_two[1] > 1e-3
    assert torch.equal(labels[clear], label_manager(encoding).convert_logits_to_segmentation(expected)[clear].long())
