"""Checkpoints of videos of the authors' code: our networks compute what theirs compute.

As in test_published.py the reference is written from their formulae. In it planes have the names of
their code, whose yt lies over (t, x) and whose xt over (t, y), t along the height; `OURS` are ours.
"""
import math
import re
import types

import pytest
import torch
import torch.nn.functional as F

import common
import data
import ldm
from test_published import (AUTHORS, FAST, across, assert_io_of_diffusion, assert_pictures,
                            assert_predictions, attention, attention_shapes, averaged, close, conv,
                            count, ddim, diffusion_state, each, equal_networks, first_stage, joint,
                            largest_change, layer, level_shapes, levels, linear, loaded, look_up,
                            needs_authors, point_block, prediction, published_io, random_input,
                            random_tensors, residual, save, second_stage, shape_mlp_shapes, split,
                            stack_shapes, without)
from test_scripts import done

OURS = dict(xy='xy', xt='yt', yt='xt')  # in the order in which they join latents
OVER = dict(xy=1, xt=3, yt=2)  # the dimension of tokens (B,T,h,w,D) that a plane has not
READ = dict(xy=[0, 1], yt=[2, 1], xt=[2, 0])  # of (x, y, t), along the width and the height
T, SIDE, PATCH = 10, 32, 8
SIZES = dict(xy=(4, 4), xt=(T, 4), yt=(T, 4))
UNET = dict(M=64, mult=(1, 2), blocks=1, factors=(2,), across=True)  # 128 channels: 2 heads of 64


# ---- a checkpoint in their layout ---------------------------------------------------------------

def attention_layer(name, D, inner):
    return (layer(f'{name}.norm', D) | layer(f'{name}.fn.to_out.0', D, inner)
            | {f'{name}.fn.to_qkv.weight': (3 * inner, D)})


def feed_forward(name, D, hidden, parts=1):
    return (layer(f'{name}.norm', D) | layer(f'{name}.fn.net.0', parts * hidden, D)
            | layer(f'{name}.fn.net.3', D, hidden))


