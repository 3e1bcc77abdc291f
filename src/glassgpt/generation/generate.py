"""Generate text: a cached forward pass per token, sampling, and streaming that shows whole characters only.

Shapes: `n` samples in one batch, `T` time, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassgpt.config.schema import SamplingConfig
from glassgpt.generation.inference import InferencePrecision, evaluation_mode, forward_bytes, prepare_for_inference
from glassgpt.model.finite import require_finite
from glassgpt.model.gpt import GPT
from glassgpt.model.kv_cache import KVCache
from glassgpt.tokenizers.base import StreamDecoder, Tokenizer
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.device import require_memory
from glassgpt.utils.errors import UserError
from glassgpt.utils.rng import generator_for

Prompt = str | Sequence[int] | Tensor | np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A generated token. `str(token)` is its text, so `print(token, end="")` streams."""

    text: str  # that it adds; "" while a character is incomplete or a stop string may have begun
    token_id: int
    sample: int  # number of the sample that it belongs to, from 0
    probability: float | None = None  # the model's, before temperature and other settings; None unless asked for

    def __str__(self) -> str:
        return self.text


@check_arguments
def generate(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompt: Prompt | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: str | Sequence[str] = (),
    n: int = 1,
    seed: int = 1337,
    use_cache: bool = True,
    precision: InferencePrecision = "auto",
    probabilities: bool = False,
) -> Iterator[GeneratedToken]:
    """Continue a prompt, and yield each token as soon as it is drawn: `print(token, end="")`. Samples take turns.

    prompt: text or token ids; None starts a new document (`default_prompt`). A sample ends after `max_new_tokens`,
    before a `stop` string, or at one of the model's `end_ids`, by default the tokenizer's end of text. A full context
    drops its older half and reads the rest again (`window_start`), unless the model `has_unlimited_context`. precision:
    see `prepare_for_inference`. probabilities: also compute each token's. Global random state is not used. Raises
    `UserError` for an empty prompt, invalid settings and samples that cannot fit into free memory, before the first
    token, and for logits that are not finite.
    """
    settings = SamplingConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    # Published models often have padded vocabularies (Qwen's by 200 ids and more): ids without text are never drawn.
    vocab_size = model.vocab_size if tokenizer is None else min(model.vocab_size, tokenizer.vocab_size)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)  # otherwise each character of a string would stop
    if not all(isinstance(text, str) and text for text in stop):
        raise UserError("stop strings must be texts of at least one character")
    if stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this model has none; remove stop")
    batch = prompt_ids(model, tokenizer, prompt).expand(n, -1)
    _require_memory(model, batch, settings, precision, use_cache)
    texts = [_TextStream(tokenizer, stop, model.end_ids, batch[0].tolist()) for _ in range(n)]
    generator = generator_for(seed, "generate")

    def tokens() -> Iterator[GeneratedToken]:  # nested, so that `generate` checks its arguments when it is called
        ids = batch
        with evaluation_mode(model):
            next_logits = _NextLogits(model, batch, max_new_tokens, precision, use_cache)
            for index in range(max_new_tokens):
                logits = next_logits(ids)[:, :vocab_size]
                drawn = _draw_next(model, logits, settings, generator)
                chances: list[float | None] = [None] * n
                if probabilities:
                    chances = logits.float().softmax(dim=-1).gather(-1, drawn[:, None])[:, 0].tolist()
                for sample, (token_id, chance, text) in enumerate(zip(drawn.tolist(), chances, texts, strict=True)):
                    if not text.ended:
                        shown = text.add(token_id, last=index == max_new_tokens - 1)
                        yield GeneratedToken(shown, token_id, sample, chance)
                if all(text.ended for text in texts):
                    return
                ids = torch.cat([ids, drawn[:, None]], dim=1)

    return tokens()


