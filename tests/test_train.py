"""The job through its public commands, on a small phantom with the recorded tiny encoder."""

import csv
import glob
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, assert_scores_are_scikit_learns, edit, settings

import config
import data
import eval as evaluation
import model
import train


def read_run(cfg):
    with open(f"{cfg.paths.run_dir}/metrics.jsonl") as f:
        history = [json.loads(line) for line in f]
    load = lambda name: torch.load(f"{cfg.paths.run_dir}/{name}", weights_only=True)
    return history, load(evaluation.BEST), load("last.pt")


def read_predictions(path):
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    return ([r["participant_id"] for r in rows], np.array([int(r["y_true"]) for r in rows]),
            np.array([[float(r[f"p{k}"]) for k in range(4)] for r in rows]))


def digest(path):
    return hashlib.sha256(open(path, "rb").read()).hexdigest()


# ---------------------------------------------------------------------------------------------------- a run, as a whole


def test_a_run_leaves_what_the_design_says(written, configure):
    cfg = configure(written)
    before = digest(TINY)
    train.main(0, cfg)
    for split in ("val", "test"):
        evaluation.evaluate_run(cfg.paths.run_dir, split)
    assert digest(TINY) == before
    expected = {"config.yaml", "provenance.json", "ledger.csv", "metrics.jsonl", evaluation.BEST, "last.pt", "predictions_val.csv",
                "eval_val.json", "predictions_test.csv", "eval_test.json", "report.html", "plots"}
    assert set(os.listdir(cfg.paths.run_dir)) == expected
    assert set(os.listdir(f"{cfg.paths.run_dir}/plots")) == {"training.png", "shares.png", *(
        f"{plot}_{split}.png" for plot in ("confusion", "roc", "reliability") for split in ("val", "test"))}
    assert not glob.glob(f"{cfg.paths.run_dir}/**/*.part", recursive=True)

    with open(f"{cfg.paths.run_dir}/config.yaml") as f:
        assert yaml.safe_load(f) == config.to_dict(cfg)
    with open(f"{cfg.paths.run_dir}/provenance.json") as f:
        provenance = json.load(f)
    assert provenance["encoder_sha256"] == model.weights_hash(model.load_encoder(TINY))
    assert provenance["labels_sha256"] == digest(written / "participants.tsv")
    assert provenance["manifest_sha256"] == digest(written / "retinal_oct" / "manifest.tsv")
    assert provenance["versions"]["torch"] == torch.__version__ and provenance["seed"] == 42 and provenance["world_size"] == 1
    with open(f"{cfg.paths.run_dir}/ledger.csv") as f:
        assert sum(1 for _ in f) == 1 + 40

    with open(written / "participants.tsv", newline="") as f:
        people = {p["participant_id"]: p for p in csv.DictReader(f, delimiter="\t")}
    for split in ("val", "test"):
        ids, y, p = read_predictions(f"{cfg.paths.run_dir}/predictions_{split}.csv")
        assert sorted(ids) == sorted(i for i, q in people.items() if q["recommended_split"] == split and q["retinal_oct"] == "TRUE")
        assert [data.CLASSES[k] for k in y] == [people[i]["study_group"] for i in ids]
        with open(f"{cfg.paths.run_dir}/eval_{split}.json") as f:
            result = json.load(f)
        assert result["n"] == len(ids)
        assert_scores_are_scikit_learns(result, y, p)
        assert {"majority_baseline", "chance_band", "ci95", "predicted_counts", "alarms", "confusion_matrix"} <= set(result)
    page = open(f"{cfg.paths.run_dir}/report.html", encoding="utf-8").read()
    assert "SYNTHETIC" in page and page.count("data:image/png;base64,") == 8 and "http" not in page.replace("http-equiv", "")


