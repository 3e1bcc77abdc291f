"""Writing: sampling as pure functions, a cached forward pass, and `generate`, which yields text as it comes.

Shapes: `n` samples side by side, `T` time, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from glassgpt.generation.inference import prepare_for_inference
from glassgpt.model.attention import KVCache
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import StreamDecoder, Tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.rng import generator_for


class Piece(str):
    """The text that one token added, "" while a character is incomplete, with the token's id, its sample's number and its probability.

    That is what the model gave it, before temperature and whatever else the draw was made with.
    """

    token: int
    sample: int
    probability: float

    def __new__(cls, text: str, token: int, sample: int, probability: float) -> "Piece":
        piece = super().__new__(cls, text)
        piece.token = token
        piece.sample = sample
        piece.probability = probability
        return piece


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (n, V) with all but the k likeliest tokens at -inf (Fan et al., 2018)."""
    threshold = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (n, V) with only the fewest likeliest tokens whose probabilities reach p (Holtzman et al., 2020)."""
    if p >= 1:
        return logits  # a float32 sum reaches 1 before the last tokens, and would drop them
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    # A token stays if those before it have not reached p yet, so the likeliest always stays.
    dropped = (probabilities.cumsum(dim=-1) - probabilities) >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits (n, V) with only tokens at least p times as likely as the likeliest (Nguyen et al., 2024)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def sampling_distribution(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The distribution (n, V) that a token is drawn from: temperature first, then top-k, top-p and min-p in this order.

    Temperature 0 puts all probability on the likeliest token.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # The largest becomes 0 first, so that a tiny temperature leads to -inf and not to inf - inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return logits.softmax(dim=-1)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token (n,) from each distribution (n, V): the first at which the running sum passes a random share of the whole.

    One random number a row, where `torch.multinomial` takes V of them: 8 rows of GPT-2's vocabulary cost a tenth of a step there.
    On the CPU, where the generator is: the same seed then gives the same draws on every device. Raises `UserError` for nan.
    """
    sums = probabilities.cpu().cumsum(dim=-1, dtype=torch.float64)
    if not sums[:, -1].isfinite().all():
        raise UserError(
            "the model's probabilities are not finite: its weights have diverged; take an earlier checkpoint"
        )
    # Strictly below 1 after rounding too, so that no token without probability comes behind the last one with any.
    share = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * (1 - 2**-50)
    return torch.searchsorted(sums, share * sums[:, -1:], right=True).squeeze(1)


def probability_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """What logits (n, V) give the tokens (n,) that were drawn: (n, 1)."""
    return logits.float().softmax(dim=-1).gather(-1, tokens[:, None])


