#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretraining in the Trainer of Transformers, on handwritten digits:

    python examples/pretraining_with_trainer.py --output_dir outputs/trainer --max_steps 300

Any option of `TrainingArguments` can be given. For images of your own, change the model's sizes and `samples`.
"""

from collections.abc import Sequence

from transformers import HfArgumentParser, Trainer, TrainingArguments

from ijepa_transformers import IJepaConfig, IJepaForPretraining, PretrainingCollator, TargetEncoderCallback
from ijepa_transformers.data import decode_image, load_image_dataset
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.masking import MultiBlockMasking


SIZES = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384}
PREDICTOR = {"predictor_hidden_size": 48, "predictor_num_hidden_layers": 2}
SETTINGS = {"remove_unused_columns": False, "learning_rate": 1e-3, "weight_decay": 0.05, "warmup_steps": 20}


def main(argv: Sequence[str] | None = None) -> Trainer:
    """Trains and saves a model that `ijepa probe`, `ijepa finetune` and `AutoModel` open."""
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(**SETTINGS, lr_scheduler_type="cosine", max_grad_norm=0.0, report_to="none")
    (arguments,) = parser.parse_args_into_dataclasses(args=argv)
    config = IJepaConfig(image_size=16, patch_size=2, num_channels=1, initializer_range=0.1, **SIZES, **PREDICTOR)
    processor = build_image_processor(config.image_height_and_width, config.num_channels)

    def samples(rows):  # the transform reads the column "image", so unused columns must stay
        images = [decode_image(image, config.num_channels) for image in rows["image"]]
        return {
            "pixel_values": processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        }

    collator = PretrainingCollator(MultiBlockMasking(config.grid_size, min_patches=4), seed=arguments.seed)
    trainer = Trainer(
        model=IJepaForPretraining(config),
        args=arguments,
        train_dataset=load_image_dataset("digits", split="train").with_transform(samples),
        eval_dataset=load_image_dataset("digits", split="test").with_transform(samples),
        data_collator=collator,
        processing_class=processor,
        callbacks=[TargetEncoderCallback(collator)],
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
