"""Two processes on one machine, with Gloo, against one process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from tiny import DATASET_JSON, make_plans
from torch import distributed as dist
from torch import multiprocessing

import nnunet_nmsw.trainers.losses.benefit as benefit_module
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.settings import SCORE_TRAININGS
from nnunet_nmsw.trainers import nnUNetTrainerNMSW, torchrun
from nnunet_nmsw.trainers.augmentation import Augmentation
from nnunet_nmsw.trainers.distributed import Processes
from nnunet_nmsw.trainers.randomness import seed_everything

PROCESSES = 2
NO_AUGMENTATION = Augmentation(None, None, [], [])
# A step of the second process has three windows, because its volume has one to sample from: the first has four.
SHAPES = ((16, 20, 24), (8, 8, 8))


class SilentTrainer(nnUNetTrainerNMSW):
    def print_to_log_file(self, *args, **kwargs):
        pass


def make_trainer(compiled: bool = False, **nmsw) -> nnUNetTrainerNMSW:
    plans = make_plans(seed=1, downsampling_factor=[1, 2, 2], **nmsw)
    configuration = plans["configurations"]["3d_fullres"]
    # Fewer patches than processes, which nnU-Net does not allow; batch Dice, which it sums over processes; and three
    # stages, with which the global branch has outputs that are not used.
    configuration.update(batch_size=1, batch_dice=True)
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=3,
        features_per_stage=[4, 8, 8],
        kernel_sizes=[[3, 3, 3]] * 3,
        strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        n_conv_per_stage=[1, 1, 1],
        n_conv_per_stage_decoder=[1, 1],
    )
    trainer = SilentTrainer({**plans, "continue_training": False}, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    trainer.augmentation = NO_AUGMENTATION
    trainer.initialize()
    if compiled:  # inside of what distributes the network, as `initialize` does it
        torch._dynamo.reset()
        trainer.nmsw_network.compile_branches("aot_eager")
    return trainer


def make_batch(rank: int, step: int = 0) -> dict:
    seed_everything(7, rank, step)
    shape = SHAPES[(rank + step) % PROCESSES]
    last_start = [n - p for n, p in zip(shape, (8, 8, 8), strict=True)]
    return {
        "data": torch.randn(1, 1, *shape).half(),
        "target": torch.randint(0, 3, (1, 1, *shape), dtype=torch.int8),
        "random_starts": torch.tensor([[0, 0, 0], last_start]),
        "affine": None,
        "seed": 0,
        "previous": None,
    }


def gradients(trainer: nnUNetTrainerNMSW, rank: int) -> dict[str, torch.Tensor]:
    step = trainer.step_of(make_batch(rank), NO_AUGMENTATION)
    seed_everything(8, rank)  # of the windows drawn
    trainer.network.zero_grad()
    trainer.network(step).loss.backward()
    named = trainer.nmsw_network.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def in_one_process(**nmsw) -> dict[str, torch.Tensor]:
    """Mean of the gradients of both volumes, the scale of benefits being that of both."""
    trainers = [make_trainer(**nmsw) for _ in range(PROCESSES)]
    for rank, trainer in enumerate(trainers):
        gradients(trainer, rank)
    scale = torch.stack([trainer.network.benefit_scale for trainer in trainers]).square().mean().sqrt()
    memory, benefit_module.SCALE_MEMORY = benefit_module.SCALE_MEMORY, 1.0  # keeps the scale
    for trainer in trainers:
        trainer.network.benefit_scale.copy_(scale)
    by_volume = [gradients(trainer, rank) for rank, trainer in enumerate(trainers)]
    benefit_module.SCALE_MEMORY = memory
    expected = {name: sum(of[name] for of in by_volume) / PROCESSES for name in by_volume[0]}
    return {**expected, "benefit_scale": scale}


def check_process(rank: int, folder: Path, settings: list[dict]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=PROCESSES)
    found = []
    for nmsw in settings:
        trainer = make_trainer(**nmsw)
        assert trainer.device == torch.device("cpu")
        assert trainer.oversample_foreground_percent == 0.33
        assert not any(isinstance(m, MemoryEfficientSoftDiceLoss) and m.ddp for m in trainer.loss.modules())
        of_first_step = gradients(trainer, rank)
        network = trainer.nmsw_network
        found.append({**of_first_step, "benefit_scale": network.benefit_scale.clone()})
        for step in range(3):
            result = trainer.train_step(make_batch(rank, step))
            assert np.isfinite(result["loss"])
        for name, tensor in network.state_dict().items():
            both = [torch.empty_like(tensor) for _ in range(PROCESSES)]
            dist.all_gather(both, tensor)
            assert torch.equal(*both), name
    check_logs(trainer, rank)
    assert trainer.processes.own_share(["a", "b", "c"]) == (["a", "c"], ["b"])[rank]
    dist.destroy_process_group()
    if rank > 0:
        return
    for nmsw, found_by_name in zip(settings, found, strict=True):
        expected = in_one_process(**{**nmsw, "compiled": False})
        missing = set(found_by_name) - set(expected)
        # nnU-Net's weight of this output is 0 in one process and one in a million in several.
        assert missing == {f"local_branch.decoder.seg_layers.0.{name}" for name in ("weight", "bias")}
        for name, value in expected.items():
            torch.testing.assert_close(found_by_name[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


def check_logs(trainer: nnUNetTrainerNMSW, rank: int) -> None:
    """The logged values are means over both processes."""
    report = trainer.train_step(make_batch(rank))
    output = {**report, "loss": np.array(1.0 + 2 * rank), "foreground_share": np.array(float(rank))}
    trainer.on_train_epoch_end([output])
    assert trainer.logger.get_value("train_losses", step=-1) == 2
    assert trainer.logger.get_value("nmsw_foreground_share", step=-1) == 0.5


@pytest.mark.compatibility("distributed", "two processes (gloo): gradients of one on both volumes, equal weights")
def test_two_processes_are_one_with_both_volumes(tmp_path, monkeypatch):
    data = tmp_path / "preprocessed" / "Dataset998_Tiny" / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()  # tells nnU-Net the format
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    settings = [{"score_training": training} for training in SCORE_TRAININGS]
    settings += [{"windows_at_once": 1}, {"compiled": True}]
    multiprocessing.spawn(check_process, (tmp_path, settings), nprocs=PROCESSES)


ARGUMENTS = ["998", "3d_fullres", "0"]
STARTED_BY_TORCHRUN = {**dict.fromkeys(torchrun.SET_BY_TORCHRUN, "1"), "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        ([], "RANK", "torchrun --nproc_per_node"),
        (["--c", "--val"], None, "--val"),
        (["--val_best", "--disable_checkpointing"], None, "--disable_checkpointing"),
        (["-pretrained_weights", "x", "--c"], None, "--c"),
        ([], None, "-device cpu"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments, missing, message, monkeypatch):
    for name, value in STARTED_BY_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.delenv(missing)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=message) as error:
        torchrun.main([*ARGUMENTS, *arguments])
    assert "\n" not in str(error.value)


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {**STARTED_BY_TORCHRUN, "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 GPUs"):
        torchrun.main(ARGUMENTS)


def test_processes_wait_for_each_other_as_often_as_all_of_them_can(monkeypatch):
    waits = []
    monkeypatch.setattr(Processes, "wait", lambda self: waits.append(self.rank))
    for rank, cases in enumerate((range(5), range(4))):
        assert list(Processes(rank, 2).in_step(cases, total=9, every=2)) == list(cases)
    assert waits.count(0) == waits.count(1) == 2


@pytest.mark.usefixtures("folders")
def test_the_loss_of_patches_is_compiled_where_nnunet_compiles(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(type(module)) or module)
    monkeypatch.setattr(SilentTrainer, "compiles", lambda self: True)
    monkeypatch.setattr(NMSWNetwork, "compile_branches", lambda self: compiled.append(type(self)))
    make_trainer()
    assert compiled == [MemoryEfficientSoftDiceLoss, NMSWNetwork]
