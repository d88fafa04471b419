"""All methods on one case, from patch predictions that are computed once.

Tensor suffixes: N windows of the grid, K chosen windows, C channels or classes, D H W axes of the padded volume or of
a patch, d h w axes of the low-resolution view.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nnunet_nmsw.config import resolve_num_patches
from nnunet_nmsw.evaluation.methods import Method
from nnunet_nmsw.evaluation.models import Case, Model
from nnunet_nmsw.evaluation.oracle import oracle_windows
from nnunet_nmsw.evaluation.selectors import entropy_windows, no_windows, object_windows, random_windows
from nnunet_nmsw.geometry import WindowGrid, crop, window_slices
from nnunet_nmsw.inference.model_folder import load_model
from nnunet_nmsw.inference.predictor import NMSWPredictor
from nnunet_nmsw.inference.preprocessing import is_stock, read_images, read_labels
from nnunet_nmsw.inference.tensor_file import TensorFile
from nnunet_nmsw.network import CoarsePrediction, WindowChoice

Result = TypeVar("Result")

Position = tuple[int, ...]
"""First voxel of a patch in the padded volume."""


def count_macs(call: Callable[[], Result]) -> tuple[Result, int]:
    """Make a call.

    Returns:
        What it returned, and the multiply-accumulates of its convolutions and matrix products.
    """
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops() // 2


class PatchStore:
    """Patch logits of one network on one case, in a `TensorFile`.

    Args:
        positions: what to keep; other patches are for one method alone.
    """

    def __init__(self, positions: Iterable[Position]) -> None:
        self.positions = frozenset(positions)
        self._file = TensorFile()
        self._offsets: dict[Position, int] = {}

    def __contains__(self, position: Position) -> bool:
        return position in self._offsets

    def put(self, position: Position, logits: Tensor) -> None:
        """Keep a patch if its position is to be kept; all have one shape and type."""
        if position in self.positions:
            self._offsets[position] = self._file.put(logits)

    def get(self, position: Position) -> Tensor:
        """A patch that was put, as a new tensor on the host."""
        return self._file.get(self._offsets[position])

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


class SharedPatches(nnUNetPredictor):
    """nnU-Net's predictor, taking patch logits from a `PatchStore` where they are there and putting them there if not.

    Everything else is the parent's, so that a method's result is what its own command would give.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.store: PatchStore | None = None
        self.macs_per_patch: dict[bool, int] = {}
        """Multiply-accumulates of a patch, mirrored or not, counted at the first of each."""
        self._upcoming: Iterator[tuple[slice, ...]] = iter(())

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple[slice, ...]], do_on_device: bool = True
    ) -> Tensor:
        # The parent asks for the patches of the slicers one after the other, without saying which it asks for.
        self._upcoming = iter(slicers)
        logits: Tensor = super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
        return logits

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        start = tuple(axis.start for axis in next(self._upcoming)[1:])
        return self.patch_logits(x, start)

    def patch_logits(self, patch_1CDHW: Tensor, start: Position) -> Tensor:
        """Logits of the patch that starts at a voxel of the padded volume."""
        if self.store is not None and start in self.store:
            return self.store.get(start).to(self.device)
        logits: Tensor
        if self.use_mirroring in self.macs_per_patch:
            logits = super()._internal_maybe_mirror_and_predict(patch_1CDHW)
        else:
            predict = partial(super()._internal_maybe_mirror_and_predict, patch_1CDHW)
            logits, self.macs_per_patch[self.use_mirroring] = count_macs(predict)
        if self.store is not None:
            self.store.put(start, logits)
        return logits


class SelectingPredictor(NMSWPredictor):
    """NMSW with windows picked in another way: by any selection but the oracle's."""

    selection: str = "greedy_benefit"
    seed: int = 0

    def choose_windows(self, coarse: CoarsePrediction, grid: WindowGrid) -> WindowChoice:
        """The windows of `selection`."""
        if self.num_patches == "auto":
            return super().choose_windows(coarse, grid)
        assert self.num_patches is not None or self.selection in ("none", "objects")
        num_patches = 0 if self.num_patches is None else resolve_num_patches(self.num_patches, len(grid))
        network = self.nmsw_network
        if self.selection == "none":
            return no_windows()
        if self.selection == "objects":
            return object_windows(coarse, grid)
        if self.selection == "random":
            return random_windows(network, coarse, grid, num_patches, self.seed)
        if self.selection == "entropy":
            return entropy_windows(network, coarse, grid, num_patches)
        return network.select(coarse, grid, num_patches, self.selection)


