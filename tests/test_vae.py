"""The first stage: posterior, decoder, objective, rendering."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import common
import encoders
import inr
import vae

TINY = dict(resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, decoder_ch=8,
            decoder_mult=(2, 1), fields=(1, 2), field_channels=4, mlp_width=8)


def tiny(**changes):
    return vae.D2CVAE(vae.VAEConfig(**{**TINY, **changes}))


def batch_of(n=3, r=16, h=16, w=16):
    corner = torch.rand(n, 2, 1) - 1
    return dict(image=torch.rand(n, 3, r, r) * 2 - 1, target=torch.rand(n, 3, h, w) * 2 - 1,
                box=torch.cat([corner, corner + 1], 2), scale=torch.linspace(0.5, 1, n))


# ---- posterior ---------------------------------------------------------------------------------

@pytest.mark.mutation('vae.py', '- 1 - self.logvar', '- self.logvar')
@pytest.mark.mutation('vae.py', 'self.logvar.exp() - 1', '(0.5 * self.logvar).exp() - 1')
def test_kl_equals_that_of_torch_distributions():
    q = vae.Posterior(torch.randn(2, 6, 5), None)
    std = (0.5 * q.logvar).exp()
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, std),
                                           torch.distributions.Normal(0, 1))
    torch.testing.assert_close(q.kl(), kl.sum((1, 2)))


@pytest.mark.mutation('vae.py', '(0.5 * self.logvar).exp() * noise', 'self.logvar.exp() * noise')
def test_posterior_samples_have_its_moments():
    q = vae.Posterior(torch.tensor([[[1.0], [math.log(4)]]]).expand(50000, 2, 1), None)
    z = q.sample()
    assert abs(z.mean() - 1) < 0.05 and abs(z.std() - 2) < 0.05


# ---- shapes ------------------------------------------------------------------------------------

@pytest.mark.mutation('encoders.py', '(x.shape[3] % 2, x.shape[2] % 2)', '(0, 0)')
def test_any_picture_size():
    model = tiny()
    for size in ((16, 16), (13, 21), (5, 64), (1, 3)):
        q = model.encode(torch.rand(2, 3, *size))
        assert q.sizes == dict(xy=tuple(-(-n // 2) for n in size))
        xi = model.decode(q.mean, q.sizes)
        h, w = q.sizes['xy']
        assert [f['xy'].shape[2:] for f in xi] == [(h, w), (2 * h, 2 * w)]
        assert model.render(xi, (7, 3)).shape == (2, 3, 7, 3)


@pytest.mark.mutation('encoders.py', 'channels < 4 * groups', 'channels < groups')
@pytest.mark.mutation('encoders.py', 'math.gcd(32, channels)', 'math.gcd(16, channels)')
def test_norms_pool_at_least_four_channels():
    """A change of one channel is felt by its group, a 32nd of the channels but four or more."""
    for channels, group in ((512, 16), (128, 4), (64, 4), (48, 6), (24, 6), (8, 4), (6, 6), (3, 3)):
        x, layer = torch.randn(1, channels, 3, 3), encoders.norm(channels)
        changed = x.clone()
        changed[:, -1] *= 2
        felt = (layer(changed) != layer(x)).flatten(2).any(2)[0]
        assert felt[-group:].all() and not felt[:-group].any()


@pytest.mark.mutation('vae.py', '(h * x.shape[2], w', '(x.shape[2], w')
def test_any_number_of_fields():
    for mult, fields in (((1,), (1,)), ((2, 1), (2,)), ((2, 1), (1, 2)), ((4, 2, 1), (1, 4)),
                         ((4, 2, 2, 1), (1, 2, 4, 8))):
        model = tiny(decoder_mult=mult, fields=fields)
        xi = model.decode(torch.randn(1, 4, 64))
        assert [f['xy'].shape[2] for f in xi] == [8 * f for f in fields]
        assert all(f['xy'].shape[1] == 4 for f in xi)


@pytest.mark.mutation('vae.py', '[-1] == top', '[-1] <= top')
def test_impossible_configurations_are_refused():
    for changes in (dict(fields=(1,)), dict(fields=(2, 1)), dict(fields=(3,)), dict(fields=(1, 4)),
                    dict(resolution=1, ch_mult=(1, 1, 1))):
        with pytest.raises(ValueError, match='--'):
            vae.VAEConfig(**{**TINY, **changes})


def test_parameters_of_the_paper():
    """Table 9's AFHQ: z 64 x 64 x 64 from 256 x 256, fields of 64 channels at 64, 128, 256."""
    config = vae.VAEConfig()
    with torch.device('meta'):
        model = vae.D2CVAE(config)
    assert model.latent_sizes() == dict(xy=(64, 64)) and config.n_ref == 196608
    fields = [f['xy'] for f in model.decode(torch.empty(1, 64, 4096, device='meta'))]
    assert [tuple(f.shape[1:]) for f in fields] == [(64, 64, 64), (64, 128, 128), (64, 256, 256)]


