"""The local page of `ijepa search`: what it shows, and how it looks to a browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers.retrieval import command, serve
from ijepa_transformers.retrieval.arguments import search_arguments
from ijepa_transformers.retrieval.finder import open_finder


NAMES = ["Ünï <img src=x onerror=alert(1)>.png", "red 1.png", "red 2.png", "sub/blue.png", "line\nbreak.png"]

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((700, 500)).save(path)
    Image.open(tmp_path / "photos" / "red 1.png").resize((600, 430)).save(tmp_path / "photos" / "red 2.png")
    return tmp_path / "photos"


@pytest.fixture
def page(photos, gray_pretrained, tmp_path):
    arguments = search_arguments(
        data=photos, model=gray_pretrained, index=tmp_path / "index", num_workers=0, serve=True
    )
    return serve.Page(open_finder(arguments)[0], arguments.k, arguments.threshold)


def test_photos_are_chosen_by_words_in_their_names(page):
    names = page.finder.index.names
    assert [names[row] for row in page.choose("RED")] == ["red 1.png", "red 2.png"]
    assert [names[row] for row in page.choose("blue sub")] == ["sub/blue.png"]
    assert len(page.choose("")) == 5 and page.choose("green") == []


def test_a_photo_and_an_upload_show_what_is_like_them(page, photos, tmp_path):
    row = page.finder.index.names.index("red 1.png")
    picture, name, matches = page.like_photo(row)
    assert picture.size == (320, 229) and picture.mode == "RGB" and name == "red 1.png"
    assert matches[0].name == "red 2.png" and len(matches) == 4
    shutil.copy(photos / "red 1.png", tmp_path / "my\nphoto.png")
    _, name, matches = page.like_file(str(tmp_path / "my\nphoto.png"))
    assert name == "my\N{REPLACEMENT CHARACTER}photo.png" and matches[0].name == "red 1.png"
    assert matches[0].similarity == pytest.approx(1, abs=1e-5)
    captions = [caption for _, caption in page.gallery([match.row for match in matches], [0.5] * 5)]
    assert captions[0] == "0.500  red 1.png" and all(
        caption.isprintable() or "\ufffd" in caption for caption in captions
    )
    with pytest.raises(ValueError, match="cannot be read"):
        page.like_file(str(tmp_path / "gone.png"))


def test_the_page_says_what_similarities_mean_and_that_the_weights_are_random(page):
    about = page.about_similarities
    assert about.startswith("For comparison, two photos at random") and "WARNING: The weights of" in about


def test_duplicates_and_outliers(page):
    names = page.finder.index.names
    sentence, groups = page.duplicates(0.9)
    assert sentence == "1 group with a cosine similarity of at least 0.9000."
    assert [[names[row] for row in rows] for rows, _ in groups] == [["red 1.png", "red 2.png"]]
    one_group, none = (page.duplicates(value)[0] for value in (0.9, 1.1))
    assert none == "0 groups with a cosine similarity of at least 1.1000. A lower value finds more."
    assert "A lower value" not in one_group
    assert len(page.outliers()) == 5 and 0 <= page.least_threshold <= page.threshold < 1


def test_without_gradio_the_command_says_what_to_install(monkeypatch, photos, gray_pretrained, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command.main([str(photos), "--model", str(gray_pretrained), "--serve", "true"])
    assert stop.value.code == 2
    sentence = 'the page needs gradio, which is not installed: pip install "ijepa-transformers[page]".'
    assert capsys.readouterr().err == f"ijepa search: error: {sentence}\n"


@pytest.mark.parametrize("words", [["--query", "a.png"], ["--duplicates"], ["--output", "a.html"], ["--json"]])
def test_what_the_page_does_itself_is_not_asked_for_beside_it(words, capsys):
    with pytest.raises(SystemExit):
        command.main(["photos", "--model", "model", "--serve", "true", *words])
    assert "serve opens a page where all of this is done" in capsys.readouterr().err


@pytest.fixture
def address(photos, gray_pretrained, tmp_path):
    """The page of the command, in a process of its own. It ends by Ctrl-C, without an error."""
    pytest.importorskip("gradio")
    words = ["search", str(photos), "--model", str(gray_pretrained), "--index", str(tmp_path / "index")]
    process = subprocess.Popen(
        [sys.executable, "-m", "ijepa_transformers.cli", *words, "--num_workers", "0", "--serve", "true"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    line = process.stdout.readline()
    yield re.fullmatch(r"(http://127\.0\.0\.1:\d+/) for this machine only; Ctrl-C ends it\.\n", line)[1]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in rest


@pytest.mark.slow
def test_the_server_names_no_other_host_and_refuses_requests_for_one(address):
    with urllib.request.urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "elsewhere.example"}))


@pytest.mark.slow
def test_the_page_in_a_browser(address, photos, tmp_path):
    """Needs `pip install playwright` and a Chromium on the path."""
    api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium")
    requests, dialogs = [], []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        api.expect.set_options(timeout=60_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        page.goto(address)
        page.get_by_placeholder("words in its name").fill("red 1")
        api.expect(page.locator("button.thumbnail-item")).to_have_count(1)
        page.locator("button.thumbnail-item").click()
        api.expect(page.locator("button.thumbnail-item")).to_have_count(5)
        assert "red 2.png" in page.locator("button.thumbnail-item").first.text_content()
        page.locator("input[type=file]").first.set_input_files(photos / "sub" / "blue.png")
        api.expect(page.locator("button.thumbnail-item").first).to_contain_text("1.000 blue.png")
        (tmp_path / "text.png").write_text("no photo")
        page.get_by_role("tab", name="Near duplicates").click()
        api.expect(page.get_by_text("with a cosine similarity of at least")).to_be_visible()
        page.get_by_role("tab", name="Outliers").click()
        strange = page.get_by_text("Ünï <img src=x onerror=alert(1)>.png").locator("visible=true")
        api.expect(strange.first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert dialogs == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
