"""Flow matching and its samplers against diffusers' schedulers and against closed forms."""

import math

import pytest
import torch

from helpers import relative_error
from sdv.schedule import FlowMatching, VPrediction, euler, unipc
from weights.wan import schedule_from

# scheduler/scheduler_config.json of Wan 2.2 TI2V-5B
CONFIG = {
    "_class_name": "UniPCMultistepScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 5.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
SHAPE = (3, 4, 2, 5, 6)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake_network(x: torch.Tensor, t: float) -> torch.Tensor:
    """Nonlinear in x and different at every t, so that a wrong order of anything shows."""
    return torch.tanh(1.5 * x + math.sin(t)) - 0.3 * x.roll(1, dims=-1) + 0.1 * math.cos(7 * t)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("shift", [5.0, 3.0, 1.0])
def test_unipc_trajectory_equals_diffusers(diffusers, steps, shift):
    theirs = diffusers.UniPCMultistepScheduler.from_config(CONFIG | {"flow_shift": shift})
    theirs.set_timesteps(steps)
    want, ours, x = [], [], normal(2)
    for t in theirs.timesteps:
        want.append((x, t.item()))
        x = theirs.step(fake_network(x, t.item()), t, x, return_dict=False)[0]

    def denoise(x, t, i):
        assert i == len(ours)
        ours.append((x, t))
        return fake_network(x, t)

    found = unipc(FlowMatching(shift=shift), denoise, normal(2), steps)
    assert [t for _, t in ours] == [t for _, t in want]
    assert max(relative_error(a, b) for (a, _), (b, _) in zip(ours, want, strict=True)) <= 1e-5
    assert relative_error(found, x) <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_euler_trajectory_equals_diffusers_on_wans_grid(diffusers, steps):
    """diffusers' own Euler grid shifts its end twice; Wan's is given to it instead."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    even = torch.linspace(1, 1 / 1000, steps + 1, dtype=torch.float64)[:-1]
    theirs.set_timesteps(sigmas=even.tolist())
    want, ours, x = [], [], normal(2)
    for t in theirs.timesteps:
        want.append((x, t.item()))
        x = theirs.step(fake_network(x, t.item()), t, x, return_dict=False)[0]

    def denoise(x, t, i):
        ours.append((x, t))
        return fake_network(x, want[i][1])

    assert relative_error(euler(FlowMatching(), denoise, normal(2), steps), x) <= 1e-5
    assert [t for _, t in ours] == pytest.approx([t for _, t in want], rel=1e-6)
    assert max(relative_error(a, b) for (a, _), (b, _) in zip(ours, want, strict=True)) <= 1e-5
    assert FlowMatching().timesteps(steps).tolist() == pytest.approx([t for _, t in ours])


def test_noising_equals_diffusers_and_the_target_is_its_derivative(diffusers):
    schedule, theirs = FlowMatching(), diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    x, noise = normal(0), normal(1)
    t = theirs.timesteps[[0, 400, 998]]
    x_t = schedule.add_noise(x, noise, t)
    assert relative_error(x_t, theirs.scale_noise(x, t, noise)) <= 1e-6
    x, noise, t = x.double(), noise.double(), t.double()
    slope = (schedule.add_noise(x, noise, t + 50) - schedule.add_noise(x, noise, t - 50)) * 10
    assert relative_error(slope, schedule.target(x, noise, t)) <= 1e-5


@pytest.mark.parametrize("sampler", [euler, unipc])
def test_a_perfect_network_leads_both_samplers_to_its_video(sampler):
    schedule, x = FlowMatching(), normal(4)

    def perfect(x_t, t, i):
        return (x_t - x) / (t / 1000)  # the flow whose clean video is x

    for steps in (1, 5, 50):
        # unipc calls at whole timesteps but steps between exact ones; the last differ by half a percent
        allowed = 1e-5 if sampler is euler else 0.01
        assert relative_error(sampler(schedule, perfect, normal(5), steps), x) <= allowed


def test_euler_is_of_first_order_and_unipc_of_a_higher_one():
    """For Gaussian videos the best prediction is linear: the samples should have the videos' deviation."""
    schedule, deviation = FlowMatching(shift=3.0), 0.5

    def best(x_t, t, i):
        s = t / 1000
        variance = (1 - s) ** 2 * deviation**2 + s**2
        return (s - (1 - s) * deviation**2) / variance * x_t  # E[noise - x | x_t]

    def error(sampler, steps):
        return abs(sampler(schedule, best, normal(6, (4, 4, 4, 64, 64)), steps).std().item() - deviation)

    assert 1.6 < error(euler, 20) / error(euler, 40) < 2.4
    assert error(unipc, 20) < 0.2 * error(euler, 20)


def test_training_times_are_uniform_or_shifted_and_come_from_the_generator():
    draws = {}
    for shift in (1.0, 5.0):
        schedule = FlowMatching(train_shift=shift)
        t = schedule.draw(100_000, torch.Generator().manual_seed(0))
        assert torch.equal(t, schedule.draw(100_000, torch.Generator().manual_seed(0)))
        assert t.dtype == torch.float32 and t.min() >= 0 and t.max() < 1000
        draws[shift] = t
    # the distribution of s -> 5 s / (1 + 4 s) has the quantile function of the shift itself
    for share in (0.1, 0.5, 0.9):
        assert draws[1.0].quantile(share).item() == pytest.approx(1000 * share, abs=8)
        assert draws[5.0].quantile(share).item() == pytest.approx(5000 * share / (1 + 4 * share), abs=12)


def test_whole_timesteps_are_shifted_alike_and_stay_in_range():
    even, shifted = (
        VPrediction(train_shift=shift).draw(100_000, torch.Generator().manual_seed(0)) for shift in (1.0, 5.0)
    )
    assert torch.equal(even, torch.randint(1000, (100_000,), generator=torch.Generator().manual_seed(0)))
    assert shifted.dtype == torch.int64 and 0 < shifted.min() < 10 and shifted.max() == 999
    assert shifted.double().quantile(0.5).item() == pytest.approx(5000 / 6, abs=5)


@pytest.mark.parametrize("sampler", [euler, unipc])
def test_samplers_work_in_fp32_whatever_the_network_returns(sampler):
    def half(x, t, i):
        assert x.dtype == torch.float32
        return fake_network(x, t).bfloat16()

    x = sampler(FlowMatching(), half, normal(2).bfloat16(), 10)
    assert x.dtype == torch.float32
    assert torch.equal(x, sampler(FlowMatching(), half, normal(2).bfloat16().float(), 10))


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        FlowMatching().timesteps(steps)


def test_the_published_config_is_the_default_and_an_euler_one_is_read_too():
    assert schedule_from(CONFIG) == FlowMatching()
    schedule = schedule_from({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert schedule == FlowMatching(shift=3.0, default_sampler="euler")
    assert schedule.samplers[schedule.default_sampler] is euler
