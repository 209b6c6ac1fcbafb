# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Settings of a command's own process: how it waits for its threads, how it keeps its memory, and which libraries are
quiet.

Only commands call this. A library does not change the process that imports it.
"""

import ctypes
import logging
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version


WAIT_POLICY = "OMP_WAIT_POLICY"
GPU_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # PyTorch 2.9 and newer warns of the first
# The variables that glibc reads, and our values in bytes. mallopt, which sets them in a process that runs, has numbers
# for them (malloc.h).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1, "MALLOC_TOP_PAD_": 2**26}
VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
# Where warnings come from that a user of our commands cannot act on: kernels that are not used, accelerators that are
# not there (torch.compile tells of CUDA's compiler if there is no GPU), a list of fonts that is made once. A filter
# holds for the logger of this name, not for those below it.
QUIET_LOGGERS = (
    *("DeepSpeed", "bitsandbytes.backends.cpu.ops", "bitsandbytes.cextension", "accelerate.utils.other"),
    *("matplotlib.font_manager", "torch.utils.cpp_extension"),
)
SYSTEM_ALLOCATOR = "MALLOC_TOP_PAD_=131072"  # glibc's own value: set by the user it keeps ours away
_keeps_memory = False  # by `keep_freed_memory`
_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2}


def prepare_process() -> None:
    """Makes computing faster; results do not change. Call it before torch is imported.

    - Threads sleep while they wait for each other. By default they spin. On a machine that is shared with other
      programs, spinning takes the time that the awaited thread needs: steps were ten times as long.
    - glibc keeps freed memory for the next step. By default it gives large blocks back to the system at once.
    - On CUDA GPUs, under Linux, blocks of memory can grow. Otherwise masks of changing lengths leave gaps, until
      memory is short and a step waits for cleaning up.

    Warnings of other libraries are hidden, because they are about code that users do not write. Errors stay.

    What the user set stays: the variables OMP_WAIT_POLICY, GOMP_SPINCOUNT, MALLOC_* or GLIBC_TUNABLES,
    PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF, PYTHONWARNINGS, TRANSFORMERS_VERBOSITY, DATASETS_VERBOSITY and
    HF_HUB_VERBOSITY.
    """
    hide_warnings_of_others()
    if sys.platform == "linux" and not any(variable in os.environ for variable in GPU_ALLOCATORS):
        os.environ[GPU_ALLOCATORS[_torch_version() >= (2, 9)]] = "expandable_segments:True"
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault(WAIT_POLICY, "passive")
    if not _has_glibc() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if not any(variable in os.environ for variable in MALLOC):
        keep_freed_memory()


def hide_warnings_of_others() -> None:
    """Sets the libraries that have a level of their own to errors only, and hides Python's warnings."""
    for variable in VERBOSITY:
        os.environ.setdefault(variable, "error")  # read when the library is imported, also by child processes
    for name in QUIET_LOGGERS:
        logging.getLogger(name).addFilter(_is_error)  # a filter, because some of them set their level themselves
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def keep_freed_memory() -> bool:
    """Tells glibc to keep blocks of up to 1 GiB when they are freed. Returns whether it did."""
    global _keeps_memory
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    accepted = [mallopt(_MALLOPT[variable], value) == 1 for variable, value in MALLOC.items()]  # all are tried
    _keeps_memory = all(accepted)
    return _keeps_memory


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` was called in this process, and did it."""
    return _keeps_memory


def _torch_version() -> tuple[int, ...]:
    """Major and minor number, without importing torch."""
    try:
        return tuple(int(number) for number in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return (0, 0)


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
