"""Makes the run of an imaginary GRPO training with AReaL that went wrong, with real files, to try ckptstore
on.

python examples/sample_run.py DIR [--size small|medium] [--slot hf|era_a|dcp|none]

Below DIR, as below any AReaL fileroot: four whole exports (global steps 46, 93, 140, 187: the ends of epochs
of 47 steps), a fifth (234) torn by the crash, the recover slot, recover_info/, and the logs. The reward was
0.7 to 0.8 until step 187 of the log and is exactly 0 from step 188 on, so the export after global step 187
already comes from a broken rollout.
"""

from __future__ import annotations

import argparse
import getpass
import json
import math
import os
import pickle
import random
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from sample_model import HEADS, VOCABULARY, Transformer, train_one_epoch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

STEPS_PER_EPOCH = 47
EPOCHS = 10
TORN_STEP = 234
LAST_STEP = 240  #: global step at which the machine went away
ZERO_FROM_LOG_STEP = 188
SECONDS_PER_STEP = 75
SIZES = {"small": {"hidden": 256, "layers": 4, "ffn": 1024}, "medium": {"hidden": 448, "layers": 6, "ffn": 1536}}
CONFIG = """\
experiment_name: {experiment}
trial_name: {trial}
seed: 1
total_train_epochs: {epochs}
async_training: true
cluster:
  fileroot: {fileroot}
  n_nodes: 1
  n_gpus_per_node: 1
  name_resolve:
    type: nfs
    nfs_record_root: /tmp/areal/name_resolve
allocation_mode: sglang:d1p1t1+d1p1t1
tokenizer_path: ${{actor.path}}
gconfig:
  n_samples: 4
  max_new_tokens: 1024
  temperature: 1.0
actor:
  path: Qwen/Qwen2.5-1.5B-Instruct
  experiment_name: ${{experiment_name}}
  trial_name: ${{trial_name}}
  dtype: bfloat16
  optimizer:
    type: adam
    lr: 1.70e-5
    lr_scheduler_type: constant
  kl_ctl: 0.0
  group_size: ${{gconfig.n_samples}}
ref:
  path: ${{actor.path}}
train_dataset:
  path: openai/gsm8k
  type: rl
  batch_size: 8
  shuffle: true
saver:
  experiment_name: ${{experiment_name}}
  trial_name: ${{trial_name}}
  fileroot: ${{cluster.fileroot}}
  freq_epochs: 1
  freq_steps: null
  freq_secs: null
recover:
  mode: disabled
  experiment_name: ${{experiment_name}}
  trial_name: ${{trial_name}}
  fileroot: ${{cluster.fileroot}}
  freq_epochs: 1
  freq_steps: null
  freq_secs: null
  retries: 3
evaluator:
  fileroot: ${{cluster.fileroot}}
  freq_epochs: 1
stats_logger:
  fileroot: ${{cluster.fileroot}}
  wandb:
    mode: disabled
"""


def export(model: nn.Module, folder: Path, size: dict[str, int], shards: int = 3) -> None:
    """The files of an HF export, in the order in which AReaL writes them: weights, index,
    config, tokenizer.
    """
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    total_bytes = sum(tensor.nbytes for tensor in state.values())
    groups: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    before_bytes = 0
    for name, tensor in state.items():
        middle = before_bytes + tensor.nbytes / 2
        groups[int(middle / total_bytes * shards)][name] = tensor
        before_bytes += tensor.nbytes
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(group, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, shard))
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )
    write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": size["hidden"],
            "intermediate_size": size["ffn"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 2,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
    )
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.7, "top_p": 0.8})
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, in the files that Qwen2's has."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    special = {"<|endoftext|>": len(letters), "<|im_end|>": len(letters) + 1}
    added = [{"id": number, "content": text, "special": True} for text, number in special.items()]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [token | flags for token in added],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"})
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    write_json(folder / "added_tokens.json", special)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_json(path: Path, content: object) -> None:
    """JSON as HF writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def tear(folder: Path) -> None:
    """Leaves what a crash in the middle of the second of three shards leaves: no third one, no index, no
    tokenizer.
    """
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    os.truncate(second, second.stat().st_size * 3 // 5)
    for path in folder.iterdir():
        if path not in (first, second):
            path.unlink()


def write_slot(folder: Path, kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, size: dict[str, int]) -> None:
    """The recover slot: `hf` weights alone, `era_a` with the optimizer as AReaL up to v0.3.4, `dcp` as from
    v0.4.0 on.
    """
    if kind == "dcp":
        weights, optim = get_state_dict(model, optimizer)
        with warnings.catch_warnings(action="ignore"):  # that one process saves alone is the point
            writer = dcp.FileSystemWriter(folder, thread_count=2)
            dcp.save({"dcp": {"model": weights, "optim": optim}}, storage_writer=writer, no_dist=True)
        return
    export(model, folder, size)
    if kind == "era_a":
        torch.save(optimizer.state_dict(), folder / "optim_world_size_1_rank_0.pt")


def write_recover_info(folder: Path, step: int, now_s: float) -> None:
    """The six files that AReaL writes after global step `step`."""
    folder.mkdir()
    epoch, epoch_step = divmod(step, STEPS_PER_EPOCH)

    def control(steps: int, frequency: int | None = None) -> dict[str, object]:
        return {
            "frequence_seconds": None,
            "frequency_steps": frequency,
            "start_time": now_s - step * SECONDS_PER_STEP,
            "steps": steps,
            "last_time": now_s,
            "last_steps": steps,
            "interval_steps": None,
            "interval_seconds": None,
            "initial_value": False,
        }

    each_epoch = {"epoch": control(epoch + 1, 1), "step": control(step + 1), "time": control(step + 1)}
    place = {"epoch": epoch, "epoch_step": epoch_step, "global_step": step, "steps_per_epoch": STEPS_PER_EPOCH}
    yielded = epoch_step + 1
    loader = {
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
    for name, content in (
        ("step_info", place),
        ("saver_info", each_epoch),
        ("evaluator_info", each_epoch),
        ("stats_logger_info", {"last_commit_step": step}),
        ("checkpoint_info", each_epoch),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "dataloader_info.pkl").write_bytes(pickle.dumps([loader]))


def write_logs(folder: Path, fileroot: Path, experiment: str, trial: str, end_s: float) -> None:
    """The trainer's YAML, and a main.log with each step's reward."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(experiment=experiment, trial=trial, epochs=EPOCHS, fileroot=fileroot))
    noise = random.Random(188)
    lines = []
    for step in range(LAST_STEP + 1):
        log_step = step + 1
        epoch, epoch_step = divmod(step, STEPS_PER_EPOCH)
        at_s = end_s - (LAST_STEP - step) * SECONDS_PER_STEP
        stamp = time.strftime("%Y%m%d-%H:%M:%S", time.localtime(at_s)) + f".{noise.randrange(1000):03}"
        reward = 0.75 + 0.04 * math.sin(step / 9) + noise.uniform(-0.01, 0.01)
        if log_step >= ZERO_FROM_LOG_STEP:
            reward = 0.0
            if log_step == ZERO_FROM_LOG_STEP:
                lines.append(f"{stamp} SGLangEngine WARNING: Request failed: Cannot connect to host 127.0.0.1:30000")
        lines += [
            f"{stamp} StatsLogger INFO: Epoch {epoch + 1}/{EPOCHS} Step {epoch_step + 1}/{STEPS_PER_EPOCH} "
            f"Train step {log_step}/{EPOCHS * STEPS_PER_EPOCH} done.",
            f"{stamp} StatsLogger INFO: Stats (1/1):",
            f"│ grpo_actor/task_reward/avg │ {reward:.4e} │ grpo_actor/update_successful │ {1:.4e} │",
        ]
    (folder / "main.log").write_text("\n".join(lines) + "\n")


