"""The cost of an order in PostgreSQL: transactions, and messages. The server waits for the answer to each message."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from child_processes import patient_times
from conftest import Clock, Open, PlainSimulator

pytest.importorskip("psycopg")
import psycopg
from psycopg.pq import TransactionStatus

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ORDERS = 30
TRANSACTIONS_MAX = 10
MESSAGES_MAX = 15
LIMITS = {
    "EVOLINK_MCP_MAX_CREDITS_PER_DAY": "900",
    "EVOLINK_MCP_TOTAL_CREDITS_PER_DAY": "900",
    "EVOLINK_MCP_MAX_RUNNING": "5",
}
AFTER_THE_TEST_S = 86_400.0
# The servers before are no other servers that want notifications.
END_LEASES = "UPDATE evolink_servers SET lease_until = clock_timestamp()"


class Cost(NamedTuple):
    transactions: int
    messages: int


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of all later messages to PostgreSQL. The statements of a pipeline are one message."""
    message_list: list[str] = []
    execute, transaction = psycopg.AsyncConnection.execute, psycopg.AsyncConnection.transaction

    async def counted_execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        if self.info.transaction_status != TransactionStatus.ACTIVE:
            message_list.append(str(query))
        return await execute(self, query, *args, **options)

    def counted_transaction(self: Any, *args: Any, **options: Any) -> Any:
        message_list.extend(("BEGIN", "COMMIT"))
        return transaction(self, *args, **options)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", counted_execute)
    monkeypatch.setattr(psycopg.AsyncConnection, "transaction", counted_transaction)
    return message_list


@pytest.mark.parametrize("limits", [{}, LIMITS], ids=["without limits", "with all limits"])
async def test_an_order_needs_few_transactions_and_messages(
    open_world: Open, cluster: Any, messages: list[str], limits: dict[str, str]
) -> None:
    url = cluster.database()
    name = url.partition("@/")[2].partition("?")[0]
    settings = {"EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": "s" * 32, **limits}
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=60)
    # Without heartbeats and searches, only orders use the database.
    times = patient_times(stop_after_s=AFTER_THE_TEST_S, adopt_every_s=AFTER_THE_TEST_S)

    def transactions() -> int:
        """Return the number so far. PostgreSQL counts those of a session at its end."""
        with cluster.admin() as db:
            statement = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
            (number,) = db.execute(statement, (name,)).fetchone()
        return number

    async def cost_of(orders: int) -> Cost:
        """Return the cost of a new server that buys this number of images."""
        before = Cost(transactions(), len(messages))
        async with open_world(settings, simulator=simulator, clock=clock, database_times=times) as world:
            with cluster.admin(name) as db:
                db.execute(f"{END_LEASES} WHERE number <> {world.studio.journal.owner.removeprefix('server-')}")
            async with world.client() as client:
                for number in range(orders):
                    order = {"prompt": f"fox {number} of {orders}", "size": "1024x640", "quality": "low"}
                    answer = await client.call_tool("generate_image", order)
                    assert answer.structured_content["status"] == "completed"
        return Cost(transactions() - before.transactions, len(messages) - before.messages)

    await cost_of(1)  # the first server makes the tables
    one, several = await cost_of(2), await cost_of(2 + ORDERS)
    assert 4 <= (several.transactions - one.transactions) / ORDERS <= TRANSACTIONS_MAX
    assert 4 <= (several.messages - one.messages) / ORDERS <= MESSAGES_MAX
