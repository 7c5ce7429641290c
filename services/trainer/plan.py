"""What a training settles before its first step, and what follows from it without looking back.

`plan.json` is written once, before step 0; whoever goes on with the training uses it, so that a
resumed or repeated training does not depend on where it runs. The learning rate depends on the
number of the step and on the step at which the decay began, never on how much data will come.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from services.trainer import matrices, memory
from services.trainer.probe import Suited
from services.trainer.settings import TrainerSettings
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.spec import Training
from stillhouse.contracts.trainings import Environment, Plan


def decay_steps(training: Training, steps_so_far: int) -> int:
    """Steps of the decay pass: a share of the steps before it, rounded up."""
    return math.ceil(training.decay * steps_so_far)


def learning_rate(training: Training, step: int, decay_from: int | None) -> float:
    """Rate of a step (counted from 1): linear warm-up, then stable, then linear towards zero.

    With D = `decay_from` steps done when the decay began and n = decay_steps(D), decay step
    j = 1..n has rate(D) x (n + 1 - j) / (n + 1): the step after the last one would have zero.
    """
    if decay_from is not None and step > decay_from:
        total = decay_steps(training, decay_from)
        left = (total + 1 - (step - decay_from)) / (total + 1)
        return learning_rate(training, max(decay_from, 1), None) * max(left, 0.0)
    if training.warmup_steps == 0:
        return training.learning_rate
    return training.learning_rate * min(1.0, step / training.warmup_steps)


def set_up_torch(settings: TrainerSettings) -> torch.device:
    """Fix what the bits depend on; return the device."""
    wanted = settings.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PermanentError(
            "TRAINER_DEVICE is cuda and torch finds no GPU: install a CUDA build of torch and the "
            "driver, or set TRAINER_DEVICE=cpu",
            reason="settings",
        )
    memory.keep()
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    # It would fill each new tensor with NaN, a tenth of a step: nothing here reads what it did not
    # write, and a test trains with the filling and without.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(wanted)


def environment(device: torch.device, settings: TrainerSettings) -> Environment:
    """Record what the bits depend on; `dtype` is that of new trainings, unless the probe finds
    another."""
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return Environment(
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=dtype,
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        matrices=matrices.here() if device.type == "cpu" else matrices.NATIVE,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        code=version("stillhouse"),
    )


def as_planned(here: Environment, plan: Plan) -> Environment:
    """This process's environment for a training: what the plan chose, where it can be had."""
    planned = plan.environment
    able = planned.matrices == matrices.NATIVE or matrices.usable()
    return here.model_copy(
        update={
            "dtype": planned.dtype,
            "matrices": planned.matrices if able else matrices.NATIVE,
        }
    )


def find_plan(store: ObjectStore, tenant: str, training: str) -> Plan | None:
    found = store.find_model(artifacts.plan_key(tenant, training), Plan)
    return found[0] if found else None


def settle_plan(
    store: ObjectStore,
    tenant: str,
    training: str,
    *,
    suited: Suited,
    here: Environment,
    layers_kept: list[int] | None,
    block_influence: list[float] | None,
) -> Plan:
    """Write the plan; where one is there already, that one holds."""
    plan = Plan(
        training_id=training,
        micro_batch_tokens=suited.micro_batch_tokens,
        activation_bytes=suited.activation_bytes,
        environment=here.model_copy(update={"dtype": suited.dtype}),
        layers_kept=layers_kept,
        block_influence=block_influence,
        started_at=datetime.now(UTC).isoformat(),
    )
    try:
        store.put_new_model(artifacts.plan_key(tenant, training), plan)
    except AlreadyExists:
        found = find_plan(store, tenant, training)
        assert found is not None, "a conditional write lost against nothing"
        return found
    return plan
