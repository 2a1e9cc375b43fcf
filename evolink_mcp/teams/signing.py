"""Sign texts with the team's secret."""

from __future__ import annotations

import hmac


class Signer:
    """Sign texts for one `purpose` (`callbacks` or `pictures`). Signatures of another purpose are invalid."""

    def __init__(self, secret: str, purpose: str) -> None:
        self._key = hmac.new(secret.encode(), purpose.encode(), "sha256").digest()

    def sign(self, text: str) -> str:
        """Return the signature of the text: 64 hex digits."""
        return hmac.new(self._key, text.encode(), "sha256").hexdigest()

    def verify(self, text: str, signature: str) -> bool:
        """Return whether this is the signature of the text. The comparison takes constant time."""
        return hmac.compare_digest(self.sign(text), signature)
