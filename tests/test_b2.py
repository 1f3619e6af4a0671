"""The real SDK over real HTTP: b2.py against a small Backblaze on loopback, which counts requests
and injects faults."""

import base64
import contextlib
import hashlib
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from b2_server import HEADERS, Fault
from helpers import ROOT, content, read_bytes, write_bytes

import b2
import files

NAME = "ai-readi/a b#c%41+ü.bin"
URL = f"b2://bucket/{NAME}"
CONTENT = bytes(range(256)) * 12_000  # 3,072,000 bytes


@pytest.fixture()
def server(store):
    with store({NAME: CONTENT}) as server:
        yield server


def downloads(fault):
    """Faults of downloads alone: fault(n) for the n-th of an object."""
    return lambda kind, name, n: fault(n) if kind == "download" else None


def first(count, fault):
    """A fault of the first downloads alone."""
    return lambda n: fault if n <= count else None


def fetch(tmp_path, deadline=20, url=URL):
    return b2.fetch(b2.find(url, deadline), tmp_path / "files", deadline)


def fetched(tmp_path, **options):
    return read_bytes(fetch(tmp_path, **options))


def kinds(server):
    return [kind for kind, _ in server.requests]


@pytest.fixture()
def short_waits(monkeypatch):
    """Waits between two tries that are a tenth as long."""
    real = b2.random.uniform
    monkeypatch.setattr(b2.random, "uniform", lambda low, high: real(low, high) / 10)


START = ["authorize", "list_buckets", "head"]


def test_find(server):
    checksum = "sha1:" + hashlib.sha1(CONTENT).hexdigest()
    found = b2.Object(URL, len(CONTENT), checksum, server.objects[NAME].id)
    assert b2.find(URL) == found and kinds(server) == START


def test_a_clean_fetch(server, tmp_path):
    path = fetch(tmp_path)
    assert read_bytes(path) == CONTENT and kinds(server) == [*START, "download"]
    assert fetch(tmp_path) == path and server.count("download") == 1  # it is there
    assert os.listdir(tmp_path / "files") == [os.path.basename(path)]


# ---------------------------------------------------------------------- what another try can help

ONE_AFTER_ANOTHER = [Fault(truncate=300_000), Fault(flip=5), Fault(reset=HEADERS)]
A_DATE = "Wed, 21 Oct 2065 07:28:00 GMT"
FOR_A_MOMENT = {  # -> faults of the n-th download, and how many downloads it takes
    "reset before headers": (first(3, Fault(reset=HEADERS)), 4),
    "reset mid-body, twice": (lambda n: Fault(reset=1_000_000 * n) if n <= 2 else None, 3),
    "truncation mid-body, four times": (first(4, Fault(truncate=700_000)), 5),
    "flipped byte, twice": (first(2, Fault(flip=2_000_000)), 3),
    "stall before headers": (first(1, Fault(stall=30)), 2),
    "stall mid-body": (first(1, Fault(stall=30, stall_at=1_500_000)), 2),
    "503": (first(2, Fault(status=503)), 3),
    "503 Retry-After": (first(1, Fault(status=503, retry_after=1)), 2),
    "503 Retry-After a date": (first(1, Fault(status=503, retry_after=A_DATE)), 2),
    "500": (first(1, Fault(status=500)), 2),
    "408": (first(1, Fault(status=408)), 2),
    "429": (first(2, Fault(status=429, retry_after=0)), 3),
    "one after another": (lambda n: dict(enumerate(ONE_AFTER_ANOTHER, 1)).get(n), 4),
}


@pytest.mark.parametrize("fault, requests", FOR_A_MOMENT.values(), ids=FOR_A_MOMENT)
def test_what_fails_for_a_moment_is_tried_again(server, short_waits, tmp_path, fault, requests):
    server.fault = downloads(fault)
    assert fetched(tmp_path) == CONTENT
    assert kinds(server) == [*START, *["download"] * requests]
    assert len(os.listdir(tmp_path / "files")) == 1


def test_it_goes_on_where_it_broke(server, short_waits, tmp_path):
    server.fault = downloads(first(3, Fault(truncate=700_000)))
    fetch(tmp_path)
    last = len(CONTENT) - 1
    starts = (0, 700_000, 1_400_000, 2_100_000)
    assert server.ranges[NAME] == [f"bytes={n}-{last}" for n in starts]


