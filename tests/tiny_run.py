"""Settings of a pretraining run that takes a second: digits, two layers of 16."""

TINY = {
    "data": "digits",
    "num_channels": 1,
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "predictor_hidden_size": 8,
    "predictor_num_hidden_layers": 1,
    "min_patches": 2,
    "batch_size": 8,
    "per_device_batch_size": 8,
    "max_steps": 6,
    "warmup_steps": 2,
    "num_workers": 0,
    "logging_steps": 2,
    "save_steps": 3,
    "mixed_precision": "no",
}
