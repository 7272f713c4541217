"""The read-out against closed forms and slow versions of itself."""
import collections
import math

import pytest
import torch
import torch.nn.functional as F

import inr


# ---- coordinates -------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', '+ 0.5) / n', '+ 0.0) / n')
@pytest.mark.mutation('inr.py', "indexing='ij')[::-1]", "indexing='ij')")
def test_grid_is_cell_centres_x_first():
    grid = inr.make_grid(2, 3)  # 2 rows, 3 columns
    assert grid.shape == (2, 3, 2)
    torch.testing.assert_close(grid[0, :, 0], torch.tensor([-2 / 3, 0, 2 / 3]))
    torch.testing.assert_close(grid[:, 0, 1], torch.tensor([-0.5, 0.5]))
    assert inr.make_grid(2, 3, 4).shape == (2, 3, 4, 3)
    torch.testing.assert_close(inr.make_grid(2, 3, 4)[:, 0, 0, 2], torch.tensor([-0.5, 0.5]))


@pytest.mark.mutation('inr.py', 'lo + (hi - lo) *', 'lo + 2 *')
def test_grid_of_a_box_is_a_slice_of_the_full_grid():
    full = inr.make_grid(8, 12)
    box = ((-1 + 2 * 3 / 12, -1 + 2 * 9 / 12), (-1 + 2 * 2 / 8, -1 + 2 * 6 / 8))
    torch.testing.assert_close(inr.make_grid(4, 6, box=box), full[2:6, 3:9])


@pytest.mark.mutation('inr.py', 'resolution * (extent.prod(-1)', '(extent.prod(-1)')
@pytest.mark.mutation('inr.py', 'box[..., 0]) / 2', 'box[..., 0])')
def test_scale_is_the_sampling_period():
    assert inr.grid_scale(64, (64, 64)) == 1
    assert inr.grid_scale(64, (128, 32)) == 1  # equal area
    torch.testing.assert_close(inr.grid_scale(64, (96, 96)), torch.tensor(2 / 3))
    quarter = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(inr.grid_scale(64, (64, 64), quarter), torch.tensor(0.5))


@pytest.mark.parametrize('size', [(16, 16), (5, 9), (7, 2), (3, 1000), (768, 768)])
@pytest.mark.mutation('inr.py', '.abs().sqrt() * resolution / 2', '.abs().sqrt() * resolution')
def test_scale_of_points_is_that_of_their_grid(size):
    points = inr.make_grid(*size).reshape(1, -1, 2)
    torch.testing.assert_close(inr.scale_of_points(16, points), inr.grid_scale(16, size))


@pytest.mark.mutation('inr.py', 'if len(coords) > 1 and', 'if False and')
def test_each_item_has_the_scale_of_its_own_grid():
    whole, quarter = (inr.make_grid(8, 8, box=box).reshape(1, -1, 2)
                      for box in (((-1, 1), (-1, 1)), ((-1, 0), (0, 1))))
    scales = inr.scale_of_points(8, torch.cat([whole, quarter, torch.rand(1, 64, 2)]))
    torch.testing.assert_close(scales, torch.tensor([1, 0.5, 1]))
    mlp, pe = inr.CFCMLP([4], 3, width=8, resolution=8), [torch.randn(3, 64, 4)]
    coords = torch.cat([quarter, whole, quarter])
    torch.testing.assert_close(mlp(pe, coords), mlp(pe, scale=torch.tensor([0.5, 1, 0.5])))


@pytest.mark.mutation('inr.py', 'if not torch.allclose(', 'if False and torch.allclose(')
def test_scale_of_scattered_points_is_that_of_training():
    row = inr.make_grid(1, 9).reshape(1, -1, 2)
    bent = inr.make_grid(4, 4).reshape(1, -1, 2) ** 3
    for points in (torch.rand(1, 100, 2), row, row[:, :1], row.flip(2), bent,
                   torch.rand(1, 2, 2)):
        assert inr.scale_of_points(16, points) == 1


