# SPDX-License-Identifier: Apache-2.0
"""How good a model's text stays on compressed pages, and what it costs.

    python -m tqkv.eval --model DIR --text FILE [--presets k4v4,k3v3/plain] [--json OUT.json] [--plots DIR]

The text is cut into windows of --context tokens. A window's first half goes in as a prompt; its second half is scored
one token a step, each over the compressed history, against the model with an uncompressed cache: KL divergence of the
next token's distribution, changed top choices, bits per byte (perplexity where a token is not a byte). Then needles:
facts hidden at all depths of a context, asked for at its end.

A preset stands for itself with a key offset, the first 4 and the last 128 tokens exact; PRESET/offset for itself with
the key offset, PRESET/plain for itself alone. "kXvY" gives other bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import __version__ as transformers_version

from . import _lib
from ._codec import build_info
from .hf import TqCache, TqLayer

_MOST_HEADS = 1024  # of a codec
_PRESETS = "k4v4,k4v3,k3v3,k4v2,k3v2,k2v2,k4v4/plain,k3v3/plain,k2v2/plain"
_NAMES = ["Ada", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Irene", "Jonas"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Text:
    """Text to tokens and back; without a tokenizer in the folder a token is a byte."""

    def __init__(self, folder: str, vocabulary: int):
        self.tokenizer: Any = None
        if any(os.path.exists(os.path.join(folder, name)) for name in _TOKENIZER_FILES):
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        elif vocabulary < 256:
            raise _lib.InvalidArgument(
                f"{folder} has no tokenizer, and its vocabulary of {vocabulary} tokens is not one of bytes"
            )

    @property
    def is_bytes(self) -> bool:
        return self.tokenizer is None

    def encode(self, text: bytes) -> list[int]:
        if self.tokenizer is None:
            return list(text)
        tokens: list[int] = self.tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"]
        return tokens

    def count_bytes(self, tokens: list[int]) -> int:
        return len(tokens) if self.tokenizer is None else len(self.tokenizer.decode(tokens).encode())


def load_model(folder: str, device: str, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval().to(device)


def cache_options(scheme: str, first: int = 4, recent: int = 128, offset: str = "sequence") -> dict[str, Any]:
    """TqCache options of "preset", "preset/offset" or "preset/plain"."""
    name, _, kind = scheme.partition("/")
    if kind not in ("", "offset", "plain"):
        raise _lib.InvalidArgument(f"{scheme!r}: after the preset comes nothing, /offset or /plain")
    known: set[str] = set()
    while (preset := _lib.functions.preset_name(len(known))) is not None:
        known.add(preset.decode())
    options: dict[str, Any] = {"preset": name}
    if name not in known:
        bits = re.fullmatch(r"k(\d+)v(\d+)", name)
        if bits is None:
            raise _lib.InvalidArgument(
                f"{name!r} is no preset ({', '.join(sorted(known))}), nor kXvY with bits X and Y"
            )
        options = {"k_bits": int(bits[1]), "v_bits": int(bits[2])}
    if name == "raw" or kind == "plain":
        return {**options, "exact_first_tokens": 0, "exact_recent_tokens": 0, "key_offset": None}
    if kind == "offset":
        return {**options, "exact_first_tokens": 0, "exact_recent_tokens": 0, "key_offset": offset}
    return {**options, "exact_first_tokens": first, "exact_recent_tokens": recent, "key_offset": offset}


class _LockstepLayer(TqLayer):
    def attend(self, q: torch.Tensor, settings: Any) -> torch.Tensor:
        rows, heads, tokens, channels = q.shape
        out = super().attend(q.reshape(1, rows * heads, tokens, channels), settings)
        return out.view(tokens, rows, heads, self.head_dim_v).transpose(0, 1)

    def sinks(self, given: torch.Tensor) -> int:
        pointer = super().sinks(given)
        heads = given.numel() * self.cache.copies
        if self._sinks.numel() != heads:
            self._sinks = self._sinks.repeat(self.cache.copies)
            pointer = int(self._sinks.data_ptr())
        return pointer


class LockstepCache(TqCache):
    """For sequences of equal length that nothing moves: they are heads of one sequence, so that a key offset each takes
    no call of its own. The arithmetic is that of a TqCache with key_offset="sequence". Attention masks, reordering,
    repeating and selecting mean nothing here."""

    layer_type = _LockstepLayer
    copies = 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.layers[layer_idx], TqLayer):
            self.copies = key_states.shape[0]
            key_states, value_states = (x.reshape(1, -1, *x.shape[2:]) for x in (key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def bytes_per_token(self) -> int:
        return super().bytes_per_token() // self.copies

    def exact_bytes_per_sequence(self) -> int:
        return super().exact_bytes_per_sequence() // self.copies


class Runner:
    """Runs a prompt and then single tokens, on a cache that is used again; on CUDA the steps are a captured graph."""

    def __init__(self, model: Any, rows: int, tokens: int, options: dict[str, Any]):
        self.model = model
        kind = LockstepCache if options["key_offset"] == "sequence" else TqCache
        self.cache = kind.for_model(model, max_tokens=tokens, **options)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self._graph: Any = None

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def start(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after the last of the prompt's tokens [rows, vocabulary]."""
        self.cache.reset()
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _step(self) -> torch.Tensor:
        position = self.cache.position[None].expand(self.token.shape[0], 1)
        return self.model(self.token, past_key_values=self.cache, position_ids=position).logits[:, -1]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after one more token of each sequence [rows]. Overwritten by the next step on CUDA."""
        self.token[:, 0] = ids
        if self.model.device.type != "cuda" or self.cache._others():
            return self._step()
        if self._graph is None:
            self._graph = self.cache.capture(self._step)
        return self._graph.replay()


def divergence(base: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """KL(base, logits), whether the top choice changed, and -log p of the targets, each [...]. `base`:
    log-probabilities."""
    new = logits.float().log_softmax(-1)
    kl = (base.exp() * (base - new)).sum(-1)
    flips = base.argmax(-1) != new.argmax(-1)
    return kl, flips, F.nll_loss(new.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


@torch.no_grad()  # type: ignore[untyped-decorator]
def base_scores(model: Any, ids: torch.Tensor, half: int) -> torch.Tensor:
    """Log-probabilities of the second half's tokens with nothing compressed [rows, tokens - half, vocabulary]."""
    rows = []
    for row in ids:
        logits = model(row[None], use_cache=False, logits_to_keep=ids.shape[1] - half + 1).logits
        rows.append(logits[0, :-1].float().log_softmax(-1))
    return torch.stack(rows)


