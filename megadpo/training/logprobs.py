"""`megadpo logprobs`: sequence log-probs of a data set's pairs under one model, a JSON line a pair."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from megadpo.config.schema import Config
from megadpo.data.groups import TokenIds
from megadpo.data.rows.dataset import prepare_groups
from megadpo.errors import UserError
from megadpo.files import is_special, replacing, require_new_file
from megadpo.parallel.layout import choose_layout
from megadpo.parallel.world import joined_world, rank, world_size
from megadpo.platform.device import compute_device, resolve_dtype
from megadpo.platform.hub import fetched
from megadpo.training.console import log
from megadpo.training.models import check_modules, open_model
from megadpo.training.setup import check_token_ids, scoring_packing
from megadpo.validation.layout import check_layout
from megadpo.validation.model import check_linear_attention

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_logprobs(model: str, data: str, out: str, config: Config, force: bool = False) -> Path:
    """Write `out`: index, chosen_logp, rejected_logp, chosen_tokens, rejected_tokens of each pair, in the data's order.

    Args:
        model: a Hugging Face directory or one of our checkpoints.
        data: whatever `data.train` accepts.
        out: a file that is not there yet; a device or a pipe is written to as it is.
        config: layout, data options and dtype; `reference.tokens_per_micro_batch` sets the micro-batches.
        force: replace `out` where it is a file.

    Raises:
        UserError: whatever cannot work, before anything is written.
    """
    path = require_new_file(Path(out), "--out", force)
    layout = choose_layout(config.parallel, world_size())
    files = open_model(fetched(model, "--model"), "--model", config)
    check_layout(layout, files.shape)
    check_modules(config, files.shape)
    check_linear_attention(config, files.shape)
    prepared = prepare_groups(config.data, data, str(files.huggingface))
    groups = prepared.groups
    for line in (prepared.report.sentence(), *prepared.report.remarks()):
        log(f"data: {line}")
    check_token_ids(groups, files)
    packing = scoring_packing(config, groups, layout, files.shape)
    with joined_world(layout, config.train.seed), contextlib.ExitStack() as stack:
        from megadpo.model.heads.kernels import choose_kernels
        from megadpo.training.reference import frozen_stage
        from megadpo.training.score import response_logps

        choose_kernels(config.model.kernels, compute_device())
        dtype = resolve_dtype(config.model.dtype)
        stage = frozen_stage(files.shape, layout, dtype, files.source, config.model)
        lines = stack.enter_context(_writing(path)) if rank() == 0 else None
        for group_ids, logps_R in response_logps(stage, packing):
            for group_id, logps_K in zip(group_ids, logps_R.reshape(-1, 2).tolist(), strict=True):
                if lines is not None:
                    lines.write(json.dumps(_line(int(groups.rows[group_id]), logps_K, groups[group_id].responses)) + "\n")
    return Path(out)


def _line(row: int, logps_K: Sequence[float], responses: Sequence[TokenIds]) -> dict[str, float]:
    (chosen_logp, rejected_logp), (chosen, rejected) = logps_K, responses
    return {
        "index": row,
        "chosen_logp": float(chosen_logp),
        "rejected_logp": float(rejected_logp),
        "chosen_tokens": len(chosen),
        "rejected_tokens": len(rejected),
    }


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[IO[str]]:
    """The file to write; it is there whole or not at all. A device or a pipe gets its lines as they come."""
    try:
        if is_special(path):
            with path.open("w", encoding="utf-8") as lines:
                yield lines
            return
        with replacing(path) as partial, partial.open("x", encoding="utf-8") as lines:
            yield lines
            lines.flush()
            os.fsync(lines.fileno())
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror or error}") from error
