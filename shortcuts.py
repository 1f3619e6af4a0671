"""What do the features know beside the label? Site, age, eye and scanner, predicted from them.

    examine(opened, book, found, encoder, dev)     # "knows" of eval_SPLIT.json, for eval.probes

A probe in closed form (discriminant.py) learns each from training's features, and is scored on
those of the split. What is predicted well can carry a label that differs along with it. The eye is
the check: left and right are mirror images, which an encoder that works tells apart.
"""

import copy
import dataclasses

import numpy as np
import torch

import confounding
import features
import heads
import intervals
import metrics
from discriminant import discriminant


def values_of(samples, row_of, train_ages):
    """{what: (a text of every sample, "" where it is not known; is it one of each volume?)}."""
    ages = [row_of[s.unit].age for s in samples]
    quarters = confounding.quarters(ages, train_ages)
    return {
        "site": ([s.site for s in samples], False),
        "quarter of age": (["" if q == "unknown" else q for q in quarters], False),
        "eye": ([s.laterality for s in samples], True),
        "scanner": ([scanner_of(s) for s in samples], True),
    }


def scanner_of(sample):
    """Its model by the manifest (AI-READI's column); "" where that does not say."""
    return sample.manifest.get("manufacturers_model_name", "")


def probe(train, x_train, scored, x, of_volumes):
    """How well a text of the samples is predicted from x (volumes, C) -> dict. train, scored: pairs
    of samples and their texts. A participant's volumes are averaged unless each has its own text.

    Rows without a text are left out, and so are those whose text is not in training; n counts those
    that are left."""
    (samples_train, texts_train), (samples, texts) = train, scored
    names = sorted(set(texts_train) - {""})
    number_of = {name: k for k, name in enumerate(names)}
    rows = [i for i, text in enumerate(texts_train) if text]
    kept = [i for i, text in enumerate(texts) if text in number_of]
    labels = torch.tensor([number_of[texts_train[i]] for i in rows])
    people = [samples_train[i].participant_id for i in rows]
    people = torch.from_numpy(np.unique(people, return_inverse=True)[1])
    mean, std = heads.statistics(x_train[rows])
    weight, bias, _ = discriminant(
        (x_train[rows] - mean) / std, labels, people, len(names), is_ordinal=False
    )
    logits = (x[kept] - mean) / std @ weight.T + bias  # (volumes, names)
    relabelled = [
        dataclasses.replace(
            samples[i],
            label=number_of[texts[i]],
            unit=samples[i].path if of_volumes else samples[i].participant_id,
        )
        for i in kept
    ]
    found = heads.by_unit(relabelled, logits.double().softmax(dim=1).numpy())
    y, answers, name = found.y_true, found.p.argmax(axis=1), "balanced_accuracy"
    ci95 = intervals.of_answers(y, answers, len(names), found.participants, [name])
    return {
        "values": [name for name in names if number_of[name] in y],
        "n": len(y),
        "balanced_accuracy": metrics.score(y, found.p, len(names))["balanced_accuracy"],
        "ci95": ci95["balanced_accuracy"],
        "chance": 1 / len(np.unique(y)),
    }


def examine(opened, book, found, encoder, dev):
    """-> {"knows": {what: as `probe`}}, and notes, what is left out and why. found: Features of the
    split, in every replica."""
    trained = set(opened.saved["train_participants"])
    samples = [s for s in book.of("train") if s.unit in trained]
    if not samples:
        return {}, ["eval.probes: these tables have none of training's participants"]
    # a ledger of its own, for encoding strikes off what cannot be read
    train = features.encode(opened.cfg, copy.deepcopy(book), samples, encoder, dev)
    x_train, x = (features.flat(part.x) for part in (train, found))
    row_of = {row.unit: row for row in book.rows}
    ages = [row_of[s.unit].age for s in train.samples]
    of_train, of_split = (values_of(part.samples, row_of, ages) for part in (train, found))
    knows, notes = {}, []
    for what, (texts_train, of_volumes) in of_train.items():
        texts, names = of_split[what][0], set(texts_train) - {""}
        if len(names) < 2 or len(names & set(texts)) < 2:
            where = "training" if len(names) < 2 else "this split"
            has = "nothing" if not names else "a single value"
            notes.append(f"eval.probes: {what} is left out, for {where} has {has} of it")
            continue
        learned, scored = (train.samples, texts_train), (found.samples, texts)
        knows[what] = probe(learned, x_train, scored, x, of_volumes)
    return {"knows": knows}, notes
