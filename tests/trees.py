"""Tiny AReaL run trees with genuine files, built without torch, and the ways in which they get damaged."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

STEPS_PER_EPOCH = 47
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
RECOVER_INFO_FILES = (
    "step_info.json",
    "saver_info.json",
    "evaluator_info.json",
    "stats_logger_info.json",
    "checkpoint_info.json",
    "dataloader_info.pkl",
)
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1}
TENSORS: Tensors = {
    "model.embed_tokens.weight": ("BF16", (16, 8)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.layers.0.mlp.down_proj.weight": ("BF16", (8, 8)),
    "model.layers.1.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.norm.weight": ("BF16", (8,)),
    "lm_head.weight": ("BF16", (16, 8)),
}
_JSON_CONTENT: dict[str, object] = {
    "config.json": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 8,
        "vocab_size": 16,
    },
    "generation_config.json": {"eos_token_id": [15], "temperature": 1.0},
    "tokenizer.json": {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}},
    "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768},
    "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    "added_tokens.json": {"<|im_end|>": 15},
    "vocab.json": {"a": 0, "b": 1},
}


def folder_name(step: int, steps_per_epoch: int = STEPS_PER_EPOCH) -> str:
    """The name that AReaL's saver gives to the save after 0-based global step `step`."""
    epoch, epoch_step = divmod(step, steps_per_epoch)
    return f"epoch{epoch}epochstep{epoch_step}globalstep{step}"


