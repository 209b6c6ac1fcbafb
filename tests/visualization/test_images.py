"""Which images are shown, and features on a finer grid."""

import numpy as np
import pytest
import torch

from ijepa_transformers import IJepaModel
from ijepa_transformers.visualization.colors import shifted_features, shifts_for
from ijepa_transformers.visualization.pool import Pool, choose_images, is_held_out


def test_images_with_detail_that_differ_are_chosen():
    images = torch.full((8, 1, 32, 32), 128, dtype=torch.uint8)
    stripes = (torch.arange(32) // 4 % 2 * 255).to(torch.uint8)
    images[2] = stripes  # the most detail
    images[3] = stripes  # the same again
    images[5] = stripes.unsqueeze(1) // 2 + 60  # less, but another image
    images[6, :, :4] = 255
    assert choose_images(images, range(8), 2) == [2, 5]
    assert choose_images(images, [0, 3, 6], 2)[0] == 3
    assert sorted(choose_images(images, [0, 3, 6], 9)) == [0, 3, 6]
    assert len(set(choose_images(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), range(9), 4))) == 4  # all alike


def test_the_chosen_images_come_first_and_keep_rows_and_labels():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    pool = Pool(images, [10, 11, 12, 13, 14], np.arange(5), ["a"], 0, [0.5], [0.5]).beginning_with([3, 1])
    assert pool.images.flatten().tolist() == pool.labels.tolist() == [3, 1, 0, 2, 4]
    assert pool.rows == [13, 11, 10, 12, 14]


def test_about_a_fifth_of_the_training_images_and_all_others_are_held_out():
    share = np.mean([is_held_out("train", row) for row in range(2000)])
    assert 0.17 < share < 0.23
    assert all(is_held_out("test", row) for row in range(100))


@pytest.mark.parametrize(
    ("grid", "patch", "shifts"),
    [((14, 14), (16, 16), 1), ((8, 8), (4, 4), 2), ((7, 30), (16, 16), 2), ((2, 2), (16, 16), 4), ((8, 8), (2, 8), 1)],
)
def test_coarse_grids_become_as_fine_as_pixels_allow(grid, patch, shifts):
    assert shifts_for(grid, patch) == shifts


def test_features_of_moved_images_are_sorted_by_place(tiny_config, monkeypatch):
    """Of an encoder that gives the mean of a patch: on a ramp, features rise evenly from left to right."""

    class Means(IJepaModel):
        def forward(self, pixel_values):
            size = self.config.patch_height_and_width[0]
            means = torch.nn.functional.avg_pool2d(pixel_values, size).flatten(2).transpose(1, 2)
            return type("Output", (), {"last_hidden_state": means})

    encoder = Means(tiny_config)  # 4 x 4 patches of 8 pixels
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    found = shifted_features(encoder, ramp, 2)
    assert found.shape == (1, 64, 3)
    rows = found[0, :, 0].view(8, 8)
    assert torch.equal(rows[0], rows[7])
    torch.testing.assert_close(rows[0, 1:7], torch.tensor([5.5, 9.5, 13.5, 17.5, 21.5, 25.5]))
    torch.testing.assert_close(shifted_features(encoder, ramp, 1)[0, :4, 0], torch.tensor([3.5, 11.5, 19.5, 27.5]))
