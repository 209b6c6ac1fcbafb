"""The Hub gets a fine-tuned model once, when it is complete and evaluated."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.runs import assert_equal_weights, fine_tune


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("precision", [None, "fp16_full_eval", "bf16_full_eval"])
def test_the_model_is_uploaded_once_with_its_results(gray_pretrained, tmp_path, monkeypatch, precision):
    """In float32, also if it is evaluated in half precision, for which `Trainer` rounds the weights."""
    uploads, weights = [], {}

    def upload_folder(folder_path, **settings):
        uploads.append({str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*")})
        weights.update(load_file(Path(folder_path) / "model.safetensors"))

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/model"))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    settings = {"push_to_hub": "true", "save_strategy": "no", "max_steps": 1, "validation_split": "test"}
    saved = fine_tune(gray_pretrained, tmp_path, **settings, **({precision: "true"} if precision else {}))
    assert_equal_weights(weights, saved)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.half().float()) for weight in weights.values())
    (files,) = uploads
    assert {"model.safetensors", "README.md", "eval_results.json"} <= files
    assert not any(name.startswith(".tmp-") for name in files)
