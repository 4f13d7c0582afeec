# Everything here works on a bare clone with only Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0

.PHONY: demo test test-long gpu gpu-train train-pocket clean

$(BIN)/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

# torch first and pinned.  Where pip would choose a CUDA build of several GB, take the CPU's:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
$(BIN)/.test: $(BIN)/.core
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(BIN)/.core
	$(BIN)/lvjax generate --config demo --out demo.mp4 --overwrite

test: $(BIN)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# The whole suite as users' programs are compiled; then what takes minutes, alone, as it measures memory.
test-long: $(BIN)/.test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -q tests -m long

# Kernel correctness and benchmarks on the accelerator at hand; from the source tree, nothing is installed.
gpu:
	PYTHONPATH=. $(PYTHON) -m lvjax.bench.gpu --minutes 9 --out $${OUT:-build/gpu}

# Pocket training from the newest snapshot, at most nine minutes; state in at most four files of at most 16 MB.
gpu-train:
	PYTHONPATH=. $(PYTHON) -m lvjax.lab.gpu_train --minutes 9 --state $${STATE:-build/gpu-train} --out $${OUT:-build/gpu-train}

train-pocket: $(BIN)/.core
	$(BIN)/lvjax train --config configs/pocket.py --folder runs/pocket

clean:
	rm -rf build dist .pytest_cache
