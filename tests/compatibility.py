"""`docs/compatibility.md`, written by the tests themselves:

    pytest -m compatibility --compatibility=docs/compatibility.md

A test that shows that a feature of nnU-Net works says so with a marker, once for every feature it shows:

    @pytest.mark.compatibility("input", "two channels in NRRD files, trained and predicted")

The first word is a row of `FEATURES`, the sentence is what was run. The document has a line for every marker, with the
result of the test: passed, failed or skipped with the reason. A feature that no test speaks for is there as missing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

FEATURES = (
    "label types",
    "input",
    "configurations",
    "plans",
    "backbones",
    "folds",
    "training flags",
    "pretrained weights",
    "variants",
    "devices",
    "distributed",
    "compile",
    "sharing",
    "stock code",
)
"""In the order of the document."""

RESULTS = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See that every marker speaks for a feature, before anything runs."""
    for test in items:
        for marker in test.iter_markers("compatibility"):
            if len(marker.args) != 2 or marker.args[0] not in FEATURES:
                raise pytest.UsageError(f"{test.nodeid}: compatibility{marker.args}; features: {', '.join(FEATURES)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep the worst of a test's three phases."""
    report = yield
    results = item.config.stash[RESULTS]
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        results[item.nodeid] = reason.replace("Skipped: ", "skipped: ")
    elif report.failed:
        results[item.nodeid] = "**failed**" if report.when == "call" else f"**failed** in {report.when}"
    elif report.when == "call":
        results[item.nodeid] = "passed"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--compatibility")
    if file is not None:
        Path(file).write_text(document(session.items, session.config.stash[RESULTS]))


def document(tests: list[pytest.Item], results: dict[str, str]) -> str:
    """The Markdown document."""
    rows: dict[str, list[str]] = {feature: [] for feature in FEATURES}
    for test in tests:
        for marker in test.iter_markers("compatibility"):
            feature, sentence = marker.args
            result = results.get(test.nodeid, "**not run**")
            cells = (feature, sentence, f"`{test.nodeid.removeprefix('tests/')}`", result)
            rows[feature].append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
            )
    lines = [
        "# Compatibility with nnU-Net",
        "",
        "nnU-Net asks of every trainer to support all of its features or to raise `NotImplementedError`. Each line is",
        "a test that runs the commands on a tiny generated dataset. This file is written by",
        "`pytest -m compatibility --compatibility=docs/compatibility.md`.",
        "",
        f"nnunet_nmsw {version('nnunet_nmsw')}, nnunetv2 {version('nnunetv2')}, torch {version('torch')}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}.",
        "",
        "| feature | what was run | test | result |",
        "|---|---|---|---|",
    ]
    for feature in FEATURES:
        lines += rows[feature] or [f"| {feature} | | | **missing**: no test |"]
    return "\n".join(lines) + "\n"
