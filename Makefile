# Aliases of visible commands; `make` alone prints them. What stands behind ## is that help.
.DEFAULT_GOAL := help
## CKPT=demo            the name of a file in configs/: which checkpoint, on which data
## MODE=probe           probe, or the name of a file in configs/ to lay over it: attentive, finetune, knn, ...
## TASK=                the label: the name of a file in configs/tasks/; AI-READI's diabetes label where empty
## RESUME=auto             of probe and finetune: go on with a run that was interrupted
## PYTHON=              3.11, 3.12, 3.13 or a path: the Python that makes .venv; without, the first that is found
CKPT ?= demo
MODE ?= probe
TASK ?=
PYTHON ?=
VENV = .venv
$(if $(filter-out 1,$(words $(VENV))),$(error VENV="$(VENV)" must be one folder, without a space in its name))
finetune preview: MODE = finetune
RUN = runs/cls_$(CKPT)$(if $(TASK),_$(TASK))$(if $(filter-out probe,$(MODE)),_$(MODE))
TASK_CONFIG = $(if $(TASK), --config configs/tasks/$(TASK).yaml)
CONFIGS = --config configs/$(CKPT).yaml$(TASK_CONFIG)$(if $(filter-out probe,$(MODE)), --config configs/$(MODE).yaml)
NAME = $(if $(filter-out probe,$(MODE)), log.run_name=$(CKPT)$(if $(TASK),_$(TASK))_$(MODE))

.PHONY: help doctor probe finetune sweep preview pictures check setup setup-xla lint test test-slow test-xla \
    test-tpu-compile bench bench-limits bench-times bench-truth bench-gpu tpu-setup tpu-train tpu-fetch clean

help:
	@echo "usage: make TARGET [VARIABLE=VALUE ...]"; echo
	@grep -hE '^[a-z -]+:.*##' Makefile | sed -E 's/:.*##/:/' | awk -F: '{printf "  make %-18s%s\n", $$1, $$2}'; echo
	@sed -n 's/^##/ /p' Makefile

probe finetune: setup  ## train, then score on val and on test; the demo without CKPT
	$(VENV)/bin/python train.py $(CONFIGS) paths.run_dir=$(RUN)$(NAME)$(if $(RESUME), train.resume=$(RESUME))
	$(VENV)/bin/python eval.py --ckpt $(RUN) --split val
	$(VENV)/bin/python eval.py --ckpt $(RUN) --split test

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
	[ -z "$$runs" ] || $(VENV)/bin/python eval.py --leaderboard $$runs || failed="$$failed leaderboard"; \
	[ -z "$$failed" ] || { echo "FAILED, and not in the leaderboard:$$failed; what they print is above"; exit 1; }

preview: setup  ## draw augmented views of CKPT's volumes
	$(VENV)/bin/python scripts/preview.py $(CONFIGS) runs/preview_$(CKPT).png

check: setup  ## who is in the data, who is missing and why, with a page; with DEEP=1, every volume is opened
	$(VENV)/bin/python check.py$(if $(DEEP), --deep) $(CONFIGS)

SHOOT = $(VENV)/bin/python scripts/pictures.py docs
pictures: setup  ## the pictures of README.md and docs/, from the demo; needs chromium; half an hour
	$(VENV)/bin/python bench/encoders.py
	$(MAKE) sweep CKPTS="demo demo_short demo_long"
	$(SHOOT) leaderboard
	$(MAKE) sweep CKPTS="demo demo_example" TASKS="default aireadi_laterality" MODES="probe attentive"
	$(SHOOT) tasks
	$(VENV)/bin/python eval.py --compare runs/cls_demo runs/cls_demo_attentive runs/cls_demo_short runs/cls_demo_long
	$(MAKE) check DEEP=1
	$(SHOOT) report gallery features training comparison check
	$(VENV)/bin/python scripts/phantom_picture.py docs/phantom.png
	$(VENV)/bin/python scripts/preview.py --config configs/demo.yaml --config configs/finetune.yaml docs/preview.png

doctor: setup  ## is this machine ready? packages, GPU or TPU, disk, memory, B2, W&B
	$(VENV)/bin/python scripts/doctor.py $(CONFIGS)

# an environment that is there keeps its Python
SAME_PYTHON = [ "$$version" = "$$("$$python" --version)" ] || { echo "error: $$folder is there already, with \
    $$version; remove it, or name another folder: VENV=folder"; exit 1; }
