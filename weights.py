"""A file of weights -> its tensors and what lies beside them; no code of the file ever runs.

    checkpoint = read_checkpoint("single_domain_01.pt")     # {"model_state_dict": ..., ...}
    config = plain(checkpoint.get("config"))                # dict, list, text, numbers

An error says which format a file has, and how to convert it. Needs torch and numpy, and safetensors
for files of that format.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import re
import resource
import shlex
import stat
import struct
import sys
import zipfile
import zlib

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from files import first_few

# Beside its weights, the pretraining saved settings and other objects. torch.load with
# weights_only=True calls nothing but torch's own functions for tensors and what is registered for
# it by name: inert stand-ins, so no code of the file runs, and OmegaConf need not be installed.


class Settings(dict):
    """Stands for an object beside the weights: keeps its arguments and state, does nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state
        if isinstance(state, dict):
            self.update(state)


def numeric(dtype):
    """The numpy dtype of numbers for which Settings stand, or None. It is made anew from its name,
    because numpy does not check a pickled dtype's state."""
    dtype = np.dtype(dtype.args[0]).newbyteorder(dtype.state[1])
    return dtype if dtype.kind in "biufc" else None


class Array(np.ndarray):
    """Stands for a numpy array, the form in which torch before 2.6 saved a TPU's tensors.

    Numbers are kept, any other array is left empty.
    """

    def __new__(cls, *args):
        return super().__new__(cls, 0)

    def __setstate__(self, state):
        version, shape, dtype, is_fortran, content = state
        if dtype := numeric(dtype):
            super().__setstate__((version, shape, dtype, is_fortran, content))


def scalar(dtype, *content):
    """Stands for a numpy scalar: a number of Python, or Settings if it is no number."""
    dtype = numeric(dtype)
    return np.frombuffer(*content, dtype, count=1).item() if dtype else Settings(*content)


STAND_INS = {
    "collections.defaultdict": lambda *args: {},  # torch fills nothing but a true dict
    "numpy._core.multiarray._reconstruct": Array,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray.scalar": scalar,
    "numpy.core.multiarray.scalar": scalar,
}
INERT = (  # the beginnings of the names for which Settings stand
    *("omegaconf.", "typing.", "pathlib.", "numpy.", "argparse.", "enum.", "datetime."),
    *(f"builtins.{t}" for t in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")),
    "torch.torch_version.",
)


def stand_in(name):
    """What a checkpoint gets as the class or function `name`, or None if it has no need of that."""
    return STAND_INS.get(name) or (Settings if name.startswith(INERT) else None)


def plain(value, inside=(), count=None):
    """What lies beside the weights, in plain Python: dict, list, text, number, None. ValueError
    where it is more than settings can be: one list may stand in many places.

    OmegaConf's objects are Settings: their content is `_content` or `_val`, and their `_parent`
    leads back to the whole.
    """
    count = count or itertools.count(1)
    if id(value) in inside:  # it holds itself
        return None
    inside = (*inside, id(value))
    if next(count) > MOST_VALUES or len(inside) > 100:
        raise ValueError(
            f"its config has more than {MOST_VALUES:,} values, or is nested more than 100 deep"
        )
    if isinstance(value, Settings) and ("_content" in value or "_val" in value):
        return plain(value.get("_content", value.get("_val")), inside, count)
    if isinstance(value, Settings) and not value:  # a path, a date
        value = getattr(value, "args", ())
    if isinstance(value, dict):
        return {k: plain(v, inside, count) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, inside, count) for v in value]
    return value.tolist() if isinstance(value, Array) else value


# ---- the formats that are read

AGAIN = "copy or download it again"
LONGEST_PICKLE = 50_000_000  # bytes; with the optimizer of 1,000 tensors it takes 0.5 million
MOST_VALUES = 100_000  # of what lies beside the weights
MOST_INFLATED = 250_000_000  # bytes, to which a small file may inflate
BEFORE_TORCH_1_6 = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:]  # its magic number


def read_checkpoint(path):
    """The pretraining's `torch.save` dict, tensors memory-mapped (the optimizer's are never read).

    Also that of torch before 1.6, a state dict that was saved by itself, and a safetensors file.
    ValueError if the file is none of these, or if its pickle asks for more than tensors, plain
    containers and settings.
    """
    checkpoint = read_file(path)
    is_dict = isinstance(checkpoint, dict)
    if is_dict and any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        checkpoint = {"model_state_dict": checkpoint, **checkpoint}
    if not is_dict or not isinstance(checkpoint.get("model_state_dict"), dict):
        found = list(checkpoint)[:10] if is_dict else type(checkpoint).__name__
        raise ValueError(f"{path} has no 'model_state_dict'; found {found}")
    return checkpoint