@pytest.mark.parametrize("kind", ["authorize", "list_buckets", "head", "list"])
@pytest.mark.parametrize(
    "fault",
    [Fault(reset=HEADERS), Fault(status=503), Fault(stall=30), Fault(truncate=HEADERS)],
    ids=["reset", "503", "stall", "cut off"],
)
def test_every_request_is_tried_again(server, short_waits, kind, fault):
    server.fault = lambda k, name, n: fault if (k, n) == (kind, 1) else None
    b2.find(URL, 20)
    assert list(b2.find_all([URL], 20)) == [URL]
    assert server.count(kind) == 2 and len(server.requests) == 5


def test_an_answer_that_breaks_off_is_asked_for_again(server, short_waits):
    faults = {("authorize", 1): Fault(truncate=20), ("list", 1): Fault(truncate=20)}
    server.fault = lambda kind, name, n: faults.get((kind, n))
    assert list(b2.find_all([URL], 20)) == [URL]
    assert server.count("authorize") == server.count("list") == 2


@pytest.mark.slow
def test_an_absurd_retry_after_does_not_outlast_the_deadline(server, tmp_path):
    server.fault = downloads(first(1, Fault(status=503, retry_after=10**9)))
    began = time.monotonic()
    assert fetched(tmp_path, deadline=2) == CONTENT and server.count("download") == 2
    assert 1 < time.monotonic() - began < 5


def gives_up_after(seconds):
    message = (
        rf"ai-readi/.*: given up after {seconds} s of failures \(data.fetch_deadline\), "
        "the last one ServiceError: 503"
    )
    return pytest.raises(TimeoutError, match=message)


def test_a_permanent_503_gives_up_and_says_why(server, tmp_path, capsys):
    server.fault = downloads(lambda n: Fault(status=503))
    with gives_up_after(2):
        fetch(tmp_path, deadline=2)
    assert "trying again in" in capsys.readouterr().err  # whoever waits is told why


@pytest.mark.slow
def test_a_permanent_503_gives_up_within_the_deadline(server, tmp_path, capsys):
    server.fault = downloads(lambda n: Fault(status=503))
    began = time.monotonic()
    with gives_up_after(3):
        fetch(tmp_path, deadline=3)
    assert time.monotonic() - began < 5 and 4 <= server.count("download") <= 8
    assert "trying again in" in capsys.readouterr().err


def test_a_trickle_gives_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(b2, "SLOWEST", 2_000_000)
    server.fault = downloads(lambda n: Fault(rate=500_000))
    with pytest.raises(TimeoutError, match="it comes at less than 2000 kB/s"):
        fetch(tmp_path, deadline=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [200, 2000])
def test_a_trickle_of_few_bytes_gives_up_and_can_be_stopped(server, tmp_path, rate):
    url = "b2://bucket/small"
    server.put("small", b"x" * 60_000)
    server.fault = downloads(lambda n: Fault(rate=rate))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="given up after 2 s of failures"):
        fetch(tmp_path, deadline=2, url=url)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(files.Stopped):
        b2.fetch(b2.find(url), tmp_path / "files", stop=stop)
    assert time.monotonic() - began < 8


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault(status=503), Fault(stall=30)], ids=["503", "stall"])
def test_what_came_before_buys_no_time(server, tmp_path, fault):
    server.fault = downloads(lambda n: Fault(truncate=2_500_000) if n == 1 else fault)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="given up after 3 s"):
        fetch(tmp_path, deadline=3)
    assert time.monotonic() - began < 8


def test_one_failure_after_a_long_wait_is_tried_again(server):
    faults = {("list", 1): Fault(stall=1.5, status=503)}
    server.fault = lambda kind, name, n: faults.get((kind, n))
    assert list(b2.find_all([URL], 1)) == [URL] and server.count("list") == 2


def test_a_slow_line_has_all_the_time_it_needs(server, tmp_path):
    server.fault = downloads(lambda n: Fault(rate=1_500_000))  # 2 s in all
    assert fetched(tmp_path, deadline=0.5) == CONTENT and server.count("download") == 1


def test_an_expired_token_is_renewed(server, tmp_path):
    b2.find(URL)
    server.expire_tokens()
    assert fetched(tmp_path) == CONTENT
    assert kinds(server) == [*START, "head", "authorize", "head", "download"]


# --------------------------------------------------------------------------------------- checksums


