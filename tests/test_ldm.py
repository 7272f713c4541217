"""Stage 2 against closed forms: schedules, Gaussian transport, guidance, plane symmetries, NFE."""
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import common
import encoders
import ldm

TRIPLE = {'xy': [4, 4], 'yz': [4, 4], 'xz': [4, 4]}


def tiny(**changes):
    """A small model with every parameter moved, so that no zero initialisation hides a path."""
    model = ldm.LDM(ldm.LDMConfig(**{**dict(
        z_channels=4, planes={'xy': [4, 4]}, ch=8, ch_mult=(1, 2), num_res_blocks=1,
        attn_factors=(2,), head_channels=8, mixing_init=0.0), **changes}))
    with torch.no_grad():
        for p in model.unet.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


class Gaussian:
    """Data N(mean, std^2), different in each channel; everything about its diffusion is known."""
    mean = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)[:, None]
    std = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)[:, None]

    def marginal(self, ab):
        return ab ** 0.5 * self.mean, (ab * self.std ** 2 + 1 - ab) ** 0.5

    def eps(self, z, t):
        ab = ldm.alpha_bar(t)[:, None, None]
        mean, std = self.marginal(ab)
        return (1 - ab) ** 0.5 * (z - mean) / std ** 2

    def transport(self, z, ab_start, ab_end):
        """Exact ODE flow from alpha_bar = ab_start to ab_end, then E[z_0 | z]."""
        mean, std = self.marginal(ab_start)
        mean_end, std_end = self.marginal(ab_end)
        standard = (z - mean) / std
        return self.mean + ab_end ** 0.5 * self.std ** 2 / std_end * standard


# ---- schedule --------------------------------------------------------------------------------

@pytest.mark.mutation('ldm.py', '0.0195', '0.02')
@pytest.mark.mutation('ldm.py', 'torch.log1p(-BETA)', 'torch.log1p(-BETA / 2)')
def test_alpha_bar_golden():
    beta = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000) ** 2
    ab = ldm.alpha_bar(torch.arange(1000))
    np.testing.assert_allclose(ab, np.cumprod(1 - beta), rtol=1e-12)
    assert float(ldm.alpha_bar(0)) == pytest.approx(0.9985, abs=1e-9)
    assert float(ldm.alpha_bar(999)) == pytest.approx(1.42304e-4, rel=1e-5)


@pytest.mark.mutation('ldm.py', 'table[i + 1], t - i', 'table[i + 1], t - t')
@pytest.mark.mutation('ldm.py', '.clamp(0, T - 2)', '.clamp(0, 500)')
def test_alpha_bar_is_log_linear_and_inverted_by_matched_time():
    a, b = (math.log(ldm.alpha_bar(t)) for t in (700, 701))
    assert math.log(ldm.alpha_bar(700.25)) == pytest.approx(0.75 * a + 0.25 * b, abs=1e-12)
    t = torch.tensor([0.0, 0.3, 17.5, 998.9, 999.0], dtype=torch.float64)
    np.testing.assert_allclose(ldm.matched_time(ldm.alpha_bar(t).log().numpy()), t, atol=1e-9)


@pytest.mark.mutation('ldm.py', '/ (3 * slope)', '/ (2.9 * slope)')
def test_continuous_schedule_follows_the_discrete_one():
    tau = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    gap = (ldm.log_alpha_bar(tau) - ldm.alpha_bar(torch.arange(1000)).log()).abs()
    assert gap.max() < 0.055
    beta = (ldm.log_alpha_bar(0.5 - 1e-5) - ldm.log_alpha_bar(0.5 + 1e-5)) / 2e-5
    assert beta == pytest.approx(1000 * ((0.0015 ** 0.5 + 0.0195 ** 0.5) / 2) ** 2, rel=1e-6)


# ---- samplers --------------------------------------------------------------------------------

@pytest.mark.mutation('ldm.py', '- alpha * math.expm1', '- 0.99 * alpha * math.expm1')
def test_ddim_with_the_true_noise_returns_the_data():
    z0, noise = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    ab = float(ldm.alpha_bar(999))
    z_T = ab ** 0.5 * z0 + (1 - ab) ** 0.5 * noise

    def eps(z, t):
        a = ldm.alpha_bar(t)[:, None, None]
        torch.testing.assert_close(z, a.sqrt() * z0 + (1 - a).sqrt() * noise)
        return noise
    for steps in (1, 7, 50):
        z, _ = ldm.sample(eps, z_T, 'ddim', steps)
        torch.testing.assert_close(z, z0, atol=1e-10, rtol=0)


@pytest.mark.mutation('ldm.py', 'math.sqrt(-math.expm1(-2', '(-math.expm1(-2')
@pytest.mark.mutation('ldm.py', "'ddpm': (1, 1)", "'ddpm': (1, 0.9)")
@pytest.mark.mutation('ldm.py', "'ddpm': (1, 1)", "'ddpm': (2, 1)")
def test_ddpm_with_1000_steps_is_ancestral_sampling():
    g, z_T = Gaussian(), torch.randn(2, 3, 4, dtype=torch.float64)
    z, nfe = ldm.sample(g.eps, z_T, 'ddpm', 1000, generator=torch.Generator().manual_seed(1))
    noise, x = torch.Generator().manual_seed(1), z_T
    beta = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000) ** 2
    ab = np.cumprod(1 - beta)
    for t in reversed(range(1000)):  # Ho et al., Algorithm 2
        e = g.eps(x, torch.full((2,), t))
        x = (x - beta[t] / (1 - ab[t]) ** 0.5 * e) / (1 - beta[t]) ** 0.5
        if t > 0:
            spread = (beta[t] * (1 - ab[t - 1]) / (1 - ab[t])) ** 0.5
            x = x + spread * torch.randn(x.shape, generator=noise, dtype=x.dtype)
    assert nfe == 1000
    torch.testing.assert_close(z, x, atol=1e-8, rtol=0)