# ---- domains -----------------------------------------------------------------------------------

SHAPE = dict(domain='shape', channels=1, loss='bce', scale_injection=False, point_hidden=8)


@pytest.mark.mutation('vae.py', 'self.stretch.get(name, (2, 2))), [])', '(2, 2)), [])')
@pytest.mark.mutation('vae.py', 'w * x.shape[3]))', '2 * x.shape[3]))')
def test_a_plane_may_grow_along_one_axis_only():
    """The planes, alike in shape, do not share a batch if they grow differently."""
    model, z = tiny(**SHAPE), torch.randn(2, 4, 3 * 64)
    square = model.decode(z)
    model.stretch = dict(yz=(2, 1), xz=(1, 2))
    xi = model.decode(z)
    assert {n: tuple(f.shape[2:]) for n, f in xi[1].items()} == dict(
        xy=(16, 16), yz=(16, 8), xz=(8, 16))
    for name in ('xy', 'yz', 'xz'):
        torch.testing.assert_close(xi[0][name], square[0][name])
    torch.testing.assert_close(xi[1]['xy'], square[1]['xy'])
    h = model.post_quant['yz'](inr.unpack(z, model.latent_sizes())['yz'])
    h = model.decoder.levels[0](model.decoder.stem(h)).repeat_interleave(2, dim=2)
    h = model.decoder.levels[1](model.decoder.ups[0].conv(h))
    torch.testing.assert_close(xi[1]['yz'], model.decoder.heads['2'](h))


@pytest.mark.mutation('vae.py', 'points.new_tensor([*at])', 'points.new_tensor([*at]).neg()')
def test_a_render_is_a_slice_of_the_function():
    model = tiny(**SHAPE, coord_input=True).requires_grad_(False)
    xi = model.decode(torch.randn(2, 4, 3 * 64))
    grid = torch.cat([inr.make_grid(20, 24), torch.full((20, 24, 1), 0.3)], dim=2)
    torch.testing.assert_close(model.render(xi, (20, 24), at=(0.3,))[:, 0],
                               model.query(xi, grid[None])[..., 0])


@pytest.mark.mutation('vae.py', '{*other.own_flags} - {*cls.own_flags}', '{*cls.own_flags}')
@pytest.mark.mutation('vae.py', 'require(value in values', 'require(values')
def test_flags_of_other_domains_are_refused():
    for changes in (dict(point_hidden=8), dict(threshold=0.2), dict(loss='bce'),
                    dict(coord_input=True), dict(SHAPE, loss='l1'),
                    dict(SHAPE, scale_injection=True)):
        with pytest.raises(ValueError, match='--'):
            tiny(**changes)
    try:
        assert tiny(**SHAPE, threshold=0.2).config.n_ref == 2048
    except ValueError as error:
        pytest.fail(str(error))


# ---- objective ---------------------------------------------------------------------------------

