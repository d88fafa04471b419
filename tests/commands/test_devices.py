"""What is computed in which precision under automatic mixed precision, and the devices that commands take."""

import multiprocessing
from unittest import mock

import pytest
import torch
from tiny import build_network
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import PATCH, loader, nnunet_augmentation, step_on

from nnunet_nmsw.commands.predict_flags import parser
from nnunet_nmsw.inference.device import prepare_device
from nnunet_nmsw.selection.budget import Budget
from nnunet_nmsw.trainers.batches import training_volume


class Bfloat16Operations(TorchDispatchMode):
    """Names of the operations that took bfloat16, outside of the two branches."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.in_branch = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not self.in_branch and any(x.dtype == torch.bfloat16 for x in inputs):
            self.names.add(str(function).removeprefix("aten.").split(".")[0])
        return function(*args, **(kwargs or {}))


MOVES = {
    "_to_copy",
    "slice",
    "select",
    "detach",
    "view",
    "alias",
    "permute",
    "unsqueeze",
    "unbind",
    "split",
    "cat",
    "clone",
}
"""Operations that compute nothing."""


@pytest.mark.compatibility(
    "devices", "bfloat16 autocast on CPU: scores, softmax, box sums and NMSW's losses are computed in float32"
)
def test_under_autocast_only_the_branches_use_half_precision():
    network = build_network(PATCH, downsampling_factor=[2, 2, 2])
    augmentation = nnunet_augmentation()
    volume = training_volume(next(loader(augmentation, True, 2, 1)), augmentation)
    # The loss of patches is nnU-Net's, and so is what it computes in.
    step = step_on(volume, of_patches=lambda logits, labels: logits.float().mean())
    operations = Bfloat16Operations()

    def enter(*_):
        operations.in_branch = True

    def leave(*_):
        operations.in_branch = False

    in_half = []
    for branch in (network.global_branch, network.local_branch):
        branch.register_forward_pre_hook(enter)
        branch.register_forward_hook(leave)
        branch.register_forward_hook(lambda _, __, output: in_half.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), operations:
        result = network(step)
        grid = network.grid(volume.shape)
        choice = network.sampler.at_inference.choose(result.coarse, grid, Budget(3))
    assert in_half == [torch.bfloat16] * 2  # the branches do
    assert operations.names <= MOVES
    precise = [*result.coarse[:2], choice.scores_K, result.loss, *result.report.values()]
    assert all(x.dtype == torch.float32 for x in precise)
    result.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.compatibility("devices", "-device cpu, cuda and mps are understood; cuda without a GPU ends in one line")
def test_devices_by_flag():
    for name in ("cpu", "cuda", "mps"):
        assert parser().parse_args(["-i", "in", "-o", "out", "-device", name]).device == name
    threads = torch.get_num_threads()
    assert prepare_device("cpu") == torch.device("cpu")
    with mock.patch("torch.cuda.is_available", return_value=True):
        of_threads = {}
        for on_host in (False, True):
            prepare_device("cuda", on_host)
            of_threads[on_host] = torch.get_num_threads()
    assert of_threads == {False: 1, True: multiprocessing.cpu_count()}
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no CUDA device"):
            prepare_device("cuda")
    if torch.backends.mps.is_available():
        assert prepare_device("mps") == torch.device("mps")
    else:
        with pytest.raises(SystemExit, match="there is no MPS device"):
            prepare_device("mps")
