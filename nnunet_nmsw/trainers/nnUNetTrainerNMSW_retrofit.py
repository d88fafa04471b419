"""A trained stock nnU-Net becomes an NMSW model: its network stays what it is, and the rest is trained around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.files import sha256_of, write_json
from nnunet_nmsw.model.safe_loading import read_checkpoint
from nnunet_nmsw.settings import NMSWSettings, refused
from nnunet_nmsw.trainers.builder import network_builder
from nnunet_nmsw.trainers.nnUNetTrainerNMSW import nnUNetTrainerNMSW
from nnunet_nmsw.trainers.pretrained import SOURCE_FILE, check_same_task, load_local_branch


class nnUNetTrainerNMSW_retrofit(nnUNetTrainerNMSW):
    """Takes the local branch from the checkpoint given with `-pretrained_weights`, and trains all but it.

    The local branch's patch predictions stay those of the stock model, bit for bit. Mirroring is restricted to the axes
    that the stock model was trained with.
    """

    has_local_branch = False

    build_network_architecture = network_builder(freeze_local_branch=True)

    @classmethod
    def check_settings(cls, settings: NMSWSettings) -> None:
        """See the parent.

        Raises:
            UserError: the local branch is to be told of the volume, and does not learn to listen.
        """
        if settings.context_channels:
            allowed = f"0 with {cls.__name__}, whose patches stay the stock model's"
            raise refused("context_channels", settings.context_channels, allowed)

    def initialize(self) -> None:
        """See the parent. There is nothing to supervise in the local branch."""
        self.enable_deep_supervision = False
        super().initialize()

    def load_pretrained_weights(self, file: Path) -> None:
        """Load the local branch, segmentation layers included, and write down where it is from.

        Args:
            file: checkpoint of a model of the same dataset and plans.

        Raises:
            UserError: it cannot be read, does not fit, or was trained with other labels, spacing or normalisation.
        """
        self.print_to_log_file(f"Taking the local branch from {file}")
        checkpoint = read_checkpoint(file, training=True)
        check_same_task(checkpoint, self.plans_manager, self.configuration_name, self.dataset_json["labels"], str(file))
        load_local_branch(self.nmsw_network, checkpoint["network_weights"], str(file))
        fold = checkpoint["init_args"]["fold"]
        if str(fold) != str(self.fold):
            self.print_to_log_file(
                f"WARNING: the local branch was trained on fold {fold}. It has seen cases that fold {self.fold} "
                "validates on; the validation will be too good."
            )
        self.inference_allowed_mirroring_axes = checkpoint.get("inference_allowed_mirroring_axes")
        self.has_local_branch = True
        if self.local_rank == 0:
            source = {"checkpoint": str(file.resolve()), "sha256": sha256_of(file)}
            write_json(Path(self.output_folder, SOURCE_FILE), source)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """See the parent."""
        super().load_checkpoint(filename_or_checkpoint)
        self.has_local_branch = True

    def on_train_start(self) -> None:
        """See the parent.

        Raises:
            UserError: there is no local branch to freeze.
        """
        if not self.has_local_branch:
            raise UserError(
                f"{type(self).__name__} needs a trained nnU-Net: give its checkpoint with -pretrained_weights, "
                "e.g. .../nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth"
            )
        super().on_train_start()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """The parent's, mirroring only along axes that the local branch was trained with."""
        trained_axes = self.inference_allowed_mirroring_axes or ()
        rotation, dummy_2d, patch_size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        axes = tuple(axis for axis in axes or () if axis in trained_axes) or None
        self.inference_allowed_mirroring_axes = axes
        return rotation, dummy_2d, patch_size, axes
