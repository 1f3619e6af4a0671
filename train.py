"""Train a head on a pretrained OCT encoder, and the encoder too if asked. Reads from top to bottom; copy it and hack on it.

    python train.py --config configs/demo.yaml                                  # laptop, synthetic data, two minutes
    python train.py --config configs/single_domain_01.yaml                      # GPU or CPU, whichever is there
    python train.py --config configs/single_domain_01.yaml train.epochs=10 train.lr_head=3e-4
    python train.py --config configs/single_domain_01.yaml --config configs/finetune.yaml   # the encoder trains too
    python train.py --config configs/single_domain_01.yaml device.processes=4   # four GPUs, or four CPU processes
    python train.py --config configs/single_domain_01.yaml train.resume=auto    # go on after an interruption
    .venv-xla/bin/python train.py --config configs/single_domain_01.yaml        # on every host of a TPU pod, through xmp.spawn

then `python eval.py --ckpt RUN_DIR --split test`. The README says what a run leaves behind.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import itertools
import json
import math
import netrc
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.parse
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

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
HARMLESS = ("paths.", "log.", "device.", "demo.", "project_name", "train.resume", "train.save_every", "train.micro_batch",
            "train.activation_checkpointing", "data.num_workers", "data.prefetch", "data.cache_gb", "data.fetch_deadline",
            "data.max_missing")
STRENGTHS = np.logspace(-6, 5, 45)  # C of logistic regression: what DINOv2's evaluation tries
NEIGHBOURS = (1, 3, 5, 10, 20, 30, 50)  # k of kNN; more would outnumber the 58 participants of the rarest class
INSTEAD = "set train.resume=never to replace the run, or paths.run_dir to another one"  # where a run cannot be resumed


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
    device.seed(cfg.seed, dev)  # for what you add: all that is random here draws from generators of its own
    run_dir, epochs = b2.local_folder(cfg.paths.run_dir, "paths.run_dir"), cfg.train.epochs
    check_run_dir(run_dir, cfg)
    print(f"{cfg.project_name}, {cfg.log.run_name} on {device.describe(dev)}: "
          f"{cfg.paths.checkpoint_path} ({cfg.model.encoder} encoder), {cfg.paths.data}")
    for note in doubts(cfg):
        print(f"note: {note}")

    # data: who is there, who is not
    ledger = data.read_ledger(cfg)
    print(f"{ledger.description}\n{data.ledger_table(ledger)}")
    data.check_missing(ledger, cfg.data.max_missing)
    train_labels = [s.label for s in ledger.of("train")]  # what could not train stops here, before anything is encoded
    data.epoch_order(torch.tensor(train_labels), cfg.data.sampler, cfg.seed, 1)
    losses.class_weights(train_labels, len(data.CLASSES), cfg.train.class_weights)
    steps = math.ceil(len(train_labels) / cfg.data.batch_size) * cfg.train.epochs
    if cfg.model.head.kind == "network" and (cfg.model.head.hidden or cfg.model.pool_method == "attentive") and steps < 500:
        print(f"note: data.batch_size={cfg.data.batch_size} makes {steps} steps in all, few for a head that starts knowing nothing; "
              "lower it")

    # features of the pretrained encoder: while it is frozen, every volume is encoded once, and the head trains on these
    encoder, size, encoder_hash = evaluation.open_encoder(cfg)
    encoder.requires_grad_(False)
    samples, x = evaluation.features(cfg, ledger, ledger.of("train") + ledger.of("val"), encoder, size, encoder_hash, dev)  # x (volumes, C)
    train, val = ([s for s in samples if s.split == split] for split in ("train", "val"))
    unfreeze = first_epoch_of_encoder(cfg)
    strength = data.strengths(cfg)
    x_val, seen_in_views = x[len(train):], samples if cfg.data.cv else train
    views = [x[:len(seen_in_views)]]
    for view in range(1, 1 + cfg.data.augment_views) if strength and unfreeze > 1 else ():
        views.append(evaluation.features_again(cfg, ledger, seen_in_views, encoder, size, encoder_hash, dev, view))
    x_views = torch.stack(views, dim=1)  # (volumes, views, C), and (volumes, views, T, C) for an attentive head
    x_train = x_views[:len(train)]
    labels = torch.tensor([s.label for s in train])
    participants = {s.participant_id: s.label for s in train}
    weights = losses.class_weights(list(participants.values()), len(data.CLASSES), cfg.train.class_weights)

    identity = {"config": config.to_dict(cfg), "encoder_sha256": encoder_hash, "labels_sha256": ledger.sha256[data.LABELS],
                "manifest_sha256": ledger.sha256[data.MANIFEST], "train_participants": list(participants),
                "volumes": [len(train), len(val)]}  # what the run is known by
    if any(vars(cfg.train.sweep).values()) or cfg.train.seeds or cfg.data.cv or cfg.eval.floors or cfg.model.head.kind != "network":
        x_random = None
        if cfg.eval.floors:
            other, _, other_hash = evaluation.random_encoder(cfg)
            x_random = evaluation.features_again(cfg, ledger, samples, other, size, other_hash, dev)
        run_heads(rank, cfg, run_dir, identity, ledger, dev, x_views, samples, x_val, len(train), x_random)
        return

    # model and optimizer
    head, log_prior = start_head(cfg, cfg.seed, x_train), log_prior_of(labels, cfg.data.sampler)
    with torch.no_grad():
        weight, bias = last_layer(head, x_train, train, cfg.model.head.ordinal)
        head[-1].weight.copy_(weight)
        head[-1].bias.copy_(bias + best_constant(log_prior, weights, cfg.train.loss))
        if cfg.train.loss == "logit_adjustment":
            head.log_prior.copy_(log_prior)
    head, x_val, log_prior = head.to(dev), x_val.to(dev), log_prior.to(dev)
    if unfreeze <= epochs:
        encoder.to(dev)
        encoder.drop_path = cfg.model.drop_path
        encoder.checkpoint = device.checkpointing(dev) if cfg.train.activation_checkpointing else None
    groups = model.parameter_groups(head, encoder if unfreeze <= epochs else None, cfg.train.lr_head, cfg.train.lr_encoder,
                                    cfg.train.layer_decay, cfg.train.weight_decay)
    optimizer = getattr(torch.optim, cfg.train.optimizer)(groups)
    loss_of = losses.LOSSES[cfg.train.loss]
    batch_size = min(cfg.data.batch_size, len(train))
    steps_per_epoch = math.ceil(len(train) / batch_size)
    print(f"head: {count(head)} parameters; class weights {[round(w, 3) for w in weights.tolist()]}")
    if unfreeze <= epochs:
        print(f"encoder: {count(encoder)} parameters, trains from epoch {unfreeze} on")

    # how far the run is
    at = {"epoch": 0, "step": steps_per_epoch, "history": [], "best": None, "best_epoch": None, "stop_reference": None,
          "epochs_without": 0, "wandb": None}
    last = resume(run_dir, identity, {*at, "head", "optimizer"}) if cfg.train.resume == "auto" else None
    if last:
        try:
            head.load_state_dict(last["head"])
            if "encoder" in last:
                encoder.load_state_dict(last["encoder"])
            optimizer.load_state_dict(last["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{run_dir}: last.pt does not fit this model: {' '.join(str(error).split())[:200]}; {INSTEAD}") from error
        at = {name: last[name] for name in at}
        print(f"resuming after {position(at, steps_per_epoch)} of {run_dir}")
    starts = device.gather([at["epoch"], at["step"]], dev)
    if any(start != starts[0] for start in starts):
        raise ValueError(f"the replicas would go on after [epoch, step] {starts}: "
                         f"every host needs the same {os.path.join(run_dir, 'last.pt')}; copy that of host 0")

    wandb_run = start_wandb(cfg, run_dir, rank, at["wandb"])  # first, for it may refuse, and an earlier run should then still be there
    at["wandb"] = wandb_run.id
    if rank == 0:
        prepare_run_dir(run_dir, cfg, ledger, encoder_hash, dev, last)
    stopping = device.sigterm()
    patience = cfg.train.early_stopping.patience if cfg.train.early_stopping.enabled else math.inf

    def weights_now():
        return {"head": head.state_dict(), **({"encoder": encoder.state_dict()} if at["epoch"] >= unfreeze else {})}

    def save_last(**more):
        """What resuming needs, from all replicas; and whether SIGTERM has come to any."""
        if rank == 0:
            content = {**identity, **at, **weights_now(), "optimizer": optimizer.state_dict(), **more}
            b2.write(os.path.join(run_dir, "last.pt"), lambda file: torch.save(device.to_host(content), file))
        if device.any_replica(stopping.is_set(), dev):
            print(f"stopped by SIGTERM after {position(at, steps_per_epoch)}; train.resume=auto goes on from there")
            raise SystemExit(128 + signal.SIGTERM)

    while at["epoch"] < epochs or at["step"] < steps_per_epoch:
        if at["step"] == steps_per_epoch:
            if at["epochs_without"] >= patience:
                break
            at |= {"epoch": at["epoch"] + 1, "step": 0}
        epoch, first_step = at["epoch"], at["step"]
        encoder_trains = epoch >= unfreeze
        encoder.requires_grad_(encoder_trains).train(encoder_trains)
        head.train()
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

        # order, views and every other random number depend on seed, epoch, step and volume alone
        batches = data.epoch_order(labels, cfg.data.sampler, cfg.seed, epoch).split(batch_size)
        parts = [micro_batches(batch, batch_size, cfg.train.micro_batch if encoder_trains else batch_size) for batch in batches]
        x_epoch = view_of_epoch(x_train, cfg.seed, epoch).to(dev)  # (volumes, C) or (volumes, T, C)
        augment = lambda key, volume: data.augment(volume, strength, f"{cfg.seed} {epoch} {key}")

        # what the steps saw: loss and probabilities, added up for each volume; weighted loss and gradient norm, for each step
        seen, sums = torch.zeros(len(train), 1 + len(data.CLASSES), device=dev), torch.zeros(2, device=dev)
        if first_step and rank == 0:
            seen, sums = last["seen"].to(dev), last["sums"].to(dev)

        bar = tqdm(total=steps_per_epoch, initial=first_step, desc=f"epoch {epoch}", unit="step", leave=False,
                   disable=rank > 0 or not encoder_trains)
        with bar, contextlib.closing(volumes_of(train, parts[first_step:], size, cfg, augment)) as volumes:
            for step in range(first_step, steps_per_epoch):
                for group in optimizer.param_groups:
                    start = 0 if group["part"] == "head" else unfreeze - 1  # a part's schedule begins when the part does
                    group["lr"] = lr_at((epoch - 1 - start) * steps_per_epoch + step, (epochs - start) * steps_per_epoch,
                                        cfg.train.warmup_epochs * steps_per_epoch, group["peak"]) if epoch > start else 0.0
                whole = weights[labels[batches[step]]].sum()  # the loss is divided by it, and the replicas' gradients are added up
                for places, rows in parts[step]:
                    noise = model.Noise(noise_key(cfg.seed, epoch, step), places, batch_size)
                    if encoder_trains:
                        volume = device.send(next(volumes), dev).float()  # (b, 1, D, H, W)
                        with device.autocast(dev, cfg.train.precision):
                            tokens = encoder(volume, noise)  # (b, N, C)
                        x = evaluation.pooled(cfg, tokens, encoder.grid(size))  # (b, C) or (b, T, C)
                    else:
                        x = x_epoch[rows.to(dev)]
                    logits = head(x, noise)  # (b, num_classes)
                    targets = labels[rows]
                    row_losses = loss_of(logits, targets.to(dev), log_prior)  # (b,)
                    loss = (row_losses * (weights[targets] * (rows >= 0) / whole).to(dev)).sum()
                    loss.backward()
                    with torch.no_grad():
                        row_seen = (torch.cat([row_losses[:, None], (logits - head.log_prior).softmax(dim=1)], dim=1)
                                    * (rows >= 0).to(dev)[:, None])  # (b, 1 + num_classes)
                        seen.index_add_(0, rows.clamp(min=0).to(dev), row_seen)
                        sums[0] += loss * len(batches[step])
                    if rows is not parts[step][-1][1]:
                        device.step_done(dev)
                device.all_sum_gradients(trained)
                sums[1] += torch.nn.utils.clip_grad_norm_(trained, cfg.train.grad_clip or math.inf) / device.world()
                optimizer.step()
                if cfg.model.head.ordinal:
                    head.share_direction()
                optimizer.zero_grad(set_to_none=False)
                device.step_done(dev)
                bar.update()
                at["step"] = step + 1
                is_due = cfg.train.save_every and at["step"] % cfg.train.save_every == 0
                if device.world() == 1 or at["step"] % 10 == 0:  # several replicas must ask each other, which costs time
                    is_due = device.any_replica(stopping.is_set(), dev) or is_due
                if is_due and at["step"] < steps_per_epoch:
                    save_last(seen=device.all_sum(seen), sums=check_finite(device.all_sum(sums), at, cfg))
        train_loss, grad_norm = check_finite(device.all_sum(sums), at, cfg).tolist()

        # validation and what the steps saw: by participant, alike in every replica
        if encoder_trains:
            x_val = evaluation.features_now(cfg, val, encoder, size, dev, f"val of epoch {epoch}").to(dev)
        ids, y_val, p_val = evaluation.by_participant(val, evaluation.predict(head, x_val))
        check_finite(torch.from_numpy(p_val), at, cfg)
        record = epoch_record(epoch, train, device.all_sum(seen).cpu(), torch.cat(batches), y_val, p_val)
        record |= {f"train/lr_{part}": max([g["lr"] for g in optimizer.param_groups if g["part"] == part], default=0.0)
                   for part in ("head", "encoder")}
        record |= {"train/loss": train_loss / len(train), "train/grad_norm": grad_norm / steps_per_epoch}
        now = (record["val/balanced_accuracy"], record["val/loss"])
        is_best = record["best"] = at["best"] is None or better(now, at["best"])
        if (at["stop_reference"] is None or better(now, at["stop_reference"], cfg.train.early_stopping.min_delta)
                or epoch <= unfreeze <= epochs):
            # patience begins when the encoder does: at first it costs some of the head's score
            at |= {"stop_reference": now, "epochs_without": 0}
        else:
            at["epochs_without"] += 1
        if is_best:
            at |= {"best": now, "best_epoch": epoch}
        at["history"].append(record)

        # save: best first, so that last.pt never knows of a best that is not on disk
        at_best = scores_of(record, ids, y_val, p_val)
        if rank == 0:
            if is_best:
                remove_evaluations(run_dir)  # of the best before
                content = {**identity, "epoch": epoch, **weights_now(), **at_best}
                b2.write(os.path.join(run_dir, evaluation.BEST), lambda file: torch.save(device.to_host(content), file))
                b2.write(os.path.join(run_dir, "predictions_val.csv"), evaluation.predictions_csv(ids, y_val, p_val))
            b2.write(os.path.join(run_dir, "metrics.jsonl"), "".join(json.dumps(r) + "\n" for r in at["history"]))
            wandb_run.log(record)
        print(epoch_lines(record, epochs))
        save_last(**at_best)
    if at["epochs_without"] >= patience and at["epoch"] < epochs:
        print(f"stopped early: {at['epochs_without']} epochs without improvement on val")

    print(f"best: epoch {at['best_epoch']}, val balanced accuracy {at['best'][0]:.3f}; saved as {os.path.join(run_dir, evaluation.BEST)}")
    finish(wandb_run, rank, cfg, run_dir, ledger, dev)


def epoch_record(epoch, train, seen, drawn, y_val, p_val):
    """What is logged of an epoch: scores of validation, and of training as its steps saw it, by participant; what was drawn.

    seen (volumes, 1 + num_classes): sums over the draws of each volume, of its loss and its probabilities. drawn: the epoch's
    indices of train. y_val (n,), p_val (n, num_classes).
    """
    seen, draws, labels = seen.double(), drawn.bincount(minlength=len(train)), torch.tensor([s.label for s in train])
    there = draws.nonzero().flatten()  # a stratified epoch leaves some out
    _, y_train, p_train = evaluation.by_participant([train[i] for i in there],
                                                    (seen[there, 1:] / seen[there, 1:].sum(dim=1, keepdim=True)).numpy())
    val_score = metrics.score(y_val, p_val)
    # all scores compare all pairs of participants, which thousands would feel
    (train_accuracy,), _ = metrics.quick_scores(y_train, p_train[None])
    predicted = np.bincount(p_train.argmax(axis=1), minlength=len(data.CLASSES))
    drawn_of, loss_of = ([values[labels == k].sum().item() for k in range(len(data.CLASSES))] for values in (draws, seen[:, 0]))
    return {
        "epoch": epoch, "train/balanced_accuracy": train_accuracy,
        **{f"train/loss_{k}": loss / n if n else None for k, (loss, n) in enumerate(zip(loss_of, drawn_of))},
        **{f"train/drawn_{k}": n for k, n in enumerate(drawn_of)},
        **{f"train/predicted_share_{k}": n / len(y_train) for k, n in enumerate(predicted.tolist())},
        "val/loss": val_score["log_loss"], "val/accuracy": val_score["accuracy"], "val/balanced_accuracy": val_score["balanced_accuracy"],
        "val/macro_f1": val_score["macro_f1"], **{f"val/f1_{k}": f1 for k, f1 in enumerate(val_score["f1_per_class"])},
        **{f"val/predicted_share_{k}": n / len(y_val) for k, n in enumerate(val_score["predicted_counts"])},
        "gap/balanced_accuracy": train_accuracy - val_score["balanced_accuracy"],
    }


# ------------------------------------------------------------------------------------ many heads on a frozen encoder's features


def start_head(cfg, seed, x_train):
    """A head to train, standardising as x_train (volumes, views, C) or (volumes, views, T, C) needs. Seeded here, for loading volumes
    draws random numbers and a full cache would not."""
    torch.manual_seed(seed)
    head = evaluation.new_head(cfg)
    head[0].fit(x_train.flatten(0, -2))
    return head


def last_layer(head, x_train, train, is_ordinal):
    """Weight (num_classes, C) and bias (num_classes,) that the last layer starts from: model.discriminant of what it is given;
    of an MLP as they are."""
    if any(isinstance(layer, torch.nn.Linear) for layer in list(head)[:-1]):  # on tiny random hidden units it would need huge weights
        return (model.ordinal(head[-1].weight) if is_ordinal else head[-1].weight), head[-1].bias
    place = {i: n for n, i in enumerate(dict.fromkeys(s.participant_id for s in train))}
    x, views = x_train.flatten(0, 1), x_train.shape[1]
    for layer in list(head.eval())[:-1]:
        x = layer(x)
    labels, participants = (torch.tensor(values).repeat_interleave(views)
                            for values in ([s.label for s in train], [place[s.participant_id] for s in train]))
    with torch.no_grad():
        return model.discriminant(x.detach(), labels, participants, len(data.CLASSES), is_ordinal)


def run_heads(rank, cfg, run_dir, identity, ledger, dev, x, samples, x_val, num_train, x_random):
    """Fit all heads that the config asks for and save the one that validation chooses as a run's best. On the CPU; every replica
    does the same.

    x (volumes, views, C): of train, and of samples (train, then val) where they are cross-validated. x_val (volumes, C).
    x_random (volumes, C): of samples, by a random encoder, for eval.floors.
    """
    if cfg.train.resume == "auto" and resume(run_dir, identity, {"head"}):
        print(f"{run_dir} holds this run, finished")
        return
    wandb_run = start_wandb(cfg, run_dir, rank, None)
    train, val, seeds = samples[:num_train], samples[num_train:], cfg.train.seeds or [cfg.seed]
    number = {"network": len(grid_of(cfg)), "logistic_regression": len(STRENGTHS), "knn": len(NEIGHBOURS)}[cfg.model.head.kind]
    print(f"{number} heads ({cfg.model.head.kind}) on {num_train} volumes{f', {len(seeds)} seeds' if len(seeds) > 1 else ''}"
          f"{f', {cfg.data.cv} folds beside' if cfg.data.cv else ''}; validation chooses")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: on a busy machine, more threads mostly wait for each other
    fits = [fit_heads(cfg, seed, x[:num_train], train, x_val, val) for seed in seeds]
    folds = cross_validate(cfg, seeds, x, samples) if cfg.data.cv else []
    floors = {}
    if cfg.eval.floors:
        floors["random encoder"] = fit_heads(cfg, seeds[0], x_random[:num_train, None], train, x_random[num_train:], val)[0].state_dict()
        floors["shuffled labels"] = fit_heads(cfg, seeds[0], x[:num_train], shuffled(train, cfg.seed),
                                              x_val, shuffled(val, cfg.seed))[0].state_dict()
    torch.set_num_threads(threads)

    head, history, predictions, rows = fits[0]
    best = next(row for row in rows if row["chosen"])
    if rank == 0:
        prepare_run_dir(run_dir, cfg, ledger, identity["encoder_sha256"], dev, None)
        content = {**identity, "epoch": best["best_epoch"], "head": head.state_dict(),
                   **scores_of(history[best["best_epoch"] - 1], *predictions), "sweep": best,
                   "repeats": [{"seed": seed, "head": fit[0].state_dict()} for seed, fit in zip(seeds, fits)],
                   **({"floors": floors} if floors else {})}
        if cfg.model.head.kind == "knn":
            content["train_balanced_accuracy"] = None  # everybody is their own nearest neighbour there
        for name in (evaluation.BEST, "last.pt"):  # the latter says that the run is finished
            b2.write(os.path.join(run_dir, name), lambda file: torch.save(content, file))
        b2.write(os.path.join(run_dir, "predictions_val.csv"), evaluation.predictions_csv(*predictions))
        b2.write(os.path.join(run_dir, "metrics.jsonl"), "".join(json.dumps(r) + "\n" for r in history))
        b2.write(os.path.join(run_dir, "sweep.csv"), csv_of([{"seed": seed, **row} for seed, fit in zip(seeds, fits) for row in fit[3]]))
        if folds:
            b2.write(os.path.join(run_dir, "cv.csv"), csv_of([row for row, *_ in folds]))
            b2.write(os.path.join(run_dir, "predictions_cv.csv"), evaluation.predictions_csv(*held_out(folds, seeds[0])))
        for record in history:
            wandb_run.log(record)
    swept = [name for name in best if name not in ("best_epoch", "val_balanced_accuracy", "val_loss", "chosen")
             and len({str(row[name]) for row in rows}) > 1]

    def described(row):
        epoch = [f"epoch {row['best_epoch']}"] if cfg.model.head.kind == "network" else []
        return ", ".join(epoch + [f"{name} {row[name]:.3g}" if type(row[name]) is float else f"{name} {row[name]}" for name in swept])

    for row in rows[:5]:
        print(f"  val bal.acc {row['val_balanced_accuracy']:.3f} loss {row['val_loss']:.3f}  "
              f"{described(row)}{'  *' if row['chosen'] else ''}")
    if cfg.model.head.kind == "network":
        print(epoch_lines(history[best["best_epoch"] - 1], cfg.train.epochs))
    print(f"best of {len(rows)}: {described(best)}; val balanced accuracy {best['val_balanced_accuracy']:.3f}; "
          f"saved as {os.path.join(run_dir, evaluation.BEST)}")
    if len(seeds) > 1:
        print(f"over {len(seeds)} seeds: val balanced accuracy "
              f"{mean_and_sd([row['val_balanced_accuracy'] for fit in fits for row in fit[3] if row['chosen']])}")
    for seed in seeds if folds else ():
        ids, y, p = held_out(folds, seed)
        print(f"{cfg.data.cv}-fold cross-validation{f', seed {seed}' if len(seeds) > 1 else ''}: "
              f"balanced accuracy {metrics.score(y, p)['balanced_accuracy']:.3f} on {len(ids)} participants, each held out once; "
              f"folds {mean_and_sd([row['held_out_balanced_accuracy'] for row, *_ in folds if row['seed'] == seed])}")
    finish(wandb_run, rank, cfg, run_dir, ledger, dev)


def scores_of(record, ids, y_val, p_val):
    """What a checkpoint says of its epoch: its scores, and its answers on validation, to which eval.py fits a temperature."""
    return {"val_balanced_accuracy": record["val/balanced_accuracy"], "val_loss": record["val/loss"],
            "train_balanced_accuracy": record["train/balanced_accuracy"],
            "val_predictions": {"participant_id": ids, "y_true": y_val.tolist(), "p": torch.from_numpy(p_val)}}


def shuffled(samples, seed):
    """The samples with the participants' labels permuted among them."""
    people = list({s.participant_id: s.label for s in samples}.items())
    labels = [people[i][1] for i in np.random.default_rng(seed).permutation(len(people))]
    label_of = {i: label for (i, _), label in zip(people, labels)}
    return [dataclasses.replace(s, label=label_of[s.participant_id]) for s in samples]


