import csv
import glob
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import CLASS_NAMES, DEMO, ROOT, content, read_bytes, read_predictions, settings
from sklearn.metrics import balanced_accuracy_score

import config
import ledger
import metrics
import tracking

KEY = "0123456789" * 4


def run(root, folder, mode, more=(), **variables):
    """train.py in a process of its own, without the developer's own account."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"HOME": str(folder), **variables}
    arguments = ["--config", "configs/demo.yaml", *settings(root, folder), f"log.wandb={mode}"]
    script = [sys.executable, "train.py", *arguments, *more]
    return subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=env)


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, pieces in
    blocks of 32 KiB."""
    log, at, whole = read_bytes(path), 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # no piece begins so close to a block's end
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@pytest.fixture(scope="module")
def people(written, tmp_path_factory):
    """A data set whose participants have ids that stand nowhere by chance, and one of whom has no
    volumes, which is printed; and the ids."""
    root, ids = shutil.copytree(written, tmp_path_factory.mktemp("people") / "data"), set()

    def renamed(line):
        participant, tab, rest = line.partition("\t")
        ids.add(f"pseudonym-{participant}-q")
        return f"pseudonym-{participant}-q{tab}{rest}"

    for table in (root / "participants.tsv", root / "retinal_oct" / "manifest.tsv"):
        header, *lines = table.read_text().splitlines(keepends=True)
        assert header.split("\t")[0] in ("participant_id", "person_id")
        table.write_text(header + "".join(map(renamed, lines)))
    cfg = config.load(DEMO, settings(root, root.parent))
    for sample in ledger.read(cfg).of("test")[:1]:
        shutil.rmtree(os.path.dirname(sample.path))
    return root, ids


def log_offline(root, folder, *more):
    """What a run with log.wandb=offline left: its folder, its W&B folder, what it printed, the
    records of history (list), summary (dict), run; and all records as bytes."""
    job = run(root, folder, "offline", more=("data.max_missing=1", *more))
    assert job.returncode == 0, job.stderr
    from wandb.proto import wandb_internal_pb2

    (path,) = glob.glob(f"{folder}/run/wandb/offline-run-*/run-*.wandb")
    found = SimpleNamespace(run=f"{folder}/run", wandb=os.path.dirname(path), printed=job.stdout)
    found.history, found.summary, found.records = [], {}, b"".join(records(path))
    name_of = lambda item: item.key or "/".join(item.nested_key)
    for message in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.HasField("history"):
            items = record.history.item
            found.history.append({name_of(item): json.loads(item.value_json) for item in items})
        if record.HasField("summary"):
            items = record.summary.update
            found.summary |= {name_of(item): json.loads(item.value_json) for item in items}
        if record.HasField("run"):
            found.info = record.run
    return found


@pytest.fixture(scope="module")
def offline(people, tmp_path_factory):
    return log_offline(people[0], tmp_path_factory.mktemp("offline"))


