"""Posed pictures: cameras, the coloured toy and its exact renders, hulls, layouts, bad files."""
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import spatial

import common
import data


@pytest.fixture(autouse=True)
def renders(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'TOY_RENDERS', tmp_path / 'renders')


def toy(**options):
    return data.make_dataset('toy_nerf', **{**dict(split='test', side=24, toy_views=6, points=200,
                                                   rays=64, clouds=2), **options})


def opened(root, name='nerf', split='all', **options):
    return data.make_dataset(name, root, split, **{**dict(points=200, rays=64), **options})


# ---- cameras ------------------------------------------------------------------------------------

def look_at(eye, target=(0, 0, 0), up=(0, 1, 0)):
    """Pose (4,4) of a camera at `eye`: camera to world, OpenCV axes x right, y down, z forward."""
    ahead = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross(ahead, up) / np.linalg.norm(np.cross(ahead, up))
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(ahead, right), ahead, eye], axis=1)
    return pose


def some_camera(rng, bend=(0, 0, 0, 0)):
    pose = look_at(rng.normal(size=3) + (0, 0, 4), rng.normal(size=3) / 4)
    return pose, np.array([50, 60, 31, 25, *bend])


def opencv_bend(x, y, k1, k2, p1, p2):
    """As the documentation of OpenCV prints it."""
    r = math.hypot(x, y)
    return (x * (1 + k1 * r ** 2 + k2 * r ** 4) + 2 * p1 * x * y + p2 * (r ** 2 + 2 * x ** 2),
            y * (1 + k1 * r ** 2 + k2 * r ** 4) + p1 * (r ** 2 + 2 * y ** 2) + 2 * p2 * x * y)


@pytest.mark.mutation('data.py', 'r2 * (k1 + r2 * k2)', 'r2 * (k1 + k2)')
@pytest.mark.mutation('data.py', 'p1 * (r2 + 2 * y * y)', 'p1 * (r2 + 2 * x * x)')
@pytest.mark.mutation('data.py', 'u, v = u + x - a, v + y - b', 'u, v = a, b')
def test_rays_and_places_are_inverse_with_any_lens():
    rng = np.random.default_rng(0)
    for bend in ((0, 0, 0, 0), (-0.2, 0.05, 0.01, -0.02), (0.1, 0.1, -0.01, 0.01)):
        pose, lens = some_camera(rng, bend)
        x, y = rng.uniform(5, 50, (2, 40))
        o, d = data.pixel_rays(pose, lens, x, y)
        np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1)
        t = rng.uniform(0.5, 5, 40)
        u, v, depth = data.project_points(pose, lens, o + t[:, None] * d)
        np.testing.assert_allclose([u, v], [x, y], atol=1e-6)
        np.testing.assert_allclose(depth, t * (d @ pose[:3, 2]))
        a, b, c = pose[:3, :3].T @ d[7]
        seen = np.array(opencv_bend(a / c, b / c, *bend)) * lens[:2] + lens[2:4]
        np.testing.assert_allclose(seen, [x[7], y[7]], atol=1e-6)


@pytest.mark.mutation('data.py', 'unit * (1, -1, -1) if axes', 'unit if axes')
def test_a_point_is_where_opencv_and_opengl_cameras_show_it():
    """By hand: a camera at (0, 0, 4) that looks along -z, y up, 40 pixels focal length."""
    opengl = np.eye(4)
    opengl[2, 3] = 4
    lens = np.array([40, 40, 32, 24, 0, 0, 0, 0])
    opencv = opengl @ np.diag([1, -1, -1, 1])
    for pose in (data.as_pose(opengl, 'opengl', 'a'), data.as_pose(opencv.ravel(), 'opencv', 'b'),
                 look_at((0, 0, 4))):
        x, y, depth = data.project_points(pose, lens, np.array([[0.4, 0.3, 0], [0, 0, 2]]))
        np.testing.assert_allclose(x, [32 + 40 * 0.4 / 4, 32])
        np.testing.assert_allclose(y, [24 - 40 * 0.3 / 4, 24])
        np.testing.assert_allclose(depth, [4, 2])
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


@pytest.mark.mutation('data.py', '(lens[..., 2:4] - corner) * factor',
                      'lens[..., 2:4] * factor - corner')
@pytest.mark.mutation('data.py', 'resized_lens(self.lenses[k], self.sizes[k], (R, R), corner',
                      'resized_lens(self.lenses[k], self.sizes[k], (R, R), (0, 0)')
def test_reduced_and_square_pictures_show_points_at_the_same_place():
    rng = np.random.default_rng(1)
    pose, lens = some_camera(rng, (-0.1, 0, 0, 0.01))
    cameras = data.Cameras(pose[None], lens[None], np.array([[80, 50]]))
    p = rng.normal(size=(20, 3)) / 3
    x, y, _ = data.project_points(pose, lens, p)
    small = cameras.reduced(40)
    assert small.sizes.tolist() == [[40, 25]] and cameras.reduced(100).sizes.tolist() == [[80, 50]]
    u, v, _ = data.project_points(pose, small.lenses[0], p)
    np.testing.assert_allclose([u, v], [x / 2, y / 2])
    u, v, _ = data.project_points(pose, cameras.square(0, 10), p)
    np.testing.assert_allclose([u, v], [(x - 15) / 5, y / 5])


