"""`diffusers-imagen demo`: use a model in a browser."""

import argparse
import errno
import ipaddress
import os
import signal
import socket
import sys
import tempfile

from ..utils.arguments import bad_argument
from ..utils.packages import require_packages
from .common import check_device
from .model_arguments import add_model_arguments, check_model, load_pipeline, sources_of
from .parser import Parser


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Serve a web page to generate, upscale and inpaint images, depending on the model. A single "
        "super-resolution stage, --sr256 or --sr1024 without --model, upscales. Requires gradio."
    )
    add_model_arguments(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address; 0.0.0.0 also serves other machines; default: %(default)s"
    )
    command.add_number("--port", int, 0, 65535, default=7860, help="port; 0 selects a free one; default: %(default)s")
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    command.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> None:
    """Serve the page until interrupted."""
    require_packages("the demo", "demo", "gradio")
    check_device(args.device)
    check_model(args, upscaler_alone=True)
    port = find_port(args.host, args.port)
    # gradio would report its use over the network, starting with its import
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the images are deleted
    with tempfile.TemporaryDirectory(prefix="diffusers-imagen-demo-") as pictures:
        os.environ["GRADIO_TEMP_DIR"] = pictures  # read when gradio is imported
        try:
            serve(args, port)
        finally:
            del os.environ["GRADIO_TEMP_DIR"]


def serve(args: argparse.Namespace, port: int) -> None:
    """Load the model and serve the page until interrupted."""
    from . import webdemo

    page = webdemo.build(load_pipeline(args), sources_of(args))
    try:
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=port,
            inbrowser=args.open,
            prevent_thread_lock=True,
            quiet=True,
            **webdemo.LOOK,
        )
    except OSError as error:
        raise ValueError(f"`port` is {port}, which cannot be served: {error}") from error
    print(f"{url} (stop with Ctrl-C)", flush=True)
    page.block_thread()


def find_port(host: str, port: int) -> int:
    """
    Return the port, or a free one for 0; raise ValueError if it is in use, or `host` is not an address of this
    machine.
    """
    if host != "localhost":
        try:
            ipaddress.IPv4Address(host)
        except ValueError as error:
            raise bad_argument("host", host, "an IPv4 address such as 127.0.0.1") from error
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise ValueError(f"`port` is {port}, which cannot be served: {error.strerror}.") from error
        except OSError as error:
            name, value = ("host", host) if error.errno == errno.EADDRNOTAVAIL else ("port", port)
            raise ValueError(f"`{name}` is {value!r}, which cannot be served: {error.strerror}.") from error
        return probe.getsockname()[1]
