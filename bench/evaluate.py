"""What a score with everything around it costs: eval.py on 159 test participants, and a comparison of 20 runs on them.

    .venv/bin/python bench/evaluate.py      # three minutes on two cores, most of them for the data

A phantom with as many participants as AI-READI, small volumes, a probe of it with eval.floors=true. Timed is evaluate_run with the
features at hand: scores of participants, volumes and groups, 10,000 resamples and permutations of each, floors, calibration, plots,
report. Then evaluation.compare of 20 runs, 190 pairs. Exits 1 when the first takes more than 10 s or the second more than 30 s.
"""

import contextlib
import json
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import numpy as np  # noqa: E402

import b2  # noqa: E402
import config  # noqa: E402
import eval as evaluation  # noqa: E402
import phantom  # noqa: E402
import train  # noqa: E402


def seconds(job):
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        result = job()
    return time.perf_counter() - start, result


def another_run(folder, run, seed):
    """A copy of a run's results with other answers, as eval.py would leave it."""
    found, rng = evaluation.open_results(run, "test"), np.random.default_rng(seed)
    p = found["probabilities"] * rng.uniform(0.5, 2, found["probabilities"].shape)
    table = evaluation.predictions_csv(found["ids"], np.array(found["y_true"]), p / p.sum(axis=1, keepdims=True))
    os.makedirs(folder)
    with open(f"{folder}/predictions_test.csv", "w", newline="", encoding="utf-8") as f:
        f.write(table)
    with open(f"{folder}/eval_test.json", "w", encoding="utf-8") as f:
        json.dump(found["result"] | {"predictions_sha256": b2.sha256(f"{folder}/predictions_test.csv")}, f)
    return folder


def main():
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_dataset(f"{folder}/data", participants=1067, seed=0, scale=(1 / 32, 1 / 32, 1 / 32))
        phantom.write_encoder(f"{folder}/encoder.pt", image_size=(8, 32, 32), dim=64, depth=1)
        cfg = config.load("configs/demo.yaml", ["demo.dir=null", f"paths.data={folder}/data", f"paths.checkpoint_path={folder}/encoder.pt",
                                                f"paths.cache_dir={folder}/cache", f"paths.run_dir={folder}/run", "model.emb_dim=64",
                                                "eval.floors=true"])
        with contextlib.redirect_stdout(sys.stderr):
            train.main(0, cfg)
            evaluation.evaluate_run(f"{folder}/run", "test")  # encodes
        one, (result, _) = seconds(lambda: evaluation.evaluate_run(f"{folder}/run", "test"))
        print(f"evaluating {result['n']} participants, {result['volumes']} volumes: {one:.1f} s (required: at most 10)", flush=True)
        runs = [another_run(f"{folder}/runs/{n}", f"{folder}/run", n) for n in range(20)]
        twenty, text = seconds(lambda: evaluation.compare(runs, "test"))
        print(f"comparing {len(runs)} runs, {text.count('McNemar')} pairs: {twenty:.1f} s (required: at most 30)")
    sys.exit("not met" if one > 10 or twenty > 30 else 0)


if __name__ == "__main__":
    main()
