"""Prometheus metrics of this server: what its studios do, how long the loop is late, how many requests are open."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import anyio
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evolink_mcp.teams.metrics import LAG_BOUNDS_S, Metrics

PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOOK_EVERY_S = 0.5


class MetricsEndpoint(Collector):
    """Reads what it tells at the moment it is asked.

    `statuses` are those of the tasks that this server works on, `streams` the requests that are open, `ready` whether
    paid work can be done.
    """

    def __init__(
        self,
        metrics: Metrics,
        statuses: Callable[[], Sequence[str]],
        streams: Callable[[], int],
        ready: Callable[[], bool],
    ) -> None:
        self._metrics = metrics
        self._statuses = statuses
        self._streams = streams
        self._ready = ready
        self._loop_delay_s = self._worst_s = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serve them on a port of their own, from a thread, until what is returned is called.

        Raises:
            OSError: the port cannot be opened.
        """
        server, _ = start_http_server(port, host, self._registry)

        def close() -> None:
            server.shutdown()
            server.server_close()

        return close

    async def watch_the_loop(self) -> None:
        """For ever: see by how much the event loop is late."""
        while True:
            due = anyio.current_time() + LOOK_EVERY_S
            await anyio.sleep(LOOK_EVERY_S)
            late = max(anyio.current_time() - due, 0.0)
            self._loop_delay_s += late
            self._worst_s = max(self._worst_s, late)

    def collect(self) -> Iterable[Metric]:
        """Every metric as it is now."""
        metrics = self._metrics
        yield GaugeMetricFamily("evolink_ready", "1 if paid work can be done.", value=float(self._ready()))
        tasks = GaugeMetricFamily("evolink_tasks", "Tasks that this server works on now.", labels=["status"])
        for status, count in Counter(self._statuses()).items():
            tasks.add_metric([status], count)
        yield tasks
        yield _counter("evolink_purchases", "Purchases by their outcome.", "outcome", metrics.purchases)
        yield CounterMetricFamily("evolink_credits", "Credits that EvoLink charged.", value=metrics.credits)
        yield _counter("evolink_looks", "Requests that read tasks.", "kind", metrics.looks)
        yield _counter("evolink_downloads", "Pictures fetched.", "outcome", metrics.downloads)
        yield _lags(metrics)
        yield CounterMetricFamily(
            "evolink_loop_delay_seconds", f"Lateness of a wait of {LOOK_EVERY_S} s, added up.", value=self._loop_delay_s
        )
        yield GaugeMetricFamily("evolink_loop_delay_seconds_max", "Its worst since the last look.", value=self._worst_s)
        self._worst_s = 0.0
        yield GaugeMetricFamily("evolink_open_streams", "Requests that are open.", value=float(self._streams()))


class MetricsPage:
    """`GET /metrics`: for who sends `token` as a bearer token, if there is one."""

    def __init__(self, endpoint: MetricsEndpoint, token: str | None) -> None:
        self._endpoint = endpoint
        self._wanted = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._wanted is None or hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._wanted):
            await Response(self._endpoint.text(), media_type=CONTENT_TYPE)(scope, receive, send)
        else:
            headers = {"www-authenticate": 'Bearer realm="metrics"'}
            await Response("EVOLINK_MCP_METRICS_TOKEN is needed.\n", 401, headers)(scope, receive, send)


def _counter(name: str, told: str, label: str, counts: Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, told, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def _lags(metrics: Metrics) -> HistogramMetricFamily:
    buckets: list[tuple[str, float]] = []
    below = 0
    for bound in (*LAG_BOUNDS_S, float("inf")):
        below += metrics.lags[bound]
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(below)))
    family = HistogramMetricFamily("evolink_lag_seconds", "For how long at most a task had ended before it was known.")
    family.add_metric([], buckets, metrics.lag_s)
    return family
