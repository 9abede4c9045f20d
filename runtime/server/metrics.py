"""What /metrics tells, in Prometheus's form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ..generate import Stats
from .sessions import Sessions

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server; nothing is registered outside of it."""

    def __init__(self, sessions: Sessions) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("trit_requests", "Requests answered", ("path", "status"), registry=registry)
        self.prompt_tokens = Counter("trit_prompt_tokens", "Prompt tokens read", registry=registry)
        self.reused_tokens = Counter("trit_reused_tokens", "Prompt tokens still in a context", registry=registry)
        self.tokens = Counter("trit_generated_tokens", "Tokens generated", registry=registry)
        self.finished = Counter("trit_answers", "Answers, by how they ended", ("reason",), registry=registry)
        self.prompt_seconds = Histogram(
            "trit_prompt_seconds", "Time until a prompt is read", buckets=SECONDS, registry=registry
        )
        self.token_seconds = Histogram(
            "trit_decode_seconds", "Time in making an answer's tokens", buckets=SECONDS, registry=registry
        )
        gauges = {
            "trit_running": ("Answers being made", lambda: sessions.running),
            "trit_waiting": ("Requests in the queue", lambda: sessions.waiting),
            "trit_contexts": ("Answers that can be made at a time", lambda: len(sessions.all)),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def answered(self, stats: Stats) -> None:
        """Count what one answer took."""
        self.prompt_tokens.inc(stats.prompt_tokens - stats.reused_tokens)
        self.reused_tokens.inc(stats.reused_tokens)
        self.tokens.inc(stats.generated_tokens)
        self.finished.labels(stats.finish_reason or "error").inc()
        self.prompt_seconds.observe(stats.prompt_seconds)
        self.token_seconds.observe(stats.seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
