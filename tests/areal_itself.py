"""One rank of AReaL itself on a CPU: its own engine, saver and recovery, a small Qwen2, and a loop that trains and notes.

python tests/areal_itself.py RANK WORLD UNTIL ANSWER YAML [KEY=VALUE …]

It starts as AReaL's launcher starts it (recover.mode=auto), trains up to the global step UNTIL, that one left out, and
leaves in ANSWER.RANK what it found in the slot, what it then trained on, and what it had after each step. With KILL_AT=N
in the environment rank 0 ends by SIGKILL in its first recover dump, before the N-th change of this to the run's files.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

#: Packages that AReaL imports on the way to its recovery, and that recovery does not use; what is installed is taken.
STAND_INS = {
    "ray", "psutil",  # launchers and schedulers
    "aiohttp", "aiofiles", "flask", "werkzeug", "tenacity", "uvloop", "orjson", "pybase64", "openai",  # servers, agents
    "etcd3",  # a name service that the YAML does not choose
    "peft", "torch_memory_saver", "triton", "mbridge", "megatron",  # LoRA, CUDA, the other engines
    "numba",  # compiles a function that divides a batch
    "datasets",  # types of what the test makes itself
    "wandb", "swanlab", "trackio", "tensorboardX",  # loggers
}  # fmt: skip


class Anything(type):
    """A class that has every attribute; called with a function it is a decorator that changes nothing; false, and no number."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __call__(cls, *args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else cls

    def __bool__(cls) -> bool:
        return False

    def __gt__(cls, other: Any) -> bool:
        return False


