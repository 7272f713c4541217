"""Radiance fields: cameras and rays, volume rendering against closed forms, read-out, pictures."""
import argparse
import collections
import itertools
import math
import typing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import inr
import metrics
import vae

AUTHORS = Path(__file__).parent.parent.parent / 'shared/data/authors/nerf'
TINY = dict(domain='nerf', channels=4, resolution=8, ch=8, ch_mult=(1, 2), point_hidden=8,
            point_blocks=2, point_channels=8, num_res_blocks=1, z_channels=4, decoder_ch=8,
            decoder_mult=(2, 1), fields=(1, 2), field_channels=4, mlp_width=8, coord_input=True,
            coord_octaves=2, scale_injection=False, colour_width=8, ray_samples=16)


def tiny(**changes):
    return vae.D2CVAE(vae.VAEConfig(**{**TINY, **changes}))


def decoded(model, batch=1):
    return model.decode(torch.randn(batch, 4, 3 * 16))


def random_rays(*shape):
    """Rays from 3 away that pass the origin within 1."""
    rays_o = 3 * F.normalize(torch.randn(*shape, 3), dim=-1)
    aim = F.normalize(torch.randn(*shape, 3), dim=-1) * torch.rand(*shape, 1)
    return rays_o, F.normalize(aim - rays_o, dim=-1)


def batch_of(n=2, rays=10, points=40):
    rays_o, rays_d = random_rays(n, rays)
    return dict(points=torch.rand(n, points, 6) * 2 - 1, rays_o=rays_o, rays_d=rays_d,
                target=torch.rand(n, rays, 3) * 2 - 1)


def ball(radius=0.5, density=100.0, centre=(0.0, 0.0, 0.0), colour=(1.0, 0.5, 0.0)):
    """A field for inr.march: constant density and colour within a ball."""
    def field(points, dirs):
        inside = (points - torch.tensor(centre)).norm(dim=-1) < radius
        return density * inside.float(), torch.tensor(colour).expand_as(points)
    return field


# ---- volume rendering --------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', 'F.pad(thickness.cumsum(-1)[..., :-1], (1, 0))',
                      'thickness.cumsum(-1)')
@pytest.mark.mutation('inr.py', 'background = float(white_background) * (1 - opacity)',
                      'background = float(white_background) * opacity')
@pytest.mark.mutation('inr.py', '* -torch.expm1(-thickness)', '* thickness')
@pytest.mark.mutation('inr.py', 'float(white_background)', '1.0')
@pytest.mark.mutation('inr.py', ' + (1 - opacity) * t[..., -1]', '')
@pytest.mark.mutation('inr.py', '(t[..., 1:] + t[..., :-1]) / 2', 't[..., 1:]')
def test_slab_of_constant_density():
    """Of opacity 1 - exp(-density length), at uneven bins; its mean depth by integration."""
    a, b, c, far = 0.7, 1.9, 1.5, 2.6
    t = torch.cat([torch.tensor([0.2, a]), a + (b - a) * torch.linspace(0, 1, 3001)[1:] ** 1.5,
                   torch.tensor([2.2, far])])[None].double()
    inside = ((t[:, 1:] + t[:, :-1]) / 2 - (a + b) / 2).abs() < (b - a) / 2
    colour = torch.tensor([0.2, 0.5, 0.9]).double()
    clear = math.exp(-c * (b - a))
    for white in (True, False):
        seen = inr.volume_render(c * inside, colour.expand(1, len(t[0]) - 1, 3), t, white)
        torch.testing.assert_close(seen['opacity'], torch.tensor([1 - clear]).double())
        torch.testing.assert_close(seen['rgb'][0], colour * (1 - clear) + white * clear)
        depth = a + (1 - clear * (1 + c * (b - a))) / c - a * clear + clear * far
        torch.testing.assert_close(seen['depth'], torch.tensor([depth]).double(), atol=1e-5, rtol=0)


@pytest.mark.mutation('inr.py', 'F.pad(thickness.cumsum(-1)[..., :-1], (1, 0))',
                      'F.pad(thickness.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))')
def test_the_nearer_of_two_slabs_hides_the_other():
    t = torch.tensor([[0.0, 1, 2, 3, 4]])
    sigma, near, far = torch.tensor([[1.0, 0, 2, 0]]), [1.0, 0, 0], [0.0, 0, 1]
    rgb = torch.tensor([[near, near, far, far]])
    one, two = math.exp(-1), math.exp(-2)
    white = one * two
    expected = torch.tensor([[1 - one + white, white, one * (1 - two) + white]])
    seen = inr.volume_render(sigma, rgb, t)
    torch.testing.assert_close(seen['rgb'], expected)
    torch.testing.assert_close(seen['depth'], torch.tensor(
        [0.5 * (1 - one) + 2.5 * one * (1 - two) + 4 * white]))


@pytest.mark.mutation('inr.py', '-torch.expm1(-(sigma * t.diff(dim=-1)).sum(-1))',
                      '1 - (1 - w).prod(-1)')
@pytest.mark.mutation('inr.py', '(-before).exp() *', '(-before).exp().clamp(min=1e-2) *')
@pytest.mark.mutation('inr.py', 'F.pad(thickness.cumsum(-1)[..., :-1], (1, 0))',
                      'thickness.cumsum(-1) - thickness')
def test_behind_an_opaque_wall_nothing_is_seen():
    """Neither far nor, by rounding, near; and half a wall before the end is no end of its own."""
    t = torch.linspace(0, 4, 9)[None]
    sigma = torch.tensor([[0, 0, 1e9, 1e9, 3, 0, 1e9, 0]])
    rgb = torch.rand(1, 8, 3)
    seen = inr.volume_render(sigma, rgb, t)
    assert torch.equal(seen['rgb'], rgb[:, 2]) and seen['opacity'] == 1
    assert seen['depth'] == 1.25
    fog = inr.volume_render(torch.tensor([[1.0, 1e9]]), rgb[:, :2], torch.tensor([[0.0, 1, 2]]))
    clear = math.exp(-1)
    torch.testing.assert_close(fog['rgb'], (1 - clear) * rgb[:, 0] + clear * rgb[:, 1])
    thin = inr.volume_render(1e-7 * torch.ones(1, 8), rgb, t)  # 1 - exp(-x) would round
    torch.testing.assert_close(thin['opacity'], torch.tensor([4e-7]), rtol=1e-4, atol=0)


