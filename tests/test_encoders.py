"""The encoders of others, against the libraries that they come from, with random weights in each
one's own format. The real weights are not here: see docs/encoders.md.

transformers has V-JEPA 2, but not 2.1, and both only on square frames; `slow_tokens` is a second,
slow implementation of both, written after the public description, and itself compared with
transformers where that can be.
"""

import ast
import importlib.util
import itertools
import json
import math
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import device
import weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def file_of(name):
    """The module of a file in encoders/, as model.loader makes it of the path."""
    path = os.path.join(ROOT, "encoders", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"encoder_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slices, vjepa2 = file_of("slices"), file_of("vjepa2")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def library(name):
    """timm or transformers, or the test is skipped."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return slices.import_library(name)


def random_volume(*size, samples=1, seed=0):
    """(B, 1, D, H, W), float32 from 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, 1, *size, generator=generator) * 255


def normalised(volume):
    """(B, 1, D, H, W) -> three equal channels, normalised as for ImageNet (B, 3, D, H, W)."""
    mean, std = (torch.tensor(v, dtype=volume.dtype).view(1, 3, 1, 1, 1) for v in (MEAN, STD))
    return (volume.expand(-1, 3, -1, -1, -1) / 255 - mean) / std


def tokens_of(encoder, volume):
    with torch.inference_mode():
        return encoder(encoder.normalise(volume))


# ---- V-JEPA 2 and 2.1


def meta_state(version, dim=64, depth=3, hidden=96, seed=0):
    """A state dict with the keys of Meta's files, of patches 2 x 4 x 4."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape, std=0.15):
        return torch.randn(shape, generator=generator) * std

    state = {
        "patch_embed.proj.weight": weight(dim, 3, 2, 4, 4),
        "patch_embed.proj.bias": weight(dim),
    }
    state["pos_embed"] = weight(1, 12, dim)  # there, and unused
    for i in range(depth):
        block = f"blocks.{i}."
        shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        shapes |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for name, shape in shapes.items():
            state[f"{block}{name}.weight"] = weight(*shape, std=1.5 * shape[1] ** -0.5)
            state[f"{block}{name}.bias"] = weight(shape[0])
        for name in ("norm1", "norm2"):
            state[f"{block}{name}.weight"] = 1 + weight(dim)
            state[f"{block}{name}.bias"] = weight(dim)
    norms = ["norm"] if version == "2" else [f"norms_block.{i}" for i in range(4)]
    for name in norms:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + weight(dim), weight(dim)
    if version == "2.1":
        del state["pos_embed"]
        state["patch_embed_img.proj.weight"] = weight(dim, 3, 1, 4, 4)
        state["patch_embed_img.proj.bias"] = weight(dim)
        for name in ("img_mod_embed", "video_mod_embed"):
            state[name] = weight(1, 1, dim, std=1)
    return state


def meta_file(path, state, key="target_encoder", prefix="module.backbone."):
    """The state dict as in Meta's file, with what lies beside it."""
    content = {
        key: {prefix + k: v for k, v in state.items()},
        "encoder": {prefix + "norm.weight": torch.ones(1)},
        "predictor": {"module.backbone.mask_tokens.0": torch.zeros(1, 1, 8)},
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "scaler": None,
        "epoch": 3,
        "loss": 0.5,
    }
    torch.save(content, path)
    return str(path)


