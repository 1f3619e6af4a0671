import glob
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    KILLED_IN_SAVE,
    ROOT,
    TINY,
    TUNE,
    content,
    copy_of,
    edit,
    evaluate,
    predictions,
    quick,
    read_bytes,
    read_run,
    same_run,
    settings,
    start,
    trained,
    warm,
    write_bytes,
)

import config
import eval as evaluation
import figures
import files
import heads
import ledger
import model
import runs
import train

DEMO = ["--config", "configs/demo.yaml"]


def sha256(path):
    return hashlib.sha256(read_bytes(path)).hexdigest()


# ------------------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module")
def whole(written, tmp_path_factory):
    """The configuration of a run that was scored on both splits."""
    cfg = quick(written, tmp_path_factory.mktemp("whole"))
    train.main(0, cfg)
    for split in ("val", "test"):
        evaluation.evaluate_run(cfg.paths.run_dir, split)
    return cfg


def test_a_run_leaves_what_the_design_says(whole):
    expected = {
        "config.yaml",
        "provenance.json",
        "ledger.csv",
        "metrics.jsonl",
        "best_checkpoint_during_training.pt",
        "last.pt",
        "predictions_val.csv",
        "eval_val.json",
        "predictions_test.csv",
        "eval_test.json",
        "report.html",
        "plots",
    }
    assert set(os.listdir(whole.paths.run_dir)) == expected


def test_a_run_leaves_these_pictures(whole):
    expected = {"training", "shares"}
    for split in ("val", "test"):
        plots = "summary", "confusion", "roc", "reliability", "features"
        expected |= {f"{plot}_{split}" for plot in plots}
    expected = {f"{name}.{kind}" for name in expected for kind in figures.KINDS}
    assert set(os.listdir(f"{whole.paths.run_dir}/plots")) == expected


@pytest.mark.parametrize("more", [[], ["train.seeds=[1,2]"]], ids=["one head", "several"])
def test_the_last_line_says_how_to_score_the_run(written, tmp_path, capsys, more):
    cfg = quick(written, tmp_path, "train.epochs=2", *more)
    train.main(0, cfg)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: ")
    assert last.endswith(f"eval.py --ckpt {cfg.paths.run_dir} --split test")


def test_a_run_leaves_no_half_file(whole):
    assert not glob.glob(f"{whole.paths.run_dir}/**/*.part", recursive=True)


def test_a_run_keeps_its_configuration(whole):
    assert yaml.safe_load(content(f"{whole.paths.run_dir}/config.yaml")) == config.to_dict(whole)


def test_a_run_knows_where_it_comes_from(whole, written):
    provenance = json.loads(content(f"{whole.paths.run_dir}/provenance.json"))
    assert provenance["encoder_sha256"] == model.weights_hash(model.load_encoder(TINY))
    assert provenance["labels_sha256"] == sha256(written / "participants.tsv")
    assert provenance["manifest_sha256"] == sha256(written / "retinal_oct" / "manifest.tsv")
    # a package may leave out how it was built: 2.13.0 of 2.13.0+cu130
    number, _, _ = torch.__version__.partition("+")
    assert provenance["versions"]["torch"] in (number, torch.__version__)
    assert provenance["seed"] == 42 and provenance["world_size"] == 1


def test_a_run_keeps_the_ledger_of_everybody(whole):
    assert len(content(f"{whole.paths.run_dir}/ledger.csv").splitlines()) == 1 + 40


def test_a_run_leaves_the_encoders_file_as_it_is(written, tmp_path):
    before = sha256(TINY)
    train.main(0, quick(written, tmp_path))
    assert sha256(TINY) == before


# ---------------------------------------------------------------------------- the best checkpoint

WIGGLES = ["train.epochs=15", "train.lr_head=0.02", "train.early_stopping.enabled=false"]


@pytest.fixture()
def wiggling(written):
    """A run whose best epoch is not its last: one whose last were best would show nothing."""
    folder = trained(written, *WIGGLES)
    history, best, last = read_run(quick(written, folder))
    assert [r["epoch"] for r in history] == list(range(16)) and best["epoch"] != 15
    return folder, history, best, last


def best_of(history):
    return max(history, key=lambda r: (-r["val/loss"], r["val/balanced_accuracy"]))