class SharedSelectingPredictor(SharedPatches, SelectingPredictor):
    """All of NMSW's methods on one case: the coarse prediction, the patches and the oracle's choice are made once."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.start_case(torch.zeros(0))

    def start_case(self, reference_DHW: Tensor) -> None:
        """Forget the last case; the reference is that of the preprocessed volume before padding."""
        self.reference_DHW = reference_DHW
        self.coarse_macs: dict[bool, int] = {}
        self._volume_CDHW = torch.zeros(0)
        self._coarse: dict[bool, CoarsePrediction] = {}
        self._oracle: dict[bool, tuple[list[int], list[float]]] = {}

    @property
    def coarse(self) -> CoarsePrediction:
        """The coarse prediction of this case."""
        return self._coarse[self.use_mirroring]

    @property
    def starts_in_padded_volume(self) -> list[list[int]]:
        """First voxels of the windows taken last."""
        return [[axis.start for axis in slicer[1:]] for slicer in self._slicers]

    def predict_coarse(self, volume_CDHW: Tensor) -> CoarsePrediction:
        """The coarse prediction, once a case; its multiply-accumulates are counted."""
        self._volume_CDHW = volume_CDHW
        if self.use_mirroring not in self._coarse:
            coarse, macs = count_macs(partial(super().predict_coarse, volume_CDHW))
            self._coarse[self.use_mirroring], self.coarse_macs[self.use_mirroring] = coarse, macs
        return self._coarse[self.use_mirroring]

    def choose_windows(self, coarse: CoarsePrediction, grid: WindowGrid) -> WindowChoice:
        """The windows of `selection`, which may be the oracle's."""
        if self.selection != "oracle":
            return super().choose_windows(coarse, grid)
        assert self.num_patches is not None
        if self.use_mirroring not in self._oracle:
            self._oracle[self.use_mirroring] = self._ask_oracle(coarse, grid)
        order, gains = self._oracle[self.use_mirroring]
        k = resolve_num_patches(self.num_patches, len(grid))
        return WindowChoice.fully_trusted(
            grid.starts_N3[torch.tensor(order[:k], dtype=torch.int64)], torch.tensor(gains[:k])
        )

    def _ask_oracle(self, coarse: CoarsePrediction, grid: WindowGrid) -> tuple[list[int], list[float]]:
        volume_1CDHW = self._volume_CDHW[None]

        def patch_logits(window: int) -> Tensor:
            start = grid.starts_N3[window].tolist()
            patch_1CDHW = crop(volume_1CDHW, start, grid.patch_size).to(self.device)
            return self.patch_logits(patch_1CDHW, tuple(start))[0].to(reference_DHW.device)

        (padded_DHW,), _ = padded(self.reference_DHW[None], grid.patch_size)
        for device in (self.device, torch.device("cpu")):
            try:
                reference_DHW = padded_DHW.to(device)
                weights = self.nmsw_network.fusion_weights.to(device)
                return oracle_windows(patch_logits, coarse.logits_Cdhw.to(device), weights, reference_DHW, grid)
            except torch.OutOfMemoryError:
                if device.type == "cpu":
                    raise
        raise AssertionError


def padded(volume_CDHW: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, list[int]]:
    """A volume as nnU-Net pads it to the patch size at least, and how many voxels were added before each axis."""
    result, unpad = pad_nd_image(volume_CDHW, patch_size, "constant", {"value": 0}, True)
    return result, [axis.start for axis in unpad[1:]]


@dataclasses.dataclass
class Prediction:
    """A case as a method predicts it.

    Attributes:
        method: the method.
        logits_CDHW: float16, on the grid of the preprocessed volume, on the host.
        properties: nnU-Net's of the preprocessed case.
        patches: how many it took.
        macs: multiply-accumulates of all networks it ran.
        covered_foreground: share of the reference's foreground voxels that lie in a window; NaN without foreground.
    """

    method: Method
    logits_CDHW: Tensor
    properties: dict[str, Any]
    patches: int
    macs: int
    covered_foreground: float


