"""A server on this machine that answers as Google's object store and as Hugging Face's hub do, for reading."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET, REPOSITORY, REVISION = "photos", "me/photos", "0" * 40
_OBJECTS, _DOWNLOADS = f"/storage/v1/b/{BUCKET}/o", f"/download/storage/v1/b/{BUCKET}/o/"
_DATASET, _FILES = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/main/"


class Store:
    """What is stored, by name, and how many bytes of it were sent."""

    def __init__(self) -> None:
        self.address = ""
        self.files: dict[str, bytes] = {}
        self.sent = 0
        self.status = 0  # that everything is refused with, where it is not 0

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, Any]:
        """Status, and bytes of a file or what becomes JSON."""
        parts = urlsplit(target)
        path, query = unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}
        if self.status:
            return self.status, {"error": "refused", "code": self.status}
        for prefix in (_DOWNLOADS, _FILES):
            if path.startswith(prefix):
                return self._file(path.removeprefix(prefix))
        if path == _OBJECTS:
            return 200, self._objects(query.get("prefix", ""), query.get("delimiter", ""))
        if path.startswith(f"{_OBJECTS}/"):
            name = path.removeprefix(f"{_OBJECTS}/")
            return (200, self._object(name)) if name in self.files else (404, {"error": "absent", "code": 404})
        if path in (_DATASET, f"{_DATASET}/revision/main"):
            return 200, {"id": REPOSITORY, "sha": REVISION, "private": False, "tags": [], "downloads": 0, "likes": 0}
        if path.startswith(f"{_DATASET}/tree/main"):
            folder = path.removeprefix(f"{_DATASET}/tree/main").strip("/")
            return 200, [self._entry(name) for name in self._within(f"{folder}/" if folder else "")]
        if path == f"{_DATASET}/paths-info/main":
            return 200, [self._entry(name) for name in self._asked(body) if name in self._all()]
        return 404, {"error": f"{method} {path}"}

    def _file(self, name: str) -> tuple[int, Any]:
        return (200, self.files[name]) if name in self.files else (404, {"error": "absent"})

    def _object(self, name: str) -> dict[str, Any]:
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(self.files[name])),
            "generation": "1", "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def _objects(self, prefix: str, delimiter: str) -> dict[str, Any]:
        names = [name for name in self.files if name.startswith(prefix)]
        deeper = {name[: name.index(delimiter, len(prefix)) + 1] for name in names if delimiter in name[len(prefix) :]}
        items = [self._object(name) for name in names if not delimiter or delimiter not in name[len(prefix) :]]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(deeper) if delimiter else []}

    def _all(self) -> set[str]:
        folders = {"/".join(name.split("/")[:depth]) for name in self.files for depth in range(1, name.count("/") + 1)}
        return folders | set(self.files)

    def _within(self, folder: str) -> list[str]:
        return sorted(name for name in self._all() if name.startswith(folder) and "/" not in name[len(folder) :])

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {"type": "directory", "path": name, "oid": REVISION}
        return {"type": "file", "path": name, "oid": REVISION, "size": len(self.files[name])}

    @staticmethod
    def _asked(body: bytes) -> list[str]:
        if body.startswith(b"{"):
            paths: list[str] = json.loads(body)["paths"]
            return paths
        return parse_qs(body.decode()).get("paths", [])


@contextmanager
def store() -> Iterator[Store]:
    """A store that answers until the body ends."""
    content = Store()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, answer = content.answer(self.command, self.path, body)
            whole = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            data = whole
            if isinstance(answer, bytes) and (wanted := self.headers.get("range")):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                data, status = whole[int(first) : int(last or len(whole)) + 1], 206
            content.sent += len(data) if isinstance(answer, bytes) else 0
            self.send_response(status)
            self.send_header("content-type", "application/octet-stream" if data is whole else "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("etag", f'"{REVISION}"')
            self.send_header("x-repo-commit", REVISION)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_POST = do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    content.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield content
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