setup: $(VENV)/installed  ## install the pinned packages into .venv; VENV=folder names another
	@[ -z "$(PYTHON)" ] || { python=$$(scripts/python.sh "$(PYTHON)") || exit 1; \
	    folder=$(VENV); version=$$($$folder/bin/python --version); $(SAME_PYTHON); }
setup-xla: .venv-xla/installed

# with pip's own list of what it installs, for that takes minutes
$(VENV)/installed: requirements.txt requirements-common.txt
.venv-xla/installed: requirements-tpu.txt requirements-common.txt
$(VENV)/installed .venv-xla/installed:
	@python=$$(scripts/python.sh "$(or $(PYTHON),$(wildcard $(@D)/bin/python))") || exit 1; \
	    folder=$(@D); if [ -e $$folder/bin/python ]; then version=$$($$folder/bin/python --version); $(SAME_PYTHON); fi; \
	    $(@D)/bin/python -m pip --version > /dev/null 2>&1 || \
	    { echo "$(@D) is made with $$("$$python" --version), $$python"; "$$python" -m venv $(@D); }
	$(@D)/bin/python -m pip install -r $<
	touch $@

lint: setup  ## ruff, shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck scripts/*.sh .ci/run

test: setup  ## the quick tests, five minutes on two cores
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 -m "not slow and not browser" tests

test-slow: setup tests/node_modules  ## the others
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadgroup -m "slow or browser" tests

# axe-core, which checks that pages can be read by everybody
tests/node_modules: tests/package.json
	npm install --prefix tests --no-package-lock --no-fund --no-audit
	touch $@

test-xla: setup-xla
	OMP_NUM_THREADS=1 PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest -q -n 2 tests/test_xla.py tests/test_tpu.py

# the TPU's compiler needs no TPU
test-tpu-compile: setup-xla
	.venv-xla/bin/python bench/tpu.py

# bench-limits: requirements that hold on a busy machine too, for CI. bench-times: ratios of times, which want a quiet one
bench: bench-limits bench-times bench-truth  ## measurements; two hours

bench-limits: setup
	$(VENV)/bin/python bench/reading.py decode
	$(VENV)/bin/python bench/reading.py stream
	$(VENV)/bin/python bench/scaling.py processes --processes 2 4
	$(VENV)/bin/python bench/reading.py augment
	$(VENV)/bin/python bench/reading.py copies
	$(VENV)/bin/python bench/encoder.py step
	$(VENV)/bin/python bench/encoder.py checkpoint
	$(VENV)/bin/python bench/probing.py learn --seeds 2 --features 64
	$(VENV)/bin/python bench/scaling.py cohort
	$(VENV)/bin/python bench/truth.py pairs

bench-times: setup
	$(VENV)/bin/python bench/probing.py sweep
	$(VENV)/bin/python bench/scaling.py evaluate
	$(VENV)/bin/python bench/encoder.py forward --depth 2
	$(VENV)/bin/python bench/reading.py volumes
	$(VENV)/bin/python bench/scaling.py growth
	$(VENV)/bin/python bench/reduction.py measure
	$(VENV)/bin/python bench/cost.py

# without setup: it also runs on a machine without a network, with whatever python3 has
bench-gpu:  ## what this machine's GPU does with the full-size encoder; eight minutes
	$(if $(wildcard $(VENV)/installed),$(VENV)/bin/python,python3) bench/gpu.py

# what is said of scores, on drawn data of which all is known
bench-truth: setup
	$(VENV)/bin/python bench/truth.py intervals
	$(VENV)/bin/python bench/truth.py alarms
	$(VENV)/bin/python bench/truth_confounding.py alarms
	$(VENV)/bin/python bench/truth_confounding.py adds
	$(VENV)/bin/python bench/truth_confounding.py shift
	$(VENV)/bin/python bench/truth_confounding.py power
	$(VENV)/bin/python bench/probing.py alarms

# A TPU pod, from your own machine: TPU and ZONE name it, DRY=1 only prints
tpu-setup tpu-train tpu-fetch:
	scripts/tpu.sh $(@:tpu-%=%)

clean:  ## remove the demo's data and caches, and every run whose name begins with runs/cls_demo
	rm -rf demo demo_literature demo_encoders runs/cls_demo* runs/preview_demo*
