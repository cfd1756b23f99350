"""A server on the loopback interface that speaks as much of the Hub's protocol as a push takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
BIG = (".safetensors",)
"""Endings of files that go to the storage of large files."""


@dataclass
class Hub:
    """What the server holds and was asked.

    Attributes:
        files: Committed files by name.
        blobs: Large files by sha256.
        faults: Part of a path -> status to answer with, or seconds to be silent.
        said: Body of answers that are faults.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    repos: dict[str, dict] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    commits: list[dict] = field(default_factory=list)
    faults: dict[str, int | float] = field(default_factory=dict)
    said: str = ""

    def create(self, body: bytes) -> tuple[int, dict]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, asked)
        return status, {"url": f"{self.url}/{name}"}

    def preupload(self, body: bytes) -> tuple[int, dict]:
        rows = []
        for file in json.loads(body)["files"]:
            row = {"path": file["path"], "shouldIgnore": False}
            row["uploadMode"] = "lfs" if file["path"].endswith(BIG) else "regular"
            known = self.files.get(file["path"])
            if known is not None and row["uploadMode"] == "lfs":
                row["oid"] = hashlib.sha256(known).hexdigest()
            elif known is not None:
                row["oid"] = hashlib.sha1(b"blob %d\0" % len(known) + known).hexdigest()
            rows.append(row)
        return 200, {"files": rows}

    def batch(self, body: bytes) -> tuple[int, dict]:
        objects = []
        for entry in json.loads(body)["objects"]:
            row = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.blobs:
                row["actions"] = {"upload": {"href": f"{self.url}/storage/{entry['oid']}"}}
            objects.append(row)
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, oid: str, body: bytes) -> tuple[int, dict]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "wrong sha256"}
        self.blobs[oid] = body
        return 200, {}

    def commit(self, body: bytes, query: str) -> tuple[int, dict]:
        rows = [json.loads(line) for line in body.splitlines()]
        made = {"summary": rows[0]["value"]["summary"], "query": query, "files": []}
        for row in rows[1:]:
            value = row["value"]
            content = (
                self.blobs[value["oid"]]
                if row["key"] == "lfsFile"
                else base64.b64decode(value["content"])
            )
            self.files[value["path"]] = content
            made["files"].append(value["path"])
        self.commits.append(made)
        answer = {"commitOid": COMMIT, "commitUrl": f"{self.url}/me/merged/commit/{COMMIT}"}
        if "create_pr=1" in query:
            answer["pullRequestUrl"] = f"{self.url}/me/merged/discussions/1"
        return 200, answer

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        """Return status and body of an answer."""
        path, _, query = path.partition("?")
        if path == "/api/repos/create":
            return self.create(body)
        if "/preupload/" in path:
            return self.preupload(body)
        if path.endswith("/objects/batch"):
            return self.batch(body)
        if path.startswith("/storage/"):
            return self.store(path.rpartition("/")[2], body)
        if "/commit/" in path:
            return self.commit(body, query)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if re.fullmatch(r"/api/models/[\w-]+/[\w-]+(/revision/\w+)?", path) and method == "GET":
            return 200, {"id": "me/merged", "sha": COMMIT, "siblings": [], "tags": []}
        return 404, {"error": f"no {path}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self) -> None:
        body = self._body()
        self.hub.requests.append((self.command, self.path))
        self.hub.headers.append(dict(self.headers))
        fault = next((f for part, f in self.hub.faults.items() if part in self.path), None)
        if isinstance(fault, float):
            time.sleep(fault)
            self.close_connection = True
            return
        if isinstance(fault, int):
            status, answer = fault, {"error": self.hub.said}
        else:
            status, answer = self.hub.answer(self.command, self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815  (the names that the server calls)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def log_message(self, *arguments) -> None:
        """Say nothing."""


@contextmanager
def serving():
    """Serve a Hub on a free port of 127.0.0.1."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
