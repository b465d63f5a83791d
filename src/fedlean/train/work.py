"""What local SGD takes: said by the same function before it is done and after."""

from __future__ import annotations

from dataclasses import replace

from fedlean.core import ClientTask, Work
from fedlean.tree import kept_counts


def sgd_work(
    task: ClientTask,
    *,
    importance: bool = False,
    piece_bytes: int = 0,
    first_piece: int = 0,
    forward_examples: int = 0,
    taps: tuple[str, ...] = (),
) -> Work:
    """Of `local_steps` steps on the task's masks.

    importance: each with weight gradients of pruned coordinates too, of all of them or of the parts
    of a sweep (`Work`)
    taps: the layers that the loss of `descent.local_descent` reads, the output among them; without
    any, the loss is the engine's (`local_sgd`).
    """
    h = task.hparams
    steps = int(h["local_steps"])
    return Work(
        steps,
        int(h["batch_size"]),
        importance_steps=steps if importance else 0,
        forward_examples=forward_examples,
        kept=kept_counts(task.sub_model.masks),
        optimizer_floats=1 if h["momentum"] else 0,
        taps=taps,
        piece_bytes=piece_bytes if importance else 0,
        first_piece=first_piece if importance else 0,
    )


def behind_frozen(
    task: ClientTask,
    cut: str,
    *,
    micro_batch: int,
    importance: bool = False,
    taps: tuple[str, ...] = (),
) -> tuple[Work, ...]:
    """Of `sgd_work` where what comes before the activation of `cut` only runs forward.

    The beginning stays in memory beside the rest, with the batch's activations at the cut and the
    micro-batch's that join them (`freezing.session.BeginningSession`).
    """
    whole = sgd_work(task, importance=importance, taps=taps)
    micro_batch = min(micro_batch, whole.batch_size)
    before = _beginning(whole, cut, micro_batch, whole.steps * whole.batch_size)
    held = whole.batch_size + micro_batch
    return before, replace(whole, begin=cut, beside=1, held_examples=held)


def behind_cached(
    task: ClientTask,
    cut: str,
    *,
    micro_batch: int,
    examples: int,
    on_disk: bool = False,
    importance: bool = False,
    taps: tuple[str, ...] = (),
) -> tuple[Work, ...]:
    """As `behind_frozen`, the beginning having run once over all `examples` of the client.

    What it gave stays in memory (`freezing.cached.cache`), or `on_disk`, where each batch is read;
    the beginning itself does not.
    """
    whole = sgd_work(task, importance=importance, taps=taps)
    micro_batch = min(micro_batch, examples)
    stays = 0 if on_disk else examples
    before = _beginning(whole, cut, micro_batch, examples)
    return (
        replace(before, held_examples=stays + micro_batch),
        replace(whole, begin=cut, held_examples=stays + whole.batch_size),
    )


def _beginning(whole: Work, cut: str, micro_batch: int, examples: int) -> Work:
    return Work(0, micro_batch, forward_examples=examples, kept=whole.kept, end=cut)


def only_sgd(task: ClientTask) -> tuple[Work, ...]:
    """The `work` of methods whose clients do nothing else."""
    return (sgd_work(task),)
