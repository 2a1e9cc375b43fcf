"""Objects that all tests of one process share, because each takes longer to make than a test."""

from __future__ import annotations

import atexit
import json
from functools import cache
from typing import Any

import httpx2 as httpx
from jsonschema import Draft202012Validator

from evolink_mcp.api.http import HttpOptions
from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.images.decode_process import Decoder

CERTIFICATES_READ_ONCE = HttpOptions(make_ssl_context=cache(httpx.create_ssl_context))


@cache
def shared_decoder() -> Decoder:
    """Return an image decoder with real processes.

    A test that ends decoder processes, or counts them, needs its own `Decoder`.
    """
    decoder = Decoder(decoder_environment())
    atexit.register(decoder.close)
    return decoder


def check_each_schema_once() -> None:
    """Let the SDK's client check each output schema once per process, and not once per connection."""
    check = Draft202012Validator.check_schema
    valid: set[str] = set()

    def check_new(schema: Any, *arguments: Any, **options: Any) -> None:
        text = json.dumps([schema, arguments, options], sort_keys=True, default=repr)
        if text not in valid:
            check(schema, *arguments, **options)
            valid.add(text)

    Draft202012Validator.check_schema = check_new
