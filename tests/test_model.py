import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import re
import runpy
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors
import torch

import device
import model

FIXTURES = os.path.join(os.path.dirname(__file__), "fixtures")
TINY = os.path.join(FIXTURES, "vjepa3d_tiny.pt")


@pytest.fixture()
def checkpoint():
    return {
        "epoch": 1,
        "model_state_dict": dict(model.read_checkpoint(TINY)["model_state_dict"]),
        "config": {"image_size": [16, 64, 64]},
    }


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
    with open(
        "/proc/self/maps", encoding="utf-8"
    ) as f:  # memory-mapped: the tensor lies inside a mapping of the file
        spans = [
            line.split()[0].split("-") for line in f if line.rstrip().endswith("vjepa3d_tiny.pt")
        ]
    assert any(int(low, 16) <= weight.data_ptr() < int(high, 16) for low, high in spans)


def test_hashes_tell_encoders_apart():
    context, target = (
        model.weights_hash(model.load_encoder(TINY, e)) for e in ("context", "target")
    )
    assert context != target and context == model.weights_hash(model.load_encoder(TINY, "context"))


def test_hashes_are_of_what_decides_the_tokens():
    """The first two are recorded: cached features and runs have them in their names."""
    assert [model.weights_hash(model.load_encoder(TINY, e)) for e in ("context", "target")] == [
        "e3a150be18ed0e40fbdade5f42e7f267122fbb566d690a61dceda1f8d977fd31",
        "592610216469bbf31e9daa29e7ef1f959492c02221f7d220ae2ff6b848a30c56",
    ]
    state = model.ViT3D(128, 2, 8).state_dict()

    def hashed(**settings):
        net = model.ViT3D(128, 2, 8, **settings)
        net.load_state_dict(state)
        return model.weights_hash(net)

    same = [hashed(), hashed(num_heads=2), hashed(eps=1e-5, activation="gelu")]
    others = [hashed(num_heads=4), hashed(eps=1e-6), hashed(activation="relu")]
    both = [hashed(num_heads=4, eps=1e-6), hashed(num_heads=4, activation="relu")]
    assert len(set(same)) == 1 and len({*same, *others, *both}) == 6


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
    checkpoint["model_state_dict"] = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in checkpoint["model_state_dict"].items()
    }
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


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop("norm.bias"), "missing: context_encoder.norm.bias"),
        (drop("pos_embed"), "missing .*context_encoder.pos_embed"),
        (drop("blocks.0.attn.qkv.weight"), "missing: context_encoder.blocks.0.attn.qkv.weight"),
        (
            lambda c: c["model_state_dict"].update({"context_encoder.cls_token": torch.zeros(1)}),
            "unexpected: context_encoder.cls_token",
        ),
        (
            lambda c: c["model_state_dict"].update(
                {"context_encoder.blocks.7.norm1.weight": torch.zeros(128)}
            ),
            "missing: context_encoder.blocks.2.norm1",
        ),
        (
            change("blocks.1.mlp.fc1.weight", lambda w: w[:10]),
            r"wrong shape: context_encoder.blocks.1.mlp.fc1.weight \(10, 128\), "
            r"expected \(512, 128\)",
        ),
        (change("patch_embed.proj.weight", lambda w: w[:100]), "not a multiple of 64"),
        (change("patch_embed.proj.weight", lambda w: w[0]), "wrong shape"),
        (change("norm.weight", not_finite), "not finite: context_encoder.norm.weight"),
        (change("norm.weight", lambda w: "text"), "not tensors"),
        (
            change("norm.weight", lambda w: w.to(torch.int64)),
            "not tensors of floating-point numbers: .*context_encoder.norm.weight",
        ),
        (change("pos_embed", lambda w: w[:, :0]), "pos_embed is empty"),
        # patches of no frame, which divide nothing
        (change("patch_embed.proj.weight", lambda w: w[:, :, :0]), "proj.weight is empty"),
        (change("norm.weight", lambda w: w.double() + 1e300), "not finite: .*norm.weight"),
        (
            change("norm.weight", lambda w: torch.ones(1).expand(128)),
            "norm.weight takes 512 bytes, of",
        ),
        (change("pos_embed", lambda w: w[:1, :1].expand(-1, 2**40, -1)), "pos_embed takes"),
        (
            lambda c: c["model_state_dict"].update(
                {"context_encoder.blocks.999999999.x": torch.zeros(1)}
            ),
            "missing: .* and 7 more; unexpected: context_encoder.blocks.999999999.x$",
        ),
        (
            lambda c: c["model_state_dict"].update(
                {f"context_encoder.blocks.{i}.x": torch.zeros(1) for i in range(2000)}
            ),
            "its keys are of 2000 blocks, but no encoder has more than 1000$",
        ),
        (
            lambda c: c["model_state_dict"].update(
                {f"context_encoder.{'x' * 10**4}{i}": torch.zeros(1) for i in range(2000)}
            ),
            "unexpected: context_encoder.x{84}, .* and 1995 more$",
        ),
        (
            lambda c: [
                c["model_state_dict"].pop(k)
                for k in list(c["model_state_dict"])
                if k.startswith("context")
            ],
            "no keys begin with 'context_encoder.'",
        ),
        (lambda c: c.pop("model_state_dict"), "has no 'model_state_dict'"),
        (lambda c: c["config"].update(image_size=[16, 64, 128]), "do not fit the encoder"),
        (lambda c: c["config"].update(image_size=64), "config.image_size is 64, not"),
        (
            lambda c: c["config"].update(image_size="16,64,64"),
            "config.image_size is '16,64,64', not",
        ),
        # their grid has as many patches
        (
            lambda c: c["config"].update(image_size=[-16, -64, 64]),
            "image_size is .-16, -64, 64., not",
        ),
        (lambda c: c["config"].update(image_size=[16, 64, 0]), "image_size is .16, 64, 0., not"),
        (
            lambda c: c["config"].update(image_size=[True, 64, 64]),
            "image_size is .True, 64, 64., no",
        ),
        (lambda c: c["config"].update(image_size=[10**400] * 3), r"image_size is \[10{98}, not"),
        (lambda c: c["config"].update(image_size=["16\n"] * 3), "image_size is .'16"),
    ],
)
def test_anything_but_the_exact_keys_is_refused_by_name(checkpoint, tmp_path, damage, message):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message) as e:
        model.load_encoder(saved(checkpoint, tmp_path))
    assert len(str(e.value)) < 2200 and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"loss": np.float64(1.5)},
        {"config": "text"},
        {"config": ["a"]},
        {"config": None},
        {"loss": np.ones(3), "when": datetime.datetime(2026, 1, 1)},
        {"config": argparse.Namespace(a=1)},
        {"seen": collections.Counter("ab"), "path": pathlib.Path("x")},
    ],
)
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
        model.load_encoder(TINY)(
            torch.zeros(1, 1, 64, 16, 64)
        )  # right number of tokens, wrong shape


class RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("write", ["zip", "legacy", "tar", "bare"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(checkpoint, tmp_path, write):
    ran, path = tmp_path / "ran", str(tmp_path / "evil.pt")
    checkpoint["config"] = RunsCode(ran)
    if write == "bare":
        with open(path, "wb") as f:
            pickle.dump(checkpoint["config"], f)
    elif write == "tar":  # the oldest of torch's formats
        pickled = pickle.dumps(checkpoint["config"], protocol=2)
        with tarfile.open(path, "w") as archive:
            for name in ("pickle", "storages", "tensors"):
                entry = tarfile.TarInfo(name)
                entry.size = len(pickled)
                archive.addfile(entry, io.BytesIO(pickled))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(ValueError, match="evil.pt .*(asks for posix.system|not a zip file)"):
        model.load_encoder(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        "builtins.__import__",
        "torch.load",
        "torch.jit.load",
        "torch.storage._load_from_bytes",
        "torch.hub.load",
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "operator.attrgetter",
        "collections.namedtuple",
        "sys.exit",
        "numpydoc.main",
    ],
)
def test_what_a_checkpoint_has_no_need_of_is_refused_by_name(tmp_path, name):
    path = tmp_path / "asks.pt"
    pickled = f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n)R.".encode()
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + pickled)
        z.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match=f"asks.pt .*its pickle asks for {re.escape(name)}, "):
        model.load_encoder(str(path))