@pytest.mark.mutation('inr.py', '(-before).exp() *', '(-before.detach()).exp() *')
@pytest.mark.mutation('inr.py', 'inverse = 1 / torch.where(rays_d.abs() < 1e-12, 1e-12, rays_d)',
                      'inverse = 1 / rays_d')
@pytest.mark.mutation('inr.py', '+ 0.01 * weights.mean(-1, keepdim=True) + 1e-6', '')
def test_gradients_are_finite():
    """Without density, with much, in bins of no width, along an axis in the plane of a face."""
    t = torch.tensor([[0.0, 0, 1, 1, 2, 3]]).double()
    sigma = torch.tensor([[0.0, 0.7, 5, 0.2, 40]]).double().requires_grad_()
    rgb = torch.rand(1, 5, 3).double().requires_grad_()

    def render(sigma, rgb):
        return tuple(inr.volume_render(sigma, rgb, t).values())
    assert torch.autograd.gradcheck(render, (sigma, rgb), raise_exception=False)
    rays_o = torch.tensor([[1.0, 0, -3], [9.0, 0, -3], [0, 0, 0]])
    rays_d = torch.tensor([[0.0, 0, 1], [0.0, 0, 1], [0, 1, 0]])
    for density in (0.0, 1.0, 1e8):
        values = torch.full((4,), density, requires_grad=True)
        seen = inr.march(lambda p, d: (values[0].expand_as(p[..., 0]), values[1:].expand_as(p)),
                         rays_o, rays_d, 8, importance=4)
        sum(v.sum() for v in seen.values()).backward()
        assert values.grad.isfinite().all() and all(v.isfinite().all() for v in seen.values())


# ---- rays through the box ----------------------------------------------------------------------

@pytest.mark.mutation('inr.py', '.clamp(min=0), ends', ', ends')
@pytest.mark.mutation('inr.py', 'return near, torch.maximum(near, far)', 'return near, far')
@pytest.mark.mutation('inr.py', 'ends.amin(0).amax(-1)', 'ends.amin(0).amin(-1)')
@pytest.mark.mutation('inr.py', 'ends.amax(0).amin(-1)', 'ends.amax(0).amax(-1)')
def test_rays_enter_and_leave_the_box():
    d = F.normalize(torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, -1], [0, 0, 1],
                                  [1, 0, 0]]), dim=1)
    o = torch.tensor([[0.3, -0.2, -3], [0, 0, 0.5], [-2, -2, 0.9], [0, 0, 2], [1.5, 0, -3],
                      [2, 0, 0]])
    near, far = inr.box_range(o, d)
    torch.testing.assert_close(near[:4], torch.tensor([2, 0, 2 ** 0.5, 1]))
    torch.testing.assert_close(far[:4], torch.tensor([4, 0.5, 3 * 2 ** 0.5, 3]))
    assert torch.equal(near[4:], far[4:]) and (near >= 0).all()  # beside the box, and away from it


@pytest.mark.mutation('inr.py', 'field(rays_o[..., None, :] + depth[..., None] * dirs, dirs)',
                      'field(rays_o[..., None, :] + depth[..., None] * dirs + 0.1, dirs)')
def test_sphere_of_constant_density():
    """Opacity 1 - exp(-density chord); rays that pass by, also beside the box, are white."""
    x = torch.linspace(-1.5, 1.5, 31)
    rays_o = torch.stack([x, 0 * x, torch.full_like(x, -3)], 1)
    rays_d = torch.tensor([0.0, 0, 1]).expand(31, 3)
    seen = inr.march(ball(0.6, density=2.0), rays_o, rays_d, 4000)
    chord = 2 * (0.36 - x ** 2).clamp(min=0).sqrt()
    torch.testing.assert_close(seen['opacity'], 1 - (-2 * chord).exp(), atol=2e-3, rtol=0)
    assert (seen['rgb'][x.abs() > 0.61] == 1).all()
    wall = inr.march(ball(0.6, density=1e5), rays_o, rays_d, 4000)
    torch.testing.assert_close(wall['depth'][chord > 0.1], (3 - chord / 2)[chord > 0.1], atol=1e-3,
                               rtol=0)
    torch.testing.assert_close(wall['rgb'][15], torch.tensor([1.0, 0.5, 0]))


@pytest.mark.mutation('inr.py', 'a + (b - a) * (u - lo)', 'a + 0 * (u - lo)')
@pytest.mark.mutation('inr.py', 'ray_weights(sigma, t), importance)',
                      'torch.ones_like(sigma), importance)')
@pytest.mark.mutation('inr.py', '+ 0.5) / count).expand', '+ 0.9) / count).expand')
def test_importance_puts_bins_where_the_light_ends():
    t, weights = torch.tensor([[0.0, 1, 2, 4]]), torch.tensor([[0.0, 1e4, 1e4]])
    finer = inr.finer_edges(t, weights, 4)
    torch.testing.assert_close(finer, torch.tensor([[0.0, 1, 1.25, 1.75, 2, 2.5, 3.5, 4]]),
                               atol=0.02, rtol=0)
    rays_o, rays_d = torch.tensor([[0.0, 0, -2.93]]), torch.tensor([[0.0, 0, 1]])
    thick = ball(0.5, 1e4)
    rough, fine = (inr.march(thick, rays_o, rays_d, 8, k)['depth'] for k in (0, 32))
    assert (rough - 2.43).abs() > 0.05 and (fine - 2.43).abs() < 0.015


