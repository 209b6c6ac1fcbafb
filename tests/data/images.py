# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Images, folders and data sets that the tests of this room share."""

from pathlib import Path

import datasets
import numpy as np

from ijepa_transformers.data.sources import image_name
from tests.data.nasty_images import encoded, photo


def photo_pixels(height=30, width=40, seed=0):
    """A smooth coloured picture, (H, W, 3) uint8."""
    return np.array(photo(height, width, seed))


def write(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo_pixels()) if content is None else content)


def names(dataset):
    return [Path(image_name(dataset, index)).name for index in range(len(dataset))]


def images_dataset(contents):
    rows = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(contents)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": rows}, features=features)


def photos(count, bad=()):
    """A data set of `count` images of 20 x 24 pixels; those with the indices `bad` cannot be read."""
    sound = (encoded(photo(20, 24, seed=index)) for index in range(count))
    return images_dataset([b"not an image" if index in bad else content for index, content in enumerate(sound)])


def labelled(contents, labels=None):
    return images_dataset(contents).add_column("label", labels or list(range(len(contents))))
