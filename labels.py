"""Tables -> who has which label and split, and the files that are named as theirs.

    tables = {"labels": files.read_table(path), "manifest": ...}    # "participants" too, or fewer
    found = read(cfg, tables)         # Found: rows (by unit), samples (by path), notes, ...

A table has a row per participant, or per volume; data.columns names its columns. With a manifest,
that table names the volumes, and data.labels says what is known of the participants; without one,
data.labels has a row per volume and does both. What is scored is a unit (data.unit): a participant
with all volumes, an eye, or a volume; the label belongs to it. A split belongs to a participant.
"""

import difflib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import PurePath

import b2
import facts
import settings
from files import first_few, hashed, merge_spellings

SPLITS = ("train", "val", "test")
FLAGS = {"TRUE": True, "YES": True, "1": True, "FALSE": False, "NO": False, "0": False}
EYES = {"R": "R", "OD": "R", "RIGHT": "R", "L": "L", "OS": "L", "LEFT": "L"}  # as tables write them
MISSING = ("", "na", "n/a", "<na>", "nan", "none", "null", "unknown")  # how tables say: missing


@dataclass
class Row:
    """A unit. status: used | missing (should have a volume, has none) | no_oct (never had OCT)."""

    participant_id: str
    split: str
    label: int
    site: str
    age: str = ""  # as in the table; "" where that has none
    volumes: int = 0
    status: str = "used"
    reason: str = ""
    notes: str = ""  # what is odd about its volumes, and cost it none
    unit: str = ""  # the participant_id, with the eye or the file where these are scored
    # the reason in words that are alike for all whom it befell, by which flow.py counts them
    cause: str = field(default="", compare=False)
    covariates: dict = field(default_factory=dict, compare=False, repr=False)  # {column: text}

    def __post_init__(self):
        self.unit = self.unit or self.participant_id


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
    unit: str = ""

    def __post_init__(self):
        self.unit = self.unit or self.participant_id


@dataclass
class Found:
    """What the tables say. rows: {unit: Row}; samples: {path: Sample}; has_rows: participants whom
    the manifest names, labelled or not; ids: facts.plain_id of all participants; left_out:
    {participant of data.labels without a row here: why}."""

    rows: dict
    samples: dict
    has_rows: set
    ids: set
    notes: list
    left_out: dict


def read(cfg, tables):
    """tables: {"labels": files.Table, and "participants", "manifest" where the config names them}
    -> Found. ValueError on whatever would make a label doubtful."""
    notes, columns = [], find_columns(cfg, tables)
    table, key = tables.get("manifest", tables["labels"]), columns["participant"][1]
    has_rows = {row[key] for row in table.rows}  # before data.where leaves any out
    everyone = dict.fromkeys(row[key] for row in tables["labels"].rows)
    left_out = set_aside(cfg, tables, notes)
    people = read_people(cfg, tables, columns, left_out)
    add_covariates(cfg, tables, columns, people, notes)
    volumes = read_volumes(cfg, tables, columns, people, left_out, notes)
    rows = read_units(cfg, tables, people, volumes, notes)
    with_rows = {row.participant_id for row in rows.values()}
    nameless = people.keys() - with_rows
    why = {pid: people[pid].cause or "no volume that could have a label" for pid in nameless}
    why |= left_out
    left_out = {pid: why[pid] for pid in everyone if pid in why and pid.casefold() not in MISSING}
    if cfg.data.columns.split is None:
        draw_splits(cfg, rows)
    samples = {}
    for path, volume in volumes.items():
        row = rows[volume["unit"]]
        about = row.participant_id, row.split, row.label, row.site, volume["eye"], path
        samples[path] = Sample(*about, manifest=volume["row"], unit=row.unit)
    has_rows -= {""}
    ids = {facts.plain_id(pid) for pid in [*people, *has_rows]}
    return Found(rows, samples, has_rows, ids, notes, left_out)


# ----------------------------------------------------------------------------------------- columns


