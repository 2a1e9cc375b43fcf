"""get_balance: credits left on the account and the key."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import BaseModel

from evolink_mcp.api.request import Arguments
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import READS, flat_tool, refuse_as, result
from evolink_mcp.tools.schemas import ErrorOut


class GetBalanceArguments(Arguments):
    """get_balance takes nothing."""


class BalanceOut(BaseModel):
    """What get_balance answers, in credits."""

    account_remaining: float | None = None
    account_used: float | None = None
    key_remaining: float | None = None
    key_used: float | None = None
    key_unlimited: bool | None = None
    error: ErrorOut | None = None


def get_balance_tool(studio: Studio) -> Tool:
    """The tool over one studio."""

    async def get_balance(req: GetBalanceArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Credits left on the EvoLink account and key. Free of charge."""
        out = BalanceOut.model_validate(asdict(await studio.balance()))
        words = [f"{name.replace('_', ' ')}: {_amount(value)}" for name, value in out if name != "error"]
        return result("Credits. " + ", ".join(words) + ".", out)

    return flat_tool(
        get_balance, GetBalanceArguments, BalanceOut, refuse_as(BalanceOut), title="Get balance", annotations=READS
    )


def _amount(value: object) -> str:
    return "not told" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
