"""Volumes: their cache and stream, from folders and a B2 of our own; augmentation; order."""

import errno
import glob
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zlib

import numpy as np
import pydicom
import pytest
import scipy.ndimage
import torch
from b2_server import HEADERS, Fault
from helpers import (
    DEMO,
    ENCODER_URL,
    PREFIX,
    ROOT_URL,
    children_of,
    content,
    read_bytes,
    remote,
    settings,
    start,
    write_bytes,
)

import b2
import config
import data
import files
import ledger

SIZE = (16, 64, 64)


def all_volumes(book, cfg, **options):
    return data.Volumes(book.samples, SIZE, cfg.paths.cache_dir, **options)


def first_volumes(n, book, cfg, **options):
    return data.Volumes(book.samples[:n], SIZE, cfg.paths.cache_dir, **options)


def flip_a_bit(path, position, bit=1):
    damaged = bytearray(read_bytes(path))
    damaged[position] ^= bit
    write_bytes(path, damaged)


def people_in(path):
    """{participant_id: row} of a ledger.csv."""
    return {row["participant_id"]: row for row in files.read_csv(path)}


# ---------------------------------------------------------------------------------------- the cache


@pytest.fixture()
def cached(dataset, configure):
    """-> volumes of four samples, their ledger, configuration, and what came the first time: a list
    of (key, volume)."""
    cfg = configure(dataset)
    book = ledger.read(cfg)
    volumes = first_volumes(4, book, cfg)
    first = [(key, volume) for _, key, volume in data.stream(volumes, book, range(4), cfg)]
    return volumes, book, cfg, first


@pytest.fixture()
def read_scans(monkeypatch):
    """A list of the DICOM files that are read from now on."""
    import volumes

    paths, real = [], volumes.read

    def noted(path, *options):
        paths.append(path)
        return real(path, *options)

    monkeypatch.setattr(volumes, "read", noted)
    return paths


def test_a_cached_volume_is_the_exact_one_rounded_to_float16(cached):
    volumes, _, _, first = cached
    for sample, (_, volume) in zip(volumes.samples, first):
        exact = data.preprocess(data.read_dicom(sample.path), SIZE)
        assert volume.shape == (1, *SIZE) and volume.dtype == torch.float16
        assert ((volume[0].float() - exact).abs() <= exact.abs() * 2**-11 + 1e-7).all()
    assert not glob.glob(f"{volumes.cache_dir}/**/*.part", recursive=True)


def test_a_cached_volume_is_not_read_again(cached, read_scans):
    volumes, book, cfg, first = cached
    again = [(key, volume) for _, key, volume in data.stream(volumes, book, range(4), cfg)]
    assert not read_scans
    for (key, volume), (first_key, first_volume) in zip(again, first, strict=True):
        assert key == first_key and torch.equal(volume, first_volume)


def test_another_time_of_the_same_content_is_the_same_volume(cached, read_scans):
    volumes, book, cfg, first = cached
    os.utime(volumes.samples[0].path, (0, 0))
    assert [key for _, key, _ in data.stream(volumes, book, [0], cfg)] == [first[0][0]]
    assert not read_scans


def test_another_content_under_the_same_name_is_another_volume(cached):
    volumes, book, cfg, first = cached
    shutil.copyfile(volumes.samples[1].path, volumes.samples[0].path)
    assert [key for _, key, _ in data.stream(volumes, book, [0], cfg)] == [first[1][0]]


def test_another_size_is_another_volume(cached, read_scans):
    volumes, book, cfg, _ = cached
    smaller = data.Volumes(volumes.samples, (8, 32, 32), cfg.paths.cache_dir)
    shapes = [volume.shape for _, _, volume in data.stream(smaller, book, [2], cfg)]
    assert shapes == [(1, 8, 32, 32)] and len(read_scans) == 1
    assert not glob.glob(f"{cfg.paths.cache_dir}/**/*.part", recursive=True)


def test_a_change_that_keeps_size_and_time_is_noticed(cached):
    volumes, *_ = cached
    path = volumes.samples[0].path
    stat, damaged = os.stat(path), bytearray(read_bytes(path))
    damaged[200] ^= 1  # in the preamble's uid, not in the pixels
    with open(path, "r+b") as f:
        f.write(damaged)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert volumes.key(0) is None


def test_an_emptied_checksum_file_is_made_again(cached):
    volumes, book, cfg, first = cached
    for note in glob.glob(f"{cfg.paths.cache_dir}/checksums/*"):
        open(note, "w").close()
    assert [volumes.key(i) for i in range(4)] == [None] * 4
    again = [key for _, key, _ in data.stream(volumes, book, range(4), cfg)]
    assert again == [key for key, _ in first] and len(set(again)) == 4


def flipped_at(content, position):
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


