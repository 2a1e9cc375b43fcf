"""The command line's arguments; whatever is wrong with them is told in one line."""

from __future__ import annotations

import argparse
from argparse import Namespace as Namespace
from typing import NoReturn

from evolink_mcp import __version__
from evolink_mcp.sanitize import harmless

DESCRIPTION = "MCP server for EvoLink's gpt-image-2. Without a command it speaks MCP over stdin and stdout."
EXAMPLE = "A calm sunset over the ocean, islands on the horizon"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line, and end with code 2."""
        self.exit(2, f"evolink-mcp: {message}; {self.prog} --help says what there is\n")


def parsed(argv: list[str]) -> Namespace:
    """The options of a command; `command` is its name, "stdio" where none is given.

    Raises:
        SystemExit: help or version was printed (0), or the arguments are wrong (2).
    """
    parser = _Parser(prog="evolink-mcp", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"evolink-mcp {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell on stderr what happens")
    parser.set_defaults(command="stdio")
    commands = parser.add_subparsers(metavar="command", dest="command", parser_class=_Parser)
    for name, what in (("http", "streamable HTTP at /mcp"), ("sse", "SSE at /sse, for older clients")):
        serve = commands.add_parser(name, help=f"serve {what}")
        serve.add_argument("--host", default="127.0.0.1", help="the address to serve at (default: this machine only)")
        serve.add_argument("--port", type=_port, default=8000, help="the port (default: 8000)")
        serve.add_argument(
            "--allowed-host", action="append", default=[], metavar="NAME", help="answer to this name too"
        )
        serve.add_argument("--insecure", action="store_true", help="serve other machines without any authentication")
    token = commands.add_parser("token", help="make a token for the file EVOLINK_MCP_TOKENS_FILE")
    token.add_argument("name", help="who will use it")
    demo = commands.add_parser("demo", help="make a picture without key or network, with a simulated EvoLink")
    demo.add_argument("prompt", nargs="?", default=EXAMPLE, help="what to draw")
    simulate = commands.add_parser("simulate", help="serve a simulated EvoLink")
    simulate.add_argument("--port", type=_port, default=8765, help="the port (default: 8765)")
    simulate.add_argument("--seconds", type=float, default=8.0, help="how long a picture takes")
    simulate.add_argument(
        "--size-rule", choices=("anchor-edge", "pixel-budget"), default="anchor-edge", help="which of EvoLink's tables"
    )
    tasks = commands.add_parser("tasks", help="show what was bought")
    tasks.add_argument("--limit", type=int, default=20, help="how many, the newest first (default: 20)")
    tasks.add_argument("--json", action="store_true", help="print JSON, for programs")
    opened = commands.add_parser("open", help="show a saved picture, or the folder of all")
    opened.add_argument("words", nargs="*", help="words of its prompt, its file's name, or a task's id")
    opened.add_argument("--print", action="store_true", help="only print the path")
    sheet = commands.add_parser("sheet", help="lay saved pictures out on one HTML page")
    sheet.add_argument("words", nargs="*", help="only pictures with these words in prompt, file name or task id")
    sheet.add_argument("--since", default="today", help="today (default), yesterday, 7d, all, or a date")
    sheet.add_argument("--out", help="the new file to write (default: a name with the time, in the pictures' folder)")
    doctor = commands.add_parser("doctor", help="check this installation, and print every host's configuration")
    doctor.add_argument("--json", action="store_true", help="print JSON, for programs")
    word = next((one for one in argv if not one.startswith("-")), None)
    if word == "help":
        parser.print_help()
        parser.exit()
    if word is not None and word not in commands.choices and argv[0] == word:
        import difflib

        near = difflib.get_close_matches(word, commands.choices, n=1)
        meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(commands.choices)}"
        parser.exit(2, f"evolink-mcp: there is no command {harmless(word, 40)}{meant}\n")
    options = parser.parse_args(argv)
    options.command = options.command or "stdio"
    return options


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 <= int(text[:6]) <= 65_535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return int(text)
