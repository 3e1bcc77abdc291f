"""Generate text: a cached forward pass per token, and streaming that shows whole characters only.

Shapes: `n` samples in one batch, `T` time, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glassgpt.config.schema import SamplingConfig
from glassgpt.generation.inference import InferencePrecision, evaluation_mode, prepare_for_inference
from glassgpt.generation.sampling import draw, sampling_distribution
from glassgpt.model.gpt import GPT
from glassgpt.model.kv_cache import KVCache
from glassgpt.tokenizers.base import StreamDecoder, Tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.rng import generator_for


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A generated token. `str(token)` is its text, so `print(token, end="")` streams."""

    text: str
    """The text that it adds; "" while a character is incomplete or a stop string may have begun."""
    token_id: int
    sample: int
    """Number of the sample that it belongs to, from 0."""
    probability: float | None = None
    """The model's probability of it, before temperature and other settings; None unless asked for."""

    def __str__(self) -> str:
        return self.text


def generate(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int] | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[str] = (),
    n: int = 1,
    seed: int = 1337,
    use_cache: bool = True,
    precision: InferencePrecision = "auto",
    probabilities: bool = False,
) -> Iterator[GeneratedToken]:
    """Continue a prompt, and yield each token as soon as it is drawn: `print(token, end="")`. Samples take turns.

    prompt: text or token ids; None starts a new document (`default_prompt`). A sample ends after `max_new_tokens`,
    before a `stop` string, or at the tokenizer's end of text. A full context drops its older half and reads the rest
    again (`window_start`), unless the model has no limit (`ModelConfig.has_unlimited_context`). precision: see
    `prepare_for_inference`. probabilities: also compute each token's probability. Global random state is not used.
    Raises `UserError` for an empty prompt and for invalid settings, before the first token.
    """
    settings = SamplingConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}")
    # Published models often have padded vocabularies (Qwen's by 200 ids and more): ids without text are never drawn.
    vocab_size = model.vocab_size if tokenizer is None else min(model.vocab_size, tokenizer.vocab_size)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)  # otherwise each character of a string would stop
    if "" in stop:
        raise UserError("a stop string is empty; it would stop before the first token")
    if stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this model has none; remove stop")
    ids = prompt_ids(model, tokenizer, prompt).expand(n, -1)
    generator = generator_for(seed, "generate")

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:  # the distribution would put all on one token, and cost a twentieth of a step
            return logits.argmax(dim=-1)
        return draw(sampling_distribution(logits, settings), generator)

    def stream() -> Iterator[GeneratedToken]:
        with evaluation_mode(model):
            ready = prepare_for_inference(model, n, max_new_tokens, precision)
            context = _Context(ready, ids, ids.shape[1] + max_new_tokens, vocab_size, use_cache)
            texts = [_TextStream(tokenizer, stop, ids[0].tolist()) for _ in range(n)]
            yield from _tokens(context, texts, choose, max_new_tokens, probabilities)

    return stream()


def _tokens(
    context: "_Context",
    texts: list["_TextStream"],
    choose: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    probabilities: bool,
) -> Iterator[GeneratedToken]:
    """Draw a token for every sample, yield those of the samples that have not ended, and repeat."""
    for index in range(max_new_tokens):
        logits = context.next_logits()
        drawn = choose(logits).to(logits.device)
        chances = logits.float().softmax(dim=-1).gather(-1, drawn[:, None])[:, 0].tolist() if probabilities else None
        for sample, (token_id, text) in enumerate(zip(drawn.tolist(), texts, strict=True)):
            if not text.ended:
                shown = text.add(token_id, last=index == max_new_tokens - 1)
                yield GeneratedToken(shown, token_id, sample, None if chances is None else chances[sample])
        if all(text.ended for text in texts):
            return
        context.append(drawn)


