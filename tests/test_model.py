import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import model

FIXTURES = os.path.join(os.path.dirname(__file__), "fixtures")
TINY = os.path.join(FIXTURES, "vjepa3d_tiny.pt")


@pytest.fixture()
def checkpoint():
    return {"epoch": 1, "model_state_dict": dict(model.read_checkpoint(TINY)["model_state_dict"]), "config": {"image_size": [16, 64, 64]}}


def saved(checkpoint, tmp_path):
    path = str(tmp_path / "encoder.pt")
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("encoder", ["context", "target"])
def test_tokens_equal_the_recorded_ones(encoder):
    recorded = np.load(os.path.join(FIXTURES, "vjepa3d_tiny.npz"))
    net = model.load_encoder(TINY, encoder)
    assert not net.training
    with torch.no_grad():
        tokens = net(torch.from_numpy(recorded["volume"]))
    assert tokens.shape == (2, 64, 128)
    assert np.abs(tokens.numpy() - recorded[f"{encoder}_tokens"]).max() <= 1e-4
    assert net.image_size == (16, 64, 64)  # from OmegaConf's ListConfig, without OmegaConf


def test_loading_needs_no_omegaconf_and_maps_the_file():
    with pytest.raises(ImportError):
        import omegaconf  # noqa: F401
    weight = model.read_checkpoint(TINY)["model_state_dict"]["context_encoder.pos_embed"]
    with open("/proc/self/maps", encoding="utf-8") as f:  # memory-mapped: the tensor lies inside a mapping of the file
        spans = [line.split()[0].split("-") for line in f if line.rstrip().endswith("vjepa3d_tiny.pt")]
    assert any(int(low, 16) <= weight.data_ptr() < int(high, 16) for low, high in spans)


def test_hashes_tell_encoders_apart():
    context, target = (model.weights_hash(model.load_encoder(TINY, e)) for e in ("context", "target"))
    assert context != target and context == model.weights_hash(model.load_encoder(TINY, "context"))


def test_another_depth_width_and_mlp_are_inferred(tmp_path):
    torch.manual_seed(0)
    net = model.ViT3D(dim=192, depth=3, num_tokens=2 * 3 * 4, hidden=100)
    state = {f"target_encoder.encoder.{k}": v for k, v in net.state_dict().items()}
    loaded = model.load_encoder(saved({"model_state_dict": state}, tmp_path), "target")
    volume = torch.randn(1, 1, 8, 48, 64)
    with torch.no_grad():
        assert torch.equal(loaded(volume), net.eval()(volume))
    assert loaded.image_size is None and loaded.blocks[0].attn.num_heads == 3


def test_half_precision_weights_are_loaded_as_float32(checkpoint, tmp_path):
    checkpoint["model_state_dict"] = {k: v.bfloat16() if v.is_floating_point() else v for k, v in checkpoint["model_state_dict"].items()}
    net = model.load_encoder(saved(checkpoint, tmp_path))
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def change(name, function):
    def apply(checkpoint):
        state = checkpoint["model_state_dict"]
        key = "context_encoder." + name
        state[key] = function(state[key].clone())
    return apply


def drop(name):
    return lambda checkpoint: checkpoint["model_state_dict"].pop("context_encoder." + name)


def not_finite(weight):
    weight.view(-1)[3] = float("nan")
    return weight


@pytest.mark.parametrize("damage, message", [
    (drop("norm.bias"), "missing: context_encoder.norm.bias"),
    (drop("pos_embed"), "missing .*context_encoder.pos_embed"),
    (drop("blocks.0.attn.qkv.weight"), "missing: context_encoder.blocks.0.attn.qkv.weight"),
    (lambda c: c["model_state_dict"].update({"context_encoder.cls_token": torch.zeros(1)}), "unexpected: context_encoder.cls_token"),
    (lambda c: c["model_state_dict"].update({"context_encoder.blocks.7.norm1.weight": torch.zeros(128)}),
     "missing: context_encoder.blocks.2.norm1"),
    (change("blocks.1.mlp.fc1.weight", lambda w: w[:10]),
     r"wrong shape: context_encoder.blocks.1.mlp.fc1.weight \(10, 128\), expected \(512, 128\)"),
    (change("patch_embed.proj.weight", lambda w: w[:100]), "not a multiple of 64"),
    (change("patch_embed.proj.weight", lambda w: w[0]), "wrong shape"),
    (change("norm.weight", not_finite), "not finite: context_encoder.norm.weight"),
    (change("norm.weight", lambda w: "text"), "not tensors"),
    (change("norm.weight", lambda w: w.to(torch.int64)), "not tensors of floating-point numbers: .*context_encoder.norm.weight"),
    (change("pos_embed", lambda w: w[:, :0]), "pos_embed is empty"),
    (lambda c: [c["model_state_dict"].pop(k) for k in list(c["model_state_dict"]) if k.startswith("context")],
     "no keys begin with 'context_encoder.'"),
    (lambda c: c.pop("model_state_dict"), "has no 'model_state_dict'"),
    (lambda c: c["config"].update(image_size=[16, 64, 128]), "do not fit the encoder"),
    (lambda c: c["config"].update(image_size=64), "config.image_size is 64, not"),
    (lambda c: c["config"].update(image_size="16,64,64"), "config.image_size is '16,64,64', not"),
])
def test_anything_but_the_exact_keys_is_refused_by_name(checkpoint, tmp_path, damage, message):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        model.load_encoder(saved(checkpoint, tmp_path))


