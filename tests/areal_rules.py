"""What AReaL does when it starts on a run, as facts: which trees it resumes from, refuses loudly, or silently starts fresh on.

Written from its documented behaviour, v0.3 to 2026-08 (areal/utils/recover.py and the engines), with torch's own readers
and without a line of AReaL or of ckptstore: what ckptstore prepares is judged by somebody else. The eras are those of
frameworks/areal/era.py.

Three outcomes: `Resumed`, an exception (loud: people notice), or `Fresh` (silent: the one that must never happen).
"""

from __future__ import annotations

import contextlib
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from tests.trees import RECOVER_INFO_FILES, TENSORS, Tensors

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CONTROL_KEYS = (
    "frequence_seconds", "frequency_steps", "start_time", "steps", "last_time", "last_steps", "interval_steps",
    "interval_seconds", "initial_value",
)  # fmt: skip
LEARNING_RATE = 1e-5


class InvalidRecoverInfo(Exception):
    """AReaL's own error for a recover_info that it cannot parse. Its trainer swallows it."""


@dataclass
class StepInfo:
    """The finished step: exactly these fields, or AReaL takes the whole recover_info for invalid."""

    epoch: int
    epoch_step: int
    global_step: int
    steps_per_epoch: int


@dataclass
class Resumed:
    """Training goes on at global step `step` with this state."""

    step: int
    weights: dict[str, dict[str, torch.Tensor]]  #: part → name → tensor
    optimizer: dict[str, dict[str, Any]]  #: part → parameter's name → state; {} for a fresh or an ignored one
    data: list[dict[str, Any]]  #: one dataloader state a rank
    frequencies: dict[str, tuple[Any, Any, Any]]  #: control → every how many epochs, steps, seconds
    last_commit_step: int


@dataclass
class Fresh:
    """Training starts at global step 0, and only a warning in the log says so."""

    why: str
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  #: already loaded over the base model's


class Engine(Stateful):
    """A model with AdamW and a schedule, as the trainer holds one for each part; tensors of `tensors`' names and shapes."""

    def __init__(self, tensors: Tensors = TENSORS, *, seed: int = 0, with_optimizer: bool = True) -> None:
        self.model = _module(tensors, seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)  # adds initial_lr to the group
        self.with_optimizer = with_optimizer

    def train_step(self) -> None:
        """One step on made-up gradients: every weight and every moment changes."""
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """As AReaL's DCPState: the model's, and the optimizer's by parameter names."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer} if self.with_optimizer else {"model": model}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse."""
        if self.with_optimizer:
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
            )
        else:
            self.model.load_state_dict(state_dict["model"])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors, copied."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @property
    def moments(self) -> dict[str, Any]:
        """The optimizer's state by parameter names."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: state for parameter, state in self.optimizer.state.items()}


def save_slot(trial: Path, engines: Mapping[str, Engine], *, era: str, world_size: int = 1) -> None:
    """The recover slots as the trainer of that era writes them, real and whole; recover_info is written apart."""
    for part, engine in engines.items():
        folder = trial / part / "recover_checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        if era != "A":
            with _quiet():
                dcp.save({"dcp": engine}, checkpoint_id=folder, no_dist=True)
            continue
        save_hf(folder, engine)
        for rank in range(world_size):
            torch.save(engine.optimizer.state_dict(), folder / f"optim_world_size_{world_size}_rank_{rank}.pt")


def save_hf(folder: Path, engine: Engine) -> None:
    """A Hugging Face export's weights and configuration, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in engine.weights.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], "hidden_size": 8}))
    (folder / "tokenizer.json").write_text("{}")


# --- the launcher -------------------------------------------------------------------------------------------------


def auto_recover_passes(trial: Path) -> bool:
    """Whether the launcher, with recover.mode=auto, tells the trainer to resume; else it starts fresh.

    Every folder of the trial is taken for a model, recover_info among them, and the helper that names its slot creates it:
    so this check proves nothing about the slot, and leaves empty folders behind.
    """
    if not (trial / "recover_info").exists():
        return False
    try:
        step, *_ = read_recover_info(trial)
    except InvalidRecoverInfo:
        return False
    if step.epoch < 0:
        return False
    for entry in sorted(trial.iterdir()):
        if entry.is_dir():
            slot = entry / "recover_checkpoint"
            slot.mkdir(parents=True, exist_ok=True)
            if not slot.exists():
                return False
    return True


# --- the trainer --------------------------------------------------------------------------------------------------


def start(
    trial: Path,
    *,
    era: str,
    world_size: int = 1,
    parts: Sequence[str] = ("default",),
    tensors: Tensors = TENSORS,
    skip_optimizer: bool = False,
    num_workers: int = 0,
) -> Resumed | Fresh:
    """A start with recover.mode=auto: the launcher's check, then the trainer's load."""
    if era != "C" and not auto_recover_passes(trial):
        return Fresh("the launcher found nothing to recover from: AREAL_RECOVER_RUN=0")
    return load(
        trial,
        era=era,
        world_size=world_size,
        parts=parts,
        tensors=tensors,
        skip_optimizer=skip_optimizer,
        num_workers=num_workers,
    )


