# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Images in: opening data sets, decoding files, crops, and the order of a run."""
