# Aliases of visible commands; `make` alone prints them. What stands behind ## is that help.
.DEFAULT_GOAL := help
## CKPT=demo            the name of a file in configs/: which checkpoint, on which data
## MODE=probe           probe, or the name of a file in configs/ to lay over it: attentive, finetune, knn, ...
## TASK=                the label: the name of a file in configs/tasks/; AI-READI's diabetes label where empty
## RESUME=auto             of probe and finetune: go on with a run that was interrupted
## PYTHON=python3.11    the Python that makes .venv
CKPT ?= demo
MODE ?= probe
TASK ?=
PYTHON ?= python3.11
finetune preview: MODE = finetune
RUN = runs/cls_$(CKPT)$(if $(TASK),_$(TASK))$(if $(filter-out probe,$(MODE)),_$(MODE))
TASK_CONFIG = $(if $(TASK), --config configs/tasks/$(TASK).yaml)
CONFIGS = --config configs/$(CKPT).yaml$(TASK_CONFIG)$(if $(filter-out probe,$(MODE)), --config configs/$(MODE).yaml)
NAME = $(if $(filter-out probe,$(MODE)), log.run_name=$(CKPT)$(if $(TASK),_$(TASK))_$(MODE))

.PHONY: help doctor probe finetune sweep preview pictures check setup setup-xla lint test test-slow test-xla \
    test-tpu-compile bench bench-limits bench-times bench-truth tpu-setup tpu-train tpu-fetch clean

help:
	@echo "usage: make TARGET [VARIABLE=VALUE ...]"; echo
	@grep -hE '^[a-z -]+:.*##' Makefile | sed -E 's/:.*##/:/' | awk -F: '{printf "  make %-18s%s\n", $$1, $$2}'; echo
	@sed -n 's/^##/ /p' Makefile

probe finetune: setup  ## train, then score on val and on test; the demo without CKPT
	.venv/bin/python train.py $(CONFIGS) paths.run_dir=$(RUN)$(NAME)$(if $(RESUME), train.resume=$(RESUME))
	.venv/bin/python eval.py --ckpt $(RUN) --split val
	.venv/bin/python eval.py --ckpt $(RUN) --split test

# every checkpoint on every task in every mode, then the leaderboard. What is finished stays; what fails is named at the end
## CKPTS="a b" TASKS="t u" MODES="probe knn"    those of make sweep; without, the three shipped checkpoints, TASK, and probe
CKPTS ?= single_domain_01 single_domain_02 multi_domain
TASKS ?= $(or $(TASK),default)
MODES ?= probe
sweep: setup  ## train and score all CKPTS on all TASKS in all MODES, then the leaderboard
	@failed=; runs=; for ckpt in $(CKPTS); do for task in $(TASKS); do for mode in $(MODES); do \
	    run=runs/cls_$$ckpt; name=$$task; [ $$task != default ] && run=$${run}_$$task || name=; \
	    [ $$mode = probe ] || run=$${run}_$$mode; echo; echo "== $$ckpt, $$task, $$mode"; \
	    if $(MAKE) --no-print-directory probe CKPT=$$ckpt TASK=$$name MODE=$$mode RESUME=auto; \
	    then runs="$$runs $$run"; else failed="$$failed $$ckpt/$$task/$$mode"; fi; \
	done; done; done; echo; \
	[ -z "$$runs" ] || .venv/bin/python eval.py --leaderboard $$runs || failed="$$failed leaderboard"; \
	[ -z "$$failed" ] || { echo "FAILED, and not in the leaderboard:$$failed; what they print is above"; exit 1; }

preview: setup  ## draw augmented views of CKPT's volumes
	.venv/bin/python scripts/preview.py $(CONFIGS) runs/preview_$(CKPT).png

check: setup  ## who is in the data, who is missing and why, with a page; with DEEP=1, every volume is opened
	.venv/bin/python check.py$(if $(DEEP), --deep) --config configs/$(CKPT).yaml$(TASK_CONFIG)