def find_columns(cfg, tables):
    """-> {role: (table, column)}, such as {"label": ("labels", "study_group")}: where each of
    data.columns stands. ValueError naming all that are in none of the tables."""
    asked = vars(cfg.data.columns)
    spellings = asked["participant"]
    for table in tables.values():
        merge_spellings(table, spellings, "data.columns.participant")
    of_volumes = "manifest" if "manifest" in tables else "labels"
    places = {"label": ["labels", of_volumes], "file": [of_volumes], "eye": [of_volumes]}
    found, absent = {"participant": (None, spellings[0])}, defaultdict(list)
    for role, column in asked.items():
        if role == "participant" or column is None:
            continue
        candidates = places.get(role, ["labels", "participants"])
        known = [name for name in candidates if name in tables]
        place = next((name for name in known if column in tables[name].header), None)
        if place:
            found[role] = place, column
        else:
            absent[known[0]].append((role, column))
    for name, missing in absent.items():
        table, roles = tables[name], ", ".join(f"data.columns.{role}" for role, _ in missing)
        spare = [role for role, _ in missing if role not in ("label", "file")]
        raise ValueError(
            f"{table.name} has no column {', '.join(repr(column) for _, column in missing)}; found "
            f"{', '.join(table.header)}; name the right one with {roles}"
            + (f", or set it to null where there is none ({', '.join(spare)})" if spare else "")
        )
    if cfg.data.unit == "eye" and "eye" not in found:
        raise ValueError("data.unit=eye needs to know which eye; name its column: data.columns.eye")
    return found


def cell(columns, role, row, table):
    """The text of a role in a row of a table ("labels", ...); "" where it stands elsewhere."""
    place, column = columns.get(role, (None, None))
    return row[column] if place == table else ""


def participant_of(columns, row, table):
    pid = row[columns["participant"][1]]
    if pid.casefold() in MISSING:
        shown = f" ('{pid}')" if pid else ""
        raise ValueError(
            f"{table.name}: a row has no {columns['participant'][1]}{shown}; fill it in, or "
            f"remove the row: {first_few(filter(None, row.values()))}"
        )
    return pid


def set_aside(cfg, tables, notes):
    """Remove from the tables the rows that data.where does not ask for, and count them -> {a
    participant who has no other row in data.labels or data.participants: why}."""
    left_out = {}
    for column, wanted in cfg.data.where.items():
        having = [name for name, table in tables.items() if column in table.header]
        if not having:
            known = dict.fromkeys(c for table in tables.values() for c in table.header if c)
            raise ValueError(
                f"data.where: no table has a column '{column}'; they have {', '.join(known)}"
            )
        for name in having:
            table = tables[name]
            kept = [row for row in table.rows if is_wanted(row[column], wanted)]
            what = f"data.where {column}={', '.join(wanted)}"
            if not kept:
                has = first_few(sorted({row[column] for row in table.rows}))
                raise ValueError(f"{what} fits no row of {table.name}; it has {has}")
            if len(kept) < len(table.rows):
                notes.append(
                    f"{what} leaves out {len(table.rows) - len(kept)} of {len(table.rows)} rows of "
                    f"{table.name}"
                )
            if name != "manifest":
                key = cfg.data.columns.participant[0]
                gone = {row[key] for row in table.rows} - {row[key] for row in kept}
                left_out = dict.fromkeys(gone, f"not {what}") | left_out
            table.rows = kept
    return left_out


def is_wanted(text, wanted):
    """Is this cell one of the values of data.where? "*" stands for any that is not missing."""
    if wanted == ["*"]:
        return text.casefold() not in MISSING
    return same_value(text, wanted) is not None


def same_value(text, values):
    """The one of the values that a cell holds: as it is written, or the same number in another
    form, as tables write 1 as 1.0; None where it holds none."""
    if text in values:
        return text
    plain = facts.plain_id(text)
    return next((value for value in values if facts.plain_id(value) == plain), None)


# ------------------------------------------------------------------------------------ participants