class StandIn(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, so only for what is not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


class OnCPU(types.ModuleType):
    """torch, where every device is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return (lambda _: torch.device("cpu")) if name == "device" else getattr(torch, name)


class Changes:
    """Counts what this process does to files below `root`: opened to write, renamed, removed. SIGKILL before the n-th."""

    def __init__(self, root: str, kill_at: int) -> None:
        self.root, self.kill_at, self.count, self.counting = root, kill_at, 0, False
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.counting or event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if str(args[0]).startswith(self.root):
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def engine_class() -> Any:
    try:
        from areal.engine.fsdp_engine import FSDPLMEngine
    except ImportError:  # before v1.0, which knows no device but GPUs
        from areal.engine import base_hf_engine
        from areal.engine.sft.lm_engine import FSDPLMEngine

        base_hf_engine.torch = OnCPU("torch")
        barrier = dist.barrier
        dist.barrier = lambda *groups, device_ids=None: barrier(*groups)
    return FSDPLMEngine


def dataloader(config: Any, rank: int, world_size: int) -> Any:
    """The loader that the trainer of that version makes, of samples that tell their number."""
    from areal.utils import data

    samples = [{"input_ids": [number + 4, 1 + number % 3, 2, 3], "loss_mask": [0, 1, 1, 1]} for number in range(28)]
    collate = getattr(data, "collate_samples_to_list", data.pad_sequences_to_tensors)
    try:
        from areal.utils.dataloader import create_dataloader
    except ImportError:  # v0.3: each rank is given its share of the data, and shuffles it by itself
        from torchdata.stateful_dataloader import StatefulDataLoader

        names = ("shuffle", "num_workers", "drop_last")
        options = {name: getattr(config, name) for name in names} | {"batch_size": config.batch_size // world_size}
        return StatefulDataLoader(samples[rank::world_size], collate_fn=collate, **options)
    return create_dataloader(samples, rank, world_size, config, collate)


def snapshot(engine: Any) -> dict[str, Any]:
    """All of the weights and the moments, whatever of them this rank holds."""

    def full(value: Any) -> Any:
        value = value.full_tensor() if isinstance(value, DTensor) else value
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    parameters, state = dict(engine.model.named_parameters()), engine.optimizer.state
    return {
        "weights": {name: full(parameter) for name, parameter in parameters.items()},
        "moments": {
            name: {key: full(value) for key, value in state[parameter].items()}
            for name, parameter in parameters.items()
            if parameter in state
        },
    }


def main(rank: int, world_size: int, until: int, answer: str, words: list[str]) -> None:
    from areal.api import alloc_mode
    from areal.api.cli_args import GRPOConfig, load_expr_config
    from areal.api.io_struct import FinetuneSpec, StepInfo
    from areal.utils.data import cycle_dataloader
    from areal.utils.evaluator import Evaluator
    from areal.utils.recover import RecoverHandler, check_if_recover
    from areal.utils.saver import Saver
    from areal.utils.stats_logger import StatsLogger

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    config, _ = load_expr_config(words, GRPOConfig)
    os.environ["AREAL_RECOVER_RUN"] = str(int(check_if_recover(config.recover, 0)))  # as its launchers do
    transformers.set_seed(config.seed + rank)  # as its trainers do, at each start
    dist.init_process_group("gloo", init_method=f"file://{answer}.rendezvous", rank=rank, world_size=world_size)
    engine = engine_class()(config.actor)
    modes = getattr(alloc_mode, "AllocationMode", None)  # up to v1.0.2; since then engines name their backend
    engine.create_process_group(modes.from_str(config.allocation_mode).train if modes else None)
    loader = dataloader(config.train_dataset, rank, world_size)
    batch_size = config.train_dataset.batch_size
    spec = FinetuneSpec(config.total_train_epochs, len(loader) * batch_size, batch_size)
    engine.initialize(None, spec)
    saver, evaluator, logger = Saver(config.saver, spec), Evaluator(config.evaluator, spec), StatsLogger(config, spec)
    handler = RecoverHandler(config.recover, spec)
    info = handler.load(engine, saver, evaluator, logger, loader)
    found: dict[str, Any] = {
        "start": info.last_step_info.next().global_step if info is not None else None,
        "frequencies": {"saver": saver.freq_ctl.step_ctl.frequency_steps, "recover": handler.freq_ctl.step_ctl.frequency_steps},
        "settings": [{**group, "params": None} for group in engine.optimizer.param_groups],
        "loaded": snapshot(engine),
        "batches": {},  # step → the tokens
        "after": {},  # step → weights and moments
        "saves": {},  # step → names of the folders
    }
    root = Saver.get_save_root(config.experiment_name, config.trial_name, config.cluster.fileroot)
    changes = Changes(root, int(os.environ.get("KILL_AT", "0")) if rank == 0 else 0)
    save = engine.save

    def noted(meta: Any) -> None:
        found["saves"].setdefault(step, []).append(os.path.basename(meta.path))
        changes.counting = meta.path.endswith("recover_checkpoint") and not changes.count
        save(meta)

    engine.save = noted
    batches = cycle_dataloader(loader)
    for step in range(found["start"] or 0, until):
        batch = next(batches)
        found["batches"][step] = [sample["input_ids"].tolist() for sample in (batch if isinstance(batch, list) else [batch])]
        engine.train_lm(batch)
        (getattr(engine, "step_lr_scheduler", None) or engine.lr_scheduler_step)()
        found["after"][step] = snapshot(engine)
        epoch, epoch_step = divmod(step, len(loader))
        saver.save(engine, epoch, epoch_step, step, tokenizer=engine.tokenizer)
        finished = StepInfo(epoch=epoch, epoch_step=epoch_step, global_step=step, steps_per_epoch=len(loader))
        handler.dump(engine, finished, saver, evaluator, logger, loader, tokenizer=engine.tokenizer)
        changes.counting = False
        logger.commit(epoch, epoch_step, step, {})
    found["changes"] = changes.count
    torch.save(found, f"{answer}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # No compiled kernels: they take minutes, and a real triton.
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)
    sys.meta_path.append(Finder())  # Transformers has asked by now which packages are there
    sys.path.insert(0, os.environ.get("AREAL_SOURCE") or sys.path[0])
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], ["--config", *sys.argv[5:]])
