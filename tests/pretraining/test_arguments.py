"""What every command shares: recipes under flags, and the check of its launch; and every value of pretraining."""

import dataclasses
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ijepa_transformers.arguments import (
    argument,
    arguments_from_keywords,
    parse_arguments,
)
from ijepa_transformers.configuration_ijepa import IJEPA_SIZES
from ijepa_transformers.distributed import check_launch
from ijepa_transformers.mask_arguments import MASK_SETTINGS, unused_mask_settings, without_removed_keys
from ijepa_transformers.pretraining.arguments import (
    SIZES,
    PretrainingArguments,
    parse_pretraining_arguments,
    pretraining_arguments,
)
from ijepa_transformers.recipe_files import MAX_RECIPE_BYTES, list_recipes


REPOSITORY = Path(__file__).parents[2]


@dataclass
class Settings:
    rate: float = argument(1.0, "a number")
    mirror: bool = argument(False, "a choice")
    size: list[int] | None = argument(None, "a list without a default")
    shots: list[int] = argument([1, 5], "a list with one")
    names: list[str] = argument([], "a list that may be empty")
    precision: str | None = argument(None, "a word")


def parse(*words):
    return parse_arguments(list(map(str, words)), [Settings], Settings, "command", "A command.")


def refusal(capsys, *words):
    """The last line of the error."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rate: 2.0\nshots: [3]\n")
    return path


def test_a_recipe_is_read_however_it_is_named_and_flags_go_over_it(recipe):
    for words in (("--recipe", recipe), (f"--recipe={recipe}",), ("--shots", 3, "--recipe", recipe)):
        assert parse(*words) == Settings(rate=2.0, shots=[3])
    assert parse("--rate", 4, f"--recipe={recipe}") == Settings(rate=4.0, shots=[3])
    assert parse("--rate", 4) == Settings(rate=4.0)


def test_a_second_recipe_is_refused(recipe, capsys):
    for words in (("--recipe", recipe, "--recipe", "b.yaml"), (f"--recipe={recipe}", "--recipe", "b.yaml")):
        assert "error: --recipe is given 2 times" in refusal(capsys, *words)


def test_a_recipe_without_a_name_or_a_file_is_an_error(tmp_path, capsys):
    assert "argument --recipe: expected one argument" in refusal(capsys, "--recipe")
    assert "There is no recipe 'nowhere.yaml'" in refusal(capsys, "--recipe=nowhere.yaml")
    assert "unrecognized arguments: --rec" in refusal(capsys, "--rec", "nowhere.yaml")


@pytest.mark.parametrize("key", ["shots", "size", "mirror"])
def test_an_empty_list_is_no_silent_default(tmp_path, capsys, key):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{key}: []\n")
    assert f"error: {key} is an empty list in the recipe" in refusal(capsys, "--recipe", path)


def test_an_empty_list_may_be_given_where_it_is_the_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("names: []\nsize: null\n")
    assert parse("--recipe", path) == Settings()


UNREADABLE = {
    "a mistake in YAML": (b"rate: [1", "is not a YAML file of values"),
    "a pickle of YAML": (b"!!python/object/apply:os.system ['touch executed']", "could not determine a constructor"),
    "an object of YAML": (b"rate: !!python/object:decimal.Decimal {}", "could not determine a constructor"),
    "a key twice": (b"rate: 1\nmirror: true\n'rate': 2\n", "the key 'rate' is there 2 times"),
    "Latin-1": (b"names: [caf\xe9]", "not UTF-8 text (byte 11)"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8 text (byte 0)"),
    "zeros": (bytes(100), "special characters are not allowed"),
    "nothing": (b"", "must hold `key: value` lines"),
    "a list": (b"- rate\n", "must hold `key: value` lines"),
    "far too much": (b"#" * (MAX_RECIPE_BYTES + 1), "more than 1,000,000 bytes"),
    "deep nesting": (b"[" * 100_000, "is not a YAML file of values"),
    "a mapping as a value": (b"rate: {least: 1}", "rate must be one value"),
    "a list in a list": (b"shots: [[1]]", "shots must be one value"),
    "a list that holds itself": (b"shots: &a [*a]", "shots must be one value"),
    "a list for one value": (b"rate: [1, 2]", "rate must be one value"),
    "a flag as a value": (b"names: [a, --rate, '3']", "'--rate' in the recipe, which looks like a flag"),
    "a word that YAML makes a truth value": (b"precision: no", "reads no, off, yes and on so unless they are in quo"),
    "no date": (b"rate: 2020-99-99", "month must be in 1..12"),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_recipe_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert message in refusal(capsys, "--recipe", path)
    assert list(tmp_path.iterdir()) == [path]  # above all not what the pickle would have made


def test_what_is_no_file_is_no_recipe(tmp_path, capsys):
    assert "cannot be read: Is a directory" in refusal(capsys, "--recipe", tmp_path)
    (tmp_path / "circle.yaml").symlink_to(tmp_path / "circle.yaml")
    assert "cannot be read: Too many levels of symbolic links" in refusal(capsys, "--recipe", tmp_path / "circle.yaml")
    assert "'/dev/zero' is no recipe: it has more than" in refusal(capsys, "--recipe", "/dev/zero")


def test_values_that_start_with_a_dash_are_values(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rate: -1.0e-5\nprecision: -x\n")
    assert parse("--recipe", path) == Settings(rate=-1e-5, precision="-x")
    assert parse("--rate", "-1e-5") == Settings(rate=-1e-5)


def test_several_processes_that_do_not_see_each_other_are_an_error(monkeypatch):
    """What torchrun on the CPU without ACCELERATE_USE_CPU is: two runs that write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but 1 would work together; on the CPU, set"):
        check_launch(1)
    check_launch(2)


