"""Many clients at once on the demo model, some broken, some gone before their answer: python -m pytest -m slow"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from runtime.demo import demo_path
from tests import serving
from tests.serving import Server

pytestmark = pytest.mark.slow
CLIENTS = 50
SECONDS = float(os.environ.get("TRIT_LOAD_SECONDS", "120"))
PROMPTS = ["Name a colour.", "Why is the sky blue?", "Count to five.", "Tell me of the river Nile. " * 8, "Say hello."]
JOBS = 20


def job(i: int, **options: Any) -> dict[str, Any]:
    """One of JOBS requests, the same each time."""
    message = {"role": "user", "content": PROMPTS[i % len(PROMPTS)]}
    return {"messages": [message], "seed": i, "max_tokens": 8 + i % 17, **options}


def said(status: int, raw: bytes, streamed: bool) -> str | None:
    """The text of an answer; None for a refusal."""
    if status != 200:
        return None
    if not streamed:
        return str(json.loads(raw)["choices"][0]["message"]["content"])
    events = [event.removeprefix("data: ") for event in raw.decode().split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


def anonymous(server: Server) -> int:
    """Bytes of memory that are the server's own, not of the mapped file."""
    assert server.process is not None
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


class Client:
    """Asks, leaves and breaks things until the time is over; counts what came of it."""

    def __init__(self, server: Server, expected: list[str], seed: int, end: float) -> None:
        self.server, self.expected, self.end = server, expected, end
        self.rng, self.counts = random.Random(seed), Counter[str]()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while time.monotonic() < self.end:
            try:
                self.rng.choices((self.ask, self.leave, self.break_rules), (7, 2, 2))[0]()
            except Exception as error:  # a thread's own would be lost
                self.counts[repr(error)] += 1

    def ask(self) -> None:
        i, stream = self.rng.randrange(JOBS), self.rng.random() < 0.4
        status, _, raw = self.server.ask("POST", "/v1/chat/completions", job(i, stream=stream))
        text = said(status, raw, stream)
        self.counts["right" if text == self.expected[i] else "wrong" if text is not None else str(status)] += 1
        if status == 503:
            time.sleep(self.rng.random())

    def leave(self) -> None:
        connection = http.client.HTTPConnection(self.server.host, self.server.port)
        body = json.dumps(job(self.rng.randrange(JOBS), stream=self.rng.random() < 0.5, max_tokens=300))
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        time.sleep(self.rng.random() / 2)
        connection.close()
        self.counts["left"] += 1

    def break_rules(self) -> None:
        body = self.rng.choice([b"{", b"[]", {"messages": []}, job(0, temperature=9), job(0, foo=1)])
        self.counts[f"broken {self.server.ask('POST', '/v1/chat/completions', body)[0]}"] += 1


@pytest.mark.skipif(not demo_path().exists(), reason="the demo model is not here: python -m runtime.chat fetches it")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the memory of a process")
def test_fifty_clients() -> None:
    options = ("--backend", "auto", "-c", "1024", "--parallel", "4", "--queue", "24")
    with serving.process(demo_path(), *options) as server:
        alone = [server.ask("POST", "/v1/chat/completions", job(i)) for i in range(JOBS)]
        expected = [said(status, raw, False) or "" for status, _, raw in alone]
        assert all(expected)
        clients = [Client(server, expected, seed, time.monotonic() + SECONDS) for seed in range(CLIENTS)]
        for client in clients:
            client.thread.start()
        time.sleep(SECONDS / 4)
        early = anonymous(server)
        for client in clients:
            client.thread.join()
        server.wait_for("trit_running", 0)
        counts = sum((client.counts for client in clients), Counter[str]())
        assert set(counts) == {"right", "left", "503", "broken 400"}, counts
        assert anonymous(server) < early + 30e6
        print(dict(counts), f"{early / 1e6:.0f} MB, then {anonymous(server) / 1e6:.0f} MB")