def load(
    trial: Path,
    *,
    era: str,
    world_size: int = 1,
    parts: Sequence[str] = ("default",),
    tensors: Tensors = TENSORS,
    skip_optimizer: bool = False,
    num_workers: int = 0,
) -> Resumed | Fresh:
    """The trainer's load. What it swallows becomes Fresh; all else is raised: KeyError, CheckpointException, ….

    `skip_optimizer` is recover.no_load_optim=true, which only era C has.
    """
    assert not skip_optimizer or era == "C", "recover.no_load_optim came with era C"
    engines = {part: Engine(tensors, seed=999, with_optimizer=not skip_optimizer) for part in parts}
    loaded: dict[str, dict[str, torch.Tensor]] = {}
    try:
        step, controls, stats_logger, dataloader = read_recover_info(trial)
        if isinstance(dataloader, list) and len(dataloader) != world_size:
            # An AssertionError there, which becomes this
            raise InvalidRecoverInfo(f"dataloader states of {len(dataloader)} ranks, and there are {world_size}")
        frequencies = {name: _apply_control(control) for name, control in controls.items()}
        last_commit_step = stats_logger["last_commit_step"]
        data = dataloader if isinstance(dataloader, list) else [dataloader] * world_size
        for state in data:
            _apply_dataloader(state, num_workers)
        for part, engine in engines.items():
            slot = trial / part / "recover_checkpoint"
            slot.mkdir(parents=True, exist_ok=True)
            if era == "A":
                _load_hf(engine, slot)
                loaded[part] = engine.weights
                _load_optimizer_shards(engine, slot, world_size)
            else:
                with _quiet():
                    dcp.load({"dcp": engine}, checkpoint_id=slot, no_dist=True)
    except (FileNotFoundError, InvalidRecoverInfo) as error:
        return Fresh(f"This should not be a resumed experiment! {error}", loaded)
    return Resumed(
        step.global_step + 1,
        {part: engine.weights for part, engine in engines.items()},
        {part: {} if skip_optimizer else engine.moments for part, engine in engines.items()},
        data,
        frequencies,
        last_commit_step,
    )


def read_recover_info(trial: Path) -> tuple[StepInfo, dict[str, Any], Any, Any]:
    """All six files. A file that cannot be parsed is InvalidRecoverInfo; keys of the controls are looked at later."""
    folder = trial / "recover_info"
    try:
        documents = {name: json.loads((folder / name).read_bytes()) for name in RECOVER_INFO_FILES if name.endswith(".json")}
        # The trainer unpickles it, and this one is the test's own.
        dataloader = pickle.loads((folder / "dataloader_info.pkl").read_bytes())  # noqa: S301
        step = StepInfo(**documents.pop("step_info.json"))
    except Exception as error:
        raise InvalidRecoverInfo(f"{folder}: {error}") from error
    stats_logger = documents.pop("stats_logger_info.json")
    return step, documents, stats_logger, dataloader


def _apply_control(control: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """KeyError for a control that lacks a key: nothing catches it. The stored frequency replaces the configured one."""
    states = {unit: {key: control[unit][key] for key in CONTROL_KEYS} for unit in ("epoch", "step", "time")}
    return states["epoch"]["frequency_steps"], states["step"]["frequency_steps"], states["time"]["frequence_seconds"]


def _apply_dataloader(state: Mapping[str, Any], num_workers: int) -> None:
    """Torchdata's StatefulDataLoader: {} is the start of an epoch; a loader with workers takes no state of one without."""
    if not state:
        return
    expected = {"_snapshot", "_steps_since_snapshot", "_iterator_finished"} if num_workers else _CURSOR_KEYS
    assert expected <= set(state), f"a dataloader with num_workers={num_workers} cannot take {sorted(state)}"


_CURSOR_KEYS = {
    "_index_sampler_state", "_sampler_iter_state", "_sampler_iter_yielded", "_num_yielded", "_IterableDataset_len_called",
    "_shared_seed", "fetcher_state", "dataset_state", "_iterator_finished",
}  # fmt: skip


def _load_hf(engine: Engine, slot: Path) -> None:
    """Every weights file in the folder is merged, whatever its name: a stray one is merged too."""
    merged: dict[str, torch.Tensor] = {}
    for path in sorted(slot.iterdir()):
        if path.suffix == ".safetensors":
            merged |= safetensors.torch.load_file(path)
        elif path.suffix == ".bin":
            merged |= torch.load(path, weights_only=True)
    if not merged:
        raise FileNotFoundError(f"no weights in {slot}")
    engine.model.load_state_dict(merged)


def _load_optimizer_shards(engine: Engine, slot: Path, world_size: int) -> None:
    """Each rank reads its own; all are tried on this one engine."""
    for rank in range(world_size):
        state = torch.load(slot / f"optim_world_size_{world_size}_rank_{rank}.pt", weights_only=False)
        engine.optimizer.load_state_dict(state)
        for group in engine.optimizer.param_groups:
            group["betas"], group["lr"], group["eps"]  # a group without its settings fails at the first step


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that one process saves alone, and over an older checkpoint: as AReaL does, on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected an existing checkpoint", UserWarning)
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _module(tensors: Tensors, seed: int) -> nn.Module:
    """A module whose parameters have these dotted names, random by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    for name, (dtype, shape) in tensors.items():
        *path, leaf = name.split(".")
        inner = root
        for step in path:
            if not hasattr(inner, step):
                inner.add_module(step, nn.Module())
            inner = getattr(inner, step)
        inner.register_parameter(leaf, nn.Parameter(torch.randn(shape, generator=generator).to(DTYPES[dtype])))
    return root
