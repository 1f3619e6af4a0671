import csv
import glob
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import DEMO, ROOT, TINY, edit, make, quick, read_bytes, settings, write_bytes

import config
import ledger

DEMO_CONFIG = ["--config", "configs/demo.yaml"]
# with --dist loadgroup, one worker makes the probe of the demo, instead of both
pytestmark = pytest.mark.xdist_group("commands")


# ----------------------------------------------------------------- make, in a copy of the project


def copy_project(folder):
    """The project's files, with this environment as .venv, into which make must install nothing."""
    for name in os.listdir(ROOT):
        source, target = os.path.join(ROOT, name), folder / name
        if name in ("configs", "templates", "scripts"):
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif name.endswith((".py", ".txt", ".yaml")) or name == "Makefile":
            shutil.copy(source, target)
        if name.startswith("requirements"):
            os.utime(target, (0, 0))  # older than the environment
    os.symlink(os.path.dirname(os.path.dirname(sys.executable)), folder / ".venv")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def first(project):
    """`make probe`, once: what a newcomer does first."""
    done = make(project, "probe")
    assert done.returncode == 0, done.stderr
    return done


def result_of(run, split):
    return json.loads((run / f"eval_{split}.json").read_text())


@pytest.mark.slow
def test_make_probe_shows_what_it_runs_and_what_came_of_it(first):
    assert "train.py --config configs/demo.yaml" in first.stdout
    assert first.stdout.count("majority class") == 2 and first.stdout.count("chance band") >= 2
    assert "report: runs/cls_demo/report.html\n" in first.stdout


@pytest.mark.slow
def test_make_probe_learns_the_boosted_effect(project, first):
    result = result_of(project / "runs" / "cls_demo", "test")
    assert result["balanced_accuracy"] > result["chance_band"][1]
    assert min(result["f1_per_class"]) > 0 and result["alarms"] == []
    assert (project / "runs" / "cls_demo" / "report.html").exists()


@pytest.mark.slow
def test_a_second_make_probe_writes_and_encodes_nothing(project, first):
    demo = [project / "demo" / "data", project / "demo" / "encoder.pt"]
    before = result_of(project / "runs" / "cls_demo", "test")
    stamps = [os.stat(path).st_mtime_ns for path in demo]
    again = make(project, "probe")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("features: 0 volumes encoded") == 3
    assert stamps == [os.stat(path).st_mtime_ns for path in demo]
    assert result_of(project / "runs" / "cls_demo", "test") == before


@pytest.mark.slow
def test_shuffled_training_labels_teach_nothing(project, first):
    """The same volumes, the training labels dealt out anew: balanced accuracy on test falls inside
    the chance band."""
    shuffled, demo = project / "shuffled", project / "demo" / "data"
    shuffled.mkdir()
    os.symlink(demo / "retinal_oct", shuffled / "retinal_oct")
    header, *lines = (demo / "participants.tsv").read_text().splitlines()
    rows, columns = [line.split("\t") for line in lines], header.split("\t")
    group, split = columns.index("study_group"), columns.index("recommended_split")
    trains = [row for row in rows if row[split] == "train"]
    groups = [row[group] for row in trains]
    random.Random(0).shuffle(groups)
    for row, new in zip(trains, groups):
        row[group] = new
    table = "\n".join([header, *("\t".join(row) for row in rows)]) + "\n"
    (shuffled / "participants.tsv").write_text(table)
    for script in (
        ["train.py", *DEMO_CONFIG, "paths.data=shuffled", "paths.run_dir=runs/shuffled"],
        ["eval.py", "--ckpt", "runs/shuffled", "--split", "test"],
    ):
        command = [sys.executable, *script]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # the same volumes under another path: known by content
        assert "features: 0 volumes encoded" in done.stdout
    result = result_of(project / "runs" / "shuffled", "test")
    assert result["chance_band"][0] <= result["balanced_accuracy"] <= result["chance_band"][1]
    assert any("permuted labels do as well" in alarm for alarm in result["alarms"])


