import contextlib
import os
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
from b2_server import B2Server
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, roc_auc_score

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


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    """No test reaches a real store with the developer's own key; an empty variable also wins over a file .env."""
    for name in ("B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY"):
        monkeypatch.setenv(name, "")


@pytest.fixture()
def store(monkeypatch):
    """with store({name: content}) as server: a B2 of our own on loopback, and the environment that b2.py needs for it."""
    import b2

    @contextlib.contextmanager
    def make(files=(), **options):
        b2.renew()  # no client of an earlier server
        with B2Server(files, **options) as server:
            for name, value in (("B2_APPLICATION_KEY_ID", server.key_id), ("B2_APPLICATION_KEY", server.key), ("B2_REALM", server.url)):
                monkeypatch.setenv(name, value)
            yield server
        b2.renew()

    monkeypatch.setattr(b2, "ENV_FILE", "/none")
    monkeypatch.setattr(b2, "READ_TIMEOUT", 2)  # enough for a busy machine, and short enough to wait for
    return make


def settings(root, tmp_path):
    return [f"paths.data={root}", f"paths.checkpoint_path={TINY}", f"paths.cache_dir={tmp_path}/cache", f"paths.run_dir={tmp_path}/run",
            "train.epochs=6", "train.warmup_epochs=1", "data.image_size=[16,64,64]", "data.num_workers=0", "train.sweep=null"]


@pytest.fixture()
def command(tmp_path, capsys, monkeypatch):
    """command("train.py", "--config", ..., root=...) -> returncode, stdout, stderr; with root, the overrides of a quick probe on it.

    Runs the script's own __main__ in this process, which saves the seconds that importing torch costs.
    """
    def run(script, *args, root=None):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args), *(settings(root, tmp_path) if root else [])])
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit_:  # a text is what Python prints to stderr before it exits with 1
            code = exit_.code
        output = capsys.readouterr()
        text = f"{code}\n" if isinstance(code, str) else ""
        return SimpleNamespace(returncode=1 if text else code or 0, stdout=output.out, stderr=output.err + text)
    return run


def assert_scores_are_scikit_learns(result, y, p):
    """The scores of metrics.evaluate, from labels y (n,) and probabilities p (n, 4), computed by scikit-learn."""
    pred = p.argmax(1)
    assert result["n"] == len(y)
    assert result["accuracy"] == pytest.approx(accuracy_score(y, pred))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, pred))
    assert result["macro_f1"] == pytest.approx(f1_score(y, pred, average="macro"))
    assert result["f1_per_class"] == pytest.approx(f1_score(y, pred, average=None))
    assert result["auroc_macro_ovr"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr"))
    assert result["log_loss"] == pytest.approx(log_loss(y, p))


def edit(path, change):
    """Rewrite a text file by change(text)."""
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read()
    changed = change(text)
    assert changed != text
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(changed)
