"""The Hub gets a fine-tuned model once, when it is complete and evaluated."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from tests.runs import fine_tune


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_the_model_is_uploaded_once_with_its_results(gray_pretrained, tmp_path, monkeypatch):
    uploads = []

    def upload_folder(folder_path, **settings):
        uploads.append({str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*")})

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/model"))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    settings = {"push_to_hub": "true", "save_strategy": "no", "max_steps": 1, "validation_split": "test"}
    fine_tune(gray_pretrained, tmp_path, **settings)
    (files,) = uploads
    assert {"model.safetensors", "README.md", "eval_results.json"} <= files
    assert not any(name.startswith(".tmp-") for name in files)
