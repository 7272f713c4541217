"""Clips: the axes of their planes, decoding, whole signals, what a run of them makes."""
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import inr
import ldm
import metrics
import sample
import vae

TINY = dict(domain='video', frames=5, resolution=8, patch=2, vit_width=16, vit_depth=1, vit_heads=1,
            plane_depth=1, plane_hidden=16, num_res_blocks=1, z_channels=4, decoder_ch=8,
            decoder_mult=(2, 1), fields=(1, 2), field_channels=4, mlp_width=8,
            scale_injection=False)


def tiny(**changes):
    return vae.D2CVAE(vae.VAEConfig(**{**TINY, **changes}))


def times(n):
    """The middles of n equal parts of [-1, 1]."""
    return inr.cell_centres(n, torch.tensor([-1.0, 1.0]))


def decoded(model, batch=1):
    sizes = model.latent_sizes()
    return model.decode(torch.randn(batch, 4, sum(h * w for h, w in sizes.values())))


# ---- axes --------------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', "'video': dict(xy=(0, 1), yt=(1, 2), xt=(0, 2))",
                      "'video': dict(xy=(0, 1), yt=(0, 2), xt=(1, 2))")
def test_a_field_is_constant_along_the_axis_it_has_not():
    model, points = tiny(), torch.rand(30, 3) * 2 - 1
    decoded_fields = decoded(model)
    for name, still in (('xy', 2), ('yt', 0), ('xt', 1)):
        xi = [{k: f if k == name else torch.zeros_like(f) for k, f in level.items()}
              for level in decoded_fields]
        for axis in range(3):
            moved = points.clone()
            moved[:, axis] = torch.rand(30) * 2 - 1
            change = (model.query(xi, moved) - model.query(xi, points)).abs().max()
            assert change < 1e-6 if axis == still else change > 1e-5


@pytest.mark.mutation('vae.py', 'stretch = dict(yt=(1, 2), xt=(1, 2))', 'stretch = dict(yt=(1, 2))')
@pytest.mark.mutation('vae.py', '[self.config.frames]',
                      '[math.ceil(self.config.resolution / self.config.patch)]')
@pytest.mark.mutation('vae.py', '[math.ceil(self.config.resolution / self.config.patch)]',
                      '[self.config.resolution // self.config.patch]')
def test_time_is_never_reduced():
    for frames, size in ((4, 8), (5, 8), (3, 12), (3, 7)):  # 4 is as many as rows
        check_sizes(tiny(frames=frames, resolution=size), frames, size)


def check_sizes(model, frames, size):
    h, x = (size + 1) // 2, torch.rand(2, 3, frames, size, size) * 2 - 1
    assert model.latent_sizes() == dict(xy=(h, h), yt=(frames, h), xt=(frames, h))
    assert model.encode(x).sizes == model.latent_sizes()
    for factor, level in zip((1, 2), decoded(model)):
        wide = factor * h
        assert {k: tuple(f.shape[2:]) for k, f in level.items()} == dict(
            xy=(wide, wide), yt=(frames, wide), xt=(frames, wide))


@pytest.mark.mutation('vae.py', 'dim=2).clamp_(-1, 1)', 'dim=2)')
@pytest.mark.mutation('vae.py', 'torch.tensor(times)).tolist()',
                      'torch.tensor((-1.0, 1.0))).tolist()')
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

@pytest.mark.mutation('vae.py', 'if middle is not None:', 'if False:')
@pytest.mark.mutation('vae.py', 'attention_across(self.decoder.width, c) if c.across',
                      'None if c.across')
def test_planes_hear_of_each_other_across_the_decoder():
    with pytest.raises(ValueError, match='--across: has 8 heads, for which 20 channels'):
        tiny(across=True, decoder_ch=10)
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


@pytest.mark.mutation('vae.py', "return c.channels * c.frames * c.resolution ** 2",
                      "return c.channels * c.resolution ** 2")
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


