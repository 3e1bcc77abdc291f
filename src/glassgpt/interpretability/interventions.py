"""What if: parts of a model switched off or taken from another text, by hooks from outside.

    with edited(model, [Edit("head", layer=3, head=5), Edit("position", position=0)]):
        model(ids)

Ablation says what a part is needed for, patching (Vig et al., 2020; Meng et al., 2022) where the difference of two texts is carried.
Heads are edited where the output projection reads them, so that a `capture` still sees what attention itself gave.

Shapes: `B` batch, `T` tokens, `C` channels, `H` query heads, `D` head width, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glassgpt.interpretability.capture import ActivationCache, require_index
from glassgpt.model.attention import Span
from glassgpt.model.gpt import GPT, Block
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.torch_internals import uncompiled

Kind = Literal["head", "attention", "feed_forward", "block", "position", "residual"]
Way = Literal["zero", "mean", "patch"]


@dataclass(frozen=True)
class Edit:
    """One change of what a model computes."""

    kind: Kind
    """A `head`, all of `attention`, the `feed_forward` block, both (`block`): what it writes into the residual stream is replaced.
    `residual`: the stream behind a layer is. `position`: that token is hidden from all later ones, in one layer or in all."""
    layer: int | None = None
    """Needed for all kinds but `position`."""
    head: int | None = None
    """Needed for `head`, and for no other kind."""
    position: int | None = None
    """The token that is hidden; with the other kinds the only one whose values are replaced (left out, those of all tokens)."""
    by: Way = "zero"
    """What takes the place: nothing; the mean over the text's positions; or the same part's values at the same position of the text
    that is patched from. `residual` can only be patched, and a `position` only be hidden (`zero`)."""

    def check(self, model: GPT, source: ActivationCache | None) -> None:
        """Raise `UserError` where this model has no such part, or the edit does not say which."""
        for name, valid in (("kind", Kind), ("by", Way)):
            given = getattr(self, name)
            if given not in get_args(valid):
                raise UserError(
                    f"an edit's {name} is one of {', '.join(get_args(valid))}, not {given!r}{did_you_mean(given, get_args(valid))}"
                )
        if self.layer is not None:
            require_index("layer", self.layer, len(model.blocks))
        elif self.kind != "position":
            raise UserError(f"an edit of kind {self.kind!r} needs a layer: 0 to {len(model.blocks) - 1}")
        if (self.head is None) == (self.kind == "head"):
            raise UserError("an edit of kind 'head' needs a head, and no other kind has one")
        if self.head is not None:
            require_index("head", self.head, model.config.n_head)
        if self.kind == "position" and (self.position is None or self.by != "zero"):
            raise UserError("an edit of kind 'position' hides one token: it needs its position, and is by 'zero' only")
        if self.kind == "residual" and self.by != "patch":
            raise UserError("an edit of kind 'residual' is by 'patch' only: without the stream there is no model left")
        if self.by == "patch":
            _require_source(model, source)


@contextmanager
def edited(model: GPT, edits: Sequence[Edit], source: ActivationCache | None = None) -> Iterator[None]:
    """The model with all of these edits inside; it is as before at the end, whatever ends it.

    `source` is what a `capture` saw of the text to patch from: one text, or as many as the batch. A mean and a position are those of
    a single pass, so that over a cache they are of the new tokens alone; and over a cache no token can be hidden. Of several edits of
    one part at one position the last counts; attention that is switched off writes nothing, whatever is done to its heads. A `capture`
    inside or around sees the edited values. Works on a compiled model as on any other.

    Raises `UserError` for a part that is not there; in the forward pass for a position that is not there and texts that do not fit.
    """
    for edit in edits:
        edit.check(model, source)
    changes: dict[tuple[nn.Module, bool], list[_Change]] = {}
    hidden: dict[nn.Module, list[int]] = {}
    for edit in edits:
        if edit.kind == "position":
            for block in model.blocks if edit.layer is None else [model.blocks[edit.layer]]:
                hidden.setdefault(cast(Block, block).attention.kernel, []).append(cast(int, edit.position))
        for module, at_input, change in _changes_of(edit, model, source):
            changes.setdefault((module, at_input), []).append(change)
    handles = [kernel.register_forward_pre_hook(partial(_hide, positions)) for kernel, positions in hidden.items()]
    try:
        handles += [
            _hook(module, at_input, partial(_changed, several)) for (module, at_input), several in changes.items()
        ]
        with uncompiled(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Effects:
    """Logits with and without edits (B, T, V), or of one position (B, V)."""

    before: Tensor
    after: Tensor

    @property
    def change(self) -> Tensor:
        """after - before."""
        return self.after - self.before


@torch.no_grad()
def effects(
    model: GPT, ids: Tensor, edits: Sequence[Edit], source: ActivationCache | None = None, position: int | None = None
) -> Effects:
    """What edits do to the logits of ids (B, T): at one position (B, V), or at all (B, T, V). Errors as in `edited`."""
    if position is not None:
        require_index("position", position, ids.shape[1])
    at = slice(None) if position is None else position
    before = model.logits(model.hidden(ids)[:, at])
    with edited(model, edits, source):
        return Effects(before, model.logits(model.hidden(ids)[:, at]))


def _require_source(model: GPT, source: ActivationCache | None) -> None:
    if source is None:
        raise UserError("an edit by 'patch' needs a second text: give `source`, what a capture saw of it")
    source.require_pass()
    shape = (len(source.layers), source.ln_final.shape[-1], source.layers[0].z.shape[1])
    config = model.config
    if shape != (config.n_layer, config.n_embd, config.n_head):
        raise UserError("the text to patch from was seen in a model of another shape: capture it in this one")


@dataclass(frozen=True)
class _Change:
    """New values for some columns of x (B, T, ...), at one position or all."""

    by: Way
    position: int | None
    columns: slice
    source: Tensor | None
    """What is patched in (B or 1, T of its own, these columns)."""

    def values(self, x: Tensor) -> Tensor:
        """The new values, for all of x's positions or for one (B or 1, T or 1, columns)."""
        at = slice(None) if self.position is None else slice(self.position, self.position + 1)
        own = x[..., self.columns]
        if self.source is not None:
            self._check_fit(self.source, x)
            return self.source[:, at].to(x)
        return own.mean(dim=1, keepdim=True) if self.by == "mean" else torch.zeros_like(own[:, at])

    def _check_fit(self, source: Tensor, x: Tensor) -> None:
        if len(source) not in (1, len(x)):
            raise UserError(f"there are {len(source)} texts to patch from and {len(x)} to patch: give one, or as many")
        if self.position is None and source.shape[1] != x.shape[1]:
            raise UserError(
                f"the text to patch from has {source.shape[1]} tokens, this one {x.shape[1]}: make them equally long, or patch one position"
            )
        if self.position is not None and self.position >= source.shape[1]:
            raise UserError(
                f"nothing can be patched at position {self.position}: the text to patch from has {source.shape[1]} tokens"
            )


