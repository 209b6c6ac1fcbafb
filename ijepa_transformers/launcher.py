# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a process of `accelerate launch` or torchrun does when its command fails.

These launchers print a traceback and a summary of their own. The summary ends with what the failed process wrote to
the file TORCHELASTIC_ERROR_FILE. There we write our sentence, so that it stands last.
"""

import json
import os
import time
from contextlib import suppress


ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # the launcher sets it, one for each process
FIRST_SPEAKS = 10.0  # seconds that the other processes give the first one to say the same


def is_first_process() -> bool:
    """Whether this process speaks for a launch. Also true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def leave_sentence(sentence: str) -> None:
    """Writes the last sentence of this process to where its launcher looks for it."""
    path = os.environ.get(ERROR_FILE)
    if path:
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": sentence, "timestamp": int(time.time())}, file)


def let_the_first_speak() -> None:
    """Waits, if a launcher will end this process, and it is not the first one.

    Often all processes fail with the same sentence. Then the launcher ends the others while they wait here. If this
    process failed alone, it goes on and tells why.
    """
    if not is_first_process() and ERROR_FILE in os.environ:
        time.sleep(FIRST_SPEAKS)
