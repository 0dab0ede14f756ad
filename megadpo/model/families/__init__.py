"""Model families: Hugging Face config and names <-> the model's shape and Megatron's names. One file a family."""

from megadpo.model.families.check import check_tensors, mtp_names, tensor_problems
from megadpo.model.families.common import HEAD, SCORE, ExpertPlace, Family, ParameterShard, ShardPiece, TensorSource
from megadpo.model.families.heads import head_of, head_settings, tying_settings, untied, with_reward_head
from megadpo.model.families.registry import FAMILIES, family_of
from megadpo.model.families.shape import shape_of
from megadpo.model.families.shards import is_correction_bias, logical_shapes, names_in, parameter_shapes, shard_parameters

__all__ = [
    "FAMILIES",
    "HEAD",
    "SCORE",
    "ExpertPlace",
    "Family",
    "ParameterShard",
    "ShardPiece",
    "TensorSource",
    "check_tensors",
    "family_of",
    "head_of",
    "head_settings",
    "is_correction_bias",
    "logical_shapes",
    "mtp_names",
    "names_in",
    "parameter_shapes",
    "shape_of",
    "shard_parameters",
    "tensor_problems",
    "tying_settings",
    "untied",
    "with_reward_head",
]
