"""LeRobot's processors around the policy: a batch axis and nothing else, since the policy normalises with its own statistics."""

from __future__ import annotations

from typing import Any

from lerobot.processor import AddBatchDimensionProcessorStep, PolicyAction, PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from .configuration_physis import PhysisConfig


def make_physis_pre_post_processors(
    config: PhysisConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """(of observations, of actions). ``dataset_stats`` are not used: what the policy was trained with lies in its folder."""
    before = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](
        steps=[AddBatchDimensionProcessorStep()], name=POLICY_PREPROCESSOR_DEFAULT_NAME
    )
    after = PolicyProcessorPipeline[PolicyAction, PolicyAction](
        steps=[], name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        to_transition=policy_action_to_transition, to_output=transition_to_policy_action,
    )  # fmt: skip
    return before, after
