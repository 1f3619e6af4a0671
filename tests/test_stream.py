"""From the bucket to the score: the commands, with their data and encoder on a B2 of our own."""

import csv
import glob
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from b2_server import HEADERS, Fault
from conftest import ROOT, TINY, settings

import b2
import data

PREFIX = "ai-readi/dataset/"
ROOT_URL, ENCODER_URL = "b2://bucket/ai-readi/dataset", "b2://bucket/encoders/tiny.pt"


@pytest.fixture()
def bucket(store):
    """with bucket(root) as server: the data set of folder root, and the tiny encoder."""
    def make(root, **options):
        files = {PREFIX + os.path.relpath(path, root): open(path, "rb").read()
                 for path in glob.glob(f"{root}/**/*", recursive=True) if os.path.isfile(path)}
        return store({**files, "encoders/tiny.pt": open(TINY, "rb").read()}, **options)
    return make


def remote(tmp_path, name="remote"):
    return [*settings(ROOT_URL, tmp_path), f"paths.checkpoint_path={ENCODER_URL}", f"paths.cache_dir={tmp_path}/{name}-cache",
            f"paths.run_dir={tmp_path}/{name}-run"]


def one_in_ten(kind, name, n):
    """Faults of all sorts on one request in ten, always on the same ones."""
    number = zlib.crc32(f"{kind} {name} {n}".encode())
    faults = [Fault(reset=HEADERS), Fault(reset=20_000), Fault(truncate=5_000), Fault(flip=3_000), Fault(status=503),
              Fault(status=429, retry_after=0), Fault(stall=30), Fault(status=401, code="expired_auth_token")]
    return faults[number // 10 % len(faults)] if number % 10 == 0 else None


def content(path):
    with open(path) as f:
        return f.read()


def train_and_eval(command, overrides):
    run = next(o for o in overrides[::-1] if o.startswith("paths.run_dir=")).split("=")[1]
    trained = command("train.py", "--config", "configs/demo.yaml", *overrides)
    assert trained.returncode == 0, trained.stderr
    scored = command("eval.py", "--ckpt", run, "--split", "test")
    assert scored.returncode == 0, scored.stderr
    return run, trained, scored


@pytest.mark.slow
def test_from_a_faulty_store_as_from_a_folder_bit_for_bit(written, bucket, command, tmp_path):
    local, *_ = train_and_eval(command, settings(written, tmp_path))
    with bucket(written, key_id="0042key-id", key="K0042-application-key") as server:
        faults, far = [], [*remote(tmp_path), "log.wandb=offline"]
        server.fault = lambda *request: (fault := one_in_ten(*request)) and faults.append((request, fault)) or fault
        far, trained, scored = train_and_eval(command, far)
        assert len(faults) > 8 and len({fault for _, fault in faults}) > 4  # they came
        for name in ("predictions_val.csv", "predictions_test.csv", "ledger.csv", "metrics.jsonl"):
            assert content(f"{far}/{name}") == content(f"{local}/{name}"), name
        assert "SYNTHETIC data b2://bucket/ai-readi/dataset" in trained.stdout and "volumes encoded" in trained.stdout
        used = {name for kind, name in server.requests if kind == "download" and name.endswith(".dcm")}
        assert len(used) == sum(int(row["volumes"]) for row in csv.DictReader(open(f"{far}/ledger.csv")))
        assert server.count("list") <= 4  # one a command, and what broke

        # nothing secret anywhere: output, run folder (with W&B's files), cache
        tokens = server.tokens | server.expired
        text = trained.stdout + trained.stderr + scored.stdout + scored.stderr
        for path in glob.glob(f"{tmp_path}/remote*/**/*", recursive=True):
            if os.path.isfile(path):
                text += open(path, encoding="latin-1").read()
        assert ("wandb" in os.listdir(far) and len(tokens) > 1
                and not [secret for secret in (server.key_id, server.key, *tokens) if secret in text])


def test_a_second_run_downloads_nothing(written, bucket, command, tmp_path):
    with bucket(written) as server:
        first, *_ = train_and_eval(command, remote(tmp_path))
        once = [name for kind, name in server.requests if kind == "download"]
        assert len(once) == len(set(once))  # each object once, also those that both commands read
        server.requests.clear()
        second, trained, _ = train_and_eval(command, [*remote(tmp_path), f"paths.run_dir={tmp_path}/second"])
        assert server.count("download") == 0 and server.count("list") == 2 and "features: 0 volumes encoded" in trained.stdout
        assert content(f"{first}/predictions_test.csv") == content(f"{second}/predictions_test.csv")
        # another encoder: features are made anew, from the cached volumes
        server.requests.clear()
        again = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path), "model.encoder=target")
        assert again.returncode == 0 and server.count("download") == 0 and "0 volumes encoded" not in again.stdout


