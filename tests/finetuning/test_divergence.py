"""Numbers with which a fine-tuning would train to NaN are refused, and one that diverges leaves no model."""

from unittest.mock import Mock

import pytest

from ijepa_transformers.failures import DivergedError
from ijepa_transformers.files import replace_files, replace_files_but_keep
from ijepa_transformers.finetuning import command
from ijepa_transformers.finetuning.trainer import ClassificationTrainer
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
        changes = {"max_steps": None, name: value}
        command.main(fine_tuning_argv("no model", tmp_path / "output", **changes))
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


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_a_loss_on_the_validation_split_that_is_not_finite_fails_and_leaves_no_model(
    gray_pretrained, tmp_path, capsys, eval_strategy
):
    """The weights are finite, but so large that the scores are not. Both after training and within it."""
    settings = {"learning_rate": 1e37, "adam_epsilon": 1e-30, "warmup_steps": 0, "max_steps": 1, "weight_decay": 0}
    evaluation = {"validation_split": "test", "eval_strategy": eval_strategy}
    with pytest.raises(SystemExit) as stopped:
        command.main(fine_tuning_argv(gray_pretrained, tmp_path, **settings, **evaluation))
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and "diverged: the loss on the 'test' split is nan after step 1" in sentence
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))
    assert not (tmp_path / "eval_results.json").exists()


def test_an_evaluation_that_fails_costs_no_model(gray_pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(ClassificationTrainer, "evaluate", Mock(side_effect=OSError("no such image")))
    with pytest.raises(SystemExit):
        command.main(fine_tuning_argv(gray_pretrained, tmp_path, validation_split="test", max_steps=1))
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / ".tmp-export").exists()


def test_the_model_is_in_the_directory_while_it_is_evaluated(gray_pretrained, tmp_path, monkeypatch):
    """So a process that is killed then, without checkpoints, costs no model. A divergence takes the model away."""
    settings = {"validation_split": "test", "max_steps": 1, "save_strategy": "no"}
    found = []

    def evaluate(trainer):
        found.append({path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
        raise DivergedError("the loss is nan.")

    monkeypatch.setattr(ClassificationTrainer, "evaluate", evaluate)
    with pytest.raises(SystemExit):
        command.main(fine_tuning_argv(gray_pretrained, tmp_path, **settings))
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "recipe.yaml"} <= set(
        found[0]
    )
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock")}
    assert not left & {"model.safetensors", "config.json", "README.md", ".tmp-export", ".tmp-before"}


def test_files_that_were_replaced_can_be_brought_back(tmp_path):
    source, destination, before = (tmp_path / name for name in ("source", "destination", "before"))
    for folder, names in ((source, ("a", "b/c")), (destination, ("a", "d"))):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(folder.name)
    written = replace_files_but_keep(source, destination, before)
    assert written == [destination / "a", destination / "b/c"] and not source.exists()
    assert [file.read_text() for file in (*written, destination / "d", before / "a")] == [
        *("source", "source", "destination", "destination")
    ]
    assert [file.name for file in before.rglob("*")] == ["a"]


def test_a_file_that_cannot_be_replaced_is_named_where_it_should_be(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("new")
    (tmp_path / "destination" / "a").mkdir(parents=True)
    with pytest.raises(OSError) as error:
        replace_files(tmp_path / "source", tmp_path / "destination")
    assert error.value.filename == str(tmp_path / "destination" / "a")