def mean_and_sd(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} ({', '.join(f'{v:.3f}' for v in values)})"


def csv_of(rows):
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def cross_validate(cfg, seeds, x, samples):
    """Fold by fold -> [(row of cv.csv, ids, y_true, probabilities) of the participants held out].

    x (volumes, views, C). Folds are of participants, stratified by class. Of each fold's score, neither weights nor choice know
    anything: it is held out, the next fold chooses head and epoch, the others train.
    """
    ids, y, _ = evaluation.by_participant(samples, np.zeros((len(samples), 1)))
    if np.bincount(y, minlength=len(data.CLASSES)).min() < cfg.data.cv:
        raise ValueError(f"data.cv={cfg.data.cv} needs as many participants of every class in train and val; "
                         f"there are {np.bincount(y).tolist()}")
    found = []
    for seed in seeds:
        folds = StratifiedKFold(cfg.data.cv, shuffle=True, random_state=seed).split(ids, y)
        fold_of = {ids[i]: fold for fold, (_, held) in enumerate(folds) for i in held}
        for fold in range(cfg.data.cv):
            part = {name: [] for name in ("train", "choose", "hold")}
            for i, sample in enumerate(samples):
                part[{fold: "hold", (fold + 1) % cfg.data.cv: "choose"}.get(fold_of[sample.participant_id], "train")].append(i)
            of = {name: [samples[i] for i in rows] for name, rows in part.items()}
            head, _, _, rows = fit_heads(cfg, seed, x[part["train"]], of["train"], x[part["choose"], 0], of["choose"])
            held = evaluation.by_participant(of["hold"], evaluation.predict(head, x[part["hold"], 0]))
            score = metrics.score(held[1], held[2])
            row = {"seed": seed, "fold": fold, "participants": len(held[0]), **next(row for row in rows if row["chosen"])}
            del row["chosen"]
            found.append((row | {"held_out_balanced_accuracy": score["balanced_accuracy"], "held_out_loss": score["log_loss"]}, *held))
    return found


