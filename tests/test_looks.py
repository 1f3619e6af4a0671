import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import LABELS_159, answers, write_bytes, write_results

import findings
import looks
import metrics
import results


def counted(folder):
    """looks.count of the run in a folder that write_results wrote."""
    opened = SimpleNamespace(path=str(folder / "best.pt"), folder=str(folder))
    result = results.read_result(folder, "test")
    return looks.count(*looks.others(opened, result), result)


@pytest.fixture()
def runs(tmp_path):
    for n in range(3):
        write_results(tmp_path / f"run{n}", answers(0.5, n))
    return tmp_path


def test_runs_on_the_same_labels_are_counted_and_others_are_not(runs):
    write_results(runs / "other labels", answers(0.5, 3), labels_sha256="1" * 64)
    write_results(runs / "other task", answers(0.5, 3), task="site")
    write_results(runs / "run1" / "last", answers(0.5, 4))  # the last checkpoint is a look too
    write_bytes(runs / "run2" / "eval_test.json", b"{}")
    found = counted(runs / "run0")
    assert (found["runs"], found["unreadable"]) == (3, 1)


def test_a_link_to_a_run_is_no_other_look(runs):
    (runs / "a link").symlink_to(runs / "run1")
    (runs / "another").symlink_to(runs / "run0")
    assert counted(runs / "run0")["runs"] == 3


@pytest.mark.parametrize("count, mean", [(1, 0), (2, 1 / math.sqrt(math.pi)), (3, 0.84628)])
def test_the_expected_maximum_of_normals(count, mean):
    assert looks.expected_maximum(count) == pytest.approx(mean, abs=1e-5)
    draws = np.random.default_rng(0).normal(size=(20_000, 40)).max(axis=1)
    assert looks.expected_maximum(40) == pytest.approx(draws.mean(), abs=0.01)


def test_optimism_is_that_of_independent_models():
    """The best of 8 models that are right in half of the cases."""
    rng, best = np.random.default_rng(0), []
    for _ in range(1000):
        right = rng.random((8, 159)) < 0.5
        recall = [right[:, k == LABELS_159].mean(axis=1) for k in range(4)]
        best.append(np.mean(recall, axis=0).max())
    said = np.where(rng.random(159) < 0.5, LABELS_159, (LABELS_159 + 1) % 4)
    ci95 = metrics.evaluate(LABELS_159, np.eye(4)[said])["ci95"]["balanced_accuracy"]
    sd, optimism = looks.optimism(ci95, 8)
    assert sd == pytest.approx(0.0396, rel=0.05)
    assert optimism == pytest.approx(np.mean(best) - 0.5, rel=0.1)


def test_the_sentence_says_how_many_and_how_much():
    result = {"looks": {"runs": 7, "unreadable": 2, "sd": 0.04, "optimism": 0.054}}
    assert findings.looks_line(result).startswith(
        "7 runs of this folder were scored on this test set (2 more could not be read): were they "
        "equally good, the best would be above its worth by 0.054 on average"
    )
