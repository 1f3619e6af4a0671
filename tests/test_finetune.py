"""Training the encoder: when, how fast, from what; and that micro-batches, processes, kills and workers change nothing."""

import csv
import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT, TINY, edit, settings
from sklearn.utils.class_weight import compute_class_weight
from test_processes import KILLED_IN_SAVE, predictions, same_run
from test_stream import start
from test_train import read_predictions, read_run

import b2
import config
import data
import device
import eval as evaluation
import model
import train

FULL = {"flip": 0.5, "intensity_jitter": 0.1, "random_crop": 0.2, "rotation": 5.0}
TUNE = ["model.freeze_encoder=true", "model.unfreeze_at_epoch=1", "model.drop_path=0.1", "model.head.hidden=8",
        "model.head.dropout=0.2", "train.epochs=3", "data.batch_size=10", "train.lr_encoder=1e-3", "train.grad_clip=1",
        "train.micro_batch=4",
        *(f"data.augment.{name}=true" for name in FULL)]


def tuned(root, folder, *more):
    return [*settings(root, folder), "device.backend=cpu", *TUNE, *more]


def probe_of(root, folder, *more):
    return config.load(os.path.join(ROOT, "configs", "demo.yaml"), [*settings(root, folder), *more])


def cfg_of(root, folder, *more):
    return config.load(os.path.join(ROOT, "configs", "demo.yaml"), tuned(root, folder, *more))


# --------------------------------------------------------------------------------------------------------- when and how fast


@pytest.mark.parametrize("overrides, first", [(["model.unfreeze_at_epoch=2"], 3),
                                              (["model.freeze_encoder=false", "model.unfreeze_at_epoch=-1"], 1),
                                              (["model.unfreeze_at_epoch=0"], 1),
                                              (["model.unfreeze_at_epoch=-1", "model.drop_path=0"], None)])
