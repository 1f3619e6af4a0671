"""The map of the features: a planted batch effect is seen, as a number and in the figure."""

import csv
import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CLASSES, content, copy_of, quick, trained
from sklearn.metrics import silhouette_score

import config
import eval as evaluation
import feature_map
import figures
import results
import train

HOSTILE = "$A_$B <script>alert(1)</script>"
SITES = (HOSTILE, "_hidden", "UCSD")


def planted(folder, shift, classes=0.0, participants=120, width=12, seed=0):
    """A label table and a features.npz of participants, two eyes each, whose site moves feature 0
    by `shift` standard deviations, and whose class moves feature 1 by `classes` -> Config."""
    rng = np.random.default_rng(seed)
    splits = np.resize(["train", "train", "train", "val", "test"], participants)
    sites, labels = rng.integers(0, 3, participants), rng.integers(0, 4, participants)
    header = ["participant_id", "study_group", "recommended_split", "clinical_site", "age"]
    rows = [
        [1000 + i, CLASSES[labels[i]], splits[i], SITES[sites[i]], 40 + i % 45]
        for i in range(participants)
    ]
    folder.mkdir(exist_ok=True)
    with open(folder / "participants.tsv", "w", newline="") as f:
        csv.writer(f, delimiter="\t").writerows([header, *rows])
    x = rng.standard_normal((2 * participants, width))
    x[:, 0] += shift * np.repeat(sites, 2)
    x[:, 1] += classes * np.repeat(labels, 2)
    ids = np.repeat([row[0] for row in rows], 2)
    np.savez(folder / "features.npz", participant=ids, x=x.astype(np.float32))
    return x, ids, rows


@pytest.fixture()
def scored(tmp_path):
    """scored(shift, ...) -> eval_test.json of a probe on `planted` features, and its folder."""

    def run(shift, **more):
        planted(tmp_path / "data", shift, **more)
        cfg = quick(
            tmp_path / "data",
            tmp_path,
            f"paths.features={tmp_path}/data/features.npz",
            "model.emb_dim=null",
            "paths.checkpoint_path=null",
            "train.epochs=2",
            f"paths.cache_dir={tmp_path}/cache",
        )
        train.main(0, cfg)
        evaluation.evaluate_run(cfg.paths.run_dir, "test")
        return results.read_result(cfg.paths.run_dir, "test"), tmp_path / "run"

    return run
