# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the names of folders mean, and what becomes of the files that are no images."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ijepa_transformers.arguments import DatasetArguments
from ijepa_transformers.data import kinds, notices
from ijepa_transformers.data.finding import resolve
from ijepa_transformers.data.labels import class_names
from ijepa_transformers.data.sources import available_split, load_image_dataset, open_split, split_to_judge_on
from ijepa_transformers.data.splits import choose_split
from tests.data.images import encoded, names, photo_pixels, write


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(notices, "_told", set())


def write_all(folder, *paths):
    content = encoded(photo_pixels())
    for path in paths:
        write(folder / path, content)


@pytest.mark.parametrize(
    "paths",
    [
        ("images/train/1.png", "images/val/2.png"),
        ("coco/train2017/1.png", "coco/val2017/2.png"),
        ("a/b/Training/1.png", "a/b/Validation/2.png"),
        ("train/images/1.png", "valid/images/2.png"),
        ("train/1.png", "dev/2.png"),
        ("images/Train/1.png", "images/eval/2.png"),
        ("train/1.png", "validation/2.png", "holdout/3.png"),
        ("train/1.png", "val/2.png", "dev/3.png"),
    ],
)
def test_split_folders_are_found_below_a_folder_that_holds_all_images(tmp_path, paths):
    write_all(tmp_path, *paths)
    write(tmp_path / "labels/train/1.txt", b"0 .5 .5 .2 .2")
    assert names(load_image_dataset(tmp_path)) == ["1.png"]
    assert names(load_image_dataset(tmp_path, split="val")) == ["2.png"]


def test_classes_below_split_folders_one_level_down_are_found(tmp_path):
    write_all(tmp_path, "images/train/cat/1.png", "images/train/dog/2.png", "images/val/dog/3.png")
    train, validation = load_image_dataset(tmp_path), load_image_dataset(tmp_path, split="val")
    assert (train["label"][:], validation["label"][:]) == ([0, 1], [1])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("bottle/train/1.png", "bottle/test/2.png", "nut/train/3.png"), "split folders further down.*bottle/test"),
        (("cat/1.png", "dog/test/2.png"), "split folders further down.*dog/test"),
        (("images/train/1.png", "images/2.png"), r"\['train'\] beside other images"),
        (("train_images/1.png", "test_images/2.png"), "'test_images' and 'train_images' look like splits"),
        (("seg_train/1.png", "seg_test/2.png", "seg_pred/3.png"), "'seg_test' and 'seg_train' look like splits"),
        (("training_set/1.png", "dev_set/2.png"), "'dev_set' and 'training_set' look like splits"),
        (("train80/1.png", "holdout20/2.png"), "'holdout20' and 'train80' look like splits"),
        (("dev/1.png", "test/2.png"), "has no split 'train'; it has 'test', 'validation'"),
        (("train/1.png", "train2017/2.png"), "two splits of the same meaning"),
        ((*(f"train.X{n}/c/1.png" for n in range(1, 5)), "val.X/c/1.png"), "'train.X1' and .* and 'val.X' look like"),
    ],
)
def test_folders_that_may_be_splits_are_refused(tmp_path, paths, message):
    write_all(tmp_path, *paths)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(tmp_path)


def test_a_photo_album_may_have_any_folders(tmp_path):
    write_all(tmp_path, "2019/train/1.png", "2019/alps/2.png", "2020/3.png", "2020/dev/4.png")
    assert len(load_image_dataset(tmp_path)) == 4


def test_dev_is_a_class_where_no_other_folder_is_a_split(tmp_path):
    write_all(tmp_path, "dev/1.png", "shop/2.png")
    assert class_names(load_image_dataset(tmp_path)) == ["dev", "shop"]


