"""The bridges, against ``torch.linalg.lstsq`` and, for the laws of sampling, against exact Gaussian formulas.

On Gaussian data every start and end is an affine function of the finest latents and noise, the exact velocity
``E[target | x_tau]`` is affine in ``x_tau``, and so is sampling as a whole in the noise it draws: means and
covariances are compared exactly, without Monte Carlo.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.bridge import BridgeFlow, BridgeKind, LeastSquares, fit_by_gradient

LEARNED: list[tuple[BridgeKind, int]] = [("shuffle", 1), ("shuffle", 3), ("channels", 1)]
KINDS: list[tuple[BridgeKind, int]] = [*LEARNED, ("affine", 1), ("matched", 1)]


def _latents(count: int, channels: int = 2, side: int = 8, seed: int = 0) -> Tensor:
    """Smooth correlated fields with a mean: something a bridge can predict in part."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, channels, side + 2, side + 2, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.avg_pool2d(white, 3, 1) * 2.5
    mixing = torch.eye(channels, dtype=torch.float64) + 0.4
    return torch.einsum("cd,ndhw->nchw", mixing, smooth) + torch.arange(1.0, channels + 1).view(-1, 1, 1)


def _pair(bridge: BridgeFlow, stage: int, latents: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
    return bridge.fitting_pair(stage, latents, flow.pool(latents), noise)


def _fit(bridge: BridgeFlow, stage: int, coarse: Tensor, target: Tensor, pieces: int = 5) -> tuple[Tensor, Tensor]:
    fit = bridge.new_fit(stage)
    for part in zip(coarse.chunk(pieces), target.chunk(pieces), strict=True):
        fit.update(*bridge.rows(stage, *part))
    solution = fit.solve()
    bridge.load_solution(stage, *solution)
    return solution


# --- the least-squares problem -----------------------------------------------------------------


def test_a_bridge_is_fitted_at_the_noise_level_of_its_boundary() -> None:
    """Windows 1..3/4, 3/4..1/4, 1/4..0; the coarse noise is twice the mean of each cell."""
    bridge = BridgeFlow([1, 2, 1], 2).double()
    latents = _latents(3)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coarse_latents, means = (x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) for x in (latents, noise))
    for stage, sigma in ((1, 0.75), (2, 0.25)):
        coarse, target = bridge.fitting_pair(stage, latents, coarse_latents, noise)
        torch.testing.assert_close(coarse, (1 - sigma) * coarse_latents + sigma * 2 * means)
        torch.testing.assert_close(target, (1 - sigma) * latents + sigma * noise)


@pytest.mark.parametrize(("kind", "kernel"), LEARNED)
def test_closed_form_in_pieces_is_lstsq(kind: BridgeKind, kernel: int) -> None:
    bridge = BridgeFlow([1, 1], 2, kind, kernel).double()
    coarse, target = _pair(bridge, 1, _latents(50))
    weight, bias = _fit(bridge, 1, coarse, target, pieces=7)
    x, y = bridge.rows(1, coarse, target)
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    torch.testing.assert_close(weight, exact[:-1].T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(bias, exact[-1], rtol=1e-8, atol=1e-10)


def test_closed_form_of_dependent_columns_is_the_smallest_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], 1)
    y = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    sums = LeastSquares(3, 1)
    sums.update(x, y)
    weight, bias = sums.solve()
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], 1), y, driver="gelsd").solution
    torch.testing.assert_close(torch.cat([weight[0], bias]), exact[:, 0])


@pytest.mark.parametrize(("kind", "kernel"), LEARNED)
def test_rows_describe_the_modules_forward(kind: BridgeKind, kernel: int) -> None:
    """The outputs of the loaded module, taken apart as the targets are, equal X @ W + b."""
    bridge = BridgeFlow([1, 1], 2, kind, kernel).double()
    coarse, target = _pair(bridge, 1, _latents(6))
    weight, bias = _fit(bridge, 1, coarse, target)
    x, fitted = bridge.rows(1, coarse, bridge(1, coarse))
    torch.testing.assert_close(fitted, x @ weight.T + bias)


