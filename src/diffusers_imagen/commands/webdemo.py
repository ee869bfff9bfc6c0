"""A page to draw with: the images of every stage appear as it finishes. Needs gradio, the extra `demo`.

It may be served to anybody, so what a visitor can ask for is bounded: one drawing at a time and few that wait, short
texts, numbers within the page's limits, no uploads, and pictures that are deleted after a while.
"""

import logging
import queue
import random
import re
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from gradio import processing_utils
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from ..pipelines import ImagenCascadePipeline
from ..pipelines.content_filter import finish_images
from ..pipelines.origin import licenses_of
from ..utils.arguments import is_finite
from ..utils.shipped import NAME


# what the shipped cascade draws, and what models draw that were trained on pictures of all kinds
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
MAX_SEED = 2**31 - 1
MAX_IMAGES = 8
MAX_STEPS, MAX_GUIDANCE = 50, 10  # or the default of a stage that has more
MAX_PROMPT_LENGTH = 1000  # in characters
MAX_WAITING = 16  # drawings; who comes then is told that the queue is full
MAX_BODY_BYTES = 2**16  # of a request: twice two texts of four bytes a character, and numbers
SECONDS_TO_LIVE = 1800  # of a picture on the disk: the page has it long before
POSTS = ("/gradio_api/queue/join", "/gradio_api/call/", "/gradio_api/run/", "/gradio_api/cancel", "/gradio_api/reset")
REFUSED_GETS = ("/gradio_api/proxy=",)  # fetches what others name

logger = logging.getLogger(__name__)


