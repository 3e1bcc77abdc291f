"""Generation: KV cache, sampling, streaming, stop strings, invalid arguments and the state of the model.

`reciter` is a GPT whose weights are set by hand so that it generates a given text. `random_model` has large random
float64 weights. Its cached and uncached logits agree to 1e-12, too closely for any draw to differ.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import SamplingConfig
from glassgpt.generation import generate as module
from glassgpt.generation.generate import GeneratedToken, generate, prompt_ids, sampling_distribution, window_start
from glassgpt.model.gpt import GPT
from glassgpt.model.kv_cache import KVCache
from glassgpt.tokenizers.builtin import BPETokenizer, BytesTokenizer, CharacterTokenizer, Tokenizer
from glassgpt.tokenizers.huggingface import HFTokenizer
from glassgpt.utils import device as device_module
from glassgpt.utils.errors import UserError

TINY: dict[str, Any] = {"vocab_size": 11, "context_length": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
BYTES = BytesTokenizer()
POSITION = pytest.mark.parametrize("position", ["learned", "rope"])


def random_model(**changes: Any) -> GPT:
    """Return a tiny model with large random float64 weights."""
    model = GPT.create(ModelConfig(**(TINY | changes)), seed=0).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter.add_(0.5 * noise)
    return model.eval()


def reciter(script: Sequence[int], vocab_size: int = 256) -> GPT:
    """Return a model that generates the ids of `script` after a prompt of one token.

    Position p is a one-hot vector, which the head maps to script[p].
    """
    width = len(script) + 1
    shape = ModelConfig(
        vocab_size=vocab_size,
        context_length=width,
        n_layer=1,
        n_head=1,
        n_embd=width,
        tied_head=False,
        residual_init="zero",
    )
    model = GPT.create(shape, seed=0).eval()
    with torch.no_grad():
        model.get_parameter("embedding.weight").zero_()
        model.get_parameter("positions.table.weight").copy_(torch.eye(width))
        head = model.get_parameter("head.weight").zero_()
        for p, token in enumerate(script):
            head[token, p] = 1000.0
    return model


def recite(script: Sequence[int], tokenizer: Tokenizer = BYTES, **settings: Any) -> list[GeneratedToken]:
    """Return the greedily generated tokens of a model that recites `script`."""
    model = reciter(script, tokenizer.vocab_size)
    return list(generate(model, tokenizer, [0], **({"max_new_tokens": len(script), "temperature": 0} | settings)))


def ids_of(generated: Iterable[GeneratedToken], sample: int = 0) -> list[int]:
    """Return the token ids of one sample."""
    return [token.token_id for token in generated if token.sample == sample]


def text_of(generated: Iterable[GeneratedToken], sample: int = 0) -> str:
    """Return the text of one sample."""
    return "".join(token.text for token in generated if token.sample == sample)


def record_shapes(model: GPT) -> list[tuple[int, ...]]:
    """Return a list that collects the shapes of all ids passed to the model from now on."""
    shapes: list[tuple[int, ...]] = []
    model.get_submodule("embedding").register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


# Cache


@POSITION
@pytest.mark.parametrize("parts", [[8], [1] * 8, [5, 1, 1, 1], [2, 3, 3]])
def test_cached_logits_equal_uncached_logits(position: str, parts: list[int]) -> None:
    """The tokens arrive in one pass, one by one, or in several parts; 1e-12 is float64's rounding of reordered sums."""
    model, ids = random_model(position=position), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
    cache = model.new_cache(2, 8)
    ends = itertools.accumulate(parts)
    logits = [
        model.logits(model.hidden(ids[:, end - size : end], cache)) for size, end in zip(parts, ends, strict=True)
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="9 tokens do not fit into 8"):
        model.hidden(ids[:, :1], cache)


