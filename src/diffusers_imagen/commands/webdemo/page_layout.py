"""Layout of the page: a tab for each task of the model, with its fields and the actions of its buttons."""

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from diffusers import DiffusionPipeline

from ...pipelines.origin import licenses_of
from ...pipelines.stages import Stage
from ...utils.shipped import NAME
from ..picture_settings import source_name
from . import page_html
from .page_drawer import Drawer, Shared
from .page_guard import MAX_WAITING
from .page_requests import MAX_IMAGES, MAX_PROMPT_LENGTH, MAX_SEED, MIN_STRENGTH, refusal
from .page_tasks import Task, limits_of, stage_title, tasks_of


# examples for the shipped cascade, and for models that were trained on general images
EMOJI_EXAMPLES = [
    "a 3d render of a tiger face",
    "a noto emoji of a red apple",
    "a 3d render of a grinning face",
    "a 3d render of a green heart",
    "a flat illustration of a blue fish",
]
EXAMPLES = [
    "a photo of a red fox in the snow",
    "a watercolor of a lighthouse at dusk",
    "a glass teapot on a wooden table, soft light",
    "an oil painting of a sailing ship in a storm",
    'a wooden sign that says "hello"',
]
# for phones, where an input image may have moved the result out of view
INTO_VIEW = (
    "document.querySelectorAll('.shown').forEach(shown => { if (shown.offsetParent && innerWidth <= 768)"
    " shown.scrollIntoView({block: 'nearest'}) });"
)
SECONDS_TO_LIVE = 1800  # lifetime of a temporary image on the disk; the page downloads it earlier
EDITOR_PIXELS = 512  # height and width of the mask editor's canvas, or the resolution of the model if larger


class Outputs(NamedTuple):
    """Outputs of a tab, in this order."""

    status: gr.HTML
    view: gr.HTML
    seed: gr.Number
    files: gr.File  # images of the last stage, for API clients


def build(pipe: DiffusionPipeline, sources: Mapping[str, str]) -> gr.Blocks:
    """Build the page.

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline: a cascade, or a single stage.
        sources (`dict[str, str]`): Folders or Hub ids of the model, by option, which the page shows.

    Raises:
        ValueError: If it has no text encoder, but networks that are conditioned on text.
    """
    tasks, files = tasks_of(pipe), None
    with gr.Blocks(title="diffusers-imagen", delete_cache=(60, SECONDS_TO_LIVE)) as page:
        gr.Markdown(f"# diffusers-imagen\n{headline(pipe, sources)}", elem_classes="headline")
        shared = Shared(threading.Lock(), set())
        page.temp_file_sets.append(shared.pictures)  # files that `delete_cache` deletes
        for task in tasks:
            with gr.Tab(task.title):
                drawer = Drawer(pipe, task, sources, shared)
                made = add_tab(drawer, examples_for(sources.values()), files)
                files = files or made
        with gr.Accordion("About this model", open=False):
            gr.Markdown(describe(pipe, sources))
    # without the queue, the requests of all visitors would run at once
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


# ---- a tab


