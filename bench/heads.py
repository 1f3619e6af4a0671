"""How little 743 participants teach a head: how far from chance to the best possible balanced accuracy the chosen head comes.

    .venv/bin/python bench/heads.py                # 743 training rows, 64 and 768 features, 10 seeds: ten minutes on two cores
    .venv/bin/python bench/heads.py --rows 20000   # hours

Gaussian features of unit variance; the class means lie along one hidden direction, spread evenly over all features. Training has
classes 290 : 162 : 233 : 58, validation (159) and test (20,000) have them evenly. Beside configs/probe.yaml's sweep:
scikit-learn's class-balanced LogisticRegression, C chosen on the same validation. Exits 1 when the sweep is worse anywhere.
"""

import argparse
import os
import sys
import warnings
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import balanced_accuracy_score, log_loss  # noqa: E402

import config  # noqa: E402
import metrics  # noqa: E402
import train  # noqa: E402

SHARES = np.array([290, 162, 233, 58])


def draw(means, features, rows, seed):
    """-> train, val, test, each (x float32 (n, features), y (n,))."""
    rng = np.random.default_rng(seed)
    direction = rng.choice([-1, 1], features) / np.sqrt(features)
    labels = (np.repeat(np.arange(4), (SHARES * rows / SHARES.sum()).round().astype(int)),
              rng.integers(0, 4, 159), rng.integers(0, 4, 20_000))
    return [((rng.standard_normal((len(y), features)) + np.array(means)[y][:, None] * direction).astype(np.float32), y) for y in labels]


def best_possible(means):
    """Bayes balanced accuracy: the nearest mean along the direction."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 2_000_000)
    x = rng.standard_normal(len(y)) + np.array(means)[y]
    return balanced_accuracy_score(y, np.abs(x[:, None] - np.array(means)).argmin(axis=1))


def logistic(data, _):
    """Test balanced accuracy of the C that validation chooses."""
    (x, y), (x_val, y_val), (x_test, y_test) = data
    tried = []
    for C in np.logspace(-6, 5, 23):
        fitted = LogisticRegression(C=C, class_weight="balanced", max_iter=300).fit(x, y)
        p = fitted.predict_proba(x_val)
        tried.append((balanced_accuracy_score(y_val, p.argmax(axis=1)), -log_loss(y_val, p, labels=range(4)), C, fitted))
    return balanced_accuracy_score(y_test, max(tried)[3].predict(x_test))


def samples(labels):
    """A participant for every label, with one volume."""
    return [SimpleNamespace(participant_id=str(i), label=int(k)) for i, k in enumerate(labels)]


def swept(data, seed):
    """Test balanced accuracy of the head that configs/probe.yaml's sweep chooses."""
    (x, y), (x_val, y_val), (x_test, y_test) = data
    cfg = config.load(os.path.join(ROOT, "configs", "probe.yaml"), [f"seed={seed}"])
    cfg.model.emb_dim = x.shape[1]
    head = train.fit_heads(cfg, seed, torch.from_numpy(x)[:, None], samples(y), torch.from_numpy(x_val), samples(y_val))[0].eval()
    with torch.no_grad():
        p = head(torch.from_numpy(x_test)).double().softmax(dim=1).numpy()
    return metrics.score(y_test, p)["balanced_accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(743,))
    parser.add_argument("--features", type=int, nargs="+", default=(64, 768))
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    print("| class means | Bayes | features | training rows | LogisticRegression, best C | the sweep |\n"
          "|---|---|---|---|---|---|", flush=True)
    worse = False
    for means in ((0, 0.4, 1, 1.6), (0, 0.2, 0.5, 0.8)):
        bayes = best_possible(means)
        for rows in args.rows:
            for features in args.features:
                scores = np.array([[f(draw(means, features, rows, seed), seed) for f in (logistic, swept)] for seed in range(args.seeds)])
                reference, sweep = (scores.mean(axis=0) - 0.25) / (bayes - 0.25)
                worse = worse or sweep < reference
                print(f"| {'/'.join(map(str, means))} | {bayes:.3f} | {features} | {rows} | {reference:.0%} | {sweep:.0%} |", flush=True)
    sys.exit("not met: no worse than LogisticRegression" if worse else 0)


if __name__ == "__main__":
    main()
