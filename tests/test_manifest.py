"""The manifest: equal content gives equal bytes, and whatever else somebody hands us gives a ManifestError."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore import canonical
from ckptstore import manifest as manifests
from ckptstore.canonical import vouches_for
from ckptstore.errors import ManifestError
from ckptstore.manifest import FileEntry, Manifest, parse
from ckptstore.model import MANIFEST_NAME, FileInfo, Status
from ckptstore.names import _folded, check_name, check_names

GOLDEN = Path(__file__).parent / "golden/manifest-v1.json"
CHUNK = 8 << 20

EXAMPLE = Manifest(
    step=187,
    epoch=3,
    epoch_step=46,
    part="default",
    origin="setup",
    files=(
        FileEntry("config.json", 660, 1_763_000_000_123_456_789, 42, 0x0123456789ABCDEF, (0x0123456789ABCDEF,)),
        FileEntry("merges.txt", 0, 1_763_000_000_000_000_000, 43, 0, ()),
        FileEntry("model.safetensors", CHUNK + 1, 1_763_000_001_000_000_000, 44, 0xFEDCBA9876543210, (1, 2)),
        FileEntry("sub/poids-d\xe9j\xe0.bin", 1, 5, 1 << 63, 7, (7,)),
    ),
    chunk_bytes=CHUNK,
    commit="00112233445566778899aabbccddeeff",
    created_at="2026-11-24T16:00:00Z",
    source="default/epoch3epochstep46globalstep187",
    tool="ckptstore 0.1.0",
    metrics={"grpo_actor/task_reward/avg": 0.53125, "steps": 188.0},
)


def infos(manifest=EXAMPLE):
    return [FileInfo(file.path, file.size_bytes, file.mtime_ns, file.inode) for file in manifest.files]


def edited(**changes):
    """The example's JSON with other values; `...` removes a key."""
    document = json.loads(EXAMPLE.to_bytes()) | changes
    return json.dumps({key: value for key, value in document.items() if value is not ...}).encode()


def edited_file(number, **changes):
    document = json.loads(EXAMPLE.to_bytes())
    document["files"][number] |= changes
    document["files"][number] = {key: value for key, value in document["files"][number].items() if value is not ...}
    return json.dumps(document).encode()


# --- what we write ------------------------------------------------------------------------------------------------


def test_golden_file_is_what_we_write_and_read():
    """Version 1 on disk never changes: manifests of today must be readable for as long as checkpoints live."""
    assert GOLDEN.read_bytes() == EXAMPLE.to_bytes()
    assert parse(GOLDEN.read_bytes()) == EXAMPLE
    assert EXAMPLE.sha256 == hashlib.sha256(GOLDEN.read_bytes()).hexdigest()


names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
crcs = st.integers(0, (1 << 64) - 1)


