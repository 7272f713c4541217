"""Every preset of both stages at its full size, on the meta device: shapes without numbers.

Networks of a thousand million parameters are built, run forward and backward and stepped in about a
second, and what they would take of a GPU's memory is counted.
"""
import contextlib
import re
from pathlib import Path

import pytest
import torch

import common
import data
import encoders
import ldm
import train_ldm
import train_vae
import vae
from test_published import (autoencoder_shapes, picture_mlp_shapes, pointnet_shapes,
                            shape_mlp_shapes, unet_shapes)
from test_published_video import decoder_shapes, encoder_shapes, read_out_shapes

README = Path(__file__).parent.parent / 'README.md'
GPUS, GPU_MEMORY = 8, 24e9  # what the paper's presets are for
BFLOAT16 = 0.6  # what activations take under autocast, over float32: some stay in float32
# Millions of parameters of both stages, without text; presets in one row have the same networks.
PARAMETERS = {
    ('celebahq_code',): ('70.6', '1015'),
    ('toy_image',): ('1.1', '2.6'),
    ('image_64', 'image'): ('2.9', '11.1'),
    ('image_256', 'afhq_cat', 'afhq_dog', 'celebahq'): ('32.7', '358'),
    ('lsun_church',): ('32.7', '358'),
    ('cifar10',): ('9.0', '84'),
    ('afhq_cat_code', 'afhq_dog_code'): ('58.2', '519'),
    ('toy_shape', 'shape_small', 'shape'): ('0.8', '4.7'),
    ('shapenet_chair', 'shapenet', 'text2shape'): ('11.1', '358'),
    ('shapenet_chair_code',): ('17.4', '679'),
    ('toy_video',): ('0.9', '4.7'),
    ('video_small', 'video'): ('2.9', '4.7'),
    ('skytimelapse',): ('71.0', '360'),
    ('skytimelapse_code',): ('71.0', '678'),
    ('toy_nerf',): ('0.8', '4.7'),
    ('nerf_small', 'nerf'): ('0.8', '4.7'),
    ('srn_cars',): ('17.5', '358'),
}


def flags_of(name):
    """The flags of a preset, of train_vae.py and of train_ldm.py."""
    return [script.build_parser().parse_preset(script.PRESETS, name, ['--preset', name])
            for script in (train_vae, train_ldm)]


def first_stage(args, **structure):
    """The VAE that train_vae.py makes with these flags."""
    kind, _ = data.DATASETS[args.dataset]
    return vae.D2CVAE(common.from_flags(args, vae.VAEConfig, domain=kind.domain,
                                       channels=kind.channels, extent=kind.extent, **structure))


def batch_of(args, items):
    """A batch as the data set of these flags gives it, without numbers."""
    domain, r = data.DATASETS[args.dataset][0].domain, args.resolution
    if domain == 'image':
        picture = torch.empty(items, 3, r, r)
        return dict(image=picture, target=picture, box=torch.empty(items, 2, 2),
                    scale=torch.empty(items))
    if domain == 'video':
        points = torch.empty(items, args.pixels, 3)
        return dict(video=torch.empty(items, 3, args.frames, r, r), coords=points, target=points)
    if domain == 'nerf':
        rays = torch.empty(items, args.rays, 3)
        return dict(points=torch.empty(items, args.points, 6), rays_o=rays, rays_d=rays,
                    target=rays)
    return dict(points=torch.empty(items, args.points, 3),
                coords=torch.empty(items, args.queries, 3), target=torch.empty(items, args.queries))


def second_stage(args, first, text='', **structure):
    """The LDM that train_ldm.py makes with these flags on this first stage."""
    args.text = text
    width = encoders.ByteText().norm.normalized_shape[0] if text else 0
    return ldm.LDM(common.from_flags(
        args, ldm.LDMConfig, domain=first.domain, planes=first.latent_sizes(),
        z_channels=first.config.z_channels, context_channels=width, **structure))


