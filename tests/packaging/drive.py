"""Drives an installed server, or a bundle unpacked elsewhere, from a foreign folder in a poor environment.

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

BUNDLE_MAX_BYTES = 500_000
# What a machine may need for uv to reach its package index; a server gets nothing of it to work with.
INDEX = ("UV_CACHE_DIR", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "UV_PYTHON", "SSL_CERT_FILE", "HTTPS_PROXY")
MANIFEST = json.loads((Path(__file__).parents[2] / "manifest.json").read_text(encoding="utf-8"))


def main() -> None:
    """Say what was seen; end with 1 when it is not what it should be."""
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
            # Placeholders stay as they are: that is what a host passes for whatever the user left empty.
            env |= config["env"] | {name: os.environ[name] for name in INDEX if name in os.environ}
            server = StdioServerParameters(command=options.uv, args=args, env=env, cwd="/")
        else:
            server = StdioServerParameters(command=options.command, env=env, cwd="/")
        anyio.run(drive, server)


async def drive(server: StdioServerParameters) -> None:
    """Tools as the manifest lists them, a free tool that works, and a missing key told in words to act on."""
    with anyio.fail_after(300):
        async with Client(server) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            size = await client.call_tool("compute_size", {"size": "16:9", "resolution": "2K"})
            refused = await client.call_tool("generate_image", {"prompt": "A calm sunset over the ocean"})
    said = refused.content[0].text
    print(f"{len(names)} tools; without a key: {said.splitlines()[-1]}")
    if names != [tool["name"] for tool in MANIFEST["tools"]]:
        sys.exit(f"the manifest lists other tools than {names}")
    if size.is_error or not refused.is_error or "EVOLINK_API_KEY" not in said or "dashboard/keys" not in said:
        sys.exit(f"not as it should be: {size.content} {refused.content}")


if __name__ == "__main__":
    main()
