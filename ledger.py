"""Tables -> participants and their volumes: who is there, who is missing, and why.

    book = read(cfg)                      # Ledger: rows (participants), samples (volumes), notes
    check(book, cfg.data.max_missing)     # ValueError when somebody is missing
    print(table(book))
    files.write("ledger.csv", files.csv_text(rows_for_csv(book)))

A participant has a label (study_group) and a split (recommended_split); a sample is one OCT volume
of a participant, chosen by scanner and region. The ledger has a row for every labelled participant,
so that nobody is dropped without a word.
"""

import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath

import b2
import facts
from files import checksum, first_bytes, first_few, json_object, read_tsv, sha256

CLASSES = (  # study_group of participants.tsv; its position is the label
    "healthy",
    "pre_diabetes_lifestyle_controlled",
    "oral_medication_and_or_non_insulin_injectable_medication_controlled",
    "insulin_dependent",
)
CLASS_NAMES = ("healthy", "pre-diabetes", "oral medication", "insulin")
SPLITS = ("train", "val", "test")
FLAGS = ("TRUE", "FALSE")
NO_AGE = ("", "na", "n/a", "<na>", "nan", "none", "null", "unknown")  # how tables say: missing
LABELS, MANIFEST = "participants.tsv", "retinal_oct/manifest.tsv"
PARTICIPANT = ("participant_id", "person_id")  # accepted names of the column that joins the tables


@dataclass
class Row:
    """A participant. status: used | missing (should have a volume, has none) | no_oct (never had
    OCT)."""

    participant_id: str
    split: str
    label: int
    site: str
    age: str = ""  # as in the table; "" where that has none
    volumes: int = 0
    status: str = "used"
    reason: str = ""
    notes: str = ""  # what is odd about their volumes, and cost them none


@dataclass
class Sample:
    """One volume of a participant. path: local or a URL; source: what the store holds there;
    sha256: "sha256:hex" of data.checksums, or ""; manifest: its row there."""

    participant_id: str
    split: str
    label: int
    site: str
    laterality: str
    path: str
    source: b2.Object = None
    sha256: str = ""
    manifest: dict = field(default_factory=dict, repr=False)


@dataclass
class Ledger:
    rows: list
    samples: list
    notes: list = field(default_factory=list)  # oddities that cost nobody a place
    description: str = ""  # what data this is, for headings
    # hashes of LABELS and MANIFEST: they tell whether two runs saw the same tables
    sha256: dict = field(default_factory=dict)
    unreadable: list = field(default_factory=list)  # (sample, reason); no longer in samples
    ids: set = field(default_factory=set)  # facts.plain_id of all participants of both tables
    facts: dict = field(default_factory=dict)  # {path: what the file says}, of those opened so far
    near_copies: list = field(default_factory=list)  # facts.near_copies of those

    def of(self, split):
        return [s for s in self.samples if s.split == split]

    def missing(self, split=None):
        return [r for r in self.rows if r.status == "missing" and split in (None, r.split)]

    def strike(self, sample, reason):
        """Take out a volume that cannot be read. A second call for the same volume does nothing."""
        if sample not in self.samples:
            return
        self.unreadable.append((sample, reason))
        row = self.remove(sample)
        row.status = "used" if row.volumes else "missing"
        row.reason = "; ".join(filter(None, [row.reason, reason]))

    def remove(self, sample):
        """Take out a volume -> its participant's Row."""
        self.samples.remove(sample)
        row = next(r for r in self.rows if r.participant_id == sample.participant_id)
        row.volumes -= 1
        return row


# ------------------------------------------------------------------------------------------ reading


