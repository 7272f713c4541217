"""tests/ablate.py: variants of stage 2 against closed forms, with networks that tell the truth."""

import pytest
import torch
from torch import nn

import ldm
from conftest import program

FILE = 'tests/ablate.py'


@pytest.fixture
def ablate(mutation):
    """The program as a module, with the edit of this run."""
    return program('ablate', mutation)


class Told(nn.Module):
    """A network that answers what it was told."""
    answer = None

    def forward(self, z, t, cond):
        return self.answer


def small(ablate, name, answer=None, **changes):
    """A variant, in training, whose network gives `answer`."""
    model = ablate.combined(name)[0](ldm.LDMConfig(**dict(
        z_channels=3, planes={'xy': [4, 4]}, ch=8, ch_mult=(1,), num_res_blocks=1, attn_factors=(),
        mixed=False) | changes))
    if answer is not None:
        model.unet = Told()
        model.unet.answer = answer
    return model


@pytest.fixture
def diffused():
    """z_0, noise, integer times and, as (B,1,1) in float32, alpha and sigma."""
    t = torch.tensor([0, 60, 500, 999])
    ab = ldm.alpha_bar(t)[:, None, None]
    z0, noise = torch.randn(2, 4, 3, 16)
    return z0, noise, t, ab.sqrt().float(), (1 - ab).sqrt().float()


TRUTHS = {'z0': lambda z0, noise: z0, 'min-snr:5': lambda z0, noise: noise}


@pytest.mark.mutation(FILE, '- alpha * super().eps', '+ alpha * super().eps')
def test_of_a_true_network_eps_is_the_noise(ablate, diffused):
    z0, noise, t, alpha, sigma = diffused
    for name, truth in TRUTHS.items():
        model = small(ablate, name, truth(z0, noise))
        eps = model.eps(alpha * z0 + sigma * noise, t)
        torch.testing.assert_close(eps, noise, rtol=0, atol=2e-5)
        assert model(z0, None, noise, t) < 1e-6


LOSSES = {  # of |network - truth|^2, the weight that each variant gives it
    'z0': lambda snr: snr.clamp(max=5), 'min-snr:5': lambda snr: snr.clamp(max=5) / snr}


@pytest.mark.mutation(FILE, 'self.weight(t).sqrt()', 'self.weight(t)')
@pytest.mark.mutation(FILE, 'weight = min_snr(5).weight', 'weight = min_snr(1).weight')
def test_the_loss_of_z0_is_weighted_by_at_most_5(ablate, diffused):
    weighs_its_error(ablate, 'z0', diffused)


@pytest.mark.mutation(FILE, '(-LOG_SNR).exp()', 'LOG_SNR.exp()')
def test_min_snr(ablate, diffused):
    weighs_its_error(ablate, 'min-snr:5', diffused)


def weighs_its_error(ablate, name, diffused):
    """The training loss of a network that answers 0; in evaluation there is no weight."""
    z0, noise, t, alpha, sigma = diffused
    model, truth = small(ablate, name, torch.zeros_like(z0)), TRUTHS[name](z0, noise)
    weight = LOSSES[name]((alpha / sigma) ** 2)
    torch.testing.assert_close(model(z0, None, noise, t), (weight * truth ** 2).mean(), rtol=1e-4,
                               atol=0)
    error = model.eps(alpha * z0 + sigma * noise, t) - noise
    torch.testing.assert_close(model.eval()(z0, None, noise, t), error.square().mean())


@pytest.mark.mutation(FILE, '(bias - LOG_SNR).sigmoid()', '(LOG_SNR - bias).sigmoid()')
@pytest.mark.mutation(FILE, '-torch.gradient(LOG_SNR)[0] * ', '')
def test_the_sigmoid_weighs_a_uniform_log_snr(ablate):
    """Times drawn by weight have log-SNR of density sigmoid(bias - lambda)."""
    model = small(ablate, 'sigmoid:-3')
    weight = model.weight(torch.arange(1000)).double()
    log_snr = torch.logit(ldm.alpha_bar(torch.arange(1000)))
    softplus = torch.nn.functional.softplus
    for low, high in ((900, 600), (600, 300), (300, 50)):  # the integral of the sigmoid is softplus
        part = weight[high:low].sum() / weight[50:900].sum()
        ends = softplus(-3 - log_snr[[low, high, 900, 50]])
        assert part == pytest.approx(((ends[0] - ends[1]) / (ends[2] - ends[3])).item(), abs=5e-3)
    assert weight.mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.mutation(FILE, 'weight = 1 / (self.BINS * self.probability()[span])',
                      'weight = self.probability()[span] ** 0')
