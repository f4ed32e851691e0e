"""What a long step says."""

from __future__ import annotations

import pytest

from stack import console
from tests.support import wait_until


def test_a_step_without_news_says_that_it_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "QUIET_S", 0.1)
    said = ""

    def lines() -> list[str]:
        nonlocal said
        said += capsys.readouterr().err
        return said.splitlines()

    with console.Step("building") as progress:
        progress.update("1 of 2")
        wait_until(lambda: sum("1 of 2" in line for line in lines()) > 2, 10, "the step repeats what it is at")
    assert lines()[0] == "--> building"
    assert lines()[-1].startswith("✓ building ")


def test_a_step_in_a_log_says_no_two_changes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with console.Step("building") as progress:
            progress.update("1 of 2")
            progress.update("2 of 2")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    begun, first, ended = capsys.readouterr().err.splitlines()
    assert begun == "--> building"
    assert first.endswith("0 s  1 of 2")
    assert ended.startswith("✗ building ")