@pytest.mark.mutation(
    'vae.py',
    "n = c.n_ref if c.kl_mode == 'code'",
    "n = 1 if c.kl_mode == 'code'")
@pytest.mark.mutation('vae.py', "losses['sn'] / c.n_ref", "losses['sn']")
@pytest.mark.mutation('vae.py', 'l1=F.l1_loss', 'l1=F.smooth_l1_loss')
def test_objective_is_equation_9():
    check_objective('code', 768)
    check_objective('paper', 256)


def check_objective(mode, n):
    model, batch = tiny(kl_mode=mode, sn_start=10.0), batch_of()
    noise = torch.randn(3, 4, 64)
    losses = model(batch, torch.tensor([0.3, 5.0]), noise)
    q = model.encode(batch)
    z = q.mean + (q.logvar / 2).exp() * noise
    xi = model.decode(z)
    values = torch.cat([model.query([{k: f[b:b + 1] for k, f in level.items()} for level in xi],
                                    inr.make_grid(16, 16, box=batch['box'][b]),
                                    batch['scale'][b]) for b in range(3)])  # (B, h, w, 3)
    recon = (values.permute(0, 3, 1, 2) - batch['target']).abs().mean()
    total = recon + 0.3 * q.kl().mean() / n + 5 * losses['sn'] / 768
    torch.testing.assert_close(losses['reconstruction'], recon)
    torch.testing.assert_close(losses['total'], total)
    assert losses['kl'] > 1 and losses['sn'] > 1


@pytest.mark.mutation('vae.py', 'for dim in (2, 3)', 'for dim in (2, 2)')
@pytest.mark.mutation('vae.py', 'dim=dim).abs()', 'dim=dim).square()')
@pytest.mark.mutation('vae.py', '    error = values - truth\n', '    error = values\n')
def test_differences_of_a_ramp_and_a_checkerboard():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing='ij')
    truth = torch.rand(1, 3, 8, 12)
    for error, expected in ((3 * x - 2 * y, 5), (0 * x - 0.25, 0), ((-1) ** (x + y), 4)):
        found = vae.gradient_loss(truth + error, truth).item()
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.mutation('vae.py', 'gradient_loss(values.float(), truth)',
                      'gradient_loss(values.float(), 2 * truth)')
@pytest.mark.mutation('vae.py', "total = total + c.gradient_weight * losses['gradient']", 'pass')
@pytest.mark.mutation('vae.py', "'ch', 'ch_mult', 'gradient_weight'", "'ch', 'ch_mult'")
def test_differences_between_neighbours_in_the_loss():
    model, batch = tiny(gradient_weight=0.5), batch_of()
    noise = torch.randn(3, 4, 64)
    losses = model(batch, noise=noise, penalty=0)
    model.config.gradient_weight = 0.0
    plain = model(batch, noise=noise, penalty=0)
    values, truth = model.predict(model.decode(model.encode(batch).sample(noise)), batch)
    expected = vae.gradient_loss(values, truth)
    torch.testing.assert_close(losses['gradient'], expected)
    torch.testing.assert_close(losses['total'], plain['total'] + 0.5 * expected)
    assert 'gradient' not in plain
    try:
        tiny(**SHAPE, gradient_weight=0.5)
        pytest.fail('surfaces have no neighbouring pixels')
    except ValueError as error:
        assert '--gradient_weight: is for image data' in str(error)


@pytest.mark.mutation(
    'vae.py',
    'LOSSES[c.loss](values.float(), truth)',
    'LOSSES[c.loss](values.float(), truth) * truth.numel() / c.n_ref')
