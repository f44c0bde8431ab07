"""A local server with the part of the Hugging Face hub's HTTP API that `huggingface_hub` and
`datasets` use to list and download files. It can inject faults."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.common import ROOT, run_script

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]  # "datasets/org/name" or "models/name" -> path -> content
    faults: list  # one per request for a file: an HTTP status, "drop", "cut", "flip"
    gone: set[str]  # paths that always answer 500

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

    def do_POST(self):  # paths-info: which of these paths exist
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
        name, commit = repo.split("/", 1)[1], commit_of(rest.removeprefix("revision/"))
        return self.json({"_id": "0", "id": name, "sha": commit, "private": False, "tags": [],
                          "downloads": 0, "likes": 0,
                          "siblings": [{"rfilename": path} for path in files]})

    def file(self, files: dict[str, bytes], rest: str):
        revision, _, path = rest.partition("/")
        if revision != "main" and not is_commit(revision):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound",
                                          "X-Repo-Commit": COMMIT})
        content, headers = files[path], {"X-Repo-Commit": commit_of(revision)}
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if path in self.gone and self.command == "GET":
            return self.answer(500, b"")
        fault = self.faults.pop(0) if self.faults and self.command == "GET" else None
        if isinstance(fault, int):
            return self.answer(fault, b"", {"Retry-After": "0"})
        if fault == "drop":  # close the connection without an answer
            self.close_connection = True
            return None
        if fault == "flip":  # one bit
            content = content[:-1] + bytes([content[-1] ^ 1])
        status, begin = 200, self.headers["Range"]
        if begin:
            begin = int(begin.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[begin:]
        return self.answer(status, content, headers, cut=fault == "cut")

    @staticmethod
    def entry(files: dict[str, bytes], path: str) -> dict:
        oid = hashlib.sha256(files[path]).hexdigest()
        entry = {"type": "file", "path": path, "size": len(files[path]), "oid": oid[:40]}
        if path.endswith((".parquet", ".bin", ".gz")):  # stored as large files
            entry["lfs"] = {"oid": oid, "size": len(files[path]), "pointerSize": 130}
        return entry

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


def is_commit(revision: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def commit_of(revision: str) -> str:
    return revision if is_commit(revision) else COMMIT


@contextlib.contextmanager
def serve(repos: dict[str, dict[str, bytes]], faults: list = (),
          gone: set[str] = frozenset()) -> Iterator[tuple[dict, list]]:
    """Serves repositories; yields environment variables that direct the clients to this server, and
    the faults that have not been injected yet."""
    pending = list(faults)
    handler = type("Handler", (Hub,), {"repos": repos, "faults": pending, "gone": set(gone)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
               "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}, pending
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_module(module: str, *arguments, **options):
    """Runs `python -m module arguments...` with short delays between retries."""
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from minigpt2 import hub; hub.INITIAL_DELAY_S = 0.001\n"
            f"runpy.run_module({module!r}, run_name='__main__')\n")
    return run_script("-c", code, *arguments, **options)