def test_content_that_is_not_its_checksums_is_refused(server, short_waits, tmp_path):
    server.fault = downloads(lambda n: Fault(flip=9))
    with pytest.raises(ValueError, match="its content is not that of its SHA1, in 3 downloads"):
        fetch(tmp_path)
    assert server.count("download") == 3 and os.listdir(tmp_path / "files") == []


@pytest.mark.parametrize("sha1", ["header", "info", "unverified"])
def test_checksums_are_compared_wherever_the_store_keeps_them(server, short_waits, tmp_path, sha1):
    server.put(NAME, CONTENT, sha1=sha1)
    server.fault = downloads(first(1, Fault(flip=9)))
    assert fetched(tmp_path) == CONTENT and server.count("download") == 2
    assert b2.find_all([URL])[URL] == b2.find(URL)


def test_without_a_checksum_the_size_is_compared(server, short_waits, tmp_path):
    server.put(NAME, CONTENT, sha1="none")
    assert b2.find(URL).checksum == ""
    server.fault = downloads(first(1, Fault(truncate=400_000)))
    path = fetch(tmp_path)
    assert read_bytes(path) == CONTENT
    server.put(NAME, CONTENT[::-1], sha1="none")  # another version: another copy
    assert fetched(tmp_path) == CONTENT[::-1] and read_bytes(path) == CONTENT


# ---------------------------------------------------------------------- what no other try can help


@contextlib.contextmanager
def stops_at_once(server, requests, error, message):
    """The error, soon, after these requests and no other."""
    began = time.monotonic()
    with pytest.raises(error, match=message):
        yield
    assert time.monotonic() - began < 5 and kinds(server) == requests


def test_a_wrong_key(server, monkeypatch):
    monkeypatch.setenv("B2_APPLICATION_KEY", "wrong")
    message = "B2 does not know this key: check B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY"
    with stops_at_once(server, ["authorize"], PermissionError, message):
        b2.find(URL)


@pytest.mark.parametrize("missing", ["B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY"])
def test_no_key(server, monkeypatch, missing):
    monkeypatch.delenv(missing)
    message = f"b2:// needs a key: set {missing} in the environment or in .*.env"
    with stops_at_once(server, [], PermissionError, message):
        b2.find(URL)


def test_an_odd_endpoint(server, monkeypatch):
    monkeypatch.setenv("B2_REALM", "us-west")
    with stops_at_once(server, [], PermissionError, "B2_REALM=us-west is no endpoint"):
        b2.find(URL)


def test_a_key_restricted_to_another_bucket(store):
    message = "b2://bucket/.*the key of B2_APPLICATION_KEY_ID may not read this .*other"
    with store({NAME: CONTENT}, restricted_to="other") as server:
        for act in (lambda: b2.find(URL), lambda: b2.find_all([URL])):
            with pytest.raises(PermissionError, match=message):
                act()
        assert kinds(server) == ["authorize"]


def test_no_such_bucket(server):
    message = "b2://elsewhere/key: there is no such bucket"
    with stops_at_once(server, START[:2], PermissionError, message):
        b2.find("b2://elsewhere/key")


def test_no_such_object(server):
    message = "b2://bucket/none is not there"
    with stops_at_once(server, START, FileNotFoundError, message):
        b2.find("b2://bucket/none")


def test_an_object_that_is_removed_after_it_was_found(server, tmp_path):
    source = b2.find(URL)
    server.remove(NAME)
    with pytest.raises(FileNotFoundError, match="ai-readi/.* is not there"):
        b2.fetch(source, tmp_path / "files")
    assert server.count("download") == 1 and os.listdir(tmp_path / "files") == []


@pytest.mark.parametrize(
    "status, code, message",
    [
        (401, "unauthorized", "the key of B2_APPLICATION_KEY_ID may not read this"),
        (403, "access_denied", "the key of B2_APPLICATION_KEY_ID may not read this"),
        (403, "transaction_cap_exceeded", "a cap of the B2 account is reached"),
        (403, "download_cap_exceeded", "a cap of the B2 account is reached"),
        (400, "bad_request", "BadRequest"),
    ],
)
def test_what_the_account_does_not_allow(server, tmp_path, status, code, message):
    server.fault = downloads(lambda n: Fault(status=status, code=code))
    with stops_at_once(server, [*START, "download"], OSError, message):
        fetch(tmp_path)
    assert os.listdir(tmp_path / "files") == []


