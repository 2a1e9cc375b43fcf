"""Each fault has one cause. The tool, `doctor` and the log name it in the same words, with the next step."""

from __future__ import annotations

import errno
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import faulty_gateway as gw
import httpx2 as httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from faulty_gateway import CURRENT, ONE_SERVER, Gateway, QuickSimulator
from mcp.client import Client
from pydantic import SecretStr
from shared import shared_decoder

from evolink_mcp import causes
from evolink_mcp.api.certificates import issuer_of
from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.http import retry_at
from evolink_mcp.api.proxies import Proxy
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.cli import doctor
from evolink_mcp.errors import Rejected
from evolink_mcp.teams.settings import TeamSettings

pytestmark = pytest.mark.anyio

KEY = "sk-canary-0123456789abcdef"
PASSWORD = "hunter2-canary"
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}
ISSUER = "Example Corp Inspection"
NOW = 1_795_000_020.0  # the begin of a minute
EVOLINK = "https://api.evolink.ai"

Environ = dict[str, str]
Place = Callable[[Path], AbstractAsyncContextManager[Environ]]


@dataclass(frozen=True)
class Fault:
    """A fault. `place` yields the variables of the server. The texts of all three places contain `texts`.

    `forbidden_words` would lead to a wrong step. `is_outcome_known` is false if the POST may have bought.
    `places`: the places that show the fault. `arguments` are those of generate_image.
    """

    place: Place
    texts: tuple[str, ...]
    code: str = "unreachable"
    forbidden_words: tuple[str, ...] = ("EVOLINK_API_KEY",)
    is_outcome_known: bool = True
    places: tuple[str, ...] = ("generate_image", "get_balance", "doctor", "log")
    arguments: Callable[[Path], dict[str, Any]] = lambda _: {}


# --- places ---


@asynccontextmanager
async def evolink(_: Path) -> AsyncIterator[Environ]:
    """EvoLink without a fault."""
    async with Gateway(QuickSimulator(duration_s=0)).open() as gateway:
        yield {"EVOLINK_BASE_URL": gateway.url}


def with_settings(**settings: str) -> Place:
    """Return a place with EvoLink and these settings. {folder} in a value is the folder of the test."""

    @asynccontextmanager
    async def place(folder: Path) -> AsyncIterator[Environ]:
        (folder / "note.txt").write_text("a file, no folder")
        async with evolink(folder) as environ:
            yield {**environ, **{name: value.replace("{folder}", str(folder)) for name, value in settings.items()}}

    return place


def with_image(content: bytes, name: str = "photo.png") -> Callable[[Path], dict[str, Any]]:
    """Return arguments with a reference image of this content."""

    def arguments(folder: Path) -> dict[str, Any]:
        path = folder / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return {"image_urls": [name]}

    return arguments


def with_argument(**arguments: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda _: arguments


def answers(status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> Place:
    """Return a place at which every request gets this answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    @asynccontextmanager
    async def place(_: Path) -> AsyncIterator[Environ]:
        always = gw.before(gw.answers(status, content, **headers))
        async with Gateway(QuickSimulator(), [always], always=True, reads=lambda _: always).open() as gateway:
            yield {"EVOLINK_BASE_URL": gateway.url}

    return place


def error(status: int, code: str | int, message: str = "it is refused", **headers: str) -> Place:
    return answers(status, {"error": {"code": code, "message": message, "type": "invalid_request_error"}}, **headers)


def at(url: str, **variables: str) -> Place:
    """Return a place where EvoLink's URL is `url` and the process has these proxy or certificate variables."""

    @asynccontextmanager
    async def place(_: Path) -> AsyncIterator[Environ]:
        yield {"EVOLINK_BASE_URL": url, **variables}

    return place


def through_proxy(status_line: bytes) -> Place:
    """Return a place behind a proxy that answers CONNECT with this line. Without one it closes the connection."""

    @asynccontextmanager
    async def place(_: Path) -> AsyncIterator[Environ]:
        head = b"HTTP/1.1 " + status_line + b"\r\ncontent-length: 0\r\n\r\n" if status_line else b""
        refuse = gw.before(gw.sends(head))
        async with Gateway(QuickSimulator(), reads=lambda _: refuse).open() as gateway:
            proxy = gateway.url.replace("http://", f"http://anna:{PASSWORD}@")
            yield {"EVOLINK_BASE_URL": EVOLINK, "HTTPS_PROXY": proxy}

    return place


def certificate(folder: Path, *, name: str = "127.0.0.1", days: int = 30) -> tuple[ssl.SSLContext, Path]:
    """Return the TLS of a server with a new certificate, and the file of its issuer."""
    issuer_key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)])
    start = datetime.now(UTC) - timedelta(days=365)
    key = ec.generate_private_key(ec.SECP256R1())

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey, is_authority: bool) -> Any:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=3650 if is_authority else 365 + days))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    authority = builder(issuer, issuer_key.public_key(), True).sign(issuer_key, hashes.SHA256())
    names: list[x509.GeneralName] = [x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name)]
    leaf = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    authority_file = folder / "authority.pem"
    server_file = folder / "server.pem"
    authority_file.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    server_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + leaf.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    return context, authority_file


