"""Every purchase, written down before it is paid for."""

# The profile of a person on one machine, unless EVOLINK_MCP_PROFILE names another one.
DEFAULT_PROFILE = "default"
