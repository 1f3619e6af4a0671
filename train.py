"""Train a head on a pretrained OCT encoder, and the encoder too if asked. Copy it and hack on it.

    python train.py --config configs/demo.yaml                   # laptop, synthetic data, 2 minutes
    python train.py --config configs/single_domain_01.yaml       # GPU or CPU, whichever is there
    python train.py --config FILE train.epochs=10 train.lr_head=3e-4
    python train.py --config FILE --config configs/finetune.yaml   # the encoder trains too
    python train.py --config FILE device.processes=4             # four GPUs, or four CPU processes
    python train.py --config FILE train.resume=auto              # go on after an interruption
    .venv-xla/bin/python train.py --config FILE                  # on every host of a TPU pod

then `python eval.py --ckpt RUN_DIR --split test`. `main` is the job, from data to saved checkpoint;
`fit` is the training loop, with the optimisation step in view. To change the loss, see losses.py;
the head, heads.Heads; the label, ledger.py; the learning rate's schedule, lr_at below.
docs/run_folder.md says what a run leaves behind.
"""

import argparse
import contextlib
import functools
import math
import random
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import data
import device
import features
import heads
import ledger
import losses
import model
import phantom
import references
import repeats
import runs
from progress import Epoch, Progress, epoch_record


def lr_at(step, total_steps, warmup_steps):
    """Share of the full learning rate at a step: linear warm-up, then half a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (
        1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))
    )


def main(rank, cfg):
    """The job, from data to saved checkpoint, in every replica; rank 0 alone writes and prints."""
    dev = device.get(cfg.device.backend)
    # for what you add: all that is random here draws from generators of its own
    device.seed(cfg.seed, dev)
    runs.check_folder(cfg)
    print(
        f"{cfg.project_name}, {cfg.log.run_name} on {device.describe(dev)}: "
        f"{cfg.paths.checkpoint_path} ({cfg.model.encoder} encoder), {cfg.paths.data}"
    )

    # who is there, who is not
    book = ledger.read(cfg)
    print(f"{book.description}\n{ledger.table(book)}")
    ledger.check(book, cfg.data.max_missing)
    check_classes(cfg, book)
    for note in config.doubts(cfg, len(book.of("train"))):
        print(f"note: {note}")

    # features of the pretrained encoder: while it is frozen, every volume is encoded once, and the
    # heads train on its features
    encoder = features.open_encoder(cfg)
    train, val = features.encode_for_training(cfg, book, encoder, dev)

    if config.trains_one_head(cfg):
        needed = {"head", "wandb", "optimizer", "progress"}
        run = runs.start(cfg, book, encoder, train, val, dev, needed)
        fit(cfg, cfg.seed, train, val, dev, encoder, run)
    else:
        run = runs.start(cfg, book, encoder, train, val, dev, {"head", "wandb"})
        if run.earlier:
            print(f"{run.folder} holds this run, finished")
            return
        floor = None
        if cfg.eval.floors:  # the same features by a random encoder
            other = features.random_encoder(encoder, cfg.seed)
            parts = (part.samples for part in (train, val))
            floor = [features.encode(cfg, book, s, other, dev, again=True) for s in parts]
        fit_again = fit if cfg.model.head.kind == "network" else fit_references
        fit_again = functools.partial(fit_again, dev=torch.device("cpu"))
        # on the CPU, where many small heads cost seconds; every replica does the same work itself,
        # and so all choose the same head
        with device.alone():
            repeats.fit_all(fit_again, cfg, run, train, val, floor)
    run.finish()


def fit(cfg, seed, train, val, dev, encoder=None, run=None):
    """Train a bank of heads on Features, and the encoder with one head where the config says so.

    Validation chooses head and epoch. Without a run, the result is returned, as repeats.Fitted; a
    run saves and prints as it goes.
    """
    epochs, unfreeze = cfg.train.epochs, config.first_epoch_of_encoder(cfg)
    bank = heads.start(cfg, seed, train, len(ledger.CLASSES)).to(dev)
    module = prepare_encoder(cfg, encoder, dev) if unfreeze <= epochs else None
    optimizer = heads.Optimizer(cfg, bank, module)
    labels, x_val = train.labels, val.x.to(dev)  # (volumes,); (volumes, C) or (volumes, T, C)
    batch_size = min(cfg.data.batch_size, len(labels))
    steps_per_epoch = math.ceil(len(labels) / batch_size)
    progress = Progress(cfg, len(bank.settings), steps_per_epoch)
    if run:
        run.begin(bank, module, optimizer, progress)
    class_weights = bank.class_weights.cpu()  # (G, num_classes)
    log, best = [], {name: p.detach().clone() for name, p in bank.named_parameters()}

    for epoch in progress.epochs(f"{len(bank.settings)} heads", is_silent=run is not None):
        # order, views and every other random number depend on seed, epoch, step and volume alone
        order = data.epoch_order(labels, cfg.data.sampler, seed, epoch)
        batches, first_step = order.split(batch_size), progress.step
        encoder_trains = epoch >= unfreeze
        micro_batch = cfg.train.micro_batch if encoder_trains else batch_size
        parts = [micro_batches(batch, batch_size, micro_batch) for batch in batches]
        x_epoch = view_of_epoch(train.views, seed, epoch).to(dev)  # (volumes, C) or (volumes, T, C)
        this = Epoch(epoch, order, *bank.log_prior.shape, steps_per_epoch, dev)
        if first_step and device.rank() == 0:  # the replicas' are added up
            vars(this).update({name: v.to(dev) for name, v in run.earlier["so_far"].items()})
        bank.train()
        if module:
            module.requires_grad_(encoder_trains).train(encoder_trains)
        streamed = volumes_of(cfg, train.samples, parts[first_step:], encoder, epoch)
        with contextlib.closing(streamed) as volumes:
            for step in range(first_step, steps_per_epoch):
                targets = labels[batches[step]]
                batch_weight = class_weights[:, targets].sum(dim=1, keepdim=True)  # (G, 1)
                # this replica's part: places in the batch and indices of train, (b,); -1: padding
                for places, rows in parts[step]:
                    noise = model.Noise(noise_key(seed, epoch, step), places, batch_size)
                    if encoder_trains:
                        volume = device.send(next(volumes), dev).float()  # (b, 1, D, H, W)
                        with device.autocast(dev, cfg.train.precision):
                            tokens = module(volume, noise)  # (b, N, C)
                        x = features.pooled(cfg, tokens, module.grid(encoder.size))
                    else:
                        x = x_epoch[rows.to(dev)]
                    logits = bank(x, noise)  # (b, C) or (b, T, C) -> (G, b, num_classes)
                    row_losses = bank.row_losses(logits, labels[rows].to(dev))  # (G, b)
                    weights = class_weights[:, labels[rows]] * (rows >= 0) / batch_weight  # (G, b)
                    # (G,): of the whole batch, once the replicas' gradients are added up
                    loss = (row_losses * weights.to(dev)).sum(dim=1)
                    loss.sum().backward()
                    so_far = logits - bank.log_prior[:, None]
                    this.see(rows.to(dev), row_losses, so_far, loss * len(targets))
                    if rows is not parts[step][-1][1]:
                        device.step_done(dev)
                device.all_sum_gradients(optimizer.trained())
                this.norms += optimizer.clip(cfg.train.grad_clip) / device.world()
                this.rates = [rate_at(cfg, n, epoch, step, steps_per_epoch) for n in (1, unfreeze)]
                optimizer.step(*this.rates)  # shares of the head's and the encoder's learning rates
                device.step_done(dev)
                progress.step = step + 1
                if run and progress.step < steps_per_epoch and run.is_due(progress.step):
                    run.save_within(this.summed())

        if encoder_trains:
            desc = f"val of epoch {epoch}"
            x_val = features.encode_now(cfg, val.samples, encoder, dev, desc).to(dev)
        vars(this).update(this.summed())
        this.predictions = heads.by_participant(val.samples, heads.predict(bank, x_val))
        # patience begins when the encoder does: at first it costs some of the head's score
        improved = progress.update(this, restart=epoch <= unfreeze <= epochs)
        for name, p in bank.named_parameters():
            best[name][improved] = p.detach()[improved]
        log.append(this)
        if run:
            run.save_epoch(this, train)

    if run:
        run.end()
        return None
    bank.load_state_dict(best, strict=False)
    return chosen(cfg, bank, progress, log, train)


def fit_references(cfg, seed, train, val, dev):
    """As fit, of scikit-learn's logistic regression or of kNN, for every C or k; training them has
    one epoch."""
    bank, labels = references.fit(cfg, train, len(ledger.CLASSES)), train.labels
    people, scheme = list(train.participants.values()), cfg.train.class_weights
    weights = losses.class_weights(people, len(ledger.CLASSES), scheme)
    p = torch.from_numpy(heads.predict(bank, train.x))  # (G, volumes, num_classes)
    row_losses = -p.clamp(min=torch.finfo(p.dtype).eps).log()[:, torch.arange(len(labels)), labels]
    loss = (row_losses * weights[labels]).sum(dim=1) / weights[labels].sum()  # (G,)
    epoch = Epoch(1, torch.arange(len(labels)), len(p), p.shape[2])
    epoch.see(epoch.drawn, row_losses, p.log(), loss * len(labels))
    epoch.predictions = heads.by_participant(val.samples, heads.predict(bank, val.x))
    progress = Progress(cfg, len(p), steps_per_epoch=1)
    progress.update(epoch)
    return chosen(cfg, bank, progress, [epoch], train)


def chosen(cfg, bank, progress, log, train):
    """The bank at every head's best, and the Epochs of all -> repeats.Fitted, of the head that
    validation chooses."""
    g = progress.chosen()
    epochs = log[: int(min(progress.last_epoch[g], len(log)))]
    history = [epoch_record(train, epoch, g, bank.settings[g]) for epoch in epochs]
    predictions = log[progress.best_epoch[g] - 1].predictions.of_head(g)
    head, rows = references.load(bank.one(g), cfg), progress.rows(bank.settings)
    return repeats.Fitted(head, history, predictions, rows)


# ---------------------------------------------------------------------- the parts of fit


def prepare_encoder(cfg, encoder, dev):
    """The encoder's module on its device, as it is to train."""
    module = encoder.module.to(dev)
    module.drop_path = cfg.model.drop_path
    module.checkpoint = device.checkpointing(dev) if cfg.train.activation_checkpointing else None
    return module


