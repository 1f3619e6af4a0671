"""The map of the features: a planted batch effect is seen, as a number and in the figure."""

import csv
import dataclasses
import html
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CLASSES, DEMO, content, copy_of, every_kind, quick, tables, trained, triton
from matplotlib.colors import to_hex
from sklearn.metrics import silhouette_score

import config
import eval as evaluation
import feature_map
import features
import figures
import report
import results
import train

HOSTILE = "$A_$B <script>alert(1)</script>"
SITES = (HOSTILE, "_hidden", "UCSD")


@pytest.fixture(autouse=True)
def no_other_figures(monkeypatch):
    """They cost seconds, and are looked at by test_report.py."""
    monkeypatch.setattr(report, "write_plots", lambda *args: None)


def planted(folder, shift, participants=120, width=12):
    """Write a table of both eyes of each participant and a features.npz of these, in which the site
    moves every feature by `shift` standard deviations up or down, and nothing else does."""
    rng = np.random.default_rng(0)
    splits = np.resize(["train", "train", "train", "val", "test"], participants)
    sites, ages = rng.integers(0, 3, participants), rng.integers(40, 85, participants)
    header = ["participant_id", "study_group", "recommended_split", "clinical_site", "age"]
    rows = [
        [1000 + i, CLASSES[i % 4], splits[i], SITES[sites[i]], ages[i], f"{i}{eye}.npy", eye]
        for i in range(participants)
        for eye in "LR"
    ]
    folder.mkdir()
    with open(folder / "participants.tsv", "w", newline="") as f:
        table = csv.writer(f, delimiter="\t")
        table.writerows([[*header, "filepath", "laterality"], *rows])
    x = rng.standard_normal((len(rows), width)).astype(np.float32)
    x += shift * np.repeat(sites, 2)[:, None] * rng.choice([-1, 1], width)
    of = {"participant": [row[0] for row in rows], "filepath": [row[5] for row in rows]}
    np.savez(folder / "features.npz", x=x, **of)


def scored(folder, shift):
    """eval_test.json of a probe on `planted` features, and its folder."""
    planted(folder / "data", shift)
    given = ["model.emb_dim=null", "paths.checkpoint_path=null", "train.epochs=2"]
    given += [f"paths.features={folder}/data/features.npz", f"paths.cache_dir={folder}/cache"]
    given += ["data.manifest=null", "data.scanner=null", "data.columns.has_oct=null"]
    cfg = quick(folder / "data", folder, *given)
    train.main(0, cfg)
    evaluation.evaluate_run(cfg.paths.run_dir, "test")
    return results.read_result(cfg.paths.run_dir, "test"), folder / "run"


def page_of(run):
    """report.html as a reader has it, without tags but with the texts of pictures."""
    page = re.sub(r'data:image/svg[^"]*', "", content(run / "report.html"))
    return html.unescape(page)


class UMAP:
    """A stand-in for umap-learn's."""

    def __init__(self, **options):
        assert options["random_state"] is not None  # the same map every time

    def fit_transform(self, x):
        return x[:, [2, 1]]


def test_a_batch_effect_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    with every_kind():
        result, run = scored(tmp_path, shift=2)
    found = result["feature_map"]["colourings"]
    assert list(found) == ["class", "site", "eye", "age"]  # nothing tells scanners apart
    assert found["site"]["components"][0] > 0.8 and found["site"]["silhouette"] > 0.3
    for what in ("class", "eye", "age"):
        assert max(found[what]["components"]) < 0.2 and (found[what]["silhouette"] or 0) < 0.05
    for name in ("features_test", "umap_test"):
        for kind in ("png", "svg", "pdf"):
            assert (run / f"plots/{name}.{kind}").stat().st_size > 1000
    page, share = page_of(run), f"{found['site']['components'][0]:.0%}"
    assert f"site: {share} of PC1" in page and f'<td data-label="PC1">{share}</td>' in page
    assert "144 points of 72 participants of train" in page
    assert "Points of test are outlined" in page and "by UMAP" in page
    picture = content(run / "plots/features_test.svg")
    assert html.escape(HOSTILE, quote=False)[-12:] in picture and "<script" not in picture
    assert "hidden" in picture  # matplotlib leaves out what begins with _


# ----------------------------------------------------------------------------- features of volumes


def eyes(root, splits):
    """{split: number of eyes with a volume}, read without the project."""
    people, manifest = tables(root)
    split_of = {person["participant_id"]: person["recommended_split"] for person in people}
    found = {(row["participant_id"], row["laterality"]) for row in triton(manifest)}
    return {split: sum(split_of[person] == split for person, _ in found) for split in splits}


def test_a_frozen_encoders_map_has_every_eye(written, tmp_path, monkeypatch):
    run = copy_of(trained(written, "train.epochs=3"), tmp_path)
    asked, encode = [], features.encode
    monkeypatch.setattr(features, "encode", lambda *a, **k: asked.append(a[2]) or encode(*a, **k))
    result, _ = evaluation.evaluate_run(run, "test")
    points = {name: of["points"] for name, of in result["feature_map"]["splits"].items()}
    assert points == eyes(written, ["train", "val", "test"])
    assert [{s.split for s in samples} for samples in asked] == [{"test"}]  # and nothing else


def test_what_is_not_in_the_cache_is_not_encoded_for_a_map(written, tmp_path):
    run = copy_of(trained(written, "train.epochs=3"), tmp_path)
    result, _ = evaluation.evaluate_run(run, "val", [f"paths.cache_dir={tmp_path}/empty"])
    points = {name: of["points"] for name, of in result["feature_map"]["splits"].items()}
    assert points == {"train": 0} | eyes(written, ["val"])
    assert "the map is of val alone" in page_of(tmp_path / "run")


