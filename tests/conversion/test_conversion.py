"""Checkpoints go from Meta's layout to ours and back without losing a bit, or not at all; and stock directories become
ours."""

import json
import math
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.models.ijepa import modeling_ijepa as stock

from ijepa_transformers import IJEPA_SIZES, IJepaConfig, IJepaForImageClassification, IJepaForPretraining, IJepaModel
from ijepa_transformers.conversion import convert as conversion_convert
from ijepa_transformers.conversion import export as conversion_export
from ijepa_transformers.conversion.convert import convert
from ijepa_transformers.conversion.directory import convert_directory
from ijepa_transformers.conversion.export import export, meta_checkpoint
from ijepa_transformers.conversion.key_mapping import from_meta
from ijepa_transformers.conversion.meta_layout import expected_shapes, optimizer_order
from ijepa_transformers.conversion.meta_optimizer import load_meta_optimizer, optimizer_moments
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.optimization import parameter_groups
from tests import forked
from tests.conftest import (
    FIXTURES,
    config_of_reference,
    masks_of_reference,
    reference_json,
    reference_tensors,
    schedules_of_reference,
    weights_of_reference,
    without_key_bias,
)
from tests.printed import proposed
from tests.runs import saved_weights


REPOSITORY = Path(__file__).parents[2]
CHECKPOINT = FIXTURES / "meta_tiny_checkpoint.pth.tar"
HEADS = {"num_attention_heads": 3}  # width 36 was not published, so they must be given


def read(file=CHECKPOINT):
    return torch.load(file, weights_only=True)


def write(checkpoint, file):
    torch.save(checkpoint, file)
    return file


def assert_identical(ours, theirs, where="checkpoint"):
    """Equal in values, types and the order of keys, at every depth."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_identical(ours[key], theirs[key], f"{where}.{key}")
    else:
        assert type(ours) is type(theirs) and ours == theirs, where


def fails_with_a_sentence(module, argv, capsys):
    """The sentence of a script that ends with status 2 in this process."""
    with pytest.raises(SystemExit) as status:
        module.main([str(word) for word in argv])
    assert status.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and ": error: " in message
    return message


@pytest.fixture
def directory(tmp_path):
    convert(CHECKPOINT, tmp_path / "model", with_optimizer=True, **HEADS)
    return tmp_path / "model"


# Meta -> ours


def test_stock_auto_model_opens_the_encoder_that_was_asked_for(tmp_path):
    """In a process without this package: the target encoder by default, the context encoder when asked."""
    for encoder in ("both", "target", "context"):
        convert(CHECKPOINT, tmp_path / encoder, encoder, **HEADS)
    reference = reference_tensors("forward.safetensors")
    save_file({"pixel_values": reference["pixel_values"]}, tmp_path / "pixels.safetensors")
    program = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
pixel_values = load_file("pixels.safetensors")["pixel_values"]
features = {}
for encoder in ("both", "target", "context"):
    model, information = AutoModel.from_pretrained(encoder, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.") and not information["missing_keys"]
    with torch.no_grad():
        features[encoder] = model(pixel_values).last_hidden_state
save_file(features, "features.safetensors")
assert "ijepa_transformers" not in sys.modules
"""
    forked.run(["-c", program], cwd=tmp_path, kind="stock", check=True)
    features = load_file(tmp_path / "features.safetensors")
    tolerance = reference_json("MANIFEST.json")["tolerances"]["output_abs"]
    for encoder, name in (("both", "target_encoder"), ("target", "target_encoder"), ("context", "encoder")):
        torch.testing.assert_close(features[encoder], reference[f"{name}_full"], atol=tolerance, rtol=0)


def test_the_pretraining_model_computes_the_reference_loss(directory, tolerances):
    tensors = reference_tensors("forward.safetensors")
    model = IJepaForPretraining.from_pretrained(directory)
    output = model(tensors["pixel_values"], *masks_of_reference(tensors))
    assert output.loss.item() == pytest.approx(tensors["loss"].item(), abs=tolerances["loss_abs"])


@pytest.mark.parametrize("encoder, model_class", [("both", IJepaForPretraining), ("target", IJepaModel)])
def test_a_converted_directory_is_what_the_model_itself_would_save(tmp_path, encoder, model_class):
    convert(CHECKPOINT, tmp_path / "model", encoder, **HEADS)
    model_class.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again")]
    assert configs[0] == configs[1]
    weights = [saved_weights(tmp_path / name) for name in ("model", "again")]
    assert set(weights[0]) == set(weights[1])
    indices = [(tmp_path / name / "pretraining.safetensors.index.json") for name in ("model", "again")]
    assert [index.exists() for index in indices] == [encoder == "both"] * 2
    assert encoder == "target" or indices[0].read_text() == indices[1].read_text()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_keys_without_module_give_the_same_directory(directory, tmp_path):
    checkpoint = read()
    for network in ("encoder", "predictor", "target_encoder"):
        checkpoint[network] = {key.removeprefix("module."): value for key, value in checkpoint[network].items()}
    convert(write(checkpoint, tmp_path / "bare.pth.tar"), tmp_path / "bare", **HEADS)
    for name in ("model.safetensors", "pretraining.safetensors"):
        assert (directory / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


def test_the_report_names_every_key_if_it_is_asked_for(directory, capsys):
    capsys.readouterr()
    convert(CHECKPOINT, directory.with_name("short"), **HEADS)
    out = capsys.readouterr().out
    assert not any(line.startswith("    ") for line in out.splitlines())
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["source", "output"]
    assert [name for name, _ in proposed(out)] == ["python"]
    convert(CHECKPOINT, directory.with_name("again"), **HEADS, verbose="true")
    lines = capsys.readouterr().out.splitlines()
    for network, count in (("encoder", 41), ("target_encoder", 41), ("predictor", 32)):
        start = next(number for number, line in enumerate(lines) if line.startswith(f"{network}: {count} keys"))
        told = 0
        for line in lines[start + 1 :]:
            if not line.startswith("    "):
                break
            told += int(line.split("(")[2].split()[0]) if " times)" in line else 1
        assert told == count
    others = next(line for line in lines if line.startswith("other keys "))
    assert others.endswith(" scaler, epoch, loss, batch_size, world_size, lr: in meta_checkpoint.json")
    assert any(line.startswith("optimizer    left out") for line in lines)


def test_the_directory_says_licence_encoder_and_preprocessing(directory):
    card = (directory / "README.md").read_text()
    assert (
        "license: cc-by-nc-4.0" in card and "`ijepa`: the target encoder" in card and "standard deviation 0.5" in card
    )
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.485, 0.456, 0.406] and settings["image_std"] == [0.229, 0.224, 0.225]
    assert settings["size"] == {"shortest_edge": round(64 * 256 / 224)} and settings["resample"] == 3  # bicubic
    assert settings["do_center_crop"] and settings["crop_size"] == {"height": 64, "width": 64}


