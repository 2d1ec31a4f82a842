"""Settings of a policy inside a world model, and of its judge; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from physisforcing.core.errors import UserError, check_at_least, unknown_name

from .judge_openai import OpenAIJudgeConfig

JUDGES = ("openai", "replay", "scripted", "none")
CONDITIONINGS = ("actions", "text")
REMAINDERS = ("drop", "keep")


@dataclass(slots=True, kw_only=True)
class PolicyInModelConfig:
    """``conditioning``: ``actions`` (the model follows the commands) or ``text`` (it follows the sentence, and the commands reach it only
    as the joint targets that its next rollout starts from). ``length_scale``: length of the video over the demonstration's.
    ``remainder``: rows of a chunk too short for the model: ``drop`` them and look again, as theirs, or ``keep`` them in the queue, for
    policies that play a recording. ``seed``: of this evaluation; all policies meet the same noise."""

    conditioning: str = "actions"
    length_scale: float = 1.2
    remainder: str = "drop"
    seed: int = 0

    def check(self) -> None:
        """``UserError`` for unknown words and lengths."""
        if self.conditioning not in CONDITIONINGS:
            raise unknown_name("conditioning", self.conditioning, CONDITIONINGS, see="docs/worldarena.md")
        if self.remainder not in REMAINDERS:
            raise unknown_name("remainder", self.remainder, REMAINDERS, see="docs/worldarena.md")
        if not 0 < self.length_scale <= 10:
            raise UserError("length_scale", got=self.length_scale, wanted="above 0, at most 10", fix="length_scale=1.2")


@dataclass(slots=True, kw_only=True)
class JudgeSettings(OpenAIJudgeConfig):
    """Which judge; the fields of ``OpenAIJudgeConfig`` belong to ``openai`` and ``replay``. ``frames``: pictures of either video that it
    sees. ``log``: file that ``openai`` writes and ``replay`` reads (empty: judge_log.jsonl of the output). ``rule``: of ``scripted``."""

    kind: str = "openai"
    frames: int = 5
    log: str = ""
    rule: str = ""

    def check_kind(self) -> None:
        """``UserError`` for an unknown judge; its own settings are checked when it is made."""
        if self.kind not in JUDGES:
            raise unknown_name("judge.kind", self.kind, JUDGES, see="physis eval evaluator --help")
        check_at_least(self, frames=1)
