"""Every purchase, written down before it is paid for."""
