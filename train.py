"""Train a classification head on a frozen pretrained OCT encoder, or fine-tune both.

    python train.py --config configs/demo.yaml                   # laptop, synthetic data, 2 minutes
    python train.py --config configs/single_domain_01.yaml       # GPU if there is one, else CPU
    python train.py --config FILE train.epochs=10 train.lr_head=3e-4
    python train.py --config FILE --config configs/finetune.yaml   # later files go over earlier
    python train.py --config FILE device.processes=4             # a process for each of four GPUs
    torchrun --nproc-per-node=8 ... train.py --config FILE       # several hosts: docs/hosts.md
    python train.py --config FILE train.resume=auto              # resume from the last checkpoint
    .venv-xla/bin/python train.py --config FILE                  # on every host of a TPU pod

then `python eval.py --ckpt RUN_DIR --split test`. This script is meant to be copied and edited.
`main` runs everything from data to the saved checkpoint, `fit` is the training loop.

To change                     edit
the loss                      losses.LOSSES; heads.Heads.row_losses applies it
the head                      heads.Heads: its parameters have a leading axis of G heads
the label                     configs/tasks/, docs/your-own.md
the learning rate's schedule  lr_factor below
the augmentation              data.augment
which head and epoch is best  progress.merits
"""

if __name__ in ("__main__", "__mp_main__"):
    import begin

    begin.process()

import contextlib
import math
import random
import sys

import torch
import torch.nn.functional as F

import config
import curve
import data
import device
import features
import heads
import ledger
import loader
import model
import phantom
import repeats
import runs
import settings
import stages
import tracking
from progress import Epoch, Progress


