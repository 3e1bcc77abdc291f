"""A model whose weights are NaN or infinite gives an error that names them, wherever its logits are used."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glassgpt.config.model import ModelConfig
from glassgpt.evaluation.hellaswag import evaluate_both_styles
from glassgpt.evaluation.hellaswag_items import Item
from glassgpt.evaluation.perplexity import evaluate
from glassgpt.generation.generate import generate
from glassgpt.generation.inference import quantize
from glassgpt.interop.hf_models import export_hf
from glassgpt.interop.references import LoadedModel
from glassgpt.interpretability.capture import capture
from glassgpt.interpretability.interventions import Edit, effects
from glassgpt.interpretability.logit_lens import logit_attribution, logit_lens, predictions
from glassgpt.model.finite import require_finite
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import BytesTokenizer
from glassgpt.utils.errors import UserError
from play_harness import serving

BYTES = BytesTokenizer()
IDS = torch.tensor([[3, 1, 4, 1, 5]])
WRONG = "blocks.1.feed_forward.down.weight"
ITEMS = [Item(0, "a", "the fox", "the fox", "", ("ran", "hid", "ate", "slept"), 0)]


def model_with(value: float, name: str = WRONG) -> GPT:
    """Return a tiny model with one value replaced in the tensor `name`."""
    model = GPT.create(ModelConfig(vocab_size=256, n_layer=2, n_head=2, n_embd=16, context_length=32), seed=0).eval()
    with torch.no_grad():
        model.get_parameter(name)[2, 3] = value
    return model


def loaded(model: GPT) -> LoadedModel:
    return LoadedModel("x", model, BYTES, None, None)


def captured(model: GPT) -> object:
    with torch.no_grad(), capture(model) as cache:
        model(IDS)
    return cache


USES: dict[str, Callable[[GPT, Path], object]] = {
    "greedy": lambda model, _: list(generate(model, BYTES, "the", max_new_tokens=4, temperature=0)),
    "sampling": lambda model, _: list(generate(model, BYTES, "the", max_new_tokens=4, top_k=5, top_p=0.9, min_p=0.1)),
    "batch": lambda model, _: list(generate(model, None, [1, 2], n=3, max_new_tokens=4, temperature=0)),
    "without cache": lambda model, _: list(
        generate(model, BYTES, "the", use_cache=False, max_new_tokens=4, temperature=0)
    ),
    "bfloat16": lambda model, _: list(
        generate(model, BYTES, "the", max_new_tokens=4, precision="bfloat16", temperature=0)
    ),
    "int8": lambda model, _: list(generate(quantize(model), BYTES, "the", max_new_tokens=4, temperature=0)),
    "evaluation": lambda model, text: evaluate(loaded(model), source=str(text), device="cpu"),
    "evaluation in int8": lambda model, text: evaluate(loaded(model), source=str(text), quantize="int8"),
    "HellaSwag": lambda model, _: evaluate_both_styles(loaded(model), ITEMS, False, lambda *progress: None),
    "lens": lambda model, _: logit_lens(model, captured(model)),  # type: ignore[arg-type]
    "predictions": lambda model, _: predictions(model, captured(model)),  # type: ignore[arg-type]
    "attribution": lambda model, _: logit_attribution(model, captured(model), 4, 7),  # type: ignore[arg-type]
    "interventions": lambda model, _: effects(model, IDS, [Edit(kind="head", by="zero", layer=0, head=0)]),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_logits_names_the_weights_that_are_not_finite(use: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the fox ran, the fox hid, and the fox slept. " * 3)
    value = math.inf if use in ("greedy", "evaluation") else math.nan
    with pytest.raises(UserError, match=rf"{WRONG} has 1 of 1,024 values"):
        USES[use](model_with(value), text)


def test_infinite_sums_of_finite_weights_are_an_error_too() -> None:
    model = model_with(0.5)
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(3e38)
    with pytest.raises(UserError, match="not finite"):
        list(generate(model, None, [1, 2, 3], temperature=0))


def test_ids_that_are_masked_by_minus_infinity_are_no_error() -> None:
    model = model_with(0.0)
    logits = torch.tensor([[0.5, -math.inf], [-math.inf, -3.0]])
    require_finite(logits, model)
    with pytest.raises(UserError, match="not finite"):
        require_finite(torch.full((1, 4), -math.inf), model)
    # Rows for ids without text, beyond those of the tokenizer.
    padded = GPT.create(ModelConfig(vocab_size=300, n_layer=1, n_head=2, n_embd=16, tied_head=False), seed=0).eval()
    with torch.no_grad():
        padded.head.weight[256:] = -math.inf
    assert len(list(generate(padded, BYTES, "the", max_new_tokens=5, temperature=0))) == 5


def test_the_page_shows_the_error(tmp_path: Path) -> None:
    """The server reads an export, since the checkpoint of a run would no longer match its manifest."""
    export_hf(model_with(math.nan), BYTES, tmp_path / "hf")
    with serving(tmp_path / "hf") as served:
        for path, more in (("attention", {}), ("lens", {"start": 0, "stop": 2}), ("next", {}), ("predictions", {})):
            status, answer = served.client.ask(path, model=0, ids=[1, 2, 3], **more)
            assert (status, WRONG in answer["error"]) == (400, True), path
        status, lines = served.client.ask("write", model=0, ids=[1, 2, 3])
        assert WRONG in str(lines), lines
