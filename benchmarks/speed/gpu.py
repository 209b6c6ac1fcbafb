# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Everything about speed and memory on one GPU, in one command of at most 8 minutes on an H100.

    python benchmarks/speed/gpu.py --output OUT.jsonl
    python benchmarks/speed/gpu.py --output OUT.jsonl --tiny       on a CPU: it tries the command, not a machine

The parts, the most important first:

    step        a training step of B/16, L/16 and H/14, batch 128: ours, compiled, and the plain reference; peak
                memory; the fastest matrix product and copy of this device, to compare with
    loop        about 60 s of `ijepa pretrain` on JPEG files, with checkpoints and k-NN: what is lost outside the step
    features    images per second of the encoder, ours and stock

Each part is a process of its own with a share of the time, and its line is in OUT.jsonl as soon as it is there. A part
that fails or runs out of time leaves a line that says so, and the next one begins. Parts whose line is in OUT.jsonl
already are not run again, so a call that was cut goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch


HERE = Path(__file__).resolve().parent
PRINT_ONLY = ("--output", "-")  # a part's line goes to our file
SHARES = {"step": 0.54, "loop": 0.26, "features": 0.2}  # of --minutes


def command(part: str, own: argparse.Namespace) -> list[str]:
    """The words that run a part."""
    device = "cpu" if own.tiny else "cuda"
    minutes = str(own.minutes * SHARES[part])
    if part == "step":
        sizes = ["--sizes", "smoke", "--batch", "4", "--turns", "2", "--steps-per-turn", "1"]
        if not own.tiny:
            sizes = ["--sizes", "B/16", "L/16", "H/14", "--batch", "128"]
        contenders = ["ours", "reference"] if own.tiny else ["ours", "reference", "ours-compiled"]
        more = ["--precision", "bf16", "--contenders", *contenders, "--minutes", minutes, *PRINT_ONLY]
        return [str(HERE / "pretraining_step.py"), "--device", device, *sizes, *more]
    if part == "features":
        cases = ["Ti/16:32:3"] if own.tiny else ["B/16:224:256", "H/14:224:64"]
        more = ["--cases", *cases, "--precisions", "bf16", "--seconds", "0" if own.tiny else "4", *PRINT_ONLY]
        return [str(HERE / "feature_extraction.py"), "--device", device, *more]
    sizes = {"size": "tiny", "image_size": 32, "patch_size": 8, "images": 24, "batch_size": 4, "workers": 0}
    if not own.tiny:
        sizes = {"size": "base", "image_size": 224, "images": 6400, "batch_size": 128, "workers": 12, "epochs": 2}
    steps = sizes["images"] * sizes.get("epochs", 1) // sizes["batch_size"]
    words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    saved = ["--save_steps", str(max(steps // 2, 1)), "--eval_steps", str(max(steps // 2, 1))]
    return [str(HERE / "end_to_end.py"), *words, "--labelled", *saved, *PRINT_ONLY]


def measure(part: str, own: argparse.Namespace) -> dict:
    """The line of a part."""
    began, words = time.perf_counter(), command(part, own)
    line = {"part": part, "command": " ".join(["python", *words]).replace(f"{HERE.parents[1]}/", "")}
    try:
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=60 * own.minutes * SHARES[part] + own.grace,
            check=False,
        )
        if done.returncode:
            line["error"] = done.stderr.strip().splitlines()[-5:]
        else:
            line["result"] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        kept = (error.stdout or b"").decode(errors="replace").splitlines()
        line |= {"error": ["the time of this part ran out"], "printed": kept[-40:]}
    return {**line, "seconds": round(time.perf_counter() - began, 1)}


def finished(output: Path) -> set[str]:
    """Parts with a result."""
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    return {line["part"] for line in map(json.loads, lines) if "result" in line}


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="a line of JSON for each part")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds that a part may take beyond its share")
    own = parser.parse_args(words)
    if not own.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --tiny tries the command on the CPU.")
    return own


def main(words: list[str] | None = None) -> None:
    own = parse(words)
    own.output.parent.mkdir(parents=True, exist_ok=True)
    for part in own.parts:
        if part in finished(own.output):
            print(f"{part}: is there already", flush=True)
            continue
        line = json.dumps(measure(part, own))
        with own.output.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
