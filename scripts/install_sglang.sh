#!/usr/bin/env bash
# Installs what the tests of the SGLang backend need, and this patune, editable, into a virtual environment: scripts/install_sglang.sh VENV
# SGLang comes without its CUDA packages, beside the CPU build of torch: enough to import its interfaces, not to serve a model.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/find_python.sh

venv=$1
cpu_wheels=https://download.pytorch.org/whl/cpu # PyTorch's index of CPU builds; asked only when the configured index has none

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$venv"
fi

echo "installing SGLang without its CUDA packages, and patune, into $venv (a few minutes the first time)" >&2
if ! install --requirement constraints/sglang.txt 2>"$venv/install.log"; then
    echo "the package index lacks something in constraints/sglang.txt (see $venv/install.log); asking $cpu_wheels too" >&2
    install --requirement constraints/sglang.txt --extra-index-url "$cpu_wheels"
fi
install --editable .