@pytest.mark.mutation('data.py', 'half / np.hypot(1, half)', 'half')
@pytest.mark.mutation('data.py', '> 0) < 0.5:', '> 0) < -1:')
@pytest.mark.mutation('data.py', '.max() > 1e-9 * np.abs(eye)', '.max() > -1 - np.abs(eye)')
def test_cameras_look_at_a_ball():
    rng, centre = np.random.default_rng(2), np.array([1.0, -2.0, 0.5])
    directions = rng.normal(size=(12, 3))
    eyes = centre + 3 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    poses = np.stack([look_at(e, centre) for e in eyes])
    lens = np.array([60.0, 60, 30, 20, 0, 0, 0, 0])
    cameras = data.Cameras(poses, np.tile(lens, (12, 1)), np.tile((60, 40), (12, 1)))
    middle, radius = data.common_ball([cameras])
    np.testing.assert_allclose(middle, centre, atol=1e-9)
    assert radius == pytest.approx(3 * math.sin(math.atan(20 / 60)))
    turned = data.Cameras(poses @ np.diag([1, -1, -1, 1]), cameras.lenses, cameras.sizes)
    with pytest.raises(ValueError, match='look away.*--axes'):
        data.common_ball([turned])
    for place in (centre, 0):
        standing = poses.copy()
        standing[:, :3, 3] = place
        with pytest.raises(ValueError, match='at one place'):
            data.common_ball([data.Cameras(standing, cameras.lenses, cameras.sizes)])
    same = data.Cameras(poses[:1].repeat(3, 0), cameras.lenses[:3], cameras.sizes[:3])
    with pytest.raises(ValueError, match='--box'):
        data.common_ball([same])


@pytest.mark.mutation('data.py', '[:, :3, 1].mean(0)', '[:, :3, 2].mean(0)')
@pytest.mark.mutation('data.py', 'np.array(UPWARDS[name])[:, 1]', 'np.array(UPWARDS[name])[1]')
def test_what_is_above_in_the_pictures_is_up():
    lens, rng = np.ones(8), np.random.default_rng(0)
    for up, axis in {'y': (0, 1, 0), 'z': (0, 0, 1), '-y': (0, -1, 0), '-z': (0, 0, -1)}.items():
        poses = [look_at(e, up=axis) for e in rng.normal(size=(20, 3))]
        assert data.upwards([data.Cameras(np.stack(poses), lens, (4, 4))]) == up


# ---- toy_nerf -----------------------------------------------------------------------------------

def slow_render(scene, o, d, step=4e-4):
    """The integral along one ray from t = 2 to 6 by equal steps, all parts asked everywhere."""
    t = np.arange(2, 6, step) + step / 2
    density, colour = data.toy_field(scene, o + t[:, None] * d)
    through = np.exp(-np.cumsum(density.astype(float)) * step)
    w = np.concatenate([[1], through[:-1]]) - through
    ends = np.sort([(-1 - o) / d, (1 - o) / d], axis=0)
    far = max(ends[0].max(), ends[1].min())  # of a ray that misses the box, where it came nearest
    return (w @ colour + through[-1], w @ t + through[-1] * far, 1 - through[-1])


@pytest.mark.mutation('data.py', 'h * (1 / x - 1 / np.expm1(x))', 'h * 0.9')
@pytest.mark.mutation('data.py', 'part.crossing(o, d, TOY_EDGE / 2)', 'part.crossing(o, d, -0.01)')
@pytest.mark.mutation('data.py', 'depth + clear * far', 'depth')
@pytest.mark.mutation('data.py', "rgb=rgb + clear[:, None]", "rgb=rgb")
def test_toy_renders_equal_a_slow_integration():
    for seed, view in ((2, 0), (4, 3), (2 ** 30 + 5, 1)):
        scene = data.toy_scene(seed)
        x, y = np.meshgrid(np.arange(8.5, 40, 4), np.arange(8.5, 40, 4))
        o, d = data.pixel_rays(data.toy_pose(seed, view), data.toy_lens(48), x.ravel(), y.ravel())
        fast = data.toy_render(scene, o, d)
        slow = [slow_render(scene, a, b) for a, b in zip(o, d)]
        assert 5 < (fast['opacity'] > 0.9).sum() < 60
        for k, v in enumerate((fast['rgb'], fast['depth'], fast['opacity'])):
            np.testing.assert_allclose(v, np.stack([s[k] for s in slow]), atol=4e-4)


@pytest.mark.mutation('data.py', 'radius, (low, high) = self.profile[:, 0].max() + margin',
                      'radius, (low, high) = self.profile[:, 0].max() - 0.05')
@pytest.mark.mutation('data.py', 'side * (self.half + margin)', 'side * (self.half - 0.05)')
def test_bounds_hold_the_parts():
    rng = np.random.default_rng(0)
    for seed in range(8):
        scene = data.toy_scene(seed)
        for whole, part in zip(scene.solid.parts, scene.parts):
            p = whole.surface(50, rng).astype('float32')
            d = rng.normal(size=p.shape).astype('float32')
            d /= np.linalg.norm(d, axis=1, keepdims=True)
            start, end = part.crossing(p - 3 * d, d, 0.001)
            assert (start <= 3).all() and (end >= 3).all()


@pytest.mark.mutation('data.py', '+ reach * TOY_LIGHT', '- reach * TOY_LIGHT')
@pytest.mark.mutation('data.py', '[round(part.area, 4) for part in solid.parts]',
                      '[*range(len(solid.parts))]')
@pytest.mark.mutation('data.py', 'return TOY_DENSITY * weight.max(1)',
                      'return TOY_DENSITY * (weight.max(1) > 0.3)')
def test_colours_of_the_toy():
    """Alike parts have one colour, the side in the light is brighter, different scenes differ."""
    scene = next(s for s in map(data.toy_scene, range(50)) if s.solid.family == 'table')
    assert (scene.paint[1:] == scene.paint[1]).all() and (scene.paint[0] != scene.paint[1]).any()
    block = data.toy_scene(0)
    block.parts = [data.single(data.Block((0, 0, 0), (0.5, 0.5, 0.5)))]
    block.paint = block.paint[:1]
    top, bottom = data.toy_field(block, np.array([[0, 0.499, 0], [0, -0.499, 0]]))[1]
    assert top.sum() > 1.3 * bottom.sum()
    density = data.toy_field(block, np.array([[0.0, 0, 0], [0, 0.5, 0], [0, 0.52, 0]]))[0]
    np.testing.assert_allclose(density, [200, 100, 0], atol=1e-3)


# ---- items --------------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', 'x + 0.5, y + 0.5)\n            found', 'x, y)\n            found')
@pytest.mark.mutation('data.py', 'trained = len(cameras) - self.test_views\n        chosen',
                      'trained = len(cameras)\n        chosen')
