"""Bytes in and out: b2://bucket/key, gs://bucket/key and local paths; and every file that the project writes.

    source = find("b2://bucket/ai-readi/dataset/participants.tsv")     # -> Object: size, checksum, version
    path = fetch(source, "cache/files")                                # -> verified local copy, kept by content
    path = local("b2://bucket/encoders/single_domain_01.pt", "cache")  # both at once; a local path comes back as it is

Backblaze B2 needs B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY, from the environment or a file .env beside this one;
B2_REALM is another endpoint's URL. gs:// needs the package gcsfs. What fails for a moment (a reset, a stall, 503, 429, a
damaged transfer) is tried again until `deadline` seconds have passed without progress; what cannot get better stops at once:
Absent (no such object), PermissionError (key, bucket or cap), Corrupt (content differs from its checksum).
Any number of threads and processes of a host may call these functions at once, also after fork.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import posixpath
import random
import re
import sys
import threading
import time
import uuid
from dataclasses import dataclass

from tqdm import tqdm

ENV_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".env")
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 20  # seconds without an answer
MAX_WAIT = 30  # seconds between two tries, whatever Retry-After says
SLOWEST = 100_000  # bytes a second; a transfer that is slower loses time, and so meets its deadline
DOWNLOADS = 3  # whole downloads of an object before its content counts as corrupt
CONNECTIONS = 64  # at most, of a process


@dataclass(frozen=True)
class Object:
    """A file that is there. checksum: "sha1:hex" or "md5:hex" as the store knows it, else ""; id: its version in the store."""

    path: str  # local path or URL
    size: int
    checksum: str = ""
    id: str = ""


class Stopped(Exception):
    """The caller wants no more bytes."""


class Absent(FileNotFoundError):
    """There is no such file or object."""


class Corrupt(ValueError):
    """What the store holds is not what its checksum says."""


# ---------------------------------------------------------------------------------------------------------------- paths


def is_remote(path):
    """Is path a URL? ValueError for a scheme that is neither b2 nor gs."""
    scheme, separator, rest = str(path).partition("://")
    if separator and scheme not in ("b2", "gs") or separator and not rest.split("/")[0]:
        raise ValueError(f"{path} is no place to read from: write b2://BUCKET/KEY, gs://BUCKET/KEY or a local path")
    return bool(separator)


def local_folder(path, key):
    """Path of a folder to write to, with ~ expanded; it need not exist. ValueError naming the config key when it cannot be one."""
    if "://" in str(path):
        raise ValueError(f"{key}={path}: results and caches are written to a local folder; set {key} to one")
    path = os.path.expanduser(str(path))
    there = os.path.abspath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise ValueError(f"{key}={path} cannot be written, for {there} cannot; set {key} to another one")
    return path


def split(url):
    """b2://bucket/key -> (bucket, key); no character of a key has a meaning."""
    bucket, _, key = url.partition("://")[2].partition("/")
    return bucket, key


def join(root, relative):
    """Path or URL of the data set's file `relative` (leading slash or not) below root. ValueError when it would leave root."""
    parts = [part for part in relative.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"'{relative}' points outside the data folder")
    if not parts:
        raise ValueError("a row names no file")
    return "/".join([root.rstrip("/"), *parts]) if is_remote(root) else os.path.join(os.path.expanduser(root), *parts)


# -------------------------------------------------------------------------------------------------------------- clients


clients, clients_lock = {}, threading.RLock()  # of this process: a client that was used before a fork is broken in the child


def renew():
    global clients_lock
    clients.clear()
    clients_lock = threading.RLock()  # the old one may be held by a thread that the child does not have


os.register_at_fork(after_in_child=renew)


def client(name, make):
    """The client of that name, made on first use."""
    with clients_lock:
        if name not in clients:
            clients[name] = make()
        return clients[name]