def read_people(cfg, tables, columns, left_out):
    """-> {participant_id: Row}, in the order of data.labels; the label is None where volumes have
    their own. ValueError on contradictions."""
    people, table = {}, tables["labels"]
    of_all = {}  # what data.participants says
    for row in tables["participants"].rows if "participants" in tables else ():
        person = person_in(columns, row, tables, "participants", cfg)
        keep_or_refuse(of_all, person, tables["participants"].name, False)
    has_volumes = "manifest" not in tables
    for row in table.rows:
        pid = participant_of(columns, row, table)
        if pid in left_out:
            continue
        person = person_in(columns, row, tables, "labels", cfg)
        if "participants" in tables:
            other = of_all.get(pid)
            if other is None:
                raise ValueError(
                    f"{tables['participants'].name} has no row of participant {pid}, whom "
                    f"{table.name} has; add one, or leave the participant out with data.where"
                )
            for name in ("split", "site", "age", "status", "reason", "cause"):
                if getattr(person, name) in ("", "used"):
                    setattr(person, name, getattr(other, name))
        keep_or_refuse(people, person, table.name, has_volumes)
    if not people:
        raise ValueError(f"{table.name} has no participants")
    for ids in grouped(people, id_without_form).values():
        if len(ids) > 1:
            raise ValueError(
                f"{table.name}: participants {first_few(ids)} may be one, for their ids differ "
                "only in form; write the id of a participant alike in every row"
            )
    return people


def person_in(columns, row, tables, name, cfg):
    """The Row of a participant, as one row of a table has it."""
    table = tables[name]
    pid = participant_of(columns, row, table)
    who = f"{table.name}: participant {pid}"
    text = {role: cell(columns, role, row, name) for role in ("split", "site", "age", "has_oct")}
    flag = text["has_oct"].upper()
    for role, value, known in (("split", text["split"], SPLITS), ("has_oct", flag, FLAGS)):
        if columns.get(role, (None,))[0] == name and value not in known:
            raise ValueError(unknown(who, columns[role][1], text[role], list(known)))
    label = None
    if columns["label"][0] == name and ("manifest" in tables or cfg.data.unit == "participant"):
        label = label_of(cfg, row[columns["label"][1]], who, columns["label"][1])
    age = checked_age(text["age"], who)
    person = Row(pid, text["split"], label, text["site"], age)
    if not FLAGS.get(flag, True):
        person.status = "no_oct"
        person.reason = person.cause = f"{columns['has_oct'][1]} is FALSE"
    return person


def keep_or_refuse(people, person, name, has_volumes):
    """Keep what is said of a participant for the first time. ValueError where it differs later; in
    a table with a row per volume, the age may, and the first one stays."""
    earlier = people.setdefault(person.participant_id, person)
    if earlier == person:
        return
    who = f"{name}: participant {person.participant_id}"
    if earlier.split != person.split:
        raise ValueError(
            f"{who} is in two splits, {earlier.split} and {person.split}; correct the wrong row"
        )
    if has_volumes and replace(earlier, age=person.age) == person:
        return
    if earlier.label != person.label:
        raise ValueError(
            f"{who} has two rows that differ: they have two labels; correct the wrong row, or "
            "where an eye or a volume has a label of its own, set data.unit=eye or volume"
        )
    differing = next(key for key in vars(person) if vars(person)[key] != vars(earlier)[key])
    raise ValueError(
        f"{who} has two rows that differ: {differing} is '{vars(earlier)[differing]}' and "
        f"'{vars(person)[differing]}'"
    )


def covariate_columns(cfg):
    """{column: role, or None} of eval.covariates; where that is null, of the age, site and sex that
    data.columns names, but for one that is the label."""
    roles = {getattr(cfg.data.columns, role): role for role in ("age", "site", "sex")}
    if cfg.eval.covariates is not None:
        return {column: roles.get(column) for column in cfg.eval.covariates}
    return {c: role for c, role in roles.items() if c not in (None, cfg.data.columns.label)}


