"""Only public addresses are valid. Each spelling of an internal address that a resolver reads is refused."""

from __future__ import annotations

import ipaddress

import pytest

from evolink_mcp.api import urls

LABEL_63 = "a" * 63


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://example.com/h", id="a name"),
        pytest.param("https://EXAMPLE.com", id="capitals and no path"),
        pytest.param("HTTPS://example.com/", id="scheme in capitals"),
        pytest.param("https://example.com./h", id="absolute name"),
        pytest.param("https://your-domain.com:8443/webhooks?a=b@c", id="port, path, an @ in the query"),
        pytest.param("https://example.com/@user/pic.png", id="an @ in the path"),
        pytest.param("https://my_bucket.s3.amazonaws.com/a%20b.png", id="underscore"),
        pytest.param("https://xn--mnchen-3ya.de/h", id="punycode"),
        pytest.param("https://münchen.de/h", id="international name"),
        pytest.param("https://例え.jp/絵.png", id="international name and path"),
        pytest.param("https://localhost.example.com/h", id="special word that is no suffix"),
        pytest.param("https://10.example.com/h", id="number that is not the last label"),
        pytest.param("https://8.8.8.8/h", id="public IPv4"),
        pytest.param("https://172.32.0.1/h", id="just above 172.16/12"),
        pytest.param("https://172.15.255.255/h", id="just below 172.16/12"),
        pytest.param("https://100.128.0.1/h", id="just above CGNAT"),
        pytest.param("https://169.253.255.255/h", id="just below link-local"),
        pytest.param("https://[2606:4700::1111]:65535/h", id="public IPv6 and the last port"),
        pytest.param(f"https://{'.'.join([LABEL_63] * 3)}.{'a' * 57}.com/", id="253 characters of host"),
        pytest.param("https://example.com/" + "a" * 2028, id="2048 characters"),
    ],
)
def test_a_public_url_is_returned_unchanged(url: str) -> None:
    assert url == urls.check_public_url(url)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("", id="empty"),
        pytest.param("http://example.com/h", id="plain http"),
        pytest.param("javascript:alert(1)", id="script"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("https:example.com", id="no authority"),
        pytest.param("//example.com/h", id="no scheme"),
        pytest.param("https://", id="nothing"),
        pytest.param("https:///h", id="empty host"),
        pytest.param("https://?x", id="query for a host"),
        pytest.param("https://:443/h", id="port for a host"),
        pytest.param("https://./h", id="only the root"),
        pytest.param(" https://example.com/h", id="leading blank"),
        pytest.param("https://exam\tple.com/h", id="tab"),
        pytest.param("https://example.com/\x00", id="NUL"),
        pytest.param("https://example.com/\r\nHost: x", id="header in the path"),
        pytest.param("https://example.com/\x85", id="C1 control"),
        pytest.param("https://example.com/\u00a0", id="no-break blank"),
        pytest.param("https://exam\u200bple.com/", id="zero-width blank"),
        pytest.param("https://example.com/\u202egnp", id="bidi override"),
        pytest.param("https://example.com/\ud800", id="lone surrogate"),
        pytest.param("https://example.com\\@10.0.0.1/", id="backslash"),
        pytest.param("https://user@example.com/h", id="user name"),
        pytest.param("https://example.com@10.0.0.1/h", id="host as user name"),
        pytest.param("https://:@example.com/h", id="empty user name"),
        pytest.param("https://example.com/h#top", id="fragment"),
        pytest.param("https://10.0.0.1#@example.com/h", id="fragment hides the host"),
        pytest.param("https://10.0.0.1?@example.com/", id="query hides the host"),
        pytest.param("https://example.com?@10.0.0.1/", id="query hides another host"),
        pytest.param("https://example.com:0/h", id="port 0"),
        pytest.param("https://example.com:65536/h", id="port too large"),
        pytest.param("https://example.com:/h", id="empty port"),
        pytest.param("https://example.com:abc/h", id="port in letters"),
        pytest.param("https://example.com:４４３/h", id="port in full-width digits"),
        pytest.param("https://example.com:443:80/h", id="two ports"),
        pytest.param("https://.example.com/h", id="leading dot"),
        pytest.param("https://example..com/h", id="empty label"),
        pytest.param("https://example.com../h", id="two final dots"),
        pytest.param("https://-example.com/h", id="label begins with a hyphen"),
        pytest.param("https://exam%70le.com/h", id="percent in the host"),
        pytest.param(f"https://{LABEL_63}a.com/", id="label of 64"),
        pytest.param(f"https://{'.'.join([LABEL_63] * 3)}.{'a' * 58}.com/", id="254 characters of host"),
        pytest.param(f"https://{'é' * 63}.com/", id="label too long once encoded"),
        pytest.param("https://example.com/" + "a" * 2029, id="2049 characters"),
        pytest.param("https://[::1/h", id="unbalanced bracket"),
        pytest.param("https://[2606:4700::1111]x/h", id="text after the bracket"),
        pytest.param("https://[v1.x]/h", id="future address"),
        pytest.param("https://[fe80::1%25eth0]/h", id="zone"),
        pytest.param("https://[2606:4700::1%25eth0]/h", id="zone on a public address"),
        pytest.param("https://[8.8.8.8]/h", id="IPv4 in brackets is IPv4 no more"),
        pytest.param("https://127.0.0.1/h", id="loopback"),
        pytest.param("https://8.8.8.8./h", id="quad with a final dot"),
        pytest.param("https://2130706433/h", id="decimal"),
        pytest.param("https://0x7f000001/h", id="hexadecimal"),
        pytest.param("https://0x7f.1/h", id="hexadecimal and short"),
        pytest.param("https://127.0.0.0x1/h", id="hexadecimal at the end"),
        pytest.param("https://1.2.3.0x/h", id="bare 0x"),
        pytest.param("https://0177.0.0.1/h", id="octal"),
        pytest.param("https://08.8.8.8/h", id="leading zero"),
        pytest.param("https://127.1/h", id="short form"),
        pytest.param("https://0/h", id="zero"),
        pytest.param("https://8.8.8.256/h", id="octet too large"),
        pytest.param("https://1.2.3.4.5/h", id="five octets"),
        pytest.param("https://example.123/h", id="numeric last label"),
        pytest.param("https://١٢٧.٠.٠.١/h", id="Arabic-Indic digits"),
        pytest.param("https://１２７.0.0.1/h", id="full-width digits"),
        pytest.param("https://①②⑦.0.0.1/h", id="circled digits"),
        pytest.param("https://127。0。0。1/h", id="ideographic full stops"),
        pytest.param("https://example｡com/h", id="half-width full stop"),
        pytest.param("https://127.0.0.1\ufe0f/h", id="a mark that IDNA drops"),
        pytest.param("https://example.com\u2215@/h", id="division slash"),
        pytest.param("https://loc\uff41lhost/h", id="NFKC changes a letter"),
        pytest.param("https://localhost/h", id="loopback name"),
        pytest.param("https://LOCALHOST./h", id="loopback name, capitals and dot"),
        pytest.param("https://foo.localhost/h", id="below localhost"),
        pytest.param("https://localhost.localdomain/h", id="hosts file"),
        pytest.param("https://ip6-localhost/h", id="single label"),
        pytest.param("https://printer.local/h", id="mDNS"),
        pytest.param("https://db.internal/h", id="internal"),
        pytest.param("https://metadata.google.internal./h", id="metadata service"),
        pytest.param("https://router.lan/h", id="lan"),
        pytest.param("https://nas.home.arpa/h", id="home.arpa"),
        pytest.param("https://1.0.0.127.in-addr.arpa/h", id="arpa"),
        pytest.param("https://hidden.onion/h", id="onion"),
        pytest.param("https://www.example/h", id="example as a top level"),
    ],
)
def test_every_other_url_is_refused_in_one_sentence_without_the_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"^The URL[^\n]+\.$") as refusal:
        urls.check_public_url(url)
    assert len(url) < 12 or url not in str(refusal.value)


