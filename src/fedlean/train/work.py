"""What local SGD takes: said by the same function before it is done and after."""

from __future__ import annotations

from fedlean.core import ClientTask, Work
from fedlean.tree import kept_counts


def sgd_work(task: ClientTask, *, importance: bool = False, forward_examples: int = 0) -> Work:
    """Of `local_steps` steps on the task's masks; importance: each with all weight gradients."""
    h = task.hparams
    steps = int(h["local_steps"])
    return Work(
        steps,
        int(h["batch_size"]),
        importance_steps=steps if importance else 0,
        forward_examples=forward_examples,
        kept=kept_counts(task.sub_model.masks),
        optimizer_floats=1 if h["momentum"] else 0,
    )


def only_sgd(task: ClientTask) -> tuple[Work, ...]:
    """The `work` of methods whose clients do nothing else."""
    return (sgd_work(task),)
