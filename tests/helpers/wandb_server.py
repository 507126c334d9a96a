"""A W&B server for the tests: on the loopback interface, in memory, with the responses that the real client needs.

GraphQL (`Viewer`, `UpsertBucket`, `RunResumeStatus`, `CreateRunFiles`, `Runs`, `Run`, `RunHistoryKeys`,
`RunParquetHistory`, `HistoryPage`, the artifact mutations ...) and `/files/<entity>/<project>/<run>/file_stream`. It keeps
what arrives as W&B does: history lines at their offsets, config and summary as JSON, one run per name.

    with WandbServer() as server:
        server.use(monkeypatch)
        ...
        server.run("sweep-run_id").history
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
KEY = "k" * 40


@dataclass
class StoredRun:
    """One run on the server."""

    name: str
    project: str
    group: str | None = None
    job_type: str | None = None
    display_name: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    """History lines by their offset."""
    complete: bool = False
    exit_code: int | None = None
    inits: int = 0
    """How often a client has opened it."""
    artifacts: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return base64.b64encode(f"Run:v1:{self.name}:{self.project}:{ENTITY}".encode()).decode()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The history's rows in order."""
        return [json.loads(self.lines[i]) for i in sorted(self.lines)]

    @property
    def plain_config(self) -> dict[str, Any]:
        return {k: v["value"] for k, v in self.config.items() if k != "_wandb"}


