"""Checkpoints between disks and stores: push, pull, mirror, and what they are made of. See docs/object-stores.md."""
