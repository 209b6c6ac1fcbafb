# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks beside that of the step run, compare equal work and report what they promise.

Sizes are the smallest that work; no figure is looked at, only that it is one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import (
    checkpoint,
    choices,
    feature_extraction,
    gpu,
    input_pipeline,
    masking,
    opening,
    scaling,
    streaming,
    timing,
)
from ijepa_transformers.masking import MultiBlockMasking


REPOSITORY = Path(__file__).resolve().parents[2]


def result_of(capsys, output):
    """What a benchmark prints last, which must be the line of its result file."""
    printed = capsys.readouterr().out.splitlines()
    (line,) = output.read_text().splitlines()
    assert printed[-1] == line and "s of processor time" in printed[-3]
    report = json.loads(line)
    assert {"wall", "cpu"} <= report["process_seconds"].keys() and report["allocator"] == "system"
    return report


def report_of(script, *words):
    """What a benchmark prints last that changes what it imports, and so has a process of its own, without a file."""
    words = [*words, "--output", "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(REPOSITORY / "benchmarks/speed" / script), *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def is_environment(report):
    return {"torch", "transformers"} <= report["versions"].keys() and report["cpu"] and report["threads"] >= 1


@pytest.fixture(autouse=True)
def global_settings():
    """Benchmarks run in a process of their own and set what is global in torch."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


# ---- turns ----------------------------------------------------------------------------------------------------------


def test_turns_call_every_contender_equally_often_and_not_always_in_one_order():
    calls = []
    times = timing.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(each.wall >= 0 and each.cpu >= 0 for values in times.values() for each in values)
    assert calls == list("abcbcacab")


def test_matmul_precision_is_put_back_even_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), timing.matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_quartiles_of_one_value_are_that_value():
    assert timing.quartiles([2.0]) == {"q1": 2.0, "median": 2.0, "q3": 2.0}
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}


# ---- masking --------------------------------------------------------------------------------------------------------


def test_masking_benchmark_reports_every_sampler(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(masking, "CASES", [((14, 14), 2)])
    masking.main(["--turns", "1", "--output", str(tmp_path / "rows.jsonl")])
    report = result_of(capsys, tmp_path / "rows.jsonl")
    assert report["benchmark"] == "masking" and is_environment(report) and report["lightly_deviations"]
    (result,) = report["results"]
    for name in ("loop", "meta", "unbiased", "random", "inverse_block"):
        assert result[name]["images_per_second"] > 0 and result[name]["times_loop"] > 0
        assert result[name]["images_per_cpu_second"] > 0 and result[name]["times_loop_by_cpu"] > 0


def test_the_loop_of_the_masking_benchmark_follows_the_published_rules():
    meta = MultiBlockMasking((14, 14), mode="meta")
    contexts, targets = masking.loop_sample(meta, batch_size=16, step=3)
    ours = meta.sample(16, seed=0, step=3)
    assert contexts.shape[:2] == ours[0].shape[:2] and targets.shape == ours[1].shape
    assert contexts.shape[-1] > meta.min_patches
    for context, blocks in zip(contexts, targets, strict=True):
        assert not set(context.flatten().tolist()) & set(blocks.flatten().tolist())
        assert max(context.max(), blocks.max()) < 13 * 14  # never the last row


# ---- feature extraction ---------------------------------------------------------------------------------------------


def test_feature_benchmark_reports_both_precisions(capsys, tmp_path):
    feature_extraction.main(["--cases", "Ti/16:32:3", "--seconds", "0", "--output", str(tmp_path / "rows.jsonl")])
    report = result_of(capsys, tmp_path / "rows.jsonl")
    assert report["benchmark"] == "feature_extraction" and is_environment(report)
    assert [result["precision"] for result in report["results"]] == ["fp32", "bf16"]
    for result in report["results"]:
        assert {"ours", "stock sdpa", "stock eager"} <= set(result["contenders"]) and result["turns"] == 3
        for ratio in ("times_stock_sdpa", "times_stock_sdpa_by_cpu"):
            assert result["contenders"]["stock sdpa"][ratio]["median"] == 1
        for values in result["contenders"].values():
            assert values["images_per_second"]["median"] > 0 and values["images_per_cpu_second"]["median"] > 0
            assert values["error"] <= feature_extraction.TOLERANCES[result["precision"]]
            assert values["page_faults"] >= 0


def test_feature_benchmark_stops_when_outputs_differ():
    case = feature_extraction.Case.parse("Ti/16:32:2")
    source = feature_extraction.IJepaModel(case.config).eval()
    models = feature_extraction.contenders(source, "fp32", "cpu")
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = models["stock eager"].features(pixel_values).double()
    assert feature_extraction.check(models, expected, pixel_values, "fp32").keys() == models.keys()
    with pytest.raises(ValueError, match="ours is off by"):
        feature_extraction.check(models, expected + 1e-3, pixel_values, "fp32")


def test_contenders_have_the_same_weights():
    case = feature_extraction.Case.parse("Ti/16:32:2")
    source = feature_extraction.IJepaModel(case.config).eval()
    for precision in ("fp32", "bf16"):
        models = feature_extraction.contenders(source, precision, "cpu")
        for contender in models.values():
            weights = contender.model.state_dict()
            assert weights.keys() == source.state_dict().keys()
            for name, value in source.state_dict().items():
                assert torch.equal(weights[name], value.to(feature_extraction.DTYPES[precision]))


@pytest.mark.parametrize("text", ["S/16:224", "S:224:8", "X/16:224:8", "S/16:224:many"])
def test_a_case_that_makes_no_sense_is_refused_by_name(text):
    with pytest.raises(feature_extraction.argparse.ArgumentTypeError, match=text):
        feature_extraction.Case.parse(text)
    assert str(feature_extraction.Case.parse("H/14:224:64")) == "H/14:224:64"


# ---- choices --------------------------------------------------------------------------------------------------------


def test_choices_are_measured_beside_the_other_way(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    words = ["--size", "smoke", "--batch", "2", "--photos", "60", "--seconds", "0"]
    choices.main([*words, "--output", str(tmp_path / "rows.jsonl")])
    report = result_of(capsys, tmp_path / "rows.jsonl")
    assert report["benchmark"] == "choices" and is_environment(report)
    assert list(report["results"]) == list(choices.PARTS)
    for part, result in report["results"].items():
        first = next(iter(result["contenders"].values()))
        assert result["turns"] == 3 and len(result["contenders"]) >= 2 and first["times_first"]["median"] == 1, part
        assert all(each["cpu_seconds"]["median"] > 0 for each in result["contenders"].values()), part


def test_each_contender_has_the_attention_of_its_name():
    """They once shared a configuration, so that all had the attention of the last one."""
    for precision in ("fp32", "bf16"):
        for name, function in choices.step("smoke", 2, precision).items():
            layers = function.args[0].networks.context_encoder.layers
            assert {layer.attention.config._attn_implementation for layer in layers} == {name.partition(",")[0]}


def test_the_other_ways_of_the_choices_compute_the_same():
    torch.manual_seed(0)
    for part, tolerance in ((choices.cast, 0), (choices.packed, 1e-5)):
        chosen, other = (function() for function in part("smoke").values())
        assert (chosen - other).abs().max() <= tolerance * chosen.abs().max()


# ---- scaling --------------------------------------------------------------------------------------------------------


def test_scaling_says_how_the_time_grows(capsys, tmp_path):
    words = ["--image_size", "64", "--batch", "1", "--seconds", "0", "--output", str(tmp_path / "rows.jsonl")]
    values = ["--image_size_values", "64", "96", "--batch_values", "1", "2", "--depth_values", "1", "2"]
    scaling.main([*words, *values])
    report = result_of(capsys, tmp_path / "rows.jsonl")
    assert report["benchmark"] == "scaling" and is_environment(report)
    assert list(report["results"]) == ["image_size", "batch", "depth"]
    for axis, works in report["results"].items():
        for work, (first, second) in works.items():
            assert first["turns"] == 3 and first["gflops_per_second"]["median"] > 0 and "exponent" in second
            assert axis != "batch" or work != "features" or second["exponent_of_operations"] == 1
    first, second = report["results"]["image_size"]["features"]
    assert (first["patches"], second["patches"]) == (16, 36) and second["exponent_of_operations"] > 1


# ---- input pipeline, whole runs -------------------------------------------------------------------------------------


def test_input_pipeline_benchmark_reports_speed_difference_and_profile(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(input_pipeline.CASES, "500x375", {"photos": 2, "batch": 2, "texture": 12.0})
    words = ["--sizes", "500x375", "--turns", "2", "--output", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["input_pipeline.py", *words])
    input_pipeline.main()
    report = result_of(capsys, tmp_path / "rows.jsonl")
    assert report["benchmark"] == "input_pipeline" and is_environment(report)
    (result,) = report["results"]
    for name, figures in result["pipelines"].items():
        assert figures["images_per_second"]["median"] > 0 and figures["profile"]
        assert figures["images_per_cpu_second"]["median"] > 0
        if name.startswith("ours") and "fast" not in name:
            assert figures["difference"]["largest"] <= 1, "the promise of docs/speed.md"


@pytest.mark.slow
def test_end_to_end_benchmark_accounts_for_all_time():
    words = ["--image_size", "128", "--images", "16", "--batch_size", "4", "--workers", "0", "--logging_steps", "2"]
    report = report_of("end_to_end.py", *words)
    assert report["benchmark"] == "end_to_end" and is_environment(report) and report["steps"] == 4
    assert 0.5 * report["seconds"] < sum(report["phases"].values()) <= report["seconds"] + 0.1
    assert report["loop"]["calls"]["step"] == 2 * report["steps"]
    assert 0 < report["loop"]["outside_step"]["total_percent"] < 100
    assert report["cpu_seconds"] > 0 and report["loop"]["cpu_seconds"]["step"] > 0


def test_checkpoint_benchmark_writes_links_and_hashes(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint.IJEPA_SIZES, "tiny", {"hidden_size": 16, "num_attention_heads": 2})
    words = ["--size", "tiny", "--turns", "2", "--directory", str(tmp_path)]
    checkpoint.main([*words, "--output", str(tmp_path / "rows.jsonl")])
    report = result_of(capsys, tmp_path / "rows.jsonl")
    assert report["benchmark"] == "checkpoint" and is_environment(report) and report["bytes"] > 0
    for name in ("write", "link", "hash"):
        assert report[name]["seconds"]["median"] > 0 and report[name]["cpu_seconds"]["median"] > 0


def test_opening_benchmark_reports_time_and_memory(capsys, tmp_path):
    words = ["--images", "40", "--folders", "4", "--directory", str(tmp_path)]
    opening.main([*words, "--output", str(tmp_path / "rows.jsonl")])
    report = result_of(capsys, tmp_path / "rows.jsonl")
    assert report["benchmark"] == "opening" and is_environment(report) and report["images"] == 40
    assert {f"{part}_{unit}" for part in ("open", "fingerprint") for unit in ("s", "cpu_s", "mib")} <= report.keys()


def test_streaming_benchmark_gives_both_clocks(tmp_path):
    streaming.build(tmp_path, num_images=4000, num_shards=2)
    for name in ("parquet first", "tar resumed", "parquet reading"):
        figures = streaming.MEASUREMENTS[name](tmp_path, 0.02)
        clocks = ("first_batch", "first_batch_cpu")
        if "reading" in name:
            clocks = ("images_per_second", "images_per_cpu_second")
        assert all(figures[clock] >= 0 for clock in clocks), name


# ---- the result file ------------------------------------------------------------------------------------------------


def test_a_result_is_added_to_the_file_of_the_day_unless_another_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    parser = timing.argparse.ArgumentParser()
    timing.add_common_arguments(parser)
    for words in ([], [], ["--output", "-"], ["--output", str(tmp_path / "other.jsonl")]):
        timing.report("example", parser.parse_args(words), {"value": 3})
    (path,) = (tmp_path / "results").iterdir()
    assert path.match("example_cpu_20??-??-??.jsonl") and path.read_text().count("\n") == 2
    assert json.loads((tmp_path / "other.jsonl").read_text())["value"] == 3
    assert capsys.readouterr().out.count('"value": 3') == 4


def test_an_allocator_that_cannot_be_set_is_refused(monkeypatch):
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: False)
    timing.prepare(timing.argparse.Namespace(allocator="system"))
    with pytest.raises(SystemExit, match="needs glibc"):
        timing.prepare(timing.argparse.Namespace(allocator="keep"))


# ---- one GPU --------------------------------------------------------------------------------------------------------


def test_the_gpu_benchmark_goes_on_after_a_part_that_failed_and_repeats_no_part(monkeypatch, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    commands = {
        "step": ["-c", "import sys; sys.exit('no memory')"],
        "loop": ["-c", "print('a word'); print('{\"benchmark\": \"loop\"}')"],
        "features": ["-c", "import time; print('started', flush=True); time.sleep(60)"],
    }
    monkeypatch.setattr(gpu, "command", lambda part, own: commands[part])
    words = ["--tiny", "--output", str(output), "--minutes", "0", "--grace", "3"]
    gpu.main(words)
    step, loop, features = map(json.loads, output.read_text().splitlines())
    assert step["error"] == ["no memory"] and loop["result"] == {"benchmark": "loop"}
    assert features["printed"] == ["started"] and "time" in features["error"][0]
    gpu.main([*words, "--parts", "step", "loop"])
    assert [json.loads(line)["part"] for line in output.read_text().splitlines()][3:] == ["step"]
    assert "loop: is there already" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_benchmark_runs_every_part_in_tiny_sizes(tmp_path):
    output = tmp_path / "rows.jsonl"
    gpu.main(["--tiny", "--output", str(output), "--grace", "200"])
    parts = {line["part"]: line["result"] for line in map(json.loads, output.read_text().splitlines())}
    assert list(parts) == ["step", "loop", "features"]
    calls = parts["loop"]["loop"]["calls"]
    assert calls["checkpoint"] == 2 and calls["evaluation"] == 2