@pytest.mark.mutation('data.py', 'for v in (self.to_box(o), d))',
                      'for v in (self.to_box(o), d * sign))')
def test_rays_of_items_have_the_colours_of_the_scene():
    """A mirrored item is the mirrored scene: its rays, points and colours turn together."""
    items, turned = toy(flip=True, rays=300, ray_views=3, side=32), set()
    for k in range(6):
        item = items.item(3, common.seeded('test', k))
        again = items.item(3, common.seeded('test', k))
        assert all(torch.equal(item[key], again[key]) for key in ('points', 'rays_o', 'rays_d',
                                                                  'target'))
        assert item['points'].shape == (200, 6) and item['rays_o'].shape == (300, 3)
        assert item['target'].abs().max() <= 1 and item['target'].dtype == torch.float32
        eyes, counts = item['rays_o'].unique(dim=0, return_counts=True)
        assert counts.tolist() == [100, 100, 100]
        own = items.cameras(3).poses[:4, :3, 3]
        errors = {}
        for sign in (1, -1):
            o, d = (item[key].numpy() * (sign, 1, 1) for key in ('rays_o', 'rays_d'))
            shown = data.toy_render(items.scenes[3], o, d)['rgb'] * 2 - 1
            errors[sign] = np.abs(shown - item['target'].numpy()).max()
        sign = min(errors, key=errors.get)
        turned.add(sign)
        assert errors[sign] < 2 / 255 < errors[-sign]
        away = np.abs(eyes.numpy()[:, None] * (sign, 1, 1) - own).max(2).min(1)
        assert away.max() < 1e-5  # none of the held-out views
        p = item['points'].numpy() * (sign, *[1] * 5)
        assert np.abs(data.toy_distance(items.scenes[3], p[:, :3])).max() < 1e-5
        np.testing.assert_allclose(data.toy_field(items.scenes[3], p[:, :3])[1] * 2 - 1, p[:, 3:],
                                   atol=1e-3)
    assert turned == {1, -1}


@pytest.mark.mutation('data.py', "self.cloud(i, common.seeded('cloud', self.names[i], k))",
                      "self.cloud(i, common.seeded('cloud', self.names[i]))")
@pytest.mark.mutation('data.py', "rng = rng or common.seeded('scene', self.names[i])",
                      "rng = rng or np.random.default_rng()")
def test_items_without_a_generator_and_views():
    items = toy()
    assert items.views == 2 and items.channels == 4 and items.domain == 'nerf'
    assert all(torch.equal(items.item(1)[k], items.item(1)[k]) for k in ('points', 'target'))
    assert not torch.equal(items.view(1, 0)['points'], items.view(1, 1)['points'])
    assert {items.draw_view(common.seeded('test', k)) for k in range(20)} == {0, 1}
    assert items.item(1)['label'] == items.labels[1]
    less = toy(**items.encoder_only).item(1, common.seeded('test', 0))
    full = items.item(1, common.seeded('test', 0))
    assert torch.equal(less['points'], full['points']) and len(less['rays_o']) == 1


@pytest.mark.mutation('data.py', 'on[pixels[:focused] * len(on) // opacity.size]',
                      'on[pixels[:focused] % 40]')
@pytest.mark.mutation('data.py', 'round(self.focus * n)', 'round(self.focus * n / 2)')
def test_rays_can_be_drawn_where_the_object_is():
    items, opacity = toy(focus=0.5), np.zeros((20, 30), 'uint8')
    opacity[4:10, 7:20] = 9
    row, column = items.draw_pixels(opacity, 400_000, common.seeded('test', 0))
    counts = np.bincount(row * 30 + column, minlength=600).reshape(20, 30) / 400_000
    np.testing.assert_allclose(counts, 0.5 / 600 + (opacity > 0) * 0.5 / 78, rtol=0.3)
    row, column = items.draw_pixels(0 * opacity, 1000, common.seeded('test', 0))
    assert row.max() == 19 and column.max() == 29
    with pytest.raises(ValueError, match='--focus'):
        toy(focus=1.5)


@pytest.mark.mutation('data.py', 'range(count - self.test_views, count)', 'range(self.test_views)')
@pytest.mark.mutation('data.py', 'shown[..., 3] > 0.5', 'shown[..., 3] < 0.5')
def test_truth_is_exact_at_any_resolution():
    items = toy(test_views=3)
    (pictures, covered), (o, d) = items.truth(2, 20), items.rays(2, 20)
    assert pictures.shape == (3, 3, 20, 20) and o.shape == d.shape == (3, 20, 20, 3)
    assert covered.shape == (3, 20, 20) and covered.dtype == torch.bool
    assert np.allclose(o[:, 0, 0], items.cameras(2).poses[3:, :3, 3], atol=1e-6)
    found = data.toy_render(items.scenes[2], o.reshape(-1, 3), d.reshape(-1, 3))
    np.testing.assert_allclose(pictures.permute(0, 2, 3, 1).reshape(-1, 3), found['rgb'] * 2 - 1,
                               atol=1e-5)
    assert np.array_equal(covered.flatten(), found['opacity'] > 0.5)
    assert (pictures.permute(0, 2, 3, 1)[~covered].mean() > 0.9)
    np.testing.assert_allclose(items.rays(2, 60, [4])[1][0, 1::3, 1::3], d[1], atol=1e-5)
    np.testing.assert_allclose(items.truth(2, 60, [4])[0][0, :, 1::3, 1::3], pictures[1], atol=1e-4)
    assert items.picture(2, 20).equal(pictures[0]) and items.preview(2, 8).shape == (3, 8, 32)


@pytest.mark.mutation('data.py', 'save_npz(path, **arrays)\n    except', 'pass\n    except')
@pytest.mark.mutation('data.py', 'range(self.toy_views))).round()', 'range(self.toy_views)))')
def test_renders_are_kept(tmp_path):
    items, again = toy(), toy()
    shot = items.shot(0, 1)
    assert len([*(tmp_path / 'renders').rglob('*.npz')]) == 1
    again.render = None
    assert np.array_equal(again.shot(0, 1), shot)
    exact = items.square(0, 1, 24)
    assert np.abs(shot / 255 - exact).max() < 1 / 500