@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "ijepa_transformers" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_says_what_it_is_what_it_costs_and_how_to_run_it(recipe):
    header = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Reproduces:", "Cost:", "Command:", "Expected:"):
        assert word in header, word


# Every value of pretraining. A field without an entry fails the first test: add its bad values with the field.

SOUND = {"data": "digits", "output_dir": "here", "max_steps": 10}

# Values that any text may be: paths and names, which only opening can judge. They must not be empty.
ANY_TEXT = {
    *("data", "data_config", "train_split", "validation_split", "image_column", "label_column"),
    *("init_from", "output_dir", "validation_data"),
}

# What the type alone refuses.
NOT_OF_TYPE = {
    bool: ["maybe", "2", "nan"],
    int: ["many", "1.5", "nan", "inf", "1e3", "0x10"],
    float: ["many", "nan", "inf", "-inf", "1,5"],
    str: [],
}

POSITIVE, NOT_NEGATIVE, INTERVAL = ["0", "-1"], ["-1"], ["0.5", "0.2 0.3 0.4", "0.5 0.2", "0 0.5", "-1 1", "nan 1"]
PART, SIDES = [*INTERVAL, "0.5 1.1"], ["0", "-16", "16 0", "16 16 16"]

OUT_OF_RANGE = {
    **{name: [""] for name in ANY_TEXT},
    "crop_scale": PART,
    "crop_ratio": [*INTERVAL, "1 inf"],
    "interpolation": ["nearest", ""],
    "cache_images": ["disk", ""],
    "image_mean": ["-0.1 0.5 0.5", "0.5 0.5", "0.5 0.5 123.7", "0.5 nan 0.5"],
    "image_std": ["0 1 1", "-1 1 1", "0.2 0.2", "inf 1 1"],
    "sixteen_bit_max": ["0", "65536", "-1"],
    "eval_resize_ratio": ["0.9", "-1"],
    "max_bad_images": [*NOT_NEGATIVE, "1.5"],
    "num_images": POSITIVE,
    "shuffle_buffer": POSITIVE,
    "num_workers": [*NOT_NEGATIVE, "1025"],
    "size": ["enormous", ""],
    "image_size": SIDES,
    "patch_size": SIDES,
    "num_channels": ["0", "17", "-3"],
    "hidden_size": [*POSITIVE, "18"],
    "num_hidden_layers": POSITIVE,
    "num_attention_heads": [*POSITIVE, "7"],
    "intermediate_size": POSITIVE,
    "predictor_hidden_size": [*POSITIVE, "18"],
    "predictor_num_hidden_layers": NOT_NEGATIVE,
    "predictor_num_attention_heads": [*POSITIVE, "7"],
    "predictor_intermediate_size": POSITIVE,
    "drop_path_rate": ["-0.1", "1"],
    "patch_embedding_init": ["zeros", ""],
    "initializer_range": ["0", "-0.1", "nan"],
    "target_normalization": ["content", "", "True"],
    "target_image_mean": ["-0.1", "1.1", "nan"],
    "loss_type": ["l1", ""],
    "attn_implementation": ["flash", ""],
    "mask_mode": ["chess", ""],
    "visible_share": ["0", "1", "-0.1", "nan"],
    "visible_aspect_ratio": [*INTERVAL, "1 inf"],
    "num_targets": POSITIVE,
    "target_scale": PART,
    "target_aspect_ratio": [*INTERVAL, "1 inf"],
    "num_contexts": POSITIVE,
    "context_scale": PART,
    "min_patches": POSITIVE,
    "num_context_tokens": POSITIVE,
    "num_target_tokens": POSITIVE,
    "optimizer": ["sgd", ""],
    "batch_size": POSITIVE,
    "per_device_batch_size": POSITIVE,
    "epochs": POSITIVE,
    "max_steps": POSITIVE,
    "warmup_epochs": NOT_NEGATIVE,
    "warmup_steps": [*NOT_NEGATIVE, "11"],
    "start_learning_rate": NOT_NEGATIVE,
    "learning_rate": [*NOT_NEGATIVE, "-1e-3"],
    "final_learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "final_weight_decay": NOT_NEGATIVE,
    "momentum": ["-0.1", "1.001"],
    "momentum_half_life": [*POSITIVE, "1.001"],
    "final_momentum": ["-0.1", "1.001"],
    "adam_beta1": ["-0.1", "1"],
    "adam_beta2": ["-0.1", "1"],
    "adam_epsilon": POSITIVE,
    "max_grad_norm": POSITIVE,
    "mixed_precision": ["fp8", "int4", ""],
    "max_skipped_steps": NOT_NEGATIVE,
    "seed": [*NOT_NEGATIVE, str(2**31)],
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "keep_checkpoints": POSITIVE,
    "export_every": NOT_NEGATIVE,
    "knn_neighbors": POSITIVE,
    "max_probe_images": POSITIVE,
    "trackers": ["excel", "excel tensorboard", ""],
    "hub_model_id": ["a/b/c", "a:b", ".x", ""],
}


