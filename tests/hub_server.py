"""A small Hub on the loopback interface, so that pushing and pulling are tested with the real clients and no network.

It keeps repositories in memory: blobs by their sha256, commits as tables path -> blob, branches and tags as names of
commits. It answers what huggingface_hub 2.4 asks for: whoami, create / delete repository, preupload, LFS batch,
upload, verify, commit, info, tree, paths-info, commits, refs, tags, branches and file downloads with ranges.

    with HubServer() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.env)      # real clients, in another process
        HfApi(endpoint=hub.endpoint, token=hub.token).list_models()   # or in this one

`hub.drop("PUT")` and `hub.drop("commit")` cut the connection in the middle of an upload. A wrong token gets 401 and a
missing repository 404 with `X-Error-Code: RepoNotFound`, as on the real Hub.
"""

import base64
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz", ".h5", ".parquet", ".arrow", ".model", ".msgpack", ".zip")
LFS_SIZE = 10 * 1024 * 1024
GIT_ATTRIBUTES = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in LFS_SUFFIXES)


class HubError(Exception):
    """An answer other than 200: status, message and the code that the client turns into its own exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Entry:
    """One file of a commit: the sha256 of its bytes, its size, and whether it went through LFS."""

    sha256: str
    git_oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Commit:
    oid: str
    title: str
    message: str
    date: str
    files: dict[str, Entry]
    parent: str | None


@dataclass
class Repository:
    """Commits by id, branches and tags by name."""

    kind: str
    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit:
        revision = {"HEAD": "main"}.get(revision, revision)
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        commit: Commit | None = self.commit(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def append(self, branch: str, title: str, message: str, files: dict[str, Entry]) -> Commit:
        parent = self.branches.get(branch)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        seed = json.dumps([self.kind, self.name, branch, parent, title, len(self.commits), sorted(files)])
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, message, date, files, parent)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


class HubServer:
    """The server and its state. A context manager; starts on a free port of 127.0.0.1.

    Attributes:
        endpoint: `http://127.0.0.1:PORT`.
        token: the token that may write, as user `user`.
        env: environment for a client process: this one's, with every HF setting replaced by those of this server.
        requests: (method, path) of every request, in order of arrival.
    """

    user = "user"
    token = "hf_loopback"

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._drops: dict[str, int] = {}

    def __enter__(self) -> "HubServer":
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
        }
        self.env = kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(Path(self._folder.name) / "hf_home"),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for connection in self.connections:  # those that a client keeps open for its next request
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._folder.cleanup()

    def drop(self, stage: str, times: int = 10**6) -> None:
        """Cut the connection of the next `times` uploads at `stage`: "PUT" (half the bytes read) or "commit" (all).

        The client sees a closed connection and the repository keeps its revision. `times=0` heals the server.
        """
        if stage not in ("PUT", "commit"):
            raise ValueError(f"HubServer.drop: stage must be 'PUT' or 'commit', got {stage!r}.")
        self._drops[stage] = times

    def takes_drop(self, stage: str) -> bool:
        with self.lock:
            left = self._drops.get(stage, 0)
            self._drops[stage] = max(0, left - 1)
            return left > 0

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Contents of one revision, for a test to look at without a client."""
        with self.lock:
            commit = self.repositories[kind, name].commit(revision)
            return {path: self.blobs[entry.sha256] for path, entry in commit.files.items()}

    def store(self, content: bytes, lfs: bool) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Entry(sha256, git_oid, len(content), lfs)


_REPO = r"(?P<name>[^/]+/[^/]+)"
_API = r"/api/(?P<kind>model|dataset|space)s/" + _REPO
_PREFIX = r"/(?:(?P<prefix>dataset|space)s/)?" + _REPO
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/(?P<kind>model|dataset|space)s", "list_repositories"),
    ("GET", _API, "info"),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", "info"),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("GET", _API + r"/commits/(?P<revision>[^/]+)", "commits"),
    ("GET", _API + r"/refs", "refs"),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", _API + r"/tag/(?P<revision>[^/]+)", "tag"),
    ("DELETE", _API + r"/tag/(?P<revision>[^/]+)", "delete_tag"),
    ("POST", _API + r"/branch/(?P<revision>[^/]+)", "branch"),
    ("DELETE", _API + r"/branch/(?P<revision>[^/]+)", "delete_branch"),
    ("POST", _PREFIX + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", _PREFIX + r"/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
]
_ROUTES = [(method, re.compile(pattern), action) for method, pattern, action in _ROUTES]
_OPEN = {"info", "tree", "commits", "refs", "paths_info", "download", "list_repositories", "validate_yaml"}


