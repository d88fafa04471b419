"""The Python that README and how-tos show, run on a tiny model that was never trained."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from untrained import write_model

ROOT = Path(__file__).parents[1]
SHAPE = (14, 15, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("examples") / "model")


def run_example(file: str, **names: Any) -> dict[str, Any]:
    """Run the only example of a document, and return its names."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / file).read_text(), re.DOTALL | re.MULTILINE)
    exec(code.replace("MODEL_FOLDER", str(names.pop("model_folder", ""))), names)
    return names


def image() -> np.ndarray:
    array: np.ndarray = np.random.default_rng(0).normal(100, 30, (1, *SHAPE)).astype(np.float32)
    return array


def test_the_example_of_the_readme(model):
    names = run_example("README.md", model_folder=model, image_czyx=image())
    assert names["segmentation"].shape == SHAPE


def test_in_the_place_of_nnunets_predictor(model):
    predictor = run_example("docs/how-to/prediction.md", device=torch.device("cpu"), folder=str(model))["predictor"]
    labels = predictor.predict_single_npy_array(image(), {"spacing": [1.0] * 3}, None, None, False)
    assert labels.shape == SHAPE
