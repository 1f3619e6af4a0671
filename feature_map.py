"""A map of the features: the first two principal components, coloured by class, site, scanner, eye
and age, side by side, so that a batch effect is seen; and numbers for what is seen.

    mapped, notes = examine(opened, book, found, encoder, dev)   # a Map, or None; in every replica
    result |= {"feature_map": mapped.found}     # what eval_SPLIT.json holds of it
    write(folder, split, mapped)                # plots/features_SPLIT; with umap-learn umap_SPLIT
    table(result), in_words(result)             # for report.html

Nothing is encoded for it. Beside the split that is scored, it shows what the cache has of training
and validation: all of it where the encoder is frozen. A point is an eye, the mean over its volumes
(an eye that two scanners saw is two points); where no eye is known, a participant.
"""

import dataclasses

import numpy as np
import torch

import data
import device
import features
import figures
import heads
import shortcuts
from confounding import number_in

MOST_UNITS = 2000  # of the split, and of training and validation, drawn where there are more
MOST_SCORED = 2000  # points between which distances are computed
COMPONENTS = 10
MOST_VALUES = {"class": 12, "site": 8, "scanner": 8, "eye": 2}  # with a colour; the rest: others
GREY = {"color": "0.6", "marker": "x"}  # of others, and of what is not known
OUTLINE = {"edgecolors": "black", "linewidths": 0.7}


@dataclasses.dataclass
class Map:
    """n points. components (n, K): principal components; splits (n,); texts {what: (n,) texts, ""
    where it is not known}; ages (n,), NaN where not known; classes: their names in order; scored:
    the split that is outlined; found: what eval_SPLIT.json holds."""

    components: np.ndarray
    splits: np.ndarray
    texts: dict
    ages: np.ndarray
    classes: tuple
    scored: str
    found: dict


def examine(opened, book, found, encoder, dev):
    """-> a Map, or None, and notes why. found: Features of the split, in every replica."""
    scored, cfg = found.samples[0].split, opened.cfg
    trained = set(opened.saved["train_participants"])
    train = [s for s in book.of("train") if s.unit in trained]
    others = train + (book.of("val") if train and scored == "test" else [])
    kept = drawn(found.samples)
    samples, x = [found.samples[i] for i in kept], features.flat(found.x[kept])
    more, x_more = recall(cfg, book, [others[i] for i in drawn(others)], encoder, dev)
    asked = {
        name: {s.unit for s in found.samples + others if s.split == name}
        for name in ("train", "val", "test")
    }
    samples, x = more + samples, torch.cat([x_more, x])
    is_train = torch.tensor([s.split == "train" for s in samples])
    mean, std = heads.statistics(x[is_train] if is_train.any() else x)
    points, x = points_of(samples, ((x - mean) / std).double().numpy())
    splits = np.array([s.split for s in points])
    components, variance = principal_components(x, splits == "train")
    if components is None:
        return None, ["the map of the features is left out: it takes three eyes that differ"]
    texts, ages = colourings(points, book)
    shown = {
        name: {
            "points": int((splits == name).sum()),
            "shown": len({s.unit for s in points if s.split == name}),
            "all": len(asked[name]),
        }
        for name in asked
        if asked[name]
    }
    summary = {
        "splits": shown,
        "variance": variance,
        "colourings": {what: measured(components, values) for what, values in texts.items()},
    }
    if len(set(ages[~np.isnan(ages)])) > 1:
        summary["colourings"]["age"] = measured_by_age(components, ages)
    if not summary["colourings"]:
        return None, [
            "the map of the features is left out: nothing is known in which its points differ "
            "(class, site, scanner, eye or age)"
        ]
    return Map(components, splits, texts, ages, book.classes, scored, summary), []


# ------------------------------------------------------------------------------------------ points


def drawn(samples):
    """Indices of the volumes of at most MOST_UNITS units, which are drawn with a fixed seed."""
    units = sorted({s.unit for s in samples})
    if len(units) > MOST_UNITS:
        units = np.random.default_rng(0).choice(units, MOST_UNITS, replace=False).tolist()
    kept = set(units)
    return [i for i, s in enumerate(samples) if s.unit in kept]