def items_of(args):
    """Items that one of eight GPUs sees at a time."""
    share = max(args.batch // GPUS, 1)  # small presets are for one process
    return min(args.micro_batch or share, share)


def millions(model):
    """Its parameters as the README gives them: '0.8', '32.7', '358'."""
    n = sum(p.numel() for p in model.parameters()) / 1e6
    return f'{n:.1f}' if n < 80 else f'{n:.0f}'


def size_of(tensors):
    """Bytes of tensors, each storage counted once."""
    storages = (x.untyped_storage() for x in tensors)
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def memory_of_a_step(model, loss_of, copies):
    """Bytes that a step of AdamW takes, `copies` of the weights besides.

    Weights, gradients and two moments in float32 are 16 bytes a parameter; the rest is what the
    backward pass keeps of the forward pass.
    """
    opt, kept = torch.optim.AdamW(model.parameters()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = loss_of()
    assert loss.shape == () and loss.dtype == torch.float32
    activations = size_of([*kept, *model.parameters()]) - size_of(model.parameters())
    loss.backward()
    opt.step()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    moments = [v for state in opt.state.values() for k, v in state.items() if k != 'step']
    held = size_of([*model.parameters(), *(p.grad for p in model.parameters()), *moments])
    n = sum(p.numel() for p in model.parameters())
    assert held == 16 * n
    return held + 4 * n * copies + BFLOAT16 * activations


def run_first_stage(args):
    """Check the shapes of what stage 1 makes: the VAE, and the bytes of a step."""
    items = items_of(args)
    model, batch = first_stage(args), batch_of(args, items)
    c, sizes = model.config, model.latent_sizes()
    with torch.no_grad():
        z = model.encode(batch).mean
        xi = model.decode(z)
        coords = torch.empty(7, 2 if model.domain == 'image' else 3)
        assert model.query(xi, coords, 1.0).shape == (items, 7, c.channels)
    assert z.shape == (items, c.z_channels, sum(h * w for h, w in sizes.values()))
    assert [{plane: f.shape for plane, f in level.items()} for level in xi] == [
        {plane: (items, c.field_channels, h if model.stretch.get(plane) else factor * h, factor * w)
         for plane, (h, w) in sizes.items()} for factor in c.fields]
    assert xi[-1]['xy'].shape[2:] == (args.resolution,) * 2  # the finest field: as the data
    return model, memory_of_a_step(model, lambda: model(batch)['total'], copies=0)


def run_second_stage(args, first):
    """Check the shapes of what stage 2 makes: the LDM, and the bytes of a step."""
    items, model = items_of(args), second_stage(args, first)
    z = torch.empty(items, *model.shape)
    t = torch.empty(items, dtype=torch.long)
    with torch.no_grad():
        assert model.eps(z, t).shape == z.shape
    return model, memory_of_a_step(model, lambda: model(z, None, z, t), copies=1)  # the average


@pytest.fixture
def meta(monkeypatch):
    """The meta device, in float32 throughout: it knows no autocast."""
    monkeypatch.setattr(torch, 'autocast', lambda *args, **more: contextlib.nullcontext())
    with torch.device('meta'):
        yield


def published(preset):
    """A file of the authors' code, of the configuration that they published, without numbers."""
    unet = dict(M=256, mult=(1, 2, 4, 6), blocks=2, factors=(2, 4, 8))
    planes, points = dict(mult=(1, 2, 4), blocks=2, z=128, E=64, field=64), None
    if preset == 'shapenet_chair_code':
        model = autoencoder_shapes(32, ch=64, planes=3, joined=(0, 1, 2), **planes)
        mlp, channels, points = shape_mlp_shapes(256, [64] * 3), 192, pointnet_shapes(256, 7, 32)
    elif preset == 'skytimelapse_code':
        unet |= dict(across=True)
        model = encoder_shapes(D=384, depth=8, z=64, E=64, cells=(32, 32, 16))
        model |= decoder_shapes(ch=64, mult=(1, 2, 4, 8), blocks=2, z=64, field=64)
        mlp, channels = read_out_shapes(256, 64), 64
    else:
        unet |= dict(mult=(1, 2, 4, 8)) if preset == 'celebahq_code' else dict(M=224)
        planes |= dict(blocks=3) if preset == 'celebahq_code' else {}
        model = autoencoder_shapes(3, ch=128, **planes)
        mlp, channels = picture_mlp_shapes(256, [64] * 3), 64
    unet = {f'model.{k}': shape for k, shape in unet_shapes(channels, **unet).items()}
    parts = dict(vaemodel=model, mlp=mlp, diffusion=unet | dict(mixing_logit=(1, channels, 1)))
    parts |= dict(pointnet=points) if points else {}
    return {part: {k: torch.empty(shape, device='meta') for k, shape in shapes.items()}
            for part, shapes in parts.items()}


@pytest.mark.mutation('train_vae.py', "dataset='celebahq', num_res_blocks=3", "dataset='celebahq'")
@pytest.mark.mutation('train_vae.py', "dataset='shapenet_chair', decoder_ch=64",
                      "dataset='shapenet_chair', decoder_ch=32")
@pytest.mark.mutation('train_ldm.py', "'afhq_dog_code': dict(PAPER, ch=224",
                      "'afhq_dog_code': dict(PAPER, ch=256")
@pytest.mark.mutation('train_ldm.py', "triplane='concat', lr=1e-4", 'lr=1e-4')
@pytest.mark.mutation('train_ldm.py', 'plane_embed=False, batch=16', 'batch=16')
@pytest.mark.mutation('ldm.py', 'inner_channels=inner', 'inner_channels=0')
def test_presets_fit_the_published_configurations():
    """What `--preset X_code --init FILE` makes has the tensors of the file."""
    for preset in (name for name in train_vae.PRESETS if name.endswith('_code')):
        state = ldm.translated(published(preset), Path('published.pt'))
        first, second = flags_of(preset)
        with torch.device('meta'):
            one = first_stage(first, **{k: state['vae_config'][k] for k in vae.STRUCTURE})
            two = second_stage(second, one, **{k: state['ldm_config'][k] for k in ldm.STRUCTURE})
        for model, weights in ((one, state['vae']), (two, state['ema'])):
            assert ({k: v.shape for k, v in model.state_dict().items()}
                    == {k: v.shape for k, v in weights.items()}), preset


@pytest.mark.mutation('train_vae.py', 'batch=80, micro_batch=1)', 'batch=80)')
@pytest.mark.mutation('train_vae.py', 'dict(PAPER, decoder_ch=128', 'dict(PAPER, decoder_ch=64')
@pytest.mark.mutation('train_ldm.py', 'ch_mult=(1, 2, 4, 8)', 'ch_mult=(1, 2, 4, 6)')
@pytest.mark.mutation('vae.py', 'xi.append([self.heads[name](x) for x in xs])',
                      'xi.append([self.heads[name](x).detach() if i == 0 else '
                      'self.heads[name](x) for x in xs])')
def test_every_preset_runs_at_full_size(meta):
    """Both stages' steps, with the parameters of the README, on eight GPUs of 24 GB."""
    assert sorted(sum(PARAMETERS, ())) == sorted(train_vae.PRESETS)
    for names, parameters in PARAMETERS.items():
        first, second = flags_of(names[0])
        one, memory_of_one = run_first_stage(first)
        two, memory_of_two = run_second_stage(second, one)
        assert (millions(one), millions(two)) == parameters, names
        assert max(memory_of_one, memory_of_two) < GPU_MEMORY, names
        for name in names[1:]:
            first, second = flags_of(name)
            again = first_stage(first)
            for a, b in ((one, again), (two, second_stage(second, again))):
                assert ({k: v.shape for k, v in a.state_dict().items()}
                        == {k: v.shape for k, v in b.state_dict().items()}), name


@pytest.mark.mutation('train_vae.py', 'kl_weight=0.005,', 'kl_weight=0.05,')
@pytest.mark.mutation('train_vae.py', 'sn_end=0.01,', 'sn_end=0.1,')
@pytest.mark.mutation('train_vae.py', 'sn_start=0.01,', 'sn_start=0.1,')
def test_radiance_fields_are_weighted_as_in_the_code():
    """By 20 sum |error| of the 15,000 colours in [0, 1] + 0.05 KL + 0.1 SN, the KL at the end."""
    args, _ = flags_of('srn_cars')
    config = common.from_flags(args, vae.VAEConfig, domain='nerf')
    for step in (0, args.steps // 2, args.steps):
        kl, sn = vae.annealed(step, args.steps, config)
        # What is minimised is the mean error of colours in [-1, 1] + (kl KL + sn SN) / n_ref.
        an_error, a_nat, a_norm = 2 / 15_000, kl / config.n_ref, sn / config.n_ref
        assert a_norm / an_error == pytest.approx(0.1 / 20)
    assert a_nat / an_error == pytest.approx(0.05 / 20)


def test_the_readme_gives_these_parameters(meta):
    """Its table of presets: '| `NAME`, `NAME` ... | r | 32.7 M + 358 M | ...'."""
    rows = re.findall(r'^\|(.*?)\|.*?\| ([\d.]+) M \+ ([\d.]+) M(.*?)\|', README.read_text(), re.M)
    counts = {name: counts for names, counts in PARAMETERS.items() for name in names}
    first, second = flags_of('shape_small')
    with_text = millions(second_stage(second, first_stage(first), text='bytes'))
    assert len(rows) >= 8
    for names, one, two, more in rows:
        for name in re.findall(r'`(\w+)`', names):
            assert (one, with_text if 'with text' in more else counts[name][1]) == (
                counts[name][0], two), name