def held_out(folds, seed):
    """-> ids, y_true, probabilities of all participants, each as its fold held it out."""
    ids, y, p = zip(*((ids, y, p) for row, ids, y, p in folds if row["seed"] == seed))
    return sum(ids, []), np.concatenate(y), np.concatenate(p)


def fit_heads(cfg, seed, x_train, train, x_val, val):
    """Every head that the config names -> (that which x_val chooses, its history, its (ids, y_true, probabilities) of val,
    rows of sweep.csv, best first)."""
    if cfg.model.head.kind == "network":
        fitted = sweep(cfg, seed, grid_of(cfg), start_head(cfg, seed, x_train), x_train, train, x_val, val)
    else:
        fitted = references(cfg, x_train, train, x_val, val)
    fitted[3].sort(key=lambda row: (math.isnan(row["val_loss"]), -row["val_balanced_accuracy"], row["val_loss"]))
    return fitted


def references(cfg, x_train, train, x_val, val):
    """As sweep, of scikit-learn's logistic regression or of kNN, for every C or k. Every view of a volume is a row."""
    views = x_train.shape[1]
    labels = torch.tensor([s.label for s in train])
    weights = losses.class_weights(list({s.participant_id: s.label for s in train}.values()), len(data.CLASSES), cfg.train.class_weights)
    x, y = x_train.flatten(0, 1), labels.repeat_interleave(views)
    candidates, best = [], None
    for strength in tqdm(NEIGHBOURS if cfg.model.head.kind == "knn" else STRENGTHS, desc=cfg.model.head.kind, leave=False,
                         mininterval=0.5, disable=device.rank() > 0):
        head = evaluation.new_head(cfg, len(x))
        if cfg.model.head.kind == "knn":
            if strength > len(x):
                continue
            settings = {"k": strength}
            head.fit(x, y, weights, strength)
        else:
            settings = {"C": float(strength), "converged": model.fit_logistic_regression(head, x, y, weights, strength)}
        ids, y_val, p_val = evaluation.by_participant(val, evaluation.predict(head, x_val))
        (accuracy,), (loss,) = metrics.quick_scores(y_val, p_val[None])
        candidates.append({**settings, "best_epoch": 1, "val_balanced_accuracy": accuracy, "val_loss": loss, "chosen": False})
        if best is None or better((accuracy, loss), best[0]):
            best = (accuracy, loss), head, (ids, y_val, p_val), candidates[-1]
    _, head, predictions, row = best
    row["chosen"] = True
    p = torch.from_numpy(evaluation.predict(head, x_train[:, 0]))  # (volumes, num_classes)
    loss = torch.from_numpy(metrics.negative_log(p.numpy()))[torch.arange(len(train)), labels]
    record = epoch_record(1, train, torch.cat([loss[:, None], p], dim=1), torch.arange(len(train)), *predictions[1:])
    record |= {"train/lr_head": 0.0, "train/lr_encoder": 0.0,
               "train/loss": (loss * weights[labels]).sum().item() / weights[labels].sum().item(), "train/grad_norm": 0.0, "best": True}
    return head, [record], predictions, candidates


