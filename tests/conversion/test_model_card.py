"""The evaluation in a model card: it replaces itself and nothing else."""

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from ijepa_transformers.model_card import _RESULT_SUFFIX, inherited_license, update_evaluation, write_model_card


def result(value=0.5, name="20-NN"):
    return EvalResult(
        task_type="image-classification",
        dataset_type="digits",
        dataset_name="digits",
        dataset_split="test",
        metric_type="accuracy",
        metric_name=name,
        metric_value=value,
    )


def write(directory, text):
    (directory / "README.md").write_bytes(text.encode())


def read(directory):
    return (directory / "README.md").read_bytes().decode()


def values(directory):
    card = ModelCard.load(directory / "README.md", ignore_metadata_errors=False)
    return {(entry.metric_name, entry.metric_value) for entry in card.data.eval_results or []}


CARDS = {
    "plain": "---\nlicense: mit\ntags:\n- a\n- b\n---\n\n# Title\n\ntext  \n\n## More\nend without newline",
    "no metadata": "# Title\n\ntext\n",
    "comments": "---\n# a comment that stays\nlicense:   mit   # odd spaces\n---\n# Title\n---\nnot metadata\n---\n",
    "windows": "---\r\nlicense: mit\r\n---\r\n\r\n# Title\r\ntext\r\n",
    "empty": "",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_every_byte_of_the_card_stays(tmp_path, card):
    write(tmp_path, card)
    update_evaluation(tmp_path, "the table", [result()])
    remaining = read(tmp_path)
    pieces = card.split("---", 2)[1:] if card.startswith("---") else [card]
    for piece in pieces:
        assert piece.strip("\r\n") in remaining
    assert remaining.count("## Evaluation") == 1 and "the table" in remaining
    assert values(tmp_path) == {(f"20-NN{_RESULT_SUFFIX}", 0.5)}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_a_second_evaluation_replaces_the_first_and_the_same_one_changes_nothing(tmp_path, card):
    write(tmp_path, card)
    update_evaluation(tmp_path, "first table", [result(0.5), result(0.6, "linear")])
    first = read(tmp_path)
    update_evaluation(tmp_path, "first table", [result(0.5), result(0.6, "linear")])
    assert read(tmp_path) == first
    update_evaluation(tmp_path, "second table", [result(0.7)])
    second = read(tmp_path)
    assert "first table" not in second and second.count("## Evaluation") == 1 and second.count("model-index") == 1
    assert values(tmp_path) == {(f"20-NN{_RESULT_SUFFIX}", 0.7)}
    update_evaluation(tmp_path, "first table", [result(0.5), result(0.6, "linear")])
    assert read(tmp_path) == first


def test_text_around_the_section_stays_where_it_is(tmp_path):
    write(tmp_path, "# Title\n")
    update_evaluation(tmp_path, "one", [result()])
    write(tmp_path, read(tmp_path) + "\n## Written later\n\nby hand\n")
    before = read(tmp_path)
    update_evaluation(tmp_path, "two", [result()])
    assert read(tmp_path) == before.replace("one", "two")


def test_results_of_others_stay(tmp_path):
    entry = {
        "task": {"type": "image-classification"},
        "dataset": {"name": "ImageNet", "type": "imagenet-1k"},
        "metrics": [{"type": "accuracy", "value": 0.79, "name": "linear"}],
    }
    index = yaml.safe_dump({"model-index": [{"name": "theirs", "results": [entry]}]}, sort_keys=False)
    write(tmp_path, f"---\nlicense: mit\n{index}tags:\n- last\n---\n# Title\n")
    for value in (0.5, 0.6):
        update_evaluation(tmp_path, "table", [result(value)])
        assert values(tmp_path) == {("linear", 0.79), (f"20-NN{_RESULT_SUFFIX}", value)}
    card = read(tmp_path)
    assert card.index("license: mit") < card.index("model-index:") < card.index("tags:\n- last\n---\n# Title\n")
    assert ModelCard.load(tmp_path / "README.md").data.model_name == "theirs"


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_without_accuracies_there_is_no_model_index(tmp_path, card):
    """The Hub refuses an empty one."""
    write(tmp_path, card)
    update_evaluation(tmp_path, "report", [])
    first = read(tmp_path)
    assert first.startswith(card) and "model-index" not in first and first.count("report") == 1
    update_evaluation(tmp_path, "report", [result()])
    update_evaluation(tmp_path, "report", [])
    assert "model-index" not in read(tmp_path) and read(tmp_path).endswith(first)


def test_without_accuracies_results_of_others_stay(tmp_path):
    write(tmp_path, "")
    update_evaluation(tmp_path, "table", [result()])
    write(tmp_path, read(tmp_path).replace(_RESULT_SUFFIX, ""))  # as if somebody else had measured it
    update_evaluation(tmp_path, "report", [])
    assert values(tmp_path) == {("20-NN", 0.5)}


def test_the_card_of_a_pretraining_run_takes_an_evaluation(tmp_path):
    write_model_card(tmp_path, name="tiny", summary={"data": "digits"}, metrics={}, recipe={"seed": 0})
    before = read(tmp_path)
    update_evaluation(tmp_path, "table", [result()])
    after = read(tmp_path)
    body = before[before.index("\n---\n", 4) :]
    assert body in after and after.startswith(before[: before.index("\n---\n", 4)])
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["ijepa", "self-supervised-learning"]


@pytest.mark.parametrize("metadata", ["a: [1", "model-index:\n- results: 5", "- a list"])
def test_metadata_that_cannot_be_read_is_an_error_and_stays(tmp_path, metadata):
    write(tmp_path, f"---\n{metadata}\n---\n# Title\n")
    before = read(tmp_path)
    with pytest.raises(ValueError, match="metadata of the model card of"):
        update_evaluation(tmp_path, "table", [result()])
    assert read(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("card", ["---\nlicense: [a\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n---\n\udcff"])
def test_a_licence_that_cannot_be_read_is_told_and_ends_nothing(tmp_path, card, capsys):
    (tmp_path / "README.md").write_bytes(card.encode("utf-8", "surrogateescape"))
    assert inherited_license(str(tmp_path)) is None
    assert f"no licence is taken from {tmp_path / 'README.md'}" in capsys.readouterr().err