def window_start(length: int, context_length: int) -> int:
    """First position that is still seen when `length` tokens are there: 0 until the context is full, then the older half goes.

    It depends on the length alone, so that cached and uncached generation see the same tokens.
    """
    half = max(1, context_length // 2)
    return max(0, -(-(length - context_length) // half)) * half


class _Writer:
    """The tokens so far, (n, T), and the logits of the next one, with a cache or recomputed.

    `vocab_size` is V here: how many of the model's ids may be drawn.
    """

    def __init__(self, model: GPT, ids: Tensor, max_length: int, use_cache: bool, vocab_size: int) -> None:
        self.model = model
        self.ids = ids
        self.context_length = max_length if model.config.has_unlimited_context else model.config.context_length
        self.capacity = min(max_length, self.context_length)
        self.use_cache = use_cache
        self.vocab_size = vocab_size
        self.cache: KVCache | None = None
        self.start = 0

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Logits (n, V) of the token behind the last one."""
        length = self.ids.shape[1]
        start = window_start(length, self.context_length)
        if self.use_cache and (self.cache is None or start != self.start):
            self.cache = self.model.new_cache(self.ids.shape[0], self.capacity)
        self.start = start
        fresh = self.ids[:, start + (self.cache.length if self.cache is not None else 0) :]
        return self.model.logits(self.model.hidden(fresh, self.cache)[:, -1])[:, : self.vocab_size]

    def append(self, tokens: Tensor) -> None:
        """Add one token (n,) to each sample."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)


class _Text:
    """One sample's text on its way out: whole characters only, and nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self.decoder = (
            StreamDecoder(tokenizer, after=_text_before(tokenizer, prompt)) if tokenizer is not None else None
        )
        self.end_of_text = tokenizer.end_of_text if tokenizer is not None else None
        self.stop = stop
        self.held = ""
        self.done = False

    def feed(self, token: int, last: bool) -> str:
        """The text that may be shown now; what could be the start of a stop string is held back."""
        self.done = last or token == self.end_of_text
        if self.decoder is None:
            return ""
        self.held += self.decoder.feed(token) if token != self.end_of_text else ""
        self.held += self.decoder.finish() if self.done else ""
        found = [at for at in (self.held.find(text) for text in self.stop) if at >= 0]
        if found:
            self.done = True
            return self.held[: min(found)]
        keep = 0 if self.done else max((_overlap(self.held, text) for text in self.stop), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _text_before(tokenizer: Tokenizer, prompt: Sequence[int]) -> int | None:
    """The id that the writing goes on from, None where a prompt has only what a text begins behind."""
    begins = {*tokenizer.prompt_prefix, tokenizer.end_of_text}
    return prompt[-1] if any(i not in begins for i in prompt) else None


def default_prompt(tokenizer: Tokenizer) -> list[int]:
    """Where a text begins: what the model expects before one, else the end of the text before it, else a line break, else (in a
    text without any) the first id."""
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
    """A prompt as ids (1, T) on the model's device: text behind the tokenizer's `prompt_prefix`, `default_prompt` for None.

    Raises `UserError` for an empty prompt, a text without a tokenizer, or an id outside the vocabulary.
    """
    if tokenizer is None and (prompt is None or isinstance(prompt, str)):
        raise UserError("this model has no tokenizer: give the prompt as token ids")
    if tokenizer is not None and prompt is None:
        prompt = default_prompt(tokenizer)
    if tokenizer is not None and isinstance(prompt, str):
        encoded = tokenizer.encode(prompt).tolist()
        prompt = [*tokenizer.prompt_prefix, *encoded] if encoded else []
    ids = torch.as_tensor(prompt, dtype=torch.int64).flatten()
    if ids.numel() == 0:
        raise UserError("the prompt is empty: the model needs at least one token to go on from; give some text")
    if int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size:
        raise UserError(f"the prompt has token ids outside 0..{model.vocab_size - 1}, the model's vocabulary")
    return ids[None].to(model.embedding.weight.device)


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
) -> Iterator[Piece]:
    """Continue a prompt. Yields a `Piece` a token as it is drawn, for `n` samples in turn: `print(piece, end="")`.

    prompt: text, or token ids; None begins as a document does (`default_prompt`). A sample ends at `max_new_tokens`, at a
    `stop` string (which is not shown) or at the tokenizer's end of text. Draws come from an own generator, so nothing else
    is moved by them. Once the context is full the older half is dropped and the rest read again (`window_start`), unless the
    model has no limit (`ModelConfig.has_unlimited_context`). Raises
    `UserError` for an empty prompt and for impossible settings, at once and not at the first token.
    """
    if max_new_tokens < 1 or n < 1:
        raise UserError(f"max_new_tokens and n must be at least 1, got {max_new_tokens} and {n}")
    if not temperature >= 0:  # this way round for nan
        raise UserError(f"temperature must be at least 0, got {temperature}")
    # Makers pad their models' vocabularies (Qwen's by 200 ids and more): what has no text is never drawn.
    vocab_size = model.vocab_size if tokenizer is None else min(model.vocab_size, tokenizer.vocab_size)
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise UserError(f"top_k must be from 1 to the vocabulary's {vocab_size}, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise UserError(f"{name} must be above 0 and at most 1, got {value}")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)  # a plain string would else stop at each of its characters
    if "" in stop:
        raise UserError("a stop string is empty: it would stop before the first token")
    if stop and tokenizer is None:
        raise UserError(
            "this model has no tokenizer, so it writes no text that a stop string could be found in; leave stop out"
        )
    ids = prompt_ids(model, tokenizer, prompt).expand(n, -1)
    writer = _Writer(model, ids, ids.shape[1] + max_new_tokens, use_cache, vocab_size)
    texts = [_Text(tokenizer, stop, ids[0].tolist()) for _ in range(n)]
    generator = generator_for(seed, "generate")

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:  # the distribution would be all on one, and cost a twentieth of a step
            return logits.argmax(dim=-1)
        return draw(
            sampling_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), generator
        )

    return _stream(writer, texts, choose, max_new_tokens)


def _stream(
    writer: _Writer, texts: list[_Text], choose: Callable[[Tensor], Tensor], max_new_tokens: int
) -> Iterator[Piece]:
    model = writer.model
    was_training = model.training
    model.eval()
    try:
        if writer.use_cache:
            writer.model = prepare_for_inference(model, len(texts), max_new_tokens)
        for index in range(max_new_tokens):
            logits = writer.next_logits()
            tokens = choose(logits)
            probabilities = probability_of(tokens.to(logits.device), logits).tolist()
            for sample, (token, text, (probability,)) in enumerate(
                zip(tokens.tolist(), texts, probabilities, strict=True)
            ):
                if not text.done:
                    yield Piece(text.feed(token, last=index == max_new_tokens - 1), token, sample, probability)
            if all(text.done for text in texts):
                return
            writer.append(tokens.to(writer.ids.device))
    finally:
        model.train(was_training)