def synthetic_checkpoint(config, with_optimizer=False):
    """A checkpoint of this architecture in Meta's layout, whose tensor number n is zero but for its first value n.

    Untouched zeros take no memory, so that a checkpoint larger than the memory can be written.
    """
    expected, count = expected_shapes(config), 0

    def tensor(shape):
        nonlocal count
        count += 1
        value = torch.zeros(shape)
        value.view(-1)[0] = count
        return value

    networks = {
        name: {f"module.{key}": tensor(shape) for key, shape in shapes.items()} for name, shapes in expected.items()
    }
    checkpoint = {**networks, "scaler": None, "epoch": 300, "loss": 0.25, "batch_size": 128, "world_size": 16}
    if with_optimizer:
        groups, state, first = [], {}, 0
        for number, names in enumerate(optimizer_order(expected)):
            settings = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.4 * (number < 2)}
            groups.append({**settings, "params": list(range(first, first + len(names)))})
            for index, (network, key) in enumerate(names, start=first):
                if not key.endswith("pos_embed"):
                    shape = expected[network][key]
                    moments = {"exp_avg": tensor(shape), "exp_avg_sq": tensor(shape)}
                    state[index] = {"step": torch.tensor(375000.0), **moments}
            first += len(names)
        checkpoint["opt"] = {"state": state, "param_groups": groups}
    return {**checkpoint, "lr": 0.001}


