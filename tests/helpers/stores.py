"""Stores on this machine: one that speaks S3, and web servers that send parts of files, or break off."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from moto.server import ThreadedMotoServer

ACCESS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_store() -> Iterator[Any]:
    """A store that speaks S3, with a bucket ``bucket``; its file system."""
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        for name, value in (ACCESS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}"}).items():
            patch.setenv(name, value)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        urlopen(Request(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()  # of earlier tests
        store.mkdir("bucket")
        yield store
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


class Web(ThreadingHTTPServer):
    """A web server of a folder that sends parts of files.

    Args:
        folder: what it serves.
        breaks: each of so many parts breaks off in its middle; 0: none does.
        parts: whole files are sent if not.

    Attributes:
        url: of the folder.
        asked: the (first, last) byte of each part that was asked for.
    """

    def __init__(self, folder: Path, breaks: int = 0, parts: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Parts, directory=str(folder)))
        self.breaks, self.sends_parts, self.asked = breaks, parts, list[tuple[int, int]]()
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


class _Parts(SimpleHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if asked is None or not self.server.sends_parts or not os.path.isfile(path):
            return super().do_GET()
        with open(path, "rb") as file:
            file.seek(int(asked[1]))
            data = file.read(int(asked[2]) - int(asked[1]) + 1)
        self.server.asked.append((int(asked[1]), int(asked[2])))
        breaks = self.server.breaks and len(self.server.asked) % self.server.breaks == 0
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if breaks else data)
        return None

    def log_message(self, *arguments: object) -> None: ...
