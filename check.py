"""The data before anything is trained: who is in them, who is missing and why.

    python check.py --config configs/single_domain_01.yaml    # the ledger; opens no volume
    python check.py --deep --config FILE         # and opens every volume once: what are they?
    python check.py --no-images --config FILE    # a page without pictures of eyes

The page lies beside the run's folder, RUN_DIR_check.html, and the flow of participants as a figure
too (RUN_DIR_flow.svg, .pdf, .png). It is also written where the check ends with an error, when it
is needed most. python data.py is the same command.
"""

if __name__ in ("__main__", "__mp_main__"):
    import begin

    begin.process()

import contextlib
import copy
import io
import os
import pathlib

import numpy as np

import architecture
import b2
import config
import data
import device
import facts
import figures
import files
import flow
import ledger
import loader
import phantom
import report
import settings
import stages
import weights
from labels import SPLITS

MOST_SCANS = 12  # pictures of B-scans on the page
MOST_LINES = 100  # of a list of problems on the page
SCAN_WIDTH = 480  # pixels of a picture of a B-scan

# what a manifest of AI-READI says of a volume
OF_MANIFEST = ("manufacturer", "manufacturers_model_name", "anatomic_region", "imaging", "height")
OF_MANIFEST += ("width", "number_of_frames", "pixel_spacing", "slice_thickness")


# ------------------------------------------------------------------------------------------- files


def deep_check(cfg, book):
    """Open every volume of the ledger once, into the cache; print what the files say of themselves.
    Unreadable volumes are struck off the ledger -> notes, {kind: what the page shows of it}."""
    lenient = copy.deepcopy(cfg)
    lenient.data.max_missing = None  # all problems are to be seen, not the first
    size = loader.volume_size(cfg, None if cfg.data.image_size else loader.load(cfg).image_size)
    volumes = data.open_volumes(cfg, book.samples, size, book.ids)
    order, scans = range(len(volumes.samples)), {}
    stage = stages.Stage("open", len(order), "volume", reading=volumes.reading)
    with stage, contextlib.closing(data.stream(volumes, book, order, lenient)) as arriving:
        for i, key, volume in stage.over(arriving):
            path, found = volumes.samples[i].path, volumes.facts(i, key)
            book.facts[path] = found
            add_scan(scans, volumes.samples[i], found, volume[0].numpy())
    notes = ledger.compare_files(book, volumes.samples, facts.NOTHING)
    lines = [facts.text_of(volumes.samples, book.facts), *(f"note: {note}" for note in notes)]
    print("\n".join(lines + ledger.unreadable_table(book).splitlines()))
    return notes, scans


def known_files(cfg, book):
    """What the cache holds of the ledger's volumes, into book.facts, without opening any -> notes,
    {kind: what the page shows of it}; [], None where it is not known in what size the cache has
    them."""
    size = size_at_hand(cfg)
    if size is None:
        return [], None
    volumes, notes, scans = data.open_volumes(cfg, book.samples, size, book.ids), [], {}
    for i, sample in enumerate(volumes.samples):
        try:
            key = volumes.key(i)
            found = volumes.facts(i, key)
        except ValueError as error:  # data.checksums has another, or it is another participant's
            notes.append(f"participant {sample.participant_id}: {error}")
            continue
        if found:
            book.facts[sample.path] = found
            if kind_of(found) not in scans and len(scans) < MOST_SCANS:
                volume = files.load_array(volumes.folder / f"{key}.npy", np.float16, size)
                if volume is not None:
                    add_scan(scans, sample, found, volume)
    return notes, scans


def size_at_hand(cfg):
    """(D, H, W) of the volumes in the cache, where data.image_size or a local checkpoint says it;
    None where that would take a download, or an encoder's code."""
    path = os.path.expanduser(cfg.paths.checkpoint_path or "")
    if cfg.paths.features:
        return None
    if cfg.data.image_size:
        return tuple(cfg.data.image_size)
    if cfg.model.loader or b2.is_remote(path) or not os.path.isfile(path):
        return None
    try:
        made = weights.plain(weights.read_checkpoint(path).get("config"))
        size = architecture.resolved(made["image_size"], made)
    except (ValueError, OSError, TypeError, KeyError):
        return None  # no size, or a damaged file, which train.py will say
    return tuple(size) if isinstance(size, list) and loader.is_size_or_none(size) else None


def kind_of(found):
    """Scanner and protocol of a file, or its format where it says neither."""
    return " ".join(filter(None, [found["scanner"], found["protocol"]])) or found["syntax"]