@pytest.mark.parametrize(("kind", "kernel"), LEARNED)
def test_the_fit_cannot_be_improved(kind: BridgeKind, kernel: int) -> None:
    """At the minimum of the loss in image space, its gradient is zero: the rows are the right problem."""
    bridge = BridgeFlow([1, 2], 2, kind, kernel).double()
    coarse, target = _pair(bridge, 1, _latents(30))
    _fit(bridge, 1, coarse, target)
    bridge.maps[0].requires_grad_(True)
    torch.nn.functional.mse_loss(bridge(1, coarse), target).backward()
    assert max(p.grad.abs().max() for p in bridge.maps[0].parameters() if p.grad is not None) < 1e-12


def test_kernel_1_sees_one_pixel_and_writes_its_cell() -> None:
    """Against four regressions written out, one for each place in the 2x2 cell."""
    bridge = BridgeFlow([1, 1], 2, "shuffle", 1).double()
    coarse, target = _pair(bridge, 1, _latents(30))
    _fit(bridge, 1, coarse, target)
    out = bridge(1, coarse)
    x = torch.cat([coarse.movedim(1, -1).reshape(-1, 2), torch.ones(30 * 16, 1, dtype=torch.float64)], 1)
    for row in range(2):
        for column in range(2):
            y = target[:, :, row::2, column::2].movedim(1, -1).reshape(-1, 2)
            expected = x @ torch.linalg.lstsq(x, y).solution
            torch.testing.assert_close(out[:, :, row::2, column::2].movedim(1, -1).reshape(-1, 2), expected)


def test_channels_is_lstsq_on_the_upsampled_pixels() -> None:
    bridge = BridgeFlow([1, 1], 3, "channels").double()
    coarse, target = _pair(bridge, 1, _latents(30, channels=3))
    weight, bias = _fit(bridge, 1, coarse, target)
    x = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).movedim(1, -1).reshape(-1, 3)
    y = target.movedim(1, -1).reshape(-1, 3)
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), exact)


@pytest.mark.parametrize(("kind", "kernel"), LEARNED)
def test_gradient_gives_the_outputs_of_the_closed_form(kind: BridgeKind, kernel: int) -> None:
    """Both on the same pairs. What remains after 600 steps of Adam is its distance from a minimum that a cosine
    decay to 0 leaves small: a relative RMS difference of the outputs below 1%, on pairs that neither saw."""
    exact = BridgeFlow([1, 1], 2, kind, kernel).double()
    sgd = BridgeFlow([1, 1], 2, kind, kernel).double()
    coarse, target = _pair(exact, 1, _latents(64))
    _fit(exact, 1, coarse, target)
    batches = list(zip(coarse.chunk(4), target.chunk(4), strict=True))
    fit_by_gradient(sgd, 1, batches * 200, steps=600, learning_rate=0.03)
    unseen, _ = _pair(exact, 1, _latents(32, seed=5), seed=6)
    expected = exact(1, unseen)
    difference = ((sgd(1, unseen) - expected).square().mean() / expected.square().mean()).sqrt()
    assert difference < 0.01
    assert not any(p.requires_grad for p in sgd.parameters())


