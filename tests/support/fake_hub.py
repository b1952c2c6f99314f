"""A hub of one repository on loopback, which counts the bytes of each file that it serves."""

import collections
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
from collections.abc import Iterator

COMMIT = "0" * 39 + "1"


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves ``folder`` as the repository ``name``; ``sent`` counts bytes by file."""

    def __init__(self, name: str, folder: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.folder, self.sent = name, folder, collections.Counter()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{self.server.name}"):
            files = sorted(self.server.folder.iterdir())
            facts = {"id": self.server.name, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT} for file in files]
            # below the repository's top there is nothing
            listed = tree if re.search(r"/tree/[^/]+/?$", path) else []
            self._send(json.dumps(listed if "/tree/" in path else facts).encode(), with_body)
            return
        found = re.fullmatch(rf"/{self.server.name}/resolve/[^/]+/(.+)", path)
        file = self.server.folder / found[1] if found else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(file.read_bytes(), with_body, file.name)

    def _send(self, data: bytes, with_body: bool, name: str | None = None) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, len(data) - 1
        if asked:
            first, last = int(asked[1]), min(last, int(asked[2])) if asked[2] else last
        body = data[first : last + 1]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
            self.server.sent[name] += len(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(name: str, folder: pathlib.Path) -> Iterator[FakeHub]:
    """The hub, for as long as the context is open."""
    with FakeHub(name, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
