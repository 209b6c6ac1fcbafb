"""Laws of the collapse measures, the report and the monitor. Shapes: N images, D feature width."""

import math

import numpy as np
import pytest
import torch

from ijepa_transformers.evaluation.collapse import (
    collapse_summary,
    effective_rank,
    layer_spread,
    nearest_cosine,
    orphan_share,
    relative_std,
    uniformity,
)
from ijepa_transformers.pretraining.collapse_monitor import CollapseMonitor


# Rank and spread


def gaussians(num_images: int, width: int, rank: int, seed: int = 0) -> torch.Tensor:
    """(N, D) of equal variance over `rank` directions of a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return torch.randn(num_images, rank, generator=generator) @ rotation[:rank]


@pytest.mark.parametrize("rank", [1, 3, 10, 32])
def test_rank_of_isotropic_gaussians_is_their_number_of_directions(rank):
    assert effective_rank(gaussians(2000, 32, rank)) == pytest.approx(rank, rel=0.01)


def test_rank_is_the_formula_of_the_paper_on_centred_features():
    features = gaussians(50, 20, 12).double()
    p = np.linalg.svd((features - features.mean(0)).numpy(), compute_uv=False)
    p = p[p > 1e-9] / p.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)


def test_rank_is_invariant_to_scale_rotation_offset_and_order():
    features = gaussians(100, 16, 16) * torch.linspace(0.1, 1, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    expected = effective_rank(features)
    for same in (features * 1e-6, features * 1e6, features @ rotation, features + 30, features.flip(0)):
        assert effective_rank(same) == pytest.approx(expected, rel=1e-3)


def test_the_rank_of_equal_images_is_one():
    offset = torch.randn(64, generator=torch.Generator().manual_seed(0))
    rounding = 1e-8 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for features in (offset.expand(200, 64), offset + rounding, torch.zeros(200, 64), offset[None]):
        assert effective_rank(features) == 1.0


def test_the_rank_of_features_that_are_not_finite_is_nan():
    features = gaussians(20, 8, 8)
    for bad in (math.nan, math.inf):
        features[3, 3] = bad
        assert math.isnan(effective_rank(features))
    with pytest.raises(ValueError, match=r"\(0, 8\)"):
        effective_rank(features[:0])


# Neighbours and report


def test_uniformity_is_the_formula_of_the_paper_on_centred_directions():
    features = gaussians(40, 8, 8) + 5
    directions = features - features.mean(0)
    directions = (directions / directions.norm(dim=1, keepdim=True)).double().numpy()
    distances = ((directions[:, None] - directions[None]) ** 2).sum(-1)[~np.eye(40, dtype=bool)]
    assert uniformity(features) == pytest.approx(np.log(np.exp(-2 * distances).mean()), abs=1e-5)


def test_uniformity_goes_from_0_for_equal_images_to_minus_4_for_many_directions():
    assert uniformity(torch.ones(50, 8)) == 0
    assert uniformity(gaussians(500, 1000, 1000)) == pytest.approx(-4, abs=0.05)
    assert uniformity(gaussians(500, 64, 2)) > uniformity(gaussians(500, 64, 8)) > uniformity(gaussians(500, 64, 64))


def crowd(num_images: int, num_hubs: int) -> torch.Tensor:
    """Images on a cone, hubs on its axis, and the mirror image of all of them, so that the mean is 0. A hub is nearer
    to each image than any other image is."""
    images = torch.cat([torch.eye(num_images), torch.ones(num_images, 1)], dim=1)
    hubs = 1e-3 * torch.randn(num_hubs, num_images + 1, generator=torch.Generator().manual_seed(0))
    hubs[:, -1] = 1
    return torch.cat([images, hubs, -images, -hubs])


def test_orphans_are_the_images_that_are_nobodys_neighbours():
    """On a circle each image is a neighbour of others. On a cone with a hub, the hub is the neighbour of most."""
    angles = torch.linspace(0, 2 * math.pi, 41)[:-1]
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert orphan_share(circle, num_neighbors=2) == 0
    assert orphan_share(crowd(20, 1), num_neighbors=1) == pytest.approx(19 / 21)  # the hub has one neighbour too
    assert orphan_share(gaussians(300, 64, 32)) < 0.05


def test_nearest_cosine_is_one_for_twins_and_zero_in_many_directions():
    features = gaussians(50, 2000, 2000)
    assert nearest_cosine(torch.cat([features, 2 * features - features.mean(0)])) == pytest.approx(1, abs=1e-3)
    assert nearest_cosine(features) == pytest.approx(0.03, abs=0.05)


def test_neighbour_measures_do_not_depend_on_scale_offset_and_order():
    features = gaussians(100, 16, 8)
    for measure in (uniformity, orphan_share, nearest_cosine):
        for same in (features * 1e-4, features * 1e4, features + 30, features.flip(0)):
            assert measure(same) == pytest.approx(measure(features), abs=1e-3)
        with pytest.raises(ValueError, match=r"N > 1, got shape \(1, 16\)"):
            measure(features[:1])


def layer(rank: int = 16, variation: float = 1.0) -> torch.Tensor:
    """Features of one layer (N, D), with an offset five times as large as a variation of 1."""
    return 5 + variation * math.sqrt(64 / rank) * gaussians(200, 64, rank)


def summary(*layers: torch.Tensor, beside: torch.Tensor | None = None) -> str:
    random_layers = None if beside is None else [layer_spread(beside)]
    return collapse_summary([layer_spread(features) for features in layers], random_layers)


def test_an_encoder_that_has_not_collapsed_gets_its_figures_and_no_praise():
    text = summary(layer(3), layer(), layer(), beside=layer(8))
    std, rank = relative_std(layer()), effective_rank(layer())
    assert text.startswith(f"not collapsed: images differ by {std:.1%} of the features' size, over {rank:.1f} of 64")
    assert f"(random encoder: {relative_std(layer(8)):.1%}, {effective_rank(layer(8)):.1f} directions)." in text
    assert "less variation" not in text and "healthy" not in text


@pytest.mark.parametrize("collapsed", [{"variation": 0.02}, {"variation": 0.0}, {"rank": 1}])
def test_a_collapsed_encoder_is_called_collapsed_from_the_right_layer_on(collapsed):
    healthy, dead = layer(), layer(**collapsed)
    assert summary(healthy, healthy, dead, dead).startswith("collapsed: ")
    assert "This begins at layer 2 of 3; the layer before is not collapsed." in summary(healthy, healthy, dead, dead)
    assert "This begins at layer 3 of 3;" in summary(healthy, dead, healthy, dead)
    assert "begins at layer 1 of 2; the layer before is narrow." in summary(layer(rank=4), dead, dead)
    assert "begins at the embedding of the patches" in summary(dead, dead)
    assert "Layers before the last with less variation: 1 (collapsed)." in summary(dead, dead, healthy)


def test_the_summary_says_what_is_wrong():
    assert "hardly depend on the image" in summary(layer(variation=0.02))
    assert "images differ in few ways" in summary(layer(rank=1))
    assert "NaN" in summary(layer() * math.nan) and summary(layer() * math.nan).startswith("collapsed")
    assert layer_spread(layer(rank=4)).state == "narrow"  # 4 of 64 directions
    assert layer_spread(layer(variation=0.3)).state == "narrow"  # 6 % of the features' size
    assert layer_spread(crowd(60, 10)).state == "narrow" and "nobody's neighbours" in summary(crowd(60, 10))
    with pytest.raises(ValueError, match="at least one layer"):
        collapse_summary([])


# Monitor


WIDTH, OFFSET = 64, 5.0  # the features of all images share an offset, 5 times as large as their healthy variation


def fed(batches, **settings) -> CollapseMonitor:
    monitor = CollapseMonitor(**{"warmup_updates": 0, **settings})
    for batch in batches:
        monitor.update(batch)
    return monitor


def batches_of(rank: int = 16, variation: float = 1.0, count: int = 8) -> list[torch.Tensor]:
    features = gaussians(32 * count, WIDTH, rank)
    features = features / features.square().mean().sqrt()
    return list((OFFSET + variation * features).split(32))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_monitor_reports_a_collapse_and_no_healthy_encoder_at_any_scale(scale):
    for healthy in (batches_of(), batches_of(rank=6), batches_of(variation=0.6)):
        report = fed(scale * batch for batch in healthy).report()
        assert not report["collapsing"] and report["reason"] == ""
    for collapsed in (batches_of(variation=0.05), batches_of(variation=0.0), batches_of(rank=1)):
        report = fed(scale * batch for batch in collapsed).report()
        assert report["collapsing"] and "collapsing" in report["reason"]


def test_monitor_names_what_is_wrong():
    assert "depend on the image" in fed(batches_of(variation=0.05)).report()["reason"]
    assert "1.0 of 64 directions" in fed(batches_of(rank=1)).report()["reason"]
    assert "NaN" in fed([batches_of()[0] * math.nan]).report()["reason"]


def test_monitor_reports_share_of_variation_and_rank_of_what_it_holds():
    batches = batches_of()
    report = fed(batches).report()
    assert report["target_std"] == pytest.approx(1 / math.sqrt(1 + OFFSET**2), rel=0.05)
    assert report["effective_rank"] == pytest.approx(effective_rank(torch.cat(batches)))


def test_monitor_is_silent_while_warming_up():
    collapsed = batches_of(variation=0.01)
    assert not fed(collapsed, warmup_updates=9).report()["collapsing"]
    assert fed(collapsed, warmup_updates=8).report()["collapsing"]
    assert not fed([collapsed[0][:1]]).report()["collapsing"]  # a single image cannot differ from itself
    with pytest.raises(ValueError, match="no features"):
        CollapseMonitor().report()


def test_monitor_remembers_only_the_newest_images_however_they_are_batched():
    old, new = batches_of(variation=0.01), batches_of()
    recent = torch.cat(new)[-100:]
    monitor = fed([*old, *new], size=100)
    assert torch.equal(monitor.features, recent)
    assert monitor.features.untyped_storage().nbytes() == recent.numel() * 4  # and no larger storage is kept
    assert torch.equal(fed([torch.cat([*old, *new])], size=100).features, recent)


def test_monitor_resumed_reports_what_an_uninterrupted_one_reports(tmp_path):
    first, second = batches_of()[:3], batches_of(variation=0.01)
    interrupted = fed(first, size=80, warmup_updates=5)
    torch.save(interrupted.state_dict(), tmp_path / "monitor.pt")
    interrupted.update(torch.zeros(80, WIDTH))  # an update after the save does not change what was saved
    resumed = CollapseMonitor(size=80, warmup_updates=5)
    resumed.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    uninterrupted = fed(first, size=80, warmup_updates=5)
    for batch in second:
        resumed.update(batch)
        uninterrupted.update(batch)
        assert resumed.report() == uninterrupted.report()
    assert resumed.report()["collapsing"]


def test_monitor_before_any_update_survives_a_round_trip():
    monitor = CollapseMonitor()
    monitor.load_state_dict(CollapseMonitor().state_dict())
    assert monitor.features is None and monitor.num_updates == 0
