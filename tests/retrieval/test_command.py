"""`ijepa search`: what is found, what is computed again, and what is said when something is wrong."""

import json
import os
import shutil
import sys
from html import escape
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import ijepa_transformers
from ijepa_transformers import IJepaModel
from ijepa_transformers.data.transforms import build_image_processor
from ijepa_transformers.evaluation import extraction
from ijepa_transformers.evaluation.probes import standardize
from ijepa_transformers.retrieval import command, index
from ijepa_transformers.retrieval.doubts import doubt_about
from tests.runs import reset_accelerate, save_pretrained_model


NAMES = ["a 1.png", "b.png", "c.png", "Ünï <b>&.png", "line\nbreak.png", "sub/e.png", "sub/f.png"]

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def save_photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def place(gray_pretrained, tmp_path, monkeypatch):
    """The working directory: a folder of photos. "sub/f.png" is a smaller copy of "b.png"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        save_photo(tmp_path / "photos" / name, seed)
    Image.open("photos/b.png").resize((36, 30), Image.Resampling.BICUBIC).save("photos/sub/f.png")
    return tmp_path


@pytest.fixture
def ask(place, gray_pretrained, capsys):
    """Runs the command with `--json true` and returns what it found."""

    def run(*words, model=gray_pretrained, data="photos"):
        reset_accelerate()
        capsys.readouterr()
        command.main([data, "--model", str(model), "--num_workers", "0", "--json", "true", *words])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refusal(place, gray_pretrained, capsys):
    """The sentence with which the command ends."""

    def run(*words, model=gray_pretrained, data="photos"):
        reset_accelerate()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command.main([data, "--model", str(model), "--num_workers", "0", *words])
        told = capsys.readouterr()
        assert stop.value.code == 2 and told.out == ""
        return told.err.splitlines()[-1].removeprefix("ijepa search: error: ")

    return run


def names_of(rows):
    return [row["name"] for row in rows]


def test_the_most_similar_photos_by_cosine_of_standardised_features(ask, gray_pretrained):
    found = ask("--query", "photos/b.png", "photos/sub/../b.png", "--k", "6")
    first, second = found["queries"]
    assert names_of(first["similar"])[0] == "sub/f.png" and "b.png" not in names_of(first["similar"])
    assert first["similar"] == second["similar"]
    table = pyarrow.parquet.read_table(sorted(Path(found["index"]).glob("*.parquet")))
    features = torch.from_numpy(np.stack(table["pooler_output"].to_numpy()))
    standard = torch.nn.functional.normalize(standardize(features, features)[0], dim=1)
    rows = {name: row for row, name in enumerate(table["name"].to_pylist())}
    for row in first["similar"]:
        expected = standard[rows["b.png"]] @ standard[rows[row["name"]]]
        assert row["similarity"] == pytest.approx(expected.item(), abs=1e-5)
        assert Path(row["path"]).is_file() and row["path"].endswith(row["name"])


def test_a_photo_from_elsewhere_is_read_as_all_images_are(ask, place):
    """A copy on its side with the EXIF data that turns it upright is the same photo."""
    upright = Image.open("photos/c.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    best = ask("--query", "turned.png", "--k", "1")["queries"][0]["similar"]
    assert names_of(best) == ["c.png"] and best[0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_near_duplicates_and_outliers_need_no_query(ask):
    found = ask("--duplicates", "--outliers", "--threshold", "0.95", "--k", "3")
    assert [group["names"] for group in found["duplicates"]] == [["b.png", "sub/f.png"]]
    assert len(found["outliers"]) == 3 and "queries" not in found
    values = [row["similarity"] for row in found["outliers"]]
    assert values == sorted(values)


def test_nothing_is_computed_twice_and_changes_are_noticed(ask, place, monkeypatch):
    monkeypatch.setattr(index, "_SHARD_SIZE", 2)
    words = ("--query", "photos/b.png", "--k", "4")
    assert ask(*words)["num_computed"] == 7
    again = ask(*words)
    assert again["num_computed"] == 0
    save_photo(place / "photos" / "0 new.png", 20)
    assert ask(*words)["num_computed"] == 1
    save_photo(place / "photos" / "c.png", 21)  # with the other photo of its shard
    (place / "photos" / "a 1.png").unlink()
    changed = ask(*words)
    assert 1 <= changed["num_computed"] <= 3 and ask(*words)["num_computed"] == 0
    fresh = ask(*words, "--index", "fresh")
    assert changed["index"] == again["index"] != fresh["index"] and fresh["num_computed"] == 7
    assert names_of(fresh["queries"][0]["similar"]) == names_of(changed["queries"][0]["similar"])
    values = [[row["similarity"] for row in part["queries"][0]["similar"]] for part in (fresh, changed)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize("data", ["photos", "photos/*.png", "linked"])
def test_a_query_that_is_in_the_data_is_not_listed(ask, place, data):
    (place / "linked").symlink_to("photos")
    found = ask("--query", "photos/b.png", "linked/b.png", data=data)
    for part in found["queries"]:
        assert part["similar"] and not any(row["path"].endswith("/b.png") for row in part["similar"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode only")
def test_a_name_that_is_not_utf_8_is_found_and_shown(ask, place):
    odd = os.fsdecode(b"photos/odd \xff.png")
    save_photo(Path(odd), 50)
    found = ask("--query", odd, "--output", "page.html")
    similar = found["queries"][0]["similar"]
    assert len(similar) == 7 and os.path.abspath(odd) not in [row["path"] for row in similar]
    assert "Like photos/odd ?.png" in Path("page.html").read_text(encoding="utf-8")
    others = ask("--query", "photos/b.png")["queries"][0]["similar"]
    assert os.path.abspath(odd) in [row["path"] for row in others]


@pytest.mark.parametrize("words", [(), ("--index", "kept")], ids=["cache", "named index"])
def test_a_damaged_file_of_the_index_is_computed_again_and_told_of_once(ask, place, monkeypatch, words):
    directory = Path(ask("--outliers", *words)["index"])
    (directory / "features-000000.parquet").write_text("junk")
    told = []
    monkeypatch.setattr(index, "tell", told.append)
    assert ask("--outliers", *words)["num_computed"] == 7
    assert len(told) == 1 and told[0].endswith("features-000000.parquet is damaged, so its photos are computed again.")
    assert ask("--outliers", *words)["num_computed"] == 0 and len(told) == 1
    assert (directory / "features-000000.parquet").exists() == bool(words)  # a directory of the user is left alone


def test_damaged_settings_cost_the_cache_and_are_refused_in_a_named_index(ask, refusal, place):
    for words in ((), ("--index", "kept")):
        directory = Path(ask("--outliers", *words)["index"])
        (directory / "settings.json").write_text("{half")
    assert ask("--outliers")["num_computed"] == 7 and ask("--outliers")["num_computed"] == 0
    assert "settings.json' is damaged" in refusal("--outliers", "--index", "kept")


def test_a_folder_that_was_moved_keeps_its_features(ask, place):
    assert ask("--outliers", "--index", "kept")["num_computed"] == 7
    (place / "photos").rename(place / "elsewhere")
    assert ask("--outliers", "--index", "kept", data="elsewhere")["num_computed"] == 0


def test_what_was_computed_before_a_failure_is_kept(ask, refusal, monkeypatch):
    monkeypatch.setattr(index, "_SHARD_SIZE", 2)
    write, written = extraction.write_shard, []

    def fails_at_the_third(path, *contents):
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write(path, *contents)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "write_shard", fails_at_the_third)
        assert "No space left on device" in refusal("--outliers", "--index", "kept")
    assert ask("--outliers", "--index", "kept")["num_computed"] == 3
    assert ask("--outliers", "--index", "kept")["num_computed"] == 0


def test_photos_that_all_have_new_names_are_computed_without_a_word_about_the_index(ask, refusal, place):
    before = names_of(ask("--query", "photos/b.png")["queries"][0]["similar"])
    ask("--outliers", "--index", "kept")
    (place / "photos").rename(place / "all")
    (place / "photos").mkdir()
    (place / "all").rename(place / "photos" / "train")
    after = names_of(ask("--query", "photos/train/b.png")["queries"][0]["similar"])
    assert after == [f"train/{name}" for name in before]
    assert "holds features of other photos" in refusal("--outliers", "--index", "kept")


def test_the_directory_of_extract_is_an_index(ask, gray_pretrained):
    ijepa_transformers.extract_features(model=gray_pretrained, data="photos", output_dir="features", num_workers=0)
    before = sorted(Path("features").iterdir())
    assert ask("--outliers", "--index", "features")["num_computed"] == 0
    assert sorted(Path("features").iterdir()) == before


def test_images_of_a_table_are_searched_too(ask, monkeypatch):
    monkeypatch.setattr(index, "_SHARD_SIZE", 500)
    words = ("--split", "test", "--duplicates", "--threshold", "0.999")
    found = ask(*words, data="digits")
    assert (found["num_photos"], found["num_computed"]) == (500, 500)
    again = ask(*words, data="digits")
    assert again["num_computed"] == 0 and again["duplicates"] == found["duplicates"]


def test_a_photo_that_cannot_be_read_is_named_and_left_out(ask, place):
    (place / "photos" / "broken.jpg").write_bytes(b"\xff\xd8 no photo")
    found = ask("--outliers")
    assert found["num_photos"] == 7 and names_of(found["unreadable"]) == ["broken.jpg"]
    save_photo(place / "good.png", 30)
    shutil.copy("good.png", "photos/broken.jpg")
    repaired = ask("--outliers")
    assert repaired["num_photos"] == 8 and repaired["unreadable"] == []


def test_text_quotes_names_and_page_escapes_them(place, gray_pretrained, capsys):
    words = ["photos", "--model", str(gray_pretrained), "--num_workers", "0", "--output", "page.html"]
    command.main([*words, "--query", "photos/Ünï <b>&.png", "--duplicates", "--outliers", "--threshold", "-1"])
    told = capsys.readouterr()
    assert "'line\\nbreak.png'" in told.out and "'Ünï <b>&.png'" in told.out
    assert "1 group of near duplicates (cosine similarity of at least -1.0000)" in told.out
    head = [line.split()[0] for line in told.err.splitlines()[:4]]
    assert head == ["model", "data", "features", "index"] and "7 of 7 to compute" in told.err
    assert "page         page.html (" in told.err and told.err.count("photos, split 'train'") == 1
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Ünï &lt;b&gt;&amp;.png" in page and "<b>&" not in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<img") == 1 + 6 + 7 + 7  # the query, those like it, one group, outliers
    assert page.count("<figcaption><b>") == 1 + 6 + 7  # the similarity of a group is not that of its photos
    assert page.count("<h3>7 photos; the two most similar have ") == 1
    comparison = "For comparison, two photos at random: usually "
    assert comparison in told.out.splitlines()[-2] and comparison in page
    assert '<span class="flag">--outliers</span>' in page.partition("<footer>")[2]  # not broken at its hyphens


def test_random_weights_are_named_everywhere_and_those_of_the_context_encoder_are_not(ask, gray_pretrained, capsys):
    """The target encoder of this model is new. Its context encoder was changed, as by training."""
    doubt = f"The weights of {str(gray_pretrained)!r} are random: nothing has trained them."
    assert ask("--outliers")["doubt"].startswith(doubt)
    assert ask("--outliers", "--encoder", "context")["doubt"] is None
    command.main(["photos", "--model", str(gray_pretrained), "--num_workers", "0", "--outliers", "--output", "p.html"])
    assert f"WARNING: {doubt}" in capsys.readouterr().out.splitlines()[-1]
    assert f'<p class="warning">WARNING: {escape(doubt)}' in Path("p.html").read_text(encoding="utf-8")


SHORT = "The run had 40 steps. Runs with fewer than about 2,000 learn little."
LEVEL = "The target encoder is level with a random encoder. The labels show no learning."


@pytest.mark.parametrize(
    ("verdict", "doubt", "of_context"),
    [
        ({"sentences": [LEVEL], "learned": False, "short_run": SHORT}, LEVEL, SHORT),
        ({"sentences": ["Not judged."], "learned": None, "short_run": SHORT}, SHORT, SHORT),
        ({"sentences": ["Not judged."], "state": "collapsed"}, "The target encoder has collapsed:", None),
        ({"sentences": ["Better."], "learned": True, "short_run": SHORT}, None, SHORT),
        ({"sentences": ["Not judged."], "learned": None, "state": "not collapsed"}, None, None),
        (None, None, None),
    ],
)
def test_the_verdict_of_a_run_that_learned_little_is_repeated(place, verdict, doubt, of_context):
    (place / "run").mkdir()
    written = "{" if verdict is None else json.dumps({"advice": [], **verdict})  # a damaged one says nothing
    (place / "run" / "verdict.json").write_text(written)
    trained = torch.nn.LayerNorm(3)
    torch.nn.init.constant_(trained.bias, 1e-6)
    for encoder, expected in (("target", doubt), ("context", of_context)):
        told = doubt_about("run", encoder, trained)
        assert told is None if expected is None else expected in told and "'run'" in told, (encoder, told)


@pytest.mark.parametrize("count", [1, 2])
def test_of_one_or_two_photos_the_numbers_are_said_to_mean_nothing(place, gray_pretrained, capsys, count):
    for number in range(count):
        save_photo(place / "few" / f"{number}.png", number)
    words = ["few", "--model", str(gray_pretrained), "--num_workers", "0", "--output", "page.html"]
    command.main([*words, "--duplicates", "--outliers"])
    told = "With fewer than 3 photos similarities say nothing, except that 1 means equal photos."
    out = capsys.readouterr().out
    assert out.startswith(f"{told}\n\nNo near duplicates") and told in Path("page.html").read_text(encoding="utf-8")


def test_equal_photos_are_near_duplicates_of_similarity_1(ask, place):
    (place / "equal").mkdir()
    for number in range(5):
        shutil.copy("photos/b.png", f"equal/{number}.png")
    for words in ((), ("--threshold", "1")):
        found = ask("--duplicates", "--outliers", *words, data="equal")
        assert [(len(group["names"]), group["similarity"]) for group in found["duplicates"]] == [(5, 1)]
        assert [row["similarity"] for row in found["outliers"]] == [1] * 5


@pytest.mark.parametrize(("k", "is_told"), [("4", True), ("5", False), ("6", False)])
def test_a_list_of_copies_alone_says_that_others_may_follow(place, gray_pretrained, capsys, k, is_told):
    for number in range(4):
        shutil.copy("photos/b.png", f"photos/copy {number}.png")
    words = ["photos", "--model", str(gray_pretrained), "--num_workers", "0", "--output", "page.html"]
    command.main([*words, "--query", "photos/b.png", "--k", k])
    told = "All of these equal the query, and more may"
    assert (told in capsys.readouterr().out, told in Path("page.html").read_text(encoding="utf-8")) == (is_told,) * 2


def other_model(path):
    torch.manual_seed(1)
    return save_pretrained_model(path, num_channels=3)


def test_mistakes_end_in_one_sentence(refusal, ask, place):
    ask("--outliers", "--index", "kept")
    for name in ("empty", "others"):
        (place / name).mkdir()
    (place / "text.jpg").write_text("no photo")
    save_photo(place / "others" / "z.png", 40)
    (place / "notes").mkdir()
    (place / "notes" / "my.txt").write_text("mine")
    query = ("--query", "photos/b.png")
    assert refusal("--query", "gone.jpg") == "The query 'gone.jpg' cannot be read: there is no such file."
    assert refusal("--query", "notes") == "The query 'notes' cannot be read: this is a folder."
    assert refusal("--query", "/dev/null") == "The query '/dev/null' cannot be read: this is not a regular file"
    assert refusal("--query", "") == "query must name image files, but one of the names is empty."
    assert refusal("--query", "text.jpg").startswith("The query 'text.jpg' cannot be read: this is not an image")
    assert "'empty'" in refusal(*query, data="empty")
    assert "'nowhere'" in refusal(*query, model="nowhere")
    assert refusal(*query, "--k", "7") == "k is 7, but there are 6 other photos."
    assert refusal("--outliers", "--k", "8") == "k is 8, but there are 7 photos."
    assert refusal(*query, "--k", "0") == "k must be at least 1, got 0."
    assert refusal() == "nothing to do: name a query image, or add --duplicates, --outliers or --serve true."
    another = other_model(place / "another")
    told = refusal(*query, "--index", "kept", model=another)
    assert told.startswith("index 'kept' holds features of another model (other weights")
    others = "index 'kept' holds features of other photos: name another index."
    assert refusal("--outliers", "--index", "kept", data="others") == others
    assert "'notes' holds other files" in refusal(*query, "--index", "notes")
    assert "lies among the images" in refusal(*query, "--index", "photos/index")
    assert "photos are named twice" in refusal(*query, "--data", "others")
    assert "is there already and is no .html file" in refusal("--outliers", "--output", "notes/my.txt")
    assert refusal("--outliers", "--output", "   ").startswith("output must not be empty")
    assert sorted(path.name for path in (place / "notes").iterdir()) == ["my.txt"]
    assert (place / "notes" / "my.txt").read_text() == "mine"


def test_an_encoder_without_finite_features_is_refused(refusal, place):
    model = other_model(place / "diverged")
    broken = IJepaModel.from_pretrained(model)
    for parameter in broken.parameters():
        parameter.data.fill_(torch.nan)
    broken.save_pretrained(place / "diverged")
    build_image_processor(16).save_pretrained(place / "diverged")
    assert "has diverged" in refusal("--outliers", model=place / "diverged")


def test_search_as_a_function(place, gray_pretrained, capsys):
    found = ijepa_transformers.search(
        data="photos", model=gray_pretrained, query=["photos/b.png"], k=2, index="kept", num_workers=0
    )
    assert found.directory == Path("kept") and capsys.readouterr().out == ""
    assert names_of(found.metrics["queries"][0]["similar"])[0] == "sub/f.png" and "'sub/f.png'" in found.table
    with pytest.raises(TypeError, match=r"search\(\) has no argument 'querry'. Did you mean query\?"):
        ijepa_transformers.search(data="photos", model=gray_pretrained, querry="photos/b.png")
    with pytest.raises(ValueError, match="k is 9, but there are 6 other photos"):
        ijepa_transformers.search(data="photos", model=gray_pretrained, query="photos/b.png", k=9, index="kept")
