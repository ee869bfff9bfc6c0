"""The page of `diffusers-imagen demo`: as a function, over gradio's HTTP interface, and in a real browser."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image


gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'diffusers-imagen[demo]'")

from diffusers_imagen import cli, webdemo  # noqa: E402


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def expected(cascade, **arguments):
    arguments = {"num_inference_steps": [2, 1], "generator": torch.Generator().manual_seed(3), **arguments}
    return cascade("a red apple", **arguments).stage_images


def assert_same(images, others) -> None:
    assert len(images) == len(others)
    for image, other in zip(images, others):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(other))


def test_each_stage_appears_with_the_first_call_of_the_next(cascade):
    arguments = {"num_inference_steps": [2, 1], "num_images_per_prompt": 2}
    generator = torch.Generator().manual_seed(3)
    progress = list(webdemo.draw(cascade, "a red apple", generator=generator, **arguments))
    # Heun: 2 N - 1 calls a stage; the last report has what the pipeline returned
    assert [step.calls for step in progress] == [1, 2, 3, 4, 4] and {step.total for step in progress} == {4}
    assert [list(step.stage_images) for step in progress] == [[], [], [], [16], [16, 32]]
    images = expected(cascade, num_images_per_prompt=2)
    for resolution in (16, 32):
        assert_same(progress[-1].stage_images[resolution], images[resolution])
    assert_same(progress[-2].stage_images[16], images[16])


def test_closing_the_iterator_stops_the_pipeline(cascade):
    calls = []
    cascade.sr256_unet.register_forward_pre_hook(lambda *args: calls.append(1))
    progress = webdemo.draw(cascade, "a red apple", num_inference_steps=[20, 20])
    assert next(progress).calls == 1
    progress.close()
    assert len(calls) == 0


def test_errors_of_the_pipeline_reach_the_caller(cascade):
    with pytest.raises(ValueError, match="`num_inference_steps` is 0"):
        list(webdemo.draw(cascade, "a red apple", num_inference_steps=0))


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'diffusers-imagen[demo]'" in capsys.readouterr().err


@pytest.fixture
def url(cascade, monkeypatch):
    """The page, served."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    # gradio asks its own page whether it is there, and on a busy machine it does not wait long enough
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: True)
    page = webdemo.build(cascade, "someone/tiny")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **webdemo.LOOK)
    yield url
    page.close()


def test_over_http(cascade, url):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False, httpx_kwargs={"timeout": 120})
    job = client.submit("a red apple", "", 3, 2, 2, 4.0, 1, 1.0, api_name="/draw")
    status, base, upscaled = job.result(timeout=120)
    assert status == "Done. Network call 4 of 4, seed 3."
    images = expected(cascade, num_images_per_prompt=2)
    for gallery, resolution in ((base, 16), (upscaled, 32)):
        assert_same([Image.open(entry["image"]) for entry in gallery], images[resolution])
    with pytest.raises(AppError, match="Say what to draw"):
        client.predict(" ", "", 3, 1, 2, 4.0, 1, 1.0, api_name="/draw")


def test_in_a_browser(cascade, url, tmp_path):
    """Writes a prompt, presses the button, and sees the images of both stages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url, timeout=120_000)
        page.get_by_label("Prompt", exact=True).fill("a red apple")
        page.get_by_label("Seed", exact=True).fill("3")
        for label, value in (("Images", 1), ("16 px steps", 2), ("32 px steps", 1)):
            page.get_by_label(f"number input for {label}", exact=True).fill(str(value))
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text("Done. Network call 4 of 4, seed 3.").wait_for(timeout=120_000)
        sources = [element.get_attribute("src") for element in page.locator(".grid-wrap img").all()]
        shown = []
        for i, source in enumerate(sources):
            (tmp_path / f"{i}.png").write_bytes(page.request.get(source).body())
            shown.append(Image.open(tmp_path / f"{i}.png"))
        browser.close()
    images = expected(cascade)
    assert_same(shown, [*images[16], *images[32]])
    assert all(request.startswith((url.rstrip("/"), "data:", "blob:")) for request in requests), requests