def test_best_checkpoint_holds_the_best_epoch(written, configure):
    cfg = configure(written, "train.epochs=15", "train.lr_head=0.02", "train.early_stopping.enabled=false")
    train.main(0, cfg)
    history, best, last = read_run(cfg)
    assert [r["epoch"] for r in history] == list(range(1, 16))
    expected = max(history, key=lambda r: (r["val/balanced_accuracy"], -r["val/loss"]))
    assert best["epoch"] == expected["epoch"] != 15  # a run whose last epoch were best would show nothing
    assert best["val_balanced_accuracy"] == expected["val/balanced_accuracy"] and best["val_loss"] == expected["val/loss"]
    running = (-1, 0)
    for r in history:  # `best` marks exactly the epochs that improved on all before
        now = (r["val/balanced_accuracy"], -r["val/loss"])
        assert r["best"] == (now > running)
        running = max(running, now)
    # the saved head, applied by hand, gives the predictions of that epoch
    result, _ = evaluation.evaluate_run(f"{cfg.paths.run_dir}/{evaluation.BEST}", "val")
    assert (result["balanced_accuracy"] == pytest.approx(expected["val/balanced_accuracy"])
            and result["log_loss"] == pytest.approx(expected["val/loss"]))
    assert last["epoch"] == 15 and last["best_epoch"] == best["epoch"] and last["val_loss"] == history[-1]["val/loss"]
    assert not torch.equal(last["head"]["2.weight"], best["head"]["2.weight"])
    assert set(last["optimizer"]) == {"state", "param_groups"} and last["best"] == (best["val_balanced_accuracy"], best["val_loss"])


def test_probabilities_are_averaged_per_participant(written, configure):
    cfg = configure(written)
    train.main(0, cfg)
    _, best, _ = read_run(cfg)
    encoder = model.load_encoder(TINY)
    weight, bias, mean, std = (best["head"][k] for k in ("2.weight", "2.bias", "0.mean", "0.std"))
    volumes = {}
    for s in data.read_ledger(cfg).of("val"):
        x = data.preprocess(data.read_dicom(s.path), (16, 64, 64)).half().float()[None, None]
        with torch.no_grad():
            feature = encoder(x)[0].mean(0)
        volumes.setdefault(s.participant_id, []).append(torch.softmax((feature - mean) / std @ weight.T + bias, 0).numpy())
    ids, _, p = read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")
    assert max(len(v) for v in volumes.values()) > 2
    assert np.abs(p - np.stack([np.mean(volumes[i], axis=0) for i in ids])).max() < 1e-5


def test_standardisation_uses_training_features_alone(written, configure):
    cfg = configure(written)
    train.main(0, cfg)
    _, best, _ = read_run(cfg)
    encoder, size, encoder_hash = evaluation.open_encoder(cfg)
    ledger = data.read_ledger(cfg)
    _, x = evaluation.features(cfg, ledger, ledger.of("train"), encoder, size, encoder_hash, torch.device("cpu"))
    assert torch.allclose(best["head"]["0.mean"], x.mean(0)) and not torch.allclose(x.std(0), torch.ones(128))


def test_the_same_seed_gives_the_same_run_with_cold_and_warm_cache(written, configure):
    runs = []
    for cache, run, seed in (("a", 1, 42), ("a", 2, 42), ("b", 3, 42), ("a", 4, 43)):
        cfg = configure(written, f"seed={seed}")
        cfg.paths.cache_dir, cfg.paths.run_dir = f"{cfg.paths.cache_dir}/{cache}", f"{cfg.paths.run_dir}{run}"
        train.main(0, cfg)
        runs.append(read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2])
    assert np.array_equal(runs[0], runs[1]) and np.array_equal(runs[0], runs[2]) and not np.array_equal(runs[0], runs[3])


# --------------------------------------------------------------------------------------------------------- the parts


def test_early_stopping(written, configure, capsys):
    cfg = configure(written, "train.epochs=40", "train.early_stopping.patience=3", "train.early_stopping.min_delta=0.5")
    train.main(0, cfg)
    history, _, last = read_run(cfg)
    assert len(history) == 4 and last["epochs_without"] == 3  # no later epoch is 50 points better than the first
    assert "stopped early: 3 epochs without improvement" in capsys.readouterr().out


def test_better_goes_by_balanced_accuracy_then_by_loss():
    assert train.better((0.5, 9), (0.4, 1)) and not train.better((0.4, 1), (0.5, 9))
    assert train.better((0.5, 0.9), (0.5, 1.0)) and not train.better((0.5, 1.0), (0.5, 1.0))
    assert not train.better((0.505, 0.9995), (0.5, 1.0), 0.01) and train.better((0.505, 0.9), (0.5, 1.0), 0.01)


