"""The model of the run that sample_run.py makes: a small decoder, and what stands for its training."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 16384
HEADS = 4


class Attention(nn.Module):
    """Causal self-attention with two query heads to each key-value head."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden // 2)
        self.v_proj = nn.Linear(hidden, hidden // 2)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection, heads in ((self.q_proj, HEADS), (self.k_proj, HEADS // 2), (self.v_proj, HEADS // 2))
        )
        key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """Gated feed-forward block."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = Attention(hidden)
        self.mlp = Mlp(hidden, ffn)
        self.input_layernorm = nn.RMSNorm(hidden)
        self.post_attention_layernorm = nn.RMSNorm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A small decoder whose parameters have Qwen2's names; positions are left out, nobody samples from it."""

    def __init__(self, hidden: int, layers: int, ffn: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, hidden)
        self.model.layers = nn.ModuleList(Layer(hidden, ffn) for _ in range(layers))
        self.model.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


def train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Stands for an epoch: every weight and every moment changes."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).uniform_(-1e-3, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
