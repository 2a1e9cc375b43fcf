"""What `evolink-mcp` does on the command line: arguments, settings, studio, transport."""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO, cast

from evolink_mcp import __version__
from evolink_mcp.cli.arguments import Namespace, parsed
from evolink_mcp.cli.process import audit_to_stderr, keep_what_stays, leave_in_time, take_descriptors
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.sanitize import harmless

ANSWER_WITHIN_S = 0.0005  # how soon the first answers interrupt the imports


def main(argv: list[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may lack letters: cp1252 has no arrow
            stream.reconfigure(errors="replace")
    options = parsed(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="evolink-mcp: %(levelname)s: %(message)s")
    logging.getLogger("evolink_mcp").setLevel(logging.INFO if options.verbose else logging.WARNING)
    for noisy in ("httpx2", "httpcore2", "mcp", "psycopg"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = COMMANDS[options.command](options)
    except KeyboardInterrupt:
        code = 130
    except (JournalUnwritable, BaseExceptionGroup) as error:  # a team's database that cannot be used at the start
        unwritable = _within(error)
        if unwritable is None:
            raise
        _complain(unwritable.message)
        code = 1
    for stream in cast("list[TextIO | None]", [sys.stdout, sys.stderr]):
        if stream is not None:
            stream.flush()
    # Threads may still wait for stdin or work on a picture; nothing that they do is needed any more.
    os._exit(code)


def _settings():
    from evolink_mcp.app.settings import BadSetting
    from evolink_mcp.teams.settings import TeamSettings

    for name, meant in TeamSettings.unknown_variables().items():
        advice = f"; did you mean {meant}?" if meant else ""
        print(f"evolink-mcp: {harmless(name, 60)} is no setting and has no effect{advice}", file=sys.stderr)
    try:
        settings = TeamSettings.from_environment()
    except BadSetting as error:
        print(f"evolink-mcp: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if settings.has_audit_log:
        audit_to_stderr()
    for told in settings.foreign_hosts:
        print(f"evolink-mcp: {told}", file=sys.stderr)
    return settings


def _stdio(_: Namespace) -> int:
    gc.disable()  # until `keep_what_stays`: to search what the imports make takes a tenth of the start
    take_descriptors()
    settings = _settings()
    if sys.stdin and sys.stdin.isatty():
        print(
            "evolink-mcp speaks MCP over stdin and stdout: an MCP host starts it. Try: evolink-mcp demo",
            file=sys.stderr,
        )
    from evolink_mcp.server.startup_answers import Opening, recorded
    from evolink_mcp.transports.signals import leave_on_stop_signal
    from evolink_mcp.transports.stdio_lines import Wires

    leave_on_stop_signal()
    opening = Opening(recorded() if settings.tools is None else None)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(ANSWER_WITHIN_S)
    try:
        wires = Wires(opening.answer)
    except OSError as error:
        print(f"evolink-mcp: there is no standard input and output to speak over ({error.strerror})", file=sys.stderr)
        return 1
    import anyio

    from evolink_mcp.app.wiring import open_studio, server_for
    from evolink_mcp.server.server import serve_streams
    from evolink_mcp.transports.stdio import serve_stdio

    sys.setswitchinterval(usual)

    async def serve(read: Any, write: Any) -> None:
        opening = open_studio(settings)
        if settings.database_url is not None or settings.store is not None or settings.has_audit_log:
            from evolink_mcp.teams.studios import open_team_studio

            opening = open_team_studio(settings)
        async with opening as studio:
            server = server_for(studio, settings, secret=settings.secret)
            keep_what_stays()
            await serve_streams(server, read, write)

    return anyio.run(serve_stdio, wires, opening, serve, leave_in_time)


def _http(options: Namespace) -> int:
    take_descriptors()
    settings = _settings()
    from evolink_mcp.app.settings import BadSetting
    from evolink_mcp.cli.serve_http import serve_http

    try:
        return serve_http(options, settings, partial(print, file=sys.stderr, flush=True))
    except BadSetting as error:
        _complain(str(error))
        return 2


def _token(options: Namespace) -> int:
    from evolink_mcp.teams.tokens import BadTokens, new_token

    try:
        token, block = new_token(options.name)
    except BadTokens as error:
        print(f"evolink-mcp: {error}", file=sys.stderr)
        return 2
    print(f"The token, shown this once: {token}\n\nFor the file that EVOLINK_MCP_TOKENS_FILE names:\n\n{block}")
    return 0


def _demo(options: Namespace) -> int:
    import anyio

    from evolink_mcp.cli.demo import run_demo

    return anyio.run(run_demo, options.prompt, print)


def _simulate(options: Namespace) -> int:
    import anyio

    from evolink_mcp.simulator.app import FAULTS, Simulator
    from evolink_mcp.transports.http import serve_app

    take_descriptors()
    print(f"A simulated EvoLink on http://127.0.0.1:{options.port} (any key will do). Point the server at it with")
    print(f"  EVOLINK_BASE_URL=http://127.0.0.1:{options.port} EVOLINK_API_KEY=sk-simulated evolink-mcp")
    print("Words in a prompt order faults:")
    for word, meaning in FAULTS.items():
        print(f"  {word:24} {meaning}")
    sys.stdout.flush()
    return anyio.run(
        serve_app, Simulator(duration_s=options.seconds, rule=options.size_rule).app, "127.0.0.1", options.port
    )


def _tasks(options: Namespace) -> int:
    import json

    from evolink_mcp.api.costs import priced
    from evolink_mcp.cli.image_commands import kept
    from evolink_mcp.tools.task_answer import brief, task_out

    try:
        place, entries = kept(_settings(), (), options.limit)
    except JournalUnwritable as error:
        _complain(error.message)
        return 1
    if not entries and not options.json:
        print(f"Nothing was bought yet: there is no entry in {place}.")
        return 0
    outs = [task_out(entry) for entry in entries]
    if options.json:
        print(json.dumps([brief(out).model_dump(mode="json") for out in outs], indent=2))
        return 0
    for out in outs:
        cost = priced(out.credits) if out.credits is not None else ""
        asked = harmless((out.request or {}).get("prompt", ""), 60)
        print(
            f"{out.created_at}  {out.task_id or '(no id)':38} {out.status:10} charged {out.charged:7} {cost:26} {asked}"
        )
        for image in out.images:
            print(f"    {image.path or image.error or image.url}")
        if out.error:
            print(f"    {out.error.message}. {out.error.advice}")
    print(f"{len(outs)} entries in {place}")
    return 0


def _open(options: Namespace) -> int:
    from evolink_mcp.cli.image_commands import open_picture

    return open_picture(_settings(), options.words, print, _complain, only_print=options.print)


def _sheet(options: Namespace) -> int:
    from evolink_mcp.cli.image_commands import lay_out

    return lay_out(_settings(), options.words, options.since, options.out, print, _complain)


def _within(error: BaseException) -> JournalUnwritable | None:
    """The reason why the journal cannot be used, if that is what ended a task group."""
    if isinstance(error, JournalUnwritable):
        return error
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return next((found for found in map(_within, inner) if found), None)


def _complain(text: str) -> None:
    print(f"evolink-mcp: {text}", file=sys.stderr)


def _doctor(options: Namespace) -> int:
    import json

    import anyio

    from evolink_mcp.cli.doctor import examine

    report = anyio.run(examine)
    if options.json:
        print(json.dumps(report.data(), indent=2))
        return report.exit_code
    print(f"evolink-mcp {__version__}\n")
    for finding in report.findings:
        print(f"  {finding.verdict:8} {finding.subject:9} {finding.words}")
        if finding.todo:
            print(f"{'':21}{finding.todo}")
    print("\nTo start this installation from a host (put your key in place of the example):")
    for text in dict.fromkeys(block.text for block in report.blocks):
        where = ", ".join(f"{block.host} ({block.where})" for block in report.blocks if block.text == text)
        print(f"\n--- {where}\n{text}")
    print("\nSomething is broken: see above." if report.exit_code else "\nNothing is broken.")
    return report.exit_code


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "stdio": _stdio,
    "http": _http,
    "sse": _http,
    "token": _token,
    "demo": _demo,
    "simulate": _simulate,
    "tasks": _tasks,
    "open": _open,
    "sheet": _sheet,
    "doctor": _doctor,
}
