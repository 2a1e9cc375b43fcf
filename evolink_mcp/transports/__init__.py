"""How messages come in and go out: stdin and stdout, or HTTP."""
