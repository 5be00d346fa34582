"""What an engine counts, under vLLM's names where they apply, so that dashboards made for vLLM work."""

import copy
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
E2E_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240)


class Metrics:
    """Counters of one replica, in a registry of its own. Sequences are counted, not HTTP requests, which may hold several."""

    def __init__(self, model: str = "", replica: str = "") -> None:
        self.registry, self._families = CollectorRegistry(), dict[str, Any]()
        self._adapters: dict[str, Metrics] = {}
        self._bind(model, replica)

    def of(self, adapter: str) -> "Metrics":
        """Those of an adapter, whose name is their model's; "" has those of the model without one."""
        if adapter and adapter not in self._adapters:
            found = copy.copy(self)
            found._bind(adapter, self._labels["replica"])
            self._adapters[adapter] = found
        return self._adapters[adapter] if adapter else self

    def _bind(self, model: str, replica: str) -> None:
        self._labels = {"model_name": model, "replica": replica}
        names = list(self._labels)

        def make(kind, name, text, more=(), **options):    # type: ignore[no-untyped-def]
            if name not in self._families:
                self._families[name] = kind(f"vllm:{name}", text, [*names, *more], registry=self.registry, **options)
            metric = self._families[name]
            return metric if more else metric.labels(**self._labels)

        self.running: Gauge = make(Gauge, "num_requests_running", "Sequences that are decoded now")
        self.waiting: Gauge = make(Gauge, "num_requests_waiting", "Sequences that wait for a place")
        self.cache_usage: Gauge = make(Gauge, "kv_cache_usage_perc", "Cached positions over slots times context, 0 to 1")
        self.prompt_tokens: Counter = make(Counter, "prompt_tokens", "Prompt tokens processed")
        self.generation_tokens: Counter = make(Counter, "generation_tokens", "Tokens generated")
        self.first_token: Histogram = make(Histogram, "time_to_first_token_seconds", "From arrival to the first token", buckets=TTFT_S)
        self.inter_token: Histogram = make(Histogram, "inter_token_latency_seconds", "Between tokens of a sequence", buckets=ITL_S)
        self.end_to_end: Histogram = make(Histogram, "e2e_request_latency_seconds", "From arrival to the last token", buckets=E2E_S)
        self._finished: Counter = make(Counter, "request_success", "Sequences that ended, by reason", more=("finished_reason",))
        for reason in ("stop", "length", "abort"):
            self._finished.labels(**self._labels, finished_reason=reason)

    def finished(self, reason: str) -> None:
        self._finished.labels(**self._labels, finished_reason=reason).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
