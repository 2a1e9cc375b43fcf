"""Profiles: the owners of entries, one per person or tenant."""

from __future__ import annotations

from urllib.parse import quote, unquote

# The profile of a person on one machine, unless EVOLINK_MCP_PROFILE names another one.
DEFAULT_PROFILE = "default"


def profile_id(name: str) -> str:
    """Return the profile's name as the tables have it: only characters that need no quotes in SQL."""
    return quote(name, safe="", errors="surrogatepass")


def profile_name(profile: str) -> str:
    """Return the name of which `profile_id` made this value."""
    return unquote(profile, errors="surrogatepass")
