# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A folder of very many images: time and memory until a run knows them, before it reads the first.

    python benchmarks/speed/opening.py [--images 100000] [--folders 1000] [--directory DIR] [--output FILE]

Makes files without content that say they have 3,000 bytes, in class folders, in a temporary directory that is removed
again. `open` lists them and finds splits and classes, `fingerprint` asks for the size of each. Memory is the growth of
the peak of this process, which has opened another folder before, so that all modules are imported. The last line is
one JSON object, which is added to a file too.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.timing import Seconds, add_common_arguments, prepare, report
from ijepa_transformers.data.contents import image_fingerprints
from ijepa_transformers.data.sources import load_image_dataset


FILE_BYTES = 3000


def make_files(root, num_images, num_folders):
    for number in range(num_images):
        file = root / f"train/n{number % num_folders:08}/n{number % num_folders:08}_{number}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as opened:
            opened.truncate(FILE_BYTES)


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measured(function):
    """The result of a call, its seconds, and by how many MiB the peak of memory grew."""
    start, before = Seconds.now(), peak_mib()
    result = function()
    return result, Seconds.now().since(start), peak_mib() - before


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--directory", help="where the temporary directory is made")
    add_common_arguments(parser)
    arguments = parser.parse_args(words)
    prepare(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        few, many = Path(directory, "few"), Path(directory, "many")
        make_files(few, 10, 2)
        make_files(many, arguments.images, arguments.folders)
        image_fingerprints(load_image_dataset(few), str(few))
        dataset, *opened = measured(lambda: load_image_dataset(many))
        _, *fingerprinted = measured(lambda: image_fingerprints(dataset, str(many)))
    row = {"images": len(dataset), "folders": arguments.folders}
    for name, (seconds, mib) in (("open", opened), ("fingerprint", fingerprinted)):
        print(f"{name}: {seconds.wall:.2f} s, {seconds.cpu:.2f} s of processor time, {mib:.0f} MiB")
        row |= {f"{name}_s": round(seconds.wall, 3), f"{name}_cpu_s": round(seconds.cpu, 3)}
        row[f"{name}_mib"] = round(mib, 1)
    report("opening", arguments, row)


if __name__ == "__main__":
    main()
