# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Judging frozen encoders and extracting features: `ijepa probe`, `ijepa extract`."""
