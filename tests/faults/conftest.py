"""What the tests of faults share."""

from pathlib import Path

import pytest
from untrained import write_image, write_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder. Not to be changed."""
    return write_model(tmp_path_factory.mktemp("untrained") / "model")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one good image, `good`."""
    folder = tmp_path / "images"
    folder.mkdir()
    write_image(folder / "good_0000.nii.gz")
    return folder
