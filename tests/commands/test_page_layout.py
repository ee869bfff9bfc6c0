"""What the page of `diffusers-imagen demo` shows for each kind of model, and its HTML."""

import json
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image


gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'diffusers-imagen[demo]'")

from deepfloyd_repository import stage_1, stage_2  # noqa: E402

from diffusers_imagen import (  # noqa: E402
    EDMHeunScheduler,
    EfficientUNetModel,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
)
from diffusers_imagen.commands import main as cli  # noqa: E402
from diffusers_imagen.commands import webdemo  # noqa: E402
from diffusers_imagen.commands.webdemo import page_html, page_layout, page_requests  # noqa: E402
from diffusers_imagen.commands.webdemo.page_drawer import Drawer, Shared  # noqa: E402
from diffusers_imagen.commands.webdemo.page_tasks import tasks_of  # noqa: E402


SOURCES = {"model": "someone/tiny"}


@pytest.fixture
def upscaler(cascade) -> ImagenSuperResolutionPipeline:
    return ImagenSuperResolutionPipeline(
        cascade.sr256_unet, cascade.sr256_scheduler, cascade.tokenizer, cascade.text_encoder, scale_factor=2
    )


@pytest.fixture
def base(cascade) -> ImagenPipeline:
    return ImagenPipeline(cascade.base_unet, cascade.base_scheduler, cascade.tokenizer, cascade.text_encoder)


def tabs(pipe) -> list[str]:
    page = webdemo.build(pipe, SOURCES)
    shown = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert shown == [task.title for task in tasks_of(pipe)]
    # no component has a button that shares, nor shares by default
    for block in page.blocks.values():
        buttons = getattr(block, "buttons", [])
        assert "share" not in (buttons or []) and not (
            isinstance(block, (gr.Image, gr.ImageEditor)) and buttons is None
        )
    return shown


def values_of(task, pipe, **changes) -> tuple[dict, Drawer]:
    """What the page sends of a task as it stands but for `changes`, and what draws it."""
    drawer = Drawer(pipe, task, SOURCES, Shared(threading.Lock(), set()))
    with gr.Blocks():
        page_layout.add_tab(drawer, ["a face"], None)
    values = {"prompt": "a face", "seed": 1, "random_seed": False, "images": 1, "negative_prompt": "", "strength": 1}
    for stage in task.stages:
        values |= {f"{stage.name}_steps": 1, f"{stage.name}_guidance": 1}
    values |= changes
    return {name: values.get(name) for name in drawer.names}, drawer


@pytest.fixture
def picture(tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    return {"path": str(tmp_path / "given.png")}


def final(drawer, values) -> tuple[str, str, int, list[str]]:
    """What the page shows at the end of a drawing."""
    *_, last = drawer.run(*values.values())
    return last


def test_a_cascade_has_all_tabs(cascade):
    assert tabs(cascade) == ["Draw", "Upscale", "Inpaint"]


def test_a_base_stage_draws_and_paints_anew(base, cascade, picture):
    assert tabs(base) == ["Draw", "Inpaint"]
    alone = ImagenCascadePipeline.from_stages(base)  # as the command loads it
    assert tabs(alone) == ["Draw", "Inpaint"]
    for pipe in (base, alone):
        values, drawer = values_of(tasks_of(pipe)[0], pipe)
        status, view, seed, files = final(drawer, values)
        assert "Done in" in status and seed == 1 and view.count("<figure") == 1
        image = pipe(
            "a face", num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(1)
        ).images[0]
        np.testing.assert_array_equal(np.asarray(Image.open(files[0])), np.asarray(image))


def test_a_super_resolution_stage_enlarges(upscaler, picture):
    assert tabs(upscaler) == ["Upscale"]
    (task,) = tasks_of(upscaler)
    assert (task.low_resolution, task.resolution) == (16, 32)
    values, drawer = values_of(task, upscaler, picture=picture, prompt="")
    *_, files = final(drawer, values)
    image = upscaler(
        "",
        image=Image.open(picture["path"]),
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), np.asarray(image))


def test_a_stage_without_text_asks_for_none(picture):
    torch.manual_seed(0)
    unet = EfficientUNetModel(
        sample_size=32,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_types=(None, None),
        encoder_hid_dim=None,
        norm_num_groups=4,
    )
    pipe = ImagenSuperResolutionPipeline(unet, EDMHeunScheduler(clip_sample=True), scale_factor=2)
    pipe.set_progress_bar_config(disable=True)
    assert tabs(pipe) == ["Upscale"]
    values, drawer = values_of(tasks_of(pipe)[0], pipe, picture=picture)
    assert "prompt" not in values and "negative_prompt" not in values
    *_, files = final(drawer, values)
    assert files[0].endswith("/upscale-seed1.png")
    assert json.loads(Image.open(files[0]).text["diffusers-imagen"])["prompt"] == ""


