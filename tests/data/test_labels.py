# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Which columns are labels, and which classes they have."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from ijepa_transformers.arguments import DatasetArguments
from ijepa_transformers.data import notices
from ijepa_transformers.data.labels import describe_classes, has_several, labels_of, several_labels_of
from ijepa_transformers.data.sources import load_image_dataset, open_split
from tests.data.images import encoded, photo_pixels


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(notices, "_told", set())


PICTURE = encoded(photo_pixels(8, 8))


@pytest.fixture
def opened(tmp_path):
    """A function: the columns of a labelled table -> its data set as a command opens it."""

    def open_table(label_column=None, needs="required", **columns):
        count = len(next(iter(columns.values())))
        datasets.Dataset.from_dict({"img": [PICTURE] * count, **columns}).to_parquet(tmp_path / "x.parquet")
        return open_split(DatasetArguments(str(tmp_path), label_column=label_column), "train", needs)

    return open_table


@pytest.mark.parametrize(
    ("label", "class_names", "ids"),
    [
        ([0, 1_000_000, 0], ["0", "1000000"], [0, 1, 0]),
        ([0, 1, 255], ["0", "1", "255"], [0, 1, 2]),
        ([1, 2, -1], ["1", "2"], [0, 1, -1]),
        ([10, 2, None], ["2", "10"], [1, 0, -1]),
        ([0, 1, 2], ["0", "1", "2"], [0, 1, 2]),
        ([True, False, None], ["False", "True"], [1, 0, -1]),
        ([3.0, 5.0, float("nan")], ["3", "5"], [0, 1, -1]),
        (["b", "a", None], ["a", "b"], [1, 0, -1]),
        (["b", "", "a", " "], ["a", "b"], [1, -1, 0, -1]),
        ([[3], [5], [3]], ["3", "5"], [0, 1, 0]),
        ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], ["0", "1", "2"], [2, 0, 1]),
    ],
)
def test_one_label_per_image(opened, label, class_names, ids):
    dataset = opened(label=label)
    assert dataset.features["label"].names == class_names and labels_of(dataset).tolist() == ids


def test_gaps_between_numbers_are_told_once(opened, capsys):
    opened(label=[0, 1, 255])
    opened(label=[0, 1, 255])
    assert capsys.readouterr().err == (
        "note: the numbers in column 'label' have gaps: 0, 1, 255. Only numbers that occur are classes: 3, called by"
        " their numbers.\n"
    )


def test_all_splits_decide_which_numbers_are_classes(tmp_path):
    for split, label in (("train", [4, 9]), ("test", [6, 4])):
        table = datasets.Dataset.from_dict({"img": [PICTURE] * 2, "label": label})
        table.to_parquet(tmp_path / f"{split}.parquet")
    train, test = load_image_dataset(tmp_path), load_image_dataset(tmp_path, split="test")
    assert train.features == test.features and (train["label"][:], test["label"][:]) == ([0, 2], [1, 0])


@pytest.mark.parametrize(
    ("columns", "class_names", "rows"),
    [
        ({"label": [[0, 2], [1], []]}, ["0", "1", "2"], [[1, 0, 1], [0, 1, 0], [0, 0, 0]]),
        ({"label": [[1, 9], [9, 1], [9, 9]]}, ["1", "9"], [[1, 1], [1, 1], [0, 1]]),
        ({"labels": [["dog", "cat"], ["cat"]]}, ["cat", "dog"], [[1, 1], [1, 0]]),
        ({"label": [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]}, ["0", "1", "2"], [[0, 1, 1], [0, 0, 0]]),
        ({"label": [[True, False], [True, True]]}, ["0", "1"], [[1, 0], [1, 1]]),
    ],
)
def test_several_labels_per_image(opened, columns, class_names, rows):
    dataset = opened(**columns)
    assert has_several(dataset) and dataset.features["label"].feature.names == class_names
    assert several_labels_of(dataset).tolist() == rows
    with pytest.raises(ValueError, match="an image has a list of labels"):
        labels_of(dataset)