def tls(*, is_trusted: bool, **options: Any) -> Place:
    """Return a place with TLS. `options` are those of `certificate`."""

    @asynccontextmanager
    async def place(folder: Path) -> AsyncIterator[Environ]:
        context, authority = certificate(folder, **options)
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)

        async def serve(stream: anyio.abc.SocketStream) -> None:
            try:
                async with await anyio.streams.tls.TLSStream.wrap(stream, server_side=True, ssl_context=context):
                    pass
            except (anyio.BrokenResourceError, anyio.EndOfStream, ssl.SSLError, OSError):
                await stream.aclose()

        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, serve)
            variables = {"SSL_CERT_FILE": str(authority)} if is_trusted else {}
            yield {"EVOLINK_BASE_URL": f"https://127.0.0.1:{port}", **variables}
            group.cancel_scope.cancel()

    return place


@asynccontextmanager
async def plain_http(_: Path) -> AsyncIterator[Environ]:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield {"EVOLINK_BASE_URL": f"https://127.0.0.1:{port}"}
        group.cancel_scope.cancel()


BLOCK_PAGE = b"<!DOCTYPE html>\n<html><head><title>Access denied &ndash; Example Corp</title></head></html>"
WEB_PAGE = ("a web page answered instead of EvoLink's API", "firewall", "The API key is not the cause")
CORRECT_PROXY = "correct or remove HTTPS_PROXY"
MODERATION = ("the content policy does not allow this picture", "Change the prompt or the reference pictures")
MODERATED = {
    "code": "content_policy_violation",
    "forbidden_words": ("EVOLINK_API_KEY", "argument", "permission", "Use a key"),
}
CREDITS = ("does not have enough credits", "Top up at https://evolink.ai/dashboard", "get_balance")

