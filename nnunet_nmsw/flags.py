"""What flags of several commands mean. It imports nothing heavy: a command that is called wrongly says so at once."""

from __future__ import annotations

import re

from nnunet_nmsw.errors import UserError

TRUST_FLAG = "--trust_model"

DEFAULT_TRAINER, DEFAULT_PLANS, DEFAULT_CONFIGURATION = "nnUNetTrainerNMSW", "nnUNetPlans", "3d_fullres"

DEFAULT_MAX_DROP = 0.002
"""Dice, of 1, that may be lost for fewer patches."""

AUTO, PYTORCH, OPENVINO = "auto", "pytorch", "openvino"
BACKENDS = (AUTO, PYTORCH, OPENVINO)
"""What computes the networks of a prediction. `AUTO` is OpenVINO where it is installed and the device is a CPU."""

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
PRECISIONS = (FLOAT32, BFLOAT16, INT8)
"""What networks compute in on a CPU. On a GPU they compute in nnU-Net's mixed precision. `INT8` is for models that
`nmsw_quantize` has prepared."""

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_memory(text: str, source: str = "--max_memory") -> int:
    """Bytes of an amount such as 8G, 500M or 1.5 GiB; units are powers of 1024.

    Args:
        text: what the user gave.
        source: the flag it was given by, for the message.

    Raises:
        UserError: it is no such amount.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f'{source} is "{text}": give an amount of memory such as 8G or 500M')
    return int(float(match[1]) * UNITS[match[2].upper()])


def in_words(amount: float) -> str:
    """Bytes as people write them."""
    return f"{amount / UNITS['G']:.1f}G"


def parse_orientation(text: str) -> str:
    """Check three letters, such as "RAS": where the axes x, y and z of an image point to, as in nibabel.

    Raises:
        UserError: they are no orientation.
    """
    letters = text.upper()
    one_of_each = all(sum(letter in pair for letter in letters) == 1 for pair in ("RL", "AP", "SI"))
    if not re.fullmatch("[RLAPSI]{3}", letters) or not one_of_each:
        raise UserError(
            f"--orientation is {text}: give a letter for each axis, R or L, A or P, and S or I, such as RAS, which "
            "nibabel calls canonical"
        )
    return letters