class _Handler(BaseHTTPRequestHandler):
    """One connection. Every `do_*` method below answers one row of the table above with a JSON body."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.hub.requests.append((self.command, url.path))
        try:
            action, self.match = self.route(url.path)
            if action == "lfs_put" and self.hub.takes_drop("PUT"):
                self.rfile.read(max(1, int(self.headers.get("Content-Length", 2)) // 2))
                return self.cut()
            self.body = self.read_body()
            if action == "commit" and self.hub.takes_drop("commit"):
                return self.cut()
            with self.hub.lock:
                if action != "lfs_put":  # the upload address itself is the permission, as on the real Hub
                    self.check_token(needed=action not in _OPEN)
                result = getattr(self, "do_" + action)()
            if result is not None:
                self.send_json(200, result)
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.send_json(error.status, {"error": error.message} | error.body, headers)

    def route(self, path: str) -> tuple[str, dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, action in _ROUTES:
            found = pattern.fullmatch(path)
            if found and wanted == method:
                return action, {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
        self.read_body()
        raise HubError(404, "Repository not found" if path.startswith("/api/") else "Not found", "RepoNotFound")

    def check_token(self, needed: bool) -> None:
        given = self.headers.get("Authorization")
        if given is None and needed:
            raise HubError(401, "Invalid username or password.")
        if given is not None and given != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------ state

    @property
    def kind(self) -> str:
        return self.match.get("kind") or self.match.get("prefix") or "model"

    @property
    def revision(self) -> str:
        return self.match.get("revision", "main")

    def repository(self) -> Repository:
        found = self.hub.repositories.get((self.kind, self.match["name"]))
        if found is None or (found.private and self.headers.get("Authorization") is None):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return found

    def json_body(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    # ------------------------------------------------------- account, repositories

    def do_whoami(self) -> dict[str, Any]:
        auth = {"accessToken": {"displayName": "loopback", "role": "write"}}
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": auth}

    def named_in_body(self) -> tuple[str, str]:
        body = self.json_body()
        return body.get("type") or "model", f"{body.get('organization') or self.hub.user}/{body['name']}"

    def do_create(self) -> dict[str, Any]:
        kind, name = self.named_in_body()
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.endpoint}/{prefix}{name}"
        if (kind, name) in self.hub.repositories:
            raise HubError(409, "You already created this repo", url=url)
        repository = Repository(kind, name, bool(self.json_body().get("private")))
        repository.append("main", "initial commit", "", {".gitattributes": self.hub.store(GIT_ATTRIBUTES, lfs=False)})
        self.hub.repositories[kind, name] = repository
        return {"url": url, "name": name}

    def do_delete(self) -> dict[str, Any]:
        if self.hub.repositories.pop(self.named_in_body(), None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return {}

    def do_validate_yaml(self) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def do_list_repositories(self) -> list[dict[str, Any]]:
        search, author = self.query.get("search", ""), self.query.get("author")
        return [
            self.describe(repository, repository.commit("main"))
            for repository in self.hub.repositories.values()
            if repository.kind == self.kind
            and search in repository.name
            and author in (None, repository.name.split("/")[0])
        ]

    def describe(self, repository: Repository, commit: Commit) -> dict[str, Any]:
        first = next(iter(repository.commits.values()))
        return {
            "_id": hashlib.sha1(repository.name.encode()).hexdigest()[:24],
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.oid,
            "createdAt": first.date,
            "lastModified": commit.date,
            "private": repository.private,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    # ------------------------------------------------------------------ reading

    def do_info(self) -> dict[str, Any]:
        repository = self.repository()
        return self.describe(repository, repository.commit(self.revision))

    def listed(self, path: str, entry: Entry) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.git_oid}
        if entry.lfs:
            row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
        return row

    def listing(self, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
        start = f"{folder}/" if folder else ""
        rows: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(commit.files.items()):
            if not path.startswith(start):
                continue
            parts = path[len(start) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                inner = start + "/".join(parts[:depth])
                oid = hashlib.sha1(f"{commit.oid}/{inner}".encode()).hexdigest()
                rows.setdefault(inner, {"type": "directory", "path": inner, "size": 0, "oid": oid})
            if recursive or len(parts) == 1:
                rows[path] = self.listed(path, entry)
        return list(rows.values())

    def do_tree(self) -> list[dict[str, Any]]:
        commit = self.repository().commit(self.revision)
        folder = self.match.get("path", "").strip("/")
        rows = self.listing(commit, folder, self.query.get("recursive", "").lower() in ("1", "true"))
        if folder and not rows:
            raise HubError(404, f"{folder} does not exist on {self.revision!r}", "EntryNotFound")
        return rows

    def do_paths_info(self) -> list[dict[str, Any]]:
        commit = self.repository().commit(self.revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = self.json_body()["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        everything = {row["path"]: row for row in self.listing(commit, "", recursive=True)}
        return [everything[path.strip("/")] for path in paths if path.strip("/") in everything]

    def do_commits(self) -> list[dict[str, Any]]:
        history = self.repository().history(self.revision)
        authors = [{"user": self.hub.user}]
        return [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": authors,
            }
            for commit in history
        ]

    def do_refs(self) -> dict[str, Any]:
        def rows(folder: str, table: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in table.items()]

        repository = self.repository()
        return {"branches": rows("heads", repository.branches), "tags": rows("tags", repository.tags), "converts": []}

    def do_download(self) -> None:
        commit = self.repository().commit(self.revision)
        path = self.match["path"]
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist on {self.revision!r}", "EntryNotFound")
        entry = commit.files[path]
        content = self.hub.blobs[entry.sha256]
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{entry.etag}"',
            "X-Linked-Etag": f'"{entry.etag}"',
            "X-Linked-Size": str(entry.size),
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(200, content, headers)
        start, stop = int(asked[1]), min(int(asked[2] or entry.size) + 1, entry.size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
        self.send(206, content[start:stop], headers)

    # ------------------------------------------------------------------ writing

    def do_preupload(self) -> dict[str, Any]:
        existing = self.repository().commit(self.revision).files
        rows = []
        for file in self.json_body()["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            known = existing.get(file["path"])
            rows.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": known.etag if known else None,
                }
            )
        return {"files": rows}

    def do_lfs_batch(self) -> dict[str, Any]:
        self.repository()
        rows = []
        for item in self.json_body()["objects"]:
            href = f"{self.hub.endpoint}/lfs/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": href + "/verify"}}
            rows.append(item if item["oid"] in self.hub.blobs else item | {"actions": actions})
        return {"transfer": "basic", "objects": rows}

    def do_lfs_put(self) -> dict[str, Any]:
        if hashlib.sha256(self.body).hexdigest() != self.match["oid"]:
            raise HubError(400, "The content does not have this hash")
        self.hub.store(self.body, lfs=True)
        return {}

    def do_lfs_verify(self) -> dict[str, Any]:
        if len(self.hub.blobs.get(self.match["oid"], b"")) != self.json_body()["size"]:
            raise HubError(404, "Object not found or of another size")
        return {}

    def do_commit(self) -> dict[str, Any]:
        repository = self.repository()
        if self.revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {self.revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repository.branches[self.revision]
        if header.get("parentCommit") not in (None, parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent].files)
        for line in lines:
            self.apply(files, line["key"], line["value"])
        commit = repository.append(self.revision, header["summary"], header.get("description", ""), files)
        prefix = "" if repository.kind == "model" else f"{repository.kind}s/"
        url = f"{self.hub.endpoint}/{prefix}{repository.name}/commit/{commit.oid}"
        return {"success": True, "commitUrl": url, "commitOid": commit.oid}

    def apply(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "").strip("/")
        if key == "file":
            files[path] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise HubError(400, f"The LFS object {value['oid']} was never uploaded")
            files[path] = self.hub.store(self.hub.blobs[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            for inside in [name for name in files if name.startswith(path + "/")]:
                del files[inside]
        elif key != "header":
            raise HubError(400, f"Unknown commit line {key!r}")

    def do_tag(self) -> dict[str, Any]:
        repository, name = self.repository(), self.json_body()["tag"]
        if name in repository.tags:
            raise HubError(409, f"Tag {name} exists already")
        repository.tags[name] = repository.commit(self.revision).oid
        return {}

    def do_delete_tag(self) -> dict[str, Any]:
        if self.repository().tags.pop(self.revision, None) is None:
            raise HubError(404, f"Invalid rev id: {self.revision}", "RevisionNotFound")
        return {}

    def do_branch(self) -> dict[str, Any]:
        repository = self.repository()
        if self.revision in repository.branches:
            raise HubError(409, f"Branch {self.revision} exists already")
        start = self.json_body().get("startingPoint") or "main"
        repository.branches[self.revision] = repository.commit(start).oid
        return {}

    def do_delete_branch(self) -> dict[str, Any]:
        if self.repository().branches.pop(self.revision, None) is None:
            raise HubError(404, f"Invalid rev id: {self.revision}", "RevisionNotFound")
        return {}


@pytest.fixture(name="hub")
def hub_fixture() -> Iterator[HubServer]:
    """A fresh, empty Hub; `hub.endpoint`, `hub.env`, `hub.token`."""
    with HubServer() as server:
        yield server
