"""What the documentation says can be typed, clicked and run."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml
from torch import distributed as dist

import ckptstore
import ckptstore.torch
from ckptstore import cli as cli_module
from ckptstore import manifest, rules
from ckptstore.breaker_config import BreakerConfig
from ckptstore.cli import cli
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


def anchors(page: Path) -> set[str]:
    """What `#…` can name on a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}: {there.name} has no such heading"


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|benchmarks|examples|csrc|ckptstore|docs)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_page_is_in_the_index_and_every_example_on_some_page() -> None:
    index = ROOT / "docs/README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in _LINK.findall(index.read_text())}
    assert set((ROOT / "docs").glob("*.md")) - linked == {index}
    text = "".join(page.read_text() for page in PAGES)
    assert [example.name for example in (ROOT / "examples").glob("*.py") if f"examples/{example.name}" not in text] == []


def test_every_public_name_has_its_place() -> None:
    text = (ROOT / "docs/python.md").read_text()
    for module in (ckptstore, ckptstore.torch):
        for name in {*module.__all__} - {"__version__"}:
            assert re.search(rf"`{name}[`(]", text), f"docs/python.md does not name {module.__name__}.{name}"
    methods = {name for name in vars(ckptstore.CheckpointStore) if not name.startswith("_")} - {"folder"}
    assert {name for name in methods if f"`{name}(" not in text} == set()


def test_every_module_has_its_room() -> None:
    text = (ROOT / "docs/design.md").read_text()
    rooms = text[text.index("## Rooms") : text.index("## Flows")]
    named = {*re.findall(r"`([a-z_]+)/?`", rooms)} - {"csrc", "ckptstore"}
    there = {path.stem for path in (ROOT / "ckptstore").iterdir() if path.suffix == ".py" or path.is_dir()}
    there |= {path.stem for room in ("transfer", "saves") for path in (ROOT / "ckptstore" / room).glob("*.py")}
    assert named == {name for name in there if not name.startswith("_")} - {"frameworks"}


def test_errors_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs/python.md").read_text(), re.MULTILINE)
    public = {name: getattr(ckptstore, name) for name in ckptstore.__all__}
    errors = {name: kind for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {name: int(code) for name, code in rows} == {name: kind.exit_code for name, kind in errors.items()}


#: What the README calls a contender → how its row of the performance page begins.
CONTENDERS = {
    **{
        name: name
        for name in ("fio", "rclone", "rsync", "cat", "DCP", "safetensors", "torch.save", "dcp.load", "s5cmd", "boto3")
    },
    "cp": "cp -r",
    "dcp.save": "DCP",
    "dcp.async_save": "dcp.async_save",
    "memcpy": "one memcpy",
    "aws": "aws",
    "s3fs": "s3fs",
    "b3sum": "",
    "sha256sum": "",
}


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    text, measured = (ROOT / "README.md").read_text(), (ROOT / "docs/performance.md").read_text()
    table = text[text.index("## How fast") : text.index("All tables")]
    ours = re.findall(r"\| \*\*(\d+\.\d\d)\*\* \|", table)
    assert len(ours) > 7
    rows = [("**", figure) for figure in ours]
    for who, figure in re.findall(r"([^\d|·][^|·]*?) (\d+\.\d\d)", re.sub(r"\*\*.*?\*\*", "", table)):
        named = [name for name in re.findall(r"[\w.]+", who) if name in CONTENDERS]
        assert named, who
        rows.append((CONTENDERS[named[0]], figure))
    assert len(rows) > 35
    for begin, figure in [*rows, *(("", figure) for figure in re.findall(r"(\d+\.\d\d) GB/s", text))]:
        assert re.search(rf"^\| {re.escape(begin)}[^|]*\| {figure} \(", measured, re.MULTILINE), f"{begin} {figure}"
    cuts = (ROOT / "docs/reliability.md").read_text()
    shares = re.findall(r"(\d+) of (\d+)", text[: text.index("## Two commands")])
    assert len(shares) == 4
    for wrong, states in shares:
        assert re.search(rf"\| {states} \|.* {wrong} \|", cuts), f"{wrong} of {states}"


def test_the_sums_of_the_reliability_page_are_those_of_its_tables() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    alone, *_ = text.partition("## Power cuts")[2].partition("### One of")
    ours = [int(n) for n in re.findall(r"^\| (?:ckptstore|`ckptstore|`dcp.save` with)[^|]*\| (\d+) \|", alone, re.MULTILINE)]
    one = re.findall(r"^\| [^|]+ \| (\d+) \| 0", text.partition("### One of")[2].partition("### Both")[0], re.MULTILINE)
    both = re.findall(r"^\| [^|]+ \| \d+ and \d+ \| ([\d,]+) \|", text, re.MULTILINE)
    kills = re.findall(r"^\| (?:push|pull|two pushes)[^|]* \| (\d+) \|", text, re.MULTILINE)
    assert (len(ours), len(one), len(both), len(kills)) == (8, 6, 6, 3)
    sums = (ours, [int(n) for n in one], [int(n.replace(",", "")) for n in both], [int(n) for n in kills])
    for numbers in sums:
        assert f"{sum(numbers):,}" in text.partition("## Power cuts")[0], numbers


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


@each_page
def test_names_in_sketches_can_be_imported(page: Path) -> None:
    """Of blocks that are not run, since they stand for a loop or a bucket of the reader's."""
    for line in re.findall(
        r"^(?:from ckptstore\S* import .*|import ckptstore\S*.*)$", "\n".join(blocks(page, "py")), re.MULTILINE
    ):
        exec(line, {})


def test_the_lines_for_a_training_loop_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's, and those with which saving.md begins; from the first start, where nothing is saved yet."""
    monkeypatch.chdir(tmp_path)
    readme, saving = blocks(ROOT / "README.md", "py"), blocks(ROOT / "docs/saving.md", "py")
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(4)).sum()
    loss.backward()
    optimizer.step()
    names = {"torch": torch, "model": model, "optimizer": optimizer, "loss": loss, "step": 100}
    exec(readme[0], names)
    store, save, load = saving[0].partition("ckpt.save(")
    exec(store, names)
    exec(saving[1], names)
    assert names["state"] is None
    exec(save + load, names)
    exec(saving[1], names)
    assert {*names["state"]} == {"model", "optimizer", "rng"}


