"""What volume files say of themselves, compared with the tables and with each other.

    check(sample, found, ids)                # Unreadable where a file is another participant's
    notes = differences(samples, facts)      # what contradicts the manifest, with both values
    groups = same_pixels(samples, facts)     # one scan under several names
    near_copies(samples, facts, earlier)     # alarms: scans that are nearly the same
    tally(known, OF_FILES)                   # (header, rows): syntaxes, sizes, ..., and how many
    print(text_of(samples, facts))           # the same for the terminal

facts: {path: what dicom.description and volumes.decode say of the file}. A sample is one of
ledger.Sample, with the manifest's row. Where a file or the manifest does not say, nothing is
demanded.
"""

import base64
import re
from collections import Counter, defaultdict

import numpy as np

from files import first_few
from volumes import Unreadable

# The sketches (volumes.sketch) of two copies of one scan correlate above this, even after lossy
# compression; those of two scans, even of one eye, do not come near. docs/trust.md has the figures.
NEAR_COPY = 0.7


def plain_id(text):
    """An id without what tables and exports add to a number: spaces, leading zeros, ".0"."""
    text = str(text).strip()
    number = re.fullmatch(r"0*(\d+)(\.0+)?", text)
    return number[1] if number else text


def other_participant(name, participant_id, ids):
    """The participant whom `name` names, if that is another one than participant_id; else None: a
    prefix, a site or a pseudonym names nobody. ids: plain ids of all participants."""
    named = plain_id(name or "")
    return named if named != plain_id(participant_id) and named in ids else None


def check(sample, found, ids):
    """Unreadable where a file's PatientID names another participant of the tables."""
    other = other_participant(found.get("patient_id"), sample.participant_id, ids)
    if other:
        raise Unreadable(
            f"{sample.path} belongs to participant {other} by its PatientID, and to "
            f"{sample.participant_id} by the manifest"
        )


# ---------------------------------------------------------------------- files against the manifest


def contradictions(sample, found):
    """{what: "manifest X, file Y"} of one file. Spacings are compared to 1 %."""
    row, problems = sample.manifest, {}

    def compare(what, expected, value):
        if expected and value and not np.allclose(expected, value, rtol=0.01, atol=0):
            show = lambda v: " x ".join(f"{n:g}" for n in v)
            problems[what] = f"manifest {show(expected)}, file {show(value)}"

    numbers = {name: numbers_in(row.get(name)) for name in MANIFEST_NUMBERS}
    compare("number of frames", numbers["number_of_frames"], [found["frames"]])
    size = numbers["height"] + numbers["width"]
    compare("rows x columns", size if len(size) == 2 else [], [found["rows"], found["columns"]])
    spacing = numbers["pixel_spacing"]
    compare("pixel spacing", spacing if len(spacing) == 2 else [], found["spacing"])
    thickness = found["thickness"]
    compare("slice thickness", numbers["slice_thickness"], thickness and [thickness])
    sides = {"OD": "R", "RIGHT": "R", "OS": "L", "LEFT": "L"}
    said = [str(side or "").strip().upper() for side in (sample.laterality, found["laterality"])]
    manifest, file = (sides.get(side, side) for side in said)
    if {manifest, file} == {"L", "R"}:
        problems["laterality"] = f"manifest {manifest}, file {file}"
    imaging = str(row.get("imaging") or "").strip()
    if imaging and imaging.upper() not in ("OCT", "STRUCTURAL OCT", "STRUCTURAL_OCT"):
        problems["imaging"] = f"manifest {imaging}"
    return problems


MANIFEST_NUMBERS = ("number_of_frames", "height", "width", "pixel_spacing", "slice_thickness")


def numbers_in(text):
    """Numbers of a cell of the manifest; [] where it has words, such as "Varies by frame"."""
    cells = str(text or "").strip("[]() ").replace(",", " ").split()
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return []


def differences(samples, facts):
    """-> notes, and {participant_id: [texts]} of the files that differ from the manifest, or that
    say something odd of themselves. What most files do alike is a convention of their scanner: it
    is noted once, and nobody is named for it."""
    known = [s for s in samples if s.path in facts]
    found = defaultdict(list)  # what: [(sample, text)]
    for sample in known:
        for what, text in contradictions(sample, facts[sample.path]).items():
            found[what].append((sample, text))
        for note in facts[sample.path]["notes"]:
            found[note].append((sample, ""))
    notes, of_participant = [], defaultdict(list)
    for what, cases in sorted(found.items()):
        is_convention = len(cases) > len(known) / 2 and len(known) >= 10
        examples = [
            f"{s.participant_id}: {text}" if text else s.participant_id for s, text in cases
        ]
        notes.append(
            f"{what}: {len(cases)} of {len(known)} files"
            + (", so a convention of this scanner" if is_convention else "")
            + f" (participant {first_few(examples, 3)})"
        )
        for sample, text in [] if is_convention else cases:
            of_participant[sample.participant_id].append(f"{what} ({text})" if text else what)
    return notes, dict(of_participant)


