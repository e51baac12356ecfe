"""Noise and samplers against diffusers' CogVideoX schedulers and against closed forms."""

import math

import pytest
import torch

from helpers import relative_error
from sdv.schedule import VPrediction, ddim, dpm, guidance
from weights.cogvideox import schedule_from
from weights.tiny import SCHEDULER

# scheduler/scheduler_config.json of CogVideoX-5B
CONFIG = SCHEDULER | {"clip_sample": False}
SHAPE = (3, 4, 2, 5, 6)
RNGS = [torch.Generator() for _ in range(SHAPE[0])]


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake_network(x: torch.Tensor, t: int) -> torch.Tensor:
    """Nonlinear in x and different at every t, so that a wrong order of anything shows."""
    return torch.tanh(1.5 * x + math.sin(t)) - 0.3 * x.roll(1, dims=-1) + 0.1 * math.cos(7 * t)


@pytest.fixture(params=[{}, {"snr_shift_scale": 3.0}, {"rescale_betas_zero_snr": False}], ids=str)
def config(request):
    return CONFIG | request.param


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


def test_noising_and_velocity_equal_diffusers(diffusers, config):
    ours, theirs = schedule_from(config), diffusers.CogVideoXDDIMScheduler.from_config(config)
    x, noise = normal(0), normal(1)
    for t in ([0, 1, 500], [37, 998, 999]):
        t = torch.tensor(t)
        assert relative_error(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t)) <= 1e-5
        assert relative_error(ours.target(x, noise, t), theirs.get_velocity(x, noise, t)) <= 1e-5


def test_timesteps_equal_diffusers_for_every_number_of_steps(diffusers):
    ours, theirs = schedule_from(CONFIG), diffusers.CogVideoXDDIMScheduler.from_config(CONFIG)
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        # For 61 and some others diffusers appends a step at t = -1.
        assert ours.timesteps(steps).tolist() == theirs.timesteps[:steps].tolist()


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_trajectory_equals_diffusers(diffusers, config, steps):
    theirs = diffusers.CogVideoXDDIMScheduler.from_config(config)
    theirs.set_timesteps(steps)
    ours, want = [], []
    x = normal(2)
    for t in theirs.timesteps:
        want.append(x)
        x = theirs.step(fake_network(x, t.item()), t, x, return_dict=False)[0]

    def denoise(x, t, i):
        assert i == len(ours)
        ours.append(x)
        return fake_network(x, t)

    assert relative_error(ddim(schedule_from(config), denoise, normal(2), steps), x) <= 1e-5
    assert len(ours) == len(want) == steps
    assert max(map(relative_error, ours, want)) <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_dpm_trajectory_equals_diffusers_from_the_same_generator(diffusers, config, steps):
    theirs = diffusers.CogVideoXDPMScheduler.from_config(config)
    theirs.set_timesteps(steps)
    ours, want, x0 = [], [], None
    x, rngs = normal(2), [torch.Generator().manual_seed(3 + i) for i in range(SHAPE[0])]
    for t, before in zip(theirs.timesteps, [None, *theirs.timesteps], strict=False):
        want.append(x)
        x, x0 = theirs.step(fake_network(x, t.item()), x0, t, before, x, generator=rngs)

    def denoise(x, t, i):
        ours.append(x)
        return fake_network(x, t)

    rngs = [torch.Generator().manual_seed(3 + i) for i in range(SHAPE[0])]
    assert relative_error(dpm(schedule_from(config), denoise, normal(2), steps, rngs), x) <= 1e-5
    assert len(ours) == len(want) == steps
    assert max(map(relative_error, ours, want)) <= 1e-5


def test_the_last_timestep_is_pure_noise_and_its_velocity_is_minus_the_video():
    schedule = VPrediction()
    x, noise = normal(0), normal(1)
    t = torch.full((3,), 999)
    assert schedule.timesteps(50)[0] == 999
    assert torch.equal(schedule.add_noise(x, noise, t), noise)
    assert torch.equal(schedule.target(x, noise, t), -x)
    assert torch.equal(schedule.to_x0(noise, -x, t), x)


def test_each_sample_has_its_own_timestep_and_the_true_velocity_gives_the_clean_video_back():
    schedule = VPrediction()
    x, noise, t = normal(0).double(), normal(1).double(), torch.tensor([0, 400, 999])
    x_t, v = schedule.add_noise(x, noise, t), schedule.target(x, noise, t)
    assert relative_error(schedule.to_x0(x_t, v, t), x) <= 1e-6
    alone = schedule.add_noise(x[1:2], noise[1:2], t[1:2])
    assert torch.equal(x_t[1:2], alone)


