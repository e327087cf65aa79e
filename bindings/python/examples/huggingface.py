# SPDX-License-Identifier: Apache-2.0
"""Generates text with a compressed cache, greedily and with beams, and compares with the model's own cache.

    python huggingface.py [MODEL_DIR] [--preset k4v4]

Without a folder: a small model with random weights, so that the example runs anywhere.
"""

import argparse
from contextlib import suppress

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tqkv.hf import TqCache

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?")
parser.add_argument("--preset", default="k4v4")
parser.add_argument("--prompt", default="The quick brown fox")
parser.add_argument("--new-tokens", type=int, default=32)
a = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

tokenizer = None
if a.model is None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
else:
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16).to(device)
    with suppress(OSError, ValueError):  # a model of bytes has none
        tokenizer = AutoTokenizer.from_pretrained(a.model)
if tokenizer is None:
    ids = torch.tensor([list(a.prompt.encode())], device=device)
else:
    ids = tokenizer(a.prompt, return_tensors="pt").input_ids.to(device)


def show(name, tokens):
    new = tokens[0, ids.shape[1] :].tolist()
    print(f"{name:12s}", repr(bytes(new).decode("utf-8", "replace") if tokenizer is None else tokenizer.decode(new)))


options = {"max_new_tokens": a.new_tokens, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
show("own cache", model.generate(ids, do_sample=False, **options))

cache = TqCache.for_model(model, preset=a.preset)
show(a.preset, model.generate(ids, do_sample=False, past_key_values=cache, **options))
print(f"{cache.bytes_per_token()} bytes a token in {len(cache)} layers")

cache = TqCache.for_model(model, preset=a.preset)
show("4 beams", model.generate(ids, do_sample=False, num_beams=4, past_key_values=cache, **options))
