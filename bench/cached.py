"""Volumes that are in the cache already, for benches of what comes after reading."""

import json
import os

import torch
from measure import ROOT  # noqa: F401  (it puts the repository's own files on sys.path)

import data
import dicom
import files
import ledger
import volumes


def samples_below(folder, count):
    """Samples whose files are never decoded: what that would give is in the cache."""
    samples = []
    for i in range(count):
        path, split = f"{folder}/{i}", ledger.SPLITS[i % 3]
        samples.append(ledger.Sample(str(i), split, 0, "", "L", path, data.b2.Object(path, 1)))
    return samples


def fill_cache(folder, count, size):
    """Files of these samples, and in folder/cache random volumes (D, H, W) as read from them."""
    samples = samples_below(folder, count)
    kept = data.Volumes(samples, size, f"{folder}/cache")
    for i, sample in enumerate(samples):
        files.write(sample.path, str(i))
        files.write(kept.note(i), files.checksum(sample.path, "sha1"))
        array = torch.randn(size).half().numpy()
        files.save_array(os.path.join(kept.folder, kept.key(i) + ".npy"), array)
        known = {"reading": volumes.READING, "pixels": str(i), "sketch": volumes.sketch(array)}
        known |= dicom.facts_of(size, "none") | {"notes": [], "mean": 0.0, "sd": 1.0}
        files.write(os.path.join(kept.cache_dir, "facts", kept.key(i) + ".json"), json.dumps(known))