def test_the_best_checkpoint_holds_the_best_epoch(wiggling):
    _, history, best, _ = wiggling
    expected = best_of(history)
    assert best["epoch"] == expected["epoch"] and best["val_loss"] == expected["val/loss"]
    assert best["val_balanced_accuracy"] == expected["val/balanced_accuracy"]


def test_best_marks_the_epochs_that_improved_on_all_before(wiggling):
    running = (-np.inf, 0)
    for r in wiggling[1]:
        now = (-r["val/loss"], r["val/balanced_accuracy"])
        assert r["best"] == (now > running)
        running = max(running, now)


def test_the_saved_head_gives_the_scores_of_its_epoch(wiggling, tmp_path):
    expected = best_of(wiggling[1])
    result, _ = evaluate(f"{copy_of(wiggling[0], tmp_path)}/{runs.BEST}", "val")
    assert result["balanced_accuracy"] == pytest.approx(expected["val/balanced_accuracy"])
    assert result["log_loss"] == pytest.approx(expected["val/loss"])


def test_the_last_checkpoint_holds_the_last_epoch_and_all_that_resuming_needs(wiggling):
    _, history, best, last = wiggling
    assert last["epoch"] == 15 and last["val_loss"] == history[-1]["val/loss"]
    assert not torch.equal(last["head"]["weight"], best["head"]["weight"])
    assert set(last["optimizer"]) == {"state", "param_groups"}
    progress = last["progress"]
    assert progress["best_epoch"] == [best["epoch"]] and progress["history"] == history
    assert progress["best"] == [(best["val_balanced_accuracy"], best["val_loss"])]


# ---------------------------------------------------------------------------- a folder used again


def test_a_rerun_into_the_same_folder_leaves_nothing_stale(written, tmp_path):
    cfg = quick(written, tmp_path)
    train.main(0, cfg)
    evaluation.evaluate_run(cfg.paths.run_dir, "test")
    train.main(0, quick(written, tmp_path, "train.epochs=2"))
    assert not os.path.exists(f"{cfg.paths.run_dir}/eval_test.json")
    assert not os.listdir(f"{cfg.paths.run_dir}/plots")
    assert [r["epoch"] for r in read_run(cfg)[0]] == [0, 1, 2]


def test_a_rerun_removes_only_what_runs_write(written, tmp_path):
    run = copy_of(trained(written), tmp_path)
    mine = [f"{run}/plots/my_figure.png", f"{run}/notes.txt"]
    os.makedirs(f"{run}/plots")
    for path in mine:
        write_bytes(path, b"")
    train.main(0, quick(written, tmp_path))
    assert all(map(os.path.exists, mine))