def b2_api():
    """The authorized B2Api; tries once a call, for all retrying is done in `patiently`."""
    import dotenv
    from b2sdk import v3
    from b2sdk.v3.exception import Unauthorized

    class Http(v3.B2Http):
        CONNECTION_TIMEOUT = CONNECT_TIMEOUT
        TIMEOUT = TIMEOUT_FOR_COPY = TIMEOUT_FOR_UPLOAD = READ_TIMEOUT  # listings wait for COPY, HEAD for UPLOAD

        def __init__(self, config):
            super().__init__(config)
            for adapter in self.session.adapters.values():
                adapter.init_poolmanager(1, CONNECTIONS)

        def request(self, method, url, headers, data=None, try_count=1, params=None, **kwargs):
            return super().request(method, url, headers, data, 1, params, **kwargs)

    class Session(v3.B2Session):
        B2HTTP_CLASS = Http

    class Api(v3.B2Api):
        SESSION_CLASS = Session

    dotenv.load_dotenv(ENV_FILE)  # what the environment has already stays
    missing = [name for name in ("B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY") if not os.environ.get(name, "").strip()]
    if missing:
        raise PermissionError(f"b2:// needs a key: set {' and '.join(missing)} in the environment or in {ENV_FILE} (see .env.example)")
    realm = os.environ.get("B2_REALM", "").strip() or "production"
    if realm != "production" and not realm.startswith(("https://", "http://")):
        raise PermissionError(f"B2_REALM={realm} is no endpoint; write its URL with https://, or unset it")
    api = Api(v3.InMemoryAccountInfo(), api_config=v3.B2HttpApiConfig(install_clock_skew_hook=False))
    try:
        api.authorize_account(os.environ["B2_APPLICATION_KEY_ID"].strip(), os.environ["B2_APPLICATION_KEY"].strip(), realm=realm)
    except Unauthorized:
        raise PermissionError("B2 does not know this key: check B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY "
                              f"(and B2_REALM, now {realm})") from None
    return api


def b2_bucket(name):
    api = client("b2", b2_api)
    return client(f"b2 bucket {name}", lambda: api.get_bucket_by_name(name))


def gs_files():
    import dotenv
    import fsspec

    dotenv.load_dotenv(ENV_FILE)
    try:
        return fsspec.filesystem("gs")
    except ImportError:
        raise ValueError("gs:// needs the package gcsfs: pip install gcsfs") from None


# --------------------------------------------------------------------------------------------------------- what is there


def find(path, deadline=300):
    """The Object at path or URL. Absent, a FileNotFoundError, when there is none."""
    if not is_remote(path):
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise Absent(f"{path} is not there")
        return Object(path, os.path.getsize(path))
    bucket, key = split(path)
    if path.startswith("gs://"):
        return patiently(lambda _: gs_object(client("gs", gs_files).info(f"{bucket}/{key}")), path, deadline)

    def ask(_):
        version = b2_bucket(bucket).get_file_info_by_name(key)
        return b2_object(bucket, key, version.content_length, version)
    return patiently(ask, path, deadline)


def find_all(paths, deadline=300):
    """{path: Object} of those of `paths` (of one bucket, or local) that are there; a bucket is listed once, below their common folder."""
    if not paths or not is_remote(paths[0]):
        return {path: Object(path, os.path.getsize(path)) for path in paths if os.path.isfile(path)}
    bucket = split(paths[0])[0]
    folder, slash, _ = os.path.commonprefix([split(path)[1] for path in paths]).rpartition("/")  # commonpath would tidy keys up
    prefix = folder + slash

    def ask(_):
        if paths[0].startswith("gs://"):
            return [gs_object(info) for info in client("gs", gs_files).find(f"{bucket}/{prefix}", detail=True).values()]
        return [b2_object(bucket, version.file_name, version.size, version) for version, _ in b2_bucket(bucket).ls(prefix, recursive=True)]
    there = {found.path: found for found in patiently(ask, f"{paths[0].split('://')[0]}://{bucket}/{prefix}", deadline)}
    return {path: there[path] for path in paths if path in there}


def b2_object(bucket, key, size, version):
    sha1 = version.get_content_sha1()
    return Object(f"b2://{bucket}/{key}", size, f"sha1:{sha1}" if sha1 else "", version.id_)


def gs_object(info):
    if info["type"] != "file":
        raise FileNotFoundError(info["name"])
    md5 = info.get("md5Hash")
    return Object("gs://" + info["name"].removeprefix("/"), info["size"], "md5:" + base64.b64decode(md5).hex() if md5 else "",
                  str(info.get("generation", "")))


# ------------------------------------------------------------------------------------------------- patience with networks


def patiently(attempt, what, deadline, stop=None):
    """attempt(patience) until it succeeds; what fails for a moment is tried again until `deadline` seconds have passed without progress."""
    patience = Patience(deadline, stop)
    while True:
        try:
            return attempt(patience)
        except Exception as error:  # `diagnose` raises again whatever it does not know
            patience.after(error, what)