def grid_of(cfg):
    """train.sweep -> settings of every head, [{"lr_head": ..., ...}]: all combinations, and what is not swept as it is elsewhere."""
    tried = {"loss": cfg.train.sweep.loss or [cfg.train.loss],
             "ordinal": cfg.train.sweep.ordinal or [cfg.model.head.ordinal],
             "class_weights": cfg.train.sweep.class_weights or [cfg.train.class_weights],
             "lr_head": cfg.train.sweep.lr_head or [cfg.train.lr_head],
             "weight_decay": cfg.train.sweep.weight_decay or [cfg.train.weight_decay]}
    return [dict(zip(tried, values)) for values in itertools.product(*tried.values())]


def runs(values):
    """[a, a, b] -> [(a, slice(0, 2)), (b, slice(2, 3))]: what lies side by side is a view, without a copy."""
    ends = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(values)))
    return [(values[start], slice(start, end)) for start, end in zip([0, *ends], ends)]


def sweep(cfg, seed, grid, head, x_train, train, x_val, val):
    """Train a head for each setting of the grid, all at once -> (best head, its history, its (ids, y_true, probabilities) of val,
    rows of sweep.csv).

    x_train (volumes, views, C), x_val (volumes, C): features of a frozen encoder, or tokens (..., T, C). The heads' parameters are
    stacked, (G, ...), and a step is one computation for all of them; each becomes what it would alone. Validation chooses head and epoch.
    """
    num_heads, num_classes, epochs = len(grid), len(data.CLASSES), cfg.train.epochs
    labels, people = torch.tensor([s.label for s in train]), list({s.participant_id: s.label for s in train}.values())
    batch_size = min(cfg.data.batch_size, len(train))
    steps_per_epoch = math.ceil(len(train) / batch_size)
    log_prior = log_prior_of(labels, cfg.data.sampler)
    params = {name: p.detach().repeat(num_heads, *[1] * p.ndim).requires_grad_() for name, p in head.named_parameters()}  # (G, ...)
    weight = params[f"{len(head) - 1}.weight"]  # (G, num_classes, hidden or C)

    class_weights = torch.stack([losses.class_weights(people, num_classes, h["class_weights"]) for h in grid])  # (G, num_classes)
    subtracted = torch.stack([log_prior * (h["loss"] == "logit_adjustment") for h in grid])[:, None]  # (G, 1, num_classes)
    with torch.no_grad():
        starts = {is_ordinal: last_layer(head, x_train, train, is_ordinal) for is_ordinal in {h["ordinal"] for h in grid}}
        weight.copy_(torch.stack([starts[h["ordinal"]][0] for h in grid]))
        params[f"{len(head) - 1}.bias"].copy_(torch.stack([starts[h["ordinal"]][1] + best_constant(log_prior, w, h["loss"])
                                                           for w, h in zip(class_weights, grid)]))
    heads_of_loss = runs([h["loss"] for h in grid])
    ordinal_heads = [heads for is_ordinal, heads in runs([h["ordinal"] for h in grid]) if is_ordinal]
    rates, decays = torch.tensor([h["lr_head"] for h in grid]), torch.tensor([h["weight_decay"] for h in grid])  # (G,)
    updates = [torch.zeros_like(p) for p in params.values()]
    # says where to; each head goes there at its own rate, and decays at its own
    optimizer = torch.optim.AdamW(updates, lr=1, weight_decay=0, fused=True)

    def logits_of(x, noise=None):
        """x (b, C) or (b, T, C) -> (G, b, num_classes)."""
        shared = True  # until the first layer that has parameters, x is the same for all heads
        for i, layer in enumerate(head):
            own = {name: params[f"{i}.{name}"] for name, _ in layer.named_parameters()}
            if isinstance(layer, model.HostDropout):
                x = layer(x, noise)
            elif not own:
                x = layer(x)
            elif shared and isinstance(layer, torch.nn.Linear):  # one matrix product for all
                x = F.linear(x, own["weight"].flatten(0, 1), own["bias"].flatten()).unflatten(1, (num_heads, -1)).transpose(0, 1)
            elif shared and isinstance(layer, model.AttentivePool):
                x = layer.look(x, own["query"])
            else:
                x = torch.func.vmap(lambda p, x: torch.func.functional_call(layer, p, (x,)), in_dims=(0, None if shared else 0))(own, x)
            shared = shared and not own
        return x

    def along(values, p):
        return values.view(-1, *[1] * (p.ndim - 1))  # (G,) -> (G, 1, ...)

    def share_directions():
        for heads in ordinal_heads:
            weight[heads] = model.ordinal(weight[heads])

    ids, y_val, _ = evaluation.by_participant(val, np.zeros((len(val), num_classes)))
    place = {i: n for n, i in enumerate(ids)}
    person = torch.tensor([place[s.participant_id] for s in val])  # (volumes,)
    best, best_epoch, reference, without, stopped = (
        [None] * num_heads, [0] * num_heads, [None] * num_heads, [0] * num_heads, [math.inf] * num_heads)
    best_params = {name: p.detach().clone() for name, p in params.items()}
    log = []
    patience = cfg.train.early_stopping.patience if cfg.train.early_stopping.enabled else math.inf
    for epoch in tqdm(range(1, epochs + 1), desc=f"{num_heads} heads", unit="epoch", leave=False, mininterval=0.5,
                      disable=device.rank() > 0):
        head.train()
        order, x_epoch = data.epoch_order(labels, cfg.data.sampler, seed, epoch), view_of_epoch(x_train, seed, epoch)
        # loss and logits of every draw; sums as in main
        drawn, sums = torch.empty(num_heads, len(order), 1 + num_classes), torch.zeros(2, num_heads)
        for step, batch in enumerate(order.split(batch_size)):
            targets = labels[batch]
            factor = lr_at((epoch - 1) * steps_per_epoch + step, epochs * steps_per_epoch, cfg.train.warmup_epochs * steps_per_epoch, 1.0)
            logits = logits_of(x_epoch[batch], model.Noise(noise_key(seed, epoch, step), torch.arange(len(batch)), batch_size))
            row_losses = torch.zeros(num_heads, len(batch))
            for name, heads in heads_of_loss:
                some = logits[heads]  # (g, b, num_classes)
                row_losses[heads] = losses.LOSSES[name](some.flatten(0, 1), targets.repeat(len(some)), log_prior).view(len(some), -1)
            row_weights = class_weights[:, targets]  # (G, b)
            loss = (row_losses * row_weights).sum(dim=1) / row_weights.sum(dim=1)  # (G,)
            gradients = torch.autograd.grad(loss.sum(), list(params.values()))
            with torch.no_grad():
                norm = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]).norm(dim=0)  # (G,)
                sums += torch.stack([loss * len(batch), norm])
                drawn[:, step * batch_size:][:, :len(batch), 0], drawn[:, step * batch_size:][:, :len(batch), 1:] = row_losses, logits
                clip = (cfg.train.grad_clip / (norm + 1e-6)).clamp(max=1)  # (G,)
                for update, g in zip(updates, gradients):
                    # the fused kernel reads nothing else rightly
                    update.grad = (g * along(clip, g) if cfg.train.grad_clip else g).contiguous()
                    update.zero_()
                optimizer.step()
                for p, update in zip(params.values(), updates):
                    rate = along(rates * factor, p)
                    p.mul_(1 - rate * along(decays * (p.ndim > 2), p)).addcmul_(update, rate)
                share_directions()
        head.eval()
        with torch.no_grad():
            p = (logits_of(x_val) - subtracted).double().softmax(dim=2)  # (G, volumes, num_classes)
            p_val = torch.zeros(num_heads, len(ids), num_classes, dtype=torch.float64).index_add_(1, person, p)
            p_val = p_val / person.bincount()[:, None]  # (G, participants, num_classes)
        diverged, p_val = (
            ~(torch.isfinite(sums).all(dim=0) & torch.isfinite(p_val).flatten(1).all(dim=1)),  # (G,); the others do not feel it
            p_val.numpy())
        log.append((drawn, sums, factor, order, p_val))
        improved = []
        for g, now in enumerate(zip(*metrics.quick_scores(y_val, p_val))):
            if diverged[g]:
                stopped[g] = min(stopped[g], epoch - 1)
            if epoch > stopped[g]:
                continue
            if best[g] is None or better(now, best[g]):
                best[g], best_epoch[g] = now, epoch
                improved.append(g)
            if reference[g] is None or better(now, reference[g], cfg.train.early_stopping.min_delta):
                reference[g], without[g] = now, 0
            else:
                without[g] += 1
            if without[g] >= patience:
                stopped[g] = epoch
        for name, p in params.items():
            best_params[name][improved] = p.detach()[improved]
        if max(stopped) < math.inf:
            break

    chosen = None
    for g in range(num_heads):
        if best[g] and (chosen is None or better(best[g], best[chosen])):
            chosen = g
    if chosen is None:
        raise ValueError("every head of train.sweep diverged in the first epoch; lower train.sweep.lr_head")
    head.load_state_dict({name: p[chosen] for name, p in best_params.items()}, strict=False)
    head.log_prior.copy_(subtracted[chosen, 0])
    history, running = [], None
    for epoch, (drawn, sums, factor, order, p_val) in enumerate(log[:int(min(stopped[chosen], len(log)))], 1):
        p = (drawn[chosen, :, 1:] - subtracted[chosen]).softmax(dim=1)  # (draws, num_classes)
        seen = torch.zeros(len(train), 1 + num_classes).index_add_(0, order, torch.cat([drawn[chosen, :, :1], p], dim=1))
        record = epoch_record(epoch, train, seen, order, y_val, p_val[chosen])
        record |= {"train/lr_head": grid[chosen]["lr_head"] * factor, "train/lr_encoder": 0.0,
                   "train/loss": sums[0, chosen].item() / len(train), "train/grad_norm": sums[1, chosen].item() / steps_per_epoch}
        now = (record["val/balanced_accuracy"], record["val/loss"])
        record["best"] = running is None or better(now, running)
        running = now if record["best"] else running
        history.append(record)
    rows = [{**h, "best_epoch": best_epoch[g], "val_balanced_accuracy": (best[g] or (math.nan,))[0],
             "val_loss": (best[g] or (math.nan,))[-1], "chosen": g == chosen} for g, h in enumerate(grid)]  # nan: diverged at once
    return head, history, (ids, y_val, log[best_epoch[chosen] - 1][4][chosen]), rows


