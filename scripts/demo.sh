#!/usr/bin/env bash
# The demonstration on a generated phantom, in a virtual environment of its own. Needs Python 3.10 to 3.13.
# Arguments go to nmsw_demo, see nmsw_demo --help.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv .venv-demo
. .venv-demo/bin/activate
python -m pip install --quiet --upgrade pip
python -m pip install --quiet '.[compare,openvino]'
nmsw_demo "$@"
