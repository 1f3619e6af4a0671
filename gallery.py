"""Cards of the eyes that a run gets most wrong, most right and is least sure of.

    cards = make(opened, book, asked, found, predictions, encoder, bank, dev)    # in every replica
    save(folder, result, cards)               # gallery_SPLIT.json; None: removes every gallery
    read(folder, result)                      # as it was written, checked; None where there is none
    of_participants(folder, result, ids)      # the same, of these participants alone
    planes_of(volume, facts, ...)             # two pictures of a volume, with its token maps

A card has the middle B-scan and the lateral plane of each eye, which identify a person:
eval.gallery=0 makes none (docs/trust.md). templates/gallery.html shows them. Volumes come from
paths.cache_dir alone; of an eye whose volume is not there, the card says so.
"""

import base64
import io
import json
import os
import pathlib
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from pydantic import AfterValidator, Field

import attribution
import data
import device
import features
import files
import results
import stages
from keys import boolean
from labels import SPLITS, grouped
from results import Count, Number, Text, shape

GROUPS = "most wrong", "most right", "least sure"
SIDE, QUALITY = 176, 55  # pixels of the longest side of a card's picture, quality of its WebP
SIDES = {"R": "right eye", "OD": "right eye", "L": "left eye", "OS": "left eye"}
# blue, vermilion and yellow of Okabe and Ito, which people with any colour vision tell apart
AGAINST, FOR, WEIGHT = (0, 114, 178), (213, 94, 0), (240, 228, 66)
NOT_THERE = "its volume is not in paths.cache_dir any more: no picture"
NO_VOLUME = "this run reads features (paths.features), not volumes: no picture"

# ------------------------------------------------------------------------------- who is shown


def choose(predictions, number):
    """heads.Predictions, how many cards -> [(group, row)], a third of each group, no participant
    twice; fewer where a group has fewer. Most wrong and most right: by the probability of the true
    class, among wrong and right answers. Least sure: by that of the answer less the next one."""
    p, y, rows = predictions.p, predictions.y_true, range(len(predictions.ids))
    ranked, answers = np.sort(p, axis=1), p.argmax(axis=1)
    margin = ranked[:, -1] - ranked[:, -2]
    orders = {
        "most wrong": {row: p[row, y[row]] for row in rows if answers[row] != y[row]},
        "most right": {row: -p[row, y[row]] for row in rows if answers[row] == y[row]},
        "least sure": {row: margin[row] for row in rows},
    }
    chosen, taken = [], set()
    for n, (group, score) in enumerate(orders.items()):
        left = number // len(GROUPS) + (n < number % len(GROUPS))
        for row in sorted(score, key=lambda row: (score[row], predictions.ids[row])):
            if left and predictions.participants[row] not in taken:
                chosen.append((group, row))
                taken.add(predictions.participants[row])
                left -= 1
    return chosen


def eyes_of(book, samples):
    """{eye: its samples}: by the tables, or where they do not say, by the files."""

    def eye(sample):
        said = sample.laterality or book.facts.get(sample.path, {}).get("laterality") or ""
        said = str(said).strip()
        return SIDES.get(said.upper(), said or "eye not named")

    return dict(sorted(grouped(samples, eye).items()))


# ------------------------------------------------------------------------------- the cards


def make(opened, book, asked, found, predictions, encoder, bank, dev):
    """-> what gallery_SPLIT.json holds but for its hashes, the same in every replica; None where
    eval.gallery is 0.

    asked: the split's samples as features.encode was given them, found: its Features. Each replica
    makes the pictures of the volumes that it encoded, for only its host may have them.
    """
    cfg = opened.cfg
    if not cfg.eval.gallery:
        return None
    samples_of, cards, shown = grouped(found.samples, lambda s: s.unit), [], []
    for group, row in choose(predictions, cfg.eval.gallery):
        unit, p = predictions.ids[row], predictions.p[row]
        samples = samples_of[unit]
        said = [book.facts.get(s.path, {}).get("scanner") or cfg.data.scanner for s in samples]
        card = {
            "group": group,
            "id": unit,
            "participant_id": predictions.participants[row],
            "site": samples[0].site or "",
            "scanner": ", ".join(dict.fromkeys(filter(None, said)))[:200],
            "label": int(predictions.y_true[row]),
            "answer": int(p.argmax()),
            "p": p.tolist(),
            "eyes": [],
        }
        for name, of_eye in eyes_of(book, samples).items():
            eye = {"eye": name, "volumes": len(of_eye), "missing": NO_VOLUME, "planes": []}
            card["eyes"].append(eye)
            shown.append((of_eye[0], card["answer"], eye))
        cards.append(card)
    if not cfg.paths.features:
        draw_share(cfg, book, asked, found, encoder, bank, dev, shown)
    return {
        "classes": list(book.classes),
        "unit": cfg.data.unit,
        "how": attribution.WORDS[attribution.kind_of(bank)],
        "cards": cards,
    }