@pytest.fixture(scope="module")
def with_participants(people, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_participants")
    return log_offline(people[0], folder, "log.wandb_participants=true")


def tables(offline):
    """{file name: table} of what was logged as tables."""
    paths = glob.glob(f"{offline.wandb}/files/media/table/**/*.json", recursive=True)
    return {os.path.basename(path): json.loads(content(path)) for path in paths}


def test_wandb_knows_the_run_by_name_group_and_tags(offline):
    info = offline.info
    assert info.display_name == "demo_linear_probe" and info.run_group == "vjepa3d_tiny"
    assert {"probe", "network", "mean", "topcon_triton"} <= set(info.tags)
    assert info.project == "3d-oct-foundation-model"


def test_wandb_has_every_epoch(offline):
    epochs = [json.loads(line) for line in content(f"{offline.run}/metrics.jsonl").splitlines()]
    logged = [h for h in offline.history if "epoch" in h]
    for h, e in zip(logged, epochs, strict=True):
        assert {name for name in h if not name.startswith("_")} == set(e)
        assert all(h[name] == pytest.approx(e[name]) for name in e)


def test_an_epochs_scores_have_their_part_as_prefix(offline):
    epoch = next(h for h in offline.history if "epoch" in h)
    names = {name for name in epoch if not name.startswith("_")} - {"epoch", "best"}
    assert {name.split("/")[0] for name in names} == {"train", "val", "gap"}
    assert {"val/f1_0", "val/predicted_share_3"} <= names


def test_wandbs_summary_has_scores_intervals_and_alarms(offline):
    ids, y, p = read_predictions(f"{offline.run}/predictions_val.csv")
    expected, summary = metrics.evaluate(y, p, 4, ids), offline.summary
    score = balanced_accuracy_score(y, p.argmax(1))
    assert summary["best/val/balanced_accuracy"] == pytest.approx(score)
    interval = [summary[f"best/val/balanced_accuracy_{end}"] for end in ("low", "high")]
    assert interval == pytest.approx(expected["ci95"]["balanced_accuracy"])
    named = metrics.alarms(expected | {"classes": CLASS_NAMES})
    assert named and set(named) <= set(summary["alarms"])


def everything(offline):
    """{path: bytes} of whatever wandb wrote, and the records of its log without their frames."""
    paths = glob.glob(f"{offline.run}/wandb/**", recursive=True)
    return {path: read_bytes(path) for path in paths if os.path.isfile(path)} | {
        "records": offline.records
    }


def test_wandb_knows_nobody(offline, people):
    assert any(participant in offline.printed for participant in people[1])  # it was there to take
    for path, data in everything(offline).items():
        assert b"pseudonym" not in data, path
        assert not any(participant.encode() in data for participant in people[1]), path


def test_wandb_collects_neither_output_nor_paths_nor_the_machine(offline, people):
    names = {os.path.basename(path) for path in everything(offline)}
    assert not names & {"output.log", "requirements.txt", "wandb-metadata.json", "diff.patch"}
    assert "train loss" in offline.printed and b"train loss" not in offline.records
    own = str(people[0]), f"{ROOT}/train.py", "configs/demo.yaml", "log.wandb=offline"
    assert not [text for text in own if text.encode() in offline.records]
    assert not offline.info.host and not offline.info.git.commit
    settings = {item.key: json.loads(item.value_json) for item in offline.info.config.update}
    assert "paths" not in settings and settings["train"]["epochs"] == 6


@pytest.mark.slow
def test_wandb_has_the_ledger_where_it_is_asked_for(with_participants, offline):
    (table,) = [t for name, t in tables(with_participants).items() if name.startswith("ledger")]
    with open(f"{with_participants.run}/ledger.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert table["columns"] == header and table["data"] == rows
    assert not [name for name in tables(offline) if "ledger" in name]


def test_wandb_has_the_confusion_matrix_and_the_roc_curves(offline):
    _, y, _ = read_predictions(f"{offline.run}/predictions_val.csv")
    found = tables(offline)
    confusion = next(t for name, t in found.items() if "confusion" in name)
    assert sum(row[-1] for row in confusion["data"]) == len(y) and len(confusion["data"]) == 16
    assert any("roc" in name for name in found)


@pytest.mark.slow
def test_without_a_key_auto_is_offline(written, tmp_path):
    result = run(written, tmp_path, "auto")
    assert result.returncode == 0, result.stderr
    (path,) = glob.glob(f"{tmp_path}/run/wandb/offline-run-*/run-*.wandb")
    log = read_bytes(path)
    names = [b"val/balanced_accuracy", b"demo_linear_probe", b"3d-oct-foundation-model"]
    assert all(name in log for name in names)


@pytest.fixture()
def without_wandb(tmp_path):
    """Environment variables with which wandb cannot be imported."""
    (tmp_path / "no_wandb").mkdir()
    (tmp_path / "no_wandb" / "wandb.py").write_text("raise ImportError('not installed')\n")
    return {"PYTHONPATH": str(tmp_path / "no_wandb")}


@pytest.mark.slow
def test_without_wandb_a_run_can_do_without_it(written, tmp_path, without_wandb):
    assert run(written, tmp_path, "disabled", **without_wandb).returncode == 0


@pytest.mark.slow
def test_without_wandb_the_error_says_what_to_install(written, tmp_path, without_wandb):
    refused = run(written, tmp_path, "auto", **without_wandb)
    assert refused.returncode == 1
    assert "pip install wandb, or set log.wandb=disabled" in refused.stderr


# ------------------------------------------------------- the environment's wish, with another wandb


class Refused(Exception):
    """What the other wandb raises."""


@pytest.fixture()
def wandb(monkeypatch, tmp_path):
    """Another wandb in place of the real one, and an environment without anything of W&B. started:
    what init was called with; fails: the modes in which it raises, with this text; settings: those
    of environment and files."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    other = SimpleNamespace(started=[], fails={}, logged=[], torn_down=0)
    other.settings = SimpleNamespace(mode="online", api_key=KEY, identity_token_file=None)
    other.settings.base_url, other.settings.model_fields_set = "https://api.wandb.ai", set()

    def init(**about):
        other.started.append(SimpleNamespace(**about))
        if about["mode"] in other.fails:
            raise Refused(other.fails[about["mode"]])
        folder = f"{about['dir']}/wandb/{about['mode']}-run/files"
        return SimpleNamespace(id="17", dir=folder, log=other.logged.append)

    def teardown():
        other.torn_down += 1

    other.init, other.teardown = init, teardown
    other.setup = lambda: other
    other.Settings = lambda **own: SimpleNamespace(base_url="https://api.wandb.ai", **own)
    monkeypatch.setitem(sys.modules, "wandb", other)
    return other


@pytest.fixture()
def begin(written, configure, tmp_path):
    """begin("log.wandb=...", ...) -> the Tracker of a run."""
    return lambda *settings: tracking.start(configure(written, *settings), f"{tmp_path}/r", "16")


@pytest.mark.parametrize("variable", ["", "online", "run", "shared", "offline", "dryrun"])
@pytest.mark.parametrize("setting", ["auto", "online", "offline"])
def test_the_quieter_of_setting_and_environment_wins(
    wandb, begin, monkeypatch, capsys, setting, variable
):
    monkeypatch.setenv("WANDB_MODE", variable)
    begin(f"log.wandb={setting}")
    is_online = setting != "offline" and variable not in ("offline", "dryrun")
    assert [about.mode for about in wandb.started] == ["online" if is_online else "offline"]
    line = f"WANDB_MODE={variable} in the environment: W&B is offline, not online (log.wandb)\n"
    assert capsys.readouterr().out == (line if setting == "online" and not is_online else "")


@pytest.mark.parametrize(
    "setting, variables",
    [
        ("auto", {"WANDB_MODE": "disabled"}),
        ("offline", {"WANDB_MODE": "disabled"}),
        ("online", {"WANDB_DISABLED": "true"}),
        ("auto", {"WANDB_DISABLED": "1", "WANDB_MODE": "online"}),
        ("disabled", {"WANDB_MODE": "online"}),
    ],
)
def test_what_is_disabled_neither_imports_nor_writes(
    begin, monkeypatch, tmp_path, capsys, setting, variables
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracker = begin(f"log.wandb={setting}")
    tracker.log({"epoch": 1})
    assert tracker.run is None and tracker.id == "16"  # a resumed run keeps its id
    assert not os.path.exists(f"{tmp_path}/r")
    name, value = next(iter(variables.items()))
    line = f"{name}={value} in the environment: W&B is disabled, not {setting} (log.wandb)\n"
    assert capsys.readouterr().out == (line if setting in ("online", "offline") else "")


@pytest.mark.parametrize("value", ["Offline", "off", "true"])
def test_an_unknown_mode_is_refused_before_anything_is_computed(
    written, tmp_path, command, monkeypatch, value
):
    monkeypatch.setenv("WANDB_MODE", value)
    job = command("train.py", "--config", "configs/demo.yaml", root=written)
    assert job.returncode == 1 and "Traceback" not in job.stderr
    line = (
        f"error: WANDB_MODE={value} in the environment is no mode of W&B; set it to one of online"
    )
    assert line in job.stderr and not os.path.exists(f"{tmp_path}/cache/features")


def test_wandb_offline_wrote_a_file_that_counts_too(wandb, begin, capsys):
    wandb.settings.mode = "offline"
    begin("log.wandb=online")
    assert wandb.started[0].mode == "offline"
    assert capsys.readouterr().out == (
        "W&B's settings file: W&B is offline, not online (log.wandb)\n"
    )


# ----------------------------------------------------------------------------------- W&B that fails


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "Timed out: connection refused\nConsider increasing",
            "Refused: Timed out: connection ref",
        ),
        ("", "Refused: no reason given; "),
        (f"bad key {KEY}", r"Refused: bad key \*\*\*; "),
    ],
)
def test_a_run_that_cannot_go_online_goes_offline(
    wandb, begin, monkeypatch, tmp_path, capsys, text, reason
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.fails["online"] = text
    begin("log.wandb=auto").log({"epoch": 1})
    assert [about.mode for about in wandb.started] == ["online", "offline"]
    assert len({about.dir for about in wandb.started}) == 1 and wandb.logged == [{"epoch": 1}]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and KEY not in said
    assert re.match(f"W&B did not start online: {reason}", said)
    command = f"wandb sync {tmp_path}/r/wandb/offline-run"
    assert said.endswith(f"this run is logged offline. To upload it later: {command}\n")


def test_a_run_goes_on_without_w_and_b(wandb, begin, capsys):
    wandb.fails = {"online": "no network", "offline": "no wandb-core"}
    tracker = begin("log.wandb=online")
    tracker.log({"epoch": 1})
    assert tracker.run is None and tracker.id == "16"
    said = "W&B did not start: Refused: no wandb-core; this run goes on without it\n"
    assert capsys.readouterr().out == said


def test_an_error_while_logging_ends_the_logging_and_not_the_run(wandb, begin, tmp_path, capsys):
    tracker, calls = begin("log.wandb=offline"), []

    def log(record):
        calls.append(record)
        raise ConnectionResetError("Connection lost")

    def teardown():
        raise SystemExit(2)  # as wandb does when its own process has died

    tracker.run.log, wandb.teardown = log, teardown
    for epoch in range(3):
        tracker.log({"epoch": epoch})
    assert len(calls) == 1 and tracker.id == "17"
    assert capsys.readouterr().out == (
        "W&B failed: ConnectionResetError: Connection lost; this run goes on without it. To upload "
        f"what it has: wandb sync {tmp_path}/r/wandb/offline-run\n"
    )


def test_an_error_at_the_end_is_a_line_and_the_summary_is_told_before(wandb, begin, capsys):
    tracker, summary = begin("log.wandb=offline"), {}

    def finish():
        raise TimeoutError("Timed out finishing run.")

    tracker.run.summary, tracker.run.finish = summary, finish
    plots = dict.fromkeys(("confusion_matrix", "line_series"), lambda *args, **more: None)
    wandb.plot, wandb.Table = SimpleNamespace(**plots), lambda **table: None
    y = [0, 1, 2, 3] * 4
    predictions = {"y_true": y, "p": torch.eye(4)[y], "participant_id": [str(i) for i in range(16)]}
    saved = {"val_predictions": predictions, "training": {}, "epoch": 3}
    tracking.finish(tracker, saved, CLASS_NAMES, [["participant_id"], ["1"]])
    assert summary["best/val/balanced_accuracy"] == 1 and wandb.torn_down == 1
    said = capsys.readouterr().out
    assert (
        said.startswith("W&B failed: TimeoutError: Timed out finishing") and said.count("\n") == 1
    )


@pytest.mark.parametrize("own", [set(), {"init_timeout"}, {"init_timeout", "finish_timeout"}])
def test_w_and_b_may_hold_a_run_up_for_so_long(wandb, begin, own):
    wandb.settings.model_fields_set = own  # by WANDB_INIT_TIMEOUT and the like
    begin("log.wandb=online")
    limits, settings = {"init_timeout": 30, "finish_timeout": 60}, vars(wandb.started[0].settings)
    for name, seconds in limits.items():
        assert settings.get(name) == (None if name in own else seconds)


def test_variables_that_the_real_wandb_would_refuse(wandb, begin, monkeypatch):
    """A key with the line break of the file that it comes from, an empty mode."""
    monkeypatch.setenv("WANDB_API_KEY", f"{KEY}\n")
    monkeypatch.setenv("WANDB_MODE", "")
    begin("log.wandb=online")
    assert os.environ["WANDB_API_KEY"] == KEY and "WANDB_MODE" not in os.environ


def test_a_setting_that_w_and_b_does_not_understand_is_named_without_its_value(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_INIT_TIMEOUT", KEY)
    with pytest.raises(ValueError) as error:
        wandb.Settings(init_timeout="a secret")
    said = tracking.reason_of(error.value)
    assert said.startswith("WANDB_INIT_TIMEOUT: Input should be a valid number")
    assert "secret" not in said and "\n" not in said


# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "server, machine, mode",
    [
        ("https://api.wandb.ai", "api.wandb.ai", "online"),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", "online"),  # as `wandb login --host` writes it
        ("http://127.0.0.1:8080", "127.0.0.1", "online"),
        ("http://127.0.0.1:8080", "api.wandb.ai", "offline"),  # the key of another server
    ],
)
def test_auto_looks_for_the_key_of_its_own_server(wandb, begin, tmp_path, server, machine, mode):
    wandb.settings.api_key, wandb.settings.base_url = None, server
    (tmp_path / ".netrc").write_text(f"machine {machine}\nlogin user\npassword {KEY}\n")
    begin("log.wandb=auto")
    assert wandb.started[0].mode == mode


def test_online_without_a_key_is_offline_and_says_so(wandb, begin, capsys):
    wandb.settings.api_key = None
    begin("log.wandb=online")
    assert wandb.started[0].mode == "offline"
    assert "log.wandb=online finds no key, so this run is logged offline" in capsys.readouterr().out


def test_a_login_file_that_cannot_be_read_costs_no_run_and_shows_no_key(
    wandb, begin, tmp_path, capsys
):
    wandb.settings.api_key = None
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user {KEY}\n")
    begin("log.wandb=auto")
    said = capsys.readouterr().out
    assert wandb.started[0].mode == "offline" and KEY not in said
    assert said.startswith(f"{tmp_path}/.netrc is not a netrc file that can be read")


# --------------------------------------------------------------------------- without a network


NO_NETWORK = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}  # a closed port


@pytest.mark.slow
def test_without_a_network_a_run_is_logged_offline(written, tmp_path):
    result = run(written, tmp_path, "online", **NO_NETWORK, WANDB_INIT_TIMEOUT="3")
    assert result.returncode == 0, result.stderr
    (folder,) = glob.glob(f"{tmp_path}/run/wandb/offline-run-*")
    lines = [line for line in result.stdout.splitlines() if line.startswith("W&B")]
    assert len(lines) == 1 and lines[0].startswith("W&B did not start online: CommError: ")
    assert lines[0].endswith(f"To upload it later: wandb sync {folder}")
    assert b"best/val/balanced_accuracy" in read_bytes(glob.glob(f"{folder}/run-*.wandb")[0])
    assert KEY not in result.stdout + result.stderr
    for path in glob.glob(f"{tmp_path}/run/**", recursive=True):
        assert os.path.isdir(path) or KEY.encode() not in read_bytes(path), path


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_of_the_environment_holds_with_the_real_wandb(written, tmp_path, mode):
    result = run(written, tmp_path, "auto", **NO_NETWORK, WANDB_MODE=mode)
    assert result.returncode == 0, result.stderr
    assert "http://127.0.0.1:9" not in result.stdout + result.stderr  # nobody tried
    found = glob.glob(f"{tmp_path}/run/wandb*/*run-*")
    assert len(found) == (mode == "offline")
