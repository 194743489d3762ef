"""The house keeps its shape: who may import whom, what never appears anywhere, and what a bare import costs."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ckptstore

ROOT = Path(ckptstore.__file__).parent

#: Lowest first. A module imports from its own layer and from those below it. What stands in no layer (a verb's helper, a
#: new subject) lies above them all: it may import what it likes, and nothing here may import it.
LAYERS = (
    ("errors", "model"),
    ("names", "metric_names", "sizes", "inspection", "untrusted", "marshalling"),
    ("manifest", "native", "config", "rules", "streak", "ranks", "parallel", "backends.stalls", "transfer.tuning", "pages"),
    ("canonical", "backends", "backends.*", "formats", "formats.*"),
    ("transfer.multipart",),
    ("transfer.fetching", "transfer.sending", "transfer.server_digests", "transfer.conditions"),
    ("frameworks", "frameworks.steps", "frameworks.areal", "frameworks.areal.*"),
    ("side", "lock", "probe", "journal", "saves.background"),
    ("places",),
    ("damage", "ledger", "halt", "pins", "inplace", "saves.owner", "rendezvous"),
    ("saves.prepared",),
    ("parts", "left", "listing", "health", "importing", "transfer.mirrored"),
    ("verify", "seal", "commit", "running"),
    ("choose", "leaving"),
    ("two_places",),
    ("plan",),
    ("transfer.receiving", "transfer.claims"),
    ("saves.new_store",),
    ("room", "staging", "saves.steps", "saves.loading"),
    ("saves.node_sets",),
    (
        "recovery",
        "adopt",
        "transfer.gathering",
        "transfer.push",
        "transfer.pull",
        "retention",
        "saves.uploading",
        "transfer.leftovers",
        "transfer.unfinished",
    ),
    ("repair",),
    ("transfer.mirror", "saves.saving", "transfer.sharing"),
    ("store",),
    ("torch.memory", "torch.state"),
    ("torch", "torch.*"),
)
#: The shim for training code stands beside the trainers that it knows, and on top of everything.
ABOVE = {"frameworks.areal.attach", "frameworks.areal.keeping"}


def modules():
    """Name (relative to the package; "" for itself) → its syntax tree."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


MODULES = modules()


@functools.cache
def nodes(name):
    """All of a module's syntax tree; a walk takes longer than what most tests do with it."""
    return tuple(ast.walk(MODULES[name]))


@functools.cache
def imports(name):
    """Dotted names that a module imports, wherever in it; `from a import b` gives a.b."""
    found = []
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a name comes from"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports(name):
    """Modules of the package that a module imports."""
    found = set()
    for imported in imports(name):
        if imported.partition(".")[0] == "ckptstore":
            rest = imported.removeprefix("ckptstore").removeprefix(".")
            found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found - {name, ""}


def layer(name):
    if name in ABOVE:
        return len(LAYERS)
    for number, members in enumerate(LAYERS):
        for member in members:
            if name == member or (member.endswith(".*") and name.startswith(member[:-1])):
                return number
    return len(LAYERS)