@pytest.mark.parametrize(
    ("splits", "asked", "chosen"),
    [
        (("train", "dev"), "auto", "dev"),
        (("train", "holdout"), "auto", "holdout"),
        (("train", "validation", "dev"), "validation", "validation"),
        (("train", "validation", "dev"), "dev", "dev"),
        (("train", "test", "holdout"), "test", "test"),
        (("train", "dev", "eval"), "eval", "eval"),
    ],
)
def test_a_split_is_found_by_its_own_name_or_by_its_meaning(splits, asked, chosen):
    assert choose_split("photos", splits, asked) == chosen


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (("train-0.parquet", "dev-0.parquet"), ["train", "validation"]),
        (("eval-0.parquet", "eval-1.parquet"), ["train"]),
    ],
)
def test_shards_of_dev_are_a_split_only_beside_others(tmp_path, files, found):
    for file in files:
        write(tmp_path / file, b"")
    assert sorted(resolve(str(tmp_path)).files) == found


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("photos", "masks", "channels"),
    [
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", 1),
        ("photos/{}.png", "gt/{}.png", 3),
        ("VOC/VOC2012/JPEGImages/{}.jpg", "VOC/VOC2012/SegmentationClass/{}.png", 1),
        ("train/x/{}.jpg", "train/y/{}_mask.png", 1),
        ("leftImg8bit/a/{}_leftImg8bit.png", "gtFine/a/{}_gtFine_labelIds.png", 1),
        ("701/Seq05_{}.png", "LabeledApproved/Seq05_{}_L.png", 3),
        ("images/img_{}.jpg", "tumours/lesion_{}.png", 1),
        ("d/{}/images/x.png", "d/{}/masks/y.png", 3),
    ],
)
def test_masks_are_no_class(tmp_path, photos, masks, channels):
    pixels = photo_pixels()
    for number in range(4):
        save(tmp_path / photos.format(number), pixels)
        save(tmp_path / masks.format(number), pixels if channels == 3 else pixels[..., 0])
    with pytest.raises(ValueError, match=r"look like masks of those in '\w+', not like a class; name the folder"):
        load_image_dataset(tmp_path)


@pytest.mark.parametrize(
    ("photo", "mask", "channels"),
    [
        ("img_{}.png", "img_{}_mask.png", 3),
        ("cat/{}.jpg", "cat/{}-segmentation.png", 1),
        ("benign ({}).png", "benign ({})_mask_1.png", 1),
        ("train/{}.jpg", "train/mask_{}.png", 1),
        ("{}_sat.jpg", "{}_mask.png", 1),
        ("{}.jpg", "{}.png", 1),
        ("d/{}/image.jpg", "d/{}/mask.png", 3),
    ],
)
def test_masks_beside_their_images_are_refused(tmp_path, photo, mask, channels):
    for number in range(3):
        save(tmp_path / photo.format(number), photo_pixels())
        save(tmp_path / mask.format(number), photo_pixels() if channels == 3 else photo_pixels()[..., 0])
    with pytest.raises(ValueError, match=r"looks like a mask of .* move the masks out of this folder, or rename them"):
        load_image_dataset(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "mask", "message"),
    [
        ("**/*.*g", "SegmentationClass/{}.png", "'SegmentationClass' look like masks of those in 'JPEGImages'"),
        ("JPEGImages/*", "JPEGImages/{}_mask.png", "'0_mask.png' looks like a mask of '0.jpg'"),
    ],
)
def test_masks_among_files_of_a_glob_are_refused(tmp_path, pattern, mask, message):
    for number in range(3):
        save(tmp_path / f"JPEGImages/{number}.jpg", photo_pixels())
        save(tmp_path / mask.format(number), photo_pixels()[..., 0])
    with pytest.raises(ValueError, match=message):
        load_image_dataset(f"{tmp_path}/{pattern}")


