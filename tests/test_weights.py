"""The formats of files of weights, and checksums, through model.load_encoder. What a pickle may ask
for, and TorchScript in disguise, are in test_model.py; bombs are in test_fuzz_encoder.py."""

import collections
import decimal
import gzip
import json
import os
import pathlib
import pickle
import re
import resource
import shlex
import struct
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import TINY, files_of, zipped

import model
import weights


@pytest.fixture()
def checkpoint():
    state = model.read_checkpoint(TINY)["model_state_dict"]
    return {
        "model_state_dict": {k: v.clone() for k, v in state.items()},
        "config": {"image_size": [16, 64, 64]},
    }


def saved(content, tmp_path):
    path = str(tmp_path / "encoder.pt")
    torch.save(content, path)
    return path


# ---- formats that are read


def as_legacy(checkpoint, path, **options):
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False, **options)


def as_compressed_zip(checkpoint, path):
    torch.save(checkpoint, path)
    pathlib.Path(path).write_bytes(zipped(files_of(path), zipfile.ZIP_DEFLATED))


def as_big_endian(checkpoint, path):
    torch.save(checkpoint, path)
    files = files_of(path)
    for name in files:
        if name.endswith("byteorder"):
            files[name] = b"big"
        if "/data/" in name:
            files[name] = np.frombuffer(files[name], "u4").byteswap().tobytes()
    pathlib.Path(path).write_bytes(zipped(files))


def as_safetensors(checkpoint, path):
    config = {"format": "pt", "config": json.dumps(checkpoint["config"])}
    safetensors.torch.save_file(checkpoint["model_state_dict"], path, config)


def as_named_texts(checkpoint, path):
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in checkpoint["config"].items()}
    safetensors.torch.save_file(checkpoint["model_state_dict"], path, texts)


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.safetensors", "encoder"])
@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        as_legacy,
        as_compressed_zip,
        as_big_endian,
        as_safetensors,
        as_named_texts,
        lambda c, path: torch.save(c, path, pickle_protocol=3),
        lambda c, path: as_legacy(
            {**c, "loss": np.float64(1), "seen": collections.Counter()}, path
        ),
        lambda c, path: torch.save({**c["model_state_dict"], "config": c["config"]}, path),
        lambda c, path: as_legacy({**c["model_state_dict"], "config": c["config"]}, path),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_formats_that_load(checkpoint, tmp_path, write, name):
    state = checkpoint[
        "model_state_dict"
    ]  # with numbers of 4 bytes alone, which as_big_endian swaps
    checkpoint["model_state_dict"] = {k: v for k, v in state.items() if v.element_size() == 4}
    checkpoint["config"].update(num_heads=4, norm_eps=1e-6, act="gelu")
    path = str(tmp_path / name)
    write(checkpoint, path)
    loaded, expected = model.load_encoder(path), model.load_encoder(TINY).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    assert (loaded.num_heads, loaded.eps, loaded.assumed) == (4, 1e-6, {})
    assert loaded.image_size == (16, 64, 64)


def test_a_bare_state_dict_says_nothing_of_its_settings(checkpoint, tmp_path):
    loaded = model.load_encoder(saved(checkpoint["model_state_dict"], tmp_path))
    assert loaded.image_size is None and len(loaded.assumed) == 3
    with pytest.raises(ValueError, match=r"no keys begin with .*; found \['norm'\]"):
        model.load_encoder(saved({"norm.weight": torch.ones(3)}, tmp_path))


# ---- checksums


def changed(path, *keys, change=lambda data: bytes([data[0] ^ 1]) + data[1:]):
    """Change the bytes of these tensors in a file, where they lie."""
    content, state = path.read_bytes(), model.read_checkpoint(TINY)["model_state_dict"]
    for key in keys:
        data = state[key].numpy().tobytes()
        assert content.count(data) == 1
        content = content.replace(data, change(data))
    path.write_bytes(content)


@pytest.fixture()
def tiny(tmp_path):
    path = tmp_path / "encoder.pt"
    path.write_bytes(pathlib.Path(TINY).read_bytes())
    return path