def rate_at(cfg, first_epoch, epoch, step, steps_per_epoch):
    """lr_at for a part of the model that trains from first_epoch on; 0 before."""
    if epoch < first_epoch:
        return 0.0
    steps_done = (epoch - first_epoch) * steps_per_epoch + step
    total = (cfg.train.epochs - first_epoch + 1) * steps_per_epoch
    return lr_at(steps_done, total, cfg.train.warmup_epochs * steps_per_epoch)


def noise_key(seed, epoch, step):
    """Key of a step's random numbers."""
    return random.Random(f"{seed} {epoch} {step}").getrandbits(62)


def view_of_epoch(views, seed, epoch):
    """Features (volumes, views, ...) -> of every volume the view that the epoch sees (volumes,
    ...)."""
    key = random.Random(f"{seed} {epoch} views").getrandbits(62)
    generator, number = torch.Generator().manual_seed(key), len(views)
    which = torch.randint(views.shape[1], (number,), generator=generator)
    return views[torch.arange(number), which]


def micro_batches(batch, batch_size, size):
    """This replica's share of a batch of sample indices -> [(their places in the batch, the
    indices)], each (size,), -1: padding."""
    places = device.share(torch.arange(len(batch)), batch_size)
    size = min(size, len(places))
    places = F.pad(places, (0, -len(places) % size), value=-1)
    return [(part, torch.where(part < 0, -1, batch[part])) for part in places.split(size)]