@st.composite
def entries(draw):
    name = "/".join(draw(st.lists(names, min_size=1, max_size=3)))
    size = draw(st.one_of(st.just(0), st.integers(1, 4096), st.integers(1, 40_000)))
    chunks = tuple(draw(crcs) for _ in range(-(-size // 4096)))
    crc = chunks[0] if len(chunks) == 1 else draw(crcs) if chunks else 0
    return FileEntry(name, size, draw(st.integers(0, (1 << 63) - 1)), draw(st.integers(0, (1 << 64) - 1)), crc, chunks)


@st.composite
def whole_manifests(draw):
    files = draw(st.lists(entries(), max_size=6, unique_by=lambda file: _folded(file.path)))
    try:
        check_names(file.path for file in files)
    except ManifestError:
        files = files[:1]
    return Manifest(
        step=draw(st.integers(-1, 1 << 40)),
        epoch=draw(st.integers(-1, 1 << 20)),
        epoch_step=draw(st.integers(-1, 1 << 20)),
        part=draw(names),
        origin="seal",
        files=tuple(files),
        chunk_bytes=4096,
        source=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        tool="t",
        metrics=draw(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=3)),
        nonfinite=tuple(draw(st.lists(st.text(max_size=8), max_size=2))),
    )


@settings(deadline=None)
@given(whole_manifests())
def test_round_trip(manifest):
    """What was written is read back equal, byte for byte, so that the SHA-256 that people pin stays the same."""
    data = manifest.to_bytes()
    assert parse(data) == manifest
    assert parse(data).to_bytes() == data
    assert data.isascii()
    assert vouches_for(data, infos(manifest))


def test_equal_numbers_give_equal_bytes():
    """A metric of 1 and one of 1.0 are the same: else the digest printed by `setup` is not the one that `verify` finds."""
    whole = dataclasses.replace(EXAMPLE, metrics={"loss": 1})
    assert whole.to_bytes() == dataclasses.replace(EXAMPLE, metrics={"loss": 1.0}).to_bytes()
    assert parse(whole.to_bytes()).sha256 == whole.sha256


def test_not_a_number_is_never_written():
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(EXAMPLE, metrics={"loss": float("nan")}).to_bytes()


def test_unknown_fields_are_ignored():
    """A later version may add some: at the top and in a file's entry."""
    assert parse(edited(later={"nested": [1, {"a": None}]})) == EXAMPLE
    assert parse(edited_file(0, later="x")) == EXAMPLE
    assert vouches_for(edited_file(0, later="x"), infos())


# --- what we refuse -----------------------------------------------------------------------------------------------


def nested(count):
    """So many empty lists in one, with an error behind the last."""
    return b"[" + b"[]," * count + b"]"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe{}",
        EXAMPLE.to_bytes()[:-2],
        EXAMPLE.to_bytes() + b"x",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        nested(300_000),
        pytest.param(nested(3_000_000), marks=pytest.mark.soak),
        edited(format="another"),
        edited(version=2),
        edited(version=True),
        edited(version=1.0),
        edited(digest="md5"),
        edited(chunk_bytes=0),
        edited(chunk_bytes="8"),
        edited(step=-2),
        edited(step=True),
        edited(step=1 << 63),
        edited(step=...),
        edited(epoch=1.5),
        edited(part="../default"),
        edited(part=""),
        edited(commit="x"),
        edited(commit="A" * 32),
        edited(tool="x" * 5000),
        edited(files={}),
        edited(files=["x"]),
        edited(files=...),
        edited(metrics=[]),
        edited(metrics={"a": "1"}),
        edited(nonfinite={"a": "nan"}),
        edited(nonfinite=["a", 1]),
        edited(nonfinite="loss"),
        edited(metrics={"a": True}),
        edited(metrics={"a": 10**400}),
        edited_file(0, bytes=-1),
        edited_file(0, bytes=661.0),
        edited_file(0, bytes=True),
        edited_file(0, bytes=1 << 63),
        edited_file(0, bytes=1 << 62),
        edited_file(0, mtime_ns=1 << 63),
        edited_file(0, inode=1 << 64),
        edited_file(0, crc="0123456789abcdef"),
        edited_file(0, crc="0123456789ABCDE"),
        edited_file(0, crc="0123456789ABCDEF\n"),
        edited_file(0, crc=1),
        edited_file(0, crc=...),
        edited_file(0, chunks=["0" * 16]),
        edited_file(0, chunks=None),
        edited_file(1, crc="0000000000000001"),
        edited_file(2, chunks=[]),
        edited_file(2, chunks=["0" * 16]),
        edited_file(2, chunks=["0" * 16, "0" * 15]),
        edited_file(0, path=1),
        edited_file(0, path=MANIFEST_NAME),
        EXAMPLE.to_bytes().replace(b"0.53125", b"NaN"),
        EXAMPLE.to_bytes().replace(b"0.53125", b"-Infinity"),
        EXAMPLE.to_bytes().replace(b"0.53125", b"1e400"),
        EXAMPLE.to_bytes().replace(b"660", b"9" * 5000),
    ],
    ids=lambda data: f"{data[:30]!r}-{len(data)}-{hashlib.md5(data).hexdigest()[:6]}",
)
def test_refused(data):
    """Nothing but a whole manifest within all caps is one."""
    with pytest.raises(ManifestError):
        parse(data)


def test_too_large_is_refused_unread(monkeypatch):
    """Caps on bytes and entries hold before any of it is parsed: a few megabytes of `[],` would need gigabytes."""
    parsed = []
    monkeypatch.setattr(manifests._FAST, "decode", lambda text: parsed.append(text))
    for data in (b"x" * (manifests.MAX_BYTES + 1), b"[" * (manifests.MAX_BRACKETS + 1)):
        with pytest.raises(ManifestError):
            parse(data)
    assert not parsed


def test_too_many_files_are_refused(monkeypatch):
    monkeypatch.setattr(manifests, "MAX_FILES", 3)
    with pytest.raises(ManifestError, match="at most"):
        parse(EXAMPLE.to_bytes())


