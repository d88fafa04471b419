"""How commands start.

Python's search for cyclic garbage walks over all objects of PyTorch's and nnU-Net's modules time and again while they
are imported, and once more when the command ends. Without that, start and end take five seconds instead of seven.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from nnunet_nmsw.console import end_in_one_line


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


def predict() -> None:
    """The command `nmsw_predict`."""
    end_in_one_line(": predictions that are there are whole, --continue_prediction makes the others")
    with importing():
        from nnunet_nmsw.inference.command import main
    try:
        main()
    finally:
        gc.freeze()


def compare() -> None:
    """The command `nmsw_compare`."""
    end_in_one_line(": the folder keeps what is done, the same command goes on from there")
    from nnunet_nmsw.evaluation.command import main

    main()


def demo() -> None:
    """The command `nmsw_demo`."""
    end_in_one_line(": the folder keeps what is done")
    from nnunet_nmsw.demo.command import main

    main()


if __name__ == "__main__":
    predict()