@pytest.mark.slow
def test_make_preview_draws(project, first):
    done = make(project, "preview")
    assert done.returncode == 0, done.stderr
    assert "preview: runs/preview_demo.png" in done.stdout
    import matplotlib.image

    picture = matplotlib.image.imread(project / "runs" / "preview_demo.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.1


def test_a_real_checkpoint_that_is_not_there(project):
    done = make(project, "probe", "CKPT=single_domain_01")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "put your bucket's name for YOUR-BUCKET, or a local path" in done.stderr


def test_a_config_that_is_not_there(project):
    done = make(project, "probe", "CKPT=no_such_config")
    assert done.returncode != 0
    assert "no_such_config" in done.stderr and "Traceback" not in done.stderr
    assert "demo.yaml" in done.stderr  # one of those that are there


def test_make_alone_trains_nothing_and_prints_its_targets(project):
    done = make(project)
    assert done.returncode == 0 and "train.py" not in done.stdout
    for target in ("probe finetune", "sweep", "check", "doctor", "CKPT=demo"):
        assert target in done.stdout


@pytest.mark.slow
def test_the_doctor_says_what_is_right_and_what_to_mend(project):
    done = make(project, "doctor")
    lines = done.stdout.splitlines()[1:]
    assert done.returncode == 0 and len(lines) == 7
    assert all(line.startswith("ok    ") for line in lines)
    done = make(project, "doctor", "CKPT=single_domain_01")
    assert done.returncode != 0 and "MEND  paths.data=b2://YOUR-BUCKET" in done.stdout
    assert "error: 1 to mend, named above" in done.stderr


def test_make_finetune_lays_its_settings_over_the_checkpoints(project):
    done = make(project, "finetune", "CKPT=single_domain_01")
    assert (
        "train.py --config configs/single_domain_01.yaml --config configs/finetune.yaml "
        "paths.run_dir=runs/cls_single_domain_01_finetune"
    ) in done.stdout
    assert done.returncode != 0 and "for YOUR-BUCKET" in done.stderr


HBA1C = "aireadi_hba1c"
TASKS_AND_MODES = f"TASKS=default {HBA1C}", "MODES=probe knn"


@pytest.fixture(scope="module")
def swept(written, tmp_path_factory):
    """A copy of the project in which `make sweep` has tried a checkpoint that is there and one that
    is not, on two tasks in two modes: its folder and what make said."""
    folder = tmp_path_factory.mktemp("sweep")
    work = copy_project(folder)
    mine = [
        override
        for override in settings(written, folder)
        if not override.startswith(("paths.run_dir", "train.sweep"))
    ]
    cfg = config.load(DEMO, mine)
    for name, path in (("good", cfg.paths.checkpoint_path), ("broken", "/nowhere.pt")):
        cfg.paths.checkpoint_path = path
        (work / "configs" / f"{name}.yaml").write_text(json.dumps(config.to_dict(cfg)))
    return work, make(work, "sweep", "CKPTS=broken good", *TASKS_AND_MODES)


@pytest.mark.slow
def test_make_sweep_goes_on_after_a_failure(swept):
    work, job = swept
    said = job.stdout[-2000:] + job.stderr[-2000:]
    assert job.returncode != 0, said
    failed = [f"broken/{task}/{mode}" for task in ("default", HBA1C) for mode in ("probe", "knn")]
    assert f"FAILED, and not in the leaderboard: {' '.join(failed)}" in job.stdout, said
    assert "/nowhere.pt is not there" in job.stderr
    with open(work / "runs" / "leaderboard.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    runs = {"cls_good", "cls_good_knn", f"cls_good_{HBA1C}", f"cls_good_{HBA1C}_knn"}
    assert {row["run"] for row in rows} == runs
    assert {row["task"].partition(":")[0] for row in rows} == {"study_group", HBA1C}
    assert "has the best mean rank of 2" in job.stdout and "linear probe" in job.stdout


@pytest.mark.slow
def test_make_sweep_skips_what_is_finished(swept):
    work, _ = swept
    table = work / "runs" / "cls_good" / "sweep.csv"
    stamp = os.stat(table).st_mtime_ns
    job = make(work, "sweep", "CKPTS=broken good", *TASKS_AND_MODES)
    assert job.stdout.count("holds this run, finished") == 4
    assert os.stat(table).st_mtime_ns == stamp


# -------------------------------------------------------------------------------------- a TPU pod


def on_all(done):
    """The commands that would run on every host."""
    start = "gcloud compute tpus tpu-vm ssh pod --zone=here --worker=all --command="
    return [line for line in done.stdout.splitlines() if line.startswith(start)]


def test_tpu_setup_prints_what_it_would_run_on_all_hosts(project):
    setup = make(project, "tpu-setup", "DRY=1", "TPU=pod", "ZONE=here")
    assert setup.returncode == 0, setup.stderr
    lines = [line for line in setup.stdout.splitlines() if line.startswith("gcloud")]
    assert lines and all("--zone=here --worker=all" in line for line in lines)
    # with the kernel's packages, in make setup-xla
    assert "make setup-xla" in on_all(setup)[-1]
    with open(f"{ROOT}/requirements-tpu.txt", encoding="utf-8") as f:
        assert "torch_xla[tpu,pallas]==" in f.read()


def test_tpu_train_prints_what_it_would_run_on_all_hosts(project):
    trained = make(project, "tpu-train", "DRY=1", "TPU=pod", "ZONE=here", "CKPT=multi_domain")
    assert trained.returncode == 0, trained.stderr
    trains, evaluates = on_all(trained)
    assert (
        "train.py --config configs/multi_domain.yaml device.backend=xla "
        "paths.run_dir=runs/cls_multi_domain train.resume=auto"
    ) in trains
    assert "eval.py --ckpt runs/cls_multi_domain --split test" in evaluates


def test_tpu_train_lays_a_mode_over_the_checkpoint(project):
    tuned = make(project, "tpu-train", "DRY=1", "TPU=pod", "CKPT=multi_domain", "MODE=finetune")
    assert (
        "train.py --config configs/multi_domain.yaml --config configs/finetune.yaml "
        "device.backend=xla paths.run_dir=runs/cls_multi_domain_finetune "
        "log.run_name=multi_domain_finetune train.resume=auto"
    ) in tuned.stdout


def test_tpu_targets_fail_where_a_command_fails(project):
    assert make(project, "tpu-setup", "GCLOUD=false", "TPU=pod").returncode != 0


# ----------------------------------------------------------- bad input: one sentence, exit code 1


def last_line(result):
    return result.stderr.strip().splitlines()[-1]


def edit_labels(change):
    return lambda root, path: edit(root / "participants.tsv", change)


def cut_short(root, path):
    whole = read_bytes(path)
    write_bytes(path, whole[: len(whole) // 2])


def remove_pixels(root, path):
    import pydicom

    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)


def point_outside(root, path):
    old, new = "/retinal_oct/structural_oct", "/../secret"
    edit(root / "retinal_oct" / "manifest.tsv", lambda text: text.replace(old, new, 1))


def move_the_first(text):
    """Append the first participant once more, in another split."""
    row = text.splitlines(True)[1].replace("\ttrain\t", "\tVAL\t").replace("\tval\t", "\ttrain\t")
    return text + row.replace("\tVAL\t", "\tval\t").replace("\ttest\t", "\ttrain\t")


def remove_all(root, path):
    folder = os.path.dirname(path)
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_short, "participant {participant} ({path} is not a readable OCT volume"),
        (
            remove_pixels,
            "participant {participant} ({path} is not a readable OCT volume: no pixel data",
        ),
        (point_outside, "points outside the data folder"),
        (
            edit_labels(lambda text: text.replace("study_group", "group", 1)),
            "has no column 'study_group'",
        ),
        (
            edit_labels(lambda text: text.replace("insulin_dependent", "type_3", 1)),
            "unknown study_group 'type_3'",
        ),
        (edit_labels(move_the_first), "is in two splits"),
        (remove_all, "labelled participants have no volume"),
        (
            lambda root, path: os.remove(root / "participants.tsv"),
            "participants.tsv is not there; set paths.data",
        ),
    ],
    ids=[
        "truncated DICOM",
        "DICOM without pixels",
        "manifest points outside",
        "labels without column",
        "unknown study_group",
        "two splits",
        "nobody there",
        "no labels",
    ],
)
def test_bad_data_stops_with_a_sentence_and_writes_no_run(
    dataset, command, tmp_path, damage, message
):
    path = ledger.read(quick(dataset, tmp_path)).of("train")[0].path
    damage(dataset, path)
    message = message.format(participant=path.split("/")[-2], path=path)
    result = command("train.py", *DEMO_CONFIG, root=dataset)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last_line(result).startswith("error: ") and message in last_line(result)
    assert not (tmp_path / "run").exists()
    assert not glob.glob(f"{tmp_path}/**/*.part", recursive=True)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "paths.checkpoint_path=/none/encoder.pt",
            "error: paths.checkpoint_path=/none/encoder.pt is not there",
        ),
        (
            "paths.data=/none",
            "error: paths.data=/none: participants.tsv is not there; set paths.data",
        ),
        (
            "paths.data=s3://bucket/ai-readi",
            "error: s3://bucket/ai-readi is no place to read from: write b2://BUCKET/KEY",
        ),
        (
            "paths.cache_dir=b2://bucket/cache",
            "error: paths.cache_dir=b2://bucket/cache: results and caches are written to a local "
            "folder",
        ),
        (
            "paths.cache_dir=/dev/null/cache",
            "error: paths.cache_dir=/dev/null/cache cannot be written, for /dev/null cannot",
        ),
        ("model.emb_dim=768", "error: model.emb_dim is 768, but the encoder of"),
        ("data.image_size=[16,64,128]", "do not fit the encoder"),
        ("train.lr_hed=1", "did you mean 'train.lr_head'?"),
        ("device.backend=cuda", "error: device.backend=cuda finds no GPU"),
        ("data.scanner=zeiss", "error: "),
    ],
)
def test_bad_settings_stop_with_a_sentence(written, command, tmp_path, override, message):
    if override == "device.backend=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = command("train.py", *DEMO_CONFIG, *settings(written, tmp_path), override)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "is not a checkpoint"),
        ("runs code", "posix.system"),
        ("missing keys", "missing"),
    ],
    ids=["truncated", "runs code", "missing keys"],
)
def test_bad_checkpoints_stop_with_a_sentence(written, command, tmp_path, kind, message):
    path, ran = tmp_path / "encoder.pt", tmp_path / "ran"
    if kind == "truncated":
        write_bytes(path, read_bytes(TINY)[: os.path.getsize(TINY) // 2])
    else:
        weights = {"context_encoder.pos_embed": torch.zeros(1, 64, 128)}
        more = {"x": RunsCode(ran)} if kind == "runs code" else {}
        torch.save({"model_state_dict": weights, **more}, path)
    overrides = [*settings(written, tmp_path), f"paths.checkpoint_path={path}"]
    result = command("train.py", *DEMO_CONFIG, *overrides)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last_line(result).startswith("error: ") and message in result.stderr
    assert not ran.exists() and not (tmp_path / "run").exists()


def test_the_exit_code_of_the_real_process(tmp_path):
    script = [sys.executable, "train.py", "--config", str(tmp_path / "none.yaml")]
    result = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and "none.yaml" in result.stderr


def test_real_configs_say_within_seconds_what_to_set(command):
    result = command("train.py", "--config", "configs/single_domain_01.yaml")
    assert result.returncode == 1 and "put your bucket's name for YOUR-BUCKET" in result.stderr
    local = ["paths.data=b2://bucket/data", "paths.checkpoint_path=b2://bucket/a.pt"]
    result = command("train.py", "--config", "configs/single_domain_01.yaml", *local)
    message = "error: b2:// needs a key: set B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY in"
    assert result.returncode == 1 and result.stderr.startswith(message)


@pytest.mark.slow
def test_a_full_disk_stops_with_a_sentence_and_leaves_no_half_file(written, tmp_path):
    """No file may grow over 20 kB, as on a disk that fills: the first cached volume (131 kB) cannot
    be written."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    script = [sys.executable, "train.py", *DEMO_CONFIG, *settings(written, tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, preexec_fn=limit)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last_line(result).startswith("error: ")
    assert "not written" in last_line(result) and "volumes" in last_line(result)
    assert not (tmp_path / "run").exists()
    assert not glob.glob(f"{tmp_path}/**/*.part", recursive=True)
