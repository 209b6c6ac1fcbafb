"""The k-NN of a run: several processes embed a share of the images each, and the result is that of one process."""

import pytest
import torch

from ijepa_transformers.pretraining.evaluate import _in_turns
from tests import forked
from tests.runs import environment_of, launched_environment, pretraining_argv


# Leaves OUTPUT/rank_N.pt: the features of the main process, how many images this process embedded, its accuracy, and
# what it raises when only the last process is asked to stop, and when only its encoder has diverged.
PROGRAM = """
import sys
from pathlib import Path

import torch

from ijepa_transformers.failures import DivergedError
from ijepa_transformers.pretraining import evaluate
from ijepa_transformers.pretraining.arguments import parse_pretraining_arguments
from ijepa_transformers.pretraining.build import build_run
from ijepa_transformers.pretraining.checkpointing import DirectoryLock
from ijepa_transformers.preemption import Preempted, StopRequest

output, *argv = sys.argv[1:]
stop, embedded, original = StopRequest(), [], evaluate.Embedding.__call__


def watched(self, pixel_values):
    embedded.append(len(pixel_values))
    return original(self, pixel_values)


evaluate.Embedding.__call__ = watched
run = build_run(parse_pretraining_arguments(argv), DirectoryLock(Path(output)), stop)
rank, is_last = run.accelerator.process_index, run.accelerator.process_index == run.accelerator.num_processes - 1
encoder = evaluate.random_encoder(run)
record = {"features": run.probe.features_of(encoder), "embedded": sum(embedded), "raised": []}
record["accuracy"] = run.probe.knn(encoder)
if is_last:
    encoder.layernorm.weight.data[0] = float("nan")
for name in ("diverged", "stopped"):
    stop.reason = "a signal" if is_last and name == "stopped" else None
    try:
        run.probe.knn(encoder)
    except (Preempted, DivergedError) as error:
        record["raised"].append(type(error).__name__)
torch.save(record, Path(output) / f"rank_{rank}.pt")
run.accelerator.end_training()
"""


def records(directory, num_processes, **changes):
    """What each process has recorded."""
    changes = {"batch_size": 24, "per_device_batch_size": 4, "validation_split": "test", **changes}
    argv = ["-c", PROGRAM, directory, *pretraining_argv(directory / "run", **changes)]
    environment = environment_of("ddp")
    if num_processes == 1:
        done = forked.run(argv, environment=environment)
    else:
        launched = launched_environment("ddp", num_processes)
        done = forked.fork_ranks(num_processes, argv, environment | launched)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(directory / f"rank_{rank}.pt") for rank in range(num_processes)]


@pytest.mark.parametrize(("num_processes", "num_images", "shares"), [(2, 11, [11, 11]), (3, 4, [4, 4, 0])])
def test_processes_share_the_images_and_the_features_are_those_of_one(tmp_path, num_processes, num_images, shares):
    """Also where a process has no batch at all."""
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    (alone,) = records(tmp_path / "alone", 1, max_probe_images=num_images)
    together = records(tmp_path / "together", num_processes, max_probe_images=num_images)
    assert alone["embedded"] == 2 * num_images and [record["embedded"] for record in together] == shares
    for ours, others in zip(together[0]["features"], alone["features"], strict=True):
        assert torch.equal(ours, others)
    assert together[0]["accuracy"] == alone["accuracy"]
    assert all(record["features"] is record["accuracy"] is None for record in together[1:])
    if shares[-1]:
        assert all(record["raised"] == ["DivergedError", "Preempted"] for record in [alone, *together])


def test_batches_of_shares_of_any_length_get_their_places_back():
    batches = [torch.full((2,), number) for number in range(5)]
    for count in (1, 2, 3, 7):
        assert torch.equal(_in_turns([batches[rank::count] for rank in range(count)]), torch.cat(batches))