FAULTS: dict[str, Fault] = {
    # the network
    "a certificate of an unknown issuer": Fault(
        tls(is_trusted=False),
        ("the certificate of 127.0.0.1:", "is not trusted", f"issuer {ISSUER}", "Set SSL_CERT_FILE", "root certificate"),
    ),
    "an expired certificate": Fault(
        tls(is_trusted=True, days=-1), ("is not valid today", "has expired", "Check the date of this machine")
    ),
    "a certificate for another name": Fault(
        tls(is_trusted=True, name="login.example.com"), ("is for another name", "EVOLINK_BASE_URL", "login page")
    ),
    "no TLS": Fault(plain_http, ("does not answer with TLS", "EVOLINK_BASE_URL")),
    "a closed port": Fault(at("https://127.0.0.1:9"), ("127.0.0.1:9 refuses the connection", "firewall")),
    "an unknown name": Fault(
        at("https://nowhere.invalid"), ("the name nowhere.invalid cannot be resolved (DNS)", "Check the network")
    ),
    "a proxy that is down": Fault(
        at(EVOLINK, HTTPS_PROXY="http://127.0.0.1:9"),
        ("the proxy of HTTPS_PROXY (127.0.0.1:9) does not answer", CORRECT_PROXY),
    ),
    "a proxy with a password that is down": Fault(
        at(EVOLINK, HTTPS_PROXY=f"http://anna:{PASSWORD}@127.0.0.1:9"),
        ("the proxy of HTTPS_PROXY (127.0.0.1:9) does not answer", CORRECT_PROXY),
    ),
    "a proxy with a password that breaks its URL": Fault(
        at(EVOLINK, HTTPS_PROXY=f"http://anna:{PASSWORD}/x@127.0.0.1:9"),
        ("HTTPS_PROXY cannot be used", "Correct HTTPS_PROXY"),
        "unusable_environment",
    ),
    "a proxy for all protocols that is down": Fault(
        at(EVOLINK, ALL_PROXY="http://127.0.0.1:9"), ("the proxy of ALL_PROXY (127.0.0.1:9) does not answer",)
    ),
    "a SOCKS proxy that is down": Fault(
        at(EVOLINK, ALL_PROXY="socks5h://127.0.0.1:9"), ("the proxy of ALL_PROXY (127.0.0.1:9) does not answer",)
    ),
    "a proxy with an unknown name": Fault(
        at(EVOLINK, HTTPS_PROXY="http://proxy.invalid:3128"), ("the proxy of HTTPS_PROXY (proxy.invalid:3128)",)
    ),
    "a proxy that asks for a password": Fault(
        through_proxy(b"407 Proxy Authentication Required"),
        ("the proxy of HTTPS_PROXY (127.0.0.1:", "requires a user name and a password (HTTP 407)", "into HTTPS_PROXY"),
    ),
    "a proxy that forbids the host": Fault(
        through_proxy(b"403 Forbidden"),
        ("refuses the connection to api.evolink.ai (HTTP 403)", "Ask the administrator of the proxy"),
    ),
    "a proxy that is not a web proxy": Fault(through_proxy(b""), ("the proxy of HTTPS_PROXY (127.0.0.1:",)),
    "a scheme of a proxy that is not supported": Fault(
        at(EVOLINK, HTTPS_PROXY="socks9://127.0.0.1:9"),
        ("HTTPS_PROXY cannot be used", "Correct HTTPS_PROXY"),
        "unusable_environment",
    ),
    "a missing certificate file": Fault(
        at(EVOLINK, SSL_CERT_FILE="/nonexistent/ca.pem"), ("SSL_CERT_FILE", "Correct"), "unusable_environment"
    ),
    "a block page with 403": Fault(
        answers(403, BLOCK_PAGE, content_type="text/html"),
        (*WEB_PAGE, "HTTP 403, title “Access denied – Example Corp”"), "blocked_by_network",
    ),
    "a block page with 401": Fault(
        answers(401, BLOCK_PAGE, content_type="text/html"), (*WEB_PAGE, "HTTP 401"), "blocked_by_network"
    ),
    "a block page with 400": Fault(
        answers(400, BLOCK_PAGE), (*WEB_PAGE, "HTTP 400"), "blocked_by_network"
    ),
    "a login page with 200": Fault(
        answers(200, BLOCK_PAGE, content_type="text/html"),
        (WEB_PAGE[0], "HTTP 200"), "outcome_unknown", is_outcome_known=False,
    ),
    "a login page with 511": Fault(
        answers(511, BLOCK_PAGE, content_type="text/html"),
        (WEB_PAGE[0], "HTTP 511"), "outcome_unknown", is_outcome_known=False,
    ),
    "a redirect to a login page": Fault(
        answers(302, location="https://login.example.com/?next=1"),
        ("redirects to login.example.com (HTTP 302)",), "outcome_unknown", is_outcome_known=False,
    ),
    "a wrong base URL with a web page": Fault(
        answers(404, b"<html><title>404 Not Found</title></html>", content_type="text/html"),
        ("EvoLink's API has no such address", "Check EVOLINK_BASE_URL", EVOLINK), "wrong_address",
        forbidden_words=("EVOLINK_API_KEY", "this task", "Check the id"),
    ),
    "a wrong base URL with JSON": Fault(
        error(404, "not_found"), ("EvoLink's API has no such address", "Check EVOLINK_BASE_URL"), "wrong_address",
        forbidden_words=("EVOLINK_API_KEY", "this task", "Check the id"),
    ),
    # the account
    "a wrong key": Fault(error(401, "unauthorized"), ("did not accept the API key", "Check EVOLINK_API_KEY"),
                         "unauthorized", forbidden_words=()),
    "a wrong key with a number as code": Fault(
        error(401, 401), ("did not accept the API key", "Check EVOLINK_API_KEY"), "unauthorized", forbidden_words=()),
    "a disabled key": Fault(error(403, "key_disabled"), ("disabled this API key", "Create a new key at https://"),
                            "unauthorized", forbidden_words=("permission",)),
    "an expired key": Fault(error(401, "key_expired"), ("the key has expired", "Create a new key at https://"),
                            "unauthorized", forbidden_words=("mistyped",)),
    "a blocked network address": Fault(
        error(403, "ip_restricted"), ("network address of this machine", "Allow this address"), "forbidden"),
    "a model that the key may not use": Fault(
        error(403, "model_access_denied"), ("has no permission", "Use a key that has access"), "forbidden"),
    **{f"no credits, {status} {code}": Fault(error(status, code), CREDITS, "insufficient_credits")
       for status, code in ((402, "insufficient_quota"), (403, "insufficient_user_quota"), (429, "insufficient_quota"),
                            (403, "key_quota_exhausted"), (403, "account_balance_insufficient"))},
    **{f"moderation, {status} {code}": Fault(error(status, code), MODERATION, **MODERATED)
       for status, code in ((400, "content_policy_violation"), (400, "sensitive_content"), (400, "moderation_blocked"),
                            (403, "content_filter"), (422, "input_moderation_failed"))},
    "moderation with a general code": Fault(
        error(400, "invalid_request", "Your request was rejected by our safety system."), MODERATION, **MODERATED),
    "a wrong argument": Fault(
        error(400, "invalid_parameters", "moderation: unknown parameter"), ("Correct the argument",),
        "invalid_request", forbidden_words=("EVOLINK_API_KEY", "content policy")),
    "a request that is too large": Fault(
        error(413, "too_large"), ("too large for EvoLink", "Send URLs or smaller pictures"), "too_large"),
    "a rate limit without a time": Fault(
        error(429, "rate_limit_exceeded"), ("limits the request rate", "Wait a minute"), "rate_limited"),
    **{f"a rate limit with {value}": Fault(
        error(429, "rate_limit_exceeded", retry_after=value),
        ("limits the request rate", f"not before {time}"), "rate_limited", forbidden_words=("EVOLINK_API_KEY", "Wait a minute"))
       for value, time in (("3600", f"{datetime.fromtimestamp(NOW + 3600):%H:%M} (in 60 minutes)"),
                           ("120", f"{datetime.fromtimestamp(NOW + 120):%H:%M} (in 2 minutes)"),
                           (formatdate(NOW + 7200, usegmt=True),
                            f"{datetime.fromtimestamp(NOW + 7200):%H:%M} (in 2 hours)"))},
    # the host and its configuration
    "no key": Fault(
        with_settings(EVOLINK_API_KEY=""), ("EVOLINK_API_KEY", "https://evolink.ai/dashboard/keys"), "key_missing",
        forbidden_words=(), places=("generate_image", "get_balance", "doctor")),
    "the example instead of a key": Fault(
        with_settings(EVOLINK_API_KEY="sk-..."), ("is still the example",), "key_missing", forbidden_words=(),
        places=("generate_image", "get_balance", "doctor")),
    "a key with a single quote": Fault(
        with_settings(EVOLINK_API_KEY='"sk-0123456789'), ("without quotes",), "key_missing", forbidden_words=(),
        places=("generate_image", "get_balance", "doctor")),
    "a key that the host did not fill in": Fault(
        with_settings(EVOLINK_API_KEY="sk-${env:KEY}-x"), ("the MCP host did not replace",), "key_missing", forbidden_words=(),
        places=("generate_image", "get_balance", "doctor")),
    "a limit per call": Fault(
        with_settings(EVOLINK_MCP_MAX_CREDITS_PER_CALL="0.1"),
        ("above the limit of 0.1 credits", "The user can raise EVOLINK_MCP_MAX_CREDITS_PER_CALL"), "over_budget",
        places=("generate_image",)),
    "a limit per day": Fault(
        with_settings(EVOLINK_MCP_MAX_CREDITS_PER_DAY="0.1"), ("EVOLINK_MCP_MAX_CREDITS_PER_DAY",), "over_budget",
        places=("generate_image",)),
    "a callback host that is not allowed": Fault(
        with_settings(EVOLINK_MCP_CALLBACK_HOSTS="hooks.evolink.ai"),
        ("this server allows hooks.evolink.ai", "Leave out callback_url"), "callback_refused",
        places=("generate_image",), arguments=with_argument(callback_url="https://hooks.pixabay.com/x")),
    "an argument of another service": Fault(
        evolink, ("n",), "invalid_arguments", places=("generate_image",), arguments=with_argument(numberOfImages=2)),
    "a size that is not legal": Fault(
        evolink, ("size", "multiple of 16"), "invalid_arguments", places=("generate_image",),
        arguments=with_argument(size="1001x1001")),
    # folders, disks and files
    "a file in the place of the output folder": Fault(
        with_settings(EVOLINK_MCP_OUTPUT_DIR="{folder}/note.txt/pictures"),
        ("note.txt", "cannot be written", "set EVOLINK_MCP_OUTPUT_DIR to another folder"), "folder_refused",
        places=("generate_image", "folders")),
    "a file in the place of the journal folder": Fault(
        with_settings(EVOLINK_MCP_DATA_DIR="{folder}/note.txt/data"),
        ("note.txt", "EVOLINK_MCP_DATA_DIR"), "journal_unwritable", places=("generate_image", "journal")),
    "a missing reference image": Fault(
        evolink, ("There is no file", "nowhere.png"), "reference_refused", places=("generate_image",),
        arguments=with_argument(image_urls=["nowhere.png"])),
    "a text file as reference image": Fault(
        evolink, ("photo.png", "cannot be a reference"), "reference_refused", places=("generate_image",),
        arguments=with_image(b"this is no image")),
    "a truncated reference image": Fault(
        evolink, ("photo.png", "cannot be a reference"), "reference_refused", places=("generate_image",),
        arguments=with_image(b"\x89PNG\r\n\x1a\n" + bytes(40))),
    "save_as outside the allowed folders": Fault(
        evolink, ("is outside the allowed folders", "EVOLINK_MCP_ALLOWED_DIRS"), "folder_refused",
        places=("generate_image",), arguments=with_argument(save_as="/nonexistent/x.png")),
}  # fmt: skip


