# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a process of `accelerate launch` or torchrun does when its command fails.

These launchers print a traceback and a summary of their own. The summary ends with what the failed process wrote to
the file TORCHELASTIC_ERROR_FILE. There we write our sentence, so that it stands last.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path


INTERRUPTED = 130  # the exit code of a command after Ctrl-C, as a shell reports it
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # the launcher sets it, one for each process
FIRST_SPEAKS = 10.0  # seconds that the other processes give the first one to say the same
_PAUSE = 0.25  # seconds


def is_first_process() -> bool:
    """Whether this process speaks for a launch. Also true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def leave_sentence(sentence: str) -> None:
    """Writes the last sentence of this process to where its launcher looks for it."""
    path = os.environ.get(ERROR_FILE)
    if path:
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": sentence, "timestamp": int(time.time())}, file)


def said_by_the_first(sentence: str) -> bool:
    """Whether the first process of this machine fails with the same sentence, so that this one can be silent.

    Often all processes fail alike. A process that is not the first one waits for what the first one says. Meanwhile
    the launcher may end it. If the first process does not fail, or fails otherwise, this one tells why.
    """
    own = os.environ.get(ERROR_FILE)
    if is_first_process() or not own:
        return False
    first = Path(own).parent.with_name("0") / Path(own).name  # the launcher's folders have the number of the process
    for _ in range(round(FIRST_SPEAKS / _PAUSE)):
        if first != Path(own) and _sentence_in(first) == sentence:
            return True
        time.sleep(_PAUSE)
    return False


def _sentence_in(path: Path) -> str | None:
    """What `leave_sentence` has written; None if it has not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