def test_schedule():
    rates = [train.lr_at(s, 100, 10, 2.0) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.001
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    assert train.lr_at(0, 5, 0, 1.0) == 1.0


def test_frozen_encoder_is_unchanged_bit_by_bit_and_features_come_once(written, configure, monkeypatch):
    cfg = configure(written)
    kept, calls = [], []
    monkeypatch.setattr(model, "load_encoder", lambda *a, real=model.load_encoder: kept.append(real(*a)) or kept[-1])
    monkeypatch.setattr(model.ViT3D, "forward", lambda self, x, real=model.ViT3D.forward: calls.append(x.shape) or real(self, x))
    train.main(0, cfg)
    fresh = model.load_encoder(TINY)
    assert all(torch.equal(a, b) for a, b in zip(kept[0].state_dict().values(), fresh.state_dict().values())) and not kept[0].training
    assert all(p.grad is None for p in kept[0].parameters())
    ledger = data.read_ledger(cfg)
    used = len(ledger.of("train")) + len(ledger.of("val"))
    assert calls == [(1, 1, 16, 64, 64)] * used

    def encoded(*overrides):
        calls.clear()
        train.main(0, configure(written, *overrides))
        return len(calls)

    assert encoded() == 0
    assert encoded("train.lr_head=0.1", "train.loss=focal", "model.head.hidden=8", "train.class_weights=none", "seed=1") == 0
    assert encoded("model.pool_method=max") == used  # another pooling, encoder, precision: other features
    assert encoded("model.encoder=target") == used
    assert encoded("train.precision=bf16") == used
    assert encoded("model.pool_method=max") == 0
    calls.clear()
    evaluation.evaluate_run(cfg.paths.run_dir, "test")
    assert len(calls) == len(ledger.of("test"))


def test_a_feature_belongs_to_the_content_of_its_volume(dataset, configure, monkeypatch):
    cfg = configure(dataset)
    train.main(0, cfg)
    a, b = data.read_ledger(cfg).of("train")[:2]
    calls = []
    monkeypatch.setattr(model.ViT3D, "forward", lambda self, x, real=model.ViT3D.forward: calls.append(1) or real(self, x))
    encoder, size, encoder_hash = evaluation.open_encoder(cfg)

    def features():
        ledger = data.read_ledger(cfg)
        return evaluation.features(cfg, ledger, ledger.of("train"), encoder, size, encoder_hash, torch.device("cpu"))[1]

    before = features()
    for one, other in ((a.path, a.path + ".aside"), (b.path, a.path), (a.path + ".aside", b.path)):  # they change places
        os.replace(one, other)
    after = features()
    assert not calls and not torch.equal(before[0], before[1])
    assert torch.equal(after[0], before[1]) and torch.equal(after[1], before[0]) and torch.equal(after[2:], before[2:])


@pytest.mark.parametrize("overrides", [["train.loss=focal"], ["train.loss=ordinal"], ["train.loss=label_smoothing"],
                                       ["train.class_weights=effective"], ["train.loss=balanced_softmax", "train.class_weights=none"],
                                       ["train.loss=logit_adjustment", "train.class_weights=none"], ["train.class_weights=[1,2,3,4]"],
                                       ["model.head.hidden=16", "train.lr_head=0.03"], ["model.pool_method=max"],
                                       ["data.batch_size=7"], ["data.batch_size=1000"], ["train.precision=bf16"],
                                       ["model.encoder=target"]])
def test_variants_train_and_evaluate(written, configure, overrides):
    cfg = configure(written, *overrides)
    train.main(0, cfg)
    history, _, _ = read_run(cfg)
    assert history[-1]["train/balanced_accuracy"] > 0.5  # of volumes that it trains on; 0.25 is chance
    evaluation.evaluate_run(cfg.paths.run_dir, "test")


def test_logit_adjustment_subtracts_the_prior_of_the_training_volumes(written, configure):
    """Trained as plain cross-entropy; the answers are those divided by the classes' shares in training."""
    answers = []
    for loss in ("ce", "logit_adjustment"):
        cfg = configure(written, f"train.loss={loss}", "train.class_weights=none", "train.early_stopping.enabled=false")
        train.main(0, cfg)
        evaluation.evaluate_run(f"{cfg.paths.run_dir}/last.pt", "val")  # the same epoch of both
        answers.append((read_predictions(f"{cfg.paths.run_dir}/last/predictions_val.csv")[2], read_run(cfg)[2]["head"]))
    ledger = data.read_ledger(cfg)
    share = np.bincount([s.label for s in ledger.of("train")]) / len(ledger.of("train"))
    (_, plain), (_, adjusted) = answers
    assert torch.equal(plain["2.weight"], adjusted["2.weight"]) and not plain["log_prior"].any()
    assert np.allclose(adjusted["log_prior"].exp().numpy(), share)
    heads = [model.Head(128, 4) for _ in answers]
    for head, (_, state) in zip(heads, answers):
        head.load_state_dict(state)
        head.eval()
    x = torch.randn(5, 128)
    expected = heads[0](x).softmax(1) / torch.from_numpy(share).float()
    assert torch.allclose(heads[1](x).softmax(1), expected / expected.sum(1, keepdim=True), atol=1e-6)
    assert (torch.equal(heads[1].train()(x), heads[0].train()(x))
            and answers[1][0][:, 3].mean() > answers[0][0][:, 3].mean())  # the rarest class gains


@pytest.mark.parametrize("overrides, said", [
    (["train.loss=balanced_softmax"], "train.class_weights=auto and train.loss=balanced_softmax correct the imbalance twice"),
    (["train.loss=logit_adjustment", "train.class_weights=none", "data.sampler=stratified"],
     "data.sampler=stratified and train.loss=logit_adjustment correct the imbalance twice"),
    (["train.loss=logit_adjustment", "data.sampler=stratified"], "correct the imbalance three times"),
    (["train.loss=balanced_softmax", "train.class_weights=none"], None)])
def test_what_corrects_more_than_once_is_said(configure, overrides, said):
    notes = " ".join(train.doubts(configure("/none", *overrides)))
    assert said in notes if said else "correct" not in notes


def test_a_loss_that_is_not_finite_stops_the_run(written, configure):
    # class 0 alone counts, one volume a step: most steps have a weight of 0 in all
    with pytest.raises(ValueError, match="train loss, gradient or prediction is not finite in epoch 1; lower train.lr_head"):
        train.main(0, configure(written, "train.class_weights=[1,0,0,0]", "data.batch_size=1"))


def test_rerun_into_the_same_folder_leaves_nothing_stale(written, configure):
    cfg = configure(written)
    train.main(0, cfg)
    evaluation.evaluate_run(cfg.paths.run_dir, "test")
    train.main(0, configure(written, "train.epochs=2"))
    assert not os.path.exists(f"{cfg.paths.run_dir}/eval_test.json") and not os.listdir(f"{cfg.paths.run_dir}/plots")
    assert len(read_run(cfg)[0]) == 2


def test_a_run_shorter_than_the_warm_up_runs(written, configure, capsys):
    cfg = configure(written, "train.epochs=2", "train.warmup_epochs=5")
    train.main(0, cfg)
    history, _, _ = read_run(cfg)
    assert len(history) == 2 and history[-1]["train/lr_head"] == pytest.approx(0.4 * 0.003)
    assert "train.warmup_epochs=5 lasts all 2 epochs of the head" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["a folder of other things", "a file", "where the encoder lies", "below a file"])
