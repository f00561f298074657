#!/usr/bin/env bash
# Installs what tests/integrations/on_vllm needs into a virtual environment: scripts/install_vllm.sh VENV
# vLLM comes without its dependencies (gigabytes of CUDA packages); of these, only what its attention interfaces import is installed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1
constraints=constraints/vllm.txt
cpu_wheels=https://download.pytorch.org/whl/cpu # PyTorch's index of CPU builds; asked only when the configured index has none
imported=(
    regex psutil pydantic cachetools requests transformers msgspec cloudpickle pyzmq orjson blake3 py-cpuinfo einops cbor2 aiohttp
    oss-harmony openai pillow pybase64 uvloop prometheus-client xgrammar fastapi partial-json-parser llguidance
)

. scripts/find_python.sh

pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$@"
}

has_cpu_torch() {
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null
}

install_cpu_torch() { # first, and checked without installing anything: xgrammar would bring in whichever build the index prefers
    local torch
    torch=$(sed -n 's/^torch==//p' constraints/base.txt)
    if ! pip_install --only-binary :all: "torch==$torch+cpu" 2>"$venv/install.log"; then
        echo "the package index has no CPU build of torch $torch (see $venv/install.log); asking $cpu_wheels" >&2
        pip_install --only-binary :all: "torch==$torch+cpu" --extra-index-url "$cpu_wheels"
    fi
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$venv"
fi
echo "installing patune and vLLM's interfaces into $venv (a few minutes the first time)" >&2
has_cpu_torch || install_cpu_torch
pip_install "${imported[@]}" pytest --editable .
pip_install --no-deps vllm
"$venv/bin/python" -c 'import vllm.v1.attention.backend, vllm.v1.attention.backends.utils, vllm.config' >"$venv/install.log" 2>&1 || {
    cat "$venv/install.log" >&2
    exit 1
}