def read_file(path):
    """What a file of weights holds, whatever its keys are, as safely as read_checkpoint; of a
    safetensors file a dict with "model_state_dict" and "config"."""
    try:
        return read(path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a damaged offset gives
            raise  # no such file, no permission: the message already names the path
        raise ValueError(f"{path} is damaged or cut short; {AGAIN}") from error
    except Exception as error:  # torch, zip and pickle raise a dozen types for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not isinstance(error, ValueError):
            reason = f"it is damaged or cut short ({reason}); {AGAIN}"
        path = path.replace("\0", "\\0")
        raise ValueError(
            f"{path} is not a checkpoint that can be read whole and safely: {reason}"
        ) from error


def read(path):
    """The content of a file, whose format shows in how it begins."""
    if "\0" in path:
        raise ValueError("there is a NUL character in its name; correct the name")
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe might never be written to
        raise ValueError("it is a folder, a pipe or a device, not a file; give the file of weights")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"it is empty; {AGAIN}")
    if head.startswith(b"PK"):
        is_compressed = check_zip(path)
        check_directories(path)
        return read_torch(path, is_compressed=is_compressed)
    if BEFORE_TORCH_1_6 in head[:32]:
        return read_torch(path, is_old=True)
    # safetensors: the length of a header, and the header, which is a JSON object
    has_header = head[8:9] == b"{"
    if has_header and int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return read_safetensors(path)
    for beginning, name, advice in OTHER_FORMATS:
        if re.match(beginning, head):
            advice = conversion(path, advice) if advice in CONTENT else advice
            raise ValueError(f"it is {name}; {advice}")
    if has_header or path.endswith(".safetensors"):
        return read_safetensors(path)  # which tells what is wrong with it
    raise ValueError(
        f"it begins with {head[:8]!r}, as no known format of weights does; save the weights by "
        "torch.save or as safetensors"
    )


