"""What is chosen for a device and a precision is as exact as what it replaces."""

import shlex
import shutil
import sys

import pytest
import torch

from ijepa_transformers import IJepaModel
from ijepa_transformers import execution as ijepa_transformers_execution
from ijepa_transformers.execution import (
    choice_on_cpu,
    choose_attention,
    computation_of,
    configure,
    medium_is_exact,
    prepare_for_inference,
    products_on_gpu,
    require_compiler,
    set_matmul_precision,
    threads,
    threads_of_step,
)


@pytest.fixture(autouse=True)
def default_precision():
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def test_float32_products_stay_as_exact_as_float32():
    torch.manual_seed(0)
    left, right = torch.randn(300, 700), torch.randn(700, 200)
    exact = left.double() @ right.double()

    def error():
        return ((left @ right - exact).abs().max() / exact.abs().max()).item()

    before = error()
    assert set_matmul_precision("cpu", "no") in ("highest", "medium")
    assert error() < 1e-6 + 2 * before


def test_a_setting_that_rounds_to_bfloat16_is_not_kept(monkeypatch):
    monkeypatch.setattr(ijepa_transformers_execution, "_matmul_error", lambda: 3e-3)  # as on a processor with AMX
    assert not medium_is_exact()
    assert set_matmul_precision("cpu", "no") == torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("device_type", "precision"), [("cuda", "no"), ("cuda", "bf16"), ("cpu", "bf16")])
def test_nothing_is_set_where_nothing_is_gained(device_type, precision):
    torch.set_float32_matmul_precision("high")
    assert set_matmul_precision(device_type, precision) == torch.get_float32_matmul_precision() == "high"


@pytest.fixture
def with_amx(monkeypatch):
    monkeypatch.setattr(ijepa_transformers_execution, "_matmul_error", lambda: 3e-3)


@pytest.fixture
def without_amx(monkeypatch):
    monkeypatch.setattr(ijepa_transformers_execution, "_matmul_error", lambda: 1e-7)


@pytest.fixture
def kept_memory(monkeypatch):
    monkeypatch.setattr(ijepa_transformers_execution, "keeps_freed_memory", lambda: True)


def eager_cases():
    cases = [
        (device, precision, training)
        for device in ("cuda", "cpu")
        for precision in ("no", "bf16", "fp16")
        for training in (True, False)
    ]
    return {case for case in cases if choose_attention(*case) == "eager"}


def test_attention_is_fused_but_where_that_is_slow_on_a_cpu(with_amx, kept_memory):
    assert eager_cases() == {("cpu", "bf16", True), ("cpu", "fp16", True)}
    torch.set_float32_matmul_precision("medium")
    assert eager_cases() == {("cpu", "bf16", True), ("cpu", "fp16", True), ("cpu", "no", True), ("cpu", "no", False)}


def test_features_in_half_precision_have_eager_attention_without_amx_and_with_kept_memory(
    tiny_config, without_amx, monkeypatch
):
    monkeypatch.setattr(ijepa_transformers_execution, "keeps_freed_memory", lambda: False)
    assert eager_cases() == {("cpu", "bf16", True), ("cpu", "fp16", True)}
    monkeypatch.setattr(ijepa_transformers_execution, "keeps_freed_memory", lambda: True)
    assert eager_cases() == {("cpu", each, training) for each in ("bf16", "fp16") for training in (True, False)}
    model = IJepaModel._from_config(tiny_config, attn_implementation="sdpa")
    assert configure(model, "cpu", "bf16") == "eager attention, float32 products highest"


def test_a_model_is_configured_and_what_the_user_chose_stays(tiny_config, with_amx):
    model = IJepaModel._from_config(tiny_config, attn_implementation="sdpa")
    assert configure(model, "cpu", "bf16") == "sdpa attention, float32 products highest"
    assert configure(model, "cpu", "bf16", training=True) == "eager attention, float32 products highest"
    assert model.config._attn_implementation == "eager"
    assert configure(model, "cuda", "no").startswith("eager attention")
    assert configure(torch.nn.Linear(2, 2), "cuda", "no") == "its own attention, float32 products highest"


def test_what_is_usual_is_left_out_of_the_computation():
    assert computation_of("cpu", 1, "fp32") == computation_of("cpu", 1, "no", "single") == "cpu"
    assert computation_of("cuda", 8, "bf16", "ddp") == "cuda, ddp, 8 processes, bf16"
    assert computation_of("cuda", 2, "fp32") == "cuda, 2 processes"


def test_the_choice_on_a_cpu_is_said_without_what_the_user_chose():
    assert choice_on_cpu("no", "sdpa") == "sdpa attention and PyTorch's own float32 products"
    torch.set_float32_matmul_precision("medium")
    assert choice_on_cpu("fp32", "eager") == "eager attention and exact float32 products by oneDNN"
    assert choice_on_cpu("bf16", "eager") == "eager attention"
    assert choice_on_cpu("no") == "exact float32 products by oneDNN" and choice_on_cpu("bf16") == ""
    torch.set_float32_matmul_precision("high")  # by the user
    assert choice_on_cpu("no", "eager") == "eager attention"


def test_how_a_gpu_multiplies_float32_is_said_with_what_to_change():
    exact = products_on_gpu("cuda", "no")
    assert "are exact" in exact and "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1" in exact and "--mixed_precision bf16" in exact
    torch.set_float32_matmul_precision("high")
    assert "are rounded to TensorFloat-32" in products_on_gpu("cuda", "no")
    assert products_on_gpu("cuda", "bf16") == products_on_gpu("cpu", "no") == ""


@pytest.mark.parametrize("compiler", ["", "no_such_compiler", "/bin/false", "/etc/passwd", "'"])
def test_a_compiler_that_does_not_work_is_refused(monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ValueError, match="does not work"):
        require_compiler("cpu")
    require_compiler("cuda")


def test_a_compiler_may_have_words_before_it(monkeypatch):
    """PyTorch takes them too. `python --version` stands for a compiler, so that the test needs none."""
    monkeypatch.setenv("CXX", f"env {shlex.quote(sys.executable)}")
    require_compiler("cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_cache_that_cannot_be_written_is_told_in_a_sentence(monkeypatch, tmp_path):
    """A file in the place of the directory stands for a disk that is full or read-only."""
    from torch._inductor import codecache

    (tmp_path / "file").touch()
    monkeypatch.setattr(codecache, "cache_dir", lambda: str(tmp_path / "file"))
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"cannot write its files \(.*TORCHINDUCTOR_CACHE_DIR"):
        prepare_for_inference(torch.nn.Linear(3, 5).eval(), torch.ones(2, 3), "fp32")


def test_one_thread_computes_a_small_step_on_a_cpu(monkeypatch):
    quickstart, small_images, vit_small = 16 * 64 * 64, 32 * 64 * 96, 16 * 196 * 384  # images x patches x width
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [threads_of_step("cpu", each) for each in (quickstart, small_images, vit_small)] == [1, 1, 8]
    assert threads_of_step("cuda", quickstart) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads_of_step("cpu", quickstart) == 8


def test_the_number_of_threads_is_what_it_was_before_the_step():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