def test_a_head_that_is_forbidden(server):
    """Its answer has no body, and so no reason."""
    server.fault = lambda kind, name, n: Fault(status=403) if kind == "head" else None
    message = "the key of B2_APPLICATION_KEY_ID may not read this"
    with stops_at_once(server, START, PermissionError, message):
        b2.find(URL)


@pytest.mark.parametrize("path", ["s3://bucket/key", "b2://", "b2:///key", "http://host/x"])
def test_other_schemes(path):
    with pytest.raises(ValueError, match="is no place to read from: write b2://BUCKET/KEY"):
        b2.find(path)


# ------------------------------------------------------------------------------------- a full disk

FETCH = f"""
import sys
sys.path.insert(0, {ROOT!r})
import b2
b2.ENV_FILE = "/none"
source = b2.find({URL!r})
"""


def python(code, *arguments, **options):
    """FETCH and more code, in a process of its own."""
    command = [sys.executable, "-c", FETCH + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


FETCH_AND_LIST = f"""{FETCH}
try:
    b2.fetch(source, sys.argv[1])
finally:
    import os
    print('left', os.listdir(sys.argv[1]))
"""


def test_a_full_disk(server, tmp_path):
    """A real one: a tmpfs of 1 MB in a mount namespace of its own."""
    options = {"capture_output": True, "text": True, "check": False}
    namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try_out = [*namespace, f'mount -t tmpfs tmpfs "{tmp_path}"']
    if not shutil.which("unshare") or subprocess.run(try_out, **options).returncode:
        pytest.skip("no mount namespaces here")
    script = f'mount -t tmpfs -o size=1m tmpfs "$0" && "{sys.executable}" -c "$1" "$0"'
    command = [*namespace, script, tmp_path, FETCH_AND_LIST]
    result = subprocess.run(command, timeout=60, **options)
    reason = f"no space left on the disk for {URL}; make room, or set paths.cache_dir to another"
    assert f"OSError: [Errno 28] {reason} disk" in result.stderr
    assert result.stdout == "left []\n" and server.count("download") == 1


class Full:
    """An open file on a disk that fills after 1 MB."""

    def __init__(self, file):
        self.file, self.name = file, file.name

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.file.tell() > 1_000_000:
            raise OSError(28, "No space left on device")
        return self.file.write(data[:100_000])  # not all of it: a write may be short


def test_a_disk_that_fills_while_writing(server, tmp_path, monkeypatch):
    real = b2.locked

    @contextlib.contextmanager
    def full(path, stop=None):
        with real(path, stop) as file:
            yield Full(file)

    monkeypatch.setattr(b2, "locked", full)
    message = (
        "no space left on the disk for b2://bucket/ai-readi/.*; make room, or set paths.cache_dir"
    )
    with pytest.raises(OSError, match=message):
        fetch(tmp_path)
    assert server.count("download") == 1 and os.listdir(tmp_path / "files") == []


# -------------------------------------------------------------------- many threads, many processes


def test_four_processes_of_four_threads_fetch_each_key_once(store, tmp_path):
    objects = {f"k/{i}": bytes([i]) * (100_000 + i) for i in range(20)}
    code = """
        from concurrent.futures import ThreadPoolExecutor
        import random
        names = [f"b2://bucket/k/{i}" for i in range(20)]
        random.shuffle(names)
        fetch = lambda name: b2.fetch(b2.find(name), sys.argv[1])
        with ThreadPoolExecutor(4) as pool:
            for name, path in zip(names, pool.map(fetch, names)):
                assert open(path, "rb").read()[:1] == bytes([int(name.split("/")[-1])])
    """
    with store({**objects, NAME: b""}) as server:
        server.fault = downloads(lambda n: Fault(rate=1_000_000))  # slow enough to meet
        processes = [python(code, tmp_path / "files") for _ in range(4)]
        for process in processes:
            assert process.wait(60) == 0, process.stderr.read()
            process.stderr.close()
        assert [server.count("download", name) for name in objects] == [1] * 20
    kept = sorted((tmp_path / "files").iterdir(), key=lambda path: path.stat().st_size)
    assert [path.read_bytes() for path in kept] == list(objects.values())  # and nothing else


def test_threads_share_a_client(store, tmp_path):
    objects = {f"k/{i}": bytes([i]) * 300_000 for i in range(12)}
    fetch_one = lambda name: b2.fetch(b2.find(f"b2://bucket/{name}"), tmp_path)
    with store(objects) as server, ThreadPoolExecutor(12) as pool:
        paths = list(pool.map(fetch_one, objects))
        assert [read_bytes(path) for path in paths] == list(objects.values())
        assert server.count("authorize") == 1 and server.count("list_buckets") == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_client_that_was_used_before_a_fork(server, tmp_path, method):
    fetch(tmp_path)
    with multiprocessing.get_context(method).Pool(2) as pool:
        folders = [tmp_path / str(i) for i in range(4)]
        paths = [pool.apply_async(b2.fetch, (b2.find(URL), folder)) for folder in folders]
        assert all(read_bytes(path.get(30)) == CONTENT for path in paths)
    # and the parent's still works
    assert read_bytes(b2.fetch(b2.find(URL), tmp_path / "parent")) == CONTENT
    # the parent once, each child that had work once
    assert server.count("authorize") in (2, 3)


def test_a_fork_while_a_thread_makes_the_client(server, tmp_path):
    faults = {("authorize", 1): Fault(stall=0.4)}
    server.fault = lambda kind, name, n: faults.get((kind, n))
    thread = threading.Thread(target=b2.find, args=(URL,))
    thread.start()
    time.sleep(0.2)  # it holds the lock now
    child = multiprocessing.get_context("fork").Process(target=fetch, args=(tmp_path,))
    child.start()
    child.join(20)
    thread.join()
    assert child.exitcode == 0


def test_kill_9_in_mid_download_then_a_new_run(server, tmp_path):
    server.fault = downloads(first(1, Fault(rate=1_000_000)))
    folder = tmp_path / "files"
    process = python("b2.fetch(source, sys.argv[1])", folder)
    parts = lambda: list(folder.glob("*.part"))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any(p.stat().st_size > 900_000 for p in parts()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    had = parts()[0].stat().st_size
    assert fetched(tmp_path) == CONTENT
    assert server.ranges[NAME][1:] == [f"bytes={had}-{len(CONTENT) - 1}"]
    assert len(os.listdir(folder)) == 1


@pytest.mark.parametrize(
    "left, requests",
    [(b"x" * 1000, 2), (b"x" * len(CONTENT), 1), (b"x" * (len(CONTENT) + 5), 1), (b"", 1)],
    ids=["a beginning", "as long", "longer", "nothing"],
)
def test_what_a_kill_left_may_be_damaged_too(server, tmp_path, left, requests):
    path = fetch(tmp_path)
    os.remove(path)
    write_bytes(path + ".part", left)
    assert fetched(tmp_path) == CONTENT and server.count("download") == 1 + requests


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-1], lambda c: b"", lambda c: b"x" + c[1:]],
    ids=["cut", "empty", "changed"],
)
def test_a_damaged_copy_is_fetched_again(server, tmp_path, damage, capsys):
    path = fetch(tmp_path)
    write_bytes(path, damage(CONTENT))
    assert fetch(tmp_path) == path and read_bytes(path) == CONTENT
    assert server.count("download") == 2
    assert "is damaged; fetching it again" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [Fault(status=503, retry_after=20), Fault(rate=500_000)])