@pytest.mark.parametrize("size", [None, [8, 8]])
def test_affine_is_lstsq_with_a_column_for_each_shift(size: list[int] | None) -> None:
    """One regression a channel: its pixels, and an indicator for each position or one for all."""
    bridge = BridgeFlow([1, 1], 2, "affine", affine_size=size).double()
    coarse, target = _pair(bridge, 1, _latents(30))
    _fit(bridge, 1, coarse, target)
    out = bridge(1, coarse)
    upsampled = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    positions = torch.eye(64, dtype=torch.float64).repeat(30, 1)
    shifts = positions if size else positions.sum(1, keepdim=True)
    for channel in range(2):
        x, y = upsampled[:, channel].flatten(), target[:, channel].flatten()
        columns = torch.cat([x[:, None], shifts], 1)
        expected = columns @ torch.linalg.lstsq(columns, y[:, None]).solution
        torch.testing.assert_close(out[:, channel].flatten(), expected[:, 0], rtol=1e-8, atol=1e-9)
    weight_before = bridge.maps[0].weight
    fit_by_gradient(bridge, 1, [(coarse, target)] * 50, steps=50, learning_rate=1e-4)
    torch.testing.assert_close(bridge(1, coarse), out, rtol=1e-2, atol=1e-2)  # it was the minimum
    assert not weight_before.requires_grad


def test_a_shift_for_each_position_works_at_its_size_alone() -> None:
    bridge = BridgeFlow([1, 1, 1], 2, "affine", affine_size=[16, 24])
    assert [tuple(map_.bias.shape) for map_ in bridge.maps] == [(2, 8, 12), (2, 16, 24)]
    assert bridge(2, torch.zeros(1, 2, 8, 12)).shape == (1, 2, 16, 24)
    with pytest.raises(ValueError, match="16x24 latents, and can't make 16x16"):
        bridge(2, torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="8x12 latents, and can't make 16x16"):
        bridge.rows(1, torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 16, 16))


# --- starts ------------------------------------------------------------------------------------


def test_the_first_stage_starts_at_pure_noise() -> None:
    bridge = BridgeFlow([1, 1], 2, "matched").double()
    latents = _latents(3, side=4)
    noise = torch.randn(latents.shape, dtype=torch.float64)
    start, end = bridge.endpoints(0, latents, latents, noise)
    assert torch.equal(start, noise)
    torch.testing.assert_close(end, 0.5 * noise + 0.5 * latents)


def test_matched_start_is_a_noised_upsampled_image() -> None:
    bridge = BridgeFlow([1, 2, 1], 2, "matched").double()
    latents = _latents(4)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coarse = latents.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    for stage, sigma in ((1, 0.75), (2, 0.25)):
        restored = 2 * sigma / (1 + sigma)
        start, end = bridge.endpoints(stage, latents, coarse, noise)
        upsampled = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(start, (1 - restored) * upsampled + restored * noise)
        assert bridge.windows[stage].start == pytest.approx(restored)
        end_sigma = (0.25, 0.0)[stage - 1]
        torch.testing.assert_close(end, end_sigma * noise + (1 - end_sigma) * latents)


@pytest.mark.parametrize("residual_noise", [True, False])
def test_residual_noise_is_an_option(residual_noise: bool) -> None:
    bridge = BridgeFlow([1, 1], 2, residual_noise=residual_noise).double()
    coarse, noise = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    difference = bridge.start(1, coarse, noise) - bridge(1, coarse)
    if residual_noise:
        means = noise.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(difference, 0.5 * (noise - means))
    else:
        assert not difference.any()


# --- the house ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "kernel"), KINDS)
def test_save_and_load(kind: BridgeKind, kernel: int, tmp_path: Path) -> None:
    residual_noise = kind == "matched"
    bridge = BridgeFlow([2, 1, 1], 2, kind, kernel, residual_noise, shift=True, max_shift=1.3)
    bridge.fitted.fill_(True)
    bridge.save_pretrained(tmp_path)
    loaded = BridgeFlow.from_pretrained(tmp_path)
    assert loaded.fitted
    assert loaded.windows == bridge.windows
    assert loaded.kind == kind
    assert loaded.residual_noise is residual_noise
    assert loaded.time_shift(4096) == pytest.approx(1.3)
    coarse, noise = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 8, 8)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in bridge.state_dict().items())
    torch.testing.assert_close(loaded.start(2, coarse, noise), bridge.start(2, coarse, noise))