def test_a_run_dir_that_is_not_a_runs_is_refused_before_anything_is_computed(written, configure, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(model, "load_encoder", lambda *a: pytest.fail("computed something"))
    mine, encoder = tmp_path / "mine", TINY
    if kind == "a file":
        mine.write_text("precious")
    elif kind == "below a file":
        (tmp_path / "file").write_text("precious")
        mine = tmp_path / "file" / "run"
    else:
        (mine / "plots").mkdir(parents=True)
        (mine / "report.html").write_text("precious")
        if kind == "where the encoder lies":
            (mine / "provenance.json").write_text("{}")
            encoder = str(shutil.copy(TINY, mine / "last.pt"))
    with pytest.raises(ValueError, match="paths.run_dir="):
        train.main(0, configure(written, f"paths.run_dir={mine}", f"paths.checkpoint_path={encoder}"))
    if mine.is_dir():
        assert (mine / "report.html").read_text() == "precious"


def test_a_rerun_removes_only_what_runs_write(written, configure):
    cfg = configure(written)
    train.main(0, cfg)
    os.makedirs(f"{cfg.paths.run_dir}/plots")
    open(f"{cfg.paths.run_dir}/plots/my_figure.png", "w").close()
    open(f"{cfg.paths.run_dir}/notes.txt", "w").close()
    train.main(0, cfg)
    assert os.path.exists(f"{cfg.paths.run_dir}/plots/my_figure.png") and os.path.exists(f"{cfg.paths.run_dir}/notes.txt")


# ----------------------------------------------------------------------------------------------------- evaluation's edges


def test_the_last_checkpoint_does_not_pass_for_the_best(written, configure):
    cfg = configure(written, "train.epochs=15", "train.lr_head=0.02", "train.early_stopping.enabled=false")
    train.main(0, cfg)
    _, best, last = read_run(cfg)
    before = read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")
    result, folder = evaluation.evaluate_run(f"{cfg.paths.run_dir}/last.pt", "val")
    assert result["epoch"] == 15 != best["epoch"] and folder == f"{cfg.paths.run_dir}/last"
    assert result["log_loss"] == pytest.approx(last["val_loss"]) and os.path.exists(f"{folder}/eval_val.json")
    assert not os.path.exists(f"{cfg.paths.run_dir}/eval_val.json")
    assert np.array_equal(before[2], read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2])


