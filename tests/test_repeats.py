import contextlib
import csv
import functools
import io
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    DEMO,
    copy_of,
    edit,
    evaluate,
    features_of,
    quick,
    read_predictions,
    read_run,
    trained,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import config
import features
import heads
import ledger
import repeats
import report
import runs
import train

GRID = {"lr_head": [0.003, 0.03], "weight_decay": [0.01, 3.0], "ordinal": [False, True]}
SWEPT = [
    "train.epochs=12",
    *(f"train.sweep.{name}={json.dumps(values)}" for name, values in GRID.items()),
]


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture()
def fits(monkeypatch):
    """The Features of train and of val of every call of train.fit."""
    calls, fit = [], train.fit

    def note(cfg, seed, train_set, val_set, *args, **named):
        calls.append((train_set, val_set))
        return fit(cfg, seed, train_set, val_set, *args, **named)

    monkeypatch.setattr(train, "fit", note)
    return calls


# ---------------------------------------------------------------------------------------- a sweep


def test_validation_chooses(written):
    folder = trained(written, *SWEPT)
    rows = rows_of(f"{folder}/run/sweep.csv")
    assert [row["chosen"] for row in rows] == ["True"] + ["False"] * 7


def test_a_sweep_says_how_many_heads_it_tried(written, tmp_path, capsys):
    train.main(0, quick(written, tmp_path, *SWEPT))
    assert "8 heads (network) on 58 volumes" in capsys.readouterr().out


def test_a_sweep_leaves_what_a_run_leaves_and_its_table(written):
    names = {"sweep.csv", "last.pt", "metrics.jsonl", "config.yaml", "provenance.json"}
    assert names | {"ledger.csv"} <= set(os.listdir(trained(written, *SWEPT) / "run"))


def test_eval_scores_the_chosen_head(written, tmp_path):
    run = copy_of(trained(written, *SWEPT), tmp_path)
    best = rows_of(f"{run}/sweep.csv")[0]
    before = read_predictions(f"{run}/predictions_val.csv")
    result, _ = evaluate(run, "val")
    assert np.abs(before[2] - read_predictions(f"{run}/predictions_val.csv")[2]).max() < 1e-6
    assert result["balanced_accuracy"] == pytest.approx(float(best["val_balanced_accuracy"]))
    assert result["log_loss"] == pytest.approx(float(best["val_loss"]), abs=1e-6)


def test_a_finished_sweep_is_left_as_it_is(written, tmp_path, capsys):
    run = copy_of(trained(written, *SWEPT), tmp_path)
    stamp = os.stat(f"{run}/sweep.csv").st_mtime_ns
    train.main(0, quick(written, tmp_path, *SWEPT, "train.resume=auto"))
    assert "holds this run, finished" in capsys.readouterr().out
    assert os.stat(f"{run}/sweep.csv").st_mtime_ns == stamp


def test_a_single_head_leaves_no_table_of_an_earlier_sweep(written, tmp_path):
    run = copy_of(trained(written, *SWEPT), tmp_path)
    train.main(0, quick(written, tmp_path, "train.epochs=12"))
    assert not os.path.exists(f"{run}/sweep.csv")


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "model.unfreeze_at_epoch=1",
            "train.sweep tries heads on the features of a frozen encoder, and this one is to "
            "train; set train.sweep=null",
        ),
        (
            "train.sweep.lr_head=0.1",
            "train.sweep.lr_head must be a list of values to try, .*, or null",
        ),
        ("train.sweep.loss=[hinge]", "train.sweep.loss must be .*one of ce, focal"),
        ("train.sweep.lr=[1]", "unknown key 'train.sweep.lr'"),
    ],
)
def test_a_sweep_needs_a_frozen_encoder_and_lists(override, message):
    with pytest.raises(ValueError, match=message):
        config.load(DEMO, [override])


def test_null_is_no_sweep():
    assert any(vars(config.load(DEMO).train.sweep).values())
    assert not any(vars(config.load(DEMO, ["train.sweep=null"]).train.sweep).values())
    cfg = config.load(DEMO, ["train.sweep=null", "model.unfreeze_at_epoch=1"])
    assert cfg.model.unfreeze_at_epoch == 1