# -------------------------------------------------------------------------------------------------- the parts of a step


def noise_key(seed, epoch, step):
    """Key of a step's random numbers."""
    return random.Random(f"{seed} {epoch} {step}").getrandbits(62)


def view_of_epoch(x, seed, epoch):
    """Features (volumes, views, C) -> of every volume the view that the epoch sees (volumes, C)."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {epoch} views").getrandbits(62))
    return x[torch.arange(len(x)), torch.randint(x.shape[1], (len(x),), generator=generator)]


def log_prior_of(labels, sampler):
    """Logarithm of the classes' shares (num_classes,) in what the sampler draws."""
    counts = labels.bincount(minlength=len(data.CLASSES)) if sampler == "shuffle" else torch.ones(len(data.CLASSES))
    return (counts / counts.sum()).log()


def best_constant(log_prior, class_weights, loss):
    """Logits (num_classes,) of the best answer that looks at nothing, as losses.LOSSES[loss] and these class weights see it.

    The last bias starts with it, as in Lin et al. 2017, section 4.1: otherwise a slow head has not learned the prior yet when
    logit adjustment takes it away.
    """
    logits = ((log_prior.exp() * class_weights).clamp(min=1e-3).log()
              - (log_prior.clamp(min=math.log(1e-3)) if loss == "balanced_softmax" else 0))
    return logits - logits.mean()


