"""The random numbers that nnU-Net draws: seeded, and kept from being used up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*seeds: int) -> None:
    """Seed all generators that nnU-Net draws from, by one number or several: seed, rank, epoch, and so on."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[list[torch.Generator]]:
    """Restore the state of all generators that nnU-Net draws from at the end. Gives those of PyTorch for a device."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        )
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    states = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for generator, generator_state in zip(generators, states, strict=True):
            generator.set_state(generator_state)
