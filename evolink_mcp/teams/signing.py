"""Sign texts with the team's secret."""

from __future__ import annotations

import hmac
from collections.abc import Sequence


class Signer:
    """Sign texts for one `purpose` (`callbacks` or `pictures`). Signatures of another purpose are invalid.

    The first of the `secrets` signs. Signatures by the others, which it replaced, stay valid.
    """

    def __init__(self, secrets: Sequence[str], purpose: str) -> None:
        self._keys = [hmac.new(secret.encode(), purpose.encode(), "sha256").digest() for secret in secrets]

    def sign(self, text: str) -> str:
        """Return the signature of the text: 64 hex digits."""
        return _signature(self._keys[0], text)

    def verify(self, text: str, signature: str) -> bool:
        """Return whether this is a signature of the text. Each comparison takes constant time."""
        return any(hmac.compare_digest(_signature(key, text), signature) for key in self._keys)


def _signature(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), "sha256").hexdigest()
