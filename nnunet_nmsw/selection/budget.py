"""How many patches a case may have: a number, a percentage of its windows, all of them, or as many as are worth it."""

from __future__ import annotations

import math
from typing import NamedTuple

from nnunet_nmsw.errors import UserError

UNCALIBRATED = "10%"
"""In the place of "auto" where there is no threshold."""


class Budget(NamedTuple):
    """What may be spent on a volume.

    Attributes:
        num_windows: how many windows, at most.
        threshold: take only windows whose mean worth, by the selector, is above this. None: take all.
    """

    num_windows: int
    threshold: float | None = None


def budget_of(num_patches: int | str, num_windows: int, threshold: float | None = None) -> Budget:
    """The budget of a volume.

    Args:
        num_patches: as from `parse_num_patches`.
        num_windows: windows of the volume's grid.
        threshold: with "auto", of the model's calibration; `UNCALIBRATED` patches where None.
    """
    if num_patches == "auto" and threshold is not None:
        return Budget(num_windows, threshold)
    return Budget(resolve_num_patches(UNCALIBRATED if num_patches == "auto" else num_patches, num_windows))


def parse_num_patches(value: int | str, source: str = "-k", auto: bool = False) -> int | str:
    """Check a number of patches given as an integer, a percentage ("10%"), "all" or, where that may be, "auto".

    Args:
        value: what the user gave.
        source: the flag or setting it was given by, for the message.
        auto: allow "auto".

    Returns:
        The integer, the percentage as it was, "all" or "auto".

    Raises:
        UserError: it is none of these.
    """
    text = str(value).strip().lower()
    words = ("all", "auto") if auto else ("all",)
    if text in words:
        return text
    try:
        if text.endswith("%"):
            if 0 < float(text[:-1]) <= 100:
                return text
        elif int(text) >= 1:
            return int(text)
    except ValueError:
        pass
    or_words = " or ".join(f'"{word}"' for word in words)
    raise UserError(
        f'{source} is "{value}": give a number of patches (1 or more), a percentage of all windows '
        f'above 0% and up to 100% such as "10%", or {or_words}'
    )


def resolve_num_patches(num_patches: int | str, num_windows: int) -> int:
    """Patches to take of a case's `num_windows` windows: at least 1, at most all. Percentages are rounded up."""
    if num_patches == "all":
        return num_windows
    if isinstance(num_patches, str):
        return max(1, math.ceil(float(num_patches[:-1]) / 100 * num_windows - 1e-9))
    return min(num_patches, num_windows)
