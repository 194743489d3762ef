"""Saves into a store of steps, of any trainer: on a disk, at a URL, by several nodes, in the background. See docs/saving.md."""