# ---- cameras -----------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', 'torch.arange(h) + 0.5, torch.arange(w) + 0.5',
                      'torch.arange(h), torch.arange(w)')
@pytest.mark.mutation('inr.py', '(x - cx) / fx, (y - cy) / fy', '(x - cx) / fy, (y - cy) / fx')
@pytest.mark.mutation('inr.py', 'dim=-1) @ pose[:3, :3].T', 'dim=-1) @ pose[:3, :3]')
@pytest.mark.mutation('inr.py', 'cx, cy = (w / 2, h / 2) if', 'cx, cy = (h / 2, w / 2) if')
@pytest.mark.mutation('inr.py', 'expand_as(rays_d), rays_d', 'expand_as(rays_d), 2 * rays_d')
def test_rays_pass_through_what_their_pixels_show():
    """Points on rays, projected by the textbook's K [R | t], land on the centres of the pixels."""
    pose = torch.eye(4)
    pose[:3, :3] = torch.linalg.qr(torch.randn(3, 3))[0]
    pose[:3, 3] = torch.tensor([0.3, -2.0, 1.1])
    for focal, centre in ((5.0, None), ((5.0, 7.0), (2.2, 3.1))):
        rays_o, rays_d = inr.camera_rays(pose, focal, (4, 6), centre)
        torch.testing.assert_close(rays_d.norm(dim=2), torch.ones(4, 6))
        points = rays_o + 2.7 * rays_d
        world_to_camera = torch.linalg.inv(pose)
        seen = points @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
        (fx, fy), (cx, cy) = (focal, focal) if centre is None else focal, centre or (3.0, 2.0)
        K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        pixel = seen @ K.T
        assert (pixel[..., 2] > 0).all()
        torch.testing.assert_close((pixel / pixel[..., 2:])[..., :2].flip(2), torch.stack(
            torch.meshgrid(torch.arange(4) + 0.5, torch.arange(6) + 0.5, indexing='ij'), 2))


@pytest.mark.mutation('inr.py', '(y - cy) / fy)))', '(cy - y) / fy)))')
@pytest.mark.mutation('inr.py', '[x, y, torch.ones_like(x)], dim=-1) @',
                      '[x, y, -torch.ones_like(x)], dim=-1) @')
@pytest.mark.mutation('inr.py', 'for v in ((x - cx) / fx', 'for v in ((cx - x) / fx')
def test_axes_of_opencv_and_of_opengl():
    """OpenCV's camera looks along +z, with rows going along +y; Blender's looks along -z, y up."""
    _, d = inr.camera_rays(torch.eye(4), 4.0, (5, 5))
    assert d[2, 2].tolist() == [0, 0, 1] and d[2, 4, 0] > 0.3 and d[4, 2, 1] > 0.3
    blender = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, -3], [0, 1, 0, 0], [0, 0, 0, 1]])
    # This camera stands at y = -3 and looks along +y: its own -z; the world's z is up.
    o, d = inr.camera_rays(blender @ torch.diag(torch.tensor([1.0, -1, -1, 1])), 4.0, (5, 5))
    assert o[0, 0].tolist() == [0, -3, 0] and d[2, 2].tolist() == [0, 1, 0]
    assert d[0, 2, 2] > 0.3 and d[2, 4, 0] > 0.3


@pytest.mark.mutation('inr.py', 'require(t.shape[-1] == sigma.shape[-1] + 1', 'require(True')
def test_bins_have_one_edge_more():
    with pytest.raises(ValueError, match='2 edges of 8 bins'):
        inr.volume_render(torch.rand(1, 8), torch.rand(1, 8, 3), torch.tensor([[0.0, 1.0]]))


@pytest.mark.mutation('inr.py', '[[1.0], [-1.0], [-1.0]]', '[[1.0], [1.0], [-1.0]]')
@pytest.mark.mutation('inr.py', '= distance * axes[2]', '= -distance * axes[2]')
@pytest.mark.mutation('inr.py', 'min(size) / 2 / math.tan(math.radians(fov) / 2)',
                      'max(size) / 2 / math.tan(math.radians(fov) / 2)')
def test_an_orbit_sees_what_the_mesh_renderer_draws():
    vertices, faces = inr.extract_mesh(lambda p: 0.3 - (p - torch.tensor([0.4, 0.5, 0.1])).norm(
        dim=1), 48)
    view = dict(elevation=25.0, azimuth=70.0, distance=3.0)
    drawn = inr.render_mesh(vertices, faces, 40, **view, fov=50.0)
    focal = inr.focal_length(50.0, (40, 60))
    rays_o, rays_d = inr.camera_rays(inr.orbit(up='y', **view), focal, (40, 60))
    seen = inr.march(ball(0.3, 1e4, (0.4, 0.5, 0.1)), rays_o, rays_d, 512)
    middle = seen['opacity'][:, 10:50] > 0.5
    assert 60 < middle.sum() and (middle != drawn['depth'].isfinite()).sum() < 6
    both = middle & drawn['depth'].isfinite()
    forwards = (rays_d @ -inr.camera_axes(25.0, 70.0)[2])[:, 10:50]
    depth = (seen['depth'][:, 10:50] * forwards)[both]
    assert (depth - drawn['depth'][both]).abs().median() < 5e-3


@pytest.mark.mutation('inr.py', "'z': [[1, 0, 0], [0, 0, -1], [0, 1, 0]]",
                      "'z': [[1, 0, 0], [0, 0, 1], [0, 1, 0]]")
@pytest.mark.mutation('inr.py', "'-y': [[1, 0, 0], [0, -1, 0], [0, 0, -1]]",
                      "'-y': [[1, 0, 0], [0, 1, 0], [0, 0, 1]]")