# ---- hull ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def many_views():
    """A chair, cameras all round it and its pictures, uint8 (64,64,4)."""
    seed = next(s for s in range(50) if data.toy_shape(s).family == 'chair')
    scene = data.toy_scene(seed)
    angles = np.linspace(0, 6, 20)
    heights = np.linspace(-0.8, 0.95, 20)[np.argsort(np.sin(9 * angles))]
    poses, shots = [], []
    x, y = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    for a, h in zip(angles, heights):
        r = 4 * math.sqrt(1 - h * h)
        poses.append(look_at((r * math.sin(a), 4 * h, r * math.cos(a))))
        o, d = data.pixel_rays(poses[-1], data.toy_lens(64), x.ravel(), y.ravel())
        shown = data.toy_render(scene, o, d)
        rgba = np.hstack([shown['rgb'], shown['opacity'][:, None]])
        shots.append((255 * rgba).round().astype('uint8').reshape(64, 64, 4))
    cameras = data.Cameras(np.stack(poses), np.tile(data.toy_lens(64), (20, 1)),
                           np.tile(64, (20, 2)))
    return scene, cameras, shots


@pytest.mark.mutation('data.py', 'reach in ((coarse, math.sqrt(3) * extent / coarse)',
                      'reach in ((coarse, 0)')
@pytest.mark.mutation('data.py', 'hits += framed & (distance[row, column] <= pixels)',
                      'hits += framed & (distance[column, row] <= pixels)')
@pytest.mark.mutation('data.py', 'needed = min(HULL_SHARE, share.max(initial=0))',
                      'needed = 0.4')
def test_hull_holds_the_object_and_fills_the_silhouettes(many_views):
    scene, cameras, shots = many_views
    masks = [s[..., 3] > 127 for s in shots]
    cells, n, share = data.visual_hull(cameras, masks, np.zeros(3), 1.0)
    assert n == 128 and share == data.HULL_SHARE
    p = data.toy_surface(scene.solid, 2000, np.random.default_rng(0))
    pixel = 4 / cameras.lenses[0, 0]
    assert spatial.KDTree((cells + 0.5) * 2 / n - 1).query(p)[0].max() < 1.2 * pixel
    for pose, lens, size, mask in zip(cameras.poses, cameras.lenses, cameras.sizes, masks):
        row, column, _, framed = data.pixels_of(pose, lens, size, (cells + 0.5) * 2 / n - 1)
        filled = np.zeros_like(mask)
        filled[row, column] = True
        assert framed.all() and (filled & mask).sum() > 0.98 * mask.sum()
        assert (filled & ~mask).sum() < 0.06 * mask.sum()


def normals(scene, p, h=1e-3):
    steps = [data.toy_distance(scene, (p + h * e).astype('float32'))
             - data.toy_distance(scene, (p - h * e).astype('float32')) for e in np.eye(3)]
    return np.stack(steps, 1) / (2 * h)


@pytest.mark.mutation('data.py', 'depth <= nearest[row, column] + 3 * cell', 'depth > 0')
@pytest.mark.mutation('data.py', 'shot[row, column, :3]\n', 'shot[column, row, :3]\n')
def test_hull_points_have_the_colours_that_are_seen(many_views):
    scene, cameras, shots = many_views
    points, share = data.hull_points(cameras, shots, np.zeros(3), 1.0, np.random.default_rng(0))
    assert 2000 < len(points) <= data.HULL_POINTS and points.shape[1] == 6
    p = points[:, :3]
    distance = data.toy_distance(scene, p.astype('float32'))
    assert np.median(np.abs(distance)) < 0.03
    near = np.abs(distance) < 0.02
    on = p[near] - distance[near, None] * normals(scene, p[near])
    wrong = np.abs(data.toy_field(scene, on)[1] * 2 - 1 - points[near, 3:]).mean(1)
    assert np.median(wrong) < 0.08 and (wrong > 0.3).mean() < 0.06


# ---- layouts ------------------------------------------------------------------------------------

def pictures_of(seed, views, side):
    """Poses (OpenCV) and uint8 (V,side,side,4) of a toy scene."""
    items = toy(split='train', toy_views=views, side=side)
    poses = items.cameras(seed).poses
    return poses, np.stack([items.shot(seed, k) for k in range(views)])


def write_srn(folder, poses, shots):
    for part in ('rgb', 'pose'):
        (folder / part).mkdir(parents=True)
    for k, (pose, shot) in enumerate(zip(poses, shots)):
        Image.fromarray(shot[..., :3]).save(folder / f'rgb/{k:06d}.png')
        (folder / f'pose/{k:06d}.txt').write_text(' '.join(map(str, pose.ravel())))
    side = shots.shape[1]
    focal = side / 2 / math.tan(math.radians(18))
    (folder / 'intrinsics.txt').write_text(f'{focal} {side / 2} {side / 2} 0.\n0. 0. 0.\n1.\n'
                                           f'{side} {side}\n')


def straight(shot):
    """Colours over white -> those that give them when laid over white, as RGBA files have them."""
    a = shot[..., 3:] / 255
    colour = (shot[..., :3] - 255 * (1 - a)) / np.maximum(a, 1 / 255)
    return np.concatenate([colour.round().clip(0, 255), shot[..., 3:]], -1).astype('uint8')


def write_json(folder, poses, shots, suffix='', **about):
    (folder / 'train').mkdir(parents=True)
    frames = []
    for k, (pose, shot) in enumerate(zip(poses, shots)):
        Image.fromarray(straight(shot)).save(folder / f'train/r_{k}.png')
        matrix = pose @ np.diag([1, -1, -1, 1])
        frames.append(dict(file_path=f'./train/r_{k}{suffix}', transform_matrix=matrix.tolist()))
    about = dict(camera_angle_x=math.radians(36), frames=frames) | about
    (folder / 'transforms.json').write_text(json.dumps(about))