def test_the_first_volume_needs_one_listing_and_two_tables(written, bucket, configure, tmp_path):
    with bucket(written) as server:
        cfg = configure(written, *remote(tmp_path), "data.prefetch=1")
        ledger = data.read_ledger(cfg)
        next(data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(len(ledger.samples)), cfg))
        assert [kind for kind, name in server.requests if not name.endswith("phantom.json")] == [
            "authorize", "list_buckets", "head", "download", "head", "download", "list", "download"]


def test_the_second_epoch_asks_for_nothing(written, bucket, configure, tmp_path):
    with bucket(written) as server:
        cfg = configure(written, *remote(tmp_path))
        ledger = data.read_ledger(cfg)
        volumes = data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir)
        first = [v for _, _, v in data.stream(volumes, ledger, range(8), cfg)]
        server.requests.clear()
        second = [v for _, _, v in data.stream(volumes, ledger, range(8), cfg)]
        assert server.requests == [] and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert (os.listdir(f"{cfg.paths.cache_dir}/raw") == []
                == [name for name in os.listdir(f"{cfg.paths.cache_dir}/locks") if name != "admission"])


def test_the_order_is_the_samplers_and_the_window_is_bounded(written, bucket, configure, tmp_path):
    with bucket(written) as server:
        cfg = configure(written, *remote(tmp_path), "data.prefetch=3")
        ledger = data.read_ledger(cfg)
        volumes = data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir)
        order = np.random.default_rng(0).permutation(20).tolist()
        server.requests.clear()
        # the first is the slowest
        server.fault = lambda kind, name, n: Fault(rate=300_000) if name.endswith(volumes.samples[order[0]].path[-30:]) else None
        arrived = []
        for i, _, _ in data.stream(volumes, ledger, order, cfg):
            arrived.append(i)
            time.sleep(0.02)
            assert server.count("download") <= len(arrived) + 3  # no further ahead than the window
        assert arrived == order


def test_many_objects_come_at_once_while_others_are_decoded(written, bucket, configure, tmp_path, monkeypatch):
    monkeypatch.setattr(b2, "READ_TIMEOUT", 10)
    monkeypatch.setattr(data, "decode_volume", lambda *args, real=data.decode_volume: time.sleep(0.2) or real(*args))
    with bucket(written) as server:
        cfg = configure(written, *remote(tmp_path), "data.prefetch=8")
        ledger = data.read_ledger(cfg)
        server.fault = lambda kind, name, n: Fault(stall=1)
        began = time.monotonic()
        arrived = [i for i, _, _ in data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(16), cfg)]
        # one by one: 16 * 1.2 s. Two windows of 1 s, and 16 * 0.2 s of decoding of which much lies within the second
        assert arrived == list(range(16)) and time.monotonic() - began < 8


# ------------------------------------------------------------------------------------------------- what is wrong in a store


def test_the_ledger_knows_the_bucket(written, bucket, command, configure, tmp_path):
    people = {s.participant_id: [] for s in data.read_ledger(configure(written)).samples}
    for sample in data.read_ledger(configure(written)).samples:
        people[sample.participant_id].append(PREFIX + os.path.relpath(sample.path, written))
    gone, empty, twin, one, other = list(people)[:5]
    with bucket(written) as server:
        for name in people[gone]:
            server.remove(name)
        for name in people[empty]:
            server.put(name, b"")
        server.put(people[twin][1], server.objects[people[twin][0]].content)
        server.put(people[other][0], server.objects[people[one][0]].content)
        result = command("data.py", "--config", "configs/demo.yaml", *remote(tmp_path))
        assert result.returncode == 1 and "2 of " in result.stderr and "data.max_missing=2" in result.stderr
        assert f"missing: {gone} " in result.stdout and f"{len(people[gone])} of {len(people[gone])} files absent" in result.stdout
        assert f"missing: {empty} " in result.stdout and "files empty" in result.stdout
        assert f"participant {twin}: " in result.stdout and "has the same content as" in result.stdout
        for pid in (one, other):
            assert (f"participant {pid}: 1 of {len(people[pid])} files with content that participants "
                    f"{', '.join(sorted([one, other]))} share: ") in result.stdout
        ledger = data.read_ledger(configure(written, *remote(tmp_path)))
        assert {PREFIX + os.path.relpath(s.path, ROOT_URL) for s in ledger.samples} == {
            n for p in people for n in people[p] if p not in (gone, empty)} - {people[twin][1], people[one][0], people[other][0]}
        assert not [name for kind, name in server.requests if kind == "download" and name.endswith(".dcm")]


