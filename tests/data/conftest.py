# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Fixtures of the room `data`."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps its Arrow files in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    datasets.disable_progress_bars()
