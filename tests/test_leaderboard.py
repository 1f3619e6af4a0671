"""Several tasks on one leaderboard: a table for each, and one over all."""

import itertools
import re

import numpy as np
import pytest
from helpers import LABELS_159, answers, write_results

import files
import leaderboard

# how often each method is right, on two tasks
SKILLS = {"good": (0.8, 0.75), "same": (0.8, 0.74), "poor": (0.3, 0.35)}


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The folder of six runs, three methods on two tasks, and what the leaderboard says."""
    folder = tmp_path_factory.mktemp("tasks")
    for number, (name, skills) in enumerate(SKILLS.items()):
        for task, skill in zip(("grade", "site"), skills):
            about = {"encoder": name, "pretrained_sha256": name[0] * 64, "task": task}
            write_results(folder / f"{name}_{task}", answers(skill, number), **about)
    write_results(folder / "z_only", answers(0.5, 9), task="site", encoder="only")
    return folder, leaderboard.leaderboard(sorted(folder.iterdir()), "test")


def test_each_task_has_a_table_of_its_own(board):
    folder, said = board
    rows = files.read_csv(folder / "leaderboard.csv")
    assert {row["task"].partition(":")[0] for row in rows} == {"grade", "site"}
    for task in ("grade", "site"):
        own = [row for row in rows if row["task"].startswith(task)]
        assert all(row["run"].endswith((task, "only")) for row in own)
        scores = [float(row["balanced accuracy"]) for row in own]
        assert scores == sorted(scores, reverse=True)
        assert [row["p (Holm)"] for row in own].count("-") == 1  # the best of the task
    assert said.count("leads with balanced accuracy") == 2


def test_the_mean_rank_and_the_wins_are_those_of_a_slow_count(board):
    _, said = board
    line = next(line for line in said.splitlines() if line.startswith("| good, "))
    _, rank, interval, wins, *scores = [cell.strip() for cell in line.strip("|").split("|")]
    ranks = []
    for task in range(2):
        recall = {}
        for number, (name, skills) in enumerate(SKILLS.items()):
            right = answers(skills[task], number).argmax(axis=1) == LABELS_159
            recall[name] = np.mean([right[k == LABELS_159].mean() for k in range(4)])
        ranks.append(1 + sum(recall[other] > recall["good"] for other in SKILLS))
        ranks[-1] += sum(recall[other] == recall["good"] for other in SKILLS if other != "good") / 2
        assert f"{recall['good']:.3f}" == scores[task]
    assert rank == f"{np.mean(ranks):.2f}"
    low, high = map(float, interval.split(" to "))
    assert 1 <= low <= float(rank) <= high <= 2  # never behind the poor one
    assert wins == "2, 2, 0"  # against poor; against same


def test_what_was_not_scored_on_every_task_is_named(board):
    _, said = board
    assert re.search(r"Not scored on every task, and not ranked here: only, linear", said)


def test_equal_methods_share_their_rank(tmp_path):
    for name, task in itertools.product("ab", ("t", "u")):
        about = {"encoder": name, "task": task}
        write_results(tmp_path / f"{name}_{task}", answers(0.6, 1), **about)
    said = leaderboard.leaderboard(sorted(tmp_path.iterdir()), "test")
    assert said.count("| 1.50 | 1.500 to 1.500 | 0, 2, 0 |") == 2


def test_a_single_task_has_no_ranking_over_tasks(tmp_path):
    for number, name in enumerate("ab"):
        write_results(tmp_path / name, answers(0.6, number), encoder=name)
    said = leaderboard.leaderboard(sorted(tmp_path.iterdir()), "test")
    assert "mean rank" not in said and "##" not in said


def test_scanners_are_not_ranked_together(tmp_path):
    for number, (name, scanner) in enumerate((("a", "triton"), ("b", "cirrus"))):
        write_results(tmp_path / name, answers(0.6, number), volumes_asked=scanner)
    said = leaderboard.leaderboard(sorted(tmp_path.iterdir()), "test")
    assert said.count("there is no other run to compare it with") == 2


def test_the_latex_tables_show_every_letter(board, tmp_path):
    folder, _ = board
    text = (folder / "leaderboard.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 3
    assert r"good\_grade & 0." in text and r"95 \% interval" in text
    for line in text.splitlines():
        assert not re.search(r"(?<!\\)[%#_$]", line.removeprefix("% needs")) or "\\pm" in line
    columns = {line.count("&") for line in text.splitlines() if line.endswith(r"\\")}
    assert columns == {4, 5}
    write_results(tmp_path / "a_$B$&%#{}~^\\", answers(0.6, 0))
    leaderboard.leaderboard(list(tmp_path.iterdir()), "test")
    text = (tmp_path / "leaderboard.tex").read_text()
    expected = r"a\_\$B\$\&\%\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert expected in text
