"""The encoder of the config -> features of every volume, each computed once and kept.

    encoder = open_encoder(cfg)                                 # checked against the config
    found = encode(cfg, book, book.of("test"), encoder, dev)    # Features: samples, x (volumes, C)
    train, val = encode_for_training(cfg, book, encoder, dev)   # with augmented views, if asked for
    x = encode_now(cfg, samples, encoder, dev, "validation")    # while it trains: nothing is kept

For an attentive head a volume's feature is its tokens (T, C) on model.token_grid, in place of their
mean (C,).
"""

import contextlib
import itertools
import math
import os
import shutil
from dataclasses import dataclass

import numpy as np
import torch

import data
import device
import facts
import files
import given
import ledger
import model
import settings
import stages
from loader import Encoder, open_encoder, random_encoder  # noqa: F401  (where they are looked for)
from volumes import READING

VERSION = "v2"  # part of every feature's key: change it with model.ViT3D.forward or model.pool


@dataclass
class Features:
    """What an encoder makes of volumes: a Sample for each, x (volumes, C) or tokens (volumes, T,
    C), float32 on the CPU.

    views (volumes, views, C) or (volumes, views, T, C): x first, then what it makes of augmented
    views.
    """

    samples: list
    x: torch.Tensor
    views: torch.Tensor = None

    def __post_init__(self):
        if self.views is None:
            self.views = self.x[:, None]

    @property
    def labels(self):
        return torch.tensor([s.label for s in self.samples])

    @property
    def units(self):
        """{unit: label}, in order: of the participants, or of what data.unit says."""
        return {s.unit: s.label for s in self.samples}

    def rows(self, indices):
        """The Features of some of the volumes."""
        return Features([self.samples[i] for i in indices], self.x[indices], self.views[indices])

    def with_others(self, others):
        """These volumes, then the others."""
        x, views = (
            torch.cat([getattr(part, name) for part in (self, others)]) for name in ("x", "views")
        )
        return Features(self.samples + others.samples, x, views)

    def labelled(self, samples):
        """The same features with other labels: a Sample for each."""
        return Features(samples, self.x, self.views)


def pooled(cfg, tokens, grid):
    """Tokens (B, N, C) of a grid (d, h, w) -> what a head takes: (B, C), or for an attentive head
    (B, T, C)."""
    if cfg.model.pool_method == "attentive":
        return model.pool_grid(tokens.float(), grid, cfg.model.token_grid, cfg.model.token_pool)
    return model.pool(tokens.float(), cfg.model.pool_method)


def shape_of(cfg):
    """Shape of a volume's feature: (C,) or (T, C)."""
    tokens = [math.prod(cfg.model.token_grid)] if cfg.model.pool_method == "attentive" else []
    return (*tokens, cfg.model.emb_dim)


class Kept:
    """The features below paths.cache_dir, by encoder weights, pooling, precision, view and
    volume."""

    def __init__(self, cfg, encoder, view):
        self.shape, self.dtype, pooling = shape_of(cfg), np.float32, cfg.model.pool_method
        if pooling == "attentive":  # tokens take a hundred times the room
            grid = "x".join(map(str, cfg.model.token_grid))
            self.dtype, pooling = np.float16, f"tokens{grid}{cfg.model.token_pool}"
        name = f"{encoder.sha256[:16]}-{pooling}-{cfg.train.precision}-{VERSION}{READING}"
        self.folder = os.path.join(os.path.expanduser(cfg.paths.cache_dir), "features", name)
        if view:
            how = f"{data.AUGMENTATION} {data.strengths(cfg)} {cfg.seed} {view}"
            self.folder += os.sep + files.hashed(how)[:16]
        files.remove_abandoned(self.folder, 60)  # nobody takes so long to write a feature

    def path(self, key):
        return os.path.join(self.folder, key + ".npy")

    def load(self, key):
        return files.load_array(self.path(key), self.dtype, self.shape)

    def check_room(self, number):
        """Say how much disk the tokens of so many volumes will take; ValueError when it is not
        there."""
        need, folder = number * 2 * math.prod(self.shape), os.path.dirname(self.folder)
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        print(
            f"tokens: {number} volumes to encode, {self.shape[0]} x {self.shape[1]} float16 each: "
            f"{need / 1e9:.2g} GB in {folder}, {free / 1e9:.3g} GB free"
        )
        if need > free:
            raise ValueError(
                f"{folder} has no room for {need / 1e9:.3g} GB of tokens; "
                "set a smaller model.token_grid, or paths.cache_dir elsewhere"
            )


