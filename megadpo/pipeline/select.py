"""Which schedule brings micro-batches through the pipeline: Megatron's, or ours."""

from __future__ import annotations

from megadpo.config.schema import PipelineScheduleConfig
from megadpo.pipeline.base import PipelineSchedule
from megadpo.pipeline.interleaved_reference import InterleavedReference
from megadpo.pipeline.megatron_schedule import MegatronSchedule
from megadpo.pipeline.own_schedule import OwnSchedule


def pipeline_schedule(
    options: PipelineScheduleConfig | None = None, reference: InterleavedReference | None = None
) -> PipelineSchedule:
    """The schedule that the options name; None: the defaults.

    Args:
        reference: the reference whose forwards run among the policy's operations (`schedule.reference: interleaved`).
    """
    options = PipelineScheduleConfig() if options is None else options
    if options.name == "megatron":
        assert reference is None and not options.zero_bubble, "refused when the configuration is checked"
        return MegatronSchedule()
    return OwnSchedule(options.zero_bubble, reference)