def score(
    runner: Runner, ids: torch.Tensor, half: int, base: torch.Tensor, progress: Callable[[int], Any]
) -> tuple[torch.Tensor, ...]:
    """divergence() of a batch of windows, each [rows, tokens - half]."""
    chunk = 64
    parts: list[tuple[torch.Tensor, ...]] = []
    held: torch.Tensor | None = None
    count = ids.shape[1] - half
    done = 0
    for i in range(count):
        logits = runner.start(ids[:, :half]) if i == 0 else runner.step(ids[:, half + i - 1])
        if held is None:
            held = torch.empty(logits.shape[0], chunk, logits.shape[1], dtype=logits.dtype, device=logits.device)
        held[:, i - done] = logits
        if i - done == chunk - 1 or i == count - 1:
            n = i + 1 - done
            parts.append(divergence(base[:, done : done + n], held[:, :n], ids[:, half + done : half + done + n]))
            done += n
            progress(n * ids.shape[0])
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def needles(text: Text, body: list[int], count: int, tokens: int, seed: int = 11) -> Iterator[tuple[list[int], int]]:
    """Contexts of `tokens` tokens that state three numbers among other text and end with a question for one of them and
    its answer; with the number of the answer's tokens. The fact asked for is at depth (i + 1/2) / count of context
    i."""
    r = random.Random(seed)
    for j in range(count):
        who = r.sample(_NAMES, 3)
        numbers = {name: f"{r.randrange(100000):05d}" for name in who}
        question = text.encode(f"\nQuestion: what is the secret number of {who[0]}? Answer:".encode())
        both = text.encode(f"\nQuestion: what is the secret number of {who[0]}? Answer: {numbers[who[0]]}".encode())
        skip = next((i for i, (a, b) in enumerate(zip(question, both, strict=False)) if a != b), len(question))
        answer = both[skip:][1:] if text.is_bytes else both[skip:]  # a byte's answer begins after the space
        facts = [text.encode(f"\nThe secret number of {name} is {numbers[name]}.\n".encode()) for name in who]
        room = tokens - len(both) - sum(map(len, facts))
        if room < 2 or room >= len(body):
            raise _lib.InvalidArgument(
                f"needles in {tokens} tokens need a text of more than {max(room, 2)} tokens; it has {len(body)}"
            )
        start = r.randrange(0, len(body) - room)
        hay = body[start : start + room]
        cuts = [int(room * (j + 0.5) / count)] + [r.randrange(0, room) for _ in who[1:]]
        context: list[int] = []
        last = 0
        for cut, fact in sorted(zip(cuts, facts, strict=True)):
            context += hay[last:cut] + fact
            last = cut
        yield context + hay[last:] + both, len(answer)