@pytest.mark.mutation('vae.py', "own_flags = 'patch', 'vit_width'", "own_flags = 'vit_width'")
def test_impossible_video_configurations_are_refused():
    for changes, word in ((dict(ch=16), '--ch'),
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


# ---- what is measured of clips ------------------------------------------------------------------

class Clips(data.Items):
    """Clip i is 0.1 i + t in the cell of time t, everywhere."""

    names, resolution, computed = list('abcd'), 8, True

    def __init__(self):
        pass

    def starts(self, i):
        return 1

    def truth(self, i, R, frames=None, start=None):
        t = times(frames or 5)
        return (0.1 * i + 0.5 * t)[None, :, None, None].expand(3, -1, R, R)

    def view(self, i, k):
        return dict(video=self.truth(i, 8))

    def item(self, i, rng=None):
        return self.view(i, 0)

    def preview(self, i, size):
        return self.truth(i, size)[:, 0]


class Reader(torch.nn.Module):
    """A VAE that knows a clip by its mean, and is 0.2 too bright."""
    config, domain = vae.VAEConfig(**TINY), 'video'

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, batch):
        return types.SimpleNamespace(mean=batch['video'].mean((1, 2, 3, 4))[:, None, None])

    def decode(self, z):
        return z

    def signal(self, xi, R, frames=None):
        t = times(frames or 5)[:, None, None]
        return (xi[..., None, None] + 0.5 * t + 0.2).expand(-1, 3, -1, R, R)

    def show(self, xi, size):
        return self.signal(xi, size)[:, :, 0]


@pytest.fixture
def clip_run(tmp_path, monkeypatch):
    info = dict(args={}, step=7, splits=None)
    (tmp_path / 'vae.pt').touch()
    monkeypatch.setattr(ldm, 'load_vae', lambda path, device: (Reader(), info))
    monkeypatch.setattr(ldm, 'load', lambda path, device: (Reader(), None, info))
    monkeypatch.setattr(data, 'open_run_data', lambda info, split, root, captions: Clips())
    return str(tmp_path)


def measure(capsys, *argv):
    metrics.main([str(a) for a in argv])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.mutation('metrics.py', 'psnr_each(pictures_of(truth), pictures_of(made))',
                      'psnr_each(truth[:, :, 0], made[:, :, 0] + 0.1)')
@pytest.mark.mutation('metrics.py', 'first_frame=x[:, :, :1]', 'first_frame=x[:, :, 1:2]')
@pytest.mark.mutation('metrics.py', '[x.shape[2] // 2]', '[0]')
@pytest.mark.mutation('metrics.py', 'return dataset.truth(i, R, self.frames)',
                      'return dataset.truth(i, R)')
