"""Are the numbers in a checkpoint sane? What no digest can tell: it was written as it is, and is worthless.

bad      NaN or infinite numbers; blocks of zeros where the checkpoint before has none (a write that never reached the disk)
suspect  a tensor of nothing but zeros, or with blocks of them, and nothing to compare with; a norm that jumped against the
         checkpoint before; all weights identical to it (training that does nothing)

Reads every number once, at the speed of the disk, in a few MiB of memory a thread; nothing is unpickled.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptstore import native, tensors
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, UsageError
from ckptstore.health import Health
from ckptstore.listing import Listing, backend_for
from ckptstore.model import Checkpoint
from ckptstore.parts import reader
from ckptstore.sizes import counted

NORM_FACTOR = 2.0  #: a jump; RL steps move a tensor's norm by some percent even over an epoch
MIN_COUNT = 1024  #: numbers; the norm of fewer may jump honestly
ZERO_BLOCK_BYTES = 4096
_MAY_BE_ZERO = re.compile(r"(?:bias|lora_B(?:\.[^.]+)?\.weight)$")
#: Rows of padding and of tokens that never occur are zero in some models.
_MAY_HAVE_ZEROS = re.compile(r"embed|lm_head|wte|wpe|output\.weight$")


class Problem(NamedTuple):
    """One thing wrong with one tensor (empty: with the checkpoint as a whole)."""

    health: Health
    part: str
    tensor: str
    what: str

    def __str__(self) -> str:
        return f"{self.part}: {self.tensor}: {self.what}" if self.tensor else f"{self.part}: {self.what}"


@dataclass(slots=True)
class Tensor:
    """One tensor's numbers, of all its chunks."""

    optimizer: bool
    count: int = 0
    size_bytes: int = 0
    nan: int = 0
    infinite: int = 0
    zero_blocks: int = 0
    sum_squares: float = 0.0
    largest: float = 0.0  #: magnitude
    crcs: tuple[int, ...] = ()
    first_nonfinite: str = ""

    @property
    def zero_share(self) -> float:
        """How much of it lies in blocks of zeros; comparable between number formats."""
        return self.zero_blocks * ZERO_BLOCK_BYTES / self.size_bytes if self.size_bytes else 0.0

    @property
    def norm(self) -> float:
        """The Euclidean norm of the finite numbers."""
        return math.sqrt(self.sum_squares)


@dataclass(frozen=True, slots=True)
class Scan:
    """What is in a checkpoint: part → tensors by name."""

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    not_scanned: tuple[str, ...]
    bytes_read: int
    seconds: float

    def norm(self, part: str) -> float:
        """The norm of all weights of a part."""
        return math.sqrt(sum(t.sum_squares for t in self.parts.get(part, {}).values() if not t.optimizer))


@dataclass(frozen=True, slots=True)
class Sanity:
    """The verdict on a checkpoint's numbers."""

    scan: Scan
    problems: tuple[Problem, ...]
    compared_with: int = -1  #: a step, -1 for none
    notes: tuple[str, ...] = field(default=())

    @property
    def health(self) -> Health:
        """bad, suspect, good; unknown where nothing could be scanned."""
        if not any(self.scan.parts.values()):
            return Health.UNKNOWN
        kinds = {problem.health for problem in self.problems}
        return next((kind for kind in (Health.BAD, Health.SUSPECT) if kind in kinds), Health.GOOD)


def scan(backend: Backend, checkpoint: Checkpoint, *, progress: native.Progress | None = None) -> Scan:
    """Read all numbers of a checkpoint. UsageError unless it lies in local files; errors of single files are "not scanned"."""
    backend = backend_for(backend, checkpoint)
    if not isinstance(backend, LocalBackend):
        raise UsageError("weights are scanned in local files only", hint="Pull the checkpoint first.")
    started = time.monotonic()
    parts: dict[str, dict[str, Tensor]] = {}
    missed: list[str] = []
    found = {}
    for part in checkpoint.parts:
        try:
            found[part.name] = tensors.places(reader(backend, part), {file.name: file for file in part.files}, root=part.path)
        except CkptStoreError as error:
            missed.append(f"{part.name}: {error}")
    total = sum(place.length for places in found.values() for place in places.found)
    done = 0
    for part in checkpoint.parts:
        places = found.get(part.name)
        if places is None:
            continue
        missed += [f"{part.name}/{text}" for text in places.not_scanned]
        base = done

        def tell(done_bytes: int, _: int, base: int = base) -> None:
            if progress is not None:
                progress(base + done_bytes, total)

        regions = [native.Region(place.file, place.offset, place.length, place.dtype) for place in places.found]
        results = native.scan_weights(part.path, regions, progress=tell) if regions else []
        mine = parts.setdefault(part.name, {})
        for place, result in zip(places.found, results, strict=True):
            if isinstance(result, CkptStoreError):
                missed.append(f"{part.name}/{place.file}: {result}")
            else:
                _add(mine.setdefault(place.key, Tensor(place.optimizer)), place, result)
        done += sum(place.length for place in places.found)
    return Scan(checkpoint.step, parts, tuple(dict.fromkeys(missed)), done, time.monotonic() - started)