class Guard:
    """ASGI middleware that lets through what the page itself asks for, in requests of a bounded size."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            if scope["type"] == "http" and scope["path"].startswith(REFUSED_GETS):
                return await PlainTextResponse("This page fetches nothing.", 403)(scope, receive, send)
            return await self.app(scope, receive, send)
        if scope["method"] != "POST" or not scope["path"].startswith(POSTS):
            return await PlainTextResponse("This page takes no files.", 403)(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                text = f"The request has more than {MAX_BODY_BYTES} bytes."
                return await PlainTextResponse(text, 413)(scope, receive, send)
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay():
            return next(whole, None) or await receive()

        await self.app(scope, replay, send)


# how the page looks, and what it lets in: arguments of `launch`. System fonts, so that nothing is asked of other servers.
LOOK = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": """
        .stage { min-height: 11rem }
        .stage * { min-height: 0 !important }
        .small img { image-rendering: pixelated }
    """,
    "footer_links": ["api", "gradio"],
    "ssr_mode": False,
    "show_error": False,  # errors of Python are the log's
    "max_file_size": 1,
    "enable_monitoring": False,
    "app_kwargs": {"middleware": [Middleware(Guard)]},
}


class Progress(NamedTuple):
    """How far a drawing is: network calls done and in all, and the images of the stages that have finished."""

    calls: int
    total: int
    stage_images: dict[int, list[Image.Image]]


def draw(pipe: ImagenCascadePipeline, prompt: str, **arguments: Any) -> Generator[Progress, None, None]:
    """Runs a pipeline in another thread, and yields after every network call.

    A stage's images come with the first call of the stage after it. Closing the iterator stops the pipeline,
    whose errors it raises.
    """
    events: queue.Queue = queue.Queue()
    stopped = threading.Event()
    made: dict[int, torch.Tensor] = {}  # by the stages that have finished, in [-1, 1]
    finished: dict[int, Any] = {}
    last: torch.Tensor | None = None

    def on_step_end(pipe, step, timestep, tensors):
        nonlocal last
        latents = tensors["latents"]  # (B, C, H, W) of the stage that runs
        if last is not None and last.shape[-1] != latents.shape[-1]:
            made[last.shape[-1]] = last.clamp(-1, 1)
            # all of them again: an image that is flagged at one stage is black at the others too
            finished.update(finish_images(pipe, made, "pil").images)
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


def build(pipe: ImagenCascadePipeline, *sources: str) -> gr.Blocks:
    """The page.

    Args:
        pipe ([`ImagenCascadePipeline`]): What draws.
        sources (`str`): Folders or Hub ids that it comes from, which the page names.
    """
    stages, examples = pipe.stages, examples_for(sources)
    with gr.Blocks(title="diffusers-imagen", delete_cache=(60, SECONDS_TO_LIVE)) as page:
        gr.Markdown(f"# diffusers-imagen\n{describe(pipe, sources)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                limit = {"max_length": MAX_PROMPT_LENGTH}  # of the browser; `read_request` asks again
                prompt = gr.Textbox(label="Prompt", value=examples[0], autofocus=True, **limit)
                negative_prompt = gr.Textbox(label="Negative prompt", placeholder="what to guide away from", **limit)
                with gr.Row():
                    stop = gr.Button("Stop")
                    start = gr.Button("Draw", variant="primary")
                gr.Examples(examples, inputs=prompt, label="Try")
                num_images = gr.Slider(1, MAX_IMAGES, label="Images", step=1, value=4)
                settings = [setting for stage in stages for setting in stage_settings(stage)]
                with gr.Row():
                    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=MAX_SEED)
                    new_seed = gr.Checkbox(label="New seed each time", value=False)
            with gr.Column(scale=3, min_width=320):
                status = gr.Markdown("Ready.")
                galleries = [stage_gallery(stage) for stage in stages]

        pictures: set[str] = set()
        page.temp_file_sets.append(pictures)  # what `delete_cache` deletes
        run = drawer(pipe, pictures)
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
    # without the queue, everybody's drawings would run at once
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def stage_settings(stage) -> tuple[gr.Slider, gr.Slider]:
    """Steps and guidance of one stage."""
    name, defaults, (steps, guidance) = f"{stage.resolution} px", stage.defaults, limits_of(stage)
    with gr.Row():
        return (
            gr.Slider(1, steps, label=f"{name} steps", step=1, value=defaults.num_inference_steps),
            gr.Slider(1, guidance, label=f"{name} guidance", step=0.5, value=defaults.guidance_scale),
        )


def limits_of(stage) -> tuple[int, float]:
    """The most steps and the strongest guidance that a visitor can ask a stage for: at least its defaults."""
    return max(MAX_STEPS, stage.defaults.num_inference_steps), max(MAX_GUIDANCE, stage.defaults.guidance_scale)


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
    return f"{stage.kind.title} {stage.resolution} px"


def examples_for(sources: tuple[str, ...]) -> list[str]:
    """Prompts to try: of what the model was trained on."""
    is_emoji = any(Path(source).name == NAME for source in sources)
    return EMOJI_EXAMPLES if is_emoji else EXAMPLES


def describe(pipe: ImagenCascadePipeline, sources: tuple[str, ...]) -> str:
    """Which model draws, how large it is, where it runs, what its card says of its limits, and its licenses."""
    parts = ", ".join(
        f"{title(stage)} ({stage.unet.num_parameters() / 1e6:,.1f} M parameters)" for stage in pipe.stages
    )
    names = " + ".join(Path(source).name if Path(source).is_dir() else source for source in sources)
    lines = [f"Model **{names}**: {parts}; {pipe._execution_device}, {str(pipe.dtype).removeprefix('torch.')}."]
    for card in (Path(source, "README.md") for source in sources):
        if card.is_file() and (limits := re.search(r"^## Limits\n+(.+?)(?:\n\n|\Z)", card.read_text(), re.M | re.S)):
            lines.append(limits.group(1).replace("\n", " "))
    for license in licenses_of(pipe.origins):
        lines.append(f"{license.notice} [{license.title}]({license.link})")
    return "\n\n".join(lines)


def choose_seed(seed: float, new_seed: bool) -> int:
    """The seed of the next drawing, which the page shows so that it can be drawn again."""
    return random.SystemRandom().randint(0, MAX_SEED) if new_seed else whole("Seed", seed or 0, 0, MAX_SEED)


def drawer(pipe: ImagenCascadePipeline, pictures: set[str]):
    """The function behind the button: a generator of the page's status and galleries; files go to `pictures`."""
    stages = pipe.stages

    def keep(images: list[Image.Image]) -> list[str]:
        # gradio would write images of a gallery to its cache too, but never delete them
        paths = [processing_utils.save_pil_to_cache(image, get_upload_folder(), format="png") for image in images]
        pictures.update(paths)
        return paths

    def run(prompt: str, negative_prompt: str, seed: float, num_images: float, *settings: float):
        request = read_request(stages, prompt, negative_prompt, seed, num_images, settings)
        drawn = request.pop("seed")
        yield ["Reading the prompt ...", *([] for _ in stages)]
        progress = draw(pipe, generator=torch.Generator().manual_seed(drawn), **request)
        shown = 0
        try:
            for calls, total, images in progress:
                done = [images.get(stage.resolution) for stage in stages]
                # what the page has already is not sent again, but the last answer is the whole one
                first_new = 0 if None not in done else shown
                galleries = [keep(x) if x and i >= first_new else gr.skip() for i, x in enumerate(done)]
                shown = len(images)
                running = "Done" if shown == len(stages) else f"Drawing: {title(stages[shown])}"
                yield [f"{running}. Network call {calls} of {total}, seed {drawn}.", *galleries]
        except (ValueError, FloatingPointError) as error:
            raise refusal(str(error)) from error
        except Exception as error:  # its text may tell of this machine
            logger.exception("A drawing failed")
            raise refusal("The drawing failed; the log of the server says why.") from error
        finally:
            progress.close()

    return run


