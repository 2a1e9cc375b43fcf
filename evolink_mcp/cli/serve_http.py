"""`evolink-mcp http` and `sse`: authentication, studios, metrics, and the end of the process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from evolink_mcp.api.urls import is_loopback
from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.app.settings import BadSetting
from evolink_mcp.cli.arguments import Namespace
from evolink_mcp.cli.process import exit_within_deadline, start_garbage_collection
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.adopter import Adopter
from evolink_mcp.teams.app import (
    Readiness,
    guarded_app,
    hostnames_of,
    metrics_for,
    studio_app,
    studio_mcp_app,
    tenants_app,
)
from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.roles import BadRoles, Roles
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import Studios, open_team_database
from evolink_mcp.teams.tokens import BadTokens, Tokens
from evolink_mcp.transports.http import mcp_app, serve_app
from evolink_mcp.transports.http_guard import Endpoint, HttpGuard
from evolink_mcp.transports.server_card import ServerCard, card_paths

Log = Callable[[str], None]


def serve_http(
    options: Namespace,
    settings: TeamSettings,
    log: Log,
    *,
    serve: Callable[..., Awaitable[int]] = serve_app,
    make_studios: Callable[..., Studios] = Studios,
) -> int:
    """Serve until a signal. Return the exit code. `log` prints a line for the person who started the server.

    `serve` and `make_studios` are for tests.

    Raises:
        BadSetting: two settings contradict each other, or the tokens or the roles are not usable.
        JournalUnwritable: the team's database is not usable.
    """
    if options.command == "sse" and settings.database_url is not None:
        # An SSE session lives in one process, and a proxy would send its messages to any replica.
        raise BadSetting(
            "evolink-mcp sse serves one process and refuses EVOLINK_MCP_DATABASE_URL; teams use evolink-mcp http"
        )
    authenticator = authenticator_of(settings, options)
    if authenticator is not None and authenticator.exposure is not None:
        log(f"evolink-mcp: {authenticator.exposure}")
    with closing(Decoder(decoder_environment())) as decoder:
        server = _HttpServer(options, settings, authenticator, decoder, log, serve, make_studios)
        return anyio.run(server.run)


def authenticator_of(settings: TeamSettings, options: Namespace) -> TeamAuthenticator | None:
    """Return the authenticator of the callers. None: the server accepts every caller.

    Raises:
        BadSetting: other machines can reach a server without authentication, or the tokens or the roles are not usable.
    """
    oauth = settings.oauth
    if settings.tokens_file is None and oauth is None:
        if settings.has_caller_keys:
            raise BadSetting("EVOLINK_MCP_CALLER_KEYS needs EVOLINK_MCP_TOKENS_FILE or EVOLINK_MCP_OAUTH_ISSUER")
        if not is_loopback(options.host) and not options.insecure:
            raise BadSetting(
                f"{harmless(options.host, 60)} is reachable from other machines, and every caller there spends your "
                "credits. Use --host 127.0.0.1, EVOLINK_MCP_TOKENS_FILE, EVOLINK_MCP_OAUTH_ISSUER, or --insecure if "
                "something else guards it."
            )
        return None
    try:
        tokens = None if settings.tokens_file is None else Tokens(settings.tokens_file)
    except BadTokens as error:
        raise BadSetting(f"EVOLINK_MCP_TOKENS_FILE: {error}") from error
    issuer = None
    if oauth is not None:
        from evolink_mcp.teams.oauth import Issuer  # PyJWT is in the extra `teams`

        try:
            roles = None if settings.oauth_roles is None else Roles(settings.oauth_roles)
        except BadRoles as error:
            raise BadSetting(f"EVOLINK_MCP_OAUTH_ROLES: {error}") from error
        resource = f"{settings.public_url}{_path(options)}"
        issuer = Issuer(oauth.issuer, oauth.audience, oauth.scopes, resource, roles=roles)
    return TeamAuthenticator(tokens, issuer, accepts_caller_keys=settings.has_caller_keys, server_key=settings.key)


# A proxy learns from an answer with 503 that a server ends. A closed port would end the requests that are on their way.
PROXY_NOTICES_S = 1.0


@dataclass(frozen=True, slots=True)
class _HttpServer:
    options: Namespace
    settings: TeamSettings
    authenticator: TeamAuthenticator | None
    decoder: Decoder
    log: Log
    serve: Callable[..., Awaitable[int]]
    make_studios: Callable[..., Studios]

    async def run(self) -> int:
        """Serve until a signal. Return the exit code."""
        options = self.options
        hostnames = hostnames_of(options.allowed_host, self.settings)
        make_mcp_app = partial(mcp_app, transport=options.command, host=options.host, hostnames=hostnames)
        async with AsyncExitStack() as stack:
            database = await stack.enter_async_context(open_team_database(self.settings.database_url))
            # After the database, so that the jobs end while they can still write their last states.
            group = await stack.enter_async_context(anyio.create_task_group())
            studios = self.make_studios(self.settings, database, self.decoder, group)
            if self.authenticator is None:
                studio, settings = await stack.enter_async_context(studios.open())
                mcp = studio_mcp_app(studio, settings, studios, make_mcp_app)
                app: Any = studio_app(mcp, studio, settings, studios)
                receive_callback = studios.receive_callback
            else:
                app = tenants_app(studios, self.authenticator, group, make_mcp_app)
                adopter = Adopter(studios, app, self.authenticator)
                receive_callback = adopter.receive_callback
                group.start_soon(adopter.run)
                group.start_soon(studios.forget_loop)
                if self.authenticator.issuer is not None:
                    group.start_soon(self.authenticator.issuer.refresh_loop)
            readiness = Readiness(self.settings, self.authenticator, database)
            guard = guarded_app(app, studios, self.authenticator, hostnames, readiness, receive_callback)
            exit_code = await self._serve(guard, readiness, studios, group, hostnames)
            group.cancel_scope.cancel()
            return exit_code
        # For a type checker, an AsyncExitStack could suppress an exception.
        raise AssertionError("unreachable")

    async def _serve(
        self, guard: HttpGuard, readiness: Readiness, studios: Studios, group: anyio.abc.TaskGroup, hostnames: list[str]
    ) -> int:
        options = self.options
        self._publish_card(guard)
        metrics = metrics_for(studios, guard, readiness)
        if metrics is not None:
            group.start_soon(metrics.measure_loop_delay)
            port = self.settings.metrics_port
            if port is not None:
                try:
                    metrics.serve(options.host, port)
                except OSError as error:
                    self.log(f"evolink-mcp: EVOLINK_MCP_METRICS_PORT: port {port} cannot be opened ({error.strerror})")
                    return 1
        is_team = self.authenticator is not None or studios.database is not None

        closed_at: float | None = None

        def is_drained() -> bool:
            nonlocal closed_at
            if not is_team:  # a personal server ends within two seconds
                return True
            has_other_servers = studios.database is not None
            guard.close(has_other_servers=has_other_servers)
            closed_at = closed_at or anyio.current_time()
            # A call may not have a job yet, so its studio does not know it.
            is_idle = studios.drain(has_other_servers=has_other_servers) and not guard.open_calls
            notice_s = PROXY_NOTICES_S if has_other_servers else 0.0
            return is_idle and anyio.current_time() - closed_at >= notice_s

        ready = partial(self._report_address, hostnames)
        return await self.serve(guard, options.host, options.port, exit_within_deadline, ready, is_drained)

    def _publish_card(self, guard: HttpGuard) -> None:
        path = _path(self.options)
        transport = "sse" if self.options.command == "sse" else "streamable-http"
        card = ServerCard(path, transport, self.settings.public_url, needs_token=self.authenticator is not None)
        for card_path in card_paths(path):
            guard.add_endpoint(Endpoint(("GET",), card_path, card))

    def _report_address(self, hostnames: list[str], port: int) -> None:
        """Print the address with the open port, and the callers that may spend credits."""
        # All imports are complete when the port is open.
        start_garbage_collection()
        options = self.options
        if not is_loopback(options.host) and not hostnames:
            self.log("evolink-mcp: without --allowed-host NAME it answers only to names of this machine")
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{port}{_path(options)}"
        self.log(f"evolink-mcp serves {address}: {self._callers()} may spend your credits")

    def _callers(self) -> str:
        if self.authenticator is None:
            return "every program of this machine" if is_loopback(self.options.host) else "everyone who reaches it"
        oauth = self.settings.oauth
        count = len(self.authenticator.tenants)
        callers = (
            [f"{'one tenant' if count == 1 else f'{count} tenants'} of {self.settings.tokens_file}"] if count else []
        )
        callers += [f"callers with a JWT of {oauth.issuer}"] if oauth else []
        return " and ".join(callers)


def _path(options: Namespace) -> str:
    return "/mcp" if options.command == "http" else "/sse"
