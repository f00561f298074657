# Everything is set up by the target that needs it; a second run reuses it.
#   make sweep                              tune the default keys (ARGS="--target gfx950 --qg 8" chooses others)
#   make test                               run the tests
#   make lint | types | compile-check       the other checks of CI
#   make transformers517 | vllm | sglang    tests of the integrations, with engines of their own
#   make clean                              remove the virtual environments
VENV := .venv
TRITON36 := .venvs/triton36
TRANSFORMERS517 := .venvs/transformers517
VLLM := .venvs/vllm
SGLANG := .venvs/sglang
INPUTS := pyproject.toml constraints/base.txt scripts/install.sh scripts/find_python.sh
ARGS ?=

.PHONY: sweep test lint types compile-check compile-check-newest compile-check-triton36 clean
.PHONY: transformers517 vllm sglang install-transformers517 install-vllm install-sglang

sweep: $(VENV)/.run
	$(VENV)/bin/patune sweep $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

compile-check: compile-check-newest compile-check-triton36

compile-check-newest: $(VENV)/.run
	$(VENV)/bin/python scripts/compile_check.py --refuse-spills

compile-check-triton36: $(TRITON36)/.run
	$(TRITON36)/bin/python scripts/compile_check.py

$(VENV)/.run: $(INPUTS) constraints/cpu.txt
	scripts/install.sh $(VENV) auto
	touch $@

$(VENV)/.dev: $(INPUTS) constraints/cpu.txt
	scripts/install.sh $(VENV) auto dev
	touch $(VENV)/.run $@

$(TRITON36)/.run: $(INPUTS) constraints/triton36.txt
	scripts/install.sh $(TRITON36) constraints/triton36.txt
	touch $@

transformers517: install-transformers517
	PYTHONPATH=$(TRANSFORMERS517) $(VENV)/bin/pytest tests/integrations $(ARGS)

vllm: install-vllm
	$(VLLM)/bin/python -m pytest tests/integrations/on_vllm $(ARGS)

sglang: install-sglang
	$(SGLANG)/bin/python -m pytest tests/integrations/on_sglang $(ARGS)

install-transformers517: $(TRANSFORMERS517)/.run
install-vllm: $(VLLM)/.run
install-sglang: $(SGLANG)/.run

$(TRANSFORMERS517)/.run: $(VENV)/.dev constraints/transformers517.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(TRANSFORMERS517) --requirement constraints/transformers517.txt
	touch $@

$(VLLM)/.run: $(INPUTS) constraints/vllm.txt scripts/install_vllm.sh
	scripts/install_vllm.sh $(VLLM)
	touch $@

$(SGLANG)/.run: $(INPUTS) constraints/sglang.txt scripts/install_sglang.sh
	scripts/install_sglang.sh $(SGLANG)
	touch $@

clean:
	rm -rf $(VENV) .venvs