# --- the three places of a text ---


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the proxy and certificate variables of this machine. Two spellings of a variable exist."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return iter([None])


async def no_sleep(_: float) -> None:
    await anyio.sleep(0)


def _text_of(findings: list[doctor.Finding]) -> str:
    return "\n".join(f"{finding.words} {finding.todo}" for finding in findings if finding.verdict != "ok")


def test_the_table_has_60_faults() -> None:
    assert len(FAULTS) >= 60


@pytest.mark.parametrize(
    ("number", "next_step"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EROFS, "mount it for writing"),
        (errno.EACCES, "Correct the permissions"),
        (errno.ENOTDIR, "Remove or rename the file"),
        (errno.EIO, "Make it writable"),
    ],
)
def test_each_failure_of_a_folder_has_its_own_next_step(number: int, next_step: str, tmp_path: Path) -> None:
    error = OSError(number, os.strerror(number))
    cause = causes.folder_fault(tmp_path, error, "EVOLINK_MCP_OUTPUT_DIR", "linux")
    assert cause.meaning == f"the folder {tmp_path} cannot be written ({os.strerror(number)})"
    assert next_step in cause.next_step
    assert cause.next_step.endswith("set EVOLINK_MCP_OUTPUT_DIR to another folder.")


def test_macos_names_the_setting_that_protects_folders(tmp_path: Path) -> None:
    error = PermissionError(errno.EPERM, "Operation not permitted")
    cause = causes.folder_fault(tmp_path, error, "EVOLINK_MCP_OUTPUT_DIR", "darwin")
    assert "System Settings › Privacy & Security › Files and Folders" in cause.next_step