def add_covariates(cfg, tables, columns, people, notes):
    """Give every Row its covariates, from data.labels or else data.participants. Where the rows of
    a participant differ, the first that has a value holds, and a note says so."""
    key = columns["participant"][1]
    for column in covariate_columns(cfg):
        known = [tables[name] for name in ("labels", "participants") if name in tables]
        table = next((table for table in known if column in table.header), None)
        if table is None:
            has = dict.fromkeys(name for table in known for name in table.header if name)
            raise ValueError(
                f"eval.covariates: no column '{column}' in {' or '.join(t.name for t in known)}; "
                f"found {', '.join(has)}"
            )
        differing = {}
        for row in table.rows:
            person = people.get(row[key])
            if person is None or row[column].casefold() in MISSING:
                continue
            if person.covariates.setdefault(column, row[column]) != row[column]:
                differing[person.participant_id] = None
        if differing:
            notes.append(
                f"eval.covariates: {len(differing)} participants have several values of {column}, "
                f"and the first is used: {first_few(differing)}"
            )


def label_of(cfg, text, who, column):
    """The class of a cell, as its number."""
    if text.casefold() in MISSING and text not in cfg.data.classes:
        raise ValueError(
            f"{who} has no {column} ('{text}'); fill it in, or leave such rows out: "
            f"data.where={{{column}: '*'}}"
        )
    if cfg.data.thresholds:
        try:
            value = math.nan if "_" in text else float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"{who} has {column} '{text}', which is no number to be compared with "
                "data.thresholds; correct it, or leave the row out with data.where"
            )
        return sum(value >= threshold for threshold in cfg.data.thresholds)
    value = same_value(text, cfg.data.classes)
    if value is None:
        raise ValueError(unknown(who, column, text, cfg.data.classes, " (data.classes)"))
    return settings.class_names(cfg).index(cfg.data.classes[value])


def unknown(who, column, text, known, where=""):
    """Message about a value that is none of the known ones."""
    nearest = difflib.get_close_matches(text, known, n=1)
    meant = f", did you mean '{nearest[0]}'?" if nearest else ";"
    return f"{who} has unknown {column} '{text}'{meant} known are {', '.join(known)}{where}"


def checked_age(text, who):
    """An age as the table has it; "" where it is missing. ValueError for what is no age."""
    if text.casefold() in MISSING:
        return ""
    try:
        years = math.nan if "_" in text else float(text)
    except ValueError:
        years = math.nan
    if not 0 <= years < 150:
        raise ValueError(
            f"{who} has age '{text}'; write it as a number of years, or leave the cell empty"
        )
    return text


def draw_splits(cfg, rows):
    """Give every participant a split, by data.split: stratified by class, decided by the seed and
    the participant's id. Whoever has volumes of several classes counts as one of that kind."""
    shares = {"val": cfg.data.split.val, "test": cfg.data.split.test}
    labels_of = defaultdict(set)
    for row in rows.values():
        labels_of[row.participant_id].add(row.label)
    strata = grouped(labels_of, lambda pid: tuple(sorted(labels_of[pid])))
    split_of, owed = {}, dict.fromkeys(shares, 0.0)
    names = settings.class_names(cfg)  # by them, so that the order of data.classes changes nothing
    for stratum in sorted(strata, key=lambda labels: [names[label] for label in labels]):
        people = sorted(strata[stratum], key=lambda pid: hashed(f"{cfg.seed} {pid}"))
        number, left = len(people), len(people) - 1  # one at least is for training
        for split, share in shares.items():
            # what rounding took from one class goes to the next
            owed[split] += share * number
            take = min(left, math.floor(owed[split] + 0.5))
            owed[split] -= take
            left -= take
            for pid in people[:take]:
                split_of[pid] = split
            people = people[take:]
        split_of |= dict.fromkeys(people, "train")
    for split, share in shares.items():
        if share and split not in split_of.values():
            raise ValueError(
                f"data.split.{split}={share:g} of {len(split_of)} participants is nobody; raise "
                "it, or name a column of splits (data.columns.split)"
            )
    for row in rows.values():
        row.split = split_of[row.participant_id]


