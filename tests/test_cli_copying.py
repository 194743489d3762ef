"""What happens around a long copy: Ctrl-C, a dropped connection, no terminal, and the bar on one.

A copy is made long by a process that stops at its first progress report until a file named `go` appears.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptstore.cli import progress as module
from ckptstore.cli.progress import Progress
from ckptstore.manifest import parse
from ckptstore.model import MANIFEST_NAME
from tests import commands, trees
from tests.commands import Terminal, flat

EXPERIMENT = "copy-grpo"
STEP = ("setup", "--as-is", "--step", "93")

#: Runs the command line with a copy that reports its progress, waits for `go`, and goes on reporting.
SLOW = """
import os, sys, time
from ckptstore import native
from ckptstore.cli import main
real = native.copy_files
def slow(source, target, specs, *, options, progress):
    total = sum(spec.size_bytes for spec in specs)
    done = 0
    while not os.path.exists("go"):
        done = min(done + 1, total - 1)
        progress(done, total)
        open("copying", "w").close()
        time.sleep(0.01)
    return real(source, target, specs, options=options, progress=progress)
native.copy_files = slow
main()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    commands.isolate(monkeypatch, tmp_path)
    path = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46, 93], slot="era_a", slot_step=46, recover_info=46)
    trees.set_age(tmp_path / "logs", 3600)
    return path


def environment(run: Path, **more: str) -> dict[str, str]:
    return commands.environment(CKPTSTORE_FILEROOT=str(run.parents[3]), **more)


def placed(run: Path) -> int:
    path = run / "default/recover_checkpoint" / MANIFEST_NAME
    return parse(path.read_bytes()).step if path.exists() else 0


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None, "the command ended early"
        assert time.monotonic() < end
        os.sched_yield()


