"""A signal ends a fine-tuning with a checkpoint. The resumed run ends as one that was never stopped, bit for bit."""

import json
import os
import signal
import threading

import pytest

from ijepa_transformers import finetune
from ijepa_transformers.finetuning import checkpointing
from ijepa_transformers.finetuning.trainer import ClassificationTrainer
from ijepa_transformers.preemption import PREEMPTED, Preempted
from tests import forked
from tests.runs import (
    REPOSITORY,
    assert_close_weights,
    assert_equal_weights,
    fine_tune,
    fine_tuning_argv,
    reset_accelerate,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "signals_that_are_heard")
# Epochs of four steps. The validation split is looked at after each.
EPOCHS = {"max_steps": 6, "eval_strategy": "epoch", "validation_split": "test", "save_total_limit": 1}
EPOCHS |= {"load_best_model_at_end": True, "save_strategy": "epoch"}


@pytest.fixture
def send_in_step(monkeypatch):
    """Sends this process a signal in a step (from 1), once."""
    original = ClassificationTrainer.training_step

    def send(step, number):
        def training_step(self, *arguments, **options):
            if self.state.global_step + 1 == step:
                monkeypatch.setattr(ClassificationTrainer, "training_step", original)
                os.kill(os.getpid(), number)
            return original(self, *arguments, **options)

        monkeypatch.setattr(ClassificationTrainer, "training_step", training_step)

    return send


def checkpoints(output_dir):
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(gray_pretrained, tmp_path_factory):
    """Runs that nobody stops: their weights and the log of the second one. Do not change them."""
    place = tmp_path_factory.mktemp("whole")
    plain = fine_tune(gray_pretrained, place / "plain")
    epochs = fine_tune(gray_pretrained, place / "epochs", **EPOCHS)
    return plain, epochs, json.loads((place / "epochs" / "trainer_state.json").read_text())


@pytest.mark.parametrize(
    ("number", "step", "workers"),
    [
        (signal.SIGTERM, 2, 0),
        (signal.SIGINT, 2, 0),
        (signal.SIGUSR1, 2, 0),
        (signal.SIGHUP, 2, 1),
        (signal.SIGTERM, 4, 0),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    gray_pretrained, whole, tmp_path, capsys, send_in_step, number, step, workers
):
    """Also in the last step, after which only the model is left to write, and if no checkpoints were asked for."""
    send_in_step(step, number)
    heard = signal.getsignal(number)
    options = {"save_only_model": True, "dataloader_num_workers": workers}
    with pytest.raises(SystemExit) as stopped:
        fine_tune(gray_pretrained, tmp_path, **options)
    assert stopped.value.code == PREEMPTED and signal.getsignal(number) == heard
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"stopped ({number.name}) after step {step}; --resume_from_checkpoint last continues."
    assert checkpoints(tmp_path) == [f"checkpoint-{step}"] and not (tmp_path / "model.safetensors").exists()
    assert_equal_weights(fine_tune(gray_pretrained, tmp_path, resume_from_checkpoint="last"), whole[0])


@pytest.mark.parametrize("step", [3, 4, 5])
def test_no_evaluation_is_left_out_and_the_best_checkpoint_stays(gray_pretrained, whole, tmp_path, send_in_step, step):
    """Also if the signal comes in the last step of an epoch, and if one checkpoint is kept."""
    send_in_step(step, signal.SIGTERM)
    with pytest.raises(SystemExit):
        fine_tune(gray_pretrained, tmp_path, **EPOCHS)
    assert f"checkpoint-{step}" in checkpoints(tmp_path)
    assert_equal_weights(fine_tune(gray_pretrained, tmp_path, resume_from_checkpoint="last", **EPOCHS), whole[1])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (
        state["best_metric"] == whole[2]["best_metric"] and state["best_global_step"] == whole[2]["best_global_step"]
    )
    accuracies = [
        {row["step"]: row["eval_accuracy"] for row in run["log_history"] if "eval_accuracy" in row}
        for run in (state, whole[2])
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("place", ["evaluation", "checkpoint"])
def test_a_signal_after_the_last_step_ends_the_run_too(gray_pretrained, whole, tmp_path, monkeypatch, place):
    """In the evaluation of the last epoch, and while the last checkpoint is written."""
    module, name = {
        "evaluation": (ClassificationTrainer, "evaluation_loop"),
        "checkpoint": (checkpointing, "_complete"),
    }[place]
    original, calls = getattr(module, name), []

    def second_call_gets_a_signal(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, second_call_gets_a_signal)
    with pytest.raises(SystemExit) as stopped:
        fine_tune(gray_pretrained, tmp_path, **EPOCHS)
    assert stopped.value.code == PREEMPTED and len(calls) == 2
    assert "checkpoint-6" in checkpoints(tmp_path) and not (tmp_path / "model.safetensors").exists()
    assert_equal_weights(fine_tune(gray_pretrained, tmp_path, resume_from_checkpoint="last", **EPOCHS), whole[1])


def test_a_step_that_is_not_the_best_is_saved_too(gray_pretrained, tmp_path, send_in_step):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "validation_split": "test"}
    send_in_step(2, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        fine_tune(gray_pretrained, tmp_path, learning_rate=1e-12, **options)
    assert stopped.value.code == PREEMPTED and checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_in_python_a_signal_raises_preempted_and_other_threads_train_on(gray_pretrained, tmp_path, send_in_step):
    options = {"use_cpu": True, "max_steps": 2, "images_per_class": 3, "dataloader_num_workers": 0}
    options |= {"data": "digits", "model": str(gray_pretrained), "per_device_train_batch_size": 8}
    send_in_step(1, signal.SIGTERM)
    with pytest.raises(Preempted):
        finetune(output_dir=str(tmp_path / "stopped"), **options)
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-1"]
    reset_accelerate()
    results = []
    thread = threading.Thread(target=lambda: results.append(finetune(output_dir=str(tmp_path / "thread"), **options)))
    thread.start()
    thread.join()
    assert results[0].metrics["train_loss"] > 0


def test_the_switch_of_trainer_is_refused(gray_pretrained, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        fine_tune(gray_pretrained, tmp_path / "output", enable_jit_checkpoint=True)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and not (tmp_path / "output").exists()
    assert "enable_jit_checkpoint must stay False, because a signal always saves a checkpoint here." in error


# The second of two processes gets a signal in its second step.
ONE_GETS_A_SIGNAL = """
import os, runpy, signal, sys
from ijepa_transformers.finetuning.trainer import ClassificationTrainer

original = ClassificationTrainer.training_step

def training_step(self, *arguments, **options):
    if os.environ["RANK"] == "1" and self.state.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *arguments, **options)

ClassificationTrainer.training_step = training_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_if_one_process_gets_a_signal_all_stop_after_the_same_step(gray_pretrained, tmp_path):
    script = tmp_path / "one_gets_a_signal.py"
    script.write_text(ONE_GETS_A_SIGNAL)
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4}
    argv = fine_tuning_argv(gray_pretrained, tmp_path / "two", per_device_train_batch_size=4, **options)
    done = forked.fork_ranks(2, [script, REPOSITORY / "run_image_classification.py", *argv])
    assert done.returncode == PREEMPTED, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("stopped")]
    assert told == ["stopped (another process was asked to) after step 2; --resume_from_checkpoint last continues."]
    assert checkpoints(tmp_path / "two") == ["checkpoint-2"]
    whole = fine_tune(gray_pretrained, tmp_path / "one", **options)
    resumed = fine_tune(gray_pretrained, tmp_path / "two", resume_from_checkpoint="last", **options)
    assert_close_weights(resumed, whole, 1e-6)
