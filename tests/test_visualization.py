"""Laws of the pictures: they are written, show what was given, and leave matplotlib's global state alone."""

import math
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ijepa import visualization
from ijepa.visualization import draw_masks, plot_training_curves


def rows(count: int) -> list[dict]:
    keys = [key for panel in visualization.PANELS for key in panel.lines]
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
    assert [each.get_title() for each in axes] == [panel.title for panel in visualization.PANELS]
    assert all(each.get_ylabel() for each in axes) and figures[0].get_suptitle() == "tiny"
    zeros = [panel.from_zero for panel in visualization.PANELS]
    assert [each.get_ylim()[0] == 0 for each in axes] == zeros
    assert visualization.CAPTION in figures[0].get_supxlabel()
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


# -------------------------------------------------------------------------------------------------------------- masks


def masks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two white images of 4 x 4 patches of 32 pixels, one context, two targets each."""
    images = torch.full((2, 1, 128, 128), 255, dtype=torch.uint8)
    contexts = torch.tensor([[[0, 1, 4]], [[2, 3, 7]]])
    return images, contexts, torch.tensor([[[10, 11], [14, 15]], [[8, 9], [12, 13]]])


def cell(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    """The picture at a place of the sheet, (H, W, 3)."""
    gap, top = visualization.GAP, 2 * visualization.GAP + 2 * (128 // 9)
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
    assert sheet.height > visualization.CELL_PIXELS
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
