"""docs/cli.md against the command line: each option, each field of each JSON document, each exit code; both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from ckptstore import CheckpointStore, CkptStoreError
from ckptstore.backends import open_backend
from ckptstore.breaker import CircuitBreaker
from ckptstore.cli import EPILOG, VERBS
from ckptstore.errors import TrainingHalted
from ckptstore.frameworks.areal import launch
from ckptstore.rules import REWARD
from ckptstore.transfer.mirror import mirror
from tests import commands, trees
from tests.test_docs import options_of

PAGE = (Path(__file__).parent.parent / "docs/cli.md").read_text()
_NAME = re.compile(r"`(\w+)`")
Cli = Callable[..., commands.Result]


def section(title: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no heading {title!r}"
    return found[1]


def rows(title: str) -> dict[str, str]:
    """The tables of a section: what stands in the first column, and in the others."""
    cells = [line.strip("| ").split(" | ", 1) for line in section(title).splitlines() if line.startswith("|")]
    return {first: rest for first, *others in cells for rest in ("".join(others),)}


def flags(title: str) -> set[str]:
    """The options that a section's tables list."""
    return {flag for first in rows(title) for flag in re.findall(r"`(-[-a-z]+)`", first)}


WHERE, WHICH, TRAINER = flags("Where the run is"), flags("Which checkpoint"), flags("What will train")
SHARED = {"setup": WHICH | TRAINER, "resume": WHICH | TRAINER, "doctor": {"--areal-dir", "--areal-version", "--world-size"}}


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_each_option_is_on_the_page_and_each_on_the_page_is_one(verb: str) -> None:
    common = {"--help"} | (set() if verb == "plot" else {"--json"}) | (set() if verb == "pull" else WHERE)
    assert flags(verb) | SHARED.get(verb, set()) | common == {
        option for option in options_of(verb) if option.startswith("-")
    } - {"-h"}
    assert not flags(verb) & (common | SHARED.get(verb, set())), "said twice"


def test_each_verb_is_in_the_tables_at_the_top() -> None:
    assert {name for first in rows("Command line") for name in re.findall(r"\[`(\w+)`\]", first)} == {*VERBS}