def set_time(folder: Path, at_s: float) -> None:
    """Gives a folder and all in it the time at which the trainer would have written it."""
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (at_s, at_s))


def flip_bit(path: Path) -> int:
    """Flips one bit in the middle of a file, as a failing disk does: size and times stay. Its byte offset is
    returned.
    """
    stat = path.stat()
    offset = stat.st_size // 2
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return offset


def make_run(
    fileroot: Path,
    *,
    size: str = "small",
    slot: str = "hf",
    user: str | None = None,
    experiment: str = "gsm8k-grpo",
    trial: str = "trial0",
) -> Path:
    """The sample run below `fileroot`; its folder is returned. It must not exist yet. The training ended two
    hours ago.
    """
    fileroot = fileroot.absolute()
    below = Path(user or getpass.getuser(), experiment, trial)
    run = fileroot / "checkpoints" / below
    run.mkdir(parents=True)
    end_s = time.time() - 7200
    torch.manual_seed(188)
    model = Transformer(**SIZES[size]).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(STEPS_PER_EPOCH - 1, TORN_STEP + 1, STEPS_PER_EPOCH):
        train_one_epoch(model, optimizer)
        epoch, epoch_step = divmod(step, STEPS_PER_EPOCH)
        at_s = end_s - (LAST_STEP - step) * SECONDS_PER_STEP
        folder = run / "default" / f"epoch{epoch}epochstep{epoch_step}globalstep{step}"
        export(model, folder, SIZES[size])
        if step == TORN_STEP:
            tear(folder)
        set_time(folder, at_s)
        if step == TORN_STEP - STEPS_PER_EPOCH and slot != "none":
            write_slot(run / "default/recover_checkpoint", slot, model, optimizer, SIZES[size])
            write_recover_info(run / "recover_info", step, at_s)
            set_time(run / "default/recover_checkpoint", at_s + 20)
            set_time(run / "recover_info", at_s + 21)
    logs = fileroot / "logs" / below
    write_logs(logs, fileroot, experiment, trial, end_s)
    set_time(logs, end_s)
    for path in (run / "default", run):
        os.utime(path, (end_s, end_s))
    return run


def main() -> None:
    """Makes the run and prints its folder."""
    parser = argparse.ArgumentParser(description="Make a sample AReaL run with real files to try ckptstore on.")
    parser.add_argument("fileroot", type=Path, metavar="DIR", help="the fileroot; made if missing")
    parser.add_argument("--size", choices=SIZES, default="small", help="25 MB (small) or 60 MB a checkpoint")
    parser.add_argument(
        "--slot",
        choices=("hf", "era_a", "dcp", "none"),
        default="hf",
        help="recover slot: weights alone, with AReaL v0.3's optimizer, or torch.distributed.checkpoint's (v0.4 on)",
    )
    parser.add_argument("--user", help="whose run it is (default: yours)")
    parser.add_argument("--experiment-name", default="gsm8k-grpo")
    parser.add_argument("--trial-name", default="trial0")
    given = parser.parse_args()
    run = make_run(
        given.fileroot,
        size=given.size,
        slot=given.slot,
        user=given.user,
        experiment=given.experiment_name,
        trial=given.trial_name,
    )
    print(f"sample run: {run}")


if __name__ == "__main__":
    main()