@pytest.mark.mutation('inr.py', 'if coords.shape[2] != 2 or', 'if coords.shape[2] != 3 or')
def test_points_in_space_have_the_scale_of_training():
    slab = inr.make_grid(4, 4, 4)[:1].reshape(1, -1, 3)
    try:
        assert inr.scale_of_points(16, slab) == inr.scale_of_points(16, torch.rand(2, 5, 3)) == 1
    except ValueError as error:
        pytest.fail(str(error))


@pytest.mark.mutation('inr.py', 'require(min(size, default=0) >= 1 and len(box) == len(size)',
                      'require(True')
def test_impossible_grids_are_refused():
    for size, box in (((0, 4), None), ((4, 4), ((-1, 1),))):
        with pytest.raises(ValueError, match='no grid of size'):
            inr.make_grid(*size, box=box)


@pytest.mark.mutation('inr.py', 'style.to(self.weight.dtype)', 'style.float()')
def test_double_precision_throughout():
    mlp = inr.CFCMLP([4, 4], 3, width=8).double()
    pe = [torch.randn(2, 5, 4, dtype=torch.double) for _ in range(2)]
    s = torch.tensor([0.5], dtype=torch.double)
    try:
        torch.testing.assert_close(mlp.fixed_scale(s)(pe), mlp(pe, scale=s), rtol=1e-12, atol=1e-12)
    except RuntimeError as error:
        pytest.fail(str(error))


# ---- planes ------------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', '(cells[v], cells[u])', '(cells[u], cells[v])')
def test_plane_sizes_follow_the_axes():
    assert inr.plane_sizes('video', (8, 6, 5)) == dict(xy=(6, 8), yt=(5, 6), xt=(5, 8))
    assert inr.plane_sizes('image', (8, 6)) == dict(xy=(6, 8))


@pytest.mark.mutation('inr.py', 'torch.cat(flat, dim=2)', 'torch.cat(flat[::-1], dim=2)')
def test_unpack_inverts_pack():
    sizes = dict(xy=(3, 4), yt=(2, 3), xt=(2, 4))
    planes = {k: torch.randn(2, 5, *s) for k, s in sizes.items()}
    back = inr.unpack(inr.pack(planes), sizes)
    assert all(torch.equal(back[k], planes[k]) for k in sizes)
    with pytest.raises(ValueError, match='does not fill'):
        inr.unpack(torch.zeros(1, 5, 7), sizes)


# ---- look-up -----------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', "'border', align_corners=align_corners",
                      "'border', align_corners=True")
@pytest.mark.mutation('inr.py', "padding_mode='border'", "padding_mode='zeros'")
def test_field_read_on_its_own_grid_is_itself():
    field = torch.randn(2, 3, 5, 7)
    values = inr.sample_field(field, inr.make_grid(5, 7).reshape(1, -1, 2).expand(2, -1, -1))
    torch.testing.assert_close(values.mT.unflatten(2, (5, 7)), field)
    corner = inr.sample_field(field, -torch.ones(2, 1, 2))  # beyond the last centre
    torch.testing.assert_close(corner[:, 0], field[:, :, 0, 0])


def bilinear(field, x, y):
    """One field (C,H,W) at one point, written out."""
    H, W = field.shape[1:]
    u = min(max((x + 1) * W / 2 - 0.5, 0), W - 1)
    v = min(max((y + 1) * H / 2 - 0.5, 0), H - 1)
    i, j = min(int(u), W - 2), min(int(v), H - 2)
    a, b = u - i, v - j
    return ((1 - a) * (1 - b) * field[:, j, i] + a * (1 - b) * field[:, j, i + 1]
            + (1 - a) * b * field[:, j + 1, i] + a * b * field[:, j + 1, i + 1])


