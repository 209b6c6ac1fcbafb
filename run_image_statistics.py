#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures mean and standard deviation of each channel of a data set, as lines of a recipe:

    python run_image_statistics.py --data my/tiles --num_channels 13 >> my_recipe.yaml

`ijepa stats` is the same. docs/pretrain.md says when it is needed.
"""

import sys

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["stats", *sys.argv[1:]])
