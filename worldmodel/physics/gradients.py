"""How much of the gradient at the tapped features each loss makes, measured during the ordinary backward pass.

Each loss reads the features through a view of its own, whose hook sees that loss's gradient alone; the hook of the features themselves
sees the sum with what comes back from the blocks above, which is flow matching. So nothing is computed twice, and it works
under activation checkpointing and sharding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Averages forget with this factor a step.
DECAY = 0.95
#: A weight set from gradients stays within this factor of the weight it started from.
RANGE = 100.0


class GradientMeter(nn.Module):
    """Norms of the gradients of (flow matching, pix, sem) at the features, and weights that keep their ratios.

    ``persistent``: the averages are part of the state dict (a run that sets its weights from them resumes with them).
    """

    norms_3: Tensor
    steps_3: Tensor
    average_3: Tensor

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self._seen: dict[str, Tensor] | None = None
        self.register_buffer("norms_3", torch.zeros(3), persistent=False)
        self.register_buffer("average_3", torch.zeros(3), persistent=persistent)
        self.register_buffer("steps_3", torch.zeros(3), persistent=persistent)

    def watch(self, hidden: Tensor, group: dist.ProcessGroup | None) -> None:
        """Measure the next backward pass at this tensor, which the blocks above read too."""
        seen: dict[str, Tensor] = {}
        self._seen = seen

        def total(gradient: Tensor) -> None:
            if "weights" not in seen:  # the losses were not asked in this pass
                return
            with torch.no_grad():
                parts = [seen.pop(name, torch.zeros_like(gradient)).float() for name in ("pix", "sem")]
                rest = gradient.float() - parts[0] - parts[1]
                squares_3 = torch.stack([part.square().sum() for part in (rest, *parts)])
                if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
                    dist.all_reduce(squares_3, group=group)
                self._note(squares_3.sqrt(), seen["weights"])

        hidden.register_hook(total)

    def split(self, hidden: Tensor, weights_2: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Two views of the features, one for each loss. ``weights_2``: those of the losses. Watches ``hidden`` itself unless
        another tensor is watched for this pass."""
        if self._seen is None:
            self.watch(hidden, group)
        seen, self._seen = self._seen, None
        assert seen is not None
        seen["weights"] = weights_2.detach().clone()
        views = hidden.view_as(hidden), hidden.view_as(hidden)
        for name, view in zip(("pix", "sem"), views, strict=True):
            view.register_hook(lambda gradient, name=name: seen.__setitem__(name, gradient))
        return views

    def _note(self, norms_3: Tensor, weights_2: Tensor) -> None:
        self.norms_3.copy_(norms_3)
        # Averages are of the losses without their weights; a batch without targets says nothing about them.
        bare_3 = norms_3 / torch.cat([torch.ones_like(weights_2[:1]), weights_2.clamp(min=1e-12)])
        # A step whose gradients overflowed is one that the trainer skips; it must not stay in the averages.
        told_3 = (norms_3 > 0) & norms_3.isfinite().all() & bare_3.isfinite()
        self.steps_3 += told_3.to(norms_3)
        moved_3 = self.average_3 + (1 - DECAY) * (bare_3 - self.average_3)
        self.average_3.copy_(torch.where(told_3, moved_3, self.average_3))

    def shares(self) -> dict[str, Tensor]:
        """Norm of each loss's weighted gradient over that of flow matching, at the last measured step."""
        flow = self.norms_3[0].clamp(min=1e-12)
        return {"share_pix": self.norms_3[1] / flow, "share_sem": self.norms_3[2] / flow}

    def weights(self, start_2: Tensor, ratios_2: Tensor) -> Tensor:
        """Weights [2] with which each loss has its ratio of the flow-matching gradient; ``start_2`` until both are known."""
        average_3 = self.average_3 / (1 - DECAY**self.steps_3).clamp(min=1e-12)
        wanted_2 = ratios_2 * average_3[0] / average_3[1:].clamp(min=1e-12)
        wanted_2 = torch.minimum(torch.maximum(wanted_2, start_2 / RANGE), start_2 * RANGE)
        return torch.where((self.steps_3[1:] > 0) & (self.steps_3[0] > 0), wanted_2, start_2)