@pytest.mark.mutation('inr.py', '.clamp(0, n - 1)', '')
@pytest.mark.mutation('inr.py', '* n - 1) / 2)', '* n) / 2)')
@pytest.mark.mutation('inr.py', 'hat_matrix(H, ys), hat', 'hat_matrix(H, xs), hat')
def test_separable_look_up_equals_the_pointwise_ones():
    field = torch.randn(2, 3, 4, 6)
    xs, ys = torch.rand(2, 9) * 2 - 1, torch.rand(2, 9).sort().values * 2 - 1
    fast = inr.sample_grid(field, xs, ys).unflatten(1, (9, 9))
    points = torch.stack([xs[:, None].expand(2, 9, 9), ys[:, :, None].expand(2, 9, 9)], -1)
    torch.testing.assert_close(fast.flatten(1, 2), inr.sample_field(field, points.flatten(1, 2)))
    for b, j, i in ((0, 0, 0), (1, 3, 8), (0, 8, 2)):
        torch.testing.assert_close(fast[b, j, i], bilinear(field[b], xs[b, i].item(),
                                                           ys[b, j].item()))


@pytest.mark.mutation('inr.py', "yz=(1, 2), xz=(0, 2)),\n    'nerf'",
                      "yz=(0, 2), xz=(1, 2)),\n    'nerf'")
@pytest.mark.mutation('inr.py', '(cells[v], cells[u])', '(cells[u], cells[v])')
@pytest.mark.mutation('inr.py', "indexing='ij')[::-1]", "indexing='ij')")
def test_planes_are_projections_of_a_grid():
    """Planes of means of w . c over the axis that they lack hold what the other two give."""
    for domain, letters in dict(image='xy', shape='xyz', nerf='xyz', video='xyt').items():
        cells, w = (6, 4, 5)[:len(letters)], torch.tensor([1.0, -2.0, 0.5])[:len(letters)]
        values = (inr.make_grid(*cells[::-1]) * w).sum(-1)  # of axes (z, y, x)
        points = torch.rand(1, 20, len(letters)) - 0.5
        for name, size in inr.plane_sizes(domain, cells).items():
            lacks = [letters.index(a) for a in letters if a not in name]
            field = values.mean([-1 - a for a in lacks]) if lacks else values
            assert field.shape == size
            found = inr.sample_field(field[None, None], points[..., inr.PLANES[domain][name]])
            own = torch.tensor([a in name for a in letters])
            torch.testing.assert_close(found[0, :, 0], points[0] @ (w * own))


# ---- Eq. 13 ------------------------------------------------------------------------------------

@pytest.mark.mutation('inr.py', '(weight.square().sum(2, keepdim=True) + 1e-8).rsqrt()',
                      '(weight.square().sum(1, keepdim=True) + 1e-8).rsqrt()')
@pytest.mark.mutation('inr.py', 'self.weight * self.affine(style.to(self.weight.dtype))[:, None]',
                      'self.weight.expand(len(style), -1, -1)')
def test_modulated_weights_are_equation_13():
    layer = inr.ModulatedLinear(5, 4, 3)
    style = torch.randn(2, 3)
    A = style @ layer.affine.weight.T + layer.affine.bias
    slow = torch.zeros(2, 4, 5)
    for b in range(2):
        for i in range(4):
            row = [layer.weight[i, k] * A[b, k] for k in range(5)]
            length = math.sqrt(sum(v.item() ** 2 for v in row) + 1e-8)
            slow[b, i] = torch.stack(row) / length
    torch.testing.assert_close(layer.modulated(style), slow)
    torch.testing.assert_close(slow.norm(dim=2), torch.ones(2, 4))
    x = torch.randn(2, 6, 5)
    expected = torch.einsum('boi,bni->bno', slow, x) + layer.bias
    torch.testing.assert_close(layer(x, style), expected)


