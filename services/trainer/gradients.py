"""From the rows of a step to its gradient: forward, loss and backward, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from services.trainer import matrices, memory, student
from services.trainer.batches import MicroBatch, collate
from services.trainer.data import Row, micro_batches
from services.trainer.head import learn_head
from services.trainer.losses import Divergence, Targets, WholeTargets
from stillhouse.chassis.crash import crash_point
from stillhouse.contracts.spec import Training
from stillhouse.contracts.trainings import Plan


@dataclass(frozen=True)
class Passes:
    """How rows go through a student by the plan of its training. `teacher` holds weights where the
    loss compares whole distributions. The plan's dtype is that of the layers, never of the logits.
    A pass that would take more memory than there is computes its layers twice."""

    training: Training
    device: torch.device
    plan: Plan
    teacher: Any = None

    def gradient(
        self, model: Any, rows: Sequence[Row], *, between: Callable[[], None] = lambda: None
    ) -> float:
        """Add the gradient of the rows' mean loss to the parameters; return that mean.

        `between` is called after each micro-batch.
        """
        matrices.use(self.plan.environment.matrices)
        head = student.output_layer(model).weight
        total, tokens = 0.0, sum(row.supervised for row in rows)
        for batch in self._batches(rows):
            words = self._words(model, batch)
            hidden = self._predicting(model, batch, words)
            loss, d_hidden = learn_head(hidden, head, self._targets(batch), scale=1 / tokens)
            crash_point("trainer.forward")
            hidden.backward(d_hidden)
            self._learn_words(model, batch, words)
            crash_point("trainer.backward")
            total += float(loss)
            between()
        return total

    def _batches(self, rows: Sequence[Row]) -> Iterator[MicroBatch]:
        """The next one is put together while the one before is computed with, and no more: targets
        are far larger than rows, and a step has as many tokens as its spec says."""
        parts = micro_batches(rows, self.plan.micro_batch_tokens)
        with ThreadPoolExecutor(1, thread_name_prefix="collate") as beside:

            def start(part: Sequence[Row]) -> Future[MicroBatch]:
                return beside.submit(collate, part, self.training.loss, self.device)

            coming = start(parts[0])
            for part in parts[1:]:
                ready = coming.result()
                coming = start(part)
                yield ready
            yield coming.result()

    def _words(self, model: Any, batch: MicroBatch) -> Tensor:
        """The embeddings of the ids, cut off from the matrix: autograd would make a gradient of
        its size for each micro-batch."""
        matrix = model.get_input_embeddings().weight
        return embedding(batch.input_ids, matrix.detach()).requires_grad_(matrix.requires_grad)

    def _learn_words(self, model: Any, batch: MicroBatch, words: Tensor) -> None:
        matrix = model.get_input_embeddings().weight
        if words.grad is None:
            return
        if matrix.grad is None:
            matrix.grad = torch.zeros_like(matrix)
        matrix.grad.index_add_(0, batch.input_ids[0], words.grad[0])

    def _predicting(self, model: Any, batch: MicroBatch, words: Tensor) -> Tensor:
        """The hidden states [N, H] from which the targets are predicted, in the dtype of the
        weights: logits in bfloat16 would be wrong in the second digit."""
        narrow = self.plan.environment.dtype == "bfloat16"
        tight = self.plan.activation_bytes * words.shape[1] > memory.available(self.device)
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=narrow),
            student.computed_twice(model, tight and words.requires_grad),
        ):
            hidden = model.model(
                inputs_embeds=words,
                position_ids=batch.position_ids,
                documents=batch.documents,
                use_cache=False,
            ).last_hidden_state
        return hidden.flatten(0, 1)[batch.predictors].to(words.dtype)

    def _targets(self, batch: MicroBatch) -> Targets:
        if self.teacher is None:
            return batch.targets
        said = self.training
        assert said.loss != "sft", "the spec refuses it with `distribution: weights`"
        divergence = Divergence(said.loss, beta=said.beta or 0.0, alpha=said.alpha)
        with torch.no_grad():
            hidden = self._predicting(self.teacher, batch, self._words(self.teacher, batch))
        return WholeTargets(hidden, student.output_layer(self.teacher).weight, divergence)