# -------------------------------------------------------------------------------------- volumes


def read_volumes(cfg, tables, columns, people, left_out, notes):
    """-> {path: dict of participant, eye, label (None: the participant's), unit, row} of the
    volumes that the config asks for. ValueError on doubt."""
    name = "manifest" if "manifest" in tables else "labels"
    table, by_folder = tables[name], name == "manifest" and cfg.data.scanner is not None
    volumes, kinds, unlabelled, elsewhere = {}, Counter(), set(), []
    wanted = (cfg.data.scanner, cfg.data.anatomic_region)
    if by_folder and "anatomic_region" not in table.header:
        raise ValueError(
            f"{table.name} has no column 'anatomic_region', which data.anatomic_region is compared "
            "with; set data.scanner=null, and choose volumes with data.where"
        )
    for row in table.rows:
        pid = row[columns["participant"][1]]
        filepath = row[columns["file"][1]]
        if not filepath and pid in people and people[pid].status == "no_oct":
            continue  # the table says itself that there is none
        try:
            location = located(cfg, filepath)
        except ValueError as error:
            raise ValueError(f"{table.name}: participant {pid}: {error}") from None
        if pid not in people:
            if pid not in left_out:
                unlabelled.add(pid or "(no id)")
            continue
        if by_folder:
            # .../retinal_oct/structural_oct/<scanner>/<participant>/<file>
            kind = (PurePath(location).parent.parent.name, row["anatomic_region"])
            kinds[kind] += 1
            if kind != wanted:
                if kind[0] != wanted[0] in filepath and row["anatomic_region"] == wanted[1]:
                    elsewhere.append(f"{pid}: {filepath}")  # the scanner is somewhere else in it
                continue
        else:
            kinds["all"] += 1
        who = f"{table.name}: participant {pid}"
        eye, label = eye_of(cell(columns, "eye", row, name)), None
        if columns["label"][0] == name and people[pid].label is None:
            label = label_of(cfg, row[columns["label"][1]], who, columns["label"][1])
        unit = {"participant": pid, "eye": f"{pid} {eye}", "volume": f"{pid} {filepath}"}
        if cfg.data.unit == "eye" and not eye:
            raise ValueError(f"{who}: {filepath} does not say which eye it is of (data.unit=eye)")
        volume = {"participant": pid, "eye": eye, "label": label, "row": row}
        volume["unit"] = unit[cfg.data.unit]
        earlier = volumes.setdefault(location, volume)
        if earlier["participant"] != pid:
            raise ValueError(
                f"{table.name}: {filepath} is listed for two participants, "
                f"{earlier['participant']} and {pid}"
            )
        if earlier["label"] != label:
            raise ValueError(f"{who}: {filepath} is listed twice, with two labels")
        if earlier is not volume:
            notes.append(f"participant {pid}: {filepath} is listed twice; used once")
    check_volumes(cfg, tables, people, (volumes, kinds, unlabelled), elsewhere, notes)
    return volumes


def eye_of(text):
    """L or R, however a table spells it; another text as it is, "" where the eye is missing."""
    return "" if text.casefold() in MISSING else EYES.get(text.upper(), text)


def located(cfg, filepath):
    """Path or URL of a volume that a table names: below paths.data, with a leading slash or
    without; an absolute path may also begin with that folder."""
    return b2.join(cfg.paths.data, b2.below(cfg.paths.data, filepath))