class WandbServer:
    """See the module. `failing` decides what goes wrong: None, "key" (401), "quota" (HTTP 403 on every upload),
    "error" (HTTP 500) or "hang" (never responds)."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], StoredRun] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.failing: str | None = None
        self.lose_history_above: int | None = None
        """Pages of the history end below this step, to simulate a server that returns less than it has."""
        self._lock = threading.RLock()
        self._open = threading.Event()
        handler = type("Bound", (_Handler,), {"store": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.set()
        self._http.shutdown()
        self._http.server_close()

    def environment(self) -> dict[str, str]:
        """The variables that point a client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def use(self, monkeypatch: Any) -> None:
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)

    def run(self, name: str, project: str = "scaling_lab") -> StoredRun:
        return self.runs[project, name]

    # -- requests
    def graphql(self, query: str, v: dict[str, Any]) -> dict[str, Any]:
        name = operation(query)
        with self._lock:
            self.operations.append(name)
            if self.failing == "quota" and query.lstrip().startswith("mutation"):
                raise Refused(403, "storage quota exceeded")
            answer = getattr(self, f"_{name}", None)
            if answer is None:
                self.unknown.append(query)
                return {}
            return answer(v)

    def stream(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One post to .../file_stream."""
        *_, project, name, _ = path.strip("/").split("/")
        with self._lock:
            run = self._run(project, name)
            for file, part in (body.get("files") or {}).items():
                if file == "wandb-history.jsonl":
                    for i, line in enumerate(part["content"]):
                        run.lines[part["offset"] + i] = line
                elif file == "wandb-summary.json" and part["content"]:
                    run.summary = json.loads(part["content"][-1])
            if body.get("complete"):
                run.complete, run.exit_code = True, body.get("exitcode")
        return {"limits": {}}

    def fail(self) -> None:
        """Fail a request as `failing` says."""
        if self.failing == "hang":
            self._open.wait(600)
        if self.failing == "key":
            raise Refused(401, "invalid API key")
        if self.failing == "error":
            raise Refused(500, "something broke")

    def _run(self, project: str, name: str) -> StoredRun:
        return self.runs.setdefault((project, name), StoredRun(name, project))

    # -- what the SDK requests during a run
    def _Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": ENTITY,
                "name": ENTITY,
                "email": "",
                "admin": False,
                "flags": "{}",
                "deletedAt": None,
                "apiKeys": {"edges": []},
                "teams": {"edges": [{"node": {"name": ENTITY}}]},
            }
        }

    _GetDefaultEntity = _Viewer

    def _RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get((v["project"], v["name"]))
        bucket = None
        if run is not None:
            tail = [run.lines[i] for i in sorted(run.lines)][-1:]
            bucket = {
                "id": run.id,
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.display_name,
                "logLineCount": 0,
                "historyLineCount": len(run.lines),
                "eventsLineCount": 0,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": run.tags,
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": {"id": "p", "name": v["project"], "entity": _ENTITY_NODE, "bucket": bucket}}

    def _UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        new = (v["project"], v["name"]) not in self.runs
        run = self._run(v["project"], v["name"])
        run.inits += v.get("groupName") is not None or v.get("jobType") is not None
        if v.get("config"):
            run.config = json.loads(v["config"])
        for ours, theirs in (
            ("group", "groupName"),
            ("job_type", "jobType"),
            ("display_name", "displayName"),
        ):
            if v.get(theirs):
                setattr(run, ours, v[theirs])
        if v.get("tags"):
            run.tags = v["tags"]
        if v.get("summaryMetrics"):
            run.summary = json.loads(v["summaryMetrics"])
        bucket = {
            "id": run.id,
            "name": run.name,
            "displayName": run.display_name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": "p", "name": run.project, "entity": _ENTITY_NODE},
            "historyLineCount": len(run.lines),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": f, "uploadUrl": f"{self.url}/upload/{v['project']}/{v['run']}/{f}"} for f in v["files"]
        ]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    # -- what the public API requests
    def _node(self, run: StoredRun) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for row in run.history:
            for key in row:
                counts[key] = counts.get(key, 0) + 1
        last = max((row["_step"] for row in run.history), default=-1)
        keys = {k: {"typeCounts": [{"type": "number", "count": n}]} for k, n in counts.items()}
        return {
            "id": run.id,
            "projectId": "1",
            "tags": run.tags,
            "name": run.name,
            "displayName": run.display_name or run.name,
            "sweepName": None,
            "state": ("finished" if run.exit_code == 0 else "failed") if run.complete else "running",
            "config": json.dumps(run.config),
            "group": run.group,
            "jobType": run.job_type,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "heartbeatAt": "2026-01-01T00:00:00Z",
            "description": None,
            "notes": None,
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.lines),
            "user": {"name": ENTITY, "username": ENTITY},
            "historyKeys": {"keys": keys, "lastStep": last, "sets": []},
        }

    def _Runs(self, v: dict[str, Any]) -> dict[str, Any]:
        """A page of a project's runs; supports the filters that this project's code sends."""
        found = [r for (project, _), r in sorted(self.runs.items()) if project == v["project"]]
        if not found:
            return {"project": None}
        fields = {"group": "group", "jobType": "job_type", "displayName": "display_name", "name": "name"}
        for key, wanted in json.loads(v.get("filters") or "{}").items():
            if key == "tags":
                found = [r for r in found if set(r.tags) & set(wanted["$in"])]
            elif key == "state":
                found = [r for r in found if self._node(r)["state"] == wanted]
            else:
                found = [r for r in found if getattr(r, fields[key]) == wanted]
        start, size = int(v.get("cursor") or 0), v.get("perPage") or 50
        page = found[start : start + size]
        edges = [{"node": self._node(r), "cursor": str(start + i + 1)} for i, r in enumerate(page)]
        more = start + size < len(found)
        return {
            "project": {
                "internalId": "1",
                "runCount": len(found),
                "readOnly": False,
                "runs": {
                    "edges": edges,
                    "pageInfo": {"endCursor": str(start + len(page)), "hasNextPage": more},
                },
            }
        }

    def _Run(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get((v["project"], v["name"]))
        return {"project": {"run": None if run is None else self._node(run)}}

    _RunHistoryKeys = _LightRun = _Run

    def _RunParquetHistory(self, v: dict[str, Any]) -> dict[str, Any]:
        live = self.runs[v["project"], v["runName"]].history
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": live}}}}

    def _HistoryPage(self, v: dict[str, Any]) -> dict[str, Any]:
        rows = self._rows(v, v["minStep"], v["maxStep"])
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}

    def _SampledHistoryPage(self, v: dict[str, Any]) -> dict[str, Any]:
        spec = json.loads(v["spec"])
        keys = spec["keys"]
        # (Here the last step counts too; in HistoryPage it does not. The client asks accordingly.)
        rows = self._rows(v, spec["minStep"], spec["maxStep"] + 1)
        rows = [r for r in rows if all(k in r for k in keys)]
        return {"project": {"run": {"sampledHistory": [[{k: r[k] for k in keys} for r in rows]]}}}

    def _rows(self, v: dict[str, Any], first: int, end: int) -> list[dict[str, Any]]:
        above = self.lose_history_above
        end = end if above is None else min(end, above)
        return [r for r in self.runs[v["project"], v["run"]].history if first <= r["_step"] < end]

    def _OrganizationCoreWeaveOrganizationID(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertView2(self, v: dict[str, Any]) -> dict[str, Any]:
        self.views.append(v)
        return {"upsertView": {"view": {"id": "v", "name": v["name"]}, "inserted": True}}

    # -- artifacts
    def _ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        key = str(len(self.artifacts))
        self.artifacts[key] = {"input": v, "files": {}}
        name = v.get("artifactCollectionName")
        if v.get("runName"):
            self._run(v["projectName"], v["runName"]).artifacts.append(name)
        return {
            "createArtifact": {
                "artifact": {
                    "id": key,
                    "state": "PENDING",
                    "artifactSequence": {"id": "s", "latestArtifact": None},
                }
            }
        }

    def _CreateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        key = v.get("artifactID") or v.get("artifactId")
        url = f"{self.url}/upload/artifact/{key}/manifest"
        return {
            "createArtifactManifest": {
                "artifactManifest": {
                    "id": f"m{key}",
                    "file": {
                        "id": "f",
                        "name": "wandb_manifest.json",
                        "displayName": "m",
                        "uploadUrl": url,
                        "uploadHeaders": [],
                    },
                }
            }
        }

    def _UpdateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        made = self._CreateArtifactManifest({"artifactID": str(v["artifactManifestID"])[1:]})
        return {"updateArtifactManifest": made["createArtifactManifest"]}

    def _CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in v.get("artifactFiles") or v["input"]["artifactFiles"]:
            self.artifacts[spec["artifactID"]]["files"][spec["name"]] = None
            url = f"{self.url}/upload/artifact/{spec['artifactID']}/{spec['name']}"
            node = {
                "id": spec["name"],
                "name": spec["name"],
                "displayName": spec["name"],
                "uploadUrl": url,
                "uploadHeaders": [],
                "storagePath": spec["name"],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}


class Refused(Exception):
    """An HTTP status other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_ENTITY_NODE = {"id": "e", "name": ENTITY}


def operation(query: str) -> str:
    """The name of a GraphQL operation."""
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return found[1] if found else "?"


class _Handler(BaseHTTPRequestHandler):
    store: WandbServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # clients that end leave open connections
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(lambda: self._post(json.loads(body)))

    def do_PUT(self) -> None:
        self.store.files[self.path] = self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(dict)

    def do_GET(self) -> None:
        data = self.store.files.get(self.path)
        self._send(200 if data is not None else 404, data or b"")

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.path.endswith("/graphql"):
            return {"data": self.store.graphql(body["query"], body.get("variables") or {})}
        if self.path.endswith("/file_stream"):
            if self.store.failing == "quota":
                raise Refused(403, "storage quota exceeded")
            return self.store.stream(self.path, body)
        raise Refused(404, self.path)

    def _answer(self, make: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                self.store.fail()
                self._send(200, json.dumps(make()).encode())
            except Refused as error:
                text = json.dumps({"errors": [{"message": str(error)}], "error": str(error)})
                self._send(error.status, text.encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    with WandbServer() as standing:
        print(standing.url, flush=True)
        while True:
            time.sleep(60)
