"""Run the commands of `evolink-mcp`. Each returns its exit code."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from evolink_mcp import __version__
from evolink_mcp.cli.arguments import Namespace, parse_arguments
from evolink_mcp.cli.early_session import EarlySession
from evolink_mcp.cli.process import (
    exit_within_deadline,
    log_audit_to_stderr,
    log_request_ids,
    raise_descriptor_limit,
    start_garbage_collection,
)
from evolink_mcp.cli.terminal import Terminal, configure
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.sanitize import harmless, printable

if TYPE_CHECKING:
    from evolink_mcp.teams.database_url import DatabaseTimes

log = logging.getLogger(__name__)

# Some MCP hosts start a server and stop it at once, so the recording of the first answers waits.
RECORD_AFTER_S = 1.0


def run_command(arguments: list[str], early_session: EarlySession | None, database_times: DatabaseTimes | None) -> None:
    """Run a command and end the process with its exit code. Without an `early_session`, "stdio" begins one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            configure(cast("io.TextIOWrapper[Any]", stream))
    options = parse_arguments(arguments)
    options.early_session = early_session
    options.database_times = database_times
    # Before the SDK, which otherwise configures the root logger at INFO.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="evolink-mcp: %(levelname)s: %(message)s")
    logging.getLogger("evolink_mcp").setLevel(logging.INFO if options.verbose else logging.WARNING)
    # httpx2 logs each URL. The server reports failures of these libraries in its own words.
    for library in ("httpx2", "httpcore2", "mcp", "opentelemetry", "psycopg"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = COMMANDS[options.command](options)
    except KeyboardInterrupt:
        code = 130
    except (JournalUnwritable, BaseExceptionGroup) as error:  # the database of a team is unusable
        unwritable = _journal_error_in(error)
        if unwritable is None:
            raise
        _print_error(unwritable.message)
        code = 1
    for stream in cast("list[TextIO | None]", [sys.stdout, sys.stderr]):
        if stream is not None:
            stream.flush()
    # Threads may still wait for stdin or decode an image. No result of them is needed.
    os._exit(code)


def _read_settings():
    from evolink_mcp.app.settings import BadSetting
    from evolink_mcp.teams.settings import TeamSettings

    for name, similar in TeamSettings.unknown_variables().items():
        hint = f"; did you mean {similar}?" if similar else ""
        _print_error(f"{harmless(name, 60)} is not a setting and has no effect{hint}")
    try:
        settings = TeamSettings.from_environment()
    except BadSetting as error:
        _print_error(str(error))
        raise SystemExit(2) from error
    if settings.has_audit_log:
        log_audit_to_stderr()
    for warning in settings.foreign_hosts:
        _print_error(warning)
    return settings


def _stdio(options: Namespace) -> int:
    session: EarlySession = options.early_session or EarlySession()
    raise_descriptor_limit()
    settings = _read_settings()
    if session.is_terminal:
        print(
            "evolink-mcp serves MCP over stdin and stdout: an MCP host starts it. Try: evolink-mcp demo",
            file=sys.stderr,
        )
    if session.lines is None:
        _print_error(f"no standard input and output ({session.problem}): the server cannot serve MCP over stdio")
        return 1
    session.lines.allow_leave()
    import anyio

    from evolink_mcp.app.wiring import open_studio, server_for
    from evolink_mcp.server.server import serve_streams
    from evolink_mcp.transports.stdio import serve_stdio

    session.end_imports()
    settings = settings.with_stored_key()  # after the first answers, because a key store is slow

    async def serve(read: Any, write: Any) -> None:
        studio_context = open_studio(settings)
        if settings.database_url is not None or settings.store is not None or settings.has_audit_log:
            from evolink_mcp.teams.studios import open_team_studio

            studio_context = open_team_studio(settings, options.database_times)
        async with studio_context as studio, anyio.create_task_group() as group:
            server = server_for(studio, settings, secrets=settings.secrets)
            start_garbage_collection()
            if not session.has_recording:
                group.start_soon(_record_startup, session, partial(serve_streams, server))
            await serve_streams(server, read, write)
            # The recording may still wait.
            group.cancel_scope.cancel()

    return anyio.run(serve_stdio, session.lines, session.startup_answers, serve, exit_within_deadline)


async def _record_startup(session: EarlySession, serve: Callable[[Any, Any], Coroutine[Any, Any, None]]) -> None:
    """Record the first answers for the next start."""
    import anyio
    import anyio.to_thread

    from evolink_mcp.server.startup_answers import record, save

    await anyio.sleep(RECORD_AFTER_S)
    try:
        results = await record(serve)
        await anyio.to_thread.run_sync(save, session.cache, session.key, results)
    # `record` runs in a task group, which raises its errors as a group.
    except* (OSError, ValueError) as errors:
        log.info("the first answers were not recorded (%s)", errors.exceptions[0])


def _http(options: Namespace) -> int:
    raise_descriptor_limit()
    log_request_ids()
    settings = _read_settings().with_stored_key()
    from evolink_mcp.app.settings import BadSetting
    from evolink_mcp.cli.serve_http import serve_http

    try:
        return serve_http(options, settings, partial(print, file=sys.stderr, flush=True))
    except BadSetting as error:
        _print_error(str(error))
        return 2


def _token(options: Namespace) -> int:
    from evolink_mcp.teams.tokens import BadTokens, new_token

    try:
        token, block = new_token(options.name)
    except BadTokens as error:
        _print_error(str(error))
        return 2
    print(f"Token, printed only once: {token}\n\nAdd this to the file of EVOLINK_MCP_TOKENS_FILE:\n\n{block}")
    return 0


def _demo(options: Namespace) -> int:
    import anyio

    from evolink_mcp.cli.demo import run_demo

    settings = _read_settings()
    return anyio.run(run_demo, options.prompt, settings.folders.output, settings.data_dir, Terminal())


def _simulate(options: Namespace) -> int:
    import anyio

    from evolink_mcp.simulator.app import FAULTS, Simulator
    from evolink_mcp.transports.http import serve_app

    raise_descriptor_limit()

    def report_address(port: int) -> None:
        base_url = f"http://127.0.0.1:{port}"
        print(f"Simulated EvoLink at {base_url}. It accepts any key. Start the server with")
        print(f"  EVOLINK_BASE_URL={base_url} EVOLINK_API_KEY=sk-simulated evolink-mcp")
        print("Words in a prompt cause faults:")
        for word, meaning in FAULTS.items():
            print(f"  {word:24} {meaning}")
        # A pipe would otherwise get the address only at the end.
        sys.stdout.flush()

    simulator = Simulator(duration_s=options.seconds, rule=options.size_rule)
    return anyio.run(partial(serve_app, simulator.app, "127.0.0.1", options.port, ready=report_address))


def _tasks(options: Namespace) -> int:
    import json

    from evolink_mcp.api.costs import format_credits
    from evolink_mcp.cli.image_commands import ALL_TIMES, find_entries, find_other_keys, find_sums, start_of
    from evolink_mcp.errors import Refused
    from evolink_mcp.tools.sums import periods, sums_text
    from evolink_mcp.tools.task_answer import OTHER_KEY_NOTE, shorten_request, task_out

    settings = _read_settings()
    terminal = Terminal()
    now = time.time()
    starts = periods(now)
    words = tuple(options.words)
    try:
        place, entries = find_entries(settings, words, options.limit, start_of(options.since, now))
        sums = find_sums(settings, list(starts.values()), words)
        other_keys = find_other_keys(settings, entries)
    except (JournalUnwritable, Refused) as error:
        _print_error(f"{error.message}. {error.advice}")
        return 1
    if not entries and not options.json:
        is_filtered = words or options.since != ALL_TIMES
        terminal.print(
            f"No purchase in {place} matches." if is_filtered else f"No purchases yet: {place} has no entries."
        )
        return 0
    outs = [task_out(entry, has_other_key=entry.key in other_keys) for entry in entries]
    if options.json:
        print(json.dumps([shorten_request(out).model_dump(mode="json") for out in outs], indent=2))
        return 0
    for out in outs:
        cost = format_credits(out.credits) if out.credits is not None else ""
        prompt = harmless((out.request or {}).get("prompt", ""), 60)
        terminal.print(
            f"{out.created_at}  {out.task_id or '(no id)':38} {out.status:10} charged {out.charged:7} {cost:26} {prompt}",
            hanging="    ",
        )
        for image in out.images:
            if image.path is not None:
                terminal.print_path(Path(image.path), "    ")
            else:
                terminal.print(printable(image.error or image.url), "    ")
        if out.error:
            terminal.print(f"{printable(out.error.message)}. {printable(out.error.advice)}", "    ")
        if OTHER_KEY_NOTE in out.notes:
            terminal.print(OTHER_KEY_NOTE, "    ")
    terminal.print(f"{len(outs)} {'entry' if len(outs) == 1 else 'entries'} in {place}")
    terminal.print(sums_text(dict(zip(starts, sums, strict=True))))
    return 0


def _audit(options: Namespace) -> int:
    from evolink_mcp.cli.audit import lines_by, text_of
    from evolink_mcp.cli.image_commands import find_charges, start_of
    from evolink_mcp.errors import Refused

    try:
        charges = find_charges(_read_settings(), start_of(options.since, time.time()))
    except (JournalUnwritable, Refused) as error:
        _print_error(f"{error.message}. {error.advice}")
        return 1
    print(text_of(lines_by(options.by, charges), options.by, options.format), end="")
    return 0


def _open(options: Namespace) -> int:
    from evolink_mcp.cli.image_commands import open_image

    terminal = Terminal()

    def report(text: str) -> None:
        terminal.print_path(Path(text))

    return open_image(
        _read_settings(), options.words, report, _print_error, since=options.since, only_print=options.print
    )


def _sheet(options: Namespace) -> int:
    from evolink_mcp.cli.image_commands import write_sheet

    path_text = Terminal().path_text
    return write_sheet(_read_settings(), options.words, options.since, options.out, print, _print_error, path_text)


def _journal_error_in(error: BaseException) -> JournalUnwritable | None:
    """Return the first JournalUnwritable in an exception or exception group."""
    if isinstance(error, JournalUnwritable):
        return error
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return next(filter(None, map(_journal_error_in, inner)), None)


def _print_error(text: str) -> None:
    print(f"evolink-mcp: {text}", file=sys.stderr)


def _doctor(options: Namespace) -> int:
    import json

    import anyio

    from evolink_mcp.cli.doctor import examine

    if not options.verbose:  # the report contains the failures that the client logs
        logging.getLogger("evolink_mcp.api").setLevel(logging.ERROR)
    report = anyio.run(examine)
    if options.json:
        print(json.dumps(report.data(), indent=2))
        return report.exit_code
    terminal = Terminal()
    terminal.print(f"evolink-mcp {__version__}\n")
    column = " " * 21
    for finding in report.findings:
        terminal.print(finding.words, f"  {finding.verdict:8} {finding.subject:9} ", column)
        if finding.todo:
            terminal.print(finding.todo, column)
    terminal.print()
    terminal.print("Configuration of each MCP host for this installation (replace the example key by yours):")
    for text in dict.fromkeys(block.text for block in report.blocks):
        places = ", ".join(f"{block.host} ({block.where})" for block in report.blocks if block.text == text)
        print(f"\n--- {places}\n{text}")
    print(f"\n{report.summary}")
    return report.exit_code


def _install(options: Namespace) -> int:
    import getpass
    from functools import partial

    from evolink_mcp.app.environment import folder_variables
    from evolink_mcp.app.key_store import KeyStore
    from evolink_mcp.cli.host_config import installed_command
    from evolink_mcp.cli.host_files import Machine
    from evolink_mcp.cli.install import Console, Installer, run_install

    settings = _read_settings()
    is_terminal = bool(sys.stdin and sys.stdin.isatty())
    console = Console(
        print,
        _print_error,
        ask=input if is_terminal else None,
        ask_secret=partial(getpass.getpass, stream=sys.stderr) if is_terminal else None,
    )
    machine = Machine(Path.home(), sys.platform, folder_variables())
    installer = Installer(machine, settings.data_dir, *installed_command())
    return run_install(options, settings, installer, KeyStore(), console)


# Each command imports its modules when it runs, because the start over stdio must be fast.
COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "stdio": _stdio,
    "http": _http,
    "sse": _http,
    "token": _token,
    "demo": _demo,
    "simulate": _simulate,
    "tasks": _tasks,
    "audit": _audit,
    "open": _open,
    "sheet": _sheet,
    "doctor": _doctor,
    "install": _install,
}
