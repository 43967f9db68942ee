"""OpenAI's files and batches beside the scripted completions, on the same address."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from email import message_from_bytes
from typing import Any

from tests.labeler.openai_server import Fault, Reply, ScriptedServer

Answer = tuple[Any, int, Mapping[str, str]]


class BatchServer(ScriptedServer):
    """A scripted server whose batches end at the second look.

    Args:
        reply: see `ScriptedServer`.
        fault: see `ScriptedServer`; its status becomes that of the request's line.
        ends: the status with which a batch ends, by its number from 0.
        answers: how many of the requests of a batch that does not complete are answered.
        before: called with method and path of each request to the batch API; may give another answer.
        room: requests that may be open at a time; a batch beyond them fails.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        fault: Callable[[dict[str, Any]], Fault | None] = lambda body: None,
        ends: Callable[[int], str] = lambda number: "completed",
        answers: int = 0,
        before: Callable[[str, str], Answer | None] = lambda method, path: None,
        room: int = 10**9,
        **more: Any,
    ) -> None:
        super().__init__(reply, fault=fault, **more)
        self.ends, self.answers, self.before, self.room = ends, answers, before, room
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    def route(self, method: str, path: str, data: bytes, headers: Mapping[str, str]) -> Answer:
        path, _, query = path.partition("?")
        parts = path.split("/")[2:]
        if parts[0] not in ("files", "batches"):
            return super().route(method, path, data, headers)
        if (other := self.before(method, path)) is not None:
            return other
        with self.lock:
            if parts == ["files"]:
                return self.upload(data, headers), 200, {}
            if parts[0] == "files":
                return self.files[parts[1]], 200, {}
            if method == "POST":
                return self.create(json.loads(data)), 200, {}
            if len(parts) == 1:
                return self.page(query), 200, {}
        return self.look(parts[1]), 200, {}

    def upload(self, data: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        form = message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + data)
        fields = {
            str(part.get_param("name", header="content-disposition")): part for part in form.get_payload()
        }
        assert fields["purpose"].get_payload(decode=True) == b"batch"
        return self.keep(fields["file"].get_payload(decode=True))

    def keep(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return {
            "id": name, "object": "file", "bytes": len(content), "created_at": int(time.time()),
            "filename": "x.jsonl", "purpose": "batch", "status": "processed",
        }  # fmt: skip

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"batch-{len(self.batches)}"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert all(set(line) == {"custom_id", "method", "url", "body"} for line in lines)
        assert len({line["custom_id"] for line in lines}) == len(lines)
        assert {line["url"] for line in lines} == {body["endpoint"]} and len(lines) <= 50_000
        assert len({line["body"]["model"] for line in lines}) == 1
        count = {"total": len(lines), "completed": 0, "failed": 0}
        batch = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"], "status": "in_progress", "created_at": int(time.time()),
            "request_counts": count,
        }  # fmt: skip
        open_requests = sum(
            b["request_counts"]["total"] for b in self.batches.values() if b["status"] == "in_progress"
        )
        if open_requests + len(lines) > self.room:
            error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
        self.batches[name] = batch
        return batch

    def page(self, query: str) -> dict[str, Any]:
        newest = [*self.batches.values()][::-1]
        start = 0
        if "after=" in query:
            after = query.partition("after=")[2].partition("&")[0]
            start = next(i for i, b in enumerate(newest) if b["id"] == after) + 1
        page = newest[start : start + 2]  # short pages, so that there are several
        return {"object": "list", "data": page, "has_more": start + 2 < len(newest)}

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        if batch["status"] != "in_progress":
            return batch
        if not batch["request_counts"]["completed"]:
            batch["request_counts"]["completed"] = 1  # at the first look
            return dict(batch)
        end = self.ends(int(name.partition("-")[2]))
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        if end == "failed":
            error = {"code": "invalid_json_line", "message": "line 1 is not JSON", "line": 1}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
            return batch
        done = lines if end == "completed" else lines[: self.answers]
        output, errors = [], []
        for line in reversed(done):  # in another order than they were sent
            content, status, _ = self.answer(line["body"])
            response = {"status_code": status, "request_id": "r", "body": content}
            result = {"id": "x", "custom_id": line["custom_id"], "response": response, "error": None}
            (output if status == 200 else errors).append(result)
        if end == "expired":
            error = {"code": "batch_expired", "message": "This request could not be executed in time."}
            errors += [
                {"id": "x", "custom_id": line["custom_id"], "response": None, "error": error}
                for line in lines[self.answers :]
            ]
        with self.lock:
            for field, results in (("output_file_id", output), ("error_file_id", errors)):
                if results:
                    content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results).encode()
                    batch[field] = self.keep(content)["id"]
            batch["request_counts"] = {
                "total": len(lines), "completed": len(output), "failed": len(lines) - len(output)
            }  # fmt: skip
            batch["status"] = end
        return batch
