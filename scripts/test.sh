#!/usr/bin/env bash
# Lint, type-check and test in a virtual environment of its own. Needs Python 3.10 to 3.13, git and nothing else.
#   NMSW_TEST_DATA=FOLDER   also runs the tests on real data (a folder with Dataset004_Hippocampus)
#   PYTHON=python3.12       chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv .venv-test
. .venv-test/bin/activate
python -m pip install --quiet --upgrade pip
python -m pip install --quiet -e '.[test]'
ruff check .
ruff format --check .
mypy
# Files of tests are shared out to two processes. Threads of these that wait by spinning would starve the other.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
pytest --timeout 1800 -n 2 --dist loadfile --no-loadscope-reorder "$@"
