"""GLM-4-0414 and GLM-Z1 (9B, 32B): the earlier GLM-4 with norms behind attention and MLP, too."""

from __future__ import annotations

from functools import partial

from sft.models.families.glm import SMALL_GLM, read_glm
from sft.models.family import Family

FAMILY = Family(
    model_type="glm4",
    read=partial(read_glm, norm_after=True),
    small_config=SMALL_GLM,
    variants={"unbiased": {"attention_bias": False, "partial_rotary_factor": 0.75}},
)
