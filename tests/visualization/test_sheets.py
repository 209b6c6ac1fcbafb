"""Laws of the pictures: they are written, show what was given, and leave matplotlib's global state alone."""

import math
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ijepa_transformers.visualization import cells
from ijepa_transformers.visualization import curves as visualization_curves
from ijepa_transformers.visualization import maps as visualization_maps
from ijepa_transformers.visualization import predictions as visualization_predictions
from ijepa_transformers.visualization.cells import cut_patches, hatching
from ijepa_transformers.visualization.colors import foreground_of, pca_colors, position_mean, position_share
from ijepa_transformers.visualization.curves import plot_training_curves
from ijepa_transformers.visualization.maps import draw_map, map_points, scatter_of
from ijepa_transformers.visualization.page import CLASS_COLORS, REST
from ijepa_transformers.visualization.predictions import (
    draw_predictions,
    draw_scores,
    nearest_patches,
    score_predictions,
)
from ijepa_transformers.visualization.sheets import (
    attention_maps,
    draw_attention,
    draw_masks,
    draw_pca,
    draw_similarity,
    most_detailed_blocks,
    most_detailed_patches,
    similarity_maps,
)


def rows(count: int) -> list[dict]:
    keys = [key for panel in visualization_curves.PANELS for key in panel.lines]
    return [{"step": 10 * step, **dict.fromkeys(keys, 1 + step / count)} for step in range(count)]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that was saved, so that a test can look inside."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw))[1])
    return saved


def test_drawing_leaves_the_global_state_of_matplotlib_alone(tmp_path, monkeypatch):
    # The first test of the file: no earlier drawing has had the chance to change what it compares with.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    before = dict(matplotlib.rcParams.copy())  # of a copy: reading the "backend" entry itself would choose one
    plot_training_curves([{"loss": 0.5}, {"loss": 0.4}], tmp_path / "curves.png")
    assert dict(matplotlib.rcParams.copy()) == before


def test_curves_have_a_panel_for_each_metric_and_are_written(tmp_path, figures):
    plot_training_curves([*rows(5), {"step": 60, "random_knn_accuracy": 0.6}], tmp_path / "curves.png", title="tiny")
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    assert picture.std() > 10 and picture.shape[1] >= 1000
    axes = figures[0].axes
    assert [each.get_title() for each in axes] == [panel.title for panel in visualization_curves.PANELS]
    assert all(each.get_ylabel() for each in axes) and figures[0].get_suptitle() == "tiny"
    zeros = [panel.from_zero for panel in visualization_curves.PANELS]
    assert [each.get_ylim()[0] == 0 for each in axes] == zeros
    assert visualization_curves.CAPTION in figures[0].get_supxlabel()
    assert [line.get_label() for line in axes[0].lines] == ["target encoder", "random encoder"]
    assert set(axes[0].lines[1].get_ydata()) == {0.6}


def test_curves_tolerate_missing_keys_and_values_that_are_not_finite(tmp_path, figures):
    metrics = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan, "other": "text"}, {"step": 3, "loss": None}]
    metrics += [{"step": 4}, {"step": 5, "loss": 0.4, "grad_norm": math.inf}]
    plot_training_curves(metrics, tmp_path / "curves.png")
    (axes,) = figures[0].axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 0.5], [5, 0.4]])


def test_many_points_get_a_running_mean_at_the_right_steps(tmp_path, figures):
    metrics = [{"step": step, "loss": step + 50 * (-1) ** step} for step in range(1000)]
    plot_training_curves(metrics, tmp_path / "curves.png")
    points, mean = figures[0].axes[0].lines
    assert len(points.get_xdata()) == 1000
    assert np.abs(mean.get_ydata() - mean.get_xdata()).max() < 0.51  # the zigzag is gone, the trend is not shifted


