"""The flow's mathematics, against closed forms, scipy's distributions, FLUX's own time shift and an ODE with a known
solution."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from scipy import special, stats
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.flow import LossWeighting, SolverKind, Window

# --- windows -----------------------------------------------------------------------------------


def test_equal_windows_have_the_papers_edges() -> None:
    windows = flow.make_windows([1, 1, 1])
    assert [w.start for w in windows] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [w.end for w in windows] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [w.width for w in windows] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("ratios", [[1.0], [3, 1], [1, 2, 3, 4], [0.1] * 7])
def test_windows_tile_the_noise_levels(ratios: list[float]) -> None:
    windows = flow.make_windows(ratios)
    assert len(windows) == len(ratios)
    assert (windows[0].start, windows[-1].end) == (1.0, 0.0)
    assert all(before.end == after.start for before, after in pairwise(windows))
    assert [w.width for w in windows] == pytest.approx(np.array(ratios) / sum(ratios))


def test_matched_windows_start_at_the_noise_level_of_the_restored_endpoint() -> None:
    plain, matched = flow.make_windows([2, 1, 1]), flow.make_windows([2, 1, 1], "matched")
    assert [w.end for w in matched] == [w.end for w in plain]
    assert [w.start for w in matched] == pytest.approx([1, 2 * 0.5 / 1.5, 2 * 0.25 / 1.25])


@pytest.mark.parametrize("ratios", [[], [1, 0, 1], [1, -1], [math.nan], [1, math.inf]])
def test_bad_window_ratios_are_refused(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="ratios"):
        flow.make_windows(ratios)


# --- pyramids ----------------------------------------------------------------------------------


def test_noise_pyramid_is_shared_and_keeps_unit_variance() -> None:
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = flow.pyramid(noise, 3, flow.coarsen_noise)
    assert [tuple(x.shape[-2:]) for x in levels] == [(8, 8), (16, 16), (32, 32)]
    assert torch.equal(levels[-1], noise)
    blocks = noise.unfold(2, 4, 4).unfold(3, 4, 4)
    torch.testing.assert_close(levels[0], 4 * blocks.mean((-1, -2)))
    for x in levels:
        spread = 5 * math.sqrt(2 / x.numel())  # five standard deviations of the variance's estimate
        assert abs(x.var().item() - 1) < spread
        assert abs(x.mean().item()) < 5 / math.sqrt(x.numel())


def test_latent_pyramid_is_block_means() -> None:
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    coarse, _, _ = flow.pyramid(latents, 3)
    torch.testing.assert_close(coarse, latents.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)))


def test_upsample_repeats_every_value_in_its_cell() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2)
    expected = np.kron(x[0, 0].numpy(), np.ones((2, 2)))
    np.testing.assert_array_equal(flow.upsample(x)[0, 0].numpy(), expected)


def test_detail_is_orthogonal_to_the_pooled_part() -> None:
    """As matrices on 16 pixels: the covariance of detail and pooled part of unit noise is their product."""
    basis = torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    detail, pooled = flow.detail(basis).flatten(1).T, flow.pool(basis).flatten(1).T
    assert (detail @ pooled.T).abs().max() < 1e-15
    assert torch.linalg.matrix_rank(detail) == 12
    torch.testing.assert_close(detail @ detail, detail)


# --- one stage ---------------------------------------------------------------------------------


def _random(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_interpolation_reaches_its_end_points() -> None:
    start, end = _random(2)
    x = flow.interpolate(start, end, torch.tensor([1.0, 0.0, 0.25]))
    assert torch.equal(x[0], start[0])
    assert torch.equal(x[1], end[1])
    torch.testing.assert_close(x[2], 0.25 * start[2] + 0.75 * end[2])


def test_one_stage_is_rectified_flow() -> None:
    """With K=1 the end is the data, the velocity noise - data, and the global time the local one."""
    latents, noise = _random(2)
    (window,) = flow.make_windows([1])
    end = flow.add_noise(latents, noise, window.end)
    assert torch.equal(end, latents)
    torch.testing.assert_close(flow.velocity_target(noise, end, window), noise - latents)
    tau = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(window.timestep(tau), tau)


def test_following_the_velocity_over_a_window_leads_from_start_to_end() -> None:
    start, end = _random(2)
    for window in flow.make_windows([1, 2, 3]):
        velocity = flow.velocity_target(start, end, window)
        torch.testing.assert_close(start - velocity * (window.start - window.end), end)
        times = window.timestep(torch.tensor([1.0, 0.0], dtype=torch.float64))
        assert times.tolist() == pytest.approx([window.start, window.end])


def test_residual_noise_adds_only_what_the_coarse_grid_does_not_hold() -> None:
    bridged, noise = _random(2)
    window = Window(0.6, 0.2)
    assert flow.start_point(bridged, noise, window, residual_noise=False) is bridged
    added = flow.start_point(bridged, noise, window) - bridged
    assert flow.pool(added).abs().max() < 1e-15
    cell_means = noise.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(added, 0.6 * (noise - cell_means))


# --- local time --------------------------------------------------------------------------------


def _draws(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator), torch.rand(count, 2, generator=generator)


def test_logit_normal_has_scipys_quantiles() -> None:
    normal, uniform = _draws(100_000)
    tau = flow.sample_tau("logit_normal", normal, uniform, mean=0.4, std=1.3).numpy()
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):
        exact = special.expit(stats.norm(0.4, 1.3).ppf(q))
        assert (tau < exact).mean() == pytest.approx(q, abs=5 * math.sqrt(q * (1 - q) / len(tau)))


def test_uniform_tau_is_uniform() -> None:
    normal, uniform = _draws(20_000)
    assert stats.kstest(flow.sample_tau("uniform", normal, uniform).numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_mixture_trains_the_start(share: float) -> None:
    normal, uniform = _draws(200_000)
    late = (flow.sample_tau("mixture", normal, uniform, uniform_share=share) > 0.95).float().mean().item()
    exact = share * 0.05 + (1 - share) * stats.norm.sf(special.logit(0.95))
    assert late == pytest.approx(exact, abs=5 * math.sqrt(exact / 200_000))


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9216])
def test_resolution_shift_is_fluxs(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(tokens)
    assert flow.resolution_shift(tokens) == pytest.approx(mu)
    assert flow.resolution_shift(tokens, 0.3, 2.0) == pytest.approx(
        calculate_shift(tokens, base_shift=0.3, max_shift=2.0)
    )
    tau = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(flow.shift_tau(tau, mu), scheduler.time_shift(mu, 1.0, tau))


def test_the_steps_of_one_stage_are_fluxs_schedule() -> None:
    """FLUX's pipeline asks its scheduler for sigmas 1, 1 - 1/n, ..., 1/n, which shifts them and appends 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=0.9)
    assert flow.local_times(8, Window(1.0, 0.0), mu=0.9) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_even_steps_span_their_window() -> None:
    window = Window(0.75, 0.25)
    times = [window.timestep(tau) for tau in flow.local_times(4, window)]
    assert times == pytest.approx([0.75, 0.625, 0.5, 0.375, 0.25])
    shifted = flow.local_times(4, window, mu=1.0)
    assert (shifted[0], shifted[-1]) == (1.0, 0.0)
    assert all(before > after for before, after in pairwise(shifted))
    assert shifted[2] > 0.5


