"""Runs commands as forks of a server that has everything imported: a command takes a second, not ten.

    done = run(["run_pretraining.py", "--data", "digits"])    as subprocess.run([sys.executable, ...]) with its output
    process = start(["run_probing.py", ...])                  as subprocess.Popen: poll, wait, send_signal, kill
    done = fork_ranks(2, ["run_pretraining.py", ...], launch_environment("ddp", 2))
                                                              as `accelerate launch` does it, without the launcher

The server is a process of its own, started on first use and ended with the tests. It imports modules and never
computes, because a fork of a process whose libraries have started threads hangs. A forked command differs from a real
one before `main()` only: tests of imports, of isolation and of the launcher itself start a real process.
"""

import atexit
import gc
import json
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
# What the server of a kind has imported. "stock" has nothing of ours.
ROOMS = "ijepa_transformers."
COMMANDS = [ROOMS + name for name in ("cli", "pretraining.command", "finetuning.command", "evaluation.command")]
COMMANDS += [ROOMS + name for name in ("evaluation.extraction", "visualization.command")]
ROOM = ROOMS + "conversion."
CONVERSIONS = [ROOM + "convert", ROOM + "export", ROOM + "onnx", ROOM + "directory"]
PRELOADED = {
    "ours": [*COMMANDS, *CONVERSIONS, "matplotlib.pyplot"],
    "deepspeed": [ROOMS + "cli", ROOMS + "pretraining.command", "deepspeed"],
    "stock": ["torch", "transformers.models.ijepa.modeling_ijepa", "safetensors.torch", "PIL.Image"],
}
# Read when a library is imported, so before a command's own environment is known.
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # the other check would start CUDA, which no fork survives
}
# Seconds after the failure of one process until the others are told to end, and until they are killed.
GRACE, PATIENCE = 3, 30


# The tests' side


