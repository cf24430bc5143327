"""What tests need to know of Weights & Biases: a server that remembers, and what is in a run's file."""

import json
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wandb.proto import wandb_internal_pb2

BLOCK = 32768  # of LevelDB's log format, in which a run's file is written


class WandbServer(ThreadingHTTPServer):
    """Takes runs over HTTP as wandb's server does, as far as a run's start, rows, summary and end go.

    ``runs`` holds by id what was uploaded: ``history`` (rows in order), ``summary``, ``settings`` (the last
    mutation's variables), ``exit`` and ``resumed`` (how often). A client that does not ask whether the run
    can be resumed writes it from its first line on, as wandb's documentation says of an id used again.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """Clients hang up when a run ends."""

    def stop(self):
        self.shutdown()
        self.server_close()

    def answer(self, operation, variables):
        name = variables.get("name") or variables.get("run")
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        if operation == "UpsertBucket":
            run = self.runs.setdefault(name, {"history": [], "summary": {}, "exit": None, "resumed": 0})
            run["settings"] = {k: v for k, v in variables.items() if v is not None} | run.get("settings", {})
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": name, "displayName": name, "description": None, "config": "{}",
                      "sweepName": None, "project": project}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": not run["history"]}}
        if operation == "RunResumeStatus":
            run = self.runs.get(name)
            if run is None:
                return {"model": None}
            run["resumed"] += 1
            bucket = {"id": "b", "name": name, "summaryMetrics": json.dumps(run["summary"]),
                      "displayName": name, "logLineCount": 0, "historyLineCount": len(run["history"]),
                      "eventsLineCount": 0, "historyTail": json.dumps(
                          [json.dumps(row) for row in run["history"][-1:]]),
                      "eventsTail": "[]", "config": "{}", "tags": [], "notes": None,
                      "wandbConfig": '{"t": 1}'}  # fmt: skip
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/storage/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":  # as if the server had its files
            artifact = {
                "id": "a",
                "state": "COMMITTED",
                "artifactSequence": {"id": "s", "latestArtifact": None},
            }
            return {"createArtifact": {"artifact": artifact}}
        return None

    def take(self, run, files, exit_code):
        for name, chunk in files.items():
            rows = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":  # a client says at which line its rows begin
                run["history"][chunk["offset"] : chunk["offset"] + len(rows)] = rows
            elif name == "wandb-summary.json":
                run["summary"] = rows[-1]
        run["exit"] = exit_code if exit_code is not None else run["exit"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """No noise."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = {}
        if self.path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            data = self.server.answer(operation, request.get("variables") or {})
            answer = {"errors": [{"message": "not here"}]} if data is None else {"data": data}
        elif self.path.endswith("/file_stream"):
            content = json.loads(body)
            run = self.server.runs[self.path.split("/")[-2]]
            self.server.take(run, content.get("files") or {}, content.get("exitcode"))
        self.reply(answer)

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply({})

    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class RunFile:
    """What is in a ``.wandb`` file: ``history`` (rows), ``metrics`` (definitions), ``summary``, ``config``,
    ``run`` and ``artifacts``."""

    def __init__(self, path):
        self.history, self.metrics, self.summary, self.artifacts, self.run = [], {}, {}, [], None
        self.config = {}
        for record in _records(path.read_bytes()):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append(_nested(record.history.item))
            elif kind == "summary":
                _merge(self.summary, record.summary.update)
            elif kind == "metric":
                self.metrics[record.metric.name] = record.metric
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "run":
                self.run = record.run
                _merge(self.config, record.run.config.update)
            elif kind == "config":
                _merge(self.config, record.config.update)

    def values(self):
        """(step, metric) -> value of all numbers that were logged."""
        return numbers(self.history)


def numbers(history):
    """(step, metric) -> value; each is there once."""
    found = {}
    for row in history:
        for name, value in row.items():
            if isinstance(value, int | float) and not name.startswith("_"):
                assert (row["_step"], name) not in found
                found[row["_step"], name] = value
    return found


def _nested(items):
    row = {}
    _merge(row, items)
    return row


def _merge(row, items):
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        target = row
        for part in path:
            target = target.setdefault(part, {})
        target[last] = json.loads(item.value_json)


def _records(content):
    assert content[:4] == b":W&B"
    position, part = 7, b""
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record
