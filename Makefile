# Everything is set up by the target that needs it; a second run reuses it.
#   make sweep                              tune the default keys (ARGS="--target gfx950 --qg 8" chooses others)
#   make test                               run the tests
#   make lint | types | compile-check       the other checks of CI
#   make clean                              remove the virtual environments
VENV := .venv
TRITON36 := .venvs/triton36
INPUTS := pyproject.toml constraints/base.txt scripts/install.sh
ARGS ?=

.PHONY: sweep test lint types compile-check compile-check-newest compile-check-triton36 clean

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

clean:
	rm -rf $(VENV) .venvs