def write_npz(path, poses, shots, cloud):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=shots, cam_poses=poses @ np.diag([1, -1, -1, 1]), data=cloud)


@pytest.fixture(scope='module')
def scene_views(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'TOY_RENDERS', tmp_path_factory.mktemp('renders'))
        return [pictures_of(k, 10, 32) for k in range(3)]


@pytest.fixture
def folders(tmp_path, scene_views):
    """The same three scenes as srn/car*, json/car* and, with their points, npz/*.npz."""
    for k, (poses, shots) in enumerate(scene_views):
        write_srn(tmp_path / f'srn/car{k}', poses, shots)
        write_json(tmp_path / f'json/car{k}', poses, shots)
        scene = data.toy_scene(k)
        p = data.toy_surface(scene.solid, 2048, np.random.default_rng(0))
        write_npz(tmp_path / f'npz/cars/sampled/0{k}_car{k}.npz', poses, shots,
                  np.hstack([p, data.toy_field(scene, p)[1]]))
    return tmp_path


@pytest.mark.mutation('data.py', 'side / 2 / math.tan(number(angle) / 2)',
                      'side / math.tan(number(angle) / 2)')
@pytest.mark.mutation('data.py', 'rows[-1][::-1], size)', '(1, 1), size)')
@pytest.mark.mutation('data.py', 'images[k] * (255 / white)', 'images[k] * 255')
def test_layouts_show_the_same_scenes(folders, scene_views):
    """Points fall on the object in all; rays are those of the toy; the box is what cameras see."""
    sets = [opened(folders / kind) for kind in ('srn', 'json', 'npz')]
    for items in sets[:2]:
        assert items.names == ['car0', 'car1', 'car2']
        assert items.extent == pytest.approx(4 * math.sin(math.radians(18)), abs=1e-3)
        assert np.abs(items.centre).max() < 1e-3
        for i, (poses, shots) in enumerate(scene_views):
            np.testing.assert_allclose(items.cameras(i).poses, poses, atol=1e-6)
            np.testing.assert_allclose(items.cameras(i).lenses[7], data.toy_lens(32))
            assert np.abs(items.shot(i, 3)[..., :3] - shots[3, ..., :3].astype(int)).max() <= 3
            assert items.agreement(i).min() > 0.85
            o, d = items.rays(i, 32)
            x, y = np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5)
            a, b = data.pixel_rays(poses[8], data.toy_lens(32), x, y)
            np.testing.assert_allclose(o[0] * items.extent + torch.tensor(items.centre).float(), a,
                                       atol=1e-3)
            np.testing.assert_allclose(d[0], b, atol=1e-6)
    npz, bytes_of = sets[2], sets[2].shot(1, 3)
    assert npz.names == [f'cars/sampled/0{k}_car{k}' for k in range(3)]
    np.testing.assert_allclose(npz.cameras(1).poses, scene_views[1][0], atol=1e-6)
    focal = 0.5 * 32 / math.tan(0.5 * 0.6911112070083618)
    assert npz.cameras(1).lenses[0].tolist() == [focal, focal, 16, 16, 0, 0, 0, 0]
    poses, shots = scene_views[1]
    for dtype, scale in (('int64', 1), ('float32', 1 / 255)):
        write_npz(folders / 'other/a.npz', poses, (shots * scale).astype(dtype), np.zeros((1, 6)))
        assert np.array_equal(opened(folders / 'other').shot(0, 3), bytes_of)
    item = npz.item(0, common.seeded('test', 0))
    p = item['points'][:, :3].double().numpy() * npz.extent + npz.centre
    assert np.abs(data.toy_distance(data.toy_scene(0), p.astype('float32'))).max() < 1e-4


@pytest.mark.mutation('data.py', "n.split('/')[-1].split('_')[-1])", 'n)')
@pytest.mark.mutation('data.py', 'return found, sides if all(sides.values()) else None',
                      'return found, None')
def test_official_splits(folders, tmp_path):
    for side in ('train', 'val', 'test'):
        shutil.copytree(folders / 'srn/car0', tmp_path / f'cars/cars_{side}/a{side}')
    items = opened(tmp_path / 'cars', 'srn_cars', 'train')
    assert items.splits() == dict(train=['cars_train/atrain'], test=['cars_test/atest'])
    assert items.notes == ['1 scenes of neither train nor test are left alone']
    for k in range(3, 5):
        shutil.copy(folders / 'npz/cars/sampled/00_car0.npz',
                    folders / f'npz/cars/sampled/{9 - k}_car{k}.npz')
    sides = opened(folders / 'npz', 'srn_cars', 'train').splits()
    assert [n[-4:] for n in sides['train']] == ['car0', 'car1', 'car2', 'car3']
    assert [n[-4:] for n in sides['test']] == ['car4']


@pytest.mark.mutation('data.py', 'abs(width - size[0]) <= 1.5 + 0.02 * size[0]', 'True')
def test_pictures_of_another_shape_than_the_cameras_saw_are_refused(tmp_path, scene_views):
    poses, shots = scene_views[0]
    for name, size, good in (('a', (96, 96), True), ('b', (64, 128), False), ('c', (64, 65), True),
                             ('d', (65, 71), False)):
        write_json(tmp_path / name, poses, shots, w=size[0], h=size[1])  # 32 x 32 are stored
        write_srn(tmp_path / f'{name}/srn', poses, shots)
        intrinsics = tmp_path / f'{name}/srn/intrinsics.txt'
        first = intrinsics.read_text().split('\n')[0]
        intrinsics.write_text(f'{first}\n{size[1]} {size[0]}\n')
        for layout, path in ((data.JsonScene, 'transforms.json'), (data.SrnScene, 'srn/intrinsics.txt')):
            try:
                layout(tmp_path / name / path).cameras(layout.axes)
                assert good, (name, layout)
            except ValueError as error:
                assert not good and 'it was cropped, or turned' in str(error)


