"""Fine-tuning that starts from a classifier: the rows of its head follow their class names."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ijepa_transformers import IJepaConfig, IJepaForImageClassification
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.finetuning.arguments import ModelArguments
from ijepa_transformers.finetuning.model import build_model


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 16, "patch_size": 4}
CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module", params=["ijepa", "vit"])
def classifier(request, tmp_path_factory):
    """A classifier of three classes, of this package and of Transformers."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    if request.param == "ijepa":
        model = IJepaForImageClassification(IJepaConfig(**SIZES, **IMAGES, **names))
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGES, **names))
    torch.nn.init.normal_(model.classifier.bias)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    build_image_processor(16, resize_ratio=1.0).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("classes", "rows", "sentence"),
    [
        (["cat", "dog", "owl"], [0, 1, 2], "the head is that of"),
        (["owl", "cat", "dog"], [2, 0, 1], "is kept for 'owl', 'cat', 'dog'"),
        (["dog", "owl", "zebra"], [1, 2, None], "kept for 'dog', 'owl'; new rows for 'zebra'; without 'cat'"),
        (["ant", "cat", "dog", "owl"], [None, 0, 1, 2], "new rows for 'ant'"),
        (["dog"], [1], "without 'cat', 'owl'"),
        (["ant", "bee", "fly"], [None] * 3, "the head is new: none of the 3 classes"),
        (["ant", "bee"], [None] * 2, "the head is new: none of the 3 classes"),
        (["cat", "cat", "dog"], [0, None, 1], "new rows for 'cat'"),
    ],
)
def test_rows_of_the_head_follow_their_class_names(classifier, classes, rows, sentence):
    saved = load_file(classifier / "model.safetensors")
    model, head = build_model(ModelArguments(model=str(classifier)), classes, has_several=False)
    assert sentence in head
    assert list(model.config.id2label.values()) == classes
    weight, bias = model.classifier.weight.data, model.classifier.bias.data
    assert weight.shape == (len(classes), 16)
    for row, place in enumerate(rows):
        if place is not None:
            assert torch.equal(weight[row], saved["classifier.weight"][place])
            assert bias[row] == saved["classifier.bias"][place]
        else:  # as the class itself starts: small weights, no bias
            assert bias[row] == 0 and 0 < weight[row].std() < 0.1
            assert not (weight[row] == saved["classifier.weight"]).all(dim=1).any()
    name = "ijepa.layernorm.weight" if "ijepa" in model.config.model_type else "vit.layernorm.weight"
    assert torch.equal(model.state_dict()[name], saved[name])


def test_a_head_without_saved_rows_is_new(gray_pretrained):
    _, head = build_model(ModelArguments(model=str(gray_pretrained)), CLASSES, has_several=False)
    assert head == "the head is new"