@pytest.mark.parametrize("fault", [pytest.param(fault, id=name) for name, fault in FAULTS.items()])
async def test_tool_doctor_and_log_name_the_cause_and_the_next_step(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "evolink_mcp")
    with anyio.fail_after(300):
        async with fault.place(tmp_path) as environ:
            for name in ("HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE"):
                if name in environ:
                    monkeypatch.setenv(name, environ[name])
            settings = TeamSettings.from_environment({
                "EVOLINK_API_KEY": KEY, "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"),
                "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"), **environ,
            })  # fmt: skip
            options: dict[str, Any] = {"sleep": no_sleep, "deadline": gw.deadline_at_silence}
            async with (
                open_studio(settings, decoder=shared_decoder(), clock=lambda: NOW, **options) as studio,
                Client(ONE_SERVER) as client,
            ):
                CURRENT.studio = studio
                purchase = await client.call_tool("generate_image", {**REQUEST, **fault.arguments(tmp_path)})
                balance = await client.call_tool("get_balance", {})
            findings = [doctor.check_key(settings), *await doctor.check_account(settings, lambda: NOW)]
    out = purchase.structured_content
    charged = "no" if fault.is_outcome_known else "unknown"
    assert (out["charged"], out["error"]["code"], purchase.is_error) == (charged, fault.code, True)
    texts = {
        "generate_image": purchase.content[0].text,
        "get_balance": balance.content[0].text,
        "doctor": _text_of(findings),
        "folders": _text_of(doctor.check_folders(settings)),
        "journal": _text_of(doctor.check_journal(settings.data_dir)),
        "log": "\n".join(record.getMessage() for record in caplog.records),
    }
    texts = {place: texts[place] for place in fault.places}
    missing = {
        place: [part for part in fault.texts if part.lower() not in text.lower()] for place, text in texts.items()
    }
    assert {place: parts for place, parts in missing.items() if parts} == {}, texts
    for text in texts.values():
        assert [word for word in (*fault.forbidden_words, KEY, PASSWORD, "hunter2") if word in text] == []