def value_type(name):
    """bool, int, float or str: of the value, or of the entries of a list."""
    hint = typing.get_type_hints(PretrainingArguments)[name]
    while typing.get_args(hint):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


FIELDS = [entry.name for entry in dataclasses.fields(PretrainingArguments)]
BAD_VALUES = [(name, value) for name in FIELDS for value in NOT_OF_TYPE[value_type(name)] + OUT_OF_RANGE.get(name, [])]


def pretraining_refusal(capsys, **changes):
    """The last line of the error; an exception that is no exit fails the test."""
    of_one_mode = {"mask_mode": "inverse_block"} if changes.keys() & {"visible_share", "visible_aspect_ratio"} else {}
    values = {**SOUND, **of_one_mode, **changes}
    words = [word for key, value in values.items() for word in (f"--{key}", *str(value).split(" "))]
    with pytest.raises(SystemExit) as stopped:
        parse_pretraining_arguments(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_no_field_is_without_a_check():
    """Truth values need their type only; every other field has values out of its range, or may be any text."""
    unchecked = {name for name in FIELDS if value_type(name) is not bool and not OUT_OF_RANGE.get(name)}
    assert not unchecked, f"add bad values of {unchecked} to OUT_OF_RANGE, and their check to the arguments"
    assert set(OUT_OF_RANGE) <= set(FIELDS), "these fields are gone"


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=[f"{name}={value}" for name, value in BAD_VALUES])
def test_a_bad_value_is_one_sentence_with_its_name_and_the_value(tmp_path, capsys, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    message = pretraining_refusal(capsys, **{name: value})
    assert message.startswith("ijepa pretrain: error: ")
    assert name in message
    shown = message.replace(",", "").replace("[", "").replace("]", "").replace("'", "")
    assert value == "" or any(shown_as in shown for shown_as in appearances(value)), message
    assert not list(tmp_path.iterdir())


def appearances(value):
    """A bad value as it was written and as Python prints it, also the one bad entry of a list."""
    numbers = []
    for convert in (int, float):
        try:
            numbers.append(" ".join(str(convert(entry)) for entry in value.split(" ")))
        except ValueError:
            continue
    return [value, value.replace(",", ""), *numbers, *(value.split(" ")[:1] if "excel" in value else [])]


@pytest.mark.parametrize("name", [name for name in FIELDS if value_type(name) in (int, float)])
def test_a_number_that_is_none_in_a_recipe_is_refused_too(tmp_path, capsys, name):
    path = tmp_path / "recipe.yaml"
    for value in (float("nan"), float("inf"), "1e999", True, "many"):
        path.write_text(yaml.safe_dump({name: value}))
        if name != "max_steps" or value:
            replaced = {name, "max_steps" if name == "epochs" else None}
            words = [word for key, entry in SOUND.items() if key not in replaced for word in (f"--{key}", str(entry))]
            with pytest.raises(SystemExit) as stopped:
                parse_pretraining_arguments(["--recipe", str(path), *words])
            assert stopped.value.code == 2 and name in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": "11"}, "warmup_steps 11 is longer than the run, which has max_steps 10"),
        ({"epochs": "3"}, "epochs 3.0 and max_steps 10 set the same thing"),
        ({"warmup_steps": "1", "warmup_epochs": "1"}, "warmup_epochs 1.0 and warmup_steps 1 set the same thing"),
        (
            {"momentum": "0.99", "momentum_half_life": "0.1"},
            "momentum 0.99 and momentum_half_life 0.1 set the same thing",
        ),
        ({"image_mean": "0.5 0.5 0.5", "image_std": "0.2"}, "image_mean and image_std must be equally many"),
        ({"image_mean": "0.5", "num_channels": "3"}, "image_mean has 1 numbers, [0.5], but num_channels is 3"),
        ({"image_std": "1 1 1", "num_channels": "1"}, "image_std has 3 numbers, [1.0, 1.0, 1.0], but num_channels"),
        ({"num_channels": "13"}, "num_channels 13 needs image_mean, because there is no usual one: measure it with"),
        ({"image_mean": "0.5"}, "but num_channels is 3"),
        ({"init_from": "x", "hidden_size": "64"}, "init_from brings its own architecture, so hidden_size"),
        ({"init_from": "x", "drop_path_rate": "1"}, "drop_path_rate must lie in [0, 1), got 1.0"),
        ({"init_from": "x", "loss_type": "l1"}, "loss_type must be one of smooth_l1, mse, got 'l1'"),
        ({"push_to_hub": "true"}, "push_to_hub needs hub_model_id"),
        ({"trackers": "comet_ml"}, "'comet_ml' is not installed here"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(capsys, monkeypatch, changes, message):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    assert message in pretraining_refusal(capsys, **changes)


def test_a_setting_of_streaming_that_is_given_without_it_is_refused(capsys, tmp_path):
    for changes in ({"num_images": "100"}, {"shuffle_buffer": "10"}):
        message = " ".join(*changes.items()) + " does nothing with streaming false: leave it out"
        assert message in pretraining_refusal(capsys, **changes)
    recipe = tmp_path / "recipe.yaml"
    settings = {"max_steps": 9, "streaming": True, "num_images": 100, "shuffle_buffer": 10}
    recipe.write_text(yaml.safe_dump({"data": "x", "output_dir": "x", **settings}))
    streamed = parse_pretraining_arguments(["--recipe", str(recipe)])
    indexed = parse_pretraining_arguments(["--recipe", str(recipe), "--streaming", "false"])
    assert (streamed.num_images, streamed.shuffle_buffer) == (100, 10)
    assert (indexed.num_images, indexed.shuffle_buffer) == (None, 1000)


def test_a_flag_replaces_what_the_recipe_says_in_another_way(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: digits\noutput_dir: x\nepochs: 3\nwarmup_epochs: 1\nmomentum_half_life: 0.1\n")
    as_written = parse_pretraining_arguments(["--recipe", str(recipe)])
    flags = ["--max_steps=7", "--warmup_steps", "2", "--momentum=0.9"]
    changed = parse_pretraining_arguments(["--recipe", str(recipe), *flags])
    names = ("epochs", "max_steps", "warmup_epochs", "warmup_steps", "momentum", "momentum_half_life")
    assert [getattr(as_written, name) for name in names] == [3, None, 1, None, None, 0.1]
    assert [getattr(changed, name) for name in names] == [None, 7, None, 2, 0.9, None]


def test_data_that_are_not_of_the_hub_replace_the_configuration_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/photos").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("data: owner/name\ndata_config: 160px\noutput_dir: x\nmax_steps: 1\n")
    argv = ["--recipe", "recipe.yaml"]
    for data in ("own/photos", str(tmp_path), "own/*/train-*.parquet", "hf://datasets/a/b/*.parquet", "digits"):
        assert parse_pretraining_arguments([*argv, "--data", data]).data_config is None, data
    for words in ([], ["--data", "own/pictures"], ["--data", "name"]):
        assert parse_pretraining_arguments([*argv, *words]).data_config == "160px", words
    asked = parse_pretraining_arguments([*argv, "--data", "own/photos", "--data_config", "full"])
    assert asked.data_config == "full"  # which opening refuses


@pytest.mark.parametrize(
    ("mode", "name", "value"),
    [
        ("random", "num_targets", 2),
        ("random", "num_targets", 4),  # also if it is the default
        ("random", "visible_aspect_ratio", "1 1"),
        ("inverse_block", "min_patches", 4),
        ("inverse_block", "allow_overlap", "true"),
        ("unbiased", "visible_share", 0.2),
        ("meta", "visible_aspect_ratio", "0.5 2"),
    ],
)
def test_a_setting_of_another_mode_of_masks_is_refused(tmp_path, capsys, mode, name, value):
    message = f"does nothing with mask_mode {mode}: leave it out."
    given = {"mask_mode": mode, name: value}
    assert f"{name} " in pretraining_refusal(capsys, **given)
    assert message in pretraining_refusal(capsys, **given)
    read = [float(part) for part in value.split()] if "ratio" in name else value
    with pytest.raises(ValueError, match=message):
        pretraining_arguments(**SOUND, **{**given, name: read})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SOUND, **given, name: read}))
    if value == 4 and name == "num_targets":  # a recipe may name a default
        assert pretraining_arguments(recipe=recipe).mask_mode == mode
        return
    with pytest.raises(ValueError, match=message):
        pretraining_arguments(recipe=recipe)


