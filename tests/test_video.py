"""Clips: the axes of their planes, decoding, whole signals, what a run of them makes."""
import math

import pytest
import torch
import torch.nn.functional as F

import inr
import ldm
import vae

TINY = dict(domain='video', frames=5, resolution=8, patch=2, vit_width=16, vit_depth=1, vit_heads=1,
            plane_depth=1, plane_hidden=16, num_res_blocks=1, z_channels=4, decoder_ch=8,
            decoder_mult=(2, 1), fields=(1, 2), field_channels=4, mlp_width=8,
            scale_injection=False)


def tiny(**changes):
    return vae.D2CVAE(vae.VAEConfig(**{**TINY, **changes}))


def decoded(model, batch=1):
    sizes = model.latent_sizes()
    return model.decode(torch.randn(batch, 4, sum(h * w for h, w in sizes.values())))


# ---- axes --------------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', "'video': dict(xy=(0, 1), yt=(1, 2), xt=(0, 2))",
                      "'video': dict(xy=(0, 1), yt=(0, 2), xt=(1, 2))")
@pytest.mark.parametrize('name, still', [('xy', 2), ('yt', 0), ('xt', 1)])
def test_a_field_is_constant_along_the_axis_it_has_not(name, still):
    model = tiny()
    xi = [{k: f if k == name else torch.zeros_like(f) for k, f in level.items()}
          for level in decoded(model)]
    points = torch.rand(30, 3) * 2 - 1
    for axis in range(3):
        moved = points.clone()
        moved[:, axis] = torch.rand(30) * 2 - 1
        change = (model.query(xi, moved) - model.query(xi, points)).abs().max()
        assert change < 1e-6 if axis == still else change > 1e-5


@pytest.mark.mutation('vae.py', 'stretch = dict(yt=(1, 2), xt=(1, 2))', 'stretch = dict(yt=(1, 2))')
@pytest.mark.mutation('vae.py', '[self.config.frames]', '[self.config.resolution // self.config.patch]')
@pytest.mark.parametrize('frames, size', [(5, 8), (4, 8), (3, 12)])  # 4 is as many as rows
def test_time_is_never_reduced(frames, size):
    model = tiny(frames=frames, resolution=size)
    h, x = size // 2, torch.rand(2, 3, frames, size, size) * 2 - 1
    assert model.latent_sizes() == dict(xy=(h, h), yt=(frames, h), xt=(frames, h))
    assert model.encode(x).sizes == model.latent_sizes()
    for factor, level in zip((1, 2), decoded(model)):
        wide = factor * h
        assert {k: tuple(f.shape[2:]) for k, f in level.items()} == dict(
            xy=(wide, wide), yt=(frames, wide), xt=(frames, wide))


@pytest.mark.mutation('vae.py', 'dim=2).clamp_(-1, 1)', 'dim=2)')
@pytest.mark.mutation('vae.py', 'torch.tensor(times)).tolist()', 'torch.tensor((-1.0, 1.0))).tolist()')
def test_frames_are_slices_of_the_function():
    """Each at its cell's centre; twice the frames over half of the time are the same function."""
    model = tiny()
    xi = decoded(model, 2)
    clip = model.signal(xi, (9, 10), frames=4)
    assert clip.shape == (2, 3, 4, 9, 10)
    for k, t in enumerate((-0.75, -0.25, 0.25, 0.75)):
        grid = torch.cat([inr.make_grid(9, 10), torch.full((9, 10, 1), t)], 2)
        values = model.query(xi, grid[None]).permute(0, 3, 1, 2).clamp(-1, 1)
        torch.testing.assert_close(clip[:, :, k], values, atol=1e-5, rtol=1e-5)
    late = model.signal(xi, (9, 10), frames=2, times=(0.0, 1.0))
    torch.testing.assert_close(late, clip[:, :, 2:])
    loud = [{k: 1e3 * f for k, f in level.items()} for level in xi]
    assert model.signal(loud, 8).abs().max() <= 1 and model.signal(xi, 8).shape[2] == 5
    strip, clip = model.show(xi, frames=2), model.signal(xi, 8)  # the first and third of five
    torch.testing.assert_close(strip, torch.cat([clip[:, :, 0], clip[:, :, 2]], 3))


# ---- decoder, objective, U-Net -----------------------------------------------------------------

@pytest.mark.mutation('vae.py', 'unpack(self.across(pack(middle)), sizes)', 'middle')
@pytest.mark.mutation('vae.py', 'Attention(self.decoder.width, 8, zero_init=True) if c.across', 'None if c.across')
def test_planes_hear_of_each_other_across_the_decoder():
    for across in (False, True):
        model = tiny(across=across)
        if model.across is not None:
            torch.nn.init.normal_(model.across.out.weight, std=0.3)
        sizes = model.latent_sizes()
        z = torch.randn(1, 4, sum(h * w for h, w in sizes.values()))
        moved = z.clone()
        moved[..., :16] += 1  # the xy plane
        change = (model.decode(moved)[0]['xt'] - model.decode(z)[0]['xt']).abs().max()
        assert change > 1e-4 if across else change == 0


@pytest.mark.mutation('vae.py', "return c.channels * c.frames * c.resolution ** 2", "return c.channels * c.resolution ** 2")
def test_objective_of_clips():
    """Mean L1 of the colours asked for, + (kl sum KL + sn SN) / N_ref, N_ref = 3 T r^2."""
    model = tiny(kl_weight=0.3, sn_start=0.0)
    assert model.config.n_ref == 3 * 5 * 8 * 8
    batch = dict(video=torch.rand(2, 3, 5, 8, 8) * 2 - 1, coords=torch.rand(2, 30, 3) * 2 - 1,
                 target=torch.rand(2, 30, 3) * 2 - 1)
    noise = torch.randn(2, 4, 16 + 2 * 20)
    posterior = model.encode(batch)
    values = model.query(model.decode(posterior.sample(noise)), batch['coords'])
    expected = F.l1_loss(values, batch['target']) + 0.3 * posterior.kl().mean() / 960
    torch.testing.assert_close(model(batch, noise=noise)['total'], expected)


@pytest.mark.mutation('vae.py', 'require(config.resolution % config.patch == 0', 'require(True')
@pytest.mark.mutation('vae.py', "own_flags = 'ch', 'ch_mult'\n", "own_flags = ()\n")
def test_impossible_video_configurations_are_refused():
    for changes, word in ((dict(patch=3), '--patch 3'), (dict(ch=16), '--ch'),
                          (dict(scale_injection=True), '--scale_injection'),
                          (dict(loss='bce'), '--loss')):
        with pytest.raises(ValueError, match=word):
            tiny(**changes)
    with pytest.raises(ValueError, match='--patch'):
        vae.VAEConfig(patch=4)


@pytest.mark.mutation('ldm.py', 'if config.plane_embed and', 'if False and')
def test_equal_planes_of_a_clip_are_told_apart():
    sizes = tiny(frames=4).latent_sizes()
    assert len(set(sizes.values())) == 1
    model = ldm.LDM(ldm.LDMConfig(domain='video', planes=sizes, z_channels=4, ch=8, ch_mult=(1,),
                                  num_res_blocks=1, attn_factors=(1,), head_channels=8))
    for p in model.unet.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, t = torch.randn(1, 4, 48), torch.tensor([500])
    xy, yt, xt = z.chunk(3, 2)
    a, b = model.unet(z, t).chunk(3, 2)[1:]
    d, c = model.unet(torch.cat([xy, xt, yt], 2), t).chunk(3, 2)[1:]
    assert (a - c).abs().max() > 1e-3 and (b - d).abs().max() > 1e-3
