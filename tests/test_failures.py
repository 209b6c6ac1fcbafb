"""How commands end: with one sentence, without their child processes, also if the terminal is closed or the disk is
full."""

import argparse
import errno
import io
import multiprocessing
import multiprocessing.queues
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ijepa_transformers import cli
from ijepa_transformers.conversion import command_line
from ijepa_transformers.data.notices import counted
from ijepa_transformers.data.workers import prepare_worker
from ijepa_transformers.failures import end, explain, failures_told
from ijepa_transformers.files import (
    check_output_directory,
    check_page,
    refuse_among_images,
    write_text,
    written_aside,
)
from ijepa_transformers.terminal import LastingStream, lasting_output
from tests.runs import fine_tune, pretrain, send_in_step, status


# The terminal


@pytest.fixture
def closed_terminal():
    """A stream to a terminal whose window was closed."""
    window, terminal = os.openpty()
    os.close(window)
    stream = open(terminal, "w")  # noqa: SIM115
    with pytest.raises(OSError, match="Input/output error"):
        print("x", file=stream, flush=True)
    yield stream
    with suppress(OSError):
        stream.close()


def test_printing_to_a_closed_terminal_does_not_fail(closed_terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_terminal)
    monkeypatch.setattr(sys, "stderr", closed_terminal)
    with lasting_output():
        for _ in range(3):
            print("x", flush=True)
            print("y", file=sys.stderr, flush=True)
    assert sys.stdout is closed_terminal
    print("x", flush=True)  # what is written behind our back goes nowhere, too


