"""Three demo encoders that differ in what they were trained on: for `make sweep`, and to see whether the leaderboard says the right thing.

    .venv/bin/python bench/encoders.py                            # five minutes on two cores
    make sweep CKPTS="demo demo_short demo_long" MODES=probe

demo/encoder.pt has random weights. Those of demo_encoders/short.pt and long.pt were fine-tuned on the labels of 200 other synthetic
participants, for 3 and for 20 epochs, and are written in the pretraining's format. The demo's participants are new to all three.
"""

import os
import subprocess
import sys
import tempfile

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import b2  # noqa: E402
import eval as evaluation  # noqa: E402
import phantom  # noqa: E402


def main():
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_dataset(f"{folder}/data", 200, seed=1)
        for name, epochs in (("short", 3), ("long", 20)):
            command = ["train.py", "--config", "configs/demo.yaml", "--config", "configs/finetune.yaml",
                       f"paths.data={folder}/data", f"paths.cache_dir={folder}/cache", f"paths.run_dir={folder}/{name}",
                       f"train.epochs={epochs}", f"train.warmup_epochs={min(2, epochs - 2)}", "demo.dir=null",
                       "paths.checkpoint_path=demo/encoder.pt"]
            subprocess.run([sys.executable, *command], check=True)
            trained = evaluation.read_saved(f"{folder}/{name}/last.pt", {"encoder"})
            state = {prefix + key: value for prefix in ("context_encoder.", "target_encoder.encoder.")
                     for key, value in trained["encoder"].items()}
            config = {"experiment_name": f"demo_{name}", "image_size": [16, 96, 96], "patch_size": [4, 16, 16]}
            b2.write(f"demo_encoders/{name}.pt", lambda file: torch.save(
                {"epoch": trained["epoch"], "step": 0, "model_state_dict": state, "optimizer_state_dict": {},
                 "scheduler_state_dict": {}, "loss": float("nan"), "config": config}, file))
            print(f"demo_encoders/{name}.pt: "
                  f"validation balanced accuracy {trained['val_balanced_accuracy']:.3f} on its own participants")


if __name__ == "__main__":
    main()