@pytest.mark.mutation('data.py', 'require(hidden or not folder.is_dir()', 'require(True')
@pytest.mark.mutation('data.py', 'require(hidden or not folder', 'require(not folder')
def test_scenes_that_cannot_be_listed_are_not_passed_over(folders, monkeypatch):
    hidden = {'.trash', 'lost+found'}
    for name in hidden:
        (folders / 'json' / name).mkdir()
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path).name not in hidden)
    try:
        opened(folders / 'json')
    except ValueError as error:
        pytest.fail(str(error))
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path).name != 'car1')
    with pytest.raises(ValueError, match='car1: cannot be listed'):
        opened(folders / 'json')


@pytest.mark.mutation('data.py', "'transforms_train.json', ('train', 'val', 'test')",
                      "'transforms_train.json', ('train', 'test')")
@pytest.mark.mutation('data.py', 'return not (path.parent / JsonScene.pattern).is_file()',
                      'return True')
@pytest.mark.mutation('data.py', 'frames=[part | frame', 'frames=[parts[0] | frame')
def test_blenders_three_files_are_one_scene(tmp_path, scene_views):
    poses, shots = scene_views[0]
    write_json(tmp_path / 's', poses, shots)
    whole = opened(tmp_path / 's', box=(1.0,)).cameras(0)
    about = json.loads((tmp_path / 's/transforms.json').read_text())
    for side, part in (('test', slice(8, 10)), ('val', slice(6, 8)), ('train', slice(0, 6))):
        own = about | dict(frames=about['frames'][part])
        own |= dict(camera_angle_x=1.0) if side == 'val' else {}
        (tmp_path / f's/transforms_{side}.json').write_text(json.dumps(own))
    assert len(opened(tmp_path / 's', box=(1.0,)).cameras(0)) == 10
    (tmp_path / 's/transforms.json').write_text(json.dumps(about | dict(frames=about['frames'][:7])))
    assert len(opened(tmp_path / 's', box=(1.0,)).cameras(0)) == 7  # which goes before the others
    (tmp_path / 's/transforms.json').unlink()
    joined = opened(tmp_path / 's', box=(1.0,)).cameras(0)
    np.testing.assert_allclose(joined.poses, whole.poses)
    assert joined.lenses[:, 0].tolist() == [16 / math.tan(0.5) if k in (6, 7) else focal
                                            for k, focal in enumerate(whole.lenses[:, 0])]


@pytest.mark.mutation('data.py', 'if key not in self.FOCAL[first:]}', '}')
@pytest.mark.mutation('data.py', "return fitted_lens(lens, (width, height), size)", 'return lens')
def test_intrinsics_in_every_way(tmp_path, scene_views):
    poses, shots = scene_views[0]
    focal = data.toy_lens(32)[0]
    write_json(tmp_path / 'a', poses, shots, '.png', camera_angle_x=None, fl_x=2 * focal,
               fl_y=2 * focal, cx=30, cy=34, w=64, h=64, k1=0.05, p2=0.01)
    lens = opened(tmp_path / 'a', box=(1.0,)).cameras(0).lenses[0]
    np.testing.assert_allclose(lens, [focal, focal, 15, 17, 0.05, 0, 0, 0.01])
    write_json(tmp_path / 'b', poses, shots, fl_x=99)
    about = json.loads((tmp_path / 'b/transforms.json').read_text())
    about['frames'][4] |= dict(camera_angle_x=math.radians(36), camera_angle_y=math.radians(30))
    about['frames'][5] |= dict(cx=11, fl_y=50)
    Image.new('RGBA', (48, 20)).save(tmp_path / 'b/train/r_6.png')
    (tmp_path / 'b/transforms.json').write_text(json.dumps(about))
    cameras = opened(tmp_path / 'b', box=(1.0,), side=24).cameras(0)
    assert cameras.lenses[0][:4].tolist() == [99, 99, 16, 16]
    np.testing.assert_allclose(cameras.lenses[4][:2], [focal, 16 / math.tan(math.radians(15))])
    np.testing.assert_allclose(cameras.lenses[5][:4], [99, 50, 11, 16])
    assert cameras.sizes[6].tolist() == [48, 20] and cameras.lenses[6][2:4].tolist() == [24, 10]
    assert cameras.reduced(24).sizes[6].tolist() == [24, 10]


@pytest.mark.mutation('data.py', 'im.putalpha(Image.fromarray(values)', "im.putalpha(im.convert('L')")
def test_masks_say_what_the_object_is(tmp_path, scene_views):
    poses, shots = scene_views[0]
    busy = shots.copy()
    busy[..., :3][shots[..., 3] == 0] = (90, 120, 60)
    busy[..., 3] = 255
    write_json(tmp_path / 'a', poses, busy)
    with pytest.raises(ValueError, match='r_0.png: no transparency, no mask.*masks/NAME.png'):
        opened(tmp_path / 'a').item(0)
    (tmp_path / 'a/masks').mkdir()
    for k, shot in enumerate(shots):
        Image.fromarray(shot[..., 3]).save(tmp_path / f'a/masks/r_{k}.png')
    items = opened(tmp_path / 'a')
    assert np.array_equal(items.shot(0, 2)[..., 3], shots[2, ..., 3])
    assert (items.shot(0, 2)[shots[2, ..., 3] == 0] == (255, 255, 255, 0)).all()
    assert items.agreement(0).min() > 0.9


@pytest.mark.mutation('data.py', 'if coloured or values.max() == 1:', 'if coloured:')
@pytest.mark.mutation('data.py', 'if coloured or values.max() == 1:', 'if values.max() == 1:')
@pytest.mark.mutation('data.py', "(-1, 3)), 1).any()", "(-1, 3)), 1).all() or True")
@pytest.mark.mutation('data.py', 'require(0.98 < shape < 1.02', 'require(True')
def test_masks_of_numbers_and_of_other_shapes():
    inside = np.zeros((4, 8), 'uint8')
    inside[:, 5:] = 1
    black, grey = Image.fromarray(inside), Image.fromarray(1 - inside)
    black.putpalette([9, 0, 0, 0, 0, 0])  # an object of the darkest colour
    grey.putpalette([255, 255, 255, 0, 0, 0])  # a picture of two colours, no numbers
    for mask in (Image.fromarray(inside), Image.fromarray(255 * inside), black, grey):
        seen = data.with_opacity(Image.new('L', (16, 8)), mask, 'x')
        assert (np.asarray(seen)[::2, ::2, 3] == 255 * inside)[:, [0, 7]].all()
    with pytest.raises(ValueError, match='x: of another shape than its mask'):
        data.with_opacity(Image.new('L', (8, 16)), black, 'x')


