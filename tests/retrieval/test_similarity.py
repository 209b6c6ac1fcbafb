"""Exact search by cosine similarity on features alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_transformers.evaluation.probes import standardize
from ijepa_transformers.retrieval import similarity
from ijepa_transformers.retrieval.doubts import about_similarities
from ijepa_transformers.retrieval.similarity import SimilaritySearch


@pytest.fixture
def features():
    """(40, 6) with an offset that all share, and scales that differ."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator) * torch.tensor([1, 2, 5, 0.1, 1, 3]) + 100


def cosines(features):
    standard = F.normalize(standardize(features, features)[0], dim=1)
    return standard @ standard.T


def test_the_nearest_are_those_of_all_cosines_of_standardised_features(features):
    found = SimilaritySearch(features).query(features[3:5], k=40)
    expected = cosines(features)[3:5]
    torch.testing.assert_close(found.similarities, expected.sort(dim=1, descending=True).values)
    assert found.rows[:, 0].tolist() == [3, 4] and sorted(found.rows[0].tolist()) == list(range(40))


def test_a_row_can_be_left_out_and_of_equal_photos_the_first_comes_first(features):
    features[9] = features[30] = features[3]
    found = SimilaritySearch(features).query(features[3:4], k=3, without=3)
    assert found.rows[0, :2].tolist() == [9, 30] and 3 not in found.rows


@pytest.mark.parametrize("values", [40 * 40, 40 * 3], ids=["at once", "three rows at a time"])
def test_pairs_and_outliers_are_those_of_all_cosines(features, monkeypatch, values):
    monkeypatch.setattr(similarity, "_CHUNK_VALUES", values)
    features[20] = features[5] + 0.001
    features[7] = features[5] + 0.002
    found = SimilaritySearch(features).compare_all(0.99)
    expected = cosines(features).fill_diagonal_(-2)
    assert [group.rows for group in found.groups] == [[5, 7, 20]]
    assert found.groups[0].similarity == pytest.approx(expected[5, 20].item(), abs=1e-6)
    torch.testing.assert_close(found.closeness, expected.topk(5, dim=1).values.mean(1))
    assert found.outliers(2) == found.closeness.argsort()[:2].tolist()


def test_groups_come_with_the_most_similar_first_and_chains_are_one_group():
    angles = torch.tensor([0.0, 0.3, 0.6, 2.0, 2.01, 4.0, 5.2])
    search = SimilaritySearch(torch.stack([angles.cos(), angles.sin()], dim=1))
    pairs = cosines(torch.stack([angles.cos(), angles.sin()], dim=1))
    threshold = min(pairs[0, 1], pairs[1, 2]).item() - 1e-4
    assert pairs[0, 2] < threshold
    assert [group.rows for group in search.compare_all(threshold).groups] == [[3, 4], [0, 1, 2]]


def test_the_usual_threshold_is_near_one_where_photos_are_near_one_another(features):
    search = SimilaritySearch(features)
    nearest = cosines(features).fill_diagonal_(-2).max(1).values
    expected = 1 - similarity.USUAL_SHARE * (1 - np.median(nearest.numpy()))
    assert search.usual_threshold() == pytest.approx(expected, abs=1e-5)


def test_few_photos_and_equal_photos_have_answers():
    alone = SimilaritySearch(torch.ones(1, 3))
    assert alone.compare_all(0.9).groups == [] and alone.compare_all(0.9).outliers(1) == [0]
    assert alone.usual_threshold() <= 1
    equal = SimilaritySearch(torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 1.0]]))
    assert [group.rows for group in equal.compare_all(equal.usual_threshold()).groups] == [[0, 1]]


@pytest.mark.parametrize("count", [2, 12])
def test_equal_photos_are_one_group_with_similarity_1(features, count):
    equal = features[:1].repeat(count, 1)
    equal[1] *= 1 + 2e-7  # rounding
    search = SimilaritySearch(equal)
    for threshold in (search.usual_threshold(), 1):
        found = search.compare_all(threshold)
        assert [(group.rows, group.similarity) for group in found.groups] == [(list(range(count)), 1)]
        assert found.closeness.tolist() == [1] * count
    assert search.query(equal[:1], k=1, without=0).similarities.tolist() == [[1]]
    assert search.query(features[5:6], k=1).similarities.tolist() == [[0]]  # another photo


def test_equal_photos_among_others_are_found_at_threshold_1(features):
    features[30] = features[3]
    assert [group.rows for group in SimilaritySearch(features).compare_all(1).groups] == [[3, 30]]


@pytest.mark.parametrize("copies", [0, 1, 5])
def test_copies_do_not_move_the_usual_threshold(copies):
    """Each photo has so many copies. Without these lines the usual distance would be that of the copies."""
    generator = torch.Generator().manual_seed(1)
    photos = torch.randn(60, 8, generator=generator)
    noise = torch.randn(copies, 60, 8, generator=generator) * 0.003
    alone, search = SimilaritySearch(photos), SimilaritySearch(torch.cat([photos, *(photos + noise)]))
    assert 1 - search.usual_threshold() == pytest.approx(1 - alone.usual_threshold(), rel=0.05)
    found = [group.rows for group in search.compare_all(search.usual_threshold()).groups]
    assert sorted(found) == [list(range(row, 60 * (copies + 1), 60)) for row in range(60) if copies]


