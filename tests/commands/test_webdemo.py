"""The page of `diffusers-imagen demo`: its drawings, and what it serves over HTTP."""

import json
import math
import os
import socket
import threading
from pathlib import Path

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
from diffusers_imagen.commands.webdemo import live_drawing, page_drawer, page_guard, page_layout  # noqa: E402


SOURCES = {"model": "someone/tiny"}


def expected(cascade, prompt="a red apple", **arguments):
    arguments = {"num_inference_steps": [2, 1], "generator": torch.Generator().manual_seed(3), **arguments}
    return cascade(prompt, **arguments).stage_images


def assert_same(images, others) -> None:
    assert len(images) == len(others)
    for image, other in zip(images, others):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(other))


def draw(cascade, **arguments):
    arguments = {"num_inference_steps": [2, 1], "generator": torch.Generator().manual_seed(3), **arguments}
    turn = arguments.pop("turn", None) or threading.Lock()
    return live_drawing.draw(cascade, cascade.stages, turn, prompt="a red apple", **arguments)


# ---- drawings


def test_each_stage_appears_with_the_first_call_of_the_next(cascade):
    progress = list(draw(cascade, num_images_per_prompt=2))
    # Heun: 2 N - 1 calls a stage; the last report has what the pipeline returned
    assert [step.calls for step in progress] == [1, 2, 3, 4, 4] and {step.total for step in progress} == {4}
    assert [step.stage and step.stage.name for step in progress] == ["base"] * 3 + ["sr256", None]
    assert [list(step.stage_images) for step in progress] == [[], [], [], [16], [16, 32]]
    images = expected(cascade, num_images_per_prompt=2)
    for resolution in (16, 32):
        assert_same(progress[-1].stage_images[resolution], images[resolution])
    assert_same(progress[-2].stage_images[16], images[16])


def test_stages_of_wide_pictures_go_by_their_resolution(cascade):
    progress = list(draw(cascade, height=32, width=64))
    assert [list(step.stage_images) for step in progress] == [[], [], [], [16], [16, 32]]
    assert [image.size for images in progress[-1].stage_images.values() for image in images] == [(32, 16), (64, 32)]


def test_previews_are_the_predicted_images(cascade, monkeypatch):
    monkeypatch.setattr(live_drawing, "PREVIEW_SECONDS", 0)
    *steps, last = draw(cascade, num_images_per_prompt=2)
    assert last.preview is None and [step.preview.shape for step in steps] == [(2, 16, 16, 3)] * 3 + [(2, 32, 32, 3)]
    # the last call of a stage predicts what the stage ends with
    for step, resolution in ((steps[2], 16), (steps[3], 32)):
        assert step.preview.dtype == np.uint8
        assert_same(step.preview, last.stage_images[resolution])
    monkeypatch.setattr(live_drawing, "PREVIEW_PIXELS", 16)
    assert [step.preview.shape for step in list(draw(cascade))[:-1]] == [(1, 16, 16, 3)] * 4


def test_previews_are_few(cascade, monkeypatch):
    monkeypatch.setattr(live_drawing, "PREVIEW_SECONDS", 1000)
    drawing = live_drawing.Drawing(cascade, cascade.stages)
    assert drawing.preview_of(torch.zeros(1, 3, 16, 16)) is not None
    assert drawing.preview_of(torch.zeros(1, 3, 16, 16)) is None
    assert live_drawing.Drawing(cascade, cascade.stages).preview_of(None) is None


def test_earlier_stages_are_filtered_too_and_nothing_passes_by_the_filter(cascade, monkeypatch):
    monkeypatch.setattr(live_drawing, "PREVIEW_SECONDS", 0)
    plain = expected(cascade, num_images_per_prompt=2)
    cascade.register_modules(**filter_parts())
    flag_above(cascade, plain[16], "p_head", 1)
    flag_above(cascade, plain[16], "w_head", 0)
    progress = list(draw(cascade, num_images_per_prompt=2))
    shown = [np.asarray(image) for image in progress[-2].stage_images[16]]
    assert list(progress[-2].stage_images) == [16]
    assert sorted(bool(image.any()) for image in shown) == [False, True]
    for image, other in zip(shown, plain[16]):
        assert not image.any() or np.array_equal(image, np.asarray(other))
    assert all(step.preview is None for step in progress)
    for only in ("safety_checker", "watermarker"):
        other = {"safety_checker": "watermarker", "watermarker": "safety_checker"}[only]
        cascade.register_modules(**filter_parts(**{other: None}))
        assert all(step.preview is None for step in draw(cascade))


