"""Shapes: toy solids, the PointNet, tri-planes, the layout of Occupancy Networks, set metrics."""
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import encoders
import inr
import metrics
import vae

TINY = dict(domain='shape', channels=1, resolution=8, ch=8, ch_mult=(1, 2), num_res_blocks=1,
            z_channels=4, decoder_ch=8, decoder_mult=(2, 1), fields=(1, 2), field_channels=4,
            mlp_width=8, point_hidden=8, point_blocks=3, point_channels=4, plane_merge='sum',
            coord_input=True, scale_injection=False, loss='bce', n_ref=64)


def tiny(**changes):
    return vae.D2CVAE(vae.VAEConfig(**{**TINY, **changes}))


# ---- toy solids --------------------------------------------------------------------------------

def test_distances_of_the_parts():
    """Against closed forms of a box, a cylinder and a cone's slant."""
    p = np.random.default_rng(0).uniform(-2, 2, (2000, 3))
    box = data.Block((0.1, 0, -0.2), (0.5, 0.3, 0.4))
    q = np.abs(p - (0.1, 0, -0.2)) - (0.5, 0.3, 0.4)
    expected = np.where((q < 0).all(1), q.max(1), np.sqrt((q.clip(0) ** 2).sum(1)))
    np.testing.assert_allclose(box.distance(p), expected)
    bar = data.rod((0, -0.6, 0.1), (0, 0.7, 0.1), 0.3)
    q = np.stack([np.hypot(p[:, 0], p[:, 2] - 0.1) - 0.3, np.abs(p[:, 1] - 0.05) - 0.65], 1)
    expected = np.where((q < 0).all(1), q.max(1), np.sqrt((q.clip(0) ** 2).sum(1)))
    np.testing.assert_allclose(bar.distance(p), expected, atol=1e-9)
    turned = data.rod((0.1, 0.2, 0.3), (0.9, -0.4, 0.5), 0.2)  # as seen along its own axis
    axis = np.array([0.8, -0.6, 0.2]) / np.linalg.norm([0.8, -0.6, 0.2])
    height = (p - (0.1, 0.2, 0.3)) @ axis
    radius = np.linalg.norm(np.cross(p - (0.1, 0.2, 0.3), axis), axis=1)
    length = np.linalg.norm([0.8, -0.6, 0.2])
    q = np.stack([radius - 0.2, np.abs(height - length / 2) - length / 2], 1)
    expected = np.where((q < 0).all(1), q.max(1), np.sqrt((q.clip(0) ** 2).sum(1)))
    np.testing.assert_allclose(turned.distance(p), expected, atol=1e-9)


@pytest.mark.mutation('data.py', 'np.sqrt(start ** 2 + u', 'np.abs(start + u')
@pytest.mark.mutation('data.py', 'p=self.sides / self.area', 'p=None')
def test_surface_points_are_uniform():
    """Shares of the area, and the mean height on a cone, of which the wide end has more."""
    rng = np.random.default_rng(0)
    box = data.Block((0, 0, 0), (0.5, 0.1, 0.2))
    p = box.surface(40_000, rng)
    assert box.area == pytest.approx(8 * (0.05 + 0.02 + 0.1))
    assert (np.abs(p[:, 0]) > 0.4999).mean() == pytest.approx(8 * 0.02 / box.area, abs=0.01)
    cone = data.Lathe([(0, 0), (1, 0), (0, 1)])
    assert cone.area == pytest.approx(math.pi * (1 + math.sqrt(2)))
    p = cone.surface(40_000, rng)
    slant = p[p[:, 1] > 1e-9]
    assert len(slant) / len(p) == pytest.approx(math.sqrt(2) / (1 + math.sqrt(2)), abs=0.01)
    assert slant[:, 1].mean() == pytest.approx(1 / 3, abs=0.01)
    assert np.abs(slant[:, [0, 2]].mean(0)).max() < 0.01


def mesh_of(solid, resolution=64):
    return inr.extract_mesh(lambda p: torch.from_numpy(-data.toy_distance(
        solid, p.double().numpy())).float(), resolution, coarse=resolution)


def handles_of(caption):
    """Genus that the words imply; solid-backed chairs have holes under their arms only."""
    number = dict(no=0, one=1, two=2, three=3, four=4, five=5, six=6)
    words = caption.split()
    if 'vase' in words or 'wheel' in words:
        return number[words[words.index('with') + 1]]
    return 2 * ('slatted' in words) + 2 * ('arms' in words)


@pytest.mark.mutation('data.py', 'np.maximum(radius, 1e-9)', 'radius')
@pytest.mark.mutation('data.py', '> -1e-6])', '> -1])')
def test_toy_solids_are_what_they_are_called():
    """One piece each, as many handles as the caption says, points on the outside only."""
    seen = {}
    for seed in itertools.count():
        solid = data.toy_shape(seed)
        if seen.setdefault(solid.family, 0) < 2:
            seen[solid.family] += 1
            components, euler, closed = metrics.topology(*mesh_of(solid))
            assert closed and components == 1 and euler == 2 - 2 * handles_of(solid.caption)
            p = data.toy_surface(solid, 500, np.random.default_rng(0))
            assert np.abs(data.toy_distance(solid, p)).max() < 1e-6 and np.abs(p).max() < 0.95
        if len(seen) == 5 and min(seen.values()) == 2:
            break


def test_two_families_are_thin():
    """A table's legs and a lamp's pole measure less than 1/20 of the box, and more than 1/26."""
    for family in ('table', 'lamp'):
        solid = next(s for s in map(data.toy_shape, range(100)) if s.family == family)
        radius = solid.parts[1].profile[:, 0].max()
        assert 2 / 26 < 2 * radius < 2 / 20


