"""A small HTTP server that speaks vLLM's pooling API, with a real model of transformers behind it.

``misbehave`` is asked before each answer to rows; what it returns is done in place of the answer.
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Deed = str | int | None
"""A status, or a word of ``_Handler.answer``; None to answer."""


class PoolingServer:
    """Started at once; ``stop`` and ``start`` on the same port."""

    def __init__(self, folder: Path, max_model_len: int = 128, key: str | None = None) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_model_len, self.key = max_model_len, key
        self.pools = True
        """Or it has completions with ``prompt_logprobs``, over the tokenizer's tokens."""
        self.misbehave: Callable[[int], Deed] = lambda number: None
        self.requests = 0
        """For rows, probes among them."""
        self.rows = 0
        """Answered."""
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"of": self})
        self._server = _Quiet(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Connections that are open are answered no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def is_up(self) -> bool:
        return self._server is not None


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none."""


class _Handler(BaseHTTPRequestHandler):
    of: PoolingServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._is_let_in():
            model = {"id": "teacher", "root": str(self.of.folder), "max_model_len": self.of.max_model_len}
            self._send(200, json.dumps({"data": [model]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in():
            return
        if self.path == "/tokenize":
            self._send(200, json.dumps({"tokens": self.of.tokenizer.encode(body["prompt"])}).encode())
        elif self.path == "/pooling" and self.of.pools:
            self._pool(body)
        elif self.path == "/v1/completions" and not self.of.pools:
            self._complete(body)
        else:
            self._send(404, b'{"detail": "Not Found"}')

    def _is_let_in(self) -> bool:
        if not self.of.is_up:
            self.connection.close()
            self.close_connection = True
            return False
        if self.of.key is not None and self.headers.get("Authorization") != f"Bearer {self.of.key}":
            self._send(401, f"no key like {self.headers.get('Authorization')}".encode())
            return False
        return True

    def _pool(self, body: dict[str, Any]) -> None:
        self.of.requests += 1
        deed = self.of.misbehave(self.of.requests)
        if isinstance(deed, int):
            self._send(deed, f"on purpose, {self.headers.get('Authorization')}".encode())
            return
        if deed == "hang":
            time.sleep(10)
        if deed in ("hang", "reset"):
            self.connection.close()
            self.close_connection = True
            return
        rows = body["input"]
        assert all(rows)
        if max(map(len, rows)) > self.of.max_model_len:
            self._send(400, b"This model's maximum context length is shorter")
            return
        with torch.no_grad():
            hidden = [self.of.model.model(torch.tensor([row])).last_hidden_state[0] for row in rows]
        if deed == "normalised":
            hidden = [torch.nn.functional.normalize(each, dim=-1) for each in hidden]
        if deed == "nan":
            hidden = [each * float("nan") for each in hidden]
        if deed == "wide":
            hidden = [torch.cat([each, each], dim=-1) for each in hidden]
        if deed == "row left out":
            hidden = hidden[1:]
        dtype = getattr(torch, body["embed_dtype"])
        self.of.rows += len(rows)
        self._send(200, b"".join(each.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for each in hidden))

    def _complete(self, body: dict[str, Any]) -> None:
        self.of.requests += 1
        deed = self.of.misbehave(self.of.requests)
        if isinstance(deed, int):
            self._send(deed, b"on purpose")
            return
        choices = []
        for index, row in enumerate(body["prompt"]):
            with torch.no_grad():
                logits = self.of.model(torch.tensor([row])).logits[0, :-1, : len(self.of.tokenizer)]
            found: list[Any] = [None]
            for token, log_probs in zip(row[1:], logits.log_softmax(-1), strict=True):
                chosen = {*log_probs.topk(body["prompt_logprobs"]).indices.tolist(), token}
                found.append({str(each): {"logprob": log_probs[each].item(), "rank": 1} for each in chosen})
            choices.append({"index": index, "prompt_logprobs": found})
        self._send(200, json.dumps({"choices": choices[::-1]}).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