def test_an_image_without_a_list_has_no_label_and_an_empty_list_no_class(opened):
    rows = several_labels_of(opened(label=[[0, 1], None, []]))
    assert np.isnan(rows[1]).all() and rows[[0, 2]].tolist() == [[1, 1], [0, 0]]


def test_columns_of_zero_and_one_are_classes_where_they_are_named(opened):
    cat, dog = [1, 0, 1], [1, 1, 0]
    with pytest.raises(ValueError, match=r"has no labels: the columns are cat \(int64\).* --label_column cat,dog\.$"):
        opened(cat=cat, dog=dog)
    assert several_labels_of(opened("cat, dog", cat=cat, dog=dog)).tolist() == [[1, 1], [0, 1], [1, 0]]
    assert labels_of(opened("cat,dog", cat=[1, 0, 0], dog=[0, 1, 1])).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"'dog' is not a column of 0 and 1; the columns are cat"):
        opened("cat,dog", cat=cat, dog=[1, 2, 0])


def test_a_column_target_is_a_label_and_a_label_goes_before_it(opened):
    assert labels_of(opened(target=[0, 1])).tolist() == [0, 1]
    assert labels_of(opened(target=[0, 1], label=[1, 0])).tolist() == [1, 0]


def test_numbers_that_are_no_classes_are_named_where_labels_are_needed(opened):
    columns = {"label": [0.5, 1.25, 0.5]}
    with pytest.raises(ValueError, match=r"has no labels: the column 'label' holds numbers such as 0\.5, and"):
        opened(**columns)
    with pytest.raises(ValueError, match="holds infinite numbers"):
        opened(label=[1.0, float("inf")])
    assert opened(needs="optional", **columns).column_names == ["image"]
    with pytest.raises(ValueError, match="class ids in column 'label' must be -1 or more, got -2"):
        opened(label=[0, -2])


def test_classes_are_described_with_their_numbers_of_images(opened):
    assert describe_classes(opened(label=["b", "a", "b"])) == "2 classes: a (1), b (2)"
    assert describe_classes(opened(label=["a\nb", "\x1b[2J", "é"])) == r"3 classes: '\x1b[2J' (1), 'a\nb' (1), é (1)"
    assert describe_classes(opened(label=[[0, 2], [2]])) == "2 classes, several per image: 0 (1), 2 (2)"
    label = datasets.ClassLabel(names=["x", "y"])
    table = datasets.Dataset.from_dict({"label": [1, 1]}, features=datasets.Features({"label": label}))
    assert describe_classes(table) == "2 classes: x (0), y (2); 1 without an image: x"


def test_splits_that_name_their_classes_differently_keep_their_own(tmp_path):
    for split, class_names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=class_names)})
        table = datasets.Dataset.from_dict({"img": [PICTURE] * 2, "label": [0, 1]}, features=features)
        table.save_to_disk(tmp_path / "saved" / split)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    test = load_image_dataset(tmp_path / "saved", split="test")
    assert test.features["label"].names == ["dog", "cat"] and labels_of(test).tolist() == [0, 1]


def test_a_single_column_of_another_name_is_named(opened):
    with pytest.raises(ValueError, match=r"the columns are Label \(int64\); name one with label_column"):
        opened(Label=[0, 1])


def test_minus_one_and_one_are_not_two_classes(opened):
    with pytest.raises(ValueError, match=r"has only one class, 1: -1 in the column 'label' means no label.*write 0"):
        opened(label=[-1, 1])


def test_a_column_that_is_named_twice_is_refused(opened):
    with pytest.raises(ValueError, match="label_column 'cat,cat' names a column twice"):
        opened(label_column="cat,cat", cat=[0, 1], dog=[1, 0])


