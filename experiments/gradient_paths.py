"""Which way of training the scores points where the expected loss falls? An answer by enumeration.

    python experiments/gradient_paths.py

A toy: five windows that do not overlap, two of them drawn, a fixed coarse prediction and a fixed small local network
with instance norm. The exact gradient of the expected fused loss with respect to the five scores comes from enumerating
all ordered draws; each path's gradient is averaged over many draws. Printed is the cosine between the two, over seeds.

    contribution   ours: minus benefit times the gradient of the draw's log-probability
    input          the paper's: a weight on the input patch, 1 with the gradient of the relaxed probability
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnunet_nmsw.model.fusion import FusionWeights
from nnunet_nmsw.selection.draw import WindowSample, sample_windows
from nnunet_nmsw.trainers.losses.fused import LowResolution, WindowPredictions, fused_loss
from nnunet_nmsw.volume.label_counts import label_counts
from nnunet_nmsw.volume.labels import LabelEncoding
from nnunet_nmsw.volume.windows import WindowGrid, crop_windows

CLASSES, K = 2, 2
PATHS = ("contribution", "input")

ENCODING = LabelEncoding(CLASSES)


class Toy:
    """A volume with two objects of different size, a coarse prediction that misses them, and a local network."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.grid = WindowGrid((6, 6, 30), (6, 6, 6), (3, 3, 3), 1.0)
        self.labels = torch.zeros(self.grid.volume_shape, dtype=torch.long)
        self.labels[1:5, 1:5, 7:11] = 1
        self.labels[2:4, 2:4, 20:22] = 1
        self.counts = label_counts(self.labels, CLASSES, self.grid.downsampling_factor)
        self.volume = (self.labels + 0.7 * torch.randn(self.grid.volume_shape))[None, None]
        self.coarse = torch.randn(CLASSES, *self.grid.low_shape)
        self.weights = FusionWeights.convex(torch.full((CLASSES,), 0.88))
        self.local = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.LeakyReLU(), nn.Conv3d(4, CLASSES, 1)
        )
        self._train()
        self.scores = 0.5 * torch.randn(len(self.grid))

    def _train(self) -> None:
        """A few steps, so that patches are worth something."""
        optimizer = torch.optim.Adam(self.local.parameters(), 0.02)
        patches = crop_windows(self.volume, self.grid.starts_N3, self.grid.patch_size)
        targets = crop_windows(self.labels[None, None], self.grid.starts_N3, self.grid.patch_size)[:, 0]
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.local(patches), targets).backward()
            optimizer.step()
        self.local.requires_grad_(False)

    def loss(self, indices: Tensor, window_weight: Tensor | None = None, input_weight: Tensor | None = None) -> Tensor:
        """Fused loss with some windows."""
        starts = self.grid.starts_N3[indices]
        patches = crop_windows(self.volume, starts, self.grid.patch_size)
        if input_weight is not None:
            patches = patches * input_weight.view(-1, 1, 1, 1, 1)
        targets = crop_windows(self.labels[None, None], starts, self.grid.patch_size)[:, 0]
        windows = WindowPredictions(self.local(patches), targets, starts)
        low = LowResolution(self.coarse, self.counts, self.grid.downsampling_factor, ENCODING)
        return fused_loss(windows, low, self.weights, window_weight_K=window_weight).loss


def exact_gradient(toy: Toy) -> Tensor:
    """Gradient of the expected loss, by enumeration of the ordered draws."""
    scores = toy.scores.double().requires_grad_(True)
    expected = torch.zeros((), dtype=torch.float64)
    for draw in itertools.permutations(range(len(scores)), K):
        log_probability, left = torch.zeros((), dtype=torch.float64), list(range(len(scores)))
        for item in draw:
            log_probability = log_probability + scores[item] - scores[left].logsumexp(0)
            left.remove(item)
        expected = expected + log_probability.exp() * toy.loss(torch.tensor(draw)).double()
    return torch.autograd.grad(expected, scores)[0].float()


def estimated_gradient(toy: Toy, path: str, draws: int) -> Tensor:
    """Mean gradient of a path over draws."""
    log_weight: Callable[[WindowSample], Tensor] = lambda s: (  # noqa: E731
        s.log_probability_K - s.log_probability_K.detach()
    ).exp()
    losses = {
        "contribution": lambda s: toy.loss(s.indices_K, window_weight=log_weight(s)),
        "input": lambda s: toy.loss(s.indices_K, input_weight=1 + (s.relaxed_K - s.relaxed_K.detach())),
    }
    everything = torch.ones(len(toy.grid), dtype=torch.bool)
    total = torch.zeros(len(toy.grid))
    for _ in range(draws):
        scores = toy.scores.clone().requires_grad_(True)
        sample = sample_windows(scores, K, everything, 2 / 3)
        total += torch.autograd.grad(losses[path](sample), scores)[0]
    return total / draws


def cosines(seed: int, draws: int, paths: tuple[str, ...] = PATHS) -> dict[str, float]:
    """Cosine between each path's mean gradient and the exact one."""
    toy = Toy(seed)
    exact = exact_gradient(toy)
    return {path: float(torch.cosine_similarity(estimated_gradient(toy, path, draws), exact, dim=0)) for path in paths}


def main() -> None:
    """Print the table."""
    seeds, draws = range(5), 400
    rows = [cosines(seed, draws) for seed in seeds]
    print(f"cosine with the exact gradient, {len(rows)} seeds, {draws} draws each")
    for path in PATHS:
        values = [row[path] for row in rows]
        print(f"{path:14s} mean {sum(values) / len(values):+.3f}   " + " ".join(f"{value:+.3f}" for value in values))


if __name__ == "__main__":
    main()