@pytest.mark.parametrize(
    "kind",
    [
        "a folder of other things",
        "a file",
        "where the encoder lies",
        "below a file",
        "in the cache",
    ],
)
def test_a_run_dir_that_is_not_a_runs_is_refused_before_anything_is_computed(
    written, configure, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(model, "load_encoder", lambda *a: pytest.fail("computed something"))
    mine, encoder = tmp_path / "mine", TINY
    if kind == "a file":
        mine.write_text("precious")
    elif kind == "in the cache":
        mine = tmp_path / "cache" / "run"
    elif kind == "below a file":
        (tmp_path / "file").write_text("precious")
        mine = tmp_path / "file" / "run"
    else:
        (mine / "plots").mkdir(parents=True)
        (mine / "report.html").write_text("precious")
        if kind == "where the encoder lies":
            (mine / "provenance.json").write_text("{}")
            encoder = str(shutil.copy(TINY, mine / "last.pt"))
    cfg = configure(written, f"paths.run_dir={mine}", f"paths.checkpoint_path={encoder}")
    with pytest.raises(ValueError, match="paths.run_dir="):
        train.main(0, cfg)
    if mine.is_dir():
        assert (mine / "report.html").read_text() == "precious"


def test_what_a_kill_left_goes_with_the_next_start(written, tmp_path):
    cfg = quick(written, tmp_path, *TUNE, "train.epochs=2", "train.resume=auto")
    for _ in range(2):  # a run anew, and one that is resumed
        os.makedirs(f"{tmp_path}/run", exist_ok=True)
        open(f"{tmp_path}/run/provenance.json", "a").close()
        open(f"{tmp_path}/run/last.pt.0123.part", "w").close()
        train.main(0, cfg)
        assert not [name for name in os.listdir(f"{tmp_path}/run") if name.endswith(".part")]


@pytest.mark.slow
def test_killed_while_training_then_run_again(written, tmp_path, command):
    args = [*DEMO, *settings(written, tmp_path), warm(written)]
    long = ["train.epochs=400", "train.early_stopping.enabled=false"]
    process = start("train.py", *args, *long)
    for line in process.stdout:
        if line.startswith("epoch   5"):
            process.kill()
            break
    process.communicate()
    for name in (runs.LAST, runs.BEST):
        torch.load(tmp_path / "run" / name, weights_only=True)
    result = command("train.py", *args, "train.epochs=6")
    assert result.returncode == 0 and "replacing an earlier run" in result.stdout
    assert len(content(tmp_path / "run" / "metrics.jsonl").splitlines()) == 7  # the start, too


# ------------------------------------------------------------- killed between epochs, and resumed

# a quick probe with an MLP and dropout, for their random numbers must agree too
MLP = ["device.backend=cpu", "data.batch_size=7", "model.head.hidden=8"]
LONG = ["train.epochs=60", "train.resume=auto", "train.early_stopping.patience=1000"]


def arguments(root, folder, *more):
    return [*DEMO, *settings(root, folder), warm(root), *MLP, *more]


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3, 4, 5))]
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(written, command, tmp_path, seed):
    """Killed at a random moment, and (the odd ones) in the midst of a save."""
    uninterrupted = trained(written, *MLP, *LONG)
    chance, args = random.Random(seed), arguments(written, tmp_path, *LONG)
    if seed % 2:
        script = [sys.executable, "-c", KILLED_IN_SAVE, str(chance.randrange(20, 100)), *args]
        run = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL)
    else:
        run, epochs = start("train.py", *args), chance.randrange(2, 40)
        for line in run.stdout:
            if line.startswith(f"epoch {epochs:3d}/60"):
                time.sleep(chance.uniform(0, 0.02))
                break
        run.kill()
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    killed = torch.load(f"{tmp_path}/run/last.pt", weights_only=True)["epoch"]
    assert 0 < killed < 60
    resumed = command("train.py", *args)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after epoch {killed} of " in resumed.stdout
    assert resumed.stdout.count("  train loss ") == 60 - killed
    same_run(tmp_path, uninterrupted)
    provenance = json.loads(content(f"{tmp_path}/run/provenance.json"))
    assert [r["after_epoch"] for r in provenance["resumed"]] == [killed]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_and_another_world_goes_on(written, tmp_path, processes):
    args = arguments(written, tmp_path, *LONG)
    run = start("train.py", *args, f"device.processes={processes}")
    for line in run.stdout:
        if line.startswith("epoch   5/60"):
            run.terminate()
            break
    output, errors = run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGTERM, errors
    epoch = torch.load(f"{tmp_path}/run/last.pt", weights_only=True)["epoch"]
    assert 5 <= epoch < 60
    assert f"stopped by SIGTERM after epoch {epoch}; train.resume=auto goes on from there" in output
    again = start("train.py", *args, f"device.processes={3 - processes}")
    output, errors = again.communicate(timeout=150)
    assert again.returncode == 0 and "resource_tracker" not in errors, errors
    assert f"resuming after epoch {epoch} of" in output
    uninterrupted = trained(written, *MLP, *LONG)
    assert np.abs(predictions(tmp_path) - predictions(uninterrupted)).max() < 1e-5


def test_a_finished_run_is_left_as_it_is(written, command, tmp_path):
    run = copy_of(trained(written, *MLP), tmp_path)
    before = {p: read_bytes(p) for p in glob.glob(f"{run}/*.*") if "provenance" not in p}
    output = command("train.py", *arguments(written, tmp_path, "train.resume=auto")).stdout
    assert "resuming after epoch 6 of" in output and "best: epoch" in output
    assert "  train loss " not in output
    assert before == {path: read_bytes(path) for path in before}


# ------------------------------------------------------------ killed within an epoch, and resumed

