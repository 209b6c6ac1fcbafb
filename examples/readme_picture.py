#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Draws the picture at the top of the README from a pretrained model and photographs that may be shown:

    python examples/datasets/build_animals_and_plants.py --output data/animals_and_plants --train 12000
    ijepa pretrain --recipe small_images --data data/animals_and_plants --validation_split test \\
        --image_size 80 --patch_size 8 --target_image_mean 1 --max_steps 8000 --warmup_steps 800 \\
        --output_dir runs/animals
    python examples/readme_picture.py --model runs/animals --data data/animals_and_plants \\
        --shown 4 5 3 --output docs/images/animals/readme.png

Each row is a photograph of the split test: the photograph, what the model sees of it, its guess of the rest as pixels,
and its features as colours. The guess is drawn by a small decoder (`ijepa visualize --decoder`), which is trained on
the split train and kept beside the model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from ijepa_transformers.files import written_aside
from ijepa_transformers.visualization.arguments import VisualizationArguments
from ijepa_transformers.visualization.beliefs import belief_sheet, decode_beliefs
from ijepa_transformers.visualization.sections import object_colors
from ijepa_transformers.visualization.sheets import pca_sheet
from ijepa_transformers.visualization.study import Study, build_study


CELL, GAP, LETTER = 176, 10, 19  # pixels
PAPER, INK = (255, 255, 255), (40, 40, 40)
HEADERS = ("a photograph", "what the model sees", "what it believes", "what it means to it")


def rows_of(study: Study, number: int) -> list[list[Image.Image]]:
    """Photograph, what is seen, the decoded guess and the colours of the features, of the first images."""
    model = study.networks.pretraining
    assert model is not None, "build_study refuses a directory without a predictor"
    beliefs = belief_sheet(study, decode_beliefs(study, model), number).cells
    colors = {("", ""): object_colors(study, study.networks.encoder, number)}
    features = pca_sheet(study.images[:number], colors, study.patch_size).cells
    return [[row[0], row[1], row[3], of_features[1]] for row, of_features in zip(beliefs, features, strict=True)]


def draw(rows: Sequence[Sequence[Image.Image]], across: int) -> Image.Image:
    """The rows in `across` columns beside each other, below their headers."""
    down, width = -(-len(rows) // across), len(HEADERS) * (CELL + GAP)
    top = GAP + LETTER + GAP
    picture = Image.new("RGB", (across * width + (across - 1) * 2 * GAP + GAP, top + down * (CELL + GAP)), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=LETTER)
    for number, row in enumerate(rows):
        left, upper = GAP + number // down * (width + 2 * GAP), top + number % down * (CELL + GAP)
        for place, (cell, header) in enumerate(zip(row, HEADERS, strict=True)):
            x = left + place * (CELL + GAP)
            picture.paste(cell.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, upper))
            if number % down == 0:
                pen.text((x + CELL / 2, GAP), header, fill=INK, font=font, anchor="ma")
    return picture


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="pretraining directory")
    parser.add_argument("--data", required=True, help="folder of data with the splits train and test")
    parser.add_argument("--output", required=True, help="the PNG file to write")
    parser.add_argument("--candidates", type=int, default=8, help="photographs to choose from")
    parser.add_argument("--shown", type=int, nargs="+", help="numbers of those that are shown, from 0; all by default")
    parser.add_argument("--across", type=int, default=1, help="photographs beside each other")
    parser.add_argument("--seed", type=int, default=0, help="of the photographs and of what is hidden")
    parser.add_argument("--decoder_steps", type=int, default=1000, help="training steps of the decoder")
    arguments = parser.parse_args(words)
    shown = arguments.shown or range(arguments.candidates)
    if unknown := [number for number in shown if not 0 <= number < arguments.candidates]:
        parser.error(f"--shown {unknown[0]}: there are the photographs 0 to {arguments.candidates - 1} (--candidates)")
    try:
        study = build_study(
            VisualizationArguments(
                model=arguments.model,
                data=arguments.data,
                output=arguments.output,
                split="test",
                decoder=True,
                decoder_images=2000,
                decoder_steps=arguments.decoder_steps,
                num_images=arguments.candidates,
                bank_size=256,
                map_images=256,
                seed=arguments.seed,
            )
        )
        rows = rows_of(study, arguments.candidates)
        picture = draw([rows[number] for number in shown], arguments.across)
        with written_aside(Path(arguments.output)) as temporary:
            picture.save(temporary, "png", optimize=True)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(arguments.output)


if __name__ == "__main__":
    main()