def test_the_encoder_changes_from_its_epoch_on_and_not_before(written, tmp_path, monkeypatch, overrides, first):
    cfg = cfg_of(written, tmp_path, "train.epochs=4", "train.early_stopping.enabled=false", *overrides)
    encoders, hashes, lines = [], [], train.epoch_lines
    monkeypatch.setattr(model, "load_encoder", lambda *a, real=model.load_encoder: encoders.append(real(*a)) or encoders[-1])
    monkeypatch.setattr(train, "epoch_lines", lambda *a: hashes.append(model.weights_hash(encoders[0])) or lines(*a))
    train.main(0, cfg)
    pretrained = model.weights_hash(model.load_encoder(TINY))
    assert [h != pretrained for h in hashes] == [first is not None and epoch >= first for epoch in range(1, 5)]
    trained = hashes[first - 1:] if first else []
    assert len(set(trained)) == len(trained)  # and in every epoch anew
    history, best, last = read_run(cfg)
    assert ("encoder" in best) == (first is not None and best["epoch"] >= first) and ("encoder" in last) == (first is not None)
    # every parameter has moved, positions and the first layer too
    if first:
        fresh = model.load_encoder(TINY).state_dict()
        assert all(not torch.equal(last["encoder"][k], v) for k, v in fresh.items())
    # each part's own schedule, begun with the part; the record holds that of the epoch's last step
    steps = -(-last["volumes"][0] // 10)
    for r in history:
        begun = (first or 9) - 1
        now = (r["epoch"] - begun) * steps - 1
        expected = train.lr_at(now, (4 - begun) * steps, steps, 1e-3) if r["epoch"] > begun else 0
        assert (r["train/lr_encoder"] == pytest.approx(expected)
                and r["train/lr_head"] == pytest.approx(train.lr_at(r["epoch"] * steps - 1, 4 * steps, steps, 0.003)))


def test_layer_wise_rates_are_the_formulas():
    torch.manual_seed(0)
    encoder, head = model.ViT3D(64, 3, 8), model.Head(64, 4, hidden=8)
    groups = model.parameter_groups(head, encoder, 0.1, 0.01, 0.5, 0.05)
    found = {id(p): (g["peak"], g["weight_decay"], g["part"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(encoder.parameters())) + len(list(head.parameters()))
    rates = {"pos_embed": 0.01 / 16, "patch_embed.proj.weight": 0.01 / 16, "patch_embed.proj.bias": 0.01 / 16,
             "norm.weight": 0.01, "norm.bias": 0.01}
    for name, p in encoder.named_parameters():
        rate = rates.get(name) or 0.01 * 0.5 ** (3 - int(name.split(".")[1]))
        decay = 0.0 if name == "pos_embed" or name.endswith("bias") or "norm" in name else 0.05
        assert found[id(p)] == (pytest.approx(rate), decay, "encoder"), name
    assert [found[id(p)] for p in head.parameters()] == [(0.1, 0.05, "head"), (0.1, 0.0, "head")] * 2


def test_early_stopping_waits_for_the_encoder(written, tmp_path):
    cfg = cfg_of(written, tmp_path, "train.epochs=9", "model.unfreeze_at_epoch=4", "train.lr_encoder=0", "train.lr_head=0",
                 "train.early_stopping.patience=2")
    train.main(0, cfg)
    assert [r["epoch"] for r in read_run(cfg)[0]] == [1, 2, 3, 4, 5, 6, 7]  # 6 and 7 bring nothing; before 5 nothing counts


def test_it_overfits_eight_volumes(dataset, tmp_path):
    cfg = cfg_of(dataset, tmp_path)
    kept, volumes = set(), 0
    for s in data.read_ledger(cfg).of("train"):
        kept.add(s.participant_id) if volumes < 8 else None
        volumes += volumes < 8
    edit(dataset / "participants.tsv", lambda t: "".join(
        line if line.split("\t")[0] in kept or "\ttrain\t" not in line else line.replace("\tTRUE", "\tFALSE")
        for line in t.splitlines(True)))
    cfg = cfg_of(dataset, tmp_path, "train.epochs=40", "train.class_weights=none", "train.lr_encoder=1e-3",
                 "train.early_stopping.enabled=false", "train.layer_decay=1", "model.head.dropout=0", "model.drop_path=0",
                 *(f"data.augment.{name}=false" for name in FULL))
    train.main(0, cfg)
    history, _, last = read_run(cfg)
    assert 8 <= last["volumes"][0] <= 10 and history[-1]["train/loss"] < 0.01 and history[-1]["train/balanced_accuracy"] == 1


# ---------------------------------------------------------------------------------------------- what must change nothing


@pytest.fixture(scope="module")
def alone(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    cfg = cfg_of(written, folder, "train.save_every=2")
    train.main(0, cfg)
    assert "encoder" in read_run(cfg)[1]  # the best is a fine-tuned one: else comparing predictions would show nothing
    return folder


def same_encoder(a, b, most):
    """Largest difference of the weights in two runs' last.pt."""
    a, b = (torch.load(f"{folder}/run/last.pt", weights_only=True)["encoder"] for folder in (a, b))
    return max((a[k] - b[k]).abs().max() for k in a) <= most


@pytest.mark.parametrize("overrides", [["train.micro_batch=10"], ["train.micro_batch=3"], ["train.activation_checkpointing=false"],
                                       pytest.param(["data.num_workers=2", "data.prefetch=1", "data.cache_gb=0"], marks=pytest.mark.slow)],
                         ids=["at once", "of three", "kept activations", "workers, no cache"])
def test_memory_and_workers_do_not_change_the_result(written, alone, tmp_path, overrides):
    """Gradients accumulated over four micro-batches are those of the batch at once: dropout, drop-path and augmentation on."""
    cfg = cfg_of(written, tmp_path, *overrides)
    train.main(0, cfg)
    assert np.abs(predictions(tmp_path) - predictions(alone)).max() < 1e-5
    if overrides[0].startswith("data."):
        assert np.array_equal(predictions(tmp_path), predictions(alone))
    assert same_encoder(tmp_path, alone, 1e-5)


def test_bf16_trains_the_encoder(written, alone, tmp_path):
    cfg = cfg_of(written, tmp_path, "train.precision=bf16")
    train.main(0, cfg)
    history, best, last = read_run(cfg)
    assert {v.dtype for v in last["encoder"].values()} == {torch.float32}  # bf16 is how it computes, not what it is
    assert len(history) == 3 and not same_encoder(tmp_path, alone, 1e-4) and same_encoder(tmp_path, alone, 1e-2)
    result, _ = evaluation.evaluate_run(cfg.paths.run_dir, "val")
    assert result["log_loss"] == best["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 5])
def test_processes_do_not_change_the_result(written, alone, tmp_path, processes):
    run = start("train.py", "--config", "configs/demo.yaml", *tuned(written, tmp_path, f"device.processes={processes}"))
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert np.abs(predictions(tmp_path) - predictions(alone)).max() < 1e-5 and same_encoder(tmp_path, alone, 1e-5)
    one, many = ([json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")] for folder in (alone, tmp_path))
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a)


@pytest.mark.slow
def test_a_stratified_epoch_is_the_same_for_any_number_of_processes(written, tmp_path):
    more = ["data.sampler=stratified", "train.class_weights=none", "train.epochs=2"]
    train.main(0, cfg_of(written, tmp_path / "one", *more))
    run = start("train.py", "--config", "configs/demo.yaml", *tuned(written, tmp_path / "three", *more, "device.processes=3"))
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0 and np.abs(predictions(tmp_path / "one") - predictions(tmp_path / "three")).max() < 1e-5, errors


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    encoder, volume = model.load_encoder(TINY).train(), torch.randn(3, 1, 16, 64, 64)
    encoder.drop_path = 0.5
    gradients, calls = [], []
    checkpoint = device.checkpointing(torch.device("cpu"))
    for run in (None, lambda *args: calls.append(1) or checkpoint(*args)):
        encoder.checkpoint = run
        encoder.zero_grad()
        encoder(volume, model.Noise(7, torch.tensor([0, 2, 3]), 5)).square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert len(calls) == 2 and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_drop_path_skips_branches_in_training_only():
    torch.manual_seed(0)
    encoder, volume = model.load_encoder(TINY), torch.randn(1, 1, 16, 64, 64).expand(400, -1, -1, -1, -1)
    encoder.blocks, encoder.drop_path = encoder.blocks[:1], 0.3  # one block: its rate is the whole of it
    with torch.no_grad():
        plain = encoder(volume[:2])
        assert torch.equal(plain[0], plain[1])
        encoder.train()
        drawn = encoder(volume, model.Noise(3, torch.arange(400), 400)).mean(dim=(1, 2))
        assert not torch.equal(encoder(volume[:8]), encoder(volume[:8]))  # by itself: torch's generator
    values, counts = drawn.round(decimals=4).unique(return_counts=True)
    assert len(values) == 4  # both branches, either, none
    assert sorted((counts / 400).tolist()) == pytest.approx(sorted([0.49, 0.21, 0.21, 0.09]), abs=0.08)
    x = model.Noise(3, torch.arange(100_000), 100_000).keep(0.3, (), layer=0)
    assert x.mean() == pytest.approx(1, abs=0.01) and x.unique().tolist() == pytest.approx([0, 1 / 0.7])


@pytest.mark.parametrize("moment", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 6))])
def test_killed_within_an_epoch_and_resumed_equals_uninterrupted_bit_for_bit(written, alone, command, tmp_path, moment):
    """Killed right after a save, of which there are three in an epoch of six steps."""
    arguments = ["--config", "configs/demo.yaml", *tuned(written, tmp_path, "train.save_every=2", "train.resume=auto")]
    code = (KILLED_IN_SAVE.replace('f"{os.sep}run{os.sep}"', '"last.pt"').replace("    move(source, target)\n", "", 1)
            .replace("    if calls", "    move(source, target)\n    if calls"))
    run = subprocess.Popen([os.sys.executable, "-c", code, str(moment), *arguments], cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run.communicate(timeout=100)
    assert run.returncode == -signal.SIGKILL
    killed = torch.load(f"{tmp_path}/run/last.pt", weights_only=True)
    resumed = command("train.py", *arguments)
    where = f"epoch {killed['epoch']}" if "val_loss" in killed else f"step {killed['step']} of epoch {killed['epoch']}"
    assert resumed.returncode == 0 and f"resuming after {where} of " in resumed.stdout
    same_run_but(tmp_path, alone, "train.resume")


def same_run_but(a, b, key):
    section, name = key.split(".")
    for checkpoint in ("last.pt", evaluation.BEST):
        content = torch.load(f"{a}/run/{checkpoint}", weights_only=True)
        content["config"][section][name] = torch.load(f"{b}/run/{checkpoint}", weights_only=True)["config"][section][name]
        torch.save(content, f"{a}/run/{checkpoint}")
    same_run(a, b)


def test_sigterm_within_an_epoch_saves(written, alone, tmp_path, monkeypatch, capsys):
    cfg = cfg_of(written, tmp_path, "train.save_every=0", "train.resume=auto")
    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def count(*args):
        calls.append(1)
        if len(calls) == 9:  # the third step of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", count)
    with pytest.raises(SystemExit) as exit_:
        train.main(0, cfg)
    assert exit_.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM after step 3 of epoch 2" in capsys.readouterr().out
    result, _ = evaluation.evaluate_run(f"{tmp_path}/run/last.pt", "val")
    assert "this checkpoint was saved within epoch 2, after step 3" in result["alarms"]
    train.main(0, cfg)
    assert np.array_equal(predictions(tmp_path), predictions(alone)) and same_encoder(tmp_path, alone, 0)
    assert not os.path.exists(f"{tmp_path}/run/last/eval_val.json")  # of a checkpoint that is there no longer


@pytest.mark.slow
def test_sigterm_to_all_processes_saves_though_decoders_get_it_too(written, tmp_path):
    run = start("train.py", "--config", "configs/demo.yaml",
                *tuned(written, tmp_path, "data.num_workers=1", "data.cache_gb=0", "train.epochs=40"), start_new_session=True)
    for line in run.stdout:
        if line.startswith("epoch   2/40"):
            os.killpg(run.pid, signal.SIGTERM)
            break
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM after" in output, errors


# ------------------------------------------------------------------------------------------------ against another implementation


def test_a_run_equals_one_written_from_the_formulas(written, tmp_path):
    """Schedules, layer rates, decay, clipping, class weights and accumulation, in double precision, with an AdamW of its own."""
    head_epochs, epochs, warmup, lr_head, lr_encoder, layer_decay, weight_decay, clip, size = 1, 3, 1, 0.003, 1e-3, 0.6, 0.05, 0.7, 13
    cfg = cfg_of(written, tmp_path, f"train.layer_decay={layer_decay}", f"train.grad_clip={clip}", f"data.batch_size={size}",
                 "model.head.dropout=0", "model.drop_path=0", "train.micro_batch=5", f"train.weight_decay={weight_decay}",
                 *(f"data.augment.{name}=false" for name in FULL))
    train.main(0, cfg)
    last = read_run(cfg)[2]

    samples = data.read_ledger(cfg).of("train")
    volumes = torch.stack([data.preprocess(data.read_dicom(s.path), (16, 64, 64)).half().double()[None] for s in samples])
    labels = torch.tensor([s.label for s in samples])
    weights = torch.tensor(compute_class_weight("balanced", classes=np.arange(4),
                                                y=list({s.participant_id: s.label for s in samples}.values())))
    encoder = model.load_encoder(TINY).double()
    torch.manual_seed(42)
    head = model.Head(128, 4, 8, 0.0).double()
    with torch.no_grad():
        pretrained = encoder(volumes).mean(dim=1)
        head[0].mean.copy_(pretrained.mean(dim=0))
        head[0].std.copy_((pretrained.var(dim=0, unbiased=False) + 1e-6).sqrt())
        # as the weighted loss sees the classes: the best answer that looks at nothing is their logarithm
        shares = labels.bincount() * weights
        head[-1].bias.copy_(shares.log() - shares.log().mean())
    rates = {}
    for name, p in [*head.named_parameters(prefix="head"), *encoder.named_parameters(prefix="encoder")]:
        block = re.match(r"encoder.blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 3 if name.startswith("encoder.norm") else 0
        plain = name.endswith("bias") or "norm" in name or name.endswith("pos_embed")
        rates[name] = (p, lr_head if name.startswith("head") else lr_encoder * layer_decay ** (3 - layer), 0 if plain else weight_decay)
    steps, state = -(-len(samples) // size), {}
    for epoch in range(epochs):
        order = data.epoch_order(labels, "shuffle", 42, epoch + 1)
        for step in range(steps):
            batch = order[step * size:(step + 1) * size]
            x = encoder(volumes[batch]).mean(dim=1) if epoch >= head_epochs else pretrained[batch]
            loss = torch.nn.functional.cross_entropy(head(x), labels[batch], weight=weights)
            names = [name for name in rates if name.startswith("head") or epoch >= head_epochs]
            gradients = torch.autograd.grad(loss, [rates[name][0] for name in names])
            scale = min(1, clip / np.sqrt(sum((g ** 2).sum().item() for g in gradients)))
            for name, gradient in zip(names, gradients):
                p, peak, decay = rates[name]
                begun = 0 if name.startswith("head") else head_epochs
                now, total, warm = (epoch - begun) * steps + step, (epochs - begun) * steps, warmup * steps
                lr = peak * (now + 1) / warm if now < warm else peak / 2 * (1 + np.cos(np.pi * (now - warm) / (total - warm)))
                m, v, n = state.get(name, (0, 0, 0))
                m, v, n = 0.9 * m + 0.1 * gradient * scale, 0.999 * v + 0.001 * (gradient * scale) ** 2, n + 1
                state[name] = m, v, n
                with torch.no_grad():
                    p -= lr * decay * p + lr * (m / (1 - 0.9 ** n)) / ((v / (1 - 0.999 ** n)).sqrt() + 1e-8)
    fresh = model.load_encoder(TINY).state_dict()
    for name, (p, _, _) in rates.items():
        part, name = name.split(".", 1)
        difference = (last[part][name] - p).abs().max()
        assert difference < 2e-5, name
        if part == "encoder":
            assert (p - fresh[name]).abs().max() > 20 * difference, name  # it has moved by more than that


@pytest.mark.parametrize("change", ["model.drop_path=0", "train.grad_clip=0.01", "train.layer_decay=0.5", "train.weight_decay=1",
                                    "data.augment.flip=false", "data.augment.intensity_jitter=false", "data.augment.random_crop=0.3",
                                    "data.augment.rotation=false", "data.sampler=stratified", "train.loss=focal", "seed=43"])
def test_every_knob_turns_something(written, tmp_path, change):
    train.main(0, cfg_of(written, tmp_path, change, "model.unfreeze_at_epoch=0", "train.epochs=1"))
    train.main(0, cfg_of(written, tmp_path / "as it was", "model.unfreeze_at_epoch=0", "train.epochs=1"))
    assert not same_encoder(tmp_path, tmp_path / "as it was", 1e-6)


def test_checkpointing_is_used_where_asked_for(written, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(device, "checkpointing", lambda dev: lambda block, *args: calls.append(1) or block(*args))
    train.main(0, cfg_of(written, tmp_path, "train.epochs=2"))
    blocks, micro_batches = 2, 6 * 3  # one epoch of 58 volumes, ten a step, four at once; the last ones are padding
    assert len(calls) == blocks * micro_batches
    train.main(0, cfg_of(written, tmp_path, "train.epochs=2", "train.activation_checkpointing=false"))
    assert len(calls) == blocks * micro_batches


def test_every_epoch_sees_another_view(written, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(model.ViT3D, "forward", lambda self, x, noise=None, real=model.ViT3D.forward:
                        (seen.extend(v for v in x if v.any()) if self.training else None) or real(self, x, noise))
    cfg = cfg_of(written, tmp_path, "model.unfreeze_at_epoch=0", "train.epochs=2", "train.micro_batch=1")
    train.main(0, cfg)
    samples = data.read_ledger(cfg).of("train")
    n = len(samples)
    volumes = data.Volumes(samples, (16, 64, 64), cfg.paths.cache_dir)
    assert len(seen) == 2 * n
    for epoch in (1, 2):
        order = data.epoch_order(torch.tensor([s.label for s in samples]), "shuffle", 42, epoch)
        for x, i in zip(seen[(epoch - 1) * n:epoch * n], order.tolist()):
            key, volume = volumes.load(i)
            expected = data.augment(volume, {"flip": 0.5, "intensity_jitter": 0.1, "random_crop": 0.1, "rotation": 5.0},
                                    f"42 {epoch} {key}")
            assert torch.equal(x, expected.float()) and not torch.equal(x, volume.float())


# --------------------------------------------------------------------------------------------------------- evaluation, faults


def test_eval_scores_the_fine_tuned_encoder(written, alone, tmp_path):
    history, best, last = read_run(cfg_of(written, alone))
    before = read_predictions(f"{alone}/run/predictions_val.csv")
    result, _ = evaluation.evaluate_run(f"{alone}/run", "val")
    assert np.array_equal(before[2], read_predictions(f"{alone}/run/predictions_val.csv")[2]) and result["epoch"] == best["epoch"] > 1
    assert result["balanced_accuracy"] == pytest.approx(max(h["val/balanced_accuracy"] for h in history))
    encoder, head = model.load_encoder(TINY), model.Head(128, 4, 8, 0.2).eval()
    encoder.load_state_dict(best["encoder"])
    head.load_state_dict(best["head"])
    answers = {}
    with torch.no_grad():  # by hand
        for s in data.read_ledger(cfg_of(written, alone)).of("val"):
            tokens = encoder(data.preprocess(data.read_dicom(s.path), (16, 64, 64)).half().float()[None, None])
            answers.setdefault(s.participant_id, []).append(head(tokens.mean(1)).softmax(1)[0].numpy())
    assert np.abs(before[2] - np.stack([np.mean(answers[i], axis=0) for i in before[0]])).max() < 1e-5
    result, _ = evaluation.evaluate_run(f"{alone}/run/last.pt", "val")
    assert result["log_loss"] == pytest.approx(last["val_loss"]) and result["epoch"] == 3
    del last["encoder"]["norm.bias"]
    torch.save(last, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="broken.pt: not loaded: .*norm.bias"):
        evaluation.evaluate_run(str(tmp_path / "broken.pt"), "val")


@pytest.mark.parametrize("damage, message", [
    (lambda content: content[:len(content) // 2], "not a zip file"), (lambda content: b"", "not a zip file"),
    (lambda content: b"text", "not a zip file"),
    (lambda content: content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1:],
     "is damaged|CRC")])
def test_a_damaged_checkpoint_is_neither_resumed_nor_scored(written, alone, tmp_path, damage, message):
    os.makedirs(f"{tmp_path}/run")
    for name in os.listdir(f"{alone}/run"):
        if os.path.isfile(f"{alone}/run/{name}"):
            content = open(f"{alone}/run/{name}", "rb").read()
            open(f"{tmp_path}/run/{name}", "wb").write(damage(content) if name.endswith(".pt") else content)
    before = sorted(os.listdir(f"{tmp_path}/run"))
    with pytest.raises(ValueError, match=f"last.pt is not a checkpoint of this train.py: .*({message}).*; "
                                         "set train.resume=never to replace the run"):
        train.main(0, cfg_of(written, tmp_path, "train.resume=auto", f"paths.cache_dir={alone}/cache"))
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_run(f"{tmp_path}/run", "val")
    assert sorted(os.listdir(f"{tmp_path}/run")) == before


@pytest.mark.parametrize("change, message", [
    (lambda last: last.pop("step"), "KeyError 'step'; set train.resume=never"),
    (lambda last: last.update(encoder={f"_orig_mod.{k}": v for k, v in last["encoder"].items()}),
     "last.pt does not fit this model: .*; set train.resume=never"),
])
def test_a_checkpoint_of_another_version_is_not_resumed(written, alone, tmp_path, change, message):
    last = torch.load(f"{alone}/run/last.pt", weights_only=True)
    change(last)
    last["config"]["train"]["resume"] = "auto"
    os.makedirs(f"{tmp_path}/run")
    torch.save(last, f"{tmp_path}/run/last.pt")
    open(f"{tmp_path}/run/provenance.json", "w").write("{}")
    with pytest.raises(ValueError, match=message):
        train.main(0, cfg_of(written, tmp_path, "train.resume=auto", f"paths.cache_dir={alone}/cache"))


def test_what_a_kill_left_goes_with_the_next_start(written, tmp_path):
    cfg = cfg_of(written, tmp_path, "train.epochs=2", "train.resume=auto")
    for _ in range(2):  # a run anew, and one that is resumed
        os.makedirs(f"{tmp_path}/run", exist_ok=True)
        open(f"{tmp_path}/run/provenance.json", "a").close()
        open(f"{tmp_path}/run/last.pt.0123.part", "w").close()
        train.main(0, cfg)
        assert not [name for name in os.listdir(f"{tmp_path}/run") if name.endswith(".part")]


def test_what_cannot_train_stops_before_the_earlier_run_is_gone(dataset, tmp_path, monkeypatch):
    cfg = cfg_of(dataset, tmp_path, "train.epochs=2")
    train.main(0, cfg)
    edit(dataset / "participants.tsv", lambda t: "".join(
        line.replace("\tTRUE", "\tFALSE") if "\ttrain\t" in line and "insulin_dependent" in line else line
        for line in t.splitlines(True)))
    before = sorted(os.listdir(cfg.paths.run_dir))
    monkeypatch.setattr(model.ViT3D, "forward", lambda *a: pytest.fail("encoded something"))
    for more, message in ((["data.sampler=stratified", "train.class_weights=none"], "no training volume is of class 3"),
                          ([], "class_weights 'auto' needs every one")):
        with pytest.raises(ValueError, match=message):
            train.main(0, cfg_of(dataset, tmp_path, *more))
    assert sorted(os.listdir(cfg.paths.run_dir)) == before


def test_an_encoder_that_diverges_is_said_by_its_key(written, tmp_path):
    with pytest.raises(ValueError, match=r"lower train.*lr_encoder=1e\+30"):
        train.main(0, cfg_of(written, tmp_path, "train.lr_encoder=1e30", "data.batch_size=1000", "train.warmup_epochs=0",
                             "train.grad_clip=0"))


def test_a_warm_up_that_lasts_all_of_the_encoders_epochs_is_said(written, tmp_path, capsys):
    train.main(0, cfg_of(written, tmp_path, "train.warmup_epochs=2", "train.epochs=3"))
    assert "note: train.warmup_epochs=2 lasts all 2 epochs of the encoder" in capsys.readouterr().out


def test_a_volume_lost_between_two_views_stops_the_run(dataset, tmp_path, monkeypatch):
    cfg = probe_of(dataset, tmp_path, "data.cache_gb=0", "data.max_missing=5", "data.augment.flip=true", "data.augment_views=2")
    victim, passes = data.read_ledger(cfg).of("train")[3], []
    monkeypatch.setattr(evaluation, "features", lambda *args, real=evaluation.features: (
        passes.append(1), len(passes) == 2 and open(victim.path, "wb").write(b"damaged"), real(*args))[-1])
    with pytest.raises(ValueError, match=f"could be read before cannot be read now: unreadable: participant {victim.participant_id}"):
        train.main(0, cfg)


def test_the_epoch_log_shows_composition_and_imbalance(alone):
    with open(f"{alone}/run/metrics.jsonl") as f:
        history = [json.loads(line) for line in f]
    with open(f"{alone}/run/ledger.csv") as f:
        volumes = [sum(int(r["volumes"]) for r in csv.DictReader(open(f"{alone}/run/ledger.csv"))
                       if (r["split"], r["label"]) == ("train", str(k))) for k in range(4)]
    for r in history:
        assert [r[f"train/drawn_{k}"] for k in range(4)] == volumes
        assert (sum(r[f"train/predicted_share_{k}"] for k in range(4)) == pytest.approx(1)
                and sum(r[f"val/predicted_share_{k}"] for k in range(4)) == pytest.approx(1))
        assert r["gap/balanced_accuracy"] == pytest.approx(r["train/balanced_accuracy"] - r["val/balanced_accuracy"])
        weights = [sum(volumes) / (4 * v) for v in volumes]
        assert all(r[f"train/loss_{k}"] > 0 for k in range(4)) and r["train/grad_norm"] > 0
        by_class = (sum(w * v * r[f"train/loss_{k}"] for k, (w, v) in enumerate(zip(weights, volumes)))
                    / sum(w * v for w, v in zip(weights, volumes)))
        assert r["train/loss"] == pytest.approx(by_class, rel=0.1)  # a mean of batches, weights by participants: alike, not equal


def test_a_volume_that_vanishes_while_training_stops_the_run(dataset, tmp_path, monkeypatch):
    cfg = cfg_of(dataset, tmp_path, "data.cache_gb=0", "data.max_missing=5")
    victim = data.read_ledger(cfg).of("train")[3]
    lines = train.epoch_lines
    monkeypatch.setattr(train, "epoch_lines", lambda r, n: (os.remove(victim.path) if r["epoch"] == 1 else None) or lines(r, n))
    with pytest.raises((ValueError, OSError), match=f"participant {victim.participant_id}: .*{os.path.basename(victim.path)}"):
        train.main(0, cfg)
    assert len(read_run(cfg_of(dataset, tmp_path))[0]) == 1


def test_a_full_disk_under_a_large_checkpoint_is_one_sentence(tmp_path):
    import resource

    code = ("import resource, signal, torch, b2\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"b2.write('{tmp_path}/last.pt', lambda f: torch.save({{'a': torch.zeros(100_000)}}, f))")
    assert resource
    done = subprocess.run([os.sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OSError: [Errno 27] not written: File too large" in done.stderr and os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError, match="mine"):  # not the disk's
        b2.write(tmp_path / "x", lambda f: (_ for _ in ()).throw(RuntimeError("mine")))


# --------------------------------------------------------------------------------------------------------- augmentation


@pytest.fixture()
def volume():
    return torch.randn(1, 8, 24, 24, generator=torch.Generator().manual_seed(0)).half()


def test_strength_nothing_is_the_identity_and_the_key_decides(volume):
    for strength in ({}, dict.fromkeys(FULL, 0), dict.fromkeys(FULL, 0.0)):
        assert torch.equal(data.augment(volume, strength, "a"), volume)
    views = [data.augment(volume, FULL, key) for key in ("a", "a", "b", "42 1 abc")]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2]) and not torch.equal(views[2], views[3])
    for view in views:
        assert view.shape == volume.shape and view.dtype == volume.dtype and torch.isfinite(view).all()
    assert torch.equal(data.augment(torch.zeros_like(volume), {**FULL, "intensity_jitter": 0}, "a"), torch.zeros_like(volume))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    data.augment(volume, FULL, "a")
    assert torch.equal(state, torch.get_rng_state())  # nobody else's random numbers


def test_flips_mirror_frames_and_columns_and_never_depth(volume):
    both = volume.numpy()[:, ::-1, :, ::-1]
    assert np.array_equal(data.augment(volume, {"flip": 1.0}, "a").numpy(), both)
    kinds = {"as it is": volume.numpy(), "frames": volume.numpy()[:, ::-1], "columns": volume.numpy()[..., ::-1], "both": both}
    seen = [next(name for name, kind in kinds.items() if np.array_equal(view, kind))
            for view in (data.augment(volume, {"flip": 0.5}, str(i)).numpy() for i in range(200))]
    assert all(30 <= seen.count(name) <= 70 for name in kinds)


def test_intensity_is_a_line_within_its_strength(volume):
    gains, shifts = [], []
    x = volume.float().flatten().numpy()
    for i in range(100):
        gain, shift = np.polyfit(x, data.augment(volume.float(), {"intensity_jitter": 0.2}, str(i)).flatten().numpy(), 1)
        gains.append(gain)
        shifts.append(shift)
    for values, middle in ((gains, 1), (shifts, 0)):
        assert max(abs(v - middle) for v in values) <= 0.2001 and min(values) < middle - 0.15 and max(values) > middle + 0.15


def test_crops_show_a_window_of_the_volume():
    """On ramps: what comes out is a line whose slope is the share that is left, and nothing from outside."""
    shape, windows = (32, 64, 64), []
    for axis in range(3):
        ramp = (torch.arange(shape[axis]) + 0.5).reshape([-1 if a == axis else 1 for a in range(3)]).expand(shape)[None]
        for i in range(50):
            seen = data.augment(ramp.contiguous(), {"random_crop": 0.3}, str(i))[0].movedim(axis, 0).flatten(1)
            assert (seen.max(dim=1).values - seen.min(dim=1).values).max() < 1e-3  # along the others nothing changes
            line = seen[2:-2, 0]  # half a voxel at the border is replicated
            slope = (line[1:] - line[:-1]).mean().item()
            assert 0.7 - 1e-3 <= slope <= 1 + 1e-3 and line.min() >= 0 and line.max() <= shape[axis]
            windows.append((axis, slope))
    assert all(min(s for a, s in windows if a == axis) < 0.75 and max(s for a, s in windows if a == axis) > 0.95 for axis in range(3))


def test_rotation_equals_scipys():
    smooth = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(6, 33, 33)), (0, 3, 3)).astype(np.float32)
    angle = 0.2
    turned = data.resample(torch.from_numpy(smooth), angle, (1, 1), (0, 0)).numpy()
    centre = np.array([16.0, 16.0])
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # (row, column) in <- out
    expected = np.stack([scipy.ndimage.affine_transform(p, matrix, centre - matrix @ centre, order=1, mode="nearest") for p in smooth])
    assert np.abs(turned - expected).max() < 1e-5
    lateral = data.augment(torch.from_numpy(smooth).repeat(6, 1, 1)[:33].transpose(0, 1)[None].contiguous(), {"rotation": 30.0}, "x")
    assert torch.isfinite(lateral).all()


def test_the_rotation_is_small_and_in_two_planes():
    """A bright rod along the columns, in the middle: rotation in the B-scan moves its ends in rows, in the lateral plane in frames."""
    rod = torch.zeros(1, 65, 65, 65)
    rod[:, 31:34, 31:34] = 1
    ends = []
    for i in range(60):
        end = data.augment(rod, {"rotation": 10.0}, str(i))[0, :, :, 60]  # (frames, rows), 28 columns off the middle
        ends.append([(end.sum(dim=1) @ torch.arange(65.0) / end.sum() - 32).item(),
                     (end.sum(dim=0) @ torch.arange(65.0) / end.sum() - 32).item()])
    most = 28 * np.tan(np.radians(10))
    frames, rows = np.abs(np.array(ends)).T
    assert frames.max() <= most / np.cos(np.radians(10)) + 0.3 and rows.max() <= most + 0.3 and min(frames.max(), rows.max()) > 0.7 * most


def test_views_are_encoded_once_and_all_are_trained_on(written, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(model.ViT3D, "forward", lambda self, x, noise=None, real=model.ViT3D.forward:
                        calls.append(x.clone()) or real(self, x, noise))
    augment = [f"data.augment.{name}=true" for name in FULL]

    def run(*overrides):
        calls.clear()
        train.main(0, probe_of(written, tmp_path, *overrides))
        return len(calls), read_predictions(f"{tmp_path}/run/predictions_val.csv")[2]

    ledger = data.read_ledger(cfg_of(written, tmp_path))
    n, m = len(ledger.of("train")), len(ledger.of("val"))
    rows = set()
    monkeypatch.setattr(model.Head, "forward", lambda self, x, noise=None, real=model.Head.forward: (
        rows.update(r.numpy().tobytes() for r in x) if self.training else None) or real(self, x, noise))
    plain = run()
    assert plain[0] == n + m and len(rows) == n
    three = run(*augment, "data.augment_views=3")
    assert three[0] == 3 * n and not np.array_equal(three[1], plain[1])
    assert len({c.flatten()[:1000].sum().item() for c in calls}) == 3 * n  # each view is another
    assert len(rows) > 3 * n  # six epochs, each drawing from four
    again = run(*augment, "data.augment_views=3")
    assert again[0] == 0 and np.array_equal(again[1], three[1])
    assert run()[0] == 0 and np.array_equal(run()[1], plain[1])
    assert run(*augment, "data.augment_views=1", "data.augment.rotation=3")[0] == n  # another strength: other views
    assert run(*augment, "data.augment_views=1", "seed=7")[0] == n


# ------------------------------------------------------------------------------------------------------------- sampling


def test_stratified_epochs_draw_classes_evenly():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 30 + [3] * 7)
    epochs = [data.epoch_order(labels, "stratified", 42, epoch) for epoch in (1, 1, 2)]
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2]) and len(epochs[0]) == len(labels)
    for order in epochs:
        drawn = labels[order]
        assert all(sorted(drawn[i:i + 4].tolist()) == [0, 1, 2, 3] for i in range(0, 96, 4))  # in every round
        for k, own in enumerate((40, 20, 30, 7)):
            times = torch.bincount(order[drawn == k], minlength=97)[labels == k]
            assert times.max() - times.min() <= 1 and times.sum() in (24, 25) and len(times) == own
    assert sorted(data.epoch_order(labels, "shuffle", 42, 1).tolist()) == list(range(97))
    with pytest.raises(ValueError, match=r"no training volume is of class 3 \(insulin\); set data.sampler=shuffle"):
        data.epoch_order(labels[:90], "stratified", 42, 1)


def test_correcting_twice_is_said(written, tmp_path, capsys):
    train.main(0, probe_of(written, tmp_path, "data.sampler=stratified"))
    assert "note: data.sampler=stratified and train.class_weights=auto correct the imbalance twice" in capsys.readouterr().out
    cfg = probe_of(written, tmp_path, "data.sampler=stratified", "train.class_weights=none")
    train.main(0, cfg)
    drawn = [read_run(cfg)[0][0][f"train/drawn_{k}"] for k in range(4)]
    assert "correct the imbalance twice" not in capsys.readouterr().out and max(drawn) - min(drawn) <= 1