@pytest.mark.parametrize("kind", ["corrupt", "no pixels", "gone since", "damaged in the store"])
def test_a_bad_volume_stops_the_run_or_is_counted(written, bucket, command, configure, tmp_path, kind):
    sample = data.read_ledger(configure(written)).of("train")[3]
    name, url = PREFIX + os.path.relpath(sample.path, written), f"{ROOT_URL}/{os.path.relpath(sample.path, written)}"
    with bucket(written) as server:
        if kind == "corrupt":
            server.put(name, b"DICM" * 1000)
        if kind == "no pixels":
            import pydicom
            ds = pydicom.dcmread(sample.path)
            del ds.PixelData
            ds.save_as(tmp_path / "x.dcm")
            server.put(name, (tmp_path / "x.dcm").read_bytes())
        if kind == "gone since":
            server.fault = lambda k, n, _: Fault(status=404) if (k, n) == ("download", name) else None
        if kind == "damaged in the store":
            server.fault = lambda k, n, _: Fault(flip=50) if (k, n) == ("download", name) else None
        stopped = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path))
        last = stopped.stderr.strip().splitlines()[-1]
        assert os.listdir(f"{tmp_path}/remote-cache/locks") in ([], ["admission"])
        assert stopped.returncode == 1 and last.startswith("error: 1 volumes cannot be read, and data.max_missing is 0: "
                                                           f"participant {sample.participant_id} ({url}")
        assert "set data.max_missing=1" in last and not os.path.exists(f"{tmp_path}/remote-run")

        run, trained, scored = train_and_eval(command, [*remote(tmp_path), "data.max_missing=1"])
        assert ("1 volumes could not be read and were left out (data.max_missing=1)\n"
                f"unreadable: participant {sample.participant_id}") in trained.stdout
        row = next(r for r in csv.DictReader(open(f"{run}/ledger.csv")) if r["participant_id"] == sample.participant_id)
        whole = next(r for r in data.read_ledger(configure(written)).rows if r.participant_id == sample.participant_id)
        assert url in row["reason"] and int(row["volumes"]) == whole.volumes - 1 and row["status"] == "used"
        assert url in next(r for r in csv.DictReader(open(f"{run}/ledger.csv")) if r["participant_id"] == sample.participant_id)["reason"]


def test_a_bad_volume_of_the_test_split_is_told_by_eval(written, bucket, command, configure, tmp_path):
    sample = data.read_ledger(configure(written)).of("test")[0]
    url = f"{ROOT_URL}/{os.path.relpath(sample.path, written)}"
    with bucket(written) as server:
        server.put(PREFIX + os.path.relpath(sample.path, written), b"DICM" * 1000)
        trained = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path))
        assert trained.returncode == 0 and "could not be read" not in trained.stdout
        stopped = command("eval.py", "--ckpt", f"{tmp_path}/remote-run")
        assert (stopped.returncode == 1 and f"participant {sample.participant_id} ({url}" in stopped.stderr
                and not os.path.exists(f"{tmp_path}/remote-run/eval_test.json"))
        scored = command("eval.py", "--ckpt", f"{tmp_path}/remote-run", "data.max_missing=1")
        assert scored.returncode == 0 and f"unreadable: participant {sample.participant_id}" in scored.stdout
        assert f"ALARM: 1 participants of test lack some of their volumes: {sample.participant_id}" in scored.stdout
        row = next(r for r in csv.DictReader(open(f"{tmp_path}/remote-run/ledger.csv")) if r["participant_id"] == sample.participant_id)
        assert url in row["reason"]


@pytest.mark.parametrize("what, message", [
    (lambda server: server.remove(PREFIX + "participants.tsv"),
     "error: paths.data=b2://bucket/ai-readi/dataset: participants.tsv is not there; set paths.data"),
    (lambda server: server.remove("encoders/tiny.pt"), f"error: paths.checkpoint_path={ENCODER_URL} is not there"),
    (lambda server: server.put("encoders/tiny.pt", b"PK" * 5000), "tiny.pt is not a checkpoint that can be read whole and safely"),
    (lambda server: server.put(PREFIX + "participants.tsv", b"a\tb\n"),
     "error: b2://bucket/ai-readi/dataset/participants.tsv has no column 'participant_id or person_id'"),
    (lambda server: setattr(server, "fault", lambda kind, *_: Fault(status=503) if kind == "download" else None),
     ("error: b2://bucket/ai-readi/dataset/participants.tsv: given up after 2 s of failures (data.fetch_deadline), "
      "the last one ServiceError: 503")),
])
def test_what_is_wrong_is_one_sentence(written, bucket, command, tmp_path, what, message):
    with bucket(written) as server:
        what(server)
        result = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path), "data.fetch_deadline=2")
        assert result.returncode == 1 and message in result.stderr.strip().splitlines()[-1] and "Traceback" not in result.stderr
        assert not os.path.exists(f"{tmp_path}/remote-run")