def test_evaluation_refuses_what_would_not_be_the_trained_thing(written, configure, tmp_path):
    cfg = configure(written)
    train.main(0, cfg)
    run = cfg.paths.run_dir
    other = torch.load(TINY, weights_only=False, pickle_module=__import__("types").SimpleNamespace(
        Unpickler=model.SafeUnpickler, __name__="safe"))
    other["model_state_dict"]["context_encoder.norm.bias"] += 1
    other["config"] = {"image_size": [16, 64, 64]}
    torch.save(other, tmp_path / "other.pt")
    for override, message in ((f"paths.checkpoint_path={tmp_path}/other.pt", "the head was trained on"),
                              ("model.pool_method=max", "would score something else"), ("paths.data=/none", "set paths.data")):
        with pytest.raises((ValueError, OSError), match=message):
            evaluation.evaluate_run(run, "test", [override])
    with pytest.raises(FileNotFoundError, match="is not there; train first"):
        evaluation.evaluate_run(str(tmp_path / "nowhere"), "test")
    for content in (b"", b"junk", open(TINY, "rb").read()):
        (tmp_path / "junk.pt").write_bytes(content)
        with pytest.raises(ValueError, match="junk.pt is not a checkpoint of this train.py"):
            evaluation.evaluate_run(str(tmp_path / "junk.pt"), "test")
    saved = torch.load(f"{run}/{evaluation.BEST}", weights_only=True)
    for change, message in ((lambda s: s.pop("config"), "is not a checkpoint of this train.py"),
                            (lambda s: s["head"].pop("2.bias"), "not loaded")):
        damaged = {**saved, "head": dict(saved["head"])}
        change(damaged)
        torch.save(damaged, tmp_path / "damaged.pt")
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate_run(str(tmp_path / "damaged.pt"), "test")
    assert not os.path.exists(f"{run}/eval_test.json")


def test_participants_that_moved_from_train_to_test_raise_an_alarm(dataset, configure):
    cfg = configure(dataset)
    train.main(0, cfg)
    moved = data.read_ledger(cfg).of("train")[0].participant_id
    edit(dataset / "participants.tsv", lambda t: "".join(
        line.replace("\ttrain\t", "\ttest\t") if line.startswith(moved) else line for line in t.splitlines(True)))
    with pytest.raises(ValueError, match="participants.tsv in .* changed since .* was trained; "
                                         "put that back, train again, or name the other data"):
        evaluation.evaluate_run(cfg.paths.run_dir, "test")
    result, _ = evaluation.evaluate_run(cfg.paths.run_dir, "test", [f"paths.data={dataset}"])
    assert f"1 participants of test were trained on: {moved}" in result["alarms"]
    assert f"participants.tsv of {dataset} is not what this run was trained with" in result["alarms"]


