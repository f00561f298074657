#!/usr/bin/env bash
# Installs patune, editable, into a virtual environment: scripts/install.sh VENV CONSTRAINTS|auto [EXTRAS]
#   scripts/install.sh .venv auto dev
# auto is constraints/cpu.txt, the pinned CPU build of torch; with an NVIDIA GPU it is no pins: pip takes the CUDA build and its Triton.
set -euo pipefail

venv=$1
constraints=$2
extras=${3:-}
package=".${extras:+[$extras]}"
cpu_wheels=https://download.pytorch.org/whl/cpu # PyTorch's index of CPU builds; asked only when the configured index has none

. "$(dirname "${BASH_SOURCE[0]}")/find_python.sh"

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" --editable "$package"
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$venv"
fi

echo "installing patune${extras:+ with $extras} into $venv (a few minutes the first time)" >&2
if [ "$constraints" = auto ] && has_nvidia_gpu; then
    install
    exit
fi
[ "$constraints" != auto ] || constraints=constraints/cpu.txt
if ! install --constraint "$constraints" 2>"$venv/install.log"; then
    echo "the package index has no CPU build of torch that fits $constraints (see $venv/install.log); asking $cpu_wheels" >&2
    install --constraint "$constraints" --extra-index-url "$cpu_wheels"
fi