@pytest.mark.mutation('ldm.py', "'ddpm': (1, 1)", "'ddpm': (1, 0)")
def test_ddpm_recovers_the_moments_of_a_gaussian():
    g = Gaussian()
    z_T = torch.randn(1, 3, 4).expand(2000, -1, -1)  # all spread comes from the steps' own noise
    z, nfe = ldm.sample(g.eps, z_T, 'ddpm', 1000)
    assert z.dtype == torch.float32 and nfe == 1000
    torch.testing.assert_close(z.mean((0, 2)), g.mean[:, 0].float(), atol=0.08, rtol=0)
    torch.testing.assert_close(z.std((0, 2)), g.std[:, 0].float(), atol=0.015, rtol=0.05)


@pytest.mark.mutation('ldm.py', 'math.exp(-eta * h) * z', 'math.exp(-eta * h - 1e-3) * z')
@pytest.mark.mutation('ldm.py', 'h / (2 * last_h)', 'h / (2.2 * last_h)')
@pytest.mark.mutation('ldm.py', 'return beta / 2 *', 'return beta *')
@pytest.mark.mutation('ldm.py', 'TAU_END = 1e-3', 'TAU_END = 2e-2')
def test_solvers_follow_the_closed_form_flow():
    g, z_T = Gaussian(), torch.randn(4, 3, 5, dtype=torch.float64)
    ends, early = ((ldm.alpha_bar(999), ldm.alpha_bar(last)) for last in (0, 1))
    tau_ends = [torch.tensor(ldm.log_alpha_bar(tau)).exp() for tau in (1.0, 1e-3)]
    for sampler, settings, (start, end), tolerance in (
            ('ddim', dict(steps=1000), ends, 1e-2), ('dpmpp', dict(steps=500), early, 1e-3),
            ('rk45', dict(rtol=1e-7, atol=1e-7), tau_ends, 1e-4)):
        z, _ = ldm.sample(g.eps, z_T, sampler, **settings)
        assert (z - g.transport(z_T, start, end)).abs().max() < tolerance, sampler


@pytest.mark.mutation('ldm.py', 'if order == 2 and', 'if False and')
def test_dpmpp_is_of_second_order():
    g, z_T = Gaussian(), torch.randn(4, 3, 5, dtype=torch.float64)
    errors = []
    for n in (100, 200):
        z = ldm.multistep(lambda z, t: g.eps(z, torch.tensor([t])), z_T,
                          np.linspace(999, 99, n).tolist(), 2, 0)
        errors.append((z - g.transport(z_T, ldm.alpha_bar(999), ldm.alpha_bar(99))).abs().max())
    assert 3.4 < errors[0] / errors[1] < 4.6


class Mixture:
    """Data 0.3 N(-1, 0.2^2) + 0.7 N(2, 0.5^2), independent in each channel and place."""
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mean = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    std = torch.tensor([0.2, 0.5], dtype=torch.float64)

    def denoised(self, z, t):
        """E[z_0 | z_t]: of each part, weighted by how probable it is."""
        ab = ldm.alpha_bar(t).view(-1, *[1] * z.ndim)
        z, var = z[..., None], ab * self.std ** 2 + 1 - ab
        gap = z - ab.sqrt() * self.mean
        share = (self.weight.log() - var.log() / 2 - gap ** 2 / (2 * var)).softmax(-1)
        return (share * (self.mean + ab.sqrt() * self.std ** 2 / var * gap)).sum(-1)

    def eps(self, z, t):
        ab = ldm.alpha_bar(t).view(-1, *[1] * (z.ndim - 1))
        return (z - ab.sqrt() * self.denoised(z, t)) / (1 - ab).sqrt()

    def at(self, t, count):
        """Draws of z_t, (1,1,count)."""
        part = (torch.rand(1, 1, count, dtype=torch.float64) > self.weight[0]).long()
        noise, ab = torch.randn(2, 1, 1, count, dtype=torch.float64), ldm.alpha_bar(t)
        z_0 = self.mean[part] + self.std[part] * noise[0]
        return ab.sqrt() * z_0 + (1 - ab).sqrt() * noise[1]


def moments(z):
    """Mean, deviation, and the shares of the lower mode and of what lies between the modes."""
    shares = [((z > low) & (z < high)).double().mean() for low, high in ((-9, 0), (0, 1))]
    return torch.stack([z.mean(), z.std(), *shares])


@pytest.mark.mutation('ldm.py', 'math.expm1(-(1 + eta) * h)', 'math.expm1(-(1 + 0.9 * eta) * h)')
@pytest.mark.mutation('ldm.py', 'math.exp(-eta * h)', 'math.exp(-0.9 * eta * h)')
@pytest.mark.mutation('ldm.py', 'math.expm1(-2 * eta * h)', 'math.expm1(-1.9 * eta * h)')
def test_sde_dpmpp_keeps_the_moments_of_a_mixture():
    """And of a Gaussian, whose mean and deviation after the last call are known; for any eta."""
    m, g = Mixture(), Gaussian()
    ab = ldm.alpha_bar(4)  # the last of 200 calls; 9 is that of 100
    truth = moments(m.denoised(m.at(9, 800_000), torch.tensor([9])))
    std = (ab ** 0.5 * g.std ** 2 / g.marginal(ab)[1]).T
    z_T = torch.randn(1, 3, 20_000, dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0, 2.0):
        z, _ = ldm.sample(m.eps, m.at(999, 200_000), 'sde-dpmpp', 100, eta=eta)
        torch.testing.assert_close(moments(z), truth, atol=0.012, rtol=0.01)
        z, _ = ldm.sample(g.eps, z_T, 'sde-dpmpp', 200, eta=eta)
        torch.testing.assert_close((z.mean(2) - g.mean.T) / std, torch.zeros_like(std), atol=0.03,
                                   rtol=0)
        torch.testing.assert_close(z.std(2), std, atol=0, rtol=0.02)