# ------------------------------------------------------------------------------------------ seeds

TWO_RATES = "train.sweep.lr_head=[0.003,0.03]"
SEEDS = ["train.seeds=[5,6,7]", TWO_RATES]


@pytest.fixture(scope="module")
def alone(written, tmp_path_factory):
    """The configurations of three runs, each with a seed of its own."""
    folder = tmp_path_factory.mktemp("seeds")
    cfgs = [quick(written, folder / str(n), f"seed={n}", TWO_RATES) for n in (5, 6, 7)]
    for cfg in cfgs:
        train.main(0, cfg)
    return cfgs


def test_the_table_of_a_sweep_has_every_seed(written):
    rows = rows_of(f"{trained(written, *SEEDS)}/run/sweep.csv")
    assert [row["seed"] for row in rows] == ["5", "5", "6", "6", "7", "7"]
    assert sum(row["chosen"] == "True" for row in rows) == 3


def test_the_runs_head_is_that_of_the_first_seed(written, alone):
    mine = read_run(quick(written, trained(written, *SEEDS)))[1]["head"]
    expected = read_run(alone[0])[1]["head"]
    assert mine.keys() == expected.keys()
    assert all(torch.equal(p, mine[name]) for name, p in expected.items())


def test_a_run_says_how_much_its_seeds_vary(written, tmp_path, alone, capsys):
    train.main(0, quick(written, tmp_path, *SEEDS))
    values = [read_run(cfg)[1]["val_balanced_accuracy"] for cfg in alone]
    spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert f"over 3 seeds: val balanced accuracy {spread}" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["val", "test"])
def test_seeds_are_the_runs_that_they_would_be_alone(written, tmp_path, alone, split):
    scores = [evaluate(cfg.paths.run_dir, split)[0] for cfg in alone]
    result, _ = evaluate(copy_of(trained(written, *SEEDS), tmp_path), split)
    assert result["seeds"]["seeds"] == [5, 6, 7]
    assert result["balanced_accuracy"] == scores[0]["balanced_accuracy"]
    for name in ("balanced_accuracy", "log_loss"):
        values, spread = [score[name] for score in scores], result["seeds"][name]
        assert spread["each"] == pytest.approx(values)
        assert spread["mean"] == pytest.approx(np.mean(values))
        assert spread["sd"] == pytest.approx(np.std(values, ddof=1))


# ---------------------------------------------------------- the chosen head, on train and val

# every epoch is the start, which is chosen
STAYS = ["train.lr_head=0"], ["train.sweep.lr_head=[0]"]


def sets_of(cfg):
    """Features x (volumes, C) and samples of train and val, and those of test."""
    book, dev = ledger.read(cfg), torch.device("cpu")
    encoder = features.open_encoder(cfg)
    both = features.encode(cfg, book, book.of("train") + book.of("val"), encoder, dev)
    return both, features.encode(cfg, book, book.of("test"), encoder, dev)


@pytest.mark.parametrize("sweep", STAYS, ids=["one head", "a sweep"])
def test_a_chosen_start_is_refitted_on_both_and_scores_test_alone(written, tmp_path, sweep):
    folder = trained(written, *sweep, "train.epochs=2")
    cfg, run = quick(written, folder, *sweep), copy_of(folder, tmp_path)
    saved, (both, test) = read_run(cfg)[1], sets_of(cfg)
    assert saved["epoch"] == 0
    # the standardisation is of all volumes, and the head that of a run that trains on both
    assert torch.allclose(saved["refit"]["mean"], both.x.mean(dim=0), atol=1e-5)
    alone = heads.start(cfg, cfg.seed, both, 4)
    expected = heads.by_unit(test.samples, heads.predict(alone, test.x)[0])
    results = {split: evaluate(run, split)[0] for split in ("val", "test")}
    p = read_predictions(f"{run}/predictions_test.csv")[2]
    assert np.allclose(p, expected.p, atol=1e-5)
    assert [results[split]["refit"] for split in ("val", "test")] == [False, True]
    assert "(the start, before training, refitted on train and val)" in report.sentence(
        results["test"]
    )
    assert "refitted" not in report.sentence(results["val"])
    # validation is scored by the head that never saw it, and so the temperature is that one's
    before = read_predictions(f"{folder}/run/predictions_val.csv")[2]
    assert np.allclose(before, read_predictions(f"{run}/predictions_val.csv")[2], atol=1e-6)
    assert results["val"]["temperature"] == results["test"]["temperature"]