class Patience:
    """What is left of the seconds that one object may fail without progress. stop: an event that ends it at once."""

    def __init__(self, seconds, stop=None):
        self.seconds, self.end, self.stop, self.failures = seconds, time.monotonic() + seconds, stop or threading.Event(), 0

    def received(self, count):
        """Bytes came: no time was lost, unless they come at less than SLOWEST."""
        self.failures = 0
        self.end = min(self.end + count / SLOWEST, time.monotonic() + self.seconds)
        if self.stop.is_set():
            raise Stopped
        if time.monotonic() > self.end:
            raise TimeoutError(f"it comes at less than {SLOWEST // 1000} kB/s")

    def after(self, error, what):
        """Wait for the next try, or raise what ends it."""
        wait = diagnose(error, what)
        self.failures += 1
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        left = self.end - time.monotonic()
        # one long wait for an answer is no reason not to ask again
        if left <= 0 and (self.failures > 1 or isinstance(error, TimeoutError)):
            raise TimeoutError(f"{what}: given up after {self.seconds:g} s of failures (data.fetch_deadline), "
                               f"the last one {reason}") from error
        backoff = random.uniform(0.5, 1) * 2 ** min(self.failures - 2, 10)  # jittered, for many clients fail together
        wait = min(max(wait, backoff), MAX_WAIT, max(left, 0.5))
        if self.failures > 2:
            tqdm.write(f"{what}: {reason}; trying again in {wait:.0f} s", file=sys.stderr)
        if self.stop.wait(wait):
            raise Stopped


def diagnose(error, what):
    """Seconds to wait before the next try, as the store asks; raises, naming what to change, where no other try can help."""
    import requests
    import urllib3
    from b2sdk.v3 import exception as b2

    if isinstance(error, (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError, UnicodeDecodeError,
                          b2.InvalidAuthToken, b2.UnknownHost)):
        return 0  # UnicodeDecodeError: garbage where JSON was due
    if isinstance(error, (FileNotFoundError, b2.FileNotPresent)):
        raise Absent(f"{what} is not there") from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(error.errno, f"no space left on the disk for {what}; make room, or set paths.cache_dir to another disk") from error
    forbidden = type(error) is OSError and "Forbidden" in str(error)  # how gcsfs says 403
    if forbidden or (package := type(error).__module__.split(".")[0]) in ("aiohttp", "gcsfs", "google"):  # not imported: gcsfs is optional
        if forbidden or getattr(error, "code", None) in (401, 403) or package == "google" and not getattr(error, "retryable", False):
            raise PermissionError(f"{what}: Google Cloud does not allow this ({' '.join(str(error).split())}); "
                                  "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS") from error
        return 0
    if not isinstance(error, b2.B2Error):
        raise error
    if isinstance(error, b2.NonExistentBucket):
        raise PermissionError(f"{what}: there is no such bucket, or B2_APPLICATION_KEY_ID is a key of another account") from error
    text = " ".join(str(error).split())
    if isinstance(error, b2.CapExceeded) or "cap_exceeded" in text:
        raise PermissionError(f"{what}: a cap of the B2 account is reached ({text}); "
                              "raise it on the account's page of caps and alerts") from error
    if isinstance(error, (b2.RestrictedBucket, b2.Unauthorized, b2.AccessDenied)) or "error: 403" in text:  # HEAD has no body to tell more
        raise PermissionError(f"{what}: the key of B2_APPLICATION_KEY_ID may not read this ({text}); it needs listBuckets, listFiles and "
                              "readFiles for this bucket, and the account's caps must allow it") from error
    if isinstance(error, b2.UnknownError) or error.should_retry_http():  # UnknownError: an answer cut off, say
        try:
            wait = float(getattr(error, "retry_after_seconds", None) or 0)
        except ValueError:  # a date, or nonsense
            wait = 0
        return wait if 0 <= wait < float("inf") else 0
    raise ConnectionError(f"{what}: {type(error).__name__} {text}") from error


# ------------------------------------------------------------------------------------------------------- bytes that arrive


def local(path, cache_dir, deadline=300):
    """Path of a local file with the content of path or URL; what comes from a store is kept by content below cache_dir."""
    source = find(path, deadline)
    if not is_remote(path):
        return source.path
    return fetch(source, os.path.join(local_folder(cache_dir, "paths.cache_dir"), "files"), deadline, bar=source.size > 20e6)


def fetch(source, folder, deadline=300, stop=None, bar=False):
    """Path of a local copy of a remote Object, verified by size and checksum; its name in folder tells its content.

    A copy that is there is verified again and mended. Whoever comes first downloads, others wait; what a failure or a kill
    left behind is resumed.
    """
    identity = source.checksum or f"{source.path} {source.id}"
    name = re.sub(r"[^\w.-]", "_", posixpath.basename(source.path), flags=re.ASCII)[-100:]
    path = os.path.join(folder, f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-{name}")
    if is_whole(path, source):
        return path
    with locked(path + ".part", stop) as part:
        if is_whole(path, source):  # another one was faster
            os.remove(part.name)
            return path
        if os.path.exists(path):
            tqdm.write(f"{path} is damaged; fetching it again", file=sys.stderr)
        try:
            download(source, part, deadline, stop, bar)
        except (Stopped, TimeoutError, KeyboardInterrupt):
            raise  # the next run goes on from here
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part.name)
            raise
        os.replace(part.name, path)
    return path


