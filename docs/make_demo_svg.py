"""Makes docs/img/demo.svg: what a terminal shows of the demo's main commands, run for real.

python docs/make_demo_svg.py
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import shutil
import string
import struct
import subprocess
import sys
import tempfile
import termios
from fcntl import ioctl
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "examples" / "sample_run.py"
COLUMNS = 100
SHOWN = "/workspace"  #: what stands for the scratch folder, whose path has the same length: lines break where they would
FLIPPED = "default/epoch2epochstep46globalstep140/model-00002-of-00003.safetensors"
COMMANDS = ("list", "setup", "verify 140")


def scratch() -> Path:
    """A new folder below /tmp with as many characters as SHOWN."""
    names = tempfile._RandomNameSequence()  # type: ignore[attr-defined]
    while True:
        name = "".join(c for c in next(names) + next(names) if c in string.ascii_letters + string.digits)
        path = Path("/tmp") / name[: len(SHOWN) - len("/tmp/")]
        if not path.exists():
            path.mkdir(mode=0o700)
            return path


def shown(words: str, env: dict[str, str]) -> str:
    """What a terminal of COLUMNS columns shows of a command."""
    outer, inner = pty.openpty()
    ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptstore.recover", *shlex.split(words)],
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=subprocess.DEVNULL,  # the progress bar, which is gone at the end
        env=env,
    )
    os.close(inner)
    data = b""
    while True:
        try:
            block = os.read(outer, 65536)
        except OSError:  # the end of a terminal
            break
        data += block
    os.close(outer)
    if process.wait() not in (0, 3):
        raise SystemExit(f"`ckptstore {words}` exited with {process.returncode}")
    return data.decode().replace("\r\n", "\n")


def main() -> None:
    """Make the run, run the commands, draw them."""
    folder = scratch()
    try:
        fileroot = folder / "outputs" / "grpo"
        env = {"PATH": os.environ["PATH"], "LOGNAME": "root", "TERM": "xterm-256color", "CKPTSTORE_FILEROOT": str(fileroot)}
        subprocess.run([sys.executable, SAMPLE, fileroot, "--slot", "dcp"], env=env, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            [sys.executable, "-m", "ckptstore.recover", "seal", "--all"], env=env, check=True, stdout=subprocess.DEVNULL
        )
        flip = f"import sys; sys.path.insert(0, {str(SAMPLE.parent)!r}); import sample_run; from pathlib import Path; "
        flip += f"sample_run.flip_bit(Path({str(fileroot / 'checkpoints/root/gsm8k-grpo/trial0' / FLIPPED)!r}))"
        subprocess.run([sys.executable, "-c", flip], check=True)
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        for number, words in enumerate(COMMANDS):
            console.print(Text(f"{chr(10) if number else ''}$ ckptstore {words}", style="bold"))
            console.print(Text.from_ansi(shown(words, env).replace(str(folder), SHOWN)))
    finally:
        shutil.rmtree(folder)
    picture = console.export_svg(title="ckptstore", unique_id="demo")
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL)  # no fonts from elsewhere
    picture = picture.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono")
    picture = picture.replace("<text ", '<text xml:space="preserve" ')  # or some viewers drop the blanks in front
    (HERE / "img").mkdir(exist_ok=True)
    (HERE / "img" / "demo.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
