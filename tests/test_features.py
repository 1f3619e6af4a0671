import glob
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ATTENTIVE, AUGMENT, TINY, evaluate, read_predictions

import b2
import features
import heads
import ledger
import model
import phantom
import train

CPU = torch.device("cpu")


@pytest.fixture()
def encoded(monkeypatch):
    """The volumes (1, 1, D, H, W) that encoders have been given, one after the other."""
    calls, forward = [], model.ViT3D.forward

    def count(self, x, noise=None):
        calls.append(x.clone())
        return forward(self, x, noise)

    monkeypatch.setattr(model.ViT3D, "forward", count)
    return calls


def number_of_volumes(cfg, *splits):
    book = ledger.read(cfg)
    return sum(len(book.of(split)) for split in splits)


# ------------------------------------------------------------------------------- a frozen encoder


def test_a_frozen_encoder_is_unchanged_bit_by_bit(written, configure, monkeypatch):
    kept, load = [], model.load_encoder

    def keep(*args):
        kept.append(load(*args))
        return kept[-1]

    monkeypatch.setattr(model, "load_encoder", keep)
    train.main(0, configure(written))
    (encoder,), fresh = kept, load(TINY)
    pairs = zip(encoder.state_dict().values(), fresh.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs) and not encoder.training
    assert all(p.grad is None for p in encoder.parameters())


def test_features_come_once(written, configure, encoded):
    cfg = configure(written)
    train.main(0, cfg)
    used = number_of_volumes(cfg, "train", "val")
    assert [x.shape for x in encoded] == [(1, 1, 16, 64, 64)] * used

    def number(*overrides):
        encoded.clear()
        train.main(0, configure(written, *overrides))
        return len(encoded)

    assert number() == 0
    other_head = ["train.lr_head=0.1", "train.loss=focal", "model.head.hidden=8", "seed=1"]
    assert number(*other_head, "train.class_weights=none") == 0
    # another pooling, encoder, precision: other features
    assert number("model.pool_method=max") == used
    assert number("model.encoder=target") == used
    assert number("train.precision=bf16") == used
    assert number("model.pool_method=max") == 0
    encoded.clear()
    evaluate(cfg.paths.run_dir, "test")
    assert len(encoded) == number_of_volumes(cfg, "test")


def test_a_feature_belongs_to_the_content_of_its_volume(dataset, configure, encoded):
    cfg = configure(dataset)
    encoder = features.open_encoder(cfg)

    def found():
        book = ledger.read(cfg)
        return features.encode(cfg, book, book.of("train"), encoder, CPU).x

    before, (a, b) = found(), (s.path for s in ledger.read(cfg).of("train")[:2])
    encoded.clear()
    for one, other in ((a, a + ".aside"), (b, a), (a + ".aside", b)):  # they change places
        os.replace(one, other)
    after = found()
    assert not encoded and not torch.equal(before[0], before[1])
    assert torch.equal(after[0], before[1]) and torch.equal(after[1], before[0])
    assert torch.equal(after[2:], before[2:])


def test_a_volume_has_the_features_of_its_path_in_every_order(written, configure):
    cfg = configure(written)
    book, encoder = ledger.read(cfg), features.open_encoder(cfg)
    samples = book.of("val")
    found = features.encode(cfg, book, samples, encoder, CPU)
    again = features.encode(cfg, book, samples[::-1], encoder, CPU)
    assert again.samples == samples[::-1] and torch.equal(again.x, found.x.flip(0))


# -------------------------------------------------------------------------------- augmented views


@pytest.mark.slow
def test_views_are_encoded_once_and_all_are_trained_on(written, configure, encoded, monkeypatch):
    rows, forward = set(), heads.Heads.forward

    def look(self, x, noise=None):
        if self.training:
            rows.update(row.numpy().tobytes() for row in x)
        return forward(self, x, noise)

    monkeypatch.setattr(heads.Heads, "forward", look)

    def run(*overrides):
        encoded.clear()
        cfg = configure(written, *overrides)
        train.main(0, cfg)
        return len(encoded), read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2]

    cfg = configure(written)
    n, m = number_of_volumes(cfg, "train"), number_of_volumes(cfg, "val")
    plain = run()
    assert plain[0] == n + m and len(rows) == n
    three = run(*AUGMENT, "data.augment_views=3")
    # the refit trains on views of validation's volumes too
    assert three[0] == 3 * (n + m) and not np.array_equal(three[1], plain[1])
    # each view is another
    assert len({x.flatten()[:1000].sum().item() for x in encoded}) == 3 * (n + m)
    assert len(rows) > 3 * n  # six epochs, each drawing from four
    again = run(*AUGMENT, "data.augment_views=3")
    assert again[0] == 0 and np.array_equal(again[1], three[1])
    again = run()
    assert again[0] == 0 and np.array_equal(again[1], plain[1])
    # another strength, another seed: other views
    assert run(*AUGMENT, "data.augment_views=1", "data.augment.rotation=3")[0] == n + m
    assert run(*AUGMENT, "data.augment_views=1", "seed=7", "train.refit=false")[0] == n