# ---- TorchScript archives, whose code torch.jit.load would run, in disguise

WRITES = """
import torch

class Writes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.x, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]):
        self.x = state[0]
        self.training = state[1]
        torch.save("text of the attacker's choice", {victim!r})

torch.jit.save(torch.jit.script(Writes()), {path!r})
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """-> (an archive, the file that its code writes when it is loaded)."""
    folder = tmp_path_factory.mktemp("script")
    path, victim, source = folder / "script.pt", folder / "written", folder / "writes.py"
    source.write_text(WRITES.format(victim=str(victim), path=str(path)))
    runpy.run_path(
        str(source), run_name="writes"
    )  # torch.jit.script reads the source from the file
    torch.jit.load(str(path))
    assert victim.exists()  # the attack works where a file is handed to torch.jit.load
    victim.unlink()
    return path.read_bytes(), victim


def directory_of(archive):
    """-> (number of entries, central directory, what precedes it) of a zip file."""
    i = archive.rfind(b"PK\5\6")
    count, size, offset = struct.unpack("<10xH2L2x", archive[i : i + 22])
    zip64 = archive.rfind(b"PK\6\6")
    if zip64 >= 0:
        count, size, offset = struct.unpack("<32x3Q", archive[zip64 : zip64 + 56])
    return count, archive[offset : offset + size], archive[:offset]


def end_of(count, size, offset):
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, offset, 0)


def padded(directory, size):
    """A central directory with a comment of its last entry that makes it `size` bytes long."""
    start = last = 0
    while start < len(directory):
        last, lengths = start, struct.unpack("<3H", directory[start + 28 : start + 34])
        start += 46 + sum(lengths)
    more = size - len(directory)
    comment = struct.pack("<H", lengths[2] + more)
    return directory[: last + 32] + comment + directory[last + 34 :] + b"x" * more


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
    return content.getvalue()


def files_of(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as z:
        return {name: z.read(name) for name in z.namelist()}


INNOCENT = directory_of(zipped({"archive/data.pkl": b"N."}))[1]
TINY_FILES = {"archive/data.pkl": b"\x80\x02}.", "archive/version": b"3\n"}


def two_directories(archive, swap=False):
    """The end record's offset points at one directory, its size at another: readers differ."""
    count, directory, body = directory_of(archive)
    size = max(len(directory), len(INNOCENT)) + 10
    pair = [padded(directory, size), padded(INNOCENT, size)]
    first, second = reversed(pair) if swap else pair
    return body + first + second + end_of(count, size, len(body))


def second_end_record(archive):
    """An innocent archive in the comment of the script's end record."""
    count, directory, body = directory_of(archive)
    script = body + directory + end_of(count, len(directory), len(body))
    innocent = zipped(TINY_FILES)
    return script[:-2] + struct.pack("<H", len(innocent)) + innocent


def renamed(archive, old, new):
    return zipped({name.replace(old, new): data for name, data in files_of(archive).items()})


def without(archive, *parts):
    return zipped(
        {n: data for n, data in files_of(archive).items() if not any(p in n for p in parts)}
    )


def merged(archive):
    """The script's code and constants beside the data.pkl of a checkpoint."""
    files = files_of(archive)
    [pickled] = [name for name in files if name.endswith("/data.pkl")]
    with open(TINY, "rb") as f:
        tiny = files_of(f.read())
    [checkpoint] = [data for name, data in tiny.items() if name.endswith("/data.pkl")]
    return zipped({**files, pickled: checkpoint})