def test_exit_codes() -> None:
    codes = {int(code) for code in rows("Exit codes") if code.isdigit()}
    assert codes == {int(code) for code in re.findall(r"(\d+) [a-z]", EPILOG)}
    kinds, known = [CkptStoreError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        known.add(kind.exit_code)
    assert known <= codes
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert EPILOG.removeprefix("Exit codes: ").rstrip(".").replace(", ", " · ") in readme.replace("\n", " ")


# --- what works where ---------------------------------------------------------------------------------------------

ARGUMENTS = {
    "show": ("1",),
    "seal": ("--all",),
    "repair": ("1", "--from", "."),
    "push": ("--all", "--to", "memory://docs-where/there"),
    "prune": ("--keep-last", "1"),
}


def promised(words: str) -> set[str]:
    """The verbs in the paragraph that begins so, up to the end of its first sentence."""
    (paragraph,) = (one for one in section("Where the run is").split("\n\n") if one.startswith(words))
    return {*_NAME.findall(paragraph.partition(";" if ";" in paragraph else ". ")[0])} & {*VERBS}


@pytest.mark.parametrize("verb", sorted({*VERBS} - {"pull"}))
def test_each_verb_works_on_a_store_of_steps_as_the_page_says(verb: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/weights.bin").write_bytes(b"1234")
    CheckpointStore(tmp_path / "steps").save(1, tmp_path / "out")
    result = cli(verb, *ARGUMENTS.get(verb, ()), "--run", tmp_path / "steps")
    refused = result.code == 2 and "is a store of steps" in result.out + result.err
    assert refused != (verb in promised("**In a store of steps**")), result
    if refused and "know it" in result.err:
        assert promised("**In a store of steps**") == {*re.findall(r"\w+", result.err.split("try:")[1])} & {*VERBS}


@pytest.mark.parametrize("verb", sorted({*VERBS} - {"pull"}))
def test_each_verb_takes_a_url_as_the_page_says(verb: str, cli: Cli) -> None:
    result = cli(verb, *ARGUMENTS.get(verb, ()), "--run", "memory://docs-where/here")  # nothing is there
    assert (verb in promised("**At a URL.**")) != (result.code == 2), result


# --- JSON fields --------------------------------------------------------------------------------------------------

DOCUMENTS, FIELDS = rows("Documents"), rows("What several documents hold")
OBJECTS = {
    "checkpoint": {*_NAME.findall(FIELDS["a checkpoint"] + FIELDS["a part"] + FIELDS["a finding"])},
    "files": {*_NAME.findall(FIELDS["a part, by `show`"])},
    "finding": {*_NAME.findall(FIELDS["a finding"])},
    "health": {*_NAME.findall(FIELDS["health"].partition(":")[0])},
    "run": {*_NAME.findall(FIELDS["a run"])},
    "recover_info": {*_NAME.findall(FIELDS["recover_info"])},
    "trip": {*_NAME.findall(FIELDS["a trip"])},
    "mirror": {*_NAME.findall(FIELDS["a mirror"])},
    "problem": {"health", "part", "tensor", "problem"},
}
#: document → the objects in it, besides what its row lists
HOLDS = {
    "list": ("checkpoint", "health", "run", "recover_info"),
    "show": ("checkpoint", "files"),
    "verify": ("finding",),
    "verify --weights": ("finding", "problem"),
    "setup --dry-run": ("checkpoint", "finding"),
    "setup": ("checkpoint", "finding"),
    "resume": ("checkpoint", "finding", "run"),
    "adopt": ("checkpoint", "health"),
    "watch": ("checkpoint", "health"),
    "status": ("run", "trip", "health", "mirror"),
    "doctor": ("run",),
}
DATA = {"slots", "strategies", "manifest_sha256", "saver", "recover", "newest"}  # names below these are data


def keys(document: object) -> Iterator[str]:
    """The names of all fields."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key
            if key not in DATA or not isinstance(value, dict):
                yield from keys(value)
    elif isinstance(document, list):
        for item in document:
            yield from keys(item)


def documented(kind: str) -> set[str]:
    row = re.sub(r"\((?:words|with \w+ health|null [^)]*|the folder [^)]*|all of [^)]*)\)", "", DOCUMENTS[f"`{kind}`"])
    own = {*_NAME.findall(row)} - {"setup", "list"}
    below = {"setup": "setup --dry-run", "resume": "setup", "verify --weights": "verify"}.get(kind)
    own |= documented(below) if below else set()
    return own.union(*(OBJECTS[name] for name in HOLDS.get(kind, ())))


def agree(kind: str, *documents: object) -> None:
    """What is in the documents is on the page, and what is on the page is in one of them."""
    found = {key for document in documents for key in keys(document)}
    assert found - documented(kind) == set(), f"{kind}: not in docs/cli.md"
    assert documented(kind) - found == set(), f"{kind}: in docs/cli.md alone"


A_FINDING = {"path": "", "problem": "", "status": ""}  # what is adopted has none
AREAL = ("--areal-version", "0.3.4", "--world-size", "2")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    monkeypatch.setattr(launch, "_package_of_python_on_path", lambda: "")
    monkeypatch.setenv("CKPTSTORE_FILEROOT", str(tmp_path))
    return lambda *words: commands.invoke(capfd, *words, *(["--json"] if words[0] != "plot" else []))


@pytest.fixture
def sample(tmp_path: Path, cli: Cli) -> Path:
    """Three good checkpoints, one with a file cut to nothing, a slot, recover_info and logs."""
    run = trees.make_run(
        tmp_path, experiment="docs-grpo", steps=[46, 93, 140, 187], slot="era_a", slot_step=140, recover_info=140
    )
    trees.zero_length(trees.checkpoint(run, 187) / "config.json")
    trees.set_age(trees.checkpoint(run, 187), 3600)
    trees.set_age(tmp_path / "logs", 3600)
    return run


def test_looking(sample: Path, cli: Cli) -> None:
    agree("list", cli("list").json)
    agree("show", cli("show", "46").json, cli("show", "187").json)  # the second has findings
    agree("verify", cli("verify").json)
    agree("doctor", cli("doctor").json)


def test_weights(sample: Path, cli: Cli) -> None:
    found = cli("verify", "--weights", "140", "93").json
    agree("verify --weights", found | {"weights": [*found["weights"], *_insane(sample, cli)]}, cli("verify").json)


def _insane(run: Path, cli: Cli) -> list[object]:
    shard = trees.checkpoint(run, 46) / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-256:] = b"\xff" * 256  # NaN in every dtype that has one
    shard.write_bytes(data)
    weights = cli("verify", "--weights", "46").json["weights"]
    assert weights[0]["problems"]
    return list(weights)


def test_sealing_setting_up_and_keeping(sample: Path, cli: Cli) -> None:
    agree("seal", cli("seal", "--all").json)
    agree("setup --dry-run", cli("setup", "--dry-run", *AREAL).json)
    agree("setup", cli("setup", "--before-step", "140", *AREAL).json, cli("setup", "--dry-run", *AREAL).json)
    agree("resume", cli("resume", "--yes", "--step", "46", *AREAL).json, cli("resume", *AREAL).json)
    agree("adopt", cli("adopt").json, A_FINDING)
    agree("setup --undo --dry-run", cli("setup", "--undo", "--dry-run").json)
    agree("setup --undo", cli("setup", "--undo").json)
    agree("clean", cli("clean", "--old-slots").json)


def test_resume_that_only_plans_has_the_fields_of_a_dry_run(sample: Path, cli: Cli) -> None:
    plan, dry = cli("resume", "--step", "46", *AREAL).json, cli("setup", "--dry-run", "--step", "46", *AREAL).json
    assert {*plan} == {*dry, "run", "command", "placeholders", "command_notes"}


def test_watching(sample: Path, cli: Cli) -> None:
    agree("watch", cli("watch", "--once").json, A_FINDING)


def test_errors(sample: Path, cli: Cli) -> None:
    error = cli("show", "1").json
    assert {*error} == {*_NAME.findall(FIELDS["an error"].partition(":")[0])}


def test_the_state_of_a_run(sample: Path, cli: Cli) -> None:
    breaker = CircuitBreaker(sample)
    for step in range(129):
        breaker.observe({REWARD: 0.75 if step < 120 else 0.0}, step)
    with pytest.raises(TrainingHalted):
        breaker.observe({REWARD: 0.0}, 129)
    mirror(open_backend(sample), "memory://docs-status/run")
    document = cli("status").json
    assert document["trip"]
    assert document["pins"]
    assert document["mirror"]
    agree("status", document)


def test_moving(sample: Path, cli: Cli, tmp_path: Path) -> None:
    url = "memory://docs-moving/run"
    cli("seal", "46")
    open_backend(url).put(f"default/{trees.checkpoint(sample, 93).name}/theirs", b"of another tool")
    agree("push", cli("push", "46", "93", "--to", url).json)
    agree("pull", cli("pull", "46", "93", "--from", url, "--to", tmp_path / "there").json)
    trees.bitflip(trees.checkpoint(sample, 46) / "model.safetensors")
    agree("repair", cli("repair", "46", "--from", url, "--dry-run").json)


def test_cleaning_a_url(sample: Path, cli: Cli) -> None:
    url = "memory://docs-cleaning/run"
    assert cli("push", "46", "--to", url).code == 0
    folder = f"default/{trees.checkpoint(sample, 46).name}/.ckptstore.attempt-0123456789abcdef"
    open_backend(url).put(f"{folder}/model.safetensors", b"of an attempt that no manifest names")
    memory = fsspec.filesystem("memory").store
    for key, file in memory.items():
        if "docs-cleaning" in key:
            file.modified = file.created = file.modified.replace(year=file.modified.year - 1)
    agree("clean --run URL", cli("clean", "--run", url, "--dry-run").json)


def test_pruning(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/weights.bin").write_bytes(b"1234")
    store = CheckpointStore(tmp_path / "steps")
    for step in (1, 2):
        store.save(step, tmp_path / "out")
    agree("prune", cli("prune", "--run", tmp_path / "steps", "--keep-last", "1").json)