def add_scan(scans, sample, found, volume):
    """Keep the middle B-scan of a volume (D, H, W) as what the page shows of its kind, if it is the
    first, as a PNG of the proportions of the eye."""
    from PIL import Image

    kind = kind_of(found)
    if kind in scans or len(scans) >= MOST_SCANS:
        return
    image = volume[len(volume) // 2].astype(np.float32)  # (H, W)
    low, high = np.percentile(image, [0.5, 99.8])
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    height, width, proportions = extent(found)
    rows = max(round(SCAN_WIDTH * height / width), 1)
    out = io.BytesIO()
    picture = Image.fromarray(np.uint8(255 * grey)).resize((SCAN_WIDTH, rows), Image.BICUBIC)
    picture.save(out, format="png")
    scans[kind] = {
        "kind": kind,
        "png": out.getvalue(),
        "size": (SCAN_WIDTH, rows),
        "about": f"{proportions}; {found['frames']} B-scans of {found['rows']} x "
        f"{found['columns']} pixels (rows x columns)",
        "whose": f"participant {sample.participant_id}, {sample.path}",
    }


def extent(found):
    """Height and width of a B-scan, and what is known of them in words: in mm where the file says
    its spacing, and that is plausible (neither side is ten times the other); else in pixels, and no
    side is shown as less than a tenth of the other."""
    pixels = found["rows"], found["columns"]
    if found["spacing"]:
        height, width = (n * mm for n, mm in zip(pixels, found["spacing"]))
        if 0.1 < height / width < 10:
            return height, width, f"{width:.3g} mm wide and {height:.3g} mm deep"
    height, width = (float(min(max(n, max(pixels) / 10), max(pixels))) for n in pixels)
    return height, width, "its proportions are those of its pixels, for the file says no spacing"


# ------------------------------------------------------------------------------------------ tables


def class_table(book):
    """Units with a volume / labelled, of each class and each site -> (header, rows of texts)."""
    sites = sorted({row.site for row in book.rows})
    rows = []
    for site in [None, *(sites if len(sites) > 1 else [])]:
        where = "" if site is None else f"{site or '(no site)'}: "
        for label, name in [*enumerate(book.classes), (None, "all")]:
            of = [r for r in book.rows if site in (None, r.site) and label in (None, r.label)]
            cells = [ledger.used_of([r for r in of if r.split == split]) for split in SPLITS]
            rows.append([f"{where}{name}", *cells, str(sum(r.volumes for r in of))])
    return ["", *SPLITS, "volumes"], rows


def store_table(book):
    """What is known of the files without opening any: endings, sizes, and what the manifest says of
    them -> (header, rows of texts)."""
    header = book.samples[0].manifest if book.samples else {}
    columns = {"ending": lambda s: "".join(pathlib.PurePath(s.path).suffixes[-1:]) or "(none)"}
    columns["eye"] = lambda s: s.laterality or "not said"
    for name in OF_MANIFEST:
        if name in header:
            columns[name] = lambda s, name=name: s.manifest.get(name) or "not said"
    head, rows = facts.tally(book.samples, columns)
    sizes = sorted(sample.source.size for sample in book.samples)
    if sizes:
        least, median, most = map(shown_bytes, (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
        span = f"{least} to {most}, median {median}"
        rows.append(["size", span, str(len(sizes))])
        rows.append(["", f"{shown_bytes(sum(sizes))} together", str(len(sizes))])
    return head, rows


def shown_bytes(number):
    """12345678 -> "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"


def problems(book, notes):
    """[(title, sentences)] of all that is odd; without those that there are none of."""
    missing = [f"{ledger.described(r.unit, r, book)}: {r.reason}" for r in book.missing()]
    struck = [
        f"{ledger.described(s.participant_id, s, book)}: {reason}" for s, reason in book.unreadable
    ]
    odd = [note for note in [*book.notes, *notes] if note not in book.near_copies]
    found = {
        f"Missing {book.unit}s": missing,
        "Unreadable or refused volumes": struck,
        "Nearly the same scan of two participants": book.near_copies,
        "Notes": odd,
    }
    return [(title, sentences) for title, sentences in found.items() if sentences]


# ---------------------------------------------------------------------------------------- the page


def write_page(cfg, book, notes, scans, stops, args):
    """RUN_DIR_check.html, and RUN_DIR_flow.png, .svg and .pdf -> the page's path. stops: what ends
    the check, or ""; scans None: it is not known what the cache holds; args: of the command."""
    run = pathlib.Path(files.local_folder(cfg.paths.run_dir, "paths.run_dir"))
    found = flow.count(book, cfg.data.labels)
    drawing = flow.draw(found)
    figures.save(run.parent, f"{run.name}_flow", drawing)
    known = [book.facts[s.path] for s in book.samples if s.path in book.facts]
    values = {
        "title": f"{run.name}: check of the data",
        "about": f"{book.description}: {ledger.volumes_asked(cfg)}",
        "stops": stops,
        "flow_words": flow.in_words(found),
        "flow_table": flow.table(found),
        "class_table": class_table(book),
        "unit": book.unit,
        "file_table": facts.tally(known, facts.OF_FILES),
        "store_table": None if cfg.paths.features else store_table(book),
        "features": cfg.paths.features,
        "opened": None if scans is None else len(known),
        "volumes": len(book.samples),
        "is_deep": args.deep,
        "with_images": not args.no_images,
        "kinds": len({kind_of(of_file) for of_file in known}),
        "problems": problems(book, notes),
        "most": MOST_LINES,
        "scans": [] if args.no_images else list((scans or {}).values()),
    }
    page = report.render("check.html", **values, flow=figures.picture(drawing, "svg"))
    path = f"{run}_check.html"
    files.write(path, page)
    return path


def reason_to_stop(cfg, book):
    """What ledger.check and check_classes have against the ledger, "" where they have nothing."""
    try:
        ledger.check(book, cfg.data.max_missing)
        ledger.check_classes(book)
    except ValueError as error:
        return str(error)
    return ""


def main():
    """The command: the ledger is printed, and the page written, also where the check then fails."""
    parser = config.parser(__doc__)
    parser.add_argument("--deep", action="store_true", help="open every volume once")
    parser.add_argument("--no-images", action="store_true", help="no B-scans in the page")
    args = parser.parse_intermixed_args()
    cfg = config.load(args.config, args.overrides)
    settings.check_placeholders(cfg)
    phantom.prepare(cfg)
    book = ledger.read(cfg)
    print(f"{book.description}: {ledger.volumes_asked(cfg)}")
    print(ledger.table(book))
    notes, scans = deep_check(cfg, book) if args.deep else known_files(cfg, book)
    stops = reason_to_stop(cfg, book)
    print(f"page: {write_page(cfg, book, notes, scans, stops, args)}")
    if stops:
        raise ValueError(stops)


if __name__ == "__main__":
    device.run(main)
