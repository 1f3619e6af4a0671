"""Progress lines: on a terminal (a pty), in a file, of several replicas; what bounds a stage."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time

import pytest
from b2_server import Fault
from helpers import ROOT, TUNE, evaluate, quick, remote

import b2
import data
import device
import features
import files
import ledger
import stages
import train

CPU = device.torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_planned(monkeypatch):
    monkeypatch.setattr(stages, "PLAN", [])
    monkeypatch.setattr(stages, "SECONDS", {})


@pytest.fixture()
def lines(capsys, monkeypatch):
    """lines() -> what the stages of this test wrote to stderr, which is a file. Every stage has a
    line when it ends."""
    monkeypatch.setattr(stages, "LOG_FROM", 0)

    def read():
        text = capsys.readouterr().err
        assert "\r" not in text and (not text or text.endswith("\n"))
        return text.splitlines()

    capsys.readouterr()
    return read


def pace_of(line):
    """-> items done, seconds so far (rounded down), items per second, seconds left (likewise)."""
    found = re.search(r"(\d+)/\d+ in 00:(\d+), ([\d.]+)item/s, (\d+):(\d+) left", line)
    done, seconds, rate, minutes_left, seconds_left = map(float, found.groups())
    return done, seconds, rate, 60 * minutes_left + seconds_left


# ------------------------------------------------------------------------------------------ a file


def test_a_file_has_a_line_now_and_then_and_one_at_the_end(lines, monkeypatch):
    monkeypatch.setattr(stages, "LOG_EVERY", 1.05)
    with stages.Stage("things", 60, "item") as stage:
        for _ in stage.over(range(60)):
            time.sleep(0.05)
    first, *_, last = lines()
    done, so_far, rate, left = pace_of(first)
    assert 0 < done < 60 and done / (so_far + 1) < rate < done / so_far
    assert left <= (60 - done) / rate + 0.01 < left + 1.1
    seconds, rate = re.fullmatch(r"things: 60/60 in 00:(\d\d), ([\d.]+)item/s", last).groups()
    assert int(seconds) >= 3 and 60 / (int(seconds) + 1) < float(rate) <= 60 / int(seconds)


def test_a_short_stage_has_none(lines, monkeypatch):
    monkeypatch.setattr(stages, "LOG_FROM", 10)
    with stages.Stage("things", 3, "item") as stage:
        assert list(stage.over("abc")) == ["a", "b", "c"]
    assert lines() == []


def test_a_stage_that_stands_still_says_so(lines, monkeypatch):
    monkeypatch.setattr(stages, "LOG_EVERY", 0.5)
    monkeypatch.setattr(stages, "WINDOW", 0)  # the rate is that of the last ten items
    with stages.Stage("things", 100, "item") as stage:
        stage.update(20)
        time.sleep(1.6)
    first, second, *_, last = lines()
    assert pace_of(second)[2] < 0.8 * pace_of(first)[2]
    assert last.startswith("things: 20/100 in 00:01")


def test_nobody_shows_but_rank_0(lines, monkeypatch):
    monkeypatch.setattr(device, "rank", lambda: 1)
    stages.plan([("encoding", 2), ("training", 0)])
    with stages.Stage("encode", 2, "item", "encoding") as stage:
        assert list(stage.over("ab")) == ["a", "b"]
    assert lines() == [] and stages.PLAN == [("training", 0)]


# ------------------------------------------------------------------------------------- the job


def test_what_is_left_of_the_job(lines, monkeypatch):
    monkeypatch.setattr(stages, "LOG_EVERY", 0.5)
    stages.plan([("encoding", 10), ("encoding", 600), ("training", 0), ("scores", 0)])

    def first_line_of(kind, total, done):
        with stages.Stage(kind, total, "item", kind) as stage:
            stage.update(done)
            time.sleep(0.7)
        return lines()[0]

    # nothing came yet: no rate, and no number
    line = first_line_of("encoding", 10, 0)
    assert line == "encoding: 0/10 in 00:00; job: then encoding and training and scores"
    line = first_line_of("encoding", 600, 5)  # the last whose time is known
    (left,) = re.search(
        r" (\d\d:\d\d) left; job: \1 left, then training and scores$", line
    ).groups()
    assert left > "00:58"  # 595 items, 10 a second
    encoding = stages.SECONDS["encoding"]
    assert 0.7 / 5 <= encoding < 2 / 5
    stages.plan([("training", 100), ("encoding", 50), ("encoding", 50)])
    line = first_line_of("training", 100, 5)
    job = float(re.search(r"; job: at most 00:(\d\d) left$", line).group(1))
    assert job == pytest.approx(pace_of(line)[3] + 100 * encoding, abs=1.1)


@pytest.mark.parametrize("kind, fits", [("network", 4), ("logistic_regression", 3), ("knn", 3)])
def test_every_stage_that_is_planned_comes_and_all_is_counted(written, tmp_path, lines, kind, fits):
    more = ["data.augment.flip=true", "eval.floors=true"]
    more += ["train.seeds=[1,2]"] if kind == "network" else []
    more += ["eval.probes=true", f"model.head.kind={kind}", "train.epochs=30"]
    train.main(0, quick(written, tmp_path, *more, "train.early_stopping.patience=2"))
    assert stages.PLAN == []
    (line,) = [line for line in lines() if line.startswith("training")]
    assert re.match(rf"training, {fits} fits: (\d+)/\1 in ", line)
    evaluate(f"{tmp_path}/run", "val")
    assert stages.PLAN == [("scores and report", 0)]


def test_folds_and_shares_are_counted(written, tmp_path, lines):
    more = ["data.cv=3", "train.fractions=[0.9,1]", "train.epochs=3"]
    train.main(0, quick(written, tmp_path, *more))
    (line,) = [line for line in lines() if line.startswith("training")]
    assert re.match(r"training, 9 fits: (\d+)/\1 in ", line)


def test_the_epochs_of_an_encoder_are_planned_and_come(written, tmp_path, lines):
    train.main(0, quick(written, tmp_path, *TUNE))
    found = [re.match(r"(.*): (\d+)/\2 in", line).group(1) for line in lines()]
    epochs = ["epoch 2/3", "val of epoch 2", "epoch 3/3", "val of epoch 3"]
    assert found[-4:] == epochs and stages.PLAN == []


# ------------------------------------------------------------------------------- what bounds it


def slowed(monkeypatch, module, name, seconds):
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: time.sleep(seconds) or real(*args))


@pytest.mark.parametrize(
    "fetch, decode, encode, bound",
    [
        (0.4, 0, 0, "network"),
        (0, 0.1, 0, "decode"),
        (0, 0, 0.1, "encoder"),
        # four fetchers bring 10 a second, a decoder makes 25
        pytest.param(0.4, 0.04, 0.02, "network", marks=pytest.mark.slow),
        # four bring 13 a second, a decoder makes 8
        pytest.param(0.3, 0.12, 0.02, "decode", marks=pytest.mark.slow),
        # four bring 20 a second, a decoder 33
        pytest.param(0.2, 0.03, 0.12, "encoder", marks=pytest.mark.slow),
    ],
)
def test_what_bounds_an_encoding(
    written, bucket, configure, lines, tmp_path, monkeypatch, fetch, decode, encode, bound
):
    with bucket(written):
        cfg = configure(written, *remote(tmp_path), "data.prefetch=4")
        book, encoder = ledger.read(cfg), features.open_encoder(cfg)
        slowed(monkeypatch, b2, "fetch", fetch)
        slowed(monkeypatch, data, "decode", decode)
        slowed(monkeypatch, features, "begin", encode)
        samples = book.samples[:16]
        lines()
        features.encode(cfg, book, samples, encoder, CPU)
    (line,) = lines()
    assert re.fullmatch(rf"encode: 16/16 in 00:0\d, .*volume(/s)?, {bound}-bound", line)


@pytest.mark.parametrize("slow, bound", [("load_array", "disk"), ("augment", "augmentation")])
def test_what_bounds_a_stream_from_the_cache(written, configure, lines, monkeypatch, slow, bound):
    cfg = configure(written, "data.prefetch=2")
    book = ledger.read(cfg)
    volumes = data.open_volumes(cfg, book.samples[:10], (16, 64, 64))
    list(data.stream(volumes, book, range(10), cfg))
    slowed(monkeypatch, files if slow == "load_array" else data, slow, 0.3)
    augment = lambda key, volume: data.augment(volume, {"flip": 0.5}, key)
    with stages.Stage("read", 10, "volume", reading=volumes.reading) as stage:
        list(stage.over(data.stream(volumes, book, range(10), cfg, augment)))
    (line,) = lines()
    assert line.endswith(f"volume/s, {bound}-bound")


def test_the_bound_is_that_of_the_last_minute(lines, monkeypatch):
    for name, value in (("LOG_EVERY", 0.4), ("WINDOW", 1.2), ("ITEMS", 1)):
        monkeypatch.setattr(stages, name, value)
    reading = stages.Reading()
    with stages.Stage("read", 100, "item", reading=reading) as stage:
        with reading.during("disk"), reading.during("network"), reading.during("wait"):
            time.sleep(1.5)
        for _ in range(60):
            time.sleep(0.05)
            stage.update()
    *some, last, whole = lines()
    assert "network-bound" in some[2] and "encoder-bound" in last
    assert whole.endswith("network-bound")  # a third of the time


# ---------------------------------------------------------------------------------------- terminals


def screen(text):
    """What a terminal shows after text -> its lines."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|\x1b\[A|[^\x1b]", text):
        if part == "\n":
            lines.append("")
            column = 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            assert part != "\x1b[A", "a second line"
            lines[-1] = lines[-1][:column] + part + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@contextlib.contextmanager
