import os
import pathlib
import re
import time

import pytest
import yaml
from helpers import DEMO, PROBE, ROOT, content

import config
import settings

CONFIGS = os.path.join(ROOT, "configs")


SHIPPED = [path.relative_to(CONFIGS) for path in sorted(pathlib.Path(CONFIGS).rglob("*.yaml"))]


@pytest.mark.parametrize("name", SHIPPED, ids=str)
def test_every_shipped_config_loads(name):
    config.load(os.path.join(CONFIGS, name))


def test_the_default_task_is_the_one_of_that_name():
    default = config.to_dict(config.load(f"{CONFIGS}/base.yaml"))
    laid = config.load([f"{CONFIGS}/base.yaml", f"{CONFIGS}/tasks/aireadi_diabetes.yaml"])
    assert laid.data.task == "aireadi_diabetes"
    assert config.to_dict(laid)["data"] == default["data"] | {"task": "aireadi_diabetes"}


def test_a_task_is_in_the_runs_folder_and_name_unless_they_are_given():
    files = [f"{CONFIGS}/demo.yaml", f"{CONFIGS}/tasks/aireadi_laterality.yaml"]
    cfg = config.load(files)
    assert cfg.paths.run_dir == "./runs/cls_demo_aireadi_laterality"
    assert cfg.log.run_name == "demo_linear_probe_aireadi_laterality"
    again = config.resolve(config.to_dict(cfg), [], "the run's own")
    assert (again.paths.run_dir, again.log.run_name) == (cfg.paths.run_dir, cfg.log.run_name)
    cfg = config.load(files, ["paths.run_dir=runs/x", "log.run_name=x"])
    assert (cfg.paths.run_dir, cfg.log.run_name) == ("runs/x", "x")


def test_a_second_file_lies_over_the_first():
    files = [f"{CONFIGS}/single_domain_01.yaml", f"{CONFIGS}/finetune.yaml"]
    cfg = config.load(files, ["train.epochs=7"])
    assert cfg.project_name == "oct_cls_single_domain_01"
    assert (cfg.train.precision, cfg.model.unfreeze_at_epoch) == ("bf16", 1)
    assert (cfg.model.head.hidden, cfg.train.epochs) == (256, 7)


def test_a_value_that_the_sweep_replaces_is_refused():
    for key in ("train.lr_head=0.1", "train.weight_decay=1", "model.head.ordinal=true"):
        with pytest.raises(ValueError, match=f"{key.partition('=')[0]} would change nothing"):
            config.load(PROBE, [key])
        config.load(PROBE, [key, "train.sweep=null"])


def test_base_yaml_has_every_key():
    keys = config.flatten(yaml.safe_load(content(f"{CONFIGS}/base.yaml")))
    assert set(keys) == set(config.KEYS)


def is_read(key, source):
    """Does the source have cfg.section.name, or the section as a whole and the name elsewhere?"""
    section, _, name = key.rpartition(".")
    whole = re.search(rf"\bcfg\.{re.escape(section)}\b(?!\.)", source)
    return f"cfg.{key}" in source or whole and (f".{name}" in source or f'"{name}"' in source)


def test_every_key_is_read_somewhere():
    """A key that no file reads would be a lie."""
    checking = ("config.py", "settings.py")
    names = [n for n in os.listdir(ROOT) if n.endswith(".py") and n not in checking]
    sources = [content(os.path.join(ROOT, name)) for name in names]
    have_one_value_only = {"train.scheduler", "train.optimizer"}
    of_tables = {key for key in config.KEYS if key.startswith("data.columns.")}
    for key in of_tables:  # labels.py looks for every column by its role
        assert f'"{key.rpartition(".")[2]}"' in content(os.path.join(ROOT, "labels.py")), key
    for key in set(config.KEYS) - have_one_value_only - of_tables:
        assert any(is_read(key, source) for source in sources), key