@pytest.mark.mutation('data.py', "t = np.clip(0.5 - distance / TOY_EDGE, 0, 1)", "t = distance < 0")
def test_items_of_toy_shapes():
    assert data.TOY_SOLIDS == dict(train=(0, 5000), test=(2 ** 30, 500))
    test = data.make_dataset('toy_shape', split='test', points=100, queries=64, near=0.5)
    assert len(test) == 500 and test.names[3] == f'seed {2 ** 30 + 3}'
    item = test.item(3)
    assert item['points'].shape == (100, 3) and item['coords'].shape == (64, 3)
    d = data.toy_distance(test.solids[3], item['coords'].double().numpy())
    inside, outside = d < -data.TOY_EDGE / 2 - 1e-6, d > data.TOY_EDGE / 2 + 1e-6
    assert (item['target'].numpy()[inside] == 1).all()
    assert (item['target'].numpy()[outside] == 0).all()
    assert np.abs(d[32:]).mean() < np.abs(d[:32]).mean() / 2  # the second half is near
    between = test.draw(3, 'near', 5000, np.random.default_rng(0))[1]
    assert ((between > 0.1) & (between < 0.9)).any()
    assert item['text'] == test.captions[3][0] and item['label'] == test.labels[3]
    assert torch.equal(test.item(3)['points'], item['points'])  # no chance without an rng
    rng = [np.random.default_rng(k) for k in (0, 0, 1)]
    a, b, c = (test.item(5, r)['points'] for r in rng)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.mutation('data.py', 'c * sign / self.extent', 'c / self.extent')
def test_flips_mirror_points_and_queries_alike():
    dataset = data.make_dataset('toy_shape', split='test', points=300, queries=300, noise=0.0,
                                flip=True)
    i, turned = next(k for k, c in enumerate(dataset.captions) if 'leaning' in c[0]), 0

    def occupancy(points):
        return data.cover(data.toy_distance(dataset.solids[i], points))
    for seed in range(6):
        item = dataset.item(i, np.random.default_rng(seed))
        flipped = item['coords'].double().numpy() * (-1, 1, 1)
        own = occupancy(item['coords'].double().numpy())
        mirrored = np.abs(own - item['target'].numpy()).max() > 1e-3
        points = item['points'].double().numpy() * ((-1, 1, 1) if mirrored else (1, 1, 1))
        assert np.abs(data.toy_distance(dataset.solids[i], points)).max() < 1e-5
        if mirrored:
            np.testing.assert_allclose(occupancy(flipped), item['target'], atol=1e-4)
        turned += mirrored
    assert 0 < turned < 6


# ---- PointNet and planes -----------------------------------------------------------------------

def slow_pointnet(net, points):
    """The PointNet of one cloud (N,D), point by point and cell by cell."""
    R = net.resolution

    def cell(p, axes):
        return tuple(min(max(int((p[a].item() + 1) / 2 * R), 0), R - 1) for a in axes)
    if net.local:
        centres = torch.tensor([[(cell(p, (a, a))[0] + 0.5) * 2 / R - 1 for a in range(3)]
                                for p in points])
        points = torch.cat([points, (points[:, :3] - centres) * R], dim=1)
    features = [net.proj_in(p) for p in points]
    for i, block in enumerate(net.blocks):
        if i > 0:
            pooled = []
            for k, p in enumerate(points):
                parts = [torch.stack([features[j] for j, q in enumerate(points)
                                      if cell(q, axes) == cell(p, axes)]).amax(0)
                         for axes in net.planes.values()]
                pooled.append(torch.cat([features[k], sum(parts)]))
            features = pooled
        features = [block(f) for f in features]
    features = [net.proj_out(f) for f in features]
    planes = {}
    for name, axes in net.planes.items():
        plane = torch.zeros(len(features[0]), R, R)
        for x, y in {cell(p, axes) for p in points}:
            plane[:, y, x] = torch.stack([f for f, p in zip(features, points)
                                          if cell(p, axes) == (x, y)]).mean(0)
        planes[name] = plane
    return planes


def trained_pointnet(in_features=3, local=False):
    net = encoders.LocalPoolPointNet(inr.PLANES['shape'], in_features, 4, 6, 3, 5, local)
    for block in net.blocks:
        torch.nn.init.normal_(block.fc1.weight)
    return net


@pytest.mark.mutation('encoders.py', "batch * R * R, 'amax')", "batch * R * R, 'mean')")
@pytest.mark.mutation('encoders.py', '* R + cell[..., v]) * R + cell[..., u])',
                      '* R + cell[..., u]) * R + cell[..., v])')
@pytest.mark.mutation('encoders.py', 'h = torch.cat([h, sum(pooled)], dim=1)',
                      'h = torch.cat([sum(pooled), h], dim=1)')
@pytest.mark.mutation('encoders.py', '2 * (place - cell) - 1', '2 * (place - place.floor()) - 1')
def test_pointnet_equals_a_loop_over_points_and_cells():
    points = torch.rand(2, 40, 3) * 2.2 - 1.1  # some are outside
    for net in (trained_pointnet(), trained_pointnet(local=True)):
        planes = net(points)
        for b in range(2):
            for name, plane in slow_pointnet(net, points[b]).items():
                torch.testing.assert_close(planes[name][b], plane, rtol=1e-5, atol=1e-5)


def test_pointnet_takes_any_cloud_in_any_order():
    net = trained_pointnet(6)
    for n in (1, 7, 300):
        points = torch.rand(1, n, 6) * 2 - 1
        planes, again = net(points), net(points[:, torch.randperm(n)])
        for name in planes:
            torch.testing.assert_close(again[name], planes[name], rtol=1e-5, atol=1e-5)


@pytest.mark.mutation('inr.py', "'shape': dict(xy=(0, 1), yz=(1, 2), xz=(0, 2))",
                      "'shape': dict(xy=(0, 1), yz=(0, 2), xz=(1, 2))")
def test_planes_know_their_axes():
    """Moving points along x leaves the yz plane's empty cells; a yz field is constant in x."""
    net, points = trained_pointnet(), torch.rand(1, 30, 3) * 2 - 1
    moved = points.clone()
    moved[..., 0] = torch.rand(1, 30) * 2 - 1
    empty = [(net(p)['yz'] == 0).all(1) for p in (points, moved)]
    assert torch.equal(*empty) and empty[0].any()
    model = tiny(coord_input=False)
    xi = model.decode(torch.randn(1, 4, 3 * 16))
    for level in xi:
        level['xy'], level['xz'] = (torch.zeros_like(level[n]) for n in ('xy', 'xz'))
    line = torch.rand(20, 3) * 2 - 1
    values = model.query(xi, line)
    other = line.clone()
    other[:, 0] = torch.rand(20) * 2 - 1
    torch.testing.assert_close(model.query(xi, other), values)
    other[:, 1] = torch.rand(20) * 2 - 1
    assert (model.query(xi, other) - values).abs().max() > 1e-4


