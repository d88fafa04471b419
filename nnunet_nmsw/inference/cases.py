"""Preprocessed cases, one after the other, made ahead by threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

Case = dict[str, Any]
"""What nnU-Net's data iterators give: `data`, `data_properties` and `ofile`; or `error`, why these are not there, and
`what` could not be done."""


class Cases(Iterator[Case]):
    """Cases in their order, each preprocessed when it is asked for or before.

    Args:
        cases: one after the other.
        number: of them.
    """

    def __init__(self, cases: Generator[Case, None, None], number: int) -> None:
        self._cases, self._number = cases, number

    def __next__(self) -> Case:
        return next(self._cases)

    def __len__(self) -> int:
        return self._number

    def close(self) -> None:
        """Preprocess no more of them."""
        self._cases.close()


def in_order(jobs: Sequence[Callable[[], Case]], num_threads: int) -> Cases:
    """Do what gives cases, in their order, ahead of who asks for them; see `_ahead`."""
    return Cases(_ahead(jobs, num_threads), len(jobs))


def _ahead(jobs: Sequence[Callable[[], Case]], num_threads: int) -> Generator[Case, None, None]:
    """Do what gives cases, in their order, ahead of who asks for them.

    Args:
        jobs: each gives a case.
        num_threads: that work; as many cases are held, ready or not, beside the one that was asked for last. With 0,
            each job is done when its case is asked for.
    """
    left = list(jobs)[::-1]
    if num_threads == 0:
        while left:
            yield left.pop()()
        return
    with ThreadPoolExecutor(num_threads, "preprocessing") as threads:
        ahead: deque[Future[Case]] = deque()
        try:
            while left or ahead:
                while left and len(ahead) < num_threads:
                    ahead.append(threads.submit(left.pop()))
                yield ahead.popleft().result()
        finally:  # whoever asked may have had enough
            for waiting in ahead:
                waiting.cancel()


def loaded(data: torch.Tensor | str) -> torch.Tensor:
    """A volume, which nnU-Net's iterators pass in a file where it is large."""
    if not isinstance(data, str):
        return data
    array = np.load(data)
    os.remove(data)
    return torch.from_numpy(array)
