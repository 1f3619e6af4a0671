"""Tables -> participants and their volumes: who is there, who is missing, and why.

    book = read(cfg)                      # Ledger: rows (participants), samples (volumes), notes
    check(book, cfg.data.max_missing)     # ValueError when somebody is missing
    print(table(book))
    files.write("ledger.csv", files.csv_text(rows_for_csv(book)))

labels.py reads the tables. A sample is one OCT volume of a participant. The ledger has a row for
everybody with a label (every unit of data.unit), so that nobody is dropped without a word.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePath

import b2
import facts
import given
import labels
import settings
from files import checksum, first_bytes, first_few, hashed, json_object, read_table, sha256
from labels import SPLITS, Row, Sample, grouped  # noqa: F401  (for whoever has them from here)

NAMED = "participants .*(?= share)"  # in what is said of files that several have


@dataclass
class Ledger:
    rows: list
    samples: list
    classes: tuple  # their names, in order
    notes: list = field(default_factory=list)  # oddities that cost nobody a place
    description: str = ""  # what data this is, for headings
    # of "labels" and "manifest": they tell whether two runs saw the same tables
    sha256: dict = field(default_factory=dict)
    unreadable: list = field(default_factory=list)  # (sample, reason); no longer in samples
    ids: set = field(default_factory=set)  # facts.plain_id of all participants of the tables
    facts: dict = field(default_factory=dict)  # {path: what the file says}, of those opened so far
    near_copies: list = field(default_factory=list)  # facts.near_copies of those
    unit: str = "participant"  # data.unit: what a row is
    left_out: dict = field(default_factory=dict)  # {participant of the table without a row: why}

    def of(self, split):
        return [s for s in self.samples if s.split == split]

    def missing(self, split=None):
        return [r for r in self.rows if r.status == "missing" and split in (None, r.split)]

    def strike(self, sample, reason, cause="a volume unreadable or refused"):
        """Take out a volume that cannot be read. A second call for the same volume does nothing.
        cause: the reason, without whom and which file it concerns."""
        if sample not in self.samples:
            return
        self.unreadable.append((sample, reason))
        row = self.remove(sample)
        row.status = "used" if row.volumes else "missing"
        row.reason = "; ".join(filter(None, [row.reason, reason]))
        row.cause = " and ".join(dict.fromkeys(filter(None, [row.cause, cause])))

    def remove(self, sample):
        """Take out a volume -> its participant's Row."""
        self.samples.remove(sample)
        row = next(r for r in self.rows if r.unit == sample.unit)
        row.volumes -= 1
        return row


# ------------------------------------------------------------------------------------------ reading


def read(cfg):
    """Join labels and manifest on the participant, and both with what the store holds -> Ledger.

    Reads the tables, and lists a bucket once; opens no volume. ValueError when a table is doubtful,
    FileNotFoundError when it is missing.
    """
    tables, hashes = read_tables(cfg)
    found = labels.read(cfg, tables)
    rows, samples, notes = found.rows, found.samples, found.notes
    known, named = {row.participant_id for row in rows.values()}, found.has_rows
    forms = labels.other_forms(known - named, named - known)
    if cfg.paths.features:
        samples, problems = find_features(cfg, rows, samples)
    else:
        problems = find_volumes(samples, cfg, notes)
    if cfg.data.checksums:
        add_checksums(samples, cfg, notes)
    samples_of = grouped(samples.values(), lambda sample: sample.unit)

    used = []
    for unit, row in rows.items():
        samples = samples_of.get(unit, [])
        if row.status == "no_oct":
            if samples:
                notes.append(
                    f"participant {unit}: {cfg.data.columns.has_oct} is FALSE, yet there "
                    f"are {len(samples)} volumes; not used"
                )
            continue
        usable = [sample for sample in samples if sample.source]
        used += usable
        row.volumes = len(usable)
        unusable = [sample.path for sample in samples if sample.path in problems]
        problem_of = grouped(unusable, problems.get)
        reasons = [
            f"{len(paths)} of {len(samples)} files {problem}: {shown(paths, cfg)}"
            for problem, paths in problem_of.items()
        ]
        causes = [f"files {re.sub(NAMED, 'several', problem)}" for problem in problem_of]
        if cfg.paths.features and not samples:
            causes = reasons = [f"no row in {cfg.paths.features}"]
        elif row.participant_id not in named:
            form = forms.get(row.participant_id)
            hint = f"; it has '{form}', write ids alike in both" if form else ""
            causes = ["no row in the manifest"]
            reasons.append(f"{causes[0]}{hint}")
        elif not samples:
            causes = reasons = [f"no volume of {volumes_asked(cfg)}"]
        row.reason, row.cause = "; ".join(reasons), " and ".join(sorted(set(causes)))
        if not usable:
            row.status = "missing"
        elif reasons:
            notes.append(f"participant {unit}: {row.reason}")
    classes = settings.class_names(cfg)
    book = Ledger(list(rows.values()), used, classes, notes, describe(cfg), hashes)
    book.ids, book.unit, book.left_out = found.ids, cfg.data.unit, found.left_out
    if not cfg.paths.features:
        strike_by_folder(book, cfg)
    return book