DAMAGES = {
    "cut": lambda c: c[:500],
    "empty": lambda c: b"",
    "a byte short": lambda c: c[:-1],
    "header": lambda c: flipped_at(c, 20),
    "middle": lambda c: flipped_at(c, len(c) // 2),
    "digest": lambda c: flipped_at(c, len(c) - 5),
    "longer": lambda c: c + b"x",
    "zeros": lambda c: b"\0" * len(c),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_file_is_made_anew(written, configure, damage, capsys):
    cfg = configure(written)
    book = ledger.read(cfg)
    volumes = first_volumes(1, book, cfg)
    ((_, key, before),) = data.stream(volumes, book, [0], cfg)
    (kept,) = glob.glob(f"{cfg.paths.cache_dir}/volumes/*.npy")
    good = read_bytes(kept)
    write_bytes(kept, damage(good))
    ((_, again, after),) = data.stream(volumes, book, [0], cfg)
    assert again == key and torch.equal(before, after) and read_bytes(kept) == good
    assert f"cache file {kept} is damaged" in capsys.readouterr().err


def test_the_cache_admits_until_it_is_full(written, configure):
    cfg = configure(written)
    book = ledger.read(cfg)
    three = 3 * (np.prod(SIZE) * 2 + 200)  # bytes, with their headers
    volumes = first_volumes(6, book, cfg, cache_gb=three / 1e9)
    first = [volume for _, _, volume in data.stream(volumes, book, range(6), cfg)]
    kept = sorted(os.listdir(volumes.folder))
    assert len(kept) == 3
    second = [volume for _, _, volume in data.stream(volumes, book, range(6), cfg)]
    assert sorted(os.listdir(volumes.folder)) == kept  # nothing is thrown out
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_volume_is_admitted_without_looking_at_all_others(written, configure, monkeypatch):
    cfg, counted, real = configure(written), [], files.size_of
    monkeypatch.setattr(files, "size_of", lambda folder: counted.append(1) or real(folder))
    volumes = all_volumes(ledger.read(cfg), cfg)
    for i in range(6):
        volumes.load(i)
    assert len(counted) == 1
    assert content(volumes.cache_dir / "locks" / "admission") == str(real(volumes.folder))


def test_without_a_cache_nothing_is_counted(written, configure):
    cfg = configure(written)
    volumes = all_volumes(ledger.read(cfg), cfg, cache_gb=0)
    volumes.load(0)
    assert not volumes.folder.exists() and os.listdir(volumes.cache_dir / "locks") == []


def admit_all(root, overrides):
    cfg = config.load(DEMO, overrides)
    book = ledger.read(cfg)
    volumes = all_volumes(book, cfg, cache_gb=10 * (np.prod(SIZE) * 2 + 200) / 1e9)
    for i in range(30):
        volumes.load(i)


@pytest.mark.slow
def test_the_limit_holds_among_processes_and_after_kills(written, tmp_path):
    """Four processes fill a cache of ten volumes; two are killed while they do."""
    arguments = str(written), settings(written, tmp_path)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=admit_all, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    folder = tmp_path / "cache" / "volumes"
    wait_until(lambda: folder.exists() and len(os.listdir(folder)) >= 3, 60)
    for process in processes[:2]:
        process.kill()
    for process in processes[2:]:
        process.join()
        assert process.exitcode == 0
    admit_all(*arguments)  # a process that comes later counts anew
    assert len([name for name in os.listdir(folder) if name.endswith(".npy")]) == 10


def test_what_a_kill_left_of_a_cached_volume_takes_no_room(written, configure):
    cfg = configure(written)
    book = ledger.read(cfg)
    volumes = all_volumes(book, cfg, cache_gb=1e-3)
    os.makedirs(volumes.folder)
    write_bytes(f"{volumes.folder}/x.npy.17.part", b"x" * 1_000_000)
    list(data.stream(volumes, book, range(3), cfg))
    assert len(os.listdir(volumes.folder)) == 3 and not glob.glob(f"{volumes.folder}/*.part")


# --------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_volume_stops_the_run_and_is_named(dataset, configure, workers):
    """The same with a thread and with processes that decode."""
    cfg = configure(dataset, f"data.num_workers={workers}")
    bad = ledger.read(cfg).samples[3]
    write_bytes(bad.path, b"damaged")
    book = ledger.read(cfg)
    message = (
        "1 volumes cannot be read, and data.max_missing is 0: "
        f"participant {bad.participant_id} .*{os.path.basename(bad.path)} "
        "is not a readable OCT volume.*set data.max_missing=1"
    )
    with pytest.raises(ValueError, match=message):
        list(data.stream(first_volumes(6, book, cfg), book, range(6), cfg))


@pytest.mark.slow
def test_worker_processes_give_the_same_volumes(written, configure, tmp_path):
    found = []
    for workers in (0, 2):
        cfg = configure(
            written, f"data.num_workers={workers}", f"paths.cache_dir={tmp_path}/{workers}"
        )
        book = ledger.read(cfg)
        found.append(list(data.stream(first_volumes(6, book, cfg), book, range(6), cfg)))
    assert [i for i, _, _ in found[0]] == list(range(6))
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2] and torch.equal(one[2], other[2])


@pytest.fixture()
def struck(dataset, configure):
    """A data set of which all volumes of one person and one of another cannot be read, streamed
    with what covers them -> the bad paths (the last one is the other's), samples of before, the
    ledger, and the paths that arrived."""
    first = ledger.read(configure(dataset)).samples
    person, other = list(dict.fromkeys(s.participant_id for s in first))[:2]
    bad = [s.path for s in first if s.participant_id == person]
    bad.append(next(s.path for s in first if s.participant_id == other))
    for path in bad:
        write_bytes(path, b"damaged" + path.encode())  # no two the same
    cfg = configure(dataset, f"data.max_missing={len(bad)}")
    book = ledger.read(cfg)
    samples = list(book.samples)
    volumes = data.Volumes(samples, SIZE, cfg.paths.cache_dir)
    order = range(len(samples))
    return (
        bad,
        samples,
        book,
        [samples[i].path for i, _, _ in data.stream(volumes, book, order, cfg)],
    )


def test_unreadable_volumes_that_max_missing_covers_are_left_out(struck):
    bad, samples, book, arrived = struck
    assert arrived == [s.path for s in samples if s.path not in bad]
    assert arrived == [s.path for s in book.samples]


def test_unreadable_volumes_are_struck_off_the_ledger(struck, tmp_path):
    bad, samples, book, _ = struck
    files.write(tmp_path / "ledger.csv", files.csv_text(ledger.rows_for_csv(book)))
    rows, owners = people_in(tmp_path / "ledger.csv"), {s.path: s.participant_id for s in samples}
    person, other = rows[owners[bad[0]]], rows[owners[bad[-1]]]
    assert (person["status"], person["volumes"]) == ("missing", "0") and bad[0] in person["reason"]
    left = sum(s.participant_id == owners[bad[-1]] for s in samples) - 1
    assert (other["status"], int(other["volumes"])) == ("used", left) and bad[-1] in other["reason"]
    assert all(path in ledger.unreadable_table(book) for path in bad)


def test_one_unreadable_volume_more_than_allowed_stops_the_run(struck):
    bad, _, book, _ = struck
    message = f"{len(bad)} volumes cannot be read, and data.max_missing is {len(bad) - 1}"
    with pytest.raises(ValueError, match=message):
        ledger.check(book, len(bad) - 1)


def test_a_second_epoch_after_a_volume_was_struck(dataset, configure):
    write_bytes(ledger.read(configure(dataset)).samples[2].path, b"damaged")
    cfg = configure(dataset, "data.max_missing=1")
    book = ledger.read(cfg)
    paths = [s.path for s in book.samples]
    volumes = all_volumes(book, cfg)
    for _ in range(2):
        arrived = [(i, volume) for i, _, volume in data.stream(volumes, book, range(8), cfg)]
        assert [i for i, _ in arrived] == [0, 1, 3, 4, 5, 6, 7] and len(book.unreadable) == 1
        for i, volume in arrived:  # index and content still belong together
            exact = data.preprocess(data.read_dicom(paths[i]), SIZE)
            assert (volume[0].float() - exact).abs().max() <= 2**-8


@pytest.mark.parametrize("number", ["EMFILE", "EIO"])
def test_trouble_of_the_disk_is_no_fault_of_the_volume(written, configure, monkeypatch, number):
    def fails(path):
        raise OSError(getattr(errno, number), "trouble")

    cfg = configure(written, "data.max_missing=10")
    book = ledger.read(cfg)
    monkeypatch.setattr(pydicom, "dcmread", fails)
    message = f"participant {book.samples[0].participant_id}: .*trouble"
    with pytest.raises(OSError, match=message):
        list(data.stream(all_volumes(book, cfg), book, range(4), cfg))
    assert book.unreadable == []


def test_too_little_memory_is_no_fault_of_the_volume(written, configure, monkeypatch):
    def fails(path, *options):
        raise MemoryError

    cfg = configure(written, "data.max_missing=10")
    book = ledger.read(cfg)
    monkeypatch.setattr(data, "decode", fails)
    message = f"participant {book.samples[0].participant_id}: out of memory"
    with pytest.raises(OSError, match=message):
        list(data.stream(all_volumes(book, cfg), book, range(4), cfg))
    assert book.unreadable == []


def decode_slowly(monkeypatch, seconds):
    real = data.decode
    monkeypatch.setattr(data, "decode", lambda *args: time.sleep(seconds) or real(*args))


def test_stopping_does_not_wait_for_what_is_queued(written, configure, monkeypatch):
    decode_slowly(monkeypatch, 0.5)
    cfg = configure(written, "data.prefetch=16")
    book = ledger.read(cfg)
    arriving = data.stream(all_volumes(book, cfg), book, range(40), cfg)
    next(arriving)
    began = time.monotonic()
    arriving.close()
    assert time.monotonic() - began < 3  # 16 decodes last 8 s


# ------------------------------------------------------------------------ the stream, from a bucket


@pytest.fixture()
def scans(written, bucket, configure, tmp_path):
    """scans("key=value", ...) -> ledger, all its volumes and configuration, from a bucket whose
    server is scans.server."""
    with bucket(written) as server:

        def make(*overrides):
            cfg = configure(written, *remote(tmp_path), *overrides)
            book = ledger.read(cfg)
            return book, all_volumes(book, cfg), cfg

        make.server = server
        yield make


def of_scans(fault):
    """Faults of the scans alone."""
    return lambda kind, name, n: fault if name.endswith(".dcm") else None


def test_the_first_volume_needs_one_listing_and_two_tables(scans):
    book, volumes, cfg = scans("data.prefetch=1")
    (_,) = data.stream(volumes, book, range(1), cfg)  # the first alone: a second is fetched ahead
    requests = [kind for kind, name in scans.server.requests if not name.endswith("phantom.json")]
    a_table = ["head", "download"]
    assert requests == ["authorize", "list_buckets", *a_table, *a_table, "list", "download"]


def test_the_second_epoch_asks_for_nothing(scans):
    book, volumes, cfg = scans()
    first = [volume for _, _, volume in data.stream(volumes, book, range(8), cfg)]
    scans.server.requests.clear()
    second = [volume for _, _, volume in data.stream(volumes, book, range(8), cfg)]
    assert scans.server.requests == []
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fetched_files_and_locks_do_not_stay(scans):
    book, volumes, cfg = scans()
    list(data.stream(volumes, book, range(8), cfg))
    assert os.listdir(f"{cfg.paths.cache_dir}/raw") == []
    assert set(os.listdir(f"{cfg.paths.cache_dir}/locks")) <= {"admission"}


def test_the_order_is_the_samplers_and_the_window_is_bounded(scans):
    book, volumes, cfg = scans("data.prefetch=3")
    order = np.random.default_rng(0).permutation(20).tolist()
    server, slowest = scans.server, volumes.samples[order[0]].path[-30:]  # the first
    server.requests.clear()
    server.fault = lambda kind, name, n: Fault(rate=300_000) if name.endswith(slowest) else None
    arrived = []
    for i, _, _ in data.stream(volumes, book, order, cfg):
        arrived.append(i)
        time.sleep(0.02)
        assert server.count("download") <= len(arrived) + 3  # no further ahead than the window
    assert arrived == order


def test_with_a_window_of_one_the_next_comes_while_the_model_works(scans):
    book, volumes, cfg = scans("data.prefetch=1")
    before = scans.server.count("download")
    arriving = data.stream(volumes, book, range(5), cfg)
    next(arriving)
    time.sleep(0.5)
    assert scans.server.count("download") == before + 2
    arriving.close()


@pytest.mark.slow
def test_many_objects_come_at_once_while_others_are_decoded(scans, monkeypatch):
    """One by one: 16 * 1.2 s. Two windows of 1 s, and 16 * 0.2 s of decoding of which much lies
    within the second."""
    monkeypatch.setattr(b2, "READ_TIMEOUT", 10)
    decode_slowly(monkeypatch, 0.2)
    book, volumes, cfg = scans("data.prefetch=8")
    scans.server.fault = lambda kind, name, n: Fault(stall=1)
    began = time.monotonic()
    arrived = [i for i, _, _ in data.stream(volumes, book, range(16), cfg)]
    assert arrived == list(range(16)) and time.monotonic() - began < 8


def test_a_cache_folder_that_breaks_strikes_no_volume(scans):
    book, volumes, cfg = scans("data.max_missing=10")
    scans.server.fault = of_scans(Fault(stall=0.5))
    threading.Timer(0.3, lambda: shutil.rmtree(f"{cfg.paths.cache_dir}/raw")).start()
    with pytest.raises(OSError, match="participant "):
        list(data.stream(volumes, book, range(8), cfg))
    assert book.unreadable == []


@pytest.mark.filterwarnings("ignore:resource_tracker")  # it was a child too
def test_a_decoder_that_is_killed_stops_the_run(scans):
    scans.server.fault = of_scans(Fault(rate=100_000))
    book, volumes, cfg = scans("data.num_workers=1", "data.prefetch=4")
    others = set(children_of(os.getpid()))
    arriving = data.stream(volumes, book, range(len(book.samples)), cfg)
    next(arriving)
    for child in set(children_of(os.getpid())) - others:
        os.kill(child, signal.SIGKILL)
    message = "a process that decodes volumes died, out of memory perhaps; lower data.num_workers"
    with pytest.raises(OSError, match=message):
        list(arriving)


def test_a_consumer_that_fails_stops_what_is_on_its_way(scans):
    book, volumes, cfg = scans()
    server, slow = scans.server, of_scans(Fault(rate=20_000))
    server.fault = lambda *request: slow(*request) if server.count("download") > 3 else None
    arriving = data.stream(volumes, book, range(len(book.samples)), cfg)
    next(arriving)
    began = time.monotonic()
    arriving.close()
    assert time.monotonic() - began < 3
    assert not glob.glob(f"{cfg.paths.cache_dir}/raw/*.dcm")


@pytest.mark.slow
def test_two_sizes_share_a_cache(written, bucket, tmp_path):
    with bucket(written) as server:
        server.fault = of_scans(Fault(stall=0.05))
        code = """if True:
            import sys, config, data, ledger, b2
            b2.ENV_FILE = "/none"
            cfg = config.load("configs/demo.yaml", sys.argv[2:])
            book, n = ledger.read(cfg), int(sys.argv[1])
            volumes = data.Volumes(book.samples, (16, n, n), cfg.paths.cache_dir)
            for i, key, volume in data.stream(volumes, book, range(30), cfg):
                assert volume.shape == (1, 16, n, n)
        """
        runs = [start("-c", code, n, *remote(tmp_path)) for n in (64, 48, 32)]
        for run in runs:
            _, errors = run.communicate(timeout=100)
            assert run.returncode == 0, errors
    assert os.listdir(f"{tmp_path}/remote-cache/raw") == []


# ------------------------------------------------------------------ from the bucket to the score


def run_dir(overrides):
    return next(o for o in overrides[::-1] if o.startswith("paths.run_dir=")).split("=")[1]


def train_and_eval(command, overrides):
    """-> the run's folder, and what the two commands answered."""
    run = run_dir(overrides)
    trained = command("train.py", "--config", "configs/demo.yaml", *overrides)
    assert trained.returncode == 0, trained.stderr
    scored = command("eval.py", "--ckpt", run, "--split", "test")
    assert scored.returncode == 0, scored.stderr
    return run, trained, scored


def one_in_ten(kind, name, n):
    """Faults of all sorts on one request in ten, always on the same ones."""
    number = zlib.crc32(f"{kind} {name} {n}".encode())
    faults = [
        Fault(reset=HEADERS),
        Fault(reset=20_000),
        Fault(truncate=5_000),
        Fault(flip=3_000),
        Fault(status=503),
        Fault(status=429, retry_after=0),
        Fault(stall=30),
        Fault(status=401, code="expired_auth_token"),
    ]
    return faults[number // 10 % len(faults)] if number % 10 == 0 else None


@pytest.mark.slow
def test_from_a_faulty_store_as_from_a_folder_bit_for_bit(written, bucket, command, tmp_path):
    """And nothing secret in the output, in the run's folder (with W&B's files), in the cache."""
    local, *_ = train_and_eval(command, settings(written, tmp_path))
    with bucket(written, key_id="0042key-id", key="K0042-application-key") as server:
        faults = []

        def fault(*request):
            found = one_in_ten(*request)
            if found:
                faults.append(found)
            return found

        server.fault = fault
        overrides = [*remote(tmp_path), "log.wandb=offline"]
        far, trained, scored = train_and_eval(command, overrides)
        assert len(faults) > 8 and len(set(faults)) > 4  # they came
        for name in ("predictions_val.csv", "predictions_test.csv", "ledger.csv", "metrics.jsonl"):
            assert content(f"{far}/{name}") == content(f"{local}/{name}"), name
        assert "SYNTHETIC data b2://bucket/ai-readi/dataset" in trained.stdout
        assert "volumes encoded" in trained.stdout
        downloads = {name for kind, name in server.requests if kind == "download"}
        used = [name for name in downloads if name.endswith(".dcm")]
        assert len(used) == sum(int(row["volumes"]) for row in files.read_csv(f"{far}/ledger.csv"))
        assert server.count("list") <= 4  # one a command, and what broke

        tokens = server.tokens | server.expired
        text = trained.stdout + trained.stderr + scored.stdout + scored.stderr
        for path in glob.glob(f"{tmp_path}/remote*/**/*", recursive=True):
            if os.path.isfile(path):
                text += read_bytes(path).decode("latin-1")
        assert "wandb" in os.listdir(far) and len(tokens) > 1
        assert not [secret for secret in (server.key_id, server.key, *tokens) if secret in text]


@pytest.mark.slow
def test_a_second_run_downloads_nothing(written, bucket, command, tmp_path):
    with bucket(written) as server:
        first, *_ = train_and_eval(command, remote(tmp_path))
        once = [name for kind, name in server.requests if kind == "download"]
        assert len(once) == len(set(once))  # each object once, also those that both commands read
        server.requests.clear()
        overrides = [*remote(tmp_path), f"paths.run_dir={tmp_path}/second"]
        second, trained, _ = train_and_eval(command, overrides)
        assert server.count("download") == 0 and server.count("list") == 2
        assert "features: 0 volumes encoded" in trained.stdout
        predictions = "predictions_test.csv"
        assert content(f"{first}/{predictions}") == content(f"{second}/{predictions}")
        # another encoder: features are made anew, from the cached volumes
        server.requests.clear()
        arguments = [*remote(tmp_path), "model.encoder=target"]
        again = command("train.py", "--config", "configs/demo.yaml", *arguments)
        assert again.returncode == 0 and server.count("download") == 0
        assert "0 volumes encoded" not in again.stdout


@pytest.mark.slow
def test_a_damaged_cache_heals(written, bucket, command, tmp_path):
    with bucket(written):
        run, *_ = train_and_eval(command, remote(tmp_path))
        before = content(f"{run}/predictions_test.csv")
        for pattern in ("volumes/*", "features/*/*", "files/*"):
            for path in glob.glob(f"{tmp_path}/remote-cache/{pattern}")[::3]:
                flip_a_bit(path, os.path.getsize(path) // 2)
        run, *_ = train_and_eval(command, remote(tmp_path))
        assert content(f"{run}/predictions_test.csv") == before


def spoil(kind, server, sample, name, tmp_path):
    """Make the object of a sample unreadable."""
    if kind == "corrupt":
        server.put(name, b"DICM" * 1000)
    elif kind == "no pixels":
        ds = pydicom.dcmread(sample.path)
        del ds.PixelData
        ds.save_as(tmp_path / "x.dcm")
        server.put(name, read_bytes(tmp_path / "x.dcm"))
    else:
        fault = {"gone since": Fault(status=404), "damaged in the store": Fault(flip=50)}[kind]
        server.fault = lambda k, n, _: fault if (k, n) == ("download", name) else None


@pytest.mark.filterwarnings("ignore:Expected implicit VR")
@pytest.mark.parametrize("kind", ["corrupt", "no pixels", "gone since", "damaged in the store"])
def test_a_bad_volume_stops_the_run_or_is_counted(
    written, bucket, command, configure, tmp_path, kind
):
    book = ledger.read(configure(written))
    sample = book.of("train")[3]
    pid, relative = sample.participant_id, os.path.relpath(sample.path, written)
    url = f"{ROOT_URL}/{relative}"
    with bucket(written) as server:
        spoil(kind, server, sample, PREFIX + relative, tmp_path)
        stopped = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path))
        last = stopped.stderr.strip().splitlines()[-1]
        assert os.listdir(f"{tmp_path}/remote-cache/locks") in ([], ["admission"])
        assert stopped.returncode == 1
        sentence = "error: 1 volumes cannot be read, and data.max_missing is 0: participant "
        assert last.startswith(f"{sentence}{pid} ({url}") and "set data.max_missing=1" in last
        assert not os.path.exists(f"{tmp_path}/remote-run")

        run, trained, _ = train_and_eval(command, [*remote(tmp_path), "data.max_missing=1"])
        assert (
            "1 volumes could not be read and were left out (data.max_missing=1)\n"
            f"unreadable: participant {pid}"
        ) in trained.stdout
        row = people_in(f"{run}/ledger.csv")[pid]
        whole = next(r for r in book.rows if r.participant_id == pid)
        assert int(row["volumes"]) == whole.volumes - 1 and row["status"] == "used"
        assert url in row["reason"]


@pytest.mark.filterwarnings("ignore:Expected implicit VR")
def test_a_bad_volume_of_the_test_split_is_told_by_eval(
    written, bucket, command, configure, tmp_path
):
    sample = ledger.read(configure(written)).of("test")[0]
    pid, relative = sample.participant_id, os.path.relpath(sample.path, written)
    url, run = f"{ROOT_URL}/{relative}", f"{tmp_path}/remote-run"
    with bucket(written) as server:
        server.put(PREFIX + relative, b"DICM" * 1000)
        trained = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path))
        assert trained.returncode == 0 and "could not be read" not in trained.stdout
        stopped = command("eval.py", "--ckpt", run)
        assert stopped.returncode == 1 and f"participant {pid} ({url}" in stopped.stderr
        assert not os.path.exists(f"{run}/eval_test.json")
        scored = command("eval.py", "--ckpt", run, "data.max_missing=1")
        assert scored.returncode == 0 and f"unreadable: participant {pid}" in scored.stdout
        alarm = f"ALARM: 1 participants of test lack some of their volumes: {pid}"
        assert alarm in scored.stdout
        assert url in people_in(f"{run}/ledger.csv")[pid]["reason"]