def lr_factor(step, total_steps, warmup_steps):
    """Multiplier of the learning rate at a step: linear warm-up, then cosine decay to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def main(rank, cfg):
    """Everything from data to the saved checkpoint, in every replica.

    device.launch calls it; on ranks above 0 it prints nothing, and rank 0 alone writes.
    """
    dev = device.get(cfg.device.backend)
    # for code that you add: the randomness of this project has generators of its own
    device.seed(cfg.seed, dev)
    runs.check_folder(cfg)
    tracking.check(cfg)
    print(
        f"{cfg.project_name}, {cfg.log.run_name} on {device.describe(dev)}: "
        f"{loader.described(cfg)}, {cfg.paths.data}"
    )

    # the participants of each split, and who has no volume
    book = ledger.read(cfg)
    print(f"{book.description}\n{ledger.table(book)}")
    ledger.check(book, cfg.data.max_missing)
    check_classes(cfg, book)
    for note in settings.doubts(cfg, len(book.of("train"))):
        print(f"note: {note}")

    stages.plan(ahead(cfg, book))  # for the time left that progress lines show
    # features of the pretrained encoder, of each volume and of its augmented views, once
    encoder = features.open_encoder(cfg)
    runs.agree(cfg, book, encoder, dev)
    train_set, val_set = features.encode_for_training(cfg, book, encoder, dev)

    if settings.trains_one_head(cfg):
        # what last.pt must hold to be resumed
        needed = {"head", "wandb", "optimizer", "progress", "epoch", "step"}
        run = runs.start(cfg, book, encoder, train_set, val_set, dev, needed)
        fit(cfg, cfg.seed, train_set, val_set, dev, encoder, run)
    else:  # several heads, or a reference, on the features of the frozen encoder
        run = runs.start(cfg, book, encoder, train_set, val_set, dev, {"head", "wandb"})
        if run.earlier:  # such a run is saved at its end alone
            print(f"{run.folder} holds this run, finished")
            return
        by_random_encoder = None
        if cfg.eval.floors:
            other = features.random_encoder(encoder, cfg.seed)
            by_random_encoder = [
                features.encode(cfg, book, part.samples, other, dev, again=True)
                for part in (train_set, val_set)
            ]
        # Every replica does all of this by itself, on the CPU, where small heads take seconds: so
        # all choose the same head.
        with device.alone():
            repeats.fit_all(fit, cfg, run, train_set, val_set, by_random_encoder)
    run.finish()


def fit(cfg, seed, train_set, val_set, dev, encoder=None, run=None, stage=None):
    """Train G heads in parallel on Features, or one head together with the encoder.

    Each head becomes what it would be alone; validation chooses the best head and epoch, among them
    epoch 0: what the head starts from. Returns repeats.Fitted, but with a run (a single head),
    which is saved and printed as it goes, None. stage: the stages.Stage that counts epochs.

    Shapes: G heads, b volumes of a micro-batch, C channels, N tokens of the encoder, T tokens that
    an attentive head takes. A plain probe and fine-tuning are G = 1.
    """
    epochs = cfg.train.epochs
    unfreeze_epoch = settings.first_epoch_of_encoder(cfg)  # infinity: never
    bank = heads.start(cfg, seed, train_set, len(settings.class_names(cfg))).to(dev)
    num_classes = bank.weight.shape[1]
    network = prepare_encoder(cfg, encoder, dev) if unfreeze_epoch <= epochs else None
    optimizer = heads.Optimizer(cfg, bank, network)
    labels = train_set.labels  # (volumes,)
    x_val = val_set.x.to(dev)  # (volumes, C) or (volumes, T, C)
    batch_size = min(cfg.data.batch_size, len(labels))
    steps_per_epoch = math.ceil(len(labels) / batch_size)
    progress = Progress(cfg, len(bank.settings), steps_per_epoch)
    if run:
        run.begin(bank, network, optimizer, progress)  # restores all four from last.pt, if resumed
        next_epoch = progress.epoch + (progress.step == steps_per_epoch)
        stages.plan(epochs_ahead(cfg, len(labels), len(x_val), next_epoch))
    class_weights = bank.class_weights.cpu()  # (G, num_classes); labels are on the host too
    best_parameters = {name: p.detach().clone() for name, p in bank.named_parameters()}
    finished = []  # Epochs

    # until the last epoch, or until patience ends (train.early_stopping); epoch 0 takes no step
    for epoch in progress.epochs(stage):
        # Every random number depends on seed, epoch, step and volume alone: neither the number of
        # replicas nor an interruption changes the result.
        order = data.epoch_order(labels, cfg.data.sampler, seed, epoch, num_classes)
        batches = order.split(batch_size)
        first_step = progress.step  # above 0 where an epoch is resumed
        encoder_trains = epoch >= unfreeze_epoch
        micro_batch_size = cfg.train.micro_batch if encoder_trains else batch_size
        steps = [micro_batches(batch, batch_size, micro_batch_size) for batch in batches]
        x_train = view_of_epoch(train_set.views, seed, epoch).to(dev)  # as x_val
        summary = Epoch(epoch, order, bank, steps_per_epoch)
        if first_step:
            summary.restore(run.earlier)
        bank.train()
        if network:
            network.requires_grad_(encoder_trains).train(encoder_trains)
        optimizer.prepare()
        # volumes are read from the first next() on, so never while the encoder is frozen
        volumes = volumes_of(cfg, train_set.samples, steps[first_step:], encoder, epoch)
        with contextlib.closing(volumes):
            for step in range(first_step, steps_per_epoch):
                batch_labels = labels[batches[step]]
                weight_sum = class_weights[:, batch_labels].sum(dim=1, keepdim=True)  # (G, 1)
                # this replica's: positions in the batch, indices of train_set, each (b,); padding
                # is -1, which reads the last volume and gives it no weight
                for positions, indices in steps[step]:
                    device.step_done(dev)  # on XLA: run what the micro-batch before has recorded
                    noise = model.Noise(noise_key(seed, epoch, step), positions, batch_size)
                    if encoder_trains:
                        volume = device.send(next(volumes), dev).float()  # (b, 1, D, H, W)
                        with device.autocast(dev, cfg.train.precision):
                            tokens = network(volume, noise)  # (b, N, C)
                        x = features.pooled(cfg, tokens, network.grid(encoder.size))
                    else:
                        x = x_train[indices.to(dev)]
                    logits = bank(x, noise)  # x (b, C) or (b, T, C) -> (G, b, num_classes)
                    targets = labels[indices]
                    losses = bank.row_losses(logits, targets.to(dev))  # (G, b)
                    weights = class_weights[:, targets] * (indices >= 0) / weight_sum  # (G, b)
                    # (G,): this micro-batch's share of the batch's weighted mean loss. The shares
                    # add up over micro-batches and replicas, and the heads do not touch each other.
                    loss = (losses * weights.to(dev)).sum(dim=1)
                    if epoch:
                        loss.sum().backward()
                    summary.add(indices.to(dev), losses, logits, loss * len(batch_labels))
                if epoch == 0:
                    head_factor = encoder_factor = 0.0
                    progress.step = step + 1
                    continue
                # a program of its own, so that all micro-batches of all steps are the same one
                device.step_done(dev)
                device.all_sum_gradients(optimizer.trained())
                summary.norms += optimizer.clip(cfg.train.grad_clip) / device.world()
                head_factor, encoder_factor = (
                    factor_from(first_epoch, cfg, epoch, step, steps_per_epoch)
                    for first_epoch in (1, unfreeze_epoch)
                )
                optimizer.step(head_factor, encoder_factor)  # and gradients are zeros again
                device.step_done(dev)
                progress.step = step + 1
                if run and progress.step < steps_per_epoch and run.is_due(progress.step):
                    run.save_within_epoch(summary)

        if encoder_trains:
            x_val = features.encode_now(cfg, val_set.samples, encoder, dev, f"val of epoch {epoch}")
            x_val = x_val.to(dev)
        predictions = heads.by_unit(val_set.samples, heads.predict(bank, x_val))
        summary.finish(predictions, head_factor, encoder_factor * cfg.train.lr_encoder)
        # until the encoder trains, patience begins anew: at first, training it costs some score
        reset_patience = epoch <= unfreeze_epoch <= epochs
        improved = progress.update(summary, reset_patience)  # indices of heads
        # A run has its best head on the disk already, and on XLA the copy would compile another
        # program.
        if not run:
            for name, p in bank.named_parameters():
                best_parameters[name][improved] = p.detach()[improved]
        finished.append(summary)
        if run:
            again = None
            if epoch == 0 and improved and settings.refits(cfg):
                again = heads.refit(cfg, seed, bank.settings[0], train_set, val_set, num_classes)
            run.save_epoch(summary, train_set, again)

    if run:
        run.end()
        return None
    bank.load_state_dict(best_parameters, strict=False)  # buffers do not change
    return repeats.best_head(cfg, bank, progress, finished, train_set)


# ------------------------------------------------------------------------------ what fit is made of


def ahead(cfg, book):
    """The stages of `main`, for stages.plan."""
    train, val = (len(book.of(split)) for split in ("train", "val"))
    found = features.ahead(cfg, book)
    if settings.trains_one_head(cfg):
        return found + epochs_ahead(cfg, train, val)
    if cfg.eval.floors:
        found += [("encoding", math.ceil(n / device.world())) for n in (train, val)]
    return [*found, ("training", 0)]


def epochs_ahead(cfg, train, val, epoch=1):
    """The stages of an encoder's training, from an epoch on, of so many volumes in all."""
    first = max(epoch, settings.first_epoch_of_encoder(cfg))
    both = [
        (kind, math.ceil(n / device.world()))
        for kind, n in (("training", train), ("encoding", val))
    ]
    return both * max(0, cfg.train.epochs + 1 - first)