def test_orbits_have_what_is_up_upwards():
    for up, axis in {'y': (0, 1, 0), 'z': (0, 0, 1), '-y': (0, -1, 0), '-z': (0, 0, -1)}.items():
        pose, axis = inr.orbit(40.0, 30.0, 2.0, up), torch.tensor(axis).float()
        torch.testing.assert_close(torch.linalg.det(pose[:3, :3]), torch.tensor(1.0))
        torch.testing.assert_close(pose[:3, 3] @ axis, torch.tensor(1.0))  # 2 sin 30
        assert pose[:3, 1] @ axis < -0.8  # the axis that points down in the picture
        torch.testing.assert_close(pose[:3, 2], -pose[:3, 3] / 2)  # looks at the origin


# ---- the read-out ------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', "'nerf': dict(xy=(0, 1), yz=(1, 2), xz=(0, 2))",
                      "'nerf': dict(xy=(0, 1), yz=(0, 2), xz=(1, 2))")
def test_a_field_is_constant_along_the_axis_it_has_not():
    model = tiny(coord_input=False, coord_octaves=0)
    every, points = decoded(model), torch.rand(30, 3) * 2 - 1
    for (name, still), axis in itertools.product(dict(xy=2, yz=0, xz=1).items(), range(3)):
        xi = [{k: f if k == name else torch.zeros_like(f) for k, f in level.items()}
              for level in every]
        moved = points.clone()
        moved[:, axis] = torch.rand(30) * 2 - 1
        change = (model.query(xi, moved) - model.query(xi, points)).abs().max()
        assert change < 1e-6 if axis == still else change > 1e-5


@pytest.mark.mutation('inr.py', '2.0 ** torch.arange(count', '3.0 ** torch.arange(count')
@pytest.mark.mutation('inr.py', 'torch.cat([x, waves.flatten(-2)], dim=-1)',
                      'torch.cat([waves.flatten(-2), x], dim=-1)')
def test_octaves():
    x = torch.rand(5, 3)
    expected = torch.cat([x, *[f(2 ** k * x) for k in range(3) for f in (torch.sin, torch.cos)]], 1)
    torch.testing.assert_close(inr.with_octaves(x, 3), expected)
    assert torch.equal(inr.with_octaves(x, 0), x)


@pytest.mark.mutation('inr.py', 'layer(h, style, gain), 0.2', 'layer(h, style, gain), 1.0')
@pytest.mark.mutation('inr.py', 'self.colour(F.leaky_relu(h, 0.2))', 'self.colour(h)')
def test_the_read_out_is_not_linear():
    """Neither what density and colour are of the fields, nor what the head makes of features.

    An affine map has f(a) + f(b) = f(a + b) + f(0) before its last function, softplus or sigmoid.
    """
    def bend(f, a, b):
        changes = f(a) + f(b) - f(a + b) - f(0 * a)
        return (changes.abs().mean(1) / f(a).std(1))[0]
    mlp, c = tiny(mlp_width=64, colour_width=64).mlp, torch.zeros(1, 500, 3)
    a, b = torch.randn(2, 1, 500, 24)

    def trunk(x):
        return mlp.radiance.raw(mlp.features(x.split(12, 2), c)[0])

    def colours(h):
        return mlp.radiance.colours_along(h, None).logit()
    assert bend(trunk, a, b) > 0.1
    assert bend(colours, *torch.randn(2, 1, 500, 64)).min() > 0.1


@pytest.mark.mutation('vae.py', 'octaves=c.view_octaves if c.view_dirs else None',
                      'octaves=c.view_octaves')
@pytest.mark.mutation('inr.py', 'for axis in axes) / len(axes)', 'for axis in axes) / 7')
@pytest.mark.mutation('inr.py', 'self.mlp(p, points, scale, dirs)', 'self.mlp(p, points, scale)')
@pytest.mark.mutation('inr.py', 'density, h = self.density(h), ', 'density, h = self.density('
                      'h + (0 if dirs is None else dirs.mean())), ')
def test_colour_alone_depends_on_the_direction():
    points = torch.rand(1, 20, 3) * 2 - 1
    first, second = (F.normalize(torch.randn(1, 20, 3), dim=2) for _ in range(2))
    axes = [s * torch.eye(3)[k].expand(1, 20, 3) for k in range(3) for s in (1, -1)]
    for view_dirs in (True, False):
        model = tiny(view_dirs=view_dirs)
        xi = decoded(model)
        (sigma, rgb), (other, changed) = (model.field(xi, points, d) for d in (first, second))
        assert torch.equal(sigma, other) and (sigma > 0).all()
        assert ((rgb - changed).abs().max() > 1e-3) == view_dirs
        assert (rgb > 0).all() and (rgb < 1).all()
        mean = sum(model.field(xi, points, d)[1] for d in axes) / 6
        torch.testing.assert_close(model.query(xi, points)[..., 1:], mean)
        f = model.function(xi)
        torch.testing.assert_close(f(points[0], dirs=first[0])[:, 1:], rgb[0])
        torch.testing.assert_close(f(points[0, :3], dirs=first[0, 0])[:, 0], sigma[0, :3])
        torch.testing.assert_close(model.density(xi, points), sigma)


@pytest.mark.mutation('vae.py', 'centre=self.config.centre', 'centre=(0.0, 0.0, 0.0)')
@pytest.mark.mutation('inr.py', "kind='function', about=f.about",
                      "kind='function', about={**f.about, 'centre': (0.0, 0.0, 0.0)}")
def test_an_exported_field_knows_its_box(tmp_path):
    model = tiny(extent=0.7, centre=(1.0, 2.0, 3.0))
    inr.save_function(tmp_path / 'f.pt', model.function(decoded(model)))
    f = inr.load_function(tmp_path / 'f.pt')
    assert (f.extent, tuple(f.centre)) == (0.7, (1.0, 2.0, 3.0))
    assert f(torch.zeros(5, 3)).shape == (5, 4)


@pytest.mark.mutation('inr.py', 'constant_(self.raw.bias, -4.0)', 'constant_(self.raw.bias, 0.0)')
def test_a_new_field_lets_light_through():
    model = tiny(mlp_width=64)
    seen = model.render_rays(decoded(model), *random_rays(1, 50), skip=False)
    assert 0.05 < seen['opacity'].mean() < 0.9