def test_closing_the_iterator_stops_the_pipeline(cascade):
    calls = []
    cascade.sr256_unet.register_forward_pre_hook(lambda *args: calls.append(1))
    progress = draw(cascade, num_inference_steps=[20, 20])
    assert next(progress).calls == 1
    progress.close()
    assert len(calls) == 0


def test_a_drawing_that_is_stopped_does_not_stop_the_next(cascade):
    turn, holds, goes_on = threading.Lock(), threading.Event(), threading.Event()

    def hold(*args):
        if not holds.is_set():
            holds.set()
            goes_on.wait(60)

    cascade.base_unet.register_forward_pre_hook(hold)
    first = draw(cascade, turn=turn, num_inference_steps=[20, 20])
    thread = threading.Thread(target=list, args=(first,))
    thread.start()
    assert holds.wait(60)  # the first is within a step
    second, made = draw(cascade, turn=turn), []
    other = threading.Thread(target=lambda: made.extend(second))
    other.start()
    other.join(0.2)
    assert made == []  # it waits for its turn
    goes_on.set()
    other.join(60)
    thread.join(60)
    assert_same(made[-1].stage_images[32], expected(cascade)[32])


def test_a_drawing_that_is_stopped_before_its_turn_never_runs(cascade):
    calls, turn = [], threading.Lock()
    cascade.base_unet.register_forward_pre_hook(lambda *args: calls.append(1))
    drawing = live_drawing.Drawing(cascade, cascade.stages)
    drawing.stopped.set()
    drawing.run(turn, {"prompt": "a red apple"})
    assert drawing.events.get() is None and not calls and not turn.locked()


def test_errors_of_the_pipeline_reach_the_caller(cascade):
    with pytest.raises(ValueError, match="`num_inference_steps` is 0"):
        list(draw(cascade, num_inference_steps=0))


# ---- the command


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


# ---- over HTTP