DISGUISES = {
    "none": lambda a: a,
    "two_directories": two_directories,
    "two_directories_swapped": lambda a: two_directories(a, swap=True),
    "archive_in_the_comment": second_end_record,
    "archive_behind": lambda a: a + zipped(TINY_FILES),
    "archive_before": lambda a: zipped(TINY_FILES) + a,
    "prefix": lambda a: b"\x80\x02N." + a,
    "text_prefix": lambda a: b"#!/bin/sh\n" + a,
    "another_folder": lambda a: renamed(a, "script/", "archive/"),
    "no_folder": lambda a: renamed(a, "script/", ""),
    "constants_in_capitals": lambda a: renamed(a, "constants.pkl", "CONSTANTS.PKL"),
    "backslashes": lambda a: renamed(a, "/", "\\"),
    "code_alone": lambda a: without(a, "constants.pkl", "data.pkl"),
    "code_without_constants": lambda a: without(a, "constants.pkl"),
    "constants_without_code": lambda a: without(a, "code/"),
    "beside_a_checkpoints_pickle": merged,
}


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.pth", "encoder.safetensors", "encoder"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_torchscript_never_runs_whatever_its_zip_says(script, tmp_path, disguise, name):
    archive, victim = script
    victim.unlink(missing_ok=True)  # what an earlier, failed test wrote
    path = tmp_path / name
    path.write_bytes(DISGUISES[disguise](archive))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        model.load_encoder(str(path))
    # nor would torch load it
    refusals = (RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError)
    with pytest.raises(refusals):
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    with open(path, "rb") as file, pytest.raises(refusals):
        torch.load(file, map_location="cpu", weights_only=True)
    assert not victim.exists()


def test_a_compressed_tensor_that_ends_early_is_refused_whatever_lies_in_memory(tmp_path):
    """torch leaves the rest of such a tensor as it finds it, often with what was freed last: the
    right bytes of the same tensor, or of another."""
    path, right = str(tmp_path / "deflated.pt"), model.weights_hash(model.load_encoder(TINY))
    with open(TINY, "rb") as f, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files_of(f.read()).items():
            z.writestr(name, data)
    assert model.weights_hash(model.load_encoder(path)) == right
    with zipfile.ZipFile(path) as z:
        entry = next(e for e in z.infolist() if "/data/" in e.filename and e.file_size == 512)
    with open(path, "rb") as f:
        content = bytearray(f.read())
    # its entry in the directory, which is behind all content
    name = content.rindex(entry.filename.encode() + b"PK")
    directory = content.rindex(b"PK\1\2", 0, name)
    for place in (directory + 20, entry.header_offset + 18):  # compressed sizes
        content[place : place + 4] = struct.pack("<I", entry.compress_size // 2)
    with open(path, "wb") as f:
        f.write(content)
    for _ in range(5):
        with pytest.raises(ValueError, match="damaged or cut short"):
            model.load_encoder(path)


def test_torchscript_is_refused(tmp_path):
    path = str(tmp_path / "script.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="TorchScript"):
        model.load_encoder(path)


# ---- what may lie beside the weights, and in which forms the weights may lie


class SavedOnTpu:
    """What torch.save writes for a TPU's tensor: "numpy" before torch 2.6, "cpu_tensor" since."""

    def __init__(self, tensor, way):
        self.tensor, self.way = tensor, way

    def __reduce__(self):
        x = self.tensor
        content = x.float().numpy() if self.way == "numpy" else x
        function = getattr(torch._utils, f"_rebuild_device_tensor_from_{self.way}")
        return function, (content, x.dtype, "xla:0", False)


def with_attribute(tensor):
    parameter = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    parameter._no_weight_decay = True
    return parameter


@pytest.mark.parametrize(
    "extra",
    [
        {"torch": torch.__version__},
        {"mask_dtype": torch.uint8},
        {"dtypes": [torch.bool, torch.complex64, torch.float8_e5m2]},
        {"optimizer_state_dict": {"m": torch.zeros(2).to(torch.float8_e4m3fn)}},
        {"seen": collections.defaultdict(list, a=[1])},
        {"names": np.array(["a", "b"]), "objects": np.array([None, "x"], dtype=object)},
        {
            "when": np.datetime64("2026-01-01"),
            "rows": np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
        },
        {"kinds": [int, float, str, bool, list, dict, tuple]},
        {"order": np.arange(3, dtype=">i4"), "columns": np.asfortranarray(np.ones((2, 3)))},
    ],
)
def test_innocent_contents_load(checkpoint, tmp_path, extra):
    checkpoint.update(extra)
    loaded = model.load_encoder(saved(checkpoint, tmp_path))
    assert model.weights_hash(loaded) == model.weights_hash(model.load_encoder(TINY))


@pytest.mark.parametrize(
    "form",
    [
        with_attribute,
        lambda x: SavedOnTpu(x, "numpy"),
        lambda x: SavedOnTpu(x, "cpu_tensor"),
        lambda x: x.double() if x.is_floating_point() else x,
    ],
)
def test_weights_in_another_form_are_the_same_weights(checkpoint, tmp_path, form):
    state = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {k: form(v.clone()) for k, v in state.items()}
    loaded = model.load_encoder(saved(checkpoint, tmp_path))
    assert model.weights_hash(loaded) == model.weights_hash(model.load_encoder(TINY))
    assert not any(hasattr(p, "_no_weight_decay") for p in loaded.parameters())


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: torch.nested.nested_tensor([x, x]),
        lambda x: x.expand(2**40, *x.shape),
        lambda x: SavedOnTpu(x[:3], "numpy"),
        lambda x: x.numpy(),
    ],
)
def test_weights_in_a_form_that_cannot_be_used_are_refused(checkpoint, tmp_path, form):
    key = "context_encoder.norm.weight"
    checkpoint["model_state_dict"][key] = form(checkpoint["model_state_dict"][key].clone())
    with pytest.raises(ValueError, match="encoder.pt: context encoder not loaded"):
        model.load_encoder(saved(checkpoint, tmp_path))


