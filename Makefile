# Aliases of visible commands. CKPT is the name of a file in configs/.
CKPT ?= demo
PYTHON ?= python3.11
RUN = runs/cls_$(CKPT)

.PHONY: probe finetune check setup setup-xla test test-xla bench clean

probe: setup
	.venv/bin/python train.py --config configs/$(CKPT).yaml paths.run_dir=$(RUN)
	.venv/bin/python eval.py --ckpt $(RUN) --split val
	.venv/bin/python eval.py --ckpt $(RUN) --split test

finetune: setup
	.venv/bin/python train.py --config configs/finetune.yaml paths.checkpoint_path=./checkpoints/$(CKPT).pt paths.run_dir=./runs/finetune_$(CKPT)

check: setup
	.venv/bin/python data.py --config configs/$(CKPT).yaml

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

test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 tests

test-xla: setup-xla
	PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest -q tests/test_xla.py

bench: setup
	.venv/bin/python bench/decode.py
	.venv/bin/python bench/stream.py

clean:
	rm -rf demo runs cache