@pytest.mark.parametrize("kind", ["knn", "logistic_regression"])
def test_a_reference_is_refitted_with_the_k_or_c_that_validation_chose(written, tmp_path, kind):
    """Against scikit-learn, on train and val."""
    cfg = quick(written, tmp_path, f"model.head.kind={kind}", "train.class_weights=none")
    train.main(0, cfg)
    best, (both, test) = rows_of(f"{tmp_path}/run/sweep.csv")[0], sets_of(cfg)
    mean, std = both.x.mean(dim=0), (both.x.var(dim=0, unbiased=False) + 1e-6).sqrt()
    x, new = (((part.x - mean) / std).double().numpy() for part in (both, test))
    if kind == "knn":
        x, new = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, new))
        votes = lambda distance: np.exp((1 - distance**2 / 2) / 0.07)
        reference = KNeighborsClassifier(int(best["k"]), weights=votes)
    else:
        reference = LogisticRegression(C=float(best["C"]), max_iter=1000, tol=1e-6)
    p = reference.fit(x, both.labels.numpy()).predict_proba(new)
    result, _ = evaluate(cfg.paths.run_dir, "test")
    found = read_predictions(f"{cfg.paths.run_dir}/predictions_test.csv")[2]
    assert result["refit"] and np.allclose(found, heads.by_unit(test.samples, p).p, atol=1e-3)


@pytest.mark.parametrize(
    "more, what",
    [
        (["train.refit=false"], "switched off"),
        (["train.choose_by=balanced_accuracy"], "takes steps"),
        (["model.head.hidden=8"], "takes steps"),
        (["model.unfreeze_at_epoch=1", "train.lr_encoder=0"], "fine-tuning"),
    ],
)
def test_a_head_that_takes_steps_or_is_not_asked_for_is_not_refitted(
    written, tmp_path, capsys, more, what
):
    cfg = quick(written, tmp_path, *STAYS[0], "train.epochs=2", *more)
    train.main(0, cfg)
    assert "refit" not in read_run(cfg)[1]
    said = "no refit: this head takes steps to train" in capsys.readouterr().out
    assert said == (what == "takes steps")
    assert evaluate(cfg.paths.run_dir, "test")[0]["refit"] is False


def test_seeds_floors_and_folds_are_refitted_as_the_run_is(written, tmp_path):
    more = [*STAYS[1], "train.epochs=2", "train.seeds=[1,2]", "eval.floors=true", "data.cv=3"]
    cfg = quick(written, tmp_path, *more)
    train.main(0, cfg)
    saved = read_run(cfg)[1]
    for entry in [*saved["repeats"], *saved["floors"].values()]:
        assert not torch.equal(entry["refit"]["mean"], entry["head"]["mean"])
    result, _ = evaluate(cfg.paths.run_dir, "test")
    assert result["refit"] and len(set(result["seeds"]["balanced_accuracy"]["each"])) == 1
    # a fold is held out by a head that the other two fit
    ids, _, p = read_predictions(f"{cfg.paths.run_dir}/predictions_cv.csv")
    both, _ = sets_of(cfg)
    folds = rows_of(f"{cfg.paths.run_dir}/cv.csv")
    held = set(ids[: int(folds[0]["participants"])])
    others = [i for i, s in enumerate(both.samples) if s.participant_id not in held]
    own = [i for i, s in enumerate(both.samples) if s.participant_id in held]
    bank = heads.start(cfg, 1, both.rows(others), 4, [settings_of(folds[0])])
    found = heads.by_unit([both.samples[i] for i in own], heads.predict(bank, both.x[own])[0])
    mine = [p[ids.index(i)] for i in found.ids]
    assert np.allclose(found.p, mine, atol=1e-4)