def test_balance_does_not_depend_on_the_number_of_coordinates():
    """Targets of any size, all 0.5 off, cost the same; so KL and SN keep their share."""
    model = tiny(scale_injection=False, sn_start=0.0)
    torch.nn.init.zeros_(model.mlp.out.weight)
    totals = []
    for h, w in ((16, 16), (4, 8), (24, 40)):
        batch = dict(batch_of(h=h, w=w), image=torch.zeros(3, 3, 16, 16))
        batch['target'] = torch.full((3, 3, h, w), 0.5)
        totals.append(model(batch, torch.tensor([0.3, 0.0]), torch.zeros(3, 4, 64))['total'])
    torch.testing.assert_close(torch.stack(totals), totals[0].expand(3))


@pytest.mark.mutation('vae.py', '1e-4 * steps) / (config.anneal', '1e-2 * steps) / (config.anneal')
@pytest.mark.mutation('vae.py', 'p = min(max((step', 'p = max(max((step')
@pytest.mark.mutation('vae.py', '(1 - p) * math.log(config.sn_start)', 'math.log(config.sn_start)')
def test_annealing():
    config = vae.VAEConfig(kl_start=1e-4, kl_weight=0.5, sn_start=10.0, sn_end=0.1)
    at = {step: vae.annealed(step, 1000, config) for step in (0, 450, 900, 1000)}
    assert at[0] == pytest.approx([1e-4, 10.0])
    assert at[450] == pytest.approx([1e-4 + 0.4999 * 449.9 / 900, 1.0], rel=1e-5)
    assert at[900] == pytest.approx([0.49994446, 0.1], rel=1e-5)
    assert at[1000] == pytest.approx([0.5, 0.1], rel=1e-5)
    assert vae.annealed(0, 10, dataclasses.replace(config, sn_start=0.0))[1] == 0


@pytest.mark.mutation(
    'vae.py',
    'p.flatten(1) for p in weights',
    'p.flatten(2).mean(2) for p in weights')
@pytest.mark.mutation('vae.py', 'for g in self.gammas', 'for g in self.gammas[1:]')
@pytest.mark.mutation('vae.py', 'range(rounds)', 'range(1)')
def test_spectral_penalty_equals_singular_values():
    model = tiny()
    model.spectral(rounds=100)
    penalty = model.spectral()
    convs = [m.weight for n in (model.encoder, model.quant, model.post_quant, model.decoder)
             for m in n.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m.weight for n in (model.encoder, model.decoder) for m in n.modules()
             if isinstance(m, torch.nn.GroupNorm)]
    exact = sum(torch.linalg.svdvals(w.flatten(1)).max() for w in convs)
    exact = exact + sum(g.abs().max() for g in norms)
    torch.testing.assert_close(penalty, exact, rtol=1e-3, atol=0)
    penalty.backward()
    w = max(convs, key=lambda w: w.numel())
    u, s, v = torch.linalg.svd(w.detach().flatten(1))
    torch.testing.assert_close(w.grad.flatten(1), u[:, :1] @ v[:1], rtol=0, atol=0.05)
    assert tiny(sn_scope='encoder').spectral() < penalty


@pytest.mark.mutation(
    'vae.py',
    "c.fields[-1:] if c.conditioning == 'single' else c.fields",
    'c.fields')
def test_every_parameter_of_the_objective_learns():
    for conditioning in ('cfc', 'concat', 'single'):
        model = tiny(conditioning=conditioning, sn_start=0.0)
        model(batch_of(), torch.tensor([0.1, 1.0]))['total'].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_of_the_objective_end_at_the_configured_ones():
    model, batch, noise = tiny(kl_weight=0.3, sn_end=0.2), batch_of(), torch.randn(3, 4, 64)
    model.spectral(rounds=100)
    expected = model(batch, torch.tensor([0.3, 0.2]), noise)['total']
    torch.testing.assert_close(model(batch, noise=noise)['total'], expected, rtol=1e-4, atol=0)


@pytest.mark.mutation('vae.py', '@torch.no_grad()\n    def render(', 'def render(')
@pytest.mark.mutation('inr.py', 'return plain.requires_grad_(False)', 'return plain')
def test_render_keeps_no_graph():
    model = tiny()
    xi = model.decode(torch.randn(1, 4, 64))
    assert not model.render(xi, (8, 8)).requires_grad
    frozen = model.mlp.fixed_scale(torch.ones(1))
    assert not any(p.requires_grad for p in frozen.parameters())