def outside(name):
    return {imported.partition(".")[0] for imported in imports(name)} - {"ckptstore"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    """No module knows what is built on it."""
    if name == "" or layer(name) == len(LAYERS):
        return
    wrong = {other for other in own_imports(name) if layer(other) > layer(name)}
    assert not wrong, f"{name} (layer {layer(name)}) imports {', '.join(sorted(wrong))} from above"


def test_every_name_in_the_table_exists():
    """A table that names what is gone proves nothing."""
    for member in [member for members in LAYERS for member in members]:
        assert member.removesuffix(".*") in MODULES, member


def test_no_cycles():
    """Every module can be understood, and tested, before those that use it."""
    graph = {name: own_imports(name) for name in MODULES if name}
    for package in ("backends", "formats"):  # a package's front imports its rooms, which its users name by the package
        graph[package] = {other for other in graph[package] if other != package}
    TopologicalSorter(graph).prepare()


def test_command_line_is_on_top():
    for name in MODULES:
        if not name.startswith("cli") and name != "recover":
            assert not any(other.startswith("cli") for other in own_imports(name)), name


def test_only_native_imports_the_extension():
    users = {name for name in MODULES if any("_native" in imported.split(".") for imported in imports(name))}
    assert users == {"native"}


ALLOWED = {
    "torch": {name for name in MODULES if name.partition(".")[0] == "torch"} | {"frameworks.areal.convert"},
    "obstore": {"backends.object"},
    "awscrt": {"backends.s3control"},
    "fsspec": {"backends.fsspec"},
    "safetensors": set(),
    "numpy": set(),
    "rich": {"cli.progress"},
    "click": {name for name in MODULES if name.startswith("cli")},
}


@pytest.mark.parametrize("library", ALLOWED)
def test_third_parties_have_one_door_each(library):
    users = {name for name in MODULES if library in outside(name)}
    assert users <= ALLOWED[library], f"{library} is imported by {users - ALLOWED[library]}"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_unpickled_or_evaluated(name):
    """Looking at a checkpoint never runs what is in it."""
    assert not outside(name) & {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for node in nodes(name):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"{name}:{node.lineno}"
            assert not (called.startswith("yaml.") and "safe" not in called), f"{name}:{node.lineno}: {called}"
            for keyword in node.keywords:
                assert keyword.arg != "shell", f"{name}:{node.lineno}: a shell"


@pytest.mark.parametrize("name", MODULES)
def test_no_handler_swallows_everything(name):
    """`except:` and a silent `except Exception` hide what nobody thought of."""
    for node in nodes(name):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            if caught in ("everything", "BaseException"):
                assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), f"{name}:{node.lineno}"


# --- the front door -----------------------------------------------------------------------------------------------

PUBLIC = {
    "CheckpointStore", "Selection", "ResumePoint", "Options", "Plan", "Outcome", "setup", "undo", "open_backend", "Checkpoint",
    "Part", "Finding", "Status", "Level", "Listing", "Report", "Manifest", "CkptStoreError", "UsageError", "NotFoundError",
    "AlreadyExistsError", "AccessError", "StorageError", "NoSpaceError", "BusyError", "RefusedError", "NothingToResumeError",
    "IntegrityError", "ManifestError", "DigestMismatchError", "SourceChangedError", "CommitError", "NotCommitted",
    "CommitUncertain", "Keep", "SaveHandle", "wait_all",
}  # fmt: skip


def test_public_names_stay():
    """What people import today works tomorrow: names are added here, never taken away."""
    assert set(ckptstore.__all__) >= PUBLIC
    assert set(dir(ckptstore)) >= PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ckptstore.nonsense


@pytest.mark.parametrize("name", sorted(set(ckptstore.__all__) - {"__version__"}))
def test_public_names_are_there_and_explained(name):
    value = getattr(ckptstore, name)
    assert value.__doc__
    assert value.__module__.startswith("ckptstore")


def test_type_checkers_see_the_same_names():
    """The names imported lazily and those under TYPE_CHECKING are two lists: they must not drift apart."""
    seen = {
        alias.asname or alias.name: node.module
        for node in nodes("")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ckptstore")
        for alias in node.names
    }
    assert seen == ckptstore._HOMES


def test_what_is_declared_as_data_is_there():
    """Without py.typed a trainer's type checker sees Any for all of ours."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    names = project["tool"]["setuptools"]["package-data"]["ckptstore"]
    assert "py.typed" in names
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_every_error_is_in_the_drawing():
    """The tree drawn at the top of errors.py is the tree."""
    from ckptstore import errors

    drawing = errors.__doc__
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.CkptStoreError):
            assert name in drawing, name


# --- what an import costs -----------------------------------------------------------------------------------------

HEAVY = ("torch", "numpy", "obstore", "awscrt", "fsspec", "rich", "yaml", "safetensors", "pydantic", "hypothesis")


def loaded_after(code, *words):
    """Top-level modules in a fresh interpreter after `code`."""
    program = f"{code}\nimport sys, json\nprint('LOADED', json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("LOADED ")[2])


@pytest.mark.parametrize(
    ("code", "but"),
    [
        ("import ckptstore", ()),
        ("import ckptstore.cli", ()),
        ("import ckptstore.store, ckptstore.recovery, ckptstore.adopt", ()),
        ("import ckptstore; ckptstore.CheckpointStore", ()),
        ("import ckptstore.recover, ckptstore.cli.list, ckptstore.cli.setup, ckptstore.cli.verify, ckptstore.cli.seal", ()),
    ],
)
def test_imports_stay_light(code, but):
    """A trainer's environment must not be changed, and a command must start in a blink."""
    loaded = loaded_after(code)
    heavy = {name for name in loaded if name.partition(".")[0] in HEAVY} - set(but)
    assert not heavy


def test_a_bare_import_loads_nothing_of_ours():
    assert [name for name in loaded_after("import ckptstore") if name.startswith("ckptstore")] == ["ckptstore"]


def test_list_loads_no_heavy_library(tmp_path):
    """`ckptstore list` on a real run, configuration and all: YAML at most."""
    from tests import trees

    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=46)
    code = "import sys\nfrom ckptstore.cli import run\nassert run(['list', '--run', sys.argv[1]]) == 0"
    heavy = {name.partition(".")[0] for name in loaded_after(code, str(run))} & set(HEAVY)
    assert heavy <= {"yaml"}
