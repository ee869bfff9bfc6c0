"""The page of `diffusers-imagen demo`: as a function, over gradio's HTTP interface, and in a real browser."""

import json
import math
import shutil
import socket
import threading

import httpx
import numpy as np
import pytest
import torch
from filter_parts import filter_parts, flag_above
from PIL import Image


gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'diffusers-imagen[demo]'")

from gradio.route_utils import delete_files_created_by_app  # noqa: E402

from diffusers_imagen.commands import demo, webdemo  # noqa: E402
from diffusers_imagen.commands import main as cli  # noqa: E402


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


def test_earlier_stages_are_filtered_too(cascade):
    arguments = {"num_inference_steps": [2, 1], "num_images_per_prompt": 2}
    plain = expected(cascade, **arguments)
    cascade.register_modules(**filter_parts())
    flag_above(cascade, plain[16], "p_head", 1)
    flag_above(cascade, plain[16], "w_head", 0)
    generator = torch.Generator().manual_seed(3)
    progress = list(webdemo.draw(cascade, "a red apple", generator=generator, **arguments))
    shown = [np.asarray(image) for image in progress[-2].stage_images[16]]
    assert list(progress[-2].stage_images) == [16]
    assert sorted(bool(image.any()) for image in shown) == [False, True]
    for image, other in zip(shown, plain[16]):
        assert not image.any() or np.array_equal(image, np.asarray(other))


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