def terminal(*command):
    """A process whose stderr is a terminal, and stdout a pipe -> the process, and shown(): what it
    has written to the terminal so far."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    text = []

    def listen():
        with contextlib.suppress(OSError):  # its other end is closed
            while part := os.read(ours, 1 << 16):
                text.append(part)

    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=its,
        text=True,
        start_new_session=True,
    ) as process:
        os.close(its)
        listener = threading.Thread(target=listen)
        listener.start()

        def shown():
            if process.poll() is not None:
                listener.join()
            return b"".join(text).decode().replace("\r\n", "\n")

        try:
            yield process, shown
        finally:
            process.kill()
    os.close(ours)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


THINGS = textwrap.dedent("""
    import signal, sys, time, stages
    stages.DRAW_EVERY = 0.1
    def command():
        stages.plan([("training", 0)])
        with stages.Stage("things", 20, "item", shown=True) as stage:
            for _ in stage.over(range(20)):
                time.sleep(0.1)
        print("done")
""")


def test_a_terminal_has_one_line_that_is_redrawn():
    with terminal("-c", THINGS + "command()") as (process, shown):
        wait_until(lambda: " 10/20" in shown())
        halfway = screen(shown())
        assert process.communicate(timeout=60)[0] == "done\n"
    (line,) = halfway
    pattern = r"things:  ?\d+%\|.*\| \d+/20,  \d\.\d\ditem/s, 00:0[012] left; job: 00:0[012] left, "
    assert re.fullmatch(pattern + "then training", line) and len(line) <= 100
    assert shown().count("\r") > 10
    last, nothing = screen(shown())
    assert re.fullmatch(r"things: 20/20 in 00:0[23],  [5-9]\.\d\ditem/s", last) and nothing == ""


def test_ctrl_c_leaves_a_clean_line():
    code = THINGS + "import device; device.run(command)"
    with terminal("-c", code) as (process, shown):
        wait_until(lambda: " 5/20" in shown())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        first, second, nothing = screen(shown())
    assert re.match(r"things: +\d/20 in 00:00", first) and second == "interrupted" and not nothing


@pytest.mark.slow
@pytest.mark.parametrize("end", ["finished", "Ctrl-C"])
def test_several_replicas_show_one_line(written, bucket, tmp_path, end):
    args = ["--config", "configs/demo.yaml", *remote(tmp_path), "device.processes=2"]
    with bucket(written) as server:
        rate = Fault(rate=2_000 if end == "Ctrl-C" else 400_000)  # minutes, or seconds
        server.fault = lambda kind, name, n: rate if name.endswith(".dcm") else None
        with terminal("train.py", *args, "device.backend=cpu") as (process, shown):
            wait_until(lambda: "encode on replica 0 of 2: " in shown(), 120)
            if end == "Ctrl-C":
                wait_until(lambda: " left, " in shown(), 120)
                os.killpg(process.pid, signal.SIGINT)
                process.communicate(timeout=60)
                assert process.returncode == 130 and screen(shown()) == ["interrupted", ""]
                assert " left, " in shown()
            else:
                output, _ = process.communicate(timeout=200)
                assert process.returncode == 0 and "\r" not in output and "volume/s" not in output
                line, nothing = screen(shown())
                assert re.match(r"encode on replica 0 of 2: (\d+)/\1 in 00:\d\d, ", line)
                assert nothing == ""
