"""Which of Ray's workers takes which case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

AT_A_TIME = 2
"""Cases of a worker: the one it predicts, and the next, which it preprocesses."""


def next_case(
    waiting: Iterable[int], attempts: Counter[int], ready: Sequence[Any], running: Sequence[tuple[int, Any]]
) -> tuple[int, Any] | None:
    """A case and the worker that takes it; None where no worker has room.

    A case whose worker has died gets a worker of its own: it may be at fault, and would take another case with it.

    Args:
        waiting: cases, the next one first.
        attempts: how often the worker of a case has died.
        ready: workers.
        running: cases and their workers.
    """
    busy = Counter(actor for _, actor in running)
    alone = {actor for case, actor in running if attempts[case]}
    with_room = [actor for actor in ready if busy[actor] < AT_A_TIME and actor not in alone]
    for case in waiting if with_room else ():
        free = [actor for actor in with_room if not (attempts[case] and busy[actor])]
        if free:
            return case, min(free, key=busy.__getitem__)
    return None