def _add(tensor: Tensor, place: tensors.Place, found: native.WeightStats) -> None:
    if found.first_nonfinite >= 0 and not tensor.first_nonfinite:
        tensor.first_nonfinite = f"number {found.first_nonfinite} in {place.file}"
    tensor.count += found.numbers
    tensor.size_bytes += place.length
    tensor.nan += found.nan
    tensor.infinite += found.infinite
    tensor.zero_blocks += found.zero_blocks
    tensor.sum_squares += found.sum_squares
    tensor.largest = max(tensor.largest, abs(found.min), abs(found.max))
    tensor.crcs += (found.crc,)


def judge(found: Scan, before: Scan | None = None) -> Sanity:
    """What is wrong with the numbers, also against those of an earlier checkpoint."""
    problems: list[Problem] = []
    notes = list(found.not_scanned)
    for part, mine in found.parts.items():
        theirs = before.parts.get(part, {}) if before is not None else {}
        for key, tensor in mine.items():
            earlier = theirs.get(key)
            same = earlier if earlier is not None and earlier.count == tensor.count else None
            problems += [Problem(health, part, key, what) for health, what in _tensor_problems(key, tensor, same, before)]
        weights = {key: tensor for key, tensor in mine.items() if not tensor.optimizer}
        if before is not None and weights and all(key in theirs and theirs[key].crcs == t.crcs for key, t in weights.items()):
            what = f"all {len(weights)} weights are identical to those of step {before.step}: nothing was learned in between"
            problems.append(Problem(Health.SUSPECT, part, "", what))
        if before is not None and (gone := [key for key, t in theirs.items() if not t.optimizer and key not in mine]):
            notes.append(f"{part}: {counted(len(gone), 'tensor')} of step {before.step} are not in it ({gone[0]}, …)")
    problems.sort(key=lambda problem: problem.health is not Health.BAD)
    return Sanity(found, tuple(problems), -1 if before is None else before.step, tuple(notes))


def _tensor_problems(key: str, tensor: Tensor, earlier: Tensor | None, before: Scan | None) -> list[tuple[Health, str]]:
    problems: list[tuple[Health, str]] = []
    if tensor.nan or tensor.infinite:
        counts = [f"{count:,} {name}" for count, name in ((tensor.nan, "NaN"), (tensor.infinite, "infinite")) if count]
        where = f" of {tensor.count:,} numbers (first: {tensor.first_nonfinite})"
        problems.append((Health.BAD, " and ".join(counts) + where))
    if tensor.optimizer:
        return problems  # moments are zero where nothing was learned, and jump as they like
    zero = tensor.zero_blocks > 0 and tensor.largest == 0.0 and not tensor.nan + tensor.infinite
    blocks = (
        f"{tensor.zero_blocks:,} of {tensor.size_bytes // ZERO_BLOCK_BYTES:,} blocks of {ZERO_BLOCK_BYTES} bytes are all zero"
    )
    if earlier is not None and before is not None:
        if tensor.zero_share > earlier.zero_share:
            was = f"{earlier.zero_blocks:,} were at step {before.step}"
            problems.append((Health.BAD, f"{blocks}; {was}: a write that never reached the disk looks like that"))
        jumped = _jump(key, tensor, earlier)
        if jumped:
            problems.append((Health.SUSPECT, f"{jumped} at step {before.step}"))
    elif zero and not _MAY_BE_ZERO.search(key):
        problems.append((Health.SUSPECT, f"all {tensor.count:,} numbers are zero"))
    elif tensor.zero_blocks and not zero and not _MAY_HAVE_ZEROS.search(key):
        problems.append((Health.SUSPECT, blocks))
    return problems


def _jump(key: str, tensor: Tensor, earlier: Tensor) -> str:
    if tensor.count < MIN_COUNT or _MAY_BE_ZERO.search(key) or not earlier.norm or tensor.nan + tensor.infinite:
        return ""
    ratio = tensor.norm / earlier.norm
    if 1 / NORM_FACTOR <= ratio <= NORM_FACTOR:
        return ""
    return f"its norm is {tensor.norm:.4g}, and was {earlier.norm:.4g}"


def previous(listing: Listing, checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint to compare with: the newest usable one before it, of another folder; None without one."""
    older = [c for c in listing.checkpoints if c.status.usable and (checkpoint.step < 0 or c.step < checkpoint.step)]
    return older[-1] if older else None


def check(
    backend: Backend,
    listing: Listing,
    checkpoint: Checkpoint,
    *,
    known: dict[str, Scan] | None = None,
    progress: native.Progress | None = None,
) -> Sanity:
    """Scan a checkpoint and the one before it, and judge. `known` keeps scans by folder, so that none is made twice."""
    known = {} if known is None else known

    def scan_once(wanted: Checkpoint) -> Scan:
        path = wanted.parts[0].path
        if path not in known:
            known[path] = scan(backend, wanted, progress=progress)
        return known[path]

    before = previous(listing, checkpoint)
    return judge(scan_once(checkpoint), None if before is None else scan_once(before))
