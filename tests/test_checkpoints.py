"""Each file of a checkpoint, damaged in each way: the sentence names it, and the run goes on from the one before."""

import json
import shutil
from pathlib import Path

import pytest

from ijepa_transformers.checkpoints import MANIFEST, damage_of, describe_files, write_manifest
from ijepa_transformers.finetuning import checkpointing as of_fine_tuning
from ijepa_transformers.pretraining import checkpointing as of_pretraining


FIXTURE = Path(__file__).parent / "fixtures" / "run_b85b42c" / "checkpoints" / "step-00000003"
TRAINER_FILES = (
    *("config.json", "model.safetensors", "optimizer.pt", "preprocessor_config.json", "rng_state.pth"),
    *("run_state.json", "scheduler.pt", "trainer_state.json", "training_args.bin"),
)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def seal(checkpoint, step):
    names = [path.name for path in checkpoint.iterdir() if path.name != MANIFEST]
    write_manifest(checkpoint, step, describe_files(checkpoint, names))


def pretraining_checkpoints(place):
    for step in (3, 6):
        shutil.copytree(FIXTURE, place / f"step-{step:08}")
        seal(place / f"step-{step:08}", step)
    return lambda report: of_pretraining.newest_checkpoint(place, report), place / "step-00000006"


def fine_tuning_checkpoints(place):
    for step in (2, 4):
        checkpoint = place / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in TRAINER_FILES:
            (checkpoint / name).write_text(f"{name} of step {step}")
        seal(checkpoint, step)
    return lambda report: of_fine_tuning._wanted_checkpoint(place, "last"), place / "checkpoint-4"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("checkpoints", [pretraining_checkpoints, fine_tuning_checkpoints])
def test_any_damaged_file_is_named_and_the_older_checkpoint_is_used(checkpoints, damage, tmp_path, capsys):
    names = sorted(path.name for path in FIXTURE.iterdir())
    for name in names if checkpoints is pretraining_checkpoints else (*TRAINER_FILES, MANIFEST):
        place = tmp_path / name
        find, newest = checkpoints(place)
        assert find(print) == newest and not capsys.readouterr().err
        DAMAGES[damage](newest / name)
        assert find(print) == min(newest.parent.iterdir())
        told = "".join(capsys.readouterr())
        assert told.count("\n") == 1 and f"{newest} is damaged" in told and "an older one is used" in told
        assert name in told or name == MANIFEST
        older = min(newest.parent.iterdir())
        DAMAGES[damage](older / name)
        with pytest.raises(ValueError, match=r"All 2 checkpoints in .* are damaged, the newest because"):
            find(print)
        shutil.rmtree(older)
        with pytest.raises(ValueError, match=r"The only checkpoint in .* is damaged, because"):
            find(print)


def test_any_changed_byte_of_a_manifest_is_noticed_unless_it_means_the_same(tmp_path):
    checkpoint = tmp_path / "step-00000003"
    shutil.copytree(FIXTURE, checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"")  # hashing it again and again takes time
    (checkpoint / "optimizer.bin").write_bytes(b"")
    seal(checkpoint, 3)
    whole = (checkpoint / MANIFEST).read_bytes()
    for place in range(0, len(whole), 5):
        for bit in (1, 16, 128):
            changed = whole[:place] + bytes((whole[place] ^ bit,)) + whole[place + 1 :]
            (checkpoint / MANIFEST).write_bytes(changed)
            if damage_of(checkpoint, 3) is None:
                assert json.loads(changed) == json.loads(whole)
