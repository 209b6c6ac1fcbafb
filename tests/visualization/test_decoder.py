"""Laws of the pictures in pixels: what is decoded, what it is compared with, and when a stored decoder is used."""

import math

import pytest
import torch

from ijepa_transformers.masking import MultiBlockMasking
from ijepa_transformers.visualization.decoder import (
    DecoderPair,
    PixelDecoder,
    decode_blocks,
    fill_blocks,
    load_decoders,
    save_decoders,
    train_decoder,
)
from ijepa_transformers.visualization.image_distance import psnr, texture_distance


SIZES = 6, 16, 4  # features, patches, values


def masking() -> MultiBlockMasking:
    return MultiBlockMasking((4, 4), target_scale=(0.2, 0.3), min_patches=2)


def test_a_decoder_learns_pixels_that_the_features_hold_and_the_seed_decides_it():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 16, 4), generator=generator, dtype=torch.uint8)
    features = torch.cat([100 + pixels.float(), torch.ones(40, 16, 2)], dim=2)  # two of them are constant
    blocks = masking().sample(40, 7)[1]
    rows = torch.arange(40)[:, None, None]
    truth = pixels[rows, blocks].float() / 255
    errors = []
    for steps in (1, 60, 60):
        decoder = train_decoder(features, pixels, masking(), steps, seed=0, device=torch.device("cpu"))
        decoded = decode_blocks(decoder, features[rows, blocks], blocks)
        errors.append((decoded - truth).square().mean().item())
    assert errors[1] < 0.4 * errors[0] and errors[1] == errors[2]
    assert decoded.min() >= 0 and decoded.max() <= 1


def test_a_block_is_decoded_from_its_own_features_alone():
    torch.manual_seed(0)
    decoder = PixelDecoder(*SIZES).eval()
    features, blocks = torch.randn(2, 3, 4, 6), torch.randint(0, 16, (2, 3, 4))
    together = decode_blocks(decoder, features, blocks)
    assert together.shape == (2, 3, 4, 4)
    alone = decode_blocks(decoder, features[1:, 2:], blocks[1:, 2:])
    torch.testing.assert_close(together[1:, 2:], alone)


def test_decoded_blocks_fill_their_places_and_overlaps_are_the_mean():
    pixels = torch.zeros(1, 5, 2)
    decoded = torch.tensor([[[[0.2, 0.2], [0.4, 0.4]], [[0.8, 0.8], [1.0, 1.0]]]])
    filled = fill_blocks(pixels, decoded, torch.tensor([[[1, 2], [2, 4]]]))
    torch.testing.assert_close(filled[0, :, 0], torch.tensor([0, 0.2, 0.6, 0, 1.0]))


@pytest.fixture
def pair() -> DecoderPair:
    torch.manual_seed(0)
    return DecoderPair(PixelDecoder(*SIZES), PixelDecoder(*SIZES), torch.randn(16, 6))


def test_stored_decoders_come_back_for_the_same_model_and_for_no_other(pair, tmp_path):
    path = tmp_path / "decoder.safetensors"
    save_decoders(pair, path, {"model": "abc", "seed": 0})
    found = load_decoders(path, {"model": "abc", "seed": 0}, SIZES)
    for name in ("trained", "untrained"):
        before, after = getattr(pair, name).state_dict(), getattr(found, name).state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(found.place_mean, pair.place_mean) and not found.trained.training
    assert load_decoders(path, {"model": "abd", "seed": 0}, SIZES) == "it belongs to another model"
    assert load_decoders(path, {"model": "abc", "seed": 1}, SIZES) == "it belongs to another seed"


@pytest.mark.parametrize("content", [b"", b"no file of tensors", "cut", "other sizes", "other tensors", "no metadata"])
def test_a_damaged_decoder_is_not_used(pair, tmp_path, content):
    path = tmp_path / "decoder.safetensors"
    save_decoders(pair, path, {"model": "abc"})
    sizes = SIZES
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif content == "other sizes":
        sizes = 8, 16, 4
    elif content in ("other tensors", "no metadata"):
        from safetensors.torch import save_file

        metadata = {"identity": '{"model": "abc"}'} if content == "other tensors" else None
        save_file({"x": torch.zeros(1)}, path, metadata)
    else:
        path.write_bytes(content)
    reason = load_decoders(path, {"model": "abc"}, sizes)
    assert isinstance(reason, str) and len(reason) < 300


def photographs() -> torch.Tensor:
    """Smooth images with edges, (3, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=32, mode="nearest")


def test_distances_are_perfect_for_the_truth_and_see_blur_and_noise():
    truth, mask = photographs(), torch.ones(3, 1, 32, 32, dtype=torch.bool)
    assert psnr(truth, truth, mask) == math.inf and texture_distance(truth, truth, mask) == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(truth, 9, stride=1, padding=4, count_include_pad=False)
    flat = truth.mean(dim=(2, 3), keepdim=True).expand_as(truth)
    distances = [texture_distance(each, truth, mask) for each in (0.98 * truth, blurred, flat)]
    assert distances == sorted(distances) and distances[0] < 0.05 and 0.3 < distances[-1] <= 2
    assert psnr(truth + 0.1, truth, mask) == pytest.approx(20, abs=0.01)


def test_only_masked_pixels_count():
    truth, mask = photographs(), torch.zeros(3, 1, 32, 32, dtype=torch.bool)
    mask[..., :16, :] = True
    other = truth.clone()
    other[..., 26:, :] = 0.5  # beyond the reach of the filters
    assert psnr(other, truth, mask) == math.inf
    shifted = truth.clone()
    shifted[..., :16, :] = 1 - shifted[..., :16, :]
    assert texture_distance(other, truth, mask) < 0.1 < texture_distance(shifted, truth, mask)
