"""Reads from b2://bucket/key, gs://bucket/key and local paths: find, fetch, try again, verify.

    source = find("b2://bucket/ai-readi/participants.tsv")  # -> Object(path, size, checksum, id)
    scans = find_all(["b2://bucket/a.dcm", "b2://bucket/b"])  # {path: Object}; b may be a folder
    path = fetch(source, "cache/files")                     # -> verified local copy
    path = local("b2://bucket/encoders/a.pt", "cache")      # both; a local path comes back as it is

Backblaze B2 needs B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY, from the environment or a file .env
beside this one; B2_REALM is another endpoint's URL. gs:// needs requirements-gcs.txt.

Temporary failures (a reset, a stall, 503, 429, a damaged transfer) are tried again until `deadline`
seconds have passed without progress: TimeoutError. What cannot get better stops at once: Absent (no
such object), PermissionError (key, bucket or cap), Corrupt (content differs from its checksum).
Any number of threads and processes of a host may call these functions at once, also after a fork.
"""

import base64
import contextlib
import errno
import os
import posixpath
import random
import re
import sys
import threading
import time
import urllib.parse
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

import stages
from files import IGNORED, Stopped, bytes_of, checksum, hashed, local_folder, locked

ENV_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".env")
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 20  # seconds without an answer
MAX_WAIT = 30  # seconds between two tries, whatever Retry-After says
SLOWEST = 100_000  # bytes a second; a transfer that is slower loses time, and so meets its deadline
DOWNLOADS = 3  # whole downloads of an object before its content counts as corrupt
CONNECTIONS = 64  # at most, of a process
MEMBERS_AT_ONCE = 8  # files of one folder that are fetched at once


@dataclass(frozen=True)
class Object:
    """A file that exists. checksum: "sha1:hex" or "md5:hex" as the store knows it, else ""; id: its
    version in the store. Or a folder whose files make up a volume: size is theirs together; of a
    remote one, members are their Objects, and checksum ("files:hex") and id are made of theirs."""

    path: str  # local path or URL
    size: int
    checksum: str = ""
    id: str = ""
    members: tuple = ()


class Absent(FileNotFoundError):
    """There is no such file or object."""


class Corrupt(ValueError):
    """What the store holds is not what its checksum says."""


# -------------------------------------------------------------------------------------------- paths


def is_remote(path):
    """Is path a URL? ValueError for a scheme that is neither b2 nor gs."""
    scheme, separator, rest = str(path).partition("://")
    if separator and (scheme not in ("b2", "gs") or not rest.split("/")[0]):
        raise ValueError(
            f"{path} is no place to read from: write b2://BUCKET/KEY, gs://BUCKET/KEY or a local "
            "path"
        )
    return bool(separator)


def split(url):
    """b2://bucket/key -> (bucket, key). A key may hold any character; none is special."""
    bucket, _, key = url.partition("://")[2].partition("/")
    return bucket, key


def join(root, relative):
    """Path or URL of the data set's file `relative` (leading slash or not) below root. ValueError
    when it would leave root."""
    parts = [part for part in relative.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"'{relative}' points outside the data folder")
    if not parts:
        raise ValueError("a row names no file")
    if is_remote(root):
        return "/".join([root.rstrip("/"), *parts])
    return os.path.join(os.path.expanduser(root), *parts)


def below(root, path):
    """What `join` was given: a path or URL relative to root; one that is not below it as it is."""
    root = root if is_remote(root) else os.path.expanduser(root)
    return path.removeprefix(root.rstrip("/") + "/")


# ------------------------------------------------------------------------------------------ clients


# of this process: a client that was used before a fork is broken in the child
clients, clients_lock = {}, threading.RLock()


def renew():
    """Forget all clients, as a child must after a fork."""
    global clients_lock
    clients.clear()
    # the old lock may be held by a thread that the child does not have
    clients_lock = threading.RLock()


os.register_at_fork(after_in_child=renew)


def client(name, make):
    """The client of that name, made on first use, when the environment has what ENV_FILE adds."""
    import dotenv

    with clients_lock:
        if name not in clients:
            try:
                dotenv.load_dotenv(ENV_FILE)  # does not overwrite the environment
            except UnicodeDecodeError:
                raise PermissionError(f"{ENV_FILE} is not text in UTF-8; save it anew so") from None
            clients[name] = make()
        return clients[name]


