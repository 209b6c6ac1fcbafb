"""Pretraining in the `Trainer` of Transformers is the pretraining of this package."""

import copy
import itertools

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from examples import pretraining_with_trainer
from ijepa_transformers import IJepaForPretraining, IJepaModel, PretrainingCollator, TargetEncoderCallback
from ijepa_transformers.data.transforms import normalize_pixel_values
from ijepa_transformers.masking import MaskingCollator, MultiBlockMasking
from ijepa_transformers.optimization import build_optimizer, parameter_groups
from ijepa_transformers.pretraining import loop
from tests.runs import assert_close_weights, assert_equal_weights, pretrain, reset_accelerate


@pytest.fixture(autouse=True)
def on_the_cpu(fresh_accelerate):
    """The Trainer and a run each build their own state of Accelerate."""


class Images(torch.utils.data.Dataset):
    """Random images with a label, which pretraining has no use for."""

    def __init__(self, number, shape=(3, 32, 32)):
        self.pixels = torch.randn(number, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": index % 2}


def arguments(directory, **changes):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "seed": 1}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0, "logging_strategy": "no"}
    return TrainingArguments(str(directory), **{**settings, **changes})


def build(model, directory, dataset=None, callback=True, **changes):
    collator = PretrainingCollator(MultiBlockMasking(model.config.grid_size, min_patches=1), seed=3)
    return Trainer(
        copy.deepcopy(model),
        arguments(directory, **changes),
        train_dataset=dataset or Images(10),
        eval_dataset=Images(6),
        data_collator=collator,
        callbacks=[TargetEncoderCallback(collator)] if callback else [],
    )


def recorded(trainer):
    """The batches that the model sees, in training and in evaluation."""
    seen = {True: [], False: []}
    trainer.model.register_forward_pre_hook(
        lambda model, args, batch: seen[model.training].append(batch), with_kwargs=True
    )
    return seen


def our_loop(directory, monkeypatch, **changes):
    """A run of this package: itself, its weights before the first step, its batches, and its weights at the end."""
    runs, starts, batches, original = [], [], [], loop.optimizer_step

    def keep(batch):
        batches.append(dict(batch))
        return batch

    def optimizer_step(run, loader, number):
        if number == 0:
            runs.append(run)
            starts.append(copy.deepcopy(run.networks))
        return original(run, map(keep, loader), number)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    end = pretrain(directory, **changes)
    return runs[0], starts[0], batches, end


