"""Data: closed-form toys, every kind of picture file, splits, crops, and what bad data get."""
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from torch.utils.data import DataLoader

import common
import data
import encoders
import metrics

FULL = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])


def noise(height, width, seed=0):
    """Smooth random uint8 picture (H,W,3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), 'uint8')
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Twelve 40 x 48 pictures p0.png .. p11.png."""
    for k in range(12):
        write(tmp_path / 'set' / f'p{k}.png', noise(40, 48, k))
    return tmp_path / 'set'


def pictures(root, split='all', resolution=16, **options):
    return data.make_dataset('image', root, split, resolution=resolution, **options)


def only(path, R=32):
    """The one picture in a file's folder, uint8 (R,R,3)."""
    return data.to_uint8(pictures(path.parent).picture(0, R)).permute(1, 2, 0).numpy()


# ---- pictures in and out ------------------------------------------------------------------------

@pytest.mark.mutation('data.py', 'x * 127.5 + 128', 'x * 127.5 + 127')
@pytest.mark.mutation('data.py', '.float() / 127.5 - 1', '.float() / 128 - 1')
def test_uint8_round_trip():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(bytes_)), bytes_)
    assert data.to_float(bytes_)[[0, 255]].tolist() == [-1, 1]
    assert data.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.mutation('data.py', 'x.shape[3]] = picture', 'x.shape[3]] = x[0]')
def test_grid_goes_row_by_row_with_white_between(tmp_path):
    x = torch.linspace(-1, 0.9, 5)[:, None, None, None].expand(5, 3, 4, 6)
    data.save_grid(tmp_path / 'new' / 'grid.png', x, columns=3, pad=2)
    grid = np.asarray(Image.open(tmp_path / 'new' / 'grid.png'))
    assert grid.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    assert (grid[2:6, 10:16] == data.to_uint8(x)[1, 0, 0, 0].item()).all()
    assert (grid[8:12, 2:8] == data.to_uint8(x)[3, 0, 0, 0].item()).all()
    assert (grid[:, :2] == 255).all() and (grid[8:12, 18:] == 255).all()


@pytest.mark.mutation('data.py', 'require(kind in Image.SAVE, ', 'require(kind, ')
def test_pictures_are_written_as_what_can_be_written(tmp_path):
    assert data.picture_kind('a/x.webp') == 'WEBP'
    for name in ('x.psd', 'x', 'x.nonsense'):
        with pytest.raises(ValueError, match=f'{name}: a picture is written as'):
            data.picture_kind(name)


@pytest.mark.mutation('data.py', 'columns or max(squares //', 'max((columns or squares) //')
@pytest.mark.mutation('data.py', 'max(squares // max(x.shape[3] // x.shape[2], 1), 1)', 'squares')
@pytest.mark.mutation('data.py', '// max(x.shape[3] // x.shape[2], 1), 1)',
                      '// max(x.shape[3] // x.shape[2], 1), 2)')
@pytest.mark.mutation('data.py', 'save_png(path, image_grid(x, columns, pad, room))',
                      'save_png(path, image_grid(x, columns, pad))')
