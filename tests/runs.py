"""Runs that several test files start: pretraining and fine-tuning in this process, pretraining under a launch mode.

Sizes are the smallest at which a law can be seen: digits of 16 pixels, two layers of 16, six steps.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from ijepa_transformers import IJepaConfig, IJepaForPretraining
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.finetuning import command as finetuning_command
from ijepa_transformers.modeling_ijepa import remove_weights, weight_files
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining import loop
from tests import forked


REPOSITORY = Path(__file__).resolve().parent.parent

TINY = {
    "data": "digits",
    "num_channels": 1,
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "predictor_hidden_size": 8,
    "predictor_num_hidden_layers": 1,
    "min_patches": 2,
    "batch_size": 8,
    "per_device_batch_size": 8,
    "max_steps": 6,
    "warmup_steps": 2,
    "num_workers": 0,
    "logging_steps": 2,
    "save_steps": 3,
    "mixed_precision": "no",
}


def reset_accelerate() -> None:
    """Accelerate keeps its state for the whole process; a run starts without one."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# Pretraining in this process


def saved_weights(directory) -> dict[str, torch.Tensor]:
    """All weights of a model's directory, from one file or several."""
    return {key: value for path in weight_files(Path(directory)) for key, value in load_file(path).items()}


def pretraining_argv(output_dir, **changes) -> list[str]:
    """The command-line arguments of a tiny run; a value of None leaves the flag out."""
    result = []
    for key, value in {**TINY, "output_dir": output_dir, **changes}.items():
        if value is not None:
            result += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return result


def pretrain(output_dir, **changes) -> dict[str, torch.Tensor]:
    """The weights that a tiny run leaves."""
    reset_accelerate()
    pretraining_command.main(pretraining_argv(output_dir, **changes))
    return saved_weights(output_dir)


def rows(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def without_speed(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in metrics]


def status(output_dir) -> str:
    return json.loads((output_dir / "run_status.json").read_text())["status"]


def assert_equal_weights(ours, others) -> None:
    assert set(ours) == set(others)
    for name in ours:
        assert torch.equal(ours[name], others[name]), name


def assert_close_weights(ours, others, tolerance) -> None:
    assert set(ours) == set(others)
    for name in ours:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], others[name], atol=tolerance, rtol=0, msg=name)


def send_in_step(monkeypatch, step, number) -> None:
    """Sends this process a signal at the start of a step (from 0)."""
    original = loop.optimizer_step

    def optimizer_step(run, batches, now):
        if now == step:
            os.kill(os.getpid(), number)
        return original(run, batches, now)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)


def blind_to_brightness(model: IJepaForPretraining) -> IJepaForPretraining:
    """Changes the target encoder in place: its features are spread out, but do not depend on the mean of a patch."""
    weight = model.ijepa.embeddings.patch_embeddings.projection.weight.data
    weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
    weight *= 100  # otherwise the position embeddings, which are the same in all images, would hide the rest
    return model


# Pretraining under a launch mode, two processes on the CPU


CONFIGURATIONS = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "zero1": "deepspeed_zero1",
    "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs pip install deepspeed")
LAUNCHED_RUN = {
    **{name: value for name, value in TINY.items() if name != "mixed_precision"},  # the launcher's
    "per_device_batch_size": 2,  # two accumulation steps of two processes, four of one
    "predictor_num_hidden_layers": 2,  # one that computes all tokens, and the last
    "momentum": 0.9,
    "logging_steps": 1,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.5,
    "drop_path_rate": 0.2,
    "validation_split": "test",
    "max_probe_images": 60,
}


def launch_flags(mode, num_processes, precision) -> list[str]:
    """The flags of `accelerate launch`."""
    configuration = str(REPOSITORY / f"ijepa_transformers/recipes/accelerate/{CONFIGURATIONS[mode]}.yaml")
    flags = ["--config_file", configuration, "--num_processes", str(num_processes)]
    return [*flags, "--mixed_precision", precision]


def environment_of(mode) -> dict[str, str]:
    """What the tests add to the environment of a launcher: the CPU instead of GPUs."""
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
    if mode is None or not mode.startswith("zero"):
        environment["ACCELERATE_USE_CPU"] = "true"
    # Not the user's directory: a build that was killed leaves a lock there, for which every later one waits.
    environment["TORCH_EXTENSIONS_DIR"] = f"{tempfile.gettempdir()}/ijepa_extensions_{os.getpid()}"
    return environment


