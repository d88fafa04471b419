"""`docs/compatibility.md`, written by the tests themselves:

    pytest -m compatibility -n 2 --dist loadfile --compatibility=docs/compatibility.md

A test that shows that a feature of nnU-Net works says so with a marker, once for every feature it shows:

    @pytest.mark.compatibility("input", "two channels in NRRD files, trained and predicted")

The first word is a row of `FEATURES`, the sentence is what was run. The document has a line for every marker, with the
result of the test: passed, failed or skipped with the reason. A feature that no test speaks for is there as missing.
"""

from __future__ import annotations

import platform
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

PROPERTY = "compatibility"
"""Under which the sentences of a test travel with its report, from another process, too."""


def check_markers(tests: list[pytest.Item]) -> None:
    """See that every marker speaks for a feature, before anything runs; and give reports the sentences."""
    for test in tests:
        for marker in test.iter_markers("compatibility"):
            if len(marker.args) != 2 or marker.args[0] not in FEATURES:
                raise pytest.UsageError(f"{test.nodeid}: compatibility{marker.args}; features: {', '.join(FEATURES)}")
            test.user_properties.append((PROPERTY, list(marker.args)))


class Document:
    """Gathers results and writes them at the end.

    Args:
        file: to write.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, str] = {}
        self.sentences: dict[str, list[list[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of a test's three phases."""
        self.sentences[report.nodeid] = [value for name, value in report.user_properties if name == PROPERTY]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.results[report.nodeid] = reason.replace("Skipped: ", "skipped: ")
        elif report.failed:
            self.results[report.nodeid] = "**failed**" if report.when == "call" else f"**failed** in {report.when}"
        elif report.when == "call":
            self.results[report.nodeid] = "passed"

    def pytest_sessionfinish(self) -> None:
        """Write the document."""
        self.file.write_text(document(self.sentences, self.results))


def document(sentences: dict[str, list[list[str]]], results: dict[str, str]) -> str:
    """The Markdown document.

    Args:
        sentences: by test, pairs of a feature and what was run.
        results: by test.
    """
    rows: dict[str, list[str]] = {feature: [] for feature in FEATURES}
    for test in sorted(sentences):
        for feature, sentence in sentences[test]:
            cells = (feature, sentence, f"`{test.removeprefix('tests/')}`", results[test])
            rows[feature].append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
            )
    lines = [
        "# Compatibility with nnU-Net",
        "",
        "nnU-Net asks of every trainer to support all of its features or to raise `NotImplementedError`. Each line is",
        "a test that runs the commands on a tiny generated dataset. This file is written by",
        "`pytest -m compatibility -n 2 --dist loadfile --compatibility=docs/compatibility.md`.",
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