def test_child_overrides_parent_and_command_line_overrides_both(tmp_path):
    (tmp_path / "parent.yaml").write_text(
        f"base: {PROBE}\nseed: 1\ntrain: {{epochs: 7, lr_head: 0.5}}\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "child.yaml").write_text("base: ../parent.yaml\ntrain: {epochs: 8}\n")
    overrides = ["train.lr_head=3e-4", "data.anatomic_region=Macula, 12 x 12", "train.sweep=null"]
    cfg = config.load(tmp_path / "sub" / "child.yaml", overrides)
    assert (cfg.seed, cfg.train.epochs, cfg.train.lr_head) == (1, 8, 3e-4)
    assert cfg.data.anatomic_region == "Macula, 12 x 12"
    assert cfg.train.weight_decay == config.load(PROBE).train.weight_decay


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lr_hed=1", "unknown key 'train.lr_hed'; did you mean 'train.lr_head'"),
        ("train.patience=3", "did you mean 'train.early_stopping.patience'"),
        ("train=3", "'train' is a section"),
        ("train.epochs=many", "train.epochs must be a whole number from 1 to 1000000; got 'many'"),
        ("train.epochs=0", "train.epochs must be"),
        ("train.epochs=1.5", "train.epochs must be"),
        ("seed=true", "seed must be a whole number"),
        ("train.sweep.lr_head=[0.1,1e-1]", "each a number >= 0, no two alike, or null; got [0.1, "),
        ("train.class_weights=[0,0,0,0]", "gives no class a weight"),
        ("train.resume=yes", "train.resume must be one of auto, never; got 'yes'"),
        ("seed=--5", "seed must be a whole number from 0 to 2147483647; got '--5'"),
        ("seed=999999999999999999", "seed must be a whole number from 0"),
        ("log.run_name=", "log.run_name must be a text"),
        ("train.lr_head=nan", "train.lr_head must be a number"),
        ("train.lr_head=-1", "train.lr_head must be a number"),
        ("model.head.dropout=1", "model.head.dropout must be a number >= 0 and < 1"),
        ("model.freeze_encoder='yes'", "model.freeze_encoder must be true or false"),
        ("data.image_size=[64,384]", "data.image_size must be"),
        (
            "train.class_weights=[1,2]",
            "train.class_weights=[1.0, 2.0] has 2 numbers, and there are 4 classes",
        ),
        ("train.loss=hinge", "train.loss must be one of ce, focal, label_smoothing"),
        ("train.epochs", "is no override"),
        ("seed=[1", "not valid YAML"),
        ("train.seeds=[1,1]", "train.seeds must be a list of different seeds, or null"),
        ("data.cv=2", "data.cv must be a whole number from 3"),
        (
            "data.augment.flip=1.5",
            "data.augment.flip must be true, false or a number >= 0 and <= 1; got 1.5",
        ),
        ("data.augment.rotation=often", "data.augment.rotation must be true, false or a number"),
        (
            "data.augment_views=4",
            "data.augment_views=4 asks for augmented views, and every switch of data.augment is "
            "off",
        ),
        (
            "model.unfreeze_at_epoch=50",
            "model.unfreeze_at_epoch=50 is never reached in train.epochs=50",
        ),
    ],
)
def test_bad_values_are_refused_by_name(override, message):
    with pytest.raises(ValueError) as error:
        config.load(PROBE, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["model.freeze_encoder=false", "model.unfreeze_at_epoch=3"],
            "freeze_encoder=false trains the encoder from the start, and "
            "model.unfreeze_at_epoch=3 later",
        ),
        (
            ["model.drop_path=0.1"],
            "model.drop_path=0.1 is for an encoder that trains; set model.drop_path=0",
        ),
        (
            ["data.augment.flip=true", "data.augment_views=0"],
            "data.augment_views=0 for none while the encoder is frozen, and it always is",
        ),
        (
            [
                "train.sweep=null",
                "data.augment.flip=true",
                "data.augment_views=3",
                "model.unfreeze_at_epoch=0",
            ],
            "data.augment_views=3 is for a frozen encoder, and this one trains from the start",
        ),
    ],
)
def test_what_would_do_nothing_or_contradicts_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        config.load(PROBE, overrides)


def test_a_switch_of_augmentation_asks_for_one_view():
    """Users have this in their files."""
    config.load(PROBE, ["data.augment.flip=true"])


def test_a_second_file_with_a_base_would_replace_the_first():
    message = (
        "demo.yaml is to lie over .*finetune.yaml, and its base: would replace all of that; name "
        "it first"
    )
    with pytest.raises(ValueError, match=message):
        config.load([f"{CONFIGS}/finetune.yaml", DEMO])


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs: 3\n", "unknown key 'epochs'; did you mean 'train.epochs'"),
        (
            f"base: {PROBE}\ntrain: {{early_stoping: {{patience: 3}}}}\n",
            "unknown key 'train.early_stoping.patience'",
        ),
        (f"base: {PROBE}\ntrian: {{}}\n", "unknown key 'trian'"),
        (
            f"base: {PROBE}\nlog: {{run_name: 2024_01}}\n",
            "log.run_name must be a text, in quotes where YAML would read something else; got "
            "202401",
        ),
        ("- 1\n", "holds no keys"),
        ("a: [\n", "not valid YAML"),
        (
            f"base: {PROBE}\ntrain: {{epochs: 3}}\nseed: 1\ntrain: {{lr_head: 1}}\n",
            "key 'train' is given twice",
        ),
        (f"base: {PROBE}\ntrain: {{epochs: 3, epochs: 4}}\n", "key 'epochs' is given twice"),
        ("base: me.yaml\n", "comes back to itself"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "me.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        config.load(tmp_path / "me.yaml")


def test_a_file_without_base_has_the_defaults(tmp_path):
    """The keys of design.md as users have them, in a file anywhere."""
    (tmp_path / "mine.yaml").write_text(
        "seed: 7\ntrain:\n  epochs: 3\nmodel:\n# head: {hidden: 8}\n"
    )
    cfg = config.load(tmp_path / "mine.yaml")
    assert (cfg.seed, cfg.train.epochs, cfg.model.head.hidden) == (7, 3, 0)
    assert cfg.data.scanner == "topcon_triton"


def test_texts_on_the_command_line_are_taken_as_they_are():
    texts = ["log.run_name=007", "paths.data=/tmp/a: b #c", "project_name=off"]
    cfg = config.load(PROBE, [*texts, "data.anatomic_region=Macula, 6 x 6"])
    assert (cfg.log.run_name, cfg.paths.data, cfg.project_name) == ("007", "/tmp/a: b #c", "off")
    assert cfg.data.anatomic_region == "Macula, 6 x 6"


def test_yaml_merge_keys_work(tmp_path):
    (tmp_path / "merged.yaml").write_text(
        f"base: {PROBE}\ntrain:\n  <<: {{epochs: 7}}\n  lr_head: 1.0\n"
    )
    cfg = config.load(tmp_path / "merged.yaml")
    assert (cfg.train.epochs, cfg.train.lr_head) == (7, 1.0)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"log: {run_name: \xe4}\n")
    with pytest.raises(ValueError, match="latin.yaml is not text in UTF-8"):
        config.load(tmp_path / "latin.yaml")