def test_only_what_needs_a_fit_starts_unfitted(tmp_path: Path) -> None:
    assert not BridgeFlow([1, 1], 2).fitted
    assert not BridgeFlow([1, 1], 2, "channels").fitted
    assert BridgeFlow([1, 1], 2, "matched").fitted
    assert BridgeFlow([1], 2).fitted
    BridgeFlow([1, 1], 2).save_pretrained(tmp_path)
    assert not BridgeFlow.from_pretrained(tmp_path).fitted


def test_bridges_are_frozen_and_small() -> None:
    bridge = BridgeFlow([1, 1, 1], 16, "shuffle", 3)
    assert sum(p.numel() for p in bridge.parameters()) == 2 * (9 * 16 * 4 * 16 + 4 * 16)
    assert not any(p.requires_grad for p in bridge.parameters())
    assert not list(BridgeFlow([1, 1, 1], 16, "matched").parameters())
    assert BridgeFlow([1], 16).time_shift(4096) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "conv"}, "kind must be one of shuffle, channels, affine, matched"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"window_ratios": [1, 0]}, "ratios"),
        ({"timestep_spacing": "odd"}, "timestep_spacing must be one of even, linspace"),
        ({"kind": "matched", "residual_noise": False}, "without residual_noise"),
        ({"kind": "matched", "windows": "contiguous"}, "can't be combined with windows contiguous"),
        ({"affine_size": [8, 8]}, "affine_size is for kind affine"),
        ({"kind": "affine", "affine_size": [8, 7]}, "must be multiples of 2"),
    ],
)
def test_bad_settings_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BridgeFlow(**{"window_ratios": [1, 1], "channels": 2} | settings)


# --- the laws of training and of sampling ------------------------------------------------------


class Gaussian(NamedTuple):
    """A mean ``(n,)`` and a covariance ``(n, n)``."""

    mean: Tensor
    covariance: Tensor


class Affine(NamedTuple):
    """``matrix @ u + offset``."""

    matrix: Tensor
    offset: Tensor

    def law(self, u: Gaussian) -> Gaussian:
        """Of the image of ``u``."""
        return Gaussian(self.matrix @ u.mean + self.offset, self.matrix @ u.covariance @ self.matrix.T)


def _affine(points: Tensor) -> Affine:
    """The affine map whose images of 0 and of the basis vectors, in this order, are ``points``."""
    flat = points.flatten(1)
    return Affine((flat[1:] - flat[0]).T, flat[0])


def _probes(numbers: int) -> Tensor:
    return torch.cat([torch.zeros(1, numbers, dtype=torch.float64), torch.eye(numbers, dtype=torch.float64)])


SIDE, STAGES = 8, 3


def _data() -> Gaussian:
    """Latents of 8x8: strongly correlated neighbours, a variance and a mean that change over the image."""
    rows, columns = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float64)] * 2, indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1)
    correlation = torch.exp(-torch.cdist(places, places) / 2)
    deviation = 0.6 + 0.08 * columns.flatten()
    return Gaussian(torch.sin(rows.flatten()) + 0.3, correlation * deviation[:, None] * deviation)


def _fitted_bridge(kind: BridgeKind, kernel: int = 1, **settings: Any) -> BridgeFlow:
    bridge = BridgeFlow([1] * STAGES, 1, kind, kernel, **settings).double()
    data, generator = _data(), torch.Generator().manual_seed(0)
    white = torch.randn(2000, SIDE**2, generator=generator, dtype=torch.float64)
    finest = (white @ torch.linalg.cholesky(data.covariance).T + data.mean).view(-1, 1, SIDE, SIDE)
    levels = flow.pyramid(finest, STAGES)
    noises = flow.pyramid(
        torch.randn(finest.shape, generator=generator, dtype=torch.float64), STAGES, flow.coarsen_noise
    )
    for stage in range(1, STAGES) if kind != "matched" else ():
        _fit(bridge, stage, *bridge.fitting_pair(stage, levels[stage], levels[stage - 1], noises[stage]))
    return bridge


