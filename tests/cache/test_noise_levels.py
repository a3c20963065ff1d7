"""Variance-preserving noise schedules in the angle of the noise, against DDIM written out."""

import math

import pytest

from xfuser_adacorr.model_executor.cache.noise_levels import (
    followed,
    fractional_index,
    noise_angle,
    velocity_weights,
)


def test_followed_is_the_derivative_of_ddims_step_by_the_output():
    """DDIM written out; relative to the latents' scale before the step."""
    alpha, alpha_next = 0.3, 0.55
    ends = {}
    for prediction in ("epsilon", "sample", "v_prediction"):

        def step(output, prediction=prediction, x=0.7):
            root, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
            x0 = {
                "epsilon": (x - noise * output) / root,
                "sample": output,
                "v_prediction": root * x - noise * output,
            }[prediction]
            eps = (x - root * x0) / noise
            return math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next) * eps

        ends[prediction] = abs(step(1.0) - step(0.0))
    angle, following = noise_angle(alpha), noise_angle(alpha_next)
    scale = math.cos(following) / math.cos(angle)  # from the scale after the step
    for prediction in ("epsilon", "sample"):
        assert followed(prediction, angle, following) * scale == pytest.approx(ends[prediction])
    assert math.sin(followed("v_prediction", angle, following)) == pytest.approx(
        ends["v_prediction"]
    )
    level, level_next = math.tan(angle), math.tan(following)
    assert followed("epsilon", angle, following) == pytest.approx(
        abs(level_next - level) / math.sqrt(1 + level**2)
    )


@pytest.mark.parametrize("angle", [0.01, 0.7, 1.56])
def test_velocity_weights_give_noise_minus_picture(angle):
    x0, noise = 0.7, -1.3
    latents = math.cos(angle) * x0 + math.sin(angle) * noise
    outputs = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": math.cos(angle) * noise - math.sin(angle) * x0,
    }
    for prediction, output in outputs.items():
        p, q = velocity_weights(prediction, angle)
        assert p * output + q * latents == pytest.approx(noise - x0)


def test_followed_is_finite_at_zero_terminal_snr():
    assert followed("v_prediction", noise_angle(0.0), noise_angle(0.1)) < math.pi / 2
    assert followed("epsilon", noise_angle(0.0), noise_angle(0.1)) == pytest.approx(1.0)


def test_fractional_index_interpolates_and_goes_on_outside():
    table = [0.0, 1.0, 3.0]
    assert [fractional_index(table, v) for v in (0.0, 0.5, 2.0, 3.0, 5.0, -1.0)] == [
        *(0.0, 0.5, 1.5, 2.0, 3.0, -1.0)
    ]
