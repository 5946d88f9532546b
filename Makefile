# Everything CI does is a target here. `make help` lists them.
PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= cpu
BIN := $(VENV)/bin

# Nothing is compiled ahead, so the first process that imports a module keeps its bytecode; without, each compiles again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# uv does not read pip's settings, which name a mirror or a folder of wheels.
PIP_SETTING = $$($(BIN)/pip config list | sed -n "s/^[^=]*[.]$(1)='\(.*\)'$$/\1/p" | tail -1)
CPU_WHEELS := https://download.pytorch.org/whl/cpu

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on the PATH; name one with PYTHON=…"; exit 1; }
	@case $(TORCH) in cpu|cuda) ;; *) echo "make: TORCH is cpu or cuda; got $(TORCH)"; exit 1;; esac
	@test -x $(BIN)/python || { echo "Creating $(VENV) …"; $(PYTHON) -m venv $(VENV); }
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/pip install --disable-pip-version-check -c constraints.txt uv
	@backend=; if [ $(TORCH) = cpu ] && [ "$$(uname)" = Linux ]; then \
		if $(BIN)/python -c "from urllib.request import *; urlopen(Request('$(CPU_WHEELS)/torch/', method='HEAD'), timeout=5)" 2>/dev/null; \
		then backend=--torch-backend=cpu; \
		else echo "$(CPU_WHEELS) does not answer: torch comes from your package index, where it may be the CUDA build"; fi; fi; \
	echo "Installing some 200 packages into $(VENV) (torch: $(TORCH)) …"; \
	export UV_DEFAULT_INDEX=$${UV_DEFAULT_INDEX:-$(call PIP_SETTING,index-url)} \
		UV_INDEX="$${UV_INDEX:-$(call PIP_SETTING,extra-index-url)}" \
		UV_FIND_LINKS="$${UV_FIND_LINKS:-$(call PIP_SETTING,find-links)}" PATH="$$PATH:$(BIN)"; \
	uv pip install --python $(BIN)/python --index-strategy unsafe-best-match $$backend -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: install
install: $(VENV)/installed ## Set up .venv; TORCH=cuda takes the build for NVIDIA GPUs (default: TORCH=cpu)

.PHONY: demo
demo: install ## Run the whole pipeline on real images (a few minutes) and print the report's path
	$(BIN)/ddm run experiment=demo

.PHONY: islands
islands: install ## Start two islands on this machine, check them, run a small pipeline on them, stop them
	@rm -rf runs/islands; $(BIN)/ddm islands up || exit 1; \
	trap '$(BIN)/ddm islands down' EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/ddm islands check compute=islands_local && \
	$(BIN)/ddm run experiment=digits compute=islands_local name=islands

# Three at a time, each on one thread, as some wait; the tests of a file share what they have trained, so they stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=15

.PHONY: test
test: install ## Run the tests (twelve minutes on two idle cores)
	$(PYTEST) -m 'not integration'

.PHONY: integration
integration: install ## Run the tests that take long: real Ray clusters, killed again and again
	$(BIN)/python -m pytest -q -m integration

.PHONY: test-quick
test-quick: install ## Run the quick tier (a few minutes)
	$(PYTEST) -m 'not slow and not integration'

.PHONY: check
check: install ## Format, lint and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: style
style: install ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench bench-latents bench-first-minutes bench-overhead bench-quality bench-compress bench-accelerate bench-score-laws bench-papers bench-backbones bench-scale bench-codecs bench-pipeline bench-guidance bench-real-models bench-serve bench-training bench-streaming bench-preparation bench-recipes bench-own-pictures bench-gpu chaos
bench: bench-first-minutes bench-overhead bench-quality bench-compress bench-accelerate bench-score-laws bench-papers bench-backbones bench-scale ## Run every benchmark and write docs/benchmarks.md

bench-first-minutes: install ## Measure imports, the first line, and the time in which no stage is at work
	$(BIN)/python -m benchmarks.first_minutes
	$(BIN)/python -m benchmarks.page

bench-overhead: install ## Measure the cost of the orchestrator against the same loops by hand
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.page

bench-quality: install ## Compare the decomposition with its baselines, 14 arms, three seeds (up to an hour)
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.page

bench-compress: install ## Compare pruning and quantization with their baselines, three seeds (four core-hours)
	$(BIN)/python -m benchmarks.compress
	$(BIN)/python -m benchmarks.page

bench-accelerate: install ## Compare caches, drafts and students with fewer steps, three seeds (four core-hours)
	$(BIN)/python -m benchmarks.accelerate
	$(BIN)/python -m benchmarks.page

