"""Anybody's labels and volumes, through the public commands: no source file is touched."""

import csv
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from helpers import CLASSES, content, tables, triton
from PIL import Image

import model

SIZE = (16, 64, 64)  # (D, H, W): tokens of 4 x 16 x 16 lie on a grid of 4 x 4 x 4
CELLS = [(d, w) for d in range(4) for w in range(4)]  # of its lateral plane


def write_encoder(path, size=SIZE):
    """An encoder, in the format of the pretraining, whose features are how bright each cell of the
    lateral plane is: what lies where is seen, so that left and right are told apart."""
    grid = [n // patch for n, patch in zip(size, (4, 16, 16))]
    encoder = model.ViT3D(128, 1, int(np.prod(grid)))
    block, cells = encoder.blocks[0], grid[0] * grid[2]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        for norm in (block.norm1, block.norm2, encoder.norm):
            norm.weight.fill_(1)
        encoder.patch_embed.proj.weight[0] = 1 / 1024  # channel 0: the mean of the patch
        for n, (d, _, w) in enumerate(np.ndindex(*grid)):
            encoder.pos_embed[0, n, 1 + grid[2] * d + w] = 10  # a channel for each cell
        for j in range(cells):  # a hidden unit for each: open in its own cell alone
            block.mlp.fc1.weight[j, 0], block.mlp.fc1.weight[j, 1 + j] = 1, 2
            block.mlp.fc1.bias[j] = -19.4
            block.mlp.fc2.weight[64 + j, j] = 4
    state = {
        **encoder.state_dict(prefix="context_encoder."),
        **encoder.state_dict(prefix="target_encoder.encoder."),
    }
    about = {"image_size": list(size), "num_heads": encoder.num_heads}
    about |= {"layer_norm_eps": encoder.eps, "activation": encoder.activation}
    torch.save({"model_state_dict": state, "config": about}, path)
    return path


def volume_of(label, seed):
    """(20, 70, 80) uint8: speckle, and a brighter block in the class's cell."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(60, 120, (20, 70, 80)).astype(np.uint8)
    d, w = CELLS[label]
    volume[5 * d : 5 * d + 5, 10:60, 20 * w : 20 * w + 20] += 60
    return volume


def as_npy(path, volume):
    np.save(path.with_suffix(".npy"), volume)
    return path.with_suffix(".npy")


def as_mat(path, volume):
    scipy.io.savemat(path.with_suffix(".mat"), {"scan": np.moveaxis(volume, 0, -1), "fs": 3.0})
    return path.with_suffix(".mat")


def as_tiff(path, volume):
    frames = [Image.fromarray(frame) for frame in volume]
    frames[0].save(path.with_suffix(".tif"), save_all=True, append_images=frames[1:])
    return path.with_suffix(".tif")


def as_folder(path, volume):
    path.mkdir()
    for i, frame in enumerate(volume, start=1):  # 1, 2, 10: their natural order
        Image.fromarray(frame).save(path / f"bscan{i}.png")
    return path


def as_zip(path, volume):
    folder = as_folder(path.with_name(path.name + "_frames"), volume)
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    return path.with_suffix(".zip")


FORMATS = (as_npy, as_mat, as_tiff, as_folder, as_zip)


def write_task(folder, names, people, formats=(as_npy,), columns="", volumes=1):
    """A folder of scans with labels.csv, and task.yaml that describes it -> what train.py is
    called with."""
    (folder / "scans").mkdir(parents=True)
    rows = [f"patient,diagnosis,scan{',fold' if columns else ''}"]
    for i in range(people):
        label = i % len(names)
        for v in range(volumes):
            write = formats[(i + v) % len(formats)]
            path = write(folder / "scans" / f"{i:03d}_{v}", volume_of(label, 1000 * v + i))
            fold = "," + ("train", "train", "val", "test")[i // len(names) % 4] if columns else ""
            rows.append(f"P{i:03d},{names[label]},{path.relative_to(folder)}{fold}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "task.yaml").write_text(f"""
data:
  task: mine
  labels: labels.csv
  manifest: null
  columns: {{participant: patient, label: diagnosis, file: scan, split: {columns or "null"},
            eye: null, site: null, age: null, has_oct: null}}
  classes: [{", ".join(names)}]
  ordered: false
""")
    encoder = write_encoder(folder / "encoder.pt")
    return [
        *("--config", "configs/demo.yaml", "--config", folder / "task.yaml"),
        f"paths.data={folder}",
        f"paths.checkpoint_path={encoder}",
        f"paths.cache_dir={folder}/cache",
        f"paths.run_dir={folder}/run",
        "data.image_size=null",
    ]


def trained_and_scored(command, folder, arguments):
    """-> eval_test.json."""
    done = command("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    done = command("eval.py", "--ckpt", folder / "run", "--split", "test")
    assert done.returncode == 0, done.stderr
    return json.loads(content(folder / "run" / "eval_test.json")), done.stdout


def test_three_classes_in_volumes_of_five_formats(tmp_path, command):
    names = ["normal", "dme", "amd"]
    task = write_task(tmp_path, names, 60, FORMATS, columns="fold", volumes=2)
    result, said = trained_and_scored(command, tmp_path, task)
    assert result["classes"] == names and result["task"] == "mine" and result["n"] == 15
    assert result["balanced_accuracy"] == 1 and result["volumes"] == 30
    assert not any("insulin" in text or "topcon" in text for text in (said, json.dumps(result)))
    page = content(tmp_path / "run" / "report.html")
    assert all(name in page for name in names) and "insulin" not in page
    with open(tmp_path / "run" / "predictions_test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["participant_id", "y_true", "p0", "p1", "p2"]
    table = {
        line.split(",")[0]: line.split(",") for line in content(tmp_path / "labels.csv").split()
    }
    for row in rows:
        person = table[row["participant_id"]]
        assert (names[int(row["y_true"])], "test") == (person[1], person[3])


def test_two_classes_without_a_split_column(tmp_path, command):
    task = write_task(tmp_path, ["healthy_eye", "drusen"], 60)
    result, _ = trained_and_scored(command, tmp_path, task)
    assert result["balanced_accuracy"] == 1 and result["n"] == 9  # 15 % of 60
    assert len(result["f1_per_class"]) == 2
    done = command("data.py", "--deep", *task)
    assert done.returncode == 0 and "(with a volume / labelled)   60 participants" in done.stdout
    assert "NumPy" in done.stdout


@pytest.fixture(scope="module")
def two_and_twelve(tmp_path_factory):
    """{2, 12: (folder, arguments)} of data sets of so many classes."""
    found = {}
    for number in (2, 12):
        folder = tmp_path_factory.mktemp("many") / "data"
        names = [f"kind{k}" for k in range(number)]
        found[number] = folder, write_task(folder, names, 16 * number)
    return found


WAYS = {
    "the sweep": [],
    "focal": ["train.loss=focal", "train.sweep=null"],
    "label smoothing": ["train.loss=label_smoothing", "train.sweep=null"],
    "logit adjustment": [
        "train.loss=logit_adjustment",
        "train.class_weights=none",
        "train.sweep=null",
    ],
    "balanced softmax": [
        "train.loss=balanced_softmax",
        "train.class_weights=none",
        "train.sweep=null",
    ],
    "ordinal": ["train.loss=ordinal", "data.ordered=true", "train.sweep=null"],
    "ordinal head": ["data.ordered=true"],
    "MLP, stratified": [
        *("model.head.hidden=32", "data.sampler=stratified", "train.sweep=null"),
        *("train.lr_head=0.03", "data.batch_size=16", "train.class_weights=none"),
    ],
    "attentive": ["model.pool_method=attentive", "model.token_grid=[2,2,2]"],
    "kNN": ["--config", "configs/knn.yaml"],
    "logistic regression": ["--config", "configs/logistic_regression.yaml"],
    "seeds, folds, floors": ["train.seeds=[1,2]", "data.cv=3", "eval.floors=true"],
    "weights": ["train.class_weights=effective"],
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 12])
@pytest.mark.parametrize("way", WAYS)
def test_every_loss_and_head_takes_any_number_of_classes(two_and_twelve, number, way, command):
    folder, arguments = two_and_twelve[number]
    result, said = trained_and_scored(
        command, folder, [*arguments, *WAYS[way], "train.epochs=10", "train.warmup_epochs=1"]
    )
    assert len(result["classes"]) == len(result["recall_per_class"]) == number
    assert np.shape(result["confusion_matrix"]) == (number, number)
    assert result["majority"]["balanced_accuracy"] == pytest.approx(1 / number)
    low, high = result["chance_band"]
    assert low < 1 / number < high
    # ordinal heads of 12 unordered cells cannot tell them apart
    if way not in ("ordinal", "ordinal head") or number == 2:
        assert result["balanced_accuracy"] > 0.6
    assert "kind1" in said


@pytest.mark.slow
def test_fine_tuning_takes_three_classes(tmp_path, command):
    task = write_task(tmp_path, ["a", "b", "c"], 24, columns="fold")
    tune = ["model.unfreeze_at_epoch=1", "train.sweep=null", "train.epochs=2", "data.batch_size=8"]
    result, _ = trained_and_scored(command, tmp_path, [*task, *tune, "train.warmup_epochs=0"])
    assert len(result["classes"]) == 3 and result["epoch"] in (1, 2)


# ------------------------------------------------------------------------ AI-READI's tasks, phantom


def of_phantom(root, folder, task, size=(16, 96, 96)):
    """What train.py is called with for a task of configs/tasks/ on synthetic data."""
    return [
        *("--config", "configs/demo.yaml", "--config", f"configs/tasks/{task}.yaml"),
        f"paths.data={root}",
        f"paths.checkpoint_path={write_encoder(folder / 'encoder.pt', size)}",
        f"paths.cache_dir={folder}/cache",
        f"paths.run_dir={folder}/run",
    ]


def test_laterality_is_told_by_an_encoder_that_sees_where_things_are(written, tmp_path, command):
    """Each eye is a row; both eyes of a person are in one split, and are drawn together."""
    arguments = of_phantom(written, tmp_path, "aireadi_laterality")
    result, said = trained_and_scored(command, tmp_path, arguments)
    assert result["balanced_accuracy"] > 0.9 and result["classes"] == ["left", "right"]
    assert result["n"] > result["participants"]
    assert f"{result['n']} eyes of {result['participants']} participants" in said
    with open(tmp_path / "run" / "predictions_test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    side_of = {(m["participant_id"], m["laterality"]) for m in triton(tables(written)[1])}
    for row in rows:
        side = "LR"[int(row["y_true"])]
        assert row["unit"] == f"{row['participant_id']} {side}"
        assert (row["participant_id"], side) in side_of
    other = command("eval.py", "--compare", tmp_path / "run", tmp_path / "run")
    assert other.returncode == 1  # and is no pair


@pytest.mark.slow
def test_the_default_task_laid_over_is_the_default(written, tmp_path, command):
    arguments = of_phantom(written, tmp_path, "aireadi_diabetes")
    result, _ = trained_and_scored(command, tmp_path, arguments)
    plain = [arguments[0], arguments[1], *arguments[4:]]
    again, _ = trained_and_scored(command, tmp_path, plain)
    assert {key for key in result if result[key] != again[key]} <= {
        *("run", "task", "checkpoint_sha256", "content_sha256")
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", ["aireadi_site", "aireadi_hba1c"])
def test_the_other_tasks_of_the_phantom(written, tmp_path, command, task):
    result, _ = trained_and_scored(command, tmp_path, of_phantom(written, tmp_path, task))
    people = {p["participant_id"]: p for p in tables(written)[0]}
    if task == "aireadi_site":
        truth = {i: ["UW", "UCSD", "UAB"].index(p["clinical_site"]) for i, p in people.items()}
    else:
        with open(written / "clinical_data" / "measurement.csv", newline="") as f:
            values = [r for r in csv.DictReader(f) if r["measurement_concept_id"] == "3004410"]
        truth = {
            r["person_id"]: int(np.digitize(float(r["value_as_number"]), [5.7, 6.5]))
            for r in values
        }
    with open(tmp_path / "run" / "predictions_test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(row["y_true"]) for row in rows] == [truth[row["participant_id"]] for row in rows]
    assert all(people[row["participant_id"]]["recommended_split"] == "test" for row in rows)
    assert len(result["classes"]) == 3 and not set(CLASSES) & set(result["classes"])


# -------------------------------------------------------------------------------- docs/your-own.md


@pytest.mark.slow
def test_the_ten_minutes_of_the_docs(tmp_path, monkeypatch, command):
    """Its code writes the scans; the example's task, as it is shipped, reads them."""
    document = content("docs/your-own.md")
    (tmp_path / "write.py").write_text(document.split("```python\n")[1].split("```")[0])
    subprocess.run([sys.executable, "write.py"], cwd=tmp_path, check=True)
    task = ["--config", "configs/demo.yaml", "--config", "configs/tasks/example_csv.yaml"]
    places = [f"demo.dir={tmp_path}/demo", f"paths.checkpoint_path={tmp_path}/demo/encoder.pt"]
    places += [f"paths.data={tmp_path}/my_scans", f"paths.cache_dir={tmp_path}/cache"]
    arguments = [*task, *places, f"paths.run_dir={tmp_path}/run"]
    result, said = trained_and_scored(command, tmp_path, arguments)
    assert result["classes"] == ["normal", "macular edema", "AMD"]
    assert result["balanced_accuracy"] > 0.8 and result["n"] == 9