def micro_batches(batch, batch_size, size):
    """This replica's share of a batch of sample indices -> [(their places in the batch, the indices)], each (size,), -1: padding."""
    places = device.share(torch.arange(len(batch)), batch_size)
    size = min(size, len(places))
    places = F.pad(places, (0, -len(places) % size), value=-1)
    return [(part, torch.where(part < 0, -1, batch[part])) for part in places.split(size)]


def volumes_of(samples, parts, size, cfg, augment):
    """Yield the volumes (b, 1, D, H, W) of every micro-batch of every step, float16; padding is zeros."""
    volumes = data.Volumes(samples, size, cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline)
    micro = [rows.tolist() for step in parts for _, rows in step]
    with contextlib.closing(data.stream(volumes, None, [row for rows in micro for row in rows if row >= 0], cfg, augment)) as arriving:
        for rows in micro:
            yield torch.stack([next(arriving)[2] if row >= 0 else torch.zeros(1, *size, dtype=torch.float16) for row in rows])


def check_finite(values, at, cfg):
    """values on the host; ValueError before weights that are no numbers any more are saved."""
    values = values.cpu()
    if not torch.isfinite(values).all():
        raise ValueError(f"train loss, gradient or prediction is not finite in epoch {at['epoch']}; "
                         f"lower train.lr_head={cfg.train.lr_head} or train.lr_encoder={cfg.train.lr_encoder}, "
                         "or look at train.class_weights")
    return values