@pytest.mark.mutation('ldm.py', '.get(sampler, (2, eta))', '.get(sampler, (2, eta or 1e-9))')
@pytest.mark.mutation('ldm.py', "'dpmpp': (2, 0)", "'dpmpp': (2, 1e-9)")
@pytest.mark.mutation('ldm.py', "'dpmpp': (2, 0)", "'dpmpp': (1, 0)")
def test_sde_dpmpp_without_noise_is_dpmpp():
    z_T = torch.randn(2, 3, 5)
    ode, _ = ldm.sample(Gaussian().eps, z_T, 'dpmpp', 7)
    assert torch.equal(ldm.sample(Gaussian().eps, z_T, 'sde-dpmpp', 7, eta=0.0)[0], ode)
    noisy, again = (ldm.sample(Gaussian().eps, z_T, 'sde-dpmpp', 7, eta=1e-9,
                               generator=torch.Generator().manual_seed(k))[0] for k in (0, 1))
    assert not torch.equal(noisy, ode) and not torch.equal(noisy, again)
    torch.testing.assert_close(noisy, ode, atol=1e-2, rtol=0)


@pytest.mark.mutation('ldm.py', 'if i == len(times) - 1', 'if i == len(times) - 2')
@pytest.mark.mutation('ldm.py', 'nfe += 1', 'nfe += 2')
@pytest.mark.mutation('ldm.py', 'T * i // steps - 1', '(T + 7) * i // steps - 8')
@pytest.mark.parametrize('steps', [3, 20])
def test_steps_are_network_calls(steps):
    grid = [math.floor(-1 + 1000 / steps * i + 1e-9) for i in range(steps, 0, -1)]
    for sampler in ('ddpm', 'ddim', 'sde-dpmpp', 'dpmpp'):
        times = []
        _, nfe = ldm.sample(lambda z, t: times.append(t[0].item()) or z,
                            torch.randn(1, 2, 3).double(), sampler, steps)
        assert nfe == steps and times == grid


@pytest.mark.mutation('ldm.py', '71 / 1920', '71 / 1900')
@pytest.mark.mutation('ldm.py', 'max(0.2, 0.9', 'max(0.2, 0.8')
@pytest.mark.mutation('ldm.py', 'min(grow, max(', 'min(5.0, max(')
@pytest.mark.mutation('ldm.py', 'max(d1, d2)) ** 0.2', 'max(d1, d2)) ** 0.25')
def test_rk45_equals_the_golden_numbers_and_scipy():
    def decay(t, y):
        return -y

    def stiff(t, y):
        return -20 * (y - math.cos(t))
    for f, y0, tol, nfe, value in (
            (decay, [1, 0.5], 1e-3, 14, 0.36806053284212015),
            (decay, [1, 0.5], 1e-5, 26, 0.36788228198472167),
            (stiff, [0], 1e-3, 80, None), (stiff, [0], 1e-5, 146, None)):
        y0 = torch.tensor([y0], dtype=torch.float64)
        y, calls = ldm.rk45(f, y0, 0.0, 1.0, tol, tol)
        scipy = solve_ivp(f, (0, 1), y0[0].numpy(), rtol=tol, atol=tol)
        assert calls == nfe == scipy.nfev
        np.testing.assert_allclose(y[0], scipy.y[:, -1], rtol=1e-12)
        assert value is None or float(y[0, 0]) == pytest.approx(value, rel=1e-13)


@pytest.mark.mutation('ldm.py', '.mean(1).max()', '.mean(1).mean()')
def test_rk45_steps_for_the_hardest_sample():
    rate = torch.tensor([[3.0]] + 63 * [[0.01]], dtype=torch.float64)
    y0 = torch.ones(64, 1, dtype=torch.float64)
    _, alone = ldm.rk45(lambda t, y: -3 * y, y0[:1], 0.0, 1.0, 1e-7, 1e-7)
    _, together = ldm.rk45(lambda t, y: -rate * y, y0, 0.0, 1.0, 1e-7, 1e-7)
    assert together == alone


@pytest.mark.mutation('ldm.py', 'nfe += 1', 'nfe += 0')
def test_rk45_sampling_counts_the_denoise_and_works_in_float32():
    calls, z_T = [], torch.randn(2, 3, 5)

    def eps(z, t):
        calls.append(t)
        return Gaussian().eps(z, t)
    z, nfe = ldm.sample(eps, z_T, 'rk45', rtol=1e-4, atol=1e-4)
    assert nfe == len(calls) and nfe % 6 == 3 and z.dtype == torch.float32  # 2 + 6 k + 1
    ends = (torch.tensor(ldm.log_alpha_bar(tau)).exp() for tau in (1.0, 1e-3))
    torch.testing.assert_close(z.double(), Gaussian().transport(z_T, *ends), atol=1e-2, rtol=0)


@pytest.mark.mutation('ldm.py', "require(sampler in SAMPLERS,", "require(True,")
@pytest.mark.mutation('ldm.py', 'require(eta >= 0', 'require(True')
@pytest.mark.mutation('ldm.py', 'require(1 <= steps <= T', 'require(1 <= steps')
@pytest.mark.mutation('ldm.py', 'require(rtol >= finest and atol >= finest',
                      'require(rtol > 0 and atol > 0')
@pytest.mark.mutation('ldm.py', 'FINEST * torch.finfo(z.dtype).eps /', 'FINEST or')
def test_sampler_settings_out_of_range():
    z = torch.randn(1, 2, 3)
    for settings, word in ((dict(sampler='euler'), 'euler'), (dict(steps=0), '0 sampling'),
                           (dict(steps=1001), '1001'), (dict(sampler='rk45', rtol=0.0), 'rtol'),
                           (dict(sampler='rk45', atol=-1.0), 'atol'), (dict(eta=-0.1), 'eta')):
        with pytest.raises(ValueError, match=word):
            ldm.sample(lambda z, t: z, z, **settings)
    ldm.sample(lambda z, t: z, z, 'rk45', rtol=3e-6, atol=3e-6)
    with pytest.raises(ValueError, match='1e-07: must be at least 2e-06'):
        ldm.sample(lambda z, t: z, z, 'rk45', rtol=1e-7, atol=1e-7)
    try:
        ldm.sample(lambda z, t: 0 * z, z.double(), 'rk45', rtol=1e-7, atol=1e-7)
    except ValueError as error:
        pytest.fail(str(error))


