"""Find the cause of a failed HTTP request to EvoLink, and build its error."""

from __future__ import annotations

import errno
import html
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx2 as httpx

from evolink_mcp import causes
from evolink_mcp.api.http import CONNECT_TIMEOUT_S, NEVER_CONNECTED, Reply, retry_after_s, retry_at, why
from evolink_mcp.api.proxies import Proxy
from evolink_mcp.api.task import as_dict
from evolink_mcp.api.urls import BASE_URL, FILES_BASE_URL
from evolink_mcp.causes import BY_STATUS, Cause
from evolink_mcp.errors import RateLimited, Rejected, Unreadable
from evolink_mcp.sanitize import harmless, quoted, word

# OpenSSL's results of a verification (x509_vfy.h).
_CERTIFICATE_CAUSES = {
    9: causes.CERTIFICATE_DATE,  # not yet valid
    10: causes.CERTIFICATE_DATE,  # expired
    62: causes.CERTIFICATE_NAME,
    64: causes.CERTIFICATE_NAME,  # the same for an IP address
}
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PAGE = re.compile(rb"<(!doctype\s+html|html|head|body)", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>([^<]{1,200})", re.IGNORECASE)
_PAGE_TITLE_CHARS = 60
_PAGE_START_BYTES = 65_536  # a page's title is near its start
_NETWORK_LOGIN = 511


@dataclass(frozen=True, slots=True)
class Target:
    """The server of an HTTP request. `setting` is the variable of its URL, `default` is EvoLink's URL."""

    host: str
    setting: str
    default: str
    proxy: Proxy | None = None

    @classmethod
    def of(cls, url: httpx.URL, proxy: Proxy | None, *, is_image: bool = False) -> Target:
        """Return the target of a request to EvoLink's API or file API. `is_image`: it is the host of an image."""
        if is_image:
            return cls(url.netloc.decode("ascii"), "the proxy settings", "", proxy)
        is_files = url.path.startswith("/api/v1/files/")
        setting = "EVOLINK_FILES_BASE_URL" if is_files else "EVOLINK_BASE_URL"
        return cls(url.netloc.decode("ascii"), setting, FILES_BASE_URL if is_files else BASE_URL, proxy)


# --- exceptions ---


def certificate_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """Return the certificate error that caused a failure, if one did."""
    return next((link for link in _chain(error) if isinstance(link, ssl.SSLCertVerificationError)), None)


def is_unconnected(error: BaseException) -> bool:
    """Return whether the failure happened before a connection to the target existed."""
    return isinstance(error, (*NEVER_CONNECTED, httpx.ProxyError))


def cause_of_failure(error: BaseException, target: Target, issuer: str | None = None) -> Cause:
    """Return the cause of a failure before a connection existed. `issuer` is that of a certificate which is not trusted."""
    links = list(_chain(error))
    proxy = target.proxy
    if (certificate := certificate_error(error)) is not None:
        cause = _CERTIFICATE_CAUSES.get(certificate.verify_code, causes.CERTIFICATE_UNTRUSTED)
        return cause.about(
            host=target.host,
            setting=target.setting,
            reason=harmless(certificate.verify_message.rstrip("."), 120),
            issuer=f", issuer {issuer}" if issuer else "",
        )
    if any(isinstance(link, PermissionError) for link in links):
        return causes.CONNECTION_FORBIDDEN.about(host=target.host)
    if proxy is not None and isinstance(error, httpx.ProxyError):
        # httpx gives the status of the proxy only in this text: "407 Proxy Authentication Required".
        status = str(error)[:3]
        cause = causes.PROXY_LOGIN if status == "407" else causes.PROXY_REFUSAL
        reason = f"HTTP {status}" if status.isdigit() else "its answer is no proxy's answer"
        return cause.about(proxy=proxy.text, variable=proxy.variable, host=target.host, reason=reason)
    tls_error = next((link for link in links if isinstance(link, ssl.SSLError) and not _is_interrupted(link)), None)
    # Behind a proxy without TLS, a TLS error comes from the target.
    if proxy is not None and (tls_error is None or proxy.url.startswith("https:")):
        return causes.PROXY_SILENT.about(proxy=proxy.text, variable=proxy.variable)
    if tls_error is not None:
        return causes.NO_TLS.about(
            host=target.host, setting=target.setting, reason=harmless(tls_error.reason or "no TLS", 60)
        )
    cause = next(filter(None, map(_cause_of_link, links)), causes.NO_CONNECTION)
    return cause.about(host=target.host, setting=target.setting, seconds=CONNECT_TIMEOUT_S, reason=why(error))


def failure_text(error: BaseException, proxy: Proxy | None) -> str:
    """Return the reason of a failure in a connection that existed, with the proxy of the connection."""
    return why(error) if proxy is None else f"{why(error)}, through the {proxy.text}"


def _cause_of_link(error: BaseException) -> Cause | None:
    if isinstance(error, socket.gaierror):
        return causes.NAME_UNKNOWN
    if isinstance(error, ConnectionRefusedError):
        return causes.CONNECTION_REFUSED
    if isinstance(error, OSError) and error.errno in _NO_ROUTE:
        return causes.NO_ROUTE
    return causes.CONNECTION_SLOW if isinstance(error, httpx.ConnectTimeout) else None


def _is_interrupted(error: ssl.SSLError) -> bool:
    # anyio catches these errors when TLS waits for data, so they are in the context of any later error.
    return isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, its causes and the members of groups."""
    while error is not None:
        yield error
        members: tuple[BaseException, ...] = getattr(error, "exceptions", ())  # those of a group
        for member in members:
            yield from _chain(member)
        error = error.__cause__ or error.__context__


# --- answers ---


def foreign_answer(reply: Reply, target: Target, url: httpx.URL) -> Cause | None:
    """Return the cause of an answer that did not come from EvoLink's API: a web page or a redirect.

    None: it may come from EvoLink. A web page with 404 shows a wrong URL, one with 5xx comes from EvoLink's servers.
    """
    is_client_status = reply.status < 500 or reply.status == _NETWORK_LOGIN
    location = reply.headers.get("location")
    if 300 <= reply.status < 400 and location:
        redirected = urlsplit(urljoin(str(url), location)).netloc.rpartition("@")[2]
        return causes.REDIRECT.about(
            host=target.host, setting=target.setting, target=harmless(redirected, 80), status=reply.status
        )
    if not is_client_status or reply.status in (404, 413, 429):
        return None
    # Megabytes of white space would make the expressions slow.
    start = reply.body[:_PAGE_START_BYTES].lstrip().removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not _PAGE.match(start):
        return None
    match = _TITLE.search(start)
    title = harmless(html.unescape(match[1].decode("utf-8", "replace")), _PAGE_TITLE_CHARS) if match else ""
    shown = f", title {quoted(title)}" if title else ""
    return causes.WEB_PAGE.about(status=reply.status, title=shown, host=target.host)


def rejection(reply: Reply, target: Target, url: httpx.URL, now: float) -> Rejected:
    """Return the error for an answer with a status of BY_STATUS. `now` is in epoch seconds."""
    foreign = foreign_answer(reply, target, url)
    if foreign is not None:
        return rejected(foreign, http_status=reply.status)
    message, codes = _message_and_codes(reply)
    cause = _refusal_cause(reply, target, url, message, codes)
    is_rate_limit = cause.code == causes.RATE_LIMIT.code
    may_call_at = retry_at(reply.headers, now) if is_rate_limit else None
    if is_rate_limit:
        cause = causes.rate_limit(may_call_at, now)
    code = codes[0]
    message_text = f"{cause.meaning} (HTTP {reply.status}"
    message_text += f", {code})" if code and code != str(reply.status) else ")"
    if message:
        message_text += f"; EvoLink's message: {quoted(message)}"
    return rejected(
        cause,
        message=message_text,
        http_status=reply.status,
        retry_after_s=retry_after_s(reply.headers, now),
        retry_at=may_call_at,
    )


def rejected(
    cause: Cause,
    *,
    message: str | None = None,
    http_status: int | None = None,
    retry_after_s: float | None = None,
    retry_at: float | None = None,
) -> Rejected:
    """Return the error of a refusal: RateLimited or Rejected."""
    kind = RateLimited if cause.code == causes.RATE_LIMIT.code else Rejected
    return kind(
        message or cause.meaning,
        code=cause.code,
        retryable=cause.retryable,
        advice=cause.next_step,
        http_status=http_status,
        retry_after_s=retry_after_s,
        retry_at=retry_at,
        cause=cause,
    )


def _refusal_cause(reply: Reply, target: Target, url: httpx.URL, message: str, codes: tuple[str, str]) -> Cause:
    if reply.status == 404:
        is_about_task = url.path.startswith("/v1/tasks/") and not url.path.endswith("/batch")
        if is_about_task and not _PAGE.match(reply.body):
            return causes.TASK_UNKNOWN
        return causes.WRONG_ADDRESS.about(host=target.host, setting=target.setting, default=target.default)
    for code in codes:
        if (cause := causes.cause_of_code(code)) is not None:
            return cause
    if reply.status in (400, 403, 422) and causes.is_moderation(message):
        return causes.CONTENT_POLICY
    return BY_STATUS[reply.status]


def _message_and_codes(reply: Reply) -> tuple[str, tuple[str, str]]:
    """Return message, and code and type, of an error body.

    It is {"error": {...}}, {"error": "x"}, {"code", "msg"}, or none of these.
    """
    try:
        data = reply.json()
    except Unreadable:
        return "", ("", "")
    body = as_dict(data)
    inner = body.get("error")
    source = as_dict(inner) or body
    message = source.get("message") or source.get("msg") or source.get("error_description")
    if message is None and isinstance(inner, str):
        message = inner
    codes = [source.get("code"), source.get("type")]
    code, kind = (word(value, 60) if isinstance(value, str | int) else "" for value in codes)
    return harmless(message) if message else "", (code, kind)
