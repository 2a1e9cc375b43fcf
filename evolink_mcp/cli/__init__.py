"""What a person runs: settings, the objects built from them, and the commands."""