@pytest.mark.parametrize(
    ("ratios", "times"),
    [
        # Of the authors' release: its windows' edges are 1, 0.667, 0.334, 0 and their starts 1, 0.8002, 0.5007.
        ([333, 333, 334], [(1.0, 0.744), (0.744, 0.386), (0.386, 0.001)]),
        ([1], [(1.0, 0.001)]),
        ([1, 1], [(1.0, 0.572), (0.572, 0.001)]),  # widths 1/2 and 2/3, the second from 2/3: 3/7 of the path is 428
    ],
)
def test_the_remaining_time_counts_down_over_all_windows(ratios: list[float], times: list[tuple[float, float]]) -> None:
    windows = flow.make_windows(ratios, "matched", "remaining", "local")
    assert [window.times for window in windows] == times
    assert [window.duration for window in windows] == [1.0] * len(ratios)
    assert [window.timestep(0.5) for window in windows] == pytest.approx([(a + b) / 2 for a, b in times])


@pytest.mark.parametrize(
    ("steps", "told"), [(1, [386]), (2, [386, 2]), (3, [386, 194, 2]), (5, [386, 290, 194, 98, 2])]
)
def test_linspace_steps_reach_the_last_timestep_of_their_window(steps: int, told: list[float]) -> None:
    """Stage 3 of the release has the 385 timesteps 386 ... 2: steps start at some of them, the last ends at 0."""
    window = flow.make_windows([333, 333, 334], "matched", "remaining", "local")[2]
    tau = flow.local_times(steps, window, spacing="linspace")
    assert [1000 * window.timestep(one) for one in tau[:-1]] == pytest.approx(told)
    assert tau[-1] == 0
    assert steps == 1 or tau[-2] == pytest.approx(1 / 385)