def recall(cfg, book, samples, encoder, dev):
    """The samples whose features are in the cache already, and these, x (volumes, C), in every
    replica. Nothing is read from a volume or encoded."""
    if cfg.paths.features and samples:
        return samples, features.flat(features.encode(cfg, book, samples, encoder, dev).x)
    x, is_kept = torch.zeros(len(samples), cfg.model.emb_dim), torch.zeros(len(samples))
    if not samples:
        return [], x
    kept, ids = features.Kept(cfg, encoder, view=0), book.ids
    volumes = data.open_volumes(cfg, samples, encoder.size, ids, encoder.wants_intensities)
    # as features.encode_share parts them: on several hosts, each has the features of its own share
    for i in range(device.rank(), len(samples), device.world()):
        try:
            key = volumes.key(i)
        except data.Unreadable:  # no map is worth a stop
            key = None
        feature = kept.load(key) if key else None
        if feature is not None:
            x[i], is_kept[i] = features.flat(torch.from_numpy(feature).float()[None])[0], 1
    x, is_kept = (device.all_sum(part.to(dev)).cpu() for part in (x, is_kept))
    rows = is_kept.nonzero()[:, 0]
    return [samples[i] for i in rows], x[rows]


def points_of(samples, x):
    """x (volumes, C) -> a Sample for every point, and the means (points, C)."""
    number_of, first = {}, []
    for sample in samples:
        key = sample.unit, sample.laterality, shortcuts.scanner_of(sample)
        if key not in number_of:
            number_of[key] = len(first)
            first.append(sample)
    rows = [number_of[s.unit, s.laterality, shortcuts.scanner_of(s)] for s in samples]
    sums = np.zeros((len(first), x.shape[1]))
    np.add.at(sums, rows, x)
    return first, sums / np.bincount(rows)[:, None]


def principal_components(x, is_train):
    """x (n, C) -> components (n, K) of scikit-learn's PCA, fitted on training's points where there
    are three, and the shares of their variance (K,); None, None where there are not two."""
    from sklearn.decomposition import PCA

    fitted_on = x[is_train] if is_train.sum() > 2 else x
    number = min(COMPONENTS, len(fitted_on) - 1, x.shape[1])
    if number < 2 or np.ptp(fitted_on, axis=0).max() == 0:
        return None, None
    pca = PCA(number, random_state=0).fit(fitted_on)
    return pca.transform(x), pca.explained_variance_ratio_.tolist()


def colourings(points, book):
    """{what: (n,) texts} of class, site, scanner and eye, those with two values or more; and ages
    (n,)."""
    row_of = {row.unit: row for row in book.rows}
    ages = [number_in(row_of[s.unit].age) for s in points]
    known = shortcuts.values_of(points, row_of, [""])
    texts = {"class": [book.classes[s.label] for s in points]}
    texts |= {what: known[what][0] for what in ("site", "scanner", "eye")}
    texts = {what: np.array(values) for what, values in texts.items() if len({*values} - {""}) > 1}
    return texts, np.array([np.nan if age is None else age for age in ages], dtype=float)


# ----------------------------------------------------------------------------------------- numbers


def measured(components, values):
    """How far groups stand apart: the mean silhouette (Rousseeuw 1987) in the map, from -1 to 1,
    and the share of each component's variance that lies between them (adjusted R²)."""
    from sklearn.metrics import silhouette_score

    known = np.flatnonzero(values != "")
    names, groups = np.unique(values[known], return_inverse=True)
    number, points = len(names), components[known]
    few = np.random.default_rng(0).permutation(len(known))[:MOST_SCORED]
    silhouette = None
    if 2 <= len(set(groups[few])) < len(few):
        silhouette = float(silhouette_score(points[few, :2], groups[few]))
    counts, centred = np.bincount(groups), points - points.mean(axis=0)
    sums = np.zeros((number, points.shape[1]))
    np.add.at(sums, groups, centred)
    between = (sums**2 / counts[:, None]).sum(axis=0)
    shares = adjusted(between / (centred**2).sum(axis=0), len(known), number - 1)
    return {"values": number, "n": len(known), "silhouette": silhouette, "components": shares}


