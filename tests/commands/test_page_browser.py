"""The page of `diffusers-imagen demo` in headless Chromium, on a wide screen and on a phone's.

Needs playwright (the extra `browser`) and Chromium. Screenshots are left in the test's temporary folder, to be looked at.
"""

import re
import threading

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from script_modules import script_module


pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'diffusers-imagen[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

from diffusers_imagen.commands import webdemo  # noqa: E402
from diffusers_imagen.commands.webdemo import page_drawer, page_guard  # noqa: E402
from diffusers_imagen.commands.webdemo.live_drawing import Progress  # noqa: E402


DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PATIENCE = 120_000  # in ms: how long a test waits for what does not come


@pytest.fixture(scope="module")
def browser():
    with script_module("screenshot_demo") as module:
        try:
            path = module.find_browser()
        except ValueError as error:
            pytest.skip(str(error))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def url(cascade, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "held"))
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: True)
    page = webdemo.build(cascade, {"model": "someone/tiny"})
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **webdemo.LOOK)
    yield url
    page.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the page in a window of a size; at the end nothing of other servers was asked for, and no script failed."""
    opened, requests, errors = [], [], []

    def open_page(size):
        context = browser.new_context(viewport=size, has_touch=size is PHONE)
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, timeout=PATIENCE)
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        return page

    yield open_page
    for context in opened:
        context.close()
    assert all(request.startswith((url.rstrip("/"), "data:", "blob:")) for request in requests), requests
    assert errors == []


def shown(page, locator):
    """The one of some elements that is in the tab that is open."""
    return locator.locator("visible=true").first


def press(page, name: str) -> None:
    shown(page, page.get_by_role("button", name=name, exact=True)).click()


def wait_for(page, text: str) -> None:
    shown(page, page.get_by_text(text)).wait_for()


def settings(page, **values) -> None:
    """Opens the settings, and sets sliders of the tab by their labels."""
    shown(page, page.get_by_role("button", name="Settings")).click()
    shown(page, page.get_by_label(re.compile("number input for .* steps"))).wait_for()
    for label, value in {"16 px steps": 2, "32 px steps": 1, **values}.items():
        fields = page.get_by_label(f"number input for {label}", exact=True).locator("visible=true")
        if fields.count():
            fields.first.fill(str(value))
    shown(page, page.get_by_role("button", name="Settings")).click()


def fits(page, locator) -> bool:
    """Whether an element is in view, and none of it is cut off."""
    box, size = locator.bounding_box(), page.viewport_size
    return (
        box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= size["width"]
        and box["y"] + box["height"] <= size["height"]
    )


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_drawing(cascade, open_page, tmp_path, size):
    page = open_page(size)
    shown(page, page.get_by_label("Prompt", exact=True)).fill("a red apple")
    settings(page)
    page.evaluate("scrollTo(0, 0)")
    press(page, "Draw")
    wait_for(page, "Done in ")
    page.screenshot(path=tmp_path / "done.png")
    status = page.locator(".im-status").first.inner_text()
    seed = int(re.search(r"seed (\d+)", status).group(1))
    assert page.get_by_label("Seed", exact=True).first.input_value() == str(seed)

    # button and picture are in view at once, the picture whole, and nothing is wider than the screen
    picture = page.locator(".im-grid figure > button img").first
    assert fits(page, page.get_by_role("button", name="Draw", exact=True).first) and fits(page, picture)
    assert page.evaluate("scrollY") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    inline = picture.bounding_box()
    assert min(inline["width"], inline["height"]) >= 300

    # a click enlarges it, Escape closes it
    picture.click()
    large = page.locator(".im-zoom:popover-open img")
    large.wait_for()
    page.screenshot(path=tmp_path / "large.png")
    box = page.locator(".im-zoom:popover-open").bounding_box()
    assert abs(box["y"] + box["height"] / 2 - size["height"] / 2) < 8  # in the middle
    assert fits(page, large) and large.bounding_box()["width"] > inline["width"] * (0.9 if size is PHONE else 1.1)
    page.keyboard.press("Escape")
    large.wait_for(state="hidden")

    # it is saved under its name, and is what the pipeline draws
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").locator("visible=true").first.click()
    assert download.value.suggested_filename == f"a-red-apple-seed{seed}.png"
    download.value.save_as(tmp_path / "saved.png")
    generator = torch.Generator().manual_seed(seed)
    image = cascade("a red apple", num_inference_steps=[2, 1], generator=generator).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "saved.png")), np.asarray(image))
    assert page.get_by_text("Share", exact=False).count() == 0

    # a seed that is kept draws the same once more
    saves = page.locator(".im-grid .im-save").first
    name, before = f"a-red-apple-seed{seed}.png", saves.get_attribute("href")
    assert saves.get_attribute("download") == name
    page.get_by_label("Random seed").first.uncheck()
    press(page, "Draw")
    page.locator(f'.im-grid .im-save[download="{name}"]:not([href="{before}"])').wait_for()
    page.get_by_label("Random seed").first.check()
    page.get_by_label("Seed", exact=True).first.fill("7")
    page.get_by_label("Seed", exact=True).first.blur()
    playwright.expect(page.get_by_label("Random seed").first).not_to_be_checked(timeout=PATIENCE)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_eight_pictures_fit_too(open_page, tmp_path, size):
    page = open_page(size)
    shown(page, page.get_by_label("Prompt", exact=True)).fill("a red apple")
    settings(page, Images=8)
    page.evaluate("scrollTo(0, 0)")
    press(page, "Draw")
    wait_for(page, "Done in ")
    page.screenshot(path=tmp_path / "eight.png")
    pictures = page.locator(".im-grid figure > button img").all()
    assert len(pictures) == 8 and all(fits(page, picture) for picture in pictures)


class Steps:
    """A drawing that goes on when it is told to, in place of the pipeline's."""

    def __init__(self, stages):
        self.stages, self.go, self.closed = stages, threading.Semaphore(0), threading.Event()

    def __call__(self, pipe, stages, turn, **arguments):
        preview = np.full((1, 16, 16, 3), 99, dtype=np.uint8)
        image = Image.new("RGB", (16, 16), "red")
        try:
            yield Progress(1, 9, stages[0], {}, preview)
            self.go.acquire(timeout=120)
            yield Progress(5, 9, stages[1], {16: [image]})
            self.go.acquire(timeout=120)
            raise ValueError("`prompt` is <b>bad</b>")
        finally:
            self.closed.set()


