"""Train a head on a pretrained OCT encoder. Reads from top to bottom; copy it and hack on it.

    python train.py --config configs/demo.yaml                                  # laptop, synthetic data, two minutes
    python train.py --config configs/single_domain_01.yaml                      # GPU or CPU, whichever is there
    python train.py --config configs/single_domain_01.yaml train.epochs=10 train.lr_head=3e-4
    python train.py --config configs/single_domain_01.yaml device.processes=4   # four GPUs, or four CPU processes
    python train.py --config configs/single_domain_01.yaml train.resume=auto    # go on after an interruption
    .venv-xla/bin/python train.py --config configs/single_domain_01.yaml        # on every host of a TPU pod, through xmp.spawn

then `python eval.py --ckpt RUN_DIR --split test`. The README says what a run leaves behind.
"""

import argparse
import importlib.metadata
import json
import math
import netrc
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.parse
from types import SimpleNamespace

import torch
import yaml

import b2
import config
import data
import device
import eval as evaluation
import losses
import metrics
import model
import phantom


# keys whose change on resuming does not change the result
HARMLESS = ("paths.", "log.", "device.", "demo.", "project_name", "train.resume", "data.num_workers", "data.prefetch", "data.cache_gb", "data.fetch_deadline",
            "data.max_missing")