@pytest.mark.mutation('inr.py', 'above | (gradient < 0)', 'above')
@pytest.mark.mutation('inr.py', 'above | (gradient < 0)', 'above | True')
@pytest.mark.mutation('inr.py', 'F.softplus(raw) - math.log1p(math.exp(self.lowest))',
                      'F.softplus(raw)')
def test_what_is_empty_can_fill_again():
    """Density 0, with a slope that counts only if it should grow, so that white cannot win all."""
    head = tiny(density_scale=2.0).mlp.radiance
    for weight in (head.raw.weight, head.raw.bias):
        torch.nn.init.constant_(weight, 0.0)
    for raw, density in ((-30.0, 0.0), (-6.0, 0.0), (3.0, 6.0922)):
        head.raw.bias.data.fill_(raw)
        for sign in (1.0, -1.0):
            head.zero_grad()
            value = head.density(torch.zeros(1, 1, 8)).sum()
            (sign * value).backward()
            assert value.item() == pytest.approx(density, abs=1e-3)
            slope = 2 / (1 + math.exp(-max(raw, -6)))
            assert head.raw.bias.grad.item() == pytest.approx(
                0 if raw < -6 and sign > 0 else sign * slope, rel=1e-4)


# ---- the training step -------------------------------------------------------------------------

@pytest.mark.mutation('vae.py', 'return 2 * rgb - 1, target', 'return rgb, target')
@pytest.mark.mutation('vae.py', 'return 15000', 'return 5000')
@pytest.mark.mutation('vae.py', "batch['rays_o'], rays_d, c.ray_samples",
                      "-batch['rays_o'], rays_d, c.ray_samples")
@pytest.mark.mutation('inr.py', 'depth = t[..., :-1] + place * t.diff(dim=-1)',
                      'depth = t[..., 1:] - 0 * place')
def test_objective_of_rays():
    """Mean L1 of the rays' colours, + (kl sum KL + sn SN) / 15,000; a slow march along them."""
    model, noise = tiny(kl_weight=0.3, sn_start=0.0).eval(), torch.randn(2, 4, 48)
    batch = batch_of()
    q = model.encode(batch)
    xi = model.decode(q.sample(noise))
    colours = torch.zeros(2, 10, 3)
    for b, r in torch.cartesian_prod(torch.arange(2), torch.arange(10)).tolist():
        o, d = batch['rays_o'][b, r], batch['rays_d'][b, r]
        near, far = inr.box_range(o, d)
        own, clear = [{k: f[b:b + 1] for k, f in level.items()} for level in xi], 1.0
        for k in range(16):
            point = o + (near + (far - near) * (k + 0.5) / 16) * d
            sigma, rgb = model.field(own, point[None, None], d[None, None])
            passed = (-sigma[0, 0] * (far - near) / 16).exp()
            colours[b, r] += clear * (1 - passed) * rgb[0, 0]
            clear = clear * passed
        colours[b, r] += clear
    expected = (2 * colours - 1 - batch['target']).abs().mean() + 0.3 * q.kl().mean() / 15000
    torch.testing.assert_close(model(batch, noise=noise)['total'], expected)


@pytest.mark.mutation('vae.py', 'if self.training:', 'if True:')
@pytest.mark.mutation('vae.py', 'if self.training:', 'if False:')
@pytest.mark.mutation('inr.py', '.sum((1, 2))[:, None', '.sum((1, 2)).cumsum(0)[:, None')
@pytest.mark.mutation('inr.py', '.view(torch.int32).long()', '.view(torch.int32).long().mul(0)')
def test_rays_are_read_at_random_places_in_training_only():
    """The places follow from the item's rays, so they come again after a resume, in any batch."""
    model, batch = tiny(), batch_of(3)
    xi = decoded(model, 3)
    jittered, again = (model.predict(xi, batch)[0] for _ in range(2))
    assert torch.equal(jittered, again)
    last = [{k: f[2:] for k, f in level.items()} for level in xi]
    alone = model.predict(last, {k: v[2:] for k, v in batch.items()})[0]
    torch.testing.assert_close(alone, jittered[2:])
    changed = {k: torch.cat([v[:, :-1], batch_of(3)[k][:, -1:]], 1) for k, v in batch.items()}
    other = model.predict(xi, changed)[0]  # of the same rays but the last
    model.eval()
    centred = model.predict(xi, batch)[0]
    assert (jittered - centred).abs().max() > 1e-4 < (jittered - other)[:, :-1].abs().max()
    expected = 2 * model.render_rays(xi, batch['rays_o'], batch['rays_d'], skip=False)['rgb'] - 1
    torch.testing.assert_close(centred, expected)


@pytest.mark.mutation('vae.py', 'if self.training and c.colour_points:', 'if c.colour_points:')
@pytest.mark.mutation('vae.py', "[:, :c.colour_points].split", "[:, -c.colour_points:].split")
@pytest.mark.mutation('vae.py', 'self.field(xi, points)[1]], dim=1)',
                      'self.field(xi, colours)[1]], dim=1)')
@pytest.mark.mutation('vae.py', 'torch.cat([target, colours], dim=1)',
                      'torch.cat([target, points], dim=1)')
def test_colours_of_points_are_asked_for_in_training_only():
    """After the rays, those of the first points, where the field is read without a direction."""
    model, batch = tiny(colour_points=5), batch_of(2)
    xi, rays = decoded(model, 2), batch['target'].shape[1]
    found, target = model.predict(xi, batch)
    points, colours = batch['points'][:, :5, :3], batch['points'][:, :5, 3:]
    torch.testing.assert_close(found[:, rays:], 2 * model.field(xi, points)[1] - 1)
    assert torch.equal(target, torch.cat([batch['target'], colours], dim=1))
    assert torch.equal(model.eval().predict(xi, batch)[1], batch['target'])


