import itertools

import pytest
import torch

from step1x_edit.model import flow
from step1x_edit.model.config import GuidanceRule


@pytest.mark.parametrize("num_steps", [1, 10, 28, 50])
@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_schedule_runs_from_noise_to_picture(num_steps: int, num_tokens: int) -> None:
    timesteps = flow.schedule(num_steps, num_tokens)

    assert timesteps.shape == (num_steps + 1,)
    assert timesteps[0] == pytest.approx(1.0, abs=1e-7)
    assert timesteps[-1] == 0.0
    assert (timesteps.diff() < 0).all()


def test_larger_pictures_stay_longer_in_the_noise() -> None:
    assert flow.schedule(2, 4096)[1] > flow.schedule(2, 1024)[1]
    assert flow.mu(256) == pytest.approx(0.5)
    assert flow.mu(4096) == pytest.approx(1.15)


@pytest.mark.parametrize(("num_tokens", "damped"), [(4096, 6), (1024, 4)])
def test_official_rule_damps_the_first_of_28_steps(num_tokens: int, damped: int) -> None:
    timesteps = flow.schedule(28, num_tokens)[:-1].tolist()

    assert sum(flow.is_damped(t, GuidanceRule.OFFICIAL) for t in timesteps) == damped


def branches() -> tuple[torch.Tensor, torch.Tensor]:
    uncond = torch.zeros(2, 3, 4)
    cond = torch.zeros(2, 3, 4)
    cond[:, 0, 0] = 32.0  # 32^0.4 = 4
    cond[:, 1, 0] = 0.5  # below 1: not damped
    return cond, uncond


@pytest.mark.parametrize(
    ("rule", "t", "first"),
    [
        (GuidanceRule.OFFICIAL, 0.94, 6 * 8.0),
        (GuidanceRule.OFFICIAL, 0.93, 6 * 32.0),
        (GuidanceRule.ALWAYS, 0.1, 6 * 8.0),
        (GuidanceRule.NEVER, 1.0, 6 * 32.0),
    ],
)
def test_guidance_rules(rule: GuidanceRule, t: float, first: float) -> None:
    cond, uncond = branches()

    guided = flow.guide(cond, uncond, 6.0, t, rule)

    assert guided[0, :, 0].tolist() == pytest.approx([first, 3.0, 0.0])


def test_guidance_mixes_timesteps_and_scales_in_a_batch() -> None:
    torch.manual_seed(0)
    cond, uncond = 5 * torch.randn(2, 2, 3, 4)
    t, scale = torch.tensor([1.0, 0.5]).view(2, 1, 1), torch.tensor([6.0, 2.0]).view(2, 1, 1)

    guided = flow.guide(cond, uncond, scale, t)

    for i in range(2):
        alone = flow.guide(cond[i : i + 1], uncond[i : i + 1], scale[i].item(), t[i].item())
        torch.testing.assert_close(guided[i : i + 1], alone)


def test_guidance_of_equal_branches_has_finite_gradients() -> None:
    cond = torch.zeros(1, 2, 4, requires_grad=True)

    flow.guide(cond, torch.zeros(1, 2, 4), 6.0, 1.0).sum().backward()

    assert cond.grad is not None
    assert torch.isfinite(cond.grad).all()


def test_steps_along_the_target_lead_from_noise_to_the_clean_latents() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4)
    velocity = noise - clean
    timesteps = flow.schedule(4, 256).tolist()

    x = noise
    for t, t_next in itertools.pairwise(timesteps):
        torch.testing.assert_close(x, (1 - t) * clean + t * noise)
        x = flow.euler_step(x, velocity, t, t_next)

    torch.testing.assert_close(x, clean)
