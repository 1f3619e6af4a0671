"""Not a bench: three demo encoders that differ in what they were trained on.

    .venv/bin/python bench/encoders.py                            # five minutes on two cores
    make sweep CKPTS="demo demo_short demo_long" MODES=probe      # does the leaderboard see it?

demo/encoder.pt has random weights. Those of demo_encoders/short.pt and long.pt were fine-tuned on
the labels of 200 other synthetic participants, for 3 and for 20 epochs, and are written in the
pretraining's format. The demo's participants are new to all three.
"""

import tempfile

import torch
from measure import bench, script

import files
import phantom
import runs


def train_encoder(folder, name, epochs):
    command = f"""train.py --config configs/demo.yaml --config configs/finetune.yaml demo.dir=null
        paths.data={folder}/data paths.cache_dir={folder}/cache paths.run_dir={folder}/{name}
        paths.checkpoint_path=demo/encoder.pt train.epochs={epochs}
        train.warmup_epochs={min(2, epochs - 2)}"""
    for line in script(*command.split()):
        print(line, end="", flush=True)
    trained = runs.read_saved(f"{folder}/{name}/last.pt", {"encoder"})
    weights, config = {}, {"experiment_name": f"demo_{name}", "patch_size": [4, 16, 16]}
    for prefix in ("context_encoder.", "target_encoder.encoder."):
        weights |= {prefix + key: value for key, value in trained["encoder"].items()}
    saved = {"epoch": trained["epoch"], "step": 0, "model_state_dict": weights}
    saved |= {"optimizer_state_dict": {}, "scheduler_state_dict": {}, "loss": float("nan")}
    saved["config"] = config | {"image_size": [16, 96, 96]}
    files.write(f"demo_encoders/{name}.pt", lambda file: torch.save(saved, file))
    accuracy = trained["val_balanced_accuracy"]
    print(f"{name}: validation balanced accuracy {accuracy:.3f} on its own participants")


def train_encoders():
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_dataset(f"{folder}/data", 200, seed=1)
        train_encoder(folder, "short", 3)
        train_encoder(folder, "long", 20)


if __name__ == "__main__":
    bench(__doc__, train=train_encoders)