@pytest.mark.mutation('inr.py', '* 0x45D9F3B', '* 3')
@pytest.mark.mutation('inr.py', 'key * 0x9E3779B1 + number', 'key * 0x9E3779B1 + number % count')
@pytest.mark.mutation('inr.py', 'mul(2.0 ** -32)', 'mul(2.0 ** -33)')
def test_scattered_numbers_look_random():
    x = inr.scattered(random_rays(8, 500)[1], 64)
    assert x.shape == (8, 500, 64) and 0 <= x.min() and x.max() < 1
    counts = torch.histc(x, 16, 0, 1) / x.numel() * 16
    assert (counts - 1).abs().max() < 0.03
    for a, b in ((x[0], x[1]), (x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.03


@pytest.mark.mutation('inr.py', 'apply(self.raw(h).float(),', 'apply(self.raw(h).float().detach(),')
def test_every_parameter_learns():
    for changes in ({}, dict(view_dirs=False), dict(ray_importance=4, conditioning='concat')):
        model = tiny(sn_start=0.0, **changes)
        model(batch_of(), torch.tensor([0.1, 1.0]))['total'].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.mutation('vae.py', "'nerf', 6\n    allowed", "'nerf', 6\n    refused")
@pytest.mark.mutation('vae.py', 'self.coord_input or not self.coord_octaves', 'True')
@pytest.mark.mutation('vae.py', 'self.view_dirs or self.view_octaves', 'True or self.view_octaves')
@pytest.mark.mutation('vae.py', 'require(self.up in UPWARDS', 'require(True')
def test_impossible_field_configurations_are_refused():
    for changes, word in ((dict(loss='bce'), '--loss'), (dict(up='w'), 'up w'),
                          (dict(scale_injection=True), '--scale_injection'),
                          (dict(coord_input=False), '--coord_octaves'),
                          (dict(view_dirs=False, view_octaves=2), '--view_octaves'),
                          (dict(threshold=0.2), '--threshold')):
        with pytest.raises(ValueError, match=word):
            tiny(**changes)
    for flag in ('ray_samples', 'ray_importance', 'colour_width', 'view_octaves'):
        with pytest.raises(ValueError, match=f'--{flag}'):
            vae.VAEConfig(**{flag: 7})


# ---- pictures ----------------------------------------------------------------------------------

def solid(model, centre=(0.5, -0.2, -0.4), radius=0.35, counts=None):
    """Gives the model a field: a ball with a soft edge, its colours those of space."""
    def density(xi, points):
        return 100 * ((radius - (points - torch.tensor(centre)).norm(dim=-1)) * 60).sigmoid()

    def field(xi, points, dirs=None):
        if counts is not None:
            counts.append(points[..., 0].numel())
        return density(xi, points), (points + 1) / 2
    model.density, model.field = density, field
    return model.eval()


@pytest.mark.mutation('vae.py', 'zip(rays_o[i].split(chunk),', 'zip(rays_o[0].split(chunk),')
@pytest.mark.mutation('vae.py', 'torch.cat(sigma, 1)', 'torch.cat(sigma[::-1], 1)')
@pytest.mark.mutation('vae.py', 'own), occupied[i])', 'own), occupied[0])')
def test_rays_in_parts_equal_all_at_once(monkeypatch):
    model = tiny().eval()
    xi, rays = decoded(model, 2), random_rays(2, 50)
    for p in model.mlp.parameters():
        p.data *= 1.5
    for skip in (True, False):
        whole = model.render_rays(xi, *rays, skip=skip, chunk=10 ** 6)
        with monkeypatch.context() as patch:
            patch.setattr(vae, 'points_at_a_time', lambda device: 7)
            parts = model.render_rays(xi, *rays, skip=skip, chunk=3)
        for k, v in whole.items():
            torch.testing.assert_close(parts[k], v)
    one = model.render_rays([{k: f[1:] for k, f in level.items()} for level in xi],
                            *[r[1:] for r in rays], skip=False)
    torch.testing.assert_close(one['rgb'], whole['rgb'][1:])
    empty = torch.stack([torch.full((2, 2, 2), full) for full in (False, True)])
    half = model.render_rays(xi, *rays, empty)['rgb']
    assert (half[0] == 1).all()
    torch.testing.assert_close(half[1], whole['rgb'][1])
    assert not whole['rgb'].requires_grad and (whole['rgb'][0] - whole['rgb'][1]).abs().max() > 0.01


@pytest.mark.mutation('vae.py', 'n, flat = points_at_a_time(points.device)', 'n, flat = 10 ** 9')
@pytest.mark.mutation('vae.py', 'chunk=points_at_a_time(device),\n', 'chunk=10 ** 9,\n')
def test_no_more_points_are_read_at_a_time_than_asked(monkeypatch):
    monkeypatch.setattr(vae, 'points_at_a_time', lambda device: 500)
    model, read = tiny().eval(), []
    look_up = model.look_up
    model.look_up = lambda xi, p: read.append(p.shape[0] * p.shape[1]) or look_up(xi, p)
    model.render_rays(decoded(model), *random_rays(1, 200))
    assert max(read) == 500 and sum(read) > 200 * 8


@pytest.mark.mutation('inr.py', 'occupied[z, y, x] &', 'occupied[x, y, z] &')
@pytest.mark.mutation('inr.py', 'occupied[z, y, x] &', '(occupied[z, y, x] | True) &')
@pytest.mark.mutation('inr.py', '(points + 1) * (cells / 2)', 'points * (cells / 2)')
@pytest.mark.mutation('inr.py', ' & (points.abs() <= 1).all(-1)', '')
@pytest.mark.mutation('inr.py', '.flip(1)  # x first, changing', '  # x first, changing')
def test_pictures_with_skipping_are_those_without():
    """To a mean difference below 1/255, with less than a quarter of the evaluations."""
    counts = []
    model = solid(tiny(ray_samples=64), counts=counts)
    xi = [{k: torch.zeros(1, 4, 16, 16) for k in ('xy', 'yz', 'xz')}]
    poses = [inr.orbit(a, 20.0, 4.0) for a in (0, 100)]
    dense = model.render_views(xi, poses, (32, 40), skip=False)
    full, _ = sum(counts), counts.clear()
    sparse = model.render_views(xi, poses, (32, 40))
    rays = sum(far > near for pose in poses for near, far in [inr.box_range(*inr.camera_rays(
        pose, inr.focal_length(40.0, (32, 40)), (32, 40)))]).sum()
    assert full == rays * 64 and sum(counts) < full / 4
    assert (dense['opacity'] > 0.5).float().mean() > 0.02
    for k, v in dense.items():
        assert (sparse[k] - v).abs().mean() < 1 / 255 and (sparse[k] - v).abs().max() < 0.02, k
    counts.clear()
    everywhere = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    away = torch.tensor([[[3.0, 3, 3], [0, 0, 3]]]), torch.tensor([[[0, 0, 1.0], [0, 0, 1]]])
    assert (model.render_rays(xi, *away, everywhere)['rgb'] == 1).all() and sum(counts) == 0


@pytest.mark.mutation('inr.py', 'kernel_size=4, stride=1, padding=1', 'kernel_size=2, stride=1')
@pytest.mark.mutation('inr.py', '[0, 0] <= least', '[0, 0] <= 2 * least')
@pytest.mark.mutation('inr.py', 'return ~(F.max_pool3d(values, kernel_size=4, stride=1, padding=1)'
                      '[0, 0] <= least)', 'return (F.max_pool3d(values, kernel_size=4, stride=1, '
                      'padding=1)[0, 0] > least)')
def test_cells_round_a_dense_node_are_occupied():
    """All that touch it and their neighbours: the density rises between the nodes, too.

    What is not a number is not empty, so that it comes to light in the picture.
    """
    assert inr.occupied_cells(lambda p: p[:, 0] * math.nan, 2).all()
    node = torch.tensor([0.0, -0.5, 0.25])  # of 8 cells a side: x 4, y 2, z 5
    cells = inr.occupied_cells(lambda p: ((p - node).norm(dim=1) < 1e-3) * 0.15, 8)
    expected = torch.zeros(8, 8, 8, dtype=torch.bool)
    expected[3:7, 0:4, 2:6] = True
    assert torch.equal(cells, expected)


@pytest.mark.mutation('vae.py', 'azimuth + 360 * k / views', 'azimuth + 180 * k / views')
@pytest.mark.mutation('vae.py', "['rgb'] * 2 - 1", "['rgb']")
@pytest.mark.mutation('vae.py', 'distance, self.config.up)', 'distance)')
@pytest.mark.mutation('vae.py', "rgb=seen['rgb'].mov", "rgb=seen['rgb'].transpose(2, 3).mov")
@pytest.mark.mutation('vae.py', 'views).unbind(1), dim=3)', 'views).unbind(1), dim=2)')
def test_views_are_pictures_from_a_circle():
    model = solid(tiny(up='z', ray_samples=32))
    xi = [{k: torch.zeros(2, 4, 8, 8) for k in ('xy', 'yz', 'xz')}]
    views = model.signal(xi, (10, 10), views=3, azimuth=10.0, elevation=35.0, distance=3.0)
    assert views.shape == (2, 3, 3, 10, 10) and torch.equal(views[0], views[1])
    for k, azimuth in enumerate((10, 130, 250)):
        rays_o, rays_d = inr.camera_rays(inr.orbit(azimuth, 35.0, 3.0, 'z'),
                                         inr.focal_length(40.0, (10, 10)), (10, 10))
        rgb = inr.march(lambda p, d: model.field(xi, p, d), rays_o, rays_d, 32)['rgb']
        assert (rgb * 2 - 1 - views[0, k].permute(1, 2, 0)).abs().mean() < 2 / 255
    assert views.min() < 0.5 and (views == 1).float().mean() > 0.5  # the ball on white
    strip = model.show(xi, 8, views=2)
    torch.testing.assert_close(strip, torch.cat([*model.signal(xi, 8, 2).unbind(1)], 3))
    assert strip.shape == (2, 3, 8, 16) and model.signal(xi, (6, 9)).shape == (2, 8, 3, 6, 9)


def test_the_grid_of_a_latent_is_made_once():
    model, made = solid(tiny()), []
    occupied = model.occupied
    model.occupied = lambda xi: made.append(1) or occupied(xi)
    model.signal([{k: torch.zeros(1, 4, 8, 8) for k in ('xy', 'yz', 'xz')}], 70)
    assert len(made) == 1


@pytest.mark.mutation('vae.py', 'math.log1p(level), 64', 'math.log1p(level / 2), 64')
@pytest.mark.mutation('vae.py', ' + points.new_tensor(self.config.centre)', '')
@pytest.mark.mutation('vae.py', 'points * self.config.extent', 'points')
@pytest.mark.mutation('vae.py', '(own, self.in_box(vertices))[1]', '(own, vertices)[1]')
@pytest.mark.mutation('vae.py', '(points - points.new_tensor(self.config.centre)) /', 'points /')
def test_surfaces_are_coloured():
    centre = torch.tensor([0.5, -0.2, -0.4])
    model = solid(tiny(extent=0.5, centre=(5.0, 6.0, 7.0)))
    xi = [{k: torch.zeros(2, 4, 8, 8) for k in ('xy', 'yz', 'xz')}]
    surfaces = model.surface(xi, 64, level=50.0)
    assert len(surfaces) == 2
    vertices, faces, colours = surfaces[0]
    in_box = (vertices - torch.tensor([5.0, 6, 7])) / 0.5
    assert ((in_box - centre).norm(dim=1) - 0.35).abs().max() < 0.006
    torch.testing.assert_close(colours, (in_box + 1) / 2)
    assert metrics.topology(vertices, faces) == (1, 2, True)
    outwards = F.normalize(in_box - centre, dim=1)
    torch.testing.assert_close(model.normals(xi, vertices), outwards, atol=1e-3, rtol=0)
    model.density = lambda xi, points: torch.zeros(points.shape[:-1])
    assert [tuple(x.shape) for x in model.surface(xi, 8)[0]] == [(0, 3)] * 3


# ---- the authors' numbers ----------------------------------------------------------------------

GLOBALS = {'argparse.Namespace': argparse.Namespace, 'builtins.dict': dict, 'builtins.int': int,
           'builtins.list': list, 'collections.defaultdict': collections.defaultdict,
           'typing.Any': typing.Any}
GLOBALS |= {f'omegaconf.{name}': type(name, (), {}) for name in (
    'base.ContainerMetadata', 'base.Metadata', 'dictconfig.DictConfig', 'listconfig.ListConfig',
    'nodes.AnyNode')}  # the configuration, which is not looked at
HALF_BOX = (1 + 0.1 + 1e-5) / 2  # of the box in which they pool points


@pytest.fixture(scope='module')
def authors():
    """Their weights, inputs and outputs."""
    with torch.serialization.safe_globals([(v, k) for k, v in GLOBALS.items()]):
        state = torch.load(AUTHORS / 'ldm-last.pt', weights_only=True)
    io = torch.load(AUTHORS / 'io.pt', weights_only=True)
    return state, io['inputs'], io['outputs']


def authors_rays(outputs):
    """Our rays for their camera: pixels without their half, poses of OpenGL."""
    pose, focal = outputs['pose'] @ torch.diag(torch.tensor([1.0, -1, -1, 1])), outputs['focal']
    return inr.camera_rays(pose, float(focal), (8, 8), (4.5, 4.5))


def authors_colours(mlp, x, dirs):
    """Their read-out, which is linear but for the sigmoid: (...,4), colours and raw density."""
    def layer(name, h):
        return F.linear(h, mlp[f'{name}.weight'], mlp[f'{name}.bias'])
    h = x
    for i in range(6):
        h = layer(f'xyz_encoding_{i + 1}.0', torch.cat([x, h], -1) if i in (2, 4) else h)
    colour = torch.cat([layer('xyz_encoding_final', h), inr.with_octaves(dirs, 4)], -1)
    return torch.cat([layer('rgb.0', layer('dir_encoding.0', colour)).sigmoid(),
                      layer('sigma', h)], -1)


needs_authors = pytest.mark.skipif(not AUTHORS.exists(), reason=f'{AUTHORS} is absent')


@pytest.mark.slow
@needs_authors
def test_points_with_colours_become_the_authors_planes(authors):
    state, inputs, outputs = authors
    model = tiny(resolution=16, point_hidden=32, point_blocks=3, point_channels=32).points
    names = {'fc_pos': 'proj_in', 'fc_c': 'proj_out', 'fc_0': 'fc0', 'fc_1': 'fc1',
             'shortcut': 'skip'}
    own = {}
    for key, value in state['pointnet'].items():
        for old, new in names.items():
            key = key.replace(old, new)
        own[key] = value.clone()
    own['proj_in.weight'][:, :3] *= HALF_BOX  # our points are in [-1, 1]
    model.load_state_dict(own)
    cloud = inputs['cloud'].clone()
    cloud[..., :3] /= HALF_BOX
    planes = model(cloud)
    for name, plane in outputs['planes'].items():
        torch.testing.assert_close(planes[name], plane, atol=2e-5, rtol=0)


@pytest.mark.slow
@needs_authors
def test_rays_are_those_of_the_authors(authors):
    _, _, outputs = authors
    rays_o, rays_d = authors_rays(outputs)
    torch.testing.assert_close(rays_o, outputs['rays_o'])
    torch.testing.assert_close(rays_d, F.normalize(outputs['rays_d'], dim=2), atol=1e-5, rtol=0)


@pytest.mark.slow
@needs_authors
def test_fields_and_rays_give_the_authors_colours(authors):
    """With their linear read-out, points a 3.5th as far out and fields read from corner to corner.

    Their last bin is without end. As an edge far away it gives their colours; without it, ours,
    what is left of the light is what their last point gets.
    """
    state, _, outputs = authors
    rays_o, rays_d = (r.flatten(0, 1) for r in authors_rays(outputs))
    z = torch.linspace(2, 6, 16) * outputs['rays_d'].flatten(0, 1).norm(dim=1, keepdim=True)
    points = rays_o[:, None] + z[..., None] * rays_d[:, None]  # (64, 16, 3)
    for kind in ('straight', 'swapped'):
        xi = [{k: f[0][:1] for k, f in outputs[f'fields.{kind}'].items()}]
        corner = points.view(1, -1, 3) / 3.5 * 15 / 16  # where align_corners=True has them
        p, = inr.look_up(xi, corner, 'nerf', 'concat')
        x = torch.cat([p.view(64, 16, -1), inr.with_octaves(points, 10)], -1)
        raw = authors_colours(state['mlp'], x, rays_d[:, None].expand(-1, 16, -1))
        torch.testing.assert_close(raw, outputs[f'raw.{kind}'], atol=4e-4, rtol=0)
        rgb, sigma = raw[..., :3], F.softplus(raw[..., 3])
        seen = inr.volume_render(sigma, rgb, F.pad(z, (0, 1), value=1e10))
        torch.testing.assert_close(seen['rgb'], outputs[f'rgb.{kind}'].flatten(0, 1), atol=1e-4,
                                   rtol=0)
        torch.testing.assert_close(seen['opacity'], outputs[f'acc.{kind}'].flatten(), atol=1e-4,
                                   rtol=0)
        ours = inr.volume_render(sigma[:, :15], rgb[:, :15], z, white_background=False)
        rest = (1 - ours['opacity'])[:, None] * rgb[:, 15]
        torch.testing.assert_close(ours['rgb'] + rest, outputs[f'rgb.{kind}'].flatten(0, 1),
                                   atol=1e-4, rtol=0)
