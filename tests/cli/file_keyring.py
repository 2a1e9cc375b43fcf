"""A key store in one file, for tests of other processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked


class FileKeyring(KeyringBackend):
    priority = 9

    @property
    def _file(self) -> Path:
        return Path(os.environ["TEST_KEY_STORE"])

    def _passwords(self) -> dict[str, str]:
        if not self._file.exists():
            return {}
        content = self._file.read_text()
        if content == "locked":
            raise KeyringLocked("the user closed the window")
        return json.loads(content)

    def get_password(self, service: str, username: str) -> str | None:
        return self._passwords().get(f"{service} {username}")

    def set_password(self, service: str, username: str, password: str) -> None:
        self._file.write_text(json.dumps({**self._passwords(), f"{service} {username}": password}))

    def delete_password(self, service: str, username: str) -> None:
        passwords = self._passwords()
        del passwords[f"{service} {username}"]
        self._file.write_text(json.dumps(passwords))