def read(cfg):
    """Join labels and manifest on the participant, and both with what the store holds -> Ledger.

    Reads the two tables, and lists a bucket once; opens no volume. ValueError when a table is
    doubtful, FileNotFoundError when it is missing.
    """
    root, notes, tables = cfg.paths.data, [], {}
    for name in (LABELS, MANIFEST):
        try:
            tables[name] = local_copy(cfg, name)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"paths.data={root}: {name} is not there; set paths.data to the folder that holds "
                "it"
            ) from None
    people = read_labels(tables[LABELS], b2.join(root, LABELS))
    samples, has_rows = read_manifest(tables[MANIFEST], people, cfg, notes, b2.join(root, MANIFEST))
    ids = {facts.plain_id(pid) for pid in [*people, *has_rows]}
    forms = other_forms(people.keys() - has_rows, has_rows - people.keys())
    problems = find_volumes(samples, cfg, notes)
    if cfg.data.checksums:
        add_checksums(samples, cfg, notes)
    samples_of = grouped(samples.values(), lambda sample: sample.participant_id)

    used = []
    for pid, person in people.items():
        samples = samples_of.get(pid, [])
        if person.status == "no_oct":
            if samples:
                notes.append(
                    f"participant {pid}: retinal_oct is FALSE, yet the manifest has {len(samples)} "
                    "volumes; not used"
                )
            continue
        usable = [sample for sample in samples if sample.source]
        used += usable
        person.volumes = len(usable)
        unusable = [sample.path for sample in samples if sample.path in problems]
        reasons = [
            f"{len(paths)} of {len(samples)} files {problem}: {shown(paths, cfg)}"
            for problem, paths in grouped(unusable, problems.get).items()
        ]
        if pid not in has_rows:
            form = forms.get(pid)
            hint = f"; it has '{form}', write ids alike in both" if form else ""
            reasons.append(f"no row in the manifest{hint}")
        elif not samples:
            reasons.append(f"no volume of {cfg.data.scanner}, {cfg.data.anatomic_region}")
        person.reason = "; ".join(reasons)
        if not usable:
            person.status = "missing"
        elif reasons:
            notes.append(f"participant {pid}: {person.reason}")
    hashes = {name: sha256(path) for name, path in tables.items()}
    book = Ledger(list(people.values()), used, notes, describe(cfg), hashes, ids=ids)
    strike_by_folder(book, cfg)
    return book


def strike_by_folder(book, cfg):
    """Strike the volumes that lie in another participant's folder, .../<participant>/<file>."""
    for sample in book.samples[:]:
        folder = PurePath(sample.path).parent.name
        other = facts.other_participant(folder, sample.participant_id, book.ids)
        if other:
            book.strike(
                sample,
                f"{shown([sample.path], cfg)} belongs to participant {other} by its folder, and to "
                f"{sample.participant_id} by the manifest",
            )


def local_copy(cfg, name):
    """Path of a local file with the content of the data folder's file `name`."""
    url = b2.join(cfg.paths.data, name)
    return b2.local(url, cfg.paths.cache_dir, cfg.data.fetch_deadline)


def read_labels(path, name):
    """participants.tsv -> {participant_id: Row}, in the file's order. ValueError on whatever would
    make a label doubtful. name: what messages call the file."""
    people = {}
    allowed = {"study_group": CLASSES, "recommended_split": SPLITS, "retinal_oct": FLAGS}
    for row in read_tsv(path, [PARTICIPANT, "clinical_site", *allowed], name):
        pid, split = row["participant_id"], row["recommended_split"]
        who = f"{name}: participant {pid}"
        if not pid:
            raise ValueError(
                f"{name}: a row has no participant_id; fill it in, or remove the row: "
                f"{first_few(filter(None, row.values()))}"
            )
        row["retinal_oct"] = row["retinal_oct"].upper()
        for column, values in allowed.items():
            if row[column] not in values:
                raise ValueError(
                    f"{who} has unknown {column} '{row[column]}'; known are {', '.join(values)}"
                )
        label = CLASSES.index(row["study_group"])
        age = checked_age(row.get("age", ""), who)
        person = Row(pid, split, label, row["clinical_site"], age)
        if row["retinal_oct"] == "FALSE":
            person.status, person.reason = "no_oct", "retinal_oct is FALSE"
        earlier = people.setdefault(pid, person)
        if earlier.split != split:
            raise ValueError(f"{who} is in two splits, {earlier.split} and {split}")
        if earlier != person:
            raise ValueError(f"{who} has two rows that differ")
    if not people:
        raise ValueError(f"{name} has no participants")
    for ids in grouped(people, facts.plain_id).values():
        if len(ids) > 1:
            raise ValueError(
                f"{name}: participants {first_few(ids)} may be one, for their ids differ only in "
                "form; write the id of a participant alike in every row"
            )
    return people