ARCHITECTURES = {
    "published width": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "mlp of ViT-g": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 384 * 48 // 11},
    "grey": {"hidden_size": 192, "num_attention_heads": 3, "num_channels": 1},
    "oblong patches": {"hidden_size": 192, "num_attention_heads": 3, "image_size": [32, 64], "patch_size": [8, 16]},
    "deep predictor": {"hidden_size": 192, "num_attention_heads": 3, "predictor_num_hidden_layers": 3},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_is_read_off_the_shapes(name, tmp_path):
    sizes = {"num_hidden_layers": 2, "image_size": 64, "patch_size": 16, "predictor_hidden_size": 48}
    sizes = {**sizes, "predictor_num_hidden_layers": 1, **ARCHITECTURES[name]}
    expected = IJepaConfig(**sizes)
    convert(write(synthetic_checkpoint(expected), tmp_path / "file.pth.tar"), tmp_path / "model")
    found, expected = IJepaConfig.from_pretrained(tmp_path / "model").to_dict(), expected.to_dict()
    for key in ("architectures", "dtype", "transformers_version", "_name_or_path"):
        found.pop(key, None), expected.pop(key, None)
    assert found == expected


def test_every_published_size_has_its_number_of_heads():
    assert conversion_convert.HEADS_BY_WIDTH == {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
    for size in IJEPA_SIZES.values():
        networks = synthetic_checkpoint(IJepaConfig(**{**size, "num_hidden_layers": 1}, image_size=32))
        networks = conversion_convert.read_networks(networks, ())
        assert conversion_convert._infer_config(networks).num_attention_heads == size["num_attention_heads"]


# What is wrong is said, and leaves nothing behind


class Code:
    """Runs a command when a pickle of it is loaded with trust."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def edited(edit):
    """A fault in the content: `edit` changes the checkpoint in place."""

    def make(file):
        checkpoint = read()
        edit(checkpoint)
        return write(checkpoint, file)

    return make


def rename(checkpoint):
    checkpoint["predictor"]["module.gate"] = checkpoint["predictor"].pop("module.mask_token")


def flip_a_byte(file):
    """Of a tensor's content, past all headers."""
    with zipfile.ZipFile(CHECKPOINT) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(CHECKPOINT.read_bytes())
    content[part.header_offset + part.file_size // 2 + 200] ^= 1
    file.write_bytes(content)
    return file


def cut(file):
    file.write_bytes(CHECKPOINT.read_bytes()[:-5000])
    return file


def not_a_checkpoint(file):
    file.write_text("<html>Not found</html>")
    return file


def a_zip_of_something_else(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("letter.txt", "Dear reader")
    return file


def with_a_broken_pickle(file):
    """In a sound archive, so that its checksums are right."""
    with zipfile.ZipFile(CHECKPOINT) as archive, zipfile.ZipFile(file, "w") as broken:
        for part in archive.infolist():
            content = archive.read(part)
            broken.writestr(part.filename, content[: len(content) // 2] if "data.pkl" in part.filename else content)
    return file


def rezipped(change=lambda name, content: content, compression=zipfile.ZIP_STORED, twice=False):
    """A fault of the archive: the same parts in a new one, after `change` of their contents."""

    def make(file):
        with zipfile.ZipFile(CHECKPOINT) as old, zipfile.ZipFile(file, "w", compression) as new:
            for part in old.namelist():
                content = change(part, old.read(part))
                for _ in range(0 if content is None else 1 + (twice and "/data/" in part)):
                    new.writestr(part, content)
        return file

    return make


def short(name, content):
    return content[:100] if "/data/" in name and len(content) > 2000 else content


def big_endian(name, content):
    """As a machine of this byte order writes it. The numbers of the checkpoint are float32."""
    if name.endswith("byteorder"):
        return b"big"
    return np.frombuffer(content, "<f4").astype(">f4").tobytes() if "/data/" in name else content


NORM = "module.norm.bias"
FC1 = "module.blocks.0.mlp.fc1.weight"


def with_value(change, network="target_encoder", key=NORM):
    """A fault of one tensor."""
    return edited(lambda checkpoint: checkpoint[network].update({key: change(checkpoint[network][key])}))


def with_one(value):
    """Changes one of many numbers."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[-1] = value
        return tensor

    return change


def hold_itself(checkpoint):
    checkpoint["loss"] = [0.0]
    checkpoint["loss"].append(checkpoint["loss"])


def with_blocks(name, network="encoder"):
    names = [f"module.blocks.{number}.{name}" for number in range(100_000)]
    return edited(lambda checkpoint: checkpoint[network].update(dict.fromkeys(names, torch.zeros(36))))


def with_code(file):
    return write({**read(), "loss": Code(file.with_name("ran"))}, file)


def in_the_old_format(file):
    torch.save(read(), file, _use_new_zipfile_serialization=False)
    return file


def behind_other_bytes(file):
    file.write_bytes(b"HTTP/1.1 200 OK\n\n" + CHECKPOINT.read_bytes())
    return file


def with_a_block(number, name, network):
    blocks = "predictor_blocks" if network == "predictor" else "blocks"
    return edited(lambda checkpoint: checkpoint[network].update({f"module.{blocks}.{number}.{name}": torch.zeros(36)}))


def renumber(checkpoint):
    network = checkpoint["target_encoder"]
    for key in [key for key in network if ".blocks.1." in key]:
        network[key.replace(".1.", f".{10**30}.")] = network.pop(key)


FAULTS = {
    "old format": (in_the_old_format, "has the format of torch before 1.6, which has no checksums. Save it again in"),
    "other bytes before": (
        behind_other_bytes,
        "is damaged: it begins with b'HTTP/1.1', and the archive of torch.save",
    ),
    "huge number": (
        with_a_block(10**30, "norm1.weight", "target_encoder"),
        f"'target_encoder' has the key 'blocks.{10**30}.norm1.weight', but no block 3",
    ),
    "huge number of a bias": (
        with_a_block(10**30, "norm1.bias", "target_encoder"),
        f"has the surplus key 'blocks.{10**30}.norm1.bias'",
    ),
    "huge number in the predictor": (
        with_a_block("9" * 5000, "norm2.weight", "predictor"),
        f"'predictor' has the key 'predictor_blocks.{'9' * 5000}.norm2.weight', but no block 2",
    ),
    "renumbered": (edited(renumber), f"has the key 'blocks.{10**30}.norm1.weight', but no block 1"),
    "empty tensor": (
        with_value(lambda tensor: torch.zeros(0, 16), key="module.blocks.0.mlp.fc1.weight"),
        "target_encoder.blocks.0.mlp.fc1.weight is a tensor of shape (0, 16), which holds no numbers",
    ),
    "missing file": (lambda file: file, "There is no file"),
    "not a checkpoint": (not_a_checkpoint, "is not a checkpoint of torch.save"),
    "another zip": (a_zip_of_something_else, "is not a checkpoint of torch.save"),
    "cut short": (cut, "is cut short"),
    "tampered": (flip_a_byte, "is damaged: the checksum of its part"),
    "broken pickle": (with_a_broken_pickle, "is not a checkpoint of torch.save (pickle data was truncated)"),
    "code": (with_code, "would run code (posix.system)"),
    "a list": (lambda file: write([1], file), "holds a list"),
    "lost network": (edited(lambda c: c.pop("target_encoder")), "lacks 'target_encoder'"),
    "surplus network": (edited(lambda c: c.update(head={})), "surplus top-level key 'head'"),
    "network is a number": (edited(lambda c: c.update(predictor=3)), "'predictor' is a int"),
    "renamed key": (edited(rename), "lacks key 'mask_token' and has the surplus key 'gate'"),
    "missing key": (edited(lambda c: c["encoder"].pop("module.blocks.1.norm2.bias")), "key 'blocks.1.norm2.bias'"),
    "missing size": (edited(lambda c: c["target_encoder"].pop("module.pos_embed")), "lacks the key 'pos_embed'"),
    "wrong shape": (
        edited(lambda c: c["encoder"].update({"module.norm.bias": torch.zeros(35)})),
        "encoder.norm.bias has shape (35,), expected (36,)",
    ),
    "wrong type": (
        edited(lambda c: c["encoder"].update({"module.norm.bias": torch.zeros(36, dtype=torch.int64)})),
        "encoder.norm.bias is torch.int64",
    ),
    "both prefixes": (
        edited(lambda c: c["encoder"].update({"norm.bias": torch.zeros(36)})),
        "both with and without 'module.'",
    ),
    "no optimizer": (edited(lambda c: c.pop("opt")), "'opt' is not the state of an optimizer"),
    "optimizer is a list": (edited(lambda c: c["opt"].update(state=[])), "'opt' is not the state of an optimizer"),
    "moment is text": (edited(lambda c: c["opt"]["state"][5].update(exp_avg="x")), "in 'opt' is str"),
    "moment is NaN": (
        edited(lambda c: c["opt"]["state"][5]["exp_avg"].fill_(math.nan)),
        "opt.context_encoder.layers.0.mlp.fc2.weight.exp_avg holds NaN or infinity",
    ),
    "moment is sparse": (
        edited(lambda c: c["opt"]["state"][5].update(exp_avg=c["opt"]["state"][5]["exp_avg"].to_sparse())),
        "exp_avg of encoder.blocks.0.mlp.fc2.weight in 'opt' is a tensor of the layout torch.sparse_coo",
    ),
    "short parts": (rezipped(short), "bytes instead of"),
    "long parts": (rezipped(lambda name, data: data + bytes(8) if "/data/" in name else data), "bytes instead of"),
    "missing part": (rezipped(lambda name, data: None if name.endswith("/data/3") else data), "/data/3' is missing"),
    "bzip2": (rezipped(compression=zipfile.ZIP_BZIP2), "is compressed with method 12 of zip"),
    "parts twice": (rezipped(twice=True), "2 times"),
    "unknown byte order": (
        rezipped(lambda name, data: b"middle" if name.endswith("byteorder") else data),
        "in the byte order b'middle'",
    ),
    "NaN": (with_value(with_one(math.nan)), "target_encoder.norm.bias holds NaN or infinity in 1 of its 36 numbers"),
    "infinity": (with_value(with_one(-math.inf)), "target_encoder.norm.bias holds NaN or infinity"),
    "too large": (with_value(lambda value: value.double() + 1e300), "target_encoder.norm.bias holds NaN or infinity"),
    "sparse": (
        with_value(torch.Tensor.to_sparse),
        "target_encoder.norm.bias is a tensor of the layout torch.sparse_coo",
    ),
    "CSR": (
        with_value(torch.Tensor.to_sparse_csr, key=FC1),
        "target_encoder.blocks.0.mlp.fc1.weight is a tensor of the layout torch.sparse_csr",
    ),
    "no numbers": (with_value(lambda tensor: tensor.to("meta")), "norm.bias is a tensor on the device 'meta'"),
    "float8": (with_value(lambda tensor: tensor.to(torch.float8_e4m3fn)), "norm.bias is of torch.float8_e4m3fn"),
    "nested": (
        with_value(lambda tensor: torch.nested.nested_tensor([tensor])),
        "target_encoder.norm.bias is a nested tensor",
    ),
    "settings that hold themselves": (edited(hold_itself), "settings cannot be written as JSON: Circular reference"),
    "a setting of many numbers": (edited(lambda c: c.update(loss=torch.zeros(3))), "JSON: they hold a Tensor"),
    "key is a number": (
        edited(lambda c: c["encoder"].update({5: torch.zeros(1)})),
        "has the key 5, which is no string",
    ),
    "surplus blocks": (with_blocks("x"), "'encoder' has the surplus 100000 keys 'blocks.0.x'"),
    "too many blocks": (with_blocks("norm1.weight"), "has the surplus 99997 keys"),
    "too many blocks everywhere": (
        with_blocks("norm1.weight", "target_encoder"),
        "has 100,000 blocks, more than 1,000",
    ),
    "lost moment": (edited(lambda c: c["opt"]["state"].pop(5)), "encoder.blocks.0.mlp.fc2.weight"),
    "surplus moment": (edited(lambda c: c["opt"]["state"].update({0: {}})), "surplus state for its parameter 0"),
    "wrong moment": (
        edited(lambda c: c["opt"]["state"][5].update(exp_avg=torch.zeros(3))),
        "exp_avg of encoder.blocks.0.mlp.fc2.weight in 'opt' has shape (3,)",
    ),
    "other groups": (edited(lambda c: c["opt"]["param_groups"][0]["params"].pop()), "groups of [13, 12, 27, 20]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_one_sentence_and_leaves_no_output(fault, tmp_path, capsys, recwarn):
    make, sentence = FAULTS[fault]
    (tmp_path / "out").mkdir()
    argv = ["--checkpoint", make(tmp_path / "faulty.pth.tar"), "--output", tmp_path / "out" / "model"]
    argv += ["--num_attention_heads", 3, "--with_optimizer"]
    recwarn.clear()
    assert sentence in fails_with_a_sentence(conversion_convert, argv, capsys)
    assert not recwarn.list  # torch warns of sparse tensors
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([], "an encoder of width 36 was not published: give --num_attention_heads"),
        (["--num_attention_heads", 5], "36 and 5"),
        (["--num_attention_heads", 3, "--image_size", 64, 32], "a grid of 8 x 4 patches, but the checkpoint has 64"),
        (["--num_attention_heads", 3, "--encoder", "target", "--with_optimizer"], "not --encoder target"),
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(argv, sentence, tmp_path, capsys):
    argv = ["--checkpoint", CHECKPOINT, "--output", tmp_path / "model", *argv]
    assert sentence in fails_with_a_sentence(conversion_convert, argv, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        rezipped(compression=zipfile.ZIP_DEFLATED),
        rezipped(big_endian),
        edited(lambda c: c["encoder"].update({NORM: torch.cat([c["encoder"][NORM]] * 2)[36:]})),
        edited(lambda c: c["encoder"].update({FC1: c["encoder"][FC1].T.contiguous().T})),
    ],
    ids=["compressed", "big-endian", "part of a storage", "transposed"],
)
def test_the_same_numbers_in_another_form_are_the_same_weights(directory, tmp_path, make):
    convert(make(tmp_path / "other.pth.tar"), tmp_path / "other", **HEADS)
    assert_identical(saved_weights(tmp_path / "other"), saved_weights(directory))


def test_weights_of_several_precisions_open_in_the_finest(tmp_path):
    """Otherwise opening them would round some."""
    checkpoint = read()
    for network in ("encoder", "target_encoder"):
        first = next(iter(checkpoint[network]))
        checkpoint[network][first] = checkpoint[network][first].bfloat16()
    convert(write(checkpoint, tmp_path / "file.pth.tar"), tmp_path / "model", **HEADS)
    weights = AutoModel.from_pretrained(tmp_path / "model").state_dict()
    assert torch.equal(weights["layernorm.bias"], checkpoint["target_encoder"][NORM])


def test_an_optimizer_that_is_left_out_may_have_any_form(directory, tmp_path):
    for number, groups in enumerate((5, [5], None)):
        checkpoint = read()
        checkpoint["opt"]["param_groups"] = groups
        convert(write(checkpoint, tmp_path / "file.pth.tar"), tmp_path / f"{number}", **HEADS)
        assert_identical(saved_weights(tmp_path / f"{number}"), saved_weights(directory))


def test_tensors_that_overlap_are_converted_with_their_own_numbers(tmp_path):
    checkpoint = read()
    weights, other = checkpoint["target_encoder"], FC1.replace("blocks.0", "blocks.1")
    shape = weights[FC1].shape
    shared = torch.arange(shape.numel() + 5, dtype=torch.float32)
    weights[FC1], weights[other] = shared[:-5].view(shape), shared[5:].view(shape)
    convert(write(checkpoint, tmp_path / "file.pth.tar"), tmp_path / "model", **HEADS)
    converted = load_file(tmp_path / "model/model.safetensors")
    for number, key in enumerate((FC1, other)):
        assert torch.equal(converted[f"ijepa.layers.{number}.mlp.fc1.weight"], weights[key])


def test_a_symbolic_link_as_output_is_written_through_and_stays(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for link, target in (("full", "there"), ("dangling", "nowhere")):
        (tmp_path / link).symlink_to(tmp_path / target)
        convert(CHECKPOINT, tmp_path / link, **HEADS)
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "model.safetensors").is_file()
        assert f"# {link}" in (tmp_path / target / "README.md").read_text()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    argv = ["--checkpoint", CHECKPOINT, "--output", tmp_path / "circle", "--num_attention_heads", 3]
    assert "circle is a link that leads back to itself" in fails_with_a_sentence(conversion_convert, argv, capsys)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion_convert, "load_checkpoint", None)
    (tmp_path / "file").write_text("mine")
    argv = ["--checkpoint", CHECKPOINT, "--output", tmp_path / "file" / "model", "--num_attention_heads", 3]
    sentence = fails_with_a_sentence(conversion_convert, argv, capsys)
    assert "the folder" in sentence and "file is no directory" in sentence


def test_an_existing_output_is_left_alone(directory, capsys):
    before = {file: file.read_bytes() for file in directory.iterdir()}
    argv = ["--checkpoint", CHECKPOINT, "--output", directory, "--num_attention_heads", 3]
    assert "already exists" in fails_with_a_sentence(conversion_convert, argv, capsys)
    assert {file: file.read_bytes() for file in directory.iterdir()} == before


def test_a_conversion_that_dies_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion_convert, "write_card", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert(CHECKPOINT, tmp_path / "model", **HEADS)
    assert not list(tmp_path.iterdir())


def test_the_scripts_run_from_the_repository(tmp_path):
    def script(name, *argv):
        return forked.run([f"conversion/{name}.py", *argv])

    model, file = tmp_path / "model", tmp_path / "again.pth.tar"
    argv = ["--checkpoint", CHECKPOINT, "--output", model, "--num_attention_heads", 3]
    assert script("convert_meta_checkpoint", *argv).returncode == 0
    assert script("export_meta_checkpoint", "--model", model, "--output", file).returncode == 0
    assert_identical(read(file)["predictor"], dict(read()["predictor"]))
    refused = script("convert_meta_checkpoint", "--from_directory", model, "--output", tmp_path / "upgraded")
    assert refused.returncode == 2 and refused.stderr.startswith("ijepa convert: error: ")


# Ours -> Meta


@pytest.mark.parametrize("change", [{}, {"scaler": None}, {"loss": math.inf, "epoch": 300}])
def test_there_and_back_is_the_identity(change, tmp_path):
    original = {**read(), **change}
    convert(write(original, tmp_path / "file.pth.tar"), tmp_path / "model", with_optimizer=True, **HEADS)
    export(tmp_path / "model", tmp_path / "back.pth.tar")
    assert_identical(read(tmp_path / "back.pth.tar"), original)
    assert abs((tmp_path / "back.pth.tar").stat().st_size - CHECKPOINT.stat().st_size) < 50_000


def test_the_name_of_the_file_needs_no_ending(directory, tmp_path):
    export(directory, tmp_path / "back")
    assert_identical(read(tmp_path / "back"), read())


def test_a_plain_pretraining_directory_exports_what_it_knows(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    export(tmp_path / "model", tmp_path / "file.pth.tar", module_prefix=False)
    checkpoint = read(tmp_path / "file.pth.tar")
    assert list(checkpoint["encoder"])[:2] == ["pos_embed", "patch_embed.proj.weight"]
    unknown = {"opt", "scaler", "loss", "batch_size", "world_size", "lr"}
    assert {key for key, value in checkpoint.items() if value is None} == unknown and checkpoint["epoch"] == 0
    convert(tmp_path / "file.pth.tar", tmp_path / "back", num_attention_heads=4)
    back = IJepaForPretraining.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in tiny_model.state_dict().items())


def lose_a_query(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["ijepa.layers.0.attention.q_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def keep_one_encoder(directory):
    IJepaModel.from_pretrained(directory).save_pretrained(directory)


def cut_the_weights(directory):
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-100])


def spoil_a_weight(directory):
    weights = load_file(directory / "model.safetensors")
    weights[min(weights)].fill_(math.nan)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_file(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def edit_config(**values):
    def edit(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **values}))

    return edit


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lose_a_query, "'blocks.0.attn.qkv.weight' of the target_encoder are not all there"),
        (keep_one_encoder, "has no context_encoder"),
        (cut_the_weights, "model.safetensors is damaged"),
        (lambda directory: (directory / "config.json").unlink(), "holds no config.json"),
        (lambda directory: (directory / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda directory: (directory / "pretraining.safetensors").unlink(), "holds no pretraining.safetensors"),
        (lambda directory: (directory / "meta_checkpoint.json").unlink(), "has moments, but settings of 0 groups"),
        (write_file("meta_checkpoint.json", b"[]"), "meta_checkpoint.json is damaged: it holds a list"),
        (write_file("optimizer.safetensors", b"x"), "optimizer.safetensors is damaged"),
        (write_file("pretraining.safetensors.index.json", b"{"), "index.json is damaged: Expecting"),
        (write_file("pretraining.safetensors.index.json", b"{}"), "does not say in which file the weights are"),
        (write_file("config.json", b"[]"), "cannot be opened"),
        (spoil_a_weight, "holds NaN or infinity"),
        (edit_config(predictor_num_attention_heads=2), "as many heads as the encoder, here 2 and 3"),
        (edit_config(layer_norm_eps=1e-12), "1e-12"),
        (edit_config(predictor_attention="shared_context"), "'shared_context' is no longer supported"),
        (edit_config(intermediate_size=72), "has shape (144, 36), expected (72, 36)"),
    ],
)
def test_a_directory_that_meta_could_not_have_saved_is_refused(directory, damage, sentence, tmp_path, capsys):
    damage(directory)
    capsys.readouterr()
    argv = ["--model", directory, "--output", tmp_path / "file.pth.tar"]
    assert sentence in fails_with_a_sentence(conversion_export, argv, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# The optimizer


def reference_run():
    """Model, optimizer and schedules of the reference trajectory before its first step."""
    reference, tensors = reference_json("train_trajectory.json"), reference_tensors("train_trajectory.safetensors")
    model = IJepaForPretraining(config_of_reference(reference["config"]))
    weights = weights_of_reference(tensors, "init.", networks=("encoder", "predictor"))
    model.load_state_dict(weights, strict=False)
    model._copy_encoder(source=model.context_encoder, destination=model.ijepa)
    return model, torch.optim.AdamW(parameter_groups(model)), schedules_of_reference(reference["schedule"]), tensors


def train(model, optimizer, schedules, tensors, steps):
    for step in steps:
        schedules.apply(optimizer, step)
        pixel_values = tensors[f"step{step:02d}.pixel_values"].float()
        loss = model(pixel_values, *masks_of_reference(tensors, f"step{step:02d}.")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target_encoder(schedules.momentum(step))


def through_a_file_of_meta(model, optimizer, path):
    """Model and optimizer after a way out to Meta's layout and back."""
    checkpoint = meta_checkpoint(model.state_dict(), model.config, *optimizer_moments(model, optimizer))
    heads = model.config.num_attention_heads
    convert(write(checkpoint, path / "half.pth.tar"), path / "half", with_optimizer=True, num_attention_heads=heads)
    model = IJepaForPretraining.from_pretrained(path / "half")
    optimizer = torch.optim.AdamW(parameter_groups(model))
    optimizer.load_state_dict(load_meta_optimizer(model, path / "half"))
    return model, optimizer


def test_a_run_continues_from_metas_layout_like_an_uninterrupted_one(tmp_path, tolerances):
    """The published trajectory, converted to Meta's layout and back after half of its steps: bit for bit the same
    weights as without, and the reference's within its tolerances."""
    model, optimizer, schedules, tensors = reference_run()
    train(model, optimizer, schedules, tensors, range(12))
    uninterrupted = model.state_dict()

    model, optimizer, schedules, tensors = reference_run()
    train(model, optimizer, schedules, tensors, range(6))
    model, optimizer = through_a_file_of_meta(model, optimizer, tmp_path)
    train(model, optimizer, schedules, tensors, range(6, 12))
    resumed = model.state_dict()

    assert all(torch.equal(value, resumed[key]) for key, value in uninterrupted.items())
    expected = weights_of_reference(tensors, "final.")
    for name in without_key_bias(expected):
        torch.testing.assert_close(resumed[name], expected[name], atol=tolerances["final_weight_abs"], rtol=0)
    for name in set(expected) - set(without_key_bias(expected)):  # noise, bounded by the sum of learning rates
        assert (resumed[name] - expected[name]).abs().max() < tensors["lr"].sum()


def test_without_the_moments_a_continued_run_differs(tmp_path, tolerances):
    """The law above would fail with a fresh optimizer, so it tests what it says."""
    model, optimizer, schedules, tensors = reference_run()
    train(model, optimizer, schedules, tensors, range(6))
    train(model, torch.optim.AdamW(parameter_groups(model)), schedules, tensors, range(6, 12))
    expected = weights_of_reference(tensors, "final.")
    distance = max((model.state_dict()[name] - expected[name]).abs().max() for name in without_key_bias(expected))
    assert distance > 100 * tolerances["final_weight_abs"]


def test_metas_own_moments_arrive_at_their_parameters(directory):
    """Against the file's list of parameter names, not against our idea of the order."""
    original, model = read()["opt"], IJepaForPretraining.from_pretrained(directory)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    optimizer.load_state_dict(load_meta_optimizer(model, directory))
    moments, groups = optimizer_moments(model, optimizer)
    for listed in reference_json("meta_tiny_checkpoint.json")["optimizer_param_groups"]:
        for number, name in zip(listed["params"], listed["names"], strict=True):
            for moment in ("exp_avg", "exp_avg_sq") if not name.endswith("pos_embed") else ():
                named = {name: original["state"][number][moment]}
                for key, value in weights_of_reference(named, networks=("encoder", "predictor")).items():
                    assert torch.equal(moments.pop(f"{key}.{moment}"), value)
    assert all(key.endswith(".step") and step == 2.0 for key, step in moments.items())
    for group, theirs in zip(groups, original["param_groups"], strict=True):
        assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}.items() <= theirs.items()


def test_a_checkpoint_with_plain_numbers_as_steps_converts(tmp_path):
    """As older versions of torch saved them."""
    checkpoint = read()
    for state in checkpoint["opt"]["state"].values():
        state["step"] = 2
    convert(write(checkpoint, tmp_path / "old.pth.tar"), tmp_path / "old", with_optimizer=True, **HEADS)
    state = load_meta_optimizer(IJepaForPretraining.from_pretrained(tmp_path / "old"), tmp_path / "old")["state"]
    assert all(entry["step"].dtype == torch.float32 and entry["step"] == 2 for entry in state.values())


def test_a_directory_without_or_with_another_optimizer_is_an_error(directory, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="another architecture"):
        load_meta_optimizer(tiny_model, directory)
    convert(CHECKPOINT, tmp_path / "plain", **HEADS)
    with pytest.raises(ValueError, match="convert the checkpoint with --with_optimizer"):
        load_meta_optimizer(IJepaForPretraining.from_pretrained(tmp_path / "plain"), tmp_path / "plain")


# Stock directories -> ours


WRONG_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": 32, "width": 32},
}


@pytest.fixture(params=["early names", "present names"])
def hub_copy(request, tiny_config, tmp_path):
    """A directory as the stock port converts them, under both generations of names."""
    config = stock.IJepaConfig(**{**tiny_config.to_dict(), "layer_norm_eps": 1e-12})
    early_names = request.param == "early names"
    stock.IJepaModel(config).save_pretrained(tmp_path / "copy", save_original_format=early_names)
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    assert any(key.startswith("encoder.layer.") for key in weights) == early_names
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps(WRONG_PROCESSOR))
    (tmp_path / "copy" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# A copy\n")
    return tmp_path / "copy"


def test_an_upgraded_copy_has_native_names_and_the_same_numbers(hub_copy, tiny_batch, tmp_path):
    expected = stock.IJepaModel.from_pretrained(hub_copy)(tiny_batch["pixel_values"]).last_hidden_state
    convert_directory(hub_copy, tmp_path / "upgraded")
    assert set(load_file(tmp_path / "upgraded" / "model.safetensors")) == set(
        IJepaModel.from_pretrained(hub_copy).state_dict()
    )
    for model_class in (stock.IJepaModel, IJepaModel):
        model = model_class.from_pretrained(tmp_path / "upgraded")
        torch.testing.assert_close(model(tiny_batch["pixel_values"])[0], expected, atol=2e-6, rtol=0)


def test_wrong_statistics_and_epsilon_are_reported_and_the_statistics_corrected(hub_copy, tmp_path, capsys):
    convert_directory(hub_copy, tmp_path / "upgraded")
    said = capsys.readouterr().out
    assert "mean [0.5, 0.5, 0.5]" in said and "squashes images to {'height': 32, 'width': 32}" in said
    assert "layer_norm_eps is 1e-12" in said and "Kept" in said
    settings = json.loads((tmp_path / "upgraded" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.485, 0.456, 0.406] and settings["size"] == {"shortest_edge": 37}
    card = (tmp_path / "upgraded" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n---") and "layer_norm_eps is 1e-12" in card
    assert IJepaConfig.from_pretrained(tmp_path / "upgraded").layer_norm_eps == 1e-12


def test_what_the_user_asks_to_keep_or_change_is_kept_or_changed(hub_copy, tmp_path, capsys):
    convert_directory(hub_copy, tmp_path / "upgraded", keep_image_processor=True, layer_norm_eps=1e-6)
    assert "Now it is 1e-06" in capsys.readouterr().out
    assert json.loads((tmp_path / "upgraded" / "preprocessor_config.json").read_text()) == WRONG_PROCESSOR
    assert IJepaConfig.from_pretrained(tmp_path / "upgraded").layer_norm_eps == 1e-6


def edit_processor(**changes):
    def edit(directory):
        settings = {**build_image_processor(32).to_dict(), **changes}
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))

    return edit


@pytest.mark.parametrize("hub_copy", ["present names"], indirect=True)
def test_a_right_image_processor_passes_through_untouched(hub_copy, tmp_path, capsys):
    edit_processor()(hub_copy)
    processor = (hub_copy / "preprocessor_config.json").read_bytes()
    capsys.readouterr()
    convert_directory(hub_copy, tmp_path / "upgraded")
    assert "image processor" not in capsys.readouterr().out
    assert (tmp_path / "upgraded" / "preprocessor_config.json").read_bytes() == processor


@pytest.mark.parametrize("hub_copy", ["present names"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"crop_size": {"height": 24, "width": 24}},
            "makes images of 24 x 24 pixels and 3 channels, and",
        ),
        ({"do_center_crop": False}, "makes images of 37 x 46 pixels"),
        ({"do_resize": False, "do_center_crop": False}, "makes images of 256 x 320 pixels"),
        ({"image_mean": [0.4] * 4, "image_std": [0.2] * 4}, "preprocessor_config.json does not fit the model"),
        ({"image_mean": [0.4], "image_std": [0.2]}, "mean [0.4] and std [0.2] do not fit 3 channels"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std of the image processor"),
        ({"do_rescale": False}, "does not just resize, crop, divide by 255"),
        ({"rescale_factor": 1 / 127.5}, "does not just resize, crop, divide by 255"),
        ({"image_processor_type": "NoImageProcessor"}, "cannot be opened"),
        ({"crop_size": "wide"}, "cannot be opened"),
    ],
)
def test_an_image_processor_that_does_not_fit_the_model_is_refused(hub_copy, changes, sentence, tmp_path, capsys):
    """It was copied without a word."""
    edit_processor(**changes)(hub_copy)
    argv = ["--from_directory", hub_copy, "--output", tmp_path / "upgraded"]
    assert sentence in fails_with_a_sentence(conversion_convert, argv, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("hub_copy", ["present names"], indirect=True)
def test_own_statistics_stay_and_are_told(hub_copy, tmp_path, capsys):
    own = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}
    edit_processor(**own)(hub_copy)
    convert_directory(hub_copy, tmp_path / "kept")
    settings = {**WRONG_PROCESSOR, **own, "sixteen_bit_max": 4095}
    (hub_copy / "preprocessor_config.json").write_text(json.dumps(settings))
    convert_directory(hub_copy, tmp_path / "corrected")
    assert capsys.readouterr().out.count("with mean [0.4, 0.5, 0.6]") == 2
    for name in ("kept", "corrected"):
        settings = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        assert settings["image_mean"] == own["image_mean"] and settings["crop_size"] == {"height": 32, "width": 32}
    assert settings["sixteen_bit_max"] == 4095


def test_a_classifier_keeps_its_head(tiny_config, tiny_batch, tmp_path, capsys):
    config = stock.IJepaConfig(**tiny_config.to_dict(), num_labels=5)
    theirs = stock.IJepaForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "copy")
    convert_directory(tmp_path / "copy", tmp_path / "upgraded")
    said = capsys.readouterr().out
    assert "There is no preprocessor_config.json" in said and "names no licence" in said
    ours = IJepaForImageClassification.from_pretrained(tmp_path / "upgraded")
    expected = theirs(tiny_batch["pixel_values"]).logits
    torch.testing.assert_close(ours(tiny_batch["pixel_values"]).logits, expected, atol=2e-6, rtol=0)


def test_a_head_that_does_not_fit_is_an_error(tiny_config, tmp_path, capsys):
    config = stock.IJepaConfig(**tiny_config.to_dict(), num_labels=5)
    stock.IJepaForImageClassification(config).save_pretrained(tmp_path / "copy")
    labels = {str(number): f"LABEL_{number}" for number in range(7)}
    edit_config(id2label=labels, label2id={label: int(number) for number, label in labels.items()})(tmp_path / "copy")
    capsys.readouterr()
    argv = ["--from_directory", tmp_path / "copy", "--output", tmp_path / "upgraded"]
    sentence = fails_with_a_sentence(conversion_convert, argv, capsys)
    assert "of shape (5,), expected (7,)" in sentence


def test_surplus_weights_are_reported(hub_copy, tmp_path, capsys):
    weights = load_file(hub_copy / "model.safetensors")
    weights["pooler.dense.bias"] = torch.zeros(32)
    save_file(weights, hub_copy / "model.safetensors", metadata={"format": "pt"})
    convert_directory(hub_copy, tmp_path / "upgraded")
    assert "1 surplus keys, left out: 'pooler.dense.bias'" in capsys.readouterr().out


def lose_weights(directory):
    weights = load_file(directory / "model.safetensors")
    del weights[next(key for key in weights if key.endswith("layernorm_before.bias"))]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def round_weights(directory):
    weights = load_file(directory / "model.safetensors")
    name = next(key for key in weights if key.endswith("layernorm_before.bias"))
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lose_weights, "lacks 1 of the weights"),
        (round_weights, "as torch.int8, and the model needs floating-point numbers"),
        (spoil_a_weight, "holds NaN or infinity"),
        (cut_the_weights, "cannot be opened"),
        (lambda directory: (directory / "config.json").unlink(), "holds no config.json"),
        (edit_config(model_type="vit"), "a model of type 'vit'"),
        (edit_config(architectures=["IJepaForPretraining"]), "holds an IJepaForPretraining"),
        (edit_config(intermediate_size=72), "layers.0.mlp.fc1.bias"),
        (edit_config(hidden_size="wide"), "cannot be opened"),
        (edit_config(architectures=[5]), "holds an 5"),
        (write_file("config.json", b"[]"), "config.json is damaged: it holds a list"),
        (write_file("preprocessor_config.json", b"{"), "preprocessor_config.json is damaged"),
    ],
)
def test_a_faulty_copy_is_refused_and_leaves_no_output(hub_copy, damage, sentence, tmp_path, capsys):
    damage(hub_copy)
    capsys.readouterr()
    argv = ["--from_directory", hub_copy, "--output", tmp_path / "upgraded"]
    assert sentence in fails_with_a_sentence(conversion_convert, argv, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("source", "option", "sentence"),
    [
        ("--checkpoint", ["--layer_norm_eps", "1e-6"], "--layer_norm_eps goes with --from_directory"),
        ("--checkpoint", ["--keep_image_processor"], "--keep_image_processor goes with --from_directory"),
        ("--from_directory", ["--with_optimizer"], "--with_optimizer goes with --checkpoint"),
        ("--from_directory", ["--encoder", "both"], "--encoder goes with --checkpoint"),
    ],
)
def test_an_option_of_the_other_source_is_refused(source, option, sentence, tmp_path, capsys):
    argv = [source, tmp_path / "source", "--output", tmp_path / "output", *option]
    assert sentence in fails_with_a_sentence(conversion_convert, argv, capsys)
    assert not list(tmp_path.iterdir())


