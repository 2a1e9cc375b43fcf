"""get_balance: the remaining credits of the account and the key."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import BaseModel

from evolink_mcp.api.costs import usd
from evolink_mcp.api.request import Arguments
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import READS, flat_tool, format_error_as, result
from evolink_mcp.tools.schemas import ErrorOut


class GetBalanceArguments(Arguments):
    """get_balance has no arguments."""


AMOUNTS = ("account_remaining", "account_used", "key_remaining", "key_used")


class BalanceOut(BaseModel):
    """The answer of get_balance, in credits, and as `..._usd` in US dollars."""

    account_remaining: float | None = None
    account_remaining_usd: float | None = None
    account_used: float | None = None
    account_used_usd: float | None = None
    key_remaining: float | None = None
    key_remaining_usd: float | None = None
    key_used: float | None = None
    key_used_usd: float | None = None
    key_unlimited: bool | None = None
    error: ErrorOut | None = None


def get_balance_tool(studio: Studio) -> Tool:
    """Return the tool."""

    async def get_balance(req: GetBalanceArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Remaining credits of the EvoLink account and key. Free of charge."""
        credits = asdict(await studio.balance())
        dollars = {f"{name}_usd": usd(credits[name]) for name in AMOUNTS if credits[name] is not None}
        out = BalanceOut.model_validate(credits | dollars)
        amounts = [
            f"{name.replace('_', ' ')}: {_amount(credits[name], dollars.get(f'{name}_usd'))}" for name in credits
        ]
        return result("Credits. " + ", ".join(amounts) + ".", out)

    return flat_tool(
        get_balance,
        GetBalanceArguments,
        BalanceOut,
        format_error_as(BalanceOut),
        title="Get balance",
        annotations=READS,
    )


def _amount(value: object, dollars: float | None) -> str:
    if dollars is not None:
        return f"{value:g} (${dollars:g})"
    return "unknown" if value is None else str(value).lower()
