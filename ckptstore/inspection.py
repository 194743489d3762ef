"""What a look at a part's files finds beside its manifest, by names, sizes and times: nothing is read."""

from __future__ import annotations

from typing import NamedTuple

from ckptstore.model import Finding, Status


class Inspection(NamedTuple):
    """How the files of a part differ from its manifest."""

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    extra: tuple[str, ...]
    moved: bool
    torn: tuple[str, ...] = ()  #: another size, and nobody wrote there on purpose
    saved: bool = False  #: a step of a store of steps

    @property
    def void(self) -> bool:
        """Whether the trainer has written since, so that the manifest says nothing of these files."""
        return bool(self.changed or self.extra)

    @property
    def holds(self) -> bool:
        """Whether the manifest's digests hold: not where the trainer has written since, which nobody does into a saved step,
        whatever else lies there.
        """
        return self.saved or not self.void

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Damage: files that the manifest lists and that are gone or torn, unless the trainer has saved since."""
        return () if self.void else self.damage

    @property
    def damage(self) -> tuple[Finding, ...]:
        """The same, as far as the manifest `holds`."""
        missing = [Finding(path, "listed in the manifest, and missing", Status.PARTIAL) for path in self.missing]
        torn = [Finding(path, "not as long as the manifest says, and not written since", Status.CORRUPT) for path in self.torn]
        return (*missing, *torn)

    @property
    def note(self) -> str:
        """Why the manifest does not count, or empty."""
        if self.void:
            touched = (*self.changed, *self.extra)
            more = f" and {len(touched) - 1} more" if len(touched) > 1 else ""
            return f"saved since by the trainer ({touched[0]}{more}): the manifest no longer counts"
        return ""