def test_missing_participants_raise_an_alarm(dataset, configure):
    cfg = configure(dataset, "data.max_missing=1")
    train.main(0, cfg)
    victim = data.read_ledger(cfg).of("test")[0].participant_id
    for s in data.read_ledger(cfg).of("test"):
        if s.participant_id == victim:
            os.remove(s.path)
    result, _ = evaluation.evaluate_run(cfg.paths.run_dir, "test")
    assert "1 labelled participants of test have no volume and are not scored" in result["alarms"]
    other = next(s for s in data.read_ledger(cfg).of("test") if s.participant_id != victim)
    os.remove(other.path)
    result, _ = evaluation.evaluate_run(cfg.paths.run_dir, "test")
    assert f"1 participants of test lack some of their volumes: {other.participant_id}" in result["alarms"]


# ----------------------------------------------------------------------------------- bad input: one sentence, exit code 1


def damage(root, kind):
    """Damage the data set -> what the message must hold."""
    path = data.read_ledger(config.load(os.path.join(ROOT, "configs", "demo.yaml"), [f"paths.data={root}"])).of("train")[0].path
    participant = path.split("/")[-2]
    if kind == "truncated DICOM":
        content = open(path, "rb").read()
        open(path, "wb").write(content[:len(content) // 2])
        return f"participant {participant} ({path} is not a readable OCT volume"
    if kind == "DICOM without pixels":
        import pydicom
        ds = pydicom.dcmread(path)
        del ds.PixelData
        ds.save_as(path)
        return f"participant {participant} ({path} is not a readable OCT volume: no pixel data"
    if kind == "manifest points outside":
        edit(root / "retinal_oct" / "manifest.tsv", lambda t: t.replace("/retinal_oct/structural_oct", "/../secret", 1))
        return "points outside the data folder"
    if kind == "labels without column":
        edit(root / "participants.tsv", lambda t: t.replace("study_group", "group", 1))
        return "has no column 'study_group'"
    if kind == "unknown study_group":
        edit(root / "participants.tsv", lambda t: t.replace("insulin_dependent", "type_3", 1))
        return "unknown study_group 'type_3'"
    if kind == "two splits":
        edit(root / "participants.tsv", lambda t: t + t.splitlines(True)[1].replace("\ttrain\t", "\tVAL\t")
             .replace("\tval\t", "\ttrain\t").replace("\tVAL\t", "\tval\t").replace("\ttest\t", "\ttrain\t"))
        return "is in two splits"
    if kind == "nobody there":
        os.remove(path)
        for s in os.listdir(os.path.dirname(path)):
            os.remove(os.path.join(os.path.dirname(path), s))
        return "labelled participants have no volume"
    os.remove(root / "participants.tsv")
    return "participants.tsv is not there; set paths.data"


@pytest.mark.parametrize("kind", ["truncated DICOM", "DICOM without pixels", "manifest points outside", "labels without column",
                                  "unknown study_group", "two splits", "nobody there", "no labels"])
def test_bad_data_stops_with_a_sentence_and_writes_no_run(dataset, command, tmp_path, kind):
    message = damage(dataset, kind)
    result = command("train.py", "--config", "configs/demo.yaml", root=dataset)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: ") and message in last and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists() and not glob.glob(f"{tmp_path}/**/*.part", recursive=True)


@pytest.mark.parametrize("override, message", [
    ("paths.checkpoint_path=/none/encoder.pt", "error: paths.checkpoint_path=/none/encoder.pt is not there"),
    ("paths.data=/none", "error: paths.data=/none: participants.tsv is not there; set paths.data"),
    ("paths.data=s3://bucket/ai-readi", "error: s3://bucket/ai-readi is no place to read from: write b2://BUCKET/KEY"),
    ("paths.cache_dir=b2://bucket/cache", "error: paths.cache_dir=b2://bucket/cache: results and caches are written to a local folder"),
    ("paths.cache_dir=/dev/null/cache", "error: paths.cache_dir=/dev/null/cache cannot be written, for /dev/null cannot"),
    ("model.emb_dim=768", "error: model.emb_dim is 768, but the encoder of"),
    ("data.image_size=[16,64,128]", "do not fit the encoder"),
    ("train.lr_hed=1", "did you mean 'train.lr_head'?"),
    ("device.backend=cuda", "error: device.backend=cuda finds no GPU"),
    ("data.scanner=zeiss", "error: "),
])
def test_bad_settings_stop_with_a_sentence(written, command, tmp_path, override, message):
    if override == "device.backend=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = command("train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path), override)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["truncated", "runs code", "missing keys"])
