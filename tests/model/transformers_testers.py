"""Our classes in the common tests of Transformers, one test class per room of the model file.

This file is not collected by our own pytest. `test_transformers_suite.py` runs it in a process of its own, where
`transformers_tests` is the `tests` folder of Transformers' source distribution.
"""

import unittest

import torch
from transformers.testing_utils import torch_device
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin

from ijepa_transformers import IJepaBackbone, IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel
from ijepa_transformers.modeling_ijepa import IJepaPatchEmbeddings


class ModelTester:
    """A tiny configuration and a batch of 4 random images of 4 x 4 patches (what the common tests ask for)."""

    is_training = True
    batch_size = 4
    num_channels = 3
    image_size = 32
    patch_size = 8
    seq_length = 16
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def get_config(self) -> IJepaConfig:
        return IJepaConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=64,
            image_size=self.image_size,
            patch_size=self.patch_size,
            predictor_hidden_size=16,
            predictor_num_hidden_layers=2,
        )

    def get_inputs(self) -> dict[str, torch.Tensor]:
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return {"pixel_values": torch.rand(shape, device=torch_device)}

    def prepare_config_and_inputs_for_common(self) -> tuple[IJepaConfig, dict[str, torch.Tensor]]:
        return self.get_config(), self.get_inputs()


class BackboneModelTester(ModelTester):
    is_training = False  # a backbone has no loss


class PretrainingModelTester(ModelTester):
    """The same batch, with one context of 5 patches and two target blocks of 3 patches for each image."""

    encoder_seq_length = 5

    def get_inputs(self) -> dict[str, torch.Tensor]:
        patches = torch.rand(self.batch_size, self.seq_length, device=torch_device).argsort(dim=1)
        context_indices, target_indices = patches[:, :5].unsqueeze(1), patches[:, 5:11].unflatten(1, (2, 3))
        return {**super().get_inputs(), "context_indices": context_indices, "target_indices": target_indices}


class CommonTests(ModelTesterMixin):
    """The common tests of a model whose input embeddings are patch embeddings."""

    tester_class = ModelTester
    test_resize_embeddings = False  # there is no vocabulary

    def setUp(self) -> None:
        self.model_tester = self.tester_class()

    def test_model_get_set_embeddings(self) -> None:
        """Replaces the common test, which expects an `nn.Embedding`; so do the stock vision models."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), IJepaPatchEmbeddings)
            other = torch.nn.Identity()
            model.set_input_embeddings(other)
            assert model.get_input_embeddings() is other


class EncoderTest(CommonTests, unittest.TestCase):
    all_model_classes = (IJepaModel, IJepaForImageClassification)


class BackboneTest(BackboneTesterMixin, CommonTests, unittest.TestCase):
    all_model_classes = (IJepaBackbone,)
    config_class = IJepaConfig
    tester_class = BackboneModelTester


class PretrainingTest(CommonTests, unittest.TestCase):
    all_model_classes = (IJepaForPretraining,)
    additional_model_inputs = ("context_indices", "target_indices")
    tester_class = PretrainingModelTester
