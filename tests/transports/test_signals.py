"""Signals reach the event loop on every system: also Windows, whose loops know no signals."""

from __future__ import annotations

import signal

import anyio
import pytest

from evolink_mcp.transports.signals import STOP_SIGNALS, on_stop_signal

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_signal_is_heard_with_its_exit_code_and_the_old_handler_comes_back(number: int) -> None:
    before = signal.getsignal(number)
    heard: list[int] = []
    with anyio.fail_after(300):
        with on_stop_signal(heard.append):
            signal.raise_signal(number)
            while not heard:
                await anyio.sleep(0.01)
    assert heard == [130 if number == signal.SIGINT else 143]
    assert signal.getsignal(number) == before
