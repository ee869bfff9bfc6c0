"""Checks of requests to the page's server: only the page's own requests, of limited size, and images are accepted."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from gradio.utils import get_upload_folder
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ...utils.images import BadImage, open_image


MAX_WAITING = 16  # drawings; further requests receive the message that the queue is full
MAX_BODY_BYTES = 2**16  # of a request: twice two texts of four bytes per character, and numbers
MAX_PICTURE_BYTES = 16 * 2**20
MAX_PICTURE_PIXELS = 64 * 10**6  # decoded in memory
MAX_FOLDER_BYTES = 2**29  # of all images on the disk, including generated ones; they are deleted after a while
MAX_UPLOADS = 4  # at a time, each in memory until complete; others wait
MAX_WAITING_UPLOADS = 64
UPLOAD_SECONDS = 120

API = "/gradio_api"
POSTS = ("/queue/join", "/call/", "/run/", "/cancel", "/reset")
UPLOAD = "/upload"
REFUSED_GETS = (f"{API}/proxy=",)  # downloads addresses given by the visitor


class Refused(Exception):
    """Rejection of a request: the status code and a one-line reason."""


class Guard:
    """ASGI middleware that accepts only the page's own requests, of limited size."""

    def __init__(self, app: Callable):
        self.app, self.waiting, self.turns = app, 0, asyncio.Semaphore(MAX_UPLOADS)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                if scope["path"].startswith(REFUSED_GETS):
                    raise Refused(403, "This page does not download files.")
            else:
                receive, send = await self.check(scope, receive), saying_why(scope, receive, send)
        except Refused as refused:
            return await response_of(refused, scope)(scope, receive, send)
        return await self.app(scope, receive, send)

    async def check(self, scope, receive) -> Callable:
        """Read and check the request's body; return a replacement for `receive`, or raise Refused."""
        path = scope["path"].removeprefix(API)
        if scope["method"] != "POST" or path == scope["path"] or not (path == UPLOAD or path.startswith(POSTS)):
            raise Refused(403, "This page does not accept such requests.")
        if path != UPLOAD:
            body = await read_body(receive, MAX_BODY_BYTES)
            if names_address(body):
                raise Refused(403, "This page does not download files.")
            return replaying(body, receive)
        if self.waiting >= MAX_WAITING_UPLOADS or size_of_folder(get_upload_folder()) > MAX_FOLDER_BYTES:
            raise Refused(503, "The page has reached its limit of images: try again in a few minutes.")
        self.waiting += 1
        try:
            async with self.turns:
                body = await asyncio.wait_for(read_body(receive, MAX_PICTURE_BYTES), UPLOAD_SECONDS)
            await check_pictures(Request(scope, replaying(body, receive)))
        except asyncio.TimeoutError:
            raise Refused(408, "The upload took too long.") from None
        finally:
            self.waiting -= 1
        return replaying(body, receive)


def response_of(refused: Refused, scope) -> Response:
    """Return the response to a rejected request; for drawings, the page shows the `detail`."""
    code, text = refused.args
    is_drawing = scope["path"].removeprefix(API).startswith(POSTS)
    return JSONResponse({"detail": text}, code) if is_drawing else PlainTextResponse(text, code)


def saying_why(scope, receive: Callable, send: Callable) -> Callable:
    """Return `send` with a one-line message instead of the queue's response that it is full."""
    is_full = False

    async def replace(message):
        nonlocal is_full
        if message["type"] == "http.response.start" and message["status"] == 503:
            is_full = True
            text = f"{MAX_WAITING} requests are waiting, which is the limit of this page: try again later."
            await response_of(Refused(429, text), scope)(scope, receive, send)
        elif not is_full:
            await send(message)

    return replace


async def read_body(receive: Callable, limit: int) -> bytes:
    """Read a request's body; raise Refused as soon as it is longer than `limit` bytes."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            unit = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit} bytes"
            raise Refused(413, f"The request has more than {unit}.")
    return bytes(body)


def replaying(body: bytes, receive: Callable) -> Callable:
    """Return a `receive` that first returns a body that was already read."""
    whole = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay():
        return next(whole, None) or await receive()

    return replay


async def check_pictures(request: Request) -> None:
    """Raise Refused unless every file in a form is an image that can be opened, and within the size limit."""
    try:
        async with request.form(max_files=2, max_fields=8) as form:
            for value in form.values():
                if isinstance(value, UploadFile):
                    check_picture(await value.read())
    except MultiPartException as error:
        raise Refused(400, f"The request cannot be read: {error.message}") from error
    except ValueError as error:  # an invalid form
        raise Refused(400, "The request cannot be read.") from error


def check_picture(data: bytes) -> None:
    """Raise Refused unless these bytes have the header of an image within the size limit."""
    try:
        with open_image(data) as image:
            pixels = image.width * image.height
    except BadImage as error:
        raise Refused(415, f"The file cannot be used as an image: {error}.") from error
    if pixels > MAX_PICTURE_PIXELS:
        raise Refused(
            413,
            f"The image has {pixels / 1e6:.0f} megapixels, but should have at most {MAX_PICTURE_PIXELS / 1e6:.0f}.",
        )


def names_address(body: bytes) -> bool:
    """Return whether a request has a network address as a file, which gradio would download."""
    try:
        values = [json.loads(body)] if body else []
    except (ValueError, RecursionError):  # gradio rejects these itself
        return False
    while values:
        value = values.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and "://" in path:
                return True
            values += value.values()
        elif isinstance(value, list):
            values += value
    return False


def size_of_folder(folder: str) -> int:
    """Return the total size of the files in a folder in bytes, ignoring files deleted in the meantime."""
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            pass
    return total
