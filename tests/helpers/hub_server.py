"""A Hub in memory: as much of its HTTP protocol as huggingface_hub needs to make, fill, list and read a repository.

Files of weights take the way of large files: preupload, LFS batch, upload, verification, and a redirect on download.
"""

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_of_the_tests"
LARGE = (".safetensors", ".bin")
# The port of all servers, of which there is one at a time: clients have read the address before a server starts.
RESERVED = socket.socket()
RESERVED.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
RESERVED.bind(("127.0.0.1", 0))
PORT = RESERVED.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves at `URL` until the end of the block; `unknown` holds what it did not understand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", PORT), Handler)
        self.url = URL
        # large files lie on another host than the Hub; to huggingface_hub, another name of this one is another host
        self.storage_url = f"http://localhost:{PORT}"
        self.repos: dict[str, list[dict[str, bytes]]] = {}  # the files of every commit, oldest first
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.unknown: list[str] = []
        self.private = False  # whether reading needs the token, too
        self.gated: set[str] = set()  # repositories whose files need the token, while their list is for everybody
        self.requests: list[str] = []

    def fill(self, repo: str, *commits: dict[str, bytes]) -> None:
        """Makes a repository with these commits, oldest first."""
        self.repos[repo] = list(commits)
        for files in commits:
            self.large.update({sha256(content): content for path, content in files.items() if path.endswith(LARGE)})

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()


class Problem(Exception):
    """An answer that is not 200: status and the code that huggingface_hub turns into an exception."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        try:
            if self.server.private and not path.startswith("large/"):  # a signed address, on another host
                self.check_token()
            self.route(path.split("/"))
        except Problem as problem:
            status, code = problem.args
            self.send(status, {"error": code}, {"X-Error-Code": code})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def route(self, parts: list[str]) -> None:
        match [self.command, *parts]:
            case ["POST", "api", "repos", "create"]:
                self.create()
            case ["POST", "api", "validate-yaml"]:
                self.send(200, {})
            case ["GET", "api", "models", user, name]:
                self.info(f"{user}/{name}", "main")
            case ["GET", "api", "models", user, name, "revision", revision]:
                self.info(f"{user}/{name}", revision)
            case ["GET", "api", "models", user, name, "tree", revision]:
                self.tree(f"{user}/{name}", revision)
            case ["GET", "api", "models", user, name, "tree", revision, *folder]:
                self.tree(f"{user}/{name}", revision, "/".join(folder) + "/")
            case ["POST", "api", "models", user, name, "preupload", revision]:
                self.preupload(f"{user}/{name}", revision)
            case ["POST", user, name, "info", "lfs", "objects", "batch"]:
                self.lfs_batch()
            case ["PUT", "large", oid]:
                self.upload(oid)
            case ["POST", "verify"]:
                self.verify()
            case ["POST", "api", "models", user, name, "commit", "main"]:
                self.commit(f"{user}/{name}")
            case ["GET" | "HEAD", user, name, "resolve", revision, *path]:
                self.resolve(f"{user}/{name}", revision, "/".join(path))
            case ["GET" | "HEAD", "large", oid]:
                self.send(200, self.server.large[oid])
            case _:
                self.server.unknown.append(f"{self.command} {self.path}")
                raise Problem(404, "EntryNotFound")

    # repositories

    def create(self) -> None:
        self.check_token()
        request = json.loads(self.body)
        repo = f"{request['organization'] or 'user'}/{request['name']}"
        known = repo in self.server.repos
        self.server.repos.setdefault(repo, [{}])
        self.send(409 if known else 200, {"url": f"{self.server.url}/{repo}"})

    def info(self, repo: str, revision: str) -> None:
        files = self.files(repo, revision)
        card = files.get("README.md", b"").decode()
        data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        self.send(
            200,
            {
                "id": repo,
                "sha": self.sha(repo, revision),
                "siblings": [{"rfilename": path} for path in files],
                "cardData": data,
                "library_name": data.get("library_name"),
                "pipeline_tag": data.get("pipeline_tag"),
                "tags": data.get("tags", []),
            },
        )

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        files = {path: content for path, content in self.files(repo, revision).items() if path.startswith(folder)}
        if folder and not files:
            raise Problem(404, "EntryNotFound")
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.send(200, entries)

    # upload

    def preupload(self, repo: str, revision: str) -> None:
        self.check_token()
        files = self.files(repo, revision)
        answers = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            large = path.endswith(LARGE)
            oid = (sha256 if large else git_oid)(files[path]) if path in files else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers})

    def lfs_batch(self) -> None:
        self.check_token()
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.server.large:
                upload = {"href": f"{self.server.url}/large/{entry['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/verify"}}
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if sha256(self.body) != oid:
            raise Problem(400, "WrongContent")
        self.server.large[oid] = self.body
        self.send(200, {})

    def verify(self) -> None:
        request = json.loads(self.body)
        if len(self.server.large.get(request["oid"], b"")) != request["size"]:
            raise Problem(400, "WrongSize")
        self.send(200, {})

    def commit(self, repo: str) -> None:
        self.check_token()
        files = dict(self.files(repo, "main"))
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        self.server.repos[repo].append(files)
        sha = self.sha(repo, "main")
        self.send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    # download

    def resolve(self, repo: str, revision: str, path: str) -> None:
        files = self.files(repo, revision)
        headers = {"X-Repo-Commit": self.sha(repo, revision)}
        if repo in self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Problem(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        if path not in files:
            raise Problem(404, "EntryNotFound")
        content = files[path]
        if not path.endswith(LARGE):
            self.send(200, content, {**headers, "ETag": f'"{git_oid(content)}"'})
            return
        oid = sha256(content)
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.send(302, b"", {**headers, "Location": f"{self.server.storage_url}/large/{oid}"})

    # what the answers share

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        """The files of a commit, by path."""
        if repo not in self.server.repos:
            raise Problem(404, "RepoNotFound")
        commits = self.server.repos[repo]
        if revision in ("main", "first"):  # branches
            return commits[-1 if revision == "main" else 0]
        for number, files in enumerate(commits):
            if commit_sha(repo, number) == revision:
                return files
        raise Problem(404, "RevisionNotFound")

    def sha(self, repo: str, revision: str) -> str:
        branches = {"main": len(self.server.repos[repo]) - 1, "first": 0}
        return commit_sha(repo, branches[revision]) if revision in branches else revision

    def check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Problem(401, "Unauthorized")

    def send(self, status: int, content, headers=None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Nothing: the tests' output stays theirs."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_sha(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
