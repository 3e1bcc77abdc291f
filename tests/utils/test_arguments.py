"""Arguments of the public functions: a wrong type is one clear error, and what fits is passed on unchanged."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch

import glassgpt as g
from glassgpt.interpretability import capture, figures, head_scores, interventions, logit_lens, weights
from glassgpt.tokenizers.builtin import build_tokenizer
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError


@check_arguments
def example(
    count: int,
    share: float = 0.5,
    *names: str,
    path: str | Path | None = None,
    kind: Literal["a", "b"] = "a",
    ids: Sequence[int] = (),
    texts: Sequence[str] = (),
    seed: int = 0,
    call: Callable[[], None] | None = None,
    on: bool = False,
    **others: Any,
) -> tuple[Any, ...]:
    """Return the arguments."""
    return count, share, names, path, kind, ids, call, on, others


class Folder(os.PathLike[str]):
    """A path that is not a `pathlib.Path`."""

    def __fspath__(self) -> str:
        return "."


def test_fitting_arguments_are_passed_on() -> None:
    folder, ids = Folder(), range(3)
    named: dict[str, Any] = {"path": folder, "kind": "b", "ids": ids, "call": test_fitting_arguments_are_passed_on}
    result = example(np.int64(3), np.float32(1), "x", "y", **named, on=1, more=None)  # type: ignore[arg-type]
    assert result == (3, 1, ("x", "y"), folder, "b", ids, named["call"], 1, {"more": None})
    assert example(1, 2)[:2] == (1, 2)
    assert example.__doc__ == "Return the arguments."


@pytest.mark.parametrize(
    ("arguments", "named", "name"),
    [
        (["3"], {}, "count"),
        ([None], {}, "count"),
        ([1, "x"], {}, "share"),
        ([1, 1.0, "x", 3], {}, "names"),
        ([1], {"path": 3}, "path"),
        ([1], {"path": b"x"}, "path"),
        ([1], {"kind": "c"}, "kind"),
        ([1], {"ids": 3}, "ids"),
        ([1], {"call": "x"}, "call"),
        ([True], {}, "count"),
        ([0], {}, "count"),
        ([1, True], {}, "share"),
        ([1], {"texts": "abc"}, "texts"),
        ([1], {"texts": ["a", 1]}, "texts"),
        ([1], {"seed": -1}, "seed"),
        ([1], {"seed": 2**63}, "seed"),
    ],
)
def test_an_argument_of_another_type_is_named(arguments: list[Any], named: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} ") as caught:
        example(*arguments, **named)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="example"):
        example()  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def model() -> g.GPT:
    """Return an untrained model."""
    shape = g.ModelConfig(vocab_size=256, context_length=8, n_layer=1, n_head=1, n_embd=8)
    return g.GPT.create(shape, seed=0)


def test_public_functions_name_an_argument_of_another_type(model: g.GPT, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("bytes")
    run, out = str(tmp_path / "run"), tmp_path / "out"
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("model", g.generate, (run, tokenizer, "x")),
        ("model", g.generate, (tokenizer, model, "x")),
        ("model", g.generate, ((model, tokenizer), None, "x")),
        ("tokenizer", g.generate, (model, "x")),
        ("prompt", g.generate, (model, tokenizer, [1.5])),
        ("prompt", g.generate, (model, tokenizer, ["x"])),
        ("prompt", g.generate, (model, tokenizer, [[1, 2], [3, 4]])),
        ("prompt", g.generate, (model, tokenizer, [10**30])),
        ("255", g.generate, (model, tokenizer, [256])),
        ("ids", model, ("x",)),
        ("ids", model, ([1, 2],)),
        ("ids", model, (torch.tensor([1, 2]),)),
        ("ids", model, (torch.empty(1, 0, dtype=torch.int64),)),
        ("reference", g.load, (123,)),
        ("reference", g.evaluate, (model,)),
        ("reference", g.export, (model, out)),
        ("out", g.export, (run, None)),
        ("config", g.train, ("demo",)),
        ("config", g.train, ({"steps": 3},)),
        ("run", g.resume, (3,)),
        ("name", g.recipe, (3,)),
        ("model", g.quantize, (run,)),
        ("model", g.capture, (tokenizer,)),
        ("run", g.write_report, (3,)),
        ("config", g.GPT, ("small",)),
        ("seed", partial(g.generate, seed=-1), (model, tokenizer)),
        ("seed", partial(g.generate, seed=2**70), (model, tokenizer)),
        ("seed", partial(g.generate, seed=True), (model, tokenizer)),
        ("n must", partial(g.generate, n=2**21), (model, tokenizer)),
        ("seed", g.GPT.create, (model.config, 0.5)),
        ("seed", g.GPT.create, (model.config, -1)),
        ("is not a model; pass", g.load, ("",)),
    ]
    for word, function, arguments in calls:
        with pytest.raises(UserError, match=word):
            function(*arguments)


def test_functions_that_look_inside_name_a_wrong_argument(model: g.GPT) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with g.capture(model) as cache:
        model(ids)
    layer, look = cache.layers[0], cast(Callable[..., Any], logit_lens.logit_lens)
    lens = look(model, cache)
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("model", head_scores.head_scores, (None,)),
        ("seed", head_scores.head_scores, (model, -1)),
        ("pattern", head_scores.pattern_scores, ([[1.0]], 1)),
        ("model", look, (cache, model)),
        ("watch", partial(look, watch="a"), (model, cache)),
        ("token", partial(look, watch=["a"]), (model, cache)),
        ("k", partial(look, k=0), (model, cache)),
        ("k", logit_lens.predictions, (model, cache, 1.5)),
        ("token", logit_lens.logit_attribution, (model, cache, 0, "a")),
        ("against", logit_lens.logit_attribution, (model, cache, 0, 1, True)),
        ("attribution", logit_lens.attribution, (1.0,)),
        ("edits", interventions.effects, (model, ids, ["head"])),
        ("edits", interventions.effects, (model, ids, "head")),
        ("cache", capture.heads, (model,)),
        ("cache", capture.attention_overview, (None,)),
        ("table", weights.nearest, (model, 0)),
        ("row", weights.nearest, (model.embedding.weight, 1.0)),
        ("n must", weights.principal_components, (model.embedding.weight, 0)),
        ("model", weights.tables, (None,)),
        ("name", weights.weight_of, (model, 3)),
        ("ids", weights.gradient_norms, (model, [1, 2])),
        ("tokens", figures.head, (cache, 0, 0, "abc")),
        ("tokens", figures.lens, (lens, "abc", build_tokenizer("bytes"))),
        *(("head", method, (head,)) for method in (layer.pattern, layer.scores) for head in ("a", True, 1.0)),
        ("head", layer.kernel_error, (None, "a")),
    ]
    for word, function, arguments in calls:
        with pytest.raises(UserError, match=f"^{word} ") as caught:
            function(*arguments)
        assert "\n" not in str(caught.value)
    assert torch.equal(layer.pattern(np.int64(0)), layer.pattern(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda ids: torch.tensor([ids])])
def test_ids_of_a_prompt_may_be_a_list_or_an_array(model: g.GPT, kind: Callable[[list[int]], Any]) -> None:
    expected = [t.token_id for t in g.generate(model, None, (1, 2), max_new_tokens=4)]
    assert [t.token_id for t in g.generate(model, None, kind([1, 2]), max_new_tokens=4)] == expected
