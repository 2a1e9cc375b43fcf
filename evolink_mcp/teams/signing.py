"""Signatures by the team's secret: what bears one was made by this team, for one purpose."""

from __future__ import annotations

import hmac


class Signer:
    """Signs texts for one `purpose` (`callbacks`, `pictures`): a signature for another one is worth nothing here."""

    def __init__(self, secret: str, purpose: str) -> None:
        self._key = hmac.new(secret.encode(), purpose.encode(), "sha256").digest()

    def sign(self, text: str) -> str:
        """The signature of this text: 64 hex digits."""
        return hmac.new(self._key, text.encode(), "sha256").hexdigest()

    def signed(self, text: str, signature: str) -> bool:
        """Whether this is the text's signature; how long it takes tells nothing."""
        return hmac.compare_digest(self.sign(text), signature)
