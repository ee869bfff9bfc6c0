"""What reaches the page's server: its own requests, of a bounded size, and pictures; everything else is refused."""

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


MAX_WAITING = 16  # drawings; who comes then is told that the queue is full
MAX_BODY_BYTES = 2**16  # of a request: twice two texts of four bytes a character, and numbers
MAX_PICTURE_BYTES = 16 * 2**20
MAX_PICTURE_PIXELS = 64 * 10**6  # that are unpacked into memory
MAX_FOLDER_BYTES = 2**29  # of all pictures on the disk, those of the page among them; they go after a while
MAX_UPLOADS = 4  # at once: each is in memory until it is whole; the others wait
MAX_WAITING_UPLOADS = 64
UPLOAD_SECONDS = 120

API = "/gradio_api"
POSTS = ("/queue/join", "/call/", "/run/", "/cancel", "/reset")
UPLOAD = "/upload"
REFUSED_GETS = (f"{API}/proxy=",)  # fetches what others name


class Refused(Exception):
    """A request that is not let in: the status code and a line that says why."""


class Guard:
    """ASGI middleware that lets through what the page itself asks for, in requests of a bounded size."""

    def __init__(self, app: Callable):
        self.app, self.waiting, self.turns = app, 0, asyncio.Semaphore(MAX_UPLOADS)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                if scope["path"].startswith(REFUSED_GETS):
                    raise Refused(403, "This page fetches nothing.")
            else:
                receive, send = await self.check(scope, receive), saying_why(scope, receive, send)
        except Refused as refused:
            return await response_of(refused, scope)(scope, receive, send)
        return await self.app(scope, receive, send)

    async def check(self, scope, receive) -> Callable:
        """The request's body, read and checked, as what `receive` would give; raises Refused."""
        path = scope["path"].removeprefix(API)
        if scope["method"] != "POST" or path == scope["path"] or not (path == UPLOAD or path.startswith(POSTS)):
            raise Refused(403, "This page takes no such request.")
        if path != UPLOAD:
            body = await read_body(receive, MAX_BODY_BYTES)
            if names_address(body):
                raise Refused(403, "This page fetches nothing.")
            return replaying(body, receive)
        if self.waiting >= MAX_WAITING_UPLOADS or size_of_folder(get_upload_folder()) > MAX_FOLDER_BYTES:
            raise Refused(503, "The page has as many pictures as it can hold: try again in some minutes.")
        self.waiting += 1
        try:
            async with self.turns:
                body = await asyncio.wait_for(read_body(receive, MAX_PICTURE_BYTES), UPLOAD_SECONDS)
            await check_pictures(Request(scope, replaying(body, receive)))
        except asyncio.TimeoutError:
            raise Refused(408, "The picture took too long.") from None
        finally:
            self.waiting -= 1
        return replaying(body, receive)


def response_of(refused: Refused, scope) -> Response:
    """The answer to a request that is not let in; what asks for a drawing shows the `detail`."""
    code, text = refused.args
    is_drawing = scope["path"].removeprefix(API).startswith(POSTS)
    return JSONResponse({"detail": text}, code) if is_drawing else PlainTextResponse(text, code)


def saying_why(scope, receive: Callable, send: Callable) -> Callable:
    """`send`, but with a clear line in place of the queue's answer that it is full, for which the page has words of its own."""
    is_full = False

    async def replace(message):
        nonlocal is_full
        if message["type"] == "http.response.start" and message["status"] == 503:
            is_full = True
            text = f"{MAX_WAITING} drawings are waiting, which is all that this page holds: try again later."
            await response_of(Refused(429, text), scope)(scope, receive, send)
        elif not is_full:
            await send(message)

    return replace


async def read_body(receive: Callable, limit: int) -> bytes:
    """All of a request's body; raises Refused as soon as it is longer than `limit` bytes."""
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
    """What gives a body that was read before, and then whatever comes after it."""
    whole = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay():
        return next(whole, None) or await receive()

    return replay


async def check_pictures(request: Request) -> None:
    """Raises Refused unless every file in a form is a picture that can be opened, and is not too large."""
    try:
        async with request.form(max_files=2, max_fields=8) as form:
            for value in form.values():
                if isinstance(value, UploadFile):
                    check_picture(await value.read())
    except MultiPartException as error:
        raise Refused(400, f"The request cannot be read: {error.message}") from error
    except ValueError as error:  # a form that is none
        raise Refused(400, "The request cannot be read.") from error


def check_picture(data: bytes) -> None:
    """Raises Refused unless these bytes are a picture by their header, and not too large."""
    try:
        with open_image(data) as image:
            pixels = image.width * image.height
    except BadImage as error:
        raise Refused(415, f"The file cannot be used as a picture: {error}.") from error
    if pixels > MAX_PICTURE_PIXELS:
        raise Refused(
            413,
            f"The picture has {pixels / 1e6:.0f} megapixels, but should have at most {MAX_PICTURE_PIXELS / 1e6:.0f}.",
        )


def names_address(body: bytes) -> bool:
    """Whether a request gives an address on the network as a file, which gradio would fetch."""
    try:
        values = [json.loads(body)] if body else []
    except (ValueError, RecursionError):  # which gradio refuses in its own words
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
    """Bytes of the files in a folder; those that are deleted meanwhile do not count."""
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            pass
    return total