# `python -c ... n ARGUMENTS`: train.py, killed right after it has saved last.pt for the n-th time
KILLED_AFTER_SAVE = """
import os, runpy, signal, sys
calls, move, last = 0, os.replace, int(sys.argv[1])
def replace(source, target):
    global calls
    move(source, target)
    calls += str(target).endswith("last.pt")
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
del sys.argv[0]
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture()
def tuned(written):
    """A folder with a finished fine-tuning run, saved three times in an epoch of six steps."""
    return trained(written, *TUNE, "train.save_every=2")


@pytest.mark.parametrize(
    "moment", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 6))]
)
@pytest.mark.slow
def test_killed_within_an_epoch_and_resumed_equals_uninterrupted_bit_for_bit(
    written, tuned, command, tmp_path, moment
):
    more = [warm(written), *TUNE, "train.save_every=2", "train.resume=auto"]
    args = [*DEMO, *settings(written, tmp_path), *more]
    script = [sys.executable, "-c", KILLED_AFTER_SAVE, str(moment), *args]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.run(script, cwd=ROOT, timeout=100, check=False, **output)
    assert run.returncode == -signal.SIGKILL
    killed = torch.load(f"{tmp_path}/run/last.pt", weights_only=True)
    where = f"epoch {killed['epoch']}"
    if "val_loss" not in killed:  # saved within an epoch
        where = f"step {killed['step']} of {where}"
    resumed = command("train.py", *args)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after {where} of " in resumed.stdout
    for name in (runs.LAST, runs.BEST):  # all that may differ
        mine = torch.load(f"{tmp_path}/run/{name}", weights_only=True)
        mine["config"]["train"]["resume"] = "never"
        torch.save(mine, f"{tmp_path}/run/{name}")
    same_run(tmp_path, tuned)


@pytest.fixture()
def stopped(written, tmp_path, monkeypatch, capsys):
    """A fine-tuning run that was sent SIGTERM in the third step of its second epoch: its
    configuration, its exit status and what it printed."""
    cfg = quick(written, tmp_path, *TUNE, "train.save_every=0", "train.resume=auto")
    calls, clip = [], heads.Optimizer.clip

    def stop_in_the_ninth(*args):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(heads.Optimizer, "clip", stop_in_the_ninth)
        train.main(0, cfg)
    return cfg, exit_.value.code, capsys.readouterr().out


def test_sigterm_within_an_epoch_saves(stopped):
    cfg, code, printed = stopped
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3 of epoch 2" in printed
    result, _ = evaluate(f"{cfg.paths.run_dir}/last.pt", "val")
    assert "this checkpoint was saved within epoch 2, after step 3" in result["alarms"]


def test_a_run_that_sigterm_stopped_goes_on_as_if_it_had_not(stopped, tuned, tmp_path):
    cfg, _, _ = stopped
    _, folder = evaluate(f"{cfg.paths.run_dir}/last.pt", "val")
    train.main(0, cfg)
    assert np.array_equal(predictions(tmp_path), predictions(tuned))
    mine, expected = read_run(cfg)[2]["encoder"], torch.load(tuned / "run/last.pt")["encoder"]
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[k], v) for k, v in expected.items())
    # of a checkpoint that is there no longer
    assert os.path.isdir(folder) and not os.path.exists(f"{folder}/eval_val.json")


# ---------------------------------------------------------------------------- what is not resumed


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ["train.lr_head=0.1", "seed=7"],
            "seed 42 -> 7; train.lr_head 0.003 -> 0.1; set that back, or set train.resume=never",
        ),
        (["data.batch_size=8"], "data.batch_size 7 -> 8"),
        (["model.encoder=target"], "model.encoder context -> target"),
    ],
)
def test_a_change_that_would_change_the_result_is_refused(
    written, command, tmp_path, change, message
):
    run = copy_of(trained(written, *MLP), tmp_path)
    before = content(f"{run}/metrics.jsonl")
    args = arguments(written, tmp_path, "train.resume=auto", *change)
    done = command("train.py", *args)
    says = f"error: {run} holds a run whose result this would change: "
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(says)
    assert message in done.stderr
    assert content(f"{run}/metrics.jsonl") == before


def test_another_data_set_is_no_resumption(written, dataset, command, tmp_path):
    copy_of(trained(written, *MLP), tmp_path)
    args = arguments(dataset, tmp_path, warm(written), "train.resume=auto")
    path = ledger.read(config.load(f"{ROOT}/configs/demo.yaml", args[2:])).of("train")[0].path
    os.remove(path)  # one of the volumes of a participant, then all
    result = command("train.py", *args)
    message = "would change: volumes is another; set that back"
    assert result.returncode == 1 and message in result.stderr
    for name in os.listdir(os.path.dirname(path)):
        os.remove(os.path.join(os.path.dirname(path), name))
    result = command("train.py", *args, "data.max_missing=1")
    assert result.returncode == 1 and "train_participants is another" in result.stderr


DAMAGE = pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[: len(data) // 2], "not a zip file"),
        (lambda data: b"", "not a zip file"),
        (lambda data: b"text", "not a zip file"),
        (
            lambda data: (
                data[: len(data) // 2]
                + bytes([data[len(data) // 2] ^ 1])
                + data[len(data) // 2 + 1 :]
            ),
            "is damaged|CRC",
        ),
    ],
    ids=["cut short", "empty", "text", "a flipped bit"],
)


@DAMAGE
def test_a_damaged_checkpoint_is_neither_resumed_nor_scored(
    written, tuned, tmp_path, damage, message
):
    run = copy_of(tuned, tmp_path)
    for name in (runs.LAST, runs.BEST):
        write_bytes(f"{run}/{name}", damage(read_bytes(f"{run}/{name}")))
    before = sorted(os.listdir(run))
    refused = (
        f"last.pt is not a checkpoint of this train.py: .*({message}).*; "
        "set train.resume=never to replace the run"
    )
    with pytest.raises(ValueError, match=refused):
        train.main(0, quick(written, tmp_path, *TUNE, "train.resume=auto"))
    with pytest.raises(ValueError, match=message):
        evaluate(run, "val")
    assert sorted(os.listdir(run)) == before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda last: last.pop("step"), "KeyError 'step'; set train.resume=never"),
        (lambda last: last.pop("progress"), "KeyError 'progress'; set train.resume=never"),
        (
            lambda last: last.update(
                encoder={f"_orig_mod.{k}": v for k, v in last["encoder"].items()}
            ),
            "last.pt does not fit this model: .*; set train.resume=never",
        ),
    ],
    ids=["no step", "no progress", "other names"],
)
def test_a_checkpoint_of_another_version_is_not_resumed(written, tuned, tmp_path, change, message):
    last = torch.load(f"{tuned}/run/last.pt", weights_only=True)
    change(last)
    os.makedirs(f"{tmp_path}/run")
    torch.save(last, f"{tmp_path}/run/last.pt")
    write_bytes(f"{tmp_path}/run/provenance.json", b"{}")
    with pytest.raises(ValueError, match=message):
        train.main(0, quick(written, tmp_path, *TUNE, "train.resume=auto"))


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff"])
def test_a_damaged_provenance_is_named_when_a_run_is_resumed(written, tuned, tmp_path, damage):
    run = copy_of(tuned, tmp_path)
    write_bytes(f"{run}/provenance.json", damage)
    message = r"provenance.json is damaged \(.*\); set train.resume=never to replace the run"
    with pytest.raises(ValueError, match=message):
        train.main(0, quick(written, tmp_path, *TUNE, "train.resume=auto"))


# ----------------------------------------------------------------------------- a run opened again


def test_a_config_that_was_edited_is_refused(written, tmp_path):
    run = copy_of(trained(written), tmp_path)
    edit(f"{run}/config.yaml", lambda text: text.replace("lr_head: 0.003", "lr_head: 0.5"))
    message = (
        "config.yaml is not what this checkpoint was trained with: train.lr_head 0.003 -> 0.5; "
        "set that back, or train again"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(run, "test")


def test_an_edit_of_what_changes_no_result_is_taken(written, tmp_path):
    run = copy_of(trained(written), tmp_path)
    edit(f"{run}/config.yaml", lambda text: text.replace("run_name: demo", "run_name: mine"))
    runs.check_config(runs.open_checkpoint(run))


@pytest.fixture()
def run(written):
    """The folder of a finished run, which is not to be changed."""
    path = trained(written) / "run"
    yield path
    assert not os.path.exists(path / "eval_test.json")


def test_another_encoder_is_refused(run, tmp_path):
    weights = model.read_checkpoint(TINY)["model_state_dict"]
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    weights["context_encoder.norm.bias"] += 1
    other = {"model_state_dict": weights, "config": {"image_size": [16, 64, 64]}}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="the head was trained on"):
        evaluate(run, "test", [f"paths.checkpoint_path={tmp_path}/other.pt"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.pool_method=max", "would score something else"),
        ("paths.data=/none", "set paths.data"),
    ],
)
def test_settings_that_would_score_something_else_are_refused(run, override, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(run, "test", [override])


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there; train first"):
        evaluate(str(tmp_path / "nowhere"), "test")


@pytest.mark.parametrize("junk", [b"", b"junk", "encoder"])
def test_what_is_no_checkpoint_is_refused(tmp_path, junk):
    write_bytes(tmp_path / "junk.pt", read_bytes(TINY) if junk == "encoder" else junk)
    with pytest.raises(ValueError, match="junk.pt is not a checkpoint of this train.py"):
        evaluate(str(tmp_path / "junk.pt"), "test")


def test_a_checkpoint_that_would_not_fit_is_refused(run, tmp_path):
    """Gigabytes that are compressed to megabytes, or that share their bytes."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"0" * (64 << 20))
    with pytest.raises(ValueError, match="bomb.pt is not a checkpoint of .*it is compressed"):
        evaluate(str(tmp_path / "bomb.pt"), "test")


