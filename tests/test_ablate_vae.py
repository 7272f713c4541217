"""tests/ablate_vae.py: terms of the loss against closed forms and slow versions."""

import pytest
import torch
import torch.nn.functional as F

import vae
from conftest import program

FILE = 'tests/ablate_vae.py'
TERMS = 'pooled', 'features'


@pytest.fixture
def ablate(mutation):
    """The program as a module, with the edit of this run."""
    return program('ablate_vae', mutation)


@pytest.mark.mutation(FILE, 'F.avg_pool2d(values - truth, side)', 'F.avg_pool2d(values, side)')
@pytest.mark.mutation(FILE, 'random_features(truth)', 'random_features(-truth)')
def test_terms_vanish_for_equal_pictures_only(ablate):
    values, other = torch.rand(2, 2, 3, 16, 12)
    for term in TERMS:
        assert getattr(ablate, term)(values, values) == 0
        assert getattr(ablate, term)(values, other) > 0.01


@pytest.mark.mutation(FILE, 'for side in (2, 4)', 'for side in (2,)')
def test_means_of_a_constant_and_a_checkerboard(ablate):
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing='ij')
    truth = torch.rand(1, 3, 8, 12)
    for error, expected in ((torch.full_like(x, -0.25), 0.5), ((-1) ** (x + y), 0)):
        assert ablate.pooled(truth + error, truth).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.mutation(FILE, 'stride=1 if i == 0 else 2', 'stride=2')
@pytest.mark.mutation(FILE, 'manual_seed(0)', 'manual_seed(torch.seed())')
@pytest.mark.mutation(FILE, '(2 / (9 * m)) ** 0.5', '(1 / (9 * m)) ** 0.5')
@pytest.mark.mutation(FILE, ').relu()', ')')
def test_random_features_are_those_of_fixed_filters(ablate):
    x = torch.randn(4, 3, 30, 30)
    first, second, third = ablate.random_features(x)
    ablate.filters.cache_clear()
    assert torch.equal(ablate.random_features(x)[0], first)
    weight = ablate.filters()[0]
    pixel = torch.einsum('bcij,ocij->bo', x[:, :, 5:8, 9:12], weight).clamp(min=0)
    torch.testing.assert_close(first[:, :, 5, 9], pixel)
    assert [f.shape[2] for f in (first, second, third)] == [28, 13, 6]
    for weight in ablate.filters():
        assert weight.square().sum((1, 2, 3)).mean() == pytest.approx(2, rel=0.1)
    torch.testing.assert_close(ablate.features(3 * x, 0 * x), 3 * ablate.features(x, 0 * x))


@pytest.mark.mutation(FILE, 'weight * term(*pair)', 'term(*pair)')
@pytest.mark.mutation(FILE, 'return sum(terms, ())', 'return sum(terms[:1], ())')
def test_a_variant_adds_weighted_terms_to_the_loss(ablate):
    values, truth = torch.rand(2, 2, 3, 16, 16)
    plain = dict(vae.LOSSES)
    with ablate.variant('multi-scale+features+lr-2e-3'):
        found = {name: vae.LOSSES[name](values, truth) for name in ('l1', 'l2')}
    more = 0.5 * ablate.pooled(values, truth) + 0.5 * ablate.features(values, truth)
    torch.testing.assert_close(found['l1'], F.l1_loss(values, truth) + more)
    torch.testing.assert_close(found['l2'], F.mse_loss(values, truth) + more)
    assert vae.LOSSES == plain
    assert ablate.combined('lr-2e-3+mlp-96')[1] == ['--lr', '2e-3', '--mlp_width', '96']
    with pytest.raises(ValueError, match='no variant nothing; of baseline'):
        ablate.combined('baseline+nothing')


@pytest.mark.mutation(FILE, "mode='area').flatten(2)", "mode='nearest').flatten(2)")
@pytest.mark.mutation(FILE, 'if self.training and', 'if')
@pytest.mark.mutation(FILE, "truth.shape[2] * batch['scale']",
                      "truth.shape[2] * batch['scale'] ** 0")
@pytest.mark.mutation(FILE, 'image=network', 'image=vae.PictureVAE')
def test_smaller_latents_stand_for_smoother_pictures(ablate, monkeypatch):
    """Half of them in training, none in evaluation; the truth loses what its latent has lost."""
    config = vae.VAEConfig(resolution=16, ch=8, ch_mult=(1, 2), decoder_ch=8, decoder_mult=(2, 1),
                           fields=(1, 2), field_channels=4, mlp_width=16, z_channels=4)
    with ablate.variant('baseline'):
        assert type(vae.D2CVAE(config)) is vae.PictureVAE
    with ablate.variant('multi-scale+eq'):
        model = vae.D2CVAE(config)
    assert type(model) is ablate.Equivariant
    z, read = torch.randn(2, 4, 64), []
    monkeypatch.setattr(vae.PictureVAE, 'decode', lambda self, z, sizes: read.append((z, sizes)))
    torch.manual_seed(0)
    for _ in range(200):
        model.decode(z)
    sides = torch.tensor([sizes['xy'] for _, sizes in read])
    assert (sides[:, 0] == sides[:, 1]).all() and set(sides[:, 0].tolist()) == {*range(2, 9)}
    assert 70 < (sides[:, 0] < 8).sum() < 110
    small = next(z for z, sizes in read if sizes['xy'] == (4, 4))
    torch.testing.assert_close(small, F.avg_pool2d(
        z.unflatten(2, (8, 8)), 2).flatten(2))
    model.eval()
    read.clear()
    for _ in range(20):
        model.decode(z)
    assert all(found is z for found, _ in read) and model.share == 1

    truth = torch.rand(2, 3, 16, 16)
    monkeypatch.setattr(vae.PictureVAE, 'predict', lambda self, xi, batch: (None, truth))
    batch = dict(scale=torch.tensor([1.0, 0.5]))
    assert model.predict(None, batch)[1] is truth
    model.share = 0.5
    found = model.predict(None, batch)[1]
    for k, factor in enumerate((2, 4)):
        means = F.avg_pool2d(truth[k:k + 1], factor)
        again = F.interpolate(means, scale_factor=factor, mode='bilinear')
        torch.testing.assert_close(found[k:k + 1], again)