def test_one_bit_that_differs_is_noticed(tiny):
    changed(tiny, "context_encoder.blocks.1.mlp.fc1.weight")
    with pytest.raises(
        ValueError,
        match="context encoder not loaded: "
        "context_encoder.blocks.1.mlp.fc1.weight: not the bytes of their checksums; copy",
    ):
        model.load_encoder(str(tiny))
    expected = model.weights_hash(model.load_encoder(TINY, "target"))
    assert model.weights_hash(model.load_encoder(str(tiny), "target")) == expected


def test_matrices_of_zeros_are_noticed(tiny):
    keys = [f"context_encoder.blocks.{i}.attn.qkv.weight" for i in range(2)]
    changed(tiny, *keys, change=lambda data: bytes(len(data)))
    with pytest.raises(ValueError, match=f"{keys[0]}, {keys[1]}: not the bytes of their checksums"):
        model.load_encoder(str(tiny))


@pytest.mark.parametrize("name", ["data.pkl", "byteorder"])
def test_the_pickle_and_the_order_of_bytes_have_checksums_too(tiny, name):
    with zipfile.ZipFile(TINY) as archive:
        (content,) = (archive.read(n) for n in archive.namelist() if n.endswith(name))
    other = bytes([*content[:-1], content[-1] ^ 1])
    tiny.write_bytes(tiny.read_bytes().replace(content, other))
    with pytest.raises(ValueError, match="Bad CRC-32|Unknown endianness"):
        model.load_encoder(str(tiny))


def test_names_that_are_exchanged_in_the_directory_are_noticed(tiny):
    """An entry's place, size and checksum fit each other, but not what the record is called."""
    content = tiny.read_bytes()
    with zipfile.ZipFile(tiny) as archive:
        start = archive.start_dir
    exchange = lambda m: b"data/" + {b"3": b"4", b"4": b"3"}[m[1]]
    directory = re.sub(rb"data/([34])(?!\d)", exchange, content[start:])
    tiny.write_bytes(content[:start] + directory)
    with pytest.raises(ValueError, match="it is a zip file, damaged or cut short; copy"):
        model.load_encoder(str(tiny))


def test_only_what_is_used_is_verified(checkpoint, tmp_path, monkeypatch):
    """Not the optimizer's moments, which are most of a real file."""
    checkpoint["optimizer_state_dict"] = {"m": torch.zeros(10**6)}
    path, verified, crc32 = saved(checkpoint, tmp_path), [], weights.zlib.crc32

    def count(data):
        verified.append(len(data))
        return crc32(data)

    monkeypatch.setattr(weights.zlib, "crc32", count)
    loaded = model.load_encoder(path)
    monkeypatch.undo()
    size = sum(p.nbytes for p in loaded.parameters())
    assert size <= sum(verified) < size + 50_000
    content = bytearray(pathlib.Path(path).read_bytes())
    content[content.index(bytes(10**6)) + 100] ^= 1
    pathlib.Path(path).write_bytes(content)
    assert model.weights_hash(model.load_encoder(path)) == model.weights_hash(loaded)