REPEATED = [
    ('"step":187', '"step":187,"step":46'),
    ('"bytes":660', '"bytes":660,"bytes":660'),
    ('"steps":188.0', '"steps":188.0,"steps":0.0'),
    # Both ways in which a repeated key could hide from a count of keys: a spaced colon, a text where an object belongs.
    ('"step":187,"tool":', '"step":187,"step":46,"tool" :'),
    ('"step":187,"tool":', '"step":187,"step":46,"tool"\n:'),
    ('"step":187,"tool":"ckptstore 0.1.0"', '"step":187,"step":46,"tool" \t:"t"'),
]


@pytest.mark.parametrize(("old", "new"), REPEATED)
def test_repeated_key_is_refused(old, new):
    """Two readers of one JSON could see two different steps."""
    text = EXAMPLE.to_bytes().decode()
    assert old in text
    changed = text.replace(old, new).encode()
    with pytest.raises(ManifestError, match="repeats a key"):
        parse(changed)
    assert not vouches_for(changed, infos())


def test_repeated_key_behind_a_text_for_metrics_is_not_vouched_for():
    text = EXAMPLE.to_bytes().decode()
    start, end = text.index('"metrics":'), text.index(',"origin"')
    changed = (text[:start] + '"metrics":"xxx"' + text[end:]).replace('"step":187', '"step":1,"step":187').encode()
    assert not vouches_for(changed, infos())


# --- names --------------------------------------------------------------------------------------------------------

UNSAFE = [
    "", ".", "..", "../x", "a/..", "a/../b", "/etc/passwd", "a//b", "a/", "./a", "a/.", "a\0b", "a\nb", "\x1b[2J", "a\x7f",
    "a\x85b", "a\\b", "\ud800", "a/\udcff", "x" * 256, "/".join(["x" * 200] * 6), "C:\\x",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_unsafe_names_are_refused(name):
    """No name leaves the folder that it is joined to, nor breaks a terminal or a file system."""
    with pytest.raises(ManifestError):
        check_name(name)
    with pytest.raises(ManifestError):
        parse(edited_file(0, path=name))
    with pytest.raises(ManifestError):
        check_names(["a", name])


@settings(deadline=None)
@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "b\0", "c\n", "d"]), max_size=4).map("/".join))
def test_a_name_is_safe_or_refused(name):
    """Whatever passes stays below the folder, by the rules of the operating system's own path joining."""
    try:
        check_name(name)
    except ManifestError:
        return
    joined = Path("/root/folder", name)
    assert str(joined).startswith("/root/folder/")
    assert ".." not in joined.parts
    assert name.encode()  # no surrogates
    assert name.isprintable() or not any(ord(character) < 32 for character in name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "a"),
        ("Model.bin", "model.BIN"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"),
        ("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"),
        ("a", "a/b"),
        ("A/b/c", "a/B"),
    ],
)
def test_two_names_for_one_file_are_refused(one, other):
    """On some file system the second would overwrite the first."""
    document = json.loads(EXAMPLE.to_bytes())
    document["files"][0]["path"], document["files"][1]["path"] = one, other
    with pytest.raises(ManifestError):
        parse(json.dumps(document).encode())
    with pytest.raises(ManifestError):
        check_names([one, other])


# --- garbage ------------------------------------------------------------------------------------------------------


def parse_or_error(data):
    """parse() may return a Manifest or raise ManifestError, nothing else; and vouches_for may not raise at all."""
    vouched = vouches_for(data, infos())
    assert vouched in (True, False)
    try:
        manifest = parse(data)
    except ManifestError:
        return
    inspection = manifest.inspect(infos())
    clean = not (inspection.void or inspection.findings)
    assert vouched == clean, "the quick look and the thorough one must agree on what list calls COMMITTED"
    assert parse(manifest.to_bytes()) == manifest


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(data):
    parse_or_error(data)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_random_edits(data):
    """A few bytes of a real manifest changed, cut out, doubled or moved: still one of two outcomes."""
    text = bytearray(EXAMPLE.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.sampled_from([1, 1, 2, 8, 60]))
        match data.draw(st.sampled_from(["set", "delete", "insert", "repeat"])):
            case "set":
                text[at : at + 1] = bytes([data.draw(st.sampled_from(b'"{}[]:,.-+eE0198aAzZ \\\n\0\xff'))])
            case "delete":
                del text[at : at + length]
            case "insert":
                text[at:at] = data.draw(st.sampled_from([b'"a":1,', b"[[", b"NaN", b"\\ud800", b"1e999", b"null", b" "]))
            case "repeat":
                text[at:at] = text[at : at + length]
        if not text:
            break
    parse_or_error(bytes(text))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_values(data):
    """Valid JSON of the right shape, with wrong values in any place."""
    document = json.loads(EXAMPLE.to_bytes())
    place = data.draw(st.sampled_from([document, *document["files"], document["metrics"]]))
    key = data.draw(st.sampled_from([*place, "new"]))
    place[key] = data.draw(json_values)
    parse_or_error(json.dumps(document).encode())


