"""The trainer is watched until its first step: it resumed where it should, or it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptstore.errors import NotFoundError
from ckptstore.supervise import NotResumed, run_confirmed


def trainer(script: str) -> list[str]:
    return [sys.executable, "-u", "-c", script]


def test_a_trainer_that_resumes_runs_to_its_end(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    said: list[str] = []
    script = "print('Recovering from step 187'); print('Train step 189/935 done.'); print('Train step 190/935 done.'); exit(7)"
    assert run_confirmed(trainer(script), expected_step=188, say=said.append) == 7
    assert said == ["resumed at global step 188 (the log says: Train step 189)"]
    assert b"Train step 190" in capfdbinary.readouterr().out


@pytest.mark.parametrize(
    "line", ["Train step 1/935 done.", "Train step 188/935 done.", "WARNING: This should not be a resumed experiment!"]
)
def test_a_trainer_that_starts_elsewhere_is_stopped(line: str, tmp_path: Path) -> None:
    """With its children: nothing goes on training in the background."""
    mark = tmp_path / "child"
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
        f"print({line!r}); time.sleep(600)"
    )
    with pytest.raises(NotResumed, match="did not resume at global step 188"):
        run_confirmed(trainer(script), expected_step=188)
    pid = int(mark.read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the trainer's child is still there")


def test_the_step_may_stand_in_a_log_file_only(tmp_path: Path) -> None:
    """Launchers send the trainer's output to files; lines from before the start prove nothing."""
    log = tmp_path / "trainer.log"
    log.write_text("Train step 1/935 done.\n")
    said: list[str] = []
    script = f"import time; open({str(log)!r}, 'a').write('Train step 189/935 done.\\n'); time.sleep(1)"
    assert run_confirmed(trainer(script), expected_step=188, logs=str(tmp_path), say=said.append) == 0
    assert said != []
    script = f"import time; open({str(tmp_path / 'new.log')!r}, 'w').write('Train step 1/935 done.\\n'); time.sleep(600)"
    with pytest.raises(NotResumed):
        run_confirmed(trainer(script), expected_step=188, logs=str(tmp_path))


def test_a_number_cut_in_two_is_read_whole() -> None:
    script = (
        "import sys, time\n"
        "for piece in ('Train st', 'ep 18', '9/935 done.\\n'):\n"
        " sys.stdout.write(piece); sys.stdout.flush(); time.sleep(0.3)"
    )
    assert run_confirmed(trainer(script), expected_step=188) == 0


def test_signals_reach_the_trainer() -> None:
    """A spot notice (SIGTERM) is the trainer's to handle."""
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saving'), sys.exit(3)))\n"
        "print('Train step 189'); print('ready')\n"
        "time.sleep(600)"
    )
    outer = (
        "import sys; from ckptstore.supervise import run_confirmed\n"
        f"sys.exit(run_confirmed([sys.executable, '-u', '-c', {script!r}], expected_step=188))"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", outer], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert process.stdout is not None
    stdout = process.stdout
    for line in process.stdout:
        if b"ready" in line:
            break
    os.kill(process.pid, signal.SIGTERM)
    assert b"saving" in stdout.read()
    stdout.close()
    assert process.wait(20) == 3


def test_death_by_signal_is_told_as_shells_do() -> None:
    assert run_confirmed(trainer("import os; os.kill(os.getpid(), 9)"), expected_step=1) == 137


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(NotFoundError, match="no-such-trainer"):
        run_confirmed(["no-such-trainer"], expected_step=1)


def gone(pid: int, *, within_s: float = 5.0) -> bool:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_server_that_outlives_its_trainer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the trainer's output, so that there is no end of it: a pod would stand still at full price."""
    monkeypatch.setattr("ckptstore.supervise.LAST_WORDS_S", 0.5)
    mark = tmp_path / "child"
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid)); print('Train step 189/935 done.'); sys.exit(7)"
    )
    said: list[str] = []
    begin_s = time.monotonic()
    assert run_confirmed(trainer(script), expected_step=188, say=said.append) == 7
    took_s = time.monotonic() - begin_s
    os.kill(int(mark.read_text()), signal.SIGKILL)
    assert took_s < 20
    assert "has ended; what it has started and left behind is still there" in said[-1]


def test_a_child_that_outlives_the_trainers_stop_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer goes at SIGTERM, its server does not listen to it: it would keep the GPUs."""
    monkeypatch.setattr("ckptstore.supervise.STOP_S", 1.0)
    mark = tmp_path / "child"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}], stdout=subprocess.PIPE); child.stdout.readline()\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid)); print('Train step 1/935 done.'); time.sleep(60)"
    )
    with pytest.raises(NotResumed):
        run_confirmed(trainer(script), expected_step=188)
    assert gone(int(mark.read_text()))


@pytest.mark.parametrize("how", ["renamed", "truncated"])
def test_a_log_that_is_rotated_at_the_start(tmp_path: Path, how: str) -> None:
    """Its old lines prove nothing, by whatever name the file goes."""
    log = tmp_path / "main.log"
    log.write_text("Train step 1/935 done.\n" * 3)
    rotate = "os.rename(log, log + '.1')" if how == "renamed" else "os.truncate(log, 0)"
    script = (
        f"import os, time; log = {str(log)!r}; {rotate}; time.sleep(1)\n"
        "open(log, 'a').write('Train step 189/935 done.\\n'); time.sleep(1)"
    )
    said: list[str] = []
    assert run_confirmed(trainer(script), expected_step=188, logs=str(tmp_path), say=said.append) == 0
    assert said == ["resumed at global step 188 (the log says: Train step 189)"]