def test_empty_strings_are_told_and_are_no_labels(opened, capsys):
    opened(label=["a", "", "b"])
    assert "1 image has an empty string in the column 'label', which means no label" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no labels: the column 'label' is empty"):
        opened(label=["", ""])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([[1, -1], [0, 1]], "the lists in the column 'label' hold 1, 0 and -1"),
        ([[1, 0], [0, 0, 1]], "the lists in the column 'label' hold 0 and 1, but have from 2 to 3 entries"),
        ([-1, None], "the column 'label' is empty"),
        ([[], [], None, [-1]], "the column 'label' is empty"),
        ([1e300, 2.0], r"the column 'label' holds numbers such as 1e\+300"),
        ([b"cat", b"dog"], "the column 'label' is of the type binary; classes are whole numbers, names"),
        ([{"id": 1}, {"id": 2}], "the column 'label' is of the type nested"),
    ],
)
def test_labels_that_mean_nothing_sure_are_refused(opened, label, message):
    with pytest.raises(ValueError, match=f"has no labels: {message}"):
        opened(label=label)


@pytest.mark.parametrize(("ids", "wrong"), [([0, 1, 2], 2), ([0, -2, 1], -2)])
def test_a_class_id_without_a_name_is_refused(tmp_path, ids, wrong):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"img": [PICTURE] * 3, "label": ids}, features=features).data.table
    label = datasets.ClassLabel(names=["cat", "dog"])
    metadata = datasets.Features({"img": datasets.Image(), "label": label}).arrow_schema.metadata
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"'label' holds the class id {wrong}, and names 2 classes"):
        open_split(DatasetArguments(str(tmp_path)), "train", labels="required")


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (["cat", "Cat ", "dog"], "The classes 'Cat ' and 'cat' differ in spaces, capital letters or accents only."),
        (["a", "b", "a|b"], "The class 'a|b' of the column 'label' looks like several classes."),
        (["[0, 2]", "[1]"], "The class '[0, 2]' of the column 'label' looks like several classes."),
    ],
)
def test_names_that_are_hardly_those_of_a_class_are_told(opened, capsys, label, said):
    opened(label=label)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "taken", "told"),
    [
        ({"fine_label": [1, 0], "coarse_label": [0, 1]}, [1, 0], "the column 'coarse_label' may hold labels too"),
        (
            {"label": [1, 0], "target": [0, 1]},
            [1, 0],
            "the column 'target' may hold labels too (--label_column target)",
        ),
        ({"category": ["a", "b"], "class_id": [1, 0], "superclass": [0, 0]}, [0, 1], "'class_id', 'superclass' may"),
        ({"label": [1, 0], "width": [3, 4], "labeler": ["x", "y"]}, [1, 0], None),
    ],
)
def test_other_columns_that_may_hold_labels_are_told(opened, capsys, columns, taken, told):
    assert labels_of(opened(**columns)).tolist() == taken
    error = capsys.readouterr().err
    assert told in error if told else "hold labels too" not in error
    column = list(columns)[1]
    if told:
        opened(label_column=column, **columns)
        assert "hold labels too" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cells", "class_names", "ids"),
    [
        (("01", "1", "01", "1"), ["01", "1"], [0, 1, 0, 1]),
        ((" 007", "8", "", "007"), ["007", "8"], [0, 1, -1, 0]),
        (("0", "1", "10", "0"), ["0", "1", "10"], [0, 1, 2, 0]),
    ],
)
def test_class_names_of_a_csv_keep_their_zeros(tmp_path, cells, class_names, ids):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(PICTURE["bytes"] if isinstance(PICTURE, dict) else PICTURE)
    rows = "".join(f"{number}.png,{cell},5\n" for number, cell in enumerate(cells))
    (tmp_path / "metadata.csv").write_text(f"file_name,label,age\n{rows}")
    dataset = load_image_dataset(tmp_path)
    assert dataset.features["label"].names == class_names and labels_of(dataset).tolist() == ids


def test_a_column_of_two_types_is_named_with_its_files(tmp_path):
    for split, label in (("train", [0, 1]), ("validation", ["a", "b"])):
        datasets.Dataset.from_dict({"img": [PICTURE] * 2, "label": label}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"column 'label' is int64 in '.*train.parquet' and string in '.*valid"):
        load_image_dataset(tmp_path, cache_dir=tmp_path / "cache")