# ---------------------------------------------------------------------- files against each other


def summary(samples, facts):
    """What a checkpoint keeps of the volumes that were trained on, for near_copies of others."""
    known = [s for s in samples if s.path in facts]
    return {
        "participant_id": [s.participant_id for s in known],
        "split": [s.split for s in known],
        "pixels": [facts[s.path]["pixels"] for s in known],
        "sketch": [facts[s.path]["sketch"] for s in known],
    }


def same_pixels(samples, facts, earlier):
    """-> [(samples with the same preprocessed volume, their participants, sorted)]: those with a
    twin. earlier: a `summary` of other volumes, whose participants count too."""
    groups, people = defaultdict(list), defaultdict(set)
    for sample in samples:
        if sample.path in facts:
            pixels = facts[sample.path]["pixels"]
            groups[pixels].append(sample)
            people[pixels].add(sample.participant_id)
    for participant, pixels in zip(earlier["participant_id"], earlier["pixels"]):
        people[pixels].add(participant)
    return [
        (group, sorted(people[pixels]))
        for pixels, group in groups.items()
        if len(group) > 1 or len(people[pixels]) > 1
    ]


NOTHING = {"participant_id": [], "split": [], "pixels": [], "sketch": []}


def near_copies(samples, facts, earlier):
    """Pairs of different participants whose volumes are nearly the same -> sentences, the closest
    first. earlier: a `summary` of volumes that these are compared with too."""
    here = summary(samples, facts)
    both = {name: here[name] + earlier[name] for name in here}
    if not here["sketch"]:
        return []
    raw = [np.frombuffer(base64.b64decode(text), np.int8) for text in both["sketch"]]
    values = np.array(raw, dtype=np.float32)  # (volumes, 1024)
    values -= values.mean(axis=1, keepdims=True)
    values /= np.linalg.norm(values, axis=1, keepdims=True).clip(min=1e-6)
    correlation = values[: len(here["sketch"])] @ values.T  # (volumes here, all volumes)
    who, found = both["participant_id"], {}
    for i, j in zip(*np.nonzero(correlation > NEAR_COPY)):
        if who[i] != who[j]:
            pair = tuple(sorted([(who[i], both["split"][i]), (who[j], both["split"][j])]))
            found[pair] = max(found.get(pair, 0), float(correlation[i, j]))
    return [
        f"participants {a[0]} ({a[1]}) and {b[0]} ({b[1]}) have nearly the same scan, closer than "
        f"two scans of one eye: its lateral differences correlate by {r:.2f}"
        for (a, b), r in sorted(found.items(), key=lambda item: -item[1])
    ]


# ---------------------------------------------------------------------- for people


# how a file is described, each by a function of its facts
OF_FILES = {
    "scanner": lambda f: f["scanner"] or "not said",
    "protocol": lambda f: f["protocol"] or "not said",
    "transfer syntax": lambda f: f["syntax"],
    "frames x rows x columns": lambda f: f"{f['frames']} x {f['rows']} x {f['columns']}",
    "spacing in mm": lambda f: spacing_text(f),
    "laterality": lambda f: f["laterality"] or "not said",
}


def tally(items, columns, most=8):
    """How many of some items are alike -> (header, rows of texts). columns {name: function of an
    item -> text}; of each, the `most` frequent texts, then how many items have others."""
    rows = []
    for name, text_of_item in columns.items():
        count = Counter(map(text_of_item, items)).most_common()
        cells = [[text, str(n)] for text, n in count[:most]]
        if count[most:]:
            rest = sum(n for _, n in count[most:])
            cells.append([f"(others, of {len(count) - most} kinds)", str(rest)])
        rows += [[name if number == 0 else "", *cell] for number, cell in enumerate(cells)]
    return ["", "", "files"], rows


def text_of(samples, facts):
    """`tally` of the files that were opened, as text."""
    known = [facts[s.path] for s in samples if s.path in facts]
    lines = [f"{name:<25}{n:>6}  {text}" for name, text, n in tally(known, OF_FILES)[1]]
    return "\n".join([f"{len(known)} files were read", *lines])


def spacing_text(found):
    """Spacing of (frames, rows, columns)."""
    if not found["spacing"]:
        return "not said"
    thickness = f"{found['thickness']:g}" if found["thickness"] else "?"
    return " x ".join([thickness, *(f"{mm:g}" for mm in found["spacing"])])