def test_nothing_to_draw_is_an_error_that_shows_the_keys(tmp_path):
    for metrics in ([], [{"step": 1, "lose": 0.5}], [{"step": 1, "loss": math.nan}]):
        with pytest.raises(ValueError, match=rf"{len(metrics)} rows"):
            plot_training_curves(metrics, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_two_runs_share_the_panels_and_one_legend(tmp_path, figures):
    runs = {
        r"no $\frac$ formula": rows(5),
        "_second": [{**row, "loss": 3.0, "random_knn_accuracy": 0.2} for row in rows(7)],
    }
    plot_training_curves(runs, tmp_path / "curves.png", title="both")
    by_title = {axes.get_title(): axes for axes in figures[0].axes}
    first, second = by_title["Loss (not a measure of quality)"].lines
    assert len(first.get_xdata()) == 5 and set(second.get_ydata()) == {3.0} and len(second.get_xdata()) == 7
    assert first.get_color() != second.get_color()
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [r"no $\frac$ formula", "_second"]
    assert [line.get_color() for line in legend.get_lines()] == [first.get_color(), second.get_color()]
    assert legend.get_title().get_text() == "both"
    names = [text.get_text() for text in by_title["Patches per mask"].get_legend().get_texts()]
    assert names == ["context", "one target block"]  # each once, not once per run
    styles = [line.get_linestyle() for line in by_title["Patches per mask"].lines]
    assert styles == ["-", ":", "-", ":"]


def test_a_metric_that_only_the_second_run_has_is_drawn(tmp_path, figures):
    runs = {"a": [{"step": 1, "loss": 1.0}], "b": [{"step": 1, "effective_rank": 3.0}]}
    plot_training_curves(runs, tmp_path / "curves.png")
    assert len(figures[0].axes) == 2


# -------------------------------------------------------------------------------------------------------------- masks


def masks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two white images of 4 x 4 patches of 32 pixels, one context, two targets each."""
    images = torch.full((2, 1, 128, 128), 255, dtype=torch.uint8)
    contexts = torch.tensor([[[0, 1, 4]], [[2, 3, 7]]])
    return images, contexts, torch.tensor([[[10, 11], [14, 15]], [[8, 9], [12, 13]]])


def cell(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    """The picture at a place of the sheet, (H, W, 3)."""
    gap, top = cells.GAP, 2 * cells.GAP + 2 * (128 // 8)
    left, upper = gap + column * (128 + gap), top + gap + row * (128 + gap)
    return np.asarray(sheet)[upper : upper + 128, left : left + 128]


def test_each_mask_shows_its_patches_in_their_place_and_no_others(tmp_path):
    images, contexts, targets = masks()
    sheet = draw_masks(images, contexts, targets, 32, tmp_path / "masks.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "masks.png")), np.asarray(sheet))
    for row in range(2):
        assert (cell(sheet, row, 0) == 255).all()
        for column, indices in enumerate((*contexts[row], *targets[row]), start=1):
            middles = cell(sheet, row, column)[16::32, 16::32, 0]  # (4, 4)
            assert np.flatnonzero(middles == 255).tolist() == indices.tolist()
            hidden = cell(sheet, row, column) != 255
            hatched = np.repeat(hatching(128, 128)[..., None], 3, axis=2)
            outlines = (cell(sheet, row, column) == cells.OUTLINE).all(axis=2, keepdims=True)
            np.testing.assert_array_equal(cell(sheet, row, column)[hidden & ~outlines], hatched[hidden & ~outlines])


def test_targets_of_each_context_are_drawn_one_after_the_other():
    images, contexts, targets = masks()
    own = torch.stack([targets, targets.flip(-2) - 1], dim=1)  # (2, 2, 2, 2)
    sheet = draw_masks(images, contexts, own, 32)
    flat = draw_masks(images, contexts, torch.cat([targets, targets.flip(-2) - 1], dim=1), 32)
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(flat))


def test_small_images_are_enlarged_and_patches_may_be_oblong():
    images = torch.randint(0, 256, (1, 3, 8, 12), dtype=torch.uint8)
    sheet = draw_masks(
        images,
        torch.tensor([[[0, 1]]]),
        torch.tensor(
            [
                [[5]],
            ]
        ),
        (4, 4),
    )
    assert sheet.height > cells.CELL_PIXELS
    draw_masks(images, torch.tensor([[[0, 1]]]), torch.tensor([[[3]]]), (4, 6))


def test_masks_that_do_not_fit_are_errors():
    images, contexts, targets = masks()
    with pytest.raises(ValueError, match="8 to 16, but there are 16"):
        draw_masks(images, contexts, targets + torch.tensor([[[0, 1]]]), 32)
    with pytest.raises(ValueError, match="do not divide"):
        draw_masks(images, contexts, targets, 30)
    with pytest.raises(ValueError, match="float32"):
        draw_masks(images.float(), contexts, targets, 32)
    with pytest.raises(ValueError, match="context_indices must be"):
        draw_masks(images, contexts[:, 0], targets, 32)


# ------------------------------------------------------------------------------------------------------------- patches


def test_patches_are_cut_row_by_row():
    images = torch.arange(2 * 8 * 12, dtype=torch.uint8).view(2, 1, 8, 12)
    patches = cut_patches(images, (4, 6))  # 2 x 2 patches
    assert patches.shape == (2, 4, 1, 4, 6)
    torch.testing.assert_close(patches[1, 1], images[1, :, :4, 6:])
    torch.testing.assert_close(patches[1, 2], images[1, :, 4:, :6])


def test_the_most_detailed_patch_and_block_are_found():
    images = torch.full((2, 1, 16, 16), 7, dtype=torch.uint8)
    images[0, 0, 4:8, 8:10], images[1, 0, 12:, 13] = 255, 200  # in the patches 6 and 15 of 4 x 4
    assert most_detailed_patches(images, 4).tolist() == [6, 15]
    blocks = torch.tensor([[[0, 1], [5, 6], [8, 9]], [[0, 1], [4, 5], [14, 15]]])
    assert most_detailed_blocks(images, blocks, 4).tolist() == [1, 2]


# ----------------------------------------------------------------------------------------------------------------- PCA


def features(batch_size: int = 4, patches: int = 16, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Patch features whose directions have different variances."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, patches, width, generator=generator) * torch.arange(width, 0, -1)


def pictures(batch_size: int = 4, channels: int = 1, patch: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, channels, 4 * patch, 4 * patch)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_equal_features_have_equal_colours_in_every_image_and_others_differ():
    batch = features()
    batch[3, 5] = batch[0, 2]
    colors = pca_colors(batch).colors
    assert colors.shape == (4, 16, 3) and colors.min() >= 0 and colors.max() <= 1
    torch.testing.assert_close(colors[3, 5], colors[0, 2], rtol=0, atol=0)
    assert (colors[0, 2] - colors[0, 3]).abs().max() > 0.05


def test_colours_depend_neither_on_the_order_of_images_nor_on_the_sign_of_a_solver(monkeypatch):
    batch, order = features(), torch.tensor([2, 0, 3, 1])
    colors = pca_colors(batch).colors
    torch.testing.assert_close(pca_colors(batch[order]).colors, colors[order])
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (solve(matrix)[0], -solve(matrix)[1]))
    torch.testing.assert_close(pca_colors(batch).colors, colors)


def test_colours_are_the_directions_of_most_variance_spread_by_percentiles():
    batch = features(batch_size=8)
    batch[0, 0] *= 100  # one outlier must not make the rest one colour
    assert pca_colors(batch).colors.flatten(0, 1).std(dim=0).min() > 0.15
    centred = features() - features().mean(dim=(0, 1))
    values = torch.linalg.svdvals(centred.flatten(0, 1)).square()
    assert pca_colors(features()).share == pytest.approx((values[:3].sum() / values.sum()).item(), rel=1e-4)
    stretched = features() * torch.tensor([20.0, 1, 1, 5, 1, 1, 1, 1])
    reds, greens, _ = pca_colors(stretched).colors.flatten(0, 1).T
    for drawn, feature in ((reds, stretched[..., 0]), (greens, stretched[..., 3])):
        assert torch.corrcoef(torch.stack([drawn, feature.flatten()]))[0, 1] > 0.9


def test_features_without_variance_are_grey_not_magnified_rounding():
    colors, share, _ = pca_colors(torch.full((2, 16, 8), 0.1))
    assert (colors == 0.5).all() and share == pytest.approx(0, abs=1e-3)
    flat = torch.zeros(2, 16, 8)
    flat[..., 0] = torch.randn(2, 16)
    assert (pca_colors(flat).colors[..., 1:] == 0.5).all()


def test_the_share_of_the_place_is_one_for_places_and_small_for_noise():
    places = torch.randn(1, 16, 8).expand(6, -1, -1)
    assert position_share(places) == pytest.approx(1)
    assert position_share(torch.randn(200, 16, 8)) < 0.05
    assert position_share(torch.ones(2, 16, 8)) == 0
    torch.testing.assert_close(places - position_mean(places), torch.zeros(6, 16, 8))


def test_the_foreground_has_a_basis_of_its_own_and_the_rest_shows_the_image_in_grey():
    batch = features()
    chosen = torch.zeros(4, 16, dtype=torch.bool)
    chosen[:, 5:7] = True
    colors = pca_colors(torch.where(chosen[..., None], batch, 1e3 * batch), chosen)
    alone = pca_colors(batch[chosen].view(4, 2, -1))
    torch.testing.assert_close(colors.colors[chosen], alone.colors.flatten(0, 1))
    assert colors.share == pytest.approx(alone.share)
    drawn = cell(draw_pca(pictures(), {("", "x"): colors}, 32), 1, 1)
    torch.testing.assert_close(torch.tensor(drawn[48, 48]) / 255, colors.colors[1, 5], rtol=0, atol=1 / 255)
    np.testing.assert_array_equal(drawn[:32, :32], cells.faded(cell(draw_pca(pictures(), {}, 32), 1, 0))[:32, :32])
    with pytest.raises(ValueError, match="at least one patch"):
        pca_colors(batch, torch.zeros(4, 16, dtype=torch.bool))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_that_is_rarer_at_the_border(sign):
    inside = torch.zeros(5, 6, 6, dtype=torch.bool)
    inside[:, 2:4, 1:5] = True
    inside[2, 4:] = True  # an object may reach the border
    noise = 0.1 * torch.randn(5, 36, 8, generator=torch.Generator().manual_seed(0))
    batch = noise + sign * inside.flatten(1)[..., None] * torch.arange(1.0, 9)
    assert torch.equal(foreground_of(batch, (6, 6)), inside.flatten(1))


def test_colours_on_a_finer_grid_lie_in_their_patch():
    fine = pca_colors(features(patches=64))  # 8 x 8 for images of 4 x 4 patches
    drawn = cell(draw_pca(pictures(), {("", "x"): fine}, 32), 3, 1)
    middles = torch.tensor(drawn[8::16, 8::16]).flatten(0, 1)
    torch.testing.assert_close(middles / 255, fine.colors[3], rtol=0, atol=1 / 255)


def test_each_patch_has_its_colour_in_its_place():
    colors = pca_colors(features())
    sheet = draw_pca(pictures(), {("this", "encoder"): colors, ("another", ""): colors}, 32)
    middles = torch.tensor(cell(sheet, 2, 1)[16::32, 16::32]).flatten(0, 1)  # (16, 3)
    torch.testing.assert_close(middles / 255, colors.colors[2], rtol=0, atol=1 / 255)
    np.testing.assert_array_equal(cell(sheet, 2, 1), cell(sheet, 2, 2))
    with pytest.raises(ValueError, match=r"colors must be \(4, 16, 3\), got \(4, 15, 3\)"):
        draw_pca(pictures(), {("", ""): pca_colors(features(patches=15))}, 32)


# ------------------------------------------------------------------------------------------- attention and similarity


def attentions() -> torch.Tensor:
    """(4, 2, 16, 16): the first head looks at the next patch, the second everywhere alike."""
    following = torch.eye(16).roll(1, dims=1).expand(4, -1, -1)
    return torch.stack([following, torch.full((4, 16, 16), 1 / 16)], dim=1)


def test_attention_maps_follow_the_chosen_patch_and_sum_to_one():
    chosen = torch.tensor([0, 5, 9, 14])
    maps = attention_maps(attentions(), chosen)
    assert maps.shape == (4, 2 + 2, 16)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(4, 4))
    torch.testing.assert_close(maps[:, 1], torch.full((4, 16), 1 / 16))  # every patch is looked at by one and by all
    assert maps[:, 2].argmax(dim=1).tolist() == [1, 6, 10, 15]
    torch.testing.assert_close(maps[:, 0], (maps[:, 2] + maps[:, 3]) / 2)
    received = torch.zeros(1, 1, 16, 16)
    received[..., 3] = 1  # all look at patch 3
    assert attention_maps(received, torch.tensor([8]))[0, 1].tolist() == [float(patch == 3) for patch in range(16)]


def test_attention_of_another_shape_or_sum_is_an_error():
    with pytest.raises(ValueError, match="sum to 1"):
        attention_maps(2 * attentions(), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="attentions must be"):
        attention_maps(attentions()[:, 0], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="attentions must be"):
        draw_attention(pictures(), torch.full((4, 2, 15, 15), 1 / 15), torch.zeros(4, dtype=torch.int64), 32)


def is_outlined(picture: np.ndarray) -> list[int]:
    """Patches of 32 pixels with a line around them."""
    corners = picture[::32, ::32].reshape(-1, 3)
    return np.flatnonzero((corners == cells.OUTLINE).all(axis=1)).tolist()


def test_bright_patches_are_those_attended_to_and_the_chosen_patch_is_marked():
    grey = torch.full_like(pictures(), 100)
    sheet = draw_attention(grey, attentions(), torch.tensor([0, 5, 9, 14]), 32)
    letter, gap = 128 // 8, cells.GAP
    step, upper = 128 + 2 * gap + letter, 2 * gap + letter
    maps = [np.asarray(sheet)[upper + step * row :][:128, gap + 136 : gap + 264] for row in range(5)]
    assert [is_outlined(each) for each in maps] == [[5], [5], [], [5], [5]]  # the third is about all patches
    brightness = maps[3][16::32, 16::32].astype(int).sum(axis=2).flatten()
    assert brightness.argmax() == 6 and len(set(np.delete(brightness, [2, 5, 6, 7, 10]))) == 1  # 6 and its neighbours
    assert brightness.min() > 0  # the image shows through


def test_a_chosen_patch_is_like_itself_and_marked_in_its_own_image_only():
    batch, chosen = features(), torch.tensor([0, 5, 9, 14])
    batch[2, 7] = 3 * batch[1, 5]  # the same direction
    batch[3, 2] = -batch[1, 5]
    maps = similarity_maps(batch, chosen)
    assert maps.shape == (4, 4, 16) and maps.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(maps[torch.arange(4), torch.arange(4), chosen], torch.ones(4))
    assert maps[1, 2, 7].item() == pytest.approx(1) and maps[1, 3, 2].item() == pytest.approx(-1)
    torch.testing.assert_close(maps[0, 2, 3], torch.cosine_similarity(batch[0, 0], batch[2, 3], dim=0))
    sheet = draw_similarity(pictures(), batch, chosen, 32)
    outlines = [[is_outlined(cell(sheet, row, column)) for column in range(5)] for row in range(5)]
    expected = [[[]] * 5] + [
        [[patch], *([patch] if row == column else [] for column in range(4))]
        for row, patch in enumerate(chosen.tolist())
    ]
    assert outlines == expected
    brightest = cell(sheet, 2, 3)[16::32, 16::32].astype(int).sum(axis=2).flatten()
    assert brightest.argmax() == 7


# --------------------------------------------------------------------------------------------------------- predictions


def test_the_nearest_patch_is_found_but_never_in_the_same_image():
    bank, numbers = features(), torch.arange(4)
    bank[3, 11] = 2 * bank[0, 6]
    query = bank[0, 6].unsqueeze(0)
    assert nearest_patches(query, torch.tensor([1]), bank, numbers).tolist() in ([6], [3 * 16 + 11])
    assert nearest_patches(query, torch.tensor([0]), bank, numbers).tolist() == [3 * 16 + 11]
    assert nearest_patches(query, torch.tensor([3]), bank, numbers).tolist() == [6]
    assert nearest_patches(query, torch.tensor([0]), bank[[3, 1]], numbers[[3, 1]]).tolist() == [11]
    with pytest.raises(ValueError, match="no other image"):
        nearest_patches(query, torch.tensor([0]), bank[:1], numbers[:1])


def test_many_queries_are_found_as_one_by_one():
    bank, queries = features(), features(batch_size=20, seed=3).flatten(0, 1)  # more than fit into one part
    assert len(queries) > 2 * visualization_predictions.QUERIES_AT_ONCE
    numbers = torch.arange(len(queries)) % 4
    together = nearest_patches(queries, numbers, bank, torch.arange(4))
    alone = [
        nearest_patches(queries[[i]], numbers[[i]], bank, torch.arange(4)).item() for i in range(0, len(queries), 37)
    ]
    assert together[::37].tolist() == alone
    assert (together // 16 != numbers).all()


def test_scores_are_perfect_for_the_truth_and_chance_for_noise():
    bank = features(batch_size=30, width=32)
    images, patches = torch.arange(8).repeat_interleave(16), torch.arange(16).repeat(8)
    truths = bank[:8].flatten(0, 1)
    perfect = score_predictions(truths, truths, images, patches, bank, torch.arange(30))
    assert perfect.prediction == pytest.approx(1) and perfect.rank == pytest.approx(1)
    noise = score_predictions(torch.randn(128, 32), truths, images, patches, bank, torch.arange(30))
    assert abs(noise.prediction) < 0.1 and 0.4 < noise.rank < 0.6
    assert abs(noise.random) < 0.1 and noise.place == perfect.place < 0.3


def test_scores_tell_the_place_apart_from_the_image():
    places = 3 * torch.randn(16, 32)
    bank = places + torch.randn(30, 16, 32)
    images, patches = torch.arange(4).repeat_interleave(16), torch.arange(16).repeat(4)
    scores = score_predictions(bank[:4].flatten(0, 1), bank[:4].flatten(0, 1), images, patches, bank, torch.arange(30))
    assert 0.85 < scores.place < 0.99 and abs(scores.random) < 0.4
    own_only = torch.cat([torch.zeros(2, 16, 32), bank[:1]])  # the truth's own image must not count as another
    alone = score_predictions(bank[0], bank[0], torch.full((16,), 2), torch.arange(16), own_only, torch.arange(3))
    assert alone.place == 0 and alone.random == 0


def test_what_was_found_is_pasted_into_the_block_and_nowhere_else():
    images, contexts, targets = masks()
    contexts, blocks = contexts[:, 0], targets[:, 0]
    found = torch.full((2, 2, 1, 32, 32), 40, dtype=torch.uint8)
    found[:, 1] = 90
    truth = cut_patches(images, 32).gather(1, blocks.view(2, 2, 1, 1, 1).expand(-1, -1, 1, 32, 32))
    sheet = draw_predictions(images, contexts, blocks, truth, found, 32)
    for row in range(2):
        true_block, nearest, guessed = (cell(sheet, row, column) for column in (2, 3, 4))
        np.testing.assert_array_equal(true_block, nearest)  # the same patches make the same picture
        middles = guessed[16::32, 16::32, 0].flatten()
        assert middles[blocks[row]].tolist() == [40, 90]
        assert np.flatnonzero(middles == 255).tolist() == contexts[row].tolist()
        seen = cell(sheet, row, 1)[16::32, 16::32, 0].flatten()
        assert np.flatnonzero(seen == 255).tolist() == contexts[row].tolist()
        outlined = np.flatnonzero((guessed[::32, ::32] == cells.OUTLINE).all(axis=2)).tolist()
        assert set(outlined) <= set(blocks[row].tolist()) and outlined


def test_the_scores_are_drawn_as_three_bars(figures):
    draw_scores(visualization_predictions.PredictionScores(0.81, 0.7, -0.1, 0.96))
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [0.81, 0.7, -0.1]
    assert [text.get_text() for text in axes.texts] == ["0.81", "0.70", "-0.10"]
    assert axes.get_xlim()[0] <= -0.3  # the number stands left of the bar, and not on its name


# ----------------------------------------------------------------------------------------------------------------- map


def test_the_map_is_the_same_each_time_and_groups_what_is_alike():
    groups = 20 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    pooled = groups.repeat_interleave(20, dim=0) + torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    points = map_points(pooled)
    np.testing.assert_array_equal(points, map_points(pooled))
    nearest = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(60)
    assert (nearest.argmin(axis=1) // 20 == np.arange(60) // 20).all()
    few = map_points(pooled[:5])
    assert few.shape == (5, 2) and np.isfinite(few).all()
    assert (map_points(torch.ones(60, 8)) == 0).all()  # collapsed


def map_arguments(count: int = 60) -> tuple[np.ndarray, torch.Tensor]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(count, 2)), pictures(4, channels=3, patch=4).repeat(count // 4, 1, 1, 1)


def test_the_map_does_not_depend_on_the_names_of_classes(figures):
    points, images = map_arguments()
    labels = [number % 3 for number in range(60)]
    for names in (["cat", "dog", "eel"], [r"no $\frac$ formula", "_y", "<script>"]):
        draw_map(points, images, labels, names)
    first, second = (figure.axes[0] for figure in figures)
    for one, other in zip(first.collections, second.collections, strict=True):
        np.testing.assert_array_equal(one.get_offsets(), other.get_offsets())
        np.testing.assert_array_equal(one.get_facecolors(), other.get_facecolors())
    for figure, names in zip(figures, (["cat", "dog", "eel"], [r"no $\frac$ formula", "_y", "<script>"]), strict=True):
        legend = figure.legends[0]  # its order is by rows
        drawn = {
            text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.legend_handles, strict=True)
        }
        assert drawn == dict(zip(names, CLASS_COLORS, strict=False))
    for label, drawn in enumerate(first.collections[1:]):
        np.testing.assert_array_equal(drawn.get_offsets(), points[label::3])


def test_more_classes_than_colours_leave_the_rest_grey(figures):
    points, images = map_arguments()
    labels = [0, 1, 2, -1, -1] * 2 + list(range(3, 13)) * 5  # the last ten are the frequent ones
    draw_map(points, images, labels)
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(texts) == sorted([*map(str, range(3, 13)), "the rest"])
    looks = {(line.get_color(), line.get_marker()) for line in figures[0].legends[0].get_lines()}
    assert len(looks) == 11
    assert len(figures[0].axes[0].collections[0].get_offsets()) == 10
    draw_map(points, images)
    assert not figures[1].legends


def test_the_map_of_the_page_has_ten_colours_and_lies_inside_its_frame():
    points, images = map_arguments()
    labels = [0, 1, 2, -1, -1] * 2 + list(range(3, 13)) * 5
    body = scatter_of(points, images, labels, [f"class {number}" for number in range(13)], "a map")
    assert len(set(CLASS_COLORS)) == 10
    assert body.names == [*((number, f"class {number + 3}") for number in range(10)), (REST, "the rest")]
    assert [point.group for point in body.points] == [REST] * 10 + list(range(10)) * 5
    assert [point.name for point in body.points][2:5] == ["class 2", "", ""]
    assert all(0 < point.x < 100 and 0 < point.y < body.height for point in body.points)
    xs, ys = np.array([(point.x, point.y) for point in body.points]).T
    assert np.corrcoef(xs, points[:, 0])[0, 1] > 0.999 and np.corrcoef(ys, points[:, 1])[0, 1] < -0.999
    assert not scatter_of(points, images, None, None, "").names
    same_place = scatter_of(np.zeros((60, 2)), images, labels, None, "")  # collapsed
    assert len({(point.x, point.y) for point in same_place.points}) == 1


def test_long_class_names_are_cut_and_do_not_squeeze_the_map(figures):
    points, images = map_arguments()
    labels = [number % 10 for number in range(60)]
    for length in (1, 80):
        sheet = draw_map(points, images, labels, [letter * length for letter in "abcdefghij"])
        assert figures[-1].axes[0].get_window_extent().width > 0.8 * sheet.width * figures[-1].dpi / 150
    texts = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert sorted(texts)[0] == "a" * 21 + "..." and len(texts) == 10


def test_thumbnails_do_not_overlap_even_where_all_images_are_at_one_place(figures):
    points, images = map_arguments()
    draw_map(points, images)
    draw_map(np.zeros((60, 2)), images)
    first, second = ([box.xyann for box in figure.axes[0].artists] for figure in figures)
    distance = np.ptp(points, axis=0).max() / visualization_maps.THUMBNAILS_ACROSS
    assert len(first) > 10 and len(second) == 1
    assert min(np.abs(np.subtract(a, b)).max() for i, a in enumerate(first) for b in first[:i]) > distance


def test_legends_read_row_by_row():
    assert visualization_curves.legend_row_by_row("abcdefg", 3) == [
        "a",
        "d",
        "g",
        "b",
        "e",
        "c",
        "f",
    ]  # a b c / d e f / g


def test_a_black_image_stays_visible_where_it_is_background():
    """On a phone a picture that is nearly black shows nothing."""
    assert cells.faded(np.zeros((4, 4, 3), np.uint8)).min() >= 64
    assert cells.faded(np.full((4, 4, 3), 255, np.uint8)).max() < 192  # colours stand out from it