LABELS = PREFIX + "participants.tsv"


def refuse_downloads(server):
    server.fault = lambda kind, *_: Fault(status=503) if kind == "download" else None


@pytest.mark.parametrize(
    "what, message",
    [
        (
            lambda server: server.remove(LABELS),
            f"error: paths.data={ROOT_URL}: participants.tsv is not there; set paths.data",
        ),
        (
            lambda server: server.remove("encoders/tiny.pt"),
            f"error: paths.checkpoint_path={ENCODER_URL} is not there",
        ),
        (
            lambda server: server.put("encoders/tiny.pt", b"PK" * 5000),
            "tiny.pt is not a checkpoint that can be read whole and safely",
        ),
        (
            lambda server: server.put(LABELS, b"a\tb\n"),
            f"error: {ROOT_URL}/participants.tsv has no column 'participant_id or person_id'",
        ),
        (
            refuse_downloads,
            f"error: {ROOT_URL}/participants.tsv: given up after 2 s of failures "
            "(data.fetch_deadline), the last one ServiceError: 503",
        ),
    ],
    ids=["no labels", "no encoder", "a corrupt encoder", "no such column", "503"],
)
def test_what_is_wrong_is_one_sentence(written, bucket, command, tmp_path, what, message):
    with bucket(written) as server:
        what(server)
        overrides = [*remote(tmp_path), "data.fetch_deadline=2"]
        result = command("train.py", "--config", "configs/demo.yaml", *overrides)
        assert result.returncode == 1 and message in result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not os.path.exists(f"{tmp_path}/remote-run")