def area_pixels(height=30, width=40, level=255):
    """A grey mask: one area of a value, (H, W) uint8."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = level
    return pixels


@pytest.mark.parametrize(
    ("photo", "mask", "pixels"),
    [
        ("images/{}.png", "lesions/{}.png", area_pixels()),
        ("images/{}.png", "lesions/{}.jpg", area_pixels()),
        ("images/{}.png", "masks/{}.png", area_pixels(15, 20)),
        ("images/{}.png", "masks/{}.png", area_pixels(level=2)),
        ("{}.png", "{}_mask.png", area_pixels(60, 80)),
        ("{}.png", "{}_mask.png", area_pixels() > 0),
        ("{}.png", "{}_lesion.png", area_pixels()),
        ("d/{}/image.png", "d/{}/mask.png", area_pixels(15, 20)),
    ],
)
def test_grey_masks_of_grey_images_are_refused(tmp_path, photo, mask, pixels):
    """Also if they have another size than their image, or are not called masks."""
    for number in range(3):
        save(tmp_path / photo.format(number), photo_pixels(seed=number)[..., 0])
        save(tmp_path / mask.format(number), pixels)
    with pytest.raises(ValueError, match=r"look like masks of|looks like a mask of"):
        load_image_dataset(tmp_path)


def thing_on_black(seed):
    """A grey image of a thing on black, (40, 50) uint8, and where it is."""
    generator = np.random.default_rng(seed)
    top, left, height, width = generator.integers((2, 2, 8, 8), (20, 25, 16, 20))
    mask = np.zeros((40, 50), bool)
    mask[top : top + height, left : left + width] = True
    return np.where(mask, generator.integers(60, 256, mask.shape), 0).astype(np.uint8), mask


@pytest.mark.parametrize("pattern", ["b/{}.png", "a/{}_thing.png"])
@pytest.mark.parametrize(("levels", "share"), [((1,), 1), ((255,), 1), ((1, 2), 1), ((9,), 2)])
def test_grey_masks_of_things_on_black_are_refused(tmp_path, pattern, levels, share):
    """Their images have areas too, and nothing is called a mask. Some things have no mask."""
    for number in range(5):
        image, mask = thing_on_black(number)
        save(tmp_path / f"a/{number}.png", image)
        lower = mask & (np.arange(len(mask))[:, None] > 20) if len(levels) > 1 else mask & False
        drawn = np.where(lower, levels[-1], np.where(mask, levels[0], 0)) * (number != 3)
        smaller = Image.fromarray(drawn.astype(np.uint8)).resize((50 // share, 40 // share), Image.Resampling.NEAREST)
        save(tmp_path / pattern.format(number), np.asarray(smaller))
    with pytest.raises(ValueError, match=r"look like masks of|looks like a mask of"):
        load_image_dataset(tmp_path)


def digit_pixels(label, number, has_few_values):
    """A digit of scikit-learn on black, (28, 28) uint8: smooth as MNIST's, or black and white."""
    digits = load_digits()
    image = Image.fromarray((digits.images[digits.target == label][number] * 15).astype(np.uint8))
    pixels = np.pad(np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)), 6)
    return (pixels > 120).astype(np.uint8) * 255 if has_few_values else pixels


@pytest.mark.parametrize("are_black_and_white", [(False, False), (True, True), (False, True), (True, False)])
def test_digits_on_black_are_no_masks_of_one_another(tmp_path, are_black_and_white):
    for label, has_few_values in zip((0, 1), are_black_and_white, strict=True):
        for number in range(10):
            save(tmp_path / f"{label}/{number}.png", digit_pixels(label, number, has_few_values))
    assert load_image_dataset(tmp_path).features["label"].names == ["0", "1"]


@pytest.mark.parametrize(
    ("size", "width"), [(28, 0.6), (40, 0.6), (40, 0.8), (60, 0.6), (60, 0.8), (60, 1), (60, 1.5)]
)
@pytest.mark.parametrize("second", ["one/{}.png", "zero/{}_b.png"])
def test_smooth_digits_that_fill_the_frame_are_no_masks_of_one_another(tmp_path, size, width, second):
    """A one is mostly black, in few frequent values and with soft edges. A zero without margin has no such areas."""
    rows, columns = np.mgrid[0:size, 0:size]
    for number in range(6):
        radius = np.hypot(rows - size / 2, columns - size / 2 - number)
        save(tmp_path / f"zero/{number}.png", (127 + 120 * np.sin(radius / 3 + number)).astype(np.uint8))
        middle = size / 2 + (number * 5) % 7 - rows / 7
        stroke = 255 * np.exp(-((columns - middle) ** 2) / 2 / width**2)
        save(tmp_path / second.format(number), stroke.astype(np.uint8))
    assert len(load_image_dataset(tmp_path)) == 12