def checked_age(text, who):
    """An age as participants.tsv has it; "" where it is missing. ValueError for what is no age."""
    if text.casefold() in NO_AGE:
        return ""
    try:
        years = float(text)
    except ValueError:
        years = math.nan
    if not 0 <= years < 150:
        raise ValueError(
            f"{who} has age '{text}'; write it as a number of years, or leave the cell empty"
        )
    return text


def id_without_form(pid):
    """What is the same for ids that differ only in form: '1001', '01001', '1001.0', '1001,0'."""
    return facts.plain_id(pid.replace(",", ".")).casefold()


def other_forms(ids, others):
    """{id: that of the others which differs from it only in form}, of the ids that have one."""
    known = {id_without_form(pid): pid for pid in others}
    return {pid: known[id_without_form(pid)] for pid in ids if id_without_form(pid) in known}


def how_ids_differ(unlabelled, people):
    """An example of an id of the manifest that participants.tsv writes in another form, in words;
    "" where there is none."""
    forms = other_forms(sorted(unlabelled), people)
    if not forms:
        return ""
    pid, other = next(iter(forms.items()))
    return f"; {LABELS} writes '{other}' and the manifest '{pid}'; write both alike"


def read_manifest(path, people, cfg, notes, name):
    """manifest.tsv -> {path: Sample} of the configured scanner and region, and the set of
    participants with any row, labelled or not. name: what messages call the file. ValueError on
    doubt."""
    samples, kinds, has_rows, unlabelled, elsewhere = {}, Counter(), set(), set(), []
    wanted = (cfg.data.scanner, cfg.data.anatomic_region)
    for row in read_tsv(path, [PARTICIPANT, "anatomic_region", "laterality", "filepath"], name):
        pid, filepath = row["participant_id"], row["filepath"]
        try:
            location = b2.join(cfg.paths.data, filepath)
        except ValueError as error:
            raise ValueError(f"{name}: participant {pid}: {error}") from None
        has_rows.add(pid)
        if pid not in people:
            unlabelled.add(pid or "(no id)")
            continue
        # .../retinal_oct/structural_oct/<scanner>/<participant>/<file>
        kind = (PurePath(location).parent.parent.name, row["anatomic_region"])
        kinds[kind] += 1
        if kind != wanted:
            if kind[0] != wanted[0] in filepath and row["anatomic_region"] == wanted[1]:
                elsewhere.append(f"{pid}: {filepath}")  # the scanner is somewhere else in it
            continue
        person = people[pid]
        person_is = pid, person.split, person.label, person.site
        sample = Sample(*person_is, row["laterality"], location, manifest=row)
        earlier = samples.setdefault(location, sample)
        if earlier.participant_id != pid:
            raise ValueError(
                f"{name}: {filepath} is listed for two participants, {earlier.participant_id} and "
                f"{pid}"
            )
        if earlier is not sample:
            notes.append(f"participant {pid}: {filepath} is listed twice; used once")
    hint = how_ids_differ(unlabelled, people)
    if not kinds:
        if unlabelled and not hint:
            hint = f"; its first id is '{min(unlabelled)}', theirs '{next(iter(people))}'"
        raise ValueError(f"{name} has no row of a participant of {LABELS}{hint}")
    if not samples:
        has = "; ".join(f"{s} '{r}' ({n})" for (s, r), n in sorted(kinds.items()))
        raise ValueError(
            f"{name} has no volume of data.scanner={wanted[0]}, data.anatomic_region={wanted[1]}; "
            f"it has {has}"
        )
    if elsewhere:
        notes.append(
            f"{len(elsewhere)} rows of the manifest have {wanted[0]} in a path that does not end "
            f"in scanner/participant/file, and are not used: participant {first_few(elsewhere, 3)}"
        )
    if unlabelled:
        notes.append(
            f"{len(unlabelled)} participants of the manifest are not in {LABELS}: "
            f"{first_few(sorted(unlabelled))}{hint}"
        )
    return samples, has_rows