# ---- reading the function ----------------------------------------------------------------------

@pytest.fixture
def function():
    model = tiny().eval().requires_grad_(False)
    for p in model.mlp.parameters():
        p.mul_(2)  # far from linear
    return model, model.decode(torch.randn(2, 4, 64))


@pytest.mark.mutation('vae.py', 'prod(y, x)', 'prod(ys[:len(y)], x)')
@pytest.mark.mutation('vae.py', 'prod(y, x)', 'prod(y, xs[:len(x)])')
@pytest.mark.mutation('vae.py', 'fine, box)[None]', 'fine)[None]')
def test_render_equals_query_at_every_chunk_size(function):
    model, xi = function
    for size, box in (((16, 16), None), ((20, 17), None),
                      ((12, 13), ((-0.25, 0.5), (0.0, 1.0)))):
        grid = inr.make_grid(*size, box=box)
        s = inr.grid_scale(16, size, None if box is None else torch.tensor(box))
        expected = model.query(xi, grid, s).permute(0, 3, 1, 2)
        torch.testing.assert_close(expected, model.query(xi, grid).permute(0, 3, 1, 2))
        for chunk in (1, 50, 10 ** 6):
            torch.testing.assert_close(model.render(xi, size, box, chunk=chunk), expected,
                                       rtol=1e-5, atol=1e-5)


@pytest.mark.mutation('vae.py', 'max(1, chunk // (columns * each)),',
                      '1 + max(1, chunk // (columns * each)),')
@pytest.mark.mutation('vae.py', 'columns = min(size[1], max(1, chunk // each))',
                      'columns = size[1]')
def test_render_reads_no_more_points_at_a_time_than_asked(function):
    model, xi = function
    points, read = [], model.look_up
    model.look_up = lambda xi, c: points.append(c.shape[0] * c.shape[1]) or read(xi, c)
    model.render(xi, (64, 40), chunk=400)
    assert max(points) == 400 and sum(points) == 2 * 64 * 40
    points.clear()
    model.render(xi, (2, 1000), chunk=400)  # averages 8 rows
    assert max(points) == 400 and sum(points) == 2 * 16 * 1000


@pytest.mark.mutation(
    'vae.py',
    'F.avg_pool2d(tile, fold) if',
    'tile[:, :, ::fold[0], ::fold[1]] if')