def add_tab(drawer: Drawer, examples: list[str], drawn: gr.File | None) -> gr.File:
    """Add the fields and the images of a task; return the component of its image files.

    `drawn` is that of the previous tab, whose images can be used as input.
    """
    task = drawer.task
    with gr.Row(elem_classes="sheet"):
        with gr.Column(elem_classes="ask"):
            fields = ask_fields(task, drawn, examples)
            with gr.Row():
                stop = gr.Button("Stop", min_width=80, scale=1)
                start = gr.Button(task.title, variant="primary", min_width=80, scale=2)
        with gr.Column(elem_classes="shown"):
            status = gr.HTML(page_html.status("Ready."))
            view = gr.HTML(page_html.EMPTY)
            files = gr.File(label="Images", file_count="multiple", visible="hidden")
        with gr.Column(elem_classes="more"):
            if "prompt" in fields:
                gr.Examples(examples, inputs=fields["prompt"], label="Examples")
            fields |= more_fields(task)
    outputs = Outputs(status, view, fields["seed"], files)
    drawer.names = list(fields)
    triggers = [start.click] + ([fields["prompt"].submit] if "prompt" in fields else [])
    in_browser: dict[str, Any] = {"fn": None, "outputs": status, "show_progress": "hidden"}
    gr.on(triggers, js=shows("Waiting in the queue ...", 0), **in_browser)
    event = gr.on(
        triggers,
        drawer.run,
        inputs=list(fields.values()),
        outputs=list(outputs),
        show_progress="hidden",
        api_name=task.name,
        preprocess=False,  # images are read only by this package
        concurrency_limit=1,
        concurrency_id="pipeline",  # shared by all tabs
    )
    event.failure(js=shows("Failed."), **in_browser)
    stop.click(
        lambda: page_html.status("Stopped."),
        outputs=status,
        cancels=event,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    # a typed seed is kept
    fields["seed"].input(None, outputs=fields["random_seed"], js="() => false", show_progress="hidden")
    return files


def shows(text: str, done: int | None = None) -> str:
    """Return JavaScript that shows a status immediately, without the server, and scrolls images into view."""
    return f"() => {{ {INTO_VIEW} return {json.dumps(page_html.status(text, done))} }}"


def ask_fields(task: Task, drawn: gr.File | None, examples: list[str]) -> dict[str, Any]:
    """Return the first fields of a task, by their names in requests: its input image and its prompt."""
    fields: dict[str, Any] = {}
    if task.takes_mask:
        side = max(EDITOR_PIXELS, task.resolution)
        fields["picture"] = gr.ImageEditor(
            label="Paint over a part",
            type="filepath",
            sources=("upload", "clipboard"),
            buttons=["fullscreen"],
            transforms=(),
            layers=False,
            brush=gr.Brush(colors=["#ff8000"], color_mode="fixed", default_size=side // 10),
            canvas_size=(side, side),
            fixed_canvas=True,
            format="png",
            elem_classes="editor",
        )
    elif task.takes_picture:
        fields["picture"] = gr.Image(
            label=f"Image, which is first resized to {task.low_resolution} px",
            type="filepath",
            sources=["upload", "clipboard"],
            buttons=[],
            height=220,
            elem_classes="given",
        )
    if task.takes_picture and drawn is not None:
        take = gr.Button("Use the generated image", size="sm")
        take.click(
            taken, inputs=drawn, outputs=fields["picture"], queue=False, preprocess=False, api_visibility="private"
        )
    if task.reads_text:
        what = "Prompt" if task.needs_prompt else "Prompt: description of the image"
        value = "" if task.takes_picture else examples[0]
        fields["prompt"] = gr.Textbox(value, label=what, max_length=MAX_PROMPT_LENGTH, lines=1, max_lines=4)
    return fields


def more_fields(task: Task) -> dict[str, Any]:
    """Return the fields of a task that have defaults, by their names in requests."""
    fields: dict[str, Any] = {}
    with gr.Row():
        fields["seed"] = gr.Number(
            label="Seed", value=0, precision=0, minimum=0, maximum=MAX_SEED, min_width=120, scale=2
        )
        fields["random_seed"] = gr.Checkbox(
            label="Random seed", info="A new seed each time", value=True, min_width=120, scale=2
        )
    fields["images"] = gr.Slider(1, MAX_IMAGES, label="Images", step=1, value=1)
    with gr.Accordion("Settings", open=False):
        if task.reads_text:
            fields["negative_prompt"] = gr.Textbox(
                label="Negative prompt", placeholder="text to guide away from", max_length=MAX_PROMPT_LENGTH
            )
        if task.takes_mask:
            fields["strength"] = gr.Slider(MIN_STRENGTH, 1, label="Strength", step=0.05, value=1)
        for stage in task.stages:
            fields |= stage_fields(stage)
    return fields


def stage_fields(stage: Stage) -> dict[str, gr.Slider]:
    """Return the fields for steps and guidance of one stage; guidance is hidden for a stage that cannot be guided."""
    name, defaults, (steps, guidance) = f"{stage.resolution} px", stage.defaults, limits_of(stage)
    can_be_guided = stage.reads_text or stage.guidance_unet is not None
    with gr.Row():
        return {
            f"{stage.name}_steps": gr.Slider(
                1, steps, label=f"{name} steps", step=1, value=defaults.num_inference_steps, min_width=140
            ),
            f"{stage.name}_guidance": gr.Slider(
                1,
                guidance,
                label=f"{name} guidance",
                step=0.5,
                value=defaults.guidance_scale,
                min_width=140,
                visible=can_be_guided,
            ),
        }


def taken(files: Any) -> str:
    """Return the last generated image, as the input of another tab."""
    path = files[-1].get("path") if isinstance(files, list) and files and isinstance(files[-1], dict) else None
    if not isinstance(path, str) or not Path(path).is_file():
        raise refusal("There is no generated image, or it was deleted: generate one first.")
    return path


# ---- texts


def examples_for(sources: Any) -> list[str]:
    """Return example prompts for the training data of the model."""
    is_emoji = any(source_name(source) == NAME for source in sources)
    return EMOJI_EXAMPLES if is_emoji else EXAMPLES


def headline(pipe: DiffusionPipeline, sources: Mapping[str, str]) -> str:
    """Return the name of the model, and the resolution of its images."""
    return f"{' + '.join(map(source_name, sources.values()))}, to {pipe.stages[-1].resolution} px"


def describe(pipe: DiffusionPipeline, sources: Mapping[str, str]) -> str:
    """Return the model's name, size, device, limits from its model card, and licenses."""
    parts = ", ".join(
        f"{stage_title(stage)} ({stage.unet.num_parameters() / 1e6:,.1f} M parameters)" for stage in pipe.stages
    )
    names = " + ".join(map(source_name, sources.values()))
    lines = [f"Model **{names}**: {parts}; {pipe._execution_device}, {str(pipe.dtype).removeprefix('torch.')}."]
    for card in (Path(source, "README.md") for source in sources.values()):
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        if limits := re.search(r"^## Limits\n+(.+?)(?:\n\n|\Z)", text, re.M | re.S):
            lines.append(limits.group(1).replace("\n", " "))
    for license in licenses_of(pipe.origins):
        lines.append(f"{license.notice} [{license.title}]({license.link})")
    return "\n\n".join(lines)