def test_a_volume_lost_between_two_views_stops_the_run(dataset, configure, monkeypatch):
    more = ["data.cache_gb=0", "data.max_missing=5", "data.augment.flip=true"]
    cfg = configure(dataset, *more, "data.augment_views=2")
    victim, passes, encode = ledger.read(cfg).of("train")[3], [], features.encode

    def damage_before_the_second(*args, **named):
        passes.append(1)
        if len(passes) == 2:
            with open(victim.path, "wb") as f:
                f.write(b"damaged")
        return encode(*args, **named)

    monkeypatch.setattr(features, "encode", damage_before_the_second)
    who = f"participant {victim.participant_id}"
    message = f"could be read before cannot be read now: unreadable: {who}"
    with pytest.raises(ValueError, match=message):
        train.main(0, cfg)


# ---------------------------------------------------------------------- tokens of attentive heads


@pytest.fixture()
def attentive(written, configure, capsys):
    """An attentive run: its configuration, what it printed, and the number of its volumes."""
    cfg = configure(written, *ATTENTIVE)
    train.main(0, cfg)
    return cfg, capsys.readouterr().out, number_of_volumes(cfg, "train", "val")


def test_an_attentive_run_caches_its_tokens(attentive):
    cfg, _, number = attentive
    kept = [
        np.load(os.path.join(folder, name))
        for folder, _, names in os.walk(f"{cfg.paths.cache_dir}/features")
        for name in names
    ]
    assert len(kept) == number
    assert all(tokens.dtype == np.float16 and tokens.shape == (8, 128) for tokens in kept)


def test_an_attentive_run_says_what_room_its_tokens_take(attentive):
    _, printed, number = attentive
    assert f"tokens: {number} volumes to encode, 8 x 128 float16 each" in printed
    assert printed.index("tokens:") < printed.index("features:")


def test_tokens_from_the_cache_give_the_same_run(attentive, capsys):
    cfg, _, _ = attentive
    path = f"{cfg.paths.run_dir}/predictions_val.csv"
    first = read_predictions(path)[2]
    train.main(0, cfg)
    assert "tokens: 0 volumes to encode" in capsys.readouterr().out
    assert np.array_equal(first, read_predictions(path)[2])
    evaluate(cfg.paths.run_dir, "val")
    assert np.allclose(first, read_predictions(path)[2], atol=1e-6)


def test_tokens_pooled_in_another_way_are_others(attentive, written, configure, capsys):
    _, _, number = attentive
    train.main(0, configure(written, *ATTENTIVE, "model.token_pool=max"))
    assert f"tokens: {number} volumes to encode" in capsys.readouterr().out


