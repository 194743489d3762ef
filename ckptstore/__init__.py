"""ckptstore: from a crash to resumed training in one command, and never onto a bad checkpoint."""

__version__ = "0.1.0"
