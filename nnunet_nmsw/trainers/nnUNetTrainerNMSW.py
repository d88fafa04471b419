"""nnU-Net's trainer with NMSW's network, whole volumes as data, and NMSW inference for validation.

Tensor suffixes: C classes, K windows, D H W axes of the volume, d h w axes of the low-resolution view.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_nmsw.config import PLANS_KEY, NMSWConfig, resolve_num_patches
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.fusion import fused_segmentation
from nnunet_nmsw.geometry import downsample
from nnunet_nmsw.labels import LabelEncoding
from nnunet_nmsw.network import NMSWNetwork, branch_architectures
from nnunet_nmsw.precision import mixed_precision
from nnunet_nmsw.trainers.checkpoints import TrainerWithNMSWCheckpoints
from nnunet_nmsw.trainers.data import Augmentation, WholeVolumeLoader
from nnunet_nmsw.trainers.distributed import gather_over_processes, mean_over_processes
from nnunet_nmsw.trainers.loss import NMSWLoss, finest_scale
from nnunet_nmsw.trainers.progress import SampledCase, plot_progress, plot_sampling
from nnunet_nmsw.views import TrainingVolume, seed_everything

LOGGED = (
    "loss_local",
    "loss_global",
    "loss_fused",
    "entropy",
    "foreground_share",
    "benefit",
    "benefit_loss",
    "loss_distillation",
    "fusion_weights",
)
"""What `NMSWLoss.report` holds, logged once an epoch under these names with the prefix `nmsw_`."""


EPOCHS_BETWEEN_PICTURES = 10
"""Every so many epochs, and after the last one, pictures of two validation cases show where the sampler looks."""


class nnUNetTrainerNMSW(TrainerWithNMSWCheckpoints):
    """Trains a global branch, a window sampler and the plans' own network together."""

    training_length: int | None = None
    """Epochs, where a variant sets them; nnU-Net's default otherwise."""

    freezes_local_branch = False
    """Train all but the local branch."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        # Before anything is written: raises for a setting or a configuration that cannot work.
        plans_manager = PlansManager(plans)
        resolved = plans_manager.get_configuration(configuration).configuration
        self.config = NMSWConfig.from_configuration(resolved)
        branch_architectures(resolved["architecture"], self.config)
        regions = plans_manager.get_label_manager(dataset_json).has_regions
        self.config = dataclasses.replace(self.config, regions=regions, freeze_local_branch=self.freezes_local_branch)
        # Saved with the results and in the checkpoint, so that a model folder alone rebuilds the network.
        plans["configurations"][configuration][PLANS_KEY] = self.config.to_dict()
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.training_length is not None:
            self.num_epochs = self.training_length
        for name in LOGGED:
            self.logger.local_logger.my_fantastic_logging.setdefault(f"nmsw_{name}", [])

    def initialize(self) -> None:
        """See the parent. Seeds everything first where the settings say so, and compiles where nnU-Net would."""
        if self.config.seed is not None:
            seed_everything(self.config.seed)
        super().initialize()
        if super()._do_i_compile():
            self.print_to_log_file("Using torch.compile for the global and the local branch")
            self._plain_network().compile_branches()

    def on_epoch_start(self) -> None:
        """See the parent. With a seed, what an epoch draws does not depend on whether the training was interrupted."""
        if self.config.seed is not None:
            seed_everything(self.config.seed, self.local_rank, self.current_epoch)
        super().on_epoch_start()

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Both branches, from the plans' architecture and their settings under `nmsw`."""
        patch_size = tuple(configuration_manager.patch_size)
        assert len(patch_size) == 3
        return NMSWNetwork.from_architecture(
            configuration_manager.configuration["architecture"],
            patch_size,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            NMSWConfig.from_configuration(configuration_manager.configuration),
        )

    def _do_i_compile(self) -> bool:
        """Not the network as a whole, which depends on data between its branches: `initialize` compiles these."""
        return False

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The parent's, where the network has nnU-Net's switch for it."""
        if hasattr(self._plain_network().local_branch, "decoder"):
            super().set_deep_supervision_enabled(enabled)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        return self.deep_supervision_scales

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss inside of NMSW's, with deep supervision where the network returns several scales."""
        scales = self._plain_network().deep_supervision_scales(self.num_input_channels)
        self.deep_supervision_scales, self.enable_deep_supervision = scales, scales is not None
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        return NMSWLoss(super()._build_loss(), scales, self.config, LabelEncoding.of(self.label_manager))

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Loaders of whole volumes: mirrored and at random for training, as they are and in order for validation."""
        self._check_previous_stage()
        rotation, do_dummy_2d, _, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.augmentation = Augmentation.of(
            self.get_training_transforms(
                # Only the size of what the spatial transform would cut: here it gives its matrix.
                patch_size=(1, 1, 1),
                rotation_for_DA=rotation,
                deep_supervision_scales=None,
                mirror_axes=mirror_axes,
                do_dummy_2d_data_aug=do_dummy_2d,
                use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
                is_cascaded=self.is_cascaded,
                foreground_labels=self.label_manager.foreground_labels,
            )
        )
        self.no_augmentation = Augmentation.of(
            self.get_validation_transforms(
                deep_supervision_scales=None,
                is_cascaded=self.is_cascaded,
                foreground_labels=self.label_manager.foreground_labels,
            )
        )
        dataset_training, self.dataset_validation = self.get_tr_and_val_datasets()
        # Each validation case once an epoch, up to nnU-Net's number of validation steps; with more processes than cases
        # some twice, because nnU-Net needs a step of every process.
        cases = list(self.dataset_validation.identifiers)
        own_steps = self.own_share(cases[: self.num_val_iterations_per_epoch])
        self.num_val_iterations_per_epoch: int = max(1, len(own_steps))

        random_windows = self.config.random_windows
        foreground_windows = random_windows - round(random_windows * (1 - self.oversample_foreground_percent))
        processes = get_allowed_n_proc_DA()
        # A training that goes on draws other data than when it started, and every rank its own.
        seeds = None if self.config.seed is None else (self.config.seed, self.local_rank, self.current_epoch)

        def loader(dataset: Any, augmentation: Augmentation, training: bool) -> Any:
            volumes = WholeVolumeLoader(
                dataset,
                self.configuration_manager.patch_size,
                random_windows,
                foreground_windows,
                augmentation,
                training,
                None if seeds is None or processes == 0 else (*seeds, int(training)),
            )
            if not training:
                volumes.indices = self.own_share(cases) or cases
            if processes == 0:
                return SingleThreadedAugmenter(volumes, None)
            workers = processes if training else 1
            if seeds is not None:
                # The batches of its workers come in turns, where the other augmenter takes what is ready first.
                augmenter = MultiThreadedAugmenter(
                    volumes, None, workers, 2, list(range(workers)), self.device.type == "cuda", wait_time=0.002
                )
                next(augmenter)
                return augmenter
            augmenter = NonDetMultiThreadedAugmenter(
                volumes,
                None,
                num_processes=workers,
                num_cached=max(2, workers // 2),
                pin_memory=self.device.type == "cuda",
                wait_time=0.002,
            )
            next(augmenter)  # a worker that cannot work fails here and not in the middle of an epoch
            return augmenter

        return (
            loader(dataset_training, self.augmentation, True),
            loader(self.dataset_validation, self.no_augmentation, False),
        )

    def _check_previous_stage(self) -> None:
        """See that the cascade's previous stage has predicted every case of the fold.

        Raises:
            UserError: it has not.
        """
        if not self.is_cascaded:
            return
        folder = Path(self.folder_with_segs_from_previous_stage)
        predicted = {file.name.split(".")[0] for file in folder.glob("*")}
        missing = [key for keys in self.do_split() for key in keys if key not in predicted]
        if missing:
            stage = self.configuration_manager.previous_stage_name
            raise UserError(
                f"{folder} has no prediction of {missing[0]} and {len(missing) - 1} more cases: train all folds of "
                f"{stage} first, with -tr {type(self).__name__} and the same plans (validation predicts the cases)"
            )

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step on a whole volume and its random windows."""
        volume = training_volume(batch, self.augmentation, len(self.label_manager.foreground_labels))
        result: dict[str, Any] = super().train_step({"data": volume, "target": volume})
        if not self.is_ddp and not np.isfinite(result["loss"]):
            self._check_weights()
        return {**result, **_to_numpy(self.loss.report)}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the means of the parts of the loss beside nnU-Net's lines.

        Raises:
            UserError: the training cannot recover: a weight is no number, or no step of the epoch had a finite loss.
        """
        losses = gather_over_processes([float(output["loss"]) for output in train_outputs])
        if not np.isfinite(losses).all():
            self._check_weights()
        if not np.isfinite(losses).any():
            raise UserError(
                f"training stopped in epoch {self.current_epoch}: no step had a finite loss. Look for images that are "
                "not normalised or hold no numbers; the checkpoints of earlier epochs are as they were"
            )
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs([{k: np.atleast_2d(v) for k, v in output.items()} for output in train_outputs])
        means = mean_over_processes({name: np.concatenate(outputs[name]).mean(0) for name in LOGGED})
        for name, mean in means.items():
            self.logger.log(f"nmsw_{name}", mean.tolist() if len(mean) > 1 else float(mean[0]), self.current_epoch)

    def _check_weights(self) -> None:
        """See that the network can still learn: once a weight is no number, every later prediction is none, either.

        Raises:
            UserError: a weight is no number.
        """
        for name, weights in self._plain_network().state_dict().items():
            if weights.is_floating_point() and not weights.isfinite().all():
                raise UserError(
                    f"training stopped in epoch {self.current_epoch}: the loss is not finite and weights of {name} are "
                    "no numbers any more. Look for images that are not normalised or hold no numbers, or lower the "
                    "learning rate; the checkpoints of earlier epochs are as they were"
                )

    def validation_step(self, batch: dict) -> dict:
        """Loss and pseudo Dice of the fused prediction of one volume, with the windows that inference would take."""
        network = self._plain_network()
        volume = training_volume(batch, self.no_augmentation, len(self.label_manager.foreground_labels))
        volume = volume.to(self.device, non_blocking=True)
        with mixed_precision(self.device):
            output = network(volume)
            loss, coarse = self.loss(output, volume), output.coarse
            grid = network.grid(volume.shape)
            num_patches = resolve_num_patches(self.config.num_patches, len(grid))
            windows = network.select(coarse, grid, num_patches)
            batches = [volume.windows(some, network.patch_size)[0] for some in windows.starts_K3.split(self.batch_size)]
            logits = [finest_scale(network(patches)) for patches in batches]
        labels_DHW = fused_segmentation(
            torch.cat(logits),
            windows.starts_K3,
            windows.trust_K,
            coarse.logits_Cdhw,
            network.fusion_weights,
            grid.volume_shape,
            self.config.downsampling_factor,
            self.loss.encoding,
        )
        hits = self.loss.encoding.hits(volume.labels_11DHW[0, 0].clamp_min(0), labels_DHW)
        names = ("tp_hard", "fp_hard", "fn_hard")
        return {"loss": loss.cpu().numpy(), **{name: hit.numpy() for name, hit in zip(names, hits, strict=True)}}

    def on_epoch_end(self) -> None:
        """Print the epoch's means, after which nnU-Net prints its own."""

        def last(name: str) -> Any:
            return self.logger.get_value(f"nmsw_{name}", step=-1)

        self.print_to_log_file(
            "NMSW loss local {:.4f}, global {:.4f}, fused {:.4f}".format(
                *(last(f"loss_{part}") for part in ("local", "global", "fused"))
            )
        )
        self.print_to_log_file(
            f"NMSW window entropy {last('entropy'):.3f} nats, sampled windows with foreground "
            f"{last('foreground_share'):.1%}, mean benefit of a sampled window {last('benefit'):.2e}, "
            f"fusion weights {np.round(last('fusion_weights'), 3).tolist()}"
        )
        if self.local_rank == 0:
            logged = {name: self.logger.get_value(f"nmsw_{name}", step=None) for name in LOGGED}
            plot_progress(logged, Path(self.output_folder, "progress_nmsw.png"))
            if self.current_epoch % EPOCHS_BETWEEN_PICTURES == 0 or self.current_epoch == self.num_epochs - 1:
                file = Path(self.output_folder, "sampling", f"epoch_{self.current_epoch:04d}.png")
                plot_sampling(self._sampled_cases(), f"epoch {self.current_epoch}", file)
        super().on_epoch_end()

    @torch.inference_mode()
    def _sampled_cases(self) -> list[SampledCase]:
        """Where the network looks in the first two validation cases."""
        network = self._plain_network()
        training = network.training
        network.eval()
        cases = []
        for key in self.dataset_validation.identifiers[:2]:
            data, segmentation, previous, _ = self.dataset_validation.load_case(key)
            image_CDHW = self._with_previous(np.asarray(data[:], dtype=np.float32), previous)
            labels_1DHW = torch.from_numpy(np.asarray(segmentation[:1], dtype=np.int16))
            image_CDHW = pad_nd_image(image_CDHW, network.patch_size, "constant", {"value": 0})
            labels_1DHW = pad_nd_image(labels_1DHW, network.patch_size, "constant", {"value": 0})
            factor = self.config.downsampling_factor
            with mixed_precision(self.device):
                coarse = network.coarse(downsample(image_CDHW[None].to(self.device), factor))
            grid = network.grid((image_CDHW.shape[1], image_CDHW.shape[2], image_CDHW.shape[3]))
            choice = network.select(coarse, grid, resolve_num_patches(self.config.num_patches, len(grid)))
            logits_Cdhw, score_map_dhw = coarse.logits_Cdhw.cpu(), coarse.score_map_dhw.cpu()
            cases.append(
                SampledCase(
                    key,
                    image_CDHW[0],
                    labels_1DHW[0],
                    logits_Cdhw,
                    score_map_dhw,
                    choice.starts_K3,
                    network.patch_size,
                    factor,
                )
            )
        network.train(training)
        return cases


def training_volume(batch: dict[str, Any], augmentation: Augmentation, num_previous: int = 0) -> TrainingVolume:
    """What `WholeVolumeLoader` delivers, as what the network takes.

    Args:
        batch: of the loader.
        augmentation: what is done to views.
        num_previous: number of foreground labels of the cascade's previous stage.
    """
    return TrainingVolume(
        batch["data"],
        batch["target"],
        batch["random_starts"],
        batch["affine"],
        augmentation.of_views,
        batch["seed"],
        batch["previous"],
        num_previous,
        augmentation.of_previous,
    )


def _to_numpy(report: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.cpu().numpy() for name, value in report.items()}
