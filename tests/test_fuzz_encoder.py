"""Encoders' files that are damaged, or made to take all memory or time: the right weights, or one
sentence, within ten seconds and a gigabyte; never another exception or the end of the process.

    .venv/bin/python -m pytest -q -s -m slow tests/test_fuzz_encoder.py     # prints the counts
"""

import functools
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import resource
import signal
import time
import zipfile

import pytest
import safetensors.torch
import torch
from helpers import TINY, files_of, read_bytes, write_bytes, zipped

import model
import phantom

MEMORY = 10**9  # above what the process has when it begins to load
SECONDS = 10
SENTENCE = 3000  # characters; the line that converts a file has a thousand

# ---- in a process of its own


def outcome_of(path, encoder="context"):
    """What load_encoder makes of a file: a hash of its weights, or what it says, or "odd: ..."."""
    start = time.monotonic()
    try:
        outcome = model.weights_hash(model.load_encoder(path, encoder))
    except ValueError as error:
        outcome = f"refused: {error}"
        if len(outcome) > SENTENCE or "\n" in outcome:
            outcome = f"odd: {outcome[:200]}"
    except BaseException as error:  # whatever it is, it is a finding
        outcome = f"odd: {type(error).__name__} {str(error)[:200]}"
    took = time.monotonic() - start
    return outcome if took < SECONDS else f"odd: {took:.0f} s, {outcome[:200]}"


def work(jobs, connection):
    """Send the outcome of each job, which writes a file and returns its path."""
    with open("/proc/self/statm", encoding="ascii") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    for job in jobs:
        path = job()
        signal.alarm(2 * SECONDS)  # which ends a process that hangs
        connection.send(outcome_of(path))
        signal.alarm(0)