def test_a_corrupt_encoder_is_named_as_the_config_names_it(written, bucket, command, tmp_path):
    with bucket(written) as server:
        server.put("encoders/tiny.pt", b"PK" * 5000)
        result = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path))
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"error: {ENCODER_URL} is not a checkpoint")


@pytest.mark.slow
def test_a_store_that_fails_in_mid_run_stops_it_soon(written, bucket, command, tmp_path):
    with bucket(written) as server:
        refused = of_scans(Fault(status=503))
        server.fault = lambda *request: refused(*request) if server.count("download") > 12 else None
        train = ["train.py", "--config", "configs/demo.yaml", *remote(tmp_path)]
        began = time.monotonic()
        result = command(*train, "data.fetch_deadline=2")
        assert result.returncode == 1 and time.monotonic() - began < 20
        last = result.stderr.splitlines()[-1]
        assert ".dcm: given up after 2 s of failures" in last
        assert last.startswith("error: participant ")
        server.fault = lambda *_: None
        assert command(*train).returncode == 0  # nothing left behind that is in the way


@pytest.mark.parametrize(
    "variable, value, path, message",
    [
        (
            "B2_APPLICATION_KEY",
            "wrong",
            ROOT_URL,
            "error: B2 does not know this key: check B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY",
        ),
        pytest.param(
            "B2_APPLICATION_KEY_ID",
            "",
            ROOT_URL,
            "error: b2:// needs a key: set B2_APPLICATION_KEY_ID in the environment or in",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "UNUSED",
            "",
            "b2://elsewhere/x",
            "error: b2://elsewhere/x/participants.tsv: there is no such bucket, or "
            "B2_APPLICATION_KEY_ID is a key of another account",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["a wrong key", "no key", "no such bucket"],
)
def test_what_the_terminal_shows(
    written, bucket, tmp_path, monkeypatch, variable, value, path, message
):
    """In a fresh process: what another test imported must not help."""
    overrides = [*remote(tmp_path), f"paths.data={path}"]
    with bucket(written):
        monkeypatch.setenv(variable, value)
        process = start("data.py", "--config", "configs/demo.yaml", *overrides)
        _, errors = process.communicate(timeout=60)
    assert errors.startswith(message) and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_two_runs_at_once_fetch_each_volume_once(written, bucket, tmp_path):
    train = ["train.py", "--config", "configs/demo.yaml", *remote(tmp_path)]
    with bucket(written) as server:
        runs = [start(*train, f"paths.run_dir={tmp_path}/run{k}") for k in range(2)]
        for run in runs:
            _, errors = run.communicate(timeout=120)
            assert run.returncode == 0, errors
        fetched = [name for kind, name in server.requests if kind == "download"]
        assert len(fetched) == len(set(fetched))
    predictions = [content(f"{tmp_path}/run{k}/predictions_val.csv") for k in range(2)]
    assert predictions[0] == predictions[1]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_leaves_nothing_that_stops_the_next_run(written, bucket, tmp_path):
    train = ["train.py", "--config", "configs/demo.yaml", *remote(tmp_path), "data.num_workers=2"]
    cache = f"{tmp_path}/remote-cache"
    with bucket(written) as server:
        slow = of_scans(Fault(rate=400_000))
        server.fault = lambda kind, name, n: slow(kind, name, n) if n == 1 else None
        run = start(*train)
        wait_until(lambda: len(glob.glob(f"{cache}/volumes/*.npy")) >= 3, seconds=60)
        children = children_of(run.pid)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert len(children) >= 2
        orphans = lambda: [child for child in children if os.path.exists(f"/proc/{child}")]
        wait_until(lambda: not orphans(), seconds=10)
        assert not orphans()
        server.requests.clear()
        run = start(*train)
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
        fetched = [name for kind, name in server.requests if kind == "download"]
        assert len(fetched) == len(set(fetched)) and LABELS not in fetched
    left = glob.glob(f"{cache}/**/*.part", recursive=True)
    # a few hundred bytes, cleared once they are old
    assert len(left) <= 2
    assert all("/features/" in path or "/checksums/" in path for path in left)


# ------------------------------------------------------------------------------------- augmentation

FULL = {"flip": 0.5, "intensity_jitter": 0.1, "random_crop": 0.2, "rotation": 5.0}


@pytest.fixture()
def volume():
    """(1, 8, 24, 24) float16."""
    return torch.randn(1, 8, 24, 24, generator=torch.Generator().manual_seed(0)).half()


def test_true_asks_for_the_usual_strength_and_what_is_off_is_left_out(written, configure):
    switches = {"flip": "true", "rotation": 3, "random_crop": 0, "intensity_jitter": "false"}
    cfg = configure(written, *(f"data.augment.{name}={value}" for name, value in switches.items()))
    assert data.strengths(cfg) == {"flip": 0.5, "rotation": 3}


@pytest.mark.parametrize("strength", [{}, dict.fromkeys(FULL, 0), dict.fromkeys(FULL, 0.0)])
def test_strength_nothing_is_the_identity(volume, strength):
    assert torch.equal(data.augment(volume, strength, "a"), volume)


def test_the_key_decides(volume):
    views = [data.augment(volume, FULL, key) for key in ("a", "a", "b", "42 1 abc")]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2]) and not torch.equal(views[2], views[3])


