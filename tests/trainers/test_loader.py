import multiprocessing
from collections import namedtuple

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from training import NONE, PATCH, Cases, loader, nnunet_augmentation

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.trainers import batches
from nnunet_nmsw.trainers.augmentation import Augmentation
from nnunet_nmsw.trainers.batches import (
    LoaderProcesses,
    RandomWindows,
    check_previous_stage,
    check_shared_memory,
    training_volume,
)


def test_volumes_come_in_order_padded_to_the_patch():
    batches = [batch for batch, _ in zip(loader(), range(4), strict=False)]
    assert [batch["keys"] for batch in batches] == [["a"], ["b"], ["c"], ["a"]]
    shapes = [tuple(batch["data"].shape) for batch in batches]
    assert shapes == [(1, 1, 20, 24, 28), (1, 1, 12, 30, 16), (1, 1, 18, 18, 18), (1, 1, 20, 24, 28)]
    for batch in batches:
        assert batch["data"].shape == batch["target"].shape
        assert batch["data"].dtype == torch.float16
        assert batch["target"].dtype == torch.int8
        assert (batch["target"] > 0).sum() == 27 + 9
    assert (batches[1]["target"][0, 0, :3] == -1).all()


def test_image_labels_and_labels_of_the_previous_stage_are_mirrored_and_padded_together():
    np.random.seed(0)  # noqa: NPY002 - batchgenerators draws from it
    torch.manual_seed(0)
    batches, load = loader(nnunet_augmentation(), at_random=True), Cases().load_case

    def with_previous_stage(key):
        image, labels, _, properties = load(key)
        return image, labels, labels[0], properties

    batches._data.load_case = with_previous_stage
    mirrored = set()
    for batch, _ in zip(batches, range(30), strict=False):
        assert torch.equal((batch["data"] / 10).round().clamp_min(0), batch["target"].clamp_min(0).half())
        assert torch.equal(batch["previous"], batch["target"])
        # The object of label 1 begins at voxel 2, 3, 4 of every case that is not mirrored.
        mirrored.add((batch["keys"][0], tuple((batch["target"][0, 0] == 1).nonzero()[0].tolist())))
    assert len(mirrored) > 12


