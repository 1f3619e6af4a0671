"""Where does a run look in one participant's eyes? A page with every volume at full size.

    path = write(opened, book, encoder, "1001", "all")     # RUN/explain_1001.html

That is python eval.py --ckpt RUN --explain 1001. Every volume is read as for scoring: from
paths.cache_dir, or else from its file. What the maps are, attribution.py says; how they are drawn,
gallery.py. The page has images of an identifiable person.
"""

import contextlib
import os
import re

import numpy as np

import attribution
import data
import device
import files
import gallery
import heads
import model
import references
import report
import runs
from findings import number
from ledger import described

SIDE, QUALITY = 592, 85  # pixels of the longest side of a picture, two beside each other; of WebP


def write(opened, book, encoder, participant, split):
    """Write explain_PARTICIPANT.html, in every replica -> its path. split: the one that the
    participant must be in; "all": any. ValueError when there is nothing to explain."""
    cfg, samples = opened.cfg, find(opened.cfg, book, participant, split)
    first, dev = samples[0], device.get(cfg.device.backend)
    trained = opened.saved.get("repeats", [opened.saved])[0]
    bank = references.load(runs.head_of(trained, first.split), cfg)  # as it scores that split
    volumes = data.open_volumes(cfg, samples, encoder.size, book.ids, encoder.wants_intensities)
    module, pooling, scored = encoder.module.to(dev), cfg.model.pool_method, []
    with contextlib.closing(data.stream(volumes, book, range(len(samples)), cfg)) as arriving:
        for i, key, volume in arriving:
            tokens, grid = gallery.tokens_of(cfg, module, volume, dev)
            found = attribution.attribute(bank, tokens, pooling)
            x = tokens[None]  # (1, T, C)
            p = heads.predict(bank, x if pooling == "attentive" else model.pool(x, pooling))[0, 0]
            scored.append((samples[i], volume[0].numpy(), grid, found, p))
            book.facts[samples[i].path] = volumes.facts(i, key)
    if not scored:
        raise ValueError(f"participant {participant}: none of the volumes could be read")
    return page(opened, book, bank, scored)


def find(cfg, book, participant, split):
    """The samples of a participant. ValueError, in one sentence, where there is none to explain."""
    if cfg.paths.features:
        raise ValueError(
            f"this run reads the features of {cfg.paths.features}, not volumes, so there is "
            "nothing to draw a map over; explain a run with an encoder"
        )
    rows = [row for row in book.rows if row.participant_id == participant]
    samples = [s for s in book.samples if s.participant_id == participant]
    if not rows:
        raise ValueError(
            f"participant {participant} is not in the ledger of this run; ledger.csv in its folder "
            "lists those who are"
        )
    name = described(participant, rows[0], book)
    if split not in ("all", rows[0].split):
        raise ValueError(f"participant {name} is not in {split}; leave --split out")
    if not samples:
        reason = next((row.reason for row in rows if row.reason), rows[0].status)
        raise ValueError(f"participant {name} has no volume to explain: {reason}")
    return samples


def page(opened, book, bank, scored):
    """Write the page of [(sample, volume (D, H, W), grid, Attribution, p (K,))], on rank 0 -> its
    path."""
    sample = scored[0][0]
    units = heads.by_unit([s for s, *_ in scored], np.array([p for *_, p in scored]))
    answer_of = dict(zip(units.ids, units.p.argmax(axis=1).tolist()))
    shown = []
    for n, (s, volume, grid, found, p) in enumerate(scored, 1):
        answer, facts = answer_of[s.unit], book.facts[s.path]
        mass = np.abs(attribution.contrast(found.scores, answer)).reshape(grid).sum(axis=(1, 2))
        frame = int((mass.argmax() + 0.5) * len(volume) / grid[0])  # the middle of that slab
        planes = gallery.planes_of(volume, facts, grid, found, answer, frame, SIDE, QUALITY)
        [eye] = gallery.eyes_of(book, [s])
        shown.append(
            {
                "title": f"Volume {n} of {len(scored)}: {eye}",
                "about": about(facts, frame, volume, grid),
                "unit": s.unit,
                "answer": answer,
                "p": p.tolist(),
                "planes": planes,
                "table": table(book.classes, found, p),
            }
        )
    text = report.render(
        "explain.html",
        title=f"Where {opened.cfg.log.run_name} looks: participant {sample.participant_id}",
        who=described(sample.participant_id, sample, book),
        checkpoint=f"{os.path.basename(opened.path)}, epoch {opened.saved['epoch']}",
        data=book.description,
        classes=book.classes,
        units=[
            {"id": i, "label": int(y), "answer": answer_of[i], "p": p.tolist()}
            for i, y, p in zip(units.ids, units.y_true, units.p)
        ],
        unit=opened.cfg.data.unit,
        volumes=shown,
        how=attribution.WORDS[attribution.kind_of(bank)],
    )
    path = os.path.join(opened.folder, file_name(sample.participant_id))
    if device.rank() == 0:
        files.write(path, text)
    return path


def about(facts, frame, volume, grid):
    """What the pictures of a volume are of, in words. facts: what its file says; frame: the index
    of the B-scan; volume (D, H, W); grid (d, h, w)."""
    covered = gallery.extent(facts)
    size = "its file does not say its spacing, so proportions are not known"
    if covered:
        size = "{:.1f} x {:.1f} x {:.1f} mm (frames, rows, columns)".format(*covered)
    return (
        f"{facts['scanner'] or 'scanner not named'}; {size}. The B-scan is slice {frame + 1} of "
        f"{len(volume)} as the encoder sees them, in the middle of the tokens that have most of "
        f"the map. {grid[0]} x {grid[1]} x {grid[2]} tokens."
    )


def table(classes, found, p):
    """What the logit of each class is made of, or of kNN its mean over tokens -> (header, rows of
    texts). found: the Attribution of a volume, p (K,) its probabilities."""
    if found.constant is None:
        header = ["class", "probability", "mean over tokens"]
        parts = [[number(value)] for value in found.scores.mean(axis=0)]
    else:
        header = ["class", "probability", "logit", "constant", "tokens for it", "tokens against it"]
        up, down = found.scores.clip(0).sum(axis=0), found.scores.clip(max=0).sum(axis=0)
        columns = found.constant + up + down, found.constant, up, down
        parts = [[f"{value:+.3f}" for value in row] for row in zip(*columns)]
    return header, [[name, number(q), *part] for name, q, part in zip(classes, p, parts)]


def file_name(participant):
    """explain_PARTICIPANT.html, in letters that every file system takes. Where that changes the id,
    a hash of it follows, so that no two participants have the same file."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", participant)[:60]
    ending = "" if safe == participant else f"_{files.hashed(participant)[:8]}"
    return f"explain_{safe}{ending}.html"