bench-score-laws: install ## Damage real images in steps, and see which scores get worse in order (EMOJI=archives: also on these)
	$(BIN)/python -m benchmarks.score_laws --count 500 --emoji $(EMOJI)
	$(BIN)/python -m benchmarks.page

bench-papers: install ## Measure what papers say on small networks, each with a control (docs/papers.md; eight CPU minutes)
	$(BIN)/python -m benchmarks.papers
	$(BIN)/python -m benchmarks.page

bench-pipeline: install ## Compare the pipeline with diffusers' own, its memory, schedulers, adapters and folders (four CPU minutes)
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.page

bench-guidance: install ## Compare ways to guide at equal calls, three sampling seeds (trains the demo; half an hour)
	$(BIN)/python -m benchmarks.guidance
	$(BIN)/python -m benchmarks.page

bench-gpu: install ## Measure training, sampling and packed layers on one GPU in eight minutes (on a CPU: that it runs)
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.page

bench-training: install ## Compare the trainer and the sampler with plain loops of PyTorch and diffusers (half an hour of CPU time)
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.page

bench-streaming: install ## Measure training from tars in S3 and on a slow disk: stalls, resumes, kills, bytes (ten minutes)
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.page

bench-preparation: install ## Measure the partition of a million to 10^8 rows: time, memory, two workers (four CPU minutes)
	$(BIN)/python -m benchmarks.preparation
	$(BIN)/python -m benchmarks.page

bench-recipes: install ## Compare optimizers, schedules, shifts, averages and REPA on one transformer (an hour on one thread)
	$(BIN)/python -m benchmarks.recipes
	$(BIN)/python -m benchmarks.page

bench-latents: install ## Measure two workers of the latents stage against one, and kill it at random instants (five minutes)
	$(BIN)/python -m benchmarks.latents
	$(BIN)/python -m benchmarks.page

.PHONY: bench-cifar bench-mixed
bench-cifar: install ## Compare eight experts with a monolith on CIFAR-10 (CIFAR=folder of Parquet files; two CPU hours)
	$(BIN)/python -m benchmarks.cifar $(if $(CIFAR),--cifar $(CIFAR)) --autoguidance
	$(BIN)/python -m benchmarks.page

bench-mixed: install ## Compare mixed velocity and noise experts with velocity alone, three seeds (ten CPU minutes)
	$(BIN)/python -m benchmarks.mixed
	$(BIN)/python -m benchmarks.page

bench-codecs: install ## Compare the codecs at equal numbers and CPU time (ten CPU minutes; EMOJI=archives: also 64 px; CIFAR=folder: only it)
	$(BIN)/python -m benchmarks.codecs $(if $(CIFAR),--cifar $(CIFAR),--emoji $(EMOJI))
	$(BIN)/python -m benchmarks.page

bench-real-models: install ## Train the demo and the emoji with three seeds, and see what their captions do (two core-hours)
	$(BIN)/python -m benchmarks.real_models
	$(BIN)/python -m benchmarks.page

bench-own-pictures: install ## Train on folders of own pictures, fitted and plain (OWN="FOLDER …"; half an hour a folder)
	$(BIN)/python -m benchmarks.own_pictures $(OWN)
	$(BIN)/python -m benchmarks.page

bench-serve: install ## Measure the service over HTTP: throughput, overload, faults, fuzzing, memory (half an hour)
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.page

bench-backbones: install ## Check every backbone at a tiny size, and the counted sizes against measured ones (ten minutes)
	$(BIN)/python -m benchmarks.backbones
	$(BIN)/python -m benchmarks.page

bench-scale: install ## Measure the controller with up to 10,000 stages, and simulate 1,000 islands
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.page

chaos: install ## Kill everything that can be killed, on two real Ray clusters (about an hour; networks need root)
	$(BIN)/python -m benchmarks.reliability
	$(BIN)/python -m benchmarks.goodput
	$(BIN)/python -m benchmarks.page

.PHONY: fault-matrix
fault-matrix: install ## Write docs/fault_matrix.md: every command on faulty inputs (an hour; mounts need root)
	$(BIN)/python -m benchmarks.fault_matrix

.PHONY: faults
faults: install ## Crash, damage and attack runs and their folders, and fill disks (about an hour; disks need root)
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.page

.PHONY: docs
docs: install ## Write docs/api.md from the docstrings
	$(BIN)/python docs/generate_api.py

.PHONY: site
site: install ## Build the documentation site into site/
	@test -x $(BIN)/zensical || $(BIN)/pip install --disable-pip-version-check -c constraints.txt zensical
	$(BIN)/zensical build --strict

.PHONY: wheel
wheel: install ## Build the wheel
	$(BIN)/python -m build --wheel --outdir dist .

.PHONY: clean
clean: ## Remove the environment and what was built; runs are kept
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