@pytest.mark.mutation('inr.py', "sum(p) if plane_merge == 'sum'", "p[0] if plane_merge == 'sum'")
@pytest.mark.mutation('inr.py', 'h = h + self.coords(with_octaves(coords, self.coord_octaves))', 'pass')
@pytest.mark.mutation('vae.py', 'bce=F.binary_cross_entropy_with_logits', 'bce=F.mse_loss')
def test_objective_of_shapes():
    """Mean cross-entropy, + (kl sum KL + sn SN) / N_ref, of logits looked up by hand."""
    model = tiny(sn_start=10.0)
    batch = dict(points=torch.rand(2, 50, 3) * 2 - 1, coords=torch.rand(2, 30, 3) * 2 - 1,
                 target=torch.rand(2, 30))
    noise = torch.randn(2, 4, 48)
    losses = model(batch, torch.tensor([0.3, 5.0]), noise)
    q = model.encode(batch)
    assert q.sizes == {name: (4, 4) for name in ('xy', 'yz', 'xz')}
    xi = model.decode(q.mean + (q.logvar / 2).exp() * noise)
    c = batch['coords']
    pe = [sum(inr.sample_field(level[name], c[..., list(axes)]) for name, axes in dict(
        xy=(0, 1), yz=(1, 2), xz=(0, 2)).items()) for level in xi]
    h = model.mlp.blocks[0](pe[0], None) + c @ model.mlp.coords.weight.T + model.mlp.coords.bias
    h = model.mlp.blocks[1](torch.cat([h, pe[1]], -1), None)
    for block in model.mlp.blocks[2:]:
        h = block(h, None)
    p = model.mlp.out(h)[..., 0].sigmoid()
    o = batch['target']
    expected = -(o * p.log() + (1 - o) * (1 - p).log()).mean()
    torch.testing.assert_close(losses['reconstruction'], expected)
    torch.testing.assert_close(losses['total'], expected + 0.3 * q.kl().mean() / 64
                               + 5 * losses['sn'] / 64)


@pytest.mark.mutation('vae.py', 'found.append({name: level[name] for name in planes})',
                      'found.append(level)')
@pytest.mark.mutation('vae.py', 'y.unflatten(0, (batch, -1)).unbind(1)',
                      'y.unflatten(0, (-1, batch)).unbind(0)')
@pytest.mark.mutation('vae.py', 'torch.stack([planes[n] for n in names], dim=1)',
                      'torch.stack([planes[n] for n in names])')
def test_planes_side_by_side_equal_planes_one_by_one():
    planes = dict(a=torch.rand(2, 3, 4, 4), b=torch.rand(2, 3, 4, 6), c=torch.rand(2, 3, 4, 4))
    network = torch.nn.Conv2d(3, 5, 3)
    first, second = tiny().on_planes(
        lambda xs, *_: [[network(x) for x in xs], [x + 1 for x in xs]], planes)
    assert list(first) == ['a', 'b', 'c']
    for name, x in planes.items():
        torch.testing.assert_close(first[name], network(x))
        assert torch.equal(second[name], x + 1)


def test_normals_of_a_ball_point_outwards():
    model = tiny(extent=0.55).eval()
    model.query = lambda xi, p: 8 * (0.5 - p.norm(dim=-1, keepdim=True))
    xi = [dict(xy=torch.zeros(1, 4, 4, 4))]
    (vertices, _), = model.signal(xi, 16)
    with torch.no_grad():
        normals = model.normals(xi, vertices)
    torch.testing.assert_close(normals, vertices / vertices.norm(dim=1, keepdim=True))
    assert model.normals(xi, torch.zeros(0, 3)).shape == (0, 3)


def test_impossible_shape_configurations_are_refused():
    for changes in (dict(loss='l1'), dict(scale_injection=True), dict(threshold=1.0),
                    dict(domain='image', coord_input=False)):
        with pytest.raises(ValueError, match='--'):
            vae.VAEConfig(**{**TINY, **changes})


@pytest.mark.mutation('vae.py', 'math.log(threshold / (1 - threshold))', 'threshold')
@pytest.mark.mutation('vae.py', 'points * self.config.extent', 'points')
def test_surfaces_lie_where_the_occupancy_is_the_threshold():
    model = tiny(extent=0.55).eval()
    model.query = lambda xi, p: 8 * (0.5 - p.norm(dim=-1, keepdim=True))  # a ball, logit 8 (1/2 - r)
    xi = [dict(xy=torch.zeros(2, 4, 4, 4))]
    for threshold in (0.5, 0.2):
        surfaces = model.signal(xi, 48, threshold)
        assert len(surfaces) == 2
        radius = 0.5 - math.log(threshold / (1 - threshold)) / 8
        r = surfaces[0][0].norm(dim=1)
        assert (r - 0.55 * radius).abs().max() < 1e-3
        assert metrics.topology(*surfaces[0]) == (1, 2, True)


# ---- Occupancy Networks' layout ----------------------------------------------------------------