def test_stages_of_deepfloyd_if(picture):
    pipe = ImagenCascadePipeline.from_stages(stage_1(), stage_2())
    pipe.set_progress_bar_config(disable=True)
    assert tabs(pipe) == ["Draw", "Upscale", "Inpaint"]
    draws, enlarges, _ = tasks_of(pipe)
    values, drawer = values_of(draws, pipe, base_steps=2, sr256_steps=2)
    reports = list(drawer.run(*values.values()))
    assert "data:image" not in "".join(view for _, view, *_ in reports if isinstance(view, str))  # unfiltered previews
    assert Image.open(reports[-1][-1][0]).size == (32, 32)
    values, drawer = values_of(enlarges, pipe, picture=picture, sr256_steps=2)
    assert Image.open(final(drawer, values)[-1][0]).size == (32, 32)
    alone = ImagenSuperResolutionPipeline.from_stage(stage_2())
    assert tabs(alone) == ["Upscale"]


def test_a_model_whose_text_nothing_encodes_is_refused(cascade):
    pipe = ImagenCascadePipeline(base_unet=cascade.base_unet, base_scheduler=cascade.base_scheduler)
    with pytest.raises(ValueError, match="no text encoder, which its networks need: pass --text-encoder"):
        webdemo.build(pipe, SOURCES)


def test_the_command_takes_an_upscaler_alone(upscaler, tmp_path, monkeypatch):
    upscaler.save_pretrained(tmp_path / "sr")
    served = []
    monkeypatch.setattr("gradio.Blocks.launch", lambda page, **options: (None, "http://x", None))
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda page: served.append(page))
    monkeypatch.setattr("signal.signal", lambda *args: None)
    assert cli.main(["demo", "--sr256", str(tmp_path / "sr"), "--port", "0"]) == 0
    assert [block.label for block in served[0].blocks.values() if isinstance(block, gr.Tab)] == ["Upscale"]


@pytest.mark.parametrize(
    ("size", "result"),
    [
        ((500, 500), (32, 32)),
        ((7, 7), (32, 32)),
        ((300, 200), (48, 32)),
        ((200, 300), (32, 48)),
        ((100, 99), (32, 32)),
        ((1000, 10), (64, 32)),  # at most twice as long as short
        ((1, 4000), (32, 64)),
    ],
)
def test_proportions_are_kept_to_a_step_of_the_networks(cascade, size, result):
    for task in tasks_of(cascade)[1:]:
        assert task.size_for(*size) == result
        mask = Image.new("L", size, 255) if task.takes_mask else None
        arguments = page_requests.fitted(task, Image.new("RGB", size), mask)
        assert (arguments["width"], arguments["height"]) == result
        width, height = arguments["image"].size
        assert abs(width * result[1] - height * result[0]) <= max(width, height) * max(result) / 2
        assert width == size[0] or height == size[1]  # no more is cut off than has to be
        assert mask is None or arguments["mask_image"].size == arguments["image"].size


def test_a_mask_that_is_cropped_away_is_refused(cascade):
    mask = Image.new("L", (1000, 10), 0)
    mask.paste(255, (0, 0, 50, 10))
    with pytest.raises(gr.Error, match="outside the center"):
        page_requests.fitted(tasks_of(cascade)[2], Image.new("RGB", (1000, 10)), mask)


def test_the_sliders_reach_the_defaults_of_every_stage(cascade):
    own = {"base": {"num_inference_steps": 100, "guidance_scale": 12.0}, "sr256": {"num_inference_steps": 20}}
    cascade.register_to_config(call_defaults=own)
    task = tasks_of(cascade)[0]
    blocks = webdemo.build(cascade, SOURCES).blocks.values()
    sliders = {}
    for block in blocks:
        if isinstance(block, gr.Slider):
            sliders.setdefault(block.label, block)
    assert [(sliders[f"{name} steps"].value, sliders[f"{name} steps"].maximum) for name in ("16 px", "32 px")] == [
        (100, 100),
        (20, 50),
    ]
    assert (sliders["16 px guidance"].value, sliders["16 px guidance"].maximum) == (12, 12)
    values, _ = values_of(task, cascade, base_steps=100, base_guidance=12.0, sr256_steps=50)
    request = page_requests.read_request(task, values).arguments
    assert request["num_inference_steps"] == [100, 50] and request["guidance_scale"] == [12.0, 1.0]
    for change, message in [({"base_steps": 101}, "from 1 to 100"), ({"sr256_steps": 100}, "from 1 to 50")]:
        with pytest.raises(gr.Error, match=message):
            page_requests.read_request(task, {**values, **change})


