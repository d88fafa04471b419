"""What a training starts from and what it leaves: checkpoints, and weights of other models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nnunet_nmsw.checkpoint import read_checkpoint
from nnunet_nmsw.config import PLANS_KEY, NMSWConfig
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import remove_leftovers, written_whole
from nnunet_nmsw.trainers.pretrained import (
    AlreadyLoaded,
    load_pretrained,
    pretrained_weights_of_command_line,
)
from nnunet_nmsw.trainers.validation import TrainerWithNMSWValidation


class TrainerWithNMSWCheckpoints(TrainerWithNMSWValidation):
    """nnU-Net's trainer of an NMSW network: `-pretrained_weights` for two branches, and whole checkpoints."""

    config: NMSWConfig
    network: nn.Module

    def initialize(self) -> None:
        """See the parent. Loads the weights given with `-pretrained_weights`."""
        pretrained = pretrained_weights_of_command_line()
        super().initialize()
        if pretrained is not None:
            self.load_pretrained_weights(pretrained)
            # nnU-Net loads them next, in its own way.
            self.network = AlreadyLoaded(self.network)

    def load_pretrained_weights(self, file: Path) -> None:
        """Start from another model: a stock model's weights go into the local branch, an NMSW model's into both.

        As in nnU-Net, segmentation layers are not taken.

        Args:
            file: checkpoint of nnU-Net.

        Raises:
            UserError: it cannot be read or does not fit.
        """
        self.print_to_log_file(f"Loading pretrained weights from {file}")
        load_pretrained(self._plain_network(), read_checkpoint(file, training=True)["network_weights"], str(file))

    def on_train_start(self) -> None:
        """See the parent."""
        self._unwrap_pretrained()
        super().on_train_start()
        if self.local_rank == 0:
            remove_leftovers(Path(self.output_folder))

    def _unwrap_pretrained(self) -> None:
        if isinstance(self.network, AlreadyLoaded):
            self.network = self.network.network

    def save_checkpoint(self, filename: str) -> None:
        """See the parent. A training that is killed while it writes leaves the checkpoint before, not half a file."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        file = Path(filename)
        with written_whole(file.parent) as unfinished:
            super().save_checkpoint(str(unfinished / file.name))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """See the parent. For `--c`, `--val` and `--val_best`.

        Raises:
            UserError: the settings in the plans have changed since the training started.
        """
        saved = filename_or_checkpoint
        if isinstance(saved, str):
            # Mapped and not read: only the settings are looked at here.
            saved = torch.load(saved, map_location="cpu", weights_only=False, mmap=True)
        plans = saved["init_args"]["plans"]
        before = plans["configurations"][self.configuration_name][PLANS_KEY]
        for name, value in self.config.to_dict().items():
            if before.get(name, value) != value:
                raise UserError(
                    f'setting "{name}" under "{PLANS_KEY}" in the plans is {value!r}, and was {before[name]!r} when '
                    f"the training of {self.output_folder} started: set it back, or train anew without --c and --val"
                )
        if not self.was_initialized:
            self.initialize()
        self._unwrap_pretrained()
        super().load_checkpoint(filename_or_checkpoint)
