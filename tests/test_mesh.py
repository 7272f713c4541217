"""Meshes in data.py: file formats, points on a surface, the inside test, the prepared layout."""
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import data

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
TRIANGLES = np.array([t for a, b, c, d in QUADS for t in ((a, b, c), (a, c, d))])


def volume(vertices, faces):
    """Signed volume of a closed mesh, positive if its faces are counterclockwise from outside."""
    a, b, c = np.asarray(vertices)[np.asarray(faces)].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def ply(order, form):
    """The unit cube as binary PLY with properties that are to be passed over."""
    text = (f'ply\nformat {form} 1.0\ncomment x\nelement vertex 8\nproperty uchar red\n'
            'property double x\nproperty float y\nproperty float z\nelement face 6\n'
            'property list uchar int vertex_indices\nproperty short flags\nend_header\n')
    body = b''.join(struct.pack(order + 'Bdff', 7, *c) for c in CORNERS)
    return text.encode() + body + b''.join(struct.pack(order + 'B4ih', 4, *q, 9) for q in QUADS)


def text_ply():
    head = ('ply\nformat ascii 1.0\nelement vertex 8\nproperty float x\nproperty float y\n'
            'property float z\nelement face 6\nproperty list uchar int vertex_index\nend_header\n')
    rows = [*CORNERS, *([4, *q] for q in QUADS)]
    return (head + '\n'.join(' '.join(f'{v:g}' for v in row) for row in rows)).encode()


def text_obj():
    lines = [f'v {x} {y} {z} 0.5 0.5 0.5' for x, y, z in CORNERS] + ['vt 0 0', 'o name', '']
    lines += ['f ' + ' '.join(f'{k + 1}/1/1' for k in q) for q in QUADS[:3]]
    return '\n'.join(lines + ['f ' + ' '.join(str(k - 8) for k in q) for q in QUADS[3:]]).encode()


def text_off(header):
    rows = [' '.join(map(str, c)) + ' 255 0 0' for c in CORNERS]
    return '\n'.join([header, '# a comment', *rows, *(
        ' '.join(map(str, [4, *q, 200, 0, 0])) for q in QUADS)]).encode()


def text_stl():
    corners = CORNERS[TRIANGLES]
    return ('solid cube\n' + '\n'.join(
        'facet normal 0 0 0\nouter loop\n' + '\n'.join('vertex %e %e %e' % tuple(v) for v in t)
        + '\nendloop\nendfacet' for t in corners) + '\nendsolid').encode()


def binary_stl():
    rows = [struct.pack('<12fH', 0, 0, 0, *t.flatten(), 3) for t in CORNERS[TRIANGLES]]
    return b'solid, or so it says'.ljust(80) + struct.pack('<I', 12) + b''.join(rows)


FILES = {'a.obj': text_obj(), 'a.off': text_off('OFF\n8 6 12'), 'b.off': text_off('OFF8 6 0'),
         'c.off': text_off('COFF 8 6 0'), 'a.ply': text_ply(), 'a.stl': text_stl(),
         'b.ply': ply('<', 'binary_little_endian'), 'c.ply': ply('>', 'binary_big_endian'),
         'b.stl': binary_stl()}


@pytest.mark.mutation('data.py', 'p[:, [0, k, k + 1]]', 'p[:, [0, k + 1, k]]')
@pytest.mark.mutation('data.py', 'c - 1 if c > 0 else len(vertices) + c', 'abs(c) - 1')
@pytest.mark.mutation('data.py', "numbers([w.split('/')[0] for", "numbers([w.split('/')[-1] for")
@pytest.mark.mutation('data.py', "binary_big_endian='>'", "binary_big_endian='<'")
@pytest.mark.mutation('data.py', 'lines.take(end, words)[1:end]',
                      'lines.take(end, words)[:end - 1]')