def b2_api():
    """The authorized B2Api. It sends each request once: `patiently` does all retrying."""
    from b2sdk import v3
    from b2sdk.v3.exception import Unauthorized

    class Http(v3.B2Http):
        CONNECTION_TIMEOUT = CONNECT_TIMEOUT
        # listings wait for COPY, HEAD for UPLOAD
        TIMEOUT = TIMEOUT_FOR_COPY = TIMEOUT_FOR_UPLOAD = READ_TIMEOUT

        def request(self, method, url, headers, data=None, try_count=1, params=None, **kwargs):
            return super().request(method, url, headers, data, 1, params, **kwargs)

    names = ("B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY")
    key = [os.environ.get(name, "").strip() for name in names]
    missing = [name for name, value in zip(names, key) if not value]
    if missing:
        raise PermissionError(
            f"b2:// needs a key: set {' and '.join(missing)} in the environment or in {ENV_FILE} "
            "(see .env.example)"
        )
    realm = os.environ.get("B2_REALM", "").strip() or "production"
    if realm != "production" and not is_endpoint(realm):
        raise PermissionError(
            f"B2_REALM={realm} is no endpoint; write its URL with https://, or unset it"
        )
    no_hook = v3.B2HttpApiConfig(install_clock_skew_hook=False)
    http = Http(no_hook)
    for adapter in http.session.adapters.values():
        adapter.init_poolmanager(1, CONNECTIONS)
    api = v3.B2Api(v3.InMemoryAccountInfo())
    api.session.raw_api.b2_http = http  # in place of the SDK's, which waits and retries by itself
    try:
        api.authorize_account(*key, realm=realm)
    except Unauthorized:
        raise PermissionError(
            "B2 does not know this key: check B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY "
            f"(and B2_REALM, now {realm})"
        ) from None
    return api


def is_endpoint(url):
    """Is this the URL of a server, with a port that can be?"""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def b2_bucket(name):
    api = client("b2", b2_api)
    return client(f"b2 bucket {name}", lambda: api.get_bucket_by_name(name))


def gs_files():
    import fsspec

    # Read by gcsfs when it is imported: else it asks over gRPC what kind of bucket this is, which
    # takes minutes where gRPC is blocked. Whoever has a zonal bucket sets it to true.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        return fsspec.filesystem("gs")
    except ImportError:
        raise ValueError(
            "gs:// needs the package gcsfs: pip install -r requirements-gcs.txt"
        ) from None


# ------------------------------------------------------------------------------------------ finding


def find(path, deadline=300):
    """The Object of the file at path or URL. Absent, a FileNotFoundError, when there is none."""
    if not is_remote(path):
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise Absent(f"{path} is not there")
        return Object(path, os.path.getsize(path))
    bucket, key = split(path)

    def ask(_):
        if path.startswith("gs://"):
            return gs_object(client("gs", gs_files).info(f"{bucket}/{key}"))
        version = b2_bucket(bucket).get_file_info_by_name(key)
        return b2_object(path, version.content_length, version)

    return patiently(ask, path, deadline)


def find_all(paths, deadline=300):
    """{path: Object} of those of `paths` (all of one bucket, or all local) that exist, files or
    folders of files. A bucket is listed once, below their common folder."""
    if not paths or not is_remote(paths[0]):
        # a pipe would be waited for
        there = [path for path in paths if os.path.isfile(path) or os.path.isdir(path)]
        return {path: Object(path, bytes_of(path)) for path in there}
    # not commonpath: it would remove double slashes, and these are part of a key
    folder = os.path.commonprefix(paths)
    folder = folder[: folder.rfind("/") + 1]
    bucket, prefix = split(folder)

    def ask(_):
        if folder.startswith("gs://"):
            listing = client("gs", gs_files).find(f"{bucket}/{prefix}", detail=True)
            return [gs_object(info) for info in listing.values()]
        return [
            b2_object(f"b2://{bucket}/{version.file_name}", version.size, version)
            for version, _ in b2_bucket(bucket).ls(prefix, recursive=True)
        ]

    found = {source.path: source for source in patiently(ask, folder, deadline)}
    inside = defaultdict(list)
    for url, source in sorted(found.items()):
        parent, _, name = url.rpartition("/")
        if name and not IGNORED.fullmatch(name):
            inside[parent].append(source)
    for path in paths:
        if path not in found and path.rstrip("/") in inside:
            found[path] = folder_object(path, inside[path.rstrip("/")])
    return {path: found[path] for path in paths if path in found}


def folder_object(path, members):
    """The Object of a remote folder, of its files' Objects."""
    names = [posixpath.basename(source.path) for source in members]
    made_of = lambda parts: hashed("\n".join(f"{part} {name}" for part, name in zip(parts, names)))
    checksums = [source.checksum for source in members]
    checksum = f"files:{made_of(checksums)}" if all(checksums) else ""
    ids = made_of(f"{source.size} {source.checksum} {source.id}" for source in members)
    return Object(path, sum(source.size for source in members), checksum, ids, tuple(members))