def test_a_reader_of_a_pipe_may_end_before_the_command(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        cli.main(["recipes"])


def test_a_full_disk_under_the_output_is_no_closed_terminal(monkeypatch, capsys):
    full = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device: 'standard output'"):  # as `command > file`
        print("x", file=LastingStream(full, "standard output"), flush=True)
    print("y", file=LastingStream(full, None), flush=True)  # nobody could read why
    full.close()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--version"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "ijepa: error: standard output: No space left on device.\n"


def test_closed_standard_streams_do_not_harm_a_command(tmp_path):
    """`command >&- 2>&-`, as some schedulers start it: files must not get the numbers of these streams."""
    code = "import os, sys; from ijepa_transformers.terminal import lasting_output\n"
    code += "with lasting_output():\n    print('x'); print('y', file=sys.stderr, flush=True); sys.stderr.isatty()\n"
    code += f"    file = open({str(tmp_path / 'result')!r}, 'w'); os.write(1, b'of a library'); file.write('right')"
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$1" <&- >&- 2>&-', "sh", code], check=False)
    assert done.returncode == 0 and (tmp_path / "result").read_text() == "right"


@pytest.fixture
def heard_hangup():
    """Under `nohup` these tests would inherit that SIGHUP is ignored, and a run respects that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("fresh_accelerate", "heard_hangup")
def test_a_run_whose_terminal_is_closed_saves_and_ends_without_its_workers(tmp_path, monkeypatch, closed_terminal):
    monkeypatch.setattr(sys, "stdout", closed_terminal)
    monkeypatch.setattr(sys, "stderr", closed_terminal)
    send_in_step(monkeypatch, 2, signal.SIGHUP)
    with pytest.raises(SystemExit) as stopped, lasting_output():
        pretrain(tmp_path / "run", num_workers=1)
    assert stopped.value.code == 75 and status(tmp_path / "run") == "preempted"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    assert multiprocessing.active_children() == []


def ignore_and_wait():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)


def test_a_command_that_fails_leaves_no_process_that_ignores_signals(capsys):
    """At its exit Python would send SIGTERM to such a process, and wait for it for ever."""
    process = multiprocessing.get_context("fork").Process(target=ignore_and_wait, daemon=True)
    process.start()
    with pytest.raises(SystemExit) as stopped:
        end("ijepa pretrain", OSError("x"), "the disk is full", 1)
    assert stopped.value.code == 1 and not process.is_alive()
    assert capsys.readouterr().err == "ijepa pretrain: error: the disk is full\n"


# Sentences


IN_A_WORKER = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(
                f"{IN_A_WORKER}RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No sp"
            ),
            ("--shm-size", "num_workers"),
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's"),
            ("--shm-size", "num_workers"),
        ),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), ("--shm-size",)),
        (OSError(errno.EMFILE, "Too many open files"), ("ulimit -n", "num_workers")),
        (RuntimeError("received 0 items of ancdata"), ("ulimit -n", "num_workers")),
        (
            RuntimeError(
                "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"
            ),
            ("ulimit -n",),
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            ("out of memory", "--shm-size", "ulimit -n", "num_workers"),
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ("out of memory",)),
        (OSError(errno.ENOSPC, "No space left on device", "out/results.md"), ("out/results.md: No space left on",)),
        (ValueError("k must be\npositive"), ("k must be positive",)),
    ],
)
def test_known_failures_are_one_sentence_with_a_remedy(error, expected):
    sentence = explain(error)
    assert "\n" not in sentence and all(part in sentence for part in expected)
    assert "Traceback" not in sentence


def test_too_little_room_for_locks_is_about_shared_memory(monkeypatch):
    """`multiprocessing` raises an error of the disk without a name."""

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("_multiprocessing.SemLock", fails)
    with pytest.raises(OSError, match="No space left") as caught:
        multiprocessing.Lock()
    assert "--shm-size" in explain(caught.value)
    assert "--shm-size" not in explain(OSError(errno.ENOSPC, "No space left on device"))


def test_a_fault_of_the_program_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, failures_told("ijepa probe", 1):
        {}["key"]
    assert stopped.value.code == 1 and "KeyError" in capsys.readouterr().err


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, failures_told("ijepa probe", 1):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "ijepa probe: error: interrupted.\n"


def fill_a_queue():
    prepare_worker(0)
    queue = multiprocessing.get_context("fork").Queue()
    queue.put(lambda: None)  # cannot be sent
    time.sleep(100)


def test_a_worker_that_cannot_send_its_batch_ends(capfd):
    """Otherwise the main process waits for the batch for ever."""
    process = multiprocessing.get_context("fork").Process(target=fill_a_queue)
    process.start()
    process.join(30)
    assert process.exitcode == 1 and "cannot hand on its batch" in capfd.readouterr().err


# The disk


def test_a_folder_in_the_place_of_a_file_stays_and_is_named(tmp_path):
    (tmp_path / "results.md").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path / "results.md", "new")
    assert explain(caught.value) == f"{tmp_path / 'results.md'}: a folder is in the place of this file; move it away."
    assert [file.name for file in tmp_path.iterdir()] == ["results.md"]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "results.md", "old")
    with pytest.raises(OSError, match="No space left") as caught, written_aside(tmp_path / "results.md") as path:
        path.write_text("half")
        fails()
    assert explain(caught.value) == f"{tmp_path / 'results.md'}: No space left on device."
    with pytest.raises(OSError, match=r"weights: I/O error .os error 28"), written_aside(tmp_path / "weights") as path:
        path.write_text("half")
        raise RuntimeError("I/O error (os error 28)")  # as safetensors says it
    told = r"state: torch.save could not write all bytes; is the disk full\?"
    with pytest.raises(OSError, match=told), written_aside(tmp_path / "state") as path:
        path.write_text("half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    assert [file.name for file in tmp_path.iterdir()] == ["results.md"]
    assert (tmp_path / "results.md").read_text() == "old"


def test_a_full_disk_in_a_conversion_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    def convert(output):
        with command_line.written_aside(output) as path:
            path.write_text("half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with pytest.raises(SystemExit) as stopped:
        command_line.run(convert, argparse.Namespace(output=tmp_path / "model"), "ijepa export")
    error = capsys.readouterr().err
    assert stopped.value.code and error.startswith(f"ijepa export: error: {tmp_path / 'model'}: ")
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []


def test_an_output_directory_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ValueError, match=r"output_dir .* cannot be used: .*file is no directory"):
            check_output_directory(place)
    check_output_directory(tmp_path / "new" / "one")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link is no directory"):
        check_output_directory(tmp_path / "link")


def test_a_page_replaces_a_page_and_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "model.safetensors", "no suffix", "page.HTML", "old.htm"):
        Path(name).write_text("mine")
    for name in ("page.HTML", "old.htm", "new.html", "new", "new/folder/page.html"):
        check_page(name)
    for name in ("photo.png", "model.safetensors", "no suffix"):
        with pytest.raises(ValueError, match=f"output '{name}' is there already and is no .html file"):
            check_page(name)
    for name, message in (("  ", "must not be empty"), (".", "is a directory"), ("old.htm/x.html", "is no directory")):
        with pytest.raises(ValueError, match=message):
            check_page(name)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("photo.png", "model.safetensors", "no suffix"),
        "page.HTML",
        "old.htm",
    }


def test_what_is_written_among_the_images_is_refused(tmp_path, monkeypatch):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path / "photos")
    for path, data in (("run", "."), ("cats/run", tmp_path / "photos"), (tmp_path / "link/run", tmp_path / "photos")):
        with pytest.raises(
            ValueError, match=r"output_dir '.*run' lies among the images in '.*': choose another place"
        ):
            refuse_among_images(Path(path), str(data))
    for path, data in ((".runs/run", "."), ("run", "cats"), ("../run", "."), ("run", "digits"), ("run", None)):
        refuse_among_images(Path(path), data)


def test_a_page_is_written_through_a_link_which_stays(tmp_path):
    (tmp_path / "deep").mkdir()
    for target in ("deep/old.html", "deep/new.html"):
        (tmp_path / "link.html").symlink_to(target)
        (tmp_path / "deep/old.html").write_text("an older page")
        write_text(check_page(str(tmp_path / "link.html")), "page")
        assert (tmp_path / "link.html").is_symlink() and (tmp_path / target).read_text() == "page"
        (tmp_path / "link.html").unlink()
    (tmp_path / "photo.png").write_text("mine")
    (tmp_path / "link.html").symlink_to("photo.png")
    with pytest.raises(ValueError, match=r"link.html' is a link to '.*photo.png', which is there already and is no"):
        check_page(str(tmp_path / "link.html"))
    (tmp_path / "loop.html").symlink_to("loop.html")
    with pytest.raises(ValueError, match=r"loop.html' is a link that leads back to itself"):
        check_page(str(tmp_path / "loop.html"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_folder_that_takes_no_files_is_refused_before_the_work():
    with pytest.raises(ValueError, match=r"output '/proc/x\.html': the folder '/proc' cannot be used: /proc may not"):
        check_page("/proc/x.html")


def test_an_error_names_the_file_that_the_user_named(tmp_path):
    with pytest.raises(OSError) as raised:
        write_text(tmp_path / ("x" * 255), "text")  # the name of the temporary file is too long
    assert raised.value.filename == str(tmp_path / ("x" * 255))


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_full_disk_in_fine_tuning_is_one_sentence_and_older_checkpoints_stay(
    gray_pretrained, tmp_path, monkeypatch, capsys
):
    save = torch.save

    def save_until_full(content, file, *args, **options):
        if "checkpoint-4/optimizer.pt" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(content, file, *args, **options)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(SystemExit) as stopped:
        fine_tune(gray_pretrained, tmp_path / "output", save_strategy="steps", save_steps=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 1 and "Traceback" not in error
    assert "the checkpoint of step 4 cannot be written" in error and "checkpoint-2" in error
    assert sorted(path.name for path in (tmp_path / "output").glob("*checkpoint*")) == ["checkpoint-2"]
    monkeypatch.undo()
    fine_tune(gray_pretrained, tmp_path / "output", resume_from_checkpoint="last")


def test_output_is_flushed_at_the_end(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("x", end="")
    assert stream.getvalue() == "x"


def test_one_of_a_kind_is_not_called_several():
    assert [counted(number, "image") for number in (0, 1, 1000)] == ["0 images", "1 image", "1,000 images"]
    assert counted(2, "process") == "2 processes"


@pytest.mark.parametrize("name", ["pretrain", "search"])
def test_ctrl_c_while_libraries_are_imported_is_one_sentence(monkeypatch, capsys, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name])
    assert stopped.value.code == 130 and capsys.readouterr().err == "ijepa: error: interrupted.\n"
