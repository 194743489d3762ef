"""What can go wrong, as one tree. Each error answers: what kind, on what, is a retry worth it, what to try.

CkptStoreError
├── UsageError (ValueError)                  the call or the command line is wrong; exit 2
├── NotFoundError (FileNotFoundError)        something named does not exist
├── AlreadyExistsError (FileExistsError)
├── AccessError (PermissionError)
├── StorageError (OSError)                   the medium failed: errno, operation and path are kept
│   ├── NoSpaceError                         ENOSPC, EDQUOT, EFBIG
│   └── TransitError                         bytes were damaged on their way, and refused; retryable
├── BusyError                                another setup, or the trainer itself, is at work; retryable
├── RankError                                another rank of the same launch failed, died or did not come; retryable
├── UnavailableError                         this store, or what is installed here, cannot do it
├── RefusedError                             possible, but would lose something or not resume: says which flag allows it
├── NothingToResumeError                     no checkpoint qualifies; exit 4
├── TrainingHalted                           the circuit breaker stopped training, or keeps it from starting again
├── IntegrityError                           exit 3
│   ├── ManifestError (ValueError)           a manifest that cannot be trusted
│   ├── NotWholeError                        nodes with a disk each do not have the same of a step
│   ├── DigestMismatchError                  bytes are not those that the manifest records
│   └── SourceChangedError                   the source was written while it was read; retryable
└── CommitError
├── NotCommitted                         nothing became visible; what was there is there
└── CommitUncertain                      the new one is visible, but the disk did not confirm it
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class CkptStoreError(Exception):
    """Base of all errors raised on purpose. `hint` is what to try next, as a full sentence, or empty; tracebacks show it."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self._hint = ""
        self.hint = hint

    @property
    def hint(self) -> str:
        """What to try next."""
        return self._hint

    @hint.setter
    def hint(self, text: str) -> None:
        notes = [note for note in getattr(self, "__notes__", ()) if note != self._hint]
        self.__notes__ = [text, *notes] if text else notes  # str(error) stays one line; a script or a notebook shows both
        self._hint = text

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        """As torch sends it to other ranks: what an error says beside its message goes with it."""
        errno = {"errno": self.errno} if isinstance(self, OSError) else {}  # not in its __dict__
        return _again, (type(self), self.args, self.__dict__ | errno)


class UsageError(CkptStoreError, ValueError):
    """The call or the command line is wrong."""

    exit_code = 2


class NotFoundError(CkptStoreError, FileNotFoundError):
    """Something that was named does not exist."""


class AlreadyExistsError(CkptStoreError, FileExistsError):
    """The destination exists and is not replaced."""


class AccessError(CkptStoreError, PermissionError):
    """The operating system or the store denies it."""


class StorageError(CkptStoreError, OSError):
    """The medium failed. `operation` is the syscall or request, `path` what it was applied to, `errno` the cause."""

    def __init__(self, message: str, *, operation: str = "", path: str = "", errno: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.operation = operation
        self.path = path
        self.errno = errno


class NoSpaceError(StorageError):
    """Out of space, quota, inodes, or over the largest file size."""


class TransitError(StorageError):
    """What arrived in a store is not what was sent, by its digest; the store refused it."""

    retryable = True


class BusyError(CkptStoreError):
    """Somebody else is at work on the same run."""

    retryable = True


class UnavailableError(CkptStoreError):
    """What was asked for cannot be done with this store, or without an extra that is not installed; the message says which."""


class RankError(CkptStoreError):
    """Another rank of the same launch failed, died, or did not come in time. `rank` is its number."""

    retryable = True

    def __init__(self, message: str, *, rank: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.rank = rank


class RefusedError(CkptStoreError):
    """Possible, but it would lose something or would not resume; the message names the flag that allows it."""


class NothingToResumeError(CkptStoreError):
    """No checkpoint qualifies."""

    exit_code = 4


class TrainingHalted(CkptStoreError):
    """The circuit breaker stopped training at `step`, bad since `since_step` (global steps, -1: unknown).

    `last_good_step` is the checkpoint to resume from (-1: none), `command` how. Can be pickled: Ray carries it home.
    """

    def __init__(
        self, message: str, *, hint: str = "", step: int = -1, since_step: int = -1, last_good_step: int = -1, command: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.__notes__ = []  # its message says all
        self.step = step
        self.since_step = since_step
        self.last_good_step = last_good_step
        self.command = command


class IntegrityError(CkptStoreError):
    """Bytes are not what they should be."""

    exit_code = 3


class ManifestError(IntegrityError, ValueError):
    """A manifest that cannot be parsed, or that says something that must not be trusted."""


class NotWholeError(IntegrityError):
    """The ranks do not see the same of a step, or lack files that lie on other nodes.

    `usable_step`: the newest that is the same for all (-1: none, or not asked); `files`: those that are not here.
    """

    def __init__(self, message: str, *, usable_step: int = -1, files: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.usable_step = usable_step
        self.files = files


class DigestMismatchError(IntegrityError):
    """Bytes differ from those that the manifest records. `path` is relative, `offset_bytes` the chunk's start."""

    def __init__(self, message: str, *, path: str, offset_bytes: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.offset_bytes = offset_bytes


class SourceChangedError(IntegrityError):
    """The source was written while it was read."""

    retryable = True

    def __init__(self, message: str, *, path: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path


class CommitError(CkptStoreError):
    """A commit did not end as one."""


class NotCommitted(CommitError):
    """Nothing became visible: what was there before is there still."""


class CommitUncertain(CommitError):
    """The new checkpoint is visible and whole, but the disk did not confirm that a power cut would keep it."""


def _again(kind: type[CkptStoreError], arguments: tuple[object, ...], state: dict[str, object]) -> CkptStoreError:
    error = kind.__new__(kind, *arguments)
    for name, value in state.items():
        setattr(error, name, value)
    return error


NO_SPACE = frozenset({_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG})


def from_os_error(error: OSError, *, doing: str, path: str, hint: str = "") -> CkptStoreError:
    """The error of this tree for an OSError: says what was being done, to what, and what the system answered."""
    if isinstance(error, CkptStoreError):
        return error  # from our own layers below: it says more already
    code = error.errno or 0
    message = f"{doing} {path}: {error.strerror or error}"
    if code in NO_SPACE:
        return NoSpaceError(
            message,
            operation=doing,
            path=path,
            errno=code,
            hint=hint or "Free some space, or raise the quota.",
        )
    if code in (_errno.EACCES, _errno.EPERM):
        return AccessError(message, hint=hint or "Run as the user that trains, or fix the permissions.")
    if code == _errno.EROFS:
        hint = hint or "It is mounted read-only: mount it for writing, or work on a copy elsewhere."
    if code in (_errno.ENOENT, _errno.ENOTDIR):
        return NotFoundError(message, hint=hint)
    if code in (_errno.EEXIST, _errno.ENOTEMPTY):
        return AlreadyExistsError(message, hint=hint)
    return StorageError(message, operation=doing, path=path, errno=code, hint=hint)
