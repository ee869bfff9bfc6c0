"""A page to draw with: the images of every stage appear as it finishes. Needs gradio, the extra `demo`."""

import queue
import random
import re
import threading
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional

import gradio as gr
import torch
from PIL import Image

from .pipelines import ImagenCascadePipeline
from .pipelines.pipeline_imagen_cascade import DEFAULT_GUIDANCE, DEFAULT_STEPS


EXAMPLES = [
    "a 3d render of a tiger face",
    "a noto emoji of a red apple",
    "a 3d render of a grinning face",
    "a 3d render of a green heart",
    "a flat illustration of a blue fish",
]
MAX_SEED = 2**31 - 1
STAGE_TITLES = {"base": "Base", "sr256": "Super-resolution", "sr1024": "Super-resolution"}
# how the page looks: arguments of `launch`. System fonts, so that nothing is asked of other servers.
LOOK = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": """
        .stage { min-height: 11rem }
        .stage * { min-height: 0 !important }
        .small img { image-rendering: pixelated }
    """,
    "footer_links": ["api", "gradio"],
    "ssr_mode": False,
}


class Progress(NamedTuple):
    """How far a drawing is: network calls done and in all, and the images of the stages that have finished."""

    calls: int
    total: int
    stage_images: dict[int, list[Image.Image]]


def draw(pipe: ImagenCascadePipeline, prompt: str, **arguments: Any) -> Iterator[Progress]:
    """Runs a pipeline in another thread, and yields after every network call.

    A stage's images come with the first call of the stage after it. Closing the iterator stops the pipeline.

    Raises:
        ValueError: If an argument does not fit.
    """
    events: queue.Queue = queue.Queue()
    stopped = threading.Event()
    finished: dict[int, list[Image.Image]] = {}
    last: Optional[torch.Tensor] = None

    def on_step_end(pipe, step, timestep, tensors):
        nonlocal last
        latents = tensors["latents"]  # (B, C, H, W) of the stage that runs
        if last is not None and last.shape[-1] != latents.shape[-1]:
            finished[last.shape[-1]] = pipe.image_processor.postprocess(last.clamp(-1, 1), output_type="pil")
        last = latents
        if stopped.is_set():
            pipe._interrupt = True
        events.put(Progress(step + 1, pipe.num_timesteps, dict(finished)))
        return {}

    def run():
        try:
            out = pipe(prompt, callback_on_step_end=on_step_end, **arguments)
            events.put(Progress(pipe.num_timesteps, pipe.num_timesteps, out.stage_images))
        except Exception as error:  # raised again where the caller waits
            events.put(error)
        events.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stopped.set()
        thread.join()


def build(pipe: ImagenCascadePipeline, model: str) -> gr.Blocks:
    """The page.

    Args:
        pipe ([`ImagenCascadePipeline`]): What draws.
        model (`str`): Folder or Hub id that it comes from, which the page names.
    """
    stages = pipe.stages
    with gr.Blocks(title="diffusers-imagen") as page:
        gr.Markdown(f"# diffusers-imagen\n{describe(pipe, model)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], autofocus=True)
                negative_prompt = gr.Textbox(label="Negative prompt", placeholder="what to guide away from")
                with gr.Row():
                    stop = gr.Button("Stop")
                    start = gr.Button("Draw", variant="primary")
                gr.Examples(EXAMPLES, inputs=prompt, label="Try")
                num_images = gr.Slider(1, 8, label="Images", step=1, value=4)
                settings = [setting for stage in stages for setting in stage_settings(stage)]
                with gr.Row():
                    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=MAX_SEED)
                    new_seed = gr.Checkbox(label="New seed each time", value=False)
            with gr.Column(scale=3, min_width=320):
                status = gr.Markdown("Ready.")
                galleries = [stage_gallery(stage) for stage in stages]

        run = drawer(pipe)
        inputs = [prompt, negative_prompt, seed, num_images, *settings]
        outputs = [status, *galleries]
        event = gr.on(
            [start.click, prompt.submit],
            choose_seed,
            inputs=[seed, new_seed],
            outputs=seed,
            show_progress="hidden",
            api_visibility="private",
        ).then(run, inputs=inputs, outputs=outputs, show_progress="hidden", api_name="draw")
        stop.click(lambda: "Stopped.", outputs=status, cancels=event, api_visibility="private")
    return page


def stage_settings(stage) -> tuple[gr.Slider, gr.Slider]:
    """Steps and guidance of one stage."""
    with gr.Row():
        return (
            gr.Slider(1, 50, label=f"{stage.resolution} px steps", step=1, value=DEFAULT_STEPS[stage.name]),
            gr.Slider(1, 10, label=f"{stage.resolution} px guidance", step=0.5, value=DEFAULT_GUIDANCE[stage.name]),
        )


def stage_gallery(stage) -> gr.Gallery:
    """Where the images of one stage appear, under its name."""
    gr.Markdown(f"**{title(stage)}**")
    return gr.Gallery(
        show_label=False,
        columns=4,
        object_fit="contain",
        height="auto",
        format="png",
        interactive=False,
        elem_classes=["stage", "small"] if stage.resolution <= 64 else "stage",
    )


def title(stage) -> str:
    """A stage's name on the page."""
    return f"{STAGE_TITLES[stage.name]} {stage.resolution} px"


def describe(pipe: ImagenCascadePipeline, model: str) -> str:
    """Which model draws, how large it is, where it runs, and what its card says of its limits."""
    parts = ", ".join(
        f"{title(stage)} ({stage.unet.num_parameters() / 1e6:,.1f} M parameters)" for stage in pipe.stages
    )
    name = Path(model).name if Path(model).is_dir() else model
    lines = [f"Model **{name}**: {parts}; {pipe.device}, {str(pipe.dtype).removeprefix('torch.')}."]
    card = Path(model, "README.md")
    if card.is_file() and (limits := re.search(r"^## Limits\n+(.+?)(?:\n\n|\Z)", card.read_text(), re.M | re.S)):
        lines.append(limits.group(1).replace("\n", " "))
    return "\n\n".join(lines)


def choose_seed(seed: float, new_seed: bool) -> int:
    """The seed of the next drawing, which the page shows so that it can be drawn again."""
    return random.SystemRandom().randint(0, MAX_SEED) if new_seed else int(seed or 0)


def drawer(pipe: ImagenCascadePipeline):
    """The function behind the button: a generator of the page's status and galleries."""
    stages = pipe.stages

    def run(prompt: str, negative_prompt: str, seed: float, num_images: float, *settings: float):
        if not prompt.strip():
            raise gr.Error("Say what to draw.", print_exception=False)
        steps, scales = settings[0::2], settings[1::2]
        yield ["Reading the prompt ...", *([] for _ in stages)]
        progress = draw(
            pipe,
            prompt,
            negative_prompt=negative_prompt.strip() or None,
            num_images_per_prompt=int(num_images),
            num_inference_steps=[int(count) for count in steps],
            guidance_scale=[float(scale) for scale in scales],
            generator=torch.Generator().manual_seed(int(seed)),
        )
        shown = 0
        try:
            for calls, total, images in progress:
                done = [images.get(stage.resolution) for stage in stages]
                # what the page has already is not sent again, but the last answer is the whole one
                first_new = 0 if None not in done else shown
                galleries = [x if x and i >= first_new else gr.skip() for i, x in enumerate(done)]
                shown = len(images)
                running = "Done" if shown == len(stages) else f"Drawing: {title(stages[shown])}"
                yield [f"{running}. Network call {calls} of {total}, seed {int(seed)}.", *galleries]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            progress.close()

    return run
