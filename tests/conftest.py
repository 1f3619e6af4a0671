"""Fixtures of all tests: synthetic data, configurations, a store of our own, commands.

Plain functions and names that test files share are in helpers.py.
"""

import contextlib
import runpy
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from b2_server import B2Server
from helpers import DEMO, PREFIX, ROOT, TINY, settings

import figures


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A small phantom data set. Read only; tests that change something take `dataset`."""
    import phantom

    root = tmp_path_factory.mktemp("phantom") / "data"
    sixteenth = (1 / 16, 1 / 16, 1 / 16)
    phantom.write_dataset(root, participants=40, seed=0, scale=sixteenth, processes=1)
    return root


@pytest.fixture()
def dataset(written, tmp_path):
    """A copy of its own."""
    return shutil.copytree(written, tmp_path / "data")


@pytest.fixture()
def configure(tmp_path):
    """configure(root, "key=value", ...) -> checked configuration of a quick probe on root with the
    tiny encoder."""
    import config

    return lambda root, *more: config.load(DEMO, [*settings(root, tmp_path), *more])


@pytest.fixture(scope="session", autouse=True)
def figures_as_svg_alone():
    """PNG and above all PDF take most of the time of a page; helpers.every_kind asks for them."""
    figures.KINDS = ("svg",)


@pytest.fixture(autouse=True)
def sigterm_ends_a_process():
    """Training in this process leaves a handler that only notes SIGTERM; a child that a later test
    forks would inherit it, and not end."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    """No test reaches a real store with the developer's own key; an empty variable also wins over a
    file .env. Nor does the developer's wish about W&B hold in a test."""
    for name in ("B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY"):
        monkeypatch.setenv(name, "")
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture()
def store(monkeypatch):
    """with store({name: content}) as server: a B2 of our own on loopback, and the environment that
    b2.py needs for it."""
    import b2

    @contextlib.contextmanager
    def make(files=(), **options):
        b2.renew()  # no client of an earlier server
        with B2Server(files, **options) as server:
            monkeypatch.setenv("B2_APPLICATION_KEY_ID", server.key_id)
            monkeypatch.setenv("B2_APPLICATION_KEY", server.key)
            monkeypatch.setenv("B2_REALM", server.url)
            yield server
        b2.renew()

    monkeypatch.setattr(b2, "ENV_FILE", "/none")
    # enough for a busy machine, and short enough to wait for
    monkeypatch.setattr(b2, "READ_TIMEOUT", 2)
    return make


@pytest.fixture()
def bucket(store):
    """with bucket(root) as server: the data set of folder root, and the tiny encoder, where
    helpers.remote looks for them."""

    def make(root, **options):
        files = [path for path in Path(root).rglob("*") if path.is_file()]
        objects = {f"{PREFIX}{path.relative_to(root)}": path.read_bytes() for path in files}
        return store({**objects, "encoders/tiny.pt": Path(TINY).read_bytes()}, **options)

    return make


@pytest.fixture()
def command(tmp_path, capsys, monkeypatch):
    """command("train.py", "--config", ..., root=...) -> returncode, stdout, stderr; with root, the
    overrides of a quick probe on it.

    Runs the script's own __main__ in this process, which saves the seconds that importing torch
    costs.
    """

    def run(script, *args, root=None):
        more = settings(root, tmp_path) if root else []
        monkeypatch.setattr(sys, "argv", [script, *map(str, args), *more])
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit_:  # a text is what Python prints to stderr before it exits with 1
            code = exit_.code
        output = capsys.readouterr()
        text = f"{code}\n" if isinstance(code, str) else ""
        return SimpleNamespace(
            returncode=1 if text else code or 0, stdout=output.out, stderr=output.err + text
        )

    return run
