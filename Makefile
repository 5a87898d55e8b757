# make install   .venv with torch, Detectron2 and this package (a second time: seconds)
# make test      the test suite
# make slow      tests that need a minute each: wheels, torchrun, simulated GPUs, many rounds
# make demo      trains baseline and RePr on the embedded shapes on the CPU and prints their COCO AP
# make portable  the numeric tests with the plainest kernels of torch and oneDNN: other CPUs round otherwise
# make lint      ruff, mypy on the public API, and which room may import which (.importlinter)
# make docs      the documentation site in site/; a dead link or a public name without a docstring fails it
# make gpu-report   the gpu tests and the benchmark on a GPU, written to gpu-report.txt (docs/gpu.md)
# make soak      kills and resumes runs at many more moments than make test

PYTHON ?= python3
export PYTHON

PROCESSES ?= 2
NUMERIC = $(addprefix tests/test_, $(addsuffix .py, orthogonality criteria data_criteria redundancy scheme returning calibration \
    held_filters proof watch optimizers earlier_versions ranks))

.PHONY: install test slow portable demo lint docs soak gpu-report clean

install:
	@tools/install.sh

PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(PROCESSES) --dist loadfile $(COVERAGE)

test: install
	$(PYTEST) -m "not slow"

slow: install
	$(PYTEST) -m slow

portable: install
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 \
	    .venv/bin/python -m pytest -q -n $(PROCESSES) --dist loadfile $(NUMERIC)

demo: install
	.venv/bin/python tools/demo.py

lint: install
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .mypy_cache site build dist

soak: install
	KILL_ROUNDS=20 .venv/bin/python -m pytest -q -rP tests/test_kill.py tests/test_torchrun.py

gpu-report: install
	{ .venv/bin/python -m torch.utils.collect_env; \
	  .venv/bin/python -m pytest -m gpu -q -rs tests; \
	  .venv/bin/python tools/benchmark.py --device cuda --config-file configs/repr_r50_fpn.yaml; } 2>&1 | tee gpu-report.txt
