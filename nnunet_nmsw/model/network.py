"""The network: a global branch that sees the whole volume at low resolution, and the plans' own network for patches.

Tensor suffixes: B batch of patches, C channels or classes, D H W axes of a patch, d h w axes of the low-resolution
view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.model.architecture import ARCHITECTURE_KEYS, takes_deep_supervision
from nnunet_nmsw.model.context import Context
from nnunet_nmsw.model.fusion import AFFINE, FusionForm, FusionWeights
from nnunet_nmsw.model.plans import branch_architectures, settings_of
from nnunet_nmsw.model.strides import convolves_one_slowly, padded_for, total_stride
from nnunet_nmsw.selection.interface import CoarsePrediction
from nnunet_nmsw.selection.sampler import SAMPLERS, Sampler, own_num_patches
from nnunet_nmsw.settings import NMSWSettings
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.precision import mixed_precision
from nnunet_nmsw.volume.windows import Shape, WindowGrid

COMPILED_VERSIONS = 32
"""The branches share the code of their class, and with it PyTorch's limit on compiled versions of a piece of code: one
for each branch, number of windows, with and without gradient, deep supervision and so on. PyTorch's 8 are too few."""

Step = Callable[["NMSWNetwork"], Any]
"""What is to be done with the network in a training step. It knows the data, the network does not."""


class Parts(NamedTuple):
    """What a trainer makes of the settings.

    Attributes:
        sampler: how windows are scored and chosen.
        fusion: how patches and the coarse prediction are fused.
        context: how the local branch is told of the whole volume, where the settings say that it is.
    """

    sampler: Sampler
    fusion: FusionForm = AFFINE
    context: type[Context] = Context

    @classmethod
    def of(cls, settings: NMSWSettings) -> Parts:
        """Ours, as the settings say."""
        return cls(SAMPLERS[settings.score_training]())


