"""Importing PyTorch and nnU-Net without a search for garbage.

Python's search for cyclic garbage walks over all objects of these libraries' modules time and again while they are
imported, and once more when a command ends. Without that, start and end take five seconds instead of seven.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Do not search for garbage inside, where modules are imported, nor ever after among what they hold."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