def test_a_given_mode_of_masks_replaces_the_settings_of_the_recipe_s_mode(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: digits\noutput_dir: x\nepochs: 3\nnum_targets: 2\nmin_patches: 5\nnum_contexts: 2\n")
    random = parse_pretraining_arguments(["--recipe", str(recipe), "--mask_mode", "random"])
    assert random.mask_fields() == {"mode": "random", "visible_share": 0.3, "num_contexts": 2}
    meta = parse_pretraining_arguments(["--recipe", str(recipe), "--mask_mode", "meta"])
    assert (meta.num_targets, meta.min_patches, meta.num_contexts) == (2, 5, 2)
    recipe.write_text("data: digits\noutput_dir: x\nepochs: 3\nmask_mode: random\nvisible_share: 0.2\n")
    unbiased = pretraining_arguments(recipe=recipe, mask_mode="unbiased", num_targets=2)
    assert unbiased.mask_fields()["num_targets"] == 2 and "visible_share" not in unbiased.mask_fields()


@pytest.mark.parametrize("mode", MASK_SETTINGS)
def test_a_saved_recipe_has_the_settings_of_its_mode_of_masks_and_gives_the_same_arguments(tmp_path, mode):
    arguments = pretraining_arguments(data="digits", output_dir="x", epochs=1, mask_mode=mode, num_contexts=2)
    arguments.save(tmp_path / "recipe.yaml")
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert set(saved) & unused_mask_settings(mode) == set() and "num_contexts" in saved
    assert pretraining_arguments(recipe=tmp_path / "recipe.yaml") == arguments


def test_an_output_directory_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("a novel")
    assert "is there already and is no directory" in pretraining_refusal(capsys, output_dir=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "a novel"


def test_images_per_pass_may_change_unless_targets_are_normalised_over_them(tmp_path):
    values = {"data": "digits", "output_dir": str(tmp_path), "max_steps": 1, "batch_size": 32}
    for kind, differences in {"layer": [], "batch": ["per_device_batch_size was 16, is 32"]}.items():
        before, after = (
            PretrainingArguments(**values, target_normalization=kind, per_device_batch_size=size) for size in (16, 32)
        )
        assert after.differences(dataclasses.asdict(before)) == differences


def test_a_setting_that_a_checkpoint_does_not_know_yet_had_its_default(tmp_path):
    values = dataclasses.asdict(PretrainingArguments(data="digits", output_dir=str(tmp_path), max_steps=1))
    older = {name: value for name, value in values.items() if name not in ("streaming", "target_normalization")}
    same = PretrainingArguments(**values)
    other = PretrainingArguments(**{**values, "streaming": True, "target_normalization": "none"})
    assert same.differences(older) == []
    assert other.differences(older) == [
        "streaming was False, is True",
        "target_normalization was None, is 'none'",
    ]


def test_a_setting_that_does_nothing_is_not_in_the_recipe_and_may_differ_on_resume(tmp_path):
    """Earlier versions took it without a word; now the flag is refused, so it cannot be repeated."""
    values = {"data": "digits", "output_dir": str(tmp_path), "max_steps": 1}
    before = PretrainingArguments(**values, num_images=100, shuffle_buffer=10)
    assert {"num_images", "shuffle_buffer"} & before.effective().keys() == set()
    assert PretrainingArguments(**values).differences(dataclasses.asdict(before)) == []
    streamed = PretrainingArguments(**values, streaming=True, num_images=100)
    assert "num_images was 100, is 99" in dataclasses.replace(streamed, num_images=99).differences(
        dataclasses.asdict(streamed)
    )


REMOVED = {
    "keep_all_context": ([False], True),
    "normalize_targets": ([None, True], False),
    "predictor_attention": ([None, "full"], "shared_context"),
    "token_multiple": ([1], 8),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_key_may_have_the_value_that_means_what_is_done_today(tmp_path, capsys, name):
    (usual, other), path = REMOVED[name], tmp_path / "recipe.yaml"
    words = ["--data=digits", "--max_steps=1", f"--output_dir={tmp_path / 'run'}"]
    expected = parse_pretraining_arguments(words)
    for value in usual:
        path.write_text(yaml.safe_dump({name: value}))
        assert parse_pretraining_arguments([*words, f"--recipe={path}"]) == expected
        state = without_removed_keys({**dataclasses.asdict(expected), name: value}, "checkpoint")
        assert expected.differences(state) == []
    path.write_text(yaml.safe_dump({name: other}))
    with pytest.raises(SystemExit):
        parse_pretraining_arguments([*words, f"--recipe={path}"])
    message = f"has {name} {other!r}, which this version no longer supports."
    assert capsys.readouterr().err.endswith(f"{message}\n")
    with pytest.raises(ValueError, match=f"checkpoint {message}"):
        without_removed_keys({name: other}, "checkpoint")


def test_removed_keys_are_known_to_pretraining_alone(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("keep_all_context: false\n")
    assert "unknown keys: keep_all_context" in refusal(capsys, "--recipe", tmp_path / "recipe.yaml")


# Flags, recipes and keywords alike


def keywords(**given):
    return arguments_from_keywords(given, [Settings], Settings, "run")


def test_dashes_in_a_flag_are_underscores_and_stay_in_a_value(tmp_path):
    recipe = tmp_path / "my-recipe.yaml"
    recipe.write_text("data: digits\noutput_dir: my-run\nepochs: 3\n")
    for words in (["--max-steps", "7"], ["--max-steps=7"]):
        arguments = parse_pretraining_arguments(["--recipe", str(recipe), "--data-config", "a-b", *words])
        assert (arguments.epochs, arguments.max_steps, arguments.data_config) == (None, 7, "a-b")
        assert arguments.output_dir == "my-run"


def test_a_near_name_is_proposed_for_a_typo(tmp_path, capsys):
    assert refusal(capsys, "--mirorr").endswith("error: unrecognized arguments: --mirorr. Did you mean --mirror?")
    assert refusal(capsys, "--xylophone").endswith("error: unrecognized arguments: --xylophone.")
    assert "Did you mean --max_steps?" in pretraining_refusal(capsys, **{"max-step": 3})
    (tmp_path / "recipe.yaml").write_text("shot: [3]\n")
    assert refusal(capsys, "--recipe", tmp_path / "recipe.yaml").endswith("unknown keys: shot. Did you mean shots?")
    with pytest.raises(TypeError, match=r"^run\(\) has no argument 'miror'. Did you mean mirror\?$"):
        keywords(miror=True)


def test_an_error_is_one_line_without_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--rate", "many")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "command: error: rate must be a number, got 'many'.\n"


def test_recipes_of_the_package_are_found_by_bare_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # an output directory of the same name is no recipe
    arguments = parse_pretraining_arguments(["--recipe", "quickstart", "--max_steps", "5", "--output_dir", "here"])
    assert arguments.max_steps == 5 and arguments.epochs is None
    assert "There is no recipe 'quickstrat'. Did you mean quickstart?" in refusal(capsys, "--recipe", "quickstrat")
    assert f"The package has {', '.join(list_recipes())}." in refusal(capsys, "--recipe", "zzz")
    (tmp_path / "own").write_text("rate: 3\n")
    assert parse("--recipe", "own") == Settings(rate=3.0)


def test_print_config_prints_a_recipe_that_gives_the_same_arguments(tmp_path, capsys):
    words = ["--recipe", "quickstart", "--max-steps", "5", "--output_dir", str(tmp_path), "--learning_rate", "1e-4"]
    with pytest.raises(SystemExit) as stopped:
        parse_pretraining_arguments([*words, "--print_config"])
    assert not stopped.value.code
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = parse_pretraining_arguments(["--recipe", str(tmp_path / "printed.yaml")])
    assert again == parse_pretraining_arguments(words)


def test_booleans_take_a_value_or_none_and_have_a_negative_where_they_are_on(capsys):
    for words, expected in ((["--mirror"], True), (["--mirror", "false"], False), (["--mirror=yes"], True)):
        assert parse(*words).mirror is expected
    for words, expected in (([], True), (["--no_hub_private"], False), (["--no-hub-private"], False)):
        values = [word for key, value in SOUND.items() for word in (f"--{key}", str(value))]
        assert parse_pretraining_arguments([*values, *words]).hub_private is expected
    assert "unrecognized arguments: --no_mirror" in refusal(capsys, "--no_mirror")


def test_help_shows_choices_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_pretraining_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "--loss_type {smooth_l1,mse}" in text and "--size {tiny,small,base,large,huge,giant}" in text
    assert "as a private one (default: true; off with --no_hub_private)" in text
    assert "--no_hub_private " not in text.replace("off with --no_hub_private)", "")


def test_sizes_in_help_are_those_of_the_model():
    assert tuple(IJEPA_SIZES) == SIZES


def test_keywords_give_what_flags_give(recipe):
    assert keywords() == Settings()
    assert keywords(rate=4, recipe=recipe) == parse("--rate", 4, "--recipe", recipe)
    assert keywords(shots=(1, 2), mirror=True, size=8) == Settings(shots=[1, 2], mirror=True, size=[8])
    assert keywords(rate=None, precision=None) == Settings()
    settings = pretraining_arguments(recipe="quickstart", max_steps=50)
    assert settings == parse_pretraining_arguments(["--recipe", "quickstart", "--max_steps", "50"])


def test_a_run_shorter_than_the_warm_up_of_its_recipe_keeps_the_share_of_the_warm_up(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: digits\noutput_dir: x\nmax_steps: 100\nwarmup_steps: 30\n")
    for max_steps, warmup_steps in ((50, 30), (20, 6)):
        arguments = pretraining_arguments(recipe=recipe, max_steps=max_steps)
        assert (arguments.max_steps, arguments.warmup_steps) == (max_steps, warmup_steps)
    with pytest.raises(ValueError, match="warmup_steps 25 is longer than the run, which has max_steps 20"):
        pretraining_arguments(recipe=recipe, max_steps=20, warmup_steps=25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": "many"}, "rate must be a number, got 'many'."),
        ({"rate": True}, "rate must be a number, got 'True'."),
        ({"rate": [1.0]}, r"rate must be one value, got \[1.0\]."),
        ({"shots": [1.5]}, "shots must be a whole number, got '1.5'."),
        ({"shots": []}, "shots is an empty list: name values, or leave it out."),
        ({"precision": False}, "precision is a truth value, False"),
        ({"recipe": "nowhere.yaml"}, "There is no recipe 'nowhere.yaml'."),
    ],
)
def test_bad_keywords_are_value_errors_with_the_same_sentences(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        keywords(**given)


def test_arguments_import_neither_torch_nor_transformers():
    code = (
        "import sys, ijepa_transformers.arguments, ijepa_transformers.pretraining.arguments as p;"
        "print([name for name in ('torch', 'transformers', 'accelerate', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_recipe_of_another_command_and_a_path_of_a_known_name_are_told(capsys):
    for name, hint in (
        ("probe_small", "Is it a recipe of another command?"),
        ("recipes/quickstart.yaml", "There is no recipe 'recipes/quickstart.yaml'. Did you mean quickstart?"),
        ("quickstart.yaml", "Did you mean quickstart?"),
    ):
        with pytest.raises(SystemExit):
            parse_pretraining_arguments(["--recipe", name])
        assert capsys.readouterr().err.rstrip().endswith(hint)
    with pytest.raises(ValueError, match=r"recipe must be the name or the path of a recipe, got \{\}"):
        pretraining_arguments(recipe={})
