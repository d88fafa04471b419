"""A sliding window that skips what is empty: a yardstick that needs no learning.

Windows do not overlap. Every second one along each axis is predicted, and then whatever touches a window in which
foreground was found. What is left holds background only, as far as its neighbours tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Index = tuple[int, ...]
"""Numbers of a window along the axes."""


def looked_at(shape: Sequence[int], has_foreground: Callable[[Index], bool]) -> set[Index]:
    """The windows that are predicted.

    Args:
        shape: windows along each axis.
        has_foreground: predicts a window. Asked once for each window that is returned.
    """
    # Every window is one of these or a neighbour of one.
    queue = list(itertools.product(*(range(min(1, n - 1), n, 2) for n in shape)))
    seen = set(queue)
    while queue:
        index = queue.pop()
        if not has_foreground(index):
            continue
        around = itertools.product(*(range(max(0, i - 1), min(n, i + 2)) for i, n in zip(index, shape, strict=True)))
        found = [neighbour for neighbour in around if neighbour not in seen]
        seen.update(found)
        queue += found
    return seen