def test_a_view_is_a_volume_of_the_same_kind(volume):
    for key in ("a", "b", "42 1 abc"):
        view = data.augment(volume, FULL, key)
        assert view.shape == volume.shape and view.dtype == volume.dtype
        assert torch.isfinite(view).all()


def test_zeros_stay_zeros(volume):
    zeros, strength = torch.zeros_like(volume), {**FULL, "intensity_jitter": 0}
    assert torch.equal(data.augment(zeros, strength, "a"), zeros)


def test_augmentation_draws_nobody_elses_random_numbers(volume):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    data.augment(volume, FULL, "a")
    assert torch.equal(state, torch.get_rng_state())


def test_flips_mirror_frames_and_columns_and_never_depth(volume):
    x = volume.numpy()
    kinds = {
        "as it is": x,
        "frames": x[:, ::-1],
        "columns": x[..., ::-1],
        "both": x[:, ::-1, :, ::-1],
    }
    assert np.array_equal(data.augment(volume, {"flip": 1.0}, "a").numpy(), kinds["both"])
    views = [data.augment(volume, {"flip": 0.5}, str(i)).numpy() for i in range(200)]
    seen = [
        next(name for name, kind in kinds.items() if np.array_equal(view, kind)) for view in views
    ]
    assert all(30 <= seen.count(name) <= 70 for name in kinds)


