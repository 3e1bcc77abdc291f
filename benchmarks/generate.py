"""Tokens/s of GPT-2 small (124M, random weights) compared to transformers' `generate` and CTranslate2.

    python benchmarks/generate.py --rounds 5 --json generate.json

Each program has a process of its own, which sleeps while the others run: threads that wait for work keep a core busy,
CTranslate2's for 0.2 s. All have the same weights (exported by glassgpt, converted by CTranslate2's own converter), a
prompt of 16 tokens, greedy choice and the same number of threads; programs that are not installed are skipped with a
note. CTranslate2 runs in each compute type that it has for this CPU. Time to first token is that of a prompt of 512
tokens and one new token. Preparing a model (glassgpt's `prepare_for_inference` and `quantize`, CTranslate2's packing
while loading) is not counted; `glassgpt as-called` is `generate` with the loaded model, which prepares it in each call.
Prints Markdown: medians, fastest and slowest, how many tokens equal transformers', and whether the bars are met. In
int8 tokens differ: logits of random weights are close together. Keep the machine idle meanwhile.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from contender import Contender, serve

from glassgpt import GPT, ModelConfig
from glassgpt.interop.hf_models import export_hf
from tokenizers import Tokenizer, models

Writer = Callable[[int, int, int], list[list[int]]]  # batch, tokens of the prompt, new tokens of each text
PROMPT, LONG_PROMPT = 16, 512
# With the usual initialization, the blocks add so little that the likeliest token is always the previous one.
LIVELIER = 5.0


def prompt_of(length: int) -> list[int]:
    """Tokens from all over the vocabulary, except the one that CTranslate2 takes for the end of a text."""
    return [(7919 * place) % 50257 for place in range(1, length + 1)]


def glassgpt_writer(directory: Path, kind: str) -> Writer:
    from glassgpt import generate, load, quantize
    from glassgpt.generation.inference import prepare_for_inference

    original, _ = load(str(directory / "hf"), device="cpu")
    models: dict[int, GPT] = {}

    def write(batch: int, prompt: int, new: int) -> list[list[int]]:
        if batch not in models:
            models.clear()
            models[batch] = (
                original
                if kind == "as-called"
                else quantize(original)
                if kind == "int8"
                else prepare_for_inference(original, batch, 256)
            )
        tokens = list(generate(models[batch], None, prompt_of(prompt), max_new_tokens=new, temperature=0, n=batch))
        return [[token.token_id for token in tokens if token.sample == sample] for sample in range(batch)]

    return write


def transformers_writer(directory: Path, kind: str) -> Writer:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(directory / "hf")
    model.eval()

    @torch.inference_mode()
    def write(batch: int, prompt: int, new: int) -> list[list[int]]:
        ids = torch.tensor([prompt_of(prompt)] * batch)
        settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, prompt:].tolist()  # type: ignore[no-any-return]

    return write


def ctranslate2_writer(directory: Path, kind: str) -> Writer:
    import ctranslate2  # type: ignore[import-not-found, unused-ignore]

    model = ctranslate2.Generator(
        str(directory / "ct2"), compute_type=kind, intra_threads=torch.get_num_threads(), inter_threads=1
    )
    settings = {"sampling_topk": 1, "include_prompt_in_result": False}

    def write(batch: int, prompt: int, new: int) -> list[list[int]]:
        tokens = [f"t{i}" for i in prompt_of(prompt)]
        results = model.generate_batch([tokens] * batch, min_length=new, max_length=new, **settings)
        return [result.sequences_ids[0] for result in results]

    return write


WRITERS = {"glassgpt": glassgpt_writer, "transformers": transformers_writer, "CTranslate2": ctranslate2_writer}


def convert(directory: Path) -> list[str]:
    """Convert the export to CTranslate2's files; returns its compute types on this CPU."""
    import ctranslate2  # type: ignore[import-not-found, unused-ignore]
    from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found, unused-ignore]

    # CTranslate2 speaks in tokens, so the ids need names.
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t0", "eos_token": "t0"}
    copy = directory / "named"
    shutil.copytree(directory / "hf", copy)
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(50257)}, unk_token="t0")).save(str(copy / "tokenizer.json"))
    (copy / "tokenizer_config.json").write_text(json.dumps(names))
    TransformersConverter(str(copy)).convert(str(directory / "ct2"))
    return sorted(ctranslate2.get_supported_compute_types("cpu"))


