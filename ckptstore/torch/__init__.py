"""Saving and loading from PyTorch: state dicts, in the background too, and torch.distributed.checkpoint. Imports torch.

>>> import ckptstore.torch as ckpt                                     # doctest: +SKIP
>>> store = ckptstore.CheckpointStore("runs/mine")                     # doctest: +SKIP
>>> ckpt.save(store, step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})    # doctest: +SKIP
>>> state = ckpt.load(store)                                           # doctest: +SKIP
"""

from __future__ import annotations

from ckptstore.saves.background import SaveHandle, wait_all
from ckptstore.torch.background import save_async
from ckptstore.torch.reader import StoreReader
from ckptstore.torch.resuming import resume_step
from ckptstore.torch.signals import Emergency, install_signal_handlers
from ckptstore.torch.simple import load, save
from ckptstore.torch.writer import StoreWriter

__all__ = [
    "Emergency",
    "SaveHandle",
    "StoreReader",
    "StoreWriter",
    "install_signal_handlers",
    "load",
    "resume_step",
    "save",
    "save_async",
    "wait_all",
]