def settings_of(row):
    """The settings in a row of sweep.csv or cv.csv."""
    numbers = {name: float(row[name]) for name in ("lr_head", "weight_decay")}
    texts = {name: row[name] for name in ("loss", "class_weights")}
    return numbers | texts | {"ordinal": row["ordinal"] == "True"}


def test_augmented_views_of_validation_are_there_for_the_refit(written, tmp_path, fits):
    more = ["data.augment.flip=true", "data.augment_views=2", "train.epochs=1", *STAYS[1]]
    cfg = quick(written, tmp_path, *more)
    train.main(0, cfg)
    assert [(a.views.shape[1], b.views.shape[1]) for a, b in fits] == [(3, 3)]
    assert "refit" in read_run(cfg)[1]


@pytest.mark.parametrize("refit, split, is_alarm", [(True, "test", True), (False, "test", False)])
def test_who_was_validated_and_refitted_on_counts_as_trained_on(
    written, dataset, tmp_path, refit, split, is_alarm
):
    """A validation participant whom the tables now have in test."""
    run = copy_of(
        trained(written, *STAYS[0], "train.epochs=2", f"train.refit={str(refit).lower()}"), tmp_path
    )
    saved = torch.load(f"{run}/{runs.BEST}", weights_only=True)
    saved["config"]["paths"]["data"] = str(dataset)
    torch.save(saved, f"{run}/{runs.BEST}")
    person = saved["val_predictions"]["participant_id"][0]
    move = lambda line: line.replace("\tval\t", "\ttest\t") if line.startswith(person) else line
    edit(dataset / "participants.tsv", lambda text: "".join(map(move, text.splitlines(True))))
    alarms = evaluate(run, split, [f"paths.data={dataset}"])[0]["alarms"]
    assert (f"1 participants of test were trained on: {person}" in alarms) == is_alarm


def test_validation_itself_raises_no_alarm_of_training(written, tmp_path):
    run = copy_of(trained(written, *STAYS[0], "train.epochs=2"), tmp_path)
    alarms = evaluate(run, "val")[0]["alarms"]
    assert not any("were trained on" in alarm for alarm in alarms)


# ------------------------------------------------------------------------------- cross-validation


@pytest.fixture(scope="module")
def folded(written, tmp_path_factory):
    """A run with three folds and two seeds: its configuration, the Features that every fit was
    given, the splits that were encoded, what it printed, and {participant: label} of train and
    val."""
    cfg = quick(written, tmp_path_factory.mktemp("cv"), "data.cv=3", "train.seeds=[1,2]")
    fitted, splits, printed = [], set(), io.StringIO()
    fit, encode = train.fit, features.encode

    def note_fit(cfg, seed, train_set, val_set, *args, **named):
        fitted.append((train_set, val_set))
        return fit(cfg, seed, train_set, val_set, *args, **named)

    def note_encode(cfg, book, samples, *args, **named):
        splits.update(s.split for s in samples)
        return encode(cfg, book, samples, *args, **named)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, "fit", note_fit)
        patch.setattr(features, "encode", note_encode)
        train.main(0, cfg)
    book = ledger.read(cfg)
    everybody = {s.participant_id: s.label for s in book.of("train") + book.of("val")}
    return cfg, fitted, splits, printed.getvalue(), everybody


def held_out_by(folded):
    """The participants whom each fold neither trained on nor chose by."""
    _, fitted, _, _, everybody = folded
    parts = [set(a.units) | set(b.units) for a, b in fitted[2:]]
    return [set(everybody) - part for part in parts]


def test_cross_validation_fits_every_fold_of_every_seed(folded):
    assert len(folded[1]) == 2 + 2 * 3  # the run's own, for each seed, and the folds


def test_cross_validation_never_touches_test(folded):
    assert folded[2] == {"train", "val"}


def test_cross_validation_holds_every_participant_out_once(folded):
    held, everybody = held_out_by(folded), set(folded[4])
    for of_seed in (held[:3], held[3:]):
        assert set.union(*of_seed) == everybody and sum(map(len, of_seed)) == len(everybody)
    assert held[:3] != held[3:]