def lr_at(step, total_steps, warmup_steps, peak):
    """Learning rate of a step: linear warm-up to peak, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def better(new, old, min_delta=0.0):
    """Is (balanced accuracy, loss) `new` better than `old`? By balanced accuracy; where that is the same, by loss."""
    if abs(new[0] - old[0]) > max(min_delta, 1e-9):  # a mean of recalls is the same only up to rounding
        return new[0] > old[0]
    return new[1] < old[1] - min_delta


def main(rank, cfg):
    """The job, from data to saved checkpoint, in every replica; rank 0 alone writes."""
    dev = device.get(cfg.device.backend)
    run_dir, epochs = b2.local_folder(cfg.paths.run_dir, "paths.run_dir"), cfg.train.epochs
    check_run_dir(run_dir, cfg)
    print(f"{cfg.project_name}, {cfg.log.run_name} on {device.describe(dev)}: {cfg.paths.checkpoint_path} ({cfg.model.encoder} encoder), {cfg.paths.data}")
    if cfg.train.warmup_epochs >= epochs:
        print(f"note: train.warmup_epochs={cfg.train.warmup_epochs} lasts the whole run of {epochs} epochs")

    # data: who is there, who is not
    ledger = data.read_ledger(cfg)
    print(f"{ledger.description}\n{data.ledger_table(ledger)}")
    data.check_missing(ledger, cfg.data.max_missing)

    # encoder: frozen, so every volume is encoded once, and the head trains on features
    encoder, size, encoder_hash = evaluation.open_encoder(cfg)
    encoder.requires_grad_(False)
    samples, x = evaluation.features(cfg, ledger, ledger.of("train") + ledger.of("val"), encoder, size, encoder_hash, dev)  # x (volumes, C)
    train, val = ([s for s in samples if s.split == split] for split in ("train", "val"))
    x_train, x_val = x[:len(train)], x[len(train):]
    train_labels = torch.tensor([s.label for s in train])
    participants = {s.participant_id: s.label for s in train}
    weights = losses.class_weights(list(participants.values()), len(data.CLASSES), cfg.train.class_weights)

    # head and optimizer; seeded here, for loading volumes draws random numbers and a full cache would not
    device.seed(cfg.seed, dev)
    head = model.Head(cfg.model.emb_dim, len(data.CLASSES), cfg.model.head.hidden, cfg.model.head.dropout)
    head[0].fit(x_train)
    head, x_train, x_val, train_labels, weights = (t.to(dev) for t in (head, x_train, x_val, train_labels, weights))
    optimizer = getattr(torch.optim, cfg.train.optimizer)(head.parameters(), lr=cfg.train.lr_head, weight_decay=cfg.train.weight_decay)
    loss_of = losses.LOSSES[cfg.train.loss]
    batch_size = min(cfg.data.batch_size, len(train))
    steps_per_epoch = math.ceil(len(train) / batch_size)
    print(f"head: {sum(p.numel() for p in head.parameters())} parameters; class weights {[round(w, 3) for w in weights.tolist()]}")

    # what the run is known by; resuming goes on with the same
    identity = {"config": config.to_dict(cfg), "encoder_sha256": encoder_hash, "labels_sha256": ledger.sha256[data.LABELS],
                "train_participants": list(participants), "volumes": [len(train), len(val)]}
    last = resume(run_dir, identity) if cfg.train.resume == "auto" else None
    first_epoch, history, best, best_epoch, stop_reference, epochs_without = 1, [], None, None, None, 0
    if last:
        head.load_state_dict(last["head"])
        optimizer.load_state_dict(last["optimizer"])
        torch.set_rng_state(last["rng"])
        first_epoch, history, best_epoch, epochs_without = last["epoch"] + 1, last["history"], last["best_epoch"], last["epochs_without"]
        best, stop_reference = tuple(last["best"]), tuple(last["stop_reference"])
        print(f"resuming after epoch {last['epoch']} of {run_dir}")
    starts = device.gather(first_epoch, dev)
    if len(set(starts)) > 1:
        raise ValueError(f"the replicas would go on with epochs {starts}: every host needs the same {os.path.join(run_dir, 'last.pt')}; copy that of host 0")

    wandb_run = start_wandb(cfg, run_dir, rank)  # first, for it may refuse, and an earlier run should then still be there
    if rank == 0:
        prepare_run_dir(run_dir, cfg, ledger, encoder_hash, dev, last)
    stopping = device.sigterm()
    patience = cfg.train.early_stopping.patience if cfg.train.early_stopping.enabled else math.inf
    for epoch in range(first_epoch, epochs + 1):
        if epochs_without >= patience:
            break
        # train: the order depends on seed and epoch alone
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(cfg.seed * 100_003 + epoch))
        head.train()
        loss_sum = torch.zeros((), device=dev)
        for i, batch in enumerate(order.split(batch_size)):
            lr = lr_at((epoch - 1) * steps_per_epoch + i, epochs * steps_per_epoch, cfg.train.warmup_epochs * steps_per_epoch, cfg.train.lr_head)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # the loss divides by the weights of the whole batch, and a replica adds up the rows that are its own; -1 is padding
            places = device.share(torch.arange(len(batch)), batch_size)
            whole = torch.full((batch_size,), -1).index_copy(0, torch.arange(len(batch)), batch).to(dev)
            rows = torch.where(places < 0, -1, batch[places]).to(dev)
            total = (weights[train_labels[whole]] * (whole >= 0)).sum()
            targets = train_labels[rows]
            loss = (loss_of(head(x_train[rows], (places, batch_size)), targets) * weights[targets] * (rows >= 0)).sum() / total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            device.all_sum_gradients(head.parameters())
            optimizer.step()
            loss_sum += loss.detach() * (whole >= 0).sum()
            device.step_done(dev)
        train_loss = device.all_sum(loss_sum).item() / len(train)
        if not math.isfinite(train_loss):
            raise ValueError(f"train loss is {train_loss} in epoch {epoch}; lower train.lr_head={cfg.train.lr_head}, or look at train.class_weights")

        # validate: by participant, alike in every replica
        ids, y_val, p_val = evaluation.by_participant(val, evaluation.predict(head, x_val))
        _, y_train, p_train = evaluation.by_participant(train, evaluation.predict(head, x_train))
        train_score, val_score = metrics.score(y_train, p_train), metrics.score(y_val, p_val)
        now = (val_score["balanced_accuracy"], val_score["log_loss"])
        is_best = best is None or better(now, best)
        if stop_reference is None or better(now, stop_reference, cfg.train.early_stopping.min_delta):
            stop_reference, epochs_without = now, 0
        else:
            epochs_without += 1
        record = {
            "epoch": epoch, "train/lr": lr, "train/loss": train_loss, "train/balanced_accuracy": train_score["balanced_accuracy"],
            "val/loss": val_score["log_loss"], "val/accuracy": val_score["accuracy"], "val/balanced_accuracy": val_score["balanced_accuracy"],
            "val/macro_f1": val_score["macro_f1"], **{f"val/f1_{k}": f1 for k, f1 in enumerate(val_score["f1_per_class"])}, "best": is_best,
        }
        history.append(record)
        if is_best:
            best, best_epoch = now, epoch

        # save: best first, so that last.pt never knows of a best that is not on disk
        if rank == 0:
            checkpoint = {**identity, "head": head.state_dict(), "epoch": epoch, "val_balanced_accuracy": now[0], "val_loss": now[1]}
            if is_best:
                b2.write(os.path.join(run_dir, evaluation.BEST), device.to_bytes(checkpoint))
                b2.write(os.path.join(run_dir, "predictions_val.csv"), evaluation.predictions_csv(ids, y_val, p_val))
            b2.write(os.path.join(run_dir, "last.pt"), device.to_bytes({
                **checkpoint, "optimizer": optimizer.state_dict(), "best": best, "best_epoch": best_epoch, "history": history,
                "stop_reference": stop_reference, "epochs_without": epochs_without, "rng": torch.get_rng_state()}))
            b2.write(os.path.join(run_dir, "metrics.jsonl"), "".join(json.dumps(r) + "\n" for r in history))
            wandb_run.log(record)
        print(f"epoch {epoch:3d}/{epochs}  lr {lr:.1e}  train loss {record['train/loss']:.3f} bal.acc {record['train/balanced_accuracy']:.3f}   "
              f"val loss {now[1]:.3f} acc {val_score['accuracy']:.3f} bal.acc {now[0]:.3f} macro F1 {val_score['macro_f1']:.3f}{'  *' if is_best else ''}")
        if device.all_sum(torch.tensor(float(stopping.is_set()), device=dev)).item():
            print(f"stopped by SIGTERM after epoch {epoch}; train.resume=auto goes on from there")
            raise SystemExit(128 + signal.SIGTERM)
    if epochs_without >= patience:
        print(f"stopped early: {epochs_without} epochs without improvement on val")

    print(f"best: epoch {best_epoch}, val balanced accuracy {best[0]:.3f}; saved as {os.path.join(run_dir, evaluation.BEST)}")
    if ledger.unreadable:
        print(f"{len(ledger.unreadable)} volumes could not be read and were left out (data.max_missing={cfg.data.max_missing})\n{data.unreadable_table(ledger)}")
    wandb_run.finish()
    device.barrier(dev)  # nobody ends before rank 0 has written all


# ------------------------------------------------------------------------------------------- the run folder and W&B


def check_run_dir(run_dir, cfg):
    """ValueError when results must not or cannot go there; asked before anything is computed."""
    inside = set(os.listdir(run_dir)) - {"wandb"} if os.path.isdir(run_dir) else set()
    if os.path.exists(run_dir) and not os.path.isdir(run_dir) or inside and "provenance.json" not in inside:
        raise ValueError(f"paths.run_dir={run_dir} is not a run's folder and not empty; set paths.run_dir to another one")
    checkpoint = os.path.realpath(os.path.expanduser(cfg.paths.checkpoint_path))
    if not b2.is_remote(cfg.paths.checkpoint_path) and checkpoint.startswith(os.path.realpath(run_dir) + os.sep):
        raise ValueError(f"paths.checkpoint_path={cfg.paths.checkpoint_path} lies in paths.run_dir={run_dir}, where an earlier run is replaced; "
                         "set paths.run_dir to another one")


def resume(run_dir, identity):
    """The run's last.pt to go on from, None where there is none yet. ValueError when going on would not give the run's result."""
    path = os.path.join(run_dir, "last.pt")
    if not os.path.exists(path):
        return None
    last = torch.load(path, map_location="cpu", weights_only=True)
    old, new = (config.flatten(part["config"]) for part in (last, identity))
    changed = [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key] and not key.startswith(HARMLESS)]
    changed += [f"{what} is another" for what in ("encoder_sha256", "labels_sha256", "train_participants", "volumes") if last[what] != identity[what]]
    if changed:
        raise ValueError(f"{run_dir} holds a run whose result this would change: {'; '.join(changed)}; set that back, or train.resume=never to "
                         "replace the run, or paths.run_dir to another one")
    return last


def prepare_run_dir(run_dir, cfg, ledger, encoder_hash, dev, last):
    """Remove an earlier run's results, then write what this run is: provenance (by which a run's folder is known), config, ledger.

    last: where a run is resumed, its last.pt; everything stays then, and provenance.json notes it.
    """
    if last:
        b2.write(os.path.join(run_dir, "metrics.jsonl"), "".join(json.dumps(r) + "\n" for r in last["history"]))
        with open(os.path.join(run_dir, "provenance.json"), encoding="utf-8") as f:
            provenance = json.load(f)
        provenance.setdefault("resumed", []).append({"after_epoch": last["epoch"], "command": command(), "device": device.describe(dev), "world_size": device.world()})
        b2.write(os.path.join(run_dir, "provenance.json"), json.dumps(provenance, indent=1) + "\n")
        return
    earlier = [evaluation.BEST, "last.pt", "metrics.jsonl", "predictions_val.csv", "predictions_test.csv", "eval_val.json", "eval_test.json",
               "report.html", "config.yaml", "ledger.csv", "plots/confusion_val.png", "plots/confusion_test.png", "plots/training.png"]
    earlier = [os.path.join(run_dir, name) for name in earlier if os.path.exists(os.path.join(run_dir, name))]
    if earlier:
        print(f"{run_dir}: replacing an earlier run")
    for path in earlier:
        os.remove(path)

    def git(*args):
        if not shutil.which("git"):
            return None
        answer = subprocess.run(["git", *args], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    packages = [p for p in ("torch", "torch_xla", "numpy", "scikit-learn", "pydicom") if any(importlib.metadata.distributions(name=p))]
    b2.write(os.path.join(run_dir, "provenance.json"), json.dumps({
        "git_commit": commit,
        "git_changes": None if commit is None else bool(git("status", "--porcelain")),
        "versions": {"python": sys.version.split()[0], **{p: importlib.metadata.version(p) for p in packages}},
        "encoder_sha256": encoder_hash,
        "labels_sha256": ledger.sha256[data.LABELS],
        "manifest_sha256": ledger.sha256[data.MANIFEST],
        "data": ledger.description,
        "command": command(),
        "seed": cfg.seed,
        "device": device.describe(dev),
        "world_size": device.world(),
    }, indent=1) + "\n")
    b2.write(os.path.join(run_dir, "config.yaml"), yaml.safe_dump(config.to_dict(cfg), sort_keys=False))
    b2.write(os.path.join(run_dir, "ledger.csv"), data.ledger_csv(ledger))


def command():
    return shlex.join([os.path.basename(sys.executable), *sys.argv])


def start_wandb(cfg, run_dir, rank):
    """The W&B run, or an object that ignores everything when log.wandb=disabled, and on ranks above 0."""
    if cfg.log.wandb == "disabled" or rank:
        return SimpleNamespace(log=lambda record: None, finish=lambda: None)
    try:
        import wandb
    except ImportError:
        raise ValueError(f"log.wandb={cfg.log.wandb} needs the package wandb: pip install wandb, or set log.wandb=disabled") from None
    mode = cfg.log.wandb
    if mode == "auto":
        host = urllib.parse.urlparse(wandb.Settings().base_url).hostname
        logins = os.environ.get("NETRC", os.path.expanduser("~/.netrc"))  # where `wandb login` puts the key
        try:
            has_key = bool(os.environ.get("WANDB_API_KEY")) or os.path.exists(logins) and netrc.netrc(logins).authenticators(host) is not None
        except netrc.NetrcParseError as error:
            raise ValueError(f"log.wandb=auto looks for a key, but {error}; mend the file, or set log.wandb=offline") from error
        mode = "online" if has_key else "offline"
    os.makedirs(run_dir, exist_ok=True)
    try:
        return wandb.init(project=cfg.log.wandb_project, name=cfg.log.run_name, mode=mode, dir=run_dir, config=config.to_dict(cfg))
    except wandb.Error as error:
        raise ValueError(f"W&B did not start: {error}; mend that, or set log.wandb=offline") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    sys.stdout.reconfigure(line_buffering=True)  # in step with the progress bar also where the output is a file

    def job():
        cfg = config.load(args.config, args.overrides)
        phantom.prepare(cfg)
        device.launch(main, cfg)
    device.run(job)
