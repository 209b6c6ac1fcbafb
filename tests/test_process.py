"""What a command sets for its own process, and what it leaves to the user. Each test asks a fresh Python."""

import subprocess
import sys

import pytest


SHOW = """
import os
from ijepa_transformers import process
kept = []
process.keep_freed_memory = lambda: kept.append(True)
process._has_glibc = lambda: GLIBC
process.prepare_process()
growing = [os.environ.get(name, "").count("expandable") for name in process.GPU_ALLOCATORS]
print(os.environ.get("OMP_WAIT_POLICY"), bool(kept), "torch" in __import__("sys").modules, *growing)
"""


def shown(glibc=True, **variables):
    """Waiting policy, whether freed memory is kept, whether torch was imported, and whether the GPU memory's blocks
    grow by each of the two variables."""
    code = SHOW.replace("GLIBC", str(glibc))
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


def test_threads_sleep_while_they_wait_and_freed_memory_is_kept_without_importing_torch():
    assert shown()[:3] == ["passive", "True", "False"]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"OMP_WAIT_POLICY": "active"}, ["active", "True"]),
        ({"GOMP_SPINCOUNT": "1000"}, ["None", "True"]),
        ({"MALLOC_TOP_PAD_": "0"}, ["passive", "False"]),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=4096"}, ["passive", "False"]),
    ],
)
def test_what_the_user_set_stays(variables, expected):
    assert shown(**variables)[:2] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has it on Linux only")
def test_blocks_of_gpu_memory_grow_unless_the_user_chose():
    assert sorted(shown()[3:]) == ["0", "1"]
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert shown(**{variable: "backend:native"})[3:] == ["0", "0"]


def test_other_c_libraries_keep_their_own_memory():
    assert shown(glibc=False)[:2] == ["passive", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt belongs to glibc")
def test_a_freed_block_of_many_megabytes_is_used_again_without_new_pages():
    code = """
import ctypes, resource
from ijepa_transformers.process import keep_freed_memory, keeps_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults(size=64 * 2**20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = [faults() for _ in range(3)][-1]
before = keeps_freed_memory()
print(usual, keep_freed_memory(), [faults() for _ in range(3)][-1], before, keeps_freed_memory())
"""
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    usual, kept, after, *said = done.stdout.split()
    assert said == ["False", kept]
    if kept != "True":
        pytest.skip("this C library has no mallopt")
    assert int(usual) > 1000 and int(after) < 100


HIDE = """
import logging, os, warnings
from ijepa_transformers.process import hide_warnings_of_others
hide_warnings_of_others()
for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed", "torch.utils.cpp_extension"):
    logging.getLogger(name).warning("of a kernel")
    logging.getLogger(name).error("of %s", name)
logging.getLogger("ijepa_transformers.modeling_ijepa").warning("ours")
warnings.warn("of Python")
print(os.environ["TRANSFORMERS_VERBOSITY"])
"""


@pytest.mark.parametrize("variables, level", [({}, "error"), ({"TRANSFORMERS_VERBOSITY": "info"}, "info")])
def test_warnings_of_others_are_hidden_and_errors_and_ours_are_not(variables, level):
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), **variables}
    done = subprocess.run([sys.executable, "-c", HIDE], capture_output=True, text=True, check=True, env=environment)
    others = ["of bitsandbytes.backends.cpu.ops", "of DeepSpeed", "of torch.utils.cpp_extension"]
    assert done.stderr.split("\n") == [*others, "ours", ""]
    assert done.stdout == f"{level}\n"


def test_warnings_that_the_user_asks_for_are_shown():
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-c", HIDE], capture_output=True, text=True, check=True, env=environment)
    assert "UserWarning: of Python" in done.stderr
