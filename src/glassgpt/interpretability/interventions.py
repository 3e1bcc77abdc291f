"""Switch off parts of a model, or replace their values by those from another text, with hooks on its modules.

    with edited(model, [Edit("head", layer=3, head=5), Edit("position", position=0)]):
        model(ids)

Ablation shows what a part is needed for; patching (Vig et al., 2020; Meng et al., 2022) shows where the difference
between two texts is carried. Heads are edited at the input of the output projection, so a `capture` still records what
the kernel returned.

Shapes: `B` batch, `T` tokens, `C` channels, `H` query heads, `D` head width, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glassgpt.config.validation import StrictConfig
from glassgpt.interpretability.capture import ActivationCache, LayerActivations, require_index
from glassgpt.model.attention import Span
from glassgpt.model.finite import require_finite
from glassgpt.model.gpt import GPT, Block
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError
from glassgpt.utils.torch_internals import uncompiled


@dataclass(frozen=True)
class Edit(StrictConfig):
    """One change of what a model computes. Raises `UserError` for an unknown kind or replacement."""

    # Replace the output of a `head`, of `attention`, of the `feed_forward` block, of both (`block`), or the `residual`
    # stream after a layer; or hide the token at a `position` from later ones.
    kind: Literal["head", "attention", "feed_forward", "block", "position", "residual"]
    layer: int | None = None  # required; only a `position` can do without: its token is then hidden in all layers
    head: int | None = None  # required for `head`; not allowed otherwise
    position: int | None = None  # the token to hide; for other kinds the only position to edit (default: all)
    # What replaces the values: zeros, their mean over the text's positions, or those of the source text at the same
    # position (`patch`). A `residual` can only be patched, and a `position` only hidden (`zero`).
    by: Literal["zero", "mean", "patch"] = "zero"

    @classmethod
    def name_of(cls, field_name: str) -> str:
        """A field's name in errors, as in the playground's requests."""
        return f"edits.{field_name}"

    def check_fits(self, model: GPT, source: ActivationCache | None) -> None:
        """Raise `UserError` if the edit is incomplete or the model has no such part."""
        what, config = f"edit: kind {self.kind!r}", model.config
        if self.layer is not None:
            require_index("layer", self.layer, config.n_layer)
        elif self.kind != "position":
            raise UserError(f"{what} needs a layer, 0 to {config.n_layer - 1}")
        if (self.head is None) == (self.kind == "head"):
            raise UserError(f"{what} {'needs a' if self.head is None else 'does not take a'} head")
        if self.head is not None:
            require_index("head", self.head, config.n_head)
        if self.kind == "position" and (self.position is None or self.by != "zero"):
            raise UserError(f"{what} needs a position, and only by 'zero'")
        if self.kind == "residual" and self.by != "patch":
            raise UserError(f"{what} only by 'patch'")
        if self.by == "patch":
            if source is None:
                raise UserError("edit: by 'patch' needs `source`, the captured activations of a second text")
            source.require_pass()
            shape = (len(source.layers), source.ln_final.shape[-1], source.layers[0].z.shape[1])
            if shape != (config.n_layer, config.n_embd, config.n_head):
                raise UserError("edit: the source text was captured in a model of another shape")


@check_arguments
@contextmanager
def edited(model: GPT, edits: Sequence[Edit], source: ActivationCache | None = None) -> Iterator[None]:
    """Apply the edits to the forward passes inside. A `capture` in or around it sees edited values.

    If several edits change the same values, the last one wins; attention that is switched off (`zero`) stays off.
    `source` holds one text, or as many as the batch. Over a KV cache, means and positions are of the new tokens only,
    and no token can be hidden. Raises `UserError` for an edit or, in the forward pass, a position or source text that
    does not fit.
    """
    blocks = cast(list[Block], list(model.blocks))
    changes: dict[tuple[nn.Module, bool], list[_Change]] = {}
    with ExitStack() as hooks:
        for edit in edits:
            edit.check_fits(model, source)
            for layer in range(len(blocks)) if edit.layer is None else [edit.layer]:
                if edit.kind == "position" and edit.position is not None:
                    hide = partial(_hide, edit.position)
                    hooks.enter_context(blocks[layer].attention.kernel.register_forward_pre_hook(hide))
                    continue
                patch = source.layers[layer] if source is not None and edit.by == "patch" else None
                for module, at_input, change in _changes_of(edit, blocks[layer], patch):
                    changes.setdefault((module, at_input), []).append(change)
        for (module, at_input), several in changes.items():
            hooks.enter_context(_hook(module, at_input, several))
        hooks.enter_context(uncompiled(model))
        yield


class Effects(NamedTuple):
    """Logits without and with edits: (B, T, V) each, or (B, V) at one position."""

    before: Tensor
    after: Tensor

    @property
    def change(self) -> Tensor:
        """after - before."""
        return self.after - self.before


@check_arguments
@torch.no_grad()
def effects(
    model: GPT, ids: Tensor, edits: Sequence[Edit], source: ActivationCache | None = None, position: int | None = None
) -> Effects:
    """What edits do to logits of ids (B, T), at one position or all. Raises as `edited`, and if they are not finite."""
    if position is not None:
        require_index("position", position, ids.shape[1])
    at = slice(None) if position is None else position
    before = model.logits(model.hidden(ids)[:, at])
    with edited(model, edits, source):
        after = model.logits(model.hidden(ids)[:, at])
    require_finite(torch.cat([before, after]), model)
    return Effects(before, after)


class _Change(NamedTuple):
    """New values for some columns of x (B, T, ...), at the edit's position or at all."""

    edit: Edit
    source: Tensor | None  # the values to patch in (B or 1, source's T, columns)
    columns: slice = slice(None)

    def apply(self, x: Tensor, changed: Tensor) -> None:
        """Write new values, computed from x, into `changed`, its copy."""
        at, position = slice(None), self.edit.position
        if position is not None:
            require_index("position", position, x.shape[1])
            at = slice(position, position + 1)
        values: Tensor | float = 0.0
        if self.source is not None:
            texts, length = self.source.shape[:2]
            if texts not in (1, len(x)):
                raise UserError(f"edit: {texts} source texts for a batch of {len(x)}; give one, or as many")
            if position is None and length != x.shape[1]:
                lengths = f"{length} tokens, this one {x.shape[1]}"
                raise UserError(f"edit: the source text has {lengths}; make them equally long, or patch one position")
            if position is not None:
                require_index("position in the source text", position, length)
            values = self.source[:, at].to(x)
        elif self.edit.by == "mean":
            values = x[..., self.columns].mean(dim=1, keepdim=True)
        changed[:, at, self.columns] = values