# --- against the files --------------------------------------------------------------------------------------------


def test_same_files_are_vouched_for_whatever_their_inodes():
    """A copy that kept its times is the same checkpoint."""
    moved = [file._replace(inode=file.inode + 1) for file in infos()]
    assert vouches_for(EXAMPLE.to_bytes(), moved)
    inspection = EXAMPLE.inspect(moved)
    assert inspection.moved
    assert not inspection.void
    assert not inspection.findings


@pytest.mark.parametrize(
    ("change", "void", "status"),
    [
        (lambda files: files[1:], False, Status.PARTIAL),
        (lambda files: [files[0]._replace(size_bytes=659), *files[1:]], False, Status.CORRUPT),
        (lambda files: [files[0]._replace(size_bytes=659, mtime_ns=1), *files[1:]], True, None),
        (lambda files: [files[0]._replace(mtime_ns=1), *files[1:]], True, None),
        (lambda files: [*files, FileInfo("new", 1, 1, 1)], True, None),
        (lambda files: [FileInfo("new", 1, 1, 1), *files[1:]], True, None),
    ],
    ids=["missing", "torn", "rewritten", "touched", "added", "replaced"],
)
def test_what_differs_is_damage_or_a_later_save(change, void, status):
    """The trainer's own later writing voids the manifest; what nobody wrote on purpose is damage."""
    files = change(infos())
    inspection = EXAMPLE.inspect(files)
    assert inspection.void is void
    assert [finding.status for finding in inspection.findings] == ([status] if status else [])
    assert ("saved since" in inspection.note) is void
    assert not vouches_for(EXAMPLE.to_bytes(), files)


def test_our_own_manifest_is_no_file_of_the_checkpoint():
    inspection = EXAMPLE.inspect([*infos(), FileInfo(MANIFEST_NAME, 9, 9, 9)])
    assert not inspection.void


# --- the short way of vouches_for() agrees with the parser ----------------------------------------------------------

PLAIN = Manifest(
    7, 0, 6, "default", "seal", (FileEntry("a.bin", 4, 10, 1, 5, (5,)), FileEntry("b/c", 0, 11, 2, 0, ())), chunk_bytes=1 << 23
)


def test_the_short_way_is_taken_for_what_we_write():
    assert canonical._canonical_inventory(PLAIN.to_bytes()) == {"a.bin": (4, 10), "b/c": (0, 11)}
    assert vouches_for(PLAIN.to_bytes(), [FileInfo("a.bin", 4, 10, 9), FileInfo("b/c", 0, 11, 9)])
    assert not vouches_for(PLAIN.to_bytes(), [FileInfo("a.bin", 4, 10, 9), FileInfo("b/c", 1, 11, 9)])
    assert not vouches_for(PLAIN.to_bytes(), [FileInfo("a.bin", 4, 10, 9)])


@given(at=st.integers(0, 10_000), new=st.binary(max_size=3), cut=st.integers(0, 3))
def test_the_short_way_sees_what_the_parser_sees(at, new, cut):
    """Any edit of a manifest: what the regular expressions take for whole is JSON, and says to a parser the same inventory."""
    data = PLAIN.to_bytes()
    at %= len(data)
    changed = data[:at] + new + data[at + cut :]
    inventory = canonical._canonical_inventory(changed)
    if inventory is None or not vouches_for(changed, infos(PLAIN)):
        return
    with contextlib.suppress(ManifestError):  # what only parse() looks at: digests that don't belong to the size, say
        assert {file.path: (file.size_bytes, file.mtime_ns) for file in parse(changed).files} == inventory
    assert isinstance(json.loads(changed), dict)