# --- rate limits ---


async def test_after_a_long_rate_limit_no_purchase_is_sent_before_its_end(tmp_path: Path) -> None:
    now = NOW
    limit = gw.before(gw.answers(429, b"{}", retry_after="3600"))
    gateway = Gateway(QuickSimulator(duration_s=0), [limit])
    with anyio.fail_after(300):
        async with gateway.open(), Client(ONE_SERVER) as client:
            settings = TeamSettings.from_environment({
                "EVOLINK_API_KEY": KEY, "EVOLINK_BASE_URL": gateway.url, "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"),
                "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"),
            })  # fmt: skip
            options: dict[str, Any] = {"sleep": no_sleep, "deadline": gw.deadline_at_silence}
            async with open_studio(settings, decoder=shared_decoder(), clock=lambda: now, **options) as studio:
                CURRENT.studio = studio
                first = await client.call_tool("generate_image", REQUEST)
                now += 600
                requests = list(gateway.requests)
                second = await client.call_tool("generate_image", {**REQUEST, "prompt": "another fox"})
                assert gateway.requests == requests
                now += 3000
                third = await client.call_tool("generate_image", REQUEST)
    at = datetime.fromtimestamp(NOW + 3600)
    for answer, distance in ((first, "60 minutes"), (second, "50 minutes")):
        error = answer.structured_content["error"]
        assert (error["code"], answer.structured_content["charged"]) == ("rate_limited", "no")
        assert error["advice"] == f"Call again, but not before {at:%H:%M} (in {distance})."
        assert datetime.fromisoformat(error["retry_at"]).timestamp() == NOW + 3600
    assert (gateway.posts, third.structured_content["charged"]) == (2, "yes")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "in 1 seconds"),
        (89, "in 89 seconds"),
        (90, "in 2 minutes"),
        (7140, "in 119 minutes"),
        (7199, "in 2 hours"),
        (86_400, "in 24 hours"),
    ],
)
def test_the_next_step_contains_the_time_until_the_next_call(seconds: int, text: str) -> None:
    assert text in causes.rate_limit(NOW + seconds, NOW).next_step


