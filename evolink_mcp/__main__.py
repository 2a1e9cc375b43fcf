"""Run `evolink-mcp` as `python -m evolink_mcp`."""

from evolink_mcp.cli.main import main

if __name__ == "__main__":
    main()
