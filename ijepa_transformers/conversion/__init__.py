# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in and out: `ijepa convert`, `ijepa export`, `ijepa onnx`."""
