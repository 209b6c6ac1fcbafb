"""The arguments of `ijepa finetune`: a run has one length, and no setting is ignored without a word."""

import pytest
import yaml

from ijepa_transformers.finetuning.arguments import fine_tuning_arguments, parse_fine_tuning_arguments


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def parsed(tmp_path):
    def parse(recipe, *flags):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"data": "digits", "model": "model", "output_dir": "out", **recipe}))
        return parse_fine_tuning_arguments(["--recipe", str(path), "--use_cpu", *flags]).training

    return parse


def test_a_length_that_is_given_replaces_the_one_of_a_recipe(parsed):
    found = parsed({"max_steps": 200, "warmup_steps": 0.1}, "--num_train_epochs", "1")
    assert (found.max_steps, found.num_train_epochs, found.warmup_steps) == (-1, 1, 0.1)
    found = parsed({"num_train_epochs": 30}, "--max_steps", "7")
    assert (found.max_steps, found.num_train_epochs) == (7, 50)  # the default, which `Trainer` does not use
    for recipe in ({"num_train_epochs": 30, "max_steps": -1}, {"num_train_epochs": 30}):
        assert parsed(recipe, "--max_steps", "-1").num_train_epochs == 30
    assert parsed({"max_steps": 200}).max_steps == 200


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            {},
            ("--num_train_epochs", "50", "--max_steps", "4"),
            "num_train_epochs 50.0 and max_steps 4 set the same thing: give one",
        ),
        (
            {"num_train_epochs": 3, "max_steps": 4},
            (),
            "num_train_epochs 3.0 and max_steps 4 set the same thing in the recipe:",
        ),
        ({}, ("--save_steps", "10"), "save_steps 10.0 does nothing with save_strategy epoch: leave it out"),
        ({"eval_steps": 10}, (), "eval_steps 10.0 does nothing with eval_strategy no: leave it out"),
    ],
)
def test_what_trainer_would_ignore_is_refused(parsed, capsys, recipe, flags, message):
    with pytest.raises(SystemExit) as stopped:
        parsed(recipe, *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_function_takes_one_length_too():
    with pytest.raises(ValueError, match=r"num_train_epochs 2\.0 and max_steps 4 set the same thing"):
        fine_tuning_arguments(data="digits", model="model", output_dir="out", num_train_epochs=2, max_steps=4)


def test_a_strategy_that_is_given_replaces_the_steps_of_a_recipe(parsed):
    found = parsed({"save_strategy": "steps", "save_steps": 100}, "--save_strategy", "epoch")
    assert (found.save_strategy, found.save_steps) == ("epoch", 500)


def test_help_has_the_usual_arguments_before_those_of_trainer(capsys):
    with pytest.raises(SystemExit):
        parse_fine_tuning_arguments(["--help"])
    usual, _, others = capsys.readouterr().out.partition("all other arguments of transformers.TrainingArguments")
    for flag in ("--learning_rate", "--max_steps", "--bf16", "--eval_strategy", "--resume_from_checkpoint"):
        assert f"\n  {flag} " in usual and f"\n  {flag} " not in others
    assert (
        "\n  --ddp_timeout " in others
        and "last (the newest complete one of output_dir; if there is none, the run starts)" in " ".join(usual.split())
    )