@pytest.mark.parametrize("extra", [{"loss": np.float64(1.5)}, {"config": "text"}, {"config": ["a"]}, {"config": None},
                                   {"loss": np.ones(3), "when": __import__("datetime").datetime(2026, 1, 1)},
                                   {"config": __import__("argparse").Namespace(a=1)},
                                   {"seen": __import__("collections").Counter("ab"), "path": __import__("pathlib").Path("x")}])
def test_harmless_contents_beside_the_weights_do_not_matter(checkpoint, tmp_path, extra):
    checkpoint.update(extra)
    assert model.load_encoder(saved(checkpoint, tmp_path)).pos_embed.shape == (1, 64, 128)


def test_the_other_encoder_may_be_damaged(checkpoint, tmp_path):
    checkpoint["model_state_dict"].pop("target_encoder.encoder.norm.bias")
    model.load_encoder(saved(checkpoint, tmp_path), "context")


def test_unknown_encoder_and_wrong_volume_size():
    with pytest.raises(ValueError, match="'context' or 'target'"):
        model.load_encoder(TINY, "teacher")
    with pytest.raises(ValueError, match="do not fit the encoder"):
        model.load_encoder(TINY)(torch.zeros(1, 1, 64, 16, 64))  # right number of tokens, wrong shape


class RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("write", ["zip", "legacy", "bare"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(checkpoint, tmp_path, write):
    ran, path = tmp_path / "ran", str(tmp_path / "evil.pt")
    checkpoint["config"] = RunsCode(ran)
    if write == "bare":
        with open(path, "wb") as f:
            pickle.dump(checkpoint["config"], f)
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(ValueError, match="system|not a zip file"):
        model.load_encoder(path)
    assert not ran.exists()


def test_torchscript_is_refused(tmp_path):
    path = str(tmp_path / "script.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="TorchScript"):
        model.load_encoder(path)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, 0.9999])
def test_truncated_checkpoint(tmp_path, keep):
    with open(TINY, "rb") as f:
        content = f.read()
    path = tmp_path / "short.pt"
    path.write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match="short.pt is not a checkpoint that can be read whole and safely"):
        model.load_encoder(str(path))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        model.load_encoder(str(tmp_path / "none.pt"))


def test_random_bytes_inside_the_zip(tmp_path):
    path = str(tmp_path / "odd.pt")
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02nonsense")
    with pytest.raises(ValueError, match="odd.pt is not a checkpoint"):
        model.load_encoder(path)


def test_pooling():
    tokens = torch.randn(2, 5, 3)
    assert torch.allclose(model.pool(tokens, "mean"), torch.stack([t.sum(0) / 5 for t in tokens]))
    assert torch.equal(model.pool(tokens, "max"), torch.stack([t.max(0).values for t in tokens]))


def test_head_standardises_with_the_training_features():
    torch.manual_seed(0)
    x = torch.randn(50, 8) * 3 + 7
    head = model.Head(8, 4, dropout=0.5)
    head[0].fit(x)
    z = head[0](x)
    assert torch.allclose(z.mean(0), torch.zeros(8), atol=1e-5) and torch.allclose(z.std(0, unbiased=False), torch.ones(8), atol=1e-4)
    head.eval()
    assert torch.allclose(head(x), z @ head[-1].weight.T + head[-1].bias, atol=1e-6)  # no dropout outside training
    assert model.Head(8, 4, hidden=16)(x).shape == (50, 4)


def test_dropout_keeps_the_expectation():
    torch.manual_seed(0)
    layer = model.HostDropout(0.3).train()
    y = layer(torch.ones(200, 1000))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7]) and abs(y.mean() - 1) < 0.01
