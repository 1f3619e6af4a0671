import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ATTENTIVE,
    AUGMENT,
    TINY,
    TUNE,
    copy_of,
    edit,
    evaluate,
    predictions,
    quick,
    read_predictions,
    read_run,
    trained,
    warm,
)
from sklearn.utils.class_weight import compute_class_weight

import data
import heads
import ledger
import model
import runs
import settings
import train

SIZE = (16, 64, 64)


def preprocessed(path):
    """The volume of a file as an encoder sees it, (1, 16, 64, 64)."""
    return data.preprocess(data.read_dicom(path), SIZE).half().float()[None]


# ----------------------------------------------------------------------------- a probe as a whole


def test_probabilities_are_averaged_per_participant(written):
    """The saved head, applied by hand to every volume."""
    cfg = quick(written, trained(written))
    head, encoder = read_run(cfg)[1]["head"], model.load_encoder(TINY)
    volumes = {}
    for s in ledger.read(cfg).of("val"):
        with torch.no_grad():
            feature = encoder(preprocessed(s.path)[None])[0].mean(0)
        x = (feature - head["mean"]) / head["std"]
        p = torch.softmax(x @ head["weight"][0].T + head["bias"][0], 0)
        volumes.setdefault(s.participant_id, []).append(p.numpy())
    ids, _, p = read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")
    assert max(len(v) for v in volumes.values()) > 2
    assert np.abs(p - np.stack([np.mean(volumes[i], axis=0) for i in ids])).max() < 1e-5


def test_the_same_seed_gives_the_same_run_with_cold_and_warm_cache(written, configure):
    found = []
    for n, override in enumerate((warm(written), warm(written), "seed=42", "seed=43")):
        cfg = configure(written, override)  # the last two with a cache of their own, first empty
        cfg.paths.run_dir += str(n)
        train.main(0, cfg)
        found.append(read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[3])


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.loss=focal"],
        ["train.loss=ordinal"],
        ["train.loss=label_smoothing"],
        ["train.class_weights=effective"],
        ["train.loss=balanced_softmax", "train.class_weights=none"],
        ["train.loss=logit_adjustment", "train.class_weights=none"],
        ["train.class_weights=[1,2,3,4]"],
        ["model.head.hidden=16", "train.lr_head=0.03"],
        ["model.pool_method=max"],
        ["data.batch_size=7"],
        ["data.batch_size=1000"],
        ["train.precision=bf16"],
        ["model.encoder=target"],
    ],
)
def test_variants_train_and_evaluate(written, tmp_path, overrides):
    cfg = quick(written, tmp_path, *overrides)
    train.main(0, cfg)
    history, _, _ = read_run(cfg)
    # of volumes that it trains on; 0.25 is chance
    assert history[-1]["train/balanced_accuracy"] > 0.5
    evaluate(cfg.paths.run_dir, "test")


def test_a_loss_that_is_not_finite_stops_the_run(written, tmp_path):
    # class 0 alone counts, one volume a step: most steps have a weight of 0 in all
    message = "train loss, gradient or prediction is not finite in epoch 0; lower train.lr_head"
    with pytest.raises(ValueError, match=message):
        more = ["train.class_weights=[1,0,0,0]", "data.batch_size=1"]
        train.main(0, quick(written, tmp_path, *more))


# ----------------------------------------------------------------------------------- the schedule


