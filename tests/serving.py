"""Servers for tests: a process of its own, as users start it, and one in a thread whose settings can be odd."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.conversion.convert import convert
from formats.sources.source import open_source
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
NO_END = {"2": -100, "3": -100}  # the ids that end an answer of the tiny model
PATIENCE = 60.0  # seconds until a test gives up


def tiny_chat_model(folder: Path) -> Path:
    """Write a model of random weights with a tokenizer that the chat format llama3 can use."""
    tiny.folder_with_tokenizer(folder / "checkpoint")
    tiny.write_tokenizer(folder / "checkpoint", more_special=["<|start_header_id|>", "<|end_header_id|>"])
    return convert(open_source(folder / "checkpoint"), folder / "tiny.trit", "f16").path


class Server:
    """A running server. process: None for one in a thread"""

    def __init__(self, host: str, port: int, process: subprocess.Popen[str] | None = None) -> None:
        self.host, self.port, self.process = host, port, process
        self.url = f"http://{host}:{port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request; returns status, headers and body. A body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            given = {"content-type": "application/json", **(headers or {})}
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, raw, given)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def error(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """Post what must fail; returns status and the error's fields."""
        status, _, raw = self.ask("POST", path, body, headers)
        return status, json.loads(raw)["error"]

    def metric(self, name: str) -> float:
        """One number of /metrics; 0 if it is not there yet."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.ask("GET", "/metrics")[2].decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        wait_until(lambda: self.metric(name) == value, f"{name} never became {value}")


def wait_until(condition: Callable[[], bool], failure: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, failure
        time.sleep(0.01)


@contextmanager
def process(model: Path, *options: str) -> Iterator[Server]:
    """Start `python -m runtime.server` on a free port."""
    command = [sys.executable, "-m", "runtime.server", str(model), "--port", "0", "--backend", "numpy", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stderr is not None
        line = next((line for line in child.stderr if line.startswith("listening")), "nothing")
        found = re.fullmatch(r"listening on http://([\d.]+):(\d+)\n", line)
        assert found, f"the server said {line!r}"
        yield Server(found[1], int(found[2]), child)
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            raise


@contextmanager
def in_thread(llm: Any, **settings: Any) -> Iterator[Server]:
    """Serve a Llama from a thread of this process; it is closed at the end."""
    from runtime.server import connection
    from runtime.server.app import Settings, make_app

    server = connection.Server(make_app(llm, Settings(**settings)), grace=0.1, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server did not start")
        yield Server("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
