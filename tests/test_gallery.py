import base64
import html
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import CLASS_NAMES, content, copy_of, start, tables, trained, triton, warm, write_bytes
from PIL import Image

import eval as evaluation
import gallery
import heads
import report
import results
import volumes

HOSTILE = '<script>alert("1")</script> $x$ \u202e1001'


def run_of(written, tmp_path, *overrides):
    return copy_of(trained(written, "train.epochs=3", *overrides), tmp_path)


@pytest.fixture(scope="module")
def scored(written, tmp_path_factory):
    """The folder of a run that was scored on test, of whose six participants five get cards: one
    answer is wrong. Read only."""
    run = run_of(written, tmp_path_factory.mktemp("gallery"))
    evaluation.evaluate_run(run, "test", ["eval.gallery=6"])
    return run


@pytest.fixture()
def copied(scored, tmp_path):
    """A copy of its own."""
    return str(shutil.copytree(scored, tmp_path / "run"))


def cards_of(run, split="test"):
    return json.loads(content(f"{run}/gallery_{split}.json"))["cards"]


def image_of(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def planes_of(cards):
    return [plane for card in cards for eye in card["eyes"] for plane in eye["planes"]]


# ------------------------------------------------------------------------------- who is shown


def predictions(p, y, people=None):
    ids = [f"u{i}" for i in range(len(y))]
    return heads.Predictions(ids, np.array(y), np.array(p), people)


def test_a_third_each_is_most_wrong_most_right_and_least_sure():
    p = [[0.9, 0.1], [0.2, 0.8], [0.05, 0.95], [0.51, 0.49], [0.6, 0.4], [0.3, 0.7], [0.45, 0.55]]
    drawn = predictions(p, [0, 0, 0, 0, 0, 1, 1])
    shown = gallery.choose(drawn, 6)
    assert shown == [
        ("most wrong", 2),  # 0.05 for its class, then 0.2
        ("most wrong", 1),
        ("most right", 0),  # 0.9, then 0.7
        ("most right", 5),
        ("least sure", 3),  # 0.51 to 0.49, then 0.45 to 0.55
        ("least sure", 6),
    ]
    assert [len(gallery.choose(drawn, n)) for n in (0, 1, 4, 5)] == [0, 1, 4, 5]


def test_no_participant_is_shown_twice_and_no_right_answer_is_most_wrong():
    """Units are eyes here; two of each participant."""
    p = np.repeat([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]], 2, axis=0)
    shown = gallery.choose(predictions(p, [0, 0, 1, 1, 0, 0], list("aabbcc")), 30)
    assert [row // 2 for _, row in shown] == [0, 1, 2] or len({row // 2 for _, row in shown}) == 3
    assert {group for group, _ in shown} == {"most right"}


# ------------------------------------------------------------------------------- the cards


def test_cards_say_what_the_predictions_and_the_manifest_say(written, scored):
    people, manifest = tables(written)
    site_of = {row["participant_id"]: row["clinical_site"] for row in people}
    result = results.read_result(scored, "test")
    run = results.open_results("a", scored, "test")
    found = gallery.read(scored, result)
    assert len(found["cards"]) == 5 == len({card["participant_id"] for card in found["cards"]})
    for card in found["cards"]:
        own = card["participant_id"]
        assert card["p"] == pytest.approx(run.p_of[own]) and card["label"] == run.label_of[own]
        assert card["answer"] == np.argmax(card["p"])
        assert card["site"] == site_of[own] and card["scanner"] == "Triton"
        of_sides = {"R": "right eye", "L": "left eye"}
        sides = [of_sides[m["laterality"]] for m in triton(manifest) if m["participant_id"] == own]
        counted = {eye["eye"]: eye["volumes"] for eye in card["eyes"]}
        assert counted == {side: sides.count(side) for side in sides}


def test_pictures_are_the_middle_b_scan_and_the_lateral_plane_in_true_proportions(written, scored):
    _, manifest = tables(written)
    for card in cards_of(scored):
        for eye in card["eyes"]:
            side = {"right eye": "R", "left eye": "L"}[eye["eye"]]
            row = next(
                m
                for m in triton(manifest)
                if (m["participant_id"], m["laterality"]) == (card["participant_id"], side)
            )
            row_mm, column_mm = map(float, row["pixel_spacing"].strip("[]").split(","))
            wide = int(row["width"]) * column_mm
            high = (
                int(row["height"]) * row_mm,
                int(row["number_of_frames"]) * float(row["slice_thickness"]),
            )
            own = volumes.read_volume(f"{written}{row['filepath']}")
            own = volumes.preprocess(own, (16, 64, 64)).numpy()
            expected = own[8], own.mean(axis=1)  # by another road than the cache
            assert [plane["name"] for plane in eye["planes"]] == ["B-scan", "lateral plane"]
            for plane, mm, pixels in zip(eye["planes"], high, expected):
                image = image_of(plane["image"])
                assert image.format == "WEBP" and plane["is_to_scale"]
                assert image.size == (plane["width"], plane["height"])
                assert plane["height"] == pytest.approx(plane["width"] * mm / wide, abs=1)
                seen = np.asarray(image.convert("L").resize(pixels.shape[::-1]), float)
                assert np.corrcoef(seen.ravel(), pixels.clip(-1, 3).ravel())[0, 1] > 0.9


def test_a_map_has_a_pixel_for_every_token_and_two_colours(scored):
    for plane in planes_of(cards_of(scored)):
        pixels = np.asarray(image_of(plane["map"]).convert("RGBA"))
        assert pixels.shape == (4, 4, 4)  # tokens (4, 4, 4) of 16 x 64 x 64
        seen = pixels[pixels[..., 3] > 0]
        assert {tuple(p) for p in seen[:, :3].tolist()} <= {gallery.AGAINST, gallery.FOR}
        assert seen[:, 3].max() == 192 and not plane["weights"]


def test_cards_are_the_same_again(written, scored, tmp_path):
    again = run_of(written, tmp_path)
    evaluation.evaluate_run(again, "test", ["eval.gallery=6"])
    assert cards_of(again) == cards_of(scored)


@pytest.mark.parametrize("more", [["model.token_grid=[2,2,2]"], ["model.token_grid=[4,3,2]"]])
def test_attentive_heads_show_their_weights(written, tmp_path, more):
    run = run_of(written, tmp_path, "model.pool_method=attentive", *more)
    evaluation.evaluate_run(run, "test", ["eval.gallery=3"])
    for plane in planes_of(cards_of(run)):
        assert image_of(plane["weights"]).size == image_of(plane["map"]).size
    assert "weights of the tokens" in content(f"{run}/report.html")


def test_unknown_spacing_is_said(written, scored):
    volume = np.random.default_rng(0).normal(size=(16, 64, 64)).astype(np.float16)
    silent = {"frames": 20, "rows": 62, "columns": 20, "spacing": None, "thickness": None}
    for facts in (silent, silent | {"spacing": [0.0, 0.1], "thickness": 0.1}):
        scores = gallery.attribution.Attribution(np.zeros((64, 4)))
        planes = gallery.planes_of(volume, facts, (4, 4, 4), scores, 0, 8, 100, 50)
        assert [(p["width"], p["height"], p["is_to_scale"]) for p in planes] == [
            (100, 100, False)
        ] * 2


def test_a_volume_that_left_the_cache_is_named_and_not_read_again(written, tmp_path):
    run, cache = run_of(written, tmp_path), tmp_path / "cache"
    more = [f"paths.cache_dir={cache}"]
    evaluation.evaluate_run(run, "test", [*more, "eval.gallery=0"])
    kept = list((cache / "volumes").glob("*.npy"))
    for path in kept:
        path.unlink()
    evaluation.evaluate_run(run, "test", [*more, "eval.gallery=3"])
    assert kept and not list((cache / "volumes").glob("*.npy"))
    assert all(eye["missing"] for card in cards_of(run) for eye in card["eyes"])
    page = content(f"{run}/report.html")
    assert page.count("not in paths.cache_dir any more") == sum(
        len(card["eyes"]) for card in cards_of(run)
    )
    assert "no image of an eye in it" in page and "data:image/webp" not in page


@pytest.mark.slow
def test_two_replicas_make_the_same_gallery(written, scored, tmp_path):
    run = run_of(written, tmp_path)
    script = "eval.py", "--ckpt", run, "device.processes=2", "eval.gallery=6", warm(written)
    process = start(*script)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert cards_of(run) == cards_of(scored)


# ------------------------------------------------------------------------------- the page


def test_the_page_shows_the_cards_and_says_what_it_holds(scored):
    page, cards = content(f"{scored}/report.html"), cards_of(scored)
    planes = planes_of(cards)
    assert page.count("data:image/webp;base64,") == 2 * len(planes)  # each with its map
    assert f"{len(planes)} images of the eyes of 5 participants in it" in page
    assert "no image of an eye" not in page
    text = html.unescape(re.sub("<[^>]*>", " ", page))
    for card in cards:
        p = card["p"][card["answer"]]
        assert re.search(rf"{card['id']} .*{CLASS_NAMES[card['answer']]} +{p:.3f}", text, re.S)
    for image in re.findall("<img[^>]*data:image/webp[^>]*>", page):
        assert len(re.search('alt="([^"]*)"', image)[1]) > 10


def test_no_images_leaves_no_image_in_page_and_folder(copied, command):
    gallery.save(copied, {"split": "val", "predictions_sha256": ""}, {"cards": []})
    Path(copied, "last").mkdir()
    Path(copied, "last/gallery_val.json").write_text("an eye")  # as eval.py --ckpt RUN/last.pt does
    Path(copied, "explain_1001.html").write_text("an eye")
    done = command("eval.py", "--ckpt", copied, "--split", "test", "--no-images")
    assert done.returncode == 0, done.stderr
    assert "explain_1001.html of --explain has images of an eye" in done.stdout
    assert "last has images of eyes, too; run eval.py --ckpt" in done.stdout
    page = content(f"{copied}/report.html")
    assert "data:image/webp" not in page and "no image of an eye in it" in page
    assert not [name for name in os.listdir(copied) if name.startswith("gallery")]


def test_the_gallery_is_of_the_first_result_alone(copied):
    evaluation.evaluate_run(copied, "val", ["eval.gallery=3"])
    page = content(f"{copied}/report.html")
    assert len(cards_of(copied, "val")) == 3
    assert page.count("data:image/webp;base64,") == 2 * len(planes_of(cards_of(copied)))


def test_training_again_removes_the_gallery(copied):
    import runs

    Path(copied, "explain_1001.html").write_text("an eye")
    runs.remove_evaluations(copied)
    left = [name for name in os.listdir(copied) if name.startswith(("gallery", "explain"))]
    assert not left


def rewritten(run, change):
    """Change what gallery_test.json holds, and seal it again."""
    found = json.loads(content(f"{run}/gallery_test.json"))
    change(found)
    text = json.dumps(results.sealed(found))
    write_bytes(f"{run}/gallery_test.json", text.encode())


def test_texts_of_the_data_are_shown_as_text(copied):
    def change(found):
        for card in found["cards"]:
            card["id"] = card["site"] = card["scanner"] = card["eyes"][0]["eye"] = HOSTILE

    rewritten(copied, change)
    report.write_report(copied)
    page = content(f"{copied}/report.html")
    assert page.count("<script") == 1 and "alert(&#34;1&#34;)" in page
    assert report.shown(HOSTILE) in html.unescape(page)


def first_plane(found):
    return next(eye for card in found["cards"] for eye in card["eyes"])["planes"][0]


SVG = base64.b64encode(b"<svg onload='alert(1)'/>").decode()
DAMAGED = {
    "an image is no base64": lambda found: first_plane(found).update(image='"><script>'),
    "an image is no WebP": lambda found: first_plane(found).update(image=SVG),
    "an image is cut": lambda found: first_plane(found).update(
        image=first_plane(found)["image"][:-8]
    ),
    "an image is huge": lambda found: first_plane(found).update(image="A" * 1_000_000),
    "a width is no number": lambda found: first_plane(found).update(width="1;x"),
    "a width is huge": lambda found: first_plane(found).update(width=10**9),
    "a group is unknown": lambda found: found["cards"][0].update(group="best"),
    "a class is missing": lambda found: found["cards"][0].update(p=[1.0]),
    "an answer is no class": lambda found: found["cards"][0].update(answer=7),
    "cards are missing": lambda found: found.pop("cards"),
    "another result": lambda found: found.update(predictions_sha256="0" * 64),
    "other classes": lambda found: found.update(classes=list("abcd")),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_gallery_that_holds_something_else_is_refused(copied, change):
    rewritten(copied, change)
    with pytest.raises(ValueError, match=r"gallery_test\.json .*run eval\.py --ckpt") as caught:
        report.write_report(copied)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cards": []}', '{"cards": NaN}'])
def test_a_damaged_gallery_is_refused(copied, text):
    write_bytes(f"{copied}/gallery_test.json", text.encode())
    with pytest.raises(ValueError, match=r"gallery_test\.json .*run eval\.py --ckpt"):
        report.write_report(copied)


def test_cards_of_given_participants(scored, tmp_path):
    result = results.read_result(scored, "test")
    ids = [card["participant_id"] for card in cards_of(scored)]
    asked = [ids[4], "nobody", ids[1], ids[4]]
    found = gallery.of_participants(scored, result, asked)
    assert [card["participant_id"] for card in found["cards"]] == [ids[4], ids[1]]
    assert gallery.of_participants(tmp_path, result, ids) is None


def test_a_comparison_shows_the_cards_of_those_whom_exactly_one_run_has_right(
    written, tmp_path, command
):
    """Two runs with galleries of all participants; without --no-images."""
    runs = []
    for name, more in (("mean", []), ("mlp", ["model.head.hidden=16"])):
        runs.append(f"{tmp_path / name}/run")
        (tmp_path / name).mkdir()
        run_of(written, tmp_path / name, *more)
        evaluation.evaluate_run(runs[-1], "test", ["eval.gallery=60"])
    answers = [{card["participant_id"]: card for card in cards_of(run)} for run in runs]
    right = [{i for i, card in own.items() if card["label"] == card["answer"]} for own in answers]
    divided = right[0] ^ right[1]
    assert divided, "these two runs must differ for this test to say anything"
    done = command("eval.py", "--compare", *runs)
    assert done.returncode == 0, done.stderr
    page = content(tmp_path / "mean" / "comparison.html")
    shown = set(re.findall("<h4>(.*?)</h4>", page))
    assert shown == {i for i in divided if i in answers[0] or i in answers[1]} and shown
    assert page.count("data:image/webp") > 0 and "images of their eyes" in page
    done = command("eval.py", "--compare", *runs, "--no-images")
    assert done.returncode == 0, done.stderr
    page = content(tmp_path / "mean" / "comparison.html")
    assert "data:image/webp" not in page and "no image of an eye is in it" in page