def test_schedule():
    rates = [2.0 * train.lr_factor(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.001
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_a_schedule_without_warm_up_begins_with_the_full_rate():
    assert train.lr_factor(0, 5, 0) == 1.0


def test_a_run_shorter_than_the_warm_up_runs(written, tmp_path, capsys):
    cfg = quick(written, tmp_path, "train.epochs=2", "train.warmup_epochs=5")
    train.main(0, cfg)
    history, _, _ = read_run(cfg)
    assert len(history) == 3 and history[-1]["train/lr_head"] == pytest.approx(0.4 * 0.003)
    printed = capsys.readouterr().out
    assert "train.warmup_epochs=5 lasts all 2 epochs of the head" in printed


# ----------------------------------------------------------------- settings that are seldom meant


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ["train.loss=balanced_softmax"],
            "train.class_weights=auto and train.loss=balanced_softmax correct the imbalance twice",
        ),
        (
            ["train.loss=logit_adjustment", "train.class_weights=none", "data.sampler=stratified"],
            "data.sampler=stratified and train.loss=logit_adjustment correct the imbalance twice",
        ),
        (
            ["train.loss=logit_adjustment", "data.sampler=stratified"],
            "correct the imbalance three times",
        ),
        (["train.loss=balanced_softmax", "train.class_weights=none"], None),
    ],
)
def test_what_corrects_more_than_once_is_said(configure, overrides, said):
    notes = " ".join(settings.doubts(configure("/none", *overrides), num_volumes=58))
    assert said in notes if said else "correct" not in notes


def test_correcting_twice_is_said_by_the_run(written, tmp_path, capsys):
    train.main(0, quick(written, tmp_path, "data.sampler=stratified"))
    twice = "data.sampler=stratified and train.class_weights=auto correct the imbalance twice"
    assert f"note: {twice}" in capsys.readouterr().out


def test_a_stratified_run_draws_the_classes_evenly(written, tmp_path, capsys):
    cfg = quick(written, tmp_path, "data.sampler=stratified", "train.class_weights=none")
    train.main(0, cfg)
    drawn = [read_run(cfg)[0][0][f"train/drawn_{k}"] for k in range(4)]
    assert max(drawn) - min(drawn) <= 1
    assert "correct the imbalance twice" not in capsys.readouterr().out


def test_a_warm_up_that_lasts_all_of_the_encoders_epochs_is_said(written, tmp_path, capsys):
    train.main(0, quick(written, tmp_path, *TUNE, "train.warmup_epochs=2", "train.epochs=3"))
    printed = capsys.readouterr().out
    assert "note: train.warmup_epochs=2 lasts all 2 epochs of the encoder" in printed


# ------------------------------------------------------------------------ when the encoder trains