def test_a_file_without_checksums_loads(checkpoint, tmp_path):
    """torch.save can be told not to compute them: all are zero."""
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(checkpoint, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert not any(entry.CRC for entry in archive.infolist())
    expected = model.weights_hash(model.load_encoder(TINY))
    assert model.weights_hash(model.load_encoder(path)) == expected


def test_two_records_of_one_name_are_refused(tiny):
    with zipfile.ZipFile(tiny, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(next(n for n in archive.namelist() if "/data/" in n), b"other")
    with pytest.raises(ValueError, match="its zip has two files of one name"):
        model.load_encoder(str(tiny))


# ---- what is no file


@pytest.mark.parametrize(
    "make, message",
    [
        (os.mkdir, "it is a folder, a pipe or a device, not a file"),
        (os.mkfifo, "it is a folder, a pipe or a device, not a file"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, make, message):
    make(tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=f"encoder.pt is not a checkpoint .*: {message}"):
        model.load_encoder(str(tmp_path / "encoder.pt"))


def test_a_name_with_a_nul_character_is_refused():
    with pytest.raises(ValueError, match=r"^a\\0b.pt is not .* NUL character in its name") as e:
        model.load_encoder("a\0b.pt")
    assert "\0" not in str(e.value)


# ---- formats that are not read


def npz(checkpoint, path):
    with open(path, "wb") as f:
        np.savez(f, **{k: v.numpy() for k, v in checkpoint["model_state_dict"].items()})


def in_tar(checkpoint, path):
    with tarfile.open(path, "w") as archive:
        archive.add(TINY)


def zip_of(**contents):
    return lambda c, path: pathlib.Path(path).write_bytes(zipped(contents))


def npy(checkpoint, path):
    with open(path, "wb") as f:
        np.save(f, np.ones(3))


def as_bytes(content):
    return lambda c, path: pathlib.Path(path).write_bytes(content)


def pickled(protocol):
    return lambda c, path: as_bytes(pickle.dumps(np.ones(3), protocol))(c, path)


TRUSTED = "if you trust its author, convert it by this line, which runs the file's code: python -c"


@pytest.mark.parametrize(
    "write, message",
    [
        (as_bytes(b""), "it is empty; copy or download it again"),
        (as_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600)), "an HDF5 file; convert it: python -c .*h5py"),
        (npy, "a numpy array .*; give a dict"),
        (npz, r"a numpy archive \(.npz\); convert it: python -c"),
        (as_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x00"), "an ONNX graph.*; give the"),
        (as_bytes(gzip.compress(b"x" * 999)), "compressed by gzip; unpack it with gunzip"),
        (in_tar, "a tar archive.*; unpack it with tar -xf"),
        (
            as_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
            "a pointer of git-lfs.*; run git lfs pull",
        ),
        (as_bytes(b"\n<!DOCTYPE html><html>" + b"x" * 999), "a web page.*; copy or download it"),
        (as_bytes(b'<?xml version="1.0"?><Error/>'), "a web page.*; copy or download it"),
        (as_bytes(b'{"error": "not found"}\n'), "it is JSON text.*; give the file of weights"),
        (as_bytes("Zugriff für immer verwehrt".encode() * 99), "it is text.*; give the file of"),
        (
            as_bytes(b"GGUF\3\0\0\0" * 99),
            r"it begins with b'GGUF.*; save the weights by torch.save",
        ),
        *((pickled(p), f"it is a pickle, not a zip file.*; {TRUSTED}") for p in (0, 1, 2, 3)),
        *((pickled(p), f"a pickle of protocol 4 or 5, .*; {TRUSTED}") for p in (4, 5)),
        (lambda c, p: torch.save(c, p, pickle_protocol=4), f"pickle, of protocol 4, .*; {TRUSTED}"),
        (lambda c, p: as_legacy(c, p, pickle_protocol=5), f"pickle, of protocol 5, .*; {TRUSTED}"),
        (
            lambda c, p: torch.save({**c, "a": decimal.Decimal(1), "b": collections.deque()}, p),
            f"asks for collections.deque, decimal.Decimal, .*nothing was run; {TRUSTED}",
        ),
        (
            lambda c, p: as_legacy({**c, "a": decimal.Decimal(1)}, p),
            f"asks for decimal.Decimal, .*nothing was run; {TRUSTED}",
        ),
        (
            lambda c, p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), p),
            f"a TorchScript program; {TRUSTED}.*torch.jit.load",
        ),
        (zip_of(weights=b"x"), r"zip file that torch.save did not write, with \['weights'\]"),
        (zip_of(), "zip file that torch.save did not write"),
        (
            as_bytes(pathlib.Path(TINY).read_bytes()[:-9]),
            "a zip file, damaged or cut short; copy or",
        ),
    ],
)
def test_other_formats_are_named_with_what_to_do(checkpoint, tmp_path, write, message):
    path = str(tmp_path / "encoder.pt")
    write(checkpoint, path)
    with pytest.raises(ValueError, match=message) as e:
        model.load_encoder(path)
    assert str(e.value).startswith(f"{path} is not a checkpoint") and "\n" not in str(e.value)


@pytest.mark.parametrize("keep", [20, 100, 0.3, 0.9, 0.9999])
def test_a_truncated_file_of_torch_before_1_6(checkpoint, tmp_path, keep):
    path = tmp_path / "encoder.pt"
    as_legacy(checkpoint, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(
        ValueError, match="it is damaged or cut short .*; copy or download it again"
    ):
        model.load_encoder(str(path))


def with_header(change):
    """Damage to a safetensors file: change(header, data) -> (header, data, length or None)."""

    def damage(content):
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        header, data, length = change(header, data)
        header = json.dumps(header).encode()
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    return damage


def overlapping(header, data):
    names = sorted(set(header) - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])
    shift = header[names[1]]["data_offsets"][0] - 4
    width = np.subtract(*header[names[1]]["data_offsets"][::-1]).item()
    header[names[1]]["data_offsets"] = [shift, shift + width]
    return header, data, None


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"x",
        with_header(lambda header, data: (header, data, 2**63)),
        with_header(lambda header, data: (header, data, 100)),
        with_header(lambda header, data: (header, data, len(json.dumps(header)) + 8)),
        with_header(overlapping),
        with_header(lambda header, data: ({**header, "x": {"dtype": "F32"}}, data, None)),
        with_header(lambda header, data: ({**header, "__metadata__": {"a": 1}}, data, None)),
    ],
)
def test_a_damaged_safetensors_file_is_refused_in_one_sentence(checkpoint, tmp_path, damage, name):
    path = tmp_path / name
    as_safetensors(checkpoint, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="a damaged safetensors file .*; copy or download") as e:
        model.load_encoder(str(path))
    assert "\n" not in str(e.value)