@torch.no_grad()  # type: ignore[untyped-decorator]
def recall(
    model: Any,
    contexts: list[tuple[list[int], int]],
    rows: int,
    options: dict[str, Any] | None,
    progress: Callable[[int], Any],
    tail: int = 96,
) -> list[bool]:
    """Whether each answer is what the model would have said. The context but its last `tail` tokens is the prompt; the
    question and the answer follow one token a step. options None: nothing compressed."""
    found: list[bool] = []
    tokens = len(contexts[0][0])
    runner = Runner(model, rows, tokens, options) if options is not None else None
    for first in range(0, len(contexts), rows):
        part = contexts[first : first + rows]
        padded = part + [part[-1]] * (rows - len(part))
        ids = torch.tensor([context for context, _ in padded], device=model.device)
        if runner is None:
            best = torch.cat(
                [model(row[None], use_cache=False, logits_to_keep=tail + 1).logits[:, :-1].argmax(-1) for row in ids]
            )
        else:
            steps = [runner.start(ids[:, :-tail]).argmax(-1)]
            steps += [runner.step(ids[:, i]).argmax(-1) for i in range(tokens - tail, tokens - 1)]
            best = torch.stack(steps, 1)
        right = best == ids[:, -tail:]
        found += [bool(right[i, -length:].all()) for i, (_, length) in enumerate(part)]
        progress(len(part))
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def decode_speed(model: Any, ids: torch.Tensor, cache: Any, steps: int = 32) -> float:
    """Tokens a second of plain decode steps of model(...), as generate() makes them."""
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:]
    for timed in (False, True):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps if timed else 4):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    return float(ids.shape[0] * steps / (time.perf_counter() - start))


def provenance(device: Any) -> dict[str, Any]:
    """What measured, and when. The environment's TQKV_COMMIT says which version."""
    device = torch.device(device)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "library": build_info().version,
        "commit": os.environ.get("TQKV_COMMIT", ""),
        "torch": torch.__version__,
        "transformers": transformers_version,
    }