def first_epoch_of_encoder(cfg):
    """The epoch, counted from 1, from which on the encoder trains; infinity: never."""
    if not cfg.model.freeze_encoder:
        return 1
    return cfg.model.unfreeze_at_epoch + 1 if cfg.model.unfreeze_at_epoch >= 0 else math.inf


def doubts(cfg):
    """Settings that are allowed and seldom meant."""
    for part, first in (("head", 1), ("encoder", first_epoch_of_encoder(cfg))):
        if first <= cfg.train.epochs <= cfg.train.warmup_epochs + first - 1:
            yield f"train.warmup_epochs={cfg.train.warmup_epochs} lasts all {cfg.train.epochs - first + 1} epochs of the {part}"
    corrections = {"data.sampler=stratified": cfg.data.sampler == "stratified",
                   f"train.class_weights={cfg.train.class_weights}": cfg.train.class_weights != "none",
                   f"train.loss={cfg.train.loss}": cfg.train.loss in ("logit_adjustment", "balanced_softmax")}
    twice = [name for name, is_on in corrections.items() if is_on]
    if len(twice) > 1:
        yield (f"{' and '.join(twice)} correct the imbalance {'twice' if len(twice) == 2 else 'three times'}; "
               "keep one, and set the others to data.sampler=shuffle, train.class_weights=none, train.loss=ce")


def count(module):
    return sum(p.numel() for p in module.parameters())


def position(at, steps_per_epoch):
    return f"epoch {at['epoch']}" if at["step"] == steps_per_epoch else f"step {at['step']} of epoch {at['epoch']}"


def epoch_lines(record, epochs):
    """What the terminal shows of an epoch."""
    def by_class(name, form):
        return "/".join("-" if record[f"{name}_{k}"] is None else form.format(record[f"{name}_{k}"]) for k in range(len(data.CLASSES)))

    lr = "  ".join(f"{part} lr {record[f'train/lr_{part}']:.1e}" for part in ("head", "encoder") if record[f"train/lr_{part}"])
    return (f"epoch {record['epoch']:3d}/{epochs}  train loss {record['train/loss']:.3f} bal.acc {record['train/balanced_accuracy']:.3f}   "
            f"val loss {record['val/loss']:.3f} acc {record['val/accuracy']:.3f} bal.acc {record['val/balanced_accuracy']:.3f} "
            f"macro F1 {record['val/macro_f1']:.3f}   gap {record['gap/balanced_accuracy']:+.3f}{'  *' if record['best'] else ''}\n"
            f"    {lr}  gradient {record['train/grad_norm']:.2g}   by class: drawn {by_class('train/drawn', '{}')}, "
            f"loss {by_class('train/loss', '{:.2f}')}, predicted on val {by_class('val/predicted_share', '{:.0%}')}")


# ------------------------------------------------------------------------------------------- the run folder and W&B


def check_run_dir(run_dir, cfg):
    """ValueError when results must not or cannot go there; asked before anything is computed."""
    inside = set(os.listdir(run_dir)) - {"wandb"} if os.path.isdir(run_dir) else set()
    if os.path.exists(run_dir) and not os.path.isdir(run_dir) or inside and "provenance.json" not in inside:
        raise ValueError(f"paths.run_dir={run_dir} is not a run's folder and not empty; set paths.run_dir to another one")
    checkpoint = os.path.realpath(os.path.expanduser(cfg.paths.checkpoint_path))
    if not b2.is_remote(cfg.paths.checkpoint_path) and checkpoint.startswith(os.path.realpath(run_dir) + os.sep):
        raise ValueError(f"paths.checkpoint_path={cfg.paths.checkpoint_path} lies in paths.run_dir={run_dir}, "
                         "where an earlier run is replaced; set paths.run_dir to another one")


def resume(run_dir, identity, keys):
    """The run's last.pt to go on from, None where there is none yet. ValueError when going on would not give the run's result.

    keys: names of what it must hold besides identity.
    """
    path = os.path.join(run_dir, "last.pt")
    if not os.path.exists(path):
        return None
    try:
        last = evaluation.read_saved(path, {*identity, *keys})
    except ValueError as error:
        raise ValueError(f"{error}; {INSTEAD}") from error
    old, new = (config.flatten(part["config"]) for part in (last, identity))
    changed = [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key] and not key.startswith(HARMLESS)]
    changed += [f"{what} is another" for what in ("encoder_sha256", "labels_sha256", "manifest_sha256", "train_participants", "volumes")
                if last[what] != identity[what]]
    if changed:
        raise ValueError(f"{run_dir} holds a run whose result this would change: {'; '.join(changed)}; set that back, or {INSTEAD}")
    return last