def test_intensity_is_a_line_within_its_strength(volume):
    x, lines = volume.float(), []
    for i in range(100):
        view = data.augment(x, {"intensity_jitter": 0.2}, str(i))
        lines.append(np.polyfit(x.flatten().numpy(), view.flatten().numpy(), 1))
    gains, shifts = np.array(lines).T
    for values, middle in ((gains, 1), (shifts, 0)):
        assert abs(values - middle).max() <= 0.2001
        assert values.min() < middle - 0.15 and values.max() > middle + 0.15


@pytest.mark.parametrize("axis", range(3))
def test_crops_show_a_window_of_the_volume(axis):
    """On ramps: what comes out is a line whose slope is the share that is left, and nothing from
    outside."""
    shape, slopes = (32, 64, 64), []
    line = (torch.arange(shape[axis]) + 0.5).reshape([-1 if a == axis else 1 for a in range(3)])
    ramp = line.expand(shape)[None].contiguous()
    for i in range(50):
        seen = data.augment(ramp, {"random_crop": 0.3}, str(i))[0].movedim(axis, 0).flatten(1)
        along_the_others = seen.max(dim=1).values - seen.min(dim=1).values
        assert along_the_others.max() < 1e-3  # nothing changes
        line = seen[2:-2, 0]  # half a voxel at the border is replicated
        slope = (line[1:] - line[:-1]).mean().item()
        assert 0.7 - 1e-3 <= slope <= 1 + 1e-3 and line.min() >= 0 and line.max() <= shape[axis]
        slopes.append(slope)
    assert min(slopes) < 0.75 and max(slopes) > 0.95