def grouped_convolution(layer, x, style):
    """The usual form: one group of a 1x1 convolution for each sample of the batch."""
    B, N, C = x.shape
    weight = layer.weight[None] * layer.affine(style)[:, None]
    weight = weight / (weight.square().sum(2, keepdim=True) + 1e-8).sqrt()
    y = F.conv2d(x.mT.reshape(1, B * C, N, 1), weight.reshape(-1, C, 1, 1), groups=B)
    return y.reshape(B, -1, N).mT + layer.bias


@pytest.mark.mutation('inr.py', 'x, weight.transpose(1, 2))',
                      'x, weight[:1].transpose(1, 2).expand(len(x), -1, -1))')
def test_mixed_scales_in_a_batch_equal_separate_runs():
    layer = inr.ModulatedLinear(6, 6, 4)
    x, style = torch.randn(3, 5, 6), torch.randn(3, 4)
    y = layer(x, style)
    torch.testing.assert_close(y, grouped_convolution(layer, x, style))
    for b in range(3):
        torch.testing.assert_close(y[b:b + 1], layer(x[b:b + 1], style[b:b + 1]))


@pytest.mark.mutation('inr.py', 'self.bias * gain, x', 'self.bias, x')
@pytest.mark.mutation('inr.py', 'x, weight[0], self.bias * gain', 'x, weight[0] / gain, self.bias')
def test_gain_scales_the_result():
    layer = inr.ModulatedLinear(6, 6, 4)
    torch.nn.init.normal_(layer.bias)
    x, style = torch.randn(3, 5, 6), torch.randn(3, 4)
    for s in (style, style[:1]):
        torch.testing.assert_close(layer(x, s, gain=1.5), 1.5 * layer(x, s))


@pytest.mark.mutation('inr.py', '10000.0 ** -k', '1000.0 ** -k')
def test_scale_embedding_frequencies():
    embedding = inr.ScaleEmbedding(8)
    embedding.net = torch.nn.Identity()
    e = embedding(torch.tensor([0.5]))[0]
    torch.testing.assert_close(e[31], torch.tensor(math.sin(0.5 * 1e-4)))
    torch.testing.assert_close(e[32], torch.tensor(math.cos(0.5)))


# ---- CFC ---------------------------------------------------------------------------------------

def plain_block(block, x, style, layers):
    h = x
    for layer in layers:
        h = F.leaky_relu(layer(h, style), 0.2) * math.sqrt(2)
    return (h + (x if block.skip is None else x @ block.skip.weight.T)) / math.sqrt(2)


@pytest.mark.parametrize('conditioning, merge', [('cfc', 'concat'), ('cfc', 'sum'),
                                                 ('concat', 'concat'), ('single', 'concat')])
@pytest.mark.mutation('inr.py', 'alpha=math.sqrt(0.5)', 'alpha=1.0')
@pytest.mark.mutation('inr.py', 'else math.sqrt(2)\n', 'else 1.0\n')
def test_mlp_equals_the_written_out_form(conditioning, merge):
    mlp = inr.CFCMLP([3, 4, 5], 2, width=8, blocks=4, layers=3, conditioning=conditioning,
                     merge=merge)
    pe, s = [torch.randn(2, 6, c) for c in (3, 4, 5)], torch.tensor([1.0, 0.5])
    style = mlp.style(s)
    first = dict(cfc=pe[0], concat=torch.cat(pe, -1), single=pe[2])[conditioning]
    h = plain_block(mlp.blocks[0], first, style, mlp.blocks[0].layers)
    for i in (1, 2, 3):
        x = h
        if conditioning == 'cfc' and i < 3:
            x = torch.cat([h, pe[i]], -1) if merge == 'concat' else h + mlp.project[i - 1](pe[i])
        h = plain_block(mlp.blocks[i], x, style, mlp.blocks[i].layers)
    torch.testing.assert_close(mlp(pe, scale=s), mlp.out(h, style))


