"""Actions as a condition of the denoiser: each latent frame's drive targets are added to the time embedding of its tokens.

A text model becomes an action model by adding this module: its last layer starts at zero, so that the velocity is bit-equal to the
text model's until something was learned. What is added changes the modulation of every block and of the output, as a timestep does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from physisforcing.core.types import ActionSpec

#: The 14 drive targets, in the order of docs/architecture.md.
JOINTS = tuple(
    f"{side}_{joint}" for side in ("left", "right") for joint in (*(f"joint_{k}" for k in range(1, 7)), "gripper")
)


@dataclass(slots=True, kw_only=True)
class ActionConfig:
    """``names``: what the numbers of an action are. ``rows``: control steps that lead up to a latent frame's pictures: 4 pictures at
    stride 2. ``hidden``: width of the network."""

    names: tuple[str, ...] = JOINTS
    rows: int = 8
    hidden: int = 160


class ActionConditioner(nn.Module):
    """Drive targets of the next P control steps -> what is added to the time embedding of each latent frame.

    Latent frame k is given the ``rows`` targets on the way to its pictures, actions ``rows (k - 1) .. rows k - 1``, as differences
    from the present targets, and the present targets themselves; both standardised with stored statistics of the training windows.
    Latent frame 0 is the present: nothing leads up to it and nothing is added.
    """

    present_mean: Tensor
    present_std: Tensor
    difference_std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, config: ActionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        dim = len(config.names)
        for name, value in (("present_mean", 0.0), ("present_std", 1.0), ("difference_std", 1.0)):
            self.register_buffer(name, torch.full((dim,), value))
        # the range of the training windows' actions, for the specification
        self.register_buffer("low", torch.full((dim,), -torch.pi))
        self.register_buffer("high", torch.full((dim,), torch.pi))
        self.net = nn.Sequential(
            nn.Linear((config.rows + 1) * dim, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
        )
        self.project = nn.Linear(config.hidden, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def set_statistics(self, actions_WPA: Tensor, present_WA: Tensor) -> None:
        """Standardise with the statistics of training windows; joints that never move keep scale 1."""
        self.present_mean.copy_(present_WA.mean(0))
        difference = (actions_WPA - present_WA[:, None]).flatten(0, 1)
        for buffer, values in ((self.present_std, present_WA), (self.difference_std, difference)):
            spread = values.std(0)
            buffer.copy_(torch.where(spread > 1e-4, spread, torch.ones_like(spread)))
        every = torch.cat([actions_WPA.flatten(0, 1), present_WA])
        self.low.copy_(every.amin(0))
        self.high.copy_(every.amax(0))

    @property
    def spec(self) -> ActionSpec:
        """Names, and the range that the training windows covered (not the robot's limits)."""
        return ActionSpec(names=self.config.names, low=tuple(self.low.tolist()), high=tuple(self.high.tolist()))

    def forward(self, actions_BPA: Tensor, present_BA: Tensor) -> Tensor:
        """Drive targets (radians; grippers 0..1) of the next P = rows (F - 1) control steps and of now -> [B,F,width]."""
        assert actions_BPA.shape[1] % self.config.rows == 0, (
            f"{actions_BPA.shape[1]} rows, not {self.config.rows} a frame"
        )
        difference = (actions_BPA - present_BA[:, None]) / self.difference_std
        blocks = difference.unflatten(1, (-1, self.config.rows)).flatten(2)
        present = ((present_BA - self.present_mean) / self.present_std)[:, None].expand(-1, blocks.shape[1], -1)
        added = self.project(self.net(torch.cat([blocks, present], dim=2)))
        return torch.cat([torch.zeros_like(added[:, :1]), added], dim=1)