def write_shape(folder, seed, n=64):
    """A ball of random size, as published: half-precision points, packed bits."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    radius, points = rng.uniform(0.2, 0.5), rng.uniform(-0.55, 0.55, (n, 3)).astype('float16')
    inside = np.linalg.norm(points.astype('float64'), axis=1) < radius
    np.savez(folder / 'points.npz', points=points, occupancies=np.packbits(inside))
    surface = rng.standard_normal((n, 3))
    surface *= radius / np.linalg.norm(surface, axis=1, keepdims=True)
    np.savez(folder / 'pointcloud.npz', points=surface.astype('float16'), normals=surface)
    return radius


@pytest.fixture
def shapenet(tmp_path):
    """Two classes with lists; radii by name."""
    radii = {}
    for k, (group, side) in enumerate(itertools.product(('03001627', '04379243'),
                                                        ('train', 'train', 'val', 'test'))):
        radii[f'{group}/m{k}'] = write_shape(tmp_path / group / f'm{k}', k)
        with (tmp_path / group / f'{side}.lst').open('a') as file:
            file.write(f'm{k}\n')
    return tmp_path, radii


@pytest.mark.mutation('data.py', "if 'train' in told:", 'if False:')
def test_a_run_keeps_its_labels_when_classes_come(shapenet):
    root, _ = shapenet
    before = data.make_dataset('shapenet', root, 'train', points=40, queries=50)
    write_shape(root / '02691156' / 'new', 9)
    (root / '02691156' / 'train.lst').write_text('new\n')
    after = data.make_dataset('shapenet', root, 'train', before.splits(), points=40, queries=50)
    assert after.names == before.names and after.labels == before.labels == [0, 0, 1, 1]
    assert after.groups == before.groups
    assert max(data.make_dataset('shapenet', root, 'train', points=40, queries=50).labels) == 2


@pytest.mark.mutation('data.py', '>> (7 - k % 8) & 1', '>> k % 8 & 1')
@pytest.mark.mutation('data.py', 'p = p + 1e-4 * rng', 'p = p + 1e-1 * rng')
@pytest.mark.mutation('data.py', "{side: lists[side] for side in ('train', 'test')}",
                      "dict(train=lists['train'] + lists['val'], test=lists['test'])")
@pytest.mark.mutation('data.py', 'in sorted(g.iterdir())', 'in g.iterdir()')
def test_shapes_as_published(shapenet, monkeypatch):
    root, radii = shapenet
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, 'iterdir', lambda path: sorted(iterdir(path), reverse=True))
    assert [*data.find_shapes(root)[1]] == [f'{g}/m{k}' for g, part in (
        ('03001627', range(4)), ('04379243', range(4, 8))) for k in part]
    monkeypatch.undo()
    train, test = (data.make_dataset('shapenet', root, s, points=40, queries=50, noise=0.0)
                   for s in ('train', 'test'))
    assert train.names == ['03001627/m0', '03001627/m1', '04379243/m4', '04379243/m5']
    assert test.names == ['03001627/m3', '04379243/m7'] and test.labels == [0, 1]
    assert 'shapes of neither train nor test' in train.notes[0]
    for i, name in enumerate(test.names):
        item = test.item(i, np.random.default_rng(0))
        r = item['coords'].double().norm(dim=1) * 0.55
        sure = (r - radii[name]).abs() > 5e-4
        assert torch.equal(item['target'][sure].bool(), r[sure] < radii[name])
        assert (item['points'].norm(dim=1) * 0.55 - radii[name]).abs().max() < 1e-3
        points, inside = test.truth(i)
        assert torch.equal(inside, points.norm(dim=1) * 0.55 < radii[name]) and len(points) == 64
    chairs = data.make_dataset('shapenet_chair', root, 'all')
    assert chairs.names == ['03001627/m0', '03001627/m1', '03001627/m3']
    alone = data.make_dataset('shape', root / '04379243', 'test')
    assert alone.names == ['04379243/m7'] and alone.titles == ['04379243']
    (root / 'metadata.yaml').write_text(json.dumps({g: dict(id=g, name=f'{n},x') for g, n in (
        ('03001627', 'chair'), ('04379243', 'table'))}))
    assert data.make_dataset('shapenet', root).titles == ['chair', 'table']
    half = data.make_dataset('shapenet', root, 'train', holdout='0.5')
    assert {*half.splits()['train'], *half.splits()['test']} == {*radii}


@pytest.mark.mutation('data.py', "for key in (part, f'{part} bits'))",
                      "for key in (part, 'points bits'))")
def test_the_near_set_is_drawn_with_its_own_occupancies(shapenet):
    root, radii = shapenet
    for name, radius in radii.items():
        rng = np.random.default_rng(1)
        p = rng.standard_normal((64, 3))
        p *= radius * rng.choice([0.95, 1.05], (64, 1)) / np.linalg.norm(p, axis=1, keepdims=True)
        inside = np.linalg.norm(p, axis=1) < radius
        np.savez(root / name / 'near.npz', points=p, occupancies=np.packbits(inside))
    dataset = data.make_dataset('shapenet', root, points=8, queries=60, near=0.5)
    for i, name in enumerate(dataset.names):
        item = dataset.item(i, np.random.default_rng(0))
        r = item['coords'][30:].norm(dim=1) * 0.55
        assert ((r / radii[name] - 1).abs() - 0.05).abs().max() < 1e-3  # all 30 are near
        assert torch.equal(item['target'][30:].bool(), r < radii[name])


@pytest.mark.mutation('data.py', 'return next((texts[tail] for', 'return next((texts[tail][:1] for')
@pytest.mark.mutation('data.py', 'if own.exists() else', 'if True else')
@pytest.mark.mutation('data.py', "so without captions'] * (not captions)", "so without captions'] * 0")
@pytest.mark.mutation('data.py', "'modelid', 'model_id', 'id')", "'id', 'modelid')")
def test_captions_are_joined_by_model(shapenet):
    root, _ = shapenet
    try:
        bare = data.make_dataset('text2shape', root)
    except OSError as error:
        pytest.fail(str(error))
    assert bare.captions is None and 'without captions' in bare.notes[-1]
    (root / 'captions.tablechair.csv').write_text(
        'id,modelId,description,category\nm1,m0,"a chair, with\n""arms""",Chair\n2,m0,red chair,Chair\n'
        '3,m3,,Chair\n4,m9,nothing,Table\n', encoding='utf-8')
    train = data.make_dataset('text2shape', root, 'train')
    assert train.captions == [['a chair, with "arms"', 'red chair'], [], [], []]
    texts = {train.item(0, np.random.default_rng(k))['text'] for k in range(20)}
    assert texts == {*train.captions[0]} and train.item(1)['text'] == ''
    assert '3 shapes have no caption' in train.notes
    for text, words in (('a,b\n1,2\n', 'needs a column'), ('id,text\nm99,chair\n', 'none of 1 names')):
        (root / 'c.csv').write_text(text)
        with pytest.raises(ValueError, match=words):
            data.make_dataset('shapenet', root, captions=str(root / 'c.csv'))
    with pytest.raises(FileNotFoundError, match='--captions'):
        data.make_dataset('shapenet', root, captions=str(root / 'none.csv'))