def download(source, part, deadline, stop, bar):
    """Append to the file part until it holds all of source."""
    name, hexdigest = source.checksum.split(":") if source.checksum else ("sha1", None)
    downloads = itertools.count(1)
    part.seek(0)
    digest = hashlib.file_digest(part, name)  # of what an earlier run left
    progress = tqdm(total=source.size, initial=part.tell(), desc=posixpath.basename(source.path), unit="B", unit_scale=True,
                    disable=not bar)

    def attempt(patience):
        nonlocal digest

        def receive(data):
            left = memoryview(data)
            while left:
                left = left[part.write(left):]
            digest.update(data)
            progress.update(len(data))
            patience.received(len(data))

        if part.tell() < source.size:
            read(source, part.tell(), receive)
        if part.tell() == source.size and hexdigest in (None, digest.hexdigest()):
            return
        if part.tell() < source.size:
            raise ConnectionError(f"{part.tell()} of {source.size} bytes came")
        progress.reset()
        part.seek(0)
        part.truncate()
        digest = hashlib.new(name)
        if next(downloads) == DOWNLOADS:
            raise Corrupt(f"{source.path}: its content is not that of its {name.upper()}, in {DOWNLOADS} downloads; "
                          "it was damaged before or during its upload")
        raise ConnectionError(f"the content that came is not that of its {name.upper()}")

    with progress:
        patiently(attempt, source.path, deadline, stop)


def read(source, start, receive):
    """Hand the bytes of a remote Object from start on to receive(bytes), in one stream."""
    if source.path.startswith("gs://"):
        with client("gs", gs_files).open(source.path.removeprefix("gs://"), "rb", cache_type="none") as f:
            f.seek(start)
            for data in iter(lambda: f.read(1 << 22), b""):
                receive(data)
    else:
        answer = client("b2", b2_api).download_file_by_id(source.id, range_=(start, source.size - 1))
        with contextlib.closing(answer.response):  # not answer.save: it waits until 256 KB have come before it hands any on
            for data in iter(lambda: answer.response.raw.read1(1 << 18), b""):
                receive(data)


def is_whole(path, source):
    """Is path there, with the size and the checksum of source?"""
    if not os.path.isfile(path) or os.path.getsize(path) != source.size:
        return False
    return not source.checksum or checksum(path, source.checksum.split(":")[0]) == source.checksum


def checksum(path, name):
    """Of a file's content, as "name:hex"; name as hashlib knows it."""
    with open(path, "rb") as f:
        return f"{name}:{hashlib.file_digest(f, name).hexdigest()}"


def sha256(path):
    """Of a file's content, in hex."""
    return checksum(path, "sha256").split(":")[1]


@contextlib.contextmanager
def locked(path, stop=None):
    """The file path, open for reading and appending, held alone among all threads and processes of this host.

    The holder may remove or rename it. A holder that is killed lets go.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    began, told = time.monotonic(), False
    while True:
        with open(path, "a+b", buffering=0) as file:  # unbuffered: on a full disk, closing would fail too
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if (stop or threading.Event()).wait(0.05):
                        raise Stopped from None
                    if time.monotonic() - began > 30 and not told:
                        told = True
                        tqdm.write(f"waiting for another thread or process that holds {path}", file=sys.stderr)
            try:
                is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                is_ours = False
            if is_ours:  # else the last holder removed or renamed it
                yield file
                return


# ------------------------------------------------------------------------------------------------------ files that we write


def write(path, data):
    """Write bytes or text to path: to a temporary name first, then moved, so that a reader sees all of it or nothing.

    data may be a function that writes to the open file it is given, for what should not lie in memory a second time.
    """
    path = str(path)
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            if callable(data):
                data(f)
            else:
                f.write(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as raised:
        error = raised if isinstance(raised, OSError) else raised.__context__  # torch.save hides the disk's error in its own
        if not isinstance(error, OSError):
            raise
        reason = ("no space left on the disk; make room, or set paths.cache_dir and paths.run_dir to another one"
                  if error.errno == errno.ENOSPC else error.strerror)
        raise OSError(error.errno, f"not written: {reason}", path) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def remove_abandoned(folder, age):
    """Remove the temporary files that killed writers left in a folder: those that nobody has touched for `age` seconds."""
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        if entry.name.endswith(".part"):
            with contextlib.suppress(FileNotFoundError):  # its writer lives, or another cleaner was faster
                if time.time() - entry.stat().st_mtime >= age:
                    os.remove(entry.path)
