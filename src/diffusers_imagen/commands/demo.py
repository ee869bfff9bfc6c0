"""`diffusers-imagen demo`: the cascade in a browser."""

import argparse
import importlib.util
import os

import torch

from .common import add_model_arguments, load_pipeline


def add_parser(commands) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "demo", help="draw in a browser", description="Serves a page to draw with. Needs gradio."
    )
    add_model_arguments(command)
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too; default: %(default)s")
    command.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    command.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> None:
    """Serves the page until interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs gradio: pip install 'diffusers-imagen[demo]'")
    # gradio would report its use to its makers, from the moment of its import
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from .. import webdemo

    pipe = load_pipeline(args.model, getattr(torch, args.dtype)).to(args.device)
    page = webdemo.build(pipe, args.model)
    try:
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=args.port,
            inbrowser=args.open,
            prevent_thread_lock=True,
            quiet=True,
            **webdemo.LOOK,
        )
    except OSError as error:
        raise ValueError(f"`port` is {args.port}, which cannot be served: {error}") from error
    print(f"{url} (stop with Ctrl-C)", flush=True)
    page.block_thread()
