"""Meta's names and ours correspond one to one, in both directions."""

import pytest
import torch

from ijepa_transformers.conversion.key_mapping import NETWORKS, from_meta, to_meta
from tests.conftest import FIXTURES


@pytest.fixture
def checkpoint():
    return torch.load(FIXTURES / "meta_tiny_checkpoint.pth.tar", weights_only=True)


@pytest.mark.parametrize("network", NETWORKS)
def test_there_and_back_is_the_identity(checkpoint, network):
    original = {key.removeprefix("module."): value for key, value in checkpoint[network].items()}
    back = to_meta(network, from_meta(network, checkpoint[network]))
    assert list(back) == list(original)
    assert all(torch.equal(back[key], original[key]) for key in original)


def test_queries_keys_and_values_are_stacked_in_this_order(checkpoint):
    stacked = checkpoint["encoder"]["module.blocks.0.attn.qkv.weight"]
    ours = from_meta("encoder", checkpoint["encoder"])
    for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
        expected = stacked[third * 36 : (third + 1) * 36]
        assert torch.equal(ours[f"context_encoder.layers.0.attention.{name}.weight"], expected)


def test_unknown_keys_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.gate"):
        from_meta("encoder", {"blocks.0.attn.gate.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="gate"):
        to_meta("encoder", {"context_encoder.layers.0.attention.gate": torch.zeros(1)})