class _NextLogits:
    """Computes the logits that follow all ids so far. A cache keeps what was computed of the earlier ones."""

    def __init__(
        self, model: GPT, prompt: Tensor, max_new_tokens: int, precision: InferencePrecision, use_cache: bool
    ) -> None:
        self.model, self.use_cache = prepare_for_inference(model, len(prompt), max_new_tokens, precision), use_cache
        max_length = prompt.shape[1] + max_new_tokens
        self.limit = max_length if model.config.has_unlimited_context else model.config.context_length
        self.capacity = min(max_length, self.limit)
        self.cache: KVCache | None = None
        self.cache_start = 0  # the first token that the cache holds

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids (n, T) -> logits (n, V)."""
        start = window_start(ids.shape[1], self.limit)
        if self.use_cache and (self.cache is None or start != self.cache_start):
            self.cache, self.cache_start = self.model.new_cache(len(ids), self.capacity), start
        unread = ids[:, start + (0 if self.cache is None else self.cache.length) :]
        return self.model.logits(self.model.hidden(unread, self.cache)[:, -1])


def _require_memory(
    model: GPT, prompt: Tensor, settings: SamplingConfig, precision: InferencePrecision, use_cache: bool
) -> None:
    """Raise `UserError` if what each sample certainly needs is more than what is free: see `require_memory`."""
    device, (n, T) = prompt.device, prompt.shape
    is_bfloat16 = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    numbers = torch.empty(0, dtype=torch.bfloat16 if is_bfloat16 else model.embedding.weight.dtype, device="meta")
    capacity = T + settings.max_new_tokens
    if not model.config.has_unlimited_context:
        capacity = min(capacity, model.config.context_length)
    cached = KVCache(model.config, 1, capacity, numbers).nbytes if use_cache else 0
    read = forward_bytes(model, min(T, capacity) if use_cache else capacity, numbers.element_size())
    # The logits; and unless the largest is taken, their distribution in float32 and its sums in float64.
    drawing = model.vocab_size * (numbers.element_size() + (0 if settings.temperature == 0 else 12))
    each = cached + max(read, drawing) + 8 * T
    what = f"generating {n:,} sample{'s' * (n > 1)} in one batch"
    require_memory(device, what, n, each, "n", "use fewer new tokens, or a shorter prompt")


def _draw_next(model: GPT, logits: Tensor, settings: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Draw one token (n,) from each row of the model's logits (n, V). Raises `UserError` if they are not finite."""
    require_finite(logits, model)
    if settings.temperature == 0:  # the distribution would put all on one token: a twentieth of a step
        return logits.argmax(dim=-1)
    return draw(sampling_distribution(logits, settings), generator).to(logits.device)