def encode(cfg, book, samples, encoder, dev, view=0, again=False, earlier=facts.NOTHING):
    """The Features of the samples that could be read, in order; the others are struck off the
    ledger.

    Every volume is encoded once for ever, and replicas share the work. view: 0 is the volume as it
    is, others are augmented. again: all could be read before; ValueError if one cannot be read now.
    earlier: facts.summary of volumes with which none of these may have its pixels in common.
    """
    if cfg.paths.features:
        x = torch.from_numpy(given.lookup(cfg, samples))
        tokens = x.ndim == 3 and cfg.model.pool_method != "attentive"
        ledger.check(book, cfg.data.max_missing)
        return Features(samples, model.pool(x, cfg.model.pool_method) if tokens else x)
    kept, struck_before = Kept(cfg, encoder, view), len(book.unreadable)
    strength, transform = data.strengths(cfg), None
    if view:
        transform = lambda key, volume: data.augment(
            volume, strength, f"{cfg.seed} view {view} {key}"
        )
    desc = f"encode view {view}" if view else "encode"
    x, encoded = encode_share(cfg, samples, encoder, dev, desc, book, kept, transform)
    own = [[sample.path, reason] for sample, reason in book.unreadable[struck_before:]]
    reason_of = {path: reason for part in device.gather(own, dev) for path, reason in part}
    for sample in samples:
        if sample.path in reason_of:  # what this replica struck itself stays struck
            book.strike(sample, reason_of[sample.path])
    if not again:
        # every replica knows the files of its share
        for part in device.gather(book.facts, dev):
            book.facts |= part
        for note in ledger.compare_files(book, samples, earlier):
            print(f"note: {note}")
    ledger.check(book, cfg.data.max_missing)
    if again and reason_of:
        reason = ledger.unreadable_table(book).splitlines()[-1]
        raise ValueError(f"a volume that could be read before cannot be read now: {reason}")
    left = {sample.path for sample in book.samples}
    rest = [i for i, sample in enumerate(samples) if sample.path in left]
    if not rest:
        raise ValueError("none of the volumes could be read")
    encoded = sum(device.gather(encoded, dev))
    print(
        f"features: {encoded} volumes encoded, {len(rest) - encoded} from {cfg.paths.cache_dir}"
        + (f", {len(samples) - len(rest)} left out" if len(rest) < len(samples) else "")
    )
    return Features([samples[i] for i in rest], x[rest])


def number_of_views(cfg):
    """How many augmented views of a volume are encoded beside it."""
    is_asked = data.strengths(cfg) and settings.first_epoch_of_encoder(cfg) > 1
    return cfg.data.augment_views if is_asked else 0


def views_of_both(cfg):
    """Has validation such views too?"""
    return bool(number_of_views(cfg) and (cfg.data.cv or settings.refits(cfg)))


def encode_for_training(cfg, book, encoder, dev):
    """The Features of train and of val. Train's have augmented views where the config asks for
    them; for data.cv and train.refit, which fit on both, so have val's."""
    found = encode(cfg, book, book.of("train") + book.of("val"), encoder, dev)
    train, val = (
        [i for i, s in enumerate(found.samples) if s.split == n] for n in ("train", "val")
    )
    both = views_of_both(cfg)
    parts = [found] if both else [found.rows(train), found.rows(val)]
    views, augmented = [parts[0].x], parts[0].samples
    for view in range(1, 1 + number_of_views(cfg)):
        views.append(encode(cfg, book, augmented, encoder, dev, view, again=True).x)
    parts[0] = Features(augmented, parts[0].x, torch.stack(views, dim=1))
    return [parts[0].rows(train), parts[0].rows(val)] if both else parts


