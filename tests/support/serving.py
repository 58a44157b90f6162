"""A web server on the loopback that misbehaves as told, and a small stand-in for the model hub."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Site:
    """What the server holds, how it behaves, and what it was asked.

    Attributes:
        address: `http://127.0.0.1:<port>`.
        files: content by path.
        cuts: of each coming request in turn, after how many bytes the connection ends; whole answers after these.
        answers: status codes of the coming requests, in place of the content.
        ranges: whether parts can be asked for.
        etag: whether the server says which version of a file it has.
        delay: seconds before an answer.
        authorization: header that every request needs, none if empty.
        asked: path and headers of every request.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    ranges: bool = True
    etag: bool = True
    delay: float = 0.0
    authorization: str = ""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def parts(self) -> list[str | None]:
        """The `Range` of each request."""
        return [headers.get("Range") for _, headers in self.asked]


class Handler(BaseHTTPRequestHandler):
    """Plain files with ranges."""

    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.asked.append((self.path, dict(self.headers)))
        time.sleep(site.delay)
        if site.answers and (status := site.answers.pop(0)) != 200:
            self.send_error(status)
            return
        if site.authorization and self.headers.get("Authorization") != site.authorization:
            self.send_error(401)
            return
        content = site.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        condition = self.headers.get("If-Range")
        start = int(asked[1]) if asked and site.ranges and condition in (None, tag) else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if site.etag:
            self.send_header("ETag", tag)
        if self.path.endswith("/"):  # a page of a package index
            self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has enough
            self.wfile.write(body[: site.cuts.pop(0)] if site.cuts else body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


class HubHandler(BaseHTTPRequestHandler):
    """The requests that the hub's client makes to fetch a repository; `Site.files` has `/<owner>/<name>/<file>`.

    Those of data sets begin with `/datasets/`.
    """

    site: Site
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.site.asked.append((path, dict(self.headers)))
        if self.site.answers:
            status = self.site.answers[0]
            self.send_response(status)
            if status == 403:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            folder = f"/{api[2]}/" if api[1] == "models" else f"/datasets/{api[2]}/"
            files = {n.removeprefix(folder): c for n, c in self.site.files.items() if n.startswith(folder)}
            if not files:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
                return
            siblings = [
                {"rfilename": name, **({"size": len(content)} if "blobs=" in self.path else {})}
                for name, content in files.items()
            ]
            listing: Any = {"id": api[2], "sha": self.commit, "siblings": siblings}
            if api[3] == "tree":
                listing = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
        elif file:
            content = self.site.files.get(f"/{file[1]}/{file[3]}")
            headers = {"X-Repo-Commit": self.commit}
            if content is None:
                self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, body)
                return
            announced = self.site.files.get(f"/announced/{file[3]}", content)
            self._send(200, content, headers | {"ETag": f'"{hashlib.sha256(announced).hexdigest()}"'}, body)
        else:
            self._send(404, b"", {}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler] = Handler) -> Iterator[Site]:
    """A running server; only this machine can reach it."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"site": site}))
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def go_online(patch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
    """Undo what forbids the network for a test whose only server is the loopback's."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        patch.delenv(name, raising=False)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setenv("no_proxy", "127.0.0.1")
    if endpoint is not None:
        patch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