def windows(context: int, prompt: Sequence[int], drawn: Sequence[int]) -> list[list[int]]:
    """Return the tokens that each draw sees: if the window exceeds the context, its older half is dropped."""
    result, window = [], list(prompt)
    for token in drawn:
        while len(window) > context:
            window = window[max(1, context // 2) :]
        result.append(list(window))
        window.append(token)
    return result


@POSITION
@pytest.mark.parametrize("context", [8, 7, 1])
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3, 4, 5, 6, 7, 8], list(range(11)) * 3], ids=len)
def test_a_full_context_drops_its_older_half_with_and_without_cache(
    position: str, context: int, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is drawn from its window's logits, for prompts shorter than, equal to or longer than the context."""
    model = random_model(position=position, context_length=context)
    recorded: list[Tensor] = []

    def record(logits: Tensor, settings: SamplingConfig) -> Tensor:
        recorded.append(logits[0])
        return sampling_distribution(logits, settings)

    monkeypatch.setattr(module, "sampling_distribution", record)
    cached, uncached = (
        ids_of(generate(model, None, prompt, max_new_tokens=30, temperature=3.0, use_cache=use_cache))
        for use_cache in (True, False)
    )
    expected = torch.stack([model(torch.tensor([window]))[0, -1] for window in windows(context, prompt, cached)])
    assert cached == uncached
    torch.testing.assert_close(torch.stack(recorded), expected.repeat(2, 1), atol=1e-12, rtol=0)


def test_rotary_models_with_windows_generate_indefinitely() -> None:
    """No token is dropped or processed twice, even if the text is much longer than the context."""
    model = random_model(position="rope", context_length=8, window=3)
    shapes = record_shapes(model)
    cached = ids_of(generate(model, None, [1, 2], max_new_tokens=60, temperature=0))
    assert shapes == [(1, 2)] + [(1, 1)] * 59
    assert cached == ids_of(generate(model, None, [1, 2], max_new_tokens=60, temperature=0, use_cache=False))
    assert cached == greedy(model, [1, 2], 60)
    assert len(set(cached)) > 2, "a repeated token would test little"


def greedy(model: GPT, prompt: Sequence[int], steps: int) -> list[int]:
    """Return the most likely continuation within the context, recomputed for each token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_window_start_drops_half_of_the_context_at_a_time() -> None:
    assert [window_start(length, 8) for length in (0, 8, 9, 12, 13, 16, 17)] == [0, 0, 4, 4, 8, 8, 12]


def test_the_prompt_takes_one_pass_and_all_samples_share_a_batch() -> None:
    model = random_model()
    shapes = record_shapes(model)
    list(generate(model, None, [1, 2, 3, 4], max_new_tokens=4, n=3))
    assert shapes == [(3, 4), (3, 1), (3, 1), (3, 1)]
    shapes.clear()
    # Tokens 5..10 exceed the context of 8 once: one more pass over the window.
    list(generate(model, None, [1, 2, 3, 4, 5], max_new_tokens=6))
    assert shapes == [(1, 5), (1, 1), (1, 1), (1, 1), (1, 5), (1, 1)]


# Sampling


def test_sampled_tokens_follow_the_models_distribution() -> None:
    """The shares of 4,000 samples of one token equal the model's probabilities within five standard errors."""
    model, count = random_model(), 4000
    drawn = torch.tensor(
        [token.token_id for token in generate(model, None, [3, 5], max_new_tokens=1, temperature=1.3, n=count)]
    )
    p = (model(torch.tensor([[3, 5]]))[0, -1] / 1.3).softmax(-1)
    share = drawn.bincount(minlength=11) / count
    assert ((share - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    assert (p > 0.01).sum() > 2, "a model that always draws the same token would test little"


def test_padded_ids_are_never_sampled() -> None:
    """The padding rows of the head have by far the largest logits here, but no padding id is sampled."""
    model = random_model(vocab_multiple=64, tied_head=False)
    with torch.no_grad():
        model.get_parameter("head.weight")[11:] = (
            1e3 * torch.randn(53, 16, generator=torch.Generator().manual_seed(0)).double()
        )
    drawn = {token.token_id for token in generate(model, None, [0], max_new_tokens=20, temperature=50.0, n=50)}
    assert drawn == set(range(11))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 50.0, "n": 50, "top_k": 7}])
