"""nnU-Net's predictor with the sliding window replaced by chosen windows, up to logits.

Tensor suffixes: 1 a batch of one, C channels or classes, D H W axes of the volume, d h w axes of the low-resolution
view, K chosen windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor
from torch._dynamo import OptimizedModule

from nnunet_nmsw.config import parse_num_patches, resolve_num_patches
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.fusion import blended_trust, fuse_volume_
from nnunet_nmsw.geometry import Shape, WindowGrid, downsample, window_slices
from nnunet_nmsw.inference.from_files import FilesPredictor
from nnunet_nmsw.inference.model_folder import initialize, trained_folds
from nnunet_nmsw.inference.streaming import mean
from nnunet_nmsw.inference.windows import ChosenWindows
from nnunet_nmsw.network import CoarsePrediction, NMSWNetwork, WindowChoice
from nnunet_nmsw.precision import mixed_precision


class LogitsPredictor(FilesPredictor):
    """nnU-Net's predictor with the sliding window replaced by chosen windows, up to the logits of a volume.

    Args:
        num_patches: see `NMSWPredictor`.
        use_global_branch: see `NMSWPredictor`.
        bfloat16: see `NMSWPredictor`.
        trust_model: see `NMSWPredictor`.
        **kwargs: those of `nnUNetPredictor`. The step of the windows is the model's.
    """

    def __init__(
        self,
        num_patches: int | str | None = None,
        use_global_branch: bool = True,
        bfloat16: bool = False,
        trust_model: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bfloat16, self.trust_model = bfloat16, trust_model
        self.num_patches = None
        if num_patches is not None:
            self.num_patches = parse_num_patches(num_patches, "num_patches", automatic=True)
        self.stop_at: float | None = None
        """With "auto": the smallest predicted benefit of a window that is taken."""
        self.use_global_branch = use_global_branch
        self.chosen_windows: list[ChosenWindows] = []
        """The windows of the case predicted last, one entry a fold of the ensemble."""
        self._slicers: list[tuple[slice, ...]] = []
        self._loaded: dict[str, Tensor] | None = None

    network: Any

    @property
    def nmsw_network(self) -> NMSWNetwork:
        """The network.

        Raises:
            UserError: the model was not trained with an NMSW trainer.
        """
        if not isinstance(self.network, NMSWNetwork):
            raise UserError(
                f"the model was trained with {self.trainer_name}, which is no NMSW trainer: "
                "predict with nnUNetv2_predict, or train with -tr nnUNetTrainerNMSW"
            )
        return self.network

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """See the parent. Code that comes with the model does not run, unless `trust_model` allows it.

        Raises:
            UserError: the model cannot be loaded, or is not to be trusted.
        """
        folder = Path(model_training_output_dir)
        folds = [use_folds] if isinstance(use_folds, str) else use_folds or trained_folds(folder, checkpoint_name)
        if not folds:
            raise UserError(f"no fold in {folder} has a {checkpoint_name}: finish a training, or name another one")
        load = super().initialize_from_trained_model_folder
        initialize(load, self, folder, folds, checkpoint_name, self.trust_model)
        self._compile_branches()

    def manual_initialization(self, *args: Any, **kwargs: Any) -> None:
        """See the parent."""
        super().manual_initialization(*args, **kwargs)
        self._compile_branches()

    def _compile_branches(self) -> None:
        """Compile the branches where nnU-Net has wrapped the network to be compiled as a whole."""
        if isinstance(self.network, OptimizedModule) and isinstance(self.network._orig_mod, NMSWNetwork):
            self.network = self.network._orig_mod
            self.network.compile_branches()

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Fused logits of a preprocessed volume.

        Args:
            input_image: shape C, D, H, W.

        Returns:
            float16 logits of shape classes, D, H, W, on the device or the host as `nnUNetPredictor` decides.
        """
        network = self.nmsw_network.to(self.device)
        network.eval()
        self.tile_step_size = network.config.tile_step_size
        padded, unpad = pad_nd_image(input_image, network.patch_size, "constant", {"value": 0}, True)
        grid = network.grid(spatial_shape(padded))
        coarse = self.predict_coarse(padded)
        windows = self.choose_windows(coarse, grid)
        offset = [axis.start for axis in unpad[1:]]
        self._remember(grid, windows, offset, spatial_shape(input_image))

        # The parent runs the windows of `_internal_get_sliding_window_slicers` and blends them; NaN where none is.
        logits_CDHW: Tensor = super().predict_sliding_window_return_logits(input_image)
        if not self.use_global_branch:
            return logits_CDHW
        trust_DHW = blended_trust(
            windows.trust_K, windows.starts_K3, grid.patch_size, grid.volume_shape, logits_CDHW.device
        )
        return fuse_volume_(
            logits_CDHW,
            coarse.logits_Cdhw,
            trust_DHW[unpad[1:]],
            network.fusion_weights,
            offset,
            network.config.downsampling_factor,
        )

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        with mixed_precision(self.device, self.bfloat16):
            logits: Tensor = super()._internal_maybe_mirror_and_predict(x)
        return logits

    def _internal_get_sliding_window_slicers(self, image_size: tuple[int, ...]) -> list[tuple[slice, ...]]:
        return self._slicers

    def _remember(self, grid: WindowGrid, windows: WindowChoice, offset: Sequence[int], volume_shape: Shape) -> None:
        # In the order of nnU-Net's sliding window, so that sums over all windows round as they do there.
        in_order = sorted(windows.starts_K3.tolist())
        self._slicers = [(slice(None), *window_slices(start, grid.patch_size)) for start in in_order]
        chosen_starts = windows.starts_K3.numpy() - np.array(offset)
        self.chosen_windows.append(
            ChosenWindows(chosen_starts, windows.scores_K.numpy(), grid.patch_size, volume_shape, len(grid))
        )

    def choose_windows(self, coarse: CoarsePrediction, grid: WindowGrid) -> WindowChoice:
        """The windows to spend patches on: `num_patches` of the grid by the model's selection."""
        network = self.nmsw_network
        num_patches = network.config.num_patches if self.num_patches is None else self.num_patches
        if num_patches == "auto":
            assert self.stop_at is not None
            return network.select(coarse, grid, len(grid), "greedy_benefit", self.stop_at)
        return network.select(coarse, grid, resolve_num_patches(num_patches, len(grid)))

    def predict_coarse(self, volume_CDHW: Tensor) -> CoarsePrediction:
        """Coarse prediction of a padded volume, averaged over mirrorings where these are on."""
        network = self.nmsw_network
        low_1Cdhw = downsample(volume_CDHW[None].float(), network.config.downsampling_factor).to(self.device)
        mirror_axes = self.allowed_mirroring_axes if self.use_mirroring else None
        axes = [axis + 2 for axis in mirror_axes or ()]
        flips = itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1))

        def mirrored(flip: tuple[int, ...]) -> Tensor:
            with mixed_precision(self.device, self.bfloat16):
                coarse = network.coarse(low_1Cdhw.flip(flip))
            return torch.cat([coarse.logits_Cdhw, coarse.score_map_dhw[None]]).flip([axis - 1 for axis in flip])

        output_Cdhw = mean(map(mirrored, flips))
        return CoarsePrediction(output_Cdhw[:-1], output_Cdhw[-1])

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Logits of a preprocessed volume, averaged over the folds of the ensemble."""
        self._start_case(data)
        logits: Tensor = super().predict_logits_from_preprocessed_data(data)
        return logits

    def _load(self, parameters: dict[str, Tensor]) -> None:
        """Load a fold's weights, unless they are in the network."""
        if self._loaded is not parameters:
            self.nmsw_network.load_state_dict(parameters)
            self._loaded = parameters

    def _start_case(self, data: Tensor) -> None:
        self.chosen_windows = []
        self._loaded = None


def spatial_shape(volume_CDHW: Tensor) -> Shape:
    d, h, w = volume_CDHW.shape[1:]
    return d, h, w
