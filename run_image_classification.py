#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes an encoder as an image classifier:

    python run_image_classification.py --recipe finetune_small --model my_model --data my_photos --output_dir out

`ijepa finetune` is the same. docs/finetune.md explains the choices.
"""

import sys

from ijepa_transformers.cli import main


if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
