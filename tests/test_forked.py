"""A forked command ends, fails, dies and speaks as a process of its own does."""

import signal
import subprocess
import time

import pytest

from tests import forked


def code(program, **options):
    return forked.run(["-c", program], **options)


def test_exit_codes_and_outputs_are_those_of_the_interpreter():
    assert code("import sys; print('said'); print('warned', file=sys.stderr)").returncode == 0
    assert code("import sys; sys.exit(7)").returncode == 7
    sentence = code("import sys; sys.exit('a sentence')")
    assert (sentence.returncode, sentence.stdout, sentence.stderr) == (1, "", "a sentence\n")
    error = code("print('before'); 1 / 0")
    assert (error.returncode, error.stdout) == (1, "before\n") and "ZeroDivisionError" in error.stderr
    assert code("raise KeyboardInterrupt").returncode == -signal.SIGINT
    assert code("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL


def test_what_is_to_happen_at_the_end_happens():
    program = "import atexit, threading, time; atexit.register(print, 'exit');"
    program += "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()"
    assert code(program).stdout == "thread\nexit\n"


def test_arguments_folder_and_environment_are_the_commands_own(tmp_path):
    (tmp_path / "neighbour.py").write_text("NAME = 'beside the script'")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, neighbour\nprint(sys.argv[1:], os.getcwd(), os.environ['ASKED'], neighbour.NAME)"
    )
    done = forked.run([script, "--flag", "a b"], cwd=tmp_path, environment={"ASKED": "yes"})
    assert done.stdout == f"['--flag', 'a b'] {tmp_path} yes beside the script\n"
    assert code("import os; print(os.environ.get('ASKED'))").stdout == "None\n"


def test_a_signal_is_heard_and_a_command_that_takes_too_long_is_killed():
    program = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True)"
    )
    process = forked.start(["-c", program + "; time.sleep(60)"])
    while not process.stdout:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    process = forked.start(["-c", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    assert process.wait() == -signal.SIGKILL


def test_no_file_grows_beyond_the_limit(tmp_path):
    done = code("with open('large', 'wb') as file: file.write(bytes(3000))", cwd=tmp_path, file_size_limit=1000)
    assert done.returncode == 1 and "File too large" in done.stderr


def test_ranks_know_their_places_and_one_that_fails_ends_the_others():
    program = "import os; print(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_PORT')))"
    lines = sorted(forked.fork_ranks(2, ["-c", program]).stdout.splitlines())
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["0 0 2", "1 1 2"] and len({line[6:] for line in lines}) == 1
    program = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    processes = forked.start_ranks(2, ["-c", program])
    assert processes.wait(30) == -signal.SIGTERM and processes.codes == [-signal.SIGTERM, 3]


def test_the_server_has_one_thread_of_python_and_of_torch_and_stock_has_nothing_of_ours():
    program = "import sys, threading, torch; print(threading.active_count(), torch.get_num_threads());"
    program += "print('ijepa_transformers' in sys.modules)"
    assert code(program).stdout == "1 1\nTrue\n"
    assert code(program, kind="stock").stdout == "1 1\nFalse\n"