def test_a_caller_that_stops_waits_for_nothing(server, tmp_path, fault):
    source, stop = b2.find(URL), threading.Event()
    server.fault = downloads(lambda n: fault)
    threading.Timer(0.3, stop.set).start()
    began = time.monotonic()
    with pytest.raises(files.Stopped):
        b2.fetch(source, tmp_path / "files", stop=stop)
    assert time.monotonic() - began < 5


# --------------------------------------------------------------------------------- listing, local


def test_one_listing_tells_all_below_the_common_folder(store):
    names = [f"d/s/{i:05}.dcm" for i in range(12_000)]
    urls = [f"b2://bucket/{name}" for name in names[:3000]]
    with store(dict.fromkeys([*names, "d/participants.tsv", "e/x"], b"1")) as server:
        assert list(b2.find_all([*urls, "b2://bucket/d/s/none.dcm"])) == urls
        assert server.requests[2:] == [("list", "d/s/")] * 2  # by 10,000
        elsewhere = ["b2://bucket/e/x", "b2://bucket/d/participants.tsv"]
        assert list(b2.find_all(elsewhere)) == elsewhere
        assert b2.find_all(["b2://bucket/nothing/here"]) == {} == b2.find_all([])


@pytest.mark.parametrize("root", ["ai//ds", "/ds", "a?b#c", ""])
def test_no_character_of_a_key_has_a_meaning(store, root):
    names = [f"{root}/s/{i}.dcm".removeprefix("" if root else "/") for i in range(3)]
    with store(dict.fromkeys(names, b"1")) as server:
        urls = [f"b2://bucket/{name}" for name in names]
        assert list(b2.find_all(urls)) == urls == [b2.find(url).path for url in urls]
        assert server.count("list") == 1


