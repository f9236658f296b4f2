"""Serves the page to the browser of this machine, and to nobody else."""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from nami_lightning.serving.drawing import Studio

LOOPBACK = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
"""What a browser on this machine calls it. Any port: a tunnel may have another one at its other end."""

WAITING = 16
"""Drawings that wait for their turn at most; one more is told so at once."""

HEADERS = {
    # Nothing is loaded from another host, and no page of another shows this one in a frame.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


def check_port(port: int) -> None:
    """Check that a port of this machine is free.

    Raises:
        ValueError: it is not, or may not be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"port {port} can't be used ({reason}): give another one by --port") from error


@contextmanager
def serving(studio: Studio, weights: Mapping[str, Any], port: int) -> Iterator[str]:
    """Serve the page until the context ends; the images of its histories are removed then.

    Args:
        studio: what draws.
        weights: what its images say of its weights: ``model``, its name for people, and more.
        port: of this machine.

    Yields:
        The page's address.

    Raises:
        ModuleNotFoundError: the extra ``serve`` is not installed.
        ValueError: the port is in use.
    """
    check_port(port)
    with TemporaryDirectory(prefix="nami_serve_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # gradio keeps its own copies there too
        for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own server whether it is up
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), LOOPBACK]))
        import_gradio()
        from starlette.middleware import Middleware

        from nami_lightning.serving.page import CSS, Page, theme

        page = Page(studio, weights, Path(folder)).blocks
        page.queue(max_size=WAITING, default_concurrency_limit=1)
        try:
            page.launch(
                server_name=LOOPBACK,
                server_port=port,
                theme=theme(),
                css=CSS,
                app_kwargs={"middleware": [Middleware(LoopbackOnly)]},
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size="1kb",  # nothing is uploaded
            )
            yield f"http://{LOOPBACK}:{port}"
        finally:
            page.close(verbose=False)


def import_gradio() -> None:
    """Import gradio, without its telemetry.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"lightning serve needs gradio: pip install 'nami_lightning[serve]' ({error})"
        ) from error


class LoopbackOnly:
    """Refuses requests that pages of other sites make, be it by a name of theirs for this machine (DNS rebinding).

    Args:
        app: the ASGI application behind it.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, with 403 if it doesn't come from this machine's own page."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if not is_own(headers.get("host", ""), headers.get("origin")):
            from starlette.responses import PlainTextResponse

            text = f"This page is served to http://{LOOPBACK} and http://localhost only.\n"
            await PlainTextResponse(text, status_code=403)(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def is_own(host: str, origin: str | None) -> bool:
    """Tell whether a request names this machine, and comes from the page itself if it says where it comes from."""
    try:
        from_page = origin is None or urlsplit(origin).netloc == host
    except ValueError:  # no address at all
        return False
    return bool(HOSTS.fullmatch(host)) and from_page
