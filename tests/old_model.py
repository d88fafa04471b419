"""A model that the first version trained, two images, and what that version predicted."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

FOLDER = Path(__file__).parent / "model_of_version_0_1"
CASES = ("case_008", "case_009")
FLAGS = ["-m", str(FOLDER / "model"), "-device", "cpu", "--disable_progress_bar", "-npp", "1", "-nps", "1"]


def read(file: Path) -> np.ndarray:
    """Labels of a file."""
    image: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return image