def test_a_folder_that_is_mostly_one_photo_has_a_usual_threshold(features):
    features[:30] = features[3]
    search = SimilaritySearch(features)
    assert [group.rows for group in search.compare_all(search.usual_threshold()).groups] == [list(range(30))]


def test_a_crowd_of_equal_photos_is_one_group_and_hides_nothing():
    """1,500 equal photos have more than a million pairs. They move neither the usual threshold nor the outliers."""
    generator = torch.Generator().manual_seed(2)
    photos = torch.randn(60, 8, generator=generator)
    near = photos[:30] + torch.randn(30, 8, generator=generator) * 0.02
    search = SimilaritySearch(torch.cat([photos, near, photos[:1].repeat(1500, 1)]))
    found = search.compare_all(search.usual_threshold())
    pairs = [[row, 60 + row] for row in range(1, 30)]
    assert sorted(group.rows for group in found.groups) == [[0, 60, *range(90, 1590)], *pairs]
    assert found.groups[0].similarity == 1 and not set(found.outliers(50)) & {0, *range(90, 1590)}
    assert [len(group.rows) for group in search.compare_all(1).groups] == [1501]
    assert [len(group.rows) for group in search.compare_all(-1).groups] == [1590]


def test_what_cannot_be_compared_is_refused(features):
    with pytest.raises(ValueError, match=r"features must be \(N, D\) with N > 0, got \(0, 3\)"):
        SimilaritySearch(torch.zeros(0, 3))
    features[2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity: the encoder has diverged"):
        SimilaritySearch(features)


def test_random_pairs_have_the_median_and_the_95th_percentile_of_all_pairs_that_are_not_equal(features):
    features[1] = features[0]  # equal photos say nothing about different ones
    pairs = cosines(features)[torch.ones(40, 40).triu(1).bool()].numpy()
    found = SimilaritySearch(torch.cat([features, features[:1]])).random_pairs()
    assert found.median == pytest.approx(np.median(pairs), abs=0.02)
    assert found.percentile_95 == pytest.approx(np.quantile(pairs, 0.95), abs=0.05)
    assert found.warning is None and about_similarities(found, None) == [found.sentence]
    assert about_similarities(found, "Why.") == [found.sentence, "WARNING: Why."]
    assert SimilaritySearch(torch.ones(5, 3)).random_pairs() is None


def test_a_model_that_hardly_tells_photos_apart_is_named_so():
    """All features are one number and a little noise, so half of all pairs have a similarity near 1."""
    generator = torch.Generator().manual_seed(0)
    collapsed = torch.randn(60, 1, generator=generator) + 0.01 * torch.randn(60, 8, generator=generator)
    found = SimilaritySearch(collapsed).random_pairs()
    assert "hardly tells these photos apart" in found.warning
    assert about_similarities(found, None)[1] == f"WARNING: {found.warning}"
    assert about_similarities(found, "Why.")[1:] == ["WARNING: Why."]  # one is enough
    assert about_similarities(None, None) == [] and about_similarities(None, "Why.") == ["WARNING: Why."]


@pytest.mark.parametrize(("photos", "copies"), [(40, 30), (12, 60), (60, 25)])
def test_a_folder_of_crowds_of_near_copies_has_a_usual_threshold(photos, copies):
    """Each photo has more copies than the 20 whose distance would else tell how far different photos are."""
    generator = torch.Generator().manual_seed(3)
    different = torch.randn(photos, 16, generator=generator)
    features = torch.cat([different + 0.01 * torch.randn(photos, 16, generator=generator) for _ in range(copies)])
    search = SimilaritySearch(features)
    found = search.compare_all(search.usual_threshold()).groups
    assert sorted(group.rows for group in found) == [
        list(range(row, photos * copies, photos)) for row in range(photos)
    ]


@pytest.mark.parametrize("copies", [30, 400])
def test_a_folder_that_is_mostly_near_copies_of_one_photo_has_a_usual_threshold(copies):
    """They would be the mean of all photos, and what is near the mean has no direction."""
    generator = torch.Generator().manual_seed(4)
    others = torch.randn(30, 16, generator=generator) + 3
    crowd = torch.randn(16, generator=generator) + 3 + 0.01 * torch.randn(copies, 16, generator=generator)
    search = SimilaritySearch(torch.cat([others, crowd]))
    found = search.compare_all(search.usual_threshold()).groups
    assert [group.rows for group in found] == [list(range(30, 30 + copies))]


@pytest.mark.parametrize("crowds", [2, 7])
def test_a_few_tight_classes_are_no_near_copies(crowds):
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(crowds, 16, generator=generator)
    features = torch.cat([centre + 0.02 * torch.randn(25, 16, generator=generator) for centre in centres])
    search = SimilaritySearch(features)
    assert all(len(group.rows) < 25 for group in search.compare_all(search.usual_threshold()).groups)