def check_zip(path):
    """Is anything in the zip file compressed? ValueError unless torch.save wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                archive.open(entry).close()  # has it the name that the directory says?
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"it is a zip file, damaged or cut short; {AGAIN}") from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"it is a TorchScript program; {conversion(path, 'TorchScript')}")
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError(f"it is a numpy archive (.npz); {conversion(path, 'npz')}")
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError(
            f"it is a zip file that torch.save did not write, with {names[:3]} in it; unpack it, "
            "and give the file of weights"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"its zip has two files of one name; {AGAIN}")
    size, inflated = os.path.getsize(path), sum(entry.file_size for entry in entries)
    if inflated > max(4 * size, MOST_INFLATED):
        raise ValueError(
            f"its {size} bytes would inflate to {inflated}; unpack it, and give a file that is not "
            "compressed"
        )
    return any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)


def check_directories(path):
    """ValueError unless torch's reader of zip files finds what Python's does, which verifies
    checksums: the same pickle, and every storage at the same place. A zip file can have two
    directories, and the two readers disagree."""
    reader = torch._C.PyTorchFileReader(path)
    # torch 2.9, on which torch_xla runs, says the size of a record only with its content
    size_of = getattr(reader, "get_record_size", lambda name: len(reader.get_record(name)))
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        (pickled,) = (e for e in archive.infolist() if e.filename.endswith("data.pkl"))
        if pickled.file_size > LONGEST_PICKLE:
            raise ValueError(
                f"its pickle takes {pickled.file_size} bytes, more than the {LONGEST_PICKLE} that "
                "any checkpoint needs beside its tensors"
            )
        if not any(e.CRC for e in archive.infolist()):
            return  # torch can save without checksums
        is_same = reader.get_record("data.pkl") == archive.read(pickled)
        for entry in archive.infolist():
            _, _, name = entry.filename.partition("/")
            if name.startswith("data/"):
                file.seek(entry.header_offset + 26)  # behind it: name, other fields, content
                lengths = struct.unpack("<HH", file.read(4))
                place = entry.header_offset + 30 + sum(lengths)
                found = reader.get_record_offset(name), size_of(name)
                is_same &= found == (place, entry.file_size)
    if not is_same:
        raise ValueError(f"its zip has two directories that disagree; {AGAIN}")


def verify(path, state):
    """ValueError that names the tensors of `state` whose bytes are not those that were saved.

    A zip file has a checksum of every storage. Whoever found the bytes, and however: those that
    become weights must have the size and the checksum of one of them. Other formats have no
    checksums. No tensor may take more bytes than are stored: strides of 0 make a huge one of a few.
    """
    bytes_of = {tensor.data_ptr(): stored_bytes(tensor) for tensor in state.values()}
    for key, tensor in state.items():
        stored = len(bytes_of[tensor.data_ptr()])
        if tensor.nbytes > stored:
            raise ValueError(
                f"{keys_text([key])} takes {tensor.nbytes} bytes, of which {stored} are stored"
            )
    if sum(tensor.nbytes for tensor in state.values()) > 2 * sum(map(len, bytes_of.values())):
        raise ValueError("its tensors share what is stored, and take more than twice as much")
    damaged = unlike_their_checksums(path, state, bytes_of) if zipfile.is_zipfile(path) else []
    if damaged:
        raise ValueError(f"{keys_text(damaged)}: not the bytes of their checksums; {AGAIN}")


def keys_text(keys):
    """The first few keys of a file, each cut and without unprintable characters, for a message."""
    return first_few([repr(str(key))[1:-1][:100] for key in keys])


def stored_bytes(tensor):
    """All bytes of the storage of a tensor, as an array in its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def unlike_their_checksums(path, state, bytes_of):
    """Keys of the tensors whose storage is none of those in a zip file of torch.save; [] where it
    was saved without checksums, or has its numbers in the pickle (a TPU's)."""
    with zipfile.ZipFile(path) as archive:
        entries = [e for e in archive.infolist() if "/data/" in e.filename]
        if not any(e.CRC for e in entries):
            return []
        orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    saved = {(e.file_size, e.CRC) for e in entries}

    def is_saved(tensor):
        content = bytes_of[tensor.data_ptr()]
        if orders == [b"big"]:  # torch has swapped them
            content = content.reshape(-1, tensor.element_size())[:, ::-1].copy()
        return (content.nbytes, zlib.crc32(content)) in saved

    return [key for key, tensor in state.items() if not is_saved(tensor)]


def read_torch(path, is_old=False, is_compressed=False):
    """What torch.save wrote. ValueError if its pickle asks for more than tensors, plain containers
    and settings.

    With weights_only=True, torch.load never hands a file to torch.jit.load, whatever directories
    its zip has.
    """
    # torch maps only its present format, would map compressed bytes as if they were weights, and
    # takes any path that ends in .safetensors for that format
    is_mapped = not (is_old or is_compressed or path.endswith(".safetensors"))
    try:
        with open(path, "rb") as file:
            names = names_in_old_file(file) if is_old else get_unsafe_globals_in_checkpoint(file)
            refused = sorted(name for name in names if stand_in(name) is None)
            if refused:
                raise ValueError(
                    f"its pickle asks for {', '.join(refused)}, which a checkpoint has no need of; "
                    f"refused, nothing was run; {conversion(path, 'torch')}"
                )
            file.seek(0)
            stand_ins = [(stand_in(name), name) for name in names]
            with torch.serialization.safe_globals(stand_ins), memory_for(path):
                source = path if is_mapped else inflated(path) if is_compressed else file
                return torch.load(source, map_location="cpu", mmap=is_mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message would advise weights_only=False, which runs the file's code
        raise ValueError(
            f"its pickle, of protocol {protocol_of(path)}, is none that torch.save writes for "
            f"weights by default; {conversion(path, 'torch')}"
        ) from error


def inflated(path):
    """The zip file again, with nothing compressed, in memory. Python verifies every checksum as it
    inflates; where a header says another size than the content has, torch leaves the rest of a
    tensor as it found it in memory, which may be another tensor's bytes."""
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
            for entry in source.infolist():
                with source.open(entry) as content:  # no more than is stated, whatever is there
                    target.writestr(entry.filename, content.read(entry.file_size))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"it is a zip file, damaged or cut short; {AGAIN}") from error
    copy.seek(0)
    return copy