def window_start(length: int, context_length: int) -> int:
    """The first of `length` tokens that the model still reads: a full context drops its older half, cached or not."""
    half = max(1, context_length // 2)
    return max(0, -(-(length - context_length) // half)) * half


def sampling_distribution(logits: Tensor, settings: SamplingConfig) -> Tensor:
    """The distribution (n, V) that tokens are drawn from: apply temperature, top-k, top-p and min-p in this order."""
    logits = logits.float()
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # The largest logit becomes 0 first, so that a tiny temperature gives -inf and not inf - inf.
    tiny = torch.finfo(torch.float32).tiny  # what is smaller would be compared and divided by as 0
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(settings.temperature, tiny)
    if settings.top_k is not None:  # Fan et al., 2018; logits equal to the k-th largest are kept
        threshold = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    # Holtzman et al., 2020. Not for 1: a float32 sum reaches it before the last tokens and would drop them.
    if settings.top_p is not None and settings.top_p < 1:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token stays if those before it sum to less than p, so the most likely token always stays.
        dropped = (probabilities.cumsum(dim=-1) - probabilities) >= max(settings.top_p, tiny)
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    if settings.min_p is not None:  # Nguyen et al., 2024; relative to the most likely token
        probabilities = logits.softmax(dim=-1)
        too_small = probabilities < settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(too_small, -torch.inf)
    return logits.softmax(dim=-1)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token (n,) from each distribution (n, V), by inversion: one random number per row.

    `torch.multinomial` draws V numbers per row, which takes a tenth of a step for 8 rows of GPT-2's vocabulary. The
    CPU's `generator` gives the same numbers for every device. Raises `UserError` if a probability is not finite.
    """
    if probabilities.device.type == "mps":
        probabilities = probabilities.cpu()  # MPS has no float64
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    if not sums[:, -1].isfinite().all():
        raise UserError("the model's probabilities are not finite: its weights diverged; use an earlier checkpoint")
    # Below 1 after rounding too: otherwise a last token without probability could be drawn.
    share = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * (1 - 2**-50)
    return torch.searchsorted(sums, share.to(sums.device) * sums[:, -1:], right=True).squeeze(1)


class _TextStream:
    """One sample's text as it grows: whole characters only, and no part of a stop string."""

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str], ends: Sequence[int] | None, prompt: Sequence[int]
    ) -> None:
        self.decoder: StreamDecoder | None = None
        self.ends: Sequence[int | None] = ends or ()
        if tokenizer is not None:
            self.ends = (tokenizer.end_of_text,) if ends is None else ends
            # A prompt of tokens that start a document has no text that the new text continues.
            continues = any(i not in (*tokenizer.prompt_prefix, tokenizer.end_of_text, *self.ends) for i in prompt)
            self.decoder = StreamDecoder(tokenizer, after=prompt[-1] if continues else None)
        self.stop, self.pending, self.ended = stop, "", False

    def add(self, token_id: int, last: bool) -> str:
        """Add a token, and return the text that can be shown now. Text that may begin a stop string stays pending."""
        is_end = token_id in self.ends
        self.ended = last or is_end
        if self.decoder is None:
            return ""
        self.pending += self.decoder.feed(token_id) if not is_end else ""
        self.pending += self.decoder.finish() if self.ended else ""
        stops = [at for at in (self.pending.find(text) for text in self.stop) if at >= 0]
        if stops:
            self.ended = True
            return self.pending[: min(stops)]
        held = ""  # the longest end that a stop string begins with
        if not self.ended:
            ends = (self.pending[at:] for at in range(len(self.pending)))
            held = next((end for end in ends if any(text.startswith(end) for text in self.stop)), "")
        shown, self.pending = self.pending.removesuffix(held), held
        return shown


def default_prompt(tokenizer: Tokenizer) -> list[int]:
    """Ids that start a new document: the tokenizer's prefix, or its end of text, or a line break, or the first id."""
    if tokenizer.prompt_prefix:
        return list(tokenizer.prompt_prefix)
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    with suppress(UserError):
        return tokenizer.encode("\n").tolist() or [0]
    return [0]


def prompt_ids(model: GPT, tokenizer: Tokenizer | None, prompt: Prompt | None) -> Tensor:
    """A prompt as ids (1, T) on the model's device: a text's after `prompt_prefix`, or `default_prompt` for None.

    Raises `UserError` for an empty prompt, text without a tokenizer, and ids outside the vocabulary.
    """
    if tokenizer is None:
        if prompt is None or isinstance(prompt, str):
            raise UserError("this model has no tokenizer; put its tokenizer.json there (in Python: or pass token ids)")
    elif prompt is None:
        prompt = default_prompt(tokenizer)
    elif isinstance(prompt, str):
        encoded = tokenizer.encode(prompt).tolist()
        prompt = [*tokenizer.prompt_prefix, *encoded] if encoded else []
    wrong = UserError("the prompt must be a text or one list of token ids, which are whole numbers of up to 64 bits")
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise wrong from None
    if ids.numel() == 0:
        raise UserError("the prompt is empty; leave it (--prompt) out to begin a new document")
    if ids.is_floating_point() or ids.numel() != max(ids.shape, default=1):
        raise wrong
    ids = ids.to(torch.int64).flatten()
    if int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size:
        raise UserError(f"the prompt has token ids outside 0..{model.vocab_size - 1}, the model's vocabulary")
    return ids[None].to(model.embedding.weight.device)
