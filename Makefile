# Aliases of visible commands. CKPT is the name of a file in configs/, MODE probe or the name of one to lay over it.
CKPT ?= demo
PYTHON ?= python3.11
MODE ?= probe
finetune preview: MODE = finetune
RUN = runs/cls_$(CKPT)$(if $(filter-out probe,$(MODE)),_$(MODE))
CONFIGS = --config configs/$(CKPT).yaml$(if $(filter-out probe,$(MODE)), --config configs/$(MODE).yaml)
NAME = $(if $(filter-out probe,$(MODE)), log.run_name=$(CKPT)_$(MODE))

.PHONY: probe finetune sweep preview check setup setup-xla lint test test-slow test-xla \
    bench bench-limits bench-times tpu-setup tpu-train tpu-fetch clean

probe finetune: setup
	.venv/bin/python train.py $(CONFIGS) paths.run_dir=$(RUN)$(NAME)$(if $(RESUME), train.resume=$(RESUME))
	.venv/bin/python eval.py --ckpt $(RUN) --split val
	.venv/bin/python eval.py --ckpt $(RUN) --split test

# every checkpoint in every mode, then the leaderboard. What is finished stays; what fails is named at the end
CKPTS ?= single_domain_01 single_domain_02 multi_domain
MODES ?= probe
sweep: setup
	@failed=; runs=; for ckpt in $(CKPTS); do for mode in $(MODES); do echo; echo "== $$ckpt, $$mode"; \
	    if $(MAKE) --no-print-directory probe CKPT=$$ckpt MODE=$$mode RESUME=auto; \
	    then runs="$$runs runs/cls_$$ckpt"; [ $$mode = probe ] || runs="$${runs}_$$mode"; else failed="$$failed $$ckpt/$$mode"; fi; \
	done; done; echo; \
	[ -z "$$runs" ] || .venv/bin/python eval.py --leaderboard $$runs || failed="$$failed leaderboard"; \
	[ -z "$$failed" ] || { echo "FAILED, and not in the leaderboard:$$failed; what they print is above"; exit 1; }

preview: setup
	.venv/bin/python scripts/preview.py $(CONFIGS) runs/preview_$(CKPT).png

check: setup
	.venv/bin/python data.py$(if $(DEEP), --deep) --config configs/$(CKPT).yaml

setup: .venv/installed
setup-xla: .venv-xla/installed

.venv/installed: requirements.txt requirements-common.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

.venv-xla/installed: requirements-tpu.txt requirements-common.txt
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/pip install -r requirements-tpu.txt
	touch $@

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck scripts/*.sh .ci/run

test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 -m "not slow and not browser" tests

test-slow: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 -m "slow or browser" tests

test-xla: setup-xla
	PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest -q tests/test_xla.py

# bench-limits: requirements that hold on a busy machine too, for CI. bench-times: ratios of times, which want a quiet one
bench: bench-limits bench-times

bench-limits: setup
	.venv/bin/python bench/reading.py decode
	.venv/bin/python bench/reading.py stream
	.venv/bin/python bench/scaling.py processes --processes 2 4
	.venv/bin/python bench/reading.py augment
	.venv/bin/python bench/reading.py copies
	.venv/bin/python bench/encoder.py step
	.venv/bin/python bench/encoder.py checkpoint
	.venv/bin/python bench/probing.py learn --seeds 2 --features 64

bench-times: setup
	.venv/bin/python bench/probing.py sweep
	.venv/bin/python bench/scaling.py evaluate
	.venv/bin/python bench/encoder.py forward --depth 2
	.venv/bin/python bench/reading.py volumes
	.venv/bin/python bench/scaling.py growth
	.venv/bin/python bench/cost.py

# A TPU pod, from your own machine: TPU and ZONE name it, DRY=1 only prints
tpu-setup tpu-train tpu-fetch:
	scripts/tpu.sh $(@:tpu-%=%)

clean:
	rm -rf demo demo_literature runs cache