def prepare_run_dir(run_dir, cfg, ledger, encoder_hash, dev, last):
    """Remove an earlier run's results, then write what this run is: provenance (by which a run's folder is known), config, ledger.

    last: where a run is resumed, its last.pt; everything stays then, and provenance.json notes it.
    """
    b2.remove_abandoned(run_dir, 0)
    if last:
        b2.write(os.path.join(run_dir, "metrics.jsonl"), "".join(json.dumps(r) + "\n" for r in last["history"]))
        with open(os.path.join(run_dir, "provenance.json"), encoding="utf-8") as f:
            provenance = json.load(f)
        provenance.setdefault("resumed", []).append({"after_epoch": last["epoch"], "after_step": last["step"], "command": command(),
                                                     "device": device.describe(dev), "world_size": device.world()})
        b2.write(os.path.join(run_dir, "provenance.json"), json.dumps(provenance, indent=1) + "\n")
        return
    earlier = [os.path.join(run_dir, name) for name in (
        evaluation.BEST, "last.pt", "metrics.jsonl", "predictions_val.csv", "sweep.csv", "cv.csv", "predictions_cv.csv",
        "config.yaml", "ledger.csv")]
    earlier = [path for path in earlier if os.path.exists(path)]
    remove_evaluations(run_dir)
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


def remove_evaluations(run_dir):
    """Remove what eval.py wrote of a checkpoint that is there no longer."""
    names = ["report.html", "plots/training.png", "plots/shares.png", "predictions_test.csv"]
    names += [name for split in ("val", "test") for name in (
        f"eval_{split}.json", *(f"plots/{plot}_{split}.png" for plot in ("confusion", "roc", "reliability")))]
    for folder in (run_dir, os.path.join(run_dir, "last")):
        # of the run folder itself, training writes these
        for name in (*names, *(("predictions_val.csv", "ledger.csv") if folder != run_dir else ())):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))


def command():
    return shlex.join([os.path.basename(sys.executable), *sys.argv])


def start_wandb(cfg, run_dir, rank, earlier):
    """The W&B run, or an object that ignores everything when log.wandb=disabled, and on ranks above 0.

    earlier: id of the run to go on with.
    """
    if cfg.log.wandb == "disabled" or rank:
        return SimpleNamespace(id=earlier, log=lambda record: None)
    try:
        import wandb
    except ImportError:
        raise ValueError(f"log.wandb={cfg.log.wandb} needs the package wandb: pip install wandb, or set log.wandb=disabled") from None
    mode = cfg.log.wandb
    if mode == "auto":
        host = urllib.parse.urlparse(wandb.Settings().base_url).hostname
        logins = os.environ.get("NETRC", os.path.expanduser("~/.netrc"))  # where `wandb login` puts the key
        try:
            has_key = (bool(os.environ.get("WANDB_API_KEY"))
                       or os.path.exists(logins) and netrc.netrc(logins).authenticators(host) is not None)
        except netrc.NetrcParseError as error:
            raise ValueError(f"log.wandb=auto looks for a key, but {error}; mend the file, or set log.wandb=offline") from error
        mode = "online" if has_key else "offline"
    os.makedirs(run_dir, exist_ok=True)
    try:
        return wandb.init(project=cfg.log.wandb_project, name=cfg.log.run_name, mode=mode, dir=run_dir, config=config.to_dict(cfg),
                          id=earlier, resume="allow" if earlier else None,
                          group=os.path.splitext(os.path.basename(cfg.paths.checkpoint_path))[0],
                          tags=["probe" if first_epoch_of_encoder(cfg) > cfg.train.epochs else "finetune", cfg.model.head.kind,
                                cfg.model.pool_method, cfg.data.scanner])
    except wandb.Error as error:
        raise ValueError(f"W&B did not start: {error}; mend that, or set log.wandb=offline") from error


def finish(wandb_run, rank, cfg, run_dir, ledger, dev):
    """What ends every run: what was left out, and W&B's summary."""
    if ledger.unreadable:
        print(f"{len(ledger.unreadable)} volumes could not be read and were left out (data.max_missing={cfg.data.max_missing})\n"
              f"{data.unreadable_table(ledger)}")
    finish_wandb(wandb_run, rank, cfg, run_dir, ledger)
    device.barrier(dev)  # nobody ends before rank 0 has written all


def finish_wandb(run, rank, cfg, run_dir, ledger):
    """Log what the run came to on validation: summary with intervals and alarms, confusion matrix, curves, ledger."""
    if cfg.log.wandb == "disabled" or rank:
        return
    import wandb
    from sklearn.metrics import roc_curve
    saved = evaluation.read_saved(os.path.join(run_dir, evaluation.BEST), {"val_predictions"})
    y, p = saved["val_predictions"]["y_true"], saved["val_predictions"]["p"].numpy()
    result = metrics.evaluate(y, p, len(data.CLASSES), saved["val_predictions"]["participant_id"])
    if saved["train_balanced_accuracy"] is not None:
        result["alarms"] += metrics.gap_alarm(saved["train_balanced_accuracy"], saved["val_balanced_accuracy"])
    header, *rows = csv.reader(io.StringIO(data.ledger_csv(ledger)))
    curves = {name: roc_curve(np.array(y) == k, p[:, k])[:2] for k, name in enumerate(data.CLASS_NAMES) if 0 < y.count(k) < len(y)}
    run.log({"val/confusion_matrix": wandb.plot.confusion_matrix(y_true=y, preds=p.argmax(axis=1).tolist(),
                                                                 class_names=list(data.CLASS_NAMES)),
             "val/roc": wandb.plot.line_series(*([c[axis].tolist() for c in curves.values()] for axis in (0, 1)), keys=list(curves),
                                               title="ROC, one against the rest", xname="false positives"),
             "ledger": wandb.Table(columns=header, data=rows)})
    run.summary.update({"best_epoch": saved["epoch"], "alarms": result["alarms"]})
    for name in metrics.SCORES:
        interval = result["ci95"][name] or (None, None)
        run.summary.update({f"best/val/{name}": result[name], f"best/val/{name}_low": interval[0], f"best/val/{name}_high": interval[1]})
    run.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, action="append", help="configuration file; a second one lies over the first")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    sys.stdout.reconfigure(line_buffering=True)  # in step with the progress bar also where the output is a file

    def job():
        cfg = config.load(args.config, args.overrides)
        phantom.prepare(cfg)
        device.launch(main, cfg)
    device.run(job)