def test_ids_that_the_tokenizer_lacks_are_never_sampled(settings: dict[str, Any]) -> None:
    """Published models often pad their vocabulary. This model has 11 ids, and prefers the 4 without a character."""
    model, tokenizer = random_model(tied_head=False), CharacterTokenizer("abcdefg")
    with torch.no_grad():
        model.get_parameter("head.weight")[7:] *= 1e3
    assert max(ids_of(generate(model, None, [0], max_new_tokens=20, temperature=50.0))) >= 7
    generated = list(generate(model, tokenizer, [0], max_new_tokens=20, **settings))
    assert max(ids_of(generated)) < 7
    assert all(token.text in "abcdefg" for token in generated)


def test_draws_do_not_use_the_global_generator() -> None:
    model = random_model()

    def draw(seed: int) -> list[int]:
        return ids_of(generate(model, None, [1], max_new_tokens=30, temperature=2.0, seed=seed))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draw(5) == first
    assert draw(6) != first


def test_samples_differ_and_their_tokens_alternate() -> None:
    generated = list(generate(random_model(), None, [1], max_new_tokens=20, temperature=2.0, n=3))
    assert [token.sample for token in generated] == [0, 1, 2] * 20
    assert len({tuple(ids_of(generated, sample)) for sample in range(3)}) == 3


def test_without_a_tokenizer_tokens_have_ids_but_no_text() -> None:
    model = random_model()
    generated = list(generate(model, None, [1, 2], max_new_tokens=3, temperature=0))
    assert {token.text for token in generated} == {""}
    assert ids_of(generated) == greedy(model, [1, 2], 3)


# Streaming and stopping


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.text(max_size=8).map(lambda text: text.encode("utf-8", "ignore")), st.binary(max_size=12)).filter(bool)
)
@example("é€😀\u0301".encode())
@example("a😀".encode()[:-1])
@example(b"\xff\xe2\x82a")
def test_streamed_text_equals_the_decoded_script(script: bytes) -> None:
    """This holds for any bytes, including characters that are cut off and invalid UTF-8."""
    generated = recite(script)
    assert ids_of(generated) == list(script)
    assert text_of(generated) == BYTES.decode(script)


def test_incomplete_characters_are_never_returned() -> None:
    text = "né€ 😀!"
    generated = recite(text.encode())
    assert [token.text for token in generated if token.text] == list(text)
    assert str(generated[1]) == ""  # the first byte of é


def text_before_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before its first stop string; the first stop string is the one that ends first."""
    for end in range(len(text) + 1):
        places = [text.find(stop) for stop in stops if stop in text[:end]]
        if places:
            return text[: min(places)]
    return text


@settings(max_examples=80, deadline=None)
@given(st.text("abé", min_size=1, max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
@example("abcabd", ["abd"])  # a false start
@example("aab", ["ab"])  # a false start that overlaps the true one
@example("abcd", ["abcd", "bc"])
@example("abab", ["b", "ab"])  # both stop strings end at the same place
@example("ba", ["ab"])  # the end of the text may begin a stop string; it is returned at the end
def test_text_ends_before_a_stop_string_even_if_it_spans_tokens(text: str, stops: list[str]) -> None:
    shown = text_of(recite(text.encode(), stop=stops))
    assert shown == text_before_stop(text, stops)


def test_text_is_held_back_only_while_a_stop_string_may_have_begun() -> None:
    assert [token.text for token in recite(b"xEyENDz", stop=["END"])] == ["x", "", "Ey", "", "", ""]


def test_a_single_string_is_one_stop_string() -> None:
    """It is not treated as a list of its characters."""
    assert text_of(recite(b"a\nb\n\nc", stop="\n\n")) == "a\nb"


def test_samples_stop_independently() -> None:
    """Samples in one batch have different lengths; each continues until its own stop string."""
    model = random_model(vocab_size=256)
    everything = list(generate(model, BYTES, [1], max_new_tokens=40, temperature=3.0, n=4))
    texts = [text_of(everything, sample) for sample in range(4)]
    stop = next(character for character in texts[0] if character.isascii())
    generated = list(generate(model, BYTES, [1], max_new_tokens=40, temperature=3.0, n=4, stop=[stop]))
    assert [text_of(generated, sample) for sample in range(4)] == [text_before_stop(text, [stop]) for text in texts]
    assert len({len(ids_of(generated, sample)) for sample in range(4)}) > 1, "samples of equal length would test little"


def test_end_of_text_ends_a_sample_and_adds_no_text() -> None:
    tokenizer = tokenizer_with_end()
    end = tokenizer.end_of_text
    assert end is not None
    ids = tokenizer.encode("ab").tolist()
    generated = recite([*ids, end, *ids], tokenizer)
    assert ids_of(generated) == [*ids, end]
    assert text_of(generated) == "ab"


def tokenizer_with_end() -> BPETokenizer:
    """Return a tokenizer of the 256 bytes and an end of text.

    Bytes are spelled like in GPT-2: printable ones as themselves, the others as characters from U+0100.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    symbols = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    return BPETokenizer.from_merges({symbol: i for i, symbol in enumerate([*symbols, "<|endoftext|>"])}, [])