def encoder_shapes(D, depth, z, E, cells=(4, 4, T)):
    """With what is around the decoder; cells along x, y, t."""
    shapes = layer('encoder.to_patch_embedding', D, 3 * PATCH ** 2)
    for n in (f'encoder.layers.{i}' for i in range(depth)):
        shapes |= attention_layer(f'{n}.0', D, 512) | attention_layer(f'{n}.1', D, 512)
        shapes |= feed_forward(f'{n}.2', D, 4 * D, 2)
    for p, places in zip(('xt', 'yt', 'xy'), cells):
        shapes |= {f'{p}_token': (1, 1, D), f'{p}_pos_embedding': (1, places + 1, D)}
        shapes |= layer(f'pre_{p}', 2 * E, D, 1, 1) | layer(f'post_{p}', z, E, 1, 1)
        for n in (f'{p}_quant_attn.layers.{i}' for i in range(4)):
            shapes |= attention_layer(f'{n}.0', D, D // 2) | feed_forward(f'{n}.1', D, 512)
    return shapes


def decoder_shapes(ch, mult, blocks, z, field):
    def eight_heads(name, c):
        return attention_shapes(name, c, 8 * c, (1,))
    c = ch * mult[-1]
    shapes = layer('decoder.conv_in', c, z, 3, 3) | eight_heads('decoder.mid_attn', c)
    shapes |= stack_shapes(*(f'decoder.mid.{n}' for n in ('block_1', 'attn_1', 'block_2')), c)
    return shapes | level_shapes(ch, mult, blocks, field, lambda i, c: eight_heads(
        f'decoder.up.{i}.inter_attn.0', c))


def read_out_shapes(W, field):
    shapes = shape_mlp_shapes(W, 3 * [3 * field]) | layer('net_out', 3, W)
    return {k: shape for k, shape in shapes.items() if not k.startswith('net_p.')}


def video_checkpoint():
    shapes = encoder_shapes(D=24, depth=2, z=12, E=8)
    shapes |= decoder_shapes(ch=32, mult=(1, 1, 1, 2), blocks=1, z=12, field=8)
    buffers = {'encoder.frame_rot_emb.inv_freqs': 10000 ** (-torch.arange(32) / 32),
               'encoder.image_rot_emb.scales': torch.logspace(0, math.log10(5), 16)}
    return second_stage(diffusion_state(8, 12, **UNET), diffusion_state(8, 13, **UNET),
                        vaemodel=buffers | random_tensors(shapes, 10),
                        mlp=random_tensors(read_out_shapes(40, 8), 11))


# ---- their networks ----------------------------------------------------------------------------

def layer_normed(s, name, x):
    return F.layer_norm(x, x.shape[-1:], s[f'{name}.weight'], s[f'{name}.bias'])


def rotated(x, angles):
    """Neighbours in x (...,n,64) by angles (n,64), which may differ within a pair."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def attend(s, name, x, heads, angles=None):
    """Within the sequences x (...,n,D)."""
    qkv = linear(s, f'{name}.fn.to_qkv', layer_normed(s, f'{name}.norm', x))
    q, k, v = (y.transpose(-3, -2) for y in qkv.unflatten(-1, (3, heads, -1)).unbind(-3))
    if angles is not None:
        q, k = rotated(q, angles), rotated(k, angles)
    y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return x + linear(s, f'{name}.fn.to_out.0', y.transpose(-3, -2).flatten(-2))


def feed(s, name, x, activation):
    h = linear(s, f'{name}.fn.net.0', layer_normed(s, f'{name}.norm', x))
    return x + linear(s, f'{name}.fn.net.3', activation(h))


def gated(h):
    value, gate = h.chunk(2, -1)
    return value * F.gelu(gate)


def time_angles(n):
    return torch.arange(n)[:, None] * 10000 ** (-2 * (torch.arange(64) % 32) / 64)


def space_angles(h, w):
    """(h w, 64): 32 for the row, then 32 for the column."""
    scales = math.pi * 5 ** (torch.arange(16) / 15)
    y, x = ((torch.linspace(-1, 1, n)[:, None] * scales).repeat_interleave(2, 1) for n in (h, w))
    return torch.cat([y[:, None].expand(-1, w, -1), x.expand(h, -1, -1)], 2).flatten(0, 1)


def tokens(s, x):
    """(B,T,h,w,D) of clips (B,3,T,H,W)."""
    p = math.isqrt(s['encoder.to_patch_embedding.weight'].shape[1] // 3)
    x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # (B, 3, T, h, p, w, p)
    x = linear(s, 'encoder.to_patch_embedding', x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4))
    frames, h, w = x.shape[1:4]
    for n in (f'encoder.layers.{i}' for i in range(count(s, 'encoder.layers.{}.0.norm.bias'))):
        x = attend(s, f'{n}.0', x.movedim(1, 3), 8, time_angles(frames)).movedim(3, 1)
        x = attend(s, f'{n}.1', x.flatten(2, 3), 8, space_angles(h, w)).unflatten(2, (h, w))
        x = feed(s, f'{n}.2', x, gated)
    return x


def moments(s, x):
    """{plane: (mean, log variance)} of tokens."""
    found = {}
    for p, dim in OVER.items():
        h = x.movedim(dim, 3)
        h = torch.cat([h, s[f'{p}_token'].expand(*h.shape[:3], 1, -1)], 3)
        h = h + s[f'{p}_pos_embedding'][:, :h.shape[3]]
        for n in (f'{p}_quant_attn.layers.{i}' for i in range(4)):
            h = feed(s, f'{n}.1', attend(s, f'{n}.0', h, 4), F.gelu)
        mean, logvar = conv(s, f'pre_{p}', h[..., 0, :].movedim(3, 1)).chunk(2, 1)
        found[p] = mean, logvar.clamp(-30, 20)
    return found


def decoded(s, z):
    """Fields, coarse to fine, a list for each plane, of latent planes."""
    planes = {p: conv(s, 'decoder.conv_in', conv(s, f'post_{p}', z[p])) for p in OURS}
    planes = each(lambda x: residual(s, 'decoder.mid.block_1', x), planes)
    planes = each(lambda x: attention(s, 'decoder.mid.attn_1', x, 16), planes)
    planes = each(lambda x: residual(s, 'decoder.mid.block_2', x), planes)
    planes = across(s, 'decoder.mid_attn', planes, 8)
    return levels(s, planes, lambda n, planes: across(s, f'{n}.0', planes, 8), flat=('xt', 'yt'))


def colours(s, fields, points):
    """(B,N,3) at points (1,N,3) or (B,N,3)."""
    pe = [look_up(fields[p], points[..., axes], True) for p, axes in READ.items()]
    h = []
    for b, parts in enumerate(zip(*pe), start=1):
        h = [point_block(s, f'net_res{b}', torch.cat([*h, *parts], -1))]
    h = point_block(s, f'net_res{len(pe[0]) + 1}', *h)
    return linear(s, 'net_out', F.leaky_relu(h, 0.2))


def places(frames, h, w):
    """Centres of so many cells, (frames,h,w,3)."""
    t, y, x = ((2 * torch.arange(n) + 1) / n - 1 for n in (frames, h, w))
    return torch.stack(torch.meshgrid(t, y, x, indexing='ij')[::-1], -1)


def clip(s, fields, frames, h, w):
    """Colours (B,3,frames,h,w)."""
    rgb = colours(s, fields, places(frames, h, w).view(1, -1, 3))
    return rgb.mT.unflatten(2, (frames, h, w))


def as_ours(fields):
    """What `decode` of ours gives: the planes of each level."""
    return [{OURS[p]: x for p, x in zip(fields, level)} for level in zip(*fields.values())]


def assert_fields(ours, theirs):
    for one, other in zip(ours, as_ours(theirs), strict=True):
        assert one.keys() == other.keys()
        for p in one:
            close(one[p], other[p])


# ---- the first stage ---------------------------------------------------------------------------

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """A checkpoint whose configuration is silent about heads: its state and its file."""
    state = video_checkpoint()
    path = save(tmp_path_factory.mktemp('clips') / 'ldm-last.pt', state, resolution=SIDE)
    return types.SimpleNamespace(state=state, path=path)


@pytest.mark.mutation('encoders.py', 'angles.repeat(1, 2) if code else',
                      'angles.repeat_interleave(2, dim=1) if code else')
@pytest.mark.mutation('encoders.py', '(1 if code else 1 - 1 / n)', '(1 - 1 / n)')
@pytest.mark.mutation('encoders.py', 'self.returned = 0 if code else -1', 'self.returned = -1')
@pytest.mark.mutation('encoders.py', 'torch.cat([x, self.summary.expand(len(x), 1, -1)], dim=1)',
                      'torch.cat([self.summary.expand(len(x), 1, -1), x], dim=1)')
@pytest.mark.mutation('ldm.py', "state[f'{there}_token'][0, 0] + last",
                      "state[f'{there}_token'][0, 0]")
@pytest.mark.mutation('ldm.py', "'_yt': 'xt', '_xt': 'yt'", "'_yt': 'yt', '_xt': 'xt'")
@pytest.mark.mutation('ldm.py', "('time', 'space', 'mlp')", "('space', 'time', 'mlp')")
@pytest.mark.mutation('ldm.py', 'video_code=True', 'video_code=False')
@torch.no_grad()
def test_clips_become_their_moments(clips):
    model, _ = loaded(ldm.load_vae, clips.path)
    x, weights = random_input(2, 3, T, SIDE, SIDE), clips.state['vaemodel']
    features = tokens(weights, x)
    close(model.encoder.tokens(x), features)
    theirs, posterior = moments(weights, features), model.encode(x)
    assert posterior.sizes == {OURS[p]: SIZES[p] for p in ('xy', 'xt', 'yt')}
    for i, values in enumerate((posterior.mean, posterior.logvar)):
        close(values, joint({p: both[i] for p, both in theirs.items()}, OURS))


@pytest.mark.mutation('vae.py', 'PlaneAttention(width, c.mid_heads)', 'PlaneAttention(width)')
@pytest.mark.mutation('ldm.py', 'mid_heads=16 if video', 'mid_heads=8 if video')
@pytest.mark.mutation('vae.py', 'if name in self.across:', 'if False:')
@pytest.mark.mutation('vae.py', 'if middle is not None:', 'if False:')
@pytest.mark.mutation('vae.py', 'regroup(self, c.norm_groups, 1e-6)',
                      'regroup(self, c.norm_groups, 1e-5)')
@pytest.mark.mutation('vae.py', 'yt=(1, 2), xt=(1, 2))', 'yt=(2, 2), xt=(2, 2))')
@torch.no_grad()
def test_latents_become_their_fields(clips):
    model, _ = loaded(ldm.load_vae, clips.path)
    z = {p: random_input(2, 8, *size, seed=n) for n, (p, size) in enumerate(SIZES.items())}
    assert_fields(model.decode(joint(z)), decoded(clips.state['vaemodel'], z))


@pytest.mark.mutation('ldm.py', 'read_axes=dict(xy=[0, 1], xt=[2, 1], yt=[2, 0])',
                      'read_axes=dict(xy=[0, 1], yt=[2, 0], xt=[2, 1])')
@pytest.mark.mutation('ldm.py', 'read_axes=dict(xy=[0, 1], xt=[2, 1], yt=[2, 0])',
                      'read_axes=dict(xy=[0, 1], xt=[0, 2], yt=[1, 2])')
@pytest.mark.mutation('ldm.py', 'out_slope=0.2 if video', 'out_slope=1.0 if video')
@pytest.mark.mutation('ldm.py', "align_corners=True, mlp_block='pre'",
                      "align_corners=False, mlp_block='pre'")
@pytest.mark.mutation('inr.py', "axes = self.about.get('axes') or PLANES", 'axes = PLANES')
@pytest.mark.mutation('vae.py', 'axes = self.config.read_axes or PLANES', 'axes = PLANES')
@torch.no_grad()
def test_colours_of_clips_are_theirs_at_every_place(clips):
    """Also between the places that their own code reads, the first of these grids."""
    model, _ = loaded(ldm.load_vae, clips.path)
    weights = clips.state['mlp']
    fields = {p: [random_input(2, 8, T if p != 'xy' else n, n, seed=n + i) for n in (8, 16, 32)]
              for i, p in enumerate(READ)}
    xi = as_ours(fields)
    for frames, h, w in ((T, SIDE, SIDE), (7, 40, 36)):
        theirs = clip(weights, fields, frames, h, w)
        close(model.query(xi, places(frames, h, w)[None]).movedim(4, 1), theirs)
        close(model.signal(xi, (h, w), antialias=False, frames=frames), theirs.clamp(-1, 1))
    points = 2.2 * torch.rand(2, 300, 3) - 1.1
    theirs = colours(weights, fields, points)
    close(model.query(xi, points), theirs)
    first = model.function([{p: f[:1] for p, f in level.items()} for level in xi])
    close(first(points[0]), theirs[0])


@pytest.mark.mutation('ldm.py', "64 if config.domain == 'video'", "32 if config.domain == 'video'")
@pytest.mark.mutation('ldm.py', 'plane_embed=False, symmetric', 'symmetric')
@pytest.mark.mutation('ldm.py', "xs = self.attended(f'down{i}', xs, batch)", 'pass')
@pytest.mark.mutation('ldm.py', "xs = self.attended(f'up{i}', xs, batch)", 'pass')
@pytest.mark.mutation('ldm.py', "xs = self.attended(f'middle{i}', layer(xs, embs, batch, cond), batch)",
                      'xs = layer(xs, embs, batch, cond)')
@pytest.mark.mutation('ldm.py', 'regroup(self.across, config.norm_groups, 1e-6)',
                      'regroup(self.across, config.norm_groups, config.norm_eps)')
@pytest.mark.mutation('ldm.py', 'kind = PlaneAttention if config.across_heads else Attention',
                      'kind = Attention')
@pytest.mark.mutation('ldm.py', "across_heads=16 if 'mid", "across_heads=8 if 'mid")
# ---- the second stage --------------------------------------------------------------------------

@torch.no_grad()
def test_noise_in_latents_of_clips_is_theirs(clips):
    _, model, _ = loaded(ldm.load, clips.path)
    assert_predictions(model, averaged(clips.state), (8, 16 + 8 * T), 64, SIZES)


@pytest.mark.mutation('ldm.py', "frames=len(found['encoder.planes.xy.position'])", 'frames=16')
@pytest.mark.mutation('ldm.py', "resolution=patch * len(found['encoder.planes.yt.position'])",
                      'resolution=256')
@pytest.mark.mutation('ldm.py', 'resolution=config.resolution, frames=config.frames)',
                      'resolution=config.resolution)')
# ---- files -------------------------------------------------------------------------------------

def test_what_tensors_tell_of_clips(clips, tmp_path):
    """model-last.pt, which has no configuration, holds what ldm-last.pt holds."""
    path = tmp_path / 'model-last.pt'
    torch.save(first_stage(clips.state), path)
    one, info = loaded(ldm.load_vae, path)
    two, network, _ = loaded(ldm.load, clips.path)
    assert equal_networks(one, two)
    for c in (one.config, two.config):
        assert (c.domain, c.frames, c.resolution, c.patch) == ('video', T, SIDE, PATCH)
    assert (info['args']['frames'], info['args']['resolution']) == (T, SIDE)
    assert network.config.planes == {OURS[p]: [*size] for p, size in SIZES.items()}
    assert network.config.head_channels == 64
    with pytest.raises(ValueError, match='stage 1 only'):
        ldm.load(path)
    save(path, clips.state, 32, SIDE)
    assert loaded(ldm.load, path)[1].config.head_channels == 32


def refusal(load, path):
    try:
        load(path)
    except ValueError as error:
        return str(error)
    return ''


def test_files_of_clips_without_a_tensor_are_refused(clips, monkeypatch):
    """One of each kind, numbers in names aside; of the U-Net what is of videos alone."""
    first, whole = first_stage(clips.state), without(clips.state, 'ema')
    for part, load, state in (('vaemodel', ldm.load_vae, first), ('mlp', ldm.load_vae, first),
                              ('diffusion', ldm.load, whole)):
        monkeypatch.setattr(torch, 'load', lambda *args, **options: state)
        loaded(load, clips.path)
        names = [n for n in state[part] if 'rot_emb' not in n
                 and (part != 'diffusion' or '_attn' in n or n == 'mixing_logit')]
        for name in {re.sub(r'\d+', '#', n): n for n in names}.values():
            less = {**state, part: without(state[part], name)}
            monkeypatch.setattr(torch, 'load', lambda *args, **options: less)
            message = refusal(load, clips.path)
            assert str(clips.path) in message and '\n' not in message, f'{name}: {message!r}'


# ---- use ---------------------------------------------------------------------------------------

@pytest.fixture
def at_work(clips, tmp_path):
    """A folder with the file and a few films."""
    (tmp_path / 'set').mkdir()
    for n in range(4):
        frames = (255 * torch.rand(T, 3, SIDE, SIDE)).byte()
        data.save_animation(tmp_path / f'set/{n}.webp', [*frames])
    (tmp_path / 'ldm-last.pt').symlink_to(clips.path)
    return tmp_path


@torch.no_grad()
def test_files_of_clips_are_sampled_and_made_slim(at_work, clips, repo):
    done(at_work, 'train_ldm.py', '--vae ldm-last.pt --slim small.pt', repo=repo)
    noise = ldm.initial_noise([0], (8, 16 + 8 * T))
    z = ddim(averaged(clips.state), noise, 2, 64, SIZES)
    fields = decoded(clips.state['vaemodel'], split(z, SIZES))
    expected = clip(clips.state['mlp'], fields, 7, 48, 48)[0].clamp(-1, 1).permute(1, 2, 3, 0)
    expected = 127.5 * (expected + 1).numpy()
    for name, bound in (('ldm-last', 1), ('small', 6)):  # halves
        done(at_work, 'sample.py', f'--run {name}.pt --out {name} --frames 7 --res 48 --num 1 '
             '--steps 2 --device cpu --sampler ddim', repo=repo)
        assert_pictures(at_work / name / '48x48/000000', expected, bound)


@pytest.mark.mutation('ldm.py', "'norm_eps', 'mixing_planes', 'across_heads'", "'norm_eps', 'mixing_planes'")
def test_files_of_clips_train_on(at_work, repo):
    """A step of a tiny rate leaves the weights; the result is a run like any other."""
    before, prior, _ = ldm.load(at_work / 'ldm-last.pt')
    done(at_work, 'train_ldm.py', f'{FAST} --ch 64 --ch_mult 1,2 --num_res_blocks 1 --cache none '
         '--attn_factors 2 --head_channels 64 --init ldm-last.pt --lr 1e-9 --vae ldm-last.pt '
         '--data set --name on', repo=repo)
    model, network, _ = ldm.load(at_work / 'runs/on/ldm.pt')
    assert largest_change(before, model) < 1e-6 and largest_change(prior, network) < 1e-6


# ---- their own numbers -------------------------------------------------------------------------

@pytest.mark.slow
@needs_authors
@torch.no_grad()
def test_videos_have_the_published_numbers(tmp_path):
    inputs, outputs, models = published_io('video', tmp_path)
    model = models['ema'][0]
    close(model.encoder.tokens(inputs['x']).flatten(1, 3), outputs['tokens'], 2e-4)
    posterior = model.encode(inputs['x'])
    close(posterior.mean, joint(outputs['mean'], OURS))
    close(posterior.logvar, joint(outputs['logvar'], OURS))
    close(posterior.kl(), outputs['kl'])
    close(posterior.sample(joint(inputs['noise'], OURS)), outputs['latent'])
    close(joint(outputs['z'], OURS), outputs['latent'])
    assert_fields(model.decode(outputs['latent']), outputs['fields'])
    xi, where = as_ours(outputs['fields']), places(6, 32, 32)
    for p, axes in READ.items():
        still = dict(xy=0, yt=2, xt=1)[p]
        close(where.select(still, 0)[..., axes].movedim(2, 0)[None], outputs['coords'][p])
    close(model.query(xi, where[None]).movedim(4, 1), outputs['rgb'])
    made = assert_io_of_diffusion(inputs, outputs, models, lambda z: z)
    rgb = model.query(model.decode(made), where[None]).movedim(4, 1)
    close(rgb, outputs['ddim5.rgb'])


@pytest.mark.slow
@needs_authors
@torch.no_grad()
def test_the_reference_has_the_published_numbers():
    with torch.serialization.safe_globals(common.HARMLESS):
        state = torch.load(AUTHORS / 'video/ldm-last.pt', weights_only=True)
    io = torch.load(AUTHORS / 'video/io.pt', weights_only=True)
    inputs, outputs, weights = io['inputs'], io['outputs'], state['vaemodel']
    features = tokens(weights, inputs['x'])
    close(features.flatten(1, 3), outputs['tokens'], 2e-4)
    for p, both in moments(weights, features).items():
        close(both[0], outputs['mean'][p])
        close(both[1], outputs['logvar'][p])
    assert_fields(as_ours(decoded(weights, outputs['z'])), outputs['fields'])
    close(clip(state['mlp'], outputs['fields'], 6, 32, 32), outputs['rgb'])
    sizes = dict(xy=(4, 4), xt=(6, 4), yt=(6, 4))
    for name, s in (('ema', averaged(state)), ('diffusion', state['diffusion'])):
        f, eps = prediction(s, inputs['z_t'], inputs['t_pair'], 16, sizes)
        close(f, outputs[f'F.{name}.t_pair'])
        close(eps, outputs[f'eps.{name}.t_pair'])
    close(ddim(averaged(state), inputs['z_T'], 5, 16, sizes), outputs['ddim5.z0'])