def test_metadata_of_safetensors_that_cannot_be_used_is_refused(checkpoint, tmp_path):
    path = str(tmp_path / "encoder.safetensors")
    state = checkpoint["model_state_dict"]
    for texts, message in (
        ({"num_heads": "many"}, "config.num_heads is 'many', not a whole number"),
        ({"num_heads": "4", "config": '{"num_heads": 2}'}, "num_heads is 4, .*num_heads is 2"),
        ({"config": "[" * 100000}, "recursion"),
    ):
        safetensors.torch.save_file(state, path, texts)
        with pytest.raises(ValueError, match=message):
            model.load_encoder(path)


class Omega:
    """An object that holds its content as OmegaConf's do, and leads back to the whole."""

    def __init__(self, content, parent=None):
        self._parent = parent
        if isinstance(content, dict):
            self._content = {k: Omega(v, self) for k, v in content.items()}
        else:
            self._val = content


SAID = {"num_heads": 4, "model": {"norm_eps": 1e-6, "x": None}, "act": "gelu"}


@pytest.mark.parametrize(
    "write",
    [
        npz,
        lambda c, p: torch.save(c, p, pickle_protocol=5),
        lambda c, p: torch.save({**c, "a": collections.deque(), "config": SAID}, p),
        lambda c, p: torch.save({**c, "config": types.SimpleNamespace(**SAID)}, p),
        lambda c, p: torch.save({**c, "config": {**SAID, "act": torch.nn.GELU}}, p),
        lambda c, p: torch.save({**c, "config": Omega(SAID)}, p),
        lambda c, p: torch.save({**c, "config": {"model": Omega(SAID)}}, p),
        lambda c, p: as_legacy({**c, "a": collections.deque(), "config": SAID}, p),
        lambda c, p: as_bytes(pickle.dumps({**c, "config": SAID}))(c, p),
    ],
)
def test_the_line_that_converts_a_file_does(checkpoint, tmp_path, monkeypatch, write):
    """Run in this process, which has torch already."""
    path = str(tmp_path / "my encoder's.pt")
    write(checkpoint, path)
    with pytest.raises(ValueError, match="python -c") as e:
        model.load_encoder(path)
    line = str(e.value)[str(e.value).index("python -c") :]
    _, _, code, *arguments = shlex.split(line)
    assert arguments == [path, str(tmp_path / "my encoder's_converted.pt")]
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    loaded, expected = model.load_encoder(arguments[1]), model.load_encoder(TINY).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    if write is not npz and "SAID" in write.__code__.co_names:
        assert (loaded.num_heads, loaded.eps, loaded.assumed) == (4, 1e-6, {})


TENSOR = torch.zeros(2**18)


class CopiedForTpu:
    def __reduce__(self):
        function = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return function, (TENSOR, torch.float64, "xla:0", False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_small_file_gets_little_memory(tmp_path):
    """torch makes a copy in another dtype for each of these, 10 GB of a megabyte."""
    state = {str(i): CopiedForTpu() for i in range(5000)}
    torch.save({"model_state_dict": state}, tmp_path / "a.pt")
    assert os.path.getsize(tmp_path / "a.pt") < 2e6
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match="allocate memory"):
        weights.read_checkpoint(str(tmp_path / "a.pt"))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