@pytest.fixture(
    scope="module",
    params=[
        (3, ["model.unfreeze_at_epoch=2"]),
        (1, ["model.freeze_encoder=false", "model.unfreeze_at_epoch=-1"]),
        (1, ["model.unfreeze_at_epoch=0"]),
        (None, ["model.unfreeze_at_epoch=-1", "model.drop_path=0"]),
    ],
    ids=["after two epochs", "not frozen", "after none", "never"],
)
def unfrozen(request, written, tmp_path_factory):
    """A run of four epochs: its configuration, the first epoch in which the encoder trains, and the
    hash of the encoder's weights after each, the start (epoch 0) first."""
    first, overrides = request.param
    more = [*TUNE, "train.epochs=4", "train.early_stopping.enabled=false", *overrides]
    cfg = quick(written, tmp_path_factory.mktemp("unfrozen"), *more)
    encoders, hashes, load, lines = [], [], model.load_encoder, runs.epoch_lines

    def keep(*args):
        encoders.append(load(*args))
        return encoders[-1]

    def note(*args):
        hashes.append(model.weights_hash(encoders[0]))
        return lines(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_encoder", keep)
        patch.setattr(runs, "epoch_lines", note)
        train.main(0, cfg)
    return SimpleNamespace(cfg=cfg, first=first, hashes=hashes)


def test_the_encoder_changes_from_its_epoch_on_and_not_before(unfrozen):
    first, pretrained = unfrozen.first, model.weights_hash(model.load_encoder(TINY))
    changed = [found != pretrained for found in unfrozen.hashes]
    assert changed == [first is not None and epoch >= first for epoch in range(5)]
    after = unfrozen.hashes[first:] if first else []
    assert len(set(after)) == len(after)  # and in every epoch anew


def test_the_encoder_is_saved_once_it_trains_and_every_weight_has_moved(unfrozen):
    first, (_, best, last) = unfrozen.first, read_run(unfrozen.cfg)
    assert ("encoder" in best) == (first is not None and best["epoch"] >= first)
    assert ("encoder" in last) == (first is not None)
    if first:  # positions and the first layer too
        fresh = model.load_encoder(TINY).state_dict()
        assert all(not torch.equal(last["encoder"][k], v) for k, v in fresh.items())


def test_the_schedule_of_each_part_begins_with_the_part(unfrozen):
    """The record holds the learning rates of the epoch's last step."""
    history, _, last = read_run(unfrozen.cfg)
    steps, begun = -(-last["volumes"][0] // 10), (unfrozen.first or 9) - 1
    assert [r["epoch"] for r in history] == [0, 1, 2, 3, 4]
    assert history[0]["train/lr_encoder"] == history[0]["train/lr_head"] == 0
    for r in history[1:]:
        done = (r["epoch"] - begun) * steps - 1
        expected = (
            1e-3 * train.lr_factor(done, (4 - begun) * steps, steps) if r["epoch"] > begun else 0
        )
        assert r["train/lr_encoder"] == pytest.approx(expected)
        expected = 0.003 * train.lr_factor(r["epoch"] * steps - 1, 4 * steps, steps)
        assert r["train/lr_head"] == pytest.approx(expected)


@pytest.mark.slow
def test_it_overfits_eight_volumes(dataset, tmp_path):
    kept, classes, volumes = set(), set(), 0
    book = ledger.read(quick(dataset, tmp_path))
    rows = [r for r in book.rows if r.split == "train" and r.volumes]
    for row in rows:  # someone of every class, and others until there are eight
        if row.label not in classes or (len(classes) == 4 and volumes < 8):
            kept.add(row.participant_id)
            classes.add(row.label)
            volumes += row.volumes

    def leave_out(line):
        is_kept = line.split("\t")[0] in kept or "\ttrain\t" not in line
        return line if is_kept else line.replace("\tTRUE", "\tFALSE")

    edit(dataset / "participants.tsv", lambda text: "".join(map(leave_out, text.splitlines(True))))
    cfg = quick(
        dataset,
        tmp_path,
        *TUNE,
        "train.epochs=40",
        "train.class_weights=none",
        "train.lr_encoder=1e-3",
        "train.early_stopping.enabled=false",
        "train.layer_decay=1",
        "model.head.dropout=0",
        "model.drop_path=0",
        *(switch.replace("true", "false") for switch in AUGMENT),
    )
    train.main(0, cfg)
    history, _, last = read_run(cfg)
    assert 8 <= last["volumes"][0] <= 12 and history[-1]["train/loss"] < 0.01
    assert history[-1]["train/balanced_accuracy"] == 1


@pytest.fixture()
def one_block():
    """An encoder with a single block, so that its rate of drop-path is the whole of it, and 400
    volumes that are all the same."""
    torch.manual_seed(0)
    encoder = model.load_encoder(TINY)
    encoder.blocks, encoder.drop_path = encoder.blocks[:1], 0.3
    return encoder, torch.randn(1, 1, *SIZE).expand(400, -1, -1, -1, -1)


@torch.no_grad()
def test_drop_path_skips_nothing_in_evaluation(one_block):
    encoder, volume = one_block
    tokens = encoder(volume[:2])
    assert torch.equal(tokens[0], tokens[1])


@torch.no_grad()
def test_drop_path_skips_branches_in_training(one_block):
    encoder, volume = one_block
    tokens = encoder.train()(volume, model.Noise(3, torch.arange(400), 400))
    values, counts = tokens.mean(dim=(1, 2)).round(decimals=4).unique(return_counts=True)
    assert len(values) == 4  # both branches, either, none
    shares = sorted((counts / 400).tolist())
    assert shares == pytest.approx([0.09, 0.21, 0.21, 0.49], abs=0.08)


@torch.no_grad()
def test_drop_path_by_itself_draws_from_torchs_generator(one_block):
    encoder, volume = one_block
    encoder.train()
    assert not torch.equal(encoder(volume[:8]), encoder(volume[:8]))


def test_drop_path_keeps_the_expectation():
    kept = model.Noise(3, torch.arange(100_000), 100_000).keep(0.3, (), layer=0)
    assert kept.mean() == pytest.approx(1, abs=0.01)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])