@pytest.mark.mutation('inr.py', 'pe = pe[-1:]', 'pe = pe[:1]')
def test_ablations_depend_on_the_fields_they_should():
    for conditioning, seen in dict(single=[0, 0, 1], concat=[1, 1, 1], cfc=[1, 1, 1]).items():
        mlp = inr.CFCMLP([4, 4, 4], 3, width=8, conditioning=conditioning)
        pe = [torch.randn(1, 5, 4, requires_grad=True) for _ in range(3)]
        grads = torch.autograd.grad(mlp(pe, scale=torch.ones(1)).sum(), pe, allow_unused=True)
        assert [int(g is not None) for g in grads] == seen


@pytest.mark.mutation('inr.py', "scale = scale_of_points(self.resolution, coords).reshape(-1)",
                      'scale = coords.new_ones(1)')
def test_scale_is_derived_from_the_grid():
    mlp = inr.CFCMLP([4], 3, width=8, resolution=16)
    coords, pe = inr.make_grid(32, 32).reshape(1, -1, 2), [torch.randn(1, 1024, 4)]
    torch.testing.assert_close(mlp(pe, coords), mlp(pe, scale=torch.tensor([0.5])))
    assert not torch.allclose(mlp(pe, coords), mlp(pe, scale=torch.ones(1)))


@pytest.mark.mutation('inr.py', 'folded.bias.copy_(layer.bias)', 'pass')
@pytest.mark.mutation('inr.py', 'folded.weight.copy_(layer.modulated(style)[0])',
                      'folded.weight.copy_(layer.weight)')
def test_network_of_one_period_equals_the_modulated_one():
    mlp, pe = inr.CFCMLP([4, 4], 3, width=8), [torch.randn(2, 5, 4) for _ in range(2)]
    for p in mlp.parameters():
        torch.nn.init.normal_(p)
    before = mlp(pe, scale=torch.tensor([0.4]))
    plain = mlp.fixed_scale(torch.tensor([0.4]))
    assert plain.style is None and not any('affine' in n for n, _ in plain.named_parameters())
    torch.testing.assert_close(plain(pe), before)
    assert torch.equal(mlp(pe, scale=torch.tensor([0.4])), before)  # the original is untouched


def test_without_scale_injection_s_is_ignored():
    mlp = inr.CFCMLP([4], 3, width=8, scale_injection=False)
    pe = [torch.randn(1, 5, 4)]
    assert torch.equal(mlp(pe), mlp(pe, scale=torch.tensor([0.3])))
    assert not any('affine' in name for name, _ in mlp.named_parameters())


def test_more_fields_than_blocks_is_refused():
    with pytest.raises(ValueError, match='mlp_blocks'):
        inr.CFCMLP([4] * 5, 3, blocks=4)


# ---- iso-surfaces ------------------------------------------------------------------------------

def ball(points):
    return 0.7 - points.norm(dim=1)


def noise_field(n, seed):
    values = torch.randn((n + 1) ** 3, generator=torch.Generator().manual_seed(seed))

    def field(points):
        x, y, z = ((points + 1) / 2 * n).round().long().unbind(1)
        return values[(z * (n + 1) + y) * (n + 1) + x]
    return field


def edges_of(faces):
    """Directed edges as a sorted list of pairs."""
    sides = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return sorted(map(tuple, sides.tolist()))


def volume(vertices, faces):
    a, b, c = vertices[faces].double().unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def area(vertices, faces):
    a, b, c = vertices[faces].double().unbind(1)
    return float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum() / 2)


@pytest.mark.mutation('inr.py', '([w, w | u, w | u | v, w | v], [0, v, u | v, u])',
                      '([w, w | v, w | u | v, w | u], [0, u, u | v, v])')
@pytest.mark.mutation('inr.py', 't = (va / (va - vb))', 't = (vb / (vb - va))')
@pytest.mark.mutation('inr.py', '4 * grid.key(lower) + axis', 'grid.key(lower) + axis')
def test_surface_of_a_ball():
    vertices, faces = inr.extract_mesh(ball, 64)
    assert vertices.dtype == torch.float32 and faces.dtype == torch.int64
    assert volume(vertices, faces) == pytest.approx(4 / 3 * math.pi * 0.7 ** 3, rel=0.01)
    assert area(vertices, faces) == pytest.approx(4 * math.pi * 0.7 ** 2, rel=0.01)
    assert (vertices.norm(dim=1) - 0.7).abs().max() < 1e-3
    assert len(vertices) - len(faces) * 3 // 2 + len(faces) == 2  # Euler