def _bins(found: list[bool], bins: int = 8) -> list[float]:
    size = max(1, len(found) // bins)
    return [sum(found[i : i + size]) / len(found[i : i + size]) for i in range(0, len(found), size)]


def evaluate(
    model: Any,
    text: Text,
    ids: list[int],
    schemes: list[str],
    *,
    context: int,
    windows: int,
    needle_count: int,
    first: int = 4,
    recent: int = 128,
    offset: str = "sequence",
    memory_bytes: int = 4 << 30,
    quiet: bool = False,
) -> dict[str, Any]:
    """All figures, as --json writes them."""
    device = model.device
    half = context // 2
    count = min(windows, len(ids) // context)
    if count < 1:
        raise _lib.InvalidArgument(f"a window takes {context} tokens; the text has {len(ids)}")
    batch = torch.tensor(ids[: count * context], device=device).view(count, context)
    config = model.config.get_text_config(decoder=True)
    vocabulary = config.vocab_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group = max(1, min(count, memory_bytes // (half * vocabulary * 4), _MOST_HEADS // heads))
    contexts = list(needles(text, ids, needle_count, context - context // 64)) if needle_count else []
    needle_rows = max(1, min(8, len(contexts), 65536 // context))
    scored = count * (context - half)
    scored_bytes = sum(text.count_bytes(row[half:].tolist()) for row in batch)
    speed_ids = batch[:, :half]

    def row(name: str, parts: list[tuple[torch.Tensor, ...]], found: list[bool], **more: Any) -> dict[str, Any]:
        kl, flips, nll = (torch.cat([part[i].flatten() for part in parts]).double() for i in range(3))
        ordered = kl.sort().values
        return {
            "scheme": name,
            "kl_mean": kl.mean().item(),
            "kl_p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))].item(),
            "flips": flips.mean().item(),
            "perplexity": math.exp(nll.mean().item()),
            "bits_per_byte": nll.sum().item() / math.log(2) / scored_bytes,
            "needle_recall": sum(found) / len(found) if found else None,
            "needle_recall_by_depth": _bins(found) if found else None,
            **more,
        }

    rows: list[dict[str, Any]] = []
    total = (len(schemes) + 1) * (scored + len(contexts))
    with tqdm(total=total, unit="tok", disable=quiet, file=sys.stderr, smoothing=0.05) as bar:
        bar.set_description("uncompressed")
        runners: dict[tuple[str, int], Runner] = {}
        results: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in ["", *schemes]}
        seconds = dict.fromkeys(schemes, 0.0)
        for at in range(0, count, group):
            part = batch[at : at + group]
            base = base_scores(model, part, half)
            zero = torch.zeros_like(base[..., 0])
            nll = F.nll_loss(base.flatten(0, 1), part[:, half:].flatten(), reduction="none").view_as(zero)
            results[""].append((zero, zero.bool(), nll))
            bar.update(zero.numel())
            for name in schemes:
                bar.set_description(name)
                start = time.perf_counter()
                key = (name, part.shape[0])
                if key not in runners:
                    runners[key] = Runner(model, part.shape[0], context, cache_options(name, first, recent, offset))
                results[name].append(score(runners[key], part, half, base, bar.update))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name] += time.perf_counter() - start
            del base
        caches = {name: runners[name, batch[:group].shape[0]].cache for name in schemes}
        sizes = {name: (cache.bytes_per_token(), cache.exact_bytes_per_sequence()) for name, cache in caches.items()}
        item = next(model.parameters()).element_size()
        some = caches[schemes[0]]
        copies = some.copies if isinstance(some, LockstepCache) else 1
        dense = sum(layer.kv_heads * (layer.head_dim_k + layer.head_dim_v) * item for layer in some._kv) // copies
        runners.clear()
        caches.clear()
        gc.collect()  # a cache and its layers know each other
        dtype = str(model.dtype).removeprefix("torch.")
        found = recall(model, contexts, needle_rows, None, bar.update) if contexts else []
        speed = decode_speed(model, speed_ids, DynamicCache(config=model.config))
        rows.append(row(f"{dtype} cache", results[""], found, bytes_per_token=dense, decode_tokens_per_s=speed))
        for name in schemes:
            bar.set_description(name)
            options = cache_options(name, first, recent, offset)
            found = recall(model, contexts, needle_rows, options, bar.update) if contexts else []
            if options["key_offset"] is not None:
                options["key_offset"] = "batch"  # one call for all sequences
            speed = decode_speed(model, speed_ids, TqCache.for_model(model, **options))
            gc.collect()
            coded, exact = sizes[name]
            rows.append(
                row(
                    name,
                    results[name],
                    found,
                    bytes_per_token=coded + exact / context,
                    bytes_per_token_coded=coded,
                    exact_bytes_per_sequence=exact,
                    decode_tokens_per_s=speed,
                    seconds=seconds[name],
                )
            )
    return provenance(device) | {
        "context": context,
        "windows": count,
        "scored_tokens": scored,
        "scored_bytes": scored_bytes,
        "needles": len(contexts),
        "exact_first_tokens": first,
        "exact_recent_tokens": recent,
        "key_offset": offset,
        "rows": rows,
    }


def table(result: dict[str, Any], bytes_are_tokens: bool) -> str:
    unit = "bits/byte" if bytes_are_tokens else "perplexity"
    lines = [
        f"{'scheme':14s} {'bytes/token':>11s} {'mean KL':>9s} {'p99 KL':>8s} {'flips':>7s} {unit:>10s}"
        f" {'needles':>8s} {'tokens/s':>9s}"
    ]
    for row in result["rows"]:
        value = row["bits_per_byte"] if bytes_are_tokens else row["perplexity"]
        needle = "-" if row["needle_recall"] is None else f"{row['needle_recall']:.3f}"
        lines.append(
            f"{row['scheme']:14s} {row['bytes_per_token']:11.0f} {row['kl_mean']:9.5f} {row['kl_p99']:8.4f}"
            f" {100 * row['flips']:6.2f}% {value:10.4f} {needle:>8s} {row['decode_tokens_per_s']:9.0f}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], folder: str) -> list[str]:
    try:
        import matplotlib
    except ImportError as error:
        raise _lib.NotSupported("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    os.makedirs(folder, exist_ok=True)
    rows = result["rows"][1:]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for kind, marker in (("", "o"), ("/offset", "s"), ("/plain", "^")):
        chosen = [r for r in rows if r["scheme"].partition("/")[2] == kind.strip("/")]
        if chosen:
            label = {"": "offset and exact ranges", "/offset": "offset", "/plain": "plain"}[kind]
            axes.scatter(
                [r["bytes_per_token"] for r in chosen], [r["kl_mean"] for r in chosen], marker=marker, label=label
            )
            for r in chosen:
                axes.annotate(
                    r["scheme"].partition("/")[0],
                    (r["bytes_per_token"], r["kl_mean"]),
                    xytext=(4, 4),
                    textcoords="offset points",
                )
    axes.set(xlabel="bytes per token", ylabel="mean KL to the uncompressed cache", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    paths = [os.path.join(folder, "kl.svg")]
    figure.tight_layout()
    figure.savefig(paths[0])
    if rows and rows[0]["needle_recall"] is not None:
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for r in result["rows"]:
            bins = r["needle_recall_by_depth"]
            axes.plot([(i + 0.5) / len(bins) for i in range(len(bins))], bins, marker="o", label=r["scheme"])
        axes.set(xlabel="depth of the fact", ylabel="recall", ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        paths.append(os.path.join(folder, "needles.svg"))
        figure.tight_layout()
        figure.savefig(paths[-1])
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tqkv.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--text", required=True, help="text that the model was not trained on")
    parser.add_argument("--presets", default=_PRESETS, help="default: %(default)s")
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of a window; default: what the model takes, at most 8192"
    )
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--needles", type=int, default=64)
    parser.add_argument("--exact-first", type=int, default=4)
    parser.add_argument("--exact-recent", type=int, default=128)
    parser.add_argument(
        "--offset",
        choices=("sequence", "batch"),
        default="sequence",
        help="keys' mean of each window, or of all together",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", help="write all figures")
    parser.add_argument("--plots", help="folder for KL over bytes and recall over depth; needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(arguments)
    schemes = [name for name in a.presets.split(",") if name]
    try:
        if not schemes:
            raise _lib.InvalidArgument("--presets names none")
        for name in schemes:
            cache_options(name)
        model = load_model(a.model, a.device, a.dtype)
        config = model.config.get_text_config(decoder=True)
        text = Text(a.model, config.vocab_size)
        with open(a.text, "rb") as f:
            ids = text.encode(f.read())
        context = a.context or min(8192, getattr(config, "max_position_embeddings", 8192))
        result = evaluate(
            model,
            text,
            ids,
            schemes,
            context=context,
            windows=a.windows,
            needle_count=a.needles,
            first=a.exact_first,
            recent=a.exact_recent,
            offset=a.offset,
            quiet=a.quiet,
        )
    except (_lib.TqError, OSError) as error:
        print(f"tqkv.eval: {error}", file=sys.stderr)
        return 1
    print(table(result, text.is_bytes))
    if a.json:
        with open(a.json, "w") as f:
            json.dump(result, f, indent=1)
    if a.plots:
        print("\n".join(plot(result, a.plots)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