def test_every_format_gives_the_cube(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        try:
            vertices, faces = data.read_mesh(tmp_path / name)
        except ValueError as error:
            pytest.fail(str(error))
        assert vertices.shape == (8, 3) and faces.shape == (12, 3), name
        assert volume(vertices, faces) == pytest.approx(1, abs=1e-6), name


def read(path, content):
    """The volume of a mesh that a file of this content holds."""
    path.write_bytes(content)
    try:
        return volume(*data.read_mesh(path))
    except ValueError as error:
        pytest.fail(str(error))


def strips_ply():
    """The cube as strips, some of an odd number of triangles."""
    strip = '2 3 6 7 4 -1 4 7 5 -1 4 5 0 1 2 3 -1 0 2 4 6 -1 1 5 3 7'
    rows = '\n'.join('%g %g %g' % tuple(c) for c in CORNERS)
    return ('ply\nformat ascii 1.0\ncomment end_header\nelement vertex 8\nproperty float x\n'
            'property float y\nproperty float z\nelement tristrips 1\nproperty list int int '
            f'vertex_indices\nend_header\n{rows}\n{len(strip.split())} {strip}\n').encode()


OBJ_LINES = text_obj().decode().split('\n')
LEGAL = {
    'bom.obj': b'\xef\xbb\xbf' + text_obj(), 'bom.off': b'\xef\xbb\xbf' + FILES['a.off'],
    'bom.ply': b'\xef\xbb\xbf' + text_ply(), 'bom.stl': b'\xef\xbb\xbf' + text_stl(),
    'mac.obj': text_obj().replace(b'\n', b'\r'), 'dos.obj': text_obj().replace(b'\n', b'\r\n'),
    'mac.off': FILES['a.off'].replace(b'\n', b'\r'), 'dos.ply': text_ply().replace(b'\n', b'\r\n'),
    'mac.ply': text_ply().replace(b'\n', b'\r'), 'dos.stl': text_stl().replace(b'\n', b'\r\n'),
    'comment.obj': '\n'.join(line + ' # f 1 2 3 \\' for line in OBJ_LINES).encode(),
    'joined.obj': text_obj().replace(b'\nf 1/1/1 ', b'\nf 1/1/1 \\\r\n'),
    'tight.obj': text_obj().replace(b' 8/1/1', b'\\\r\n8/1/1'),
    'capitals.stl': text_stl().upper(), 'name.stl': text_stl().replace(b'cube', b'vertex 1 2 3 \\'),
    'two.stl': text_stl().replace(b'endfacet', b'endfacet\nendsolid a\nsolid b', 1),
    'wide.stl': text_stl().replace(b'\nouter', b' outer'),
    'letters.off': text_off('NCOFF\n8 6 0'), 'st.off': text_off('STCNOFF 8 6 0'),
    'four.off': '\n'.join(['4OFF 8 6', *('%g %g %g 2' % tuple(2 * c) for c in CORNERS), *(
        ' '.join(map(str, [4, *q])) for q in QUADS)]).encode(),
    'wrapped.off': FILES['a.off'].replace(b'\n4 0 1 3 2 ', b'\n4 0 1\n3 2 '),
    'strips.ply': strips_ply(),
    'comment.ply': FILES['b.ply'].replace(b'comment x', b'comment end_header'),
    'joined_files.obj': text_obj().replace(b'\nv ', b'\n\xef\xbb\xbfv ', 1), 'padded.obj':
    text_obj() + bytes(99), 'padded.off': FILES['a.off'] + bytes(9),
    'bare.off': FILES['a.off'].replace(b'OFF\n', b''),
    'mixed.ply': text_ply().replace(b'\n', b'\r\n', 3),
    'undefined.stl': text_stl().replace(b'normal 0 0 0', b'normal -nan(ind) 1.#IND -1.#QNAN')}


@pytest.mark.mutation('data.py', ".replace('\\ufeff', '')", "")
@pytest.mark.mutation('data.py', "data.rstrip(b'\\0').decode", "data.decode")
@pytest.mark.mutation('data.py', "OFF)?(.*)'", "OFF)(.*)'")
@pytest.mark.mutation('data.py', "re.split('[\\r\\n]+', (found", "re.split('\\r\\n', (found")
@pytest.mark.mutation('data.py', "comment='$^'", "comment='#'")
@pytest.mark.mutation('data.py', "re.sub('\\r\\n?', '\\n',", "re.sub('\\r\\n', '\\n',")
@pytest.mark.mutation('data.py', 'while joined and line', 'while not joined and line')
@pytest.mark.mutation('data.py', "line[:-1] + ' ' + next", 'line[:-1] + next')
@pytest.mark.mutation('data.py', "f'{comment}.*', ''", "f'{comment}$', ''")
@pytest.mark.mutation('data.py', "size = 4 if '4' in", "size = 3 if '4' in")
@pytest.mark.mutation('data.py', '(b, a, c) if turned', '(a, b, c) if turned')
@pytest.mark.mutation('data.py', 'turned = False\n        else', 'pass\n        else')
@pytest.mark.mutation('data.py', "wanted in ('*', '0', word.lower())", "wanted in ('*', '0', word)")
@pytest.mark.mutation('data.py', 'for word in words:\n                wanted',
                      'for word in words[:5]:\n                wanted')
def test_what_the_formats_allow_gives_the_cube(tmp_path):
    for name, content in LEGAL.items():
        assert read(tmp_path / name, content) == pytest.approx(1, abs=1e-6), name


CUT = {
    'half.stl': text_stl()[:text_stl().index(b'\nfacet', 900)], 'facet.stl': text_stl().replace(
        b'endloop', b'', 1), 'three.off': FILES['a.off'].replace(b'\n4 0 1 3 2 ', b'\n4 0 1 3\n#'),
    'rows.off': FILES['a.off'] + b'\n3 0 1 2',
    'nine.ply': text_ply().replace(b'vertex 8', b'vertex 9'),
    'rows.ply': text_ply() + b'\n4 0 1 2 3',
    'word.ply': text_ply().replace(b'\n0 0 1', b'\n0 0 1 7'),
    'more.ply': FILES['b.ply'] + b'more', 'zero.obj': text_obj() + b'\nf 0 1 2',
    'two.obj': text_obj() + b'\nv 1 2', 'back.obj': text_obj() + b'\nf -1 -2 -9',
    'zeros.obj': text_obj().replace(b'\nf', b'\n\0\0\0f', 1),
    'wide.obj': text_obj().decode().encode('utf-16'),
    'space.obj': text_obj() + '\n\u200bv 1'.encode(), 'python.obj': text_obj() + b'\nv 0 0 1_0',
    'python.off': FILES['a.off'].replace(b' 0', b' 0_0', 1),
    'python.ply': text_ply().replace(b'\n0 0 1', b'\n0 0 1_0'),
    'python.stl': text_stl().replace(b'vertex 0', b'vertex 0_0', 1),
    'far.off': b'4OFF 3 1\n0 0 0 1\n1 0 0 0\n0 1 0 1\n3 0 1 2',
    'binary.stl': binary_stl()[:-7], 'scalars.ply': FILES['b.ply'].replace(
        b'list uchar int vertex_indices', b'uchar n\n' + b'\n'.join(
            b'property int %c' % c for c in b'abcd'))}


@pytest.mark.mutation('data.py', "require(not inside, 'the file", "require(True, 'the file")
@pytest.mark.mutation('data.py', 'require(not next(self.rows, None)', 'require(True')
@pytest.mark.mutation('data.py', "require(not words, 'more numbers", "require(True, 'more numbers")
@pytest.mark.mutation('data.py', 'require(not stream.read().strip()', 'require(True')
@pytest.mark.mutation('data.py', 'require(0 not in corners', 'require(True')
@pytest.mark.mutation('data.py', '0 <= min(corners) and', '-9 <= min(corners) and')
@pytest.mark.mutation('data.py', 'require(key.isascii() and', 'require(True or')
@pytest.mark.mutation('data.py', "require(not any('_' in w for w in words)", 'require(True')
@pytest.mark.mutation('data.py', 'require(size == 3 or vertices[:, 3].all()', 'require(True')
@pytest.mark.mutation('data.py', "require(b'\\0' not in data.rstrip(b'\\0')", 'require(True')
@pytest.mark.mutation('data.py', "raise ValueError(f'line {self.number}: {error}')",
                      "raise ValueError(str(error))")
def test_files_whose_counts_and_contents_disagree(tmp_path):
    for name, content in CUT.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            data.read_mesh(tmp_path / name)
        assert '\n' not in str(caught.value)
        told = {'more.ply': 'more bytes', 'back.obj': 'not there', 'scalars.ply': 'vertex_indices',
                'binary.stl': '677 bytes, where a binary STL of 12 facets has 684'}
        assert told.get(name, 'line') in str(caught.value)


def comb(teeth=7):
    """A comb as one polygon: a back of 2 teeth x 1, teeth of 1 x 9; its area is 11 teeth."""
    outline = [(0, 0), (2 * teeth, 0)]
    for k in reversed(range(teeth)):
        outline += [(2 * k + 2, 1), (2 * k + 1, 1), (2 * k + 1, 10), (2 * k, 10)]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    return np.pad(np.array(outline, float), ((0, 0), (0, 1))) @ turn.T


@pytest.mark.mutation('data.py', 'fans[k] = p[k][clip_ears(flat[k])]', 'pass')
@pytest.mark.mutation('data.py', 'not (within & (turn(c, a, p[left]) > -1e-12)).any()', 'True')
@pytest.mark.mutation('data.py', 'turn(a, b, c) >= 0 and', 'True and')
def test_concave_polygons_are_cut_into_their_own_area(tmp_path):
    corners = comb()
    for order in (1, -1):
        lines = ['v %.9g %.9g %.9g' % tuple(c) for c in corners]
        lines += ['f ' + ' '.join(str(k + 1) for k in range(len(corners))[::order])]
        (tmp_path / 'comb.obj').write_text('\n'.join(lines))
        vertices, faces = data.read_mesh(tmp_path / 'comb.obj')
        a, b, c = vertices[faces].transpose(1, 0, 2)
        across = np.cross(b - a, c - a) / 2
        normal = order * np.cross(corners[1] - corners[0], corners[2] - corners[0])
        assert len(faces) == len(corners) - 2 and (across @ normal > -1e-9).all()
        assert np.linalg.norm(across, axis=1).sum() == pytest.approx(77)
        x, y = (corners[k] - corners[0] for k in (1, -1))  # along the back, along a tooth
        points, _ = data.surface_points(vertices, faces, 2000, np.random.default_rng(0))
        u, v = (points - corners[0]) @ x / 14, (points - corners[0]) @ y / 10
        assert ((v < 1 + 1e-6) | (u % 2 < 1 + 1e-6)).all()


@pytest.mark.mutation('data.py', 'turn(c, a, p[left]) > -1e-12', 'turn(c, a, p[left]) > 1e-12')
def test_corners_on_straight_edges_and_on_cuts():
    """Outlines of random heaps of squares, with a corner wherever squares meet."""
    ell = [(0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (1, 2)]
    for seed in range(40):
        heights = np.random.default_rng(seed).integers(1, 6, 6).tolist()
        outline = [(x, 0) for x in range(7)]
        for x in reversed(range(6)):
            after = heights[x + 1] if x < 5 else 0
            step = 1 if heights[x] > after else -1
            outline += [(x + 1, y) for y in range(after + step, heights[x] + step, step)
                        if (x + 1, y) != outline[-1]]
            outline += [(x, heights[x])]
        outline += [(0, y) for y in reversed(range(1, heights[0]))]
        for corners, area in ((ell, 3), (list(dict.fromkeys(outline)), sum(heights))):
            p = np.pad(np.roll(np.array(corners, float), seed, axis=0), ((0, 0), (0, 1)))
            a, b, c = p[data.cut_polygons(p, [list(range(len(p)))])].transpose(1, 0, 2)
            found = np.cross(b - a, c - a)[:, 2] / 2
            assert found.min() > -1e-9 and found.sum() == pytest.approx(area)


@pytest.mark.mutation('data.py', 'np.eye(3)[np.abs(normal).argmin(1)]', 'np.eye(3)[[0]]')
@pytest.mark.mutation('data.py', "found[found[:, 0].argsort(kind='stable'), 1:]", 'found[:, 1:]')
def test_a_chevron_and_convex_polygons_keep_their_order():
    flat = np.array([[0, 0, 0], [2, 1, 0], [0, 2, 0], [1, 1, 0], [3, 1, 0]], float)
    for axes in range(3):
        vertices = np.roll(flat, axes, axis=1)
        faces = data.cut_polygons(vertices, [[0, 1, 3], [0, 1, 2, 3], [0, 4, 2, 3], [2, 0, 1]])
        assert faces[0].tolist() == [0, 1, 3] and faces[-1].tolist() == [2, 0, 1]
        a, b, c = vertices[faces].transpose(1, 0, 2)
        area = np.cross(b - a, c - a)[:, (2 + axes) % 3] / 2
        np.testing.assert_allclose([area[1:3].sum(), area[3:5].sum()], [1, 2])
        assert (area >= 0).all()


@pytest.mark.mutation('data.py', 'points.reshape(-1, columns)[:, :3]', 'points.reshape(-1, 3)')
@pytest.mark.mutation('data.py', '*(n for n in rows if n > 1)', '')
@pytest.mark.mutation('data.py', "next((c for c in ';,' if c in line), None)",
                      "',' if ',' in line else None")
@pytest.mark.mutation('data.py', 'points[np.isfinite(points).all(1)]', 'points')
def test_point_clouds_as_arrays(tmp_path):
    points = np.random.default_rng(0).normal(size=(60, 4))

    def cloud(array):
        np.save(tmp_path / 'a.npy', array)
        return data.read_cloud(tmp_path / 'a.npy', 60)
    expected = cloud(points[:, :3])
    for array in (points, points[None], points.reshape(6, 10, 4)):
        np.testing.assert_array_equal(cloud(array), expected)
    points[7, 1] = np.nan
    try:
        assert np.isfinite(cloud(points)).all()
    except ValueError as error:
        pytest.fail(str(error))
    for wrong in (points[:, :3].T, points[:, :2], points[:, 0], points[0], np.zeros((3, 20, 20)),
                  np.full((9, 3), np.nan), points[:48, :1].reshape(3, 4, 4),
                  points[:16].reshape(2, 4, 8), points[:48].reshape(2, 3, 32)):
        with pytest.raises(ValueError, match='a.npy'):
            cloud(wrong)
    path = tmp_path / 'a.xyz'
    for rows in (b'\xef\xbb\xbf0,0,0\r\n1,2,3 # end\r\n', b'0 0 0\n1 , 2 ,3, 255',
                 b'0\t0 0\n1;2;3;4;'):
        path.write_bytes(rows)
        try:
            assert data.read_geometry(path)[0].tolist() == [[0, 0, 0], [1, 2, 3]]
        except ValueError as error:
            pytest.fail(str(error))
    for rows in (b'0,1;0,2;0,3', b'0,1 0,2 0,3', b'0 0', b'0,0', b'0,,0', b'1_0 0 0'):
        path.write_bytes(b'0 0 0\n' + rows)
        with pytest.raises(ValueError, match='a.xyz.*line 2'):
            data.read_geometry(path)


@pytest.mark.mutation('data.py', 'digits = 7 + max(0, math.ceil(math.log10(farness(vertices))))',
                      'digits = 7')
@pytest.mark.mutation('data.py', "('double', '<f8') if farness(vertices) > 2",
                      "('double', '<f8') if False")
def test_meshes_far_from_the_origin_keep_their_form(tmp_path):
    vertices = 2 * CORNERS + [500_000, 4_649_776, 300] + np.random.default_rng(0).random((8, 3)) / 9
    for suffix in ('.obj', '.ply'):
        data.write_mesh(tmp_path / f'far{suffix}', vertices, TRIANGLES)
        v, f = data.read_mesh(tmp_path / f'far{suffix}')
        np.testing.assert_allclose(v[f], vertices[TRIANGLES], rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match='write .obj or .ply'):
        data.write_mesh(tmp_path / 'far.stl', vertices, TRIANGLES)


@pytest.mark.mutation('data.py', "faces + 1, 'f %d %d %d'", "faces, 'f %d %d %d'")
@pytest.mark.mutation('data.py', "rows['count'], rows['corners'] = 3, faces",
                      "rows['count'], rows['corners'] = 3, faces[:, ::-1]")
def test_what_is_written_is_read_back(tmp_path):
    vertices = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for suffix in data.MESH_WRITERS:
        path = tmp_path / f'new/mesh{suffix}'
        data.write_mesh(path, vertices, torch.from_numpy(TRIANGLES))
        try:
            v, f = data.read_mesh(path)
        except ValueError as error:
            pytest.fail(str(error))
        np.testing.assert_allclose(v[f], vertices.numpy()[TRIANGLES], rtol=1e-6)
    stored = np.frombuffer(path.read_bytes(), '<f4', 3, 84)  # the first normal of the .stl
    a, b, c = vertices.numpy()[TRIANGLES[0]]
    np.testing.assert_allclose(stored, np.cross(b - a, c - a) / np.linalg.norm(
        np.cross(b - a, c - a)), rtol=1e-4)
    with pytest.raises(ValueError, match='written as one of .obj .ply .stl'):
        data.write_mesh(tmp_path / 'mesh.off', vertices, TRIANGLES)


@pytest.mark.mutation('data.py', 'max(corners) < len(vertices)', 'True')
@pytest.mark.mutation('data.py', 'finite_extent(vertices[used], path)',
                      'finite_extent(vertices, path)')
@pytest.mark.mutation('data.py', 'require(np.cross(b - a, c - a).any()', 'require(True')
def test_files_that_are_no_mesh(tmp_path):
    bad = {'cut.ply': FILES['b.ply'][:-60], 'cut.stl': FILES['b.stl'][:-60],
           'cut.off': FILES['a.off'][:60], 'word.obj': b'v 0 0 zero', 'none.obj': b'v 0 0 0\n',
           'far.obj': FILES['a.obj'] + b'\nf 1 2 99', 'point.obj': b'v 1 1 1\nf 1 1 1',
           'nan.obj': b'v nan 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3', 'empty.off': b'',
           'line.obj': b'v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3', 'a.gltf': b'', 'empty.npy': b'',
           'headless.ply': b'end_header\n'}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        try:
            with pytest.raises(ValueError, match=name) as caught:
                data.read_mesh(tmp_path / name)
        except IndexError:
            pytest.fail('a traceback')
        assert '\n' not in str(caught.value)
    (tmp_path / 'more.obj').write_bytes(b'v 9 9 9\n' + FILES['a.obj'].replace(b'\nf', b'\n#')
                                        + b'\nf -1 -2 -3')
    vertices, faces = data.read_mesh(tmp_path / 'more.obj')
    assert len(vertices) == 3 and sorted(faces.ravel()) == [0, 1, 2]  # the others have no face


# ---- inside or outside --------------------------------------------------------------------------

def ball(n, bumps=0.0, hole=False):
    """A sphere of 2 n^2 quads with bumps, and without its cap if `hole`."""
    theta, phi = np.meshgrid(np.linspace(1e-3, np.pi - 1e-3, n + 1), np.arange(2 * n) * np.pi / n,
                             indexing='ij')
    r = 0.4 * (1 + bumps * np.sin(5 * phi) * np.sin(4 * theta))
    vertices = np.stack([r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi),
                         r * np.cos(theta)], -1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(n // 5 if hole else 0, n), np.arange(2 * n), indexing='ij')
    a, b = i * 2 * n + j, i * 2 * n + (j + 1) % (2 * n)
    quads = np.stack([a, a + 2 * n, b + 2 * n, b], -1).reshape(-1, 4)
    return vertices, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def direct(points, vertices, faces):
    """Winding number from the angles of spherical triangles (Girard): area = sum - pi."""
    total = np.zeros(len(points))
    for t in vertices[faces]:
        u = t[:, None] - points
        u = u / np.linalg.norm(u, axis=-1, keepdims=True)
        angles = 0
        for k in range(3):
            p, q = (u[k - m] - (u[k - m] * u[k]).sum(-1, keepdims=True) * u[k] for m in (1, 2))
            cosine = (p * q).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(q, axis=-1)
            angles += np.arccos(np.clip(cosine, -1, 1))
        total += np.sign((u[0] * np.cross(u[1], u[2])).sum(-1)) * (angles - np.pi)
    return total / (4 * np.pi)


def near_and_far(vertices, faces, n):
    rng = np.random.default_rng(0)
    on, _ = data.surface_points(vertices, faces, n, rng)
    return np.concatenate([on + 0.02 * rng.normal(size=on.shape), rng.uniform(-.55, .55, (n, 3))])


@pytest.mark.mutation('data.py', '(first + second + third', '(first + third')
@pytest.mark.mutation('data.py', 'trace - 3 * (outer', 'trace - 2 * (outer')
@pytest.mark.mutation('data.py', '7.5 * cubic', '5 * cubic')
@pytest.mark.mutation('data.py', 'leaves[spare].mean(1, keepdim=True)', 'leaves[spare]')
@pytest.mark.mutation('data.py', 'normals.sum(1), normals.mT', 'normals.mean(1), normals.mT')
@pytest.mark.mutation('data.py', 'la * lb * lc +', '-la * lb * lc +')
def test_winding_number_against_the_direct_sum():
    vertices, faces = ball(24, bumps=0.3, hole=True)
    points = near_and_far(vertices, faces, 150)
    w = data.winding_number(points, vertices, faces).numpy()
    expected = direct(points, vertices, faces)
    assert np.abs(w - expected).max() < 0.004  # 0.01 is what the method promises
    assert ((0.1 < expected) & (expected < 0.9)).any()  # beside the hole


@pytest.mark.mutation('data.py', 'w[order] = angles', 'w[order.flip(0)] = angles')
@pytest.mark.mutation('data.py', 'b, 2 * k, b, 2 * k + 1]', 'b, k, b, k + 1]')
def test_closed_meshes_are_one_inside_and_zero_outside():
    for vertices, faces in ((CORNERS - 0.5, TRIANGLES), ball(16), ball(40)):
        points = near_and_far(vertices, faces, 3000)
        w = data.winding_number(points, vertices, faces)
        if len(vertices) == 8:
            inside = np.abs(points).max(1) < 0.5
        else:  # the polyhedron lies between two spheres
            r = np.linalg.norm(points, axis=1)
            points, w, r = (x[(r < 0.39) | (r > 0.4)] for x in (points, w, r))
            inside = r < 0.395
        assert np.abs(w.numpy() - inside).max() < 0.01 and 0 < inside.mean() < 1


@pytest.mark.mutation('data.py', ':, longest]', ':, 0 * longest]')
@pytest.mark.mutation('data.py', 'cells >= len(points)', 'cells < 0')
def test_cells_are_a_tree_that_halves_the_longest_side():
    points = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    index, spare = data.cells_of(points, 10)
    assert index.shape == (128, 8) and sorted(index[~spare].tolist()) == list(range(1000))
    sides = points[index].amax(1) - points[index].amin(1)
    assert sides.amax() < 0.55  # halved about twice along each axis
    pairs = points[index].view(64, 16, 3)
    halved = pairs.amax(1) - pairs.amin(1)
    assert (halved.gather(1, (halved - sides.view(64, 2, 3).amax(1)).argmax(1)[:, None])
            >= 0.7 * halved.amax(1, keepdim=True)).float().mean() > 0.8


# ---- points on the surface, the prepared layout --------------------------------------------------

@pytest.mark.mutation('data.py', 'u, v = np.sqrt(rng.random((n, 1)))', 'u, v = rng.random((n, 1))')
@pytest.mark.mutation('data.py', 'p=area / area.sum()', 'p=None')
def test_surface_points_are_uniform_by_area():
    vertices = CORNERS * [3, 1, 1]  # two sides of area 1, four of area 3
    points, normals = data.surface_points(vertices, TRIANGLES, 40_000, np.random.default_rng(0))
    for axis, (high, share) in enumerate(zip((3, 1, 1), (1 / 14, 3 / 14, 3 / 14))):
        for end, sign in ((0, -1), (high, 1)):
            on = np.abs(points[:, axis] - end) < 1e-9
            assert on.mean() == pytest.approx(share, abs=0.01)
            np.testing.assert_allclose(normals[on], [sign * np.eye(3)[axis]] * on.sum(), atol=1e-12)
            others = np.delete(points[on], axis, axis=1) / np.delete([3, 1, 1], axis)
            np.testing.assert_allclose(others.mean(0), 0.5, atol=0.03)
            np.testing.assert_allclose(others.var(0), 1 / 12, atol=0.01)


@pytest.fixture
def meshes(tmp_path, monkeypatch):
    """A folder `set` of two classes: boxes 4 x 2 x 1, one inside out, one without two sides."""
    monkeypatch.chdir(tmp_path)
    vertices = CORNERS * [4, 2, 1] + [7, 0, 0]
    for k in range(12):
        faces = TRIANGLES[:, ::-1] if k == 3 else TRIANGLES[4:] if k == 4 else TRIANGLES
        data.write_mesh(f'set/{"chair" if k < 6 else "table"}/m{k}.obj', vertices, faces)
    (tmp_path / 'set' / 'table' / 'deep').mkdir()
    (tmp_path / 'set' / 'table' / 'deep' / 'm12.stl').write_bytes(b'not a mesh')


def prepare(capsys, *flags, folder='set'):
    """What `python data.py mesh set` prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sys.argv', f'data.py mesh {folder} --out o --points 4000'.split() + [*flags])
        data.main()
    return capsys.readouterr().out.splitlines()


def lists(group):
    return {side: Path(f'o/{group}/{side}.lst').read_text().split()
            for side in ('train', 'val', 'test')}


@pytest.mark.mutation('data.py', 'np.packbits(inside)', 'np.packbits(inside, bitorder="little")')
@pytest.mark.mutation('data.py', 'np.split(w.abs().numpy(), [n])', 'np.split(w.numpy(), [n])')
@pytest.mark.mutation('data.py', '(args.keep or k not in doubts)', 'True')
@pytest.mark.mutation('data.py', 'AMBIGUOUS, HOLLOW = 0.05', 'AMBIGUOUS, HOLLOW = 1')
def test_a_folder_of_meshes_becomes_the_occupancy_layout(meshes, capsys):
    *told, summary = prepare(capsys, '--split', '0.2')
    assert len(told) == 2 and told[0].startswith('table/deep__m12: ')
    assert told[1].startswith('chair/m4: ') and 'neither in nor out' in told[1]
    assert summary.endswith('1 unreadable, 1 doubtful, left out of the lists')
    listed = [i for g in ('chair', 'table') for side in lists(g).values() for i in side]
    assert sorted(listed) == sorted(f'm{k}' for k in range(12) if k != 4)
    assert all(any(lists(g)[side] for g in ('chair', 'table')) for side in ('val', 'test'))
    half = np.array([4, 2, 1]) / 8  # the longest side is 1
    for name in ('chair/m0', 'chair/m3'):
        with np.load(f'o/{name}/points.npz') as stored:
            points = stored['points'].astype(float)
            inside = np.unpackbits(stored['occupancies'])[:len(points)]
            np.testing.assert_allclose(stored['loc'], [9, 1, 0.5])
            assert stored['scale'] == 4 and points.shape == (4000, 3)
        assert np.abs(points).max() <= 0.55 and np.abs(points).max() > 0.54
        off = (np.abs(np.abs(points) - half) > 1e-6).all(1)  # of the surface: halves are exact
        assert (inside == (np.abs(points) < half).all(1))[off].all() and off.mean() > 0.99
        with np.load(f'o/{name}/pointcloud.npz') as stored:
            on = np.abs(stored['points'].astype(float)) / half
            assert np.abs(on.max(1) - 1).max() < 2e-3 and stored['normals'].shape == (4000, 3)


@pytest.mark.mutation('data.py', 'files.refuse_lost()\n    require(names', 'require(names')
def test_a_folder_that_cannot_be_listed_is_not_taken_for_removed(meshes, capsys, monkeypatch):
    prepare(capsys)
    before, scandir = lists('chair'), os.scandir

    def refusing(place):
        if Path(place).name == 'chair':
            raise PermissionError(13, 'Permission denied')
        return scandir(place)
    monkeypatch.setattr(os, 'scandir', refusing)
    with pytest.raises(OSError, match='chair: cannot be listed: Permission denied; make it'):
        prepare(capsys)
    assert lists('chair') == before


@pytest.mark.mutation('data.py', 'return solid_shares(folder, recipe) or sample_mesh',
                      'return sample_mesh(path, folder, recipe) and solid_shares(folder, recipe)'
                      ' or sample_mesh')
def test_another_process_may_remove_what_this_one_made(meshes, capsys, monkeypatch):
    first, calls = prepare(capsys), []
    sample_mesh = data.sample_mesh
    monkeypatch.setattr(data, 'solid_shares', lambda *_: None)
    monkeypatch.setattr(data, 'sample_mesh', lambda *args: calls.append(args) or sample_mesh(*args))
    assert prepare(capsys) == first
    assert len(calls) == 13


@pytest.mark.mutation('data.py', 'place not in (None, source)', 'False')
def test_a_class_of_another_folder_is_pointed_out(meshes, capsys):
    assert not any('note' in line for line in prepare(capsys) + prepare(capsys))
    Path('set').rename('moved')
    notes = [line for line in prepare(capsys, folder='moved') if 'note' in line]
    assert any(n.startswith('note: o/chair was made of ') and 'set before' in n for n in notes)


@pytest.mark.mutation('data.py', 'return solid_shares(folder, recipe) or sample', 'return sample')
def test_a_second_call_goes_on_where_the_first_stopped(meshes, capsys, monkeypatch):
    first = prepare(capsys)
    monkeypatch.setattr(data, 'read_mesh', lambda path: pytest.fail(f'{path} read again')
                        if 'm12' not in str(path) else (_ for _ in ()).throw(ValueError('m12')))
    again = prepare(capsys, '--keep')
    assert again[1] == first[1] and again[-1].endswith('1 doubtful, kept')
    assert 'm4' in sum(lists('chair').values(), [])


@pytest.mark.mutation('data.py', "if str(stored['recipe']) == json.dumps(recipe):", 'if True:')
@pytest.mark.mutation('data.py', "(folder / f'{part}.npz').unlink(missing_ok=True)", 'pass')
@pytest.mark.mutation('data.py', "np.load(folder / f'{part}.npz')['points']", 'pass')
@pytest.mark.mutation('data.py', 'except Exception:  # nothing there',
                      'except OSError:  # nothing there')
def test_what_was_made_otherwise_is_made_again(meshes, capsys):
    def stored(name):
        with np.load(f'o/chair/m0/{name}.npz') as file:
            return file['points']
    prepare(capsys, '--near', '0.5')
    first = stored('points')
    assert len(stored('near')) == 2000
    prepare(capsys, '--seed', '1', '--near', '0')
    assert not (stored('points') == first).all() and not Path('o/chair/m0/near.npz').exists()
    data.write_mesh('set/chair/m0.obj', CORNERS * [1, 1, 9], TRIANGLES)
    whole = Path('o/chair/m1/points.npz').read_bytes()
    Path('o/chair/m1/points.npz').write_bytes(whole[:len(whole) // 2])
    try:
        prepare(capsys, '--seed', '1', '--near', '0')
    except Exception as error:
        pytest.fail(f'a traceback: {error}')
    on = np.abs(stored('pointcloud').astype(float))
    np.testing.assert_allclose(on.max(0), [1 / 18, 1 / 18, 1 / 2], atol=1e-3)
    assert Path('o/chair/m1/points.npz').read_bytes() == whole
    Path('o/chair/m0/pointcloud.npz').unlink()
    cloud = Path('o/chair/m1/pointcloud.npz')
    cloud.write_bytes(cloud.read_bytes()[:-999])
    prepare(capsys, '--seed', '1', '--near', '0')
    try:
        assert len(stored('pointcloud')) == len(np.load(cloud)['points']) == 4000
    except Exception as error:
        pytest.fail(f'not made again: {error}')


@pytest.mark.mutation('data.py', "for part in ('points', 'near'):", "for part in ('near',):")
def test_a_kill_leaves_no_points_of_another_mesh(meshes, capsys, monkeypatch):
    """A mesh is replaced, the command killed between two files, and the first mesh put back."""
    def stored(name):
        return np.load(f'o/chair/m0/{name}.npz')['points'].astype(float)
    prepare(capsys, '--near', '0')
    first, save = Path('set/chair/m0.obj').read_bytes(), data.save_npz

    def killed(path, **arrays):
        save(path, **arrays)
        if path.parts[-2:] == ('m0', 'pointcloud.npz'):
            raise KeyboardInterrupt
    data.write_mesh('set/chair/m0.obj', CORNERS * [1, 1, 9], TRIANGLES)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, 'save_npz', killed)
        prepare(capsys, '--near', '0')
    Path('set/chair/m0.obj').write_bytes(first)
    prepare(capsys, '--near', '0')
    on = np.abs(stored('pointcloud'))
    np.testing.assert_allclose(on.max(0), [1 / 2, 1 / 4, 1 / 8], atol=1e-3)


@pytest.mark.mutation('data.py', "(out / group / f'{side}.lst').unlink(missing_ok=True)", 'pass')
@pytest.mark.mutation('data.py', 'and place == source', '')
@pytest.mark.mutation('data.py', 'kept | made', 'made')
@pytest.mark.mutation('data.py', "for n in listed})", "for n in self.folders})")
@pytest.mark.mutation('data.py', "not path or rows and {'id'", "not rows or {'id'")
def test_classes_come_and_go(meshes, capsys):
    """A class that is renamed is not there twice; one made of another folder stays."""
    prepare(capsys)
    Path('more/lamp').mkdir(parents=True)
    for k in range(4):
        data.write_mesh(f'more/lamp/l{k}.obj', CORNERS, TRIANGLES)
    Path('set/chair').rename('set/stool')
    prepare(capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sys.argv', 'data.py mesh more --out o --points 100'.split())
        data.main()
    shapes = data.make_dataset('shape', 'o', 'all', near=0.0)
    assert {n.split('/')[0] for n in sum(shapes.sides.values(), [])} <= {'lamp', 'stool', 'table'}
    assert shapes.groups == shapes.titles == ['lamp', 'stool', 'table']
    about = json.loads(Path('o/metadata.yaml').read_text())
    assert {*about} == {'stool', 'table', 'lamp'}
    Path('c.csv').write_text('name,kind\n')
    with pytest.raises(ValueError, match='--classes c.csv: not a CSV with'):
        prepare(capsys, '--classes', 'c.csv')


@pytest.mark.mutation('data.py', 'told = (name, key, Path(name).name, Path', 'told = (key, Path')
def test_classes_are_told_by_any_name_of_a_file(tmp_path):
    for name in ('a/x.obj', 'b/y.obj', 'b/z.obj'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, _ = data.find_meshes(tmp_path, {
        'x.obj': 'chair', 'b/y.obj': 'lamp', 'y': 'no', 'z': 'table'})
    assert {*found} == {('chair', 'x'), ('lamp', 'y'), ('table', 'z')}


@pytest.mark.mutation('data.py', 'sorted(first_names(there, root.joinpath).values(), key=natural)',
                      'there')
@pytest.mark.mutation('data.py', 'os.path.islink(path_of(n))', '0')
def test_a_mesh_with_several_names_is_used_once(meshes, capsys):
    Path('set/chair/a.obj').symlink_to('m0.obj')
    os.link('set/chair/m1.obj', 'set/table/z.obj')
    *_, summary = prepare(capsys)
    assert summary.endswith('; passed over: 2 other names (links) of those there')
    ids = [i for g in ('chair', 'table') for side in lists(g).values() for i in side]
    assert 'm0' in ids and 'a' not in ids and ('m1' in ids) != ('z' in ids)


@pytest.mark.mutation('data.py', 'if stray or len({*column}) > 1]', 'if column]')
@pytest.mark.mutation('data.py', 'if stray or len', 'if len')
@pytest.mark.mutation('data.py', 'for parts in paths if len(parts) == depth', 'for parts in paths')
@pytest.mark.mutation('data.py', "re.sub(r'[\\r\\n\\ud800-\\udfff]', '_', i)", 'i')
@pytest.mark.mutation('data.py', 'if (root / n).is_file()]', ']')
@pytest.mark.mutation('data.py', 'name=SHAPENET.get(g, g)', 'name=g')
def test_shapenet_as_it_is_unpacked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(4):
        folder = Path(f'set/03001627/id{k}/models')
        data.write_mesh(folder / 'model_normalized.obj', CORNERS, TRIANGLES)
        (folder / '._model_normalized.obj').write_bytes(b'AppleDouble')
        (folder / 'model.glb').write_bytes(b'')
    (folder / 'folder.obj').mkdir()
    (tmp_path / 'set/dangling.obj').symlink_to('nowhere.obj')
    try:
        *told, summary = prepare(capsys)
    except (OSError, ValueError) as error:
        pytest.fail(str(error))
    assert not told and summary.endswith(
        'left out of the lists; passed over: 4 .glb, 1 links that lead nowhere, or pipes')
    assert sorted(sum(lists('03001627').values(), [])) == [f'id{k}' for k in range(4)]
    assert json.loads(Path('o/metadata.yaml').read_text())['03001627']['name'] == 'chair'
    data.write_mesh('set/03001627/a/stray\n\udce9.obj', CORNERS, TRIANGLES)  # not UTF-8
    try:
        prepare(capsys)
    except ValueError as error:
        pytest.fail(str(error))
    assert sorted(sum(lists('03001627').values(), [])) == sorted(
        ['a__stray__', *(f'id{k}' for k in range(4))])


@pytest.mark.mutation('data.py', '    mesh_sides(list(found), args)', '    pass')
@pytest.mark.mutation('data.py', "    common.try_writing('--out', out)\n    mesh_sides", '    mesh_sides')
@pytest.mark.mutation('data.py', '        float(args.split)\n    except', '        pass\n    except')
def test_flags_are_refused_before_meshes_are_read(meshes, capsys, monkeypatch, tmp_path):
    (tmp_path / 'names.txt').write_text('chair/m0')
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(data, 'read_mesh', lambda path: pytest.fail('read'))
    for flags, words in (('--split names.txt', '--split names.txt: must be a fraction'),
                         ('--split 2', '--split 2'), ('--group [', 'not a regular expression'),
                         ('--out file/x', '--out: nothing can be written')):
        with pytest.raises(ValueError, match=words):
            prepare(capsys, *flags.split())


@pytest.mark.mutation('data.py', '        except OSError as error:  # those of writing',
                      '        except KeyError as error:  # those of writing')
@pytest.mark.mutation('data.py', 'sample_mesh(path, folder, recipe)\n        except ValueError',
                      'sample_mesh(path, folder, recipe)\n        except (ValueError, OSError)')
def test_a_full_disk_is_no_fault_of_the_meshes(meshes, capsys, monkeypatch, tmp_path):
    def full(path, **arrays):
        raise OSError(f'{path}: not written, the disk is full')
    with monkeypatch.context() as patch, pytest.raises(
            (OSError, ValueError), match='the disk is full'):
        patch.setattr(data, 'save_npz', full)
        prepare(capsys)

    def recipe(path, args, known=data.mesh_recipe):
        if path.name == 'm7.obj':
            raise OSError('cannot be read')
        return known(path, args)
    monkeypatch.setattr(data, 'mesh_recipe', recipe)
    try:
        assert 'table/m7: cannot be read' in prepare(capsys)
    except OSError as error:
        pytest.fail(str(error))


@pytest.mark.mutation('data.py', 'or self.folders\n', 'if given else self.folders\n')
def test_what_is_left_out_of_the_lists_is_not_trained_on(meshes, capsys):
    """Without held-out shapes, too."""
    prepare(capsys, '--split', '0')
    shapes = data.make_dataset('shape', 'o', 'all')
    assert len(shapes) == 11 and 'chair/m4' not in shapes.names


def test_meshes_that_cannot_be_prepared(meshes, capsys, tmp_path):
    for k in range(3):
        (tmp_path / 'set' / f'bad{k}.ply').write_bytes(b'ply')
    with pytest.raises(ValueError, match='4 of 16 meshes cannot be read'):
        prepare(capsys)
    with pytest.raises(ValueError, match='not a folder'):
        data.find_meshes(tmp_path / 'nowhere', {})
    data.write_mesh(tmp_path / 'set/chair/m0.stl', CORNERS, TRIANGLES)
    with pytest.raises(ValueError, match='would get the same name'):
        prepare(capsys)
