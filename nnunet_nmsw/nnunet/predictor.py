"""What is private of nnU-Net's predictor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor


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

    def before_windows(
        self, starts: Sequence[tuple[int, ...]], patch_logits: Callable[[tuple[int, ...]], Tensor]
    ) -> None:
        """Called before the patches of a volume are asked for.

        Args:
            starts: first voxels of the windows.
            patch_logits: `patch_logits` of the window that starts there.
        """

    def num_windows(self, volume_shape: tuple[int, ...]) -> int:
        """Windows over a padded volume."""
        return len(self._internal_get_sliding_window_slicers(volume_shape))

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple[slice, ...]], do_on_device: bool = True
    ) -> Tensor:
        # The parent asks for the patches of the slicers one after the other, without saying which it asks for.
        by_start = {tuple(axis.start for axis in slicer[1:]): slicer for slicer in slicers}

        def patch_logits(start: tuple[int, ...]) -> Tensor:
            patch_1CDHW = data[by_start[start]][None].to(self.device)
            return self.patch_logits(patch_1CDHW, start, super(PatchHooks, self)._internal_maybe_mirror_and_predict)

        self.before_windows(list(by_start), patch_logits)
        self._upcoming = iter(slicers)
        logits: Tensor = super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
        return logits

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        start = tuple(axis.start for axis in next(self._upcoming)[1:])
        return self.patch_logits(x, start, super()._internal_maybe_mirror_and_predict)