def test_attentive_fine_tuning(written, tmp_path):
    cfg = quick(written, tmp_path, *ATTENTIVE, "model.unfreeze_at_epoch=1", "train.epochs=3")
    train.main(0, cfg)
    path = f"{cfg.paths.run_dir}/predictions_val.csv"
    before = read_predictions(path)[2]
    evaluate(cfg.paths.run_dir, "val")
    # tokens kept for eval are float16
    assert np.allclose(before, read_predictions(path)[2], atol=2e-3)


# ----------------------------------------------------------------------- what must change nothing


@pytest.fixture()
def tuned(written):
    """A folder with a finished fine-tuning run."""
    folder = trained(written, *TUNE, "train.save_every=2")
    # the best is a fine-tuned one: else comparing predictions would show nothing
    assert "encoder" in read_run(quick(written, folder))[1]
    return folder


def largest_change(a, b):
    """Largest difference of the encoder's weights in the last.pt of two folders' runs."""
    a, b = (torch.load(f"{folder}/run/last.pt", weights_only=True)["encoder"] for folder in (a, b))
    return max((a[k] - b[k]).abs().max() for k in a)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.micro_batch=10"],
        ["train.micro_batch=3"],
        ["train.activation_checkpointing=false"],
        pytest.param(
            ["data.num_workers=2", "data.prefetch=1", "data.cache_gb=0"], marks=pytest.mark.slow
        ),
    ],
    ids=["at once", "of three", "kept activations", "workers, no cache"],
)
def test_memory_and_workers_do_not_change_the_result(
    written, tuned, configure, tmp_path, overrides
):
    """Gradients accumulated over four micro-batches are those of the batch at once: dropout,
    drop-path and augmentation on."""
    is_cold = overrides[0].startswith("data.")
    more = [] if is_cold else [warm(written)]
    train.main(0, configure(written, *TUNE, *more, *overrides))
    assert np.abs(predictions(tmp_path) - predictions(tuned)).max() < 1e-5
    if is_cold:
        assert np.array_equal(predictions(tmp_path), predictions(tuned))
    assert largest_change(tmp_path, tuned) <= 1e-5


def test_bf16_trains_the_encoder(written, tuned, tmp_path):
    cfg = quick(written, tmp_path, *TUNE, "train.precision=bf16")
    train.main(0, cfg)
    history, best, last = read_run(cfg)
    # bf16 is how it computes, not what it is
    assert {v.dtype for v in last["encoder"].values()} == {torch.float32}
    assert len(history) == 4 and 1e-4 < largest_change(tmp_path, tuned) <= 1e-2
    result, _ = evaluate(cfg.paths.run_dir, "val")
    assert result["log_loss"] == best["val_loss"]


@pytest.mark.parametrize(
    "change",
    [
        "model.drop_path=0",
        "train.grad_clip=0.01",
        "train.layer_decay=0.5",
        "train.weight_decay=1",
        "data.augment.flip=false",
        "data.augment.intensity_jitter=false",
        "data.augment.random_crop=0.3",
        "data.augment.rotation=false",
        "data.sampler=stratified",
        "train.loss=focal",
        "seed=43",
    ],
)
def test_every_knob_turns_something(written, tmp_path, change):
    one_epoch = ["model.unfreeze_at_epoch=0", "train.epochs=1"]
    train.main(0, quick(written, tmp_path, *TUNE, change, *one_epoch))
    assert largest_change(tmp_path, trained(written, *TUNE, *one_epoch)) > 1e-6