@pytest.mark.mutation('vae.py', 'if antialias else (1, 1)', 'if True else (1, 1)')
def test_small_renders_are_area_averages(function):
    model, xi = function
    fine = model.render(xi, (16, 24), antialias=False)
    torch.testing.assert_close(model.render(xi, (8, 12)), F.avg_pool2d(
        model.render(xi, (16, 24)), 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.render(xi, (16, 24)), fine)
    torch.testing.assert_close(model.render(xi, (8, 12), chunk=20), model.render(xi, (8, 12)),
                               rtol=1e-5, atol=1e-5)
    raw = model.render(xi, (8, 8), antialias=False)
    values = model.query(xi, inr.make_grid(8, 8), 2.0).permute(0, 3, 1, 2)
    torch.testing.assert_close(raw, values, rtol=1e-5, atol=1e-5)


def test_a_crop_is_a_window_of_the_whole(function):
    """Rendering a quarter at the pitch of the whole gives the same pixels."""
    model, xi = function
    whole = model.render(xi, (32, 48))
    part = model.render(xi, (16, 12), ((-0.5, 0.0), (-1.0, 0.0)))
    torch.testing.assert_close(part, whole[:, :, :16, 12:24], rtol=1e-5, atol=1e-5)


def test_samples_of_a_batch_are_independent(function):
    model, xi = function
    one = model.decode(torch.randn(1, 4, 64))
    both = [{k: torch.cat([f[:1], g]) for (k, f), g in zip(a.items(), b.values())}
            for a, b in zip(xi, one)]
    torch.testing.assert_close(model.render(both, (20, 20))[1:], model.render(one, (20, 20)),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.mutation('vae.py', '(box[:, 0] >= box[:, 1]).any()', 'False')
def test_impossible_renders_are_refused(function):
    model, xi = function
    for size, box in (((0, 4), None), ((4, 4), ((0.5, 0.0), (-1, 1)))):
        with pytest.raises(ValueError, match='cannot render'):
            model.render(xi, size, box)
    for size, at in (((4, 4, 4), ()), ((4, 4), (0.0,))):
        with pytest.raises(ValueError, match='cannot render'):
            model.render(xi, size, at=at)


@pytest.mark.mutation('inr.py', '[name], points[..., along]', '[name], -points[..., along]')
def test_query_takes_points_of_any_shape(function):
    model, xi = function
    points = torch.rand(5, 2) * 2 - 1
    shared, each = model.query(xi, points), model.query(xi, points.expand(2, 5, 2))
    assert shared.shape == (2, 5, 3)
    torch.testing.assert_close(shared, each)
    torch.testing.assert_close(shared, model.query(xi, points[None]))
    two_rows = inr.make_grid(2, 6)  # as many rows as samples: only its own dimension tells
    assert model.query(xi, two_rows[None]).shape == (2, 2, 6, 3)
    grid = inr.make_grid(16, 16)
    field = xi[-1]['xy']
    torch.testing.assert_close(inr.sample_field(xi[0]['xy'], inr.make_grid(8, 8).reshape(
        1, -1, 2).expand(2, -1, -1)).mT.unflatten(2, (8, 8)), xi[0]['xy'])
    pe = [inr.sample_field(level['xy'], grid.reshape(1, -1, 2).expand(2, -1, -1)) for level in xi]
    assert field.shape[2:] == (16, 16)
    torch.testing.assert_close(model.query(xi, grid).flatten(1, 2),
                               model.mlp(pe, scale=torch.ones(1)))


# ---- one sample as a function ------------------------------------------------------------------

@pytest.mark.mutation('inr.py', "kind='function', about=f.about", "kind='function', about={**f.about, "
                      "'extent': 1.0}")
@pytest.mark.mutation('inr.py', 'v.half() for k, v in f.mlp', '0.99 * v for k, v in f.mlp')
@pytest.mark.mutation('inr.py', 'name: field.half().clone()', 'name: field.bfloat16()')
@pytest.mark.mutation('inr.py', "points.new_tensor([scale])", "points.new_tensor([1.0])")
@pytest.mark.mutation('vae.py', "plane_merge=self.config.plane_merge, read", "plane_merge='concat', read")
def test_an_exported_function_is_the_sample(tmp_path):
    """At points of any shape, at the period of their grid or a given one, to half precision."""
    for domain in vae.DOMAINS:
        D = 1 + max(map(max, inr.PLANES[domain].values()))
        encoder = (dict(vit_width=16, vit_depth=1, vit_heads=1, plane_depth=1, frames=5)
                   if domain == 'video' else dict(ch=8, ch_mult=(1, 2)))
        model = vae.D2CVAE(vae.VAEConfig(
            domain=domain, channels=2, extent=0.55, resolution=16, **encoder,
            z_channels=4, decoder_ch=8, decoder_mult=(2, 1), fields=(1, 2), field_channels=4,
            mlp_width=16, plane_merge='sum', scale_injection=domain == 'image',
            loss='bce' if domain == 'shape' else 'l1', coord_input=domain == 'shape'))
        sizes = model.latent_sizes()
        xi = model.decode(torch.randn(1, 4, sum(h * w for h, w in sizes.values())))
        inr.save_function(tmp_path / 'f.pt', model.function(xi))
        f = inr.load_function(tmp_path / 'f.pt')
        assert torch.equal(f.xi[0]['xy'], xi[0]['xy'].half().float()) and f.extent == 0.55
        assert {f.to('meta').xi[0]['xy'].device.type, next(f.mlp.parameters()).device.type} == {'meta'}
        f = inr.load_function(tmp_path / 'f.pt')
        points, grid = torch.rand(7, D) * 2 - 1, inr.make_grid(*[5, 9, 8][-D:])
        for c, scale in ((points, None), (grid, None), (grid, 0.3)):
            try:
                values = f(c, scale)
            except RuntimeError as error:
                pytest.fail(str(error))
            assert values.shape == (*c.shape[:-1], 2)
            torch.testing.assert_close(values, model.query(xi, c[None], scale)[0], atol=3e-3,
                                       rtol=3e-3)
        assert domain != 'image' or (f(grid, 0.3) - f(grid)).abs().max() > 1e-2
        torch.testing.assert_close(f(points[0]), f(points)[0])
        assert not any(p.requires_grad for p in f.parameters())
        none = f(torch.rand(3, 0, D), dirs=torch.rand(0, 3) if domain == 'nerf' else None)
        assert none.shape == (3, 0, f(torch.zeros(1, D), dirs=torch.ones(3)).shape[-1])


@pytest.mark.mutation('inr.py', 'points = coords.reshape(1,', 'points = coords.detach().reshape(1,')
def test_gradients_of_a_function_are_those_of_differences(function):
    model, xi = function
    xi = [{k: field[:1].double() for k, field in level.items()} for level in xi]
    f = model.function(xi).double()
    points = ((torch.rand(20, 2) * 2 - 1).double() * 0.9).requires_grad_()
    value = f(points, 1.0)[:, 0]
    try:
        gradient, = torch.autograd.grad(value.sum(), points)
    except RuntimeError as error:
        pytest.fail(str(error))
    for axis in range(2):
        h = torch.zeros(2).double()
        h[axis] = 1e-6
        difference = (f(points + h, 1.0) - f(points - h, 1.0))[:, 0] / 2e-6
        torch.testing.assert_close(gradient[:, axis], difference, atol=1e-5, rtol=1e-4)


@pytest.mark.mutation('inr.py', "load_checkpoint(path, 'function', device)",
                      "load_checkpoint(path, None, device)")
def test_files_that_hold_no_function(tmp_path):
    common.save_checkpoint(tmp_path / 'vae.pt', dict(kind='vae', about=dict(
        domain='image', extent=1.0, plane_merge='sum', read_out=dict(
            pe_channels=[4], out_channels=3))))
    (tmp_path / 'torn.pt').write_bytes(b'PK')
    for name, word in (('vae.pt', 'function is needed'), ('torn.pt', 'truncated')):
        with pytest.raises(ValueError, match=word):
            try:
                inr.load_function(tmp_path / name)
            except KeyError as error:
                pytest.fail(str(error))
    with pytest.raises(FileNotFoundError, match='none.pt'):
        inr.load_function(tmp_path / 'none.pt')


@pytest.mark.mutation('inr.py', 'torch.as_tensor(self.centre) * scale', 'torch.as_tensor(self.centre)')
@pytest.mark.mutation('inr.py', 'self.extent = float(self.extent * scale)', 'pass')
def test_a_function_in_other_units(function, tmp_path):
    model, xi = function
    f = model.function([{k: field[:1] for k, field in level.items()} for level in xi])
    box = [torch.tensor([-1.0, 1, 0.5]) * f.extent + torch.tensor(f.centre)]
    f.move((0, 0, -5), 1)
    f.move((1, 2, 3), 4)
    inr.save_function(tmp_path / 'f.pt', f)
    f = inr.load_function(tmp_path / 'f.pt')
    box.append(torch.tensor([-1.0, 1, 0.5]) * f.extent + torch.tensor(f.centre))
    torch.testing.assert_close(box[1], 4 * box[0] + torch.tensor([1.0, 2, -17]))