def add_checksums(samples, cfg, notes):
    """Give every sample of {path: Sample} its line of data.checksums, which sha256sum wrote in the
    data folder; data.py verifies the file by it when it is first read."""
    path, sums = os.path.expanduser(cfg.data.checksums), {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, start=1):
            match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line.rstrip("\n"))
            if not match:
                raise ValueError(
                    f"data.checksums={path}, line {number} is not what sha256sum writes, a hash "
                    "of 64 digits, two spaces and a file's name"
                )
            sums[os.path.normpath(match[2]).lstrip("/")] = f"sha256:{match[1].lower()}"
    prefix = cfg.paths.data.rstrip("/") + "/"
    unlisted = []
    for location, sample in samples.items():
        sample.sha256 = sums.get(os.path.normpath(location.removeprefix(prefix)), "")
        if not sample.sha256:
            unlisted.append(location)
    if unlisted:
        notes.append(
            f"{len(unlisted)} volumes are not in data.checksums, and are not verified: "
            f"{shown(unlisted, cfg)}"
        )


def find_volumes(samples, cfg, notes):
    """Look the paths of {path: Sample} up in the store, and give every sample that can be used its
    source -> {path: problem}. A second copy of a participant's volume gets neither."""
    found = b2.find_all(list(samples), cfg.data.fetch_deadline)
    usable = {path: source for path, source in found.items() if source.size}
    problems = {
        path: "empty" if path in found else "absent" for path in samples if path not in usable
    }
    for paths in same_content(usable):
        participants = sorted({samples[path].participant_id for path in paths})
        if len(participants) == 1:
            first, *paths = paths
            notes.append(
                f"participant {participants[0]}: {shown(paths, cfg)} has the same content as "
                f"{shown([first], cfg)}; used once"
            )
        else:  # what several participants share cannot carry a label
            problem = f"with content that participants {first_few(participants)} share"
            problems |= dict.fromkeys(paths, problem)
        for path in paths:
            del usable[path]
    unverified = [p for p, source in found.items() if b2.is_remote(p) and not source.checksum]
    if unverified:
        notes.append(
            f"{len(unverified)} volumes have no checksum in the store and are verified by their "
            f"size alone, and not compared with each other: {shown(unverified, cfg)}"
        )
    for path, source in usable.items():
        samples[path].source = source
    return problems


def shown(paths, cfg):
    """The first two of some paths, relative to the data folder, for a message."""
    return first_few([path.removeprefix(cfg.paths.data.rstrip("/") + "/") for path in paths], 2)


def same_content(sources):
    """{path: b2.Object} -> lists of paths whose files hold the same bytes. A store knows checksums;
    local files are read only where their sizes and first bytes agree."""
    if any(b2.is_remote(path) for path in sources):
        traits = [lambda path: sources[path].checksum or path]
    else:
        traits = [lambda path: sources[path].size, first_bytes, lambda path: checksum(path, "sha1")]
    groups = [list(sources)]
    for trait in traits:
        parts = [part for group in groups for part in grouped(group, trait).values()]
        groups = [part for part in parts if len(part) > 1]
    return groups