def read_request(stages, prompt, negative_prompt, seed, num_images, settings) -> dict[str, Any]:
    """What a visitor asks for as arguments of the pipeline, with the seed as `seed`.

    Raises gr.Error for what the page would not send: requests need not come from a browser.
    """
    for name, text in (("The prompt", prompt), ("The negative prompt", negative_prompt)):
        if not isinstance(text, (str, type(None))):
            raise refusal(f"{name} is no text.")
        if text and len(text) > MAX_PROMPT_LENGTH:
            raise refusal(f"{name} has {len(text)} characters, but should have at most {MAX_PROMPT_LENGTH}.")
        if text and not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise refusal(f"{name} is no text.")
    if not prompt or not prompt.strip():
        raise refusal("Say what to draw.")
    if len(settings) != 2 * len(stages):
        raise refusal(f"There should be {2 * len(stages)} settings of stages, not {len(settings)}.")
    return {
        "prompt": prompt,
        "negative_prompt": (negative_prompt or "").strip() or None,
        "seed": whole("Seed", seed or 0, 0, MAX_SEED),
        "num_images_per_prompt": whole("Images", num_images, 1, MAX_IMAGES),
        "num_inference_steps": [
            whole("Steps", count, 1, limits_of(stage)[0]) for stage, count in zip(stages, settings[0::2])
        ],
        "guidance_scale": [
            float(number("Guidance", scale, 1, limits_of(stage)[1])) for stage, scale in zip(stages, settings[1::2])
        ],
    }


def number(name: str, value: Any, lowest: float, highest: float) -> float:
    """A number that is within the page's limits."""
    if not is_finite(value) or not lowest <= value <= highest:
        raise refusal(f"{name} should be a number from {lowest} to {highest}.")
    return value


def whole(name: str, value: Any, lowest: int, highest: int) -> int:
    """As `number`, without what comes after the point."""
    return int(number(name, value, lowest, highest))


def refusal(text: str) -> gr.Error:
    """An error that the page shows, and the log does not."""
    return gr.Error(text, print_exception=False)