@pytest.mark.mutation('ldm.py', 'require(nfe < MOST_CALLS', 'require(nfe < 2 * MOST_CALLS')
def test_rk45_gives_up_where_the_network_rounds_coarsely():
    """A velocity that is random in its fourth digit has no integral to 1e-9."""
    calls = []

    def coarse(t, y):
        calls.append(t)
        return y + 1e-4 * torch.randn_like(y)
    with pytest.raises(ValueError, match='choose larger ones'):
        ldm.rk45(coarse, torch.ones(1, 2, dtype=torch.float64), 0.0, 1.0, 1e-9, 1e-9)
    assert len(calls) < 10_010 and calls[-1] < 1


@pytest.mark.mutation('ldm.py', 'require(abs(h) > 10', 'require(not abs(h) < 0 * 10')
def test_rk45_stops_on_values_that_are_not_finite():
    calls = []

    def broken(t, y):
        calls.append(t)
        assert len(calls) < 2000
        return y / 0 if t > 0.5 else y
    with pytest.raises(ValueError, match='not finite'):
        ldm.rk45(broken, torch.ones(1, 2), 0.0, 1.0, 1e-3, 1e-3)
    with pytest.raises(ValueError, match='not finite'):
        ldm.rk45(lambda t, y: y / 0, torch.ones(1, 2), 0.0, 1.0, 1e-3, 1e-3)


# ---- network ---------------------------------------------------------------------------------

@pytest.mark.mutation('ldm.py', 'elif attend:', 'elif False:')
def test_the_paper_network_has_358_million_parameters():
    with torch.device('meta'):
        unet = ldm.UNet(ldm.LDMConfig())
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(358e6, rel=2e-3)


def swapped(z):
    """Latents of three equal planes with the first two exchanged."""
    a, b, c = z.chunk(3, dim=2)
    return torch.cat([b, a, c], dim=2)


@pytest.mark.mutation('ldm.py', 'if config.plane_embed and', 'if False and')
@pytest.mark.mutation('ldm.py', "if config.plane_embed and", "if True and")
@pytest.mark.mutation('ldm.py', '.unbind(1)))', '.flip(1).unbind(1)))')
def test_swapping_equal_planes_matters_only_with_plane_embedding():
    z, t = torch.randn(2, 4, 48), torch.tensor([3, 700])
    for plane_embed in (True, False):
        unet = tiny(domain='shape', planes=TRIPLE, plane_embed=plane_embed).unet
        gap = (unet(swapped(z), t) - swapped(unet(z, t))).abs().max()
        assert gap > 1e-2 if plane_embed else gap < 1e-5


@pytest.mark.mutation('ldm.py', "self.groups.setdefault(tuple(size)", "self.groups.setdefault(i")
def test_planes_of_one_shape_share_one_batch():
    unet, batches = tiny(domain='video', planes={'xy': [4, 4], 'yt': [2, 4], 'xt': [2, 4]}).unet, []
    unet.stem.register_forward_hook(lambda layer, args, out: batches.append(tuple(out.shape)))
    unet(torch.randn(3, 4, 32), torch.zeros(3))
    assert batches == [(3, 8, 4, 4), (6, 8, 2, 4)]


@pytest.mark.mutation('encoders.py', 'torch.cat(tokens, dim=2)',
                      'torch.cat([0 * t for t in tokens], 2)')
@pytest.mark.mutation('ldm.py', 'pack({i: planes[i] for i in sorted(planes)})', 'pack(planes)')
def test_every_plane_hears_of_every_other_and_keeps_its_place():
    sizes = {'xy': [2, 4], 'yt': [4, 4], 'xt': [2, 4]}
    unet = tiny(domain='video', planes=sizes, plane_embed=False).unet
    z, t = torch.randn(1, 4, 32), torch.tensor([500])
    parts = slice(8), slice(8, 24), slice(24, 32)
    base = unet(z, t)
    for part in parts:
        moved = z.clone()
        moved[..., part] += 1
        change = (unet(moved, t) - base).abs()
        assert all(change[..., other].max() > 1e-4 for other in parts)
        assert max(parts, key=lambda p: change[..., p].mean()) == part


@pytest.mark.mutation('encoders.py', 'x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)',
                      'x.flip(0).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)')
def test_attention_over_one_plane_is_self_attention_and_over_three_joint():
    block = ldm.Block(8, 8, ldm.LDMConfig(ch=8, head_channels=4), attend=True)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    xs, embs = [torch.randn(6, 8, 3, 2)], [torch.randn(6, 32)]
    h = block.res(xs[0], embs[0])
    single, = block(xs, embs, 6)
    torch.testing.assert_close(single, block.attention(h.flatten(2)).view(6, 8, 3, 2))
    joint, = block(xs, embs, 2)  # two items of three planes
    tokens = torch.stack([torch.cat([h[3 * b + p].flatten(1) for p in range(3)], 1)
                          for b in range(2)])
    expected = block.attention(tokens)
    for b in range(2):
        for p in range(3):
            torch.testing.assert_close(joint[3 * b + p].flatten(1), expected[b, :, 6 * p:6 * p + 6])


@pytest.mark.mutation('ldm.py', 'layer(x, skip.shape[2:])',
                      'layer(x, [2 * n for n in x.shape[2:]])')
