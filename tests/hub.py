"""A hub of data sets on this machine: a folder OWNER/NAME with files, served as huggingface_hub asks for it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 40
DATA_SET = "([^/]+/[^/]+)"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def reply(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entry(self, folder: Path, path: Path) -> dict[str, Any]:
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        return {"type": kind, "oid": name_of(path), "size": size, "path": str(path.relative_to(folder))}

    def file(self, path: Path) -> None:
        content, tag = path.read_bytes(), f'"{name_of(path)}"'
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.reply(content, Accept_Ranges="bytes", ETag=tag, X_Repo_Commit=COMMIT)
        start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        place = f"bytes {start}-{end}/{len(content)}"
        self.reply(content[start : end + 1], 206, Content_Range=place, ETag=tag, X_Repo_Commit=COMMIT)

    def do_GET(self) -> None:
        request = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        found = re.fullmatch(
            rf"(/api)?/datasets/{DATA_SET}(?:/(\w[\w-]*)/([^/]+)/?(.*))?", unquote(urlsplit(self.path).path)
        )
        if found is None or not (folder := self.root / found[2]).is_dir():
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        path = folder / (found[5] or "")
        if not path.exists():
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        match found[3]:
            case "resolve":
                self.file(path)
            case "tree":
                every = path.rglob("*") if "recursive=true" in self.path.lower() else path.iterdir()
                self.reply([self.entry(folder, each) for each in sorted(every)])
            case "paths-info":
                paths = [folder / name for name in parse_qs(request).get("paths", [])]
                self.reply([self.entry(folder, each) for each in paths if each.exists()])
            case _:
                names = [{"rfilename": str(each.relative_to(folder))} for each in folder.rglob("*") if each.is_file()]
                self.reply({"id": found[2], "sha": COMMIT, "siblings": names, "private": False, "tags": []})

    do_HEAD = do_POST = do_GET


def name_of(path: Path) -> str:
    return hashlib.sha1(str(path).encode()).hexdigest()


@contextmanager
def running_hub(root: Path) -> Iterator[str]:
    """Serve the data sets of a folder; the address, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOfFolder", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