def measured_by_age(components, ages):
    """As `measured`, of a regression on age; ages are no groups, so there is no silhouette."""
    known = ~np.isnan(ages)
    age, points = ages[known] - ages[known].mean(), components[known]
    centred = points - points.mean(axis=0)
    total = (age**2).sum() * (centred**2).sum(axis=0)
    shares = adjusted((age @ centred) ** 2 / total, len(age), 1)
    return {
        "values": len(set(age)),
        "n": int(known.sum()),
        "silhouette": None,
        "components": shares,
    }


def adjusted(shares, n, freedom):
    """R² (K,) less what so many degrees of freedom explain of noise, and at least 0 -> list."""
    if n - freedom < 2:
        return [0.0] * len(shares)
    return np.clip(1 - (1 - shares) * (n - 1) / (n - freedom - 1), 0, 1).tolist()


def table(result):
    """The numbers beside the map."""
    found = result["feature_map"]
    header = ["coloured by", "silhouette", "PC1", "PC2", f"most of {len(found['variance'])}"]
    rows = []
    for what, part in found["colourings"].items():
        shares, most = part["components"], int(np.argmax(part["components"]))
        cells = [apart(part["silhouette"]), *(f"{share:.0%}" for share in shares[:2])]
        rows.append([what, *cells, f"{shares[most]:.0%} (PC{most + 1})"])
    return header, rows


def apart(silhouette):
    """A silhouette as text."""
    return "-" if silhouette is None else f"{round(silhouette, 2) + 0:.2f}"  # never -0.00


def in_words(result):
    """What the map shows, for who cannot see it."""
    found, seen = result["feature_map"], []
    first, second = found["variance"][:2]
    for what, part in found["colourings"].items():
        of_first, of_second = part["components"][:2]
        words = f"{what}: {of_first:.0%} of PC1, {of_second:.0%} of PC2"
        no_groups = part["silhouette"] is None
        seen.append(words + ("" if no_groups else f", silhouette {apart(part['silhouette'])}"))
    return (
        f"Map of the features by their principal components PC1 ({first:.0%} of the variance) and "
        f"PC2 ({second:.0%}): {counted(result)}. What goes along with {'; '.join(seen)}."
    )


def counted(result):
    """How many points the map has of each split, in words."""
    parts = []
    for split, of in result["feature_map"]["splits"].items():
        some = "" if of["shown"] == of["all"] else f" (of {of['all']})"
        parts.append(f"{of['points']} points of {of['shown']}{some} {result['unit']}s of {split}")
    return ", ".join(parts)


# --------------------------------------------------------------------------------------- the figure


def write(folder, split, mapped):
    """plots/features_SPLIT and, where umap-learn is installed, plots/umap_SPLIT, of a Map."""
    shares = mapped.found["variance"]
    axes = [f"PC{k + 1} ({shares[k]:.0%})" for k in range(2)]
    figures.save(
        folder / "plots", f"features_{split}", draw(mapped, mapped.components[:, :2], axes)
    )
    by_umap = neighbours(mapped.components)
    if by_umap is not None:
        figures.save(folder / "plots", f"umap_{split}", draw(mapped, by_umap, ["UMAP 1", "UMAP 2"]))
    else:
        for path in folder.glob(f"plots/umap_{split}.*"):
            path.unlink()  # of an earlier map


def neighbours(components):
    """UMAP (McInnes et al. 2018) of components (n, K) -> (n, 2); None where umap-learn is not
    installed, or there are too few points."""
    if len(components) < 10:
        return None
    try:
        from umap import UMAP
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        print(f"note: no UMAP of the features, for umap-learn cannot be imported: {error}")
        return None
    return UMAP(n_jobs=1, random_state=0).fit_transform(components)