@pytest.mark.parametrize('h, w', [(5, 7), (1, 1), (3, 10), (1, 6)])
def test_any_plane_size(h, w):
    model = tiny(planes={'xy': [h, w]}, ch_mult=(1, 2, 2))
    z = torch.randn(2, 4, h * w)
    try:
        out = model.eps(z, torch.tensor([0, 999]))
    except RuntimeError as error:
        pytest.fail(str(error))
    assert out.shape == z.shape and model(z).isfinite()


@pytest.mark.mutation('ldm.py', 'if out_channels % h == 0', 'if h == most')
@pytest.mark.mutation('encoders.py', '*kv.chunk(2, dim=2))', '*kv.chunk(2, dim=2)[::-1])')
@pytest.mark.mutation('encoders.py', 'return x + self.out(h)', 'return self.out(h)')
def test_attention_equals_a_slow_one():
    """Six heads of ten channels: the most of at least eight that 60 channels divide into."""
    heads = ldm.Block(60, 60, ldm.LDMConfig(head_channels=8), True).attention.heads
    layer = encoders.Attention(60, heads, context_channels=5)
    x, context = torch.randn(2, 60, 4), torch.randn(2, 3, 5)
    h = nn.functional.group_norm(x, layer.norm.num_groups, eps=1e-6).mT  # (B, N, C)
    q, (k, v) = layer.q(h), layer.kv(context).split(60, dim=2)
    slow = torch.empty_like(q)
    for b in range(2):
        for n in range(4):
            for own in torch.arange(60).split(10):
                weights = (k[b][:, own] @ q[b, n, own] / 10 ** 0.5).softmax(0)
                slow[b, n, own] = weights @ v[b][:, own]
    try:
        torch.testing.assert_close(layer(x, context), x + layer.out(slow).mT)
    except RuntimeError as error:
        pytest.fail(str(error))


@pytest.mark.mutation('ldm.py', 't.float()[:, None]', 't.float().round()[:, None]')
def test_fractional_times_are_told_apart():
    e = ldm.time_embedding(torch.tensor([10.0, 10.4]), 9)
    assert e.shape == (2, 9) and (e[0] - e[1]).abs().max() > 0.1
    torch.testing.assert_close(e[:, 0], torch.tensor([10.0, 10.4]).cos())


# ---- mixing, loss, conditions ----------------------------------------------------------------

@pytest.mark.mutation('ldm.py', 'torch.lerp(sigma * z_t, out,', 'torch.lerp(z_t, out,')
def test_mixing_at_zero_is_the_standard_normal():
    model = tiny(mixing_init=-40.0)
    z, t = torch.randn(3, 4, 16), torch.tensor([0, 500, 999])
    sigma = (1 - ldm.alpha_bar(t)).sqrt().float()[:, None, None]
    torch.testing.assert_close(model.eps(z, t), sigma * z)
    z_0, _ = ldm.sample(model.eps, z, 'rk45')  # velocity 0, so only the last denoise acts
    ab = math.exp(ldm.log_alpha_bar(1e-3))
    torch.testing.assert_close(z_0, ab ** 0.5 * z, atol=1e-5, rtol=1e-5)


@pytest.mark.mutation('ldm.py', 'share = self.mixing_logit.sigmoid()', 'share = self.mixing_logit')
def test_mixing_is_per_channel_and_learned():
    model = tiny()
    with torch.no_grad():
        model.mixing_logit[0, :, 0] = torch.tensor([-40.0, 0.0, 40.0, 1.0])
    z, t = torch.randn(2, 4, 16), torch.tensor([300, 800])
    z_part = (1 - ldm.alpha_bar(t)).sqrt().float()[:, None, None] * z
    s = torch.tensor([0.0, 0.5, 1.0, 1 / (1 + math.exp(-1))])[:, None]
    torch.testing.assert_close(model.eps(z, t), (1 - s) * z_part + s * model.unet(z, t))
    model(z).backward()
    assert model.mixing_logit.grad[0, 1] != 0
    plain = tiny(mixed=False)
    torch.testing.assert_close(plain.eps(z, t), plain.unet(z, t))


@pytest.mark.mutation('ldm.py', 'return sigma * z_t + alpha * share', 'return sigma * z_t + share')
@pytest.mark.mutation('ldm.py', '1 / self.scales(t)[0] if', '1 / self.scales(t)[1] if')
@pytest.mark.parametrize('mixed', [True, False])
def test_v_of_the_network_and_its_loss(mixed):
    """v = alpha eps - sigma z_0 is the network's output, times the share if mixed."""
    model = tiny(predict='v', mixed=mixed, mixing_init=1.0)
    z0, noise, t = torch.randn(3, 4, 16), torch.randn(3, 4, 16), torch.tensor([0, 300, 999])
    ab = ldm.alpha_bar(t)[:, None, None]
    alpha, sigma = ab.sqrt().float(), (1 - ab).sqrt().float()
    z_t = alpha * z0 + sigma * noise
    v = model.unet(z_t, t) * (torch.tensor(1.0).sigmoid() if mixed else 1)
    eps = model.eps(z_t, t)
    z0_of_eps = (z_t - sigma * eps) / alpha  # both sides times alpha, which is small at 999
    torch.testing.assert_close(alpha * v, alpha * (alpha * eps - sigma * z0_of_eps))
    loss = (v - (alpha * noise - sigma * z0)).square().mean()
    torch.testing.assert_close(model(z0, None, noise, t), loss, rtol=1e-4, atol=0)