def test_tokens_that_have_no_room_stop_the_run(written, configure, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = (
        "no room for .* GB of tokens; set a smaller model.token_grid, or paths.cache_dir elsewhere"
    )
    with pytest.raises(ValueError, match=message):
        train.main(0, configure(written, *ATTENTIVE, "model.token_grid=[2,2,1]"))


def test_a_grid_finer_than_the_encoders_tokens_is_refused(written, configure):
    message = r"model.token_grid=\[4, 4, 5\] is finer than the encoder's tokens, \[4, 4, 4\]"
    with pytest.raises(ValueError, match=message):
        train.main(0, configure(written, *ATTENTIVE, "model.token_grid=[4,4,5]"))


# --------------------------------------------------------------------------------------- Features


def test_a_random_encoder_has_the_shape_and_not_the_weights(configure):
    encoder = features.open_encoder(configure("/none"))
    random = features.random_encoder(encoder, seed=1)
    a, b = encoder.module.state_dict(), random.module.state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert random.size == encoder.size and random.sha256 != encoder.sha256
    assert random.sha256 == features.random_encoder(encoder, seed=1).sha256
    assert random.sha256 != features.random_encoder(encoder, seed=2).sha256


# ------------------------------------------------------------- what the encoder's file does not say


def file_with(tmp_path, config, dim=128):
    path = tmp_path / "with_config.pt"
    state = model.ViT3D(dim, 2, 64, num_heads=2).state_dict(prefix="context_encoder.")
    config = {"image_size": [16, 64, 64], **config}
    torch.save({"model_state_dict": state, "config": config}, path)
    return f"paths.checkpoint_path={path}"


@pytest.mark.parametrize(
    "config, note",
    [
        (
            {},
            "note: the encoder's file does not say its number of heads, LayerNorm eps and "
            "activation; assumed are 2 heads of width 64, 1e-05 and exact GELU\n",
        ),
        (
            {"num_heads": 2, "act": "relu"},
            "note: the encoder's file does not say its LayerNorm eps; assumed is 1e-05\n",
        ),
        ({"num_heads": 2, "act": "relu", "norm_eps": 1e-5}, ""),
    ],
)
def test_what_is_assumed_of_the_encoder_is_printed(configure, tmp_path, capsys, config, note):
    features.open_encoder(configure("/none", file_with(tmp_path, config)))
    assert capsys.readouterr().out == note


def test_the_demos_encoder_says_all(configure, tmp_path, capsys):
    phantom.write_encoder(tmp_path / "demo.pt", image_size=(16, 64, 64))
    features.open_encoder(configure("/none", f"paths.checkpoint_path={tmp_path}/demo.pt"))
    assert capsys.readouterr().out == ""


def test_a_run_says_once_what_is_assumed(written, configure, capsys):
    train.main(0, configure(written, "eval.floors=true"))
    assert capsys.readouterr().out.count("note: the encoder's file does not say its number of") == 1


def test_a_random_encoder_has_the_settings_too(configure, tmp_path):
    config = {"num_heads": 4, "norm_eps": 1e-3, "act": "gelu_tanh"}
    encoder = features.open_encoder(configure("/none", file_with(tmp_path, config)))
    random = features.random_encoder(encoder, seed=1).module
    assert (random.num_heads, random.eps, random.activation) == (4, 1e-3, "gelu_tanh")
    assert random.blocks[0].attn.num_heads == 4 and random.blocks[0].mlp.act.approximate == "tanh"
    assert random.norm.eps == random.blocks[1].norm2.eps == 1e-3


def test_features_are_kept_by_the_settings_too(configure, tmp_path):
    folders = set()
    for config in ({}, {"num_heads": 2}, {"num_heads": 4}, {"norm_eps": 1e-6}, {"act": "relu"}):
        torch.manual_seed(0)
        cfg = configure("/none", file_with(tmp_path, config))
        folders.add(features.Kept(cfg, features.open_encoder(cfg), view=0).folder)
    assert len(folders) == 4  # the first two are the same encoder


def test_tokens_whose_width_an_attentive_head_cannot_take_are_refused(configure, tmp_path):
    path = file_with(tmp_path, {"num_heads": 2}, dim=160)
    cfg = configure("/none", path, *ATTENTIVE, "model.emb_dim=160")
    with pytest.raises(ValueError, match="multiple of 64, .* 160 wide; set model.pool_method=mean"):
        features.open_encoder(cfg)


def test_an_error_names_the_encoder_as_the_config_does(configure, tmp_path, monkeypatch):
    """But the line that converts it has the local copy."""
    local, name = tmp_path / "copy.pt", "b2://bucket/encoder.pt"
    torch.save({"a": SimpleNamespace()}, local)
    monkeypatch.setattr(b2, "local", lambda *args: str(local))
    with pytest.raises(ValueError) as e:
        features.open_encoder(configure("/none", f"paths.checkpoint_path={name}"))
    assert str(e.value).startswith(f"{name} is not a checkpoint")
    assert str(e.value).endswith(f"{local} {tmp_path}/copy_converted.pt")


@pytest.mark.parametrize(
    "make, message",
    [
        (os.mkdir, "is no file; put the pretrained encoder's file there, or set paths.checkpoint_"),
        (os.mkfifo, "is no file; put the pretrained encoder's file there"),
        (lambda path: None, "is not there; put the pretrained encoder's file there"),
    ],
)
def test_what_is_no_encoders_file_is_said_at_once(configure, tmp_path, make, message):
    path = str(tmp_path / "encoder.pt")
    make(path)
    cfg = configure("/none", f"paths.checkpoint_path={path}")
    with pytest.raises(FileNotFoundError, match=f"^paths.checkpoint_path={path} {message}"):
        features.open_encoder(cfg)


def test_a_path_with_a_nul_character_is_not_there(configure):
    cfg = configure("/none")
    cfg.paths.checkpoint_path = "a\0b.pt"
    with pytest.raises(FileNotFoundError, match=r"^paths.checkpoint_path=a\\0b.pt is not there"):
        features.open_encoder(cfg)


def test_an_encoder_that_may_not_be_read(configure, monkeypatch):
    """Root may read all, so the system's answer is made here."""

    def refuse(path, encoder):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(model, "load_encoder", refuse)
    with pytest.raises(
        OSError, match="^paths.checkpoint_path=.* cannot be read .Permission denied.;"
    ):
        features.open_encoder(configure("/none"))


def test_what_killed_writers_left_is_removed_and_living_ones_are_not_disturbed(written, configure):
    cfg = configure(written)
    train.main(0, cfg)
    (folder,) = glob.glob(f"{cfg.paths.cache_dir}/features/*")
    for name, age in (("old.npy.0.part", 100), ("young.npy.1.part", 0)):
        open(f"{folder}/{name}", "w").close()
        os.utime(f"{folder}/{name}", (time.time() - age,) * 2)
    train.main(0, cfg)
    left = [os.path.basename(path) for path in glob.glob(f"{folder}/*.part")]
    assert left == ["young.npy.1.part"]