# The size of a published checkpoint; not for every day: IJEPA_TEST_HUGE=1 pytest -s -k huge


@pytest.mark.slow
@pytest.mark.skipif("IJEPA_TEST_HUGE" not in os.environ, reason="writes 21 GB; IJEPA_TEST_HUGE=1 runs it")
def test_a_huge_checkpoint_with_optimizer_fits_into_memory(tmp_path):
    """ViT-H/14 with predictor and AdamW's moments: the peak, with the mapped file in it, is near one copy of it."""
    config = IJepaConfig(**IJEPA_SIZES["huge"], patch_size=14)
    file, model = tmp_path / "huge.pth.tar", tmp_path / "model"
    torch.save(synthetic_checkpoint(config, with_optimizer=True), file)
    command = [sys.executable, "conversion/convert_meta_checkpoint.py", "--checkpoint", file, "--output", model]
    started = time.perf_counter()
    subprocess.run([*command, "--with_optimizer"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = file.stat().st_size
    print(f"\n{size / 1e9:.2f} GB in {seconds:.0f} s, peak resident memory {peak / 1e9:.2f} GB (mapped file included)")
    assert peak < 1.15 * size
    weights, expected = saved_weights(model), torch.load(file, weights_only=True, mmap=True)
    for network in ("encoder", "predictor", "target_encoder"):
        for key, value in from_meta(network, expected[network]).items():
            assert torch.equal(weights[key], value), key