def b2_object(url, size, version):
    sha1 = version.get_content_sha1()
    return Object(url, size, f"sha1:{sha1}" if sha1 else "", version.id_)


def gs_object(info):
    if info["type"] != "file":
        raise FileNotFoundError(info["name"])
    md5 = info.get("md5Hash")
    return Object(
        "gs://" + info["name"].removeprefix("/"),
        info["size"],
        "md5:" + base64.b64decode(md5).hex() if md5 else "",
        str(info.get("generation", "")),
    )


# ------------------------------------------------------------------------------------- trying again


def patiently(attempt, what, deadline, stop=None):
    """attempt(patience), again after temporary failures, until it succeeds or `deadline` seconds
    have passed without progress -> its result. what: the object's name in messages."""
    patience = Patience(deadline, stop)
    while True:
        try:
            return attempt(patience)
        except Exception as error:  # `diagnose` raises again whatever it does not know
            patience.after(error, what)


class Patience:
    """The seconds that the transfer of one object may still fail without progress. stop: an event
    that ends it at once."""

    def __init__(self, seconds, stop=None):
        self.seconds, self.failures = seconds, 0
        self.end = time.monotonic() + seconds
        self.stop = stop or threading.Event()

    def received(self, count):
        """Account for bytes that arrived: only a transfer slower than SLOWEST loses time."""
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
        # a first failure that took all the time, such as a 503 after a long wait, gets a second try
        if left <= 0 and (self.failures > 1 or isinstance(error, TimeoutError)):
            raise TimeoutError(
                f"{what}: given up after {self.seconds:g} s of failures (data.fetch_deadline), "
                f"the last one {reason}"
            ) from error
        # jittered, since many clients fail together
        backoff = random.uniform(0.5, 1) * 2 ** min(self.failures - 2, 10)
        wait = min(max(wait, backoff), MAX_WAIT, max(left, 0.5))
        if self.failures > 2:
            tqdm.write(f"{what}: {reason}; trying again in {wait:.0f} s", file=sys.stderr)
        if self.stop.wait(wait):
            raise Stopped


def diagnose(error, what):
    """Seconds to wait before the next try, as the store asks. Raises, naming what to change, where
    no other try can help."""
    import requests
    import urllib3
    from b2sdk.v3 import exception as b2

    temporary = (
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        ConnectionError,
        TimeoutError,
        UnicodeDecodeError,  # garbage where JSON was due
        b2.InvalidAuthToken,
        b2.UnknownHost,
    )
    if isinstance(error, temporary):
        return 0
    if isinstance(error, (FileNotFoundError, b2.FileNotPresent)):
        raise Absent(f"{what} is not there") from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(
            error.errno,
            f"no space left on the disk for {what}; make room, or set paths.cache_dir to another "
            "disk",
        ) from error
    text = " ".join(str(error).split())
    if isinstance(error, b2.B2Error):
        return diagnose_b2(error, text, what)
    package = type(error).__module__.split(".")[0]  # by name: gcsfs is optional and not imported
    is_refused = (
        (type(error) is OSError and "Forbidden" in text)  # how gcsfs reports a 403
        or getattr(error, "code", None) in (401, 403)
        or (package == "google" and not getattr(error, "retryable", False))
    )
    if is_refused:
        raise PermissionError(
            f"{what}: Google Cloud does not allow this ({text}); run gcloud auth "
            "application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
        ) from error
    if package in ("aiohttp", "gcsfs", "google"):
        return 0
    raise error


def diagnose_b2(error, text, what):
    """The part of `diagnose` for the SDK's own errors. text: the error's, on one line."""
    from b2sdk.v3 import exception as b2

    if isinstance(error, b2.NonExistentBucket):
        raise PermissionError(
            f"{what}: there is no such bucket, or B2_APPLICATION_KEY_ID is a key of another account"
        ) from error
    if isinstance(error, b2.CapExceeded) or "cap_exceeded" in text:
        raise PermissionError(
            f"{what}: a cap of the B2 account is reached ({text}); raise it on the account's page "
            "of caps and alerts"
        ) from error
    refused = (b2.RestrictedBucket, b2.Unauthorized, b2.AccessDenied)
    # the answer to a HEAD request has no body that could tell more than 403
    if isinstance(error, refused) or "error: 403" in text:
        raise PermissionError(
            f"{what}: the key of B2_APPLICATION_KEY_ID may not read this ({text}); it needs "
            "listBuckets, listFiles and readFiles for this bucket, and the account's caps must "
            "allow it"
        ) from error
    # UnknownError: for example an answer that was cut off
    if isinstance(error, b2.UnknownError) or error.should_retry_http():
        return error.retry_after_seconds or 0  # None also where the store gives a date
    raise ConnectionError(f"{what}: {type(error).__name__} {text}") from error