@pytest.mark.mutation('ldm.py', 'variance = (alpha * std).square() +', 'variance = alpha * std +')
@pytest.mark.mutation('ldm.py', "std / self.z_std if", 'std if')
@pytest.mark.mutation('ldm.py', 'self.expected_noise(z_t, t, *posterior) if', 'noise if')
def test_expected_noise_is_the_mean_over_the_posterior():
    """Integrated over a grid of eps: p(eps | z_t, x) is N(eps; 0, 1) p(z_0 = z_t - sigma eps | x).

    Here z_0 is that of the VAE, so with its deviations, and z_t - sigma eps is over alpha.
    """
    mean, std = torch.randn(3, 4, 16), torch.rand(3, 4, 16) + 0.3
    z0, noise = mean + std * torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    t, eps = torch.tensor([5, 300, 700]), torch.linspace(-9, 9, 2001, dtype=torch.float64)
    alpha, sigma = (x.sqrt() for x in (ldm.alpha_bar(t)[:, None, None],
                                       1 - ldm.alpha_bar(t)[:, None, None]))
    for latent_norm in ('none', 'channel'):
        model = tiny(latent_norm=latent_norm)
        model.set_latent_stats([0.3, -1.0, 0.0, 2.0], [0.5, 2.0, 1.0, 3.0])
        z_t = alpha * model.normalise(z0) + sigma * noise
        z0_of_eps = model.denormalise((z_t - sigma * eps[:, None, None, None]) / alpha)
        density = torch.exp(-(z0_of_eps - mean).square() / (2 * std ** 2)
                            - eps[:, None, None, None].square() / 2)
        expected = (density * eps[:, None, None, None]).sum(0) / density.sum(0)
        found = model.expected_noise(z_t.float(), t, mean, std)
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
        loss = (model.eps(z_t.float(), t) - found).square().mean()
        torch.testing.assert_close(model(z0, None, noise, t, posterior=(mean, std)), loss,
                                   rtol=1e-4, atol=0)
        exact = model.expected_noise(z_t.float(), t, z0, torch.zeros_like(std))
        torch.testing.assert_close(exact, noise, rtol=0, atol=2e-5)


@pytest.mark.mutation('ldm.py', 'weight_decay=0.0', 'weight_decay=weight_decay')
@pytest.mark.mutation('ldm.py', '[*self.unet.parameters(),', '[*self.parameters(),')
def test_the_mixing_logit_does_not_decay():
    model = tiny(mixing_init=-6.0)
    groups = model.param_groups(0.1, 0.5, mixing_lr_mult=10)
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))
    opt = torch.optim.AdamW(groups)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = model.unet.stem.weight.detach().clone()
    opt.step()
    assert (model.mixing_logit == -6).all()
    torch.testing.assert_close(model.unet.stem.weight, 0.95 * before)
    assert opt.param_groups[1]['lr'] == pytest.approx(1.0)


@pytest.mark.mutation('ldm.py', 'ab.sqrt().float(), (1 - ab).sqrt()', 'ab.sqrt().float(), (1 - ab)')
@pytest.mark.mutation('ldm.py', 'self.normalise(z0.float())', 'z0.float()')
def test_loss_is_the_mean_squared_error_of_the_noise():
    model = tiny(latent_norm='channel')
    model.set_latent_stats(torch.randn(4), torch.rand(4) + 0.5)
    z0, (_, given) = torch.randn(3, 4, 16), model.draw(range(3), 'test')
    z = (z0 - model.z_mean) / model.z_std
    total = 0.0
    for k in range(3):
        ab = float(ldm.alpha_bar(given['t'][k]))
        z_t = ab ** 0.5 * z[k] + (1 - ab) ** 0.5 * given['noise'][k]
        error = (model.eps(z_t[None], given['t'][k:k + 1])[0] - given['noise'][k]).detach()
        total += error.square().mean().item() / 3
    assert model(z0, **given).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.mutation('ldm.py', '.clamp(max=T - 1)', '')
def test_no_time_is_past_the_last():
    """The sigmoid of 40 is 1 in double precision."""
    times = tiny(t_mean=40.0, t_std=1.0).times(torch.tensor([0.1, 0.5, 0.9]))
    assert times.tolist() == [999] * 3


@pytest.mark.mutation('ldm.py', 'return (T * u).long()', 'return ((T - 9) * u).long()')
@pytest.mark.mutation('ldm.py', 'drop=u[:, 1] < self', 'drop=u[:, 1] > self')
@pytest.mark.mutation('ldm.py', 'drop=u[:, 1]', 'drop=u[:, 0]')
@pytest.mark.mutation('ldm.py', 'return noise[:, 0], dict', 'return noise[:, 1], dict')
def test_draws_of_a_row_depend_on_its_position_alone():
    model = tiny(num_classes=3, cond_dropout=0.25)
    posterior, drawn = model.draw(range(9000), 'diffusion', 5)
    again, same = model.draw([70, 3], 'diffusion', 5)
    assert torch.equal(again, posterior[[70, 3]])
    assert all(torch.equal(same[k], drawn[k][[70, 3]]) for k in drawn)
    t, drop = drawn['t'], drawn['drop'].float()
    assert t.min() == 0 and t.max() == 999 and t.dtype == torch.long
    assert t.double().mean() == pytest.approx(499.5, abs=10)
    assert float(drop.mean()) == pytest.approx(0.25, abs=0.02)
    related = torch.corrcoef(torch.stack([t.float(), drop, posterior[:, 0, 0],
                                          drawn['noise'][:, 0, 0]]))
    assert related.fill_diagonal_(0).abs().max() < 0.05


@pytest.mark.mutation('ldm.py', 'c.t_mean + c.t_std *', 'c.t_mean + 2 * c.t_std *')
@pytest.mark.mutation('ldm.py', 'c.t_mean + c.t_std *', 'c.t_std *')
@pytest.mark.mutation('ldm.py', 'ndtri(u.double())).sigmoid()', 'ndtri(u.double())).sigmoid() ** 2')
@pytest.mark.mutation('ldm.py', 'require(self.t_std or not self.t_mean', 'require(True')
def test_times_of_a_normal_logit():
    """ln (t / (1000 - t)) has this mean and deviation: quantiles at 0, 1 and -2 deviations."""
    model, below = tiny(t_mean=-0.5, t_std=1.5), torch.special.ndtr(torch.tensor([0.0, 1.0, -2.0]))
    expected = torch.tensor([1000 / (1 + math.exp(0.5 - 1.5 * d)) for d in (0, 1, -2)])
    assert (expected - model.times(below) - 0.5).abs().max() < 0.52
    t = model.draw(range(4000), 'diffusion', 5)[1]['t']
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000
    logits = torch.logit((t + 0.5) / 1000)
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.1)
    assert logits.std().item() == pytest.approx(1.5, abs=0.1)
    assert tiny().times(torch.tensor([0.0, 0.4567, 0.9999])).tolist() == [0, 456, 999]
    with pytest.raises(ValueError, match='--t_mean -1'):
        tiny(t_mean=-1.0)