@pytest.fixture
def page(cascade, monkeypatch, tmp_path):
    """The page, served: gradio's blocks."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "held"))
    # gradio asks its own page whether it is there, and on a busy machine it does not wait long enough
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: True)
    page = webdemo.build(cascade, SOURCES)
    page.launch(prevent_thread_lock=True, quiet=True, **webdemo.LOOK)
    yield page
    page.close()


@pytest.fixture
def client(page):
    with httpx.Client(base_url=page.local_url, timeout=120, trust_env=False) as client:
        yield client


# prompt, seed, random, images, negative prompt, steps and guidance of both stages
DRAWING = ["a red apple", 3, False, 1, "", 2, 4.0, 1, 1.0]


def ask(client, data, name="generate") -> str:
    """The last message of a drawing that was asked for without the page."""
    headers = {"content-type": "application/json"}
    post = f"/gradio_api/call/{name}"
    answer = client.post(post, content=json.dumps({"data": data}), headers=headers)
    assert answer.status_code == 200, answer.text
    return client.get(f"{post}/{answer.json()['event_id']}").text.strip().split("\n\n")[-1]


def result_of(client, data, name="generate") -> list:
    """Status, pictures, seed and files of a drawing."""
    answer = ask(client, data, name)
    assert answer.startswith("event: complete\ndata: "), answer
    return json.loads(answer.split("data: ", 1)[1])


def pictures_of(client, files) -> list[Image.Image]:
    pictures = []
    for file in files:
        answer = client.get(f"/gradio_api/file={file['path']}")
        assert answer.status_code == 200
        Path("got.png").write_bytes(answer.content)
        pictures.append(Image.open("got.png"))
        pictures[-1].load()
    return pictures


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_drawing(cascade, client):
    status, view, seed, files = result_of(client, [*DRAWING[:3], 2, *DRAWING[4:]])
    assert "Done in " in status and "seed 3." in status and seed == 3
    assert [file["orig_name"] for file in files] == ["a-red-apple-seed3-0.png", "a-red-apple-seed3-1.png"]
    pictures = pictures_of(client, files)
    images = expected(cascade, num_images_per_prompt=2)
    assert_same(pictures, images[32])
    settings = json.loads(pictures[1].text["diffusers-imagen"])
    assert settings["model"] == {"model": "someone/tiny"} and settings["num_inference_steps"] == {
        "base": 2,
        "sr256": 1,
    }
    assert (settings["prompt"], settings["seed"], settings["image"]) == ("a red apple", 3, 1)
    # the pictures of both stages are on the page, and are saved by their names
    assert [f'download="a-red-apple-seed3-{i}.png"' in view for i in (0, 1)] == [True, True]
    small = "a-red-apple-seed3-1-16px.png"
    assert f'download="{small}"' in view
    path = next(part for part in view.split('"') if part.endswith(small))
    (picture,) = pictures_of(client, [{"path": path.removeprefix("gradio_api/file=")}])
    assert_same([picture], [images[16][1]])
    assert json.loads(picture.text["diffusers-imagen"])["num_inference_steps"] == {"base": 2}


def test_seeds_are_random_unless_one_is_kept(cascade, client):
    data = [DRAWING[0], 3, True, *DRAWING[3:]]
    seeds = []
    for _ in range(2):
        status, _, seed, files = result_of(client, data)
        assert f"seed {seed}." in status and f"-seed{seed}.png" in files[0]["orig_name"]
        seeds.append(seed)
    assert len({3, *seeds}) == 3
    images = expected(cascade, generator=torch.Generator().manual_seed(seeds[-1]))
    assert_same(pictures_of(client, files), images[32])


def upload(client, image, name="picture.png", **options) -> dict:
    image.save(name, **options)
    return upload_bytes(client, Path(name).read_bytes(), name)


def upload_bytes(client, data, name="picture.png") -> dict:
    answer = client.post("/gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def noise(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_is_enlarged(cascade, client):
    picture = noise(60, 40)
    data = [upload(client, picture), "a face", 5, False, 1, "", 2, 1.0]
    _, view, _, files = result_of(client, data, "upscale")
    assert [file["orig_name"] for file in files] == ["a-face-seed5.png"] and "16px" not in view
    generator = torch.Generator().manual_seed(5)
    image = cascade("a face", image=picture, height=32, width=48, num_inference_steps=2, generator=generator).images[0]
    assert image.size == (48, 32)
    assert_same(pictures_of(client, files), [image])
    settings = json.loads(pictures_of(client, files)[0].text["diffusers-imagen"])
    assert settings["task"] == "upscale" and (settings["height"], settings["width"]) == (32, 48)


def test_the_painted_part_of_a_picture_is_drawn_anew(cascade, client):
    # as the editor sends it: on a canvas that is transparent beside the picture, with strokes in a layer
    picture, canvas = noise(64, 64), Image.new("RGBA", (96, 64))
    canvas.paste(picture, (16, 0))
    layer = Image.new("RGBA", canvas.size)
    layer.paste((255, 128, 0, 255), (0, 0, 60, 32))
    value = {"background": upload(client, canvas), "layers": [upload(client, layer)], "composite": None}
    data = [value, "a face", 5, False, 1, "", 1, 2, 4.0, 1, 1.0]
    _, _, _, files = result_of(client, data, "inpaint")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 44, 32))
    arguments = {"num_inference_steps": [2, 1], "generator": torch.Generator().manual_seed(5), "strength": 1.0}
    image = cascade("a face", image=picture, mask_image=mask, **arguments).images[0]
    (made,) = pictures_of(client, files)
    assert_same([made], [image])
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(np.asarray(made).astype(int) - small)
    assert difference[17:].max() <= 3 < difference[:15, :20].max()
    assert json.loads(made.text["diffusers-imagen"])["strength"] == 1.0

    for changes, message in [
        ({"layers": []}, "Paint over the part"),
        ({"layers": [upload(client, Image.new("RGBA", canvas.size))]}, "Paint over the part"),
        ({"layers": [upload(client, layer.resize((8, 8)))]}, "cannot be read"),
        ({"background": None}, "Upload an image first"),
        ({"background": upload(client, Image.new("RGBA", canvas.size))}, "Paint over the part"),
    ]:
        answer = ask(client, [{**value, **changes}, *data[1:]], "inpaint")
        assert answer.startswith("event: error") and message in answer, (changes, answer)


def test_what_the_page_would_not_send_is_refused_and_nothing_runs(client, monkeypatch):
    monkeypatch.setattr(page_drawer, "draw", None)
    for place, value, message in [
        (0, "x" * 1001, "has 1001 characters, but should have at most 1000"),
        (0, "\ud800", "The prompt is not valid Unicode"),
        (0, 5, "The prompt is not a text"),
        (0, None, "Enter a prompt"),
        (0, " ", "Enter a prompt"),
        (1, -1, "Seed should be a number from 0 to"),
        (1, 2**40, "Seed should be a number from 0 to"),
        (1, math.nan, "error"),
        (1, "<img src=x>", "Seed should be a number from 0 to"),
        (3, 100, "Images should be a number from 1 to 8"),
        (3, math.nan, "Images should be a number from 1 to 8"),
        (3, True, "Images should be a number"),
        (3, "many", "Images should be a number"),
        (4, "x" * 1001, "has 1001 characters"),
        (5, 10**6, "Steps should be a number from 1 to 50"),
        (5, None, "Steps should be a number from 1 to 50"),
        (6, 1e308, "Guidance should be a number from 1 to 10"),
        (6, math.nan, "Guidance should be a number"),
    ]:
        answer = ask(client, [*DRAWING[:place], value, *DRAWING[place + 1 :]])
        assert answer.startswith("event: error") and message in answer, (place, value, answer)
    assert ask(client, DRAWING[:3]).startswith("event: error")
    for value in (None, [], "picture.png", {"path": None}):
        answer = ask(client, [value, "a face", 5, False, 1, "", 2, 1.0], "upscale")
        assert answer.startswith("event: error"), answer


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (FloatingPointError("not <b>finite</b>"), "not &lt;b&gt;finite&lt;/b&gt;"),
        (RuntimeError("/home/me"), "the log of"),
    ],
)
def test_an_error_is_one_line_without_what_is_inside(client, cascade, monkeypatch, error, shown):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(cascade.base_unet, "forward", fail)
    answer = ask(client, DRAWING)
    assert shown in answer and "/home/me" not in answer and "Traceback" not in answer


def test_nothing_but_the_pages_own_requests_is_let_in(client, tmp_path):
    (tmp_path / "private").write_text("secret")
    for path in ("component_server", "component_server/", "process_recording", "vibe-edit", "api/draw", "upload/x"):
        assert client.post(f"/gradio_api/{path}", files={"files": ("a.png", b"x" * 100)}).status_code == 403, path
    assert client.post("/login").status_code == 403
    assert client.get("/gradio_api/proxy=http://example.com").status_code == 403
    assert client.get(f"/gradio_api/file={tmp_path / 'private'}").status_code == 403
    assert client.post("/gradio_api/run/generate", json={"data": DRAWING}).status_code == 404  # past the queue
    assert client.put("/config").status_code == 403
    post, headers = "/gradio_api/call/generate", {"content-type": "application/json"}
    long = json.dumps({"data": ["x" * 5_000_000, *DRAWING[1:]]}).encode()
    assert client.post(post, content=long, headers=headers).status_code == 413
    parts = (long[i : i + 50_000] for i in range(0, len(long), 50_000))  # without a length
    assert client.post(post, content=parts, headers=headers).status_code == 413


def test_files_of_the_machine_and_of_others_are_not_taken_for_pictures(client, tmp_path):
    noise(8, 8).save(tmp_path / "mine.png")
    meta = {"meta": {"_type": "gradio.FileData"}}
    answer = ask(client, [{"path": str(tmp_path / "mine.png"), **meta}, "", 5, False, 1, "", 2, 1.0], "upscale")
    assert answer.startswith("event: error")
    data = [{"path": "http://example.com/a.png", **meta}, "", 5, False, 1, "", 2, 1.0]
    answer = client.post("/gradio_api/call/upscale", json={"data": data})
    assert answer.status_code == 403 and "does not download files" in answer.text


def test_only_pictures_of_a_bounded_size_are_taken(client, page, monkeypatch):
    def send(data, **options):
        answer = client.post("/gradio_api/upload", files={"files": ("a.png", data)}, **options)
        return answer.status_code, answer.text

    assert send(b"#!/bin/sh\n") == (415, "The file cannot be used as an image: " + send(b"#!")[1].split(": ", 1)[1])
    assert send(b"<svg xmlns='http://www.w3.org/2000/svg'/>")[0] == 415
    assert send(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")[0] == 415  # which Pillow gives to Ghostscript
    assert send(b"x" * (page_guard.MAX_PICTURE_BYTES + 1)) == (413, "The request has more than 16 MiB.")
    Image.new("1", (10_000, 10_000)).save("large.png")
    assert send(Path("large.png").read_bytes()) == (
        413,
        "The image has 100 megapixels, but should have at most 64.",
    )
    noise(8, 8).save("a.png")
    data = Path("a.png").read_bytes()
    files = [("files", ("a.png", data)), ("files", ("b.sh", b"#!/bin/sh"))]
    assert client.post("/gradio_api/upload", files=files).status_code == 415
    assert client.post("/gradio_api/upload", content=b"x", headers={"content-type": "text/plain"}).status_code >= 400
    assert send(data)[0] == 200
    held = page_guard.size_of_folder(os.environ["GRADIO_TEMP_DIR"])
    assert held >= len(data)
    monkeypatch.setattr(page_guard, "MAX_FOLDER_BYTES", held - 1)
    code, text = send(data)
    assert code == 503 and "try again in a few minutes" in text
    assert page_guard.size_of_folder("nowhere") == 0


def test_few_wait_and_the_next_is_told_that_the_queue_is_full(client, monkeypatch):
    waiting = threading.Event()

    def draw(*args, **kwargs):
        waiting.wait(60)
        yield from ()

    monkeypatch.setattr(page_drawer, "draw", draw)
    post = "/gradio_api/call/generate"
    answers = [client.post(post, json={"data": DRAWING}) for _ in range(2 * page_guard.MAX_WAITING)]
    waiting.set()
    codes = [answer.status_code for answer in answers]
    assert page_guard.MAX_WAITING <= codes.count(200) <= page_guard.MAX_WAITING + 2  # and the one that runs
    assert set(codes) == {200, 429}
    assert answers[-1].json()["detail"] == "16 requests are waiting, which is the limit of this page: try again later."


def test_one_drawing_runs_at_a_time_whatever_the_tab(page):
    drawings = [fn for fn in page.fns.values() if fn.api_name in ("generate", "upscale", "inpaint")]
    assert len(drawings) == 3
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in drawings} == {("pipeline", 1)}


def test_pictures_are_deleted(client, page):
    data = [upload(client, noise(8, 8)), "a face", 5, False, 1, "", 2, 1.0]
    result_of(client, data, "upscale")
    result_of(client, DRAWING)

    def pictures():
        return list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.png"))

    kept = pictures()
    assert len(kept) >= 4  # one that was given, one enlarged, and two of a drawing
    assert page.delete_cache == (60, page_layout.SECONDS_TO_LIVE)
    delete_files_created_by_app(page, page_layout.SECONDS_TO_LIVE)  # what gradio does once a minute
    assert pictures() == kept
    delete_files_created_by_app(page, -1)
    assert pictures() == []
    answer = ask(client, data, "upscale")
    assert answer.startswith("event: error")
    with pytest.raises(gr.Error, match="generate one first"):
        page_layout.taken([{"path": str(kept[0])}])
    for files in (None, [], [{}], "x"):
        with pytest.raises(gr.Error, match="generate one first"):
            page_layout.taken(files)