def test_the_three_parts_of_a_fold_are_disjoint_and_have_all_volumes(folded):
    cfg, fitted, _, _, _ = folded
    book = ledger.read(cfg)
    volumes = Counter(s.participant_id for s in book.of("train") + book.of("val"))
    for trains, chooses in fitted[2:]:
        assert not set(trains.units) & set(chooses.units)
        assert len(trains.samples) == sum(volumes[i] for i in trains.units)


def test_every_class_is_spread_over_the_folds(folded):
    everybody = folded[4]
    for held in held_out_by(folded):
        for label in range(4):
            number = sum(k == label for k in everybody.values())
            mine = sum(everybody[i] == label for i in held)
            assert number // 3 <= mine <= -(-number // 3)


def test_predictions_of_cross_validation_are_of_everybody(folded):
    cfg, everybody = folded[0], folded[4]
    ids, y, _ = read_predictions(f"{cfg.paths.run_dir}/predictions_cv.csv")
    assert sorted(ids) == sorted(everybody) and [everybody[i] for i in ids] == y.tolist()


def test_the_score_of_a_fold_is_that_of_whom_it_held_out(folded):
    cfg = folded[0]
    ids, y, p = read_predictions(f"{cfg.paths.run_dir}/predictions_cv.csv")
    rows = rows_of(f"{cfg.paths.run_dir}/cv.csv")
    assert len(rows) == 6
    for row, held in list(zip(rows, held_out_by(folded)))[:3]:  # predictions are the first seed's
        mine = [n for n, i in enumerate(ids) if i in held]
        score = balanced_accuracy_score(y[mine], p[mine].argmax(axis=1))
        assert float(row["held_out_balanced_accuracy"]) == pytest.approx(score)
        assert int(row["participants"]) == len(held)


def test_a_run_says_what_cross_validation_came_to(folded):
    cfg, _, _, printed, everybody = folded
    _, y, p = read_predictions(f"{cfg.paths.run_dir}/predictions_cv.csv")
    score = balanced_accuracy_score(y, p.argmax(axis=1))
    assert (
        f"3-fold cross-validation, seed 1: balanced accuracy {score:.3f} on {len(everybody)} "
        "participants"
    ) in printed


def test_cross_validation_needs_every_class_in_every_fold(written, tmp_path):
    message = "data.cv=9 needs as many participants of every class in train and val"
    with pytest.raises(ValueError, match=message):
        train.main(0, quick(written, tmp_path, "data.cv=9"))


def test_cross_validation_trains_on_views_and_scores_without(written, tmp_path, fits):
    more = ["data.augment.flip=true", "data.augment_views=2", "train.epochs=2"]
    train.main(0, quick(written, tmp_path, "data.cv=3", *more))
    assert [(a.views.shape[1], b.x.ndim) for a, b in fits] == [(3, 2)] * 4


def test_a_head_learns_nothing_of_whom_it_is_scored_on(configure):
    """With labels at random, cross-validation falls to chance; choosing on the held-out fold would
    not."""
    cfg = configure(
        "/none",
        "model.emb_dim=128",
        "train.epochs=20",
        "train.sweep.lr_head=[0.001,0.01,0.1]",
        "train.sweep.weight_decay=[0.01,1]",
        "data.cv=3",
    )
    fit = functools.partial(train.fit, dev=torch.device("cpu"))
    rng, scores = np.random.default_rng(0), []
    for seed in range(6):
        y = rng.permutation(np.repeat(range(4), 40))
        everybody = features_of(rng.standard_normal((160, 128)).astype(np.float32), y)
        parts = everybody.rows(list(range(120))), everybody.rows(list(range(120, 160)))
        held = repeats.held_out(repeats.cross_validate(fit, cfg, [seed], *parts), seed)
        scores.append(balanced_accuracy_score(held.y_true, held.p.argmax(axis=1)))
    assert abs(np.mean(scores) - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 160 / 6), scores


# ----------------------------------------------------------------------------------------- floors


