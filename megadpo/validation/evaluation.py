"""Options of the evaluation in the step loop: what is evaluated, by which metric the best model is chosen, when it ends."""

from __future__ import annotations

from collections.abc import Iterable

from megadpo.config import strict
from megadpo.config.schema import Config
from megadpo.config.sources import eval_prefix, eval_sets
from megadpo.errors import UserError
from megadpo.metrics.best import Best

LESS_IS_BETTER = ("loss",)
MORE_IS_BETTER = ("accuracies", "accuracy", "margins")
"""Endings of metrics' names."""


def check_evaluation(config: Config) -> None:
    """Refuse options of `eval` that contradict each other, or that nothing reads.

    Raises:
        UserError: naming the option.
    """
    options = config.eval
    for name in ("every", "pairs", "at_start", "best_metric", "patience"):
        value = getattr(options, name)
        if config.data.eval is None and (value or value == ""):
            raise UserError(f"eval.{name} is set, but there is nothing to evaluate on; set data.eval as well")
    if options.best_metric is None:
        defaults = type(options)()
        for name in ("patience", "best_direction", "min_improvement"):
            if getattr(options, name) != getattr(defaults, name):
                raise UserError(
                    f"eval.{name} is read with eval.best_metric, which is null; name a metric there (eval_loss) or remove it"
                )
        return
    if not options.best_metric.strip():
        raise UserError("eval.best_metric is empty; name a metric of the evaluation (eval_loss), or null for none")
    if not options.every:
        raise UserError(
            "eval.best_metric chooses among evaluations, but eval.every is 0, so that the one after the last step is all "
            "there is; set eval.every"
        )
    if options.min_improvement and options.patience is None:
        raise UserError("eval.min_improvement is read with eval.patience, which is null; set that too or remove it")


def metrics_of_evaluation(config: Config) -> list[str]:
    """The names of all metrics that an evaluation gives, but for a user's own."""
    from megadpo.objectives.objective import metric_names  # needs torch, which reading options does not

    names = [*metric_names(config.objective)]
    names += ["rewards/margins"] if "rewards/rejected" in names and "rewards/margins" not in names else []
    return [eval_prefix(one) + name for one in eval_sets(config.data.eval) for name in (*names, "seconds")]


def check_best_metric(config: Config, own: Iterable[str] = ()) -> None:
    """Refuse a metric that no evaluation gives, or of which it is not known what is better.

    Args:
        own: names that a user's own function has given.

    Raises:
        UserError: with the names that there are.
    """
    if config.eval.best_metric is None:
        return
    metric, known = full_name(config.eval.best_metric), [*metrics_of_evaluation(config), *own]
    if metric in known:
        best_of(config)
        return
    guess = strict.closest(metric, known)
    meant = f" (did you mean {guess}?)" if guess else ""
    raise UserError(f"eval.best_metric: the evaluation gives no {metric}{meant}; it gives {', '.join(known)}")


def full_name(metric: str) -> str:
    """As it is in metrics.jsonl: with `eval_` before it."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def best_of(config: Config) -> Best:
    """What looks for the best evaluation, with nothing found yet.

    Raises:
        UserError: whether more or less of the metric is better is not known.
    """
    options = config.eval
    if options.best_metric is None:
        return Best()
    metric, direction = full_name(options.best_metric), options.best_direction
    if direction == "auto" and metric.endswith(LESS_IS_BETTER):
        direction = "min"
    elif direction == "auto" and metric.endswith(MORE_IS_BETTER):
        direction = "max"
    elif direction == "auto":
        raise UserError(f"eval.best_direction is auto, but what is better of {metric} is not known; set it to min or max")
    return Best(metric, direction == "max", options.patience, options.min_improvement)
