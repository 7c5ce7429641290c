"""Learning rate, length of the decay, times and settings."""

from __future__ import annotations

import pytest

from services.trainer.plan import decay_steps, learning_rate
from services.trainer.settings import TrainerSettings
from services.trainer.timeouts import TIMES, TrainerTimes
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.leases import LeaseTimes
from stillhouse.chassis.settings import SettingsError, load
from stillhouse.contracts.spec import Training

TRAINING = Training(learning_rate=1.0, warmup_steps=4, decay=0.25)


def test_the_rate_warms_up_and_then_stays() -> None:
    rates = [learning_rate(TRAINING, step, None) for step in range(1, 8)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(Training(learning_rate=0.5, warmup_steps=0), 1, None) == 0.5


def test_the_decay_falls_in_equal_steps_and_would_end_at_zero() -> None:
    assert decay_steps(TRAINING, 14) == 4
    rates = [learning_rate(TRAINING, step, 14) for step in range(14, 20)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_a_decay_that_begins_in_the_warm_up_starts_from_the_rate_reached() -> None:
    assert learning_rate(TRAINING, 3, 2) == pytest.approx(0.5 * 1 / 2)


@pytest.mark.parametrize(("share", "so_far", "steps"), [(0, 10, 0), (0.1, 1, 1), (0.1, 36, 4)])
def test_the_decay_is_a_share_rounded_up(share: float, so_far: int, steps: int) -> None:
    assert decay_steps(Training(decay=share), so_far) == steps


@pytest.mark.parametrize("profile", TIMES)
def test_the_profiles_times_fit_each_other(profile: str) -> None:
    TIMES[profile].check()


@pytest.mark.parametrize(
    "times",
    [
        TrainerTimes(poll=(1, 2), wait=1, segment=61, retry=1),
        TrainerTimes(poll=(1, 2), wait=1, segment=10, retry=1, lease=LeaseTimes(ttl=20, beat=8)),
    ],
)
def test_times_that_do_not_fit_are_refused(times: TrainerTimes) -> None:
    with pytest.raises(PermanentError, match="expected"):
        times.check()


def test_settings_replace_single_times_of_the_profile() -> None:
    settings = load(
        TrainerSettings,
        {
            "TRAINER_BROKER_URL": "redis://localhost",
            "TRAINER_PROFILE": "embedded",
            "TRAINER_WAIT_SECONDS": "7",
            "TRAINER_LEASE_TTL_SECONDS": "9",
            "TRAINER_FILE_ROOTS": "/a:/b",
        },
    )
    assert settings.times.wait == 7
    assert settings.times.segment == TIMES["embedded"].segment
    assert settings.times.lease.ttl == 9
    assert [str(root) for root in settings.file_roots] == ["/a", "/b"]


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(SettingsError, match="TRAINER_SEGMENT_SECOND"):
        load(
            TrainerSettings,
            {"TRAINER_BROKER_URL": "redis://localhost", "TRAINER_SEGMENT_SECOND": "1"},
        )