def safetensors_bytes(tensors: Tensors, *, seed: int = 0) -> bytes:
    """A safetensors file with random data of these dtypes and shapes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + random.Random(seed).randbytes(position)


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    tensors: Tensors = TENSORS,
) -> Path:
    """An HF model folder as AReaL exports it: nine files, the weights in `shards` files with an index if more
    than one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, seed=seed))
    else:
        weight_map = {}
        for number in range(shards):
            shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            mine = {name: tensors[name] for name in names[number::shards]}
            (folder / shard).write_bytes(safetensors_bytes(mine, seed=seed * 100 + number))
            weight_map.update(dict.fromkeys(mine, shard))
        total = sum(prod(shape) * _ITEM_BYTES[dtype] for dtype, shape in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, content in _JSON_CONTENT.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return folder


def write_bin_model(folder: Path) -> Path:
    """A model with `pytorch_model.bin` in place of safetensors; the weights are a zip, as torch.save makes
    it, of no tensors.
    """
    import zipfile

    write_model(folder)
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("pytorch_model/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("pytorch_model/version", "3\n")
    return folder


def write_lora(folder: Path, *, seed: int = 0) -> Path:
    """A PEFT adapter folder: no config.json, no base weights."""
    folder.mkdir(parents=True, exist_ok=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_{x}.weight": ("F32", (2, 8)) for x in "AB"}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, seed=seed))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (folder / "README.md").write_text("adapter\n")
    return folder


def write_era_a_slot(folder: Path, *, world_size: int = 2, seed: int = 0) -> Path:
    """A recover slot of AReaL up to v0.3.4: an HF model and one optimizer file a rank (any bytes: nothing
    reads them here).
    """
    write_model(folder, seed=seed)
    for rank in range(world_size):
        name = f"optim_world_size_{world_size}_rank_{rank}.pt"
        (folder / name).write_bytes(random.Random(seed + rank).randbytes(3000))
    return folder


def dcp_metadata(items: Sequence[tuple[str, str, int, int]], tensors: Tensors | None = None) -> bytes:
    """A `.metadata` in torch's own layout, written opcode by opcode, of (key, file, offset, length) items.

    Keys in `tensors` become tensors of that dtype and shape in one chunk; the other keys become objects.
    """
    tensors = tensors or {}
    metadata = "torch.distributed.checkpoint.metadata"
    entries = b"".join(
        _text(key) + (_tensor_record(*tensors[key]) if key in tensors else _object(metadata, "BytesStorageMetadata"))
        for key, *_ in items
    )
    storage = b"".join(
        _object(metadata, "MetadataIndex", fqn=_text(key), index=b"N", offset=b"N")
        + _object(
            "torch.distributed.checkpoint.filesystem",
            "_StorageInfo",
            relative_path=_text(file),
            offset=_int(offset),
            length=_int(length),
        )
        for key, file, offset, length in items
    )
    root = _object(
        metadata,
        "Metadata",
        state_dict_metadata=b"}(" + entries + b"u",
        planner_data=b"}",
        storage_data=b"}(" + storage + b"u",
        storage_meta=b"N",
        version=b"N",
    )
    return b"\x80\x04" + root + b"."


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    data = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


def _global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def _object(module: str, name: str, **state: bytes) -> bytes:
    fields = b"".join(_text(key) + value for key, value in state.items())
    return _global(module, name) + b")\x81}(" + fields + b"ub"


def _size(shape: Iterable[int]) -> bytes:
    return _global("torch", "Size") + b"(" + b"".join(_int(n) for n in shape) + b"t\x85R"


def _tensor_record(dtype: str, shape: tuple[int, ...]) -> bytes:
    metadata = "torch.distributed.checkpoint.metadata"
    layout = _global("torch.serialization", "_get_layout") + _text("torch.strided") + b"\x85R"
    memory = _global(metadata, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R"
    fields = _global("torch", dtype) + layout + b"\x89" + memory + b"\x89"
    properties = _global(metadata, "TensorProperties") + b")\x81(" + fields + b"tb"
    chunk = _object(metadata, "ChunkStorageMetadata", offsets=_size([0] * len(shape)), sizes=_size(shape))
    return _object(
        metadata,
        "TensorStorageMetadata",
        properties=properties,
        size=_size(shape),
        chunks=b"](" + chunk + b"e",
    )


def write_dcp_slot(folder: Path, *, ranks: int = 2, optimizer: bool = True, seed: int = 0) -> Path:
    """A recover slot of AReaL from v0.4 on: `.metadata` and a shard a rank, of random bytes in real places."""
    folder.mkdir(parents=True, exist_ok=True)
    keys: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, (_, shape) in TENSORS.items():
        keys[f"dcp.model.{key}"] = ("bfloat16", shape)
        if optimizer:
            keys |= {f"dcp.optim.state.{key}.{m}": ("bfloat16", shape) for m in ("exp_avg", "exp_avg_sq")}
    objects = ["dcp.optim.param_groups.0.lr", "dcp.optim.param_groups.0.params"] if optimizer else []
    items, ends = [], [0] * ranks
    for number, key in enumerate([*keys, *objects]):
        rank = number % ranks
        length = 1200 + prod(keys[key][1]) * 2 if key in keys else 1261
        items.append((key, f"__{rank}_0.distcp", ends[rank], length))
        ends[rank] += length
    for rank, size in enumerate(ends):
        (folder / f"__{rank}_0.distcp").write_bytes(random.Random(seed * 10 + rank).randbytes(size))
    (folder / ".metadata").write_bytes(dcp_metadata(items, keys))
    return folder


def write_recover_info(trial: Path, step: int, *, steps_per_epoch: int = STEPS_PER_EPOCH, world_size: int = 1) -> Path:
    """`recover_info/` as AReaL leaves it after 0-based global step `step`."""
    folder = trial / "recover_info"
    folder.mkdir(parents=True, exist_ok=True)
    epoch, epoch_step = divmod(step, steps_per_epoch)
    now = 1_763_000_000.0

    def control(frequency: int | None, steps: int) -> dict[str, object]:
        return {
            "frequence_seconds": None,
            "frequency_steps": frequency,
            "start_time": now - 3600,
            "steps": steps,
            "last_time": now,
            "last_steps": steps,
            "interval_steps": None,
            "interval_seconds": None,
            "initial_value": False,
        }

    def controls(epochs: int | None, steps: int | None) -> dict[str, object]:
        return {
            "epoch": control(epochs, (step + 1) // steps_per_epoch),
            "step": control(steps, step + 1),
            "time": control(None, step + 1),
        }

    contents: dict[str, object] = {
        "step_info.json": {
            "epoch": epoch,
            "epoch_step": epoch_step,
            "global_step": step,
            "steps_per_epoch": steps_per_epoch,
        },
        "saver_info.json": controls(1, None),
        "evaluator_info.json": controls(1, None),
        "stats_logger_info.json": {"last_commit_step": step},
        "checkpoint_info.json": controls(1, None),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    yielded = epoch_step + 1
    state = {
        "_index_sampler_state": None,
        "_sampler_iter_state": {"samples_yielded": yielded * 8},
        "_sampler_iter_yielded": yielded,
        "_num_yielded": yielded,
        "_IterableDataset_len_called": None,
        "_shared_seed": None,
        "fetcher_state": None,
        "dataset_state": None,
        "_iterator_finished": False,
    }
    (folder / "dataloader_info.pkl").write_bytes(pickle.dumps([state] * world_size))
    return folder


def write_logs(root: Path, *, user: str = "alice", experiment: str = "gsm8k-grpo", trial: str = "trial0") -> Path:
    """`{fileroot}/logs/{user}/{exp}/{trial}/config.yaml`, with the blocks that recovery reads."""
    folder = root / "logs" / user / experiment / trial
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        f"experiment_name: {experiment}\ntrial_name: {trial}\n"
        f"cluster:\n  fileroot: {root}\n  n_nodes: 1\n  n_gpus_per_node: 1\n"
        "saver:\n  freq_epochs: 1\n  freq_steps: null\n  freq_secs: null\n"
        "recover:\n  mode: disabled\n  retries: 3\n  freq_epochs: 1\n  freq_steps: null\n  freq_secs: null\n"
        "actor:\n  path: Qwen/Qwen2.5-1.5B-Instruct\n  optimizer:\n    type: adam\n    lr: 2e-06\n"
    )
    return folder


def make_run(
    root: Path,
    *,
    user: str = "alice",
    experiment: str = "gsm8k-grpo",
    trial: str = "trial0",
    steps: Iterable[int] | None = None,
    every: int | None = None,
    last: int = 187,
    steps_per_epoch: int = STEPS_PER_EPOCH,
    parts: Sequence[str] = ("default",),
    sharded: bool = False,
    slot: str | None = None,
    slot_step: int = 7,
    recover_info: int | None = None,
    logs: bool = True,
) -> Path:
    """A run below the fileroot `root`; the trial's folder is returned.

    Saves at `steps` (0-based global steps), or after each `every` steps up to `last`, or at each epoch's end.
    `slot` is None, "hf", "era_a" or "dcp"; `slot_step` seeds its weights, which equal those of the export of
    that step for "hf" and "era_a". mtimes follow the steps, a minute a step, the newest an hour ago.
    """
    folder = root / "checkpoints" / user / experiment / trial
    folder.mkdir(parents=True, exist_ok=True)
    if steps is None:
        steps = range((every or steps_per_epoch) - 1, last + 1, every or steps_per_epoch)
    chosen = sorted(steps)
    newest = max(chosen, default=0)
    for number, part in enumerate(parts):
        for step in chosen:
            save = folder / part / folder_name(step, steps_per_epoch)
            write_model(save, seed=step + 1000 * number, shards=3 if sharded else 1)
            set_age(save, 3600 + (newest - step) * 60)
        if slot is not None:
            make = {"hf": write_model, "era_a": write_era_a_slot, "dcp": write_dcp_slot}[slot]
            set_age(make(folder / part / "recover_checkpoint", seed=slot_step + 1000 * number), 3600)
    if recover_info is not None:
        set_age(write_recover_info(folder, recover_info, steps_per_epoch=steps_per_epoch), 3600)
    if logs:
        write_logs(root, user=user, experiment=experiment, trial=trial)
    for part in parts:
        if (folder / part).exists():
            set_age(folder / part, 3600, deep=False)
    set_age(folder, 3600, deep=False)
    return folder


def checkpoint(trial: Path, step: int, part: str = "default", steps_per_epoch: int = STEPS_PER_EPOCH) -> Path:
    """The folder of one save."""
    return trial / part / folder_name(step, steps_per_epoch)


def make_many(root: Path, n: int, *, user: str = "alice", experiment: str = "big", trial: str = "trial0") -> Path:
    """`n` checkpoints of nine small files each, one a step; quick: the same bytes each time."""
    folder = root / "checkpoints" / user / experiment / trial
    source = write_model(root / ".template")
    contents = [(name, (source / name).read_bytes()) for name in MODEL_FILES]
    shutil.rmtree(source)
    default = folder / "default"
    default.mkdir(parents=True)
    base = os.open(default, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for step in range(n):
            name = folder_name(step)
            os.mkdir(name, dir_fd=base)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=base)
            for file_name, data in contents:
                fd = os.open(file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=inner)
                os.write(fd, data)
                os.close(fd)
            os.close(inner)
    finally:
        os.close(base)
    return folder


# Damage


def bitflip(path: Path, offset: int = -1, bit: int = 0) -> None:
    """Flips one bit of the byte at `offset` (from the end when negative), keeping size and times."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        (value,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ (1 << bit)]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def truncate(path: Path, lost_bytes: int = 100) -> None:
    """Cuts the last bytes off."""
    os.truncate(path, max(0, path.stat().st_size - lost_bytes))


def zero_length(path: Path) -> None:
    """Leaves the name without a byte."""
    os.truncate(path, 0)


def extend(path: Path, extra: bytes = b"\0" * 64) -> None:
    """Appends bytes that belong to nothing."""
    with path.open("ab") as file:
        file.write(extra)


def zero_tail(path: Path, length_bytes: int = 64) -> None:
    """The size is right but the last bytes are zeros: a crash before the file system wrote them."""
    size = path.stat().st_size
    os.truncate(path, size - length_bytes)
    os.truncate(path, size)


def remove_shard(folder: Path, number: int = 2) -> Path:
    """Removes one shard of a sharded model; its path is returned."""
    (path,) = folder.glob(f"model-{number:05}-of-*.safetensors")
    path.unlink()
    return path


def empty_epoch(trial: Path, step: int, part: str = "default") -> Path:
    """The folder that AReaL makes before it saves, left by a crash."""
    folder = checkpoint(trial, step, part)
    folder.mkdir(parents=True)
    return folder


def tmp_folder(trial: Path, step: int, part: str = "default") -> Path:
    """A save in progress as Archon makes it: `<name>.tmp/sharded/…`."""
    folder = trial / part / (folder_name(step) + ".tmp")
    write_dcp_slot(folder / "sharded", optimizer=False)
    return folder


NEAR_MISSES = (
    "epoch0epochstep46globalstep46.bak",
    "epoch0epochstep46globalstep46 (copy)",
    "epoch0epochstep46",
    "Epoch0EpochStep46GlobalStep46",
    "xepoch0epochstep46globalstep46",
    "epoch0epochstep46globalstep46\n",
    "epoch0epochstep-1globalstep46",
    "epoch\N{ARABIC-INDIC DIGIT THREE}epochstep46globalstep46",
    "checkpoint-46",
    "global_step46",
)


def near_misses(trial: Path, part: str = "default", names: Iterable[str] = NEAR_MISSES) -> list[Path]:
    """Folders with a whole model inside, whose names AReaL's saver never writes."""
    return [write_model(trial / part / name) for name in names]


def critic_only(trial: Path, step: int) -> Path:
    """A critic save whose default twin does not exist."""
    return write_model(checkpoint(trial, step, "critic"), seed=step)


def stray_slot(trial: Path) -> Path:
    """`{trial}/recover_checkpoint/`, where old guides copy to and AReaL never reads."""
    return write_model(trial / "recover_checkpoint")


def symlink_file(path: Path, target: Path) -> None:
    """Moves `path` to `target` and leaves a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


def set_age(folder: Path, age_s: float, *, deep: bool = True) -> None:
    """Makes a folder, and all below it if `deep`, `age_s` seconds old."""
    when = time.time() - age_s
    for path in sorted(folder.rglob("*"), reverse=True) if deep else ():
        os.utime(path, (when, when), follow_symlinks=False)
    os.utime(folder, (when, when))