def test_every_epoch_sees_another_view(written, tmp_path, monkeypatch):
    seen, forward = [], model.ViT3D.forward

    def look(self, x, noise=None):
        if self.training:
            seen.extend(volume for volume in x if volume.any())
        return forward(self, x, noise)

    monkeypatch.setattr(model.ViT3D, "forward", look)
    more = ["model.unfreeze_at_epoch=0", "train.epochs=2", "train.micro_batch=1"]
    cfg = quick(written, tmp_path, *TUNE, *more)
    train.main(0, cfg)
    samples = ledger.read(cfg).of("train")
    labels, volumes = (
        torch.tensor([s.label for s in samples]),
        data.Volumes(samples, SIZE, cfg.paths.cache_dir),
    )
    n, usual = len(samples), {"flip": 0.5, "intensity_jitter": 0.1, "random_crop": 0.1}
    assert len(seen) == 2 * n
    for epoch in (1, 2):
        order = data.epoch_order(labels, "shuffle", 42, epoch, 4)
        for x, i in zip(seen[(epoch - 1) * n : epoch * n], order.tolist()):
            key, volume = volumes.load(i)
            expected = data.augment(volume, usual | {"rotation": 5.0}, f"42 {epoch} {key}")
            assert torch.equal(x, expected.float()) and not torch.equal(x, volume.float())


# ----------------------------------------------------------------- against another implementation