@pytest.fixture()
def smooth():
    """(6, 33, 33) float32, without fine structure."""
    noise = np.random.default_rng(0).normal(size=(6, 33, 33))
    return scipy.ndimage.gaussian_filter(noise, (0, 3, 3)).astype(np.float32)


def test_rotation_equals_scipys(smooth):
    angle, centre = 0.2, np.array([16.0, 16.0])
    turned = data.resample(torch.from_numpy(smooth), angle, (1, 1), (0, 0)).numpy()
    # (row, column) in <- out
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    offset = centre - matrix @ centre
    for plane, found in zip(smooth, turned):
        expected = scipy.ndimage.affine_transform(plane, matrix, offset, order=1, mode="nearest")
        assert np.abs(found - expected).max() < 1e-5


def test_a_lateral_rotation_is_finite(smooth):
    planes = torch.from_numpy(smooth).repeat(6, 1, 1)[:33].transpose(0, 1)[None]
    assert torch.isfinite(data.augment(planes.contiguous(), {"rotation": 30.0}, "x")).all()


def test_the_rotation_is_small_and_in_two_planes():
    """A bright rod along the columns, in the middle: rotation in the B-scan moves its ends in rows,
    in the lateral plane in frames."""
    rod = torch.zeros(1, 65, 65, 65)
    rod[:, 31:34, 31:34] = 1
    ends, position = [], torch.arange(65.0)
    for i in range(60):
        # (frames, rows), 28 columns off the middle
        end = data.augment(rod, {"rotation": 10.0}, str(i))[0, :, :, 60]
        ends.append([(end.sum(dim=other) @ position / end.sum() - 32).item() for other in (1, 0)])
    most = 28 * np.tan(np.radians(10))
    frames, rows = np.abs(np.array(ends)).T
    assert frames.max() <= most / np.cos(np.radians(10)) + 0.3 and rows.max() <= most + 0.3
    assert min(frames.max(), rows.max()) > 0.7 * most