class FoldPredictor:
    """Predicts cases with every method of one model of a fold.

    Args:
        model: the model.
        fold: the fold.
        device: to predict on.
        stop_at: of the automatic number of patches, see `Model.stop_at`.
    """

    def __init__(self, model: Model, fold: int, device: torch.device, stop_at: float | None = None) -> None:
        self.role = model.role
        common = {"perform_everything_on_device": device.type == "cuda", "device": device, "allow_tqdm": False}
        self.sliding_window = SharedPatches(**common)
        self.nmsw: SharedSelectingPredictor | None = None
        loaded: nnUNetPredictor = self.sliding_window
        if model.role == "nmsw":
            loaded = self.nmsw = SharedSelectingPredictor(**common)
            load_model(self.nmsw, model.folder, [fold], model.checkpoint, model.trusted)
            self.nmsw.stop_at = stop_at
            self.sliding_window.macs_per_patch = self.nmsw.macs_per_patch
            self.sliding_window.manual_initialization(
                self.nmsw.network,
                self.nmsw.plans_manager,
                self.nmsw.configuration_manager,
                self.nmsw.list_of_parameters,
                self.nmsw.dataset_json,
                self.nmsw.trainer_name,
                self.nmsw.allowed_mirroring_axes,
            )
        else:
            load_model(self.sliding_window, model.folder, [fold], model.checkpoint, model.trusted)
        self.plans_manager = loaded.plans_manager
        self.configuration_manager = loaded.configuration_manager
        self.dataset_json = loaded.dataset_json

    def predict(self, case: Case, methods: Sequence[Method]) -> Iterator[Prediction]:
        """Predict a case with one method after the other, only one set of logits alive at a time.

        Raises:
            UserError: an image cannot be read.
        """
        data, _, properties = self._preprocess(case, None)
        volume_CDHW = torch.from_numpy(np.asarray(data))
        foreground_DHW = torch.zeros(0)
        if self.nmsw is not None:
            # Preprocessed apart, since nnU-Net's normalisation of an image looks at labels where it gets some.
            _, labels, _ = self._preprocess(case, case.reference)
            # nnU-Net marks voxels outside of its crop with -1.
            reference_DHW = torch.from_numpy(np.asarray(labels)[0]).clamp_min(0)
            (foreground_DHW,), _ = padded((reference_DHW > 0)[None], self.configuration_manager.patch_size)
            self.nmsw.start_case(reference_DHW)
            self.nmsw.seed = zlib.crc32(case.name.encode())
        for _, of_one_kind in itertools.groupby(methods, lambda method: method.mirrored):
            store = None
            if self.nmsw is not None:
                volume_shape = foreground_DHW.shape
                grid = self.nmsw.nmsw_network.grid((volume_shape[0], volume_shape[1], volume_shape[2]))
                positions = torch.cat([grid.starts_N3, self.nmsw.nmsw_network.placement_grid(grid).starts_N3])
                store = PatchStore(map(tuple, positions.tolist()))
                self.nmsw.store = self.sliding_window.store = store
            try:
                for method in of_one_kind:
                    if method.selection is None:
                        yield self._slide(method, volume_CDHW, properties)
                    else:
                        yield self._select(method, volume_CDHW, foreground_DHW, properties)
            finally:
                if store is not None:
                    store.close()

    def _preprocess(self, case: Case, reference: str | None) -> tuple[Any, Any, dict[str, Any]]:
        preprocessor = self.configuration_manager.preprocessor_class(verbose=False)
        of_model = (self.plans_manager, self.configuration_manager, self.dataset_json)
        image, properties = read_images(self.sliding_window, list(case.images))
        labels = None if reference is None else read_labels(self.sliding_window, reference, image.shape[1:])
        preprocessed: tuple[Any, Any, dict[str, Any]]
        if is_stock(preprocessor):
            preprocessed = preprocessor.run_case_npy(image, labels, properties, *of_model)
        else:
            preprocessed = preprocessor.run_case(list(case.images), reference, *of_model)
        return preprocessed

    def _slide(self, method: Method, volume_CDHW: Tensor, properties: dict[str, Any]) -> Prediction:
        self.sliding_window.use_mirroring = method.mirrored
        self.sliding_window.tile_step_size = method.tile_step_size
        logits = self.sliding_window.predict_logits_from_preprocessed_data(volume_CDHW)
        shape = [max(n, p) for n, p in zip(volume_CDHW.shape[1:], self.configuration_manager.patch_size, strict=True)]
        patches = len(self.sliding_window._internal_get_sliding_window_slicers(tuple(shape)))
        macs = patches * self.sliding_window.macs_per_patch[method.mirrored]
        return Prediction(method, logits, properties, patches, macs, 1.0)

    def _select(
        self, method: Method, volume_CDHW: Tensor, foreground_DHW: Tensor, properties: dict[str, Any]
    ) -> Prediction:
        nmsw = self.nmsw
        assert nmsw is not None
        assert method.selection is not None
        nmsw.use_mirroring, nmsw.selection, nmsw.num_patches = method.mirrored, method.selection, method.num_patches
        logits = nmsw.predict_logits_from_preprocessed_data(volume_CDHW)
        starts = nmsw.starts_in_padded_volume
        covered_DHW = torch.zeros_like(foreground_DHW)
        for start in starts:
            covered_DHW[window_slices(start, nmsw.nmsw_network.patch_size)] = True
        foreground = int(foreground_DHW.sum())
        share = float((foreground_DHW & covered_DHW).sum()) / foreground if foreground else float("nan")
        macs = len(starts) * nmsw.macs_per_patch.get(method.mirrored, 0) + nmsw.coarse_macs[method.mirrored]
        return Prediction(method, logits, properties, len(starts), macs, share)
