"""`evolink-mcp http` and `sse`: who may call, whose studio answers, what is told about the work, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import anyio

from evolink_mcp.api.urls import is_loopback
from evolink_mcp.app.settings import BadSetting, decoder_environment
from evolink_mcp.app.wiring import open_studio, open_team_database, server_for
from evolink_mcp.cli.arguments import Namespace
from evolink_mcp.cli.process import keep_what_stays, leave_in_time
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.app import Studios, app_of, behind_door, go_on_with_what_was_left, names_of, tenants_app
from evolink_mcp.teams.callers import Callers
from evolink_mcp.teams.oauth import Issuer
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.tokens import BadTokens, Tokens
from evolink_mcp.transports.http import serve_app


def serve_web(options: Namespace, settings: TeamSettings, log: Callable[[str], None]) -> int:
    """Serve until a signal; returns the exit code. `log` takes lines for the person who started it.

    Raises:
        BadSetting: the settings do not fit each other, or the tokens file cannot be used.
        JournalUnwritable: the team's database cannot be used.
    """
    callers = callers_of(settings, options)
    if callers is not None and callers.exposure is not None:
        log(f"evolink-mcp: {callers.exposure}")
    names = names_of(options.allowed_host, settings)
    with closing(Decoder(decoder_environment())) as decoder:
        return anyio.run(partial(_serve, options, settings, callers, names, log, decoder))


def callers_of(settings: TeamSettings, options: Namespace) -> Callers | None:
    """Who may call; None for whoever reaches the server.

    Raises:
        BadSetting: nobody guards a server that others reach, or the tokens file cannot be used.
    """
    oauth, own_keys = settings.oauth, settings.has_caller_keys
    if settings.tokens_file is None and oauth is None:
        if own_keys:
            raise BadSetting("EVOLINK_MCP_CALLER_KEYS needs EVOLINK_MCP_TOKENS_FILE or EVOLINK_MCP_OAUTH_ISSUER")
        if not is_loopback(options.host) and not options.insecure:
            raise BadSetting(
                f"{harmless(options.host, 60)} is reachable from other machines, and whoever reaches it spends your "
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
        resource = f"{settings.public_url}/{_path(options)}"
        issuer = Issuer(oauth.issuer, oauth.audience, oauth.scopes, resource)
    return Callers(tokens, issuer, own_keys=own_keys, key=settings.key)


async def _serve(
    options: Namespace,
    settings: TeamSettings,
    callers: Callers | None,
    names: list[str],
    log: Callable[[str], None],
    decoder: Decoder,
) -> int:
    async with open_team_database(settings.database_url) as database, anyio.create_task_group() as group:
        studios = Studios(database, decoder)
        is_team = callers is not None or database is not None
        place: Any = {"command": options.command, "host": options.host, "names": names}

        async def served(app: Any) -> int:
            door = behind_door(app, settings, names, callers, studios)
            if (endpoint := studios.metrics_endpoint) is not None:
                group.start_soon(endpoint.watch_the_loop)
                if (port := settings.metrics_port) is not None:
                    try:
                        endpoint.serve(options.host, port)
                    except OSError as error:
                        log(f"evolink-mcp: EVOLINK_MCP_METRICS_PORT: port {port} cannot be opened ({error.strerror})")
                        return 1

            def drained() -> bool:
                if not is_team:  # a server of one person is gone within two seconds
                    return True
                door.close()
                return studios.drain()

            ready = partial(_ready, options, settings, callers, names, log)
            return await serve_app(door, options.host, options.port, leave_in_time, ready, drained)

        if callers is None:
            async with open_studio(
                settings, remote=True, database=database, decoder=decoder, metrics=studios.metrics
            ) as studio:
                code = await served(app_of(studios, server_for(studio, settings), studio, **place))
        else:
            tenants = tenants_app(settings, callers, studios, group, **place)
            group.start_soon(go_on_with_what_was_left, studios, tenants, settings, callers)
            code = await served(tenants)
        group.cancel_scope.cancel()
        return code
    raise AssertionError("unreachable")


def _path(options: Namespace) -> str:
    return "mcp" if options.command == "http" else "sse"


def _ready(
    options: Namespace, settings: TeamSettings, callers: Callers | None, names: list[str], log: Callable[[str], None]
) -> None:
    """The port is open: say where, and who may spend."""
    keep_what_stays()
    if not is_loopback(options.host) and not names:
        log("evolink-mcp: without --allowed-host NAME it answers only to names of this machine")
    who = "every program of this machine" if is_loopback(options.host) else "everyone who reaches it"
    if callers is not None:
        known = len({tenant.name for tenant in callers.tenants})
        may = [f"{'one tenant' if known == 1 else f'{known} tenants'} of {settings.tokens_file}"] if known else []
        may += [f"whom {settings.oauth.issuer} knows"] if settings.oauth else []
        who = " and ".join(may)
    host = f"[{options.host}]" if ":" in options.host else options.host
    log(f"evolink-mcp serves http://{host}:{options.port}/{_path(options)}: {who} may spend your credits")
