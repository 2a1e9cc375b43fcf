"""The target of a framework's script, and its report: one line of JSON on stdout, which drive.py checks."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

TARGET: dict[str, Any] = json.loads(sys.argv[1])
MODEL_URL: str = TARGET["model_url"]
ORDER = "Make one image."
KEY = "sk-no-key"


def report(package: str) -> None:
    print("\nREPORT " + json.dumps({"version": f"{package} {version(package)}"}))