def test_the_caller_sets_schemes_and_length() -> None:
    assert urls.check_public_url("http://example.com/", schemes=("http", "https")) == "http://example.com/"
    with pytest.raises(ValueError, match="http:// or https://"):
        urls.check_public_url("ftp://example.com/", schemes=("http", "https"))
    with pytest.raises(ValueError, match="longer than 8192"):
        urls.check_public_url("https://example.com/" + "a" * 1_000_000, max_length=8192)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        pytest.param("8.8.8.8", True, id="public IPv4"),
        pytest.param("2606:4700::1111", True, id="public IPv6"),
        pytest.param("2001:200::1", True, id="just above 2001::/23"),
        pytest.param("3fff:1000::1", True, id="just above 3fff::/20"),
        pytest.param("0.1.2.3", False, id="this network"),
        pytest.param("10.255.255.255", False, id="RFC 1918 10/8"),
        pytest.param("172.16.0.1", False, id="RFC 1918 172.16/12"),
        pytest.param("192.168.1.1", False, id="RFC 1918 192.168/16"),
        pytest.param("100.64.0.1", False, id="CGNAT"),
        pytest.param("127.255.255.254", False, id="loopback"),
        pytest.param("169.254.169.254", False, id="metadata"),
        pytest.param("168.63.129.16", False, id="Azure platform"),
        pytest.param("192.0.0.192", False, id="Oracle metadata"),
        pytest.param("192.88.99.1", False, id="6to4 relay"),
        pytest.param("198.19.255.255", False, id="benchmarks"),
        pytest.param("203.0.113.1", False, id="TEST-NET-3"),
        pytest.param("224.0.0.1", False, id="multicast"),
        pytest.param("255.255.255.255", False, id="broadcast"),
        pytest.param("::", False, id="unspecified"),
        pytest.param("::1", False, id="IPv6 loopback"),
        pytest.param("::ffff:8.8.8.8", False, id="v4-mapped"),
        pytest.param("::127.0.0.1", False, id="v4-compatible"),
        pytest.param("64:ff9b::7f00:1", False, id="NAT64"),
        pytest.param("100::1", False, id="discard"),
        pytest.param("2001:0:7f00:1::", False, id="Teredo"),
        pytest.param("2001:db8::1", False, id="documentation"),
        pytest.param("2002:7f00:1::", False, id="6to4"),
        pytest.param("3fff::1", False, id="new documentation"),
        pytest.param("fd00:ec2::254", False, id="ULA"),
        pytest.param("fe80::1", False, id="IPv6 link-local"),
        pytest.param("2606:4700::1%eth0", False, id="zone"),
        pytest.param("fec0::1", False, id="site-local"),
        pytest.param("ff02::1", False, id="IPv6 multicast"),
        pytest.param("example.com", False, id="no address"),
    ],
)
def test_an_ip_address_is_public_by_fixed_lists(address: str, public: bool) -> None:
    assert public == urls.is_public_ip(address)


def test_parsed_addresses_get_the_same_result() -> None:
    assert urls.is_public_ip(ipaddress.ip_address("1.1.1.1"))
    assert not urls.is_public_ip(ipaddress.ip_address("::ffff:127.0.0.1"))