# ----------------------------------------------------------------------------------------- fetching


def local(path, cache_dir, deadline=300):
    """Path of a local file with the content of path or URL. A remote object is fetched to
    cache_dir/files, and kept there."""
    source = find(path, deadline)
    if not is_remote(path):
        return source.path
    folder = os.path.join(local_folder(cache_dir, "paths.cache_dir", must_write=False), "files")
    return fetch(source, folder, deadline, bar=source.size > 20e6)


def fetch(source, folder, deadline=300, stop=None, bar=False):
    """Path of a local copy of a remote Object, verified by size and checksum. Its name is made of
    that checksum, so another content has another path.

    A copy that exists is verified again, and fetched again when it is damaged. Of several callers
    the first downloads and the others wait; a download that was interrupted is resumed.
    """
    identity = source.checksum or f"{source.path} {source.id}"
    name = re.sub(r"[^\w.-]", "_", posixpath.basename(source.path), flags=re.ASCII)[-100:]
    path = os.path.join(folder, f"{hashed(identity)[:32]}-{name}")
    if os.path.exists(path) and is_whole(path, source):
        return path
    with locked(path + ".part", stop) as part:
        if os.path.exists(path):
            if is_whole(path, source):  # another one was faster
                os.remove(part.name)
                return path
            tqdm.write(f"{path} is damaged; fetching it again", file=sys.stderr)
        try:
            download(source, part, deadline, stop, bar)
        except (Stopped, TimeoutError):
            raise  # and leave the part: the next run resumes it
        except Exception:
            os.remove(part.name)
            raise
        os.replace(part.name, path)
    return path


def fetch_folder(source, folder, deadline=300, stop=None):
    """Path of a local folder with the files of a remote one (an Object with members), each under
    its own name and verified. Two callers may not fetch the same at once."""
    identity = source.checksum or f"{source.path} {source.id}"
    path = os.path.join(folder, f"{hashed(identity)[:32]}.files")
    os.makedirs(path, exist_ok=True)

    def fetch_member(member):
        place = os.path.join(path, posixpath.basename(member.path))
        if not (os.path.exists(place) and is_whole(place, member)):
            os.replace(fetch(member, path, deadline, stop), place)

    with ThreadPoolExecutor(MEMBERS_AT_ONCE) as pool:
        list(pool.map(fetch_member, source.members))
    return path


def download(source, part, deadline, stop, bar):
    """Append to the open file `part` until it holds all of source. Corrupt when its content is
    wrong in all of DOWNLOADS downloads."""
    stage = stages.Stage(
        posixpath.basename(source.path),
        source.size,
        "B",
        shown=bar,  # on any rank: the others wait for this one
        unit_scale=True,
        initial=part.tell(),  # what an earlier run left
    )

    def receive_rest(patience):
        if part.tell() >= source.size:
            return
        with contextlib.closing(read(source, part.tell())) as pieces:
            for data in pieces:
                unwritten = memoryview(data)
                while unwritten:
                    unwritten = unwritten[part.write(unwritten) :]
                stage.update(len(data))
                patience.received(len(data))
        if part.tell() < source.size:
            raise ConnectionError(f"{part.tell()} of {source.size} bytes came")

    with stage:
        for _ in range(DOWNLOADS):
            patiently(receive_rest, source.path, deadline, stop)
            if is_whole(part.name, source):
                return
            stage.update(-stage.n)
            part.seek(0)
            part.truncate()
    name = source.checksum.split(":")[0].upper() or "size"
    raise Corrupt(
        f"{source.path}: its content is not that of its {name}, in {DOWNLOADS} downloads; it was "
        "damaged before or during its upload"
    )


def read(source, start):
    """Yield the bytes of a remote Object from start on, in one stream."""
    if source.path.startswith("gs://"):
        path = source.path.removeprefix("gs://")
        with client("gs", gs_files).open(path, "rb", cache_type="none") as f:
            f.seek(start)
            yield from iter(lambda: f.read(1 << 22), b"")
    else:
        api = client("b2", b2_api)
        response = api.download_file_by_id(source.id, range_=(start, source.size - 1)).response
        # not the SDK's save: it waits until 256 KB have come before it hands any on
        with contextlib.closing(response):
            yield from iter(lambda: response.raw.read1(1 << 18), b"")


def is_whole(path, source):
    """Has the file the size and the checksum of source?"""
    if os.path.getsize(path) != source.size:
        return False
    return not source.checksum or checksum(path, source.checksum.split(":")[0]) == source.checksum