@pytest.mark.mutation('inr.py', 'if any({*EDGES[loop[i]], *EDGES[loop[j]]} <= {*face} for',
                      'if any(False for')
@pytest.mark.mutation('inr.py', 'if inside[side[1]]:', 'if not inside[side[1]]:')
@pytest.mark.mutation('inr.py', 'base = 3 * self.n + 1', 'base = self.n')
def test_surface_of_noise_is_a_closed_manifold():
    for n, seed in ((1, 0), (5, 1), (8, 2), (13, 3)):
        vertices, faces = inr.extract_mesh(noise_field(n, seed), n, coarse=n)
        edges = edges_of(faces)
        assert len(set(edges)) == len(edges)  # no edge twice in one direction
        assert set(edges) == {(b, a) for a, b in edges}  # each once in the other
        assert set(faces.flatten().tolist()) == set(range(len(vertices)))
        assert 0 < volume(vertices, faces) < 8 and vertices.abs().max() <= 1


def test_coarse_to_fine_finds_what_the_dense_grid_finds():
    for offset in (0.0, 0.013, 0.031, 0.05):
        fields = [lambda p: 0.021 - (p[:, 0] - offset).abs(),  # thinner than a cell
                  lambda p: 0.03 - (p[:, :2] - offset).norm(dim=1),
                  lambda p: 0.037 - (p - offset).norm(dim=1),
                  lambda p: (p - 1 - offset).norm(dim=1) - 0.3]
        for field in fields:
            for n, coarse in ((64, 16), (50, 20)):
                found = inr.extract_mesh(field, n, coarse=coarse)
                dense = inr.extract_mesh(field, n, coarse=n)
                assert len(dense[1]) > 0 and torch.equal(found[0], dense[0])
                assert sorted(found[1].tolist()) == sorted(dense[1].tolist())


@pytest.mark.mutation('inr.py', 'reach = 0.5 *', 'reach = 0.2 *')
@pytest.mark.mutation('inr.py', '(nearest <= reach) if step', '(nearest <= 0) if step')
@pytest.mark.mutation('inr.py', 'v.abs().amin(1), near', 'v.abs().amax(1), near')
def test_a_ball_of_one_node_is_found_by_the_distance_to_it():
    for node in ((4, 3, 4), (3, 4, 4), (12, 4, 5)):  # of eight wide cells, none that is looked at
        vertices, faces = inr.extract_mesh(
            lambda p: 0.02 - (p - torch.tensor(node) / 32).norm(dim=1), 64, coarse=8)
        assert len(vertices) == 6 and len(faces) == 8
        torch.testing.assert_close(vertices.mean(0), torch.tensor(node) / 32)


@pytest.mark.mutation('inr.py', '(torch.cat(parts) != positive[:, None]).any(1)',
                      '(torch.cat(parts) != positive[:, None]).all(1)')
@pytest.mark.mutation('inr.py', 'while len(new):', 'while False:')
@pytest.mark.mutation('inr.py', 'there.any(2) & (there != side).any(2)', 'there.any(2) & False')
def test_thin_plates_of_saturated_logits_are_found_and_closed():
    across = F.normalize(torch.tensor([0.9, 0.4, 0.2]), dim=0)
    for offset in (-0.3, 0.007, 0.02, 0.4):
        for field in (lambda p: p[:, 1], lambda p: p @ across):
            def plate(p):  # two cells thick, of coarse cells that are four wide
                return (2000 * (0.016 - (field(p) - offset).abs())).clamp(-20, 20)
            found, dense = (inr.extract_mesh(plate, 128, coarse=n) for n in (32, 128))
            assert len(dense[1]) > 0 and torch.equal(found[0], dense[0])
            assert sorted(found[1].tolist()) == sorted(dense[1].tolist())


