"""Serve Prometheus metrics: tasks, purchases, polls, downloads, the delay of the event loop, and open HTTP requests."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import anyio
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evolink_mcp import __version__
from evolink_mcp.teams.metrics import LAG_BOUNDS_S, Metrics

if TYPE_CHECKING:
    from evolink_mcp.teams.database import Database

T = TypeVar("T")

PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOOP_CHECK_INTERVAL_S = 0.5


class MetricsCollector(Collector):
    """Collect the metrics when Prometheus reads them.

    `statuses` returns the status of each task that this process works on, `open_requests` the number of open HTTP
    requests, `is_ready` whether this server can do paid work. `database` is the team's.
    """

    def __init__(
        self,
        metrics: Metrics,
        statuses: Callable[[], Sequence[str]],
        open_requests: Callable[[], int],
        is_ready: Callable[[], bool],
        database: Database | None = None,
    ) -> None:
        self._metrics = metrics
        self._statuses = statuses
        self._open_requests = open_requests
        self._is_ready = is_ready
        self._database = database
        self._loop_delay_s = 0.0
        self._loop_delay_max_s = 0.0
        # The global registry refuses a second collector with the same names.
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serve the metrics on a separate port from a thread. Return a function that stops it.

        Raises:
            OSError: the port is not available.
        """
        server, _ = start_http_server(port, host, self._registry)

        def close() -> None:
            server.shutdown()
            server.server_close()

        return close

    async def measure_loop_delay(self) -> None:
        """Measure the delay of the event loop, forever."""
        while True:
            due = anyio.current_time() + LOOP_CHECK_INTERVAL_S
            await anyio.sleep(LOOP_CHECK_INTERVAL_S)
            delay_s = max(anyio.current_time() - due, 0.0)
            self._loop_delay_s += delay_s
            self._loop_delay_max_s = max(self._loop_delay_max_s, delay_s)

    def collect(self) -> Iterable[Metric]:
        """Yield the current value of every metric."""
        metrics = self._metrics
        yield GaugeMetricFamily("evolink_ready", "1 if this server can do paid work.", value=float(self._is_ready()))
        tasks = GaugeMetricFamily("evolink_tasks", "Tasks that this server works on.", labels=["status"])
        for status, count in Counter(self._statuses()).items():
            tasks.add_metric([status], count)
        yield tasks
        yield _counter("evolink_purchases", "Purchases by outcome.", "outcome", metrics.purchases)
        yield CounterMetricFamily("evolink_credits", "Credits that EvoLink charged.", value=metrics.credits)
        # Dashboards use the published name, so it stays.
        yield _counter("evolink_looks", "Polls of tasks by kind.", "kind", metrics.polls)
        yield _counter("evolink_downloads", "Image downloads by outcome.", "outcome", metrics.downloads)
        yield _detection_lags(metrics)
        yield CounterMetricFamily(
            "evolink_loop_delay_seconds", "Total delay of the event loop.", value=self._loop_delay_s
        )
        yield GaugeMetricFamily(
            "evolink_loop_delay_seconds_max",
            "Largest delay of the event loop since the last read.",
            value=self._loop_delay_max_s,
        )
        self._loop_delay_max_s = 0.0  # each read starts a new interval
        yield GaugeMetricFamily("evolink_open_streams", "Open HTTP requests.", value=float(self._open_requests()))
        yield InfoMetricFamily("evolink_server", "Version of this server.", {"version": __version__})
        answers = {(route, str(status)): count for (route, status), count in _items(metrics.answers)}
        yield _counters("evolink_http_requests", "HTTP answers by route and status.", ("route", "status"), answers)
        yield _counters(
            "evolink_upstream_requests",
            "HTTP requests to EvoLink by outcome.",
            ("request", "outcome"),
            metrics.upstream,
        )
        yield _counter("evolink_callbacks", "Callbacks of EvoLink by outcome.", "outcome", metrics.callbacks)
        yield CounterMetricFamily("evolink_takeovers", "Entries adopted from other servers.", value=metrics.takeovers)
        yield _counter(
            "evolink_store_failures", "Failures of the object store by operation.", "operation", metrics.store_failures
        )
        yield _counter("evolink_refused_tokens", "Refused callers by reason.", "reason", metrics.refusals)
        yield from self._database_metrics()

    def _database_metrics(self) -> Iterable[Metric]:
        database = self._database
        failures = Counter[str]() if database is None else database.failures
        pool: dict[str, int] = {} if database is None else database.pool_stats()
        wait_s = pool.get("requests_wait_ms", 0) / 1000
        yield _counter("evolink_database_errors", "Errors of the database by kind.", "kind", failures)
        yield CounterMetricFamily(
            "evolink_database_actions", "Actions in the database.", value=pool.get("requests_num", 0)
        )
        yield CounterMetricFamily(
            "evolink_database_waits", "Actions that waited for a connection.", value=pool.get("requests_queued", 0)
        )
        yield CounterMetricFamily("evolink_database_wait_seconds", "Total wait for connections.", value=wait_s)


class MetricsPage:
    """`GET /metrics`. With a `token`, it needs that bearer token."""

    def __init__(self, metrics: MetricsCollector, token: str | None) -> None:
        self._metrics = metrics
        self._authorization = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        if self._authorization is None or hmac.compare_digest(authorization, self._authorization):
            response = Response(self._metrics.text(), media_type=CONTENT_TYPE)
        else:
            challenge = {"www-authenticate": 'Bearer realm="metrics"'}
            response = Response("EVOLINK_MCP_METRICS_TOKEN is needed.\n", 401, challenge)
        await response(scope, receive, send)


def _items(counts: Mapping[T, float]) -> list[tuple[T, float]]:
    # A thread serves the separate port, and the event loop adds keys meanwhile.
    return list(counts.items())


def _counter(name: str, description: str, label: str, counts: Counter[str]) -> CounterMetricFamily:
    return _counters(name, description, (label,), {(value,): count for value, count in _items(counts)})


def _counters(
    name: str, description: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, description, labels=labels)
    for values, count in sorted(_items(counts)):
        family.add_metric(values, count)
    return family


def _detection_lags(metrics: Metrics) -> HistogramMetricFamily:
    buckets: list[tuple[str, float]] = []
    cumulative = 0
    for bound in (*LAG_BOUNDS_S, float("inf")):
        # Each bucket of Prometheus contains the smaller ones.
        cumulative += metrics.lags[bound]
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(cumulative)))
    description = "Highest possible time from the end of a task until the server detected it."
    family = HistogramMetricFamily("evolink_lag_seconds", description)
    family.add_metric([], buckets, metrics.lag_s)
    return family