def test_a_run_equals_one_written_from_the_formulas(written, tmp_path):
    """Schedules, layer rates, decay, clipping, class weights and accumulation, in double precision,
    with an AdamW of its own."""
    head_epochs, epochs, warmup, size, clip = 1, 3, 1, 13, 0.7
    lr_head, lr_encoder, layer_decay, weight_decay = 0.003, 1e-3, 0.6, 0.05
    cfg = quick(
        written,
        tmp_path,
        *TUNE,
        f"train.layer_decay={layer_decay}",
        f"train.grad_clip={clip}",
        f"data.batch_size={size}",
        "model.head.dropout=0",
        "model.drop_path=0",
        "train.micro_batch=5",
        f"train.weight_decay={weight_decay}",
        *(switch.replace("true", "false") for switch in AUGMENT),
    )
    train.main(0, cfg)
    last = read_run(cfg)[2]

    samples = ledger.read(cfg).of("train")
    volumes = torch.stack([preprocessed(s.path).double() for s in samples])
    labels = torch.tensor([s.label for s in samples])
    people = list({s.participant_id: s.label for s in samples}.values())
    weights = torch.tensor(compute_class_weight("balanced", classes=np.arange(4), y=people))
    encoder = model.load_encoder(TINY).double()
    torch.manual_seed(42)
    head = heads.Heads(128, 4, hidden=8).double()
    with torch.no_grad():
        pretrained = encoder(volumes).mean(dim=1)
        head.mean.copy_(pretrained.mean(dim=0))
        head.std.copy_((pretrained.var(dim=0, unbiased=False) + 1e-6).sqrt())
        # as the weighted loss sees the classes: the best answer that looks at nothing is their
        # logarithm
        shares = labels.bincount() * weights
        head.bias.copy_(shares.log() - shares.log().mean())
    rates = {}  # {name: (parameter, full learning rate, weight decay)}
    for name, p in head.named_parameters(prefix="head"):
        rates[name] = p, lr_head, 0 if name.endswith("bias") else weight_decay
    for name, p in encoder.named_parameters(prefix="encoder"):
        block = re.match(r"encoder.blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 3 if name.startswith("encoder.norm") else 0
        is_plain = name.endswith(("bias", "pos_embed")) or "norm" in name
        rates[name] = p, lr_encoder * layer_decay ** (3 - layer), 0 if is_plain else weight_decay
    steps, state = -(-len(samples) // size), {}
    for epoch in range(epochs):
        order = data.epoch_order(labels, "shuffle", 42, epoch + 1, 4)
        for step in range(steps):
            batch = order[step * size : (step + 1) * size]
            trains = epoch >= head_epochs
            x = encoder(volumes[batch]).mean(dim=1) if trains else pretrained[batch]
            loss = torch.nn.functional.cross_entropy(head(x)[0], labels[batch], weight=weights)
            names = [name for name in rates if name.startswith("head") or trains]
            gradients = torch.autograd.grad(loss, [rates[name][0] for name in names])
            scale = min(1, clip / np.sqrt(sum((g**2).sum().item() for g in gradients)))
            for name, gradient in zip(names, gradients):
                p, peak, decay = rates[name]
                begun = 0 if name.startswith("head") else head_epochs
                done, total = (epoch - begun) * steps + step, (epochs - begun) * steps
                warm_steps = warmup * steps
                lr = peak * (done + 1) / warm_steps
                if done >= warm_steps:
                    share = (done - warm_steps) / (total - warm_steps)
                    lr = peak / 2 * (1 + np.cos(np.pi * share))
                m, v, n = state.get(name, (0, 0, 0))
                m, n = 0.9 * m + 0.1 * gradient * scale, n + 1
                v = 0.999 * v + 0.001 * (gradient * scale) ** 2
                state[name] = m, v, n
                direction = (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
                with torch.no_grad():
                    p -= lr * decay * p + lr * direction
    fresh = model.load_encoder(TINY).state_dict()
    for name, (p, _, _) in rates.items():
        part, name = name.split(".", 1)
        difference = (last[part][name] - p).abs().max()
        assert difference < 2e-5, name
        if part == "encoder":  # it has moved by more than that
            assert (p - fresh[name]).abs().max() > 20 * difference, name


# ---------------------------------------------------------------------------- what stops training


def test_an_encoder_that_diverges_is_said_by_its_key(written, tmp_path):
    more = ["train.lr_encoder=1e30", "data.batch_size=1000", "train.warmup_epochs=0"]
    with pytest.raises(ValueError, match=r"lower train.*lr_encoder=1e\+30"):
        train.main(0, quick(written, tmp_path, *TUNE, *more, "train.grad_clip=0"))


def test_a_volume_that_vanishes_while_training_stops_the_run(dataset, tmp_path, monkeypatch):
    cfg = quick(dataset, tmp_path, *TUNE, "data.cache_gb=0", "data.max_missing=5")
    victim, lines = ledger.read(cfg).of("train")[3], runs.epoch_lines

    def remove_after_the_first(record, epochs):
        if record["epoch"] == 1:
            os.remove(victim.path)
        return lines(record, epochs)

    monkeypatch.setattr(runs, "epoch_lines", remove_after_the_first)
    message = f"participant {victim.participant_id}: .*{os.path.basename(victim.path)}"
    with pytest.raises((ValueError, OSError), match=message):
        train.main(0, cfg)
    assert [r["epoch"] for r in read_run(cfg)[0]] == [0, 1]


@pytest.mark.parametrize("overrides", [[], ["train.class_weights=none"]])
def test_what_cannot_train_stops_before_the_earlier_run_is_gone(
    written, dataset, tmp_path, monkeypatch, overrides
):
    def leave_out(line):
        is_rare = "\ttrain\t" in line and "insulin_dependent" in line
        return line.replace("\tTRUE", "\tFALSE") if is_rare else line

    edit(dataset / "participants.tsv", lambda text: "".join(map(leave_out, text.splitlines(True))))
    run_dir = copy_of(trained(written), tmp_path)
    before = sorted(os.listdir(run_dir))
    forward = lambda *args: pytest.fail("encoded something")
    monkeypatch.setattr(model.ViT3D, "forward", forward)
    with pytest.raises(ValueError, match="no training volume is of class insulin; correct"):
        train.main(0, quick(dataset, tmp_path, *TUNE, *overrides))
    assert sorted(os.listdir(run_dir)) == before
