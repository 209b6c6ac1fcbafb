"""A Hub that cannot be reached: one sentence at once, and what is in a cache or on this machine still opens."""

import socket
import time
import urllib.error
from email.message import Message
from unittest.mock import Mock

import datasets
import pytest
from huggingface_hub import constants

from ijepa_transformers import cli, hub
from ijepa_transformers.data import load_image_dataset
from ijepa_transformers.data.shards import open_stream
from ijepa_transformers.encoders import load_config, load_encoder, load_processor


NOBODY = "http://127.0.0.1:9"  # refuses every connection


@pytest.fixture
def unreachable(monkeypatch):
    """A Hub that refuses connections. Waiting for it is an error."""
    monkeypatch.setattr(hub, "_asked", {})
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("load", [load_config, load_encoder, load_processor])
def test_a_model_of_a_hub_that_cannot_be_reached_is_one_sentence_at_once(load):
    with pytest.raises(ValueError, match="'someone/model' cannot be opened: ") as caught:
        load("someone/model")
    reason = f"the Hub ({NOBODY}) cannot be reached: Connection refused"
    sentence = f"'someone/model' is not on this machine, and {reason}. Check the path or the connection."
    assert str(caught.value).endswith(sentence)
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(
    ("load", "source"),
    [
        (load_image_dataset, "someone/photos"),
        (open_stream, "someone/photos"),
        (open_stream, "hf://datasets/someone/photos/*.parquet"),
    ],
)
def test_data_of_a_hub_that_cannot_be_reached_are_one_sentence_at_once(load, source):
    with pytest.raises(ValueError, match=source.partition("*")[0]) as caught:
        load(source)
    assert str(caught.value).endswith(f", because the Hub ({NOBODY}) cannot be reached: Connection refused.")


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (["extract", "--model", "someone/model", "--data", "digits"], "The model 'someone/model' cannot be opened: "),
        (["probe", "--models", "a=random:someone/model@context"], "The model 'someone/model' cannot be opened: "),
        (["probe", "--models=a=random:someone/model#1"], "The model 'someone/model' cannot be opened: "),
        (["pretrain", "--init-from", "someone/model"], "The model 'someone/model' cannot be opened: "),
        (["finetune", "--data", "someone/photos"], "'someone/photos' is neither a file nor a folder on this machine"),
        (
            ["search", "someone/photos", "--duplicates"],
            "'someone/photos' is neither a file nor a folder on this machin",
        ),
        (["pretrain", "--recipe", "cifar10"], "'uoft-cs/cifar10' is neither a file nor a folder on this machine"),
        (["pretrain", "--recipe=cifar10", "--data", "a/b"], "'a/b' is neither a file nor a folder on this machine"),
    ],
)
def test_a_command_says_it_before_it_imports_anything_heavy(argv, start, monkeypatch, capsys):
    real = cli.importlib.import_module
    light = {".pretraining.finished"}  # which itself asks nothing of PyTorch, by a test of its own
    monkeypatch.setattr(
        cli.importlib,
        "import_module",
        lambda name, package: real(name, package) if name in light else pytest.fail("imports the command"),
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"ijepa {argv[0]}: error: {start}") and error.count("\n") == 1
    assert f"the Hub ({NOBODY}) cannot be reached: Connection refused." in error


@pytest.mark.usefixtures("unreachable")
def test_what_is_in_a_cache_or_no_name_is_left_to_the_command(monkeypatch, tmp_path):
    (tmp_path / "models--someone--model").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    words = ["--model", "someone/model", "--data", "photos", "--init_from", "../elsewhere/model", "--size", "small"]
    assert hub.sentence_for(words) is None
    assert hub.sentence_for(["--data", "*.tar", "--data", "a/b/c", "--data", "digits"]) is None


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("more", [["--print_memory_estimate", "true"], ["--data", "digits"], ["--print-config"]])
def test_data_of_a_recipe_that_are_not_opened_need_no_hub(more, monkeypatch):
    def read(argv):
        raise LookupError("the arguments are read")

    monkeypatch.setattr(cli, "_function", lambda place: read if "arguments" in place else lambda argv: False)
    with pytest.raises(LookupError):
        cli.run("pretrain", ["--recipe", "cifar10", *more])


def test_what_is_on_this_machine_needs_no_hub(monkeypatch, gray_pretrained):
    monkeypatch.setattr(hub, "why_unreachable", lambda: pytest.fail("asks the Hub"))
    assert load_config(str(gray_pretrained)).model_type == "ijepa"


def test_an_address_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    monkeypatch.setattr(socket, "create_connection", lambda place, patience: time.sleep(0.5) or socket.socket())
    assert hub._why_no_connection("https://huggingface.co") == "no answer"


def test_a_hub_that_takes_connections_and_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(hub, "_asked", {})
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert hub.why_unreachable() == f"the Hub ({address}) cannot be reached: no answer within 0.3 s"


@pytest.mark.parametrize("error", [None, OSError("no certificate"), ValueError("404")])
def test_a_hub_that_answers_anything_is_there(monkeypatch, error):
    def answer(request, timeout):
        if error:
            raise error
        return socket.socket()

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert hub._why_no_answer("https://host") is None


def test_a_hub_that_is_out_of_order_is_named(monkeypatch):
    error = urllib.error.HTTPError("https://host", 503, "Service Unavailable", Message(), None)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=error))
    assert hub._why_no_answer("https://host") == "it answers HTTP Error 503: Service Unavailable"


def test_behind_a_proxy_the_proxy_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: False)
    monkeypatch.setattr(socket, "create_connection", lambda place, patience: asked.append(place) or socket.socket())
    assert hub._why_no_connection("https://huggingface.co") is None and asked == [("proxy", 3128)]


def test_in_offline_mode_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_why_no_connection", lambda address: pytest.fail("asks the Hub"))
    assert hub.why_unreachable() is None