@pytest.mark.parametrize("quality", [60, 90])
def test_jpeg_masks_that_are_not_called_so_are_refused(tmp_path, quality):
    """JPEG gives them more values."""
    for number in range(6):
        mask = np.roll(area_pixels(60, 80), (5 * number, 7 * number), (0, 1))
        pixels = photo_pixels(60, 80, seed=number)[..., 0] // 2 + mask // 4
        save(tmp_path / f"images/{number}.png", pixels.astype(np.uint8))
        (tmp_path / "lesions").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"lesions/{number}.jpg", quality=quality)
    with pytest.raises(ValueError, match="look like masks of"):
        load_image_dataset(tmp_path)


def test_grey_images_that_are_called_alike_are_no_masks(tmp_path):
    """Two views of one thing, drawings of another class, and drawings only, also if some have more values."""
    for number in range(3):
        smooth = area_pixels().copy()
        smooth[8:14, 10:20] = np.arange(60).reshape(6, 10) * 4
        save(tmp_path / f"scans/one/{number}.png", area_pixels())
        save(tmp_path / f"scans/eight/{number}.png", smooth)
        save(tmp_path / f"views/{number}.png", photo_pixels(seed=number)[..., 0])
        save(tmp_path / f"views/{number}_left.png", photo_pixels(seed=9)[..., 0])
        save(tmp_path / f"classes/photo/{number}.png", photo_pixels(seed=number)[..., 0])
        save(tmp_path / f"classes/drawing/{number}.png", area_pixels(31, 41))
        save(tmp_path / f"digits/one/{number}.png", area_pixels())
        save(tmp_path / f"digits/two/{number}.png", area_pixels(level=200))
    for name, count in (("views", 6), ("classes", 6), ("digits", 6), ("scans", 6)):
        assert len(load_image_dataset(tmp_path / name)) == count


def test_a_glob_over_several_splits_is_told(tmp_path, capsys):
    write_all(tmp_path, "train/1.png", "val/2.png")
    assert len(load_image_dataset(f"{tmp_path}/*/*.png")) == 2
    assert "matches files of 'train' and 'val'; all of them are one split, train" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"/\*' matches folders only, such as '.*/train'"):
        load_image_dataset(f"{tmp_path}/*")


