"""An encoder of the reader's own: model.loader, without touching a source file."""

import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, content, quick, settings, tables, triton

import data
import features
import ledger
import loader
import model
import volumes

# fifteen lines that a reader writes: B-scans as tokens, by a small network of their own
MINE = """
import torch
from torch import nn

class Scans(nn.Module):
    width, image_size = 64, None

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 64, 8, 8)
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.norm = nn.LayerNorm(64)

    def forward(self, volume):  # (B, 1, D, H, W) -> (B, D, 64)
        b, _, d, h, w = volume.shape
        x = self.stem(volume.reshape(b * d, 1, h, w)).flatten(2).mean(2).view(b, d, 64)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def grid(self, size):
        return size[0], 1, 1

    def layers(self):
        return [self.stem, *self.blocks, self.norm]

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))

def load(path, seed=0):
    return Scans(seed)
"""


@pytest.fixture()
def mine(tmp_path):
    """mine(text) -> overrides of a run with an encoder file of that text."""

    def make(text=MINE, *overrides, name="mine.py"):
        (tmp_path / name).write_text(text)
        more = [f"model.loader={tmp_path}/{name}", "model.emb_dim=null"]
        return [*more, "paths.checkpoint_path=null", *overrides]

    return make


def test_an_encoder_of_ones_own_is_trained_scored_and_compared(written, tmp_path, command, mine):
    arguments = ["--config", "configs/demo.yaml", *settings(written, tmp_path), *mine()]
    done = command("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    done = command("eval.py", "--ckpt", tmp_path / "run", "--split", "test")
    assert done.returncode == 0, done.stderr
    result = json.loads(content(tmp_path / "run" / "eval_test.json"))
    made = json.loads(content(tmp_path / "run" / "provenance.json"))
    assert made["encoder_sha256"] == result["encoder_sha256"]
    assert made["loader"]["file"] == f"{tmp_path}/mine.py" and len(made["loader"]["sha256"]) == 64


def opened(written, tmp_path, overrides):
    return loader.open_encoder(quick(written, tmp_path, *overrides))


def test_its_source_and_options_are_in_every_features_key(written, tmp_path, mine):
    first = opened(written, tmp_path, mine())
    assert first.sha256 == opened(written, tmp_path, mine()).sha256
    others = [
        mine(MINE + "\n# edited\n", name="edited.py"),
        mine(MINE, "model.loader_options={seed: 1}"),
        # the same weights, by an option that says so
        mine(MINE, "model.loader_options={seed: 0}"),
    ]
    found = [opened(written, tmp_path, overrides).sha256 for overrides in others]
    assert len({first.sha256, *found}) == 4
    kept = [
        features.Kept(quick(written, tmp_path, *overrides, "model.emb_dim=64"), encoder, 0).folder
        for overrides, encoder in (
            (others[0], first),
            (others[1], opened(written, tmp_path, mine())),
        )
    ]
    assert first.sha256[:16] in kept[0] and len(set(kept)) == 1


def test_the_version_of_its_library_is_in_every_features_key(written, tmp_path, mine):
    with_version = MINE + """
import pathlib
of_eyes = load
def load(*args, **options):
    module = of_eyes(*args, **options)
    module.made_with = f"eyes {pathlib.Path(__file__).with_suffix('.version').read_text()}"
    return module
"""
    overrides, found = mine(with_version), []
    for version in ("1.0", "1.0", "1.1"):
        (tmp_path / "mine.version").write_text(version)
        found.append(opened(written, tmp_path, overrides).sha256)
    assert found[0] == found[1] != found[2]


def test_an_edited_encoder_meets_no_stale_features(written, tmp_path, command, mine):
    arguments = ["--config", "configs/demo.yaml", *settings(written, tmp_path)]
    assert " volumes encoded, 0 from" in command("train.py", *arguments, *mine()).stdout
    assert "features: 0 volumes encoded" in command("train.py", *arguments, *mine()).stdout
    edited = MINE.replace("tanh", "sin")
    done = command("train.py", *arguments, *mine(edited))
    assert " volumes encoded, 0 from" in done.stdout and "features: 0 volumes" not in done.stdout
    # the run that was trained with it does not meet another either
    mine()
    done = command("eval.py", "--ckpt", tmp_path / "run")
    assert done.returncode == 1 and "the head was trained on" in done.stderr


def broken(change):
    return MINE.replace(*change)


@pytest.mark.parametrize(
    "text, message",
    [
        ("def lode(path): pass", "has no function load"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError: No module named"),
        ("def load(path:", "cannot be imported: SyntaxError"),
        ("def load(path): return 3", "load gives int, no nn.Module"),
        (broken(("width, image_size = 64, None", "width = 64")), "its module has no image_size"),
        (broken(("width, image_size = 64", "image_size = 64")), "its .* has no width, the number"),
        (broken(("64, None", "64.0, None")), "its width is 64.0, not the number of channels"),
        (broken(("64, None", "64, (16, 64)")), r"its image_size is \(16, 64\), not \(D, H, W\)"),
        (broken(("def grid", "def grod")), "its module has no grid, grid.size. ->"),
        (broken(("size[0], 1, 1", "size[0], 2, 1")), r"gives \(1, 16, 64\) for a volume"),
        (broken(("width, image_size = 64", "width, image_size = 32")), r"is to be \(B, 16, 32\)"),
        (broken(("return self.norm(x)", "return x[0]")), r"gives \(16, 64\) for a volume"),
        (broken(("return self.norm(x)", "return None")), "gives NoneType for a volume"),
        (
            broken(("return self.norm(x)", "return x * float('nan')")),
            "features of .* are not finite",
        ),
    ],
)
def test_a_broken_contract_is_one_sentence(written, tmp_path, command, mine, text, message):
    arguments = ["--config", "configs/demo.yaml", *settings(written, tmp_path), *mine(text)]
    done = command("train.py", *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    import re

    assert re.search(message, done.stderr.splitlines()[-1]), done.stderr
    assert not (tmp_path / "cache" / "features").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.loader=nowhere.py"], "model.loader=nowhere.py is not a file"),
        (["model.loader_options={depth: 3}"], "model.loader_options: load.. got an unexpected key"),
        (["model.emb_dim=768"], "model.emb_dim is 768, but the encoder of .* is 64 wide"),
        (["model.loader=null"], "paths.checkpoint_path=null is for an encoder that model.loader"),
    ],
)
def test_wrong_settings_are_named(written, tmp_path, mine, overrides, message):
    with pytest.raises(ValueError, match=message):
        opened(written, tmp_path, [*mine(), *overrides])


# ------------------------------------------------------------------------------------ intensities

BRIGHT = MINE.replace(
    "    def grid",
    """    def normalise(self, volume):  # (B, 1, D, H, W), as the file has them
        assert volume.dtype == torch.float32
        return volume / 255

    def grid""",
)


def test_one_cache_serves_z_scores_and_intensities(written, tmp_path, mine, monkeypatch):
    """The number of files that are decoded says so; and the intensities are those of the file."""
    decoded = []
    decode = volumes.decode
    monkeypatch.setattr(
        data, "decode", lambda path, *args: decoded.append(path) or decode(path, *args)
    )
    cfg = quick(written, tmp_path, *mine(), f"paths.cache_dir={tmp_path}/cache")
    book = ledger.read(cfg)
    samples = book.of("test")
    for text in (MINE, BRIGHT):
        cfg = quick(written, tmp_path, *mine(text), f"paths.cache_dir={tmp_path}/cache")
        encoder = loader.open_encoder(cfg)
        assert encoder.wants_intensities == (text == BRIGHT)
        found = features.encode(cfg, ledger.read(cfg), samples, encoder, torch.device("cpu"))
    assert len(decoded) == len(samples)
    seen = data.open_volumes(cfg, samples, encoder.size, book.ids, encoder.wants_intensities)
    order = range(3)
    for i, _, volume in data.stream(seen, None, order, cfg):
        whole = volumes.read_volume(samples[i].path).astype(np.float32)  # (frames, rows, columns)
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(whole)[None, None], encoder.size, mode="trilinear"
        )[0]
        # half of float16's last digit, of a value up to ten SD from the mean
        assert (volume - resized).abs().max() <= 2**-11 * 10 * resized.std()
        module = encoder.module.module
        with torch.no_grad():
            expected = module(resized[None] / 255)[0].mean(dim=0)
        assert torch.allclose(found.x[i], expected, atol=1e-3)


