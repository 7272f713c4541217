"""The video encoder against closed forms and slow versions of its parts."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import encoders


def tiny(cells=(3, 2, 5), depth=2, plane_depth=2, **others):
    return encoders.VideoEncoder(3, cells, patch=4, width=16, depth=depth, heads=2, head_channels=8,
                                 plane_depth=plane_depth, plane_hidden=24, **others)


def clip(batch, frames, height, width):
    return torch.rand(batch, 3, frames, height, width) * 2 - 1


@pytest.mark.mutation('encoders.py', "-(-H // self.patch), -(-W // self.patch)",
                      "H // self.patch, W // self.patch")
@pytest.mark.mutation('encoders.py', "(T, h * p, w * p), mode='trilinear'",
                      "(T, h * p, w * p), mode='nearest'")
def test_frames_of_any_size_are_stretched_to_whole_patches():
    encoder, video = tiny().eval(), clip(2, 3, 9, 14)
    frames = F.interpolate(video.transpose(1, 2).flatten(0, 1), (12, 16), mode='bilinear')
    expected = encoder(frames.unflatten(0, (2, 3)).transpose(1, 2))
    for name, plane in encoder(video).items():
        assert plane.shape == expected[name].shape
        torch.testing.assert_close(plane, expected[name])


# ---- rotations ---------------------------------------------------------------------------------

@pytest.mark.mutation('encoders.py', '(-2 * torch.ar', '(-torch.ar')
@pytest.mark.mutation('encoders.py', '(1 if code else 1 - 1 / n)', '1')
@pytest.mark.mutation('encoders.py', '[y[:, None].expand(h, w, -1), x.expand(h, w, -1)]',
                      '[x.expand(h, w, -1), y[:, None].expand(h, w, -1)]')
@pytest.mark.mutation('encoders.py', 'math.log10(5)', 'math.log10(10)')
@pytest.mark.mutation('encoders.py', 'angles.cos() + turned', 'angles.cos() - turned')
def test_rotation_is_multiplication_by_complex_numbers():
    time, space = encoders.time_angles(4, 12), encoders.space_angles(2, 3, 12)
    for k in range(6):
        for t in range(4):
            assert time[t, 2 * k].item() == pytest.approx(t * 10000 ** (-k / 6))
        for row, y in enumerate((-1 / 2, 1 / 2)):
            for column, x in enumerate((-2 / 3, 0, 2 / 3)):
                angle = math.pi * (1, 5 ** 0.5, 5)[k % 3] * (y, x)[k // 3]
                assert space[3 * row + column, 2 * k].item() == pytest.approx(angle, abs=1e-5)
    x = torch.randn(3, 4, 12)
    turned = torch.view_as_complex(x.unflatten(2, (6, 2))) * torch.exp(1j * time[:, ::2])
    torch.testing.assert_close(encoders.rotate(x, time), torch.view_as_real(turned).flatten(2))


@pytest.mark.mutation('encoders.py', 'if code else angles.repeat_interleave(2, dim=1)',
                      'if True else 0')
@pytest.mark.mutation('encoders.py', 'flatten(0, 1).repeat_interleave(2, dim=1)',
                      'flatten(0, 1).repeat(1, 2)')
@pytest.mark.mutation('encoders.py', '[-x[..., 1::2]', '[x[..., 1::2]')
def test_products_depend_on_the_difference_of_places_only():
    q, k = torch.randn(2, 1, 24)
    a = encoders.time_angles(6, 24)
    time = encoders.rotate(q.expand(6, -1), a) @ encoders.rotate(k.expand(6, -1), a).T
    torch.testing.assert_close(time[1:, 1:], time[:-1, :-1], atol=1e-4, rtol=0)
    a = encoders.space_angles(4, 5, 24)
    space = encoders.rotate(q.expand(20, -1), a) @ encoders.rotate(k.expand(20, -1), a).T
    space = space.view(4, 5, 4, 5)
    torch.testing.assert_close(space[1:, :, 1:], space[:-1, :, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(space[:, 1:, :, 1:], space[:, :-1, :, :-1], atol=1e-4, rtol=0)
    assert min(time[0].std(), space[0, 0, 0].std(), space[0, 0, :, 0].std()) > 0.1


# ---- the layers against slow versions ----------------------------------------------------------

@pytest.mark.mutation('encoders.py', 'rotate(q, angles), rotate(k, angles)', 'rotate(q, angles), k')
@pytest.mark.mutation('encoders.py', 'permute(2, 0, 3, 1, 4)', 'permute(3, 0, 2, 1, 4)')
@pytest.mark.mutation('encoders.py', 'return x + self.out(attend', 'return self.out(attend')
@pytest.mark.mutation('encoders.py', 'transpose(-1, -2) * d ** -0.5)',
                      'transpose(-1, -2) * n ** -0.5)')
@pytest.mark.mutation('encoders.py', 'self.qkv(self.norm(x))', 'self.qkv(x)')
def test_attention_equals_a_slow_loop():
    for tokens in (5, 11):  # fewer and more than the channels of a head
        check_attention(tokens)


def check_attention(tokens):
    layer, angles = encoders.TokenAttention(12, heads=3, head_channels=8), torch.randn(tokens, 8)
    x = 3 * torch.randn(2, tokens, 12)
    q, k, v = layer.qkv(F.layer_norm(x, (12,))).split(24, dim=2)
    slow = torch.empty_like(q)
    for b in range(2):
        for n in range(tokens):
            for own in torch.arange(24).split(8):
                query = encoders.rotate(q[b, n:n + 1, own], angles[n:n + 1])[0]
                keys = encoders.rotate(k[b][:, own], angles)
                slow[b, n, own] = (keys @ query / 8 ** 0.5).softmax(0) @ v[b][:, own]
    torch.testing.assert_close(layer(x, angles), x + layer.out(slow))
    assert layer.qkv.bias is None


@pytest.mark.mutation('encoders.py', '(size[0], -1)).transpose(1, 2)', '(size[0], -1))')
@pytest.mark.mutation('encoders.py', 'self.time(x.transpose(1, 2)', 'self.time(x')
@pytest.mark.mutation('encoders.py', 'self.space(x.flatten(0, 1), of_space)',
                      'self.space(x.flatten(0, 1), of_time)')
@pytest.mark.mutation('encoders.py', 'return value * F.gelu(gate)', 'return gate * F.gelu(value)')
@pytest.mark.mutation('encoders.py', 'return x + super().forward(x)', 'return super().forward(x)')
def test_layer_attends_along_time_and_within_frames():
    layer, x = encoders.SpaceTimeLayer(8, 2, 4), torch.randn(2, 4, 4, 8)  # as many places as frames
    of_time, of_space = torch.randn(2, 4, 4)
    h = torch.empty_like(x)
    for b in range(2):
        for place in range(4):
            h[b, :, place] = layer.time(x[b, None, :, place], of_time)[0]
    slow = torch.stack([layer.space(item, of_space) for item in h])
    value, gate = layer.mlp[1](layer.mlp[0](slow)).split(32, dim=3)
    slow = slow + layer.mlp[3](value * F.gelu(gate))
    torch.testing.assert_close(layer(x, of_time, of_space), slow)


@pytest.mark.mutation('encoders.py', 'self.returned = 0 if code else -1',
                      'self.returned = 0')
@pytest.mark.mutation('encoders.py', 'x + self.positions(x.shape[3])', 'x')
@pytest.mark.mutation('encoders.py', '.unflatten(0, size).permute(0, 3, 1, 2)',
                      '.unflatten(0, size).permute(0, 3, 2, 1)')
def test_planes_are_read_by_the_summary_token():
    reader = encoders.PlaneTransformer(5, 16, depth=2, heads=4, hidden=24)
    x = torch.randn(2, 3, 3, 5, 16)
    plane = reader(x)
    for b, i, j in np.ndindex(2, 3, 3):
        line = torch.cat([x[b, i, j] + reader.position, reader.summary[None]])[None]
        for layer in reader.layers:
            line = layer(line)
        torch.testing.assert_close(plane[b, :, i, j], line[0, -1])
    unread = encoders.PlaneTransformer(5, 16, depth=0, heads=4, hidden=24)
    assert torch.equal(unread(x), unread.summary[None, :, None, None].expand(2, -1, 3, 3))


@pytest.mark.mutation('encoders.py', 'x + self.positions(x.shape[3])', 'x')
def test_lines_are_sets_of_tokens_with_positions():
    reader = encoders.PlaneTransformer(6, 16, depth=2, heads=4, hidden=24)
    x, order = torch.randn(1, 2, 2, 6, 16), torch.tensor([3, 0, 5, 1, 4, 2])
    plane, shuffled = reader(x), reader(x[..., order, :])
    assert (plane - shuffled).abs().max() > 0.01
    reader.position.data = reader.position[order]
    torch.testing.assert_close(reader(x[..., order, :]), plane)


@pytest.mark.mutation('encoders.py', "mode='linear', align_corners=False", "mode='nearest'")
@pytest.mark.mutation('encoders.py', 'align_corners=False)[0].T', 'align_corners=True)[0].T')
def test_positions_are_interpolated():
    reader = encoders.PlaneTransformer(5, 8, depth=0, heads=4, hidden=8)
    assert torch.equal(reader.positions(5), reader.position)
    for n in (1, 3, 8, 10):
        at = (np.arange(n) + 0.5) / n
        slow = [np.interp(at, (np.arange(5) + 0.5) / 5, c) for c in reader.position.detach().T]
        np.testing.assert_allclose(reader.positions(n).detach(), np.stack(slow, 1), atol=1e-5)


# ---- the encoder -------------------------------------------------------------------------------

@pytest.mark.mutation('encoders.py', 'permute(0, 2, 3, 5, 4, 6, 1)', 'permute(0, 2, 3, 5, 6, 4, 1)')
@pytest.mark.mutation('encoders.py', 'permute(0, 2, 3, 5, 4, 6, 1)', 'permute(0, 2, 5, 3, 4, 6, 1)')
def test_tokens_are_linear_in_patches():
    model, video = tiny(depth=0), clip(2, 3, 8, 12)
    tokens = model.tokens(video)
    assert tokens.shape == (2, 3, 2, 3, 16)
    for t, i, j in np.ndindex(3, 2, 3):
        patch = video[:, :, t, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
        expected = model.embed(patch.permute(0, 2, 3, 1).flatten(1))  # row, column, channel
        torch.testing.assert_close(tokens[:, t, i, j], expected)


@pytest.mark.mutation('encoders.py', 'x.movedim(u + v, 3)', 'x.movedim((1, 3, 2)[u + v - 1], 3)')
@pytest.mark.mutation('encoders.py', 'x.movedim(u + v, 3)', 'x.movedim(4 - u - v, 3)')
@pytest.mark.mutation('encoders.py', 'cells[3 - u - v]', 'cells[u + v - 1]')
def test_planes_depend_on_their_two_coordinates():
    """Without layers that mix tokens, a patch at (t, y, x) reaches one cell of each plane."""
    model, video = tiny(cells=(3, 4, 5), depth=0), clip(1, 5, 12, 12)
    assert {name: len(p.position) for name, p in model.planes.items()} == dict(xy=5, yt=3, xt=4)
    t, y, x = 3, 0, 2
    changed = video.clone()
    changed[:, :, t, 4 * y:4 * y + 4, 4 * x:4 * x + 4] += 1
    before, after = model(video), model(changed)
    for name, cell in dict(xy=(y, x), yt=(t, y), xt=(t, x)).items():
        where = (before[name] - after[name]).abs().amax((0, 1)) > 1e-4
        assert where.nonzero().tolist() == [list(cell)], name


@pytest.mark.mutation('encoders.py', 'self.positions(x.shape[3])', 'self.position')
@pytest.mark.mutation('encoders.py', 'space_angles(h, w, self', 'space_angles(w, w, self')
def test_any_clip_size():
    """Also other sizes than those of training; as many frames as rows; one frame of one patch."""
    model = tiny()
    for frames, h, w in [(5, 2, 3), (7, 3, 1), (1, 1, 1), (3, 3, 5)]:
        try:
            planes = model(clip(2, frames, 4 * h, 4 * w))
        except RuntimeError as error:
            pytest.fail(str(error))
        sizes = dict(xy=(2, 16, h, w), yt=(2, 16, frames, h), xt=(2, 16, frames, w))
        assert {name: tuple(p.shape) for name, p in planes.items()} == sizes
        assert all(p.isfinite().all() for p in planes.values())


@pytest.mark.mutation('encoders.py', 'self.space(x.flatten(0, 1)',
                      'self.space(x.transpose(0, 1).flatten(0, 1)')
def test_items_of_a_batch_do_not_meet():
    model, video = tiny(), clip(3, 5, 8, 12)
    for name, plane in model(video).items():
        alone = torch.cat([model(item[None])[name] for item in video])
        torch.testing.assert_close(plane, alone)


@pytest.mark.mutation('encoders.py', 'q, k = rotate(q, angles), rotate(k, angles)',
                      'q, k, v = (rotate(e, angles) for e in (q, k, v))')
def test_clips_without_motion_have_planes_constant_in_time():
    model, frame = tiny(), clip(2, 1, 8, 12)
    planes = model(frame.expand(-1, -1, 5, -1, -1))
    for name in ('yt', 'xt'):
        first = planes[name][:, :, :1]
        torch.testing.assert_close(planes[name], first.expand_as(planes[name]))
        assert first.std() > 0.1


@pytest.mark.mutation('encoders.py', 'x.flatten(2, 3).float()', 'x.flatten(2, 3)')
def test_bfloat16_is_close_and_sums_stay_float32():
    model, video = tiny(), clip(2, 5, 8, 12)
    exact = model(video)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.tokens(video).dtype == torch.float32
        rough = model(video)
    for name, plane in exact.items():
        assert 0 < (rough[name] - plane).std() < 0.02 * plane.std(), name


@pytest.mark.mutation('encoders.py', 'if angles is not None:',
                      'if (x if angles is None else angles).sum():')
def test_one_graph_computes_it():
    model, video = tiny(depth=1, plane_depth=1), clip(2, 5, 8, 12)
    try:
        planes = torch.compile(model, fullgraph=True, backend='aot_eager')(video)
    except torch._dynamo.exc.Unsupported as error:
        pytest.fail(str(error))
    for name, plane in model(video).items():
        torch.testing.assert_close(planes[name], plane)


class Largest(TorchDispatchMode):
    """Records the most elements that a tensor had."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(r.numel() for r in torch.utils._pytree.tree_leaves(result)
                                       if torch.is_tensor(r)), 0)
        return result


@pytest.mark.mutation('encoders.py', 'F.scaled_dot_product_attention(q, k, v)\n',
                      '(q @ k.mT * q.shape[3] ** -0.5).softmax(3) @ v\n')
def test_memory_is_linear_in_the_tokens():
    model, video = tiny(), clip(1, 4, 40, 40)
    with torch.no_grad(), Largest() as largest:
        model(video)
    assert largest.numel == 4 * 100 * 8 * 16  # the feed-forward network, 8 * width for each token
