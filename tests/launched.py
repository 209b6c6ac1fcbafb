"""What tests/runs.py launches in place of run_pretraining.py: the same script, watched.

    accelerate launch ... tests/launched.py WATCHED_DIR never [arguments of run_pretraining.py]
    accelerate launch ... tests/launched.py WATCHED_DIR 1:3 [arguments of run_pretraining.py]

With 1:3 the losses of process 1 are NaN in step 3 (from 0), with 1:save its disk is full. Every process leaves
WATCHED_DIR/rank_N.json: the number of processes, the mode, what the launcher has set, a digest of all weights, whole,
and which images it saw in which step. On a machine without accelerators, Accelerate keeps FSDP away from the CPU,
although torch has it there; here it is let through.
"""

import functools
import hashlib
import json
import os
import sys
from importlib import import_module
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate.state import DistributedType, PartialState

from ijepa_transformers import modeling_ijepa, optimization
from ijepa_transformers.pretraining import command as pretraining_command
from ijepa_transformers.pretraining import exporting, loop


LAUNCHERS = ("ACCELERATE_", "FSDP_")  # variables by which `accelerate launch` tells its processes the mode


def let_fsdp_through():
    state = PartialState(cpu=True)
    if not torch.distributed.is_initialized():  # a single process, for which Accelerate opens no group
        torch.distributed.init_process_group("gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.nn.functional.layer_norm = functools.partial(layer_norm_as_on_a_gpu, torch.nn.functional.layer_norm)
    return state


def layer_norm_as_on_a_gpu(layer_norm, tokens, shape, *weights_and_eps):
    """Autocast on a GPU computes norms in float32, also with weights that FSDP2 has gathered in bfloat16. On a CPU it
    leaves them alone, and PyTorch has no norm of float32 tokens with weights in bfloat16."""
    *weights, eps = weights_and_eps or (1e-5,)
    return layer_norm(tokens, shape, *(weight.to(tokens.dtype) for weight in weights), eps=eps)


def leave_out_the_operator():
    """DeepSpeed compiles an operator by which processes on CPUs talk, for a minute. Gloo does that too."""
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # `deepspeed.comm.torch` may also be PyTorch


def whole(parameter):
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def digest(networks):
    result = hashlib.sha256()
    for name, parameter in networks.named_parameters():
        result.update(name.encode() + whole(parameter).cpu().numpy().tobytes())
    for name, buffer in networks.named_buffers():
        result.update(name.encode() + buffer.cpu().numpy().tobytes())
    return result.hexdigest()


def watch(directory):
    seen, step, close = [], loop.optimizer_step, pretraining_command.close

    def watched_step(run, batches, number):
        result = step(run, batches, number)
        seen.extend((number, name) for batch in result.batches for name in run.data.names(batch))
        return result

    def watched_close(run, others):
        accelerator = run.accelerator
        record = {"num_processes": accelerator.num_processes, "mode": run.launch.mode, "seen": seen}
        record |= {"weights": digest(run.networks), "accumulation": accelerator.gradient_accumulation_steps}
        record["environment"] = {name: os.environ[name] for name in os.environ if name.startswith(LAUNCHERS)}
        (directory / f"rank_{accelerator.process_index}.json").write_text(json.dumps(record))
        close(run, others)

    loop.optimizer_step, pretraining_command.close = watched_step, watched_close
    exporting.plot_training_curves = lambda rows, path, **_: Path(path).touch()  # takes longer than the run


def spoil(rank, step):
    """Makes the losses of one process NaN in one step."""
    loss, apply, now = modeling_ijepa.IJepaForPretraining.prediction_loss, optimization.Schedules.apply, []

    def watched_apply(self, optimizer, number):
        now[:] = [number]
        apply(self, optimizer, number)

    def spoiled_loss(self, predictions, targets):
        bad = now == [step] and PartialState().process_index == rank
        return loss(self, predictions * float("nan") if bad else predictions, targets)

    optimization.Schedules.apply = watched_apply
    modeling_ijepa.IJepaForPretraining.prediction_loss = spoiled_loss


def fail_to_save(rank):
    """Lets the disk of one process be full."""
    save = torch.save

    def full(*arguments, **options):
        if PartialState().process_index == rank:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    torch.save = full


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(exist_ok=True, parents=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.accelerator.is_available():
        let_fsdp_through()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available():
        leave_out_the_operator()
    watch(directory)
    if sys.argv[2] != "never":
        rank, step = sys.argv[2].split(":")
        fail_to_save(int(rank)) if step == "save" else spoil(int(rank), int(step))
    pretraining_command.main(sys.argv[3:])
