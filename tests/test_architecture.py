"""What a checkpoint's config says of its encoder, through model.load_encoder."""

import argparse
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model


def reference(state, volume, num_heads, eps, activation):
    """Tokens (N, C) of a volume (D, H, W) by the formulas, one patch and one head at a time."""
    kernel = state["patch_embed.proj.weight"]
    dim, patch = len(kernel), kernel.shape[2:]
    blocks = volume.unfold(0, patch[0], patch[0]).unfold(1, patch[1], patch[1])
    patches = blocks.unfold(2, patch[2], patch[2]).reshape(-1, *patch)
    x = torch.stack([(kernel[:, 0] * p).sum((1, 2, 3)) for p in patches])
    x = x + state["patch_embed.proj.bias"] + state["pos_embed"][0]

    def norm(x, name):
        deviation = x - x.mean(-1, keepdim=True)
        x = deviation / ((deviation**2).mean(-1, keepdim=True) + eps).sqrt()
        return x * state[name + ".weight"] + state[name + ".bias"]

    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    i, width = 0, dim // num_heads
    while f"blocks.{i}.norm1.weight" in state:
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(dim, dim=1)
        heads = [slice(h * width, (h + 1) * width) for h in range(num_heads)]
        mixed = [(q[:, h] @ k[:, h].T / width**0.5).softmax(-1) @ v[:, h] for h in heads]
        x = x + linear(torch.cat(mixed, dim=1), f"blocks.{i}.attn.proj")
        hidden = activation(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
        i += 1
    return norm(x, "norm")


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def weights_of(dim, hidden, seed=0):
    """State of an encoder of 2 blocks for volumes of 8x32x32, on which all settings show."""
    torch.manual_seed(seed)
    # torch's own layers begin so that softmax is nearly uniform
    state = model.ViT3D(dim, 2, 8, hidden, num_heads=1).state_dict()
    return {
        k: v * 4 if ".qkv." in k else v / 30 if "embed" in k else v * 2 for k, v in state.items()
    }


def written(tmp_path, config, dim=128, hidden=96):
    state = {f"context_encoder.{k}": v for k, v in weights_of(dim, hidden).items()}
    path = str(tmp_path / "encoder.pt")
    torch.save({"model_state_dict": state, "config": config}, path)
    return path


@pytest.mark.parametrize(
    "dim, config, num_heads, eps, activation",
    [
        (
            160,
            {"num_heads": 2, "norm_eps": 1e-6, "act_layer": "nn.GELU(approximate='tanh')"},
            *(2, 1e-6, gelu_tanh),
        ),
        (160, {"head_dim": 80, "eps": 1e-6, "act": "relu"}, 2, 1e-6, F.relu),
        (128, {"num_heads": 8, "ln_eps": 1e-3, "hidden_act": "swish"}, 8, 1e-3, F.silu),
        (128, {"heads": 1, "layer_norm_eps": 1e-12, "activation": "gelu"}, 1, 1e-12, F.gelu),
        (128, {}, 2, 1e-5, F.gelu),
    ],
)
def test_tokens_are_those_of_the_configs_settings(
    tmp_path, dim, config, num_heads, eps, activation
):
    loaded = model.load_encoder(written(tmp_path, {"model": config}, dim))
    # rounding alone would change a token by 1e-4 in float32
    volume = torch.randn(8, 32, 32, dtype=torch.float64) / 30
    state = loaded.double().state_dict()
    with torch.no_grad():
        tokens = loaded(volume[None, None])[0]
        expected = reference(state, volume, num_heads, eps, activation)
        assert (tokens - expected).abs().max() <= 1e-5
        for other in (
            (num_heads * 5 if dim == 160 else num_heads * 4, eps, activation),
            (num_heads, eps * 10, activation),
            (num_heads, eps, F.tanh),
            (num_heads, eps, F.gelu if activation is gelu_tanh else gelu_tanh),
        ):  # a wrong setting would show
            assert (tokens - reference(state, volume, *other)).abs().max() > 1e-5


@pytest.mark.parametrize(
    "config, num_heads, eps, activation",
    [
        ({"num_heads": 4}, 4, 1e-5, "gelu"),
        ({"n_heads": 4, "dim_head": 32}, 4, 1e-5, "gelu"),
        ({"encoder": {"heads": 4, "depth": 2, "dim": 128}}, 4, 1e-5, "gelu"),
        ({"model": {"vit": {"num_attention_heads": 4.0}}}, 4, 1e-5, "gelu"),
        ({"model.num_heads": 4}, 4, 1e-5, "gelu"),
        ({"encoder_num_heads": 4, "encoder-depth": 2}, 4, 1e-5, "gelu"),
        ({"args": {"model_cfg": {"eps": 1e-6}}}, 2, 1e-6, "gelu"),
        ({"model": {"norm_layer": {"eps": 1e-6}, "optimizer": {"eps": 1e-8}}}, 2, 1e-6, "gelu"),
        ({"model": {"act": "torch.nn.SiLU"}}, 2, 1e-5, "silu"),
        ({"hidden_act": "gelu_new"}, 2, 1e-5, "gelu_tanh"),
        ({"act_layer": "<class 'torch.nn.modules.activation.ReLU'>"}, 2, 1e-5, "relu"),
        ({"num_heads": 4, "model": {"heads": 4}}, 4, 1e-5, "gelu"),
        ({"act": "RELU", "encoder_act": "nn.ReLU()"}, 2, 1e-5, "relu"),
        ({"heads_of_all": 8, "model": {"num_heads": "${heads_of_all}"}}, 8, 1e-5, "gelu"),
        ({"num_heads": np.int64(4), "norm_eps": np.float32(0.5)}, 4, 0.5, "gelu"),
        ({"patch_size": 16, "model": {"patch_size": (4, 16, 16)}}, 2, 1e-5, "gelu"),
        ({"patch_size": np.array([4, 16, 16]), "mlp_ratio": 0.75}, 2, 1e-5, "gelu"),
        (argparse.Namespace(num_heads=4, norm_eps=1e-6), 4, 1e-6, "gelu"),
    ],
)  # fmt: skip
def test_settings_are_found_by_their_usual_names(tmp_path, config, num_heads, eps, activation):
    loaded = model.load_encoder(written(tmp_path, config))
    assert (loaded.num_heads, loaded.eps, loaded.activation) == (num_heads, eps, activation)
    assert loaded.blocks[1].attn.num_heads == num_heads
    assert {m.eps for m in loaded.modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}
    # the attention of this many heads, not only its name
    volume = torch.randn(1, 1, 8, 32, 32)
    plain = model.ViT3D(128, 2, 8, 96, (4, 16, 16), num_heads, eps, activation).eval()
    plain.load_state_dict(loaded.state_dict())
    assert torch.equal(plain(volume), loaded(volume))


@pytest.mark.parametrize(
    "config",
    [
        {"predictor": {"num_heads": 3, "depth": 6, "embed_dim": 384, "act": "mish"}},
        {"predictor_num_heads": 3, "pred_depth": 6, "decoder_embed_dim": 384},
        {"model": {"predictor": {"heads": "x"}, "pred_embed_dim": 384, "decoder": {"depth": 4}}},
        {"optimizer": {"eps": 1e-8}, "optim": {"model": {"eps": 1}}, "eps": 1e-8},
        {"adamw": {"eps": 1e-8}, "anything": {"eps": 1e-8}},
        {"data": {"patch_size": 8, "depth": 64}, "wandb": {"depth": "x"}, "scheduler": {"dim": 1}},
        {"model": {"normalise": {"eps": 1e-8}, "attentive_pooler": {"num_heads": 16}}},
        {"model": {"head": {"dim": 4}, "loss": {"dim": 1}, "projector": {"hidden_size": 2048}}},
        {"model": {"mlp": {"dim": 96, "depth": 2}, "attention": {"dim": 64}}},
        {"depth": 64, "height": 384, "width": 384},
        {"num_heads": None, "model": {"eps": None, "act": None}},
        {"probe": {"num_heads": 16}, "anything": {"num_heads": 16}},
        "num_heads: 16",
        None,
    ],
)  # fmt: skip
def test_what_is_said_of_other_parts_is_not_said_of_the_encoder(tmp_path, config):
    loaded = model.load_encoder(written(tmp_path, config))
    assert (loaded.num_heads, loaded.eps, loaded.activation) == (2, 1e-5, "gelu")
    assert loaded.assumed == {
        "number of heads": "2 heads of width 64",
        "LayerNorm eps": "1e-05",
        "activation": "exact GELU",
    }


@pytest.mark.parametrize(
    "config, said",
    [
        ({"num_heads": 2}, "number of heads"),
        ({"head_dim": 64}, "number of heads"),
        ({"norm_eps": 1e-5}, "LayerNorm eps"),
        ({"act": "gelu"}, "activation"),
    ],
)
def test_what_is_said_is_not_assumed(tmp_path, config, said):
    every = ["number of heads", "LayerNorm eps", "activation"]
    every.remove(said)
    assert list(model.load_encoder(written(tmp_path, config)).assumed) == every


@pytest.mark.parametrize(
    "config, message",
    [
        # two things
        (
            {"num_heads": 2, "model": {"heads": 4}},
            "its config.num_heads is 2, but its config.model.heads is 4",
        ),
        (
            {"encoder": {"eps": 1e-6}, "norm_eps": 1e-5},
            "its config.encoder.eps is 1e-06, but its config.norm_eps is 1e-05",
        ),
        ({"act": "gelu", "model": {"act": "relu"}}, "act is gelu, .*config.model.act is relu"),
        ({"dim": 128, "model": {"dim": 256}}, "config.dim is 128, .*config.model.dim is 256"),
        # not what the weights have
        ({"model": {"embed_dim": 768}}, "model.embed_dim is 768, but its weights are 128 wide"),
        ({"num_hidden_layers": 12}, "num_hidden_layers is 12, but its weights are of 2 b"),
        ({"patch_size": [2, 16, 16]}, r"patch_size is \(2, 16, 16\), .* patches \(4, 16, 16\)"),
        ({"model": {"patch_size": 14}, "patch_size": 16}, r"model.patch_size is \(14, 14\)"),
        ({"vit": {"mlp_ratio": 4.0}}, "vit.mlp_ratio is 4.0, but its weights are 96 wide in"),
        ({"num_heads": 3}, "config.num_heads is 3, which does not divide the width 128"),
        ({"head_dim": 80}, "config.head_dim is 80, which does not divide the width 128"),
        ({"num_heads": 4, "head_dim": 64}, "num_heads is 4 and its config.head_dim is 64, but"),
        # unusable
        ({"num_heads": "4"}, "config.num_heads is '4', not a whole number"),
        ({"num_heads": True}, "config.num_heads is True, not a whole number"),
        ({"num_heads": [2, 4]}, r"config.num_heads is \[2, 4\], not a whole number"),
        ({"num_heads": 0}, "config.num_heads is 0, not a whole number"),
        ({"num_heads": -2}, "config.num_heads is -2, not a whole number"),
        ({"head_dim": 0}, "config.head_dim is 0, not a whole number"),
        ({"model": {"x" * 10**5 + "\n": {"heads": 0}}}, "config.model.x{187} is 0, not a whole"),
        ({"patch_size": 0}, "config.patch_size is 0, not one to three whole numbers"),
        ({"patch_size": [4, 16, 10**400]}, r"config.patch_size is \[4, 16, 1000.*, not one to"),
        ({"num_heads": 2.5}, "config.num_heads is 2.5, not a whole number"),
        ({"num_heads": 10**400}, "config.num_heads is 1000.*, not a whole number"),
        ({"model": {"num_heads": "${no.such}"}}, r"num_heads is '\$\{no.such\}', not a whole"),
        ({"a": "${b}", "b": "${a}", "act": "${a}"}, r"config.act is '\$\{[ab]\}', not one of"),
        ({"norm_eps": "1e-6"}, "config.norm_eps is '1e-6', not a number between 0 and 1"),
        ({"norm_eps": float("nan")}, "config.norm_eps is nan, not a number between"),
        ({"norm_eps": -1e-6}, "config.norm_eps is -1e-06, not a number between"),
        ({"mlp_ratio": float("inf")}, "config.mlp_ratio is inf, not a number"),
        ({"patch_size": [16]}, r"config.patch_size is \[16\], not one to three"),
        ({"hidden_act": "quick_gelu"}, "config.hidden_act is 'quick_gelu', not one of gelu, "),
        ({"act": False}, "config.act is False, not one of"),
        ({"act": "nn.GELU(approximate='other')"}, "config.act is .*, not one of"),
        ({"act": {"_target_": "torch.nn.ReLU"}}, "config.act is .*torch.nn.ReLU.*, not one of"),
        ({"model": {"act": pathlib.Path("x")}}, r"config.model.act is \['x'\], not one of"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_weights_or_itself_is_refused(tmp_path, config, message):
    with pytest.raises(
        ValueError, match=f"encoder.pt: context encoder not loaded: .*{message}"
    ) as e:
        model.load_encoder(written(tmp_path, config))
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000


def test_a_width_without_heads_of_64_needs_their_number(tmp_path):
    with pytest.raises(
        ValueError, match="does not say num_heads, and the width 160 .* add num_heads"
    ):
        model.load_encoder(written(tmp_path, {}, dim=160))


def test_settings_in_omegaconf_objects(tmp_path, monkeypatch):
    """Of the form that OmegaConf 2.3 pickles: nodes that know the whole by _parent."""
    omegaconf = types.ModuleType("omegaconf")
    for name in ("DictConfig", "AnyNode"):
        cls = type(name, (), {"__module__": "omegaconf"})
        setattr(omegaconf, name, cls)

    def node(value, parent=None):
        made = omegaconf.DictConfig() if isinstance(value, dict) else omegaconf.AnyNode()
        made._parent, made._metadata = parent, {"flags": {}}
        if isinstance(value, dict):
            made._content = {k: node(v, made) for k, v in value.items()}
        else:
            made._val = value
        return made

    whole = {"heads": 8, "model": {"num_heads": "${heads}", "norm": {"layer_norm_eps": 1e-6}}}
    monkeypatch.setitem(sys.modules, "omegaconf", omegaconf)
    for config in (node(whole), {**whole, "model": node(whole)._content["model"]}):
        path = written(tmp_path, config)
        loaded = model.load_encoder(path)
        assert (loaded.num_heads, loaded.eps) == (8, 1e-6)


def test_a_config_that_holds_itself_is_read(tmp_path):
    config = {"num_heads": 4}
    config["model"] = config["list"] = [config, config]
    config["again"] = config
    assert model.load_encoder(written(tmp_path, config)).num_heads == 4


@pytest.mark.parametrize("times, message", [(60, "more than 100,000 values"), (99, "100 deep")])
def test_a_config_of_more_than_settings_is_refused(tmp_path, times, message):
    """One list in many places makes 2 ** 60 values of a few bytes."""
    value = {"x": 1}
    for i in range(times):
        value = {"model": value, "again": value if times == 60 else i}
    with pytest.raises(ValueError, match=f"its config has .*{message}"):
        model.load_encoder(written(tmp_path, {"a": {"b": value}}))