def test_the_next_step_contains_the_date_of_another_day() -> None:
    day = datetime.fromtimestamp(NOW + 3 * 86_400)
    assert f"{day:%Y-%m-%d %H:%M} (in 72 hours)" in causes.rate_limit(NOW + 3 * 86_400, NOW).next_step


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [("3600", 3600), ("0", None), ("-5", None), ("soon", None), ("inf", 120), ("1e9", 120),
     (formatdate(NOW + 3 * 86_400, usegmt=True), 3 * 86_400), (formatdate(NOW - 5, usegmt=True), None)],
)  # fmt: skip
def test_only_a_credible_time_of_a_rate_limit_counts(header: str, wait_s: float | None) -> None:
    at = retry_at(httpx.Headers({"retry-after": header}), NOW)
    assert at == (None if wait_s is None else NOW + wait_s)


# --- parts ---


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://proxy.example.com:3128", "proxy.example.com:3128"),
        ("proxy.example.com:3128", "proxy.example.com:3128"),
        ("http://anna:secret@10.0.0.1:3128/", "10.0.0.1:3128"),
        ("http://anna:se/cr@et@10.0.0.1:3128", "10.0.0.1:3128"),
        ("socks5h://[::1]:1080", "[::1]:1080"),
        ("http://anna:secret", ""),
        ("http://anna secret", ""),
        ("anna:se cret", ""),
    ],
)
def test_the_address_of_a_proxy_has_no_password(url: str, address: str) -> None:
    assert Proxy(url, "HTTPS_PROXY").address == address


def test_a_damaged_certificate_has_no_issuer(tmp_path: Path) -> None:
    _, authority = certificate(tmp_path)
    der = x509.load_pem_x509_certificate(authority.read_bytes()).public_bytes(serialization.Encoding.DER)
    assert issuer_of(der) == ISSUER
    assert {issuer_of(der[:end]) for end in range(0, len(der) - 1, 7)} == {None}
    assert issuer_of(b"\x30\x82") is None


@pytest.mark.parametrize("code", ["moderation_blocked", "content_filter", "input_moderation_failed"])
def test_moderation_of_a_running_task_has_the_same_cause_as_at_submit(code: str) -> None:
    assert causes.cause_of_task_code(code) == causes.CONTENT_POLICY


def test_an_unknown_code_of_a_failed_task_stays() -> None:
    assert causes.cause_of_task_code("odd_code").code == "odd_code"


@pytest.mark.parametrize(
    ("setting", "base_url"),
    [
        ("https://api.evolink.ai/v1", EVOLINK),
        ("https://api.evolink.ai/v1/", EVOLINK),
        ("https://api.evolink.ai/v1/images/generations", EVOLINK),
        ("https://gateway.example.com/evolink/v1/tasks", "https://gateway.example.com/evolink"),
    ],
)
def test_a_base_url_ends_before_the_version_and_one_line_says_so(
    setting: str, base_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert TeamSettings.from_environment({"EVOLINK_BASE_URL": setting}).base_url == base_url
    (record,) = caplog.records
    assert record.getMessage() == f"EVOLINK_BASE_URL must end before /v1: the server uses {base_url}"


@pytest.mark.parametrize("url", [EVOLINK, "https://x.example.com/v1beta", "https://x.example.com/v1/evolink"])
def test_another_path_of_a_base_url_stays(url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert TeamSettings.from_environment({"EVOLINK_BASE_URL": url}).base_url == url
    assert caplog.records == []


async def test_the_same_cause_is_logged_once_until_a_request_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    refuse = gw.before(gw.error(401, "unauthorized"))
    reads = iter([refuse, refuse, None, refuse])
    gateway = Gateway(QuickSimulator(), reads=lambda _: next(reads))
    async with gateway.open(), EvolinkClient(SecretStr(KEY), base_url=gateway.url) as client:
        for _ in range(4):
            with suppress(Rejected):
                await client.balance()
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    assert messages[0].startswith("EvoLink did not accept the API key. Check EVOLINK_API_KEY")
