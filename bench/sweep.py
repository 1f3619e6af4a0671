"""What many heads cost: 64 heads at once against one after the other, and a whole probe against its single encoding pass.

    .venv/bin/python bench/sweep.py      # a minute on two cores

Exits 1 when 64 heads x 50 epochs on 743 x 768 features are less than 15 times faster than a plain loop over them, or the demo's probe
(encoding and 50 epochs of a sweep of 24 heads) takes more than 1.1 times its encoding alone.
"""

import contextlib
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import config  # noqa: E402
import data  # noqa: E402
import device  # noqa: E402
import eval as evaluation  # noqa: E402
import heads as gaussians  # noqa: E402
import metrics  # noqa: E402
import model  # noqa: E402
import phantom  # noqa: E402
import train  # noqa: E402

GRID = ["train.sweep.lr_head=[0.0001,0.0003,0.001,0.003,0.01,0.02,0.05,0.1]",
        "train.sweep.weight_decay=[0.001,0.01,0.03,0.1,0.3,1,3,10]", "train.sweep.ordinal=null"]


def seconds(job):
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        job()
    return time.perf_counter() - start


def one_after_the_other(grid, x, y, x_val, y_val):
    """The same heads as plain torch trains them: AdamW, warm-up and cosine, batches of 32, the epoch that is best on validation kept."""
    best = []
    for head_of in grid:
        torch.manual_seed(0)
        head = model.Head(x.shape[1], 4, 0, 0.1)
        head[0].fit(x)
        optimizer = torch.optim.AdamW(head.parameters(), lr=head_of["lr_head"], weight_decay=head_of["weight_decay"])
        weights = len(y) / (4 * y.bincount())
        steps, step, kept = 50 * -(-len(x) // 32), 0, None
        for _ in range(50):
            head.train()
            for batch in torch.randperm(len(x)).split(32):
                for group in optimizer.param_groups:
                    group["lr"] = train.lr_at(step, steps, steps // 10, head_of["lr_head"])
                optimizer.zero_grad()
                F.cross_entropy(head(x[batch]), y[batch], weight=weights).backward()
                optimizer.step()
                step += 1
            head.eval()
            with torch.no_grad():
                now = [v[0] for v in metrics.quick_scores(y_val, head(x_val).softmax(dim=1)[None].numpy())]
            if kept is None or train.better(now, kept[0]):
                kept = now, {name: p.clone() for name, p in head.state_dict().items()}
        best.append(kept)
    return best


def main():
    (x, y), (x_val, y_val), _ = ((torch.from_numpy(x), y) for x, y in gaussians.draw((0, 0.4, 1, 1.6), 768, 743, 0))
    cfg = config.load("configs/probe.yaml", [*GRID, "train.early_stopping.enabled=false"])
    grid = train.grid_of(cfg)
    torch.set_num_threads(1)  # the fastest for both
    at_once = seconds(lambda: train.sweep(cfg, 0, grid, train.start_head(cfg, 0, x[:, None]), x[:, None], gaussians.samples(y),
                                          x_val, gaussians.samples(y_val)))
    in_turn = seconds(lambda: one_after_the_other(grid, x, torch.from_numpy(y), x_val, y_val))
    print(f"{len(grid)} heads x 50 epochs on {x.shape[0]} x {x.shape[1]} features: "
          f"{in_turn / at_once:.1f} times faster at once than one after the other (required: 15)", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        cfg = config.load("configs/demo.yaml", [f"paths.run_dir={folder}/run", f"paths.cache_dir={folder}/cache"])
        phantom.prepare(cfg)

        def encoding():
            ledger = data.read_ledger(cfg)
            encoder, size, encoder_hash = evaluation.open_encoder(cfg)
            evaluation.features(cfg, ledger, ledger.of("train") + ledger.of("val"), encoder, size, encoder_hash, device.get("cpu"))

        alone = seconds(encoding)
        cfg.paths.cache_dir = f"{folder}/another"
        whole = seconds(lambda: train.main(0, cfg))
    print(f"the demo's probe, encoding and 50 epochs of 24 heads: {whole / alone:.2f} times the encoding alone (required: at most 1.1)")
    sys.exit("not met" if in_turn / at_once < 15 or whole / alone > 1.1 else 0)


if __name__ == "__main__":
    main()