def _changes_of(edit: Edit, block: Block, patch: LayerActivations | None) -> Iterator[tuple[nn.Module, bool, _Change]]:
    """The modules that an edit changes: module, whether its input (otherwise its output) changes, change."""
    out, D = block.attention.out, block.attention.head_dim
    if edit.kind == "residual":
        yield block, False, _Change(edit, patch.resid_post if patch else None)
    if edit.kind in ("head", "attention", "block"):
        columns = slice(None) if edit.head is None else slice(edit.head * D, (edit.head + 1) * D)
        yield out, True, _Change(edit, patch.z.transpose(1, 2).flatten(2)[..., columns] if patch else None, columns)
        if edit.by == "zero" and edit.head is None:  # the bias of all heads, too
            yield out, False, _Change(edit, None)
    if edit.kind in ("feed_forward", "block"):
        yield block.feed_forward, False, _Change(edit, patch.mlp_out if patch else None)


def _hook(module: nn.Module, at_input: bool, changes: list[_Change]) -> RemovableHandle:
    """Apply changes to a module's first input or to its output; `prepend`, so that a `capture` always sees them."""

    def change(x: Tensor) -> Tensor:
        changed = x.clone()  # each change is computed from x itself, so their order matters only if they overlap
        for each in changes:
            each.apply(x, changed)
        return changed

    if at_input:
        return module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _, inputs, output: change(output), prepend=True)


def _hide(position: int, kernel: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The kernel's inputs with a mask that hides the token at a position from later ones."""
    q, k, v, mask, bias = inputs
    T = k.shape[-2]
    if q.shape[-2] != T:
        raise UserError("edit: a token can only be hidden in a pass over the whole text, without a KV cache")
    require_index("position", position, T)
    mask = cast(Span, kernel.span).plain_mask(T, T, k.device) if mask is None else mask.clone()
    mask[position + 1 :, position] = False
    return q, k, v, mask, bias