def sentencepiece() -> HFTokenizer:
    """Return a tokenizer of five tokens like Llama's.

    Each word includes the space before it, which is dropped at the start of a text, and prompts begin with <s>.
    """
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    word = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    start = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **added} for i, name in enumerate(["<unk>", "<s>", "</s>"])],
        "pre_tokenizer": word,
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": start},
        "decoder": word,
        "model": {
            "type": "WordLevel",
            "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "▁low": 3, "▁tide": 4},
            "unk_token": "<unk>",
        },
    }
    return HFTokenizer(json.dumps(content))


@pytest.mark.parametrize(
    ("prompt", "expected_ids", "expected_text"),
    [
        (None, [1], "tide low"),
        ("low", [1, 3], " tide low"),
        ([1], [1], "tide low"),
        ([3], [3], " tide low"),
        ([2, 1], [2, 1], "tide low"),
    ],
    ids=str,
)
def test_generated_text_continues_its_prompt(
    prompt: str | list[int] | None, expected_ids: list[int], expected_text: str
) -> None:
    """The prompt begins with <s>, and a space separates the prompt's last word from the first generated word."""
    tokenizer = sentencepiece()
    model = reciter([4] * (len(expected_ids) - 1) + [4, 3, 2], tokenizer.vocab_size)
    assert prompt_ids(model, tokenizer, prompt).tolist() == [expected_ids]
    assert text_of(generate(model, tokenizer, prompt, temperature=0)) == expected_text
    with pytest.raises(UserError, match="prompt is empty"):
        prompt_ids(model, tokenizer, "")


@pytest.mark.parametrize("count", [1, 5, 20])
def test_max_new_tokens_limits_a_sample(count: int) -> None:
    assert len(list(generate(random_model(), None, [1], max_new_tokens=count))) == count


# Refusals and state


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [3, 256]}, "outside 0..255"),
        ({"prompt": [-1]}, "outside 0..255"),
        ({"tokenizer": None, "prompt": "text"}, "no tokenizer"),
        ({"tokenizer": None, "prompt": None}, "no tokenizer"),
        ({"tokenizer": None, "stop": ["x"]}, "tokenizer"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"n": 0}, "n must be"),
        ({"stop": ["x", ""]}, "stop strings"),
        ({"stop": ""}, "stop strings"),
    ],
    ids=str,
)
def test_invalid_arguments_are_errors_when_generate_is_called(changes: dict[str, Any], words: str) -> None:
    """The error is raised by the call itself, not later by the first `next`."""
    arguments: dict[str, Any] = {"tokenizer": BYTES, "prompt": [1]} | changes
    with pytest.raises(UserError, match=words):
        generate(reciter(b"abc"), **arguments)


