"""What the documentation says can be typed, clicked and run."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from ckptstore import cli as cli_module
from ckptstore.cli import cli
from ckptstore.frameworks.areal import launch
from tests import commands, trees

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in _FENCE.findall(page.read_text()) if language in languages]


@functools.cache
def verb(name: str) -> click.Command:
    command = importlib.import_module(f"ckptstore.cli.{name}").command
    assert isinstance(command, click.Command)
    return command


def options_of(name: str) -> set[str]:
    """Long and short options of a verb; of the bare command when it is empty."""
    command: click.Command = verb(name) if name else cli
    context = click.Context(command)
    return {text for parameter in command.get_params(context) for text in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


def typed(page: Path) -> Iterator[list[str]]:
    """Every ckptstore command line of a page, as words: those in code blocks and those in running text."""
    text = page.read_text()
    lines = [line for block in blocks(page, "", "bash", "console") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    for line in lines:
        line = re.sub(r"^(\$ |python -m |[A-Z_]+=\S+ )+", "", line.strip()).replace("ckptstore.recover", "ckptstore")
        if line.startswith("ckptstore ") and "{" not in line:
            line = line.split("  #")[0].split("  ")[0]
            yield shlex.split(line.replace("'", ""))[1:]


@each_page
def test_commands_can_be_typed(page: Path) -> None:
    for words in typed(page):
        name = words[0] if words and re.fullmatch("[a-z]+", words[0]) else ""
        if name:
            assert name in cli_module.VERBS, f"{page.name}: there is no verb in `ckptstore {' '.join(words)}`"
        for word in words[1:] if "--" not in words else words[1 : words.index("--")]:
            option = word.strip("[]…,").partition("=")[0]
            if option.startswith("-") and len(option) > 1:
                assert option in options_of(name), (
                    f"{page.name}: `ckptstore {' '.join(words)}`: {option} is no option of {name}"
                )


def test_every_verb_and_option_is_in_the_command_line_page() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    for name in cli_module.VERBS:
        assert f"| `{name}" in text or f"`{name}`" in text, name
        missing = {option for option in options_of(name) if option.startswith("--") and option not in text}
        assert missing <= {"--help"}, f"{name}: {missing}"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|benchmarks|examples|csrc|ckptstore|docs)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@each_page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.isolate(monkeypatch, tmp_path)
    if not (found := blocks(page, "python")):
        return
    run = trees.make_run(tmp_path / "outputs/grpo", steps=[46, 93, 140, 187], slot="dcp", slot_step=46, recover_info=46)
    trees.truncate(trees.checkpoint(run, 187) / "model.safetensors")
    trees.set_age(run / "default", 3600)
    trees.set_age(tmp_path / "outputs/grpo/logs", 3600)
    for number, block in enumerate(found, 1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), {"__name__": "__main__"})


def test_json_blocks_are_json() -> None:
    import json

    for page in PAGES:
        for block in blocks(page, "json"):
            json.loads(block)


# --- JSON fields --------------------------------------------------------------------------------------------------

TRAINER = ("--areal-version", "0.3.4", "--world-size", "2")


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(launch, "_package_of_python_on_path", lambda: "")
    monkeypatch.setenv("CKPTSTORE_FILEROOT", str(tmp_path))
    run = trees.make_run(tmp_path, experiment="docs-grpo", steps=[46, 93, 140], slot="era_a", slot_step=140, recover_info=140)
    trees.zero_length(trees.checkpoint(run, 140) / "config.json")
    trees.set_age(trees.checkpoint(run, 140), 3600)
    trees.set_age(tmp_path / "logs", 3600)
    return run


def keys(document: object) -> Iterator[str]:
    """The names of all fields; what is below `slots`, `strategies` and the like is data."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key
            if key not in ("slots", "strategies", "manifest_sha256", "saver", "recover"):
                yield from keys(value)
    elif isinstance(document, list):
        for item in document:
            yield from keys(item)


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["show", "46"],
        ["verify"],
        ["seal", "--all"],
        ["setup", "--dry-run", "--step", "93", *TRAINER],
        ["setup", "--step", "93", *TRAINER],
        ["resume", "--step", "93", *TRAINER],
        ["adopt"],
        ["push", "--latest", "--to", "memory://docs/run"],
        ["doctor"],
        ["clean", "--dry-run"],
        ["show", "1"],
    ],
    ids=" ".join,
)
def test_every_json_field_is_documented(sample: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    result = commands.invoke(capfd, *words, "--json")
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/cli.md").read_text())) | {"error", "facts", "hint", "exit_code"}
    assert set(keys(result.json)) - documented == set()


def test_every_json_field_of_a_pull_is_documented(sample: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = "memory://docs-pull/run"
    assert commands.invoke(capfd, "push", "46", "--to", url).code == 0
    result = commands.invoke(capfd, "pull", "46", "--from", url, "--to", tmp_path / "there", "--json")
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/cli.md").read_text()))
    assert result.json["done"] is True
    assert set(keys(result.json)) - documented == set()


def test_every_json_field_of_a_remote_clean_is_documented(sample: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = "memory://docs-clean/run"
    assert commands.invoke(capfd, "push", "46", "--to", url).code == 0
    result = commands.invoke(capfd, "clean", "--run", url, "--dry-run", "--json")
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/cli.md").read_text()))
    assert set(keys(result.json)) - documented == set()


def test_undo_and_errors_are_documented(sample: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run: Callable[..., commands.Result] = functools.partial(commands.invoke, capfd)
    assert run("setup", "--step", "93", *TRAINER).code == 0
    document = run("setup", "--undo", "--json").json
    text = (ROOT / "docs/cli.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `setup --undo`"))
    assert set(document) == set(re.findall(r"`(\w+)`", row.partition("|")[2].partition("|")[2]))
    error = next(line for line in text.splitlines() if line.startswith("An error:"))
    assert set(run("show", "1", "--json").json) == set(re.findall(r'"(\w+)"', error))


# --- nothing of the place where this was written -----------------------------------------------------------------


def private_words() -> list[str]:
    """This checkout's path, this user's home and this machine's name, where they are telling."""
    home = os.path.expanduser("~")
    words = [str(ROOT)] + ([f"{home}/"] if home not in ("", "/", "/root") else [])
    if len(socket.gethostname()) > 5:
        words.append(socket.gethostname())
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX_URL"):
        words += re.findall(r"//(?:[^/@]*@)?([^/:]+)", os.environ.get(name, ""))
    return [word for word in words if word not in ("/", "//", "localhost", "pypi.org")]


def test_no_file_names_this_machine() -> None:
    suffixes = {".md", ".py", ".pyi", ".toml", ".cpp", ".h", ".sh", ".svg", ".yml", ".yaml", ""}
    folders = [ROOT / name for name in ("ckptstore", "csrc", "docs", "examples", "tests", "benchmarks", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes and path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in suffixes and path.stat().st_size < 1 << 20]
    # Behind a letter it is a part of a longer path: …/checkpoints/root/…
    patterns = [re.compile(rf"(?<![\w…}}*]){re.escape(word)}") for word in private_words()]
    for path in files:
        if "__pycache__" in path.parts or (path.suffix == "" and b"\0" in path.read_bytes()[:4096]):
            continue
        text = path.read_text(errors="replace")
        for pattern in patterns:
            assert not pattern.search(text), f"{path.relative_to(ROOT)} names {pattern.pattern}"


def test_the_picture_is_of_this_version() -> None:
    """Made by docs/make_demo_svg.py: names no font, no script and no place elsewhere."""
    text = (ROOT / "docs/img/demo.svg").read_text()
    assert "✗&#160;CORRUPT" in text
    assert re.findall(r"https?://[^\s\"<]+", text) == ["http://www.w3.org/2000/svg", "https://www.textualize.io"]
    assert "<script" not in text


@pytest.mark.parametrize("name", cli_module.VERBS)
def test_help_names_variables_as_they_are_set(name):
    """A shell tells $CKPTSTORE_URL from $ckptstore_url."""
    command = verb(name)
    told = re.findall(r"\$(\w+)", command.get_help(click.Context(command, info_name=name)))
    assert {*told} <= {"CKPTSTORE_URL", "CKPTSTORE_FILEROOT"}, told
