"""ckptstore in an AReaL training script, by one line:

    attach(run=RUN, breaker=CircuitBreaker(RUN))        # anywhere before the first step, on every rank

From then on each step's metrics reach the breaker and the run's ledger when AReaL commits them (StatsLogger.commit), and each
save of the recover slot is kept as a step of its own (RecoverHandler.dump). Works with every AReaL from v0.3 on: only the names
of these methods, and of commit's parameters, are relied upon.

Nothing here ever disturbs training but the breaker's TrainingHalted, which is raised out of commit. What is missing in this
AReaL, or fails, is said once in the log, and left out.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckptstore.errors import TrainingHalted
from ckptstore.frameworks.areal.keeping import Keeper, OnSave, Recorder

if TYPE_CHECKING:
    from ckptstore.breaker import CircuitBreaker

log = logging.getLogger(__name__)

OnCommit = Callable[[int, Any], object]
"""Called on every rank with a global step and its metrics, once AReaL has logged them."""

STATS_LOGGER = ("areal.utils.stats_logger", "StatsLogger")
RECOVER_HANDLER = ("areal.utils.recover", "RecoverHandler")
_SAVE = "_save_checkpoint"  #: what dump calls for each model, once it is time to save
_ORIGINAL = "__ckptstore_original__"
_attached: list[Attachment] = []


def attach(
    stats_logger: Any = None,
    recover_handler: Any = None,
    *,
    run: str | os.PathLike[str],
    breaker: CircuitBreaker | None = None,
    on_commit: OnCommit | None = None,
    on_save: OnSave | None = None,
    adopt: bool = True,
    keep: int = 2,
) -> Attachment:
    """Hook AReaL's StatsLogger and RecoverHandler: instances, classes, or None for AReaL's own classes.

    `run` is the run's folder. Without a breaker metrics are only recorded. `adopt` keeps the newest `keep` saves of the slot,
    and the last good one, copied by rank 0 in a thread; the next save waits for it. `on_save` is called on rank 0 (in that
    thread) with the global step of each finished save, and the Checkpoint adopted of it, or None. Attaching again replaces what
    was attached before.
    """
    attachment = Attachment(os.path.abspath(run))
    recorder = Recorder(attachment.run) if breaker is None else None
    keeper = Keeper(attachment.run, keep=keep if adopt else 0, on_save=on_save)

    def committed(step: Any, data: Any) -> None:
        for look in (recorder.observe if recorder else None, _flipped(on_commit), breaker.observe if breaker else None):
            if look is not None:
                _guarded(look, data, step)

    logger_class = _given(stats_logger, STATS_LOGGER)
    if logger_class is not None:
        attachment.patch(logger_class, "commit", lambda original: _commit_hook(original, committed))
    if adopt or on_save is not None:
        handler = _given(recover_handler, RECOVER_HANDLER)
        if handler is not None:
            attachment.patch(handler, "dump", lambda original: _around(original, keeper.note, keeper.look))
            if callable(getattr(handler, _SAVE, None)):  # else a copy that the next save overtakes is found out, and dropped
                attachment.patch(handler, _SAVE, lambda original: _around(original, keeper.make_way))
            attachment.keeper = keeper
    _attached.append(attachment)
    return attachment


def detach() -> None:
    """Take away whatever was attached in this process, and wait for an adoption in progress."""
    while _attached:
        _attached[-1].detach()


class Attachment:
    """What `attach` hooked, until `detach`. `hooked` names it: empty when nothing could be."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.keeper: Keeper | None = None
        self._patches: list[tuple[Any, str, Any]] = []

    @property
    def hooked(self) -> tuple[str, ...]:
        """The methods that are hooked."""
        return tuple(name for _, name, _ in self._patches)

    def patch(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a method of a class or of an instance. A hook of ours that is there already is replaced, not wrapped."""
        _restore(owner, name)
        current = getattr(owner, name, None)
        if not callable(current) or inspect.iscoroutinefunction(current):
            log.warning("%r has no method %s that could be hooked: ckptstore does without", owner, name)
            return
        if not isinstance(owner, type) and (below := getattr(current, _ORIGINAL, None)) is not None:
            current = below.__get__(owner)  # the class is hooked as well: once is enough
        hook = make(current)
        setattr(hook, _ORIGINAL, current)
        try:
            setattr(owner, name, hook)
        except (AttributeError, TypeError) as error:
            log.warning("%s of %r cannot be hooked (%s): ckptstore does without", name, owner, error)
            return
        self._patches.append((owner, name, hook))

    def wait(self) -> None:
        """Wait until an adoption in progress has ended."""
        if self.keeper is not None:
            self.keeper.wait()

    def detach(self) -> None:
        """Put the methods back, where nobody has replaced them since, and wait for an adoption in progress."""
        for owner, name, hook in self._patches:
            if getattr(owner, "__dict__", {}).get(name) is hook:
                _restore(owner, name)
        self._patches.clear()
        self.wait()
        if self in _attached:
            _attached.remove(self)


def _restore(owner: Any, name: str) -> None:
    hook = getattr(owner, "__dict__", {}).get(name)
    original = getattr(hook, _ORIGINAL, None)
    if original is None:
        return
    delattr(owner, name)  # an instance's hook, or one over an inherited method: the original is found again
    if isinstance(owner, type) and getattr(owner, name, None) is not original:
        setattr(owner, name, original)


def _given(owner: Any, default: tuple[str, str]) -> Any:
    """What was passed, else AReaL's own class; None, said in the log, where there is none."""
    if owner is not None:
        return owner
    module, name = default
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        log.warning("this AReaL has no %s.%s (%s): ckptstore does without", module, name, error)
        return None


def _commit_hook(original: Callable[..., Any], committed: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """Commit first, so that the step which halts training is in AReaL's own log as well."""

    @functools.wraps(original)
    def commit(*args: Any, **keywords: Any) -> Any:
        result = original(*args, **keywords)
        given = _arguments(original, args, keywords)
        if "global_step" in given and "data" in given:
            committed(given["global_step"], given["data"])
        else:
            if _is_new(f"{original!r}"):
                log.warning("%r has no global_step and data, but %s: no metrics are recorded", original, sorted(given))
        return result

    return commit


def _around(
    original: Callable[..., Any], before: Callable[[], None], after: Callable[[], None] | None = None
) -> Callable[..., Any]:
    @functools.wraps(original)
    def hook(*args: Any, **keywords: Any) -> Any:
        _guarded(before)
        result = original(*args, **keywords)
        if after is not None:
            _guarded(after)
        return result

    return hook


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(function).bind(*args, **keywords).arguments)
    except (TypeError, ValueError):
        return dict(keywords)


def _flipped(on_commit: OnCommit | None) -> Callable[[Any, Any], object] | None:
    return (lambda data, step: on_commit(step, data)) if on_commit is not None else None


def _guarded(call: Callable[..., object], *args: Any) -> None:
    """Training goes on whatever fails here, the breaker's halt alone excepted."""
    try:
        call(*args)
    except TrainingHalted:
        raise
    except Exception as error:
        if _is_new(f"{getattr(call, '__qualname__', call)}: {type(error).__name__}: {error}"):
            log.warning("ckptstore: a hook failed (training goes on; said once)", exc_info=True)


_said: set[str] = set()


def _is_new(text: str) -> bool:
    new = text not in _said and len(_said) < 1000
    _said.add(text)
    return new
