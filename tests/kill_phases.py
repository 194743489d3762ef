"""The phases that the kill campaign counts, in order."""

PHASES = ("start-up", "copy", "manifest", "journal", "exchange", "set-aside", "journal removal")
