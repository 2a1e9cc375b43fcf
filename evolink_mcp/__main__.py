"""`python -m evolink_mcp` is `evolink-mcp`."""

from evolink_mcp.cli.main import main

if __name__ == "__main__":
    main()