def test_progress_previews_stopping_errors_and_a_full_queue(cascade, open_page, url, tmp_path, monkeypatch):
    steps = Steps(cascade.stages)
    monkeypatch.setattr(page_drawer, "draw", steps)
    page = open_page(DESKTOP)
    shown(page, page.get_by_label("Prompt", exact=True)).fill("a red apple")
    press(page, "Draw")
    wait_for(page, "Base 16 px: network call 1 of 9")
    bar = page.get_by_role("progressbar").first
    assert (bar.get_attribute("aria-valuenow"), bar.get_attribute("aria-valuemax")) == ("1", "9")
    page.locator('.im-grid img[src^="data:image/jpeg"]').wait_for()
    page.screenshot(path=tmp_path / "preview.png")
    steps.go.release()
    wait_for(page, "Super-resolution 32 px: network call 5 of 9")
    page.locator(".im-grid figure > button img").first.wait_for()  # the base stage's, as soon as there is one
    steps.go.release()
    wait_for(page, "`prompt` is <b>bad</b>")
    wait_for(page, "Failed.")
    page.screenshot(path=tmp_path / "error.png")
    assert "Traceback" not in page.content()

    # others wait until the queue is full
    post, data = f"{url}gradio_api/call/generate", ["a", 3, False, 1, "", 2, 4.0, 1, 1.0]
    with httpx.Client(trust_env=False, timeout=120) as client:
        codes = [client.post(post, json={"data": data}).status_code for _ in range(page_guard.MAX_WAITING + 4)]
    assert codes[0] == 200 and codes[-1] == 429
    press(page, "Draw")
    wait_for(page, "16 requests are waiting, which is the limit of this page: try again later.")
    wait_for(page, "Failed.")
    page.screenshot(path=tmp_path / "full.png")
    for _ in range(2 * len(codes)):
        steps.go.release()