def test_unknown_conventions_are_named() -> None:
    for arguments, message in (
        ({"kind": "other"}, "windows must be one of contiguous, matched"),
        ({"time": "other"}, "time must be one of noise_level, remaining"),
        ({"velocity_time": "other"}, "velocity_time must be one of global, local"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.make_windows([1, 1], **arguments)  # type: ignore[arg-type]


# --- the loss of a step ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ratio", "expected"),
    [
        ("ratio", [4, 2, 1], [4 / 7, 2 / 7, 1 / 7]),
        ("ratio", [0, 3, 1], [0, 3 / 4, 1 / 4]),
        ("uniform", [4, 2, 1], [1 / 3, 1 / 3, 1 / 3]),
        ("uniform", [4, 0, 1], [1 / 2, 0, 1 / 2]),
        ("balanced", [4, 2, 1], [2 / 7, 4 / 7, 1 / 7]),  # in proportion to 1/2, 1/1, 1/4
        ("balanced", [4, 2, 0], [1 / 3, 2 / 3, 0]),
    ],
)
def test_loss_weights(kind: LossWeighting, ratio: list[int], expected: list[float]) -> None:
    weights = flow.loss_weights(kind, torch.tensor(ratio, dtype=torch.float32), torch.tensor([2.0, 1.0, 4.0]))
    assert weights.tolist() == pytest.approx(expected)
    assert weights.sum().item() == pytest.approx(1)


# --- solvers -----------------------------------------------------------------------------------


def _error(kind: SolverKind, steps: int, window: Window, mu: float | None) -> tuple[float, int]:
    """Error at the window's end on ``dx/dt = x cos 3t``, solved by ``x = exp(sin(3t) / 3)``, and the calls it took.

    Its second-order error does not nearly cancel on these grids, so the orders show at few steps.
    """
    calls = 0

    def velocity(x: Tensor, tau: float) -> Tensor:
        nonlocal calls
        calls += 1
        return x * math.cos(3 * window.timestep(tau))

    x = torch.tensor([math.exp(math.sin(3 * window.start) / 3)], dtype=torch.float64)
    state = None
    for tau, tau_next in pairwise(flow.local_times(steps, window, mu)):
        state = flow.solver_step(kind, velocity, x, tau, tau_next, window.duration, state)
        x = state.x
    return abs(x.item() - math.exp(math.sin(3 * window.end) / 3)), calls


@pytest.mark.parametrize("mu", [None, 1.15])
@pytest.mark.parametrize("window", [Window(1.0, 0.0), Window(0.8, 0.3)])
@pytest.mark.parametrize(("kind", "order", "calls"), [("euler", 1, 1), ("heun", 2, 2), ("multistep", 2, 1)])
def test_solver_order_and_cost(kind: SolverKind, order: int, calls: int, window: Window, mu: float | None) -> None:
    coarse, _ = _error(kind, 200, window, mu)
    fine, fine_calls = _error(kind, 400, window, mu)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert fine_calls == 400 * calls


def test_solver_is_exact_on_a_straight_line_at_one_step() -> None:
    start, end = _random(2)
    for window in (Window(0.6, 0.2), Window(0.6, 0.2, velocity_time="local")):
        velocity = flow.velocity_target(start, end, window)
        for kind in ("euler", "heun", "multistep"):
            step = flow.solver_step(kind, lambda x, tau, v=velocity: v, start, 1.0, 0.0, window.duration, None)  # type: ignore[misc]
            torch.testing.assert_close(step.x, end)


def test_multistep_minds_the_length_of_the_step_before() -> None:
    """On ``dx/dt = t`` a two-step method is exact after its first step, whatever the two lengths."""
    x, times = torch.zeros(1, dtype=torch.float64), (1.0, 0.9, 0.4, 0.3)
    first = flow.solver_step("multistep", lambda x, t: torch.full_like(x, t), x, times[0], times[1], 1.0, None)
    second = flow.solver_step("multistep", lambda x, t: torch.full_like(x, t), first.x, times[1], times[2], 1.0, first)
    third = flow.solver_step("multistep", lambda x, t: torch.full_like(x, t), second.x, times[2], times[3], 1.0, second)
    assert (second.x - first.x).item() == pytest.approx((0.4**2 - 0.9**2) / 2)
    assert (third.x - second.x).item() == pytest.approx((0.3**2 - 0.4**2) / 2)
