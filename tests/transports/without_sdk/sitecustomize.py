"""For a child process: the import of the SDK, and of what it needs, never ends."""

import os
import sys
import threading

NEEDED = {"mcp", "mcp_types", "pydantic", "anyio", "asyncio", "httpx2"}


class Never:
    """A finder that waits."""

    def find_spec(self, name: str, *_: object) -> None:
        """Wait without end, so that only code before this import can answer. A signal still arrives."""
        if name.partition(".")[0] in NEEDED:
            # Not one wait without end: a signal that comes just before it would not be looked at.
            while True:
                threading.Event().wait(0.05)


if os.environ.get("WITHOUT_SDK"):
    sys.meta_path.insert(0, Never())