def test_the_papers_weighted_loss_on_x0_is_the_plain_mse_on_velocity():
    schedule, t = VPrediction(), torch.tensor([3, 400, 999])
    x, noise, pred = (normal(seed).double() for seed in (0, 1, 2))
    x_t = schedule.add_noise(x, noise, t)
    weight = 1 / (1 - schedule.abar[t])
    papers = weight * (schedule.to_x0(x_t, pred, t) - x).square().mean(dim=(1, 2, 3, 4))
    plain = (pred - schedule.target(x, noise, t)).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(papers, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampler", [ddim, dpm])
def test_a_perfect_network_leads_every_sampler_to_its_video(sampler):
    schedule, x = VPrediction(), normal(4)

    def perfect(x_t, t, i):
        alpha, sigma = schedule.abar[t].sqrt(), (1 - schedule.abar[t]).sqrt()
        return (alpha * x_t - x) / sigma  # the velocity whose clean video is x

    for steps in (1, 5, 50):
        assert relative_error(sampler(schedule, perfect, normal(5), steps, RNGS), x) <= 1e-5


def test_ddim_is_of_first_order_and_dpm_is_better():
    """For Gaussian videos the best prediction is linear: the samples should have the videos' deviation."""
    schedule, deviation = VPrediction(), 0.5

    def best(x_t, t, i):
        abar = schedule.abar[t]
        x0 = abar.sqrt() * deviation**2 / (abar * deviation**2 + 1 - abar) * x_t
        return (abar.sqrt() * x_t - x0) / (1 - abar).sqrt()

    def error(sampler, steps):
        x, rngs = normal(6, (4, 4, 4, 64, 64)), [torch.Generator().manual_seed(i) for i in range(4)]
        return abs(sampler(schedule, best, x, steps, rngs).std().item() - deviation)

    assert 1.6 < error(ddim, 20) / error(ddim, 40) < 2.1
    assert error(dpm, 20) / error(dpm, 40) > 2.4
    assert error(dpm, 40) < 0.5 * error(ddim, 40)


@pytest.mark.parametrize("sampler", [ddim, dpm])
def test_samplers_work_in_fp32_whatever_the_network_returns(sampler):
    def half(x, t, i):
        assert x.dtype == torch.float32
        return fake_network(x, t).bfloat16()

    def sampled(noise):
        rngs = [torch.Generator().manual_seed(i) for i in range(SHAPE[0])]
        return sampler(VPrediction(), half, noise, 10, rngs)

    x = sampled(normal(2).bfloat16())
    assert x.dtype == torch.float32
    assert relative_error(x, sampled(normal(2).bfloat16().float())) == 0


def test_draws_are_uniform_over_all_timesteps_and_come_from_the_generator():
    schedule = VPrediction()
    t = schedule.draw(200_000, torch.Generator().manual_seed(0))
    assert torch.equal(t, schedule.draw(200_000, torch.Generator().manual_seed(0)))
    counts = t.bincount(minlength=1000).double()
    chi_square = ((counts - 200) ** 2 / 200).sum().item()
    assert len(counts) == 1000 and 850 < chi_square < 1150  # 999 degrees of freedom: 999 +- 3.4 deviations


def test_dynamic_guidance_rises_smoothly_with_a_step_index_and_jumps_with_the_timestep():
    assert guidance(1.0, 500, 50, dynamic=True) == 1  # none: diffusers' pipelines guide above 1 only
    rise = [guidance(6.0, 50 - i, 50, dynamic=True) for i in range(51)]
    assert rise == sorted(rise) and rise[0] == 1 and rise[-1] == 7
    released = [guidance(6.0, t, 50, dynamic=True) for t in VPrediction().timesteps(50).tolist()]
    assert min(released) >= 1 and max(released) <= 7
    assert sum(a > b for a, b in zip(released, released[1:], strict=False)) > 10


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        VPrediction().timesteps(steps)


def test_the_config_of_5b_is_the_default_and_names_its_sampler():
    assert schedule_from(CONFIG) == VPrediction()
    assert schedule_from(CONFIG).samplers[schedule_from(CONFIG).default_sampler] is ddim
    dpm_config = CONFIG | {"_class_name": "CogVideoXDPMScheduler"}
    assert schedule_from(dpm_config).default_sampler == "dpm"
    assert schedule_from({k: v for k, v in CONFIG.items() if k != "snr_shift_scale"}).snr_shift_scale == 3.0


def test_a_time_that_is_shifted_to_the_end_is_the_last():
    assert VPrediction(train_shift=1e9).draw(100).max() == 999
