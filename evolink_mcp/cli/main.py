"""The entry point of `evolink-mcp`.

Without an argument it serves MCP over stdio: it reads stdin and answers the first requests before it imports the rest.
"""

import sys

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from evolink_mcp.teams.database_url import DatabaseTimes


def main(argv: "list[str] | None" = None, database_times: "DatabaseTimes | None" = None) -> None:
    """Run a command and end the process with its exit code. `database_times` is for tests."""
    arguments = sys.argv[1:] if argv is None else argv
    early_session = None
    if not arguments:
        from evolink_mcp.cli.early_session import EarlySession

        early_session = EarlySession()
    from evolink_mcp.cli.commands import run_command

    run_command(arguments, early_session, database_times)