def read_tables(cfg):
    """-> {"labels": files.Table, and "participants", "manifest" where the config names them}, and
    the sha256 of what the labels come from ("labels") and of the manifest ("manifest", "" where
    there is none)."""
    tables, hashes = {}, {}
    for key in ("labels", "participants", "manifest"):
        name = getattr(cfg.data, key)
        if name is None:
            continue
        url = place_of(cfg, name)
        try:
            path = b2.local(url, cfg.paths.cache_dir, cfg.data.fetch_deadline)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"paths.data={cfg.paths.data}: {name} is not there; set paths.data to the folder "
                f"that holds it, or data.{key} to the table's own path"
            ) from None
        tables[key], hashes[key] = read_table(path, url, name), sha256(path)
    of_people = hashes.pop("participants", None)
    if of_people:
        hashes["labels"] = hashed(f"{hashes['labels']} {of_people}")
    return tables, {"manifest": ""} | hashes


def place_of(cfg, name):
    """Path or URL of a table: below paths.data, unless its name is a URL or an absolute path of
    its own, or begins with ~ or ./ or ../"""
    if "://" in name or os.path.isabs(name) or name.startswith(("~", "./", "../")):
        return os.path.expanduser(name)
    return b2.join(cfg.paths.data, name)


def volumes_asked(cfg):
    """Which of the volumes the config asks for, in words."""
    asked = [f"{column} {' or '.join(values)}" for column, values in cfg.data.where.items()]
    if cfg.data.manifest is not None and cfg.data.scanner is not None:
        asked = [cfg.data.scanner, cfg.data.anatomic_region, *asked]
    return ", ".join(asked) or "any kind"


def find_features(cfg, rows, samples):
    """The samples, with a source where paths.features has a row of their file; or where its rows
    are those of participants, a sample for each such row -> {path: Sample}, {path: problem}."""
    found, name = given.read(cfg), cfg.paths.features
    if found.file:
        row_of, problems = found.row_of(), {}
        for path, sample in samples.items():
            if given.plain_path(b2.below(cfg.paths.data, path)) in row_of:
                sample.source = b2.Object(path, 1)
            else:
                problems[path] = f"without a row in {name}"
        return samples, problems
    if cfg.data.unit != "participant":
        raise ValueError(
            f"paths.features={name} has no array 'file', and data.unit={cfg.data.unit} scores less "
            "than a participant; add it"
        )
    of_rows = {}
    for participant, numbers in found.rows_of().items():
        if participant in rows:
            row = rows[participant]
            about = row.participant_id, row.split, row.label, row.site, ""
            for number in numbers:
                path = f"{name} row {number}"
                of_rows[path] = Sample(*about, path, b2.Object(path, 1))
    return of_rows, {}


def strike_by_folder(book, cfg):
    """Strike the volumes that lie in another participant's folder, .../<participant>/<file>, in a
    data set that has a folder for each; folders of classes may be numbered as participants are."""
    folder_of = {sample.path: PurePath(sample.path).parent.name for sample in book.samples}
    named = {facts.plain_id(folder) for folder in folder_of.values()} & book.ids
    if len(named) <= len({sample.participant_id for sample in book.samples}) / 2:
        return
    for sample in book.samples[:]:
        folder = folder_of[sample.path]
        other = facts.other_participant(folder, sample.participant_id, book.ids)
        if other:
            book.strike(
                sample,
                f"{shown([sample.path], cfg)} belongs to participant {other} by its folder, and to "
                f"{sample.participant_id} by the manifest",
                "a volume in another participant's folder",
            )


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
    unlisted = []
    for location, sample in samples.items():
        sample.sha256 = sums.get(os.path.normpath(b2.below(cfg.paths.data, location)), "")
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
            problem = f"with content that participants {first_few(participants)} share"  # NAMED
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
    return first_few([b2.below(cfg.paths.data, path) for path in paths], 2)


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