def launched_environment(mode, num_processes=2, precision="no") -> dict[str, str]:
    """What Accelerate's launcher adds to the environment of its processes, but for the process group."""
    flags = [*launch_flags(mode, num_processes, precision), "--main_process_port", "0", "script.py"]
    arguments, configuration, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    if mode.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(configuration.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def launched_argv(mode, output_dir, precision, changes) -> list[str]:
    """tests/launched.py with its arguments."""
    watched = [str(output_dir / "watched"), changes.pop("watch_nan", "never")]
    values = {**LAUNCHED_RUN, "output_dir": output_dir / "run", **changes}
    values |= {} if mode else {"mixed_precision": precision}
    flags = [f"--{key}={value}" for key, value in values.items() if value != ""]
    return [str(REPOSITORY / "tests/launched.py"), *watched, *flags]


def start_launch(mode, output_dir, num_processes=2, precision="no", **changes) -> forked.Processes:
    """tests/launched.py in forked processes, as `accelerate launch --config_file recipes/accelerate/...` runs it; a
    mode of None is Python alone."""
    argv, environment = launched_argv(mode, output_dir, precision, changes), environment_of(mode)
    if mode is None:
        return forked.start(argv, environment=environment)
    environment |= launched_environment(mode, num_processes, precision)
    kind = "deepspeed" if mode.startswith("zero") else "ours"
    return forked.start_ranks(num_processes, argv, environment, kind=kind)


def launch(mode, output_dir, num_processes=2, precision="no", check=True, **changes):
    """`start_launch` to the end."""
    done = start_launch(mode, output_dir, num_processes, precision, **changes).completed(timeout=400)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def real_launch_command(mode, output_dir, num_processes=2, precision="no", **changes) -> list[str]:
    """The command of `accelerate launch`, or of Python alone."""
    argv = launched_argv(mode, output_dir, precision, changes)
    if mode is None:
        return [sys.executable, *argv]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*launcher, *launch_flags(mode, num_processes, precision), *argv]


def launch_for_real(mode, output_dir, *, check=True, **options):
    """`accelerate launch` itself."""
    command = real_launch_command(mode, output_dir, **options)
    environment = {**os.environ, **environment_of(mode)}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=400)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def launched_weights(output_dir) -> dict[str, torch.Tensor]:
    return saved_weights(output_dir / "run")


def launched_ranks(output_dir) -> list[dict]:
    """What every process of a launch has recorded."""
    return [json.loads(file.read_text()) for file in sorted((output_dir / "watched").glob("rank_*.json"))]


def cut_back(source, directory, step=3):
    """A copy of a launched run as it was when a process was killed after `step` steps."""
    shutil.copytree(source / "run", directory / "run")
    for checkpoint in (directory / "run/checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    remove_weights(directory / "run")
    return directory


# Fine-tuning in this process


TINY_FINE_TUNING = {
    "data": "digits",
    "images_per_class": 3,
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def fine_tuning_argv(directory, output_dir, /, **changes) -> list[str]:
    """The command-line arguments of a tiny run; a value of None leaves the flag out."""
    result = ["--use_cpu"]
    for key, value in {**TINY_FINE_TUNING, "model": directory, "output_dir": output_dir, **changes}.items():
        if value is not None:
            result += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return result


def fine_tune(directory, output_dir, **changes) -> dict[str, torch.Tensor]:
    """The weights that a tiny run leaves."""
    reset_accelerate()
    finetuning_command.main(fine_tuning_argv(directory, output_dir, **changes))
    return load_file(Path(output_dir) / "model.safetensors")


def save_pretrained_model(path, num_channels):
    """A pretraining directory for images of 16 pixels, whose two encoders differ."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    predictor = {"predictor_hidden_size": 8, "predictor_num_hidden_layers": 1}
    images = {"num_channels": num_channels, "image_size": 16, "patch_size": 4, "patch_embedding_init": "fan_in"}
    model = IJepaForPretraining(IJepaConfig(**settings, **predictor, **images))
    for parameter in model.context_encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    build_image_processor(16, num_channels=num_channels, resize_ratio=1.0).save_pretrained(path)
    return path