@pytest.mark.mutation('ldm.py', "* self.z_std + self.z_mean", "* self.z_std")
def test_latent_normalisation_round_trip():
    model, z = tiny(latent_norm='channel'), torch.randn(50, 4, 16) * 3 + 1
    model.set_latent_stats(z.mean((0, 2)), z.std((0, 2)))
    normal = model.normalise(z)
    assert normal.mean().abs() < 1e-5 and float(normal.std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(model.denormalise(normal), z)
    assert tiny().normalise(z) is z
    assert {'z_mean', 'z_std', 'null_context'} <= set(model.state_dict())


def conditional(kind):
    if kind == 'label':
        return tiny(num_classes=5), torch.tensor([0, 4, 2])
    model = tiny(context_channels=6)
    model.set_null_context(torch.randn(7, 6))
    return model, torch.randn(3, 7, 6)


@pytest.mark.mutation('ldm.py', 'torch.lerp(e_null, e_cond, w)', 'torch.lerp(e_cond, e_null, w)')
@pytest.mark.mutation('ldm.py', 'if w == 1:\n            return lambda',
                      'if w == 0:\n            return lambda')
@pytest.mark.parametrize('kind', ['label', 'text'])
def test_guidance(kind):
    model, cond = conditional(kind)
    calls, z, t = [], torch.randn(3, 4, 16), torch.tensor([0, 400, 999])
    model.unet.register_forward_hook(lambda net, args, out: calls.append(len(out)))
    null, e_cond = model.eps(z, t), model.eps(z, t, cond)
    assert (null - e_cond).abs().max() > 1e-3
    calls.clear()
    assert torch.equal(model.guided(cond, 1)(z, t), e_cond) and calls == [3]
    torch.testing.assert_close(model.guided(cond, 0)(z, t), null, atol=1e-5, rtol=1e-4)
    assert calls == [3, 6]  # both branches as one batch
    torch.testing.assert_close(model.guided(cond, 3)(z, t), null + 3 * (e_cond - null),
                               atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.guided(None, 3)(z, t), null)


@pytest.mark.mutation('ldm.py', 'torch.where(drop, self.null(len(z0)), cond)', 'cond + 0 * drop')
@pytest.mark.mutation('ldm.py', 'emb + self.label(cond), None', 'emb + 0 * self.label(cond), None')
@pytest.mark.mutation('ldm.py', 'self.text(self.self_attention(h), context)',
                      'self.self_attention(h)')
def test_dropped_conditions_do_not_matter_and_others_do():
    for model, cond in (conditional('label'), conditional('text')):
        z0, (_, given) = torch.randn(3, 4, 16), model.draw(range(3), 'test')
        none, other, drop = [False] * 3, cond.flip(0), [True] * 3

        def loss(cond, drop):
            return model(z0, cond, given['noise'], given['t'], torch.tensor(drop)).item()
        assert abs(loss(cond, none) - loss(other, none)) > 1e-5
        assert loss(cond, drop) == loss(other, drop)
        assert loss(cond, drop) == pytest.approx(loss(None, drop), rel=1e-6)


@pytest.mark.mutation('ldm.py', 'self.null(len(z0)), cond)', 'self.null(len(z0)), cond.detach())')
def test_conditions_that_were_kept_get_gradients():
    drop = torch.tensor([False, True, False])
    model, labels = conditional('label')
    model(torch.randn(3, 4, 16), labels, drop=drop).backward()
    rows = model.unet.label.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [True, False, True, False, False, True]  # 0, 2 and none
    model, text = conditional('text')
    model(torch.randn(3, 4, 16), text.requires_grad_(), drop=drop).backward()
    assert text.grad is not None
    assert (text.grad.abs().sum((1, 2)) > 0).tolist() == [True, False, True]


@pytest.mark.mutation('ldm.py', 'cond.max() < classes', 'True')
@pytest.mark.mutation('ldm.py', 'cond.shape[2] == width', 'True')
@pytest.mark.mutation('ldm.py', 'require(classes or width', 'require(True')
def test_wrong_conditions_are_refused():
    for model, cond, word in ((tiny(), torch.zeros(1).long(), 'unconditional'),
                              (tiny(num_classes=3), torch.tensor([4]), 'labels'),
                              (tiny(num_classes=3), torch.tensor([-1]), 'labels'),
                              (tiny(context_channels=6), torch.randn(1, 7, 5), 'features')):
        with pytest.raises(ValueError, match=word):
            model.check_condition(cond)
    with pytest.raises(ValueError, match='not both'):
        tiny(num_classes=3, context_channels=6)
    with pytest.raises(ValueError, match='domain'):
        tiny(domain='shape')


# ---- generation and loading ------------------------------------------------------------------

@pytest.mark.mutation('ldm.py', "rtol, atol, generators,\n", "rtol, atol, None,\n")
@pytest.mark.mutation('ldm.py', "torch_seeded('z_T', s)", "torch_seeded('z_T', len(seeds))")
@pytest.mark.mutation('ldm.py', 'z_T[part].to(device), sampler',
                      'z_T[:len(z_T[part])].to(device), sampler')
def test_a_sample_depends_on_its_seed_alone():
    model, vae, seeds = tiny(num_classes=3), nn.Linear(1, 1), [7, 0, 99, 3]
    labels = torch.tensor([0, 2, 1, 0])

    def run(k, batch, sampler):
        return ldm.generate(vae, model, [seeds[i] for i in k], labels[k], 2.0, sampler, 4,
                            batch=batch)
    for sampler in ('ddpm', 'sde-dpmpp'):
        together = run([0, 1, 2, 3], 4, sampler)
        torch.testing.assert_close(run([0, 1, 2, 3], 3, sampler), together, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(run([2], 1, sampler), together[2:3], atol=1e-4, rtol=1e-4)
        assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.mutation('ldm.py', 'out.append(ldm.denormalise(z))', 'out.append(z)')
@pytest.mark.mutation('ldm.py', 'nfe.append(calls)', 'nfe.append(0)')
def test_generate_returns_latents_of_the_vae_and_its_calls():
    model, z_T = tiny(latent_norm='channel'), torch.randn(3, 4, 16)
    model.set_latent_stats([1.0, 2, 3, 4], [0.5, 1, 1.5, 2])
    z, nfe = ldm.generate(nn.Linear(1, 1), model, range(3), steps=5, batch=2, z_T=z_T,
                          return_nfe=True)
    own = [common.torch_seeded('posterior noise', k) for k in range(3)]
    raw, _ = ldm.sample(model.eps, z_T, 'sde-dpmpp', 5, generator=own)
    torch.testing.assert_close(z, raw * model.z_std + model.z_mean, atol=1e-4, rtol=1e-4)
    assert nfe == [5, 5]
    with pytest.raises(ValueError, match='3 initial noises for 2 seeds'):
        ldm.generate(nn.Linear(1, 1), model, range(2), z_T=z_T)


@pytest.mark.mutation('ldm.py', 'torch.sin(w * angle) * b', 'w * torch.sin(angle) * b')
def test_slerp_stays_on_the_sphere():
    a, b = ldm.initial_noise([1, 2], (8, 64))
    assert torch.equal(a, ldm.initial_noise([1], (8, 64))[0])
    a, b = a / a.norm(), b / b.norm()
    for w in (0.0, 0.3, 1.0):
        assert float(ldm.slerp(a, b, w).norm()) == pytest.approx(1, abs=1e-5)
    angle = torch.arccos((a * b).sum())
    assert float((ldm.slerp(a, b, 0.25) * a).sum()) == pytest.approx(float((angle / 4).cos()),
                                                                     abs=1e-5)
    torch.testing.assert_close(ldm.slerp(a, a, 0.4), a, atol=1e-5, rtol=1e-4)


@pytest.fixture
def checkpoint(tmp_path):
    """A run folder with a small second stage in half precision."""
    import dataclasses
    import vae
    vae_config = vae.VAEConfig(resolution=8, ch=8, ch_mult=(1, 1), num_res_blocks=1, z_channels=4,
                               decoder_ch=8, field_channels=4, mlp_width=8, mlp_blocks=4)
    first, model = vae.D2CVAE(vae_config), tiny(context_channels=6)
    model.set_null_context(torch.randn(7, 6))
    state = dict(kind='ldm', vae_config=dataclasses.asdict(vae_config), step=3, args=dict(seed=2),
                 ldm_config=dataclasses.asdict(model.config), splits=dict(train=[], test=[]),
                 vae_args=dict(dataset='d', preset='p', data='', flip=False, steps=1,
                               resolution=8),
                 **{k: {n: v.half() if v.is_floating_point() else v
                        for n, v in m.state_dict().items()}
                    for k, m in (('vae', first), ('ema', model))})
    common.save_checkpoint(tmp_path / 'ldm.pt', state)
    return tmp_path, state, model


@pytest.mark.mutation('ldm.py', '    load_weights(network, weights, path)', '    pass')
@pytest.mark.mutation('ldm.py', "state.get('vae_args', state['args'])", "state['args']")
@pytest.mark.mutation('ldm.py', '.eval().requires_grad_(False)', '.train()')
def test_load_gives_back_what_was_saved(checkpoint):
    folder, state, model = checkpoint
    for path in (folder, folder / 'ldm.pt'):
        vae, loaded, info = ldm.load(path)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert info['step'] == 3 and info['args'] == state['vae_args']
        assert info['ldm_args'] == dict(seed=2)
        weights = loaded.state_dict()
        assert all(torch.equal(weights[k], v.float()) for k, v in state['ema'].items())
        assert loaded.config == model.config and loaded.null_context.shape == (7, 6)


@pytest.mark.mutation('ldm.py', "state['kind'] != 'vae'", 'True')
@pytest.mark.mutation('ldm.py', "state['kind'] in ('vae', 'ldm')", 'True')
@pytest.mark.mutation('ldm.py', "the_checkpoint(path, 'ldm.pt', 'vae.pt')",
                      "the_checkpoint(path, 'ldm.pt')")
def test_load_refuses_other_files(checkpoint, tmp_path):
    folder, state, _ = checkpoint

    def message(path):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            try:
                ldm.load(path)
            except KeyError as missing:
                pytest.fail(repr(missing))
        assert '\n' not in str(error.value)
        return str(error.value)
    stage1 = tmp_path / 'stage1'
    stage1.mkdir()
    assert 'no such' in message(stage1)
    common.save_checkpoint(stage1 / 'vae.pt', dict(state, kind='vae', args=state['vae_args']))
    assert 'train_ldm.py --vae' in message(stage1) and 'stage 1 only' in message(stage1 / 'vae.pt')
    common.save_checkpoint(folder / 'ldm.pt', dict(kind='inception'))
    assert 'holds a inception' in message(folder)
    common.save_checkpoint(folder / 'ldm.pt', {k: v for k, v in state.items() if k != 'ema'})
    assert 'damaged, without ema' in message(folder)
    for part in ('ema', 'vae', 'ldm_config', 'vae_config'):
        common.save_checkpoint(folder / 'ldm.pt', state | {part: dict(ch=[1])})
        assert 'does not fit this model' in message(folder)
    (folder / 'ldm.pt').write_bytes((stage1 / 'vae.pt').read_bytes()[:100])
    assert 'truncated' in message(folder)
