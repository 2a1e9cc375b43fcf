"""The address at which EvoLink tells that a task has ended: signed, so that nobody else can tell, and made for one order.

What comes there is a hint: the task is read back from EvoLink before anything is believed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evolink_mcp.teams.signing import Signer

PATH = "/callbacks/"
# The looks at a task that will be told; they are for a callback that does not come.
BACKSTOP_S = 60.0
_SIGNED = re.compile(r"([0-9a-z]{0,64})\.([A-Za-z0-9_-]{1,96})\.([0-9a-f]{64})")


class Callbacks:
    """Addresses below `public_url`, signed with the team's `secret`."""

    def __init__(self, public_url: str, secret: str) -> None:
        self._public_url = public_url.rstrip("/")
        self._signer = Signer(secret, "callbacks")

    def addressed(self, body: Mapping[str, Any], account: str, key: str) -> dict[str, Any]:
        """The order's body as it is sent: with an address of ours, unless the caller gave one."""
        if "callback_url" in body:
            return dict(body)
        return {
            **body,
            "callback_url": f"{self._public_url}{PATH}{account}.{key}.{self._signer.sign(f'{account}.{key}')}",
        }

    def read(self, path: str) -> tuple[str, str] | None:
        """Account and key of the order that this path was made for; None if it was not made here."""
        found = _SIGNED.fullmatch(path.removeprefix(PATH))
        if found is None or not self._signer.verify(f"{found[1]}.{found[2]}", found[3]):
            return None
        return found[1], found[2]