@pytest.mark.mutation('data.py', 'if len(values) == n:', 'if len(values) == n and values.dtype == bool:')
@pytest.mark.mutation('data.py', 'np.packbits(values > 0.5)', 'np.packbits(values > 0)')
@pytest.mark.mutation('data.py', 'len(values) == math.ceil(n / 8)', 'len(values) >= n / 8')
@pytest.mark.mutation('data.py', '((values >= 0) & (values <= 1)).all()', 'True')
@pytest.mark.mutation('data.py', 'require(np.isfinite(points).all()', 'require(True')
@pytest.mark.mutation('data.py', 'require(reach <= 1.2 * self.extent', 'require(True')
def test_occupancies_packed_or_one_by_one(shapenet):
    root, _ = shapenet
    place = root / '03001627' / 'm3' / 'points.npz'
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (61, 3))
    inside = np.linalg.norm(points, axis=1) < 0.4

    def truth(occupancies, points=points):
        np.savez(place, points=points, occupancies=occupancies)
        return data.make_dataset('shapenet_chair', root, 'test').truth(0)[1].numpy()
    for kind in ('bool', 'uint8', 'int64', 'float16', 'float64'):
        try:
            np.testing.assert_array_equal(truth(inside.astype(kind)), inside)
        except ValueError as error:
            pytest.fail(str(error))
    np.testing.assert_array_equal(truth(inside[:, None] * 0.9 + 0.05), inside)
    np.testing.assert_array_equal(truth(np.packbits(inside)), inside)
    with pytest.raises(ValueError, match='points reach 2.* box is .-0.55'):
        truth(inside, 2 * points / abs(points).max())
    broken = np.where(np.arange(61)[:, None] == 5, np.nan, points)
    for wrong in ((inside[:60],), (np.packbits(inside).astype(int),), (np.zeros(9, 'uint8'),),
                  (2.0 * inside,), (np.where(inside, np.nan, 0),),
                  (inside[:0], points[:0]), (inside, points[:, :2])):
        with pytest.raises(ValueError, match='m3'):
            truth(*wrong)
    with pytest.raises(ValueError, match='not finite'):
        truth(np.packbits(inside), broken)
    np.savez(place, points=points, occupancies=inside)
    np.savez(place.with_name('pointcloud.npz'), points=points[:0])
    with pytest.raises(ValueError, match='m3'):
        truth(inside)


@pytest.mark.mutation('data.py', 'reshape(x, z, y).swapaxes(1, 2)', 'reshape(x, z, y)')
@pytest.mark.mutation('data.py', 'np.repeat(values > 0, counts)', 'np.repeat(values == 0, counts)')
@pytest.mark.mutation('metrics.py', 'grid is not None and grid.shape', 'False and grid.shape')
@pytest.mark.mutation('metrics.py', 'grid.shape == (cells,) * 3:', 'True:')
@pytest.mark.mutation('data.py', 'except (AttributeError, ValueError):\n        raise ValueError(f\'{path}: '
                      'damaged, or not a binvox', 'except KeyError:\n        raise ValueError(f\'{path}: '
                      'damaged, or not a binvox')
def test_voxels_are_those_of_binvox_files(shapenet):
    """x slowest, then z, then y, as runs of at most 255 cells."""
    root, _ = shapenet
    shapes = data.make_dataset('shapenet', root)
    grid = torch.rand(8, 8, 8) < 0.5
    grid[:6] = True  # a run that is longer
    cells = [bool(grid[x, y, z]) for x in range(8) for z in range(8) for y in range(8)]
    runs = []
    for cell in cells:
        if not runs or runs[-1][0] != cell or runs[-1][1] == 255:
            runs.append([cell, 0])
        runs[-1][1] += 1
    whole = (b'#binvox 1\ndim 8 8 8\ntranslate -0.5 -0.5 -0.5\nscale 1\ndata\n'
             + bytes(sum(runs, [])))
    without, source = metrics.true_grid(shapes, 1, 8)
    assert source == 'nearest stored point' and not torch.equal(without, grid)
    file = root / shapes.names[1] / 'model.binvox'
    file.write_bytes(whole)
    found, source = metrics.true_grid(shapes, 1, 8)
    assert torch.equal(found, grid) and source == 'model.binvox'
    other, source = metrics.true_grid(shapes, 1, 4)  # another size than it has
    assert other.shape == (4, 4, 4) and source == 'nearest stored point'
    for wrong in (whole[:-2], whole[:-1], whole.replace(b'dim', b'him'), b''):
        file.write_bytes(wrong)
        try:
            assert torch.equal(metrics.true_grid(shapes, 1, 8)[0], without)
        except AttributeError as error:
            pytest.fail(str(error))
        with pytest.raises(ValueError, match='model.binvox: damaged'):
            data.read_binvox(file)


@pytest.mark.mutation('common.py', "except UnicodeDecodeError as error:\n        raise ValueError(f'{path}",
                      "except KeyError as error:\n        raise ValueError(f'{path}")
def test_lists_in_another_encoding_are_named(shapenet):
    root, _ = shapenet
    (root / '03001627/train.lst').write_bytes('m\xe9'.encode('latin-1'))
    with pytest.raises(ValueError, match='train.lst: not in UTF-8'):
        data.make_dataset('shapenet', root)


@pytest.mark.mutation('common.py', ".replace('\\ufeff', '')", '')
def test_lists_with_byte_order_marks(shapenet):
    root, _ = shapenet
    for file in root.glob('*/*.lst'):  # as if it had been joined of several
        file.write_text('\n'.join(f'\ufeff{line}' for line in file.read_text().split()), 'utf-8')
    (root / 'split.json').write_text(json.dumps(dict(test=['04379243/m6'])), encoding='utf-8-sig')
    try:
        assert data.make_dataset('shapenet', root).names == [
            '03001627/m0', '03001627/m1', '04379243/m4', '04379243/m5']
        held = data.make_dataset('shapenet', root, 'test', holdout=str(root / 'split.json'))
    except ValueError as error:
        pytest.fail(str(error))
    assert held.names == ['04379243/m6']