def test_columns_of_a_grid_of_strips(tmp_path):
    """Nine of two squares each: a row of so many, or in the room of so many squares."""
    for layout, columns in ((dict(columns=5), 5), (dict(columns=20), 9), (dict(room=5), 2),
                            (dict(room=1), 1), ({}, 1)):
        data.save_grid(tmp_path / 'grid.png', torch.zeros(9, 3, 2, 4), pad=1, **layout)
        width, height = Image.open(tmp_path / 'grid.png').size
        assert (width, height) == (5 * columns + 1, 3 * -(-9 // columns) + 1)


@pytest.mark.mutation('data.py', "tick = 10 if Path(path).suffix == '.gif' else 1", 'tick = 1')
def test_gifs_last_as_long_as_they_should(tmp_path):
    """Hundredths of a second are what they count in."""
    frames = [torch.full((3, 4, 4), 10 * k, dtype=torch.uint8) for k in range(15)]
    data.save_animation(tmp_path / 'x.gif', frames, 1 / 15)
    with Image.open(tmp_path / 'x.gif') as film:
        lasts = [film.seek(k) or film.info['duration'] for k in range(15)]
    assert sum(lasts) == 1000 and {*lasts} == {60, 70}


@pytest.mark.mutation('data.py', 'x.cpu().permute(1, 2, 0).numpy()) for',
                      'x.permute(1, 2, 0).numpy()) for')
def test_animations_of_frames_on_a_card(tmp_path):
    frames = torch.arange(2 * 3 * 4 * 6, dtype=torch.uint8).view(2, 3, 4, 6)
    on_card = [mock.Mock(spec=['cpu'], cpu=mock.Mock(return_value=frame)) for frame in frames]
    try:
        data.save_animation(tmp_path / 'x.webp', on_card)
    except AttributeError as error:
        pytest.fail(str(error))
    with Image.open(tmp_path / 'x.webp') as film:
        film.seek(1)
        assert (np.asarray(film.convert('RGB')) == frames[1].permute(1, 2, 0).numpy()).all()


# ---- toy_image ----------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', '(np.arange(width) + 0.5)', '(np.arange(width) + 0.4)')
@pytest.mark.mutation('data.py', '(np.arange(height) + 0.5)', '(np.arange(height) + 0.6)')
def test_toy_is_a_function_of_position():
    seeds = [3, 2 ** 30, 11]
    coarse = data.toy_image(seeds, (20, 32))
    fine = data.toy_image(seeds, (60, 96))
    assert coarse.shape == (3, 3, 20, 32) and coarse.dtype == torch.float32
    assert coarse.abs().max() <= 1
    assert torch.allclose(fine[:, :, 1::3, 1::3], coarse, atol=1e-4)  # centre of 3 x 3 cells
    assert torch.equal(data.toy_image(seeds, (20, 32)), coarse)
    alone = torch.cat([data.toy_image([s], (20, 32)) for s in seeds])
    assert torch.allclose(alone, coarse, atol=1e-5)


@pytest.mark.mutation('data.py', 'y = (y0 + (y1 - y0)', 'y = (y0 + (y1 - x0)')
def test_toy_crop_is_a_slice_of_the_frame():
    whole = data.toy_image([5], 48)
    box = [[-1 + 2 * 12 / 48, -1 + 2 * 36 / 48], [-1 + 2 * 7 / 48, -1 + 2 * 23 / 48]]
    assert torch.allclose(data.toy_image([5], (16, 24), box), whole[:, :, 7:23, 12:36], atol=1e-4)


@pytest.mark.mutation('data.py', 'TOY_EDGE = 2 / 128', 'TOY_EDGE = 2 / 512')
@pytest.mark.mutation('data.py', 'TOY_EDGE = 2 / 128', 'TOY_EDGE = 2 / 16')
def test_toy_edges_are_smooth_over_a_128th_of_the_box():
    """A smoothstep of width w climbs by at most 1.5 h / w over h; colours differ by 2 at most."""
    steepest = 0
    for seed in range(6):
        x = data.toy_image([seed], 768)
        steepest = max(steepest, x.diff(dim=2).abs().max(), x.diff(dim=3).abs().max())
    limit = 2 * 1.5 * (2 / 768) / (2 / 128)
    assert 0.4 * limit < steepest < limit


@pytest.mark.mutation('data.py', '/ np.hypot(c - a, d - b)', '/ 1')
def test_toy_polygon_is_a_distance():
    square = (-1, -1), (1, -1), (1, 1), (-1, 1)
    wide = tuple((3 * a, b) for a, b in square)
    for x, y, expected in ((0, 0, -1), (2.5, 0, -0.5), (4, 0.5, 1), (0, -3, 2)):
        assert data.polygon(np.float64(x), np.float64(y), *wide) == pytest.approx(expected)


@pytest.mark.mutation('data.py', 'test=(2 ** 30, 1_000)', 'test=(19_999, 1_000)')
def test_toy_splits_share_no_seed():
    train, test, both = (data.make_dataset('toy_image', split=s, resolution=32)
                         for s in ('train', 'test', 'all'))
    assert (len(train), len(test), len(both)) == (20_000, 1_000, 21_000)
    assert not set(train.numbers) & set(test.numbers)
    assert torch.equal(train.picture(7, 24), data.toy_image([7], 24)[0])
    assert torch.equal(test.picture(7, 24), data.toy_image([2 ** 30 + 7], 24)[0])
    for wrong in (dict(holdout='0.5'), dict(group='x'), dict(captions='a.csv')):
        with pytest.raises(ValueError, match='computed, with a fixed split'):
            data.make_dataset('toy_image', resolution=32, **wrong)


@pytest.mark.mutation('data.py', 'if not -len(self) <= i < len(self):', 'if False:')
def test_a_data_set_ends_where_it_ends(tmp_path):
    for k in range(3):
        data.save_png(tmp_path / f'{k}.png', torch.zeros(3, 8, 8))
    pictures = data.make_dataset('image', tmp_path, 'all', resolution=8)
    assert [len([*pictures]) for _ in range(3)] == [3, 3, 3]


@pytest.mark.mutation('data.py', 'x0 = R - left - r if flip else left', 'x0 = left')
def test_toy_items_are_crops_of_the_flipped_picture():
    dataset = data.make_dataset('toy_image', resolution=16, scales=(1, 1.5, 2), flip=True)
    flips = 0
    for k in range(30):
        item = dataset.item(k, common.seeded('item', 0, k))
        flipped = torch.allclose(item['image'], dataset.picture(k, 16).flip(-1), atol=1e-4)
        check_crop(item, dataset.picture(k, round(16 / item['scale'].item())), flipped, 1e-3)
        flips += flipped
    assert 5 < flips < 25


def check_crop(item, whole, flipped, atol=0.0):
    """The target is the part of the (flipped) whole picture that the box says."""
    r, R = item['target'].shape[-1], whole.shape[-1]
    (x0, _), (y0, _) = ((item['box'] + 1) / 2 * R).round().int().tolist()
    assert torch.allclose(item['box'][:, 1] - item['box'][:, 0], torch.tensor(2 * r / R))
    whole = whole.flip(-1) if flipped else whole
    assert torch.allclose(item['target'], whole[:, y0:y0 + r, x0:x0 + r], atol=atol)
    assert item['scale'].item() == pytest.approx(r / R)


# ---- picture files ------------------------------------------------------------------------------

def rgba(alpha):
    return np.full((40, 40, 4), (200, 100, 0, alpha), 'uint8')


def palette():
    image = Image.fromarray(np.full((40, 40), 1, 'uint8'), 'L')
    image = image.convert('P')
    image.putpalette([9, 9, 9, 200, 100, 0])
    return image


PICTURES = {  # what is written, how, and the RGB that must come back
    'opaque.png': (rgba(255), {}, (200, 100, 0)),
    'clear.webp': (rgba(0), {'lossless': True}, (255, 255, 255)),
    'half.png': (rgba(128), {}, (227, 177, 127)),
    'grey_alpha.png': (Image.fromarray(rgba(0)).convert('LA'), {}, (255, 255, 255)),
    'grey.png': (np.full((40, 40), 77, 'uint8'), {}, (77, 77, 77)),
    'bits.png': (np.ones((40, 40), bool), {}, (255, 255, 255)),
    'palette.png': (palette(), {}, (200, 100, 0)),
    'palette_clear.png': (palette(), {'transparency': 1}, (255, 255, 255)),
    'rgb_key.png': (rgba(255)[..., :3], {'transparency': (200, 100, 0)}, (255, 255, 255)),
    'cmyk.jpg': (Image.new('CMYK', (40, 40), (0, 255, 255, 0)), {}, (254, 0, 0)),
    'sixteen.png': (np.full((40, 40), 200 * 257, 'uint16'), {}, (200, 200, 200)),
    'sixteen_dark.png': (np.full((40, 40), 257, 'uint16'), {}, (1, 1, 1)),
    'thirty_two.tif': (np.full((40, 40), 200 * 257, 'int32'), {}, (200, 200, 200)),
    'unit_float.tif': (np.full((40, 40), 0.4, 'float32'), {}, (102, 102, 102)),
    'byte_float.tif': (np.full((40, 40), 102.2, 'float32'), {}, (102, 102, 102)),
    'moving.gif': (palette(), {'save_all': True, 'append_images': [Image.new('P', (40, 40))]},
                   (200, 100, 0)),
    'moving.webp': (rgba(255), {'save_all': True, 'lossless': True, 'append_images':
                                [Image.new('RGBA', (40, 40), 'blue')]}, (200, 100, 0))}


@pytest.mark.mutation('data.py', "im.size, 'white'", "im.size, 'black'")
@pytest.mark.mutation('data.py', 'else 2 ** 16 - 1)', 'else 255 * 256)')
@pytest.mark.mutation('data.py', "scale = 255 if im.mode == 'F' and peak < 2 else 1", 'scale = 1')
@pytest.mark.mutation('data.py', "or 'transparency' in im.info", '')
def test_every_mode_becomes_rgb(tmp_path):
    for name, (picture, options, expected) in PICTURES.items():
        (tmp_path / name).mkdir()
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        image.save(tmp_path / name / name, **options)
        got = only(tmp_path / name / name)
        assert np.abs(got - np.array(expected)).max() <= name.endswith('jpg'), (name, got[0, 0])


def tiff(bits, row):
    """A grey TIFF of one row of two pixels."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 12 * 8 + 4, 278: 1,
            279: len(row)}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + row


@pytest.mark.mutation('data.py', "2 ** 12 - 1 if stored == 'I;12' else", '')
@pytest.mark.mutation('data.py', 'stored[0] if isinstance(stored, tuple) else stored', 'stored')
@pytest.mark.mutation('data.py', 'peak < 2', 'peak <= 1')
def test_greys_of_more_than_8_bits_keep_their_range(tmp_path):
    for bits, row in ((8, b'\x40\xff'), (12, b'\x40\x4f\xff'), (16, b'\x40\x40\xff\xff')):
        got = tried(tmp_path / f'{bits}.tif', tiff(bits, row))
        assert got[..., 0].tolist() == [[64, 255]], bits
    above = Image.fromarray(np.array([[0.4, 1.004]], 'float32'))  # as resampling leaves it
    assert np.asarray(data.eight_bit(above, None)).tolist() == [[102, 255]]


@pytest.mark.mutation('data.py', 'turn = im.getexif().get(0x112)', 'turn = None')
def test_exif_orientation_is_applied(tmp_path):
    upright = noise(24, 24)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.swapaxes(0, 1), 6: np.rot90(upright), 8: np.rot90(upright, -1),
              7: upright[::-1, ::-1].swapaxes(0, 1)}
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = write(tmp_path / str(orientation) / 'a.png', np.ascontiguousarray(array), exif=exif)
        assert (only(path, 24) == upright).all(), orientation


def chunk(kind, body, checksum=None):
    """A chunk of a PNG."""
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', checksum)


def grey_png(depth, colour, row, *chunks):
    """An 8 x 8 PNG of equal rows, grey (colour 0), RGB (2) or with a palette (3)."""
    header = struct.pack('>IIBBBBB', 8, 8, depth, colour, 0, 0, 0)
    return b''.join([b'\x89PNG\r\n\x1a\n', chunk(b'IHDR', header), *chunks,
                     chunk(b'IDAT', zlib.compress((b'\0' + row) * 8)), chunk(b'IEND', b'')])


def tried(path, content):
    """uint8 (H,W,3) of a picture of these bytes, or why there is none."""
    path.write_bytes(content)
    try:
        return np.asarray(data.find_files(path).open(path.name, data.to_rgb))
    except Exception as error:
        return data.reason(error)


@pytest.mark.mutation('data.py', 'values == clear, 0, 255', 'values < clear, 0, 255')
@pytest.mark.mutation('data.py', 'im = eight_bit(im, clear, stored)', 'im = eight_bit(im, None, stored)')
@pytest.mark.mutation('data.py', "'L;2': 85, 'L;4': 17", "'L;2': 85")
@pytest.mark.mutation('data.py', 'value >> 8 for value in clear', 'value for value in clear')
def test_the_colour_that_a_png_calls_transparent_is_white(tmp_path):
    """Greys of all depths, 16 bits a channel, palettes: the pixels of the key turn white."""
    keyed = {  # depth, colour, a row, its key; the first values in 8 bits, None for transparent
        'one': (1, 0, b'\x50', b'\0\0', [None, 255, None, 255]),
        'two': (2, 0, b'\x6c\0', b'\0\1', [None, 170, 255, 0]),
        'four': (4, 0, b'\x51\x2f\0\0', b'\0\5', [None, 17, 34, 255]),
        'eight': (8, 0, bytes([5, 6, 4, 0] * 2), b'\0\5', [None, 6, 4, 0]),
        'sixteen': (16, 0, struct.pack('>8H', *[300, 302, 299, 50 * 257] * 2), b'\1\x2c',
                    [None, 1, 1, 50]),
        'none of them': (16, 0, struct.pack('>8H', *[0, 257, 514, 0] * 2), b'\1\2', [0, 1, 2, 0])}
    for name, (depth, colour, row, key, expected) in keyed.items():
        got = tried(tmp_path / 'a.png', grey_png(depth, colour, row, chunk(b'tRNS', key)))
        expected = [255 if v is None else v for v in expected]
        assert got[0, :4].tolist() == [[v] * 3 for v in expected], name
    row = struct.pack('>24H', *([300, 5000, 60000] + [300, 5000, 50000]) * 4)
    got = tried(tmp_path / 'a.png', grey_png(16, 2, row, chunk(b'tRNS', row[:6])))
    assert got[0, :2].tolist() == [[255] * 3, [1, 19, 195]]
    row, colours = bytes([0, 1] * 4), chunk(b'PLTE', bytes([9, 8, 7, 6, 5, 4]))
    got = tried(tmp_path / 'a.png', grey_png(8, 3, row, colours, chunk(b'tRNS', b'\xff' * 300)))
    assert np.ndim(got) and got[0, :2].tolist() == [[9, 8, 7], [6, 5, 4]]  # more than there are


def segment(kind, body):
    """A segment of a JPEG."""
    return bytes([255, kind]) + struct.pack('>H', len(body) + 2) + body


def exif(*more, orientation=6):
    """EXIF with an orientation and more entries (tag, type, count, 4 bytes)."""
    entries = [(0x112, 3, 1, struct.pack('<HH', orientation, 0)), *more]
    return b'II*\0' + struct.pack('<IH', 8, len(entries)) + b''.join(
        struct.pack('<HHI', *e[:3]) + e[3] for e in entries) + b'\0' * 4


TURNED = {  # EXIF that turns: every value but the orientation is one that cannot be written back
    'sound': exif(), 'text for a ratio': exif((0x11a, 2, 2, b'x\0\0\0')),
    'bytes for a ratio': exif((0x11b, 7, 4, b'\xff' * 4)),
    'negative': exif((0x11a, 9, 1, b'\xfb' + b'\xff' * 3)),
    'text for a number': exif((0x100, 2, 4, b'abc\0')),
    'a ratio for text': exif((0x132, 5, 1, struct.pack('<I', 9))),
    'no offset': exif((0x10f, 2, 99, b'\xff' * 4)),
    'unknown type': exif((0x9999, 77, 1, b'abcd')), 'inner': exif((0x8769, 4, 1, b'\x08\0\0\0')),
    'far': exif((0x8769, 4, 1, b'\xff' * 4))}
PLAIN = {'none': b'', 'garbage': b'no TIFF', 'cut': exif()[:14], 'odd': exif(orientation=9),
         'nowhere': b'II*\0' + b'\xff' * 4, 'big': b'II+\0' + exif()[4:],
         'a float': exif().replace(struct.pack('<HHIHH', 0x112, 3, 1, 6, 0),
                                   struct.pack('<HHIf', 0x112, 11, 1, 6))}
XMP = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
ODD_CHUNKS = {
    'pHYs': chunk(b'pHYs', b'\0'), 'cHRM': chunk(b'cHRM', b'abc'), 'sRGB': chunk(b'sRGB', b''),
    'iCCP': chunk(b'iCCP', b'name\0\5abc'), 'no iCCP': chunk(b'iCCP', b''),
    'long zTXt': chunk(b'zTXt', b'k\0\0' + zlib.compress(bytes(3_000_000))),
    'zTXt': chunk(b'zTXt', b'k\0\7abc'), 'checksum': chunk(b'tEXt', b'k\0v', 5),
    'private': chunk(b'abCd', b'x', 5), 'acTL': chunk(b'acTL', b'\0'),
    'fcTL': chunk(b'fcTL', bytes(26)), 'fdAT': chunk(b'fdAT', b'\0')}
ODD_SEGMENTS = {
    'JFIF': segment(0xe0, b'JFIF\0'), 'Adobe': segment(0xee, b'Adobe'), 'junk': b'\0\0\0',
    'ICC': segment(0xe2, b'ICC_PROFILE\0'), 'MPF': segment(0xe2, b'MPF\0nothing'),
    'Photoshop': segment(0xed, b'Photoshop 3.0\x008BIM\3\xed'), 'comment': segment(0xfe, b'\xff'),
    'both': segment(0xe0, b'JFIF\0') + segment(0xee, b'Adobe')}


def encoded(picture, suffix, **options):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, suffix, **options)
    return stream.getvalue()


@pytest.mark.mutation('data.py', '        turn = None\n', '        raise\n')
@pytest.mark.mutation('data.py', '= im.getexif().get(0x112)', '= im.getexif().tobytes() and 6')
@pytest.mark.mutation('data.py', "('tRNS eXIf acTL fcTL fdAT', 'tRNS eXIf', 'eXIf')", "('tRNS',)")
@pytest.mark.mutation('data.py', "'e1 ee', 'e0 e1', 'e1')", "'ee', 'e0')")
@pytest.mark.mutation('data.py', 'if isinstance(turn, int) and turn in', 'if turn in')
def test_metadata_turn_a_picture_and_no_more(tmp_path):
    upright = noise(16, 24)
    jpeg, png = encoded(upright, 'jpeg'), encoded(upright, 'png')
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    for turned, kinds in ((True, TURNED), (False, PLAIN)):
        for name, tags in kinds.items():
            for odd in (b'', ODD_SEGMENTS['both']):
                content = jpeg[:2] + odd + segment(0xe1, b'Exif\0\0' + tags) + jpeg[2:]
                got = tried(tmp_path / 'a.jpg', content)
                assert np.array_equal(got, np.rot90(decoded, -1) if turned else decoded), name
            for odd in (b'', ODD_CHUNKS['pHYs']):
                content = png[:33] + odd + chunk(b'eXIf', tags) + png[33:]
                got = tried(tmp_path / 'a.png', content)
                assert np.array_equal(got, np.rot90(upright, -1) if turned else upright), name
            content = encoded(upright, 'webp', lossless=True, exif=b'Exif\0\0' + tags)
            got = tried(tmp_path / 'a.webp', content)
            assert np.array_equal(got, np.rot90(upright, -1) if turned else upright), name


@pytest.mark.mutation('data.py', "('xmp', 'XML:com.adobe.xmp')", "('XML:com.adobe.xmp',)")
@pytest.mark.mutation('data.py', "('xmp', 'XML:com.adobe.xmp')", "('xmp',)")
def test_xmp_turns_no_picture(tmp_path):
    """As in browsers."""
    upright = noise(16, 24)
    jpeg, png = encoded(upright, 'jpeg'), encoded(upright, 'png')
    body = b'http://ns.adobe.com/xap/1.0/\0' + XMP
    assert np.array_equal(tried(tmp_path / 'a.jpg', jpeg[:2] + segment(0xe1, body) + jpeg[2:]),
                          np.asarray(Image.open(io.BytesIO(jpeg))))
    text = chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + XMP)
    assert np.array_equal(tried(tmp_path / 'a.png', png[:33] + text + png[33:]), upright)
    content = encoded(upright, 'webp', lossless=True, xmp=XMP)
    assert np.array_equal(tried(tmp_path / 'a.webp', content), upright)


@pytest.mark.mutation('data.py', 'for data in without_metadata(data):', 'for data in ():')
@pytest.mark.mutation('data.py', 'kept in choices:', 'kept in choices[:1]:')
@pytest.mark.mutation('data.py', "if needed or zlib", "if True or zlib")
@pytest.mark.mutation('data.py', "for key in ('xmp', 'XML:com.adobe.xmp'):", 'for key in ():')
def test_what_pillow_stumbles_over_is_left_out(tmp_path):
    picture = noise(16, 24)
    jpeg, png = encoded(picture, 'jpeg'), encoded(picture, 'png')
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    for name, odd in ODD_CHUNKS.items():
        for place in (33, -12):  # before and after the pixels
            assert np.array_equal(tried(tmp_path / 'a.png', png[:place] + odd + png[place:]),
                                  picture), name
    damaged = png[:33] + chunk(b'eXIf', exif(), 5) + png[33:]
    assert np.array_equal(tried(tmp_path / 'a.png', damaged), picture)
    for name, odd in ODD_SEGMENTS.items():
        assert np.array_equal(tried(tmp_path / 'a.jpg', jpeg[:2] + odd + jpeg[2:]), decoded), name
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700], tags[700] = 2, 'XMP that is no bytes'
    tiff = encoded(picture, 'tiff', tiffinfo=tags)
    assert np.array_equal(tried(tmp_path / 'a.tif', tiff), picture)
    (tmp_path / 'a.png').write_bytes(png[:33] + ODD_CHUNKS['pHYs'] + png[33:])
    assert not pictures(tmp_path / 'a.png').bad  # by its header, too


@pytest.mark.mutation('data.py', 'raise explained(data, error)', 'raise error')
@pytest.mark.mutation('data.py', "return OSError('an empty file')", 'data = b"x"')
@pytest.mark.mutation('data.py', "return OSError(f'{kind}: {why}')", 'continue')
def test_the_reason_is_the_real_one(tmp_path):
    png = encoded(noise(40, 40), 'png')
    for content, why in ((b'', 'an empty file'), (png[:-300], 'truncated'),
                         (png[:29] + b'abcd' + png[33:], "PNG: .*checksum in b'IHDR'"),
                         (png[:29] + b'abcd' + ODD_CHUNKS['pHYs'] + png[33:], "in b'IHDR'"),
                         (b'<!DOCTYPE html>', 'no picture: it begins with b.<!DOCTYPE html>')):
        assert re.search(why, str(tried(tmp_path / 'a.png', content))), why


@pytest.mark.mutation('data.py', '(width - side) // 2', '0')
@pytest.mark.mutation('data.py', '(height - side) // 2', '0')
def test_the_centre_square_is_taken(tmp_path):
    wide = noise(33, 57)
    assert (only(write(tmp_path / 'w' / 'a.png', wide), 33) == wide[:, 12:45]).all()
    tall = noise(57, 33)
    assert (only(write(tmp_path / 'h' / 'a.png', tall), 33) == tall[12:45]).all()
    assert pictures(tmp_path / 'w', resolution=21)[0]['image'].shape == (3, 21, 21)


@pytest.mark.mutation('data.py', 'Image.Resampling.BICUBIC', 'Image.Resampling.NEAREST')
def test_shrinking_is_antialiased(tmp_path):
    board = np.indices((96, 96)).sum(0) % 2 * 255
    path = write(tmp_path / 'a' / 'a.png', np.repeat(board[..., None], 3, 2).astype('uint8'))
    assert np.abs(only(path, 16).astype(int) - 127).max() < 8


@pytest.mark.mutation('data.py', 'int(p) if k % 2 else p', 'p')
@pytest.mark.mutation('data.py', r"(^|/)(\.|__MACOSX/|lost\+found/|@eaDir/|\$RECYCLE\.BIN/)", r'(^|/)nothing')
def test_names_are_natural_and_hidden_files_are_none(tmp_path):
    for name in ('b/x/p10.png', 'b/x/p9.PNG', 'p2.png', '.hidden/q.png', '__MACOSX/._p2.png'):
        write(tmp_path / name, noise(16, 16))
    (tmp_path / 'captions.csv').write_text('p2,hello')
    os.symlink(tmp_path, tmp_path / 'b' / 'round')  # a link back up must not be followed for ever
    assert pictures(tmp_path).names == ['b/x/p9.PNG', 'b/x/p10.png', 'p2.png']


def zipped(folder):
    path = folder.with_name('set.zip')
    with zipfile.ZipFile(path, 'w') as file:
        for picture in sorted(folder.rglob('*.png')):
            file.write(picture, picture.relative_to(folder))
        file.writestr('dataset.json', '{}')
    return path


@pytest.mark.mutation('data.py', '!= os.getpid():  #', '== None:  #')
def test_a_zip_is_a_folder(folder, monkeypatch):
    plain, packed = pictures(folder), pictures(zipped(folder))
    assert plain.names == packed.names
    packed = pickle.loads(pickle.dumps(packed))  # as a spawned worker gets it
    first = packed.files.file()
    monkeypatch.setattr(os, 'getpid', lambda: -1)  # as in a forked worker
    assert packed.files.file() is not first
    monkeypatch.undo()
    loader = DataLoader(packed, batch_size=3, num_workers=2)
    got = torch.cat([batch['image'] for batch in loader])
    assert torch.equal(got, torch.stack([item['image'] for item in map(plain.item, range(12))]))


@pytest.mark.mutation('data.py', '            if place in seen:\n', '            if False:\n')
@pytest.mark.mutation('data.py', 'todo.append if link else todo.appendleft', 'todo.appendleft')
@pytest.mark.mutation('data.py', 'found.setdefault(identity(path_of(name)), name)',
                      'found.setdefault(name, name)')
@pytest.mark.mutation('data.py', 'key=lambda n: os.path.islink(path_of(n))', 'key=natural')
def test_a_picture_with_several_names_is_used_once(folder):
    """By links of folders, of files, and hard ones; the name that is no link stays."""
    os.symlink('set', folder.parent / 'other')
    os.symlink(folder, folder / 'again')
    os.makedirs(folder / 'deep')
    shutil.move(folder / 'p0.png', folder / 'deep' / 'p0.png')
    for name in ('above', 'very'):
        os.symlink('deep', folder / name)
    for k in range(1, 5):
        os.symlink(f'p{k}.png', folder / f'a{k}.png')
    os.link(folder / 'p7.png', folder / 'p99.png')
    dataset = pictures(folder.parent / 'other', tolerant=True)
    assert dataset.names == ['deep/p0.png', *(f'p{k}.png' for k in range(1, 12))]
    assert sorted(sum(dataset.splits().values(), [])) == sorted(dataset.names)
    assert dataset.notes == ['5 pictures left out: other names (links) of those there',
                             'passed over: 3 folders under a second name']


@pytest.mark.mutation('data.py', "(side, name) for side in ('train', 'test')",
                      "(side, name) for side in ('test', 'train')")
@pytest.mark.mutation('data.py', 'for n in dict.fromkeys(names) if (side, n) in used]',
                      'for n in names if (side, n) in used]')
@pytest.mark.mutation('data.py', "self.header(n) if n in known else\n",
                      "self.header(n) if True else\n")
def test_what_a_split_lists_is_used_once_and_on_one_side(folder):
    os.symlink('p1.png', folder / 'link.png')
    shutil.copy(folder / 'p5.png', folder / '.hidden.png')
    sides = dict(train=['p1.png', 'p2.png', 'p2.png', '.hidden.png'], test=['link.png', 'p3.png'])
    train, test = (pictures(folder, side, holdout=sides) for side in ('train', 'test'))
    assert (train.names, test.names) == (['p2.png'], ['link.png', 'p3.png'])
    assert train.splits()['train'] == ['p2.png', '.hidden.png']
    assert train.bad == [('.hidden.png', 'not there')]


@pytest.mark.mutation('data.py', 'posixpath.normpath(n): n for n', 'n: n for n')
@pytest.mark.mutation('data.py', 'self.file().open(self.entries[name])',
                      'self.file().open([n for n in self.file().infolist() if '
                      'n.filename == self.entries[name]][0])')
def test_an_entry_that_a_zip_lists_twice_is_one_picture(folder):
    with zipfile.ZipFile(folder / 'set.zip', 'w') as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, picture in (('a/x.png', 'p0'), ('a/x.png', 'p1'), ('./a/y.png', 'p2'),
                              ('a//y.png', 'p3')):
            file.writestr(name, (folder / f'{picture}.png').read_bytes())
    dataset = pictures(folder / 'set.zip')
    assert dataset.names == ['a/x.png', 'a/y.png']
    assert dataset.notes == ['passed over: 2 entries listed again']
    own = pictures(folder)
    for k, name in enumerate(['p1.png', 'p3.png']):  # the later one, as unzip has it
        assert torch.equal(dataset.picture(k, 16), own.picture(own.names.index(name), 16))


@pytest.mark.mutation('data.py', "self.lost.append((inner, f'cannot be listed", "str((inner, f'")
@pytest.mark.mutation('data.py', '[*self.files.lost, *((n, h)', '[*((n, h)')
@pytest.mark.mutation('data.py', 'for folder, why in files.lost:', 'for folder, why in ():')
@pytest.mark.mutation('data.py', 'for inner, why in self.lost:', 'for inner, why in ():')
def test_a_folder_that_cannot_be_listed_is_said(folder, monkeypatch):
    write(folder / 'sub' / 'x.png', noise(16, 16))
    listed = os.scandir

    def refuse(path):
        if str(path).rstrip('/').endswith('sub'):
            raise PermissionError(13, 'Permission denied', str(path))
        return listed(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    assert pictures(folder).bad == [('sub/', 'cannot be listed: Permission denied')]
    with pytest.raises(ValueError, match='sub: cannot be listed: Permission denied'):
        pictures(folder / 'sub')
    with pytest.raises(OSError, match='sub: cannot be listed: Permission denied; make it'):
        metrics.all_files(folder)


@pytest.fixture
def pipe(tmp_path):
    """A named pipe at which whoever waits to read finds the end."""
    path, done = tmp_path / 'pipe', threading.Event()
    os.mkfifo(path)

    def end():
        while not done.wait(0.01):
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody reads
                pass
    threading.Thread(target=end, daemon=True).start()
    yield path
    done.set()


@pytest.mark.mutation('common.py', 'if not Path(path).is_file() and Path(path).exists():',
                      'if Path(path).is_dir():')
@pytest.mark.mutation('common.py', 'return regular(path).read_text', 'return Path(path).read_text')
@pytest.mark.mutation('data.py', 'isinstance(file, Path) and common.regular(file)',
                      'isinstance(file, Path)')
@pytest.mark.mutation('data.py', 'require(root.is_dir() or root.is_file(), f', 'require(True, f')
@pytest.mark.mutation('data.py', 'data = common.regular(path).read_bytes()\n    try',
                      'data = path.read_bytes()\n    try')
@pytest.mark.mutation('data.py', 'zipfile.ZipFile(common.regular(path))', 'zipfile.ZipFile(path)')
@pytest.mark.mutation('data.py', "open(common.regular(self.root / name), 'rb')",
                      "open(self.root / name, 'rb')")
@pytest.mark.mutation('encoders.py', 'if regular(path).suffix', 'if Path(path).suffix')
@pytest.mark.mutation('encoders.py', 'np.load(regular(path))', 'np.load(path)')
def test_pipes_are_not_waited_for(folder, pipe, monkeypatch):
    """In whatever a user can name, or has in a folder."""
    os.symlink(pipe, folder / 'x.png')
    why = 'a folder, pipe or device where a file is needed'
    assert pictures(folder).bad == [('x.png', f'OSError: {folder}/x.png: {why}')]
    with pytest.raises(ValueError, match='pipe: neither a folder nor a file'):
        pictures(pipe)
    for suffix in ('obj', 'xyz', 'npy', 'npz', 'safetensors'):
        os.symlink(pipe, pipe.with_name(f'x.{suffix}'))
    x = str(pipe.with_name('x.'))
    for read in (lambda: data.read_mesh(x + 'obj'), lambda: data.read_cloud(x + 'xyz', 9),
                 lambda: data.read_split(pipe), lambda: data.read_captions(pipe),
                 lambda: data.read_classes(pipe), lambda: common.read_text(pipe),
                 lambda: data.Folder(pipe.parent, ['x.npy']).stream('x.npy'),
                 lambda: encoders.read_tensors(x + 'safetensors', ''),
                 lambda: encoders.StoredReader(x + 'npz')):
        with pytest.raises((ValueError, OSError), match=f'OSError|{why}'):
            read()
    monkeypatch.setattr(zipfile, 'ZipFile', lambda path: pytest.fail('it would wait'))
    assert not data.ArrayScene.applies(pipe.with_name('x.npz'))


@pytest.mark.mutation('data.py', '.webp .avif', '.webp')
@pytest.mark.mutation('data.py', "text and f'passed over", "'' and f'passed over")
@pytest.mark.mutation('data.py', 'self.passed.most_common()', 'self.passed.most_common(9)')
def test_formats_and_what_is_passed_over(folder, monkeypatch, capsys):
    for suffix in 'avif jpe pnm apng pbm'.split():
        picture = Image.fromarray(noise(24, 24))
        picture.convert('1' if suffix == 'pbm' else 'RGB').save(folder / f'x.{suffix}')
    for name in ('a.heic', 'b.HEIC', 'set.zip', 'README', '.hidden', *(f'a.{k}' for k in range(9))):
        (folder / name).write_text('x')
    check(monkeypatch, folder, '--res', 16, '--out', folder.parent / 'a.png')
    text = capsys.readouterr().out
    assert '16 RGB' in text and 'bad       0 files' in text
    assert 'passed over: 2 .heic, 1 files without suffix, 1 .0, 1 .1, ' in text
    assert '.8, 1 .zip (to read a zip, name the zip itself)' in text
    (folder / 'only').mkdir()
    shutil.copy(folder / 'set.zip', folder / 'only')
    with pytest.raises(ValueError, match='in it; passed over: 1 .zip .to read a zip, name'):
        pictures(folder / 'only')


@pytest.mark.mutation('data.py', "if selection.split != 'all':", 'if False:')
@pytest.mark.mutation('data.py', '        dataset.refuse_one()\n', '')
def test_one_picture_is_no_data_set(folder, monkeypatch):
    for place in (folder / 'p3.png', folder / 'alone'):
        write(folder / 'alone' / 'a.png', noise(24, 24))
        for side in ('train', 'test'):
            with pytest.raises(ValueError, match='a single picture, .*add others'):
                pictures(place, side)
        assert len(pictures(place)) == 1  # to be looked at or encoded
        with pytest.raises(ValueError, match='a single picture'):
            check(monkeypatch, place, '--out', folder / 'out.png')


@pytest.mark.mutation('data.py', "root.name + '.zip').exists()", "root.name + '.rar').exists()")
def test_the_default_place_may_be_a_zip(folder, monkeypatch):
    (folder.parent / 'data').mkdir()
    zipped(folder).rename(folder.parent / 'data' / 'celebahq.zip')
    monkeypatch.chdir(folder.parent)
    try:
        assert len(data.make_dataset('celebahq', split='all', resolution=16)) == 12
    except FileNotFoundError as error:
        pytest.fail(str(error))


@pytest.mark.mutation('data.py', "if '.mdb' in files.passed:", 'if False:')
def test_an_lmdb_is_refused_with_the_tool_that_unpacks_it(tmp_path):
    (tmp_path / 'church_outdoor_train_lmdb').mkdir()
    (tmp_path / 'church_outdoor_train_lmdb' / 'data.mdb').write_bytes(b'')
    with pytest.raises(ValueError, match='python data.py export'):
        data.make_dataset('lsun_church', tmp_path, resolution=32)


# ---- bad files ----------------------------------------------------------------------------------

def cut(path):
    """Keep the header, lose the end."""
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.mutation('data.py', 'MIN_SIDE = 8', 'MIN_SIDE = 2')
def test_unreadable_and_tiny_files_are_listed_and_skipped(folder):
    (folder / 'p3.png').write_text('not a picture')
    write(folder / 'p5.png', noise(5, 40))
    dataset = pictures(folder)
    assert [name for name, _ in dataset.bad] == ['p3.png', 'p5.png'] and len(dataset) == 10
    assert dataset.bad[1][1] == 'only 40 x 5 pixels'


@pytest.mark.mutation('data.py', 'i = (i + 1) % len(self)', 'i = (i + 2) % len(self)')
@pytest.mark.mutation('data.py', "tqdm.write(common.printable(f'skipped: {self", "str((f'skipped: {self")
def test_a_picture_that_fails_late_is_replaced_by_the_next(folder, capsys):
    cut(folder / 'p4.png')
    cut(folder / 'p11.png')
    dataset = pictures(folder)
    assert len(dataset) == 12 and not dataset.bad
    assert torch.equal(dataset[4]['image'], dataset[5]['image'])
    assert torch.equal(dataset.picture(11, 20), dataset.picture(0, 20))
    assert [name for name, _ in dataset.bad] == ['p4.png', 'p11.png']
    assert re.findall('skipped: (p[0-9]+.png): ', capsys.readouterr().out) == ['p4.png', 'p11.png']
    again = pictures(folder)
    again.verify()
    assert again.bad == dataset.bad


@pytest.mark.mutation('data.py', 'bad >= 3 and bad > total / 100', 'bad >= 4 and bad > total / 100')
@pytest.mark.mutation('data.py', 'bad >= 3 and bad > total / 100', 'bad >= 3')
def test_three_and_one_percent_are_too_many(folder):
    for k in (2, 5, 8):
        cut(folder / f'p{k}.png')
    dataset = pictures(folder)
    dataset.item(2), dataset.item(5)
    with pytest.raises(ValueError, match='3 of 12 pictures cannot be used, e.g. p2.png'):
        dataset.item(8)
    for k in range(400):
        shutil.copy(folder / 'p0.png', folder / f'q{k}.png')
    try:
        pictures(folder).verify()
    except ValueError as error:
        pytest.fail(str(error))


@pytest.mark.mutation('data.py', 'if bad == total or', 'if')
def test_none_left_is_an_error(tmp_path):
    (tmp_path / 'a.png').write_text('no')
    with pytest.raises(ValueError, match='1 of 1 pictures cannot be used'):
        pictures(tmp_path)


@pytest.mark.mutation('data.py', ' the pictures there or name ', ' nothing ')
def test_missing_places_say_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder or zip; put the pictures there or'):
        data.make_dataset('celebahq', tmp_path / 'none', resolution=16)
    with pytest.raises(ValueError, match='no pictures .*--data PATH'):
        pictures(tmp_path)
    (tmp_path / 'a.txt').write_text('x')
    with pytest.raises(ValueError, match='neither a folder nor a zip'):
        pictures(tmp_path / 'a.txt')
    with pytest.raises(FileNotFoundError, match='cifar-10-python.tar.gz'):
        data.make_dataset('cifar10', tmp_path, resolution=32)
    with pytest.raises(ValueError, match='--dataset imagenet: unknown; one of toy_image'):
        data.make_dataset('imagenet', resolution=16)


@pytest.mark.mutation('data.py', '1 <= s < np.inf', '0 <= s < np.inf')
@pytest.mark.mutation('data.py', 'resolution >= 4', 'resolution >= 0')
@pytest.mark.mutation('data.py', 'len(probs) == len(scales)', 'True')
def test_impossible_options_are_refused():
    for options, message in ((dict(scales=(0.5, 1)), '--scales'),
                             (dict(scales=(1, float('inf'))), '--scales'),
                             (dict(resolution=2), '--resolution'),
                             (dict(scale_probs=(0.5, 0.5)), '--scale_probs'),
                             (dict(continuous=True, scale_probs=(1,)), '--scale_probs')):
        with pytest.raises(ValueError, match=message):
            data.make_dataset('toy_image', **{'resolution': 16, **options})


# ---- items --------------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', 'whole[:, ::-1] if flip', 'whole[::-1] if flip')
@pytest.mark.mutation('data.py', '[top:top + r, left:left + r]', '[left:left + r, top:top + r]')
def test_items_are_crops_of_the_flipped_picture(folder):
    dataset = pictures(folder, scales=(1, 1.5, 2), flip=True)
    flips = sizes = 0
    for k in range(60):
        i = k % 12
        item = dataset.item(i, common.seeded('item', 0, k))
        assert all(torch.equal(v, w) for v, w in
                   zip(item.values(), dataset.item(i, common.seeded('item', 0, k)).values()))
        flipped = not torch.equal(item['image'], dataset.picture(i, 16))
        assert not flipped or torch.equal(item['image'], dataset.picture(i, 16).flip(-1))
        check_crop(item, dataset.picture(i, round(16 / item['scale'].item())), flipped)
        flips, sizes = flips + flipped, sizes + (item['scale'] < 1).item()
    assert 18 < flips < 42 and 26 < sizes < 54


@pytest.mark.mutation('data.py', 'rng is not None and self.flip and', 'self.flip and')
@pytest.mark.mutation('data.py', 'R = r if rng is None else self.draw_size(i, rng)',
                      'R = self.draw_size(i, rng or np.random.default_rng(0))')
def test_without_a_generator_items_are_plain(folder):
    try:
        item = pictures(folder, scales=(2,), flip=True)[1]
    except AttributeError as error:
        pytest.fail(str(error))
    assert item['image'] is item['target'] and torch.equal(item['box'], FULL)
    assert item['scale'] == 1 and 'label' not in item


@pytest.mark.mutation('data.py', 'rng.integers(0, R - r + 1, 2)', 'rng.integers(0, R - r, 2)')
def test_every_crop_position_is_reached(folder):
    dataset, seen = pictures(folder, resolution=30, scales=(1.1,)), set()
    for k in range(150):
        box = dataset.item(0, common.seeded(k))['box']
        seen.add(tuple(((box[:, 0] + 1) / 2 * 33).round().int().tolist()))
    assert seen == {(x, y) for x in range(4) for y in range(4)}


@pytest.mark.mutation('data.py', 'p * (R <= largest)', 'p * (R < largest)')
@pytest.mark.mutation('data.py', 'p * (R <= largest)', 'p')
def test_a_picture_is_never_enlarged_to_be_the_truth(folder):
    """Short sides are 40: of r = 16 the factor 2.5 is the last that fits."""
    def drawn(**options):
        dataset = pictures(folder, **options)
        return {round(16 / dataset.item(0, common.seeded(k))['scale'].item()) for k in range(300)}
    assert drawn(scales=(1, 2.5, 3)) == {16, 40}
    assert drawn(scales=(4,)) == {16}
    assert drawn(scales=(4,), continuous=True) == set(range(16, 41))


@pytest.mark.mutation('data.py', 'min(shape) < self.resolution', 'max(shape) < self.resolution')
def test_small_pictures_are_kept_and_counted(folder):
    dataset = pictures(folder, resolution=44, scales=(1, 2))
    assert dataset.notes == ['12 pictures smaller than 44 are enlarged']
    assert dataset.item(0, common.seeded(0))['target'].shape == (3, 44, 44)


@pytest.mark.mutation('data.py', 'p=probs / probs.sum()', 'p=None')
def test_scale_probabilities(folder):
    dataset = pictures(folder, scales=(1, 1.5, 2), scale_probs=(0.3, 0.1, 0.6))
    counts = np.unique([dataset.draw_size(0, common.seeded(k)) for k in range(1000)],
                       return_counts=True)
    assert counts[0].tolist() == [16, 24, 32]
    assert np.abs(counts[1] / 1000 - (0.3, 0.1, 0.6)).max() < 0.05


@pytest.mark.mutation('data.py', 'rng.integers(r, max(r, min(max(self.sizes), largest)) + 1)',
                      'rng.integers(r, max(r, min(max(self.sizes), largest)))')
def test_continuous_scale_covers_the_range():
    dataset = data.make_dataset('toy_image', resolution=8, scales=(1, 1.5), continuous=True)
    assert {dataset.draw_size(0, common.seeded(k)) for k in range(80)} == {8, 9, 10, 11, 12}


@pytest.mark.mutation('data.py', 'if self.used + size_of(value) <=', 'if 0 <=')
@pytest.mark.mutation('data.py', 'self.kept[key] = value\n', 'self.kept[key] = 255 - value\n')
def test_the_cache_is_bounded_and_changes_nothing(folder):
    limit = 5 * 16 * 16 * 3
    dataset, plain = pictures(folder, cache_bytes=limit), pictures(folder, cache_bytes=0)
    for _ in range(2):
        for i in range(12):
            assert torch.equal(dataset[i]['image'], plain[i]['image'])
    assert len(dataset.cache.kept) == 5 and dataset.cache.used == limit
    assert not plain.cache.kept


@pytest.mark.mutation('data.py', "found['text'] = texts[int(rng.integers(len(texts))) if rng else 0]",
                      "found['text'] = texts[0]")
@pytest.mark.mutation('data.py', "('file', 'modelid',", "('modelid',")
@pytest.mark.mutation('data.py', 'skipinitialspace=True', 'skipinitialspace=False')
@pytest.mark.mutation('data.py', 'require(not wrong, f', 'require(True, f')
def test_pictures_have_captions_by_file_name(folder):
    """By path, last part or stem; several texts of one are drawn in turn."""
    os.makedirs(folder / 'deep')
    os.rename(folder / 'p3.png', folder / 'deep' / 'p3.png')
    (folder / 'c.csv').write_text('\ufefffile,caption\np0.png,a  red\np0.png,b\np3.png,c\np4,d\n',
                                  encoding='utf-8')
    try:
        dataset = pictures(folder, captions=str(folder / 'c.csv'))
    except ValueError as error:
        pytest.fail(str(error))
    texts = dict(zip(dataset.names, dataset.captions))
    assert (texts['p0.png'], texts['deep/p3.png'], texts['p4.png']) == (['a red', 'b'], ['c'], ['d'])
    assert '9 pictures have no caption' in dataset.notes
    i = dataset.names.index('p0.png')
    assert {dataset.item(i, common.seeded(k))['text'] for k in range(9)} == {'a red', 'b'}
    assert dataset.item(dataset.names.index('p5.png'))['text'] == ''
    (folder / 'c.csv').write_text('file,caption\np0.png, "a red, round chair",\n')
    try:
        assert data.read_captions(folder / 'c.csv') == {'p0.png': ['a red, round chair']}
    except ValueError as error:
        pytest.fail(str(error))
    (folder / 'c.csv').write_text('file,caption\np0.png,ok\np1.png,a red, round chair\n')
    with pytest.raises(ValueError, match='row 2 has more fields'):
        data.read_captions(folder / 'c.csv')


@pytest.mark.mutation('data.py', 'longer.setdefault(key.split(', '{}.setdefault(key.split(')
@pytest.mark.mutation('data.py', "self.sides['train'] + self.sides['test'])),", 'self.names)),')
def test_captions_of_one_side_and_with_another_folder(folder):
    """The file may name p0.png by its folder elsewhere; held-out pictures need no caption."""
    (folder / 'c.csv').write_text('id,file,text\n1,there/p0.png,red\n')
    sides = dict(train=[f'p{k}.png' for k in range(9)], test=['p9.png', 'p10.png', 'p11.png'])
    try:
        train, test = (pictures(folder, side, holdout=sides, captions=str(folder / 'c.csv'))
                       for side in ('train', 'test'))
    except ValueError as error:
        pytest.fail(str(error))
    assert train.captions[0] == ['red'] and not any(train.captions[1:] + test.captions)
    with pytest.raises(ValueError, match='none of 1 names'):
        pictures(folder, holdout=dict(train=['p1.png'], test=['p2.png']),
                 captions=str(folder / 'c.csv'))


@pytest.mark.mutation('data.py', 'if len(above) == 1 else []', '')
@pytest.mark.mutation('data.py', 'if above and not texts.keys() & {*whole}:', 'if above:')
@pytest.mark.mutation('data.py', 'whole = name, os.path.splitext(name)[0]', 'whole = name, name')
@pytest.mark.mutation('data.py', "in range(1, key.count('/') + 1)", 'in range(1, 2)')
@pytest.mark.mutation('data.py', "for folders in range(name.count('/') + 1)", 'for folders in range(1)')
def test_captions_are_of_the_name_that_shares_most_folders():
    for keys, name, key in (
            ('cat/1 dog/1', 'cat/1.png', 'cat/1'), ('cat/1 dog/1', 'dog/1.png', 'dog/1'),
            ('cat/1.png', 'dog/1.png', None), ('cat/1.png dog/1.png', '1.png', None),
            ('set/cat/1 set/dog/1', 'cat/1.png', 'set/cat/1'), ('cat/1 1', 'dog/1.png', '1'),
            ('x/1.png 1.png', '1.png', '1.png'), ('w/x/y/1 1', 'y/1.png', 'w/x/y/1'),
            ('1.jpg', '1.png', None), ('y/1 y/1.png', 'x/y/1.png', 'y/1.png')):
        found = data.captions_by_name({k: [k] for k in keys.split()})(name)
        assert found == ([key] if key else [])


@pytest.mark.mutation('data.py', 'if row[key] and row[text]', 'if row[text]')
def test_rows_without_a_name_are_left_out(tmp_path):
    (tmp_path / 'c.csv').write_text('caption,file\na dog\nwith ears,1.png\n')
    assert data.read_captions(tmp_path / 'c.csv') == {'1.png': ['with ears']}


@pytest.mark.mutation('data.py', 'if why and self.sound.get(i, True)]', 'if why]')
@pytest.mark.mutation('data.py', """        if self.labels is None and self.captions is None:
            return {}
""", '')
def test_a_broken_file_is_read_late_and_listed_once(folder):
    cut(folder / 'p4.png')
    dataset = pictures(folder)
    assert dataset.known(4) == {} and not dataset.bad  # nothing had to be read for that
    assert not dataset.can_read(4)
    dataset.verify()
    assert [name for name, _ in dataset.bad] == ['p4.png']


@pytest.mark.mutation('data.py', 'if self.stand_in(i) == i]', ']')
def test_no_neighbour_is_substituted_among_the_readable(folder):
    cut(folder / 'p4.png')
    assert pictures(folder).readable(range(12)) == [*range(4), *range(5, 12)]


# ---- splits -------------------------------------------------------------------------------------

NAMES = [f'face{k}-tone{t}.png' for k in range(400) for t in range(5)]


@pytest.mark.mutation('data.py', 'u < fraction', 'u > fraction')
@pytest.mark.mutation('data.py', "(seed, k)).encode(), digest_size=6) for k in sorted(keys)}",
                      "(seed, j)).encode(), digest_size=6) for j, k in enumerate(sorted(keys))}")
def test_a_fraction_is_held_out_by_name():
    split = data.divide(NAMES, 0.2)
    assert sorted(split['train'] + split['test']) == sorted(NAMES)
    assert 0.17 < len(split['test']) / len(NAMES) < 0.23
    fewer = data.divide(NAMES[1::2], 0.2)  # adding files moves no other
    assert set(fewer['test']) == set(split['test']) & set(NAMES[1::2])
    assert data.divide(NAMES, '0.2') == split and data.divide(NAMES, 0.2, seed=1) != split
    assert len(data.divide(NAMES)['test']) == pytest.approx(200, abs=50)
    assert not data.divide(NAMES, 0)['test']
    for n in range(2, 9):
        assert all(data.divide(NAMES[:n], f).values() for f in (0.01, 0.99) for n in range(2, 9))


@pytest.mark.mutation('data.py', "partial(re.compile(group).sub, '') if group else str", 'str')
def test_groups_stay_on_one_side():
    for holdout in (0.2, {'test': ['face3-tone1.png', 'face9-tone0']}):
        split = data.divide(NAMES, holdout, group='-tone[0-9]')
        faces = [{n.split('-')[0] for n in names} for names in split.values()]
        assert not faces[0] & faces[1] and len(split['test']) == 5 * len(faces[1])
    assert sorted(faces[1]) == ['face3', 'face9']
    with pytest.raises(ValueError, match='--group .*not a regular expression'):
        data.divide(NAMES, 0.2, group='(')


@pytest.mark.mutation('data.py', "if isinstance(holdout, dict) and 'train' in holdout:",
                      'if False:')
def test_split_files(tmp_path):
    given = {'train': NAMES[5:9], 'test': NAMES[:3]}
    (tmp_path / 's.json').write_text(json.dumps(given))
    assert data.divide(NAMES, tmp_path / 's.json') == given == data.divide(NAMES, given)
    (tmp_path / 's.txt').write_text('\n'.join(NAMES[:2]) + '\nface0-tone2\n\n')
    split = data.divide(NAMES, str(tmp_path / 's.txt'))
    assert split == {'train': NAMES[3:], 'test': NAMES[:3]}
    (tmp_path / 'bad.txt').write_text('nobody.png')
    for holdout, message in ((tmp_path / 'bad.txt', 'e.g. nobody.png'), (1.5, 'must be in')):
        with pytest.raises(ValueError, match=message):
            data.divide(NAMES, holdout)
    for content in ('[1]', '{"test": [1, 2]}', '{"test": null}', '{"train": null, "test": []}'):
        (tmp_path / 'bad.json').write_text(content)
        with pytest.raises(ValueError, match='must be {"train"'):
            data.divide(NAMES, tmp_path / 'bad.json')
    with pytest.raises(FileNotFoundError, match='neither a fraction nor a file'):
        data.divide(NAMES, 'nowhere.txt')


@pytest.mark.mutation('data.py', 'if fraction and len(hashes) > 1:', 'if len(hashes) > 1:')
def test_an_empty_part_is_an_error(folder):
    with pytest.raises(ValueError, match='no pictures in the test part'):
        pictures(folder, 'test', holdout=0.0)


@pytest.mark.mutation('data.py', "args['data'], split, listed,", "args['data'], split, args['split'],")
@pytest.mark.mutation('data.py', "info.get('ldm_args', {}).get('captions') or args", 'args')
@pytest.mark.mutation('data.py', "get('captions') or args.get('captions', '')", "get('captions')")
def test_a_finished_run_gets_its_split_back(folder):
    args = dict(dataset='image', data=str(folder), resolution=16, scales=(1.0,), scale_probs=(),
                continuous=False, flip=False, split='0.3', group=None, seed=4)
    train, test = (pictures(folder, s, holdout=0.3, seed=4) for s in ('train', 'test'))
    assert train.splits() == test.splits() == {'train': train.names, 'test': test.names}
    splits = json.loads(json.dumps(train.splits()))
    for k in range(30):  # pictures added later are in neither part
        shutil.copy(folder / 'p0.png', folder / f'new{k}.png')
    again = data.open_run_data(dict(args=args, splits=splits), 'test', scales=(2.0,))
    assert again.names == test.names and again.sizes == [32] and again.captions is None
    for stage in (1, 2):
        (folder / f'{stage}.csv').write_text(f'file,text\n{test.names[0]},of stage {stage}\n')
    captioned = dict(args, captions=str(folder / '1.csv'))
    for later, texts in ((dict(ldm_args=dict(captions=str(folder / '2.csv'))), ['of stage 2']),
                         (dict(ldm_args=dict(captions='')), ['of stage 1']), ({}, ['of stage 1'])):
        again = data.open_run_data(dict(later, args=captioned, splits=splits), 'test')
        assert again.captions and again.captions[0] == texts
    assert data.open_run_data(dict(args=captioned, splits=splits), 'test', captions='').captions is None
    with pytest.raises(FileNotFoundError, match='trained on are gone'):
        data.open_run_data(dict(args=dict(args, data='/nowhere'), splits=splits), 'test')
    toy = dict(args, dataset='toy_image', data='')
    splits = data.make_dataset('toy_image').splits()
    assert len(data.open_run_data(dict(args=toy, splits=splits), 'test')) == 1000


@pytest.mark.mutation('data.py', "{*holdout['train']} & {*holdout['test']}", 'set()')
@pytest.mark.mutation('data.py', 'require(not group, f', 'require(True, f')
def test_a_split_of_two_sides_is_checked():
    sides = dict(train=['a', 'b'], test=['c'])
    assert data.divide('abc', sides) == sides
    with pytest.raises(ValueError, match='1 names are on both sides, e.g. b'):
        data.divide('abc', dict(sides, test=['b', 'c']))
    for given in (dict(holdout=sides), dict(official=sides)):
        with pytest.raises(ValueError, match='--group x: the split lists both sides'):
            data.divide('abc', group='x', **given)


@pytest.mark.mutation('data.py', "{'test', 'val'} & {*parts[n][1:]}", "{'val'} & {*parts[n][1:]}")
@pytest.mark.mutation('data.py', 'if animal in parts[n]]', ']')
def test_afhq_layouts(tmp_path):
    for side in ('train', 'test'):
        for animal in data.AFHQ:
            for k in range(3):
                write(tmp_path / 'afhq' / side / animal / f'{k}.png', noise(16, 16))
    train, test = (data.make_dataset('afhq_cat', tmp_path / 'afhq', s, resolution=16)
                   for s in ('train', 'test'))
    assert train.names == [f'train/cat/{k}.png' for k in range(3)]
    assert test.names == [f'test/cat/{k}.png' for k in range(3)]
    one = data.make_dataset('afhq_dog', tmp_path / 'afhq' / 'train' / 'dog', 'all', resolution=16)
    assert one.names == ['0.png', '1.png', '2.png']
    with pytest.raises(ValueError, match='no folder cat'):
        data.make_dataset('afhq_cat', tmp_path / 'afhq' / 'train' / 'dog', resolution=16)


# ---- CIFAR-10 -----------------------------------------------------------------------------------

@pytest.fixture
def cifar(tmp_path):
    """The published layout with four pictures a batch, as a folder and as the archive."""
    place = tmp_path / 'plain' / 'cifar-10-batches-py'
    place.mkdir(parents=True)
    for b, name in enumerate([f'data_batch_{k}' for k in range(1, 6)] + ['test_batch']):
        array = np.stack([noise(32, 32, 4 * b + k).transpose(2, 0, 1).ravel() for k in range(4)])
        batch = dict(data=array, labels=[b, 1, 2, 9], filenames=['x'] * 4, batch_label=name)
        (place / name).write_bytes(pickle.dumps(batch, protocol=2))
    (place / 'batches.meta').write_bytes(pickle.dumps(dict(label_names=['x'])))
    (tmp_path / 'packed').mkdir()
    with tarfile.open(tmp_path / 'packed' / 'cifar-10-python.tar.gz', 'w:gz') as tar:
        tar.add(place, 'cifar-10-batches-py')
    return tmp_path


@pytest.mark.mutation('data.py', '.transpose(0, 2, 3, 1)', '.transpose(0, 3, 2, 1)')
@pytest.mark.mutation('data.py', "dict(label=self.labels[i])", "dict(label=0)")
def test_cifar_layouts(cifar):
    places = [cifar / 'plain', cifar / 'plain' / 'cifar-10-batches-py', cifar / 'packed',
              cifar / 'packed' / 'cifar-10-python.tar.gz']
    for place in places:
        train, test = (data.make_dataset('cifar10', place, s, resolution=32)
                       for s in ('train', 'test'))
        assert len(train) == 20 and train.names[4] == 'train/10000' and len(test) == 4
        assert train.labels[4:8] == [1, 1, 2, 9] and test.item(0)['label'] == 5
        got = data.to_uint8(train.picture(6, 32)).permute(1, 2, 0).numpy()
        assert (got == noise(32, 32, 6)).all()


@pytest.mark.mutation('data.py', "raise pickle.UnpicklingError(f'refused to load {module}.{name}')",
                      'return super().find_class(module, name)')
def test_a_foreign_pickle_runs_no_code(cifar):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(cifar / 'owned'),)
    place = cifar / 'plain' / 'cifar-10-batches-py'
    (place / 'data_batch_2').write_bytes(pickle.dumps(dict(data=Evil(), labels=[0])))
    with pytest.raises(ValueError, match='not CIFAR-10 as published'):
        data.make_dataset('cifar10', place, resolution=32)
    assert not (cifar / 'owned').exists()


# ---- python data.py check -----------------------------------------------------------------------

def check(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['data.py', 'check', *map(str, argv)])
    data.main()


@pytest.mark.mutation('data.py', 'dataset.verify()', 'dataset')
@pytest.mark.mutation('data.py', 'len(sides["test"])', 'len(sides["train"])')
def test_check_lists_what_it_finds(folder, monkeypatch, capsys):
    cut(folder / 'p4.png')
    check(monkeypatch, folder, '--res', 16, '--split', 0.3, '--out', folder / 'out' / 'a.png')
    text = capsys.readouterr().out
    sides = data.divide([f'p{k}.png' for k in range(12)], 0.3)
    assert f'{len(sides["train"])} train, {len(sides["test"])} test' in text
    assert 'short side 40 min, 40 median, 40 max' in text and '12 RGB' in text
    assert 'bad       1 files\n  p4.png: OSError' in text
    assert Image.open(folder / 'out' / 'a.png').size == (8 * 18 + 2, 2 * 18 + 2)


@pytest.mark.mutation('data.py', 'dataset.tolerant = False', 'dataset')
def test_check_fails_where_training_would(folder, monkeypatch, capsys):
    for k in (2, 5, 8):
        (folder / f'p{k}.png').write_text('x')
    with pytest.raises(ValueError, match='3 of 12'):
        check(monkeypatch, folder, '--out', folder / 'out.png')
    assert 'bad       3 files' in capsys.readouterr().out


@pytest.mark.mutation('data.py', 'common.run(main)', 'main()')
def test_misuse_is_one_line_and_exit_code_2(repo, tmp_path):
    for argv, message in ((['celebahq'], 'data/celebahq: no such folder or zip'),
                          (['nothing'], 'neither a data set'), (['toy_image', '--bla'], '--bla')):
        done = subprocess.run([sys.executable, repo / 'data.py', 'check', *argv], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('error: ')
    assert not list(tmp_path.glob('out*'))