def ahead(cfg, book):
    """The stages of encode_for_training, for stages.plan: volumes that this replica may encode."""
    train, val = (math.ceil(len(book.of(n)) / device.world()) for n in ("train", "val"))
    if cfg.paths.features:
        return []
    of_view = [("encoding", train + val if views_of_both(cfg) else train)]
    return [("encoding", train + val), *number_of_views(cfg) * of_view]


def encode_now(cfg, samples, encoder, dev, desc):
    """Features x (volumes, C) or (volumes, T, C) by an encoder that is being trained: none is kept.

    ValueError when a volume cannot be read, or a feature is not finite.
    """
    encoder.module.eval()
    return encode_share(cfg, samples, encoder, dev, desc)[0]


def encode_share(cfg, samples, encoder, dev, desc, book=None, kept=None, transform=None):
    """Encode this replica's share of the volumes -> features of all, and how many it encoded.

    One volume at a time, so that a feature does not depend on its neighbours. book: strike off what
    cannot be read; else that is an error. kept: where features are looked for, and kept.
    """
    ids = book.ids if book else ()
    volumes = data.open_volumes(cfg, samples, encoder.size, ids, encoder.wants_intensities)
    x, encoded = torch.zeros(len(samples), *shape_of(cfg)), 0

    def is_kept(i, key):
        found = volumes.facts(i, key) if kept else None
        feature = kept.load(key) if found else None
        if feature is None:
            return False
        book.facts[samples[i].path], x[i] = found, torch.from_numpy(feature)
        return True

    mine = range(device.rank(), len(samples), device.world())
    todo = []
    for i in mine:
        try:
            if not is_kept(i, volumes.key(i)):
                todo.append(i)
        except data.Unreadable as error:  # its file is known, and another participant's
            book.strike(samples[i], str(error))
    if kept and cfg.model.pool_method == "attentive":
        kept.check_room(sum(device.gather(len(todo), dev)))
    reading, leave = volumes.reading, kept is not None
    stage = stages.Stage(desc, len(todo), "volume", "encoding", reading=reading, leave=leave)
    if not todo:
        return device.all_sum(x.to(dev)).cpu(), encoded
    with stage, contextlib.closing(data.stream(volumes, book, todo, cfg, transform)) as arriving:
        module = encoder.module.to(dev)
        # the content of some is known only now, and their feature may be kept under another name
        unknown = (arrived for arrived in stage.over(arriving) if not is_kept(*arrived[:2]))
        begun = ((i, key, begin(cfg, module, volume, dev)) for i, key, volume in unknown)
        # a feature is waited for when the next volume is on its way, so that an accelerator is busy
        for (i, key, feature), _ in itertools.pairwise(itertools.chain(begun, [None])):
            array = feature.cpu().numpy().astype(kept.dtype if kept else np.float32)
            if not np.isfinite(array).all():
                raise ValueError(
                    f"participant {samples[i].participant_id}: the encoder's features of "
                    f"{samples[i].path} are not finite ({desc}); while it trains, lower "
                    f"train.lr_encoder={cfg.train.lr_encoder}"
                )
            x[i] = torch.from_numpy(array)
            if kept:
                files.save_array(kept.path(key), array)
                book.facts[samples[i].path] = volumes.facts(i, key)
            encoded += 1
    return device.all_sum(x.to(dev)).cpu(), encoded


def begin(cfg, module, volume, dev):
    """Volume (1, D, H, W) -> its feature (C,) or (T, C) on dev, which may still be computing it."""
    feature = pooled(cfg, *tokens_of(cfg, module, volume, dev))[0]
    device.step_done(dev)
    return feature


def tokens_of(cfg, module, volume, dev):
    """Volume (1, D, H, W) -> the encoder's tokens (1, N, C) on dev, and their grid (d, h, w)."""
    with torch.no_grad(), device.autocast(dev, cfg.train.precision):
        tokens = module(device.send(volume[None], dev).float())  # (1, 1, D, H, W) -> (1, N, C)
    return tokens, module.grid(volume.shape[-3:])


def flat(x):
    """Features (volumes, C), or tokens (volumes, T, C) of attentive pooling -> (volumes, C), the
    mean over the tokens."""
    return x.mean(dim=1) if x.ndim == 3 else x
