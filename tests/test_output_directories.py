"""Commands write only into directories that are new, empty or their own. Nothing that lies there is lost."""

import json

import pytest

from ijepa_transformers.conversion.arguments import parse_convert_arguments
from ijepa_transformers.evaluation import command as probing
from ijepa_transformers.evaluation.earlier import drop_if_repeated, keep_earlier
from ijepa_transformers.evaluation.extraction_arguments import extraction_arguments
from ijepa_transformers.files import refuse_other_files
from ijepa_transformers.finetuning import command as finetuning
from ijepa_transformers.pretraining import command as pretraining
from tests.runs import fine_tuning_argv, pretraining_argv


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def commands(model, output_dir):
    return {
        "pretrain": (pretraining.main, pretraining_argv(output_dir)),
        "resume": (pretraining.main, pretraining_argv(output_dir, resume=True)),
        "finetune": (finetuning.main, fine_tuning_argv(model, output_dir)),
        "probe": (probing.main, ["--models", str(model), "--data", "digits", "--output_dir", str(output_dir)]),
    }


@pytest.mark.parametrize("name", ["pretrain", "resume", "finetune", "probe"])
def test_a_folder_with_other_files_is_refused_and_stays_as_it_is(gray_pretrained, tmp_path, capsys, name):
    notes = tmp_path / "README.md"
    notes.write_text("my notes")
    main, argv = commands(gray_pretrained, tmp_path)[name]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "holds other files, such as 'README.md'" in error
    assert notes.read_text() == "my notes" and [path.name for path in tmp_path.glob("[!.]*")] == ["README.md"]


def test_logs_hidden_files_and_own_files_are_no_obstacle(tmp_path):
    for name in (".nfs", "job.log", "slurm-7.out"):
        (tmp_path / name).touch()
    refuse_other_files(tmp_path, ["own-*"])
    refuse_other_files(tmp_path / "new", ["own-*"])
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"photo\.jpg"):
        refuse_other_files(tmp_path, ["own-*"])
    (tmp_path / "own-1").touch()
    refuse_other_files(tmp_path, ["own-*"])


def test_an_earlier_table_of_other_probes_is_kept(tmp_path):
    def write(*rows):
        kept = keep_earlier(tmp_path)
        (tmp_path / "results.json").write_text(json.dumps({"data": {"train": 5}, "rows": rows}))
        (tmp_path / "results.md").write_text(str(rows))
        return drop_if_repeated(tmp_path, kept)

    def rows_of(name):
        return json.loads((tmp_path / name).read_text())["rows"]

    assert write({"knn": 0.5}) is None
    assert write({"linear": 0.7}) == tmp_path / "results_1.json"
    assert write({"linear": 0.7}) is None  # the same table again
    assert write({"attentive": 0.8}) == tmp_path / "results_2.json"
    assert rows_of("results.json") == [{"attentive": 0.8}] and rows_of("results_1.json") == [{"knn": 0.5}]
    assert sorted(path.name for path in tmp_path.glob("*.md")) == ["results.md", "results_1.md", "results_2.md"]


@pytest.mark.parametrize(("path", "reason"), [(" ", "must not be empty, got ' '"), ("x" * 300, "File name too long")])
@pytest.mark.parametrize("name", ["pretrain", "finetune", "probe"])
def test_a_path_that_cannot_be_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, name, path, reason):
    monkeypatch.chdir(tmp_path)
    main, argv = commands("a_model", path)[name]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and reason in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/features\nmodel: ~/model\ndata: digits\n")
    arguments = extraction_arguments(recipe="~/recipe.yaml")
    assert (arguments.output_dir, arguments.model) == (f"{tmp_path}/features", f"{tmp_path}/model")
    converted = parse_convert_arguments(["--checkpoint=~/x.pth.tar", "--output=~/converted"])
    assert (converted.checkpoint_file, converted.output) == (f"{tmp_path}/x.pth.tar", f"{tmp_path}/converted")
