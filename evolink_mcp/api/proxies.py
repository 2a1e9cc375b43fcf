"""The proxy that the environment names for a URL. A text about a proxy never contains its user name or password."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass

_PLAIN_ADDRESS = re.compile(r"[\w.-]{1,253}(:\d{1,5})?|\[[0-9a-fA-F:.]{2,45}\](:\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy. `url` may contain a password. `variable` is the place of its setting."""

    url: str
    variable: str

    @property
    def address(self) -> str:
        """The host and port without user name and password. Empty if the URL is unusual."""
        # A password may contain "/" or "@", so only the part behind the last "@" is the address.
        after_password = self.url.rpartition("@")[2].rpartition("://")[2]
        address = re.split(r"[/?#]", after_password, maxsplit=1)[0]
        return address if _PLAIN_ADDRESS.fullmatch(address) else ""

    @property
    def text(self) -> str:
        """The proxy for a sentence: "proxy of HTTPS_PROXY (127.0.0.1:3128)"."""
        return f"proxy of {self.variable} ({self.address})" if self.address else f"proxy of {self.variable}"


def proxy_for(scheme: str, hostname: str) -> Proxy | None:
    """Return the proxy for a URL with this scheme and host. None: no proxy."""
    proxies = urllib.request.getproxies()
    # httpx chooses in the same order, so this is the proxy that it uses.
    key = scheme if proxies.get(scheme) else "all"
    url = proxies.get(key)
    if not url or urllib.request.proxy_bypass(hostname):
        return None
    # Without variables, `getproxies` reads the system settings of Windows and macOS.
    is_variable = key in urllib.request.getproxies_environment()
    return Proxy(url, f"{key.upper()}_PROXY" if is_variable else "the system settings")


def proxy_variables() -> list[str]:
    """Return the names of the set proxy variables."""
    return [f"{name.upper()}_PROXY" for name in urllib.request.getproxies()]