def _training_laws(bridge: BridgeFlow) -> tuple[Gaussian, list[tuple[Affine, Affine]]]:
    """The law of u = (finest latents, finest noise), and each stage's start and end as affine functions of u."""
    data, n = _data(), SIDE**2
    u = Gaussian(
        torch.cat([data.mean, torch.zeros(n, dtype=torch.float64)]),
        torch.block_diag(data.covariance, torch.eye(n, dtype=torch.float64)),
    )
    latents, noise = (part.view(-1, 1, SIDE, SIDE) for part in _probes(2 * n).split(n, 1))
    levels, noises = flow.pyramid(latents, STAGES), flow.pyramid(noise, STAGES, flow.coarsen_noise)
    ends = [bridge.endpoints(stage, levels[stage], levels[max(stage - 1, 0)], noises[stage]) for stage in range(STAGES)]
    return u, [(_affine(start), _affine(end)) for start, end in ends]


def _exact_velocity(u: Gaussian, start: Affine, end: Affine, window: flow.Window) -> flow.Velocity:
    """``E[(start - end) / duration | x_tau]``, by the formula of the conditional mean."""
    duration = 1.0 if window.velocity_time == "local" else window.start - window.end

    def velocity(x: Tensor, tau: float) -> Tensor:
        here = tau * start.matrix + (1 - tau) * end.matrix
        target = (start.matrix - end.matrix) / duration
        inverse = torch.linalg.pinv(here @ u.covariance @ here.T, rtol=1e-12, hermitian=True)
        gain = target @ u.covariance @ here.T @ inverse
        mean_here = here @ u.mean + tau * start.offset + (1 - tau) * end.offset
        mean_target = target @ u.mean + (start.offset - end.offset) / duration
        return ((x.flatten(1) - mean_here) @ gain.T + mean_target).view_as(x)

    return velocity


def _sampling_laws(
    bridge: BridgeFlow, u: Gaussian, maps: list[tuple[Affine, Affine]], steps: int
) -> list[tuple[Gaussian, Gaussian]]:
    """Law of the start and end of every stage as sampling reaches them, from the exact velocity.

    Sampling is affine in all the unit noise it draws; 0 and the basis vectors go through it as one batch.
    """
    sides = [SIDE // 2**above for above in reversed(range(STAGES))]
    drawn = _probes(sum(side**2 for side in sides))
    unit = Gaussian(torch.zeros(drawn.shape[1], dtype=torch.float64), torch.eye(drawn.shape[1], dtype=torch.float64))
    noises = [
        part.view(-1, 1, side, side) for part, side in zip(drawn.split([s**2 for s in sides], 1), sides, strict=True)
    ]
    laws: list[tuple[Gaussian, Gaussian]] = []
    x = noises[0]
    for stage, window in enumerate(bridge.windows):
        if stage > 0:
            x = bridge.start(stage, x, noises[stage])
        started = _affine(x).law(unit)
        velocity = _exact_velocity(u, *maps[stage], window)
        for tau, tau_next in pairwise(flow.local_times(steps, window)):
            x = flow.solver_step("heun", velocity, x, tau, tau_next, window.duration, None).x
        laws.append((started, _affine(x).law(unit)))
    return laws


def _distance(law: Gaussian, other: Gaussian) -> float:
    """Largest relative difference of the mean and of the covariance, in the Euclidean and Frobenius norms."""
    mean = (law.mean - other.mean).norm() / other.covariance.trace().sqrt()
    covariance = (law.covariance - other.covariance).norm() / other.covariance.norm()
    return max(mean.item(), covariance.item())


def _detail_variance(law: Gaussian) -> float:
    """Mean variance of what pooling removes."""
    side = round(len(law.mean) ** 0.5)
    basis = torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)
    remove = flow.detail(basis).flatten(1).T
    return ((remove @ law.covariance @ remove.T).trace() / side**2).item()