def outcomes(jobs):
    """The outcome of each job, in one child with little memory. Fails where the child dies."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(jobs, sender))
    child.start()
    sender.close()
    found = []
    try:
        while len(found) < len(jobs):
            found.append(receiver.recv())
    except EOFError:
        found.append("odd: the process ended")
    child.join()
    return found


# ---- bombs: small files, or files of few bytes that are used


def state_of():
    state = model.read_checkpoint(TINY)["model_state_dict"]
    return {k: v.clone() for k, v in state.items() if k.startswith("context_encoder.")}


def saved(state, path, config=None, **options):
    torch.save({"model_state_dict": state, "config": config or {}}, path, **options)


def expanded(path):
    state = state_of()
    state["context_encoder.pos_embed"] = torch.zeros(1, 1, 128).expand(1, 2**33, 128)
    saved(state, path)


def huge_beside(path):
    """Of an unexpected key, and of one of another part."""
    state = {"predictor.net.weight": torch.zeros(1).expand(2**40), **state_of()}
    state["context_encoder.cls_token"] = torch.zeros(1).expand(2**40)
    saved(state, path)


def one_storage_for_all(path):
    weight = torch.zeros(3 * 1024, 1024)
    state = model.ViT3D(1024, 1, 8, 3 * 1024).state_dict(prefix="context_encoder.")
    pattern = {k: v.shape for k, v in state.items()}
    for i in range(1, 200):
        pattern |= {k.replace("blocks.0", f"blocks.{i}"): v for k, v in pattern.items() if "0" in k}
    state = {k: weight.view(-1)[: shape.numel()].view(shape) for k, shape in pattern.items()}
    saved(state, path)


class SavedOnTpu:
    def __init__(self, tensor, dtype):
        self.tensor, self.dtype = tensor, dtype

    def __reduce__(self):
        function = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return function, (self.tensor, self.dtype, "xla:0", False)


def copies_of_one_storage(path):
    """torch would make a copy in another dtype for each."""
    tensor = torch.zeros(2**18)
    others = {f"predictor.{i}": SavedOnTpu(tensor, torch.float64) for i in range(5000)}
    mine = {f"context_encoder.{i}": SavedOnTpu(tensor, torch.float64) for i in range(5000)}
    saved({**others, **mine, **state_of()}, path)


def with_pickle(path, pickled, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


def zeros_that_are_deflated(path):
    saved({**state_of(), "predictor.0": torch.zeros(10**8)}, path)
    write_bytes(path, zipped(files_of(path), zipfile.ZIP_DEFLATED))


def stated_size_is_a_lie(path):
    """Four bytes, as the zip says; two gigabytes when they are inflated."""
    saved({**state_of(), "context_encoder.x": torch.zeros(1)}, path)
    with zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files_of(path).items():
            if len(content) != 4:
                archive.writestr(name, content)
                continue
            with archive.open(name, "w", force_zip64=True) as f:
                for _ in range(2000):
                    f.write(bytes(10**6))
            archive.getinfo(name).file_size = 4
    os.replace(f"{path}.zip", path)


def many_blocks(path):
    state, weight = state_of(), torch.zeros(1)
    state |= {f"context_encoder.blocks.{i}.x": weight for i in range(30_000)}
    saved(state, path)


def one_far_block(path):
    saved({**state_of(), "context_encoder.blocks.999999999.x": torch.zeros(1)}, path)


def many_bad_keys(path):
    state, weight = state_of(), torch.zeros(1)
    state |= {f"context_encoder.{'x' * 1000}\n{i}": weight for i in range(3000)}
    saved(state, path)


def shared_lists_in_the_config(path):
    """Of 2 ** 60 values, written in a few bytes."""
    value = []
    for _ in range(60):
        value = [value, value]
    saved(state_of(), path, {"model": value, "image_size": value})


def deep_config(path):
    config = {}
    for _ in range(300):
        config = {"model": config}
    saved(state_of(), path, config)


def encoded_again_and_again(path):
    """hex(hex(hex(...))), each of which torch would call."""
    call = b"c_codecs\nencode\n("
    text = b"X\x10\0\0\0" + b"x" * 16
    pickled = call * 40 + call[:-1] + b"(" + text + b"X\5\0\0\0ascii" + b"tR"
    pickled += (b"X\3\0\0\0hex" + b"tR") * 40
    with_pickle(path, b"\x80\x02" + pickled + b".")


def memo_of_the_last_place(path):
    with_pickle(path, b"\x80\x02}r\xff\xff\xff\xffr\0\0\0\x80.")


def many_empty_dicts(path):
    with_pickle(path, b"\x80\x02(" + b"}" * 10**8 + b"t.", zipfile.ZIP_DEFLATED)


def many_calls(path):
    with_pickle(path, b"\x80\x02(" + b"cenum\nx\n" * 10**7 + b"t.", zipfile.ZIP_DEFLATED)


BOMBS = {
    expanded: "pos_embed takes 4398046511104 bytes, of which 512 are stored",
    huge_beside: "cls_token takes 4398046511104 bytes, of which 4 are stored",
    one_storage_for_all: "its tensors share what is stored, and take more than twice as much",
    copies_of_one_storage: "it is damaged or cut short .*t allocate memory",
    zeros_that_are_deflated: "would inflate to 40.......; unpack it",
    stated_size_is_a_lie: "it is a zip file, damaged or cut short",
    many_blocks: "its keys are of 30000 blocks, but no encoder has more than 1000",
    one_far_block: "missing: .* and 7 more; unexpected: context_encoder.blocks.999999999.x",
    many_bad_keys: "unexpected: .* and 2995 more",
    shared_lists_in_the_config: "its config has more than 100,000 values",
    deep_config: "nested more than 100 deep",
    encoded_again_and_again: "damaged or cut short",
    memo_of_the_last_place: "has no 'model_state_dict'",
    many_empty_dicts: "its pickle takes 100000005 bytes",
    many_calls: "its pickle takes 80000005 bytes",
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_bombs(tmp_path, bomb):
    path = str(tmp_path / "bomb.pt")
    bomb(path)
    (outcome,) = outcomes([lambda: path])
    assert re.match("refused: .*" + BOMBS[bomb], outcome), outcome


# ---- mutations


def damaged(content, other, chance):
    """A copy with one of eight kinds of damage. other: a file of the same format."""
    content, size = bytearray(content), len(content)
    at, length = chance.randrange(size), chance.choice([1, 2, 4, 8, 64, 4096, size // 4])
    piece = content[chance.randrange(size) :][:length]
    kind = chance.randrange(8)
    if kind == 0:
        for _ in range(chance.choice([1, 3, 30])):
            content[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif kind == 1:
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif kind == 2:
        content[at : at + length] = chance.randbytes(len(content[at : at + length]))
    elif kind == 3:
        del content[at:]
    elif kind == 4:
        del content[at : at + length]
    elif kind == 5:  # a block twice, or in another's place
        content[at : at + chance.choice([0, len(piece)])] = piece
    elif kind == 6:
        content[at:] = other[at:]
    else:
        content[at : at + length] = other[at : at + length]
    return bytes(content)


NUMBERS = [0, 1, 2, 4, 7, 8, 63, 64, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1]


def with_other_headers(content, other, chance):
    """With other numbers in headers, directory entries and end records of a zip."""
    content = bytearray(content)
    headers = {b"PK\3\4": 30, b"PK\1\2": 46, b"PK\5\6": 22, b"PK\6\6": 56, b"PK\6\7": 20}
    headers[b"PK\7\x08"] = 16
    places = [
        (m.start(), headers[m[0]])
        for m in re.finditer(b"PK[\1-\7][\2-\x08]", content)
        if m[0] in headers
    ]
    for _ in range(chance.choice([1, 1, 2, 5])):
        start, length = chance.choice(places)
        if chance.random() < 0.2:  # the header of another record
            from_, more = chance.choice(places)
            content[start : start + min(length, more)] = content[from_ : from_ + min(length, more)]
        else:
            width = chance.choice([1, 2, 4])
            at = start + chance.randrange(0, length + 20, width)
            number = chance.choice([*NUMBERS, chance.getrandbits(32)]) % 256**width
            content[at : at + width] = number.to_bytes(width, "little")
    return bytes(content)


def rewritten(pickled, chance):
    """A pickle with other instructions, or with other numbers and names in them."""
    codes = [(o, v, at) for o, v, at in pickletools.genops(pickled)]
    ends = [at for _, _, at in codes[1:]] + [len(pickled)]
    pieces = [pickled[at:end] for (_, _, at), end in zip(codes, ends)]
    for _ in range(chance.choice([1, 1, 2, 5])):
        i = chance.randrange(len(pieces))
        numbers = [j for j, (o, _, _) in enumerate(codes) if o.name.startswith("BININT")]
        kind = chance.randrange(7)
        if kind < 3:  # of shapes, strides, offsets, sizes
            j = chance.choice(numbers)
            number = chance.choice([-1, *NUMBERS, codes[j][1] + 1, codes[j][1] * 2])
            pieces[j] = pickle.dumps(number, 2)[2:-1]
        elif kind == 3:
            pieces[i] = chance.choice(pieces)
        elif kind == 4:
            del pieces[i], codes[i]
        elif kind == 5:
            pieces[i] = (
                bytes([chance.choice(b"().0012aNRQbcehiqrsuX}]\x81\x85\x86\x87\x88")])
                + pieces[i][1:]
            )
        else:
            pieces[i] = pieces[i].replace(b"Float", chance.choice([b"Long", b"Double", b"Untyped"]))
            pieces[i] = pieces[i].replace(b"_v2", chance.choice([b"", b"_v3"]))
    return b"".join(pieces)


def with_other_pickle(content, other, chance, compression=zipfile.ZIP_STORED):
    """A whole zip, with right checksums, of a rewritten pickle."""
    files = files_of(io.BytesIO(content))
    (name,) = (n for n in files if n.endswith("/data.pkl"))
    return zipped({**files, name: rewritten(files[name], chance)}, compression)


def deflated_with_other_pickle(content, other, chance):
    return with_other_pickle(content, other, chance, zipfile.ZIP_DEFLATED)


def with_pickle_in_place(content, other, chance):
    """With a rewritten pickle in the place of its own, in a zip or in a file of old."""
    start = content.index(b"\x80\x02}q\0(")  # that of a dict
    *_, (_, _, length) = pickletools.genops(content[start:])
    pickled = content[start : start + length + 1]
    changed = rewritten(pickled, chance).ljust(len(pickled), b".")[: len(pickled)]
    return content[:start] + changed + content[start + len(pickled) :]


def with_other_safetensors_header(content, other, chance):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = chance.randrange(4)
    if kind == 0:
        entry["shape"][chance.randrange(len(entry["shape"]))] = chance.choice([-1, *NUMBERS])
    elif kind == 1:
        entry["data_offsets"][chance.randrange(2)] = chance.choice([-1, *NUMBERS])
    elif kind == 2:
        entry["dtype"] = chance.choice(["F64", "F16", "BF16", "I32", "F8_E4M3", "X"])
    else:
        header[chance.choice(list(header))] = header.pop(name)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + content[8 + length :]


def as_zip(seed, path):
    phantom.write_encoder(path, image_size=(16, 64, 64), depth=2, seed=seed, optimizer=True)


def content_of(seed, path):
    as_zip(seed, path + ".zip")  # which stays mapped
    checkpoint = model.read_checkpoint(path + ".zip")
    return {k: checkpoint[k] for k in ("model_state_dict", "config")}


def as_tiny(seed, path):
    """The recorded file, of which there is only one; the other has other weights in its layout."""
    content = read_bytes(TINY)
    if seed:
        with zipfile.ZipFile(TINY) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        for name, data in files.items():
            if "/data/" in name and len(data) % 4 == 0:
                data = (
                    (torch.frombuffer(bytearray(data), dtype=torch.float32) * 2).numpy().tobytes()
                )
                files[name] = data
        content = zipped(files)
    write_bytes(path, content)


def as_deflated(seed, path):
    as_zip(seed, path)
    write_bytes(path, zipped(files_of(path), zipfile.ZIP_DEFLATED))


def as_legacy(seed, path):
    torch.save(content_of(seed, path), path, _use_new_zipfile_serialization=False)


def as_safetensors(seed, path):
    content = content_of(seed, path)
    texts = {"config": json.dumps(content["config"])}
    safetensors.torch.save_file(content["model_state_dict"], path, texts)


# how a file is written, what is done to it, how often; weights that differ cannot be noticed where
# nothing has a checksum, or where the checksums were made anew
MUTATIONS = [
    (as_tiny, damaged, 400, False),
    (as_tiny, with_other_headers, 400, False),
    (as_zip, damaged, 400, False),
    (as_zip, with_other_headers, 400, False),
    (as_zip, with_pickle_in_place, 200, False),
    (as_deflated, damaged, 200, False),
    (as_deflated, with_other_headers, 200, False),
    (as_zip, with_other_pickle, 400, True),
    (as_zip, deflated_with_other_pickle, 200, True),
    (as_legacy, damaged, 300, True),
    (as_legacy, with_pickle_in_place, 400, True),
    (as_safetensors, damaged, 300, True),
    (as_safetensors, with_other_safetensors_header, 300, True),
]


@pytest.mark.slow
@pytest.mark.parametrize("write, mutate, number, may_differ", MUTATIONS)
def test_mutations(tmp_path, capsys, write, mutate, number, may_differ):
    paths, changed = [str(tmp_path / name) for name in "ab"], str(tmp_path / "changed.pt")
    for seed, path in enumerate(paths):
        write(seed, path)
    right = {model.weights_hash(model.load_encoder(path)) for path in paths}
    a, b = map(read_bytes, paths)

    def job(seed):
        write_bytes(changed, mutate(a, b, random.Random(seed)))
        return changed

    found = outcomes([functools.partial(job, seed) for seed in range(number)])
    odd = [(seed, o) for seed, o in enumerate(found) if o.startswith("odd")]
    refused = [o for o in found if o.startswith("refused")]
    differ = [
        seed for seed, o in enumerate(found) if o not in right and o[:3] not in ("odd", "ref")
    ]
    same = number - len(refused) - len(differ) - len(odd)
    with capsys.disabled():
        print(
            f"\n{write.__name__[3:]}, {mutate.__name__}, of {number}: {len(refused)} refused, "
            f"{same} with the right weights, {len(differ)} with others"
        )
    assert not odd and len(refused) > number / 10
    assert may_differ or not differ, differ
