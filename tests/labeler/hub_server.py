"""A stand-in for the Hugging Face hub on loopback: the calls of its API that make and fill a dataset repository.

Repositories, preupload, Git LFS and commits, as `huggingface_hub` speaks them. A committed LFS file must have been
uploaded whole and under its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "hf_of_this_test"
OWNER = "someone"


class HubServer:
    """The stand-in; use as a context manager.

    Attributes:
        repositories: files by path for each `owner/name`.
        visibility: as asked for when the repository was made; None for the hub's default.
        commits: messages in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.send({"error": "Invalid username or password."}, 401)
                else:
                    self.send(*outer.answer(self.path, body))

            def do_GET(self) -> None:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.send({"error": "Invalid username or password."}, 401)
                elif self.path == "/api/whoami-v2":
                    self.send({"type": "user", "name": OWNER})
                elif route := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/main\?.*", self.path):
                    files = outer.repositories[route[1]]
                    self.send(
                        [{"type": "file", "path": p, "size": len(c), "oid": ""} for p, c in files.items()]
                    )
                else:
                    self.send({"error": "no such route"}, 404)

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.large[self.path.rpartition("/")[2]] = body
                self.send({})

            def send(self, content: Any, status: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def answer(self, path: str, body: bytes) -> tuple[Any, int]:
        """The answer to a POST, with its status."""
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if path == "/verify":
            told = json.loads(body)
            return ({}, 200) if len(self.large.get(told["oid"], b"")) == told["size"] else ({}, 404)
        route = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/.]+)(.*)", path)
        if route is None or route[1] not in self.repositories:
            return {"error": "Repository not found"}, 404
        if route[2] == "/preupload/main":
            files = json.loads(body)["files"]
            return {"files": [self._mode(f["path"]) for f in files]}, 200
        if route[2] == ".git/info/lfs/objects/batch":
            return {
                "transfer": "basic",
                "objects": [self._large(o) for o in json.loads(body)["objects"]],
            }, 200
        if route[2] == "/commit/main":
            return self._commit(route[1], [json.loads(line) for line in body.splitlines()])
        return {"error": "no such route"}, 404

    def _create(self, asked: dict[str, Any]) -> tuple[Any, int]:
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        address = {"url": f"{self.url}/datasets/{name}"}
        if name in self.repositories:
            return {**address, "error": "You already created this dataset repo"}, 409
        self.repositories[name] = {}
        self.visibility[name] = asked.get("visibility")
        return address, 200

    def _mode(self, path: str) -> dict[str, Any]:
        return {
            "path": path,
            "uploadMode": "regular" if path.endswith(".md") else "lfs",
            "shouldIgnore": False,
        }

    def _large(self, told: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/large/{told['oid']}"}
        return {**told, "actions": {"upload": upload, "verify": {"href": f"{self.url}/verify"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[Any, int]:
        files = dict(self.repositories[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large.get(value["oid"], b"")
                if hashlib.sha256(content).hexdigest() != value["oid"]:
                    return {"error": f"{value['path']} was not uploaded"}, 400
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "header":
                self.commits.append(value["summary"])
        self.repositories[name] = files
        oid = hashlib.sha1(repr(lines).encode()).hexdigest()
        return {"commitUrl": f"{self.url}/datasets/{name}/commit/{oid}", "commitOid": oid}, 200

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
