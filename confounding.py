"""What could be known without the eye? The label from covariates alone, and the score within site
and age.

    floor = fit_floor(roles, table, labels, ...)   # logistic regression; floor.p(table)
    within(y, p, groups, people)                   # chance band, labels permuted within groups
    weights, bias = fit_pool(y, [p_a, p_b])        # how much does each prediction say?
    examine(opened, book, predictions, split)      # all of it of a run -> parts of eval_SPLIT.json

A model that knows the site and the age from a picture scores above the chance band wherever these
differ between the classes. In shapes, n is the number of rows, K of classes, R of resamples.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

import files
import intervals
import metrics
import resampling
from labels import MISSING, covariate_columns

STRENGTHS = np.logspace(-3, 3, 7)  # C that validation chooses from

# ------------------------------------------------------------------------- the label from a table


def number_in(text):
    """The number in a cell; NaN where it is missing, None where it is something else."""
    if text.casefold() in MISSING:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


@dataclass
class Floor:
    """Logistic regression of the label on columns of a table, {column: is it one of numbers?}."""

    columns: dict
    C: float
    model: object

    def p(self, table):
        """Probabilities (n, K) of rows, dicts of texts."""
        return self.model.predict_proba(cells(table, self.columns))


def cells(table, columns):
    """Rows as dicts of texts -> (n, columns): numbers (NaN: missing), and texts ("": missing)."""
    found = np.empty((len(table), len(columns)), dtype=object)
    for k, (column, is_number) in enumerate(columns.items()):
        texts = [row.get(column, "") for row in table]
        if is_number:
            values = map(number_in, texts)
            found[:, k] = [math.nan if value is None else value for value in values]
        else:
            found[:, k] = ["" if text.casefold() in MISSING else text for text in texts]
    return found


def fit_floor(roles, table, labels, val_table, val_labels):
    """The Floor of training's rows, dicts of texts, which must have every class; its C is the best
    on validation, by balanced accuracy and among equals by log-loss, as the run's head is.

    roles {column: "age", "site", "sex" or None}: ages are numbers, sites and sexes are not; another
    column is one of numbers where training has nothing else. A missing number is the mean of
    training, and an indicator says that it was missing; a missing text is a category of its own.
    Categories are indicators; one that training lacks is none of them.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    columns = {}
    for column, role in roles.items():
        values = [number_in(row.get(column, "")) for row in table]
        columns[column] = role == "age" or role is None and None not in values
    numbers = [k for k, is_number in enumerate(columns.values()) if is_number]
    others = [k for k, is_number in enumerate(columns.values()) if not is_number]
    fill = SimpleImputer(add_indicator=True, keep_empty_features=True)
    tried = []
    for C in STRENGTHS if len(val_table) else [1.0]:
        x = ColumnTransformer(
            [
                ("numbers", make_pipeline(fill, StandardScaler()), numbers),
                ("others", OneHotEncoder(handle_unknown="ignore", sparse_output=False), others),
            ]
        )
        model = make_pipeline(
            x, LogisticRegression(C=C, class_weight="balanced", max_iter=1000, tol=1e-6)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # close enough, for any C
            model.fit(cells(table, columns), labels)
        tried.append(Floor(columns, float(C), model))
    if len(tried) == 1:
        return tried[0]
    p = np.array([floor.p(val_table) for floor in tried])  # (C, n, K)
    scores = zip(*metrics.quick_scores(np.asarray(val_labels), p))
    keys = [(round(accuracy, 9), -loss) for accuracy, loss in scores]
    return tried[keys.index(max(keys))]


def oddities(floor, table, others):
    """What is odd about the columns of a Floor that was fitted on a table, in sentences. others:
    the rows that it is to predict."""
    found = []
    for column, is_number in floor.columns.items():
        values, new = ({row.get(column, "") for row in rows} for rows in (table, others))
        values, new = ({v for v in v_ if v.casefold() not in MISSING} for v_ in (values, new))
        if is_number:
            odd = sorted(value for value in new if number_in(value) is None)
            what = "are no numbers, and count as missing"
        else:
            odd, what = sorted(new - values), "are not in training, and say nothing"
            if len(values) > max(20, len(table) / 10):
                text = next((value for value in sorted(values) if number_in(value) is None), None)
                found.append(
                    f"covariate {column} has {len(values)} different values, each a category"
                    + (f", for '{text[:40]}' is no number" if text else "")
                )
        if odd:
            found.append(f"values of covariate {column} {what}: {files.first_few(odd)}")
    return found


# --------------------------------------------------------------------------- what the eye adds


def fit_pool(y, parts, even=False):
    """The log-linear pool of J predictions that suits y (n,) best -> weights (J,), bias (K,).

    parts: J arrays of probabilities (n, K); see `pool`. even: every class counts alike, however
    often it is there. With one prediction, it is the temperature scaling with a bias for each class
    of Alexandari et al. (2020). A slight ridge penalty keeps the solution finite where a prediction
    separates the classes.
    """
    logs = -metrics.negative_log(np.array(parts))  # (J, n, K)
    count, _, num_classes = logs.shape
    true = np.eye(num_classes)[y]  # (n, K)
    of_row = true / np.maximum(true.sum(axis=0), 1) if even else true / len(y)  # (n, K)
    of_row = of_row.sum(axis=1, keepdims=True) / of_row.sum()  # (n, 1)

    def loss(parameters):
        weights, bias = parameters[:count], parameters[count:]
        p = pooled(logs, weights, bias)
        value = (of_row * true * metrics.negative_log(p)).sum() + 5e-4 * (parameters**2).sum()
        slope = of_row * (p - true)  # (n, K), of the logits
        gradient = [*np.einsum("nk,jnk->j", slope, logs), *slope.sum(axis=0)]
        return value, np.array(gradient) + 1e-3 * parameters

    start = np.r_[np.full(count, 1 / count), np.zeros(num_classes)]
    parameters = minimize(loss, start, jac=True, method="L-BFGS-B", tol=1e-12).x
    return parameters[:count], parameters[count:]


def pooled(logs, weights, bias):
    """Log-probabilities (J, n, K) -> softmax of their weighted sum and the bias (n, K)."""
    logits = np.tensordot(weights, logs, 1) + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def pool(parts, weights, bias):
    """Other rows by what `fit_pool` found: softmax(weighted sum of log p + bias) (n, K)."""
    return pooled(-metrics.negative_log(np.array(parts)), weights, bias)


def what_the_eye_adds(validation, scored):
    """Does a model of covariates and run predict better than one of covariates alone? Both are
    `fit_pool` of validation, and scored on another split. -> dict of numbers.

    validation, scored: (y (n,), p of the covariates (n, K), p of the run (n, K), participants).
    Validation's rows trained neither of the two predictions, so a head that has memorised training
    gets the weight that it deserves. Validation chose the head, which can only make it look better
    there: it then gets too much weight, and the sum predicts the scored split worse.
    """
    y_val, floor_val, run_val, _ = validation
    y, floor, run, people = scored
    alone = pool([floor], *fit_pool(y_val, [floor_val], even=True))
    weights, bias = fit_pool(y_val, [floor_val, run_val], even=True)
    both, rows = pool([floor, run], weights, bias), np.arange(len(y))
    gain = metrics.negative_log(alone[rows, y]) - metrics.negative_log(both[rows, y])  # (n,)
    pair = metrics.compare(y, both, alone, people)
    return {
        "weight": float(weights[1]),
        "log_loss": mean_over_classes(y, gain, people),
        "balanced_accuracy": {
            "difference": pair["difference"],
            "ci95": pair["ci95"],
            "p_value": pair["p_value"],
        },
    }


def mean_over_classes(y, values, people):
    """The mean over the classes of the mean of values (n,) in each, with the 95 % interval and the
    two-sided p-value of a bootstrap over participants (Efron and Tibshirani 1993)."""
    means = resampling.means_of_classes(y, values[:, None], people)[:, 0]  # (1 + R, classes)
    mean, *resampled = np.nanmean(means, axis=1)
    resampled = np.array(resampled)
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return {
        "difference": float(mean),
        "ci95": intervals.percentiles(resampled),
        "p_value": float(min(1.0, 2 * (tail + 1) / (len(resampled) + 1))),
    }


# -------------------------------------------------------------------------- within site and age


def within(y, p, groups, people=None):
    """The chance band [low, high] of balanced accuracy when labels are permuted among the
    participants of a group alone (Chaibub Neto et al. 2018, arXiv 1805.07465).

    y (n,), p (n, K), groups (n,) of text, the same in all rows of a participant, people (n,). What
    a model owes to knowing the group is in the band.
    """
    y, people = np.asarray(y), np.arange(len(y)) if people is None else np.asarray(people)
    groups, rng, parts, order = np.asarray(groups), np.random.default_rng(0), [], []
    for group in np.unique(groups):
        inside = np.flatnonzero(groups == group)
        labels = resampling.permuted_labels(y[inside], people[inside])  # (R, rows of the group)
        # in another order, for groups of one size would all be permuted alike
        parts.append(labels[rng.permutation(len(labels))])
        order.append(inside)
    answers = p.argmax(axis=1)[np.concatenate(order)]
    permuted = np.concatenate(parts, axis=1)  # (R, n)
    return intervals.percentiles(resampling.accuracies_of_permuted(permuted, answers))


def quarters(ages, borders_of=None):
    """Texts of ages -> the quarter of each, "0" to "3", or "unknown". borders_of: the ages whose
    quartiles part them (default: the same)."""
    numbers, known = (
        np.array([np.nan if number_in(age) is None else number_in(age) for age in texts])
        for texts in (ages, ages if borders_of is None else borders_of)
    )
    known = known[~np.isnan(known)]
    borders = np.quantile(known, [0.25, 0.5, 0.75]) if len(known) else []
    quarter = np.searchsorted(borders, numbers, side="right")
    return [str(q) if age == age else "unknown" for q, age in zip(quarter, numbers)]


def groups_of(cfg, rows):
    """The site and the quarter of age of Rows -> (n,) of text, and what they are in words; None
    where the task knows neither, or is to predict both."""
    columns, parts, words = cfg.data.columns, [], []
    if columns.site not in (None, columns.label):
        parts.append([row.site for row in rows])
        words.append("site")
    if columns.age not in (None, columns.label):
        parts.append(quarters([row.age for row in rows]))
        words.append("quarter of age")
    return [" / ".join(names) for names in zip(*parts)] or None, " and ".join(words)


# ---------------------------------------------------------------------------------------- a run


def examine(opened, book, predictions, split):
    """-> parts of eval_SPLIT.json: "within" (the band and what the labels were permuted within),
    "covariates" (the floor and what the eye adds to it), as far as the tables tell; and notes, why
    something is left out."""
    row_of = {row.unit: row for row in book.rows}
    found, notes = {}, []
    groups, words = groups_of(opened.cfg, [row_of[i] for i in predictions.ids])
    if groups:
        y, p, people = predictions.y_true, predictions.p, predictions.participants
        found["within"] = {"groups": words, "band": within(y, p, groups, people)}
    roles = covariate_columns(opened.cfg)
    if roles:
        covariates = score_covariates(opened, book, row_of, roles, predictions, split, notes)
        found |= {"covariates": covariates} if covariates else {}
    return found, notes


def score_covariates(opened, book, row_of, roles, predictions, split, notes):
    """The "covariates" of `examine`, or None, with the reason in notes."""
    from sklearn.base import clone

    y, p, people = predictions.y_true, predictions.p, predictions.participants
    trained = [row_of[i] for i in opened.saved["train_participants"] if i in row_of]
    val = [row for row in book.rows if row.split == "val" and row.status == "used"]
    if {row.label for row in trained} != set(range(p.shape[1])):
        notes.append(
            "covariates: no floor, for these tables lack training's participants of some class"
        )
        return None
    tables = [[row.covariates for row in rows] for rows in (trained, val)]
    fit = [(table, [row.label for row in rows]) for table, rows in zip(tables, (trained, val))]
    floor = fit_floor(roles, *fit[0], *fit[1])
    table = [row_of[i].covariates for i in predictions.ids]
    notes += oddities(floor, tables[0], table)
    before = alone = floor.p(table)
    if split == "test" and "refit" in opened.saved:  # as the head is that made the predictions
        again = clone(floor.model).fit(
            cells(tables[0] + tables[1], floor.columns), fit[0][1] + fit[1][1]
        )
        alone = Floor(floor.columns, floor.C, again).p(table)
    scores, pair = metrics.score(y, alone, p.shape[1]), metrics.compare(y, p, alone, people)
    answers, name = alone.argmax(axis=1), "balanced_accuracy"
    ci95 = intervals.of_answers(y, answers, p.shape[1], people, [name])
    found = {
        "columns": list(floor.columns),
        "C": floor.C,
        **{name: scores[name] for name in (*metrics.SCORES, *metrics.MORE_SCORES)},
        "ci95": ci95,
        "difference": pair["difference"],
        "difference_ci95": pair["ci95"],
        "p_value": pair["p_value"],
    }
    validation = opened.saved.get("val_predictions")
    if validation and split != "val":  # what is fitted on validation is not scored on it
        person = {row.participant_id: row.covariates for row in book.rows}
        names, labels = validation["participant_id"], np.array(validation["y_true"])
        if len(set(labels.tolist())) < p.shape[1] or not set(names) <= set(person):
            notes.append(
                "covariates: what the eye adds is not known, for these tables lack participants of "
                "validation, or it lacks a class"
            )
        else:
            floor_val = floor.p([person[name] for name in names])
            known = labels, floor_val, validation["p"].numpy(), names
            found["adds"] = what_the_eye_adds(known, (y, before, p, people))
    return found


def in_words(names):
    """["age", "site", "sex"] -> age, site and sex."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def alarms(result):
    """Sentences on what `examine` found of a result."""
    found = []
    if "covariates" in result:
        floor = result["covariates"]
        if floor["p_value"] >= 0.05 or floor["difference"] <= 0:
            added = floor.get("adds", {}).get("log_loss", {"difference": 0})
            adds = added["difference"] > 0 and added["p_value"] < 0.05
            found.append(
                f"not shown to be better than {in_words(floor['columns'])} alone: balanced "
                f"accuracy {result['balanced_accuracy']:.3f} against "
                f"{floor['balanced_accuracy']:.3f}, p = {floor['p_value']:.3f}"
                + (f"; yet it adds to them, p = {added['p_value']:.4f}" if adds else "")
            )
    if "within" in result:
        groups, (low, high) = result["within"]["groups"], result["within"]["band"]
        if result["balanced_accuracy"] <= high + 1e-9:  # sums of recalls are equal up to rounding
            found.append(
                f"balanced accuracy {result['balanced_accuracy']:.3f} is not above the chance band "
                f"within {groups}, {low:.3f} to {high:.3f}: labels permuted among participants of "
                "the same do as well"
            )
    return found