def test_psnr_of_clips_is_that_of_their_frames(capsys, clip_run):
    """Beside the mean clip and repeated frames; errors in [0, 1] are half of those in [-1, 1]."""
    def expected(errors):
        return -20 * np.log10(np.abs(errors) / 2).mean()
    for frames in (5, 10):
        try:
            found = measure(capsys, 'psnr', clip_run, '--frames', frames, '--res', 16)
        except RuntimeError as error:
            pytest.fail(str(error))
        assert (found['n'], found['frames'], found['resolution']) == (4 * frames, frames, 16)
        assert found['psnr'] == pytest.approx(20, abs=1e-4)
        t = 0.5 * times(frames).double().numpy()
        assert found['first_frame'] == pytest.approx(expected(t[1:] - t[0]), abs=1e-4)
        others = np.delete(t, frames // 2) - t[frames // 2]
        assert found['middle_frame'] == pytest.approx(expected(others), abs=1e-4)
        off = np.array([-0.15, -0.05, 0.05, 0.15])
        assert found['mean_clip'] == pytest.approx(expected(off), abs=1e-4)
    assert measure(capsys, 'psnr', clip_run)['frames'] == 5
    values, strips = metrics.held_out(Reader(), Clips())
    assert values == {'psnr_8': pytest.approx(20, abs=1e-4)} and strips.shape == (8, 3, 8, 8)


@pytest.mark.mutation('metrics.py', "mode='trilinear'", "mode='nearest'")
def test_the_interpolated_baseline_of_clips_is_linear_between_their_frames(capsys, clip_run):
    """Which gives back what is linear in time, but before the first frame and after the last."""
    run = metrics.VideoRun(Reader(), args=types.SimpleNamespace(frames=10, res=0))
    made = run.drawn(torch.zeros(1, 1, 1), 12, enlarged=True)
    assert made.shape == (1, 3, 10, 12, 12)
    t = 0.5 * times(10).clamp(-0.8, 0.8) + 0.2  # the middles of the outermost of five
    torch.testing.assert_close(made[0, 0, :, 3, 3], t)


@pytest.mark.mutation('metrics.py', "run.thing == 'clip', f'--frames", "True, f'--frames")
@pytest.mark.mutation('metrics.py', "not args.frames, '--frames: folders",
                      "True, '--frames: folders")
def test_frames_are_for_clips(tmp_path, clip_run, monkeypatch):
    for name in 'AB':
        data.save_png(tmp_path / name / '0.png', torch.zeros(3, 12, 12))
    with pytest.raises(ValueError, match='--frames: folders'):
        metrics.main(['psnr', str(tmp_path / 'A'), str(tmp_path / 'B'), '--frames', '3'])
    with pytest.raises(ValueError, match='no pictures or views to measure; .* fvd, rfvd, nfe, psnr'):
        metrics.main(['fid', clip_run])
    reader = Reader()
    reader.domain = 'image'
    monkeypatch.setattr(ldm, 'load_vae', lambda path, device: (reader, dict(args={}, step=7)))
    with pytest.raises(ValueError, match='--frames: .* makes no clips'):
        metrics.main(['psnr', clip_run, '--frames', '3'])


class Colour(torch.nn.Module):
    """Instead of I3D: the mean level of the first and of the last frame."""
    dim, resize, source = 2, None, dict(kind='i3d', weights='w', sha256='s', publisher='p')

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def set_eps(self, eps):
        pass

    def forward(self, x):
        self.seen.append(x)
        return x[:, 0, [0, -1]].float().mean((2, 3))


@pytest.mark.mutation('metrics.py', 'next((run.frames for', 'next((16 for')
@pytest.mark.mutation('metrics.py', "rounding='truncate'", "rounding='round'")
@pytest.mark.mutation('metrics.py', "args.float else args.rounding or 'round'", "args.float else 'round'")
def test_rfvd_of_a_run(capsys, tmp_path, clip_run, monkeypatch):
    """All too bright by 25.5 levels; a folder beside a run is cut into clips as long as its."""
    net = Colour()
    monkeypatch.setattr(metrics, 'load_network', lambda kind, path: net)
    found = measure(capsys, 'rfvd', clip_run, '--split', 'test')
    assert found['rfvd'] == pytest.approx(2 * 25.5 ** 2, abs=30)
    assert found['real']['frames'] == found['fake']['frames'] == 5
    assert {x.shape[1:] for x in net.seen} == {(3, 5, 8, 8)} and net.seen[0].dtype == torch.uint8
    for k in range(3):
        for t in range(7):
            data.save_png(tmp_path / f'B/{k}/{t}.png', torch.full((3, 8, 8), k / 4 + t / 20))
    seen = {}
    for preset in ('styleganv', 'ddmi'):
        net.seen.clear()
        measure(capsys, 'rfvd', clip_run, '--preset', preset)
        seen[preset] = [x.int() for x in net.seen]
    (real, rounded), (same, truncated) = seen.values()
    assert torch.equal(real, same)  # fakes alone are truncated
    assert {*(rounded - truncated).unique().tolist()} == {0, 1}
    net.seen.clear()
    try:
        measure(capsys, 'fvd', clip_run, tmp_path / 'B', '--num', 3)
    except ValueError as error:
        pytest.fail(str(error))
    assert {x.shape[2] for x in net.seen} == {5}


# ---- sample.py ----------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder in which a tiny model of clips is a run, and that model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = tiny()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


def shot(folder):
    """uint8 (T,3,H,W): the frames in a folder, in order."""
    frames = [np.asarray(Image.open(p)) for p in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def flags(**changes):
    given = dict(out='out', box=(), antialias=True, frames=0, slow=1, time=(), fps=8.0,
                 animation='webp')
    return types.SimpleNamespace(**{**given, **changes})


@pytest.mark.mutation('sample.py', '(args.frames or vae.config.frames) * args.slow',
                      '(args.frames or vae.config.frames)')
@pytest.mark.mutation('sample.py', '(args.time or (-1, 1))', '(-1, 1)')
@pytest.mark.mutation('data.py', 'lossless=True', 'quality=50')
@pytest.mark.mutation('sample.py', 'frames[i * len(frames) // 8]', 'frames[i]')
def test_written_videos_are_the_function(saved):
    z = 5 * torch.randn(2, 4, 56)  # no two frames alike
    sample.write_videos(saved, zip(z, 'ab'), [(12, 10)],
                        flags(frames=4, slow=2, time=(-0.5, 0.5)), None)
    expected = data.to_uint8(saved.signal(saved.decode(z[1:]), (12, 10), frames=8,
                                          times=(-0.5, 0.5))[0])
    frames = shot(Path('out/12x10/b'))
    assert torch.equal(frames.transpose(0, 1), expected)
    with Image.open('out/12x10/b.webp') as film:
        assert film.n_frames == 8
        for k in (0, 5):
            film.seek(k)
            assert np.array_equal(np.asarray(film.convert('RGB')), frames[k].permute(1, 2, 0))
    assert Image.open('out/grid_12x10.png').size == (8 * 12 + 2, 2 * 14 + 2)
    sample.write_videos(saved, zip(z, 'a'), [(8, 8)],
                        flags(out='b', frames=16, box=(-1, 0, 0, 1)), None)
    shown = np.asarray(Image.open('b/grid_8x8.png'))[2:10, 2:].reshape(8, 8, 10, 3)[:, :, :8]
    corner = saved.render(saved.decode(z[:1]), (8, 8), ((-1, 0), (0, 1)), at=(-1 + 9 / 16,))
    assert np.array_equal(shown[:, 2], data.to_uint8(corner[0]).permute(1, 2, 0))


@pytest.mark.mutation('sample.py', "-1 <= t[0] < t[1] <= 1", 'True')
def test_impossible_times_are_refused():
    for time in ((0.5, -0.5), (0.0,), (-1.5, 1.0)):
        with pytest.raises(ValueError, match='--time'):
            sample.check_videos(flags(time=time), [])


@pytest.mark.mutation('sample.py', 'max(s) < 2 ** 14 for s in sizes', 'True for s in sizes')
@pytest.mark.mutation('sample.py', "!= 'gif' or args.fps <= 50", "!= 'gif' or True")
@pytest.mark.mutation('sample.py', 'require(count <= 10_000', 'require(True')
def test_what_no_animation_can_hold_is_refused(saved):
    for given, size in ((dict(), 2 ** 14), (dict(animation='gif', fps=60.0), 8)):
        with pytest.raises(ValueError, match='--res|--fps'):
            sample.check_videos(flags(**given), [(8, size)])
    sample.check_videos(flags(animation='gif', fps=50.0), [(8, 2 ** 14)])
    xi = saved.decode(torch.zeros(1, 4, 56))
    with pytest.raises(ValueError, match='at most 10,000'):
        next(sample.video_frames(saved, xi, (8, 8), flags(frames=101, slow=100)))


def test_clips_are_reconstructed_from_files(saved):
    """Frames of an animated file, of a longer one the middle."""
    frames = [torch.full((3, 8, 8), 30 * k, dtype=torch.uint8) for k in range(7)]
    data.save_animation('in/long.webp', frames)
    data.save_animation('in/short.webp', frames[1:6])
    names, z, extra = sample.encode_videos('in', saved, dict(resolution=8, frames=5, interval=1),
                                           torch.device('cpu'))
    assert names == ['long_webp', 'short_webp'] and extra is None
    x = data.to_float(torch.stack(frames[1:6], 1))[None]
    torch.testing.assert_close(torch.stack([*z]), saved.encode(x).mean.expand(2, -1, -1))
