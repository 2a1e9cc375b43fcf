"""Keep the API key in the key store of the system: Keychain, Credential Locker or Secret Service.

Needs the extra `keyring`. The library is imported only here, and only if a setting or a command asks for the key store.
"""

from __future__ import annotations

SERVICE = "evolink-mcp"
USER = "EVOLINK_API_KEY"


class KeyStoreUnusable(Exception):
    """The key store is missing, locked or refuses the access. The message is one line and contains no key."""


class KeyStore:
    """The key store of the system."""

    def problem(self) -> str | None:
        """Return the reason why no key store is usable, None if one is."""
        try:
            import keyring
        except ImportError:
            return 'the extra “keyring” is not installed: run pip install ".[keyring]" in the repository of evolink-mcp'
        # The library's substitutes for a missing key store have the priority 0 or -1.
        if keyring.get_keyring().priority <= 0:
            return "this system has no key store"
        return None

    def load(self) -> str | None:
        """Return the key, or None if no key is stored. Raises KeyStoreUnusable."""
        if problem := self.problem():
            raise KeyStoreUnusable(problem)
        import keyring
        import keyring.errors

        try:
            return keyring.get_password(SERVICE, USER)
        except keyring.errors.KeyringError as error:
            # A message of the library may have several lines and name details of the system.
            raise KeyStoreUnusable(f"the key store refuses the access ({type(error).__name__})") from None

    def save(self, key: str) -> None:
        """Store the key in the place of an older one. Raises KeyStoreUnusable."""
        if problem := self.problem():
            raise KeyStoreUnusable(problem)
        import keyring
        import keyring.errors

        try:
            keyring.set_password(SERVICE, USER, key)
        except keyring.errors.KeyringError as error:
            raise KeyStoreUnusable(f"the key store refuses the access ({type(error).__name__})") from None

    def delete(self) -> None:
        """Delete the key, if there is one. Raises KeyStoreUnusable."""
        # The library raises an error for a key that does not exist.
        if self.load() is None:
            return
        import keyring
        import keyring.errors

        try:
            keyring.delete_password(SERVICE, USER)
        except keyring.errors.KeyringError as error:
            raise KeyStoreUnusable(f"the key store refuses the access ({type(error).__name__})") from None
