"""The code blocks of README and guides run, one page after the other, on small data.

Flags make every run small. A block with the comment `<!-- not run: ... -->` before it is left out.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ijepa_transformers
from ijepa_transformers import IJepaConfig, IJepaForPretraining
from ijepa_transformers.conversion.export import meta_checkpoint
from tests import forked
from tests.markdown_files import code_blocks, ijepa_arguments, shell_lines, short_name, user_pages


pytestmark = pytest.mark.slow

SMALL_RUN = {
    "max_steps": 2,
    "warmup_steps": 1,
    "batch_size": 8,
    "per_device_batch_size": 8,
    "eval_steps": 2,
    "save_steps": 2,
    "num_workers": 0,
    "mixed_precision": "no",
}
SMALL = {
    "pretrain": SMALL_RUN,
    "finetune": {"max_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "report_to": "none"},
    "probe": {"num_draws": 1, "max_images": 100, "num_workers": 0},
    "extract": {"num_workers": 0},
    "stats": {"num_workers": 0},
    "search": {"num_workers": 0},
    "visualize": {"num_images": 2, "bank_size": 8, "map_images": 8},
}
IMAGES_PER_CLASS = {"train": 16, "validation": 6}
# What pages use without making it.
FOUND = {
    "README.md": ("outputs/quickstart",),  # made by its first command, which is not run
    "evaluate.md": ("outputs/quickstart",),
    "finetune.md": ("my_model",),
    "learning.md": ("out", "out2"),
    "convert.md": ("my_model",),
    "features.md": ("my_model",),
    "search.md": ("my_model",),
    "dense.md": ("my_model",),
    "integrations.md": ("my_model",),
    "speed.md": ("my_model",),
    "visualize.md": ("my_model",),
}


def make_photos(folder):
    """Three classes of images: their colour tells the class."""
    random = np.random.default_rng(0)
    for split, count in IMAGES_PER_CLASS.items():
        for number, name in enumerate(("cat", "dog", "owl")):
            (folder / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = random.integers(0, 128, (40, 48, 3), dtype=np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{image}.jpg")


def make_meta_checkpoint(path):
    """A checkpoint in Meta's layout, of a width whose number of heads is known."""
    settings = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 384}
    predictor = {"predictor_hidden_size": 48, "predictor_num_hidden_layers": 1, "predictor_num_attention_heads": 3}
    config = IJepaConfig(**settings, **predictor, predictor_intermediate_size=192, image_size=32, patch_size=8)
    torch.save(meta_checkpoint(IJepaForPretraining(config).state_dict(), config), path)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Photos, a checkpoint of Meta's layout, and two small runs: in colour and on digits."""
    folder = tmp_path_factory.mktemp("things")
    make_photos(folder / "my_photos")
    shutil.copy(folder / "my_photos/train/owl/0.jpg", folder / "photo.jpg")
    make_meta_checkpoint(folder / "IN1K-vit.h.14-300e.pth.tar")
    size = {"image_size": 32, "patch_size": 8}
    for name, settings in (
        ("run", {"recipe": "small_images", "data": "my_photos", **size}),
        ("quickstart", {"recipe": "quickstart"}),
    ):
        command(["pretrain"], folder, settings | {"output_dir": f"runs/{name}"})
    return folder


def command(arguments, place, more=None):
    """Runs `ijepa` with small settings."""
    given = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    settings = dict(SMALL.get(arguments[0], {})) | (more or {})
    if "print_memory_estimate" in given:
        settings = {}
    flags = [word for name, value in settings.items() if name not in given for word in (f"--{name}", str(value))]
    if arguments[0] == "recipes" or "help" in given:
        flags = []
    done = forked.run(["-m", "ijepa_transformers.cli", *arguments, *flags], cwd=place, timeout=900)
    assert done.returncode == 0, f"ijepa {' '.join(map(str, arguments))}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.fixture
def place(things, tmp_path, monkeypatch, request):
    """The working directory of a page."""
    shutil.copytree(things / "my_photos", tmp_path / "my_photos")
    for name in ("photo.jpg", "IN1K-vit.h.14-300e.pth.tar"):
        shutil.copy(things / name, tmp_path / name)
    for name in FOUND.get(request.node.callspec.params["page"].name, ()):
        run = "quickstart" if "quickstart" in name else "run"
        shutil.copytree(things / "runs" / run, tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of `ijepa search`
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain", "finetune", "probe", "extract_features", "search"):
        monkeypatch.setattr(ijepa_transformers, name, small(getattr(ijepa_transformers, name)))
    return tmp_path


def small(function):
    """A Python function of the package with small settings."""
    settings = SMALL["extract" if function.__name__ == "extract_features" else function.__name__]

    def call(**keywords):
        return function(**keywords | settings)

    return call


@pytest.mark.parametrize("page", user_pages(), ids=short_name)
def test_the_blocks_of_a_page_run(page, place):
    names = {"__name__": "__page__"}
    for block in code_blocks(page):
        if block.marker is not None:
            continue
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
        elif block.language == "bash":
            for words in shell_lines(block):
                if (arguments := ijepa_arguments(words)) is not None:
                    command(arguments, place)
