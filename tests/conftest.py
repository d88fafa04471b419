"""Fixtures that tests of all kinds share, options, and the document of `compatibility.py`."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import surroundings  # noqa: F401 - before nnU-Net is imported
import torch
from commands import DATASET, TRAINER, run_executable, write_tiny_plans
from compatibility import Document, check_markers
from hypothesis import settings
from tiny import build_network

from nnunet_nmsw.demo.phantom import write_dataset
from nnunet_nmsw.model.network import NMSWNetwork

# The same examples everywhere, whatever a variable `CI` or a database of earlier failures says.
settings.register_profile("the same", deadline=None, derandomize=True, database=None)
settings.load_profile("the same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="write what the tests marked `compatibility` showed")
    parser.addoption("--kills", type=int, default=1, help="how often the tests marked `faults` kill each command")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--compatibility")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Document(Path(file)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    check_markers(items)
    if hasattr(config, "workerinput"):  # one of several processes: what takes long begins first
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("real_data", "integration")])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Networks that OpenVINO has converted are not left in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whatever tests ran before in this process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - which nnU-Net draws from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Commands set their number, and sums are rounded by it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_network() -> NMSWNetwork:
    """The network of the default tiny plans, in evaluation mode."""
    return build_network().eval()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders, with a preprocessed file by whose name nnU-Net tells the format."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    data = tmp_path / "nnUNet_preprocessed" / "Dataset998_Tiny" / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()
    return tmp_path


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model: plan, preprocess, train one epoch, validate."""
    folder = tmp_path_factory.mktemp("nnunet")
    write_dataset(folder / "nnUNet_raw" / DATASET, num_training=5, num_test=2, size=44)
    run_executable("nnUNetv2_plan_and_preprocess -d 998 -c 3d_fullres -npfp 1 -np 1", folder)
    before = sorted((folder / "nnUNet_preprocessed" / DATASET).rglob("*"))
    write_tiny_plans(folder, DATASET)
    run_executable(f"nnUNetv2_train 998 3d_fullres 0 -p nnUNetPlans_small -tr {TRAINER} -device cpu", folder)
    after = sorted((folder / "nnUNet_preprocessed" / DATASET).rglob("*"))
    new = {file.name for file in set(after) - set(before)}
    assert new == {"nnUNetPlans_small.json", "splits_final.json"}  # no second copy of the data
    return folder


@pytest.fixture(scope="session")
def model(workspace: Path) -> Path:
    """The model's folder."""
    return workspace / "nnUNet_results" / DATASET / f"{TRAINER}__nnUNetPlans_small__3d_fullres"