@pytest.mark.mutation('data.py', '*self.box)[-4:-1]', '*self.box)[:3]')
@pytest.mark.mutation('data.py', '(places - np.array(self.centre)) / self.extent',
                      'places / self.extent')
def test_box_of_all_scenes(folders):
    for split in ('train', 'test'):
        assert opened(folders / 'srn', split=split, holdout=0.4).extent == pytest.approx(
            4 * math.sin(math.radians(18)), abs=1e-3)
    given = opened(folders / 'srn', box=(0.1, 0.2, 0.3, 1.5))
    assert given.centre == (0.1, 0.2, 0.3) and given.extent == 1.5
    plain = opened(folders / 'srn', box=(1.5,))
    assert plain.centre == (0, 0, 0)
    a, b = (s.rays(0, 8)[0][0, 0, 0] * 1.5 + torch.tensor(s.centre) for s in (given, plain))
    torch.testing.assert_close(a, b)
    for box in ((1.0, 2.0), (0.0,), (1.0, 0.0, 0.0, -1.0)):
        with pytest.raises(ValueError, match='--box'):
            opened(folders / 'srn', box=box)


@pytest.mark.mutation('data.py', 'return dict(file)\n', 'raise OSError\n')
def test_points_are_kept_beside_the_scene(folders, monkeypatch):
    points = opened(folders / 'srn').source(1)
    monkeypatch.setattr(data, 'hull_points', lambda *args: pytest.fail('made twice'))
    assert np.array_equal(opened(folders / 'srn').source(1), points)
    assert len([*(folders / 'srn/car1').glob('points-*.npz')]) == 1


@pytest.mark.mutation('data.py', 'found.update(np.ascontiguousarray(array))', 'pass')
@pytest.mark.mutation('data.py', '*vars(self.cameras(i)).values(), *self', '*(), *self')
@pytest.mark.mutation('data.py', '*self.read(i, range(len(self.cameras(i))))):', '):')
def test_points_are_made_anew_when_pictures_or_poses_change(folders):
    scene = folders / 'srn/car1'
    picture, pose = (min((scene / part).iterdir()) for part in ('rgb', 'pose'))
    for count in (1, 2, 3):
        opened(folders / 'srn', box=(1.5,)).source(1)
        assert len([*scene.glob('points-*.npz')]) == count
        if count == 1:
            Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
        else:
            numbers = np.array(pose.read_text().split(), float)
            pose.write_text(' '.join(map(str, numbers + ([0, 0, 0, 1e-3] * 3 + [0] * 4))))


# ---- bad input ----------------------------------------------------------------------------------

def change(path, edit):
    about = json.loads(path.read_text())
    edit(about)
    path.write_text(json.dumps(about))


BAD = {
    'not JSON': lambda f: (f / 'transforms.json').write_text('{"frames": ['),
    'no list `frames`': lambda f: change(f / 'transforms.json', lambda a: a.pop('frames')),
    'camera_angle_x, or fl_x': lambda f: change(f / 'transforms.json',
                                                lambda a: a.pop('camera_angle_x')),
    'no file_path': lambda f: change(f / 'transforms.json',
                                     lambda a: a['frames'][1].pop('file_path')),
    'transform_matrix of frame 2: not a matrix': lambda f: change(
        f / 'transforms.json', lambda a: a['frames'][2].pop('transform_matrix')),
    'frame 0: not finite': lambda f: change(
        f / 'transforms.json', lambda a: a['frames'][0]['transform_matrix'][0].__setitem__(
            3, float('nan'))),
    'not a rotation': lambda f: change(
        f / 'transforms.json', lambda a: a['frames'][0]['transform_matrix'][0].__setitem__(0, 5.0)),
    'no picture ./train/r_3': lambda f: (f / 'train/r_3.png').unlink(),
    'undistort': lambda f: change(f / 'transforms.json', lambda a: a.update(k3=0.1)),
    'folds the picture over': lambda f: change(f / 'transforms.json', lambda a: a.update(k1=-30.0)),
    'only 2 views': lambda f: change(f / 'transforms.json',
                                     lambda a: a.update(frames=a['frames'][:2])),
}


@pytest.mark.parametrize('why', BAD)
def test_one_line_about_bad_transforms(tmp_path, scene_views, why):
    write_json(tmp_path / 'a', *scene_views[0])
    BAD[why](tmp_path / 'a')
    with pytest.raises(ValueError) as error:
        opened(tmp_path)
    assert why in str(error.value) and '\n' not in str(error.value) and 'a:' in str(error.value)


@pytest.mark.mutation('data.py', 'self.check_bend(lens, (width, height))', 'pass')
def test_lenses_that_can_be_undone_and_that_cannot(tmp_path, scene_views):
    write_json(tmp_path / 'a', *scene_views[0], k1=-0.2, k2=0.1, p1=0.01)
    assert opened(tmp_path).names == ['a']
    write_json(tmp_path / 'b', *scene_views[0], k1=-4.0)
    with pytest.raises(ValueError, match='folds the picture over'):
        opened(tmp_path / 'b')