class NMSWNetwork(nn.Module):
    """Global and local branch with the learned weights of their fusion.

    Called with a batch of patches it is the local branch, so stock nnU-Net can slide it over a volume. Called with a
    step of training it calls the step with itself, so that whoever wraps it (distributed training) wraps the step.

    Args:
        global_branch: takes the low-resolution view; a channel for each class, one for the score map, and those of the
            context.
        local_branch: takes patches, with what `context` adds to them.
        channels: of the image and of the logits.
        patch_size: voxels by axis.
        settings: the settings.
        parts: what is made of them.
    """

    def __init__(
        self,
        global_branch: nn.Module,
        local_branch: nn.Module,
        channels: tuple[int, int],
        patch_size: Shape,
        settings: NMSWSettings,
        parts: Parts | None = None,
    ) -> None:
        super().__init__()
        self.global_branch = global_branch
        self.local_branch = local_branch
        self.sampler, self.fusion, context = parts or Parts.of(settings)
        self.context = context(*channels, settings.context_channels) if settings.context_channels else None
        # As differences from where they start.
        self.fusion_parameters = nn.Parameter(torch.zeros(self.fusion.rows, channels[1]))
        self.patch_size, self.settings = patch_size, settings
        self.local_branch_is_frozen = False
        self.benefit_scale: Tensor
        self.register_buffer("benefit_scale", torch.zeros(()))

    @classmethod
    def from_architecture(
        cls,
        architecture: dict[str, Any],
        patch_size: Shape,
        channels: tuple[int, int],
        deep_supervision: bool,
        settings: NMSWSettings,
        parts: Parts | None = None,
    ) -> NMSWNetwork:
        """Build both branches from the `architecture` of a plans' configuration.

        Args:
            architecture: of the plans.
            patch_size: voxels by axis.
            channels: of the input and of the logits.
            deep_supervision: whether the local branch is asked for several scales.
            settings: the settings.
            parts: what is made of them; ours where None.

        Raises:
            UserError: an architecture names what there is not, or is not for patches of this size.
        """
        architectures, parts = branch_architectures(architecture, settings), parts or Parts.of(settings)
        num_image_channels, num_classes = channels

        def branch(of: dict[str, Any], num_inputs: int, num_outputs: int, deep_supervision: bool) -> nn.Module:
            network: nn.Module = get_network_from_plans(
                *(of[key] for key in ARCHITECTURE_KEYS),
                num_inputs,
                num_outputs,
                allow_init=True,
                deep_supervision=deep_supervision if takes_deep_supervision(of) else None,
            )
            return network

        num_context = settings.context_channels
        global_branch = branch(architectures["global"], num_image_channels, num_classes + 1 + num_context, False)
        of_local = parts.context.channels_of_local_branch(num_image_channels, num_context)
        local_branch = branch(architectures["local"], of_local, num_classes, deep_supervision)
        stride = total_stride(local_branch)
        if stride is not None and any(n % s for n, s in zip(patch_size, stride, strict=True)):
            raise UserError(
                f'"patch_size" in the plans is {list(patch_size)}, and {architecture["network_class_name"]} with its '
                f'"arch_kwargs" takes multiples of {stride}: change one of them'
            )
        return cls(global_branch, local_branch, channels, patch_size, settings, parts)

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
            outputs = self.local(torch.zeros(1, num_input_channels, *self.patch_size, device=device))
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
        return self.fusion.weights(self.fusion_parameters.float())

    @property
    def num_patches(self) -> int | str:
        """K at inference, as the model is set."""
        return own_num_patches(self.settings.num_patches, self.sampler)

    def freeze_local_branch(self) -> None:
        """Train all but the local branch, which stays as it is at inference: dropout and batch statistics, too."""
        self.local_branch.requires_grad_(False)
        self.local_branch_is_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> NMSWNetwork:
        """See the parent."""
        super().train(mode)
        if self.local_branch_is_frozen:
            self.local_branch.eval()
        return self

    def grid(self, volume_shape: Shape) -> WindowGrid:
        """The windows of nnU-Net's sliding window over a volume."""
        return WindowGrid(volume_shape, self.patch_size, self.settings.downsampling_factor)

    def coarse(self, low_1Cdhw: Tensor, encoding: LabelEncoding) -> CoarsePrediction:
        """Run the global branch on a downsampled volume of any shape."""
        padded_1Cdhw = padded_for(self.global_branch, low_1Cdhw)
        if convolves_one_slowly(self.global_branch, padded_1Cdhw):
            padded_1Cdhw = padded_1Cdhw.expand(2, -1, -1, -1, -1)
        output = self.global_branch(padded_1Cdhw)[0].float()
        return self.coarse_of(output[(slice(None), *(slice(n) for n in low_1Cdhw.shape[2:]))], encoding)

    def coarse_of(self, output: Tensor, encoding: LabelEncoding) -> CoarsePrediction:
        """What the global branch's output says, voxel by voxel."""
        num_classes = self.fusion_parameters.shape[1]
        logits_Cdhw, output_dhw, of_context_Gdhw = output[:num_classes], output[num_classes], output[num_classes + 1 :]
        score_map_dhw = self.sampler.score_map(output_dhw, encoding.entropy(logits_Cdhw.detach()))
        context_Gdhw = None if self.context is None else self.context.of_volume(of_context_Gdhw, logits_Cdhw, encoding)
        return CoarsePrediction(logits_Cdhw, score_map_dhw, encoding, context_Gdhw)

    def with_context(self, patches_BIDHW: Tensor, coarse: CoarsePrediction, starts_B3: Tensor) -> Tensor:
        """Patches of a volume with what the local branch is told of the volume, where it is told.

        Args:
            patches_BIDHW: patches of the image.
            coarse: prediction of the volume.
            starts_B3: first voxels of the patches.
        """
        if self.context is None or coarse.context_Gdhw is None:
            return patches_BIDHW
        of_windows = (coarse.context_Gdhw, starts_B3, self.patch_size, self.settings.downsampling_factor)
        return torch.cat([patches_BIDHW, self.context.of_windows(*of_windows).to(patches_BIDHW)], 1)

    def local(self, patches_BCDHW: Tensor) -> Tensor | list[Tensor]:
        """Logits of a training step's windows, with as few activations in memory as the settings say.

        Returns:
            Shape B, classes, D, H, W; with deep supervision a list of scales, the finest first.
        """
        at_once = self.settings.windows_at_once
        if self.context is not None:
            patches_BCDHW = self.context(patches_BCDHW)
        if at_once is None or at_once >= len(patches_BCDHW):
            return self.local_branch(patches_BCDHW)
        some_patches = patches_BCDHW.split(at_once)
        if self.local_branch_is_frozen and not patches_BCDHW.requires_grad:  # nothing kept
            parts = [self.local_branch(some) for some in some_patches]
        else:
            parts = [checkpoint(self.local_branch, some, use_reentrant=False) for some in some_patches]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]

    def forward(self, x: Tensor | Step) -> Any:
        """Local logits of a batch of patches, with or without context, or what a step makes of this network."""
        if not isinstance(x, Tensor):
            return x(self)
        logits = self.local_branch(x if self.context is None else self.context(x))
        # bfloat16 has too few digits for nnU-Net's sums over mirrorings.
        return logits.float() if isinstance(logits, Tensor) and logits.dtype == torch.bfloat16 else logits


def build_network(
    configuration: ConfigurationManager,
    channels: tuple[int, int],
    deep_supervision: bool,
    parts_of: Callable[[NMSWSettings], Parts] = Parts.of,
) -> NMSWNetwork:
    """The network of a configuration of the plans.

    Args:
        configuration: with the settings under `nmsw`.
        channels: of the input and of the logits.
        deep_supervision: whether the local branch is asked for several scales.
        parts_of: what is made of the settings; ours by default.
    """
    d, h, w = configuration.patch_size
    settings = settings_of(configuration.configuration)
    of_branches = (configuration.configuration["architecture"], (d, h, w), channels, deep_supervision)
    return NMSWNetwork.from_architecture(*of_branches, settings, parts_of(settings))
