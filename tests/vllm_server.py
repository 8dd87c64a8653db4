"""vLLM's server of hidden states, on this machine's CPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx


class VLLM:
    """A vLLM server of its own process group."""

    def __init__(self, model: Path, log: Path, max_model_len: int = 64) -> None:
        self.model, self.log, self.max_model_len = model, log, max_model_len
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        pooler = '{"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": false}'
        options = ["--runner", "pooling", "--convert", "embed", "--dtype", "float32", "--enforce-eager"]
        options += [
            "--max-model-len",
            str(self.max_model_len),
            "--pooler-config",
            pooler,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model), *options]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with open(self.log, "a") as stream:
            self.process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + 500
        while True:
            try:
                httpx.get(self.url + "/v1/models")
                return
            except httpx.HTTPError:
                is_alive = time.monotonic() < deadline and self.process.poll() is None
                assert is_alive, self.log.read_text()[-3000:]
                time.sleep(0.2)