@pytest.mark.mutation('inr.py', 'at_node = (t - t.round()).abs() < AT_NODE', 'at_node = t > 2')
@pytest.mark.mutation('inr.py', 'whole = (names != names.roll(1, dims=1)).all(1)',
                      'whole = names[:, 0] >= 0')
def test_surfaces_through_nodes_have_no_triangle_without_area():
    for field in (lambda p: 0.5 - p.abs().amax(1), lambda p: 0.5 - p.abs().sum(1),
                  lambda p: p[:, 0], lambda p: p[:, 1] - p[:, 2] + 1e-7, lambda p: p[:, 0] * 0 + 1,
                  lambda p: (0.5 + 1e-6 - p.abs().amax(1)).clamp(max=1)):
        vertices, faces = inr.extract_mesh(field, 16)
        a, b, c = vertices[faces].double().unbind(1)
        assert torch.linalg.cross(b - a, c - a).norm(dim=1).min() > 1e-6
        assert len(vertices.unique(dim=0)) == len(vertices)
        assert collections.Counter(edges_of(faces)) == collections.Counter(
            (b, a) for a, b in edges_of(faces))
        assert set(faces.flatten().tolist()) == set(range(len(vertices)))


@pytest.mark.mutation('inr.py', 'torch.cat(parts) - self.level', 'torch.cat(parts)')
@pytest.mark.mutation('inr.py', 'self.values(nodes[inside])', 'self.values(nodes[inside]) * 0 - 1')
def test_surface_in_a_box_at_a_level():
    box = [(-0.5, 1.0), (0.0, 2.0), (-3.0, -1.0)]
    full = inr.extract_mesh(lambda p: p[:, 0] * 0 + 1, 8, box=box)
    assert volume(*full) == pytest.approx(1.5 * 2 * 2, rel=1e-6)
    assert volume(*inr.extract_mesh(lambda p: p[:, 0], 6, level=0.25, box=box)) == pytest.approx(3)
    for empty in (inr.extract_mesh(lambda p: p[:, 0] * 0 - 1, 8),
                  inr.extract_mesh(lambda p: p[:, 0] * 0 + 1, 8, level=2.0, coarse=2)):
        assert empty[0].shape == (0, 3) and empty[1].shape == (0, 3)


@pytest.mark.mutation('inr.py', 'nodes.split(self.chunk)', 'nodes.split(len(nodes) + 1)')
@pytest.mark.mutation(
    'inr.py',
    'index, inverse = distinct(self.key(nodes))',
    'index = torch.arange(nodes[..., 0].numel())\n        inverse = index.view(nodes.shape[:2])')
def test_few_points_are_evaluated_and_few_at_a_time():
    seen = []

    def field(points):
        seen.append(len(points))
        return ball(points)
    inr.extract_mesh(field, 128, coarse=32, chunk=5000)
    first = 33 ** 3 + 3 * 32 ** 3  # corners, and three nodes inside of each cell
    assert max(seen) <= 5000 and sum(seen) - first < 0.25 * 129 ** 3


@pytest.mark.mutation('inr.py', 'require(values.isfinite().all()', 'require(True')
def test_what_has_no_surface():
    for wrong in (lambda: inr.extract_mesh(lambda p: p[:, 0] / 0, 8),
                  lambda: inr.extract_mesh(ball, 0), lambda: inr.extract_mesh(ball, 8, coarse=0),
                  lambda: inr.extract_mesh(ball, 8, box=[(1, -1)] * 3)):
        with pytest.raises(ValueError):
            wrong()


# ---- drawing meshes ----------------------------------------------------------------------------