@pytest.mark.mutation('data.py', 'n if f"{group}/{n}" in self.folders else n.strip()', 'n.strip()')
@pytest.mark.mutation('data.py', "n if n in known else n.strip()", 'n.strip()')
def test_names_may_begin_and_end_in_spaces(shapenet):
    root, _ = shapenet
    (root / '03001627/m0').rename(root / '03001627/ m\x0b0 ')
    lines = root / '03001627/train.lst'
    lines.write_text(lines.read_text().replace('m0', ' m\x0b0 ').replace('m1', ' m1\t'))
    assert data.make_dataset('shapenet', root).names[:2] == ['03001627/ m\x0b0 ', '03001627/m1']
    (root / 'split.txt').write_text(' 04379243/m5 \r\n03001627/ m\x0b0 \n\n')
    try:
        held = data.make_dataset('shapenet', root, 'test', holdout=str(root / 'split.txt'))
    except ValueError as error:
        pytest.fail(str(error))
    assert held.names == ['03001627/ m\x0b0 ', '04379243/m5']


def test_broken_shapes(shapenet, capsys):
    """Missing ones are listed; a cut one is stood in for; too many end the run; so does no place."""
    root, _ = shapenet
    (root / '03001627' / 'm0' / 'points.npz').unlink()
    cut = (root / '04379243' / 'm4' / 'points.npz')
    cut.write_bytes(cut.read_bytes()[:300])
    train = data.make_dataset('shapenet', root, 'train', points=8, queries=8)
    assert train.bad == [('03001627/m0', 'no points.npz')] and len(train) == 3
    item, stand_in = train.item(1, np.random.default_rng(0)), train.stand_in(1)
    assert stand_in == 2 and train.bad[-1][0] == '04379243/m4' and item['label'] == 1
    short = root / '03001627' / 'm1' / 'points.npz'
    np.savez(short, points=np.zeros((64, 3)), occupancies=np.zeros(3, 'uint8'))
    with pytest.raises(ValueError, match='3 of 4 shapes cannot be used'):
        train.item(0)
    with pytest.raises(ValueError, match='near.npz|cannot be used'):
        data.make_dataset('shapenet', root, near=0.5)
    with pytest.raises(FileNotFoundError, match='python data.py mesh'):
        data.make_dataset('shapenet', root / 'nowhere')
    (root / 'empty').mkdir()
    with pytest.raises(ValueError, match='CLASS/ID'):
        data.make_dataset('shape', root / 'empty')


def checked(monkeypatch, capsys, *flags):
    monkeypatch.setattr('sys.argv', ['data.py', 'check', *map(str, flags)])
    data.main()
    return capsys.readouterr().out


@pytest.mark.mutation('data.py', 'self.labels.count(k)} {title}', 'len(self)} {title}')
def test_check_of_shapes(shapenet, tmp_path, monkeypatch, capsys):
    root, _ = shapenet
    monkeypatch.chdir(tmp_path)
    out = checked(monkeypatch, capsys, root, '--res', 32)
    assert out.startswith(f'shape at {root}') and 'shapes    4 train, 2 test' in out
    assert '3 03001627, 3 04379243' in out and 'of the box min' in out and 'bad       0' in out
    assert Image.open('out/check_shape.png').size == (6 * 34 + 2, 36)
    assert 'seeds 0 to 4999' in checked(monkeypatch, capsys, 'toy_shape', '--out', 'x.png')
    (root / '03001627' / 'm0' / 'points.npz').unlink()
    (root / '03001627' / 'm1' / 'points.npz').write_bytes(b'')
    assert '03001627/m0: no points.npz' in checked(monkeypatch, capsys, 'shapenet', '--data', root)


def test_flags_of_the_other_domain_are_refused():
    args = dict(dataset='toy_shape', flip=False, seed=0, resolution=8, scales=(1.0,))
    args.update({f.name: f.default for f in data.fields(data.ShapeConfig)})
    with pytest.raises(ValueError, match='--scales'):
        data.options_of(args)
    assert data.options_of(dict(args, scales=data.PictureConfig.scales))['queries'] == 2048


# ---- metrics of sets ---------------------------------------------------------------------------

def clouds(seed, n, step):
    scale = 1 + step * np.arange(n)[:, None, None]
    return torch.from_numpy((np.random.RandomState(seed).rand(n, 128, 3) - 0.5) * scale)


@pytest.mark.mutation('metrics.py', 'between.amin(1).mean()', 'between.amin(0).mean()')
@pytest.mark.mutation('metrics.py', 'len(between.argmin(0).unique()) / R',
                      'len(between.argmin(1).unique()) / R')
