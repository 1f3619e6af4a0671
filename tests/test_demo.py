"""`make probe`, once, from a copy of the project: what a newcomer does first, and what must come of it."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project's files, with this environment as .venv."""
    folder = tmp_path_factory.mktemp("clone")
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".txt")) or name in ("configs", "Makefile"):
            source, target = os.path.join(ROOT, name), folder / name
            shutil.copytree(source, target) if os.path.isdir(source) else shutil.copy2(source, target)
    os.symlink(os.path.dirname(os.path.dirname(sys.executable)), folder / ".venv")
    return folder


@pytest.fixture(scope="module")
def first(project):
    return make(project, "probe")


def make(project, *args):
    return subprocess.run(["make", *args], cwd=project, capture_output=True, text=True)


def result_of(run, split):
    with open(run / f"eval_{split}.json") as f:
        return json.load(f)


def test_make_probe_learns_the_boosted_effect(project, first):
    assert first.returncode == 0, first.stderr
    assert "train.py --config configs/demo.yaml" in first.stdout  # make shows what it runs
    assert first.stdout.count("majority class") == 2 and first.stdout.count("chance band") >= 2
    assert "report: runs/cls_demo/report.html\n" in first.stdout
    result = result_of(project / "runs" / "cls_demo", "test")
    assert result["balanced_accuracy"] > result["chance_band"][1]
    assert min(result["f1_per_class"]) > 0 and result["alarms"] == []
    assert (project / "runs" / "cls_demo" / "report.html").exists()


def test_a_second_make_probe_writes_and_encodes_nothing(project, first):
    before = result_of(project / "runs" / "cls_demo", "test")
    stamp = os.stat(project / "demo" / "data").st_mtime_ns, os.stat(project / "demo" / "encoder.pt").st_mtime_ns
    again = make(project, "probe")
    assert again.returncode == 0 and again.stdout.count("features: 0 volumes encoded") == 3
    assert stamp == (os.stat(project / "demo" / "data").st_mtime_ns, os.stat(project / "demo" / "encoder.pt").st_mtime_ns)
    assert result_of(project / "runs" / "cls_demo", "test") == before


def test_shuffled_training_labels_teach_nothing(project, first):
    """The same volumes, the training labels dealt out anew: balanced accuracy on test falls inside the chance band."""
    shuffled = project / "shuffled"
    shuffled.mkdir()
    os.symlink(project / "demo" / "data" / "retinal_oct", shuffled / "retinal_oct")
    header, *lines = (project / "demo" / "data" / "participants.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    group, split = header.split("\t").index("study_group"), header.split("\t").index("recommended_split")
    train = [r for r in rows if r[split] == "train"]
    groups = [r[group] for r in train]
    random.Random(0).shuffle(groups)
    for row, new in zip(train, groups):
        row[group] = new
    (shuffled / "participants.tsv").write_text("\n".join([header, *("\t".join(r) for r in rows)]) + "\n")
    for script in (["train.py", "--config", "configs/demo.yaml", "paths.data=shuffled", "paths.run_dir=runs/shuffled"],
                   ["eval.py", "--ckpt", "runs/shuffled", "--split", "test"]):
        done = subprocess.run([sys.executable, *script], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "features: 0 volumes encoded" in done.stdout  # the same volumes under another path: known by content
    result = result_of(project / "runs" / "shuffled", "test")
    assert result["chance_band"][0] <= result["balanced_accuracy"] <= result["chance_band"][1]
    assert any("permuted labels do as well" in a for a in result["alarms"])


def test_a_real_checkpoint_that_is_not_there(project):
    done = make(project, "probe", "CKPT=single_domain_01")
    assert (done.returncode != 0
            and "error: b2:// needs a key: set B2_APPLICATION_KEY_ID and B2_APPLICATION_KEY" in done.stderr
            and "Traceback" not in done.stderr)
    done = make(project, "probe", "CKPT=no_such_config")
    assert done.returncode != 0 and "no_such_config" in done.stderr and "Traceback" not in done.stderr


def test_make_finetune_lays_its_settings_over_the_checkpoints(project):
    done = make(project, "finetune", "CKPT=single_domain_01")
    assert ("train.py --config configs/single_domain_01.yaml --config configs/finetune.yaml "
            "paths.run_dir=runs/cls_single_domain_01_finetune") in done.stdout
    assert done.returncode != 0 and "error: b2:// needs a key" in done.stderr


def test_make_preview_draws(project, first):
    done = make(project, "preview")
    assert done.returncode == 0 and "preview: runs/preview_demo.png" in done.stdout, done.stderr
    import matplotlib.image
    picture = matplotlib.image.imread(project / "runs" / "preview_demo.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.1


def test_tpu_targets_print_what_they_would_run(project):
    setup = make(project, "tpu-setup", "DRY=1", "TPU=pod", "ZONE=here")
    assert (setup.returncode == 0
            and all("--zone=here --worker=all" in line for line in setup.stdout.splitlines() if line.startswith("gcloud")))
    trained = make(project, "tpu-train", "DRY=1", "TPU=pod", "ZONE=here", "CKPT=multi_domain")
    on_all = [line for line in trained.stdout.splitlines()
              if line.startswith("gcloud compute tpus tpu-vm ssh pod --zone=here --worker=all --command=")]
    assert trained.returncode == 0 and len(on_all) == 2
    assert ("train.py --config configs/multi_domain.yaml device.backend=xla paths.run_dir=runs/cls_multi_domain "
            "train.resume=auto") in on_all[0]
    assert "eval.py --ckpt runs/cls_multi_domain --split test" in on_all[1]
    tuned = make(project, "tpu-train", "DRY=1", "TPU=pod", "CKPT=multi_domain", "MODE=finetune")
    assert ("train.py --config configs/multi_domain.yaml --config configs/finetune.yaml device.backend=xla "
            "paths.run_dir=runs/cls_multi_domain_finetune log.run_name=multi_domain_finetune train.resume=auto") in tuned.stdout
    failed = make(project, "tpu-setup", "GCLOUD=false", "TPU=pod")
    assert failed.returncode != 0
