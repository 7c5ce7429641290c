"""The optimiser: fused AdamW, with clipping, and its state as named tensors.

Its state is saved as safetensors under the names of the parameters, so that a checkpoint can be
read without running anything and does not depend on the order of parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.spec import Training

BETAS = (0.9, 0.95)
EPSILON = 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over all parameters of a student; norms and biases are not decayed."""

    def __init__(self, model: nn.Module, training: Training) -> None:
        # Tied parameters are yielded once.
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._clip = training.clip_norm
        matrices = [p for p in self._named.values() if p.ndim >= 2]
        others = [p for p in self._named.values() if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": training.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=training.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )

    def clip(self) -> float:
        """Scale the gradients to the clipping norm at most; return their norm before."""
        return float(torch.nn.utils.clip_grad_norm_(list(self._named.values()), self._clip))

    def step(self, rate: float) -> None:
        """Step with this learning rate and forget the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The moments of every parameter; empty before the first step."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            for moment in _MOMENTS:
                if moment in self._adamw.state.get(parameter, {}):
                    found[f"{moment}.{name}"] = self._adamw.state[parameter][moment]
        return found

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Go on from a saved state after this many steps. Raises PermanentError when it is the
        state of another model."""
        expected = {f"{moment}.{name}" for name in self._named for moment in _MOMENTS}
        if tensors.keys() != expected:
            raise PermanentError(
                f"optimizer.safetensors: expected the moments of {len(self._named)} parameters, "
                f"found {len(tensors)} tensors that do not fit: "
                f"{sorted(tensors.keys() ^ expected)[:3]}",
                reason="checkpoint_unreadable",
            )
        for name, parameter in self._named.items():
            state = self._adamw.state[parameter]
            state["step"] = torch.tensor(float(steps), device=parameter.device)
            for moment in _MOMENTS:
                value = tensors[f"{moment}.{name}"]
                if value.shape != parameter.shape:
                    raise PermanentError(
                        f"optimizer.safetensors: {moment}.{name} has shape {tuple(value.shape)}, "
                        f"expected {tuple(parameter.shape)}",
                        reason="checkpoint_unreadable",
                    )
                state[moment] = value.to(parameter.device).clone()