def draw_share(cfg, book, asked, found, encoder, bank, dev, shown):
    """Draw the eyes of shown, [(sample, answer, eye of a card)], each in the replica that encoded
    its volume; every replica then has all pictures, in place in these cards."""
    samples = [sample for sample, _, _ in shown]
    volumes = data.open_volumes(cfg, samples, encoder.size, book.ids, encoder.wants_intensities)
    row_of = {sample.path: n for n, sample in enumerate(found.samples)}
    encoded_by = {sample.path: n % device.world() for n, sample in enumerate(asked)}
    mine = [i for i, s in enumerate(samples) if encoded_by[s.path] == device.rank()]
    drawn, module = {}, encoder.module.to(dev)
    with stages.Stage("gallery", len(mine), "eye") as stage:
        for i in stage.over(mine):
            key = volumes.key(i)
            facts = volumes.facts(i, key)
            kept = facts and files.load_array(
                volumes.folder / f"{key}.npy", np.float16, volumes.size
            )
            if kept is None:
                drawn[str(i)] = NOT_THERE, []
                continue
            volume = torch.from_numpy(kept)[None]  # (D, H, W) -> (1, D, H, W)
            if cfg.model.pool_method == "attentive":  # its features are tokens: nothing to encode
                tokens, grid = found.x[row_of[samples[i].path]], tuple(cfg.model.token_grid)
            else:
                tokens, grid = tokens_of(cfg, module, volumes.seen(i, key, volume), dev)
            scored = attribution.attribute(bank, tokens, cfg.model.pool_method)
            middle = len(kept) // 2
            planes = planes_of(kept, facts, grid, scored, shown[i][1], middle, SIDE, QUALITY)
            drawn[str(i)] = "", planes
    for part in device.gather(drawn, dev):
        for i, (missing, planes) in part.items():
            eye = shown[int(i)][2]
            eye["missing"], eye["planes"] = missing, planes


def tokens_of(cfg, module, volume, dev):
    """Volume (1, D, H, W) -> its tokens as the head of the config pools them, (T, C) float32 on the
    CPU, and their grid (d, h, w)."""
    tokens, grid = features.tokens_of(cfg, module, volume, dev)  # (1, N, C)
    if cfg.model.pool_method == "attentive":
        tokens, grid = features.pooled(cfg, tokens, grid), tuple(cfg.model.token_grid)
    device.step_done(dev)
    return tokens[0].float().cpu(), grid


# ------------------------------------------------------------------------------- pictures


def planes_of(volume, facts, grid, scored, answer, frame, side, quality):
    """Volume (D, H, W), what its file says, and the Attribution of its tokens on a grid (d, h, w)
    -> two planes, dicts of PLANE: its B-scan `frame` and its lateral plane (the mean over depth),
    as pictures at one scale, side pixels at most; and the maps of each for the class `answer`, with
    a pixel for every token.

    The map of the B-scan is that of the tokens that hold the frame, that of the lateral plane the
    sum over depth."""
    volume, depth = volume.astype(np.float32), len(volume)
    millimetres = extent(facts)
    longest = max(millimetres or (1,))
    sizes = [max(4, round(side * mm / longest)) for mm in millimetres or (1, 1, 1)]
    slab = int((frame + 0.5) * grid[0] / depth)
    scores = attribution.contrast(scored.scores, answer).reshape(grid)
    maps = {"map": (scores, (AGAINST, FOR))}
    if scored.weights is not None:
        maps["weights"] = scored.weights.reshape(grid), (WEIGHT, WEIGHT)
    cuts = {
        "B-scan": (volume[frame], sizes[1], lambda tokens: tokens[slab]),  # (h, w)
        "lateral plane": (volume.mean(axis=1), sizes[0], lambda tokens: tokens.sum(axis=1)),
    }
    return [
        {
            "name": name,
            "is_to_scale": millimetres is not None,
            "width": sizes[2],
            "height": height,
            "image": picture(plane, (sizes[2], height), quality),
            "map": "",
            "weights": "",
            **{kind: overlay(cut(tokens), *colours) for kind, (tokens, colours) in maps.items()},
        }
        for name, (plane, height, cut) in cuts.items()
    ]


def extent(facts):
    """mm that the frames, rows and columns of a file cover; None where it does not say."""
    spacing = [facts["thickness"], *(facts["spacing"] or ())]
    if len(spacing) != 3 or not all(mm and np.isfinite(mm) and mm > 0 for mm in spacing):
        return None
    return [facts[name] * mm for name, mm in zip(("frames", "rows", "columns"), spacing)]