def test_the_lines_for_many_ranks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of distributed.md, by one rank: a first start, a save, and a start that goes on."""
    monkeypatch.chdir(tmp_path)
    start, save = blocks(ROOT / "docs/distributed.md", "py")[:2]
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(4)).sum()
    loss.backward()
    optimizer.step()
    names = {"model": model, "optimizer": optimizer, "loss": loss}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(start, names)
        assert names["first"] == 0
        exec(save, names | {"step": 7})
        saved = model.weight.detach().clone()
        torch.nn.init.zeros_(model.weight)
        exec(start, names)
    finally:
        dist.destroy_process_group()
    assert names["first"] == 8
    assert torch.equal(model.weight, saved)


@each_page
def test_tables_have_as_many_cells_in_each_row(page: Path) -> None:
    """A `|` ends a cell in code, too: only `\\|` does not."""
    width = 0
    for number, line in enumerate(_FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text()).splitlines(), 1):
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1 if line.startswith("|") else 0
        assert not cells or not width or cells == width, f"{page.name}:{number}: {line}"
        width = cells


@each_page
def test_prose_is_no_wider_than_code(page: Path) -> None:
    prose = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text()).splitlines()
    wide = [number for number, line in enumerate(prose, 1) if len(line) > 128 and not line.startswith(("|", "- **"))]
    assert not wide, f"{page.name}: lines {wide}"


@each_page
def test_yaml_blocks_are_what_is_read(page: Path) -> None:
    for block in blocks(page, "yaml"):
        found = yaml.safe_load(block)
        assert isinstance(found, dict), block
        BreakerConfig.of_block(found.get("circuit_breaker"))


def test_json_blocks_are_json() -> None:
    for page in PAGES:
        for block in blocks(page, "json"):
            json.loads(block)


def test_the_rules_are_as_their_page_says() -> None:
    lines = re.findall(r"^\| (`\w+`.*) \| .* \| (\d+) \|(.*)\|$", (ROOT / "docs/circuit-breaker.md").read_text(), re.MULTILINE)
    found = {}
    for names, patience, own in lines:
        for name in re.findall(r"`(\w+)`", names):
            given = {key: float(value or "nan") for key, value in re.findall(r"`(\w+)(?:: ([\d.]+))?`", own)}
            found[name] = (int(patience), given)
    common = {"metric", "patience", "arm"}
    for name, kind in rules.KNOWN.items():
        defaults = {field.name: field.default for field in dataclasses.fields(kind) if field.name not in common}
        assert {*found[name][1]} == {*defaults}, name
        assert found[name][0] == kind.__dataclass_fields__["patience"].default, name
        assert all(defaults[key] == value for key, value in found[name][1].items() if key != "rules"), name


def test_the_manifest_is_as_its_page_says(tmp_path: Path) -> None:
    """The example has the fields of a manifest, and the table has them all."""
    text = (ROOT / "docs/manifest-format.md").read_text()
    (example,) = (json.loads(block) for block in blocks(ROOT / "docs/manifest-format.md", "json"))
    run = trees.make_run(tmp_path, steps=[46])
    ckptstore.CheckpointStore(run).seal(46)
    found = json.loads((trees.checkpoint(run, 46) / manifest.MANIFEST_NAME).read_text())
    assert {*example} == {*found}
    assert {*example["files"][0]} == {*found["files"][0]}
    table = {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([\w.\[\]]+)`", line.split("|")[1])
    }
    told = {name.removeprefix("files[].") for name in table}
    assert told == ({*found} | {*found["files"][0]} | {"base", "group", "nonfinite"}) - {"files"}


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


def test_help_fits_a_common_terminal(monkeypatch):
    """Each verb in one line of the overview; options beside what is said of them, and no word of click's for a number."""
    monkeypatch.setenv("COLUMNS", "80")
    overview = cli.get_help(click.Context(cli, info_name="ckptstore", terminal_width=80))
    verbs = overview.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in verbs] == [*cli_module.VERBS]
    for name in cli_module.VERBS:
        text = verb(name).get_help(click.Context(verb(name), info_name=name, terminal_width=80))
        assert not re.search(r"INTEGER|FLOAT|TEXT|^ +\[\w+\|", text, re.MULTILINE), name
        for line in text.splitlines():
            assert len(line) <= 80, line
        for line in text[re.search(r"^(Which checkpoint|Options):$", text, re.MULTILINE).start() :].splitlines():
            assert not re.match(r"  -\S", line) or re.match(r"  -.*\S  +\S", line), f"{name}: {line}"


@pytest.mark.parametrize("name", cli_module.VERBS)
def test_help_names_variables_as_they_are_set(name):
    """A shell tells $CKPTSTORE_URL from $ckptstore_url."""
    command = verb(name)
    told = re.findall(r"\$(\w+)", command.get_help(click.Context(command, info_name=name)))
    assert {*told} <= {"CKPTSTORE_URL", "CKPTSTORE_FILEROOT"}, told