@figures.style()
def draw(mapped, coordinates, names):
    """A panel for each colouring, two a row; coordinates (n, 2), names of the two axes."""
    from matplotlib.lines import Line2D

    panels = list(mapped.found["colourings"])
    columns = min(2, len(panels))
    groups = {what: groups_of(mapped, what) for what in mapped.texts}
    lines = [legend_lines(groups[what]) if what in groups else 3 for what in panels]
    height = 0.3
    for first in range(0, len(panels), columns):
        height += 2 + 0.15 * max(lines[first : first + columns])
    figure, axes = figures.new_panels(len(panels), height, columns)
    for axis, what in zip(axes, panels):
        if what == "age":
            draw_ages(figure, axis, mapped, coordinates)
        else:
            draw_groups(axis, mapped, coordinates, groups[what])
        axis.set(title=what, xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
    is_scored = mapped.splits == mapped.scored
    circle = {"marker": "o", "linestyle": "", "color": "0.7", "markersize": 5}
    handles = [Line2D([], [], **circle, markeredgecolor="black", label=mapped.scored)]
    if not is_scored.all():
        others = " and ".join(n for n in ("train", "val") if (mapped.splits == n).any())
        handles.append(Line2D([], [], **circle, markeredgewidth=0, label=others))
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def groups_of(mapped, what):
    """A colouring -> {name: rows} of the most frequent groups, which have a colour each, and the
    same of others and unknown, which are grey."""
    values, most = mapped.texts[what], MOST_VALUES[what]
    names, counts = np.unique(values[values != ""], return_counts=True)
    if len(names) > most:
        names = np.sort(names[np.argsort(-counts, kind="stable")[: most - 1]])
    if what == "class":
        names = [name for name in mapped.classes if name in names]
    groups = {name: np.flatnonzero(values == name) for name in names}
    rest = np.flatnonzero((values != "") & ~np.isin(values, names))
    grey = {"others": rest, "unknown": np.flatnonzero(values == "")}
    return groups, {name: rows for name, rows in grey.items() if len(rows)}


def legend_lines(groups):
    """How many lines the legend of a pair of `groups_of` takes."""
    count = sum(map(len, groups))
    return count if is_wide(groups) else -(-count // 2)


def is_wide(groups):
    """Are the names too long for two columns of a legend?"""
    return max(len(name) for part in groups for name in part) > 12


def draw_groups(axis, mapped, coordinates, groups):
    """The panel of a colouring, of a pair of `groups_of`, with the legend below it."""
    from matplotlib.lines import Line2D

    named, grey = groups
    kinds, colours, markers = [], figures.COLOURS, figures.MARKERS
    for k, (name, rows) in enumerate(named.items()):
        # another shape of the same colour, where there are more groups than colours
        marker = markers[(k + k // len(colours)) % len(markers)]
        kinds.append((name, rows, {"color": colours[k % len(colours)], "marker": marker}))
    kinds += [(name, rows, GREY) for name, rows in grey.items()]
    # what is rare is drawn last, so that it is seen
    for _, rows, look in sorted(kinds, key=lambda kind: -len(kind[1])):
        scatter(axis, mapped, coordinates, rows, **look)
    axis.legend(
        [Line2D([], [], linestyle="", markersize=4, **look) for *_, look in kinds],
        [figures.label(name, 28) for name, *_ in kinds],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=1 if is_wide(groups) else 2,
        fontsize=7,
        handletextpad=0.2,
        columnspacing=1,
        borderaxespad=0,
    )


def draw_ages(figure, axis, mapped, coordinates):
    """The panel of age: a colour bar instead of a legend."""
    known = ~np.isnan(mapped.ages)
    ages = mapped.ages[known]
    scatter(axis, mapped, coordinates, np.flatnonzero(~known), **GREY)
    look = {"marker": "o", "cmap": "viridis", "vmin": ages.min(), "vmax": ages.max()}
    shown = scatter(axis, mapped, coordinates, np.flatnonzero(known), c=mapped.ages, **look)
    figure.colorbar(shown, ax=axis, orientation="horizontal", label="years", shrink=0.8)


def scatter(axis, mapped, coordinates, rows, c=None, **look):
    """Some of the points, (n, 2) coordinates and c (n,) of all; those of the scored split have an
    outline, and lie above the others."""
    n, is_scored = len(coordinates), mapped.splits[rows] == mapped.scored
    look = look | {"s": np.clip(4000 / n, 4, 22), "rasterized": n > 1000}
    styles = (({"linewidths": 0, "alpha": 0.6}, ~is_scored), (OUTLINE, is_scored))
    for level, (style, chosen) in enumerate(styles):
        if look["marker"] == GREY["marker"]:  # it has no face, and so no outline
            style = {"linewidths": 0.7}
        colours = {} if c is None else {"c": c[rows[chosen]]}
        places = coordinates[rows[chosen]].T
        shown = axis.scatter(*places, zorder=1 + level, **look, **style, **colours)
    return shown
