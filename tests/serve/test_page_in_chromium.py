"""The page as people use it: by mouse, by keyboard, in a browser."""

import io
import json
import re
import shutil
from collections.abc import Iterator

import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
PATIENCE_MS = 30_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, running) -> Iterator["sync_api.Page"]:
    """A page on which nothing may go wrong: no error, and nothing that its policy forbids.

    It is closed before the server that it asks.
    """
    opened = browser.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield opened
    opened.close()
    # A refusal is told in the console, too.
    assert [text for text in wrong if not re.search("status of 40[01]", text)] == []


def labels(page) -> list[str]:
    """Wait for an answer, and return its labels."""
    page.locator("#labels li").first.wait_for()
    return page.locator("#labels li > span:first-child").all_inner_texts()


def test_an_image_that_is_chosen_gets_the_servers_labels(page, running, jpeg, tmp_path) -> None:
    server = running()
    _, answer, _ = server.ask("POST", "/models/coat_lite_toy", jpeg)
    expected = json.loads(answer)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg)
    page.goto(server.url)
    page.get_by_role("combobox", name="Model").select_option("coat_lite_toy")
    page.get_by_label("Drop an image here").set_input_files(photo)
    assert labels(page) == [entry["label"] for entry in expected]
    shares = page.locator("#labels li > span:nth-child(2)").all_inner_texts()
    assert shares == [f"{100 * entry['score']:.1f}%" for entry in expected]
    assert expected[0]["label"] in page.get_by_role("status").inner_text()
    row = page.locator("#requests tr").first.locator("td").all_inner_texts()
    assert row[0] == "photo.jpg" and 0 < float(row[2]) <= float(row[3])

    picture = tmp_path / "page.png"
    page.screenshot(path=picture, full_page=True)
    with Image.open(io.BytesIO(picture.read_bytes())) as seen:
        assert len(seen.convert("RGB").getcolors(1 << 24)) > 100  # the photograph is shown


def test_the_card_tells_what_computes(page, running) -> None:
    server = running()
    _, answer, _ = server.ask("GET", "/models")
    (card,) = [one for one in json.loads(answer) if one["name"] == "coat_toy"]
    page.goto(server.url)
    page.get_by_role("combobox", name="Model").select_option("coat_toy")
    told = page.locator("#card").inner_text()
    for part in (card["sha256"], card["artifact"], "onnxruntime, fp32", "64 × 64 pixels"):
        assert part in told


def test_a_sample_is_sent_by_the_keyboard_alone(page, running) -> None:
    page.goto(running().url)
    page.locator("#model option").first.wait_for(state="attached")
    page.get_by_role("combobox", name="Model").focus()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "sailboat":
            break
    page.keyboard.press("Enter")
    assert len(labels(page)) == 5
    assert page.get_by_alt_text("sailboat").is_visible()


def test_what_is_no_image_is_told_in_a_line(page, running, tmp_path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no image")
    page.goto(running().url)
    page.locator("#model option").first.wait_for(state="attached")
    with page.expect_response(lambda response: response.status == 400):
        page.get_by_label("Drop an image here").set_input_files(broken)
    status = page.locator("#status.failed")
    status.wait_for()
    assert re.search("image", status.inner_text())
    assert page.locator("#labels li").count() == 0


def test_a_token_is_asked_for_and_used(page, running, tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text("a secret of some length")
    page.goto(running("--token-file", token).url)
    page.get_by_role("textbox", name="Token").fill("a secret of some length")
    page.get_by_role("button", name="Use it").click()
    page.locator("#model option").first.wait_for(state="attached")
    page.get_by_role("button", name="umbrella").click()
    assert len(labels(page)) == 5