@pytest.fixture(scope="module")
def floored(written, tmp_path_factory):
    """A run with floors: its configuration, and the Features that the three fits were given."""
    cfg = quick(written, tmp_path_factory.mktemp("floors"), "eval.floors=true", TWO_RATES)
    fitted, fit = [], train.fit

    def note(cfg, seed, train_set, val_set, *args, **named):
        fitted.append((train_set, val_set))
        return fit(cfg, seed, train_set, val_set, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", note)
        train.main(0, cfg)
    return cfg, fitted


def labels_of(*parts):
    return [part.labels.tolist() for part in parts]


def test_a_floor_is_a_probe_on_a_random_encoder(floored):
    (mine, mine_val), (random, random_val), _ = floored[1]
    assert labels_of(mine, mine_val) == labels_of(random, random_val)
    assert mine.x.shape == random.x.shape and not torch.allclose(mine.x, random.x)


def test_a_floor_is_a_probe_on_shuffled_labels(floored):
    (mine, mine_val), _, (shuffled, shuffled_val) = floored[1]
    assert torch.equal(mine.x, shuffled.x)
    assert not torch.equal(mine.labels, shuffled.labels)
    assert not torch.equal(mine_val.labels, shuffled_val.labels)


def test_volumes_of_a_participant_keep_one_shuffled_label(floored):
    (mine, _), _, (shuffled, _) = floored[1]
    assert len({(s.participant_id, s.label) for s in shuffled.samples}) == len(mine.units)
    assert sorted(shuffled.units.values()) == sorted(mine.units.values())


@pytest.fixture(scope="module")
def scored(floored):
    """The result of the run with floors on test, twice."""
    return [evaluate(floored[0].paths.run_dir, "test")[0] for _ in range(2)]


def test_the_floors_of_a_result_are_compared_with_the_run(scored):
    result = scored[0]
    assert set(result["floors"]) == {"random encoder", "shuffled labels"}
    for floor in result["floors"].values():
        difference = result["balanced_accuracy"] - floor["balanced_accuracy"]
        assert 0 <= floor["balanced_accuracy"] <= 1
        assert floor["difference"] == pytest.approx(difference)


def test_a_floor_that_is_not_shown_to_be_worse_raises_an_alarm(scored):
    for name, floor in scored[0]["floors"].items():
        is_said = any(
            "not shown to be better" in alarm and name.split()[0] in alarm
            for alarm in scored[0]["alarms"]
        )
        assert is_said == (floor["p_value"] >= 0.05 or floor["difference"] <= 0)


def test_scoring_again_gives_the_same_floors(scored):
    assert scored[0] == scored[1]


def test_floors_need_a_frozen_encoder(configure):
    message = "eval.floors trains probes to compare with, and this encoder is to train"
    with pytest.raises(ValueError, match=message):
        configure("/none", "eval.floors=true", "model.freeze_encoder=false")


# ----------------------------------------------------------------------------- what means nothing


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["train.seeds=[1,2]", "model.freeze_encoder=false"],
            "train.seeds and data.cv repeat the head, on the features of a frozen encoder",
        ),
        (["data.cv=5", "model.unfreeze_at_epoch=1"], "train.seeds and data.cv repeat the head"),
        (
            ["model.head.kind=knn", "model.head.hidden=8"],
            "model.head.hidden=8 means nothing to model.head.kind=knn",
        ),
        (
            ["model.head.kind=knn", "model.pool_method=attentive"],
            "model.pool_method=attentive means nothing to model.head.kind=knn",
        ),
        (
            ["model.head.kind=logistic_regression", "train.loss=focal"],
            "train.loss=focal means nothing to model.head.kind=logistic_regression",
        ),
        (
            ["model.head.kind=logistic_regression", "train.seeds=[1,2]"],
            r"train.seeds=\[1, 2\] means nothing to",
        ),
        (
            ["model.head.kind=knn", "train.sweep.lr_head=[1]"],
            "train.sweep means nothing to model.head.kind=knn",
        ),
        (
            ["model.head.kind=knn", "model.freeze_encoder=false"],
            "model.head.kind=knn is for the features of a frozen encoder",
        ),
    ],
)
def test_what_means_nothing_is_refused(configure, overrides, message):
    with pytest.raises(ValueError, match=message):
        configure("/none", *overrides)