def test_an_address_that_cannot_be_served_is_refused_before_a_model_loads(monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_pipeline", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in [
            (["--port", port], f"`port` is {port}, which cannot be served: Address already in use"),
            (["--port", "-1"], "`port` is -1, but should be from 0 to 65,535"),
            (["--port", "65536"], "`port` is 65536, but"),
            (["--host", "nowhere"], "`host` is 'nowhere', but should be an IPv4 address"),
            (["--host", "8.8.8.8"], "`host` is '8.8.8.8', which cannot be served"),
            (["--device", "banana"], "`device` is 'banana', which cannot be used"),
        ]:
            assert cli.main(["demo", *arguments]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
    assert 0 < demo.find_port("127.0.0.1", 0) < 65536


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


DRAWING = ["a red apple", "", 3, 1, 2, 4.0, 1, 1.0]
POST = "/gradio_api/call/draw"


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        yield client


def ask(client, data) -> str:
    """The last message of a drawing that was asked for without the page."""
    answer = client.post(POST, content=json.dumps({"data": data}), headers={"content-type": "application/json"})
    assert answer.status_code == 200
    return client.get(f"{POST}/{answer.json()['event_id']}").text.strip().split("\n\n")[-1]


def test_what_the_page_would_not_send_is_refused_and_nothing_runs(client, monkeypatch):
    monkeypatch.setattr(webdemo, "draw", None)
    for place, value, message in [
        (0, "x" * 1001, "has 1001 characters, but should have at most 1000"),
        (0, "\ud800", "is no text"),
        (0, None, "Say what to draw"),
        (1, "x" * 1001, "has 1001 characters"),
        (2, -1, "less than minimum value 0"),
        (2, 2**40, "greater than maximum"),
        (2, math.nan, '"error"'),
        (3, 100, "greater than maximum value 8"),
        (3, math.nan, "Images should be a number from 1 to 8"),
        (3, True, "Images should be a number"),
        (3, "many", '{"error": null}'),
        (4, 10**6, "greater than maximum value 50"),
        (4, None, '{"error": null}'),
        (5, 1e308, "greater than maximum value 10"),
        (5, math.nan, "Guidance should be a number"),
    ]:
        answer = ask(client, [*DRAWING[:place], value, *DRAWING[place + 1 :]])
        assert answer.startswith("event: error") and message in answer, (place, value, answer)
    assert ask(client, DRAWING[:3]).startswith("event: error")


@pytest.mark.parametrize(
    ("error", "shown"), [(FloatingPointError("not finite"), "not finite"), (RuntimeError("/home/me"), "the log of")]
)
def test_an_error_is_shown_without_what_is_inside(client, cascade, monkeypatch, error, shown):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(cascade.base_unet, "forward", fail)
    answer = ask(client, DRAWING)
    assert shown in answer and "/home/me" not in answer


def test_nothing_but_the_pages_own_requests_is_let_in(client, tmp_path):
    (tmp_path / "private").write_text("secret")
    for path in ("upload", "upload/", "component_server", "process_recording", "vibe-edit", "api/draw"):
        assert client.post(f"/gradio_api/{path}", files={"files": ("a.png", b"x" * 100)}).status_code == 403, path
    assert client.post("/login").status_code == 403
    assert client.get("/gradio_api/proxy=http://example.com").status_code == 403
    assert client.get(f"/gradio_api/file={tmp_path / 'private'}").status_code == 403
    assert client.post("/gradio_api/run/draw", json={"data": DRAWING}).status_code == 404  # past the queue
    assert client.put("/config").status_code == 403
    long = json.dumps({"data": ["x" * 5_000_000, *DRAWING[1:]]}).encode()
    headers = {"content-type": "application/json"}
    assert client.post(POST, content=long, headers=headers).status_code == 413
    parts = (long[i : i + 50_000] for i in range(0, len(long), 50_000))  # without a length
    assert client.post(POST, content=parts, headers=headers).status_code == 413


def test_few_wait_and_the_next_is_told_that_the_queue_is_full(client, monkeypatch):
    waiting = threading.Event()

    def draw(*args, **kwargs):
        waiting.wait(60)
        yield from ()

    monkeypatch.setattr(webdemo, "draw", draw)
    answers = [client.post(POST, json={"data": DRAWING}) for _ in range(2 * webdemo.MAX_WAITING)]
    waiting.set()
    codes = [answer.status_code for answer in answers]
    assert webdemo.MAX_WAITING <= codes.count(200) <= webdemo.MAX_WAITING + 2  # and the one that runs
    assert set(codes) == {200, 503} and "Queue is full" in answers[-1].json()["detail"]


def test_pictures_are_deleted(cascade, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = webdemo.build(cascade, "someone/tiny")
    run = webdemo.drawer(cascade, page.temp_file_sets[-1])
    shown = {
        path
        for galleries in run(*DRAWING)
        for gallery in galleries[1:]
        if isinstance(gallery, list)
        for path in gallery
    }
    pictures = list(tmp_path.glob("*/*.png"))
    assert len(pictures) == 2 and set(map(str, pictures)) == shown
    assert page.delete_cache == (60, webdemo.SECONDS_TO_LIVE)
    delete_files_created_by_app(page, webdemo.SECONDS_TO_LIVE)  # what gradio does once a minute
    assert list(tmp_path.glob("*/*.png")) == pictures
    delete_files_created_by_app(page, -1)
    assert list(tmp_path.glob("*/*.png")) == []


def test_the_sliders_reach_the_defaults_of_every_stage(cascade):
    own = {"base": {"num_inference_steps": 100, "guidance_scale": 12.0}, "sr256": {"num_inference_steps": 20}}
    cascade.register_to_config(call_defaults=own)
    blocks = webdemo.build(cascade, "someone/tiny").blocks.values()
    sliders = {block.label: block for block in blocks if isinstance(block, gr.Slider)}
    assert [(sliders[f"{name} steps"].value, sliders[f"{name} steps"].maximum) for name in ("16 px", "32 px")] == [
        (100, 100),
        (20, 50),
    ]
    assert (sliders["16 px guidance"].value, sliders["16 px guidance"].maximum) == (12, 12)
    request = webdemo.read_request(cascade.stages, "a", "", 0, 1, (100, 12.0, 50, 1.0))
    assert request["num_inference_steps"] == [100, 50] and request["guidance_scale"] == [12.0, 1.0]
    with pytest.raises(gr.Error, match="from 1 to 100"):
        webdemo.read_request(cascade.stages, "a", "", 0, 1, (101, 12.0, 50, 1.0))
    with pytest.raises(gr.Error, match="from 1 to 50"):
        webdemo.read_request(cascade.stages, "a", "", 0, 1, (100, 12.0, 100, 1.0))


def test_the_page_names_the_stages_and_suits_them(cascade, tmp_path):
    folder = tmp_path / "imagen-emoji"
    folder.mkdir()
    (folder / "README.md").write_text("# x\n\n## Limits\n\nDraws emoji.\n\n## More\n")
    line = webdemo.describe(cascade, ("someone/base", str(folder)))
    assert line.startswith("Model **someone/base + imagen-emoji**: Base 16 px") and line.endswith("Draws emoji.")
    cascade.register_to_config(origin={"sr256": {"base_model": "DeepFloyd/IF-II-M-v1.0", "license": "deepfloyd"}})
    notice = "DeepFloyd is licensed under the DeepFloyd License, Copyright (c) Stability AI Ltd. All Rights Reserved."
    assert webdemo.describe(cascade, ("someone/base",)).count(notice) == 1 and notice not in line
    assert webdemo.examples_for((str(folder),)) == webdemo.EMOJI_EXAMPLES
    assert webdemo.examples_for(("DeepFloyd/IF-I-M-v1.0", "someone/sr")) == webdemo.EXAMPLES


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