def cast_rays(vertices, faces, size, elevation, azimuth, distance, fov):
    """Depth (S,S) and face (S,S) by intersecting the ray of every pixel with every triangle."""
    right, up, back = inr.camera_axes(elevation, azimuth).double()
    k = (torch.arange(size) + 0.5 - size / 2) / (size / 2) * math.tan(math.radians(fov) / 2)
    rays = (k[None, :, None] * right - k[:, None, None] * up - back).flatten(0, 1)  # depth 1 each
    a, b, c = vertices[faces].double().unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    origin = back * distance
    t = ((a - origin) * normal).sum(1) / (rays @ normal.T)  # (S*S, F)
    hit = origin + t[..., None] * rays[:, None]
    inside = t > 0
    for p, q in ((a, b), (b, c), (c, a)):
        inside &= (torch.linalg.cross((q - p).expand_as(hit), hit - p) * normal).sum(2) >= 0
    depth, face = t.masked_fill(~inside, math.inf).min(1)
    return depth.view(size, size), face.view(size, size)


@pytest.mark.mutation('inr.py', "inverse, 'amax')", "inverse, 'amin')")
@pytest.mark.mutation('inr.py', '[focal, -focal]', '[focal, focal]')
@pytest.mark.mutation('inr.py', 'w = w * screen[corner, 2]',
                      'w = w / (w / screen[corner, 2]).sum(1, keepdim=True)')
@pytest.mark.mutation('inr.py', 'torch.stack([x, y], dim=1) + 0.5', 'torch.stack([x, y], dim=1)')
@pytest.mark.mutation(
    'inr.py',
    'torch.tensor([math.cos(a), 0.0, -math.sin(a)])',
    'torch.tensor([math.cos(a), 0.0, math.sin(a)])')
def test_drawing_equals_casting_rays():
    generator = torch.Generator().manual_seed(0)
    vertices = torch.rand(40, 3, generator=generator) * 2 - 1
    faces = torch.randint(40, (25, 3), generator=generator)
    faces = faces[(faces != faces.roll(1, dims=1)).all(1)]
    view = dict(size=48, elevation=25, azimuth=130, distance=3.0, fov=50)
    drawn = inr.render_mesh(vertices, faces, **view)
    depth, face = cast_rays(vertices, faces, **view)
    both = depth.isfinite() & drawn['depth'].isfinite()
    differ = depth.isfinite() != drawn['depth'].isfinite()
    assert differ.float().mean() < 2e-3  # on the very edges
    assert ((depth - drawn['depth']).abs()[both] > 1e-4).float().mean() < 2e-3
    assert (drawn['shade'][~depth.isfinite()] == 1).float().mean() > 0.99


@pytest.mark.mutation('inr.py', 'normal[seen] = n @ axes.T', 'normal[seen] = n')
def test_drawing_of_a_ball():
    vertices, faces = inr.extract_mesh(ball, 48)
    for elevation, azimuth in ((0, 0), (35, 200)):
        seen = inr.render_mesh(vertices, faces, 101, elevation, azimuth, distance=3.0)
        torch.testing.assert_close(seen['depth'][50, 50], torch.tensor(2.3), atol=2e-3, rtol=0)
        torch.testing.assert_close(seen['normal'][50, 50], torch.tensor([0.0, 0, 1]), atol=0.03,
                                   rtol=0)
        radius = math.tan(math.asin(0.7 / 3)) / math.tan(math.radians(20)) / 2  # of the outline
        share = seen['depth'].isfinite().float().mean()
        assert share == pytest.approx(math.pi * radius ** 2, rel=0.02)


def test_cameras_stand_where_they_say():
    for elevation, azimuth, place in ((0, 0, (0, 0, 1)), (0, 90, (1, 0, 0)), (90, 0, (0, 1, 0))):
        axes = inr.camera_axes(elevation, azimuth)
        torch.testing.assert_close(axes[2], torch.tensor(place).float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(axes @ axes.T, torch.eye(3), atol=1e-6, rtol=0)
        assert torch.linalg.det(axes) > 0
