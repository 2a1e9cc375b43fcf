"""The addresses for EvoLink's callbacks. Each one belongs to one entry and is signed, so only this team can make it.

A callback is a hint: the server polls the task before it believes anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from evolink_mcp.teams.signing import Signer

PATH = "/callbacks/"
_SIGNED = re.compile(r"([0-9a-z]{0,64})\.([A-Za-z0-9_-]{1,96})\.([0-9a-f]{64})")


class Callbacks:
    """Addresses below `public_url`, signed with the team's `secrets`."""

    def __init__(self, public_url: str, secrets: Sequence[str]) -> None:
        self._public_url = public_url.rstrip("/")
        self._signer = Signer(secrets, "callbacks")

    def add_address(self, body: Mapping[str, Any], channel: str, key: str) -> dict[str, Any]:
        """Return the request body with this entry's address, unless the caller gave one."""
        if "callback_url" in body:
            return dict(body)
        # The channel is a hash of the profile, so the address does not show the profile to EvoLink.
        signature = self._signer.sign(f"{channel}.{key}")
        return {**body, "callback_url": f"{self._public_url}{PATH}{channel}.{key}.{signature}"}

    def read(self, path: str) -> tuple[str, str] | None:
        """Return channel and key of the entry that this path belongs to. None: this team did not make the path."""
        match = _SIGNED.fullmatch(path.removeprefix(PATH))
        if match is None or not self._signer.verify(f"{match[1]}.{match[2]}", match[3]):
            return None
        return match[1], match[2]
