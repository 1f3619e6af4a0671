import os
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "tests", "fixtures", "vjepa3d_tiny.pt")  # encoder of 16x64x64 volumes, 128 wide
sys.path.insert(0, ROOT)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A small phantom data set. Read only; tests that change something take `dataset`."""
    import phantom

    root = tmp_path_factory.mktemp("phantom") / "data"
    phantom.write_dataset(root, participants=40, seed=0, scale=(1 / 16, 1 / 16, 1 / 16), processes=1)
    return root


@pytest.fixture()
def dataset(written, tmp_path):
    """A copy of its own."""
    return shutil.copytree(written, tmp_path / "data")


@pytest.fixture()
def configure(tmp_path):
    """configure(root, "key=value", ...) -> checked configuration of a quick probe on root with the tiny encoder."""
    import config

    def make(root, *overrides):
        return config.load(os.path.join(ROOT, "configs", "demo.yaml"), [*settings(root, tmp_path), *overrides])
    return make


def settings(root, tmp_path):
    return [f"paths.data={root}", f"paths.checkpoint_path={TINY}", f"paths.cache_dir={tmp_path}/cache", f"paths.run_dir={tmp_path}/run",
            "train.epochs=6", "train.warmup_epochs=1", "data.image_size=[16,64,64]", "data.num_workers=0"]


@pytest.fixture()
def command(tmp_path):
    """command("train.py", "--config", ..., root=...) -> finished process; with root, the overrides of a quick probe on it."""
    def run(*args, root=None, **kwargs):
        extra = settings(root, tmp_path) if root else []
        return subprocess.run([sys.executable, *map(str, args), *extra], capture_output=True, text=True, cwd=ROOT, **kwargs)
    return run


def edit(path, change):
    """Rewrite a text file by change(text)."""
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read()
    changed = change(text)
    assert changed != text
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(changed)