@pytest.fixture
def copying(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A setup in the middle of its copy, without a terminal."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *STEP], env=environment(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        wait_for(Path("copying"), process)
        yield process
        process.kill()


def test_ctrl_c_leaves_the_slot_and_says_how_to_go_on(run: Path, copying: subprocess.Popen[bytes]) -> None:
    before = commands.snapshot(run)
    copying.send_signal(signal.SIGINT)
    _, err = copying.communicate(timeout=30)
    assert copying.returncode == 130
    text = flat(err.decode())
    assert "stopped: the slot is as it was" in text
    assert "The same command continues where it stopped" in text
    assert "`ckptstore clean` removes what is staged" in text
    assert text.endswith("interrupted")
    assert commands.snapshot(run) == before
    side = run.parent / ".ckptstore/trial0"
    assert len(list(side.glob("stage-*"))) == 1
    Path("go").touch()
    assert commands.spawn(*STEP, env=environment(run)).code == 0  # the same command
    assert placed(run) == 93
    assert list(side.glob("stage-*")) == []


def test_a_dropped_connection_does_not_stop_the_copy(run: Path, copying: subprocess.Popen[bytes]) -> None:
    copying.send_signal(signal.SIGHUP)
    copying.send_signal(signal.SIGHUP)
    Path("go").touch()
    copying.communicate(timeout=30)
    assert copying.returncode == 0
    assert placed(run) == 93


def test_a_dropped_connection_leaves_output_that_goes_to_a_file(run: Path) -> None:
    words = [sys.executable, "-c", SLOW, *STEP]
    with open("log", "wb") as log, subprocess.Popen(words, env=environment(run), stdout=log, stderr=log) as process:
        wait_for(Path("copying"), process)
        process.send_signal(signal.SIGHUP)
        Path("go").touch()
        assert process.wait(30) == 0
    assert "✓ global step 93" in Path("log").read_text()


def test_a_terminal_that_goes_away_does_not_stop_the_copy(run: Path) -> None:
    """The bar is being drawn when the terminal vanishes: writing to it fails, and SIGHUP comes."""
    words = [sys.executable, "-c", SLOW, *STEP]
    with Terminal(words, env=environment(run, TERM="xterm-256color")) as terminal:
        terminal.expect("copying default")
        terminal.hang_up()
        Path("go").touch()
        assert terminal.process.wait(30) == 0
    assert placed(run) == 93


def test_the_bar_shows_bytes_rate_and_time_left(run: Path) -> None:
    with Terminal([sys.executable, "-c", SLOW, *STEP], env=environment(run, TERM="xterm-256color")) as terminal:
        terminal.expect("copying default")
        terminal.expect(" bytes/s ")
        Path("go").touch()
        result = terminal.finish()
    assert result.code == 0
    assert "━" in result.out
    assert "✓ global step 93" in flat(result.out)


def test_a_second_setup_is_told_how_far_the_first_one_is(run: Path, copying: subprocess.Popen[bytes]) -> None:
    result = commands.spawn(*STEP, env=environment(run))
    assert result.code == 1
    assert f"pid {copying.pid} on " in result.err
    assert "setup of step 93" in result.err or "copying default" in result.err
    assert "another ckptstore is at work" in commands.spawn("list", env=environment(run)).err


def test_json_has_no_progress(run: Path) -> None:
    Path("go").touch()
    words = [sys.executable, "-c", SLOW, *STEP, "--json"]
    done = subprocess.run(words, env=environment(run), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


# --- without a terminal -------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def report(progress: Progress, clock: Clock, *, seconds: int, start_bytes: int = 0) -> None:
    """A copy of 100 MB/s, reported once a second."""
    for second in range(seconds + 1):
        progress.notify("copying default", start_bytes + second * 100_000_000, 10_000_000_000)
        clock.now_s += 1


def test_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress() as progress:
        report(progress, clock, seconds=25)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "copying default: 1.0 GB of 10.0 GB, 100 MB/s, 90 s left",
        "copying default: 2.0 GB of 10.0 GB, 100 MB/s, 80 s left",
    ]


def test_what_was_staged_before_is_not_counted_as_speed(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress() as progress:
        report(progress, clock, seconds=10, start_bytes=8_000_000_000)
    assert capsys.readouterr().err == "copying default: 9.0 GB of 10.0 GB, 100 MB/s, 10 s left\n"


def test_what_begins_anew_has_a_rate_of_its_own(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    """After the digests the upload, and a file that is sent again: no rate is below nothing."""
    with Progress() as progress:
        progress.notify("digesting default", 10_000_000_000, 10_000_000_000)
        clock.now_s += 1
        report(progress, clock, seconds=15)
        report(progress, clock, seconds=10)
    assert capsys.readouterr().err.splitlines() == [
        "copying default: 900 MB of 10.0 GB, 100 MB/s, 91 s left",
        "copying default: 300 MB of 10.0 GB, 100 MB/s, 97 s left",
    ]


def test_a_standstill_is_said(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    """All parts are on their way, and the store has stopped answering: neither a rate nor "0 s left"."""
    with Progress() as progress:
        report(progress, clock, seconds=5)
        for _ in range(20):
            progress.notify("copying default", 600_000_000, 10_000_000_000)
            clock.now_s += 1
        report(progress, clock, seconds=10, start_bytes=600_000_000)
    assert [line.rpartition(", ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "3 min left",
        "nothing moved for 14 s",
        "4 min left",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(quiet=True) as progress:
        report(progress, clock, seconds=30)
    assert capsys.readouterr() == ("", "")


def test_a_stream_that_fails_ends_the_display_not_the_copy(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def fail(text: str, *, err: bool) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "echo", fail)
    with Progress() as progress:
        report(progress, clock, seconds=30)


def test_names_of_parts_do_not_drive_the_terminal(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress() as progress:
        for second in range(12):
            progress.notify("copying \x1b[2Jred", second, 100)
            clock.now_s += 1
    assert r"copying \x1b[2Jred: " in capsys.readouterr().err


def test_the_signal_handler_of_before_is_back(run: Path) -> None:
    before = signal.getsignal(signal.SIGHUP)
    with Progress():
        assert signal.getsignal(signal.SIGHUP) != before
    assert signal.getsignal(signal.SIGHUP) == before