def test_a_store_that_fails_in_mid_run_stops_it_soon(written, bucket, command, tmp_path):
    with bucket(written) as server:
        server.fault = lambda kind, name, n: Fault(status=503) if name.endswith(".dcm") and server.count("download") > 12 else None
        began = time.monotonic()
        result = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path), "data.fetch_deadline=2")
        assert result.returncode == 1 and time.monotonic() - began < 20
        assert (".dcm: given up after 2 s of failures" in result.stderr.splitlines()[-1]
                and result.stderr.splitlines()[-1].startswith("error: participant "))
        server.fault = lambda *_: None
        # nothing left behind that is in the way
        assert command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path)).returncode == 0


def test_a_damaged_cache_heals(written, bucket, configure, command, tmp_path):
    with bucket(written):
        run, *_ = train_and_eval(command, remote(tmp_path))
        before = content(f"{run}/predictions_test.csv")
        for pattern in ("volumes/*", "features/*/*", "files/*"):
            for path in glob.glob(f"{tmp_path}/remote-cache/{pattern}")[::3]:
                edit_bytes(path)
        run, *_ = train_and_eval(command, remote(tmp_path))
        assert content(f"{run}/predictions_test.csv") == before


def edit_bytes(path):
    content = bytearray(open(path, "rb").read())
    content[len(content) // 2] ^= 1
    open(path, "wb").write(content)


def test_a_corrupt_encoder_is_named_as_the_config_names_it(written, bucket, command, tmp_path):
    with bucket(written) as server:
        server.put("encoders/tiny.pt", b"PK" * 5000)
        result = command("train.py", "--config", "configs/demo.yaml", *remote(tmp_path))
        assert result.stderr.splitlines()[-1].startswith(f"error: {ENCODER_URL} is not a checkpoint")


def test_with_a_window_of_one_the_next_comes_while_the_model_works(written, bucket, configure, tmp_path):
    with bucket(written) as server:
        cfg = configure(written, *remote(tmp_path), "data.prefetch=1")
        ledger = data.read_ledger(cfg)
        before = server.count("download")
        arriving = data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(5), cfg)
        next(arriving)
        time.sleep(0.5)
        assert server.count("download") == before + 2
        arriving.close()


def test_a_cache_folder_that_breaks_strikes_no_volume(written, bucket, configure, tmp_path):
    with bucket(written) as server:
        cfg = configure(written, *remote(tmp_path), "data.max_missing=10")
        ledger = data.read_ledger(cfg)
        server.fault = lambda kind, name, n: Fault(stall=0.5) if name.endswith(".dcm") else None
        threading.Timer(0.3, lambda: shutil.rmtree(f"{cfg.paths.cache_dir}/raw")).start()
        with pytest.raises(OSError, match="participant "):
            list(data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(8), cfg))
        assert ledger.unreadable == []


# ------------------------------------------------------------------------------------------------------------ processes