@pytest.mark.parametrize(("label", "dtype"), [(127, torch.int8), (128, torch.int16), (200, torch.int16)])
def test_labels_above_127_stay_what_they_are(label, dtype):
    batches, load = loader(), Cases().load_case
    batches._data.load_case = lambda key: (load(key)[0], load(key)[1].astype(np.int16) * label // 2, None, load(key)[3])
    batch = next(batches)
    assert batch["target"].dtype == dtype
    assert batch["target"].max() == label


def test_random_windows_lie_inside_and_the_last_hold_foreground():
    np.random.seed(0)  # noqa: NPY002 - batchgenerators draws from it
    torch.manual_seed(0)
    seen, missed = set(), 0
    for batch, _ in zip(loader(nnunet_augmentation(), at_random=True), range(60), strict=False):
        shape = torch.tensor(batch["data"].shape[2:])
        starts = batch["random_starts"]
        assert starts.shape == (6, 3)
        assert (starts >= 0).all()
        assert (starts + 12 <= shape).all()
        _, labels = training_volume(batch, NONE).windows(starts, PATCH)
        with_foreground = (labels[3:] > 0).flatten(1).any(1)
        # What a rotation leaves of an object of a few voxels may lie between the voxels.
        assert with_foreground.all() or batch["affine"] is not None
        missed += int((~with_foreground).sum())
        seen.update(batch["keys"])
    assert seen == {"a", "b", "c"}
    assert missed < 5


def test_one_window_holds_foreground_by_probability():
    assert RandomWindows.oversampled(PATCH, 1, 0.33)[1:] == (1, 0.33)
    assert RandomWindows.oversampled(PATCH, 2, 0.33)[1:] == (2, 1)
    np.random.seed(0)  # noqa: NPY002
    one, centre = loader(windows=1, foreground=0.33), np.full((1, 3), 15)
    starts = [one.draw_windows((30, 30, 30), [centre], lambda voxel: voxel)[0].tolist() for _ in range(300)]
    on_foreground = sum(start == [9, 9, 9] for start in starts)
    assert 70 < on_foreground < 130


def test_the_same_seed_gives_the_same_batches():
    np.random.seed(1)  # noqa: NPY002
    first, second, other = (
        [batch for batch, _ in zip(loader(nnunet_augmentation(), True, seed=seed), range(5), strict=False)]
        for seed in ((7, 0, 0), (7, 0, 0), (7, 0, 1))
    )
    for one, two in zip(first, second, strict=True):
        assert one["keys"] == two["keys"]
        assert one["seed"] == two["seed"]
        assert torch.equal(one["random_starts"], two["random_starts"])
        assert torch.equal(one["data"], two["data"])
    assert [batch["seed"] for batch in first] != [batch["seed"] for batch in other]


@pytest.mark.parametrize("seed", [None, (7,)])
def test_workers_draw_their_own_mirrorings(seed):
    """Forks of one process have one state of PyTorch's generator, from which nnU-Net draws the axes."""
    torch.manual_seed(0)
    drawn = []
    for worker in range(2):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            drawn.append(pool.apply(mirrorings, (seed, worker)))
    assert drawn[0] != drawn[1]


def mirrorings(seed, worker):
    """Where the brightest voxel lies in 20 batches of a worker."""
    of_worker = loader(nnunet_augmentation(), seed=seed)
    of_worker.indices, of_worker.thread_id, of_worker.is_in_worker = ["a"], worker, True
    return [int(next(of_worker)["data"].argmax()) for _ in range(20)]


def test_flat_patches_are_rotated_in_plane():
    np.random.seed(0)  # noqa: NPY002
    affines = [nnunet_augmentation(flat=True).draw_affine() for _ in range(30)]
    drawn = [affine for affine in affines if affine is not None]
    assert drawn
    for affine in drawn:
        assert affine[0].tolist() == affine[:, 0].tolist() == [1, 0, 0]
        assert not np.allclose(affine, np.eye(3))


def test_with_an_ignore_label_random_windows_are_centred_on_annotated_voxels():
    batches = loader(windows=6, foreground=2)
    annotated = np.array([[0, 15, 16, 17]])
    batches._data.load_case = lambda key: (*Cases().load_case("a")[:3], {"class_locations": {(-1, 0, 1): annotated}})
    starts = next(batches)["random_starts"]
    assert (starts == torch.tensor([8, 10, 11])).all()  # the voxel minus half the patch, inside the volume of 20


def test_elastic_deformation_is_refused():
    with pytest.raises(NotImplementedError, match="deform"):
        Augmentation.of(SpatialTransform((1, 1, 1), 0, False, p_elastic_deform=0.5))


def the_blur():
    blurs = [part.transform for part in nnunet_augmentation().of_views if hasattr(part, "transform")]
    (blur,) = [blur for blur in blurs if isinstance(blur, GaussianBlurTransform)]
    return blur


def test_the_blur_is_nnunets_away_from_the_edge():
    image = torch.rand(1, 24, 24, 24)
    for seed in range(5):
        blur, original = the_blur(), GaussianBlurTransform((0.5, 1.0), False, False, 0.5)
        results = []
        for transform in (blur, original):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            results.append(transform(image=image.clone())["image"][:, 4:-4, 4:-4, 4:-4])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 9), (2, 3, 30)])
def test_the_blur_takes_views_of_any_shape(shape):
    image = torch.rand(2, *shape)
    for axis in range(3):
        blurred = the_blur()._benchmark_wrapper(image, 1.0, axis)
        assert blurred.shape == image.shape
        assert blurred.min() >= image.min() - 1e-6
        assert blurred.max() <= image.max() + 1e-6


def test_the_blur_stays_on_the_device_of_the_image():
    image = torch.empty(1, 8, 8, 8, device="meta")
    assert the_blur()._benchmark_wrapper(image, 1.0, 1).device.type == "meta"


@pytest.mark.parametrize(
    ("workers", "seed", "pinned", "fits"),
    [
        (0, None, False, True),
        (4, None, True, True),
        (4, None, False, False),
        (8, None, True, False),
        (2, (1,), True, False),
    ],
)
def test_too_little_shared_memory_is_found_before_a_worker_dies_of_it(
    workers, seed, pinned, fits, tmp_path, monkeypatch
):
    free = 4 * 3 * 20 * 24 * 28  # four volumes of the largest case, three bytes a voxel
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda _: usage(free))
    monkeypatch.setattr(batches, "SHARED_MEMORY", tmp_path)
    arguments = (Cases(), PATCH, LoaderProcesses(workers, seed, pinned))
    if fits:
        check_shared_memory(*arguments)
    else:
        with pytest.raises(UserError, match="--shm-size=1g") as error:
            check_shared_memory(*arguments)
        assert "nnUNet_n_proc_DA" in str(error.value)


def test_names_of_cases_may_hold_dots(tmp_path):
    (tmp_path / "case.1.b2nd").touch()
    check_previous_stage(tmp_path, ["case.1"], "3d_lowres", "nnUNetTrainerNMSW")
    with pytest.raises(UserError, match=r"case\.2"):
        check_previous_stage(tmp_path, ["case.1", "case.2"], "3d_lowres", "nnUNetTrainerNMSW")