# ------------------------------------------------------------------------- fine-tuning, and floors


def test_parameter_groups_of_any_encoder_follow_its_layers(written, tmp_path, mine):
    module = opened(written, tmp_path, mine()).module.requires_grad_(True)
    groups = model.parameter_groups(module, 1.0, 0.5, 0.1)
    rate_of = {id(p): group["peak"] for group in groups for p in group["params"]}
    for i, layer in enumerate(module.layers()):
        assert {rate_of[id(p)] for p in layer.parameters()} == {0.5 ** (3 - i)}


def test_drop_path_skips_a_block_for_some_samples(written, tmp_path, mine):
    module = opened(written, tmp_path, mine()).module.train()
    volume, noise = torch.randn(64, 1, 4, 16, 16), model.Noise(7, torch.arange(64), 64)
    plain = module(volume)
    module.drop_path = 0.9
    dropped = module(volume, noise)
    assert torch.equal(dropped, module(volume, noise))
    # the first block is skipped with 0.45, the second with 0.9: the others are scaled
    blocks = module.layers()[1:-1]
    keep = [noise.keep(0.9 * (i + 1) / 2, (1, 1), layer=i) for i in range(2)]
    x = module.module.stem(volume.reshape(-1, 1, 16, 16)).flatten(2).mean(2).view(64, 4, 64)
    for factor, block in zip(keep, blocks):
        x = x + factor * (block(x) - x)
    assert torch.allclose(dropped, module.module.norm(x), atol=1e-6)
    assert not torch.allclose(dropped, plain)
    module.eval()
    assert torch.equal(module(volume, noise), plain)


