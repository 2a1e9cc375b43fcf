"""The Skills extension (SEP-2640): clients that know it read how to brief, edit, derive sizes and control costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcp.server.context import ServerRequestContext
from mcp.server.extension import Extension, MethodBinding, ResourceBinding
from mcp.server.mcpserver.resources import FunctionResource
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, PaginatedRequestParams, RequestParams

from evolink_mcp.sanitize import harmless
from evolink_mcp.server.catalogue import SKILL_NAME, SKILL_URI, skill_entry, skill_text

# Capabilities of an older protocol version have no field for extensions.
MODERN = frozenset({"2026-07-28"})
DAY_MS = 86_400_000
CACHE: dict[str, Any] = {"resultType": "complete", "ttlMs": DAY_MS, "cacheScope": "private"}

Request = ServerRequestContext[Any, Any]


class SkillParams(RequestParams):
    """The parameters of skills/get."""

    uri: str


class Skills(Extension):
    """One skill with one file."""

    identifier = "io.modelcontextprotocol/skills"

    def resources(self) -> Sequence[ResourceBinding]:
        """Return the file of the skill as a resource."""
        resource = FunctionResource(
            uri=SKILL_URI,
            name=SKILL_NAME,
            title="Skill: images with EvoLink",
            description="How to brief, edit, derive sizes and control costs.",
            mime_type="text/markdown",
            fn=skill_text,
        )
        return [ResourceBinding(resource)]

    def methods(self) -> Sequence[MethodBinding]:
        """Return the two methods of the extension, for clients of its protocol version."""
        return [
            MethodBinding("skills/list", PaginatedRequestParams, self.list, MODERN),
            MethodBinding("skills/get", SkillParams, self.get, MODERN),
        ]

    async def list(self, ctx: Request, params: PaginatedRequestParams) -> dict[str, Any]:
        """Return the entry of the skill."""
        return {**CACHE, "skills": [skill_entry()]}

    async def get(self, ctx: Request, params: SkillParams) -> dict[str, Any]:
        """Return the entry of one skill.

        Raises:
            MCPError: there is no such skill (-32602).
        """
        if params.uri != SKILL_URI:
            raise MCPError(INVALID_PARAMS, f"There is no skill {harmless(params.uri, 80)}, only {SKILL_URI}.")
        return {**CACHE, "skill": skill_entry()}
