"""Where a run may pause or end: when its state is saved, and what is said of one that was told to stop."""

from __future__ import annotations

from megadpo.launch.signals import WORDS, Stopped
from megadpo.training.console import log
from megadpo.training.run import Run


def save_where_due(run: Run, done: int, is_last: bool, is_best: bool = False) -> bool:
    """Save after every so many steps, at the run's end, whichever end that is, and after an evaluation that is the best;
    whether it was saved. Collective."""
    from megadpo.training.run_state import save

    options, ends = run.setup.config.checkpoint, is_last or run.stopping.agreed is not None
    if not is_best and not (options.every and done % options.every == 0) and not (options.at_end and ends):
        return False
    run.check_owner()
    run.progress.begin("saving")
    save(run, done)
    if ends:
        run.saver.finish()
    run.stopping.agree()  # a save may be long: no further step, and no second save, for a signal that came during it
    if run.stopping.agreed is not None:
        run.saver.finish()
    return run.saver.last_step == done or run.stopping.agreed is None


def stopped(run: Run, done: int, is_saved: bool) -> Stopped:
    """What ends a run before its last step, told to the user."""
    status, num_steps = run.stopping.agreed, run.setup.num_steps
    assert status is not None
    why = "its save failed" if run.setup.config.checkpoint.at_end else "checkpoint.at_end is false"
    what = "saved, and the same command goes on from there" if is_saved else f"not saved ({why})"
    log(f"{WORDS[status]} after step {done} of {num_steps}: {what}")
    return Stopped(status, is_told=True)