def test_a_seed_that_was_not_asked_for_is_any(cascade):
    values, _ = values_of(tasks_of(cascade)[0], cascade, seed=5, random_seed=True)
    seeds = {page_requests.choose_seed(5, True) for _ in range(4)}
    assert len(seeds) == 4 and all(0 <= seed <= page_requests.MAX_SEED for seed in seeds)
    assert [page_requests.choose_seed(seed, False) for seed in (5, 5.0, None)] == [5, 5, 0]


def test_the_page_names_the_stages_and_suits_them(cascade, tmp_path):
    folder = tmp_path / "imagen-emoji"
    folder.mkdir()
    (folder / "README.md").write_text("# x\n\n## Limits\n\nDraws emoji.\n\n## More\n")
    sources = {"model": "someone/base", "sr256": str(folder)}
    line = page_layout.describe(cascade, sources)
    assert line.startswith("Model **someone/base + imagen-emoji**: Base 16 px") and line.endswith("Draws emoji.")
    assert page_layout.headline(cascade, sources) == "someone/base + imagen-emoji, to 32 px"
    cascade.register_to_config(origin={"sr256": {"base_model": "DeepFloyd/IF-II-M-v1.0", "license": "deepfloyd"}})
    notice = "DeepFloyd is licensed under the DeepFloyd License, Copyright (c) Stability AI Ltd. All Rights Reserved."
    assert page_layout.describe(cascade, SOURCES).count(notice) == 1 and notice not in line
    assert page_layout.examples_for([str(folder)]) == page_layout.EMOJI_EXAMPLES
    assert page_layout.examples_for(["DeepFloyd/IF-I-M-v1.0", "someone/sr"]) == page_layout.EXAMPLES


# ---- HTML


def test_texts_of_visitors_are_no_html(cascade, picture):
    values, drawer = values_of(tasks_of(cascade)[0], cascade, prompt='a "face" <script>alert(1)</script> ../..\\x')
    status, view, _, files = final(drawer, values)
    assert "<script" not in view and "&lt;script&gt;" in view
    assert re.fullmatch(r"a-face-script-alert-1-script-x-seed1\.png", files[0].rpartition("/")[2])
    assert "<b>" not in page_html.status("<b>")


def test_pictures_and_what_enlarges_and_saves_them():
    stages = [
        page_html.Shown("Base", (64, 64), ["/tmp/b c.png"]),
        page_html.Shown("Large", (256, 128), ["/tmp/é.png"]),
    ]
    view = page_html.pictures(stages, "a face")
    buttons = re.findall(r'<button type="button" popovertarget="([^"]+)" title="Enlarge">', view)
    assert len(set(buttons)) == 2 and all(f'<div popover class="im-zoom" id="{name}">' in view for name in buttons)
    assert view.count('href="gradio_api/file=/tmp/b%20c.png" download="b c.png"') == 1  # the small one, when enlarged
    assert view.count('href="gradio_api/file=/tmp/%C3%A9.png" download="é.png"') == 2
    assert "--ratio:2.0000" in view and "256 x 128 px" in view
    assert view.index("%C3%A9") < view.index("b%20c")  # the last stage comes first


@pytest.mark.parametrize("count", range(1, 9))
def test_a_grid_has_room_for_all_and_is_no_larger(count):
    columns, rows = map(int, re.search(r"--columns:(\d+);--rows:(\d+)", page_html.grid(count, "")).groups())
    assert columns * rows - columns < count <= columns * rows
    assert columns in (rows, rows + 1) or (columns, rows) == (4, 2)


def test_a_preview_is_within_the_page():
    pixels = np.full((2, 16, 32, 3), 200, dtype=np.uint8)
    view = page_html.pictures([page_html.Shown("Base", (8, 8), ["/tmp/a.png"])], "a face", pixels)
    assert view.count('src="data:image/jpeg;base64,') == 2 and "--ratio:2.0000" in view
    assert "im-row" in view and "--columns:2;--rows:1" in view
    assert 'aria-valuenow="3"' in page_html.status("x", 3, 12) and "width:25.0%" in page_html.status("x", 3, 12)
