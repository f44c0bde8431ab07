"""A small server on loopback that speaks as much of the Hugging Face hub's HTTP API as its real
clients (`huggingface_hub`, `datasets`) use to list and download files."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]  # "datasets/org/name" or "models/name" -> path -> content
    truncated: set[str]  # paths whose body is shorter than announced

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        for repo, files in self.repos.items():
            files_root = repo.removeprefix("models/")
            if f"{path}/".startswith(f"api/{repo}/"):
                return self.api(repo, files, path.removeprefix(f"api/{repo}").strip("/"))
            if path.startswith(f"{files_root}/resolve/"):
                return self.file(files, path.removeprefix(f"{files_root}/resolve/"))
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self):  # paths-info: which of these paths are there
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length).decode()
        paths = (json.loads(body)["paths"] if body.startswith("{")
                 else urllib.parse.parse_qs(body).get("paths", []))
        path = urllib.parse.unquote(self.path).strip("/")
        for repo, files in self.repos.items():
            if path.startswith(f"api/{repo}/paths-info/"):
                return self.json([self.entry(files, p) for p in paths if p in files])
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def api(self, repo: str, files: dict[str, bytes], rest: str):
        if rest.startswith("tree/"):
            folder = rest.split("/", 2)[2] if rest.count("/") > 1 else ""
            inside = [p for p in files if not folder or p.startswith(folder + "/")]
            if not inside:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self.json([self.entry(files, p) for p in inside])
        if rest and not rest.startswith("revision/"):
            return self.answer(404, b"{}")
        name = repo.split("/", 1)[1]
        return self.json({"_id": "0", "id": name, "sha": COMMIT, "private": False, "tags": [],
                          "downloads": 0, "likes": 0,
                          "siblings": [{"rfilename": path} for path in files]})

    def file(self, files: dict[str, bytes], rest: str):
        revision, _, path = rest.partition("/")
        if revision not in (COMMIT, "main"):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound",
                                          "X-Repo-Commit": COMMIT})
        etag = hashlib.sha256(files[path]).hexdigest()
        return self.answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT},
                           cut=path in self.truncated)

    @staticmethod
    def entry(files: dict[str, bytes], path: str) -> dict:
        oid = hashlib.sha256(files[path]).hexdigest()
        return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict | None = None, cut: bool = False):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(repos: dict[str, dict[str, bytes]], truncated: set[str] = frozenset()) -> Iterator[dict]:
    """Serves the repositories; yields the environment that makes the real clients use them."""
    handler = type("Handler", (Hub,), {"repos": repos, "truncated": set(truncated)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
