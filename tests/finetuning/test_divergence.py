"""Numbers with which a fine-tuning would train to NaN are refused, and one that diverges leaves no model."""

import pytest
import yaml

from ijepa_transformers.finetuning import arguments as finetuning_arguments
from ijepa_transformers.finetuning import command
from tests.runs import fine_tuning_argv


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("learning_rate", "weight_decay", "warmup_steps") for value in ("nan", "-1")),
        ("learning_rate", "1e400"),
        ("per_device_train_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("num_train_epochs", "-1"),
        ("max_steps", "0"),
    ],
)
def test_a_number_that_cannot_work_is_refused_before_anything_is_opened(tmp_path, capsys, name, value):
    with pytest.raises(SystemExit) as stopped:
        command.main(fine_tuning_argv("no model", tmp_path / "output", **{name: value}))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and f"{name} " in error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_that_diverges_fails_and_leaves_no_model(gray_pretrained, tmp_path, capsys, steps):
    """After one step only the weights show it, later the loss does."""
    settings = {"learning_rate": 1e38, "adam_epsilon": 0, "warmup_steps": 0, "max_steps": steps, "weight_decay": 1e3}
    with pytest.raises(SystemExit) as stopped:
        command.main(fine_tuning_argv(gray_pretrained, tmp_path, **settings))
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and "The training has diverged" in sentence and "learning rate 1e+38" in sentence
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


def parsed(recipe, *flags):
    argv = [
        "--recipe",
        str(recipe),
        "--data",
        "digits",
        "--model",
        "model",
        "--output_dir",
        "out",
        "--use_cpu",
        *flags,
    ]
    return finetuning_arguments.parse_fine_tuning_arguments(argv).training


def test_epochs_that_are_given_replace_the_steps_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"max_steps": 200, "warmup_steps": 0.1, "num_train_epochs": 30}))
    found = parsed(recipe, "--num_train_epochs", "1")
    assert (found.max_steps, found.num_train_epochs) == (-1, 1)
    found = parsed(recipe, "--max_steps", "-1")
    assert (found.max_steps, found.num_train_epochs, found.warmup_steps) == (-1, 30, 0.1)
    assert parsed(recipe).max_steps == 200