def window_start(length: int, context_length: int) -> int:
    """The first of `length` tokens that the model still reads: a full context drops its older half.

    It depends on the length alone, so that cached and uncached generation read the same tokens.
    """
    half = max(1, context_length // 2)
    return max(0, -(-(length - context_length) // half)) * half


@dataclass
class _Context:
    """The tokens so far, ids (n, T), and the next token's logits, with a cache or computed from the whole text."""

    model: GPT
    ids: Tensor
    max_length: int
    vocab_size: int
    """V, the number of the model's ids that may be drawn."""
    use_cache: bool
    cache: KVCache | None = None
    start: int = 0

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Logits (n, V) of the token after the last one."""
        config = self.model.config
        limit = self.max_length if config.has_unlimited_context else config.context_length
        start = window_start(self.ids.shape[1], limit)
        if self.use_cache and (self.cache is None or start != self.start):
            self.cache = self.model.new_cache(self.ids.shape[0], min(self.max_length, limit))
        self.start = start
        unread = self.ids[:, start + (self.cache.length if self.cache is not None else 0) :]
        return self.model.logits(self.model.hidden(unread, self.cache)[:, -1])[:, : self.vocab_size]

    def append(self, token_ids: Tensor) -> None:
        """Add one token (n,) to each sample."""
        self.ids = torch.cat([self.ids, token_ids[:, None]], dim=1)


class _TextStream:
    """One sample's text as it grows: whole characters only, and no part of a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], prompt: Sequence[int]) -> None:
        self.decoder = None if tokenizer is None else StreamDecoder(tokenizer, after=_text_before(tokenizer, prompt))
        self.end_of_text = None if tokenizer is None else tokenizer.end_of_text
        self.stop = stop
        self.pending = ""
        self.ended = False

    def add(self, token_id: int, last: bool) -> str:
        """Add a token, and return the text that can be shown now. Text that may begin a stop string stays pending."""
        self.ended = last or token_id == self.end_of_text
        if self.decoder is None:
            return ""
        self.pending += self.decoder.feed(token_id) if token_id != self.end_of_text else ""
        self.pending += self.decoder.finish() if self.ended else ""
        stops = [at for at in (self.pending.find(text) for text in self.stop) if at >= 0]
        if stops:
            self.ended = True
            return self.pending[: min(stops)]
        held = 0 if self.ended else max((_overlap(self.pending, text) for text in self.stop), default=0)
        shown = self.pending[: len(self.pending) - held]
        self.pending = self.pending[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _text_before(tokenizer: Tokenizer, prompt: Sequence[int]) -> int | None:
    """The id before the generated text, or None if the prompt has only tokens that start a document."""
    starts = {*tokenizer.prompt_prefix, tokenizer.end_of_text}
    return prompt[-1] if any(i not in starts for i in prompt) else None


def default_prompt(tokenizer: Tokenizer) -> list[int]:
    """Ids that start a new document: the tokenizer's prefix, or its end of text, or a line break, or the first id."""
    if tokenizer.prompt_prefix:
        return list(tokenizer.prompt_prefix)
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        ids: list[int] = tokenizer.encode("\n").tolist()
    except UserError:
        ids = []
    return ids or [0]


def prompt_ids(model: GPT, tokenizer: Tokenizer | None, prompt: str | Sequence[int] | None) -> Tensor:
    """A prompt as ids (1, T) on the model's device: a text's after `prompt_prefix`, or `default_prompt` for None.

    Raises `UserError` for an empty prompt, text without a tokenizer, and ids outside the vocabulary.
    """
    if tokenizer is None and (prompt is None or isinstance(prompt, str)):
        raise UserError("this model has no tokenizer; pass the prompt as token ids")
    if tokenizer is not None and prompt is None:
        prompt = default_prompt(tokenizer)
    if tokenizer is not None and isinstance(prompt, str):
        encoded = tokenizer.encode(prompt).tolist()
        prompt = [*tokenizer.prompt_prefix, *encoded] if encoded else []
    ids = torch.as_tensor(prompt, dtype=torch.int64).flatten()
    if ids.numel() == 0:
        raise UserError("the prompt is empty; the model needs at least one token to continue")
    if int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size:
        raise UserError(f"the prompt has token ids outside 0..{model.vocab_size - 1}, the model's vocabulary")
    return ids[None].to(model.embedding.weight.device)
