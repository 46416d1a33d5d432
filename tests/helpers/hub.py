"""A Hugging Face hub on this machine: as much of it as an upload needs."""

import json
import threading
from base64 import b64decode
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was uploaded: file name -> content; and every request with its token."""

    def __init__(self, *, refuse: tuple[int, str] = (200, "nothing")) -> None:
        self.refuse = refuse  # a status, and a part of the paths that get it as answer
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # large files by digest
        self.created: list[dict] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> dict:
        if method == "PUT":
            self.stored[path.rsplit("/", 1)[1]] = body
            return {}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/{self.created[-1].get('organization', 'somebody')}/{self.created[-1]['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            href = {o["oid"]: {"upload": {"href": f"{self.url}/store/{o['oid']}"}} for o in objects}
            return {"transfer": "basic", "objects": [o | {"actions": href[o["oid"]]} for o in objects]}
        if "/commit/" in path:
            self.commit([json.loads(line) for line in body.splitlines()])
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/u/r/commit/{'0' * 40}"}
        return {"id": "me/student", "private": True, "siblings": []}

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]


@contextmanager
def hub(**options):
    """A running `Hub`."""
    state = Hub(**options)

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.requests.append((self.command, self.path, self.headers.get("Authorization")))
            path = self.path.split("?")[0]
            status, refused = state.refuse
            is_refused = refused in path
            content = b'{"error": "no"}' if is_refused else json.dumps(state.answer(self.command, path, body)).encode()
            self.send_response(status if is_refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = reply

        def log_message(self, *args) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