@pytest.mark.mutation('metrics.py', '(d ** p).mean() + (e ** p).mean()', 'd.mean() + e.mean()')
@pytest.mark.mutation('metrics.py', 'clouds.amin(1, keepdim=True) + clouds', '2 * clouds')
@pytest.mark.mutation('metrics.py', '[0 if squared else 1]', '[0]')
def test_mmd_and_cov_golden():
    refs, samples = clouds(2, 6, 0.2), clouds(3, 8, 0.15)
    raw, plain = (metrics.mmd_cov(refs, samples, squared) for squared in (True, False))
    assert raw['mmd'] == pytest.approx(0.07043072783553041, rel=1e-12)
    assert raw['mmd_smp'] == pytest.approx(0.07160804142951539, rel=1e-12)
    assert raw['cov'] == pytest.approx(5 / 6)
    assert plain['mmd'] == pytest.approx(0.3413504355995658, rel=1e-12)
    assert plain['cov'] == pytest.approx(5 / 6)
    half = metrics.unit_sphere(refs + 3, 0.5, 'mean')
    torch.testing.assert_close(half.mean(1), torch.zeros(6, 3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(half.norm(dim=2).amax(1), torch.full((6,), 0.5).double())
    torch.testing.assert_close(half, metrics.unit_sphere(7 * refs, 0.5, 'mean'))
    sphere = metrics.mmd_cov(*map(metrics.unit_sphere, (refs, samples)))
    assert sphere['mmd'] == pytest.approx(0.04867620148873064, rel=1e-12)
    assert sphere['cov'] == pytest.approx(4 / 6)


@pytest.mark.mutation('metrics.py', 'd2.amin(1).mean() + d2.amin(0).mean()', '2 * d2.amin(1).mean()')
@pytest.mark.mutation('metrics.py', 'd.amin(1), d.amin(2)', 'd.amin(1), d.amin(1)')
@pytest.mark.mutation('metrics.py', 'matrix + matrix.mT if b is a', 'matrix if b is a')
def test_chamfer_equals_loops():
    a, b = clouds(0, 3, 0.1)[:, :20], clouds(1, 3, 0.3)[:, :33]
    slow = [sum(min(((p - q) ** 2).sum() for q in y) for p in x) / len(x)
            + sum(min(((p - q) ** 2).sum() for q in x) for p in y) / len(y) for x, y in zip(a, b)]
    torch.testing.assert_close(metrics.chamfer(a, b), torch.stack(slow))
    squared, plain = metrics.chamfer_matrix(a, b)
    torch.testing.assert_close(squared.diag(), torch.stack(slow))
    torch.testing.assert_close(metrics.chamfer_matrix(a, a), metrics.chamfer_matrix(a, a.clone()))
    brute = torch.stack([metrics.cuda_row(x, b, most=2 * len(x) * b.shape[1]) for x in a], dim=1)
    torch.testing.assert_close(brute, torch.stack([squared, plain]), rtol=1e-5, atol=1e-6)
    r = torch.tensor([[[0.0, 0, 0]], [[3.0, 0, 4]]])
    assert metrics.chamfer_matrix(r[:1], r[1:]).flatten().tolist() == pytest.approx([50, 10])


@pytest.mark.mutation('metrics.py', 'distances.fill_diagonal_(math.inf)', 'pass')
@pytest.mark.mutation('metrics.py', '== (torch.arange(len(union)) < R)',
                      '!= (torch.arange(len(union)) < R)')
def test_one_nna():
    """Sets far apart are told apart; of pairs of twins every nearest neighbour is a stranger."""
    a = clouds(0, 5, 0.0)
    assert metrics.mmd_cov(a, a + 100)['one_nna'] == 1
    assert metrics.mmd_cov(a, a + 1e-6)['one_nna'] == 0
    empty = metrics.unit_sphere(torch.cat([a[:1] * 0, a]))  # a sample without a surface
    assert empty.isfinite().all() and metrics.mmd_cov(a, empty)['mmd'] < 1
    same = metrics.mmd_cov(a, a.clone())
    assert same['mmd'] == 0 and same['cov'] == 1


@pytest.mark.mutation('metrics.py', "lambda k: str(meshes[k])", "lambda k: 'one'")
def test_clouds_of_a_folder_of_meshes(tmp_path, capsys):
    """Points on the surface of each mesh; a broken file is left out and named."""
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    for k in range(3):
        data.write_mesh(tmp_path / f'{k}.obj', torch.tensor(corners + k), torch.tensor(faces))
    (tmp_path / '1.obj').write_text('nothing')
    args = SimpleNamespace(points=50, seed=0)
    source = metrics.folder_clouds(tmp_path, args, 0, 9, 0)
    first, third = torch.cat(metrics.measured(source, lambda clouds: clouds))
    for k, cloud in ((0, first), (2, third)):
        p = cloud - k
        assert p.shape == (50, 3) and p.min() > -1e-6 and p.sum(1).max() < 1 + 1e-6
        assert torch.minimum(p.amin(1), 1 - p.sum(1)).abs().max() < 1e-6  # on a face
    said = capsys.readouterr().err
    assert source.about['found'] == 3 and f'unreadable meshes: {tmp_path / "1.obj"}: ' in said
    assert torch.equal(metrics.surface_cloud([], [], 4), torch.zeros(4, 3))


@pytest.mark.mutation('metrics.py', 'require(len(a) == len(b), f', 'require(True, f')
@pytest.mark.mutation('metrics.py', 'require(voxels.shape[1] > 1', 'require(True')
@pytest.mark.mutation('metrics.py', 'require(len(refs) and len(samples)', 'require(True')
def test_what_cannot_be_compared_is_refused():
    for distance, *sets in ((metrics.chamfer, clouds(0, 2, 0.1), clouds(1, 3, 0.1)),
                            (metrics.tmd, torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)),
                            (metrics.mmd_cov, clouds(0, 2, 0.1), clouds(1, 3, 0.1)[:, :9]),
                            (metrics.mmd_cov, clouds(0, 2, 0.1)[:0], clouds(1, 3, 0.1))):
        try:
            distance(*sets)
            pytest.fail(f'{distance} has compared them')
        except ValueError:
            pass
        except (RuntimeError, IndexError) as error:
            pytest.fail(str(error))


@pytest.mark.mutation('metrics.py', '- overlap.trace()', '')
@pytest.mark.mutation(
    'metrics.py',
    'union.clamp(min=1), 1.0)\n        n = len',
    'union.clamp(min=1), 0.0)\n        n = len')
def test_tmd_golden():
    slabs = torch.zeros(1, 10, 32, 32, 32, dtype=torch.bool)
    for i in range(10):
        slabs[0, i, :16 + i] = True
    assert metrics.tmd(slabs) == pytest.approx(0.8393888412679634, rel=1e-12)
    random = torch.from_numpy(np.random.RandomState(7).rand(10, 8, 8, 8) < 0.5)[None]
    assert metrics.tmd(random) == pytest.approx(0.3336883521819074, rel=1e-12)
    assert metrics.tmd(torch.zeros(1, 3, 4, 4, 4, dtype=torch.bool)) == 1


@pytest.mark.mutation(
    'metrics.py',
    'union.clamp(min=1), 1.0)\n\n\n# ---- sets',
    'union.clamp(min=1), 0.0)\n\n\n# ---- sets')
def test_iou():
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    b = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    assert metrics.iou(a, b).tolist() == pytest.approx([1 / 3, 1, 0])


@pytest.mark.mutation('metrics.py', 'components -= len(vertices) - len(used)', 'pass')
def test_topology():
    tetrahedron = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
    vertices = torch.rand(9, 3)  # one of no face
    assert metrics.topology(vertices, tetrahedron) == (1, 2, True)
    assert metrics.topology(vertices, torch.cat([tetrahedron, tetrahedron + 4])) == (2, 4, True)
    assert metrics.topology(vertices, tetrahedron[:3]) == (1, 1, False)


@pytest.mark.mutation('metrics.py', "F.relu(head[f'conv{k}_bn'](x))",
                      "head[f'conv{k}_bn'](F.relu(x))")
@pytest.mark.mutation('metrics.py', "head['fc'](F.relu(x.flatten(1)))", "head['fc'](x.flatten(1))")
def test_voxel_classifier_equals_its_description():
    net = metrics.VoxelClassifier().eval()
    for name, buffer in net.named_buffers():
        if 'running' in name:
            buffer.uniform_(0.5, 1.5)
    for p in net.parameters():  # so that every layer matters to the result
        p.data.mul_(3)
    s, x = net.state_dict(), (torch.rand(2, 32, 32, 32) < 0.4)

    def normalised(x, name):
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, var, w, b = (s[f'{name}.{k}'].view(shape) for k in (
            'running_mean', 'running_var', 'weight', 'bias'))
        return (x - mean) / (var + 1e-5).sqrt() * w + b
    h = torch.nn.functional.conv3d(x[:, None].float(), s['encoder_head.conv_in.weight'],
                                   s['encoder_head.conv_in.bias'], padding=1)
    for k in range(4):
        h = normalised(h, f'encoder_head.conv{k}_bn').relu()
        h = torch.nn.functional.conv3d(h, s[f'encoder_head.conv_{k}.weight'],
                                       s[f'encoder_head.conv_{k}.bias'], stride=2, padding=1)
    h = h.flatten(1).relu() @ s['encoder_head.fc.weight'].T + s['encoder_head.fc.bias']
    for norm, linear in ((0, 3), (4, 7)):
        h = normalised(h, f'projection.{norm}').relu()
        h = h @ s[f'projection.{linear}.weight'].T + s[f'projection.{linear}.bias']
    torch.testing.assert_close(net(x), h, rtol=1e-3, atol=1e-3 * h.abs().max().item())


def test_voxel_classifier_has_the_published_names():
    net = metrics.VoxelClassifier()
    state = net.state_dict()
    assert len(state) == 46 and sum(p.numel() for p in net.parameters()) == 7_072_013
    for name in ('encoder_head.conv_in.weight', 'encoder_head.conv0_bn.running_mean',
                 'encoder_head.conv_3.bias', 'encoder_head.fc.weight', 'projection.7.bias'):
        assert name in state
    assert state['encoder_head.fc.weight'].shape == (512, 4096)
    assert net.eval()(torch.zeros(2, 32, 32, 32)).shape == (2, 13)


def test_a_diverged_field_has_no_shape():
    model = tiny().eval()
    model.query = lambda xi, p: p[..., :1] * math.nan
    with pytest.raises(ValueError, match='NaN'):
        metrics.occupancy_grid(model, [dict(xy=torch.zeros(1, 4, 4, 4))], 8)


class TwoHalves(data.Items):
    """Shape 0 fills the half where x > 0, shape 1 that where z > 0."""
    names = 'ab'
    points = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (3000, 3)))

    def __init__(self):
        pass

    def truth(self, i, n):
        return self.points, self.points[:, 2 * i] > 0