def test_checkpointing_changes_nothing_but_memory(written, tmp_path, mine):
    import device

    module = opened(written, tmp_path, mine()).module.train().requires_grad_(True)
    volume, calls = torch.randn(2, 1, 4, 16, 16), []
    module.layers()[1].register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        module.zero_grad()
        module(volume).square().sum().backward()
        return [p.grad.clone() for p in module.parameters()]

    expected = gradients()
    module.checkpoint = device.checkpointing(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients()))
    assert "forward" not in vars(module.layers()[1])


@pytest.mark.slow
def test_fine_tuning_and_floors_of_ones_own_encoder(written, tmp_path, command, mine):
    base = ["--config", "configs/demo.yaml", *settings(written, tmp_path)]
    tune = ["model.unfreeze_at_epoch=1", "train.epochs=3", "model.drop_path=0.1"]
    done = command("train.py", *base, *mine(), *tune, "train.lr_encoder=0.01")
    assert done.returncode == 0, done.stderr
    assert command("eval.py", "--ckpt", tmp_path / "run").returncode == 0
    no_layers = MINE.replace("def layers", "def lairs")
    done = command("train.py", *base, *mine(no_layers), *tune)
    assert done.returncode == 1 and "has no layers(), its modules from input" in done.stderr
    simple = ["train.layer_decay=1", "model.drop_path=0", "train.activation_checkpointing=false"]
    done = command("train.py", *base, *mine(no_layers), *tune, *simple)
    assert done.returncode == 0, done.stderr
    done = command("train.py", *base, *mine(), "train.sweep.lr_head=[0.001]", "eval.floors=true")
    assert done.returncode == 0, done.stderr
    done = command("eval.py", "--ckpt", tmp_path / "run")
    assert done.returncode == 0 and "random encoder" in done.stdout


def test_a_random_encoder_has_other_weights_of_the_same_shapes(written, tmp_path, mine):
    encoder = opened(written, tmp_path, mine())
    other, again = (loader.random_encoder(encoder, seed=3) for _ in range(2))
    assert other.sha256 == again.sha256 != encoder.sha256
    for (name, a), (_, b) in zip(
        encoder.module.state_dict().items(), other.module.state_dict().items()
    ):
        assert a.shape == b.shape and ("norm" in name or not torch.equal(a, b)), name


def test_the_pretrainings_encoders_are_what_they_were(written, tmp_path):
    encoder = loader.open_encoder(quick(written, tmp_path))
    assert type(encoder.module) is model.ViT3D
    assert encoder.sha256 == model.weights_hash(model.load_encoder(TINY))