def test_the_trainer_ends_with_the_weights_of_our_loop(tmp_path, monkeypatch):
    changes = {"weight_decay": 0.05, "final_weight_decay": 0.05, "max_steps": 5}
    run, model, batches, end = our_loop(tmp_path / "ours", monkeypatch, batch_size=16, **changes)
    settings, schedules = run.arguments, run.schedules
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    dataset = Images(len(pixels))
    dataset.pixels = normalize_pixel_values(pixels, run.processor.image_mean, run.processor.image_std)
    optimizer = build_optimizer(
        parameter_groups(model),
        name="adamw",
        learning_rate=1.0,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        device_type="cpu",
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.05 if group["decayed"] else 0.0
    collator = PretrainingCollator(run.masking, settings.seed)
    reset_accelerate()
    trainer = Trainer(
        model,
        arguments(
            tmp_path / "theirs",
            max_steps=5,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
        ),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[TargetEncoderCallback(collator, schedules.start_momentum, schedules.final_momentum)],
        optimizers=(optimizer, LambdaLR(optimizer, schedules.learning_rate)),
    )
    seen = recorded(trainer)[True]
    trainer.train()
    for batch, ours in zip(seen, batches, strict=True):
        assert torch.equal(batch["context_indices"], ours["context_indices"])
        assert torch.equal(batch["target_indices"], ours["target_indices"])
    assert_close_weights(trainer.model.state_dict(), end, 1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_trainer_ends_as_one_that_was_not_interrupted(tiny_model, tmp_path, num_workers):
    changes = {"dataloader_num_workers": num_workers, "max_steps": 5}
    whole = build(tiny_model, tmp_path / "whole", save_strategy="steps", save_steps=4, **changes)
    whole.train()  # steps 1 to 3 are an epoch
    again = build(tiny_model, tmp_path / "again", **changes)
    with torch.no_grad():
        again.model.predictor.mask_token.add_(1.0)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal_weights(again.model.state_dict(), whole.model.state_dict())
    assert not torch.equal(whole.model.ijepa.layernorm.bias, tiny_model.ijepa.layernorm.bias)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_gives_a_loss_has_the_same_masks_each_time_and_changes_no_training(
    tiny_model, tmp_path, num_workers
):
    alone = build(tiny_model, tmp_path / "a", dataloader_num_workers=num_workers)
    alone.train()
    trainer = build(
        tiny_model,
        tmp_path / "b",
        dataloader_num_workers=num_workers,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=3,
    )
    seen = recorded(trainer)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 2 and trainer.evaluate()["eval_loss"] == losses[-1]
    indices = [batch["context_indices"] for batch in seen[False]]
    assert all(torch.equal(indices[0], other) for other in indices[::2])
    masks = [batch["target_indices"].tolist() for batch in seen[True]]
    assert all(masks[i] != masks[j] for i, j in itertools.combinations(range(4), 2))
    assert_equal_weights(alone.model.state_dict(), trainer.model.state_dict())


def test_without_the_callback_the_target_stays_and_the_model_warns(tiny_model, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("ijepa_transformers.modeling_ijepa.logger.warning", warnings.append)
    trainer = build(tiny_model, tmp_path, callback=False)
    trainer.train()
    assert len(warnings) == 1 and "TargetEncoderCallback" in warnings[0]
    assert_equal_weights(trainer.model.ijepa.state_dict(), tiny_model.ijepa.state_dict())


def test_the_callback_needs_a_pretraining_model_and_a_momentum(tiny_config, tmp_path):
    trainer = Trainer(IJepaModel(tiny_config), arguments(tmp_path), callbacks=[TargetEncoderCallback()])
    trainer.train_dataset = Images(4)
    with pytest.raises(ValueError, match="needs an IJepaForPretraining, but the model is a IJepaModel"):
        trainer.train()
    with pytest.raises(ValueError, match=r"start_momentum must lie in \[0, 1\], got 2"):
        TargetEncoderCallback(start_momentum=2)


PIXELS = torch.zeros(3, 32, 32)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"image": PIXELS, "label": 0}, r"'pixel_values', but only \['image', 'label'\].*remove_unused_columns=False"),
        ((PIXELS, 0), "must be a dictionary with 'pixel_values', but it is a tuple"),
        ({"pixel_values": PIXELS.byte()}, r"normalised floats, got torch\.uint8"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_by_name(sample, message):
    with pytest.raises(ValueError, match=message):
        PretrainingCollator(MultiBlockMasking((4, 4), min_patches=1))([sample])


def test_the_collator_of_our_loop_names_the_one_for_the_trainer():
    with pytest.raises(ValueError, match=r"lack slot_block and step.*PretrainingCollator"):
        MaskingCollator(MultiBlockMasking((4, 4), min_patches=1), 0)([{"pixel_values": PIXELS}])


def test_the_example_trains_evaluates_and_saves_what_opens_here(tmp_path):
    argv = [f"--output_dir={tmp_path}", "--max_steps=2", "--use_cpu=true", "--eval_strategy=steps"]
    trainer = pretraining_with_trainer.main([*argv, "--eval_steps=2", "--per_device_eval_batch_size=250"])
    assert any("eval_loss" in row for row in trainer.state.log_history)
    opened = IJepaForPretraining.from_pretrained(tmp_path)
    assert_equal_weights(opened.state_dict(), trainer.model.state_dict())
    assert not torch.equal(opened.ijepa.layernorm.bias, opened.context_encoder.layernorm.bias)


@pytest.mark.slow
def test_torch_compile_of_the_trainer_changes_nothing(tiny_model, tmp_path):
    ends = []
    for name, compiled in (("plain", False), ("compiled", True)):
        reset_accelerate()
        # Inductor is tested with the model; here another backend, which is quicker.
        compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = build(tiny_model, tmp_path / name, **compiling)
        lengths = {batch["context_indices"].shape[-1] for batch in trainer.get_train_dataloader()}
        assert len(lengths) > 1
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert_close_weights(*ends, tolerance=1e-5)
