"""How does a result depend on how frequent the classes are? Scores at other class shares, and the
shares that the predictions themselves tell.

    at_shares(y, p, [0.7, 0.1, 0.1, 0.1])     # accuracy, F1, precision, log-loss at these shares
    estimated(p, prior)                       # the class shares of these rows, without their labels
    examine(opened, book, predictions, ...)   # both of a run -> parts of eval_SPLIT.json

In shapes, n is the number of rows and K of classes.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

import confounding
import intervals
import metrics
import resampling

RESAMPLES = 100  # of the estimated class shares, each of which fits a calibration


def at_shares(y, p, shares):
    """Scores of the same answers and probabilities where classes had these shares (K,) -> dict.

    A row weighs as its class's share over that in y (n,). Recall and balanced accuracy do not
    depend on shares, nor does the AUROC of two classes; that of one class against several others
    depends on which of these are frequent. None where y lacks a class that has a share.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

    shares, counts = np.asarray(shares, float), np.bincount(y, minlength=p.shape[1])
    if (shares[counts == 0] > 0).any():
        return None
    weight = (shares / np.maximum(counts, 1))[y]  # (n,), sums to 1
    options = {"labels": range(len(shares)), "sample_weight": weight, "zero_division": 0}
    precision, _, f1, _ = precision_recall_fscore_support(y, p.argmax(axis=1), **options)
    there = np.flatnonzero((shares > 0) & (shares < 1))
    auroc = [roc_auc_score(y == k, p[:, k], sample_weight=weight) for k in there]
    return {
        "shares": shares.tolist(),
        "accuracy": float(accuracy_score(y, p.argmax(axis=1), sample_weight=weight)),
        "macro_f1": float(f1.mean()),
        "macro_precision": float(precision.mean()),
        "auroc_macro_ovr": float(np.mean(auroc)) if auroc else None,
        "log_loss": float(weight @ metrics.negative_log(p[np.arange(len(y)), y])),
        "precision_per_class": precision.tolist(),
    }


def estimated(p, prior, weights=None):
    """The class shares (K,) under which rows with probabilities p (n, K) are likeliest: what the EM
    algorithm of Saerens, Latinne and Decaestecker (2002) converges to, slowly. prior (K,): the
    class shares for which p are the probabilities; weights (n,): how often a row counts."""
    ratio = p / np.maximum(prior, 1e-12)  # (n, K), proportional to the likelihoods of the classes
    weights = np.full(len(p), 1 / len(p)) if weights is None else weights / np.sum(weights)

    def loss(logits):
        shares = softmax(logits)
        mixture = ratio @ shares  # (n,)
        slope = -(weights / mixture) @ ratio  # (K,), of the shares
        return -(weights @ np.log(mixture)), shares * (slope - shares @ slope)

    start = np.log(np.maximum(prior, 1e-12))
    return softmax(minimize(loss, start, jac=True, method="L-BFGS-B", tol=1e-10).x)


def label_shift(validation, scored):
    """The class shares of the scored rows as their p (n, K) tell them, with 95 % intervals, beside
    the true ones -> dict, or None where validation lacks a class. Both: (y, p, participants).

    Which shares a head's probabilities are for depends on its class weights, its loss, its sampler
    and its early stopping: even ones with balanced weights, training's without. So they are first
    calibrated on validation by a temperature and a bias for each class; after that they are
    probabilities for validation's shares, whatever the head was trained for. The intervals are of a
    bootstrap of the participants of both.
    """
    (y_val, p_val, of_val), (y, p, people) = validation, scored
    shares_of = lambda labels: np.bincount(labels, minlength=p.shape[1]) / len(labels)
    if not shares_of(y_val).all():
        return None

    def calibrated(rows):
        """p by the calibration of some of validation's rows, and the shares that it is for."""
        pool = confounding.fit_pool(y_val[rows], [p_val[rows]])
        return confounding.pool([p], *pool), shares_of(y_val[rows])

    rng = np.random.default_rng(0)
    draws = [np.repeat(np.arange(len(y_val)), drawn(rng, of_val)) for _ in range(RESAMPLES)]
    known = [calibrated(rows) for rows in draws if shares_of(y_val[rows]).all()]
    resampled = [estimated(*pair, drawn(rng, people)) for pair in known]
    return {
        "validation": shares_of(y_val).tolist(),
        "estimated": estimated(*calibrated(slice(None))).tolist(),
        "ci95": intervals.percentiles(np.array(resampled)),
        "true": shares_of(y).tolist(),
    }


def drawn(rng, people):
    """How often each row is there (n,) when as many participants are drawn with replacement."""
    first, member = resampling.participants(np.zeros(len(people)), people)
    return np.bincount(rng.integers(len(first), size=len(first)), minlength=len(first))[member]


def examine(opened, book, predictions, split):
    """-> "prevalence" and "label_shift" of eval_SPLIT.json, as far as they are known; and notes,
    why a score is left out."""
    y, p = predictions.y_true, predictions.p
    num_classes = p.shape[1]
    row_of = {row.unit: row for row in book.rows}
    trained = [row_of[i].label for i in opened.saved["train_participants"] if i in row_of]
    asked = {"this split": np.bincount(y, minlength=num_classes) / len(y)}
    if trained:
        asked["training"] = np.bincount(trained, minlength=num_classes) / len(trained)
    asked["even"] = np.full(num_classes, 1 / num_classes)
    if opened.cfg.eval.prevalence:
        asked["eval.prevalence"] = opened.cfg.eval.prevalence
    scores = {name: at_shares(y, p, shares) for name, shares in asked.items()}
    notes = [
        f"no scores at the class shares of {name}, for {split} lacks a class"
        for name in asked
        if scores[name] is None
    ]
    found = {"prevalence": {name: s for name, s in scores.items() if s is not None}}
    known = opened.saved.get("val_predictions")
    if known and split != "val":  # what is fitted on validation says nothing new of it
        of_val = np.array(known["y_true"]), known["p"].numpy(), known["participant_id"]
        shift = label_shift(of_val, (y, p, predictions.participants))
        found |= {"label_shift": shift} if shift else {}
    return found, notes
