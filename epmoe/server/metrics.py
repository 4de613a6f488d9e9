"""Metrics for Prometheus, under our names and those that gateways look for (vllm:…)."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from epmoe.engine.figures import Figures, total
from epmoe.server.frames import Load

FIRST_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
BETWEEN_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

# Ours → what gateways look for, with the same values.
ALIASES = {
    "epmoe_requests_running": "vllm:num_requests_running",
    "epmoe_requests_waiting": "vllm:num_requests_waiting",
    "epmoe_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "epmoe_prompt_tokens": "vllm:prompt_tokens",
    "epmoe_completion_tokens": "vllm:generation_tokens",
    "epmoe_first_token_seconds": "vllm:time_to_first_token_seconds",
    "epmoe_between_tokens_seconds": "vllm:inter_token_latency_seconds",
    "epmoe_drafted_tokens": "vllm:spec_decode_num_draft_tokens",
    "epmoe_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}


class Metrics:
    """One a process; a new HTTP process counts from zero, as Prometheus expects of one that was started again.

    Args:
        load: rank 0's last figures; None where there are none yet.
    """

    def __init__(self, model: str, load: Callable[[], Load | None]) -> None:
        self.model, self.load = model, load
        disable_created_metrics()  # a second series for each, which nobody reads
        own = self.registry = CollectorRegistry()
        self.requests = Counter("epmoe_requests", "requests that were answered", ["path", "status"], registry=own)
        self.prompt_tokens = Counter("epmoe_prompt_tokens", "tokens of prompts", registry=own)
        self.cached_tokens = Counter("epmoe_cached_tokens", "of them, those that the cache had", registry=own)
        self.completion_tokens = Counter("epmoe_completion_tokens", "tokens of answers", registry=own)
        self.first_token = Histogram(
            "epmoe_first_token_seconds", "from a request to its first token", buckets=FIRST_S, registry=own
        )
        self.between = Histogram(
            "epmoe_between_tokens_seconds", "from a token of an answer to its next", buckets=BETWEEN_S, registry=own
        )
        own.register(_Loaded(self))

    def text(self) -> bytes:
        """What /metrics answers."""
        everything = CollectorRegistry()
        everything.register(_Twice(self.registry, self.model))
        return generate_latest(everything)


class _Loaded:
    """Rank 0's figures as metrics. What a replica has done still counts when it is lost: no counter goes back."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.last: dict[int, Figures] = {}  # of each replica that there ever was

    def collect(self) -> Iterator[Metric]:
        found = self.metrics.load()
        if found is None:
            return
        self.last |= {each.replica: each for each in found.replicas}
        load, done = total(found.replicas), total([*self.last.values()])
        used = 1 - load.pages_free / load.pages if load.pages else 0.0
        yield GaugeMetricFamily("epmoe_requests_running", "requests that run", value=load.running)
        yield GaugeMetricFamily("epmoe_requests_waiting", "requests that wait", value=load.queued + load.waiting)
        yield GaugeMetricFamily("epmoe_queue_tokens", "tokens of prompts that wait", value=load.queued_tokens)
        yield GaugeMetricFamily("epmoe_cache_usage_ratio", "share of the cache's pages in use", value=used)
        yield CounterMetricFamily("epmoe_put_back", "times that a request was put back", value=done.put_back)
        yield CounterMetricFamily("epmoe_steps", "steps of the engine", value=done.steps)
        yield CounterMetricFamily("epmoe_step_seconds", "what they have taken together", value=done.step_s)
        yield CounterMetricFamily("epmoe_drafted_tokens", "tokens that were drafted", value=done.drafted)
        yield CounterMetricFamily("epmoe_accepted_tokens", "of them, those that came", value=done.accepted)
        yield GaugeMetricFamily("epmoe_replicas", "replicas of the model that serve", value=len(found.replicas))
        if len(found.replicas) > 1:
            yield from _by_replica(found.replicas)


def _by_replica(several: Sequence[Figures]) -> Iterator[Metric]:
    """What tells whether the replicas have as much to do as each other."""
    running = GaugeMetricFamily("epmoe_replica_requests_running", "requests that run, by replica", labels=["replica"])
    waiting = GaugeMetricFamily("epmoe_replica_requests_waiting", "requests that wait, by replica", labels=["replica"])
    used = GaugeMetricFamily("epmoe_replica_cache_usage_ratio", "share of pages in use, by replica", labels=["replica"])
    steps = CounterMetricFamily("epmoe_replica_steps", "steps of the engine, by replica", labels=["replica"])
    for each in several:
        label = [str(each.replica)]
        running.add_metric(label, each.running)
        waiting.add_metric(label, each.queued + each.waiting)
        used.add_metric(label, 1 - each.pages_free / each.pages if each.pages else 0.0)
        steps.add_metric(label, each.steps)
    yield from (running, waiting, used, steps)


class _Twice:
    """All metrics, and once more under the names of ALIASES, which have the model as a label."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self.registry, self.model = registry, model

    def collect(self) -> Iterable[Metric]:
        for metric in self.registry.collect():
            yield metric
            if (alias := ALIASES.get(metric.name)) is None:
                continue
            twin = Metric(alias, metric.documentation, metric.type)
            for sample in metric.samples:
                name = alias + sample.name.removeprefix(metric.name)
                twin.add_sample(name, {**sample.labels, "model_name": self.model}, sample.value)
            yield twin
