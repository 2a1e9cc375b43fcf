"""The URL of the team's PostgreSQL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from evolink_mcp.errors import JournalUnwritable

# PostgreSQL ends the session of an unreachable server after 7 s, and a transaction of a frozen server after 5 s. A statement
# waits longer for a lock than that. These options overrule the settings of the database.
OPTIONS = (
    "-c synchronous_commit=on -c default_transaction_isolation=read\\ committed -c statement_timeout=8s "
    "-c lock_timeout=6s -c idle_in_transaction_session_timeout=5s -c tcp_keepalives_idle=3 -c tcp_keepalives_interval=2 "
    "-c tcp_keepalives_count=2 -c tcp_user_timeout=7000"
)
# The same times for the client's end of a connection.
KEEPALIVES = {"keepalives_idle": 3, "keepalives_interval": 2, "keepalives_count": 2, "tcp_user_timeout": 7000}
ADVICE = (
    "Nothing is bought that cannot be written down first. Tell the administrator that the database of "
    "EVOLINK_MCP_DATABASE_URL cannot be used; then call again."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseTimes:
    """Times of a server's session, in seconds.

    `stop_after_s`: a server stops its work this long after the last answer of its session. `grace_s`: other servers
    adopt the entries of a dead server this long after the end of its session, or after the time when it must have stopped
    its work. `adopt_every_s`: pause between searches for such entries. `check_after_s`: the pool checks a connection before
    its use if it was idle for this time, or if its last use was before the current session of this server.
    `action_min_s`: every action may take this time, also after the deadline of its call.
    """

    connect_timeout_s: int = 5
    stop_after_s: float = 3.0
    # Longer than `stop_after_s`, so that two servers never work on one entry.
    grace_s: float = 4.0
    adopt_every_s: float = 3.0
    check_after_s: float = 5.0
    # An upload may have used the time of the call.
    action_min_s: float = 2.0

    @property
    def lease_s(self) -> float:
        """The time from a heartbeat to the deadline of the lease."""
        return self.stop_after_s + self.grace_s


DEFAULT_TIMES = DatabaseTimes()


@dataclass(frozen=True, slots=True)
class Address:
    """The connection string of libpq, the `place` for messages, and the `passwords` that must not appear in them."""

    conninfo: str = field(repr=False)
    place: str
    passwords: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, url: str, connect_timeout_s: int = DEFAULT_TIMES.connect_timeout_s) -> Address:
        """Read a value of EVOLINK_MCP_DATABASE_URL.

        Raises:
            JournalUnwritable: It is no PostgreSQL URL.
        """
        try:
            values = conninfo_to_dict(url)
            options: dict[str, Any] = {
                "application_name": "evolink-mcp",
                "connect_timeout": connect_timeout_s,
                **KEEPALIVES,
            }
            conninfo = make_conninfo(url, **options, options=f"{values.get('options') or ''} {OPTIONS}".strip())
        except psycopg.ProgrammingError:
            place = "the database"
            # The chained error would quote the URL with its password.
            raise cls("", place).unwritable("its address is not one that PostgreSQL understands") from None
        host = values.get("host") or values.get("hostaddr") or "this machine"
        public_values = {host, values.get("dbname"), values.get("user")}
        passwords = [str(values[name]) for name in ("password", "sslpassword") if values.get(name)]
        return cls(
            conninfo,
            f"the database {values.get('dbname') or values.get('user') or ''} on {host}",
            # A password that equals the user name would remove this name from every message.
            tuple(password for password in passwords if password not in public_values),
        )

    def unwritable(self, reason: str) -> JournalUnwritable:
        """Return the error with the database's name and setting, and without a password."""
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
