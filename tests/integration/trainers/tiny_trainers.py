"""Trainers for the tests, found by nnU-Net through `nnUNet_extTrainer`: a few steps instead of thousands."""

import os
import signal
import time
from pathlib import Path
from typing import ClassVar
from unittest import mock

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_nmsw.trainers import (
    nnUNetTrainerNMSW,
    nnUNetTrainerNMSW_paper,
    nnUNetTrainerNMSW_retrofit,
    nnUNetTrainerNMSW_retrofit_context,
)
from nnunet_nmsw.trainers.variants import NoMirroring


class Tiny:
    """Mixin: two epochs of five steps."""

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 5, 2
        super().initialize()


class nnUNetTrainer_tiny(Tiny, nnUNetTrainer):
    """Stock nnU-Net."""


class nnUNetTrainerNMSW_tiny(Tiny, nnUNetTrainerNMSW):
    """NMSW, its local branch told of the whole volume: what works with context works without."""

    defaults: ClassVar = {"context_channels": 2}


class nnUNetTrainerNMSW_late(nnUNetTrainerNMSW_tiny):
    """Of several processes the last is late in the validation."""

    def print_to_log_file(self, *args, **kwargs):
        super().print_to_log_file(*args, **kwargs)
        if str(args[0]).startswith("predicting") and self.local_rank > 0:
            time.sleep(3)


class nnUNetTrainerNMSW_short(nnUNetTrainerNMSW):
    """Enough to learn something: three epochs of 180 steps."""

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 180, 5
        super().initialize()


class nnUNetTrainerNMSW_retrofit_tiny(Tiny, nnUNetTrainerNMSW_retrofit):
    """NMSW around a trained stock model."""


class nnUNetTrainerNMSW_retrofit_context_tiny(Tiny, nnUNetTrainerNMSW_retrofit_context):
    """The same, told of the whole volume."""


class nnUNetTrainerNMSW_paper_tiny(Tiny, nnUNetTrainerNMSW_paper):
    """The paper's method."""


class Mortal:
    """Mixin: three epochs of three steps, dead where the variable `NMSW_TEST_KILL` says, with the whole command."""

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 3, 2
        self.save_every = 1
        self.steps = 0
        super().initialize()

    def train_step(self, batch):
        self.steps += 1
        die_at(f"epoch {self.current_epoch} step {(self.steps - 1) % self.num_iterations_per_epoch}")
        return super().train_step(batch)

    def save_checkpoint(self, filename):
        point = f"epoch {self.current_epoch} {Path(filename).stem}"

        def save_half(checkpoint, file):
            Path(file).write_bytes(b"half a checkpoint")
            die_at(point)

        if os.environ.get("NMSW_TEST_KILL") == point:
            with mock.patch("torch.save", save_half):
                super().save_checkpoint(filename)
        super().save_checkpoint(filename)

    def perform_actual_validation(self, save_probabilities=False):
        die_at("validation")
        super().perform_actual_validation(save_probabilities)


class nnUNetTrainerNMSW_mortal(Mortal, nnUNetTrainerNMSW):
    """NMSW."""


class nnUNetTrainerNMSW_retrofit_mortal(Mortal, nnUNetTrainerNMSW_retrofit):
    """NMSW around a trained stock model."""


def die_at(point):
    if os.environ.get("NMSW_TEST_KILL") == point:
        os.killpg(os.getpgid(0), signal.SIGKILL)


class nnUNetTrainerNMSW_tiny_NoMirroring(NoMirroring, nnUNetTrainerNMSW_tiny):
    """NMSW without mirroring."""


class nnUNetTrainerNMSW_diverging(Tiny, nnUNetTrainerNMSW):
    """Learns in its first epoch, and diverges in the second: a step too large for any number."""

    def initialize(self):
        super().initialize()
        self.save_every = 1

    def train_step(self, batch):
        if self.current_epoch == 1:
            for group in self.optimizer.param_groups:
                group["lr"] = float("inf")
        return super().train_step(batch)
