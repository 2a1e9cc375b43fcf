"""Parse the command line. A wrong argument ends the command with one line."""

from __future__ import annotations

import argparse
from argparse import Namespace as Namespace
from typing import NoReturn

from evolink_mcp import __version__
from evolink_mcp.cli.terminal import Terminal
from evolink_mcp.sanitize import harmless

DESCRIPTION = "MCP server for EvoLink's gpt-image-2. Without a command it serves MCP over stdin and stdout."
EXAMPLE = "A calm sunset over the ocean, islands on the horizon"
# The longest variable has 33 characters.
HELP_COLUMN = 34
AUDIT_KEYS = ("tenant", "day", "month", "task")
AUDIT_FORMATS = ("table", "csv", "json")
LIMIT_MAX = 100_000
SECONDS_MAX = 86_400


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"evolink-mcp: {message}; see {self.prog} --help\n")


class _MainParser(_Parser):
    def format_help(self) -> str:
        """Append the table of settings to the help."""
        from evolink_mcp.teams.settings import TeamSettings

        terminal = Terminal()
        column = " " * (HELP_COLUMN + 3) if terminal.width > 2 * HELP_COLUMN else "      "
        lines = [
            terminal.wrapped(
                f"{entry.description} Default: {entry.default_text}.", f"  {entry.variable:{HELP_COLUMN}} ", column
            )
            for entry in TeamSettings.table().values()
        ]
        return f"{super().format_help()}\nsettings (environment variables):\n" + "\n".join(lines) + "\n"


def parse_arguments(argv: list[str]) -> Namespace:
    """Return the options. `command` is the name of the command, by default "stdio".

    Raises:
        SystemExit: code 0 after the help or the version, code 2 for wrong arguments.
    """
    parser = _MainParser(prog="evolink-mcp", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"evolink-mcp {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every step to stderr")
    parser.set_defaults(command="stdio")
    # Only the help of the main parser lists the settings.
    commands = parser.add_subparsers(metavar="command", dest="command", parser_class=_Parser)
    for name, protocol in (("http", "streamable HTTP at /mcp"), ("sse", "SSE at /sse, for older clients")):
        serve = commands.add_parser(name, help=f"serve {protocol}")
        serve.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine only)")
        serve.add_argument("--port", type=_port, default=8000, help="port (default: 8000)")
        serve.add_argument(
            "--allowed-host",
            type=_hostname,
            action="append",
            default=[],
            metavar="NAME",
            help="additional hostname of this server",
        )
        serve.add_argument("--insecure", action="store_true", help="serve other machines without authentication")
    token = commands.add_parser("token", help="create a token for the file of EVOLINK_MCP_TOKENS_FILE")
    token.add_argument("name", help="name of the caller")
    demo = commands.add_parser("demo", help="generate an image without a key or a network, with a simulated EvoLink")
    demo.add_argument("prompt", nargs="?", default=EXAMPLE, help="prompt for the image")
    simulate = commands.add_parser("simulate", help="serve a simulated EvoLink")
    simulate.add_argument("--port", type=_port, default=8765, help="port (default: 8765)")
    simulate.add_argument("--seconds", type=_seconds, default=8.0, help="duration of a task (default: 8)")
    simulate.add_argument(
        "--size-rule", choices=("anchor-edge", "pixel-budget"), default="anchor-edge", help="size table of EvoLink"
    )
    tasks = commands.add_parser("tasks", help="list the purchases")
    tasks.add_argument("words", nargs="*", help="only purchases with these words in prompt, file name or task ID")
    tasks.add_argument("--since", default="all", help="today, yesterday, 7d, all (default), or a date")
    tasks.add_argument("--limit", type=_count, default=20, help="maximum number, newest first (default: 20)")
    tasks.add_argument("--json", action="store_true", help="print JSON")
    audit = commands.add_parser("audit", help="add the charges of the journal")
    audit.add_argument("--since", default="all", help="today, yesterday, 7d, all (default), or a date")
    audit.add_argument(
        "--by", choices=AUDIT_KEYS, default="tenant", help="one line per tenant (default), day, month or task"
    )
    audit.add_argument("--format", choices=AUDIT_FORMATS, default="table", help="table (default), csv or json")
    opened = commands.add_parser("open", help="open a saved image, or the output folder")
    opened.add_argument("words", nargs="*", help="words of the prompt, the file name or the task ID")
    opened.add_argument("--since", default="all", help="today, yesterday, 7d, all (default), or a date")
    opened.add_argument("--print", action="store_true", help="only print the path")
    sheet = commands.add_parser("sheet", help="show saved images on one HTML page")
    sheet.add_argument("words", nargs="*", help="only images with these words in prompt, file name or task ID")
    sheet.add_argument("--since", default="today", help="today (default), yesterday, 7d, all, or a date")
    sheet.add_argument("--out", help="new file to write (default: a name with the time, in the output folder)")
    doctor = commands.add_parser("doctor", help="check this installation and print the configuration of each MCP host")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    install = commands.add_parser("install", help="add this server to the configuration of MCP hosts")
    install.add_argument(
        "hosts", nargs="*", metavar="HOST", help="host, for example codex (default: all that it finds)"
    )
    install.add_argument("--undo", action="store_true", help="remove this server from the configuration again")
    install.add_argument("--yes", action="store_true", help="change the files without a question")
    install.add_argument(
        "--key-in-file", action="store_true", help="write the key into the configuration, not into the key store"
    )
    install.add_argument(
        "--store-key",
        action="store_true",
        help="only store the key in the key store, for plugins (with --undo: delete it)",
    )
    word = next((argument for argument in argv if not argument.startswith("-")), None)
    if word == "help":
        parser.print_help()
        parser.exit()
    # argparse would answer with the list of all commands and without the nearest one.
    if word is not None and word not in commands.choices and argv[0] == word:
        parser.exit(2, f"evolink-mcp: unknown command {harmless(word, 40)}; {_hint(word, list(commands.choices))}\n")
    options = parser.parse_args(argv)
    # argparse sets the destination to None if there is no command, in spite of the default.
    options.command = options.command or "stdio"
    return options


def _hint(word: str, commands: list[str]) -> str:
    import difflib

    similar = difflib.get_close_matches(word, commands, n=1)
    return f"did you mean {similar[0]}?" if similar else f"the commands are {', '.join(commands)}"


def _port(text: str) -> int:
    # int() refuses more than 4,300 digits with an error of another kind.
    if not text.isascii() or not text.isdigit() or not 0 <= int(text[:6]) <= 65_535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:10]) <= LIMIT_MAX:
        raise argparse.ArgumentTypeError(f"a limit is a number from 1 to {LIMIT_MAX}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"a duration is a number of seconds from 0 to {SECONDS_MAX}")
    return seconds


def _hostname(text: str) -> str:
    from evolink_mcp.transports.authority import canonical

    hostname = canonical(text)
    if hostname is None:
        raise argparse.ArgumentTypeError("a hostname has no scheme, port or path, for example images.example.com")
    return hostname