@pytest.mark.mutation('data.py', 'require(np.isfinite(pose).all()', 'require(True')
def test_bad_scenes_are_listed_and_skipped(folders, scene_views):
    for k in range(3, 300):
        shutil.copytree(folders / 'json/car0', folders / f'json/car{k}')
    BAD['frame 0: not finite'](folders / 'json/car1')
    (folders / 'json/car2/train/r_9.png').write_bytes(b'broken')
    items = opened(folders / 'json')
    assert [n for n, _ in items.bad] == ['car1', 'car2'] and len(items) == 298
    (folders / 'srn/car1/pose/000003.txt').unlink()
    (folders / 'srn/car2/rgb/000004.png').write_bytes(
        (folders / 'srn/car2/rgb/000004.png').read_bytes()[:300])
    items = opened(folders / 'srn', cache_bytes=0)
    assert items.bad == [('car1', items.bad[0][1])] and '000003.txt' in items.bad[0][1]
    item = items.item(1, common.seeded('test', 0))  # the next good one stands in
    assert 'car2' in dict(items.bad) and torch.isfinite(item['points']).all()
    assert items.stand_in(1) == 0
    with pytest.raises(FileNotFoundError, match='no such folder'):
        opened(folders / 'nothing')
    (folders / 'empty').mkdir()
    with pytest.raises(ValueError, match='no scenes; each is a folder with transforms.json'):
        opened(folders / 'empty')


# ---- check --------------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', 'once.setdefault(identity(file), (k, frame, file))',
                      'once.setdefault(k, (k, frame, file))')
@pytest.mark.mutation('data.py', 'self.place = path if isinstance(self, ArrayScene) else path.parent',
                      'self.place = path.parent')
@pytest.mark.mutation('data.py', 'return self.scenes[name].place if name in self.scenes else name',
                      'return name')
@pytest.mark.mutation('data.py', 'if path.is_file() and layout.applies(path):', 'if True:')
def test_scenes_and_views_with_several_names_are_used_once(folders, scene_views):
    """By links, or listed twice; neither is a folder or a pipe of a scene's name a scene."""
    for kind, name, other in (('json', 'car0', 'a'), ('srn', 'car1', 'z'),
                              ('npz', 'cars/sampled/00_car0.npz', 'cars/sampled/link.npz')):
        path = folders / kind / other
        path.symlink_to(folders / kind / name)
        assert len(opened(folders / kind)) == 3, kind
    (folders / 'json/car7/transforms.json').mkdir(parents=True)
    items = opened(folders / 'json')
    assert items.names == ['car0', 'car1', 'car2'] and not items.bad
    assert items.notes == ['1 scenes left out: other names (links) of those there']
    file = folders / 'json/car0/transforms.json'
    about = json.loads(file.read_text())
    about['frames'] += [about['frames'][2], dict(about['frames'][3], file_path='train/link.png')]
    file.write_text(json.dumps(about))
    (folders / 'json/car0/train/link.png').symlink_to('r_3.png')
    items = opened(folders / 'json')
    assert len(items.cameras(0)) == 10
    np.testing.assert_allclose(items.cameras(0).poses, scene_views[0][0], atol=1e-6)


def check(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['data.py', 'check', *map(str, argv)])
    data.main()


@pytest.mark.mutation('data.py', 'framed & mask[row, column]', 'framed')
@pytest.mark.mutation('data.py', '((0.5, ', '((0.0, ')
@pytest.mark.mutation('data.py', '(0.8, ', '(0.0, ')
def test_check_draws_and_says_what_is_wrong(folders, monkeypatch, capsys):
    out = folders / 'look.png'
    for kind in ('srn', 'json'):
        check(monkeypatch, folders / kind, '--out', out, '--res', 24)
        printed = capsys.readouterr().out
        assert f'nerf at {folders / kind}' in printed and '10 median' in printed
        assert '+- 1.236' in printed and 'warning' not in printed
        assert Image.open(out).size == (6 * 24 + 4, 3 * 26 + 2)
    for k in range(3):
        path = folders / f'npz/cars/sampled/0{k}_car{k}.npz'
        arrays = dict(np.load(path))
        arrays['data'][:, :3] = arrays['data'][:, [0, 2, 1]] * (1, 1, -1) + (0, 0, 1)
        np.savez(path, **arrays)
    check(monkeypatch, folders / 'npz', '--out', out, '--res', 24)
    assert 'fewer than half of the points do' in capsys.readouterr().out
    for path in (folders / 'srn').rglob('pose/*.txt'):  # turned about the line of sight
        pose = np.array(path.read_text().split(), float).reshape(4, 4) @ np.diag([-1, -1, 1, 1])
        path.write_text(' '.join(map(str, pose.ravel())))
    check(monkeypatch, folders / 'srn', '--out', out, '--res', 24)
    assert 'they leave much uncovered' in capsys.readouterr().out


@pytest.mark.mutation('data.py', 'scene.cameras(self.axes or scene.axes)',
                      'scene.cameras(scene.axes)')
def test_check_of_wrong_axes(folders, monkeypatch, capsys):
    with pytest.raises(ValueError, match='look away.*--axes opencv'):
        check(monkeypatch, folders / 'srn', '--axes', 'opengl')
    with pytest.raises(ValueError, match='--axes.*--box'):
        opened(folders / 'srn', box=(1.4,), axes='opengl').item(0)


@pytest.mark.mutation('data.py', "and most < 128 else 255", "else 255")
@pytest.mark.mutation('data.py', "images.dtype.kind == 'f' and most < 128", "images.dtype.kind == 'f'")
@pytest.mark.mutation('data.py', 'require(white == 1 or most < 256', 'require(True')
def test_pictures_in_an_npz_are_bytes_or_floats(tmp_path, scene_views):
    poses, shots = scene_views[0]
    found = []
    for images in (shots, shots / 255, shots.astype('float32'), 257 * shots.astype('uint16')):
        write_npz(tmp_path / 'cars/sampled/00_a.npz', poses, images, np.zeros((9, 6)))
        scene = next(iter(data.find_scenes(tmp_path)[0].values()))
        try:
            found.append(np.stack([np.asarray(im) for im in scene.pictures(range(3))]))
        except ValueError as error:
            assert 'images: values up to 65535' in str(error)
    assert len(found) == 3 and all(np.array_equal(other, found[0]) for other in found)