@pytest.mark.parametrize("consume", [list, next, lambda generated: None], ids=["to the end", "one token", "not at all"])
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(consume: Callable[[Any], object], training: bool) -> None:
    model = random_model().train(training)
    generated = generate(model, None, [1], max_new_tokens=5)
    consume(generated)
    del generated
    assert {module.training for module in model.modules()} == {training}


def test_dropout_is_disabled_and_no_gradients_are_computed() -> None:
    model = random_model(dropout=0.5).train()
    assert ids_of(generate(model, None, [1], max_new_tokens=6, temperature=0)) == greedy(model.eval(), [1], 6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_generated_token_formats_as_its_text_and_has_a_probability_on_request() -> None:
    assert recite("é".encode())[1] == GeneratedToken("é", 0xA9, 0, None)
    assert f"{recite('é'.encode())[1]}" == "é"
    model = random_model()
    p = model(torch.tensor([[3, 5]]))[0, -1].detach().softmax(-1)
    (token,) = generate(model, None, [3, 5], max_new_tokens=1, temperature=3.0, top_k=4, probabilities=True)
    assert token.probability == pytest.approx(float(p[token.token_id]), rel=1e-6)


def test_a_text_prompt_is_encoded_by_the_tokenizer() -> None:
    model = random_model(vocab_size=256)
    by_text, by_ids = (generate(model, BYTES, prompt, max_new_tokens=10) for prompt in ("é!", list("é!".encode())))
    assert ids_of(by_text) == ids_of(by_ids)


def test_generation_records_no_autograd_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of a long text would fill the memory."""
    recorded: list[bool] = []
    hidden = GPT.hidden

    def record(self: GPT, *arguments: Any) -> Tensor:
        result = hidden(self, *arguments)
        recorded.append(result.requires_grad)
        return result

    monkeypatch.setattr(GPT, "hidden", record)
    list(generate(random_model(), None, [1], max_new_tokens=3))
    assert recorded == [False] * 3


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(tokenizer_with_end(), 256), (BYTES, ord("\n")), (CharacterTokenizer("a\nb"), 1), (CharacterTokenizer("ab"), 0)],
    ids=["end of text", "line break", "line break of characters", "no line break"],
)
def test_without_a_prompt_generation_begins_a_document(tokenizer: Tokenizer, expected: int) -> None:
    model = random_model(vocab_size=tokenizer.vocab_size)
    by_default, by_id = (ids_of(generate(model, tokenizer, prompt, max_new_tokens=10)) for prompt in (None, [expected]))
    assert by_default == by_id


@pytest.mark.parametrize(("use_cache", "position"), [(True, "rope"), (False, "learned")])
def test_samples_that_cannot_fit_into_memory_are_refused(
    use_cache: bool, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(position=position)
    # Keys and values in float64: 2 layers, 2 heads of width 8, 6 of 8 positions. Logits, their distribution and sums.
    cached = 2 * 2 * 16 * 6 * 8 if use_cache else 0
    read = (3 if use_cache else 6) * (2 * 16 + 64) * 8
    each = cached + read + 3 * 8
    free = 1000 * each
    monkeypatch.setattr(device_module, "available_memory", lambda device, swap=False: free)

    def start(n: int, tokens: int = 3) -> None:
        generate(model, None, [1, 2, 3], max_new_tokens=tokens, n=n, use_cache=use_cache)

    start(900)
    with pytest.raises(UserError, match=r"use n of at most 900$") as error:
        start(1100)
    assert "\n" not in str(error.value)
    free = 10
    with pytest.raises(UserError, match="fewer new tokens"):
        start(1)


def test_a_cache_knows_its_bytes() -> None:
    config = ModelConfig(**(TINY | {"window": 4, "position": "rope"}))
    cache, meta = (KVCache(config, 3, 8, torch.empty(0, device=device)) for device in ("cpu", "meta"))
    assert cache.nbytes == meta.nbytes == sum(x.numel() * 4 for layer in cache.layers for x in (layer.k, layer.v))