def describe(cfg):
    """What data this is, for headings: synthetic data must never pass for real."""
    try:
        url = b2.join(cfg.paths.data, "phantom.json")
        path = b2.local(url, cfg.paths.cache_dir, cfg.data.fetch_deadline)
    except FileNotFoundError:
        return f"data {cfg.paths.data}"
    with open(path, "rb") as f:
        made = json_object(f.read(), path, "write the synthetic data anew")
    return f"SYNTHETIC data {cfg.paths.data} ({made.get('effect', 'unknown')} class effect)"


# ----------------------------------------------------------------------------------------- checking


def check(book, max_missing):
    """ValueError unless everybody and every volume is there, but for the max_missing that the
    config allows, or when train or val is empty.

    Counted are participants without any volume and volumes that cannot be read. max_missing None:
    nothing is an error, for all problems are to be seen.
    """
    if max_missing is None:
        return
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
            raise ValueError(
                f"no participant of split {split} has a volume; look at the splits of the table "
                "(data.columns.split), or at data.split"
            )


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
                book.strike(sample, f"{sample.path} shows {shared}", "pixels that several share")
            continue
        for sample in copies[1:]:
            book.remove(sample)
            notes.append(
                f"participant {sample.participant_id}: {sample.path} has the same pixels as "
                f"{copies[0].path}; used once"
            )
    book.near_copies = facts.near_copies(left(), book.facts, earlier)
    return notes + book.near_copies


def check_classes(book):
    """ValueError unless every class has a training volume: a head would never answer it."""
    present = {s.label for s in book.of("train")}
    absent = [name for label, name in enumerate(book.classes) if label not in present]
    if absent:
        raise ValueError(
            f"no training volume is of class {first_few(absent)}; correct the table or its splits, "
            "or leave the class out (data.classes, data.where)"
        )


# ------------------------------------------------------------------------------------------ showing


def table(book):
    """Text: participants with a volume / labelled participants by split, class and site; then who
    is missing and why, and the notes."""
    sites = sorted({r.site for r in book.rows} - {""})

    width = max(18, 2 + max(map(len, book.classes)))

    def line(split, name, *cells):
        return f"{split:<7}{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells)

    lines = [line("split", "class", *sites, "all", "volumes")]
    for split in SPLITS:
        for label, name in [*enumerate(book.classes), (None, "all")]:
            rows = [r for r in book.rows if r.split == split and label in (None, r.label)]
            cells = []
            for site in [*sites, None]:
                cells.append(used_of([r for r in rows if site in (None, r.site)]))
            lines.append(line(split, name, *cells, sum(r.volumes for r in rows)))
    count = Counter(r.status for r in book.rows)
    lines.append(
        f"(with a volume / labelled)   {len(book.rows)} {book.unit}s: {count['used']} used with "
        f"{len(book.samples)} volumes, {count['missing']} missing, {count['no_oct']} without OCT"
    )
    for r in book.missing():
        who = described(r.unit, r, book)
        lines.append(f"missing: {who}: {r.reason}")
    return "\n".join(lines + [f"note: {note}" for note in book.notes])


def used_of(rows):
    """With a volume / labelled, of some Rows: "54/55"; "-" where none is labelled."""
    states = [row.status for row in rows if row.status != "no_oct"]
    return f"{states.count('used')}/{len(states)}" if states else "-"


def unreadable_table(book):
    """A line for every volume that could not be read; "" when there is none."""
    return "\n".join(
        f"unreadable: participant {described(s.participant_id, s, book)}: {reason}"
        for s, reason in book.unreadable
    )


def described(name, row, book):
    """A Row or Sample in words: whose it is, with split, class and site."""
    about = [row.split, book.classes[row.label], row.site]
    return f"{name} ({', '.join(filter(None, about))})"


def rows_for_csv(book):
    """Header, then a list of cells for every participant, as for files.csv_text."""
    header = ["participant_id", "split", "label", "site", "volumes", "status", "reason", "notes"]
    header[1:1] = [] if book.unit == "participant" else ["unit"]
    return [header, *([getattr(r, name) for name in header] for r in book.rows)]