# ------------------------------------------------------------- ready-made encoders, random weights


def library(name):
    """timm or transformers, as encoders/slices.py imports it; or the test is skipped."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    spec = importlib.util.spec_from_file_location(
        "slices", os.path.join(ROOT, "encoders", "slices.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.import_library(name)


@pytest.fixture(scope="module")
def vjepa2_folder(tmp_path_factory):
    """A small V-JEPA 2 as transformers saves it."""
    transformers = library("transformers")
    torch.manual_seed(0)
    options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = transformers.VJEPA2Config(crop_size=64, frames_per_clip=16, **options)
    folder = tmp_path_factory.mktemp("vjepa2") / "small-vjepa2"
    transformers.VJEPA2Model(made).save_pretrained(folder)
    return folder


def of_vjepa2(folder):
    return [f"paths.checkpoint_path={folder}", "model.loader=encoders/vjepa2.py"]


def of_slices():
    random_vit = "{name: test_vit, random: true, frames: 4, size: 64}"
    loader_of = ["model.loader=encoders/slices.py", f"model.loader_options={random_vit}"]
    return ["paths.checkpoint_path=null", *loader_of]


@pytest.mark.slow
def test_two_encoders_on_two_tasks_in_two_modes(written, tmp_path, command, vjepa2_folder):
    """Without a source file touched; every volume is decoded once for both encoders."""
    library("timm")
    base = [*settings(written, tmp_path), f"paths.cache_dir={tmp_path}/cache", "model.emb_dim=null"]
    runs = []
    for name, encoder in (("vjepa2", of_vjepa2(vjepa2_folder)), ("slices", of_slices())):
        for task in ("aireadi_diabetes", "aireadi_laterality"):
            for mode in ("probe", "attentive"):
                grid = ["model.token_grid=[2,1,1]"] if mode == "attentive" else []
                run = f"{tmp_path}/{name}_{task}_{mode}"
                files = ["configs/demo.yaml", f"configs/tasks/{task}.yaml", f"configs/{mode}.yaml"]
                files = files[: 3 if mode == "attentive" else 2]
                arguments = [part for file in files for part in ("--config", file)]
                more = [*encoder, *grid, f"paths.run_dir={run}", "train.epochs=3"]
                done = command("train.py", *arguments, *base, *more, "train.warmup_epochs=1")
                assert done.returncode == 0, done.stderr
                done = command("eval.py", "--ckpt", run)
                assert done.returncode == 0, done.stderr
                runs.append(run)
    done = command("eval.py", "--leaderboard", *runs)
    assert done.returncode == 0 and "has the best mean rank of 4" in done.stdout
    assert done.stdout.count("## ") == 2
    kept = list((tmp_path / "cache" / "volumes").iterdir())
    assert len(kept) == len(triton(tables(written)[1]))  # one of each file serves both


@pytest.mark.slow
def test_v_jepa_2_is_fine_tuned(written, tmp_path, command, vjepa2_folder):
    base = [*settings(written, tmp_path), *of_vjepa2(vjepa2_folder), "model.emb_dim=null"]
    tune = ["model.unfreeze_at_epoch=1", "train.epochs=2", "model.drop_path=0.1"]
    done = command("train.py", "--config", "configs/demo.yaml", *base, *tune)
    assert done.returncode == 0, done.stderr
    done = command("eval.py", "--ckpt", tmp_path / "run")
    assert done.returncode == 0 and "small-vjepa2" in content(tmp_path / "run" / "eval_test.json")


@pytest.mark.slow
def test_the_example_sees_where_things_are(written, tmp_path, command):
    task = ["--config", "configs/demo_example.yaml"]
    task += ["--config", "configs/tasks/aireadi_laterality.yaml"]
    places = [f"paths.data={written}", f"paths.cache_dir={tmp_path}/cache"]
    done = command("train.py", *task, *places, f"paths.run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert command("eval.py", "--ckpt", tmp_path / "run").returncode == 0
    result = json.loads(content(tmp_path / "run" / "eval_test.json"))
    assert result["encoder"] == "example" and result["balanced_accuracy"] > 0.6
