"""`pretrain`, `finetune`, `probe` and `extract_features` as functions: results, errors, and the process afterwards."""

import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from ijepa_transformers import extract_features, finetune, pretrain, probe
from ijepa_transformers.preemption import STOP_SIGNALS
from tests.runs import TINY, assert_equal_weights, saved_weights


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def process_state():
    """What a run could leave behind in its process."""
    return {
        "signals": [signal.getsignal(number) for number in STOP_SIGNALS],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "precision": torch.get_float32_matmul_precision(),
        "bars": (transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()),
        "environment": dict(os.environ),
        "accelerate": dict(PartialState._shared_state),
        "group": torch.distributed.is_initialized(),
        "folder": os.getcwd(),
    }


def test_pretrain_can_be_called_twice_and_leaves_the_process_as_it_was(tmp_path):
    before = process_state()
    first = pretrain(**TINY, output_dir=tmp_path / "first", validation_split="test", max_probe_images=50)
    assert process_state() == before
    torch.manual_seed(1)  # nothing that the caller does may matter
    second = pretrain(**{**TINY, "mixed_precision": "bf16"}, output_dir=tmp_path / "bf16")
    third = pretrain(**TINY, output_dir=tmp_path / "third")
    assert first.directory == tmp_path / "first" and (first.directory / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (first.directory / "metrics.jsonl").read_text().splitlines()]
    assert first.metrics == rows[-1] and first.metrics["step"] == TINY["max_steps"]
    assert "I-JEPA target encoder" in first.table and third.table is None
    assert second.metrics["loss"] != third.metrics["loss"] == first.metrics["loss"]
    assert_equal_weights(*(saved_weights(result.directory) for result in (first, third)))
    with pytest.raises(AttributeError):
        first.table = ""


def test_processes_of_the_caller_live_on(tmp_path):
    before = multiprocessing.active_children()  # an earlier test's workers may still be on their way out
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        pretrain(**{**TINY, "num_workers": 1}, output_dir=tmp_path / "run")
        after = multiprocessing.active_children()
        assert other in after and set(after) <= {*before, other}
    finally:
        other.kill()
        other.join()


def test_mistakes_of_a_run_are_exceptions_and_its_directory_is_free_again(tmp_path):
    before = process_state()
    with pytest.raises(TypeError, match=r"pretrain\(\) has no argument 'max_step'. Did you mean max_steps\?"):
        pretrain(**TINY, max_step=3)
    with pytest.raises(ValueError, match="loss_type must be one of smooth_l1, mse, got 'l1'"):
        pretrain(**TINY, output_dir=tmp_path / "run", loss_type="l1")
    pretrain(**TINY, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(**TINY, output_dir=tmp_path / "run")
    resumed = pretrain(**TINY, output_dir=tmp_path / "run", resume=True)
    assert resumed.metrics["step"] == TINY["max_steps"] and process_state() == before


def test_the_memory_estimate_is_a_table_and_trains_nothing(tmp_path):
    result = pretrain(**TINY, output_dir=tmp_path / "run", print_memory_estimate=True)
    assert "GiB" in result.table and not (tmp_path / "run").exists()


def test_the_other_functions_return_what_their_files_hold(gray_pretrained, tmp_path):
    before = process_state()
    features = extract_features(model=gray_pretrained, data="digits", split="test", output_dir=tmp_path / "features")
    assert features.metrics == json.loads((tmp_path / "features" / "manifest.json").read_text())
    probed = probe(
        models=[f"ours={gray_pretrained}"],
        data="digits",
        validation_split="test",
        probes=["knn"],
        k=[5],
        max_images=60,
        num_workers=0,
        output_dir=tmp_path / "probes",
    )
    results = json.loads((tmp_path / "probes" / "results.json").read_text())
    assert probed.metrics == {row["name"]: row["summary"] for row in results["rows"]}
    assert "| ours " in probed.table and results["command"].startswith("probe(models=['ours=")
    tuned = finetune(
        model=gray_pretrained,
        data="digits",
        validation_split="test",
        images_per_class=2,
        max_steps=2,
        per_device_train_batch_size=4,
        dataloader_num_workers=0,
        report_to="none",
        output_dir=tmp_path / "classifier",
    )
    assert tuned.directory == tmp_path / "classifier" and load_file(tuned.directory / "model.safetensors")
    assert tuned.metrics["train_loss"] >= 0 and 0 <= tuned.metrics["eval_accuracy"] <= 1
    with pytest.raises(TypeError, match=r"finetune\(\) has no argument 'learning_rat'. Did you mean learning_rate\?"):
        finetune(model=gray_pretrained, learning_rat=1)
    assert process_state() == before


def test_pretraining_outside_the_main_thread_is_refused_in_one_sentence(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        attempt = pool.submit(pretrain, recipe="quickstart", output_dir=tmp_path / "run")
        with pytest.raises(ValueError, match="must be called in the main thread"):
            attempt.result()
    assert not (tmp_path / "run").exists()
