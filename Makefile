# make demo   shows it at work on this machine, without QEMU; with CUT=2 its link is lost twice
# make test   fetches what the tests need and runs them
# On Debian, what is missing is installed (as root, or by sudo). PYTHON=python3.13 make ... selects another interpreter.

PYTHON ?= python3
CUT ?= 0
PYTEST_ARGS ?=
FUZZ_EXAMPLES ?= 5000
SANITIZE_TIMES ?= 10

VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard $(foreach in,vhostpc/_native vhostpc/_native/*,$(in)/*.c $(in)/*.h)) vhostpc/_native/build.py
STRICT := -std=gnu11 -O2 -Wall -Wextra -Wconversion -Wno-sign-conversion -Wshadow -Werror -pthread -Ivhostpc/_native
OWN_C := $(sort $(filter-out %/_vpc.c %/_vpc.abi3.c,$(wildcard vhostpc/_native/*.c vhostpc/_native/*/*.c tests/guest/*.c tests/native/*.c bench/native/*.c)))

export PYTHON
.PHONY: build peers demo demo-qemu test test-long lint lint-c lint-package lint-words bench fuzz sanitize clean help
.DEFAULT_GOAL := build

# What it needs of the interpreter: its version, and where it is at home (also of one in a virtual environment).
WHICH := 'import sys, zlib; print("%d.%d.%d" % sys.version_info[:3], zlib.crc32(sys.base_prefix.encode()), sep="-")'
# An environment stays as it is until another interpreter is asked for.
MADE := $(if $(wildcard $(BIN)/python),$(firstword $(wildcard $(VENV)/.python-*)))
ifneq ($(and $(filter file,$(origin PYTHON)),$(MADE)),)
INTERPRETER := $(MADE)
else
INTERPRETER := $(VENV)/.python-$(shell $(PYTHON) -c $(WHICH) 2>/dev/null)
endif
ifeq ($(wildcard $(BIN)/python),)
.PHONY: $(INTERPRETER)
endif

# Its first lines.
help:
	@sed -n '/^#/!q;s/^# //p' Makefile
	@echo "targets: build demo demo-qemu test test-long lint bench fuzz sanitize clean"

build: $(VENV)/.built

$(INTERPRETER):
	@tools/need build
	@wanted=$$($(PYTHON) -c $(WHICH)); found=$$($(BIN)/python -c $(WHICH) 2>/dev/null); \
	if [ -e $(VENV) ] && [ "$$found" != "$$wanted" ] && ! [ "$$found" -a $(origin PYTHON) = file ]; then \
		echo "$(VENV) is of another Python than $(PYTHON), which is $${wanted%-*}: recreating it"; \
		rm -rf $(VENV); \
	fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.python-*; touch $(VENV)/.python-$$($(BIN)/python -c $(WHICH))

# Editable: a changed Python file needs no new build, a changed C file does.
$(VENV)/.built: $(INTERPRETER) pyproject.toml setup.py $(NATIVE)
	@tools/need build
	@echo "building vhostpc in $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.built
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

demo: build
	@$(BIN)/vhostpc demo --cut $(CUT)

peers: $(VENV)/.test
	@tools/need test
	@$(BIN)/python -m tests.qemu.peers
	@$(BIN)/python -m tests.peers.packages

demo-qemu: peers
	@$(BIN)/python -m tests.qemu.demo --cut $(CUT)

test: peers
	@$(BIN)/python -m pytest -m 'not long' $(PYTEST_ARGS)

test-long: peers
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.lint lint-c lint-package lint-words
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lint-c:
	@tools/need build lint
	@for file in $(OWN_C); do \
		gcc $(STRICT) -c -o /dev/null $$file && aarch64-linux-gnu-gcc $(STRICT) -c -o /dev/null $$file \
			|| exit 1; \
	done; echo "C: $(words $(OWN_C)) files without a warning for x86-64 and arm64"

lint-package: $(VENV)/.lint
	@$(BIN)/python tools/check_package.py
	@$(BIN)/python tools/check_manifest.py

lint-words: $(VENV)/.lint
	@$(BIN)/python tools/check_words.py

bench: peers
	@tools/need bench
	@$(BIN)/python -m bench

fuzz: $(VENV)/.test
	@FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -m fuzz $(PYTEST_ARGS)

sanitize: $(VENV)/.test
	@$(BIN)/python -m tests.native $(SANITIZE_TIMES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f vhostpc/_native/_vpc.c vhostpc/_native/_vpc.abi3.c vhostpc/_native/_vpc*.so vhostpc/_native/*.o vhostpc/_native/*/*.o
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
