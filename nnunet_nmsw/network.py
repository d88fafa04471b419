"""The network: a global branch that sees the whole volume at low resolution, and the plans' own network for patches.

Tensor suffixes:

    B  batch of patches   C  channels or classes   D H W  axes of the volume, or of a patch
    K  sampled windows    R  random windows        d h w  axes of the low-resolution view    N  windows of the grid
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_nmsw.architecture import (
    ARCHITECTURE_KEYS,
    check_architecture,
    global_architecture,
    takes_deep_supervision,
)
from nnunet_nmsw.config import PLANS_KEY, NMSWConfig
from nnunet_nmsw.errors import UserError
from nnunet_nmsw.fusion import FusionWeights
from nnunet_nmsw.geometry import Shape, WindowGrid
from nnunet_nmsw.labels import entropy, foreground_probability
from nnunet_nmsw.precision import mixed_precision
from nnunet_nmsw.topk import (
    WindowSample,
    candidate_windows,
    greedy_benefit,
    greedy_coverage,
    sample_windows,
    top_k,
    window_entropy,
)
from nnunet_nmsw.views import TrainingVolume


class CoarsePrediction(NamedTuple):
    """What the global branch makes of a volume: coarse logits and a score map, float32 on the low-resolution grid."""

    logits_Cdhw: Tensor
    score_map_dhw: Tensor


class WindowChoice(NamedTuple):
    """Windows chosen at inference.

    Attributes:
        starts_K3: their first voxels in the order of choice, int64 on the host.
        scores_K: their scores, float32 on the host.
        trust_K: how much of what each changes is kept, from 0 to 1, float32 on the host.
    """

    starts_K3: Tensor
    scores_K: Tensor
    trust_K: Tensor

    @classmethod
    def fully_trusted(cls, starts_K3: Tensor, scores_K: Tensor) -> WindowChoice:
        """Windows whose patches count fully, whatever their scores."""
        return cls(starts_K3, scores_K, torch.ones(len(starts_K3)))


class TrainingOutput(NamedTuple):
    """Output of a training step's forward pass.

    Attributes:
        coarse: prediction of the global branch.
        local: logits of the windows, sampled ones first, then random ones; a list of scales with deep supervision.
        targets: labels of these windows, int16 of shape K + R, 1, patch size.
        starts: their first voxels, int64 on the host, (K + R) × 3.
        sample: the draw of the K sampled windows.
        entropy: of the window distribution, nats.
        fusion: weights of the fusion.
        benefit_scale: the network's buffer, scalar: benefits are this times the score map.
    """

    coarse: CoarsePrediction
    local: Tensor | list[Tensor]
    targets: Tensor
    starts: Tensor
    sample: WindowSample
    entropy: Tensor
    fusion: FusionWeights
    benefit_scale: Tensor


class NMSWNetwork(nn.Module):
    """Global and local branch with the learned class weights of their fusion.

    Called with a batch of patches it is the local branch, so stock nnU-Net can slide it over a volume; called with a
    `TrainingVolume` it is a whole training step up to the loss.
    """

    def __init__(
        self, global_branch: nn.Module, local_branch: nn.Module, num_classes: int, patch_size: Shape, config: NMSWConfig
    ) -> None:
        super().__init__()
        self.global_branch = global_branch
        self.local_branch = local_branch
        # For the fusion "affine" three rows: patch, coarse, bias, as differences from where they start.
        rows = 3 if config.fusion == "affine" else 1
        self.fusion_parameters = nn.Parameter(torch.zeros(rows, num_classes))
        self.patch_size = patch_size
        self.config = config
        if config.freeze_local_branch:
            local_branch.requires_grad_(False)
        self.benefit_scale: Tensor
        self.register_buffer("benefit_scale", torch.zeros(()))

    @classmethod
    def from_architecture(
        cls,
        architecture: dict[str, Any],
        patch_size: Shape,
        num_input_channels: int,
        num_classes: int,
        deep_supervision: bool,
        config: NMSWConfig,
    ) -> NMSWNetwork:
        """Build both branches from the `architecture` of a plans' configuration.

        Raises:
            UserError: an architecture names what there is not, or is not for patches of this size.
        """
        architectures = branch_architectures(architecture, config)

        def branch(of: dict[str, Any], num_outputs: int, deep_supervision: bool) -> nn.Module:
            network: nn.Module = get_network_from_plans(
                *(of[key] for key in ARCHITECTURE_KEYS),
                num_input_channels,
                num_outputs,
                allow_init=True,
                deep_supervision=deep_supervision if takes_deep_supervision(of) else None,
            )
            return network

        global_branch = branch(architectures["global"], num_classes + 1, False)
        local_branch = branch(architectures["local"], num_classes, deep_supervision)
        stride = total_stride(local_branch)
        if stride is not None and any(n % s for n, s in zip(patch_size, stride, strict=True)):
            raise UserError(
                f'"patch_size" in the plans is {list(patch_size)}, and {architecture["network_class_name"]} with its '
                f'"arch_kwargs" takes multiples of {stride}: change one of them'
            )
        return cls(global_branch, local_branch, num_classes, patch_size, config)

    @property
    def decoder(self) -> nn.Module:
        """The local branch's decoder, on which nnU-Net switches deep supervision on and off."""
        decoder = self.local_branch.decoder
        assert isinstance(decoder, nn.Module)
        return decoder

    @torch.no_grad()
    def deep_supervision_scales(self, num_input_channels: int) -> list[list[float]] | None:
        """Sizes of the local branch's outputs relative to the patch, finest first; None without deep supervision.

        The network is asked with an empty patch, as the plans of others than nnU-Net's U-Nets do not tell. One output
        alone is no deep supervision: nnU-Net gives the coarsest no weight in the loss.

        Raises:
            UserError: there are several outputs and nothing by which nnU-Net could switch them off.
        """
        training, device = self.training, self.fusion_parameters.device
        self.eval()  # neither dropout, which would draw random numbers, nor statistics of batches
        with mixed_precision(device):
            outputs = self.local_branch(torch.zeros(1, num_input_channels, *self.patch_size, device=device))
        self.train(training)
        if isinstance(outputs, Tensor) or len(outputs) == 1:
            return None
        if not hasattr(self.local_branch, "decoder"):
            raise UserError(
                f"the plans' network {type(self.local_branch).__name__} returns {len(outputs)} outputs and has no "
                "attribute `decoder.deep_supervision` to switch that off, as nnU-Net's networks have: add it, or "
                "return one output"
            )
        return [[n / p for n, p in zip(output.shape[2:], self.patch_size, strict=True)] for output in outputs]

    def compile_branches(self, backend: str = "inductor") -> None:
        """Compile both branches in place, with `torch.compile`, when they are first called.

        What lies between them depends on data and would only break graphs. The state dictionary keeps its names.

        Args:
            backend: of `torch.compile`.
        """
        config = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, COMPILED_VERSIONS)
        # Every volume has another shape, and all windows have the same.
        self.global_branch.compile(backend=backend, dynamic=True)
        self.local_branch.compile(backend=backend, dynamic=False)

    @property
    def fusion_weights(self) -> FusionWeights:
        """Weights of the fusion, float32."""
        parameters = self.config.fusion_speed * self.fusion_parameters.float()
        initial = torch.as_tensor(float(self.config.initial_class_weight), device=parameters.device)
        if self.config.fusion == "class_weights":
            return FusionWeights.convex(torch.sigmoid(initial + parameters[0]))
        weight = torch.sigmoid(initial)
        return FusionWeights(weight + parameters[0], 1 - weight + parameters[1], parameters[2])

    def train(self, mode: bool = True) -> NMSWNetwork:
        """See the parent. A frozen local branch stays as it is at inference, dropout and batch statistics included."""
        super().train(mode)
        if self.config.freeze_local_branch:
            self.local_branch.eval()
        return self

    def grid(self, volume_shape: Shape) -> WindowGrid:
        """The candidate windows of a volume."""
        return WindowGrid(volume_shape, self.patch_size, self.config.downsampling_factor, self.config.tile_step_size)

    def placement_grid(self, grid: WindowGrid) -> WindowGrid:
        """The positions that the selection "greedy_benefit" chooses from: those of the grid and more between them."""
        return dataclasses.replace(grid, tile_step_size=min(self.config.placement_step, grid.tile_step_size))

    def coarse(self, low_1Cdhw: Tensor) -> CoarsePrediction:
        """Run the global branch on a downsampled volume of any shape."""
        shape = low_1Cdhw.shape[2:]
        # Up to what the network's strides divide, and at least two voxels at its bottleneck, which instance norm needs.
        strides = total_stride(self.global_branch) or [UNKNOWN_STRIDE] * 3
        multiples = [max(2, -(-n // stride)) * stride for n, stride in zip(shape, strides, strict=True)]
        padding = [p for n, m in zip(reversed(shape), reversed(multiples), strict=True) for p in (0, m - n)]
        output = self.global_branch(F.pad(low_1Cdhw, padding))[0].float()
        output = output[(slice(None), *(slice(n) for n in shape))]
        logits_Cdhw, score_map_dhw = output[:-1], output[-1]
        if self.config.score_map != "free":
            score_map_dhw = score_map(score_map_dhw, self.entropy(logits_Cdhw.detach()), self.config.score_map)
        return CoarsePrediction(logits_Cdhw, score_map_dhw)

    def entropy(self, coarse_logits_Cdhw: Tensor) -> Tensor:
        """Entropy of the coarse prediction in nats, shape d, h, w."""
        return entropy(coarse_logits_Cdhw, self.config.regions)

    def scores(self, score_map_dhw: Tensor, grid: WindowGrid) -> Tensor:
        """Scores of the windows, float32 of shape N: `score_scale` times the mean of the score map over each."""
        return self.config.score_scale * grid.mean(score_map_dhw)

    def trust(self, scores_K: Tensor) -> Tensor:
        """How much of what chosen windows change is kept, from 0 to 1: the root of each benefit over the largest.

        Benefits are the predicted ones. All of it where the settings say so, where scores were not trained to predict
        benefits, or where no window has a positive one: patches that were asked for, and paid for, count.

        Args:
            scores_K: scores of the windows of a case.
        """
        if self.config.trust == "full" or self.config.benefit_loss_weight == 0 or len(scores_K) == 0:
            return torch.ones_like(scores_K)
        largest = scores_K.max()
        return (scores_K / largest).clamp(0, 1).sqrt() if largest > 0 else torch.ones_like(scores_K)

    def candidates(self, coarse_logits_Cdhw: Tensor, grid: WindowGrid, at_least: int) -> Tensor:
        """Windows worth a patch, bool of shape N: see `candidate_windows`."""
        foreground_dhw = foreground_probability(coarse_logits_Cdhw.detach(), self.config.regions)
        return candidate_windows(foreground_dhw, grid, self.config.candidate_threshold, at_least)

    def select(
        self,
        coarse: CoarsePrediction,
        grid: WindowGrid,
        num_patches: int,
        selection: str | None = None,
        stop_at: float | None = None,
    ) -> WindowChoice:
        """The windows to spend `num_patches` patches on, without noise.

        Args:
            coarse: prediction of the global branch.
            grid: windows of the volume.
            num_patches: number of windows; from all of the grid's on, these are they.
            selection: in the place of the settings'.
            stop_at: of the selection "greedy_benefit": take fewer windows, none whose predicted benefit is not above.
        """
        selection = selection or self.config.selection
        if num_patches >= len(grid) and stop_at is None:
            selection = "top_k"
        if selection == "greedy_benefit":
            grid = self.placement_grid(grid)
        scores_N = self.scores(coarse.score_map_dhw, grid)
        candidates_N = self.candidates(coarse.logits_Cdhw, grid, at_least=1)
        if selection == "greedy_benefit":
            discount = self.config.coverage_discount
            indices_K = greedy_benefit(coarse.score_map_dhw, candidates_N, num_patches, grid, discount, stop_at)
        elif selection == "greedy_coverage":
            indices_K = greedy_coverage(scores_N, candidates_N, num_patches, grid)
        else:
            indices_K = top_k(scores_N, candidates_N, num_patches)
        scores_K = scores_N[indices_K].cpu()
        return WindowChoice(grid.starts_N3[indices_K.cpu()], scores_K, self.trust(scores_K))

    def forward(self, x: Tensor | TrainingVolume) -> Any:
        """Local logits of a batch of patches, or the `TrainingOutput` of a `TrainingVolume`."""
        if not isinstance(x, TrainingVolume):
            logits = self.local_branch(x)
            # bfloat16 has too few digits for nnU-Net's sums over mirrorings.
            return logits.float() if isinstance(logits, Tensor) and logits.dtype == torch.bfloat16 else logits
        grid = self.grid(x.shape)
        coarse = self.coarse(x.low_resolution(self.config.downsampling_factor))
        scores_N = self.scores(coarse.score_map_dhw, grid)
        k = min(self.config.sampled_windows, len(grid))
        candidates_N = self.candidates(coarse.logits_Cdhw, grid, at_least=k)
        if self.config.gradient_path == "none":
            # Predicted benefits have no scale of their own: what is drawn depends on their spread in this volume.
            spread = scores_N[candidates_N].std(correction=0).clamp_min(1e-6)
            scores_N = self.config.score_scale * (scores_N / spread).detach()
        sample = sample_windows(scores_N, k, candidates_N, self.config.temperature)
        starts = torch.cat([grid.starts_N3[sample.indices_K.cpu()], x.random_starts_R3])
        patches_BCDHW, targets_B1DHW = x.windows(starts, self.patch_size)
        if self.config.gradient_path == "input":
            weight_B = torch.cat([sample.relaxed_K, sample.relaxed_K.new_ones(len(x.random_starts_R3))])
            patches_BCDHW = patches_BCDHW * weight_B.view(-1, 1, 1, 1, 1)
        return TrainingOutput(
            coarse,
            self._local_logits(patches_BCDHW),
            targets_B1DHW,
            starts,
            sample,
            window_entropy(scores_N, candidates_N),
            self.fusion_weights,
            self.benefit_scale,
        )

    def _local_logits(self, patches_BCDHW: Tensor) -> Tensor | list[Tensor]:
        """Logits of a training step's windows, with as few activations in memory as the settings say."""
        at_once = self.config.windows_at_once
        if at_once is None or at_once >= len(patches_BCDHW):
            logits: Tensor | list[Tensor] = self.local_branch(patches_BCDHW)
            return logits
        some_patches = patches_BCDHW.split(at_once)
        if self.config.freeze_local_branch:  # no gradient, nothing kept
            parts = [self.local_branch(some) for some in some_patches]
        else:
            parts = [checkpoint(self.local_branch, some, use_reentrant=False) for some in some_patches]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]


def branch_architectures(architecture: dict[str, Any], config: NMSWConfig) -> dict[str, dict[str, Any]]:
    """Architectures of the branches "local" and "global", checked.

    Args:
        architecture: that of the plans.
        config: the settings.

    Raises:
        UserError: one of them names what cannot be imported, or has arguments that are not its class's.
    """
    of_global = global_architecture(architecture, config.global_architecture, config.global_width)
    check_architecture(architecture, '"architecture" in the plans')
    check_architecture(of_global, f'"global_architecture" under "{PLANS_KEY}" in the plans')
    return {"local": architecture, "global": of_global}


UNKNOWN_STRIDE = 32
"""Total stride of five stages, as many as most networks have at most."""


def total_stride(network: nn.Module) -> list[int] | None:
    """By axis what a network's input must be a multiple of; None where it does not tell.

    nnU-Net's networks tell it by their encoder's strides, others by an attribute `total_stride`, three integers.
    """
    strides = getattr(getattr(network, "encoder", None), "strides", None)
    if strides is None:
        stride: list[int] | None = getattr(network, "total_stride", None)
        return stride
    by_stage = [[stride] * 3 if isinstance(stride, int) else stride for stride in strides]
    return [math.prod(of_axis) for of_axis in zip(*by_stage, strict=True)]


COMPILED_VERSIONS = 32
"""The branches share the code of their class, and with it PyTorch's limit on compiled versions of a piece of code: one
for each branch, number of windows, with and without gradient, deep supervision and so on. PyTorch's 8 are too few."""

GATE_ENTROPY = 0.1
"""In nats. Well below this entropy of the coarse prediction (98% for one of two classes), a patch is worth nothing."""


def score_map(output_dhw: Tensor, entropy_dhw: Tensor, form: str) -> Tensor:
    """The score map of the network's last output and the coarse prediction's entropy, by the setting `score_map`."""
    if form == "gated":
        return output_dhw * entropy_dhw / (entropy_dhw + GATE_ENTROPY)
    if form == "plus_entropy":
        return output_dhw + entropy_dhw
    assert form == "times_entropy"
    return (1 + output_dhw) * entropy_dhw
