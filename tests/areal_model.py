"""A small language model with the module names of Qwen2, in plain torch, its exports, and AReaL's way of saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ckptstore.model import FileInfo

VOCABULARY, WIDTH, INNER, LAYERS = 48, 16, 40, 2
#: before torch 2.7, FSDP2 loads but cannot train on CPUs
TRAINS_SHARDED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)) + self.k_proj(x).repeat(1, 1, 2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.mlp = MLP()
        self.input_layernorm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x):
        return x + self.mlp(self.self_attn(self.input_layernorm(x)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens):
        return self.lm_head(self.model(tokens))


def make(seed: int = 0, dtype: torch.dtype = torch.bfloat16, tied: bool = False) -> Model:
    torch.manual_seed(seed)
    return Model(tied).to(dtype)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer as AReaL makes it, with the LR schedule that adds `initial_lr`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05, betas=(0.9, 0.95), eps=1e-5, fused=True)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = model(torch.arange(12).reshape(2, 6)).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach().to_local() if hasattr(loss, "to_local") else loss)


class State:
    """What AReaL hands to dcp.load: a Stateful of the model and, unless left out, the optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        optimizers = self.optimizer if self.optimizer is not None else []
        model, optimizer = get_state_dict(self.model, optimizers)
        return {"model": model, "optim": optimizer} if self.optimizer is not None else {"model": model}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        optimizers = self.optimizer if self.optimizer is not None else []
        set_state_dict(self.model, optimizers, model_state_dict=state["model"], optim_state_dict=state.get("optim", {}))


def export(
    folder: Path, model: Model, *, tied: bool | None = False, drop_head: bool = False, shards: int = 1
) -> list[FileInfo]:
    """Save the model as the Hugging Face library does; the folder's files."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}
    if drop_head:
        del state["lm_head.weight"]
    names = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            save_file({key: state[key] for key in names[number::shards]}, folder / shard, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names[number::shards], shard))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    return infos(folder)


def infos(folder: Path) -> list[FileInfo]:
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return [FileInfo(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found]
