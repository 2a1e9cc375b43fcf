"""Test an installed server or an unpacked bundle from another folder with a minimal environment.

drive.py COMMAND
drive.py --bundle FILE --uv UV --into FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

BUNDLE_MAX_BYTES = 800_000
# uv may need these variables to reach its package index. The server does not use them.
INDEX_VARIABLES = (
    "UV_CACHE_DIR",
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_FIND_LINKS",
    "UV_PYTHON",
    "SSL_CERT_FILE",
    "HTTPS_PROXY",
)
MANIFEST = json.loads((Path(__file__).parents[2] / "manifest.json").read_text(encoding="utf-8"))


def main() -> None:
    """Print the result. Exit with 1 if it is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", nargs="?")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--uv")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        env = {"HOME": home, "PATH": "/usr/bin:/bin"}
        if options.bundle:
            size = options.bundle.stat().st_size
            if size > BUNDLE_MAX_BYTES:
                sys.exit(f"the bundle has {size} bytes, more than {BUNDLE_MAX_BYTES}")
            zipfile.ZipFile(options.bundle).extractall(options.into)
            config = json.loads((options.into / "manifest.json").read_text(encoding="utf-8"))["server"]["mcp_config"]
            args = [arg.replace("${__dirname}", str(options.into)) for arg in config["args"]]
            # Placeholders stay unchanged: a host passes them for fields that the user left empty.
            env |= config["env"] | {name: os.environ[name] for name in INDEX_VARIABLES if name in os.environ}
            server = StdioServerParameters(command=options.uv, args=args, env=env, cwd="/")
        else:
            server = StdioServerParameters(command=options.command, env=env, cwd="/")
        anyio.run(drive, server)


async def drive(server: StdioServerParameters) -> None:
    """Check the list of tools, a free tool, and the error for a missing key."""
    with anyio.fail_after(300):
        async with Client(server) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            size = await client.call_tool("compute_size", {"size": "16:9", "resolution": "2K"})
            refusal = await client.call_tool("generate_image", {"prompt": "A calm sunset over the ocean"})
    message = refusal.content[0].text
    print(f"{len(names)} tools; without a key: {message.splitlines()[-1]}")
    if names != [tool["name"] for tool in MANIFEST["tools"]]:
        sys.exit(f"the manifest lists other tools than {names}")
    if size.is_error or not refusal.is_error or "EVOLINK_API_KEY" not in message or "dashboard/keys" not in message:
        sys.exit(f"wrong answers: {size.content} {refusal.content}")


if __name__ == "__main__":
    main()