def _changes_of(edit: Edit, model: GPT, source: ActivationCache | None) -> Iterator[tuple[nn.Module, bool, _Change]]:
    """Where an edit changes what: module, whether its input (or its output), change."""
    if edit.kind == "position":
        return
    assert edit.layer is not None
    block = cast(Block, model.blocks[edit.layer])
    seen = source.layers[edit.layer] if source is not None and edit.by == "patch" else None
    everything = partial(_Change, edit.by, edit.position, slice(None))
    if edit.kind == "residual":
        yield block, False, everything(seen.resid_post if seen else None)
    if edit.kind in ("attention", "block"):
        yield block.attention.out, True, everything(seen.z.transpose(1, 2).flatten(2) if seen else None)
        if edit.by == "zero":  # the bias too
            yield block.attention.out, False, everything(None)
    if edit.kind in ("feed_forward", "block"):
        yield block.feed_forward, False, everything(seen.mlp_out if seen else None)
    if edit.head is not None:
        D = model.config.resolved_head_dim
        columns = slice(edit.head * D, (edit.head + 1) * D)
        yield (
            block.attention.out,
            True,
            _Change(edit.by, edit.position, columns, seen.z[:, edit.head] if seen else None),
        )


def _changed(changes: list[_Change], x: Tensor) -> Tensor:
    """x (B, T, ...) with all changes. Each is made of x itself, whatever others did to it; where two meet, the last counts."""
    changed = x.clone()
    for change in changes:
        if change.position is None:
            changed[:, :, change.columns] = change.values(x)
        else:
            require_index("position", change.position, x.shape[1])
            changed[:, change.position, change.columns] = change.values(x)[:, 0]
    return changed


def _hook(module: nn.Module, at_input: bool, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """A `capture` sees the edited values, whichever came first: it hooks outputs only, behind all inputs, and here the edit is ahead."""
    if at_input:
        return module.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))
    return module.register_forward_hook(lambda _, given, gives: change(gives), prepend=True)


def _hide(positions: list[int], kernel: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """A kernel's arguments with a mask in which only the tokens at these positions see themselves."""
    q, k, v, mask, bias = given
    T = k.shape[-2]
    if q.shape[-2] != T:
        raise UserError("a token can be hidden in a pass over the whole text only: leave the cache out")
    for position in positions:
        require_index("position", position, T)
    if mask is None:
        everywhere = torch.arange(T, device=k.device)
        mask = cast(Span, kernel.span).mask(everywhere, everywhere)
    shown = torch.ones(T, dtype=torch.bool, device=k.device)
    shown[positions] = False
    return q, k, v, mask & (shown | torch.eye(T, dtype=torch.bool, device=k.device)), bias