@contextlib.contextmanager
def memory_for(path):
    """Within, this process gets memory in proportion to a file's size: some of torch's functions,
    which a pickle may call, make terabytes of a megabyte. On Linux alone."""
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    most = used + 4 * os.path.getsize(path) + 10**9
    most = most if soft == resource.RLIM_INFINITY else min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def names_in_old_file(file):
    """The names in a file of torch before 1.6 that torch does not know as safe."""
    unpickler = torch._weights_only_unpickler
    # three pickles that tell the format, and that of the content
    names = set().union(*(unpickler.get_globals_in_pkl(file) for _ in range(4)))
    return names - set(unpickler._get_allowed_globals())


def protocol_of(path):
    """The protocol of the content's pickle in a file of torch.save, old or new."""
    with open(path, "rb") as file:
        head = file.read(2)
    if head == b"PK":
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            head = archive.read(name)
    return head[1]


def read_safetensors(path):
    """The weights of a safetensors file, memory-mapped; the texts in its header are its config."""
    import safetensors  # no other format needs it

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            texts = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is a damaged safetensors file ({error}); {AGAIN}") from error
    config = {}
    for key, text in texts.items():
        try:
            config[key] = json.loads(text)
        except ValueError:  # it is no JSON, and means itself
            config[key] = text
    if isinstance(config.get("config"), dict):
        config = {**config["config"], **config}
    return {"model_state_dict": state, "config": config}


# ---- the formats that are not read

# The user may run a line that makes a checkpoint of another file. We do not, because reading some
# formats runs the code that is in them.
CONTENT = {
    "torch": "c = torch.load(sys.argv[1], 'cpu', weights_only=False)",
    "TorchScript": "c = torch.jit.load(sys.argv[1], 'cpu').state_dict()",
    "pickle": "import pickle; c = pickle.load(open(sys.argv[1], 'rb'))",
    "npz": "import numpy; c = dict(numpy.load(sys.argv[1]))",
    "HDF5": "import h5py; c = {}; h5py.File(sys.argv[1]).visititems(lambda k, v: "
    "c.update({k.replace('/', '.'): v[()]}) if hasattr(v, 'dtype') else None)",
}
# of the config's objects, OmegaConf's among them, what they hold
PLAIN = (
    "lambda o: getattr(o, '_content', getattr(o, '_val', getattr(o, '__name__', "
    "getattr(o, '__dict__', str(o)))))"
)


def conversion(path, content):
    """What to do with the file at `path`: one line for a shell. content: a key of CONTENT."""
    python = (
        f"import json, sys, torch; {CONTENT[content]}; "
        "w = {k: torch.as_tensor(v) for k, v in c.get('model_state_dict', c).items()}; "
        f"s = json.loads(json.dumps(c.get('config'), default={PLAIN})); "
        "torch.save({'model_state_dict': w, 'config': s}, sys.argv[2])"
    )
    converted = os.path.splitext(path)[0] + "_converted.pt"
    line = f'python -c "{python}" {shlex.quote(path)} {shlex.quote(converted)}'
    if content in ("npz", "HDF5"):
        return f"convert it: {line}"
    return f"if you trust its author, convert it by this line, which runs the file's code: {line}"


OTHER_FORMATS = (  # how a file begins, what it is, what to do
    (rb"\x89HDF\r\n", "an HDF5 file", "HDF5"),
    (
        rb"\x93NUMPY",
        "a numpy array (.npy), which has no names",
        "give a dict of named tensors that torch.save wrote",
    ),
    (rb"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (
        rb"(?s).{257}ustar",
        "a tar archive, not a zip file of torch.save",
        "unpack it with tar -xf, and give the file of weights",
    ),
    (
        rb"version https://git-lfs",
        "a pointer of git-lfs, not the weights",
        "run git lfs pull in its repository",
    ),
    (
        rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]",
        "an ONNX graph, in which weights lose their names",
        "give the checkpoint that it was exported from",
    ),
    (rb"\x80[\x04\x05]", "a pickle of protocol 4 or 5, not a zip file of torch.save", "pickle"),
    (
        rb"\x80|\([dl]p\d|[}\]]q\x00|c[\w.]+\n\w+\n[(q)p]",
        "a pickle, not a zip file of torch.save",
        "pickle",
    ),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page (HTML or XML), not the weights", AGAIN),
    (rb"\s*[{\[][^\x00]*\Z", "JSON text, not the weights", "give the file of weights"),
    (
        rb"([\t-\r -~]|[\xc2-\xf4][\x80-\xbf]+)*[\xc2-\xf4]?\Z",  # UTF-8, perhaps cut
        "text, not the weights",
        "give the file of weights",
    ),
)