def picture(plane, size, quality):
    """A plane of a volume as a grey WebP of size (width, height), in base64. Grey levels are
    between the 1st and the 99.5th percentile."""
    from PIL import Image

    low, high = np.percentile(plane, (1, 99.5))
    grey = ((plane - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    image = Image.fromarray(grey.round().astype(np.uint8))
    return in_base64(image.resize(size, Image.Resampling.BICUBIC), quality=quality, method=4)


def overlay(values, below, above):
    """Values (rows, columns) -> a WebP with a pixel for each, in base64: the colour `below` under
    0, `above` over it, and the less transparent the further from 0; the largest is the darkest."""
    from PIL import Image

    share = np.abs(values) / max(np.abs(values).max(), 1e-30)
    rgba = np.zeros((*values.shape, 4), np.uint8)
    rgba[..., :3] = np.where(values[..., None] < 0, below, above)
    rgba[..., 3] = np.rint(share * 24) * 8  # 192 of 255 at most: the eye is seen through it
    return in_base64(Image.fromarray(rgba), lossless=True)


def in_base64(image, **options):
    """A Pillow image as a WebP file, in base64."""
    out = io.BytesIO()
    image.save(out, "WEBP", **options)
    return base64.b64encode(out.getvalue()).decode()


# ------------------------------------------------------------------------------- the file


def webp(text):
    """Check that a text is the base64 of a WebP file, or empty -> the text. ValueError."""
    content = base64.b64decode(text, validate=True)  # ValueError where it is no base64
    head = content[:4], content[8:12], int.from_bytes(content[4:8], "little") + 8
    if text and head != (b"RIFF", b"WEBP", len(content)):
        raise ValueError("is no WebP")
    return text


# what gallery_SPLIT.json holds, beside its hash of itself
Webp = Annotated[str, Field(strict=True, max_length=200_000), AfterValidator(webp)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]
PLANE = {"name": Text, "is_to_scale": boolean, "width": Pixels, "height": Pixels}
PLANE |= {"image": Webp, "map": Webp, "weights": Webp}
EYE = {"eye": Text, "volumes": Count, "missing": Text, "planes": list[shape("Plane", PLANE)]}
CARD = {"group": Literal[GROUPS], **dict.fromkeys(("id", "participant_id", "site"), Text)}
CARD |= {"scanner": Text, "label": Count, "answer": Count, "p": list[Number]}
CARD |= {"eyes": list[shape("Eye", EYE)]}
GALLERY = {"split": Literal["val", "test"], "predictions_sha256": Text, "classes": list[Text]}
GALLERY |= {"unit": Literal["participant", "eye", "volume"], "how": Text}
GALLERY = shape("Gallery", GALLERY | {"cards": list[shape("Card", CARD)]})


def save(folder, result, found):
    """Write gallery_SPLIT.json of what `make` found for a result. None: no image of an eye is to be
    in the folder, and the galleries of all splits are removed."""
    if found is None:
        for split in SPLITS:
            pathlib.Path(folder, f"gallery_{split}.json").unlink(missing_ok=True)
        for page in sorted(pathlib.Path(folder).glob("explain_*.html")):
            print(f"note: {page} of --explain has images of an eye; remove it where none is to be")
        if any(pathlib.Path(folder).glob("last/gallery_*.json")):  # results of last.pt
            again = results.how_to_score(pathlib.Path(folder, "last.pt"), result["split"])
            print(f"note: {folder}/last has images of eyes, too; {again} --no-images")
        return
    about = {name: result[name] for name in ("split", "predictions_sha256")}
    text = json.dumps(results.sealed(about | found)) + "\n"
    files.write(pathlib.Path(folder, f"gallery_{result['split']}.json"), text)


def read(folder, result):
    """The gallery of a result (of results.read_result) -> dict; None where it has none. ValueError,
    with what to do, where it was edited, is of another result, or holds anything else."""
    split = result["split"]
    path, again = pathlib.Path(folder, f"gallery_{split}.json"), results.how_to_score(folder, split)
    if not os.path.lexists(path):
        return None
    found = files.read_json(path, again)
    if found.get("content_sha256") != results.content_hash(found):
        raise ValueError(f"{path} was edited, or written by another version; {again}")
    try:
        GALLERY.model_validate(found)
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(f"{path} has no {where} that can be used; {again}") from error
    number = len(found["classes"])
    if any(len(c["p"]) != number or max(c["label"], c["answer"]) >= number for c in found["cards"]):
        raise ValueError(f"{path} has a card of other classes than its own; {again}")
    if any(found[name] != result[name] for name in ("split", "predictions_sha256", "classes")):
        raise ValueError(f"{path} is not about eval_{split}.json beside it; {again}")
    return found


def of_participants(folder, result, ids):
    """The gallery of a result with the cards of these participants alone, in their order, those who
    have one; None where it has no gallery. ValueError as `read`."""
    found = read(folder, result)
    if found is None:
        return None
    cards = grouped(found["cards"], lambda card: card["participant_id"])
    return found | {"cards": [card for i in dict.fromkeys(ids) for card in cards.get(i, [])]}


def contents(found):
    """What a gallery holds of eyes, in words; "" where it has no picture."""
    cards = [card for card in found["cards"] if any(eye["planes"] for eye in card["eyes"])]
    number = sum(len(eye["planes"]) for card in cards for eye in card["eyes"])
    people = len({card["participant_id"] for card in cards})
    return f"{number} images of the eyes of {people} participants" if number else ""