class Processes:
    """One command in one or several forked processes, which are a process group."""

    def __init__(self, server: "Server", request: dict):
        self.directory = tempfile.TemporaryDirectory(prefix="ijepa_forked_")
        files = {name: f"{self.directory.name}/{name}" for name in ("stdout", "stderr")}
        for file in files.values():
            Path(file).touch()
        self.server, self.argv = server, request["argv"]
        self.pids: list[int] = server.ask(request | files)
        self.codes: list[int | None] = [None] * len(self.pids)

    @property
    def pid(self) -> int:
        return self.pids[0]

    @property
    def stdout(self) -> str:
        return Path(self.directory.name, "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return Path(self.directory.name, "stderr").read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        """None while a process runs, then the first code that is not 0; negative for a signal."""
        if None in self.codes:
            return None
        return next((code for code in self.codes if code), 0)

    def poll(self) -> int | None:
        running = [pid for pid, code in zip(self.pids, self.codes, strict=True) if code is None]
        ended = dict(zip(running, self.server.ask({"poll": running}), strict=True)) if running else {}
        self.codes = [ended.get(pid, code) for pid, code in zip(self.pids, self.codes, strict=True)]
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Waits for all processes. If one fails, the others are told to end, and killed at last, as a launcher does.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds; the group has been killed.
        """
        began, failed_at, told = time.monotonic(), None, False
        while self.poll() is None:
            now = time.monotonic()
            failed_at = now if failed_at is None and any(self.codes) else failed_at
            if failed_at is not None and now > failed_at + GRACE and not told:
                self.send_signal(signal.SIGTERM)
                told = True
            if now > began + timeout or (failed_at is not None and now > failed_at + PATIENCE):
                self.kill()
            if now > began + timeout:
                raise subprocess.TimeoutExpired(self.argv, timeout, self.stdout, self.stderr)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To every process that runs, but not to data-loading processes."""
        for pid, code in zip(self.pids, self.codes, strict=True):
            if code is None:
                os.kill(pid, number)

    def kill(self) -> None:
        """Ends the group, with its data-loading processes, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def completed(self, timeout: float = 300) -> subprocess.CompletedProcess:
        code = self.wait(timeout)
        return subprocess.CompletedProcess(self.argv, code, self.stdout, self.stderr)


class Server:
    """The process that forks on request."""

    def __init__(self, kind: str):
        ours, its = socket.socketpair()
        command = [sys.executable, __file__, str(its.fileno()), *PRELOADED[kind]]
        self.modules = tempfile.TemporaryDirectory(prefix="ijepa_modules_")  # where code beside weights is copied to
        environment = {**os.environ, **SERVER_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
        environment["HF_MODULES_CACHE"] = self.modules.name
        self.process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, pass_fds=[its.fileno()], start_new_session=True
        )
        its.close()
        self.socket, self.stream = ours, ours.makefile("rw")
        atexit.register(self.close)

    def ask(self, request: dict):
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        answer = self.stream.readline()
        assert answer, "the server of forked processes has ended"
        return json.loads(answer)

    def close(self) -> None:
        self.stream.close()
        self.socket.close()
        self.process.wait()


@cache
def server(kind: str) -> Server:
    return Server(kind)


def start(
    argv: list,
    *,
    count: int = 1,
    environment: dict[str, str] | None = None,
    cwd: Path = REPOSITORY,
    file_size_limit: int | None = None,
    kind: str = "ours",
) -> Processes:
    """`python *argv` in `count` forked processes; `argv` may begin with "-c" or "-m".

    Args:
        environment: added to that of the tests.
        file_size_limit: bytes, after which a process cannot go on with a file: a full disk.
        kind: what the processes have imported, a key of `PRELOADED`.
    """
    request = {"argv": [str(each) for each in argv], "count": count, "cwd": str(cwd), "limit": file_size_limit}
    request["environment"] = {**os.environ, **SERVER_ENVIRONMENT, **(environment or {})}
    return Processes(server(kind), request)


def run(argv: list, *, timeout: float = 300, check: bool = False, **options) -> subprocess.CompletedProcess:
    """Starts `python *argv` and waits for its end; see `start`."""
    done = start(argv, **options).completed(timeout)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def start_ranks(count: int, argv: list, environment: dict[str, str] | None = None, **options) -> Processes:
    """`start` in `count` processes of one process group in PyTorch's sense."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return start(argv, count=count, environment={**group, "MASTER_PORT": str(port), **(environment or {})}, **options)


def fork_ranks(
    count: int, argv: list, environment: dict[str, str] | None = None, *, timeout: float = 300, **options
) -> subprocess.CompletedProcess:
    """`start_ranks` to the end; the exit code is 0 if all processes have ended with 0."""
    return start_ranks(count, argv, environment, **options).completed(timeout)


# The server's side


def serve(connection: socket.socket, modules: list[str]) -> dict | None:
    """Answers requests until the tests hang up. Returns a command in a forked process, None in the server."""
    for name in modules:
        import_module(name)
    gc.collect()
    gc.freeze()  # or the first collection in a fork would copy all of the memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups, stream = {}, connection.makefile("rw")  # the group of every process that runs
    for line in stream:
        request = json.loads(line)
        if "poll" in request:
            answer = [exit_code(pid) for pid in request["poll"]]
            ended = {pid for pid, code in zip(request["poll"], answer, strict=True) if code is not None}
            groups = {pid: group for pid, group in groups.items() if pid not in ended}
        else:
            answer = []
            for rank in range(request["count"]):
                pid = os.fork()
                if pid == 0:
                    stream.close()
                    connection.close()
                    return request | {"rank": rank, "group": answer[0] if answer else 0}
                answer.append(pid)
                with suppress(OSError):  # the child does the same, whoever is first
                    os.setpgid(pid, answer[0])
            groups |= dict.fromkeys(answer, answer[0])
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
    for group in set(groups.values()):
        with suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    return None


def exit_code(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def become(command: dict) -> None:
    """Gives a forked process the surroundings of a process that was started with the command."""
    import numpy

    os.setpgid(0, command["group"])
    os.environ.clear()
    os.environ.update(command["environment"])
    if "WORLD_SIZE" in os.environ:
        os.environ.update(RANK=str(command["rank"]), LOCAL_RANK=str(command["rank"]))
    os.chdir(command["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["limit"], command["limit"]))
    random.seed()
    numpy.random.seed()


def execute(argv: list[str]) -> None:
    """What the interpreter does with its arguments."""
    first, *rest = argv
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def code_of(argv: list[str]) -> int:
    """Executes a command, with what the interpreter says about its end."""
    try:
        execute(argv)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code: int) -> None:
    """The interpreter's end, but for its last part: to free every object takes a second, and nobody needs it."""
    with suppress(KeyboardInterrupt):
        threading._shutdown()  # waits for threads
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command = serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    if command is not None:
        become(command)
        end(code_of(command["argv"]))
