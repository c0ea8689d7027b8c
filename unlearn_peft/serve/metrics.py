"""Metrics for Prometheus, in the server's own registry."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .engine.base import EngineStats

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_WAIT = 4.0  # times what a text took of a processor, until there is another: with many tenants that is seconds
_ENGINE = {  # field of `EngineStats` -> its metric
    "running": (GaugeMetricFamily, "batch_size", "Answers in the batch now."),
    "waiting": (GaugeMetricFamily, "queue_size", "Answers that wait for a place in the batch."),
    "resident": (GaugeMetricFamily, "resident_adapters", "Adapters in memory."),
    "resident_bytes": (GaugeMetricFamily, "resident_adapter_bytes", "Memory that they take."),
    "kv_used_bytes": (GaugeMetricFamily, "kv_used_bytes", "Keys and values of answers and of the prefix cache."),
    "kv_bytes": (GaugeMetricFamily, "kv_bytes", "The room for them."),
    "prefix_bytes": (GaugeMetricFamily, "prefix_cache_bytes", "Of these, what the prefix cache has."),
    "prefix_tokens": (CounterMetricFamily, "prefix_cache_tokens", "Tokens of prompts that were not read again."),
    "half_speed_rows": (GaugeMetricFamily, "half_speed_rows", "Answers in a batch at which each is half as fast."),
    "loads": (CounterMetricFamily, "adapter_loads", "Adapters read and verified."),
    "load_seconds": (CounterMetricFamily, "adapter_load_seconds", "Seconds that reading and verifying took."),
}


class Metrics(Collector):
    """The server's metrics, named `unlearn_peft_...`. Tenants' names are labels: keep /metrics internal."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats, self.registry = stats, CollectorRegistry()
        named: dict[str, Any] = {"namespace": "unlearn_peft", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by their end.", ["tenant", "status"], **named)
        self.tokens = Counter("tokens", "Tokens read and generated.", ["tenant", "kind"], **named)
        self.refusals = Counter("refusals", "Requests refused, by the reason's code.", ["code"], **named)
        self.canary = Counter("canary_checks", "Sets that were checked before they were served.", ["result"], **named)
        self.seconds = Histogram("request_seconds", "From arrival to end.", buckets=_SECONDS, **named)
        self.first = Histogram("first_token_seconds", "From arrival to the first text.", buckets=_SECONDS, **named)
        self.active = Gauge("active_answers", "Answers running and waiting.", **named)
        self.policy_problem = Gauge("policy_problem", "1: the newest policy was refused, an older is used.", **named)
        self.registry.register(self)
        self._lock, self._text, self._stays_until = threading.Lock(), b"", 0.0

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format, as they were a moment ago. From asyncio, call it in a thread.

        Whoever asks all the time takes a fifth of a processor.
        """
        with self._lock:
            if time.monotonic() >= self._stays_until:
                began = time.thread_time()
                self._text = generate_latest(self.registry)
                self._stays_until = time.monotonic() + _WAIT * (time.thread_time() - began)
            return self._text

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Called by Prometheus' registry: yield what the engine knows of itself now."""
        stats = self._stats()
        for field, (kind, name, text) in _ENGINE.items():
            if (value := getattr(stats, field)) is not None:
                yield kind(f"unlearn_peft_{name}", text, value=value)