@pytest.mark.parametrize(
    "key, value", [("config", [1]), ("scans", None), ("epoch", "3"), ("train_participants", 17)]
)
def test_a_checkpoint_of_other_kinds_is_refused(run, tmp_path, key, value):
    saved = torch.load(run / runs.BEST, weights_only=True)
    torch.save(saved | {key: value}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"is not a checkpoint of .* of another kind: {key}"):
        evaluate(str(tmp_path / "other.pt"), "test")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: saved.pop("config"), "is not a checkpoint of this train.py"),
        (lambda saved: saved["head"].pop("bias"), "not loaded"),
    ],
    ids=["no config", "no bias"],
)
def test_a_checkpoint_that_lacks_something_is_refused(run, tmp_path, change, message):
    saved = torch.load(run / runs.BEST, weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=message):
        evaluate(str(tmp_path / "damaged.pt"), "test")


# ------------------------------------------------------------------------------ one run at a time


def test_a_folder_that_a_run_writes_is_refused_to_a_second(written, tmp_path, command):
    cfg = quick(written, tmp_path)
    with runs.locked(cfg):
        done = command("train.py", "--config", "configs/demo.yaml", root=written)
    assert done.returncode == 1 and not os.path.exists(tmp_path / "run")
    assert f"is being written by process {os.getpid()} on " in done.stderr
    assert not glob.glob(f"{tmp_path}/.*") and not glob.glob(f"{tmp_path}/*.lock")


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_encoded(written, command):
    arguments = ["--config", "configs/demo.yaml", "paths.run_dir=/proc/x"]
    done = command("train.py", *arguments, f"paths.data={written}", "demo.dir=null")
    assert done.returncode == 1
    assert done.stderr.endswith("set paths.run_dir to another folder\n")
    assert "paths.run_dir=/proc/x cannot be written" in done.stderr


def test_the_lock_of_a_killed_run_is_free(written, tmp_path):
    code = """
import config, runs, time, sys
with runs.locked(config.load(sys.argv[1], sys.argv[2:])):
    print("held", flush=True)
    time.sleep(600)
"""
    script = [sys.executable, "-c", code, DEMO[1], *settings(written, tmp_path)]
    with subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid}"):
            runs.locked(quick(written, tmp_path)).__enter__()
        holder.kill()
    with runs.locked(quick(written, tmp_path)):
        pass


# ------------------------------------------------------------------------------------ a full disk


def test_a_full_disk_under_a_large_checkpoint_is_one_sentence(tmp_path):
    code = f"""
import resource, signal, torch, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
files.write('{tmp_path}/last.pt', lambda f: torch.save({{'a': torch.zeros(100_000)}}, f))
"""
    script = [sys.executable, "-c", code]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and os.listdir(tmp_path) == []
    assert "OSError: [Errno 27] not written: File too large" in done.stderr


def test_an_error_while_saving_that_is_not_the_disks_stays_what_it_is(tmp_path):
    def fail(file):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        files.write(tmp_path / "x", fail)