def test_torch_is_told_of_no_more_safe_names():
    before = set(torch.serialization.get_safe_globals())
    model.load_encoder(TINY)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, 0.9999])
def test_truncated_checkpoint(tmp_path, keep):
    with open(TINY, "rb") as f:
        content = f.read()
    path = tmp_path / "short.pt"
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(
        ValueError, match="short.pt is not a checkpoint that can be read whole and safely"
    ):
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


def test_pooling_on_a_grid():
    tokens = torch.randn(2, 2 * 4 * 6, 3)
    for method in ("mean", "max"):
        pooled = model.pool_grid(tokens, (2, 4, 6), (1, 2, 2), method)
        assert pooled.shape == (2, 4, 3)
        first = tokens.view(2, 2, 4, 6, 3)[:, :, :2, :3].flatten(1, 3)  # (B, 12, C)
        assert torch.allclose(pooled[:, 0], model.pool(first, method), atol=1e-6)
        whole = model.pool_grid(tokens, (2, 4, 6), (1, 1, 1), method)
        assert torch.allclose(whole[:, 0], model.pool(tokens, method), atol=1e-6)


def test_groups_of_parameters_for_the_optimizer():
    encoder = model.ViT3D(dim=64, depth=2, num_tokens=4)
    groups = model.parameter_groups(encoder, lr=1.0, layer_decay=0.5, weight_decay=0.1)
    members = {id(p): group for group in groups for p in group["params"]}
    assert len(members) == len(list(encoder.parameters())) == sum(len(g["params"]) for g in groups)
    for name, layer, decay in (
        ("pos_embed", 0, 0.0),
        ("patch_embed.proj.weight", 0, 0.1),
        ("patch_embed.proj.bias", 0, 0.0),
        ("blocks.0.attn.qkv.weight", 1, 0.1),
        ("blocks.1.norm1.weight", 2, 0.0),
        ("norm.bias", 3, 0.0),
    ):
        group = members[id(encoder.get_parameter(name))]
        assert group["lr"] == group["peak"] == 0.5 ** (3 - layer) and group["part"] == "encoder"
        assert group["weight_decay"] == decay


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_scaled_dot_product_attention(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 300, 64).to(dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    out = device.attention(q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    assert (out.float() - expected).abs().max() <= tolerance
    q.requires_grad_()
    with_gradient = device.attention(q, k, v)
    with_gradient.float().sum().backward()
    assert (with_gradient.float() - expected).abs().max() <= tolerance and q.grad.isfinite().all()