def factor_from(first_epoch, cfg, epoch, step, steps_per_epoch):
    """lr_factor of parameters that train from first_epoch on, with their own warm-up; 0 before."""
    if epoch < first_epoch:
        return 0.0
    steps_done = (epoch - first_epoch) * steps_per_epoch + step
    total_steps = (cfg.train.epochs - first_epoch + 1) * steps_per_epoch
    return lr_factor(steps_done, total_steps, cfg.train.warmup_epochs * steps_per_epoch)


def prepare_encoder(cfg, encoder, dev):
    """The encoder's module on its device, with drop-path and activation checkpointing."""
    module = encoder.module.to(dev)
    module.drop_path = cfg.model.drop_path
    module.checkpoint = device.checkpointing(dev) if cfg.train.activation_checkpointing else None
    return module


def noise_key(*parts):
    """A number that the parts decide, the same in every process: a seed for random numbers."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)


def view_of_epoch(views, seed, epoch):
    """Draw one view of every volume: (volumes, views, ...) -> (volumes, ...)."""
    generator = torch.Generator().manual_seed(noise_key(seed, epoch, "views"))
    chosen = torch.randint(views.shape[1], (len(views),), generator=generator)
    return views[torch.arange(len(views)), chosen]


def micro_batches(batch, batch_size, size):
    """Indices of a batch (n,) -> this replica's micro-batches, [(positions, indices), ...].

    Both are (size,); positions are those in the batch; -1 is padding. All have the same size, for
    XLA compiles a program for each shape.
    """
    positions = device.share(torch.arange(len(batch)), batch_size)
    size = min(size, len(positions))
    positions = F.pad(positions, (0, -len(positions) % size), value=-1)
    return [(part, torch.where(part < 0, -1, batch[part])) for part in positions.split(size)]


def volumes_of(cfg, samples, steps, encoder, epoch):
    """Yield the augmented volumes (b, 1, D, H, W) of every micro-batch of the steps, as data.stream
    does. Padding is zeros.
    """
    micro = [indices.tolist() for step in steps for _, indices in step]
    order = [index for indices in micro for index in indices if index >= 0]
    strength = data.strengths(cfg)
    augment = lambda key, volume: data.augment(volume, strength, f"{cfg.seed} {epoch} {key}")
    intensities = encoder.wants_intensities
    kind = torch.float32 if intensities else torch.float16
    padding = torch.zeros(1, *encoder.size, dtype=kind)
    volumes = data.open_volumes(cfg, samples, encoder.size, are_intensities=intensities)
    desc, reading = f"epoch {epoch}/{cfg.train.epochs}", volumes.reading
    stage = stages.Stage(desc, len(order), "volume", "training", reading=reading, leave=False)
    with stage, contextlib.closing(data.stream(volumes, None, order, cfg, augment)) as stream:
        arriving = (volume for _, _, volume in stream)
        for indices in micro:
            batch = [next(arriving) if index >= 0 else padding for index in indices]
            stage.update(sum(index >= 0 for index in indices))
            yield torch.stack(batch)


# -------------------------------------------------------------------------------------- the command


def check_classes(cfg, book):
    """ValueError, before anything is encoded, where a class is not there in training, or has too
    few people for data.cv or train.fractions."""
    ledger.check_classes(book)
    curve.check(cfg, book.of("train"))
    repeats.check_folds(cfg, book.of("train") + book.of("val"))


def command():
    args = config.parser(__doc__).parse_intermixed_args()
    # flush every line, so that a log file has output and progress bars in order
    sys.stdout.reconfigure(line_buffering=True)
    cfg = config.load(args.config, args.overrides)
    settings.check_placeholders(cfg)
    phantom.prepare(cfg)  # the synthetic data of a demo, where they are not there yet
    with runs.locked(cfg):
        device.launch(main, cfg)


if __name__ == "__main__":
    device.run(command)
