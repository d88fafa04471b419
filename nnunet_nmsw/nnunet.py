"""Everything private of nnU-Net and batchgenerators that this package leans on, and why.

What is public is overridden and called where it belongs. Each piece here has a contract test in
`tests/test_nnunet_contract.py`, which says what has changed when a new nnU-Net breaks it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchgenerators.dataloading.data_loader import DataLoader
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_nmsw.errors import UserError


class TrainerHooks(nnUNetTrainer):
    """nnU-Net's trainer, its private methods that ours has to answer for under public names."""

    deep_supervision_scales: list[list[float]] | None = None
    """What stands in for scales from the plans' strides, which only nnU-Net's own U-Nets have."""

    def build_loss(self, of_patches: Callable[[], nn.Module]) -> nn.Module:
        """The loss.

        Args:
            of_patches: builds nnU-Net's.
        """
        raise NotImplementedError

    def compiles(self) -> bool:
        """Whether nnU-Net would compile the network, by its variables of the environment."""
        return bool(super()._do_i_compile())

    def _do_i_compile(self) -> bool:
        # The network as a whole depends on data between its branches: these are compiled instead.
        return False

    def _build_loss(self) -> nn.Module:
        # Called by `initialize`, when the network is there; nnU-Net's loss of patches becomes a part of ours.
        return self.build_loss(super()._build_loss)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        return self.deep_supervision_scales


class PredictorHooks(nnUNetPredictor):
    """nnU-Net's predictor, its private methods that ours has to answer for under public names."""

    def cases_from_files(
        self, images: list[list[str]], previous_stage: list[str] | None, outputs: list[str] | None, num_processes: int
    ) -> Any:
        """What `predict_from_data_iterator` takes, of files.

        Args:
            images: by case and channel.
            previous_stage: of the cascade, by case.
            outputs: files to be written, without ending.
            num_processes: that preprocess.
        """
        raise NotImplementedError

    def input_and_output(
        self,
        source: str | list[list[str]],
        target: str | list[str] | None,
        previous_stage: str | None,
        overwrite: bool,
        part: tuple[int, int],
        save_probabilities: bool,
    ) -> tuple[list[list[str]], list[str] | None, list[str] | None]:
        """nnU-Net's lists of images, output files and files of the previous stage, without cases that are done.

        Args:
            source: folder or files.
            target: folder or files.
            previous_stage: folder.
            overwrite: cases that are done, too.
            part: number of this part, and of parts.
            save_probabilities: a case without them is not done.
        """
        # Public methods of nnU-Net do this and predict at once, with processes of their own.
        lists: tuple[list[list[str]], list[str] | None, list[str] | None] = self._manage_input_and_output_lists(
            source, target, previous_stage, overwrite, *part, save_probabilities
        )
        return lists

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> Any:
        return self.cases_from_files(
            input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, num_processes
        )


class PatchHooks(nnUNetPredictor):
    """nnU-Net's sliding window, patch by patch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._upcoming: Iterator[tuple[slice, ...]] = iter(())

    def patch_logits(self, patch_1CDHW: Tensor, start: tuple[int, ...], predict: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of a patch, shape 1, C, D, H, W.

        Args:
            patch_1CDHW: the patch.
            start: its first voxel in the padded volume.
            predict: nnU-Net's prediction of it, mirrored where that is on.
        """
        raise NotImplementedError

    def num_windows(self, volume_shape: tuple[int, ...]) -> int:
        """Windows over a padded volume."""
        return len(self._internal_get_sliding_window_slicers(volume_shape))

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple[slice, ...]], do_on_device: bool = True
    ) -> Tensor:
        # The parent asks for the patches of the slicers one after the other, without saying which it asks for.
        self._upcoming = iter(slicers)
        logits: Tensor = super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
        return logits

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        start = tuple(axis.start for axis in next(self._upcoming)[1:])
        return self.patch_logits(x, start, super()._internal_maybe_mirror_and_predict)


def log_more(trainer: nnUNetTrainer, names: Sequence[str]) -> None:
    """Let a trainer log values by epoch under more names; its logger knows a fixed list."""
    for name in names:
        trainer.logger.local_logger.my_fantastic_logging.setdefault(name, [])


@contextmanager
def as_one_process(trainer: nnUNetTrainer) -> Iterator[None]:
    """Let a trainer initialise without its own distribution, which splits batches of patches over the GPUs."""
    distributed, trainer.is_ddp = trainer.is_ddp, False
    try:
        yield
    finally:
        trainer.is_ddp = distributed


def load_case(loader: DataLoader, key: str) -> Any:
    """A case of the dataset that a loader was made with. batchgenerators keeps it to itself."""
    return loader._data.load_case(key)


def pretrained_weights_of_command_line(arguments: Sequence[str] | None = None) -> Path | None:
    """The file given with `-pretrained_weights`, which nnU-Net does not pass on to the trainer.

    Args:
        arguments: of the command; this process's where None. Processes that nnU-Net spawns have their parent's.

    Raises:
        UserError: there is no such file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-pretrained_weights", type=Path)
    parser.add_argument("-p")  # or it would be read as short for -pretrained_weights
    file: Path | None = parser.parse_known_args(arguments)[0].pretrained_weights
    if file is not None and not file.is_file():
        raise UserError(f"-pretrained_weights {file}: there is no such file")
    return file


class AlreadyLoaded(nn.Module):
    """Stands in for a network while nnU-Net's own loading of pretrained weights runs, which finds nothing to do.

    nnU-Net wants every weight of the network in the checkpoint, which a stock model's does not have.

    Args:
        network: what `network` gives back.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing."""
        return {}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""
