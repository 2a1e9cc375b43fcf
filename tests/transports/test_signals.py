"""Signals reach the event loop on every system. Event loops on Windows have no signal support."""

from __future__ import annotations

import signal

import anyio
import pytest

from evolink_mcp.transports.signals import STOP_SIGNALS, on_stop_signal

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_signal_arrives_with_its_exit_code_and_the_previous_handler_is_restored(number: int) -> None:
    before = signal.getsignal(number)
    exit_codes: list[int] = []
    with anyio.fail_after(300):
        with on_stop_signal(exit_codes.append):
            signal.raise_signal(number)
            while not exit_codes:
                await anyio.sleep(0.01)
    assert exit_codes == [130 if number == signal.SIGINT else 143]
    assert signal.getsignal(number) == before
