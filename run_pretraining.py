#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretrains I-JEPA on any images:

    accelerate launch run_pretraining.py --recipe quickstart
    accelerate launch run_pretraining.py --recipe custom_images_single_gpu --data my/photos

The same command runs on a CPU, a GPU or many. `ijepa pretrain` is the same. `--help` lists every argument.
"""

import sys

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