# ----------------------------------------------------------------------------------------- sampling


@pytest.fixture()
def labels():
    """(97,)"""
    return torch.tensor([0] * 40 + [1] * 20 + [2] * 30 + [3] * 7)


@pytest.mark.parametrize("sampler", ["shuffle", "stratified"])
def test_seed_and_epoch_decide_the_order(labels, sampler):
    one, same, other = (data.epoch_order(labels, sampler, 42, epoch, 4) for epoch in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one) == len(labels)


@pytest.mark.parametrize("epoch", [1, 2])
def test_stratified_epochs_draw_classes_evenly(labels, epoch):
    order = data.epoch_order(labels, "stratified", 42, epoch, 4)
    drawn = labels[order]
    rounds = [sorted(drawn[i : i + 4].tolist()) for i in range(0, 96, 4)]
    assert all(of_round == [0, 1, 2, 3] for of_round in rounds)
    for k, own in enumerate((40, 20, 30, 7)):
        times = torch.bincount(order[drawn == k], minlength=97)[labels == k]
        assert times.max() - times.min() <= 1 and times.sum() in (24, 25) and len(times) == own


def test_a_shuffled_epoch_has_everything_once(labels):
    order = data.epoch_order(labels, "shuffle", 42, 1, 4)
    assert sorted(order.tolist()) == list(range(97))


def test_stratified_epochs_need_every_class(labels):
    message = "no training volume is of class 3; set data.sampler=shuffle"
    with pytest.raises(ValueError, match=message):
        data.epoch_order(labels[:90], "stratified", 42, 1, 4)