def turned(x, grid, version):
    """Queries or keys (B, heads, N, d) with their rotary positions, one number after the other."""
    part, out = 2 * (x.shape[-1] // 3 // 2), x.clone()
    places = list(itertools.product(*map(range, grid)))
    for n, axis in itertools.product(range(len(places)), range(3)):
        place = places[n][axis]
        if version == "2.1" and axis:  # stretched to the 16 places of the pretraining's grid
            place *= 15 / (grid[axis] - 1)
        for pair in range(part // 2):
            i, j = axis * part + 2 * pair, axis * part + 2 * pair + 1
            if version == "2.1":  # as in Su et al. (2021)
                angles = [place / 10000 ** (2 * pair / part)] * 2
            else:  # the frequencies are written one after the other, twice
                exponents = [2 * (m % (part // 2)) / part for m in (2 * pair, 2 * pair + 1)]
                angles = [place / 10000**exponent for exponent in exponents]
            a, b = x[..., n, i], x[..., n, j]
            out[..., n, i] = a * math.cos(angles[0]) - b * math.sin(angles[0])
            out[..., n, j] = b * math.cos(angles[1]) + a * math.sin(angles[1])
    return out


def slow_tokens(state, volume, num_heads, version):
    """Tokens of one of Meta's state dicts, in double precision: (B, 1, D, H, W) -> (B, N, C)."""
    state = {k: v.double() for k, v in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    patch = kernel.shape[2:]
    x = F.conv3d(normalised(volume.double()), kernel, state["patch_embed.proj.bias"], stride=patch)
    grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)
    if version == "2.1":
        x = x + state["video_mod_embed"]
    for i in range(len({k.split(".")[1] for k in state if k.startswith("blocks.")})):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = turned(q, grid, version), turned(k, grid, version)
        attended = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm" if version == "2" else "norms_block.3")


# (version, width, heads): heads of 32 with a rest of 2 that is not turned, of 80 as in ViT-H
KINDS = [("2", 64, 2), ("2", 160, 2), ("2.1", 64, 2), ("2.1", 192, 3)]


@pytest.mark.parametrize(("version", "dim", "heads"), KINDS)
@pytest.mark.parametrize("size", [(8, 16, 16), (4, 12, 20), (2, 20, 8), (12, 8, 16)])
def test_tokens_of_metas_files_are_those_of_the_description(tmp_path, version, dim, heads, size):
    state, volume = meta_state(version, dim), random_volume(*size, samples=2)
    key = "target_encoder" if version == "2" else "ema_encoder"
    path = meta_file(tmp_path / "meta.pt", state, key)
    encoder = vjepa2.load(path, version=version, num_heads=heads)
    tokens = tokens_of(encoder, volume)
    grid = (size[0] // 2, size[1] // 4, size[2] // 4)
    assert encoder.grid(size) == grid and encoder.width == dim and encoder.image_size is None
    assert tokens.shape == (2, math.prod(grid), dim) and tokens.dtype == torch.float32
    torch.testing.assert_close(
        tokens, slow_tokens(state, volume, heads, version).float(), rtol=0, atol=1e-4
    )
    encoder.version = "2.1" if version == "2" else "2"  # a mix-up would show
    assert (tokens_of(encoder, volume) - tokens).abs().max() > 0.01


def transformers_model(crop_size, frames=8, model="VJEPA2Model", **options):
    """A small V-JEPA 2 of transformers, with weights large enough for positions to matter."""
    transformers = library("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, patch_size=4)
    predictor = dict(pred_hidden_size=24, pred_num_hidden_layers=4, pred_num_attention_heads=2)
    made = transformers.VJEPA2Config(
        **{**sizes, **predictor, **options},
        crop_size=crop_size,
        frames_per_clip=frames,
        initializer_range=0.2,
        num_pooler_layers=1,
    )
    network = getattr(transformers, model)(made).eval()
    for name, parameter in network.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    return network


def their_tokens(network, volume):
    """What transformers makes of (B, 1, D, H, W): it takes (B, D, 3, H, W)."""
    with torch.inference_mode():
        video = normalised(volume).transpose(1, 2)
        return network(video, skip_predictor=True).last_hidden_state


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("size", [(8, 16, 16), (4, 24, 24), (16, 12, 12)])
def test_tokens_are_those_of_transformers_at_its_crop_size(tmp_path, size, heads):
    saved = transformers_model(16, num_attention_heads=heads)
    saved.save_pretrained(tmp_path)
    encoder, volume = vjepa2.load(str(tmp_path)), random_volume(*size, samples=2)
    # its positions follow its config, so it has to be told the size; ours follow the volume
    network = transformers_model(size[1], num_attention_heads=heads)
    network.load_state_dict(saved.state_dict())
    torch.testing.assert_close(
        tokens_of(encoder, volume), their_tokens(network, volume), rtol=0, atol=1e-4
    )


def test_metas_file_and_a_folder_of_the_same_weights_give_the_same_tokens(tmp_path):
    network = transformers_model(16)
    network.save_pretrained(tmp_path)
    theirs, state = network.state_dict(), {}
    for name, keys in vjepa2.names_in_transformers("", 3).items():
        state[name] = torch.cat([theirs[key] for key in keys])
    path = meta_file(tmp_path / "meta.pt", state)
    volume = random_volume(4, 12, 20)
    folder, meta = vjepa2.load(str(tmp_path)), vjepa2.load(path, version=2, num_heads=2)
    assert torch.equal(tokens_of(folder, volume), tokens_of(meta, volume))
    # which is not square, so the slow implementation is compared
    torch.testing.assert_close(
        tokens_of(meta, volume), slow_tokens(state, volume, 2, "2").float(), rtol=0, atol=1e-4
    )


def test_the_slow_implementation_is_that_of_transformers():
    network, volume = transformers_model(12), random_volume(6, 12, 12)
    theirs = network.state_dict()
    state = {
        name: torch.cat([theirs[key] for key in keys])
        for name, keys in vjepa2.names_in_transformers("", 3).items()
    }
    slow = slow_tokens(state, volume, 2, "2").float()
    torch.testing.assert_close(slow, their_tokens(network, volume), rtol=0, atol=1e-4)


def test_folders_may_be_in_parts_and_of_a_classifier_and_named_by_their_weights(tmp_path):
    volume = random_volume(4, 16, 16)
    network = transformers_model(16, model="VJEPA2ForVideoClassification")
    expected = their_tokens(network.vjepa2, volume)
    network.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    network.save_pretrained(tmp_path / "one")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    for path in (tmp_path / "parts", index, tmp_path / "one", tmp_path / "one/model.safetensors"):
        tokens = tokens_of(vjepa2.load(str(path)), volume)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-4)


def test_one_channel_is_as_three_normalised_ones():
    state = meta_state("2")
    volume = random_volume(4, 8, 12)
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    expected = F.conv3d(normalised(volume), kernel, bias, stride=(2, 4, 4))
    folded = {"patch_embed.proj.weight": kernel.clone(), "patch_embed.proj.bias": bias.clone()}
    vjepa2.fold(folded)
    kernel, bias = folded.values()
    assert kernel.shape == (64, 1, 2, 4, 4)
    found = F.conv3d(volume / 255, kernel, bias, stride=(2, 4, 4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", ["2", "2.1"])
def test_bfloat16_on_the_cpu_is_close(tmp_path, version):
    path = meta_file(tmp_path / "meta.pt", meta_state(version, 160))
    encoder = vjepa2.load(path, version=version, num_heads=2)
    volume = random_volume(8, 16, 24)
    exact = tokens_of(encoder, volume)
    with device.autocast(torch.device("cpu"), "bf16"):
        tokens = tokens_of(encoder, volume)
    # bfloat16 has eight bits, and three blocks add up its errors: 2 % of the tokens' size
    assert (tokens - exact).norm() < 0.02 * exact.norm()
    assert tokens.dtype == torch.float32


@pytest.mark.parametrize("version", ["2", "2.1"])
def test_gradients_reach_every_weight_also_after_inference(tmp_path, version):
    path = meta_file(tmp_path / "meta.pt", meta_state(version))
    encoder = vjepa2.load(path, version=version, num_heads=2)
    volume = random_volume(4, 8, 12)
    assert not encoder.training
    tokens_of(encoder, volume)
    encoder.train()(encoder.normalise(volume)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_layers_are_in_order_and_hold_every_weight(tmp_path):
    path = meta_file(tmp_path / "meta.pt", meta_state("2"))
    encoder = vjepa2.load(path, version=2, num_heads=2)
    layers, calls = encoder.layers(), []
    assert layers == [encoder.patch_embed, *encoder.blocks, encoder.norm] and len(layers) == 5
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == sum(
        p.numel() for p in encoder.parameters()
    )
    for layer in layers:
        layer.register_forward_hook(lambda *call: calls.append(call))
    tokens_of(encoder, random_volume(4, 8, 12))
    assert [call[0] for call in calls] == layers
    assert all(args[0].shape == out.shape == (1, 12, 64) for _, args, out in calls[1:-1])


def test_the_norms_eps_is_metas_or_what_a_folder_says(tmp_path):
    def found(encoder):
        return {m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)}

    meta = meta_file(tmp_path / "meta.pt", meta_state("2.1"))
    assert found(vjepa2.load(meta, num_heads=2)) == {1e-6}
    transformers_model(16, layer_norm_eps=1e-3).save_pretrained(tmp_path)
    assert found(vjepa2.load(str(tmp_path))) == {1e-3}


def test_half_precision_files_are_read_as_float32(tmp_path):
    state = {k: v.bfloat16() for k, v in meta_state("2.1").items()}
    encoder = vjepa2.load(meta_file(tmp_path / "meta.pt", state), num_heads=2)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    volume = random_volume(4, 8, 12)
    expected = slow_tokens(state, volume, 2, "2.1").float()
    torch.testing.assert_close(tokens_of(encoder, volume), expected, rtol=0, atol=1e-4)


def test_safetensors_of_metas_layout(tmp_path):
    state, path = meta_state("2.1"), str(tmp_path / "meta.safetensors")
    save_file(state, path)
    volume = random_volume(4, 8, 12)
    tokens = tokens_of(vjepa2.load(path, num_heads=2, key="model_state_dict"), volume)
    expected = tokens_of(vjepa2.load(meta_file(tmp_path / "m.pt", state), num_heads=2), volume)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(drop="blocks.1.mlp.fc2.bias"), r"missing: blocks\.1\.mlp\.fc2\.bias"),
        (dict(drop="patch_embed.proj.weight"), r"missing .*: patch_embed\.proj\.weight"),
        (dict(drop="norm.bias"), r"missing: norm\.bias"),
        (dict(add=("blocks.0.ls1.gamma", 64)), r"unexpected: blocks\.0\.ls1\.gamma"),
        (dict(add=("blocks.3.norm1.weight", 64)), r"missing: blocks\.3\."),
        (dict(add=("blocks.0.norm1.weight", 63)), r"norm1\.weight \(63,\), expected \(64,\)"),
        (dict(nan="norm.weight"), r"not finite: norm\.weight"),
        (dict(put=torch.ones(64, dtype=torch.int64)), r"not named tensors .*: .*norm\.bias"),
        (dict(put="text"), r"not named tensors .*: .*norm\.bias"),
    ],
)
def test_keys_that_are_not_as_needed_are_named(tmp_path, change, message):
    state = meta_state("2")
    if "drop" in change:
        del state[change["drop"]]
    if "add" in change:
        state[change["add"][0]] = torch.ones(change["add"][1])
    if "nan" in change:
        state[change["nan"]][0] = math.nan
    if "put" in change:
        state["norm.bias"] = change["put"]
    path = meta_file(tmp_path / "meta.pt", state)
    with pytest.raises(ValueError, match=f"^{re.escape(path)}: V-JEPA 2 not loaded: .*{message}"):
        vjepa2.load(path, version=2, num_heads=2)


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        ("2", dict(num_heads=2), "set model.loader_options.version to 2"),
        ("2", dict(version=2.1, num_heads=2), "keys are those of V-JEPA 2, but .*version is 2.1"),
        ("2.1", dict(version=2, num_heads=2), "keys are those of V-JEPA 2.1, but .*version is 2$"),
        ("2", dict(version=3), "version is 3, not 2 or 2.1"),
        ("2", dict(version=2), "number of heads is not in its weights"),
        ("2", dict(version=2, num_heads=5), "5 heads, which do not divide a width of 64"),
        ("2", dict(version=2, num_heads=64), "64 heads, which do not divide"),
        ("2", dict(version=2, model="vit_large"), "64 wide, of 3 blocks, but .* 1024 wide, of 24"),
        ("2", dict(version=2, model="vit_small"), "'vit_small', not one of"),
        ("2", dict(version=2, num_heads=2, key="ema_encoder"), "no state dict 'ema_encoder'"),
        ("2", dict(version=2, num_heads=2, key="epoch"), "no state dict 'epoch'"),
    ],
)
def test_what_the_file_cannot_tell_is_never_guessed(tmp_path, version, options, message):
    path = meta_file(tmp_path / "meta.pt", meta_state(version))
    with pytest.raises(ValueError, match=message):
        vjepa2.load(path, **options)


def test_published_sizes_with_their_numbers_of_heads(monkeypatch, tmp_path):
    monkeypatch.setitem(vjepa2.MODELS, "vit_base", (64, 3, 4))
    path = meta_file(tmp_path / "meta.pt", meta_state("2.1"), "ema_encoder")
    assert vjepa2.load(path, model="vit_base").num_heads == 4
    with pytest.raises(ValueError, match="model says 4 and .*num_heads says 2"):
        vjepa2.load(path, model="vit_base", num_heads=2)


def test_of_several_encoders_one_is_named(tmp_path):
    state = {f"module.backbone.{k}": v for k, v in meta_state("2").items()}
    both = {"target_encoder": state, "ema_encoder": state}
    torch.save(both, tmp_path / "both.pt")
    torch.save({"encoder": state}, tmp_path / "one.pt")
    with pytest.raises(ValueError, match="it has target_encoder and ema_encoder; set .*key"):
        vjepa2.load(str(tmp_path / "both.pt"), version=2, num_heads=2)
    with pytest.raises(ValueError, match="neither target_encoder nor ema_encoder; .*encoder"):
        vjepa2.load(str(tmp_path / "one.pt"), version=2, num_heads=2)
    options = dict(version=2, num_heads=2, key="encoder")
    assert vjepa2.load(str(tmp_path / "one.pt"), **options).width == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_attention_heads=4), None),
        (dict(num_attention_heads=None), "number of heads is not in its weights"),
        (dict(num_attention_heads=5), "num_attention_heads says 5 heads, which do not divide"),
        (dict(hidden_size=32), "hidden_size 32, but its weights 64"),
        (dict(num_hidden_layers=2), "num_hidden_layers 2, but its weights 3"),
        (dict(model_type="vit"), "model_type 'vit', not vjepa2"),
        (dict(hidden_act="relu"), "hidden_act 'relu', not gelu"),
    ],
)
def test_a_folders_config_is_checked(tmp_path, change, message):
    transformers_model(16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        assert vjepa2.load(str(tmp_path)).num_heads == 4
        with pytest.raises(ValueError, match="num_heads says 2 and .* says 4"):
            vjepa2.load(str(tmp_path), num_heads=2)
        return
    with pytest.raises(ValueError, match=message):
        vjepa2.load(str(tmp_path))


def test_a_folder_lacks_a_part(tmp_path):
    transformers_model(16).save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    part = content["weight_map"]["encoder.layernorm.weight"]
    os.remove(tmp_path / part)
    with pytest.raises(FileNotFoundError, match=part):
        vjepa2.load(str(tmp_path))
    kept = {k: v for k, v in content["weight_map"].items() if v != part}
    index.write_text(json.dumps({**content, "weight_map": kept}))
    with pytest.raises(ValueError, match=r"missing: .*encoder\.layernorm\.weight"):
        vjepa2.load(str(tmp_path))
    index.write_text(json.dumps({**content, "weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="outside of the folder"):
        vjepa2.load(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/octprobe-was-here",)


@pytest.mark.parametrize("load", [vjepa2.load, slices.load])
def test_no_code_of_a_file_runs(tmp_path, load):
    path = str(tmp_path / "evil.pt")
    torch.save({"target_encoder": meta_state("2"), "more": Evil()}, path)
    library("timm")
    options = {} if load is vjepa2.load else dict(name="test_vit", key="target_encoder")
    with pytest.raises(ValueError, match="refused, nothing was run"):
        load(path, **options)
    assert not os.path.exists("/tmp/octprobe-was-here")


def test_sizes_that_are_not_whole_patches_are_refused(tmp_path):
    path = meta_file(tmp_path / "meta.pt", meta_state("2"))
    encoder = vjepa2.load(path, version=2, num_heads=2)
    for size in ((3, 8, 8), (4, 9, 8), (0, 8, 8)):
        with pytest.raises(ValueError, match="not whole patches"):
            encoder.grid(size)
    with pytest.raises(ValueError, match="not whole patches"):
        encoder(torch.zeros(1, 1, 3, 8, 8))


@pytest.mark.parametrize("scaled", [vjepa2.scaled, slices.scaled])
def test_intensities_of_another_kind_are_refused(scaled):
    volume = random_volume(4, 8, 8)
    assert torch.equal(scaled(volume, 255), volume / 255)
    assert torch.equal(scaled(volume * 257, 65535), volume * 257 / 65535)
    assert torch.equal(scaled(volume * 0, 255), volume * 0)  # a constant volume
    for other in (volume * 257, volume / 255):
        with pytest.raises(ValueError, match=r"set it to the largest"):
            scaled(other, 255)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "version"), [("vit_base", "2.1"), ("vit_large", "2")])
def test_published_sizes_load_whole(tmp_path, model, version):
    dim, depth, heads = vjepa2.MODELS[model]
    state = meta_state(version, dim, depth, 4 * dim)
    path = meta_file(tmp_path / "meta.pt", state)
    encoder = vjepa2.load(path, version=version, model=model)
    assert encoder.num_heads == heads and len(encoder.blocks) == depth
    assert tokens_of(encoder, random_volume(4, 16, 16)).shape == (1, 32, dim)


# ---- files


@pytest.mark.parametrize("name", ["slices", "vjepa2"])
def test_no_library_is_imported_before_it_is_needed(name):
    with open(os.path.join(ROOT, "encoders", f"{name}.py"), encoding="utf-8") as file:
        nodes = ast.parse(file.read()).body
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert names <= {"torch", "numpy", "device", "model", "weights"}


def test_read_file_gives_what_lies_in_a_file(tmp_path):
    torch.save({"a": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "a.pt")
    content = weights.read_file(str(tmp_path / "a.pt"))
    assert content["epoch"] == 3 and content["a"]["w"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="has no 'model_state_dict'"):
        weights.read_checkpoint(str(tmp_path / "a.pt"))
    (tmp_path / "b.pt").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="cannot be read|not a checkpoint that can be read"):
        weights.read_file(str(tmp_path / "b.pt"))


# ---- B-scans through a 2D backbone

# timm's names with their sizes here: a plain ViT, one with registers as RETFound-Green's, CNNs
TIMM = {"test_vit": 32, "vit_small_patch14_reg4_dinov2": 28, "resnet18": 64, "test_convnext": 64}


def timm_file(path, name, size=None, prefix="", **beside):
    """(timm's model with random weights, a file of them; with a prefix, under "teacher")."""
    torch.manual_seed(0)
    options = {"img_size": size} if size and "vit" in name else {}
    model = library("timm").create_model(name, pretrained=False, num_classes=0, **options).eval()
    for module_name, weight in model.state_dict().items():
        if "running" in module_name:  # of batch norms, which would otherwise do nothing
            weight.uniform_(0.5, 1.5)
    state = {prefix + k: v.clone() for k, v in model.state_dict().items()} | beside
    torch.save({"teacher": state, "epoch": 1} if prefix else state, path)
    return model, str(path)


def image(volume, place, size, mean, std):
    """What a backbone gets of one B-scan of a volume (1, 1, D, H, W): (1, 3, size, size)."""
    scan = volume[:, :, place] / 255
    if scan.shape[2:] != (size, size):
        scan = F.interpolate(scan, (size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (scan.expand(-1, 3, -1, -1) - mean) / std


@pytest.mark.parametrize("name", TIMM)
def test_a_scans_token_is_timms_feature_of_it(tmp_path, name):
    size = TIMM[name]
    model, path = timm_file(tmp_path / "w.pth", name, size)
    encoder = slices.load(path, name=name, size=size, mean=MEAN, std=STD)
    volume = random_volume(3, 30, 40)
    tokens = tokens_of(encoder, volume)
    with torch.inference_mode():
        expected = torch.cat([model(image(volume, i, size, MEAN, STD)) for i in range(3)])
    torch.testing.assert_close(tokens[0], expected, rtol=0, atol=1e-4)
    assert encoder.grid((3, 30, 40)) == (3, 1, 1) and encoder.width == expected.shape[1]


@pytest.mark.parametrize("name", TIMM)
def test_patches_are_those_of_timm_at_their_places(tmp_path, name):
    size = TIMM[name]
    model, path = timm_file(tmp_path / "w.pth", name, size)
    encoder = slices.load(
        path, name=name, size=size, mean=0.5, std=0.25, tokens="patches", frames=2
    )
    volume = random_volume(4, size, size)
    tokens = tokens_of(encoder, volume)
    d, h, w = encoder.grid((4, size, size))
    assert d == 2 and tokens.shape == (1, 2 * h * w, encoder.width)
    for i, place in enumerate((1, 3)):
        with torch.inference_mode():
            x = model.forward_features(image(volume, place, size, [0.5] * 3, [0.25] * 3))
            if x.ndim == 3:
                expected = x[:, model.num_prefix_tokens :]
            else:
                expected = x.flatten(2).transpose(1, 2)
        found = tokens.unflatten(1, (d, h * w))[:, i]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_mean_of_patches_as_retfound_green_has_it(tmp_path):
    name = "vit_small_patch14_reg4_dinov2"
    model, path = timm_file(tmp_path / "w.pth", name, 28)
    encoder = slices.load(path, name=name, size=28, mean=0.5, std=0.5, pool="mean")
    model.global_pool = "avg"  # as its README says
    volume = random_volume(1, 28, 28)
    with torch.inference_mode():
        expected = model(image(volume, 0, 28, [0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(tokens_of(encoder, volume)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("frames", "places"), [(1, [4]), (3, [1, 4, 7]), (None, list(range(9)))])
def test_which_scans_are_taken(tmp_path, frames, places):
    _, path = timm_file(tmp_path / "w.pth", "test_vit", 32)
    options = dict(name="test_vit", size=32)
    encoder = slices.load(path, frames=frames, **options)
    every = slices.load(path, **options)
    volume = random_volume(9, 32, 32)
    assert encoder.places(9) == places and encoder.grid((9, 32, 32)) == (len(places), 1, 1)
    expected = tokens_of(every, volume)[:, places]
    torch.testing.assert_close(tokens_of(encoder, volume), expected, rtol=0, atol=1e-5)


def test_the_middle_of_an_even_number_and_too_many_scans():
    library("timm")
    encoder = slices.load(None, name="test_vit", size=32, frames=1, random=True)
    assert encoder.places(8) == [4] and encoder.places(1) == [0]
    encoder.frames = 5
    assert encoder.places(5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="frames is 5, but the volume has 4 B-scans"):
        encoder.grid((4, 32, 32))


@pytest.mark.parametrize("tokens", ["scans", "patches"])
@pytest.mark.parametrize("name", ["test_vit", "resnet18"])
def test_batches_are_as_one_by_one(tmp_path, name, tokens):
    _, path = timm_file(tmp_path / "w.pth", name, TIMM[name])
    options = dict(name=name, size=TIMM[name], tokens=tokens)
    volume = random_volume(5, 40, 48, samples=2)
    one = slices.load(path, batch=1, **options)
    expected = torch.cat([tokens_of(one, sample) for sample in volume.split(1)])
    for batch in (3, 64):
        found = tokens_of(slices.load(path, batch=batch, **options), volume)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def hugging_face(kind):
    """A small model of transformers with random weights, its images 28 x 28."""
    transformers = library("transformers")
    vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2)
    vit |= dict(image_size=28, patch_size=14)
    made = {
        "Dinov2": vit,
        "Dinov2WithRegisters": {**vit, "num_register_tokens": 3},
        "ViT": {**vit, "intermediate_size": 64},
        "DINOv3ViT": {**vit, "intermediate_size": 64, "num_register_tokens": 2},
        "ResNet": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    }[kind]
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**made)
    return getattr(transformers, f"{kind}Model")(made).eval()


HUGGING_FACE = ["Dinov2", "Dinov2WithRegisters", "ViT", "DINOv3ViT", "ResNet"]


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_tokens_are_those_of_transformers(tmp_path, kind):
    model = hugging_face(kind)
    model.save_pretrained(tmp_path)
    said = {"crop_size": {"height": 28, "width": 28}, "image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    volume = random_volume(2, 20, 36)
    with torch.inference_mode():
        x = torch.cat([image(volume, i, 28, MEAN, STD) for i in range(2)])
        x = model(pixel_values=x).last_hidden_state
    x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (2, N, C)
    patches = x if kind == "ResNet" else x[:, -4:]
    feature = x.mean(1) if kind == "ResNet" else x[:, 0]
    scans = slices.load(str(tmp_path), library="transformers")
    torch.testing.assert_close(tokens_of(scans, volume)[0], feature, rtol=0, atol=1e-4)
    every = slices.load(str(tmp_path), library="transformers", tokens="patches")
    found = tokens_of(every, volume)[0]
    torch.testing.assert_close(found, patches.flatten(0, 1), rtol=0, atol=1e-4)
    assert math.prod(every.grid((2, 20, 36))) == len(found)


@pytest.mark.parametrize("kind", ["Dinov2", "ViT", "DINOv3ViT"])
def test_transformers_resamples_positions_for_a_size_that_is_asked_for(tmp_path, kind):
    model = hugging_face(kind)
    model.save_pretrained(tmp_path)
    options = dict(library="transformers", mean=MEAN, std=STD, tokens="patches")
    encoder = slices.load(str(tmp_path), size=[28, 42], **options)
    assert encoder.grid((3, 50, 50)) == (3, 2, 3)
    assert tokens_of(encoder, random_volume(3, 50, 50)).shape == (1, 18, 32)


def test_a_folder_of_transformers_with_wrong_weights_is_refused(tmp_path):
    model = hugging_face("Dinov2")
    options = dict(library="transformers", mean=0.5, std=0.5)
    state = model.state_dict()

    def refused(state, message):
        model.save_pretrained(tmp_path)
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            slices.load(str(tmp_path), **options)

    refused({k: v for k, v in state.items() if k != "layernorm.bias"}, r"missing: layernorm\.bias")
    refused({**state, "more.weight": torch.ones(1)}, r"unexpected: more\.weight")
    refused({**state, "layernorm.bias": torch.ones(5)}, r"wrong shape: .*layernorm\.bias")
    refused({**state, "layernorm.bias": torch.full((32,), math.inf)}, "not finite: layernorm")
    os.remove(tmp_path / "config.json")
    with pytest.raises(ValueError, match="no config.json of transformers"):
        slices.load(str(tmp_path), **options)


def test_a_folder_that_does_not_tell_mean_and_std_is_refused(tmp_path):
    hugging_face("Dinov2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing tells its mean; set .*mean"):
        slices.load(str(tmp_path), library="transformers")


def test_a_file_of_weights_with_the_config_of_a_folder(tmp_path):
    model = hugging_face("Dinov2")
    model.config.save_pretrained(tmp_path)
    path = str(tmp_path / "weights.pth")
    torch.save({"model": {f"net.{k}": v for k, v in model.state_dict().items()}}, path)
    options = dict(library="transformers", mean=0.5, std=0.5, key="model", prefix="net.")
    encoder = slices.load(path, name=str(tmp_path), **options)
    volume = random_volume(1, 28, 28)
    with torch.inference_mode():
        x = model(pixel_values=image(volume, 0, 28, [0.5] * 3, [0.5] * 3)).last_hidden_state
    torch.testing.assert_close(tokens_of(encoder, volume), x[:, :1], rtol=0, atol=1e-4)


def test_keys_beside_the_backbones_are_ignored_by_name_alone(tmp_path):
    one = torch.ones(1)
    beside = {"decoder_pred.weight": one, "mask_token": one, "head.bias": one}
    _, path = timm_file(tmp_path / "w.pth", "test_vit", 32, **beside)
    assert slices.load(path, name="test_vit", size=32).width == 64
    _, path = timm_file(tmp_path / "w.pth", "test_vit", 32, "backbone.", **{"dino_head.w": one})
    options = dict(name="test_vit", size=32, key="teacher")
    assert slices.load(path, prefix="backbone.", **options).width == 64
    with pytest.raises(ValueError, match=r"missing: .*; unexpected: .*backbone\."):
        slices.load(path, **options)
    with pytest.raises(ValueError, match="no state dict 'model'; found .*teacher"):
        slices.load(path, name="test_vit", size=32, key="model")
    with pytest.raises(ValueError, match="no weights begin with 'net.'"):
        slices.load(path, name="test_vit", size=32, key="teacher", prefix="net.")
    _, path = timm_file(tmp_path / "w.pth", "test_vit", 32, **{"adapter.w": one})
    with pytest.raises(ValueError, match=r"unexpected: adapter\.w"):
        slices.load(path, name="test_vit", size=32)
    assert slices.load(path, name="test_vit", size=32, unused=["adapter."]).width == 64


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_timm_that_are_not_as_needed_are_named(tmp_path, suffix):
    model, _ = timm_file(tmp_path / "w.pth", "resnet18")
    state, path = model.state_dict(), str(tmp_path / f"w{suffix}")

    def refused(state, message):
        save = save_file if suffix == ".safetensors" else torch.save
        save(state, path)
        with pytest.raises(ValueError, match=f"{re.escape(path)}: backbone not loaded: {message}"):
            slices.load(path, name="resnet18", size=64)

    refused({k: v for k, v in state.items() if k != "bn1.bias"}, r"missing: bn1\.bias")
    refused({**state, "bn1.bias": torch.ones(5)}, r"wrong shape: bn1\.bias \(5,\), expected \(64,")
    refused({**state, "bn1.bias": torch.full((64,), math.nan)}, r"not finite: bn1\.bias")


def test_positions_are_resampled_only_for_a_size_that_is_asked_for(tmp_path):
    timm = library("timm")
    model, path = timm_file(tmp_path / "w.pth", "test_vit", 64)
    with pytest.raises(ValueError, match="wrong shape: pos_embed .*; set .*size"):
        slices.load(path, name="test_vit")
    encoder = slices.load(path, name="test_vit", size=32, mean=MEAN, std=STD)
    model.set_input_size(img_size=(32, 32))
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer)
    volume = random_volume(1, 32, 32)
    with torch.inference_mode():
        expected = model(image(volume, 0, 32, MEAN, STD))
    torch.testing.assert_close(tokens_of(encoder, volume)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="test_vit"), "no path of weights"),
        (dict(name="no_such_model", random=True), "timm has no model 'no_such_model'"),
        (dict(name="hf-hub:timm/resnet18", random=True), "timm has no model"),
        (dict(random=True), "timm has no model None"),
        (dict(name="test_vit", random=True, tokens="all"), "tokens is 'all'"),
        (dict(name="test_vit", random=True, library="keras"), "library is 'keras'"),
        (dict(name="test_vit", random=True, pool="max"), "pool is 'max'"),
        (dict(name="test_vit", random=True, frames=0), "frames is 0"),
        (dict(name="test_vit", random=True, batch=None), "batch is None"),
        (dict(name="test_vit", random=True, mean=[0.5, 0.5]), "one number or three"),
        (dict(name="resnet18", random=True, pool="cls"), "no CLS token"),
        (dict(library="transformers", name="no/such/folder", random=True), "no config.json"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    library(options.get("library", "timm") if options.get("library") != "keras" else "timm")
    with pytest.raises(ValueError, match=message):
        slices.load(None, **options)


def test_random_weights_are_asked_for_in_so_many_words(tmp_path):
    _, path = timm_file(tmp_path / "w.pth", "test_vit", 32)
    with pytest.raises(ValueError, match="random is true, but the weights are"):
        slices.load(path, name="test_vit", random=True)


@pytest.mark.parametrize("kind", ["timm", "Dinov2", "Dinov2WithRegisters", "ViT", "DINOv3ViT"])
def test_layers_of_a_vit_are_in_order_and_of_a_cnn_there_are_none(tmp_path, kind):
    options = dict(random=True, size=28, mean=0.5, std=0.5, frames=2)
    if kind == "timm":
        library("timm")
        encoder = slices.load(None, name="test_vit", **{**options, "size": 32})
        assert not hasattr(slices.load(None, name="resnet18", **options), "layers")
    else:
        hugging_face(kind).config.save_pretrained(tmp_path)
        encoder = slices.load(None, name=str(tmp_path), library="transformers", **options)
    layers, calls = encoder.layers(), []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: calls.append((module, args, out)))
    tokens_of(encoder, random_volume(2, 28, 28))
    assert [module for module, *_ in calls] == layers and len(layers) >= 4
    for _, (x, *_), out in calls[1:-1]:
        out = out[0] if isinstance(out, tuple) else out
        assert x.shape == out.shape and x.shape[0] == 2


def test_gradients_of_slices_reach_the_patches():
    library("timm")
    encoder = slices.load(None, name="test_vit", size=32, random=True, tokens="patches").train()
    encoder(encoder.normalise(random_volume(2, 40, 40))).square().sum().backward()
    patches, *_ = encoder.layers()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in patches.parameters())


def test_slices_in_bfloat16_on_the_cpu_are_close(tmp_path):
    _, path = timm_file(tmp_path / "w.pth", "test_vit", 32)
    encoder, volume = slices.load(path, name="test_vit", size=32), random_volume(3, 32, 32)
    exact = tokens_of(encoder, volume)
    with device.autocast(torch.device("cpu"), "bf16"):
        tokens = tokens_of(encoder, volume)
    assert (tokens.float() - exact).norm() < 0.03 * exact.norm()
