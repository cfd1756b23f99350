from __future__ import annotations

import os
import signal

import pytest

from merge_kit.cli.signals import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_event_and_is_remembered(number, capfd):
    with Stop() as stop:
        assert not stop.event.is_set()
        os.kill(os.getpid(), number)
        assert stop.event.is_set()
        assert stop.signal == number
    assert "Once more stops at once" in capfd.readouterr().err


def test_the_second_signal_exits_at_once(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with Stop():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