def start(script, *args, **options):
    return subprocess.Popen([sys.executable, script, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


@pytest.mark.parametrize("variable, value, path, message", [
    ("B2_APPLICATION_KEY", "wrong", ROOT_URL, "error: B2 does not know this key: check B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY"),
    ("B2_APPLICATION_KEY_ID", "", ROOT_URL, "error: b2:// needs a key: set B2_APPLICATION_KEY_ID in the environment or in"),
    ("UNUSED", "", "b2://elsewhere/x",
     "error: b2://elsewhere/x/participants.tsv: there is no such bucket, or B2_APPLICATION_KEY_ID is a key of another account"),
])
def test_what_the_terminal_shows(written, bucket, tmp_path, monkeypatch, variable, value, path, message):
    """In a fresh process: what another test imported must not help."""
    with bucket(written):
        monkeypatch.setenv(variable, value)
        _, errors = start("data.py", "--config", "configs/demo.yaml", *remote(tmp_path), f"paths.data={path}").communicate(timeout=60)
    assert errors.startswith(message) and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_two_runs_at_once_fetch_each_volume_once(written, bucket, tmp_path):
    with bucket(written) as server:
        runs = [start("train.py", "--config", "configs/demo.yaml", *remote(tmp_path), f"paths.run_dir={tmp_path}/run{k}") for k in range(2)]
        for run in runs:
            _, errors = run.communicate(timeout=120)
            assert run.returncode == 0, errors
        fetched = [name for kind, name in server.requests if kind == "download"]
        assert len(fetched) == len(set(fetched))
    assert content(f"{tmp_path}/run0/predictions_val.csv") == content(f"{tmp_path}/run1/predictions_val.csv")


def test_two_sizes_share_a_cache(written, bucket, tmp_path):
    with bucket(written) as server:
        server.fault = lambda kind, name, n: Fault(stall=0.05) if name.endswith(".dcm") else None
        code = """if True:
            import sys, config, data, b2
            b2.ENV_FILE = "/none"
            cfg = config.load("configs/demo.yaml", sys.argv[2:])
            ledger = data.read_ledger(cfg)
            n = int(sys.argv[1])
            for i, key, volume in data.stream(data.Volumes(ledger.samples, (16, n, n), cfg.paths.cache_dir), ledger, range(30), cfg):
                assert volume.shape == (1, 16, n, n)
        """
        runs = [start("-c", code, n, *remote(tmp_path)) for n in (64, 48, 32)]
        for run in runs:
            _, errors = run.communicate(timeout=100)
            assert run.returncode == 0, errors
    assert os.listdir(f"{tmp_path}/remote-cache/raw") == []


def test_a_decoder_that_is_killed_stops_the_run(written, bucket, configure, tmp_path):
    with bucket(written) as server:
        server.fault = lambda kind, name, n: Fault(rate=100_000) if name.endswith(".dcm") else None
        cfg = configure(written, *remote(tmp_path), "data.num_workers=1", "data.prefetch=4")
        ledger = data.read_ledger(cfg)
        others = set(children_of(os.getpid()))
        arriving = data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(len(ledger.samples)), cfg)
        next(arriving)
        for child in set(children_of(os.getpid())) - others:
            os.kill(child, signal.SIGKILL)
        with pytest.raises(OSError, match="a process that decodes volumes died, out of memory perhaps; lower data.num_workers"):
            list(arriving)


def test_a_consumer_that_fails_stops_what_is_on_its_way(written, bucket, configure, tmp_path):
    with bucket(written) as server:
        cfg = configure(written, *remote(tmp_path))
        ledger = data.read_ledger(cfg)
        server.fault = lambda kind, name, n: Fault(rate=20_000) if name.endswith(".dcm") and server.count("download") > 3 else None
        arriving = data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(len(ledger.samples)), cfg)
        next(arriving)
        began = time.monotonic()
        arriving.close()
        assert time.monotonic() - began < 3 and not glob.glob(f"{cfg.paths.cache_dir}/raw/*.dcm")


@pytest.mark.slow
def test_kill_9_leaves_nothing_that_stops_the_next_run(written, bucket, tmp_path):
    overrides = [*remote(tmp_path), "data.num_workers=2"]
    with bucket(written) as server:
        server.fault = lambda kind, name, n: Fault(rate=400_000) if name.endswith(".dcm") and n == 1 else None
        run = start("train.py", "--config", "configs/demo.yaml", *overrides)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(glob.glob(f"{tmp_path}/remote-cache/volumes/*.npy")) < 3:
            time.sleep(0.02)
        children = children_of(run.pid)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert len(children) >= 2
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [child for child in children if os.path.exists(f"/proc/{child}")]  # no orphans
        server.requests.clear()
        run = start("train.py", "--config", "configs/demo.yaml", *overrides)
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
        fetched = [name for kind, name in server.requests if kind == "download"]
        assert len(fetched) == len(set(fetched)) and PREFIX + "participants.tsv" not in fetched
    left = glob.glob(f"{tmp_path}/remote-cache/**/*.part", recursive=True)
    # a few hundred bytes, cleared once they are old
    assert len(left) <= 2 and all("/features/" in path or "/checksums/" in path for path in left)


def test_what_killed_writers_left_is_removed_and_living_ones_are_not_disturbed(written, configure):
    import train

    cfg = configure(written)
    train.main(0, cfg)
    folder, = glob.glob(f"{cfg.paths.cache_dir}/features/*")
    for name, age in (("old.npy.0.part", 100), ("young.npy.1.part", 0)):
        open(f"{folder}/{name}", "w").close()
        os.utime(f"{folder}/{name}", (time.time() - age,) * 2)
    train.main(0, cfg)
    assert [os.path.basename(path) for path in glob.glob(f"{folder}/*.part")] == ["young.npy.1.part"]


def children_of(pid):
    return [int(child) for task in os.listdir(f"/proc/{pid}/task") for child in open(f"/proc/{pid}/task/{task}/children").read().split()]