def test_without_umap_an_earlier_map_of_it_goes(tmp_path, monkeypatch):
    mapped = map_of(["a", "b"] * 10)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    feature_map.write(tmp_path, "val", dataclasses.replace(mapped, components=np.ones((20, 3))))
    assert (tmp_path / "plots/umap_val.svg").exists()
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    feature_map.write(tmp_path, "val", mapped)
    assert not list(tmp_path.glob("plots/umap*")) and (tmp_path / "plots/features_val.svg").exists()


# ------------------------------------------------------------------------------------- the numbers


def test_components_are_those_of_a_singular_value_decomposition():
    rng = np.random.default_rng(0)
    x, is_train = rng.standard_normal((60, 7)) * np.arange(1, 8), np.arange(60) < 40
    components, variance = feature_map.principal_components(x, is_train)
    centre = x[is_train].mean(axis=0)
    _, singular, directions = np.linalg.svd(x[is_train] - centre, full_matrices=False)
    expected = (x - centre) @ directions.T
    assert np.abs(np.abs(components) - np.abs(expected)).max() < 1e-9
    assert variance == pytest.approx(singular**2 / (singular**2).sum())


@pytest.mark.parametrize("x", [np.zeros((9, 4)), np.ones((2, 4)), np.arange(9.0)[:, None]])
def test_what_has_no_two_components_has_no_map(x):
    assert feature_map.principal_components(x, np.ones(len(x), bool)) == (None, None)


def test_numbers_are_those_of_a_regression():
    rng = np.random.default_rng(1)
    groups, ages = rng.choice(["a", "b", "c"], 200), rng.uniform(40, 80, 200)
    components = rng.standard_normal((200, 4))
    components[:, 1] += groups == "b"
    components[:, 2] += ages / 20

    def r2(design):
        design = np.column_stack([np.ones(200), design])
        fitted = design @ np.linalg.lstsq(design, components, rcond=None)[0]
        plain = fitted.var(axis=0) / components.var(axis=0)
        return np.maximum(0, 1 - (1 - plain) * 199 / (200 - design.shape[1]))

    found = feature_map.measured(components, groups)
    of_groups = np.column_stack([groups == "b", groups == "c"])
    assert found["components"] == pytest.approx(r2(of_groups))
    assert found["silhouette"] == pytest.approx(silhouette_score(components[:, :2], groups))
    of_ages = feature_map.measured_by_age(components, ages)
    assert of_ages["components"] == pytest.approx(r2(ages))


# -------------------------------------------------------------------------------------- the figure


def map_of(values, **changes):
    """A Map of as many random points, of which every third is of test."""
    n, rng = len(values), np.random.default_rng(2)
    splits = np.where(np.arange(n) % 3, "train", "test")
    found = {"variance": [0.5, 0.2], "colourings": {"site": None}}
    mapped = feature_map.Map(
        rng.standard_normal((n, 2)),
        splits,
        {"site": np.array(values)},
        np.full(n, np.nan),
        (),
        "test",
        found,
    )
    return dataclasses.replace(mapped, **changes)


def points_of(figure):
    """[(has a black outline, number of points)] of the first panel."""
    black = lambda drawn: [to_hex(c) for c in drawn.get_edgecolors()] == ["#000000"]
    return [(black(drawn), len(drawn.get_offsets())) for drawn in figure.axes[0].collections]


def test_the_scored_split_is_outlined():
    mapped = map_of(["a", "b", "c"] * 10)
    figure = feature_map.draw(mapped, mapped.components, ["PC1", "PC2"])
    outlined = [
        sum(n for is_black, n in points_of(figure) if is_black == wanted)
        for wanted in (True, False)
    ]
    assert outlined == [10, 20]


def test_many_sites_are_others_and_points_without_one_are_unknown():
    values = [f"site {k:02d}" for k in range(12) for _ in range(20 - k)] + [""] * 5
    mapped = map_of(values)
    figure = feature_map.draw(mapped, mapped.components, ["PC1", "PC2"])
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == [*(f"site {k:02d}" for k in range(7)), "others", "unknown"]
    assert sum(n for _, n in points_of(figure)) == len(values)
    assert figure.get_figwidth() <= figures.WIDTH


def test_a_large_map_is_a_small_file():
    mapped = map_of(["a", "b"] * 2000)
    figure = feature_map.draw(mapped, mapped.components, ["PC1", "PC2"])
    assert len(figures.picture(figure, "svg")) < 300_000


def test_points_that_differ_in_nothing_have_no_map():
    """Test of one class alone, a table without site, eye and age, and no features of training."""
    alike = {
        "split": "test",
        "label": 0,
        "laterality": "",
        "manifest": {},
        "path": "a.npy",
        "site": "",
    }
    samples = [SimpleNamespace(unit=str(i), participant_id=str(i), **alike) for i in range(9)]
    rows = [SimpleNamespace(unit=s.unit, site="", age="") for s in samples]
    book = SimpleNamespace(of=lambda split: [], rows=rows, classes=CLASSES, facts={})
    found = features.Features(samples, torch.randn(9, 128))
    opened = SimpleNamespace(saved={"train_participants": []}, cfg=config.load(DEMO))
    mapped, [note] = feature_map.examine(opened, book, found, None, None)
    assert mapped is None and "nothing is known in which its points differ" in note