def contenders(directory: Path) -> list[str]:
    """Every installed program, by name and kind."""
    model = GPT.create(ModelConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768), seed=0)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.ndim == 2:
                parameter.mul_(LIVELIER)
    export_hf(model, None, directory / "hf")
    found = ["glassgpt float32", "glassgpt as-called", "glassgpt int8"]
    if importlib.util.find_spec("transformers"):
        found.append("transformers float32")
    if importlib.util.find_spec("ctranslate2"):
        found += [f"CTranslate2 {kind}" for kind in convert(directory)]
    for name in ("transformers", "ctranslate2"):
        if not importlib.util.find_spec(name):
            print(f"without {name}, which is not installed")
    return found


def measure(found: dict[str, Contender], batch: int, prompt: int, new: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, alternately; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(1 + rounds):
        for name, contender in found.items():
            seconds[name].append(contender.seconds(batch, prompt, new))
    return {name: times[1:] for name, times in seconds.items()}


def alike(found: dict[str, Contender], name: str) -> str:
    """How many of the tokens generated last equal transformers'."""
    reference = found.get("transformers float32")
    if reference is None:
        return "-"
    pairs = [
        pair
        for ours, theirs in zip(found[name].result, reference.result, strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    return f"{sum(one == other for one, other in pairs)} of {len(pairs)}"


def bars(batch: int, pace: dict[str, float]) -> list[tuple[str, float, float]]:
    """What is claimed, the measured ratio, and the bar."""
    best = max((pace[name] for name in pace if name.startswith("CTranslate2")), default=None)
    found = []
    if "CTranslate2 float32" in pace:
        found.append(("float32 / CTranslate2 float32", pace["glassgpt float32"] / pace["CTranslate2 float32"], 1.0))
    if "transformers float32" in pace:
        found.append(("float32 / transformers", pace["glassgpt float32"] / pace["transformers float32"], 2.0))
        found.append(("as called / transformers", pace["glassgpt as-called"] / pace["transformers float32"], 2.0))
    if best is not None:
        found.append(("int8 / CTranslate2's best", pace["glassgpt int8"] / best, 2.0 if batch == 1 else 1.0))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        name, kind = options.serve[0].split()
        serve(WRITERS[name](Path(options.serve[1]), kind))
        return 0
    packages = [d for d in ("torch", "transformers", "ctranslate2") if list(importlib.metadata.distributions(name=d))]
    versions = {name: importlib.metadata.version(name) for name in packages}
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        found = {}
        for who in contenders(Path(scratch)):
            command = [__file__, "--serve", who, scratch, "--threads", str(options.threads)]
            found[who] = running.enter_context(Contender(command))
        print(f"{options.threads} threads, {options.rounds} rounds, {versions}\n")
        print("| batch | prompt | new | who | s, median (fastest – slowest) | tokens/s | tokens as transformers' |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        cells = [(batch, PROMPT, new) for batch in options.batches for new in options.tokens] + [(1, LONG_PROMPT, 1)]
        claims = []
        for batch, prompt, new in cells:
            seconds = measure(found, batch, prompt, new, options.rounds)
            pace = {name: batch * new / statistics.median(times) for name, times in seconds.items()}
            for name, times in seconds.items():
                spread = f"{statistics.median(times):.3f} ({min(times):.3f} – {max(times):.3f})"
                print(
                    f"| {batch} | {prompt} | {new} | {name} | {spread} | {pace[name]:.1f} | {alike(found, name)} |",
                    flush=True,
                )
            rows.append({"batch": batch, "prompt": prompt, "new": new, "seconds": seconds, "tokens_per_second": pace})
            claims += [(batch, new, *bar) for bar in bars(batch, pace)] if new > 1 else []
    print("\n| batch | new | ratio of tokens/s | measured | bar | met |\n| --- | --- | --- | --- | --- | --- |")
    for batch, new, claim, ratio, bar in claims:
        missed += ratio < bar
        print(f"| {batch} | {new} | {claim} | {ratio:.2f} | {bar:.1f} | {'yes' if ratio >= bar else 'no'} |")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"versions": versions, "threads": options.threads, "rows": rows}, indent=1) + "\n"
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
