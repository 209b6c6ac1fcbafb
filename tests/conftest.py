"""Fixtures shared by the tests: a tiny model, and Meta's reference numbers under our names."""

import gc
import json
import os
import signal
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; two tests run at a time, each on one core
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ijepa_transformers import IJepaConfig, IJepaForPretraining
from ijepa_transformers.conversion.key_mapping import from_meta
from ijepa_transformers.optimization import Schedules
from ijepa_transformers.preemption import STOP_SIGNALS
from ijepa_transformers.pretraining import exporting
from ijepa_transformers.visualization.curves import plot_training_curves
from tests.runs import reset_accelerate, save_pretrained_model


FIXTURES = Path(__file__).parent / "fixtures"

torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported stays: the collections at the end of every run need not look at it, which takes half a
    second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def curves_are_not_drawn():
    """To draw the curves takes longer than the tiny run that they show. `drawn_curves` draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "plot_training_curves", lambda rows, path, **_: Image.new("L", (1, 1)).save(path))
        yield


@pytest.fixture
def drawn_curves(monkeypatch):
    """The runs of this test leave real curves."""
    monkeypatch.setattr(exporting, "plot_training_curves", plot_training_curves)


@pytest.fixture(autouse=True)
def precision_of_products():
    """A run in this process chooses it for the whole process; the next test starts with torch's own."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Runs in this process compute on the CPU, and none inherits Accelerate's state from another one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def gray_pretrained(tmp_path_factory):
    """A pretraining directory for grey images of 16 pixels. Do not change it."""
    return save_pretrained_model(tmp_path_factory.mktemp("gray") / "model", num_channels=1)


def reference_json(name):
    return json.loads((FIXTURES / name).read_text())


def reference_tensors(name):
    return load_file(FIXTURES / name)


def config_of_reference(reference):
    """Our configuration for the `config` entry of a reference file."""
    return IJepaConfig(
        hidden_size=reference["embed_dim"],
        num_hidden_layers=reference["depth"],
        num_attention_heads=reference["num_heads"],
        intermediate_size=int(reference["embed_dim"] * reference["mlp_ratio"]),
        image_size=reference["image_size"],
        patch_size=reference["patch_size"],
        predictor_hidden_size=reference["predictor_embed_dim"],
        predictor_num_hidden_layers=reference["predictor_depth"],
        predictor_num_attention_heads=reference["predictor_num_heads"],
        layer_norm_eps=reference["layer_norm_eps"],
    )


def weights_of_reference(tensors, prefix="", networks=("encoder", "predictor", "target_encoder")):
    """Weights stored as `<prefix><network>.<Meta's key>` under our names."""
    weights = {}
    for network in networks:
        start = f"{prefix}{network}."
        found = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        weights.update(from_meta(network, found))
    return weights


def masks_of_reference(tensors, prefix=""):
    """Context (B, C, N_ctx) and target indices (B, M, N_tgt) of a reference file."""
    stacks = []
    for kind in ("context_mask", "target_mask"):
        names = sorted(key for key in tensors if key.startswith(f"{prefix}{kind}."))
        stacks.append(torch.stack([tensors[name].long() for name in names], dim=1))
    return stacks


def schedules_of_reference(settings):
    total = int(settings["ipe_scale"] * settings["epochs"] * settings["ipe"])
    return Schedules(
        total_steps=total,
        warmup_steps=int(settings["warmup"] * settings["ipe"]),
        start_learning_rate=settings["start_lr"],
        peak_learning_rate=settings["lr"],
        final_learning_rate=settings["final_lr"],
        start_weight_decay=settings["wd"],
        final_weight_decay=settings["final_wd"],
        start_momentum=settings["ema"][0],
        final_momentum=settings["ema"][1],
    )


def without_key_bias(names):
    """The gradient of a key bias is zero in exact arithmetic; what is stored for it is rounding noise."""
    return [name for name in names if not name.endswith("k_proj.bias")]


@pytest.fixture
def signals_that_are_heard():
    """Whoever started the tests, with nohup or in the background of a script, may have had signals ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tolerances():
    return reference_json("MANIFEST.json")["tolerances"]


@pytest.fixture
def tiny_config():
    return IJepaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        predictor_hidden_size=16,
        predictor_num_hidden_layers=2,
    )


@pytest.fixture
def tiny_model(tiny_config):
    torch.manual_seed(0)
    return IJepaForPretraining(tiny_config)


@pytest.fixture
def trained(tiny_model):
    """A pretraining model whose two encoders differ, as after training."""
    for parameter in tiny_model.context_encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tiny_model.update_target_encoder(0.5)
    return tiny_model.eval()


@pytest.fixture
def tiny_batch():
    """Two images of 4 x 4 patches, one context of 5 patches, two target blocks of 3."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "context_indices": torch.tensor([[[0, 1, 4, 5, 8]], [[2, 3, 6, 7, 11]]]),
        "target_indices": torch.tensor([[[9, 10, 13], [12, 14, 15]], [[0, 4, 8], [12, 13, 14]]]),
    }
