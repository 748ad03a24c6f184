from dataclasses import replace

import pytest

from model.training.presets import PRESETS, RECIPES, Phase, Rates, Recipe, TrainConfig, rate_factor


def test_the_first_stage_has_the_papers_numbers() -> None:
    stage = PRESETS["stage1"]
    assert (stage.steps, stage.size, stage.batch_size) == (200_000, 480, 8)
    assert stage.rates == Rates(motion=1e-4, attention=1e-5, backbone=1e-6)
    assert stage.videos == (("youtube_vos", 1), ("davis16", 1))
    assert stage.images == ()


def test_the_second_stage_has_the_papers_numbers() -> None:
    stage = PRESETS["stage2"]
    assert (stage.steps, stage.size, stage.batch_size) == (155_000, 480, 8)
    assert stage.rates == Rates(motion=1e-5, attention=1e-6, backbone=1e-7)
    assert (stage.videos, stage.images) == ((("davis16", 1),), (("duts", 1),))
    assert stage.image_batches is None  # as many as the released code takes


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_where_the_paper_is_silent_its_stages_follow_the_released_code(name: str) -> None:
    stage = PRESETS[name]
    assert (stage.betas, stage.schedule) == ((0.9, 0.99), "halving")


def test_halving_rates_are_halved_at_35_and_at_75_percent() -> None:
    factors = [rate_factor("halving", step, 200) for step in (0, 69, 70, 149, 150, 199)]
    assert factors == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_cosine_rates_rise_over_two_percent_and_fall_to_nothing() -> None:
    factors = [rate_factor("cosine", step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 21)
    assert factors[:20] == sorted(factors[:20])
    assert factors[20] == 1
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[510] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("schedule", ["halving", "cosine"])
def test_no_rate_is_ever_zero_or_above_its_peak(schedule: str, steps: int) -> None:
    assert all(0 < rate_factor(schedule, step, steps) <= 1 for step in range(steps))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("save_every", 0),
        ("validate_every", -1),
        ("size", 100),
        ("size", 0),
        ("seed", -1),
        ("precision", "float64"),
    ],
)
def test_a_value_that_cannot_be_trained_with_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .* got {value!r}"):
        replace(PRESETS["stage1"], **{field: value})


def test_a_configuration_can_be_changed_without_changing_the_preset() -> None:
    changed = replace(PRESETS["stage2"], steps=10)
    assert isinstance(changed, TrainConfig)
    assert PRESETS["stage2"].steps == 155_000


# -- recipes ---------------------------------------------------------------------------------------------

SHIPPED = RECIPES["shipped"]


def test_the_shipped_recipe_goes_from_stills_to_everything() -> None:
    stills, trunk, motion, joint = SHIPPED.phases
    assert [phase.name for phase in SHIPPED.phases] == ["stills", "trunk", "motion", "joint"]
    assert (stills.windows, trunk.windows, motion.images) == ((), (), ())
    assert joint.windows
    assert joint.images
    assert max(stills.sizes) <= min(trunk.sizes)
    assert not any(prefix.startswith(("backbone", "propagation")) for prefix in motion.trained)


def test_no_phase_draws_the_samples_of_another() -> None:
    assert len({phase.seed for phase in SHIPPED.phases}) == len(SHIPPED.phases)


def test_the_data_must_serve_the_largest_size_of_samples() -> None:
    assert SHIPPED.largest_size == 384


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sizes": (100,)}, "multiple of 32, got 100"),
        ({"sizes": ()}, "phase joint needs a size"),
        ({"validation_size": 16}, "multiple of 32, got 16"),
        ({"cue_dropout": 1.5}, r"cue_dropout must be within \[0, 1\], got 1.5"),
        ({"windows": ()}, "takes 2 windows a step from 0 sources"),
        ({"stills_per_step": 0}, "takes 0 images a step from 6 sources"),
        ({"windows_per_step": 0, "stills_per_step": 0}, "windows or stills in every step"),
        ({"side_stride": 0}, "side_stride must be at least 1, got 0"),
    ],
)
def test_a_phase_that_cannot_be_trained_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(SHIPPED.phases[-1], **changes)  # type: ignore[arg-type]


def test_phases_of_a_recipe_have_different_names() -> None:
    phase: Phase = SHIPPED.phases[0]
    with pytest.raises(ValueError, match="different names, got stills, stills"):
        Recipe(SHIPPED.network, (phase, phase))
    with pytest.raises(ValueError, match="got none"):
        Recipe(SHIPPED.network, ())
