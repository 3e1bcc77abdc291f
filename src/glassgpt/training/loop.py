"""The recipe of a run: evaluate, update, record, sample, save.

A run's state is its weights, its optimizer and the number of updates done. Batches, dropout and samples are functions
of the seed and the step, so a run that was killed and resumed computes what it would have computed otherwise. Under
`torchrun` every rank runs this loop; the main one writes.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

from glassgpt.distributed.group import StoppedError
from glassgpt.evaluation.hellaswag import score_hellaswag, summarize
from glassgpt.evaluation.perplexity import evaluate_data
from glassgpt.interpretability.snapshots import take_probe
from glassgpt.model.gpt import GPT
from glassgpt.model.param_groups import norms_by_group
from glassgpt.runs.checkpoint import take_snapshot
from glassgpt.training.recorder import Recorder
from glassgpt.training.setup import TrainState, is_due, sampler
from glassgpt.training.step import UpdateQueue
from glassgpt.utils.device import memory_used
from glassgpt.utils.rng import seed_for


def training_loop(state: TrainState, recorder: Recorder) -> int | None:
    """Train until the last step. Returns the signal that stopped the run before it, None if it is complete.

    A signal also stops within an update or an evaluation, which a resumed run then repeats as a whole.
    """
    config, saved_step, memory = state.config, state.step, 0
    updates = UpdateQueue(state, recorder)
    try:
        if state.step == 0:
            evaluate(state, recorder)
        elif state.pending_evaluation is not None:
            save(state, recorder, evaluate(state, recorder)[0])
        while state.step < state.steps:
            updates.start_update()
            signal, memory = highest_of_ranks(state)
            is_last = state.step == state.steps
            evaluates = state.evaluates_at(state.step)
            probes = bool(state.prompts) and not evaluates and is_due(state.step, config.probe.every)
            saves = is_last or signal or is_due(state.step, config.checkpoint_every)
            updates.finish_updates(all_of_them=bool(evaluates or probes or saves), memory_bytes=memory)

            val_loss, is_best = None, False
            if evaluates:
                state.pending_evaluation = updates.group_norms
                val_loss, is_best = evaluate(state, recorder)
            elif probes:
                probe(state, recorder, state.strategy.full_model())
            if saves or is_best:
                save(state, recorder, val_loss)
                saved_step = state.step
            if signal and not is_last:
                return signal
    except StoppedError as stop:
        state.strategy.model.zero_grad()  # of a part of an update
        updates.finish_updates(all_of_them=True, memory_bytes=memory)
        if state.step > saved_step:
            save(state, recorder, None)
        return stop.signal
    return None


def highest_of_ranks(state: TrainState) -> tuple[int, int]:
    """The signal that any rank received (0: none), and the most memory in use; exchanged between hosts, not devices."""
    # Read once per step, so that a signal cannot end the loop after a step that was not saved.
    own = [state.ranks.stop_signal(), memory_used(state.device)]
    signal, memory = state.ranks.all_gather_numbers(own).max(axis=0).astype(int).tolist()
    return signal, memory


def evaluate(state: TrainState, recorder: Recorder) -> tuple[float, bool]:
    """Record validation loss, norms, samples and a snapshot. Returns the loss, and whether it is a new best."""
    began = time.perf_counter()
    model = state.strategy.full_model()
    state.ranks.enter_phase(f"the evaluation of step {state.step}")
    limit = state.config.eval_tokens
    result = evaluate_data(model, state.data, precision=state.precision, limit=limit, ranks=state.ranks)
    record = {"step": state.step, **{f"val_{key}": value for key, value in result.items()}}
    record |= hellaswag_scores(state, model)
    record["weight_norms"] = {name: norm.item() for name, norm in norms_by_group(model).items()}
    record |= {"grad_norms": dict(state.pending_evaluation)} if state.pending_evaluation else {}
    recorder.evaluated({**record, "seconds": time.perf_counter() - began})
    samples = sample(state, recorder, model)
    probe(state, recorder, model, samples)
    state.pending_evaluation = None
    loss: float = result["loss"]
    is_best = state.step > 0 and math.isfinite(loss) and (state.best_val_loss is None or loss < state.best_val_loss)
    if is_best:
        state.best_step, state.best_val_loss = state.step, loss
    return loss, is_best


def hellaswag_scores(state: TrainState, model: GPT) -> dict[str, Any]:
    """The scores on HellaSwag for the record of an evaluation; empty if they are not due."""
    items, is_published = state.hellaswag
    due = state.step == state.steps or is_due(state.step, state.config.hellaswag_every)
    if not items or not due:
        return {}
    scores = score_hellaswag(model, state.data.tokenizer, items, precision=state.precision, ranks=state.ranks)
    figures = summarize(scores)
    return {
        "hellaswag_acc": figures["acc"],
        "hellaswag_acc_norm": figures["acc_norm"],
        "hellaswag_items": figures["n"],
        "hellaswag_published": is_published,
    }


def sample(state: TrainState, recorder: Recorder, model: GPT) -> list[str]:
    """Record and return the samples of this step, prompt included. Only the main rank generates them."""
    settings = state.config.sample
    state.ranks.enter_phase(f"the samples of step {state.step}", may_take_long=True)
    if not settings.count or not state.ranks.is_main:
        return []
    texts = [settings.prompt or ""] * settings.count
    for token in sampler(model, state.data.tokenizer, settings, seed_for(state.config.seed, "sample", state.step)):
        texts[token.sample] += token.text
    recorder.sampled(texts)
    return texts


def probe(state: TrainState, recorder: Recorder, model: GPT, samples: Sequence[str] = ()) -> None:
    """Record a snapshot of what the model computes at this step, on the main rank."""
    state.ranks.enter_phase(f"the snapshot of step {state.step}", may_take_long=True)
    if state.prompts and state.ranks.is_main:
        recorder.probed(take_probe(model, state.prompts, samples, state.step))


def save(state: TrainState, recorder: Recorder, val_loss: float | None) -> None:
    """Copy the state of all ranks, and let the main rank write it as a checkpoint while training continues."""
    state.ranks.enter_phase(f"the save of step {state.step}", may_take_long=True)
    recorder.finish()  # the save before: two copies might not fit into the host's memory
    state.ranks.enter_phase(f"the gathering of step {state.step}")
    recorder.save(take_snapshot(state.strategy, state.optimizers), val_loss)