def _differences(bridge: BridgeFlow, steps: int) -> list[tuple[float, float]]:
    """Of every stage's start and end, sampling against training."""
    u, maps = _training_laws(bridge)
    sampled = _sampling_laws(bridge, u, maps, steps)
    return [
        (_distance(reached_start, start.law(u)), _distance(reached_end, end.law(u)))
        for (reached_start, reached_end), (start, end) in zip(sampled, maps, strict=True)
    ]


@pytest.mark.parametrize(("kind", "kernel"), KINDS)
def test_crossing_a_bridge_with_fresh_noise_keeps_the_law(kind: BridgeKind, kernel: int) -> None:
    """From the training's own end of the stage before, no solver in between: equal to rounding."""
    bridge = _fitted_bridge(kind, kernel, residual_noise=True)
    u, maps = _training_laws(bridge)
    for stage in range(1, STAGES):
        before, (start, _) = maps[stage - 1][1], maps[stage]
        inputs, outputs = len(before.offset), len(start.offset)
        coarse, noise = _probes(inputs + outputs).split([inputs, outputs], 1)
        sides = [round(n**0.5) for n in (inputs, outputs)]
        crossed = _affine(
            bridge.start(stage, coarse.view(-1, 1, sides[0], sides[0]), noise.view(-1, 1, sides[1], sides[1]))
        )
        end = before.law(u)
        fresh = Gaussian(
            torch.cat([end.mean, torch.zeros(outputs, dtype=torch.float64)]),
            torch.block_diag(end.covariance, torch.eye(outputs, dtype=torch.float64)),
        )
        assert _distance(crossed.law(fresh), start.law(u)) < 1e-10


@pytest.mark.parametrize(("kind", "kernel"), KINDS)
def test_sampling_has_the_laws_of_training(kind: BridgeKind, kernel: int) -> None:
    """Start and end of every stage, with the exact velocity and 50 Heun steps a stage."""
    bridge = _fitted_bridge(kind, kernel, residual_noise=True)
    differences = _differences(bridge, steps=50)
    assert max(max(stage) for stage in differences) < 3e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "shuffle", "windows": "matched"},
        {"kind": "affine", "windows": "matched", "affine_size": [SIDE, SIDE]},
        {"kind": "matched", "velocity_time": "local", "time": "remaining"},  # as the authors trained
        {"kind": "affine", "affine_size": [SIDE, SIDE], "velocity_time": "local"},
    ],
)
def test_sampling_has_the_laws_of_training_in_every_convention(settings: dict[str, Any]) -> None:
    bridge = _fitted_bridge(**settings)
    differences = _differences(bridge, steps=50)
    assert max(max(stage) for stage in differences) < 3e-4


def test_what_sampling_misses_is_the_solvers_error() -> None:
    """Half the step leaves a quarter of the difference, as a second-order solver must: there is no other bias."""
    bridge = _fitted_bridge("shuffle", 3, residual_noise=True)
    coarse, fine = (_differences(bridge, steps)[-1][1] for steps in (25, 50))
    assert coarse / fine == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("kind", "kernel"), [pair for pair in KINDS if pair[0] != "matched"])
def test_without_residual_noise_the_detail_is_lost(kind: BridgeKind, kernel: int) -> None:
    """The second stage still starts with the law of training, but ends with hardly any of its detail."""
    bridge = _fitted_bridge(kind, kernel, residual_noise=False)
    u, maps = _training_laws(bridge)
    sampled = _sampling_laws(bridge, u, maps, steps=50)
    (_, first_end), (second_start, second_end), (_, last_end) = sampled
    assert _distance(first_end, maps[0][1].law(u)) < 3e-4
    assert _distance(second_start, maps[1][0].law(u)) < 3e-4
    assert _distance(second_end, maps[1][1].law(u)) > 0.4
    for reached, end in ((second_end, maps[1][1]), (last_end, maps[2][1])):
        assert _detail_variance(reached) < 0.05 * _detail_variance(end.law(u))
