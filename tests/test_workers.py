"""Data loading processes are started a few times in a command, whatever its length, and can be spawned.

Where processes are not forked (macOS, Windows), starting one takes seconds, and all that it gets is pickled.
"""

import errno
import multiprocessing
import pickle
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers.data.workers import prepare_worker
from ijepa_transformers.evaluation import command as probing
from ijepa_transformers.evaluation import extraction, statistics
from ijepa_transformers.finetuning import command as finetuning
from ijepa_transformers.preemption import ignore_stop_signals
from tests.runs import fine_tune


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 2)):
        for number in range(count):
            for name in ("cat", "dog"):
                path = tmp_path / "photos" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    return str(tmp_path / "photos")


@pytest.fixture
def started(monkeypatch):
    """The data loading processes that were started. What each of them gets can be pickled."""
    processes, start = [], BaseProcess.start

    def counted(process):
        dataset, *functions = process._args[1], *filter(callable, process._args)
        assert any(function in (prepare_worker, ignore_stop_signals) for function in functions)
        assert pickle.loads(pickle.dumps([dataset, functions]))
        processes.append(process)
        start(process)

    monkeypatch.setattr(BaseProcess, "start", counted)
    yield processes
    assert multiprocessing.active_children() == []


def test_fine_tuning_starts_them_once_for_training_and_once_for_all_evaluations(
    gray_pretrained, photos, tmp_path, started
):
    options = {"data": photos, "images_per_class": None, "validation_split": "validation", "eval_strategy": "epoch"}
    options |= {"max_steps": 4, "per_device_train_batch_size": 4, "dataloader_num_workers": 1}
    fine_tune(gray_pretrained, tmp_path / "output", **options)  # two epochs, two evaluations and that of the end
    assert len(started) == 2


def test_probing_starts_them_once_for_each_pass_over_a_split_and_once_for_all_epochs(
    gray_pretrained, photos, tmp_path, started
):
    argv = ["--models", str(gray_pretrained), "--data", photos, "--probes", "knn", "linear", "--k", "1"]
    argv += ["--augment", "flip", "--epochs", "5", "--no_baselines", "--validation_split", "validation"]
    probing.main([*argv, "--num_workers", "1", "--output_dir", str(tmp_path / "output")])
    assert len(started) == 3  # features of two splits, and the epochs of the heads


def test_statistics_and_extraction_start_them_once(gray_pretrained, photos, tmp_path, started):
    statistics.main(["--data", photos, "--num_channels", "1", "--num_workers", "1"])
    assert len(started) == 1
    argv = ["--model", str(gray_pretrained), "--data", photos, "--num_workers", "1", "--shard_size", "2"]
    extraction.main([*argv, "--output_dir", str(tmp_path / "features")])
    assert len(started) == 2


WORDS = "--data {photos} --num_workers 1 --output_dir {output}"
COMMANDS = {
    "extract": (extraction.main, f"--model {{model}} {WORDS}", "num_workers"),
    "probe": (probing.main, f"--models {{model}} --no_baselines --probes knn --k 1 {WORDS}", "num_workers"),
    "stats": (statistics.main, "--data {photos} --num_channels 1 --num_workers 1", "num_workers"),
    "finetune": (
        finetuning.main,
        "--use_cpu --model {model} --data {photos} --dataloader_num_workers 1 --max_steps 1 --output_dir {output}",
        "dataloader_num_workers",
    ),
}
FAILURES = {
    "ulimit -n 4096": OSError(errno.EMFILE, "Too many open files"),
    "--shm-size 8g": RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)"),
}


@pytest.mark.parametrize("remedy", FAILURES)
@pytest.mark.parametrize("name", COMMANDS)
def test_too_few_files_or_too_little_shared_memory_is_one_sentence_with_the_remedy(
    name, remedy, gray_pretrained, photos, tmp_path, monkeypatch, capsys
):
    def fails(process):
        raise FAILURES[remedy]

    monkeypatch.setattr(BaseProcess, "start", fails)
    main, words, argument = COMMANDS[name]
    with pytest.raises(SystemExit) as stopped:
        main(words.format(model=gray_pretrained, photos=photos, output=tmp_path / "output").split())
    told = capsys.readouterr().err
    sentence = told.strip().splitlines()[-1]
    assert stopped.value.code in (1, 2) and "Traceback" not in told
    assert sentence.startswith(f"ijepa {name}: error: ") and remedy in sentence and f"lower {argument}" in sentence
