"""TRL's GRPOTrainer with the callback of examples/hf_trainer.py: it is a Hugging Face Trainer, so nothing else is needed.

python examples/trl_grpo.py DIR      trains a tiny model made here, without any download, twice
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from datasets import Dataset
from hf_trainer import StoreCallback, newest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from ckptstore import CheckpointStore
from ckptstore.retention import Keep

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(61))]


def model() -> Qwen2ForCausalLM:
    """A language model small enough for an example."""
    torch.manual_seed(1)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Words for the numbers."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Short is good."""
    return [-float(len(text)) for text in completions]


def main() -> None:
    """Trains to step 4, and on to step 8 from what the store holds."""
    place = sys.argv[1]
    store = CheckpointStore(os.path.join(place, "store"))
    data = Dataset.from_dict({"prompt": [f"w{number} w{number + 1}" for number in range(16)]})
    for steps in (4, 8):
        arguments = GRPOConfig(
            os.path.join(place, f"outputs-{steps}"), max_steps=steps, save_steps=2, save_total_limit=1, report_to=[],
            per_device_train_batch_size=4, num_generations=4, max_completion_length=4, use_cpu=True, bf16=False,
            disable_tqdm=True, logging_steps=2,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model(), reward, args=arguments, train_dataset=data, processing_class=tokenizer(),
            callbacks=[StoreCallback(store, keep=Keep(last=3))],
        )  # fmt: skip
        before = newest(store, os.path.join(place, "from-store"))
        trainer.train(resume_from_checkpoint=before)
        print(f"from {before and os.path.basename(before)} to {trainer.state.global_step}; kept {[one.step for one in store]}")


if __name__ == "__main__":
    main()
