"""What every process of the tests lives in, those that pytest starts and those that are forked or killed."""

from __future__ import annotations

from collections.abc import Mapping

PATIENT_S = 120


def unmeasured(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what measures coverage in child processes."""
    return {name: value for name, value in environ.items() if not name.startswith("COVERAGE_")}


def keep_the_database() -> None:
    """A machine may stand still for seconds: no server of this process gives its database up for that."""
    from evolink_mcp.teams import database, database_url

    database.Database.__init__.__kwdefaults__["stop_after_s"] = float(PATIENT_S)
    database_url.CONNECT_TIMEOUT_S = database.CONNECT_TIMEOUT_S = PATIENT_S
