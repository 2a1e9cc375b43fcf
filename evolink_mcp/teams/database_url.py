"""PostgreSQL's address: how it is reached, and what may be said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from evolink_mcp.errors import JournalUnwritable

CONNECT_TIMEOUT_S = 5
# What a server holds that is cut off from the network is free after 7 s; and what the database's owner has set does not
# loosen what the journal promises.
OPTIONS = (
    "-c synchronous_commit=on -c default_transaction_isolation=read\\ committed -c statement_timeout=30s "
    "-c idle_in_transaction_session_timeout=30s -c tcp_keepalives_idle=3 -c tcp_keepalives_interval=2 "
    "-c tcp_keepalives_count=2 -c tcp_user_timeout=7000"
)
KEEPALIVES = {"keepalives_idle": 3, "keepalives_interval": 2, "keepalives_count": 2, "tcp_user_timeout": 7000}
ADVICE = (
    "Nothing is bought that cannot be written down first. Tell the administrator that the database of "
    "EVOLINK_MCP_DATABASE_URL cannot be used; then call again."
)


@dataclass(frozen=True, slots=True)
class Address:
    """The connection string of libpq, the `place` for messages, and the `passwords` that must not appear in them."""

    conninfo: str = field(repr=False)
    place: str
    passwords: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, url: str) -> Address:
        """The address of a URL of EVOLINK_MCP_DATABASE_URL.

        Raises:
            JournalUnwritable: it is none.
        """
        try:
            said = conninfo_to_dict(url)
            more: dict[str, Any] = {
                "application_name": "evolink-mcp",
                "connect_timeout": CONNECT_TIMEOUT_S,
                **KEEPALIVES,
            }
            conninfo = make_conninfo(url, **more, options=f"{said.get('options') or ''} {OPTIONS}".strip())
        except psycopg.ProgrammingError:
            place = "the database"
            raise cls("", place).unwritable("its address is not one that PostgreSQL understands") from None
        host = said.get("host") or said.get("hostaddr") or "this machine"
        shown = {host, said.get("dbname"), said.get("user")}
        passwords = [str(said[name]) for name in ("password", "sslpassword") if said.get(name)]
        return cls(
            conninfo,
            f"the database {said.get('dbname') or said.get('user') or ''} on {host}",
            tuple(password for password in passwords if password not in shown),
        )

    def unwritable(self, reason: str) -> JournalUnwritable:
        """The error that names the place and the setting, and never a password."""
        return JournalUnwritable(
            f"the journal in {self.place} cannot be used ({reason}); EVOLINK_MCP_DATABASE_URL names it",
            advice=ADVICE,
            retryable=True,
        )

    def reason(self, error: Exception) -> str:
        """Return the first line of an error, without a password. A server may quote its input."""
        text = str(error)
        for password in self.passwords:
            text = text.replace(password, "***")
        return next(iter(text.strip().splitlines()), "") or type(error).__name__