@pytest.mark.mutation(FILE, 'root = self.square.sqrt()', 'root = self.square')
@pytest.mark.mutation(FILE, '(span + place) / self.BINS', 'span / self.BINS')
def test_times_drawn_by_loss_are_weighted_back(ablate):
    """A tenth of the times has nine times the loss, and so half of the draws less a hundredth."""
    model, u = small(ablate, 'by-loss'), (torch.arange(100_000) + 0.5) / 100_000
    model.square[:5] = 9.0 ** 2
    t = model.times(u)
    assert (t < 100).float().mean() == pytest.approx(0.99 / 2 + 0.01 / 10, abs=1e-3)
    weight = model.error_scale(t).square().flatten().detach()
    for power in (0, 1, 2):  # the weighted mean is that over all times alike
        alike = ((torch.arange(1000) / 1000) ** power).mean().item()
        assert (weight * (t / 1000) ** power).mean().item() == pytest.approx(alike, abs=2e-3)
    assert model.eval().times(u).bincount().unique().tolist() == [100]
    assert model.error_scale(t) == 1


@pytest.mark.mutation(FILE, 'len(t) * slope / (2', 'slope / (2')
@pytest.mark.mutation(FILE, '.lerp_(loss.square(), self.SHARE)', '.lerp_(loss, self.SHARE)')
def test_the_loss_of_each_time_is_noted(ablate, diffused):
    z0, noise, t, _, _ = diffused
    model = small(ablate, 'by-loss', torch.zeros_like(z0))
    model(z0, None, noise, t).backward()
    expected = torch.ones(model.BINS)
    expected[t // 20] = 0.9 + 0.1 * noise.square().mean((1, 2)) ** 2
    torch.testing.assert_close(model.square, expected)


def test_dropout_is_of_training_alone(ablate):
    model, z = small(ablate, 'dropout'), torch.randn(2, 3, 16)
    torch.nn.init.normal_(model.unet.out.weight)
    for block in model.unet.modules():
        if hasattr(block, 'conv2'):
            torch.nn.init.normal_(block.conv2.weight)
    t = torch.tensor([3, 900])
    assert not model.eps(z, t).equal(model.eps(z, t))
    assert model.eval().eps(z, t).equal(model.eps(z, t))


@pytest.mark.mutation(FILE, '(1 - 1 / n) ** (self.gamma + 1)', '(1 - 1 / n) ** self.gamma')
@pytest.mark.mutation(FILE, '16 - sigma_rel', '15 - sigma_rel')
@pytest.mark.parametrize('sigma_rel', [0.05, 0.15])
def test_power_average(ablate, sigma_rel, n=400):
    """The weight of step i is that of t^gamma between (i-1)/n and i/n; its deviation sigma_rel."""
    module = nn.Module()
    module.p = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    average = ablate.PowerEMA(module, sigma_rel)
    for k in range(n):
        module.p.data = torch.eye(n, dtype=torch.float64)[k]
        average.update(k + 1)
    ends, (weights,) = torch.linspace(0, 1, n + 1, dtype=torch.float64), average.shadow
    torch.testing.assert_close(weights, (ends ** (ablate.power(sigma_rel) + 1)).diff())
    place = (ends[1:] + ends[:-1]) / 2
    mean = (weights * place).sum()
    deviation = (weights * (place - mean) ** 2).sum().sqrt()
    assert deviation == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.mutation(FILE, 'average.load_state_dict(kept[str(s)])', 'pass')
@pytest.mark.mutation(FILE, '(super(), *self.others.values())', '(super(),)')
def test_averages_go_on_where_they_stopped(ablate, tmp_path):
    module = nn.Linear(3, 2)

    def made():
        return ablate.Averages(tmp_path / 'averages.pt', [0.1], module, 0.999)

    def step(n, *all_averages):
        for p in module.parameters():
            p.data = torch.randn_like(p)
        for average in all_averages:
            average.update(n)
    first = made()
    for n in range(1, 4):
        step(n, first)
    second, state = made(), first.state_dict()
    second.load_state_dict(state)
    before = [p.clone() for p in first.others[0.1].shadow]
    step(4, first, second)
    for a, b in zip((first, first.others[0.1]), (second, second.others[0.1])):
        assert all(x.equal(y) for x, y in zip(a.shadow, b.shadow))
    assert not any(x.equal(y) for x, y in zip(before, first.others[0.1].shadow))


@pytest.mark.mutation(FILE, '[part for part in parts if part not in variants]', '[]')
def test_names_are_joined(ablate):
    cls, flags = ablate.combined('logit-normal:-1+z0')
    assert issubclass(cls, ablate.Z0)
    assert flags == ['--t_mean=-1', '--t_std=1', '--mixed', 'off']
    assert ablate.combined('deep')[1] == ['--ch', '48', '--num_res_blocks', '2']
    try:
        with pytest.raises(ValueError, match='no variant w; of baseline'):
            ablate.combined('v+w')
    except KeyError:
        pytest.fail('not one line')
