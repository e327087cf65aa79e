# SPDX-License-Identifier: Apache-2.0
"""Whether a model's own activations survive compression: the check before a preset is used.

    python -m tqkv.validate_model --model DIR --text FILE [--preset k4v4] [--json OUT.json]

Per layer: the cosine between the keys and values of a prompt and their decoded codes, and the relative error of
attention outputs over compressed pages against the same queries over uncompressed keys and values. Then the model
writes on with an uncompressed cache, and the compressed one is fed that text token by token: how often would it have
written the same? Exit code 0 where all thresholds hold, 1 where one does not, 2 where the model cannot run.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from . import _lib
from .eval import Text, cache_options, load_model
from .hf import TqCache, TqLayer

_Settings = tuple[float | None, float | None, torch.Tensor | None, int | None]


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, settings: _Settings
) -> torch.Tensor:
    """Attention of the last queries over all keys in double precision: [rows, heads, tokens, channels] each; the result
    is [rows, tokens, heads, channels]."""
    scale, soft_cap, sinks, window = settings
    total, tokens = key.shape[2], query.shape[2]
    group = query.shape[1] // key.shape[1]
    k, v = key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    x = query.double() @ k.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        x = soft_cap * torch.tanh(x / soft_cap)
    position = torch.arange(total, device=query.device)
    at = position[total - tokens :]
    seen = (position <= at[:, None]) & (position >= starts.long()[:, None, None])
    if window is not None:
        seen = seen & (at[:, None] - position < window)
    x = x.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        x = torch.cat([x, sinks.double().view(1, -1, 1, 1).expand(*x.shape[:3], 1)], 3)
    return (x.softmax(-1)[..., :total] @ v).transpose(1, 2)


class _LayerError:
    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.cosine_k = self.cosine_v = 1.0
        self.error = self.norm = 0.0

    def observe(
        self,
        layer: TqLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        settings: _Settings,
        out: torch.Tensor,
    ) -> None:
        if self.keys is None:
            self.keys, self.values = key, value
            self.cosine_k = self._cosine(layer, key, "k")
            self.cosine_v = self._cosine(layer, value, "v")
            return
        self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        want = dense_attention(query, self.keys, self.values, layer.cache.starts, settings)
        self.error += float((out.double() - want).square().sum())
        self.norm += float(want.square().sum())

    @staticmethod
    def _cosine(layer: TqLayer, x: torch.Tensor, side: str) -> float:
        """Mean over vectors; keys with the offset back in."""
        codec = layer.codec
        if getattr(codec.info, side).bits == 16:
            return 1.0
        x = x.float()
        offset = (
            layer.offset[:, :, None] if side == "k" and layer.offset is not None else torch.zeros((), device=x.device)
        )
        centred = (x - offset).transpose(1, 2).contiguous()
        codes, scales = codec.encode(centred.view(-1, x.shape[3]), side)
        back = codec.decode(codes, scales, side, dtype="f32").view(centred.shape).transpose(1, 2) + offset
        return float(torch.nn.functional.cosine_similarity(x.double(), back.double(), dim=-1).mean())


@torch.no_grad()  # type: ignore[untyped-decorator]
def validate(
    model: Any, ids: list[int], options: dict[str, Any], *, prompt: int, new_tokens: int, quiet: bool = False
) -> dict[str, Any]:
    """All figures, as --json writes them."""
    if len(ids) < prompt:
        raise _lib.InvalidArgument(f"a prompt of {prompt} tokens; the text has {len(ids)}")
    start = torch.tensor([ids[:prompt]], device=model.device)
    text = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        past_key_values=DynamicCache(config=model.config),
        pad_token_id=0,
    )
    cache = TqCache.for_model(model, **options)
    errors = {layer.index: _LayerError() for layer in cache._kv}
    cache.observer = lambda layer, *call: errors[layer.index].observe(layer, *call)
    same = []
    steps = range(prompt, text.shape[1])
    logits = model(start, past_key_values=cache, logits_to_keep=1).logits
    for i in tqdm(steps, unit="tok", disable=quiet, file=sys.stderr):
        same.append(int(logits[0, -1].argmax()) == int(text[0, i]))
        logits = model(text[:, i : i + 1], past_key_values=cache).logits
    return {
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "agreement": sum(same) / len(same),
        "first_difference": same.index(False) if False in same else None,
        "non_finite": int(cache.faults().count[_lib.FAULT_KINDS.index("non_finite")]),
        "layers": [
            {
                "layer": index,
                "cosine_k": error.cosine_k,
                "cosine_v": error.cosine_v,
                "output_error": (error.error / error.norm) ** 0.5 if error.norm else 0.0,
            }
            for index, error in errors.items()
        ],
    }


def failures(result: dict[str, Any], min_cosine: float, max_output_error: float, min_agreement: float) -> list[str]:
    """A sentence for each threshold that does not hold."""
    found = []
    for row in result["layers"]:
        for side in ("k", "v"):
            if not row[f"cosine_{side}"] >= min_cosine:
                found.append(
                    f"layer {row['layer']}: cosine of {side.upper()} {row[f'cosine_{side}']:.4f} is below {min_cosine}"
                )
        if not row["output_error"] <= max_output_error:
            found.append(f"layer {row['layer']}: output error {row['output_error']:.4f} is above {max_output_error}")
    if not result["agreement"] >= min_agreement:
        found.append(f"agreement {result['agreement']:.4f} is below {min_agreement}")
    if result["non_finite"]:
        found.append(f"{result['non_finite']} keys or values hold a NaN or infinity; they were stored as zero")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tqkv.validate_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--text", required=True, help="text whose beginning is the prompt")
    parser.add_argument("--preset", default="k4v4", help="a preset or kXvY; /offset and /plain as for tqkv.eval")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--raw-first-layers", type=int, default=0)
    parser.add_argument("--raw-last-layers", type=int, default=0)
    parser.add_argument("--min-cosine", type=float, default=0.9, help="default: %(default)s")
    parser.add_argument("--max-output-error", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--min-agreement", type=float, default=0.9, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", help="write all figures")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(arguments)
    try:
        options = cache_options(a.preset, offset="batch")
        options |= {"raw_first_layers": a.raw_first_layers, "raw_last_layers": a.raw_last_layers}
        model = load_model(a.model, a.device, a.dtype)
        with open(a.text, "rb") as f:
            ids = Text(a.model, model.config.get_text_config(decoder=True).vocab_size).encode(
                f.read(64 * a.prompt_tokens)
            )
        result = validate(model, ids, options, prompt=a.prompt_tokens, new_tokens=a.new_tokens, quiet=a.quiet)
    except (_lib.TqError, OSError) as error:
        print(f"tqkv.validate_model: {error}", file=sys.stderr)
        return 2
    found = failures(result, a.min_cosine, a.max_output_error, a.min_agreement)
    result |= {"preset": a.preset, "failures": found}
    print(f"{'layer':>5s} {'cosine K':>9s} {'cosine V':>9s} {'output error':>13s}")
    for row in result["layers"]:
        print(f"{row['layer']:5d} {row['cosine_k']:9.4f} {row['cosine_v']:9.4f} {row['output_error']:13.4f}")
    first = result["first_difference"]
    print(
        f"{100 * result['agreement']:.1f}% of {result['new_tokens']} tokens agree"
        + ("" if first is None else f"; the first that does not is number {first}")
    )
    print("\n".join(found) if found else "all thresholds hold")
    if a.json:
        with open(a.json, "w") as f:
            json.dump(result, f, indent=1)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