def test_long_names(store, tmp_path):
    name = "d/" + "眼" * 200 + ".dcm"
    with store({name: b"1"}):
        assert read_bytes(b2.local(f"b2://bucket/{name}", tmp_path)) == b"1"


def test_local_paths_come_back_as_they_are(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("hello")
    assert b2.local(str(path), cache) == str(path) and not cache.exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert b2.local("~/a.txt", cache) == str(path)
    with pytest.raises(FileNotFoundError, match="none is not there"):
        b2.local(str(tmp_path / "none"), cache)


def test_an_object_that_is_replaced_is_noticed(server, tmp_path):
    path = b2.local(URL, tmp_path)
    assert b2.local(URL, tmp_path) == path and server.count("download") == 1
    server.put(NAME, b"new")
    assert read_bytes(b2.local(URL, tmp_path)) == b"new" and server.count("download") == 2


def test_the_env_file(server, tmp_path, monkeypatch):
    key = f"B2_APPLICATION_KEY_ID={server.key_id}\nB2_APPLICATION_KEY='{server.key}'\n"
    (tmp_path / ".env").write_text(f"{key}B2_REALM=http://127.0.0.1:9\n")
    monkeypatch.setattr(b2, "ENV_FILE", str(tmp_path / ".env"))
    for name in ("B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY"):
        monkeypatch.delenv(name)
    assert b2.find(URL).size == len(CONTENT)  # B2_REALM of the environment wins


def test_a_large_object_is_never_in_memory(store, tmp_path):
    """Such as an encoder checkpoint of 1.4 GB."""
    with open(tmp_path / "large.bin", "wb") as f:
        f.truncate(400_000_000)
    code = """
        import os
        import stages
        stages.LOG_FROM = 0  # a line, however short it takes
        def peak():
            lines = open("/proc/self/status")
            return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))
        before = peak()
        path = b2.local("b2://bucket/large.bin", sys.argv[1])
        assert path == b2.local("b2://bucket/large.bin", sys.argv[1])  # verified, not fetched
        assert peak() - before < 40, (before, peak())
        assert os.path.getsize(path) == 400_000_000 and path.endswith("-large.bin")
    """
    with store({NAME: b"", "large.bin": tmp_path / "large.bin"}) as server:
        process = python(code, tmp_path / "cache")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert server.count("download") == 1
        assert "large.bin: 400M/400M in 00:" in errors  # its progress is shown


# ------------------------------------------------------------------------------------------- gs://


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_without_gcsfs_the_error_says_what_to_install():
    with pytest.raises(ValueError, match="package gcsfs: pip install -r requirements-gcs.txt"):
        b2.find("gs://bucket/key", 5)


@pytest.mark.parametrize("own", [None, "true"])
def test_gcsfs_is_imported_without_its_probe_of_buckets_unless_asked_for(
    tmp_path, monkeypatch, own
):
    name = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"
    monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(name, own)
    (tmp_path / "gcsfs.py").write_text(
        f"""if True:
        import os
        from fsspec.implementations.memory import MemoryFileSystem
        class GCSFileSystem(MemoryFileSystem):
            when_imported = os.environ["{name}"]
        """
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    code = "import b2; print(b2.gs_files().when_imported)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{own or 'false'}\n", done.stderr


def test_gcsfs_and_its_pinned_requirements_go_together():
    pinned = content(f"{ROOT}/requirements-gcs.txt")
    assert "-c requirements-common.txt" in pinned and re.search(r"^gcsfs==[\d.]+$", pinned, re.M)


class File(io.BytesIO):
    """An open file whose read() can be replaced."""


@pytest.fixture()
def google():
    """fsspec's file system in memory in place of gcsfs, telling md5Hash and generation as gcsfs
    does. google.faults: functions that change the next files that b2.read opens."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Google(MemoryFileSystem):
        store, pseudo_dirs, opened, faults = {}, [""], [], []

        def told(self, info):
            if info["type"] == "file":
                md5 = hashlib.md5(self.cat(info["name"])).digest()
                info |= {"md5Hash": base64.b64encode(md5).decode(), "generation": "17"}
            return info

        def info(self, path, **kwargs):
            return self.told(super().info(path, **kwargs))

        def find(self, path, detail=False, **kwargs):
            found = super().find(path, detail=True, **kwargs)
            told = {name: self.told(info) for name, info in found.items()}
            return told if detail else list(found)

        def _open(self, path, mode="rb", **kwargs):
            file = super()._open(path, mode, **kwargs)
            if kwargs.get("cache_type") == "none":  # from b2.read
                self.opened.append(path)
                file = File(file.getvalue())
                if self.faults:
                    self.faults.pop(0)(file)
            return file

    fsspec.register_implementation("gs", Google, clobber=True)
    b2.renew()
    yield Google()
    fsspec.register_implementation("gs", "gcsfs.GCSFileSystem", clobber=True)
    b2.renew()


@pytest.fixture()
def scans(google):
    """A table and two scans on Google -> the first scan's Object."""
    google.pipe("/bucket/d/participants.tsv", b"table")
    google.pipe("/bucket/d/s/a.dcm", CONTENT)
    google.pipe("/bucket/d/s/b.dcm", b"")
    checksum = "md5:" + hashlib.md5(CONTENT).hexdigest()
    return b2.Object("gs://bucket/d/s/a.dcm", len(CONTENT), checksum, "17")


def test_google_cloud_storage_through_fsspec(scans, tmp_path):
    assert b2.find("gs://bucket/d/s/a.dcm") == scans
    found = b2.find_all([f"gs://bucket/d/s/{name}.dcm" for name in "abc"])
    b = "gs://bucket/d/s/b.dcm"
    assert found == {scans.path: scans, b: b2.find(b)}
    assert read_bytes(b2.local("gs://bucket/d/participants.tsv", tmp_path)) == b"table"
    with pytest.raises(FileNotFoundError):
        b2.find("gs://bucket/none")


def breaks(file):
    """After 2 MB."""
    pieces = [file.read(1_000_000), file.read(1_000_000)]

    def read(n):
        if not pieces:
            raise ConnectionResetError("reset")
        return pieces.pop(0)

    file.read = read


def is_wrong(file):
    """Some bytes are others."""
    real = file.read
    file.read = lambda n: real(n).replace(b"\x07", b"\x08")


def test_google_is_tried_again(google, short_waits, scans, tmp_path):
    google.faults[:] = [breaks, is_wrong]
    google.opened.clear()
    assert read_bytes(b2.fetch(scans, tmp_path / "files")) == CONTENT and len(google.opened) == 3


# -------------------------------------------------------------------------- what is named at once


@pytest.mark.parametrize("content", ["B2_REALM=x\n".encode("utf-16"), b"# caf\xe9\nB2_REALM=x\n"])
def test_an_env_file_that_is_no_utf8_is_named_at_once(store, tmp_path, monkeypatch, content):
    with store() as server:
        (tmp_path / ".env").write_bytes(content)
        monkeypatch.setattr(b2, "ENV_FILE", str(tmp_path / ".env"))
        with stops_at_once(server, [], PermissionError, ".env is not text in UTF-8"):
            b2.find(URL)


@pytest.mark.parametrize(
    "realm", ["https://", "https://host:99999", "http://host:port", "ftp://host", "https:/host"]
)
def test_an_endpoint_that_cannot_be_is_named_at_once(store, monkeypatch, realm):
    with store() as server:
        monkeypatch.setenv("B2_REALM", realm)
        with stops_at_once(server, [], PermissionError, f"B2_REALM={realm} is no endpoint"):
            b2.find(URL)


@pytest.mark.parametrize("root", ["~/data", "./data", "/a/data/", "b2://bucket/data", "gs://b/d/"])
def test_below_takes_back_what_join_added(root):
    assert b2.below(root, b2.join(root, "/retinal_oct/x.dcm")) == "retinal_oct/x.dcm"
    assert b2.below(root, "elsewhere/x.dcm") == "elsewhere/x.dcm"