def test_bad_checkpoints_stop_with_a_sentence(written, command, tmp_path, kind):
    path, ran = tmp_path / "encoder.pt", tmp_path / "ran"
    content = open(TINY, "rb").read()
    if kind == "truncated":
        path.write_bytes(content[:len(content) // 2])
    else:
        class RunsCode:
            def __reduce__(self):
                return os.system, (f"touch {ran}",)
        torch.save({"model_state_dict": {"context_encoder.pos_embed": torch.zeros(1, 64, 128)},
                    **({"x": RunsCode()} if kind == "runs code" else {})}, path)
    result = command("train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path), f"paths.checkpoint_path={path}")
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert {"truncated": "is not a checkpoint", "runs code": "posix.system", "missing keys": "missing"}[kind] in result.stderr
    assert not ran.exists() and not (tmp_path / "run").exists()


def test_the_exit_code_of_the_real_process(tmp_path):
    result = subprocess.run([sys.executable, "train.py", "--config", str(tmp_path / "none.yaml")], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode == 1 and result.stderr.startswith("error: ") and "none.yaml" in result.stderr
            and len(result.stderr.splitlines()) == 1)


def test_real_configs_say_within_seconds_what_to_set(command):
    result = command("train.py", "--config", "configs/single_domain_01.yaml")
    assert result.returncode == 1 and result.stderr.startswith("error: b2:// needs a key: "
                                                               "set B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY in")


def test_a_full_disk_stops_with_a_sentence_and_leaves_no_half_file(written, tmp_path):
    """No file may grow over 20 kB, as on a disk that fills: the first cached volume (131 kB) cannot be written."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    result = subprocess.run([sys.executable, "train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path)],
                            capture_output=True, text=True, cwd=ROOT, preexec_fn=limit)
    last = result.stderr.strip().splitlines()[-1]
    assert (result.returncode == 1 and last.startswith("error: ") and "not written" in last and "volumes" in last
            and "Traceback" not in result.stderr)
    assert not (tmp_path / "run").exists() and not glob.glob(f"{tmp_path}/**/*.part", recursive=True)


def test_killed_while_training_then_run_again(written, tmp_path, command):
    args = ["train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path), "train.epochs=400",
            "train.early_stopping.enabled=false"]
    process = subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch   5"):
            process.kill()
            break
    process.wait()
    torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.load(tmp_path / "run" / evaluation.BEST, weights_only=True)
    result = command(*args[:-2], "train.epochs=6")
    assert result.returncode == 0 and "replacing an earlier run" in result.stdout
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        assert len(f.readlines()) == 6


# --------------------------------------------------------------------------------------------------------------- W&B


@pytest.mark.slow
def test_wandb_offline_and_disabled(written, tmp_path):
    def go(mode, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path), **env}
        return subprocess.run([sys.executable, "train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path),
                               f"log.wandb={mode}"], capture_output=True, text=True, cwd=ROOT, env=clean)
    result = go("auto")  # no key: offline
    assert result.returncode == 0, result.stderr
    run, = glob.glob(f"{tmp_path}/run/wandb/offline-run-*/run-*.wandb")
    content = open(run, "rb").read()
    assert b"val/balanced_accuracy" in content and b"demo_linear_probe" in content and b"3d-oct-foundation-model" in content

    (tmp_path / "no_wandb").mkdir()
    (tmp_path / "no_wandb" / "wandb.py").write_text("raise ImportError('not installed')\n")
    without = {"PYTHONPATH": str(tmp_path / "no_wandb")}
    assert go("disabled", **without).returncode == 0
    refused = go("auto", **without)
    assert refused.returncode == 1 and "pip install wandb, or set log.wandb=disabled" in refused.stderr
