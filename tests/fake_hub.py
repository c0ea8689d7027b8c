"""A local stand-in of the Hub's HTTP API, and of a mirror: honest unless told otherwise."""

import asyncio
import base64
import hashlib
import json
import threading
import time

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse


def git_digest(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub:
    """Repositories in memory: name -> commit -> files. `lies` changes what is served; `asked` is what was asked for."""

    def __init__(self):
        self.repositories, self.branches = {}, {}
        self.lies, self.asked, self.mirror, self.large = {}, [], {}, {"adapter_model.safetensors"}
        self.app = FastAPI()
        self._routes()

    def commit(self, name, files, branch="main"):
        digest = hashlib.sha1(
            json.dumps({k: git_digest(v) for k, v in files.items()}, sort_keys=True).encode()
        ).hexdigest()
        self.repositories.setdefault(name, {})[digest] = dict(files)
        self.branches[name, branch] = digest
        return digest

    def resolved(self, name, revision):
        commit = self.branches.get((name, revision), revision)
        return commit if commit in self.repositories.get(name, {}) else None

    def served(self, data, request):
        """A body by Range, cut or changed where a lie says so."""
        if self.lies.get("body"):
            data = self.lies["body"](data)
        begin, headers, status = 0, {}, 200
        if (asked := request.headers.get("range")) and not self.lies.get("no range"):
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
            headers, status = {"content-range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}, 206
        body = data[begin:]
        if "status" in self.lies:
            return Response(status_code=self.lies["status"])
        if "drip" in self.lies:
            return StreamingResponse(_dripping(body, self.lies["drip"]), status, headers)
        if cut := self.lies.pop("cut once", None) or self.lies.get("cut"):
            return Cut(body, cut, status, headers)
        return Response(body, status, {**headers, **self.lies.get("headers", {})}, "application/octet-stream")

    def _routes(self):
        app = self.app

        @app.middleware("http")
        async def note(request: Request, call_next):
            headers = request.headers
            self.asked.append((request.method, request.url.path, headers.get("range"), headers.get("authorization")))
            return await call_next(request)

        @app.get("/api/models/{owner}/{name}/revision/{revision:path}")
        def info(owner: str, name: str, revision: str):
            commit = self.resolved(f"{owner}/{name}", revision)
            if commit is None:
                return JSONResponse({"error": "not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = []
            for file, data in self.repositories[f"{owner}/{name}"][commit].items():
                entry = {"rfilename": file, "size": len(data), "blobId": git_digest(data)}
                if file in self.large:
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
                siblings.append(entry)
            answer = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
            return self.lies["info"](answer) if "info" in self.lies else answer

        @app.get("/{owner}/{name}/resolve/{commit}/{file}")
        def resolve(owner: str, name: str, commit: str, file: str, request: Request):
            found = self.resolved(f"{owner}/{name}", commit)
            data = self.repositories.get(f"{owner}/{name}", {}).get(found, {}).get(file)
            if data is None:
                return Response(status_code=404)
            if "redirect" in self.lies:
                return RedirectResponse(self.lies["redirect"], 302)
            if file in self.large:
                return RedirectResponse(f"/cdn/{owner}/{name}/{found}/{file}", 302)
            return self.served(data, request)

        @app.get("/cdn/{owner}/{name}/{commit}/{file}")
        def cdn(owner: str, name: str, commit: str, file: str, request: Request):
            return self.served(self.repositories[f"{owner}/{name}"][commit][file], request)

        @app.get("/mirror/{file}")
        def mirror(file: str, request: Request):
            if "redirect" in self.lies:
                return Response(status_code=302, headers={"location": self.lies["redirect"]})
            return self.served(self.mirror[file], request) if file in self.mirror else Response(status_code=404)

        @app.post("/api/repos/create")
        async def create(request: Request):
            body = await request.json()
            name = f"{body.get('organization') or 'me'}/{body['name']}"
            self.private = body.get("private") or body.get("visibility") == "private"
            self.commit(name, {})
            return {"url": f"/{name}", "name": name, "id": name}

        @app.post("/api/validate-yaml")
        async def validate(request: Request):
            self.validated = await request.json()
            return {"errors": [], "warnings": []}

        @app.post("/api/models/{owner}/{name}/preupload/{revision}")
        async def preupload(owner: str, name: str, revision: str, request: Request):
            files = (await request.json())["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}

        @app.post("/api/models/{owner}/{name}/commit/{revision}")
        async def commit(owner: str, name: str, revision: str, request: Request):
            lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
            files = dict(self.repositories[f"{owner}/{name}"][self.branches[f"{owner}/{name}", revision]])
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = self.commit(f"{owner}/{name}", files, revision)
            return {"success": True, "commitOid": oid, "commitUrl": f"{request.base_url}{owner}/{name}/commit/{oid}"}


async def _dripping(body, seconds):
    """A byte now and then."""
    for byte in body:
        yield bytes([byte])
        await asyncio.sleep(seconds)


class Cut(Response):
    """Promises a whole body, sends the beginning, and closes."""

    def __init__(self, body, cut, status, headers):
        super().__init__(body, status, headers, "application/octet-stream")
        self.cut = cut

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: self.cut], "more_body": True})
        raise ConnectionError("cut")


class Running:
    """The stand-in on a free port, in a thread."""

    def __init__(self):
        self.hub = Hub()
        config = uvicorn.Config(self.hub.app, port=0, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(5)
