"""nnU-Net's trainer with NMSW's network, whole volumes as data, and NMSW inference for validation.

Tensor suffixes: D H W axes of the volume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_nmsw.files import remove_leftovers
from nnunet_nmsw.model.network import NMSWNetwork
from nnunet_nmsw.model.plans import branch_architectures, settings_of
from nnunet_nmsw.model.safe_loading import read_checkpoint
from nnunet_nmsw.model.weights import lay_out_
from nnunet_nmsw.nnunet.trainer import (
    AlreadyLoaded,
    TrainerHooks,
    as_one_process,
    log_under,
    pretrained_weights_of_command_line,
)
from nnunet_nmsw.settings import PLANS_KEY, NMSWSettings
from nnunet_nmsw.trainers.augmentation import Augmentation, augmentations_of
from nnunet_nmsw.trainers.batches import (
    LoaderProcesses,
    RandomWindows,
    check_previous_stage,
    check_shared_memory,
    training_batches,
    training_volume,
    validation_batches,
)
from nnunet_nmsw.trainers.builder import network_builder
from nnunet_nmsw.trainers.checkpoints import save_whole, settings_of_training
from nnunet_nmsw.trainers.distributed import (
    Processes,
    device_of_process,
    distributed,
    gather_over_processes,
    mean_over_processes,
    over_own_windows_,
)
from nnunet_nmsw.trainers.losses.local import LocalLoss
from nnunet_nmsw.trainers.pretrained import load_pretrained
from nnunet_nmsw.trainers.progress import EPOCHS_BETWEEN_PICTURES, lines, plot_progress, plot_sampling, sampled_cases
from nnunet_nmsw.trainers.randomness import seed_everything
from nnunet_nmsw.trainers.step import REPORTED, TrainingStep, means_of_steps, update
from nnunet_nmsw.trainers.validation import check_losses, check_weights, predicted_in_training, validate
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.precision import mixed_precision

LOGGED_UNDER = "nmsw_"  # before the names of a step's report, in nnU-Net's log


class nnUNetTrainerNMSW(TrainerHooks):
    """Trains a global branch, a window sampler and the plans' own network together.

    `local_rank` is the rank among all processes, as in nnU-Net, which decides by it who writes files.
    """

    training_length: int | None = None
    """Epochs, where a variant sets them; nnU-Net's default otherwise."""

    defaults: ClassVar[dict[str, Any]] = {}
    """Settings where the plans have none, in the place of the settings' own defaults."""

    network: Any
    loss: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        # Before anything is written: raises for a setting or a configuration that cannot work.
        resolved = PlansManager(plans).get_configuration(configuration).configuration
        self.named = set(resolved.get(PLANS_KEY, {}))
        self.settings = settings_of(resolved, self.defaults)
        self.check_settings(self.settings)
        branch_architectures(resolved["architecture"], self.settings)
        # Saved with the results and in the checkpoint, so that a model folder alone rebuilds the network.
        self.own_configuration = plans["configurations"][configuration]
        self.own_configuration[PLANS_KEY] = self.settings.to_dict()
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.processes = Processes.of_this_training()
        if self.is_ddp:
            self.device = device_of_process(device)
            self.grad_scaler = self.grad_scaler if self.device.type == "cuda" else None
        self.num_epochs = self.training_length or self.num_epochs
        self.encoding = LabelEncoding.of(self.label_manager)
        log_under(self, LOGGED_UNDER, REPORTED)

    @classmethod
    def check_settings(cls, settings: NMSWSettings) -> None:
        """See that this trainer can do what the settings say; raises `UserError` where it cannot."""

    @property
    def nmsw_network(self) -> NMSWNetwork:
        """The network, whatever wraps it."""
        network = self.network.network if isinstance(self.network, AlreadyLoaded) else self.network
        network = network.module if isinstance(network, DistributedDataParallel) else network
        assert isinstance(network, NMSWNetwork)
        return network

    # What is trained, and what from.

    build_network_architecture = network_builder()

    def initialize(self) -> None:
        """See the parent. Seeds everything first where the settings say so, and compiles where nnU-Net would."""
        if self.settings.seed is not None:
            seed_everything(self.settings.seed)
        pretrained = pretrained_weights_of_command_line()
        with as_one_process(self):
            super().initialize()
        lay_out_(self.nmsw_network, self.device)
        if self.is_ddp:
            self.network = distributed(self.network, self.device)
            # Now that it is distributed, the coarsest output of the local branch has a weight above zero in the loss.
            self.loss = self._build_loss()
        if pretrained is not None:
            self.load_pretrained_weights(pretrained)
            # nnU-Net loads them next, in its own way.
            self.network = AlreadyLoaded(self.network)
        if self.compiles():
            self.print_to_log_file("Using torch.compile for the global and the local branch")
            self.nmsw_network.compile_branches()

    def build_loss(self, of_patches: Any) -> nn.Module:
        """The loss of patches, with deep supervision where the network returns several scales."""
        scales = self.nmsw_network.deep_supervision_scales(self.num_input_channels)
        self.deep_supervision_scales, self.enable_deep_supervision = scales, scales is not None
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        loss = LocalLoss(of_patches(), scales, self.encoding)
        over_own_windows_(loss)
        return loss

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The parent's, where the network has nnU-Net's switch for it."""
        if hasattr(self.nmsw_network.local_branch, "decoder"):
            super().set_deep_supervision_enabled(enabled)

    def load_pretrained_weights(self, file: Path) -> None:
        """Start from another model: a stock model's weights go into the local branch, an NMSW model's into both.

        As in nnU-Net, segmentation layers are not taken.

        Args:
            file: checkpoint of nnU-Net.

        Raises:
            UserError: it cannot be read or does not fit.
        """
        self.print_to_log_file(f"Loading pretrained weights from {file}")
        load_pretrained(self.nmsw_network, read_checkpoint(file, training=True)["network_weights"], str(file))

    def save_checkpoint(self, filename: str) -> None:
        """See the parent. Writes the file whole or not at all."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
        else:
            save_whole(super().save_checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """See the parent. For `--c`, `--val` and `--val_best`.

        Raises:
            UserError: the settings in the plans have changed since the training started.
        """
        now = (self.configuration_name, self.settings, self.named, self.output_folder)
        self.settings = settings_of_training(filename_or_checkpoint, *now)
        for of_plans in (self.own_configuration, self.configuration_manager.configuration):
            of_plans[PLANS_KEY] = self.settings.to_dict()
        if not self.was_initialized:
            self.initialize()
        self.nmsw_network.settings = self.settings
        self._unwrap_pretrained()
        super().load_checkpoint(filename_or_checkpoint)
        log_under(self, LOGGED_UNDER, REPORTED)

    def _unwrap_pretrained(self) -> None:
        if isinstance(self.network, AlreadyLoaded):
            self.network = self.network.network

    # Data.

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Loaders of whole volumes: mirrored and at random for training, as they are and in order for validation."""
        if self.is_cascaded:
            check_previous_stage(
                Path(self.folder_with_segs_from_previous_stage),
                [key for keys in self.do_split() for key in keys],
                self.configuration_manager.previous_stage_name,
                type(self).__name__,
            )
        self.augmentation, self.no_augmentation = augmentations_of(self)
        dataset_training, self.dataset_validation = self.get_tr_and_val_datasets()
        # Each validation case once an epoch, up to nnU-Net's number of validation steps; with more processes than cases
        # some twice, because nnU-Net needs a step of every process.
        cases = list(self.dataset_validation.identifiers)
        own_steps = self.processes.own_share(cases[: self.num_val_iterations_per_epoch])
        self.num_val_iterations_per_epoch: int = max(1, len(own_steps))

        number, patch_size = self.settings.random_windows, self.configuration_manager.patch_size
        windows = RandomWindows.oversampled(patch_size, number, self.oversample_foreground_percent)
        # A training that goes on draws other data than when it started, and every rank its own.
        seed = None if self.settings.seed is None else (self.settings.seed, self.local_rank, self.current_epoch)
        workers = LoaderProcesses(get_allowed_n_proc_DA(), seed, self.device.type == "cuda")
        check_shared_memory(dataset_training, patch_size, workers)
        training = (dataset_training, windows, self.augmentation, workers)
        validation = (self.dataset_validation, windows, self.no_augmentation, workers, self.processes)
        return training_batches(*training), validation_batches(*validation)

    def step_of(self, batch: dict[str, Any], augmentation: Augmentation) -> TrainingStep:
        """A batch of the loader as a step."""
        volume = training_volume(batch, augmentation, num_previous=len(self.label_manager.foreground_labels))
        return TrainingStep(volume, self.loss)

    # Training.

    def on_train_start(self) -> None:
        """See the parent. Where there is no split of the cases yet, one process makes it before the others read it."""
        self._unwrap_pretrained()
        if self.is_ddp and self.local_rank == 0:
            self.do_split()
        self.processes.wait()
        super().on_train_start()
        if self.local_rank == 0:
            remove_leftovers(Path(self.output_folder))

    def on_epoch_start(self) -> None:
        """See the parent. With a seed, what an epoch draws does not depend on whether the training was interrupted."""
        if self.settings.seed is not None:
            seed_everything(self.settings.seed, self.local_rank, self.current_epoch)
        super().on_epoch_start()

    def train_step(self, batch: dict) -> dict:
        """A step on a whole volume and its windows; see `TrainingStep`."""
        step = self.step_of(batch, self.augmentation).to(self.device, non_blocking=True)
        result = update(step, self.network, self.optimizer, self.grad_scaler)
        if not self.is_ddp and not np.isfinite(result["loss"]):
            check_weights(self.nmsw_network, self.current_epoch)
        return result

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the means of what the steps report beside nnU-Net's lines.

        Raises:
            UserError: the training cannot recover: a weight is no number, or no step of the epoch had a finite loss.
        """
        losses = gather_over_processes([float(output["loss"]) for output in train_outputs])
        check_losses([loss for of_one in losses for loss in of_one], self.nmsw_network, self.current_epoch)
        super().on_train_epoch_end(train_outputs)
        for name, mean in mean_over_processes(means_of_steps(train_outputs, REPORTED)).items():
            self.logger.log(LOGGED_UNDER + name, mean.tolist() if len(mean) > 1 else float(mean[0]), self.current_epoch)

    def validation_step(self, batch: dict) -> dict:
        """Loss and pseudo Dice of the fused prediction of one volume, with the windows that inference would take."""
        step = self.step_of(batch, self.no_augmentation).to(self.device, non_blocking=True)
        with mixed_precision(self.device):
            loss = self.nmsw_network(step).loss  # what wraps it waits for processes that may have no case left
        labels_DHW = predicted_in_training(self.nmsw_network, step, self.device)
        hits = self.encoding.hits(step.volume.labels_11DHW[0, 0].clamp_min(0), labels_DHW)
        names = ("tp_hard", "fp_hard", "fn_hard")
        return {"loss": loss.cpu().numpy(), **{name: hit.numpy() for name, hit in zip(names, hits, strict=True)}}

    def on_epoch_end(self) -> None:
        """Print the epoch's means, after which nnU-Net prints its own, and draw pictures."""
        logged = {name: self.logger.get_value(LOGGED_UNDER + name, step=None) for name in REPORTED}
        for line in lines(logged):
            self.print_to_log_file(line)
        if self.local_rank == 0:
            folder, epoch = Path(self.output_folder), self.current_epoch
            plot_progress(logged, folder / "progress_nmsw.png")
            if epoch % EPOCHS_BETWEEN_PICTURES == 0 or epoch == self.num_epochs - 1:
                cases = sampled_cases(self.nmsw_network, self.dataset_validation, self.encoding, self.device)
                plot_sampling(cases, f"epoch {epoch}", folder / "sampling" / f"epoch_{epoch:04d}.png")
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """See the parent. Afterwards every process may load the checkpoints that the first one has written."""
        super().on_train_end()
        self.processes.wait()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases as `nmsw_predict` would and write `validation/summary.json`."""
        self.set_deep_supervision_enabled(False)
        validate(self, self.nmsw_network, self.processes, save_probabilities)
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