def grouped(items, key):
    """{key(item): [the items of that key]}, in the order of the items."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def describe(cfg):
    """What data this is, for headings: synthetic data must never pass for real."""
    try:
        path = local_copy(cfg, "phantom.json")
    except FileNotFoundError:
        return f"data {cfg.paths.data}"
    with open(path, "rb") as f:
        made = json_object(f.read(), path, "write the synthetic data anew")
    return f"SYNTHETIC data {cfg.paths.data} ({made.get('effect', 'unknown')} class effect)"


# ----------------------------------------------------------------------------------------- checking


def check(book, max_missing):
    """ValueError unless everybody and every volume is there, but for the max_missing that the
    config allows, or when train or val is empty.

    Counted are participants without any volume and volumes that cannot be read.
    """
    struck = {s.participant_id for s, _ in book.unreadable}
    absent = [r for r in book.missing() if r.participant_id not in struck]
    problems = [f"{s.participant_id} ({reason})" for s, reason in book.unreadable]
    problems += [f"{r.participant_id} ({r.reason})" for r in absent]
    if len(problems) > max_missing:
        labelled = sum(r.status != "no_oct" for r in book.rows)
        counts = []
        if absent:
            counts += [f"{len(absent)} of {labelled} labelled participants have no volume"]
        if book.unreadable:
            counts += [f"{len(book.unreadable)} volumes cannot be read"]
        raise ValueError(
            f"{' and '.join(counts)}, and data.max_missing is {max_missing}: participant "
            f"{first_few(problems, 3)}; restore them, or set data.max_missing={len(problems)} to "
            "go on without"
        )
    for split in ("train", "val"):
        if not book.of(split):
            raise ValueError(f"no participant of split {split} has a volume")


def compare_files(book, samples, earlier):
    """Compare what the files of these samples say with the manifest, and their pixels with each
    other -> notes. Copies are dealt with as files with the same bytes are. earlier: facts.summary
    of volumes that were used elsewhere."""
    notes, of_participant = facts.differences(samples, book.facts)
    for row in book.rows:
        row.notes = "; ".join(of_participant.get(row.participant_id, [])) or row.notes

    def left():
        paths = {sample.path for sample in book.samples}
        return [sample for sample in samples if sample.path in paths]

    for copies, participants in facts.same_pixels(left(), book.facts, earlier):
        if len(participants) > 1:  # what several participants share cannot carry a label
            for sample in copies:
                shared = f"pixels that participants {first_few(participants)} share"
                book.strike(sample, f"{sample.path} shows {shared}")
            continue
        for sample in copies[1:]:
            book.remove(sample)
            notes.append(
                f"participant {sample.participant_id}: {sample.path} has the same pixels as "
                f"{copies[0].path}; used once"
            )
    book.near_copies = facts.near_copies(left(), book.facts, earlier)
    return notes + book.near_copies


def check_classes(book, needed_by):
    """ValueError unless every class has a training volume. needed_by: the setting that needs them,
    such as "data.sampler=stratified"."""
    present = {s.label for s in book.of("train")}
    for label, name in enumerate(CLASS_NAMES):
        if label not in present:
            raise ValueError(
                f"{needed_by} needs every one of {len(CLASSES)} classes in training, and no "
                f"training volume is of class {label} ({name}); set "
                f"{needed_by.partition('=')[0]} to another value"
            )


# ------------------------------------------------------------------------------------------ showing


def table(book):
    """Text: participants with a volume / labelled participants by split, class and site; then who
    is missing and why, and the notes."""
    sites = sorted({r.site for r in book.rows})

    def line(split, name, *cells):
        return f"{split:<7}{name:<18}" + "".join(f"{cell:>10}" for cell in cells)

    lines = [line("split", "class", *sites, "all", "volumes")]
    for split in SPLITS:
        for label, name in [*enumerate(CLASS_NAMES), (None, "all")]:
            rows = [r for r in book.rows if r.split == split and label in (None, r.label)]
            cells = []
            for site in [*sites, None]:
                states = [r.status for r in rows if site in (None, r.site) and r.status != "no_oct"]
                cells.append(f"{states.count('used')}/{len(states)}" if states else "-")
            lines.append(line(split, name, *cells, sum(r.volumes for r in rows)))
    count = Counter(r.status for r in book.rows)
    lines.append(
        f"(with a volume / labelled)   {len(book.rows)} participants: {count['used']} used with "
        f"{len(book.samples)} volumes, {count['missing']} missing, {count['no_oct']} without OCT"
    )
    for r in book.missing():
        who = f"{r.participant_id} ({r.split}, {CLASS_NAMES[r.label]}, {r.site})"
        lines.append(f"missing: {who}: {r.reason}")
    return "\n".join(lines + [f"note: {note}" for note in book.notes])


def unreadable_table(book):
    """A line for every volume that could not be read; "" when there is none."""
    return "\n".join(
        f"unreadable: participant {s.participant_id} ({s.split}, {CLASS_NAMES[s.label]}, {s.site}):"
        f" {reason}"
        for s, reason in book.unreadable
    )


def rows_for_csv(book):
    """Header, then a list of cells for every participant, as for files.csv_text."""
    header = ["participant_id", "split", "label", "site", "volumes", "status", "reason", "notes"]
    return [header, *([getattr(r, name) for name in header] for r in book.rows)]