def volumes_of(cfg, samples, parts, encoder, epoch):
    """Yield the augmented volumes (b, 1, D, H, W) of every micro-batch of every step, float16;
    padding is zeros."""
    volumes = data.Volumes(
        samples, encoder.size, cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline
    )
    micro = [rows.tolist() for step in parts for _, rows in step]
    wanted = [row for rows in micro for row in rows if row >= 0]
    strength = data.strengths(cfg)
    augment = lambda key, volume: data.augment(volume, strength, f"{cfg.seed} {epoch} {key}")
    padding = torch.zeros(1, *encoder.size, dtype=torch.float16)
    with contextlib.closing(data.stream(volumes, None, wanted, cfg, augment)) as arriving:
        name, hidden = f"epoch {epoch}", device.rank() > 0
        bar = tqdm(arriving, name, len(wanted), leave=False, unit="volume", disable=hidden)
        arriving = iter(bar)
        for rows in micro:
            yield torch.stack([next(arriving)[2] if row >= 0 else padding for row in rows])


def check_classes(cfg, book):
    """ValueError before anything is encoded, where the config needs every class in training and one
    is not there."""
    if cfg.data.sampler == "stratified":
        ledger.check_classes(book, "data.sampler=stratified")
    for scheme in cfg.train.sweep.class_weights or [cfg.train.class_weights]:
        if scheme in ("auto", "effective"):
            ledger.check_classes(book, f"train.class_weights={scheme}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        help="configuration file; a second one lies over the first",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    sys.stdout.reconfigure(
        line_buffering=True
    )  # in step with the progress bar also where the output is a file

    def job():
        cfg = config.load(args.config, args.overrides)
        phantom.prepare(cfg)
        device.launch(main, cfg)

    device.run(job)
