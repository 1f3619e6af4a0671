"""What could be known without the eye: the covariate floor, the band within site and age, what the
eye adds, what the features know; through the commands too."""

import csv
import json
import shutil

import numpy as np
import pytest
from helpers import (
    COUNTS,
    TINY,
    content,
    copy_of,
    draw_people,
    edit,
    evaluate,
    quick,
    settings,
    trained,
)
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import config
import confounding
import ledger
import metrics
import phantom
import report
import shortcuts
from labels import covariate_columns

ROLES = {"age": "age", "site": "site"}


def some_people(seed, count=200, confounded=True):
    return draw_people(np.random.default_rng(seed), [count // 4] * 4, 0.9, confounded)


# ------------------------------------------------------------------------------------- the floor


def test_the_floor_is_a_logistic_regression_of_scaled_age_and_sites():
    y, table, _, _ = some_people(0)
    y_val, val, _, _ = some_people(1)
    floor = confounding.fit_floor(ROLES, table, y, val, y_val)
    age = np.array([float(row["age"]) for row in table])

    def design(rows):
        ages = (np.array([float(row["age"]) for row in rows]) - age.mean()) / age.std()
        return np.c_[
            ages, [[row["site"] == name for name in ("UAB", "UCSD", "UW")] for row in rows]
        ]

    fits = {
        C: LogisticRegression(C=C, class_weight="balanced", tol=1e-8, max_iter=10_000)
        .fit(design(table), y)
        .predict_proba(design(val))
        for C in confounding.STRENGTHS
    }
    assert np.abs(floor.p(val) - fits[floor.C]).max() < 1e-3
    score = {C: metrics.score(y_val, p, 4)["balanced_accuracy"] for C, p in fits.items()}
    assert score[floor.C] == max(score.values())


def test_a_missing_number_is_the_mean_and_an_indicator():
    """Whose age is missing is told by that alone: here, all of them are of class 3."""
    y, table, _, _ = some_people(0)
    for row, label in zip(table, y):
        row["age"] = "NA" if label == 3 else row["age"]
    floor = confounding.fit_floor({"age": "age"}, table, y, table, y)
    p = floor.p([{"age": "NA"}, {}, {"age": "60"}])
    assert (p[:2].argmax(axis=1) == 3).all() and p[2].argmax() != 3
    assert np.array_equal(p[0], p[1])


def test_a_category_that_training_lacks_says_nothing_and_is_named():
    y, table, _, _ = some_people(0)
    floor = confounding.fit_floor({"site": "site"}, table, y, table, y)
    others = [{"site": "Graz"}, {"site": "UW"}]
    assert np.ptp(floor.p(others)[0]) < np.ptp(floor.p(others)[1])
    assert confounding.oddities(floor, table, others) == [
        "values of covariate site are not in training, and say nothing: Graz"
    ]


def test_a_column_of_numbers_is_one_unless_a_text_is_in_it():
    y, table, _, _ = some_people(0)
    for i, row in enumerate(table):
        row |= {"bmi": str(20 + i / 10), "code": f"{i}" if i else "none of these"}
    floor = confounding.fit_floor({"bmi": None, "code": None, "site": "site"}, table, y, [], [])
    assert floor.columns == {"bmi": True, "code": False, "site": False} and floor.C == 1
    odd = confounding.oddities(floor, table, [{"bmi": "thin", "code": "1", "site": ""}])
    assert odd[0] == "values of covariate bmi are no numbers, and count as missing: thin"
    because = ", for 'none of these' is no number"
    assert odd[1] == f"covariate code has 200 different values, each a category{because}"


# --------------------------------------------------------------------------- within site and age


def slowly_within(y, p, groups, people, draws=4000):
    """The band by a loop that moves whole participants within their group."""
    rng, answers, found = np.random.default_rng(5), p.argmax(axis=1), []
    first = {person: i for i, person in reversed(list(enumerate(people)))}
    for _ in range(draws):
        label_of = {}
        for group in set(groups):
            members = [person for person, i in first.items() if groups[i] == group]
            labels = rng.permutation([y[first[person]] for person in members])
            label_of |= dict(zip(members, labels))
        labels = np.array([label_of[person] for person in people])
        found.append(np.mean([(answers[labels == k] == k).mean() for k in np.unique(y)]))
    return np.percentile(found, [2.5, 97.5])


def test_the_band_within_groups_is_that_of_a_slow_permutation():
    y, table, _, known = some_people(3, 120)
    groups, eyes = [row["site"] for row in table], np.arange(120).repeat(2)
    both = [groups[i] for i in eyes]
    band = confounding.within(y[eyes], known[eyes], both, [f"P{i}" for i in eyes])
    expected = slowly_within(y[eyes], known[eyes], both, [f"P{i}" for i in eyes])
    assert band == pytest.approx(expected, abs=0.012)
    assert confounding.within(y, known, groups) == pytest.approx(band)  # an eye twice is no more


def test_within_one_group_the_band_is_the_chance_band():
    y, _, _, known = some_people(4)
    chance = metrics.evaluate(y, known, 4)["chance_band"]
    assert confounding.within(y, known, ["all"] * len(y)) == pytest.approx(chance)


def test_groups_of_one_size_are_permuted_each_in_its_own_way():
    """With the same permutation in both, two groups of two would agree in every draw."""
    y, p = np.array([0, 1] * 20), np.eye(2)[[0, 1] * 20]
    band = confounding.within(y, p, np.arange(20).repeat(2).astype(str))
    assert band == pytest.approx([0.3, 0.7], abs=0.06)  # of 20 coins


def test_ages_are_parted_by_their_quartiles():
    ages = [str(age) for age in range(40, 60)]
    quarters = confounding.quarters([*ages, "", "NA"])
    assert quarters == [q for q in "0123" for _ in range(5)] + ["unknown"] * 2
    assert confounding.quarters(["10", "90"], ages) == ["0", "3"]


def test_what_knows_the_site_alone_is_within_the_band_and_what_sees_the_eye_is_not():
    y, table, eye, known = some_people(6, 160)
    ages = confounding.quarters([row["age"] for row in table])
    groups = [f"{row['site']} {age}" for row, age in zip(table, ages)]
    score = lambda p: metrics.score(y, p, 4)["balanced_accuracy"]
    assert metrics.evaluate(y, known, 4)["chance_band"][1] < score(known)
    assert score(known) <= confounding.within(y, known, groups)[1]
    assert score(eye) > confounding.within(y, eye, groups)[1]


# ---------------------------------------------------------------------------- what the eye adds


@pytest.mark.parametrize("even", [False, True])
def test_the_pool_of_two_classes_is_a_logistic_regression_of_the_logits(even):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat([0, 1], (300, 100)))
    logits = rng.normal(2 * y[:, None] - 1, [1, 3], (400, 2))
    parts = [np.c_[-logits[:, j], logits[:, j]] / 2 for j in range(2)]
    parts = [softmax(part, axis=1) for part in parts]
    weights, bias = confounding.fit_pool(y, parts, even=even)
    expected = LogisticRegression(C=1e9, class_weight="balanced" if even else None, tol=1e-9)
    expected.fit(logits, y)
    assert weights == pytest.approx(expected.coef_[0], rel=0.03)
    assert bias[1] - bias[0] == pytest.approx(expected.intercept_[0], rel=0.05, abs=0.02)
    p = confounding.pool(parts, weights, bias)[:, 1]
    assert np.abs(p - expected.predict_proba(logits)[:, 1]).max() < 0.02


def test_noise_adds_nothing_and_the_eye_does():
    """Noise that validation chose as the best of 100, as it chooses heads and epochs."""
    said = {"noise": 0, "eye": 0}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        val, test = (draw_people(rng, COUNTS[name], 0.9, True) for name in ("val", "test"))
        p = softmax(rng.normal(size=(100, len(val[0]), 4)), axis=2)
        best = p[np.argmax(metrics.quick_scores(val[0], p)[0])]
        other = softmax(rng.normal(size=(len(test[0]), 4)), axis=1)
        for name, runs in (("noise", (best, other)), ("eye", (val[2], test[2]))):
            known = [(part[0], part[3], run, None) for part, run in zip((val, test), runs)]
            found = confounding.what_the_eye_adds(*known)["log_loss"]
            said[name] += found["difference"] > 0 and found["p_value"] < 0.05
    assert said["noise"] <= 4 and said["eye"] >= 17  # 4 or less in 98 %, were the rate 5 %


@pytest.mark.parametrize(
    "gain, p_value, yet", [(0.1, 0.01, True), (0.1, 0.2, False), (-0.1, 0.01, False)]
)
def test_the_alarm_says_where_the_eye_adds_to_what_is_as_good(gain, p_value, yet):
    floor = {"columns": ["age"], "balanced_accuracy": 0.47, "difference": 0.03, "p_value": 0.3}
    floor["adds"] = {"log_loss": {"difference": gain, "p_value": p_value}}
    [alarm] = confounding.alarms({"balanced_accuracy": 0.5, "covariates": floor})
    said = "not shown to be better than age alone: balanced accuracy 0.500 against 0.470, p = 0.300"
    assert alarm == said + ("; yet it adds to them, p = 0.0100" if yet else "")


def test_the_difference_in_log_loss_is_the_mean_over_the_classes():
    y, _, eye, known = some_people(0)
    gain = np.log(eye[np.arange(200), y]) - np.log(known[np.arange(200), y])
    found = confounding.mean_over_classes(y, gain, None)
    assert found["difference"] == pytest.approx(np.mean([gain[y == k].mean() for k in range(4)]))
    error = np.sqrt(np.mean([gain[y == k].var(ddof=1) / 50 for k in range(4)]) / 4)
    assert np.ptp(found["ci95"]) == pytest.approx(2 * 1.96 * error, rel=0.1)


# ------------------------------------------------------------------------- what the features know


def test_a_probe_finds_what_is_planted_and_no_more():
    rng = np.random.default_rng(0)
    samples = [
        ledger.Sample(str(i // 2), "train", 0, f"site {i // 2 % 3}", "RL"[i % 2], f"{i}.npy")
        for i in range(240)
    ]
    sites = np.array([int(s.site[-1]) for s in samples])
    x = rng.normal(size=(240, 8)).astype(np.float32)
    x[:, 0] += 6 * sites  # and nothing of the eye
    x, texts = shortcuts.torch.from_numpy(x), {"site": [s.site for s in samples]}
    texts["eye"] = [s.laterality for s in samples]
    found = {}
    for what, of_volumes in (("site", False), ("eye", True)):
        learned, scored = (
            (samples[part], texts[what][part]) for part in (slice(160), slice(160, 240))
        )
        found[what] = shortcuts.probe(learned, x[:160], scored, x[160:], of_volumes)
    assert found["site"]["balanced_accuracy"] > 0.95 and found["site"]["n"] == 40
    assert found["site"]["chance"] == pytest.approx(1 / 3)
    assert found["eye"]["n"] == 80 and found["eye"]["ci95"][0] < 0.5 < found["eye"]["ci95"][1]


# ----------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """given(confounded) -> a folder with a finished run, on features that show the site and the
    eye's own class, but in `confounded` the site alone; two eyes each. Site and age tell of the
    class there, and do not in the other."""
    made = {}

    def make(confounded):
        if confounded in made:
            return made[confounded]
        folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(1)
        rows, x = [], []
        for split, counts in COUNTS.items():
            counts = [c // 4 for c in counts] if split == "train" else counts
            y, table, _, _ = draw_people(rng, counts, 0, confounded)
            for label, about in zip(y, table):
                pid = 1000 + len(rows) // 2
                shown = [about["site"] == "UW", about["site"] == "UCSD"]
                shown += [0 if confounded else label]
                for side in "LR":
                    name = f"{pid}_{side}.npy"
                    where = about["site"], about["age"], "" if pid % 7 == 0 else "FM"[pid % 2]
                    rows.append([pid, f"c{label}", split, name, side, *where])
                    x.append(np.r_[np.array(shown), side == "L", np.zeros(12)] * 2)
        x = np.array(x) + 0.7 * rng.normal(size=(len(x), 16))
        with open(folder / "labels.csv", "w", newline="") as f:
            f.write("participant_id,label,split,file,eye,site,age,sex\n")
            csv.writer(f).writerows(rows)
        people, names = [str(row[0]) for row in rows], [row[3] for row in rows]
        np.savez(folder / "x.npz", participant=people, filepath=names, x=x.astype(np.float32))
        (folder / "config.yaml").write_text(f"""
base: {phantom.__file__.replace("phantom.py", "configs/probe.yaml")}
paths: {{data: {folder}, checkpoint_path: null, features: {folder}/x.npz, run_dir: {folder}/run}}
data:
  labels: labels.csv
  manifest: null
  columns: {{label: label, split: split, file: file, eye: eye, site: site, sex: sex, has_oct: null}}
  classes: [c0, c1, c2, c3]
model: {{emb_dim: null}}
train: {{sweep: null, epochs: 8, warmup_epochs: 1}}
log: {{wandb: disabled}}
""")
        made[confounded] = folder
        return folder

    return make


def scored(folder, command, split="test", *overrides):
    """What eval.py prints and writes of the run of a folder."""
    if not (folder / "run").exists():
        assert command("train.py", "--config", folder / "config.yaml").returncode == 0
    job = command("eval.py", "--ckpt", folder / "run", "--split", split, *overrides)
    assert job.returncode == 0, job.stderr
    return job.stdout, json.loads(content(folder / f"run/eval_{split}.json"))


def test_a_shortcut_by_site_is_named(given, command):
    said, result = scored(given(True), command, "test", "eval.probes=true")
    assert result["balanced_accuracy"] > result["chance_band"][1]
    assert "ALARM: not shown to be better than age, site and sex alone" in said
    assert "is not above the chance band within site and quarter of age" in said
    assert result["covariates"]["adds"]["log_loss"]["p_value"] > 0.05
    low, high = result["within"]["band"]
    assert f"within site and quarter of age {low:.3f} to {high:.3f}" in said
    assert result["knows"]["site"]["balanced_accuracy"] > 0.9
    assert result["knows"]["eye"]["balanced_accuracy"] > 0.9
    assert "eval.probes: scanner is left out, for training has nothing of it" in said
    assert "age, site and sex alone" in content(given(True) / "run/report.html")


def test_a_real_effect_raises_neither_alarm(given, command):
    said, result = scored(given(False), command)
    assert "alone: balanced accuracy" not in said and "chance band within" not in result["alarms"]
    assert result["alarms"] == []
    adds = result["covariates"]["adds"]
    assert all(adds[name]["p_value"] < 0.05 for name in ("log_loss", "balanced_accuracy"))
    assert result["covariates"]["columns"] == ["age", "site", "sex"] and "knows" not in result
    assert abs(np.array(result["label_shift"]["estimated"]) - 0.25).max() < 0.15


def test_validations_score_is_that_of_the_best_of_many(given, command):
    said, result = scored(given(False), command, "val")
    assert "(chosen on this split: no interval; chance band" in said
    assert "label_shift" not in result and "adds" not in result["covariates"]
    low, high = result["ci95"]["balanced_accuracy"]
    page = content(given(False) / "run/report.html").partition("<h2>val</h2>")[2]
    for text in (said, page.partition("<h2>Training</h2>")[0]):
        assert f"{low:.3f} to {high:.3f}" not in text


def test_runs_are_compared_on_validation_without_intervals_of_their_scores(
    given, command, tmp_path
):
    _, result = scored(given(False), command, "val")
    runs = [shutil.copytree(given(False) / "run", tmp_path / name) for name in "ab"]
    interval = report.span(result["ci95"]["balanced_accuracy"])
    for what in ("--compare", "--leaderboard"):
        said = command("eval.py", what, *runs, "--split", "val").stdout
        assert "Head and epoch were chosen on this split" in said and interval not in said
    assert interval not in content(tmp_path / "leaderboard.csv")


def test_the_covariates_may_be_others_or_none_when_a_run_is_scored(given, command):
    said, result = scored(given(False), command, "test", "eval.covariates=[]")
    assert "covariates" not in result and "within" in result and "sex alone" not in said
    _, result = scored(given(False), command, "test", "eval.covariates=[sex]")
    assert result["covariates"]["columns"] == ["sex"]


def test_a_column_that_is_not_there_is_named(given, command):
    folder = given(False)
    scored(folder, command)
    job = command("eval.py", "--ckpt", folder / "run", "eval.covariates=[weight]")
    assert job.returncode == 1
    assert (
        "eval.covariates: no column 'weight' in" in job.stderr
        and "found participant_id, la" in (job.stderr)
    )


@pytest.mark.parametrize("column, role", [("label", "label"), ("participant_id", "participant")])
def test_a_covariate_that_is_the_answer_is_refused(given, command, column, role):
    job = command(
        "train.py", "--config", given(False) / "config.yaml", f"eval.covariates=[{column}]"
    )
    assert f"has '{column}', which is data.columns.{role}; leave it out" in job.stderr


def test_several_values_of_a_participant_are_noted(given, tmp_path):
    """In a table with a row per volume, here with a birthday between the two eyes."""
    folder = given(False)
    header, first, *rest = content(folder / "labels.csv").splitlines()
    cells = first.split(",")
    cells[6] = "39.5"
    (tmp_path / "labels.csv").write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
    cfg = config.load(folder / "config.yaml", [f"data.labels={tmp_path}/labels.csv"])
    book = ledger.read(cfg)
    note = "eval.covariates: 1 participants have several values of age, and the first is used: 1000"
    assert note in book.notes and book.rows[0].covariates["age"] == "39.5"


def test_the_label_is_no_covariate_by_default(written, tmp_path):
    files = ["configs/demo.yaml", "configs/tasks/aireadi_site.yaml"]
    assert covariate_columns(config.load(files)) == {"age": "age"}
    cfg = quick(written, tmp_path, "data.columns.label=clinical_site", "data.classes=[UW,UCSD,UAB]")
    assert covariate_columns(cfg) == {"age": "age"}
    assert confounding.groups_of(cfg, ledger.read(cfg).rows)[1] == "quarter of age"


def test_other_data_have_no_floor_and_say_so(written, tmp_path):
    """Data of other participants: nobody of training is in these tables."""
    run = copy_of(trained(written), tmp_path)
    other = tmp_path / "other"
    phantom.write_dataset(other, participants=40, seed=9, scale=(1 / 16,) * 3, processes=1)
    rename = lambda text: (
        "\n".join("9" + line if line[0].isdigit() else line for line in text.split("\n") if line)
        + "\n"
    )
    edit(other / "participants.tsv", rename)
    edit(other / "retinal_oct/manifest.tsv", rename)
    result, _ = evaluate(run, "test", [f"paths.data={other}", "eval.probes=true"])
    assert "covariates" not in result and "knows" not in result
    notes = " ".join(result["notes"])
    assert "covariates: no floor, for these tables lack training's participants" in notes
    assert "eval.probes: these tables have none of training's participants" in notes


@pytest.mark.slow
@pytest.mark.parametrize("effect, alarms", [("confounded", 2), ("boosted", 0)])
def test_the_phantoms_say_which_effect_is_in_the_eye(tmp_path, command, effect, alarms):
    root = tmp_path / "data"
    phantom.write_dataset(root, participants=200, effect=effect, scale=(1 / 16,) * 3, processes=2)
    shipped = f"configs/demo{'_confounded' if effect == 'confounded' else ''}.yaml"
    more = [o for o in settings(root, tmp_path) if "epochs" not in o]
    assert (
        command("train.py", "--config", shipped, *more, f"paths.checkpoint_path={TINY}").returncode
        == 0
    )
    job = command("eval.py", "--ckpt", tmp_path / "run", "eval.probes=true")
    assert job.returncode == 0, job.stderr
    result = json.loads(content(tmp_path / "run/eval_test.json"))
    named = [a for a in result["alarms"] if "clinical_site alone" in a or "band within site" in a]
    assert len(named) == alarms and result["balanced_accuracy"] > result["chance_band"][1]
    assert (result["knows"]["site"]["balanced_accuracy"] > 0.8) == bool(alarms)