def test_stop(cascade, open_page, tmp_path, monkeypatch):
    steps = Steps(cascade.stages)
    monkeypatch.setattr(page_drawer, "draw", steps)
    page = open_page(PHONE)
    shown(page, page.get_by_label("Prompt", exact=True)).fill("a red apple")
    press(page, "Draw")
    wait_for(page, "Base 16 px: network call 1 of 9")
    press(page, "Stop")
    wait_for(page, "Stopped.")
    steps.go.release()  # the step that runs ends, and no more is asked for
    assert steps.closed.wait(60)
    page.screenshot(path=tmp_path / "stopped.png")
    press(page, "Draw")  # and another can be drawn
    wait_for(page, "Base 16 px: network call 1 of 9")
    steps.go.release()
    steps.go.release()


def test_what_is_no_picture_and_none_at_all_is_said_in_one_line(open_page, tmp_path):
    page = open_page(DESKTOP)
    page.get_by_role("tab", name="Upscale").click()
    press(page, "Upscale")
    wait_for(page, "Upload an image first.")
    page.screenshot(path=tmp_path / "none.png")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_upscale_and_inpaint(open_page, tmp_path, size):
    page = open_page(size)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    given = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
    given.save(tmp_path / "given.png")
    page.get_by_role("tab", name="Upscale").click()
    page.locator('input[type="file"]').first.wait_for(state="attached")
    shown(page, page.get_by_role("button", name="Upscale", exact=True)).wait_for()
    page.locator('.tabitem:visible input[type="file"]').first.set_input_files(tmp_path / "given.png")
    page.locator(".tabitem:visible .image-frame img, .tabitem:visible img[src*='given']").first.wait_for()
    settings(page)
    press(page, "Upscale")
    wait_for(page, "Done in ")
    page.screenshot(path=tmp_path / "upscaled.png")
    picture = shown(page, page.locator(".im-grid figure > button img"))
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [42, 32]
    assert fits(page, picture)

    page.get_by_role("tab", name="Inpaint").click()
    shown(page, page.get_by_role("button", name="Inpaint", exact=True)).wait_for()
    page.locator('.editor input[type="file"]').first.set_input_files(tmp_path / "given.png")
    shown(page, page.locator(".editor").get_by_label("Brush Size")).wait_for()  # once there is a picture to paint on
    shown(page, page.get_by_label("Prompt", exact=True)).fill("a face")
    settings(page)
    page.locator(".editor").scroll_into_view_if_needed()
    box = page.locator(".editor canvas").last.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    for step in range(10):
        page.mouse.move(x - 30 + 6 * step, y + 2 * step)
    page.mouse.up()
    page.screenshot(path=tmp_path / "painted.png")
    press(page, "Inpaint")
    wait_for(page, "Done in ")
    page.screenshot(path=tmp_path / "inpainted.png")
    source = shown(page, page.locator(".im-grid figure > button img")).get_attribute("src")
    (tmp_path / "made.png").write_bytes(page.request.get(page.url + source).body())
    made = np.asarray(Image.open(tmp_path / "made.png").convert("RGB")).astype(int)
    assert made.shape == (32, 44, 3)  # steps of 4 px: of 2 px in the base stage
    rows = 64 * 32 / 44  # the middle of the picture, in these proportions
    small = given.resize((44, 32), Image.Resampling.BICUBIC, box=(0, 24 - rows / 2, 64, 24 + rows / 2))
    small = np.asarray(small).astype(int)
    difference = np.abs(made - small).max(axis=-1)
    # the corners are kept, as far as the editor's own scaling leaves them, and the middle is drawn anew
    assert np.median(difference[:6]) < 30 < np.median(difference[14:18, 18:26])