def test_an_image_beside_class_folders_is_named(tmp_path):
    write_all(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/3.png")
    with pytest.raises(ValueError, match=r"has no labels, because 'train/3\.png' lies beside the class folders"):
        open_split(DatasetArguments(str(tmp_path)), "train", labels="required")


def test_class_folders_that_are_empty_or_there_twice_are_told(tmp_path, capsys):
    write_all(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/@eaDir/cat/1.png")
    (tmp_path / "train/fish").mkdir()
    (tmp_path / "train/puma").symlink_to("cat")
    (tmp_path / "val").symlink_to("train")
    assert load_image_dataset(tmp_path).features["label"].names == ["cat", "dog", "puma"]
    told = capsys.readouterr().err
    assert "train/fish' holds no image, so it is no class" in told and "@eaDir" not in told
    assert "train/puma' and '" in told and "val' and '" in told and "are the same folder" in told


def test_files_that_are_called_as_those_of_a_saved_data_set(tmp_path):
    write_all(tmp_path, "1.png")
    (tmp_path / "state.json").write_text("{}")
    assert len(load_image_dataset(tmp_path)) == 1
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="has the files of a save_to_disk folder, and cannot be opened"):
        load_image_dataset(tmp_path)


def test_photographs_that_are_called_alike_are_no_masks(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.jpg", photo_pixels())
        save(tmp_path / f"{number}.png", photo_pixels())
        save(tmp_path / f"{number}_mask.png", photo_pixels(31))
        save(tmp_path / f"{number}_b.png", photo_pixels()[..., 0])
    assert len(load_image_dataset(tmp_path)) == 12


def test_classes_of_equal_file_names_are_no_masks(tmp_path):
    for number in range(4):
        for name in ("mask", "no_mask", "labels"):
            size = {"labels": 31}.get(name, 30)  # photographs differ in size
            save(tmp_path / name / f"{number}.jpg", np.zeros((size, 40, 3), np.uint8))
    assert load_image_dataset(tmp_path).features["label"].names == ["labels", "mask", "no_mask"]


def test_files_of_other_kinds_are_counted_once_with_advice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kinds, "reads_heif", lambda: False)
    write_all(tmp_path, "1.jpg", "2.jpg", "b.heic", "a.HEIC", "scan.dcm", "plain", "deep/more.zip", "notes.txt", ".x")
    assert len(load_image_dataset(tmp_path)) == len(load_image_dataset(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 images" in line and "5 other files are left out: 2 .heic, 1 " in line
    assert 'Files .heic are read after pip install "ijepa-transformers[heif]".' in line
    assert "Files .zip must be unpacked first." in line and "Files without an extension must be renamed" in line


def test_a_folder_of_other_kinds_only_says_what_it_holds(tmp_path):
    write_all(tmp_path / "x", "a.dcm", "b.dcm")
    with pytest.raises(ValueError, match=r"holds no images .*; it holds 2 \.dcm\. Files \.dcm must be converted"):
        load_image_dataset(tmp_path / "x")
    write_all(tmp_path, "images.tar.gz")
    with pytest.raises(ValueError, match=r"images\.tar\.gz' is packed or compressed: unpack 'images\.tar\.gz' first"):
        load_image_dataset(tmp_path / "images.tar.gz")


def test_the_split_to_judge_on_is_found(tmp_path, capsys):
    write_all(tmp_path / "one", "train/1.png", "valid/2.png", "test/3.png")
    write_all(tmp_path / "two", "train/1.png", "Testing/2.png")
    write_all(tmp_path / "none", "1.png")
    assert available_split(DatasetArguments(str(tmp_path / "one")), "auto") == "valid"
    assert available_split(DatasetArguments(str(tmp_path / "two")), "auto") == "Testing"
    with pytest.raises(ValueError, match="has no split 'validation' or 'test'; it has 'train'"):
        available_split(DatasetArguments(str(tmp_path / "none")), "auto")
    assert split_to_judge_on(DatasetArguments(str(tmp_path / "none")), "auto") is None
    assert "no validation and no test split, so nothing is evaluated" in capsys.readouterr().err


def test_one_class_folder_is_named(tmp_path):
    write_all(tmp_path, "only/1.png", "only/2.png")
    with pytest.raises(ValueError, match="has only one class, the folder 'only'; a classifier needs two"):
        open_split(DatasetArguments(str(tmp_path)), "train", labels="required")


METADATA = {
    "metadata.csv": "file_name, label\r\n1.png, cat\r\ndeep/2.png,dog \r\n",
    "metadata.jsonl": '{"a_file_name": "1.png", "label": "cat"}\n{"a_file_name": "deep/2.png", "label": "dog"}\n',
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_beside_images_has_the_labels(tmp_path, name):
    write_all(tmp_path, "1.png", "deep/2.png", "3.png")
    write(tmp_path / name, METADATA[name].encode())
    dataset = open_split(DatasetArguments(str(tmp_path)), "train", labels="required")
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dict(zip(names(dataset), dataset["label"][:], strict=True)) == {"1.png": 0, "2.png": 1, "3.png": -1}


def test_captions_leave_the_classes_to_the_folders(tmp_path, capsys):
    write_all(tmp_path, "cat/1.png", "dog/2.png")
    content = f"file_name , text\n{tmp_path}/cat/1.png,a\ndog/2.png,b\n"
    write(tmp_path / "metadata.csv", content.encode())
    dataset = open_split(DatasetArguments(str(tmp_path)), "train", labels="required")
    assert dataset.features["label"].names == ["cat", "dog"] and not capsys.readouterr().err
    write(tmp_path / "metadata.csv", content.replace("text", "label").encode())
    dataset = open_split(DatasetArguments(str(tmp_path)), "train", labels="required")
    assert dataset.features["label"].names == ["a", "b"]
    assert "are those of its metadata; its folders are not used" in capsys.readouterr().err


def test_metadata_of_different_types_are_refused(tmp_path):
    for split, label in (("train", "3"), ("test", "cat")):
        write_all(tmp_path / split, "1.png")
        write(tmp_path / split / "metadata.csv", f"file_name,label\n1.png,{label}\n".encode())
    with pytest.raises(ValueError, match=r"do not fit together: .*label has incompatible types"):
        load_image_dataset(tmp_path)


def test_each_split_may_have_its_metadata(tmp_path):
    for split, number in (("train", 3), ("test", 7)):
        write_all(tmp_path / split, "1.png")
        write(tmp_path / split / "metadata.csv", f"file_name,label\n1.png,{number}\n".encode())
    train, test = load_image_dataset(tmp_path), load_image_dataset(tmp_path, split="test")
    assert train.features["label"].names == ["3", "7"] and (train["label"][:], test["label"][:]) == ([0], [1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,label\n1.png,cat\n", "metadata.csv' has no column file_name"),
        (b"file_name,label\n9.png,cat\n", "metadata.csv' names 1 image that is not there, for example '9.png'"),
        (b"file_name,label\n1.png,cat\n./1.png,dog\n", "names './1.png', which has a row already"),
        (b"file_name,label\n1.png,cat,dog\n", "metadata.csv' cannot be read: CSV parse error"),
        (b"", "metadata.csv' cannot be read"),
        (b"file_name;label\n1.png;cat\n", "has no column file_name; its columns are 'file_name;label'"),
        ("file_name,label\n1.png,cat\n".encode("utf-16"), "metadata.csv' is UTF-16; save it as UTF-8"),
        ("file_name,label\n1.png,caf\u00e9\n".encode("latin-1"), "the column 'label' of .* is not UTF-8"),
        (b"file_name,label,label\n1.png,cat,dog\n", "metadata.csv' has two columns 'label'"),
        (b"file_name,label\n1,cat\n", "names 1 image that is not there, for example '1'"),
    ],
)
def test_unusable_metadata_is_named(tmp_path, content, message):
    write_all(tmp_path, "1.png")
    write(tmp_path / "metadata.csv", content)
    with pytest.raises(ValueError, match=message):
        open_split(DatasetArguments(str(tmp_path)), "train", labels="required")


@pytest.mark.parametrize("name", ["labels.csv", "train.csv", "metadata.tsv", "Metadata.json", "image_labels.txt"])
@pytest.mark.parametrize("image", ["1.png", "images/1.png"])
def test_a_table_that_is_not_read_is_named_with_what_is_read(tmp_path, capsys, name, image):
    write_all(tmp_path, image)
    write(tmp_path / name, b"file_name,label\n1.png,cat\n")
    said = f"has no labels: '{tmp_path / name}' is not read. Labels are read from a metadata.csv or metadata.jsonl"
    for column in (None, "label", "cat,dog"):
        with pytest.raises(ValueError, match=f"{said} beside .* column file_name"):
            open_split(DatasetArguments(str(tmp_path), label_column=column), "train", labels="required")
    load_image_dataset(tmp_path)
    assert said in capsys.readouterr().err


def test_tables_beside_labelled_images_are_no_matter(tmp_path, capsys):
    write_all(tmp_path, "cat/1.png", "dog/1.png")
    write(tmp_path / "labels.csv", b"file_name,label\n1.png,cat\n")
    assert "label" in load_image_dataset(tmp_path).features and not capsys.readouterr().err


@pytest.mark.parametrize("image", ["1.png", "cat/1.png"])
def test_metadata_without_a_row_are_told(tmp_path, capsys, image):
    write_all(tmp_path, image, "dog/2.png")
    write(tmp_path / "metadata.csv", b"file_name,label\n")
    load_image_dataset(tmp_path)
    assert "metadata.csv' has no row" in capsys.readouterr().err
    if image == "1.png":
        with pytest.raises(ValueError, match=r"has no labels: .*metadata.csv' has no row"):
            open_split(DatasetArguments(str(tmp_path)), "train", labels="required")
