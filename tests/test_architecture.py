"""The house as docs/architecture.md draws it: who imports whom, how large things are."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import nnunet_nmsw

PACKAGE = Path(nnunet_nmsw.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py") if "plugin" not in file.parts)
FLOORS = (
    ("errors", "console", "files", "documents", "flags", "imports", "transfer", "_register", "backbones"),
    ("nnunet",),
    ("volume",),
    ("selection",),
    ("settings",),
    ("model",),
    ("inference",),
    ("trainers",),
    ("evaluation",),
    ("demo", "commands"),
)
"""Each imports from itself and from those before."""

CORE = (
    "volume",
    "selection",
    "model",
    "trainers",
    "inference/volume.py",
    "inference/networks.py",
    "inference/planes.py",
)
MODULES = {file.stem for file in PACKAGE.iterdir()}
LARGEST_FILE, MOST_ARGUMENTS = 300, 7
OTHERWISE_NAMED = {"PIL": "pillow", "skimage": "scikit-image"}
"""Distributions by module. Python 3.10 does not know those of all modules."""

NNUNETS_SIGNATURES = ("predict_from_files", "__init__ of WholeVolumeLoader")


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Modules of this package that a file imports, when it is imported or later."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names = (alias.name for alias in node.names)
            yield from (f"{PACKAGE.name}.{name}" for name in names if name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("nnunet_nmsw"))


def floor_of(module: str) -> int:
    parts = module.split(".")
    return -1 if len(parts) == 1 else next(number for number, names in enumerate(FLOORS) if parts[1] in names)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_imports_from_a_floor_above(file):
    above = [module for module in imported(file) if floor_of(module) > floor_of(name_of(file))]
    assert not above, f"{name_of(file)} imports {', '.join(above)}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(file): set(imported(file)) for file in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done or module not in graph:
            return
        for other in graph[module]:
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_can_be_read_at_a_sitting(file):
    assert len(file.read_text().splitlines()) <= LARGEST_FILE


@pytest.mark.parametrize(
    "file", [file for part in CORE for file in sorted((PACKAGE / part).rglob("*.py"))], ids=name_of
)
def test_functions_of_the_core_take_few_arguments(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            number = len([name for name in arguments if name not in ("self", "cls")])
            assert number <= MOST_ARGUMENTS, f"{node.name} takes {number} arguments"


def test_only_one_folder_touches_what_is_private_of_nnunet():
    private = (
        "_benchmark_wrapper",
        "_internal_",
        "_do_i_compile",
        "_build_loss(",
        "._data.",
        "my_fantastic_logging",
        "_manage_input",
    )
    for file in FILES:
        if name_of(file).startswith("nnunet_nmsw.nnunet"):
            continue
        code = file.read_text()
        found = [
            name for name in private if name in code and not (name == "_build_loss(" and "self._build_loss()" in code)
        ]
        assert not found, f"{name_of(file)} uses {found}"


def test_what_is_imported_is_declared():
    modules: set[str] = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
    modules -= {*sys.stdlib_module_names, "nnunet_nmsw"}
    declared = {normalised(re.split(r"[^\w.-]", name)[0]) for name in metadata.requires("nnunet-nmsw") or []}
    distributions = metadata.packages_distributions()
    for module in sorted(modules):
        names = [OTHERWISE_NAMED.get(module, module), *distributions.get(module, [])]
        assert declared & set(map(normalised, names)), f"{module} is imported and not declared"


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