def test_what_a_run_stores_loads_again(tmp_path):
    cfg = config.load(PROBE, ["train.class_weights=[1,2,3,4]", "data.image_size=[16,64,64]"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict(cfg)))
    assert config.load(tmp_path / "config.yaml") == cfg
    assert config.resolve(config.to_dict(cfg), [], "checkpoint") == cfg


# ------------------------------------------------------------------------------ bombs

ALIASES = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefg", "bcdefgh")
)


@pytest.mark.parametrize(
    "text, message",
    [(ALIASES, "aliases .* are not supported"), ("a: " + "[" * 3000, "is not valid YAML")],
    ids=["aliases", "nested"],
)
def test_a_file_that_unfolds_without_end_is_refused_at_once(tmp_path, text, message):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        config.load(path)
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------------------- where a value stands


def written(tmp_path, text):
    (tmp_path / "own.yaml").write_text(f"base: {DEMO}\n{text}")
    return tmp_path / "own.yaml"


PLACES = [
    ("train:\n  lr_head: nope\n", "got 'nope' (OWN, line 3)"),
    ("train.lr_head: nope\n", "got 'nope' (OWN, line 2)"),
    (
        "train:\n  epochs: 3\nmodel:\n  unfreeze_at_epoch: 7\n",
        "(model.unfreeze_at_epoch: OWN, line 5; train.epochs: OWN, line 3)",
    ),
    ("train.epochs: 3\ntrain: {epochs: 5}\n", "OWN: key 'train.epochs' is given twice"),
    ('paths: {data: "a\\0b"}\n', "paths.data must be a text"),
    ("model: {head: {hidden: 2000000000}}\n", "from 0 to 65536; got 2000000000 (OWN, line 2)"),
]


@pytest.mark.parametrize("text, message", PLACES, ids=[text for text, _ in PLACES])
def test_a_message_names_file_and_line(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as error:
        config.load(path)
    assert message.replace("OWN", str(path)) in str(error.value)


def test_what_the_command_line_sets_has_no_line(tmp_path):
    path = written(tmp_path, "train:\n  lr_head: nope\n")
    with pytest.raises(ValueError, match="got 'x'$"):
        config.load(path, ["train.lr_head=x"])


def test_a_base_that_is_no_path_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: [1, 2]\n")
    with pytest.raises(ValueError, match="base: must be a path"):
        config.load(tmp_path / "a.yaml")


def test_a_file_that_is_not_there_names_those_that_are():
    with pytest.raises(FileNotFoundError, match="dmeo.yaml .*; did you mean demo.yaml. .* has .*"):
        config.load(os.path.join(ROOT, "configs", "dmeo.yaml"))
    with pytest.raises(FileNotFoundError, match="nosuch.yaml is not a file; .* has .*demo.yaml"):
        config.load(os.path.join(CONFIGS, "nosuch.yaml"))


def test_a_sweep_of_too_many_heads_is_refused():
    rates = [1e-5 * i for i in range(1, 100)]
    override = f"train.sweep.lr_head={rates}", f"train.sweep.weight_decay={rates}"
    with pytest.raises(ValueError, match="train.sweep makes [0-9]* heads, more than 4096"):
        config.load(PROBE, override)


@pytest.mark.parametrize("mode", ["probe", "finetune", "attentive", "knn", "logistic_regression"])
def test_shipped_settings_do_not_scold_themselves(mode):
    cfg = config.load([DEMO, os.path.join(CONFIGS, f"{mode}.yaml")][: 1 if mode == "probe" else 2])
    assert list(settings.doubts(cfg, 303)) == []