def check_volumes(cfg, tables, people, found, elsewhere, notes):
    """ValueError where no volume is left; notes about rows that are not used."""
    (volumes, kinds, unlabelled), labels = found, tables["labels"].short
    table = tables.get("manifest", tables["labels"])
    hint = how_ids_differ(unlabelled, people, labels)
    if not kinds:
        if unlabelled and not hint:
            hint = f"; its first id is '{min(unlabelled)}', theirs '{next(iter(people))}'"
        raise ValueError(f"{table.name} has no row of a participant of {labels}{hint}")
    if not volumes:
        has = "; ".join(f"{s} '{r}' ({n})" for (s, r), n in sorted(kinds.items()))
        raise ValueError(
            f"{table.name} has no volume of data.scanner={cfg.data.scanner}, "
            f"data.anatomic_region={cfg.data.anatomic_region}; it has {has}"
        )
    if elsewhere:
        notes.append(
            f"{len(elsewhere)} rows of the manifest have {cfg.data.scanner} in a path that does "
            "not end in scanner/participant/file, and are not used: participant "
            f"{first_few(elsewhere, 3)}"
        )
    if unlabelled:
        notes.append(
            f"{len(unlabelled)} participants of the manifest are not in {labels}: "
            f"{first_few(sorted(unlabelled))}{hint}"
        )


def read_units(cfg, tables, people, volumes, notes):
    """-> {unit: Row}: of the participants, or of the eyes or files that the volumes name.
    ValueError where the volumes of one have two labels."""
    rows, with_volumes, nameless = {}, set(), []
    by_participant = cfg.data.unit == "participant"
    for path, volume in volumes.items():
        person, unit = people[volume["participant"]], volume["unit"]
        label = person.label if volume["label"] is None else volume["label"]
        with_volumes.add(person.participant_id)
        earlier = rows.setdefault(unit, replace(person, unit=unit, label=label))
        name = tables.get("manifest", tables["labels"]).name
        if earlier.participant_id != person.participant_id:
            raise ValueError(
                f"{name}: participants '{earlier.participant_id}' and '{person.participant_id}' "
                f"both have '{unit}' as {cfg.data.unit}; write ids without spaces"
            )
        if earlier.label != label:
            names = settings.class_names(cfg)
            finer = {"participant": "eye or volume", "eye": "volume"}.get(cfg.data.unit)
            instead = f", or where that has a label of its own, set data.unit={finer}"
            raise ValueError(
                f"{name}: {unit} has two labels, {names[earlier.label]} and {names[label]} "
                f"({path}); correct one{instead}"
            )
    if cfg.data.unit == "eye":
        for pid, eyes in grouped(rows, lambda unit: rows[unit].participant_id).items():
            if len(eyes) > 2:
                raise ValueError(
                    f"participant {pid} has {len(eyes)} eyes, {first_few(eyes)}; write an eye "
                    "alike in every row (data.columns.eye)"
                )
    if by_participant:  # in the order of the table
        rows = {pid: rows.get(pid, person) for pid, person in people.items()}
    else:
        rows |= {pid: person for pid, person in people.items() if pid not in with_volumes}
    for unit, row in list(rows.items()):
        if row.label is None:  # the label would be that of a volume
            nameless.append(unit)
            del rows[unit]
    if nameless:
        notes.append(
            f"{len(nameless)} participants have no volume that could have a label: "
            f"{first_few(nameless)}"
        )
    return rows


# ------------------------------------------------------------------------------ ids in another form


def id_without_form(pid):
    """What is the same for ids that differ only in form: '1001', '01001', '1001.0', '1001,0'."""
    return facts.plain_id(pid.replace(",", ".")).casefold()


def other_forms(ids, others):
    """{id: that of the others which differs from it only in form}, of the ids that have one."""
    known = {id_without_form(pid): pid for pid in others}
    return {pid: known[id_without_form(pid)] for pid in ids if id_without_form(pid) in known}


def how_ids_differ(unlabelled, people, labels):
    """An example of an id of the manifest that the labels' table writes in another form, in words;
    "" where there is none."""
    forms = other_forms(sorted(unlabelled), people)
    if not forms:
        return ""
    pid, other = next(iter(forms.items()))
    return f"; {labels} writes '{other}' and the manifest '{pid}'; write both alike"


def grouped(items, key):
    """{key(item): [the items of that key]}, in the order of the items."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)