SHOOT = .venv/bin/python scripts/pictures.py docs
pictures: setup  ## the pictures of README.md and docs/, from the demo; needs chromium; half an hour
	.venv/bin/python bench/encoders.py
	$(MAKE) sweep CKPTS="demo demo_short demo_long"
	$(SHOOT) leaderboard
	$(MAKE) sweep CKPTS="demo demo_example" TASKS="default aireadi_laterality" MODES="probe attentive"
	$(SHOOT) tasks
	.venv/bin/python eval.py --compare runs/cls_demo runs/cls_demo_attentive runs/cls_demo_short runs/cls_demo_long
	$(MAKE) check DEEP=1
	$(SHOOT) report gallery features training comparison check
	.venv/bin/python scripts/phantom_picture.py docs/phantom.png
	.venv/bin/python scripts/preview.py --config configs/demo.yaml --config configs/finetune.yaml docs/preview.png

doctor: setup  ## is this machine ready? packages, GPU or TPU, disk, memory, B2, W&B
	.venv/bin/python scripts/doctor.py --config configs/$(CKPT).yaml$(TASK_CONFIG)

setup: .venv/installed  ## install the pinned packages into .venv
setup-xla: .venv-xla/installed

.venv/installed: requirements.txt requirements-common.txt
	@command -v $(PYTHON) > /dev/null || { \
	    echo "error: $(PYTHON) is not there; install Python 3.11, or name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

.venv-xla/installed: requirements-tpu.txt requirements-common.txt
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/pip install -r requirements-tpu.txt
	touch $@

lint: setup  ## ruff, shellcheck
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck scripts/*.sh .ci/run

test: setup  ## the quick tests, five minutes on two cores
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 -m "not slow and not browser" tests

test-slow: setup tests/node_modules  ## the others
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 -m "slow or browser" tests

# axe-core, which checks that pages can be read by everybody
tests/node_modules: tests/package.json
	npm install --prefix tests --no-package-lock --no-fund --no-audit
	touch $@

test-xla: setup-xla
	PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest -q tests/test_xla.py

# the TPU's compiler needs no TPU
test-tpu-compile: setup-xla
	.venv-xla/bin/python bench/tpu.py

# bench-limits: requirements that hold on a busy machine too, for CI. bench-times: ratios of times, which want a quiet one
bench: bench-limits bench-times bench-truth  ## measurements; two hours

bench-limits: setup
	.venv/bin/python bench/reading.py decode
	.venv/bin/python bench/reading.py stream
	.venv/bin/python bench/scaling.py processes --processes 2 4
	.venv/bin/python bench/reading.py augment
	.venv/bin/python bench/reading.py copies
	.venv/bin/python bench/encoder.py step
	.venv/bin/python bench/encoder.py checkpoint
	.venv/bin/python bench/probing.py learn --seeds 2 --features 64
	.venv/bin/python bench/scaling.py cohort
	.venv/bin/python bench/truth.py pairs

bench-times: setup
	.venv/bin/python bench/probing.py sweep
	.venv/bin/python bench/scaling.py evaluate
	.venv/bin/python bench/encoder.py forward --depth 2
	.venv/bin/python bench/reading.py volumes
	.venv/bin/python bench/scaling.py growth
	.venv/bin/python bench/cost.py

# what is said of scores, on drawn data of which all is known
bench-truth: setup
	.venv/bin/python bench/truth.py intervals
	.venv/bin/python bench/truth.py alarms
	.venv/bin/python bench/truth_confounding.py alarms
	.venv/bin/python bench/truth_confounding.py adds
	.venv/bin/python bench/truth_confounding.py shift
	.venv/bin/python bench/truth_confounding.py power
	.venv/bin/python bench/probing.py alarms

# A TPU pod, from your own machine: TPU and ZONE name it, DRY=1 only prints
tpu-setup tpu-train tpu-fetch:
	scripts/tpu.sh $(@:tpu-%=%)

clean:  ## remove the demo's data, caches and runs; yours stay
	rm -rf demo demo_literature demo_encoders runs/cls_demo* runs/preview_demo*
