"""The client's name in the session ID of streamable HTTP.

Each POST is served alone. Before protocol version 2026-07-28 only `initialize` names the client, but each later request has
the session ID. So the ID carries the name. It has no signature: the name sets only wait and previews of the client's own calls.
"""

from __future__ import annotations

import uuid
from base64 import urlsafe_b64decode, urlsafe_b64encode

# The client repeats the session ID as a header of each request.
NAME_MAX_CHARS = 60


def new_session_id(client_name: object) -> str:
    """Return a new session ID. A name that is no text counts as missing."""
    # The protocol allows only visible ASCII in a session ID, so the name is base64. A lone surrogate has no UTF-8.
    name = client_name[:NAME_MAX_CHARS] if isinstance(client_name, str) else ""
    return f"{uuid.uuid4().hex}.{urlsafe_b64encode(name.encode(errors='ignore')).decode()}"


def client_name_in(session_id: str) -> str | None:
    """Return the client's name, or None if the session ID has none."""
    try:
        return urlsafe_b64decode(session_id.partition(".")[2]).decode() or None
    except ValueError:
        return None
