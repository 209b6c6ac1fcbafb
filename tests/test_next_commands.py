"""The commands that stand at the end of a command are accepted as they are printed, with real paths."""

import pytest
import yaml

from ijepa_transformers.evaluation import statistics
from ijepa_transformers.evaluation.statistics import next_command as after_stats
from ijepa_transformers.evaluation.statistics_arguments import statistics_arguments
from ijepa_transformers.retrieval.arguments import search_arguments
from ijepa_transformers.retrieval.command import next_commands as after_search
from ijepa_transformers.visualization.arguments import VisualizationArguments
from ijepa_transformers.visualization.messages import next_commands as after_visualize
from tests.printed import parsed, proposed


def test_statistics_go_into_a_pretraining_run(tmp_path):
    data = str(tmp_path / "my photos")
    arguments = statistics_arguments(data=data, split="test", num_channels=1, image_column="scan")
    name, found = parsed(after_stats(arguments, {"num_channels": 1, "image_mean": [0.25], "image_std": [0.5]}))
    assert name == "pretrain" and (found.data, found.train_split, found.image_column) == (data, "test", "scan")
    assert (found.num_channels, found.image_mean, found.image_std) == (1, [0.25], [0.5])


def test_statistics_alone_are_on_standard_output(capsys):
    statistics.main(["--data", "digits", "--num_channels", "1", "--max_images", "20", "--num_workers", "0"])
    out, err = capsys.readouterr()
    measured = yaml.safe_load(out)
    assert set(measured) == {"num_channels", "image_mean", "image_std"}
    assert [line.split()[0] for line in err.splitlines()[:2]] == ["data", "measured"] and err.count("1,297") == 1
    (found,) = (arguments for _, arguments in proposed(err))
    assert found.image_mean == measured["image_mean"] and found.image_std == measured["image_std"]


@pytest.mark.parametrize("has_gradio", [True, False])
def test_a_search_proposes_what_was_not_asked(tmp_path, monkeypatch, has_gradio):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: has_gradio or None)
    photos, model = str(tmp_path / "my photos"), str(tmp_path / "model")
    given = {"data": photos, "model": model, "index": "kept", "encoder": "context"}
    found = [parsed(line) for line in after_search(search_arguments(**given, query=["it's.jpg"], k=3))]
    assert [name for name, _ in found] == ["search"] * (3 if has_gradio else 2)
    assert {(each.data, each.model, each.index, each.encoder) for _, each in found} == {tuple(given.values())}
    (_, both), (_, page), *rest = found
    assert both.duplicates and both.outliers and not both.query
    assert page.query == ["it's.jpg"] and page.k == 3 and page.output == "search.html"
    assert all(each.serve for _, each in rest)
    everything = {**given, "duplicates": True, "outliers": True, "output": "page.html"}
    assert len(after_search(search_arguments(**everything))) == has_gradio


def test_a_page_proposes_its_decoder_a_search_and_features(tmp_path):
    model = tmp_path / "my model"
    model.mkdir()
    given = {"model": f"{model}/", "data": "photos", "output": "page.html", "split": "test", "encoder": "context"}
    arguments = VisualizationArguments(**given, runs=["other=out"], num_images=3)
    found = dict(map(parsed, after_visualize(arguments, has_predictor=True)))
    assert list(found) == ["visualize", "search", "extract"]
    again = found["visualize"]
    assert again.decoder and (again.output, again.runs, again.num_images) == ("page.html", ["other=out"], 3)
    assert {(each.data, each.split, each.encoder) for each in found.values()} == {("photos", "test", "context")}
    assert found["search"].model == str(model) and found["extract"].output_dir == f"{model}_features"
    assert [name for name, _ in map(parsed, after_visualize(arguments, has_predictor=False))] == ["search", "extract"]
    on_the_hub = VisualizationArguments(model="someone/model", data="photos", output="page.html")
    assert parsed(after_visualize(on_the_hub, True)[-1])[1].output_dir == "model_features"