@pytest.mark.mutation('metrics.py', 'while not seen.all()', 'while False')
@pytest.mark.mutation(
    'metrics.py',
    'for v in (seen, inside))\n    return',
    'for v in (seen, seen))\n    return')
def test_mean_shape_of_few_points():
    """No cell without a point is taken for an empty one."""
    mean = metrics.mean_shape(TwoHalves())
    n = len(mean)
    assert n < 16 and mean.shape == (n, n, n)
    high = (torch.arange(n) >= n // 2).float() / 2
    assert torch.equal(mean, (high[:, None, None] + high[None, None]).expand(n, n, n))


def test_grids_have_x_first():
    """A half space in x, read from a trained field's place and from a data set's points."""
    model = tiny().eval()
    model.query = lambda xi, p: p[..., :1]
    grid = metrics.occupancy_grid(model, [dict(xy=torch.zeros(1, 4, 4, 4))], 8)
    assert torch.equal(grid[0], (torch.arange(8) >= 4)[:, None, None].expand(8, 8, 8))
    points = torch.rand(20000, 3) * 2 - 1
    stored = SimpleNamespace(truth=lambda i, n: (points, points[:, 1] > 0),
                             voxels=lambda i: None)
    grid, _ = metrics.true_grid(stored, 0, 8)
    assert torch.equal(grid, (torch.arange(8) >= 4)[None, :, None].expand(8, 8, 8))
    ends = metrics.unit_cube_grid(32, ends=True)
    assert ends.abs().max() == pytest.approx(0.5 / 0.55) and len(ends) == 32 ** 3


@pytest.mark.mutation('metrics.py', 'ends=published)', 'ends=False)')
@pytest.mark.mutation('metrics.py', 'found == numbers[label]', 'found == label')
def test_the_published_classifier_knows_the_classes_by_their_numbers(tmp_path, monkeypatch):
    """Clip-Forge's file names no classes; its grids reach from face to face."""
    torch.save(dict(model=metrics.VoxelClassifier().state_dict()), tmp_path / 'best.pt')
    args = SimpleNamespace(classifier=tmp_path / 'best.pt', device='cpu', a='run')
    classifier = metrics.open_classifier(args, ['04379243', '03001627'])
    assert classifier[1:] == ([10, 4], True)
    model, asked = tiny().eval(), []
    model.query = lambda xi, p: asked.append(p) or p[..., :1]
    monkeypatch.setattr(metrics, 'classify', lambda net, grids: torch.tensor([4, 10, 10, 4, 4]))
    assert metrics.accuracy(model, [dict(xy=torch.zeros(1, 4, 4, 4))], 1, *classifier) == 60
    assert torch.cat(asked, 1).abs().max().item() == pytest.approx(0.5 / 0.55)
    with pytest.raises(ValueError, match='does not know the class .*a'):
        metrics.open_classifier(args, ['a'])
