"""Packed files: what comes out is what went in, and what broken ones get."""
import json
import pickle
import shutil
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
import metrics
import sample

SIZE = 64  # pixels a side: no picture of the fixtures is larger


def noise(height, width, seed=0):
    """Smooth random uint8 picture (H,W,3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), 'uint8')
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    im.save(path, **options)


def exif(turn):
    found = Image.Exif()
    found[0x112] = turn
    return found


@pytest.fixture
def folder(tmp_path):
    """Pictures of every kind, 12 to 64 pixels a side, in folders; p9 comes before p10."""
    place = tmp_path / 'set'
    for k in (1, 2, 9, 10, 11):
        write(place / f'a/p{k}.png', noise(40 + k, 60, k))
    write(place / 'b/turned.jpg', noise(33, 64, 20), exif=exif(6))
    write(place / 'b/grey.png', noise(50, 40, 21)[..., 0])
    clear = np.dstack([noise(40, 40, 22), noise(40, 40, 23)[..., 0]])
    write(place / 'b/clear.png', Image.fromarray(clear))
    write(place / 'deep.png', noise(30, 30, 24)[..., 0].astype('uint16') * 257)
    write(place / 'palette.gif', Image.fromarray(noise(36, 36, 25)).quantize(9))
    write(place / 'small.bmp', noise(12, 13, 26))
    return place


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """Run `python data.py pack` with these arguments; the packed file."""
    def run(*argv, size=SIZE, out=tmp_path / 'set.pack'):
        argv = 'data.py', 'pack', *argv, '--size', size, '--out', out
        monkeypatch.setattr(sys, 'argv', [*map(str, argv)])
        try:
            data.main()
        except Exception as error:  # one that is not meant for a user's eyes fails as well
            pytest.fail(str(error))
        return out
    return run


def pictures(root, split='all', name='image', **options):
    options = dict(dict(resolution=16, scales=(1.0, 1.5, 2.0), flip=True), **options)
    return data.make_dataset(name, root, split, **options)


def videos(root, split='all', name='video', resolution=16, frames=4, **options):
    return data.make_dataset(name, root, split, resolution=resolution, frames=frames, **options)


def assert_equal(a, b):
    """Two data sets: names, both sides of the split, items, truths, what is known of them."""
    assert a.names == b.names and a.splits() == b.splits()
    assert (a.labels, a.captions) == (b.labels, b.captions)
    assert [a.largest(i) for i in range(len(a))] == [b.largest(i) for i in range(len(b))]
    for i in range(len(a)):
        x, y = ([d.item(i, np.random.default_rng(7 * i + k)) for k in range(4)]
                + [d.item(i), dict(truth=d.truth(i, 30))] for d in (a, b))
        for one, other in zip(x, y):
            assert one.keys() == other.keys()
            for key, value in one.items():
                assert np.array_equal(value, other[key]), (a.names[i], key)


# ---- pictures -----------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', 'self.starts = dict(zip(self.names, packed_starts(entries)))',
                      'self.starts = dict(zip(self.names[::-1], packed_starts(entries)))')
@pytest.mark.mutation('data.py', 'splits().values(), []), key=natural)',
                      'splits().values(), []), key=str)')
@pytest.mark.mutation('data.py', 'resize(im, min(about[', 'resize(im, max(about[')
@pytest.mark.mutation('data.py', 'side=min(size, dataset.largest(i))', 'side=size')
@pytest.mark.mutation('data.py', 'file.seek(start)', 'file.seek(8)')
def test_pictures_come_out_equal_where_none_is_larger(folder, pack):
    file = pack(folder)
    assert_equal(pictures(folder), pictures(file))
    for split in ('train', 'test'):
        for options in (dict(), dict(holdout=0.5, seed=3), dict(group=r'\d+')):
            assert_equal(pictures(folder, split, **options), pictures(file, split, **options))
    assert data.find_files(file).names == data.find_files(folder).names  # in order
    assert all(pictures(file).modes[k] == 'RGB' for k in range(len(pictures(file))))


def test_every_picture_data_set_takes_a_packed_file(folder, pack):
    file = pack('celebahq', '--data', folder)
    for name in ('image', 'celebahq', 'lsun_church'):
        assert_equal(pictures(folder, name=name), pictures(file, name=name))


@pytest.mark.mutation('data.py', 'resize(im, min(about[', 'resize(im.rotate(90), min(about[')
def test_larger_pictures_are_reduced_once(folder, pack, capsys):
    file = pack(folder, size=32)
    whole, packed = pictures(folder), pictures(file)
    assert [packed.largest(i) for i in range(len(packed))] == [
        min(32, whole.largest(i)) for i in range(len(whole))]
    for i in range(len(whole)):
        im = whole.decode(i)
        side = min(32, im.width)
        small = data.resized(im, (side, side))
        assert np.array_equal(packed.decode(i), small)
        assert np.array_equal(packed.pixels(i, 10), data.resize(small, 10))
    last = capsys.readouterr().out.splitlines()[-1]
    larger = sum(whole.largest(i) > 32 for i in range(len(whole)))
    assert '11 pictures, 0.0 MiB; at sizes up to 32 they come out equal to unpacked ones' in last
    assert last.endswith(f', {larger} that were larger up to the resize to 32') and larger == 9
    pack(folder)
    assert capsys.readouterr().out.endswith('come out equal to unpacked ones\n')


@pytest.mark.mutation('data.py', 'require(self.seen == identity(self.root)', 'require(True')
@pytest.mark.mutation('data.py', 'return self.seen[2:]', 'return self.sides')
def test_a_file_that_was_packed_anew_is_not_read_by_the_old_index(folder, pack):
    files = data.Packed(pack(folder))
    sent, before = pickle.dumps(files), np.asarray(files.square('a/p2.png'))
    names, old = files.names, files.digest(files.names)
    write(folder / 'a/p2.png', noise(42, 60, 99))  # other pixels, and all else as it was
    pack(folder)
    anew = data.Packed(files.root)
    assert anew.names == names and anew.sides == files.sides and anew.digest(names) != old
    (folder / 'a/p1.png').unlink()
    pack(folder)
    assert np.array_equal(np.asarray(files.square('a/p2.png')), before)  # it has the old file
    other = pickle.loads(sent)
    for _ in range(2):
        with pytest.raises(ValueError, match='has been packed anew'):
            other.square('a/p2.png')


@pytest.mark.mutation('data.py', "left in Path(args.out).parent.glob(", "left in (")
def test_what_a_killed_call_left_is_pointed_out(folder, pack, capsys):
    path = Path(pack(folder))
    assert 'another process writes it' not in capsys.readouterr().out
    path.with_name(f'{path.name}.0123abcd.tmp').write_bytes(bytes(2 ** 20))
    path.with_name(f'{path.name}x.0123abcd.tmp').write_bytes(b'')
    pack(folder)
    told = [line for line in capsys.readouterr().out.splitlines() if 'another process writes it' in line]
    assert len(told) == 1 and f'{path.name}.0123abcd.tmp, 1.0 MiB' in told[0]


def test_packed_files_can_be_packed_again(folder, pack, tmp_path):
    file = pack(folder, '--split', 0.4)
    again = pack(file, size=20, out=tmp_path / 'again')
    assert pictures(again).splits() == pictures(file).splits()
    for i, im in enumerate(map(pictures(file).decode, range(11))):
        side = min(20, im.width)
        assert np.array_equal(pictures(again).decode(i), data.resized(im, (side, side)))


@pytest.mark.mutation('data.py', 'return dict(vars(self), mapped=None)', 'return dict(vars(self))')
@pytest.mark.mutation('data.py', "return (self.sides[name],) * 2, 'RGB'",
                      "return self.square(name).size, 'RGB'")
def test_only_what_is_asked_for_is_read_and_by_every_process(folder, pack):
    file = pack(folder)
    with pytest.MonkeyPatch.context() as patch:  # sizes are known without the pictures
        patch.setattr(data.Packed, 'square', lambda *_: pytest.fail('read'))
        packed = pictures(file)
    expected = torch.stack([packed.item(i)['image'] for i in range(len(packed))])
    sent = pickle.dumps(packed.files)  # as a spawned worker gets it
    assert len(sent) < 3000
    packed.files = pickle.loads(sent)
    loader = DataLoader(packed, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat([batch['image'] for batch in loader]), expected)


# ---- splits, labels, captions -------------------------------------------------------------------

@pytest.mark.mutation('data.py', 'if self.files.official:', 'if False:')
@pytest.mark.mutation('data.py', 'split=dataset.splits() if told else None', 'split=None')
@pytest.mark.mutation('data.py', 'args.split or args.group\n', 'args.group\n')
@pytest.mark.mutation('data.py', 'dataset.official or args.split or args.group\n',
                      'dataset.official or args.split\n')
def test_the_split_that_was_asked_for_is_kept(folder, pack, tmp_path):
    held = tmp_path / 'held.txt'
    held.write_text('deep.png\na/p2\n')
    for flag, value, options in (('--split', held, dict(holdout=held)),
                                 ('--split', 0.5, dict(holdout=0.5)),
                                 ('--group', r'\d+', dict(group=r'\d+'))):
        file = pack(folder, flag, value)
        assert pictures(file, seed=5).splits() == pictures(folder, **options).splits()
        assert pictures(file, holdout=0.3).splits() == pictures(folder, holdout=0.3).splits()


@pytest.mark.mutation('data.py', 'for n in listed if n in known]', 'for n in listed]')
def test_one_animal_of_a_packed_afhq(pack, tmp_path):
    names = [f'{side}/{animal}/{k}.png' for side in ('train', 'test') for animal in ('cat', 'dog')
             for k in range(3)]
    for k, name in enumerate(names):
        write(tmp_path / 'afhq' / name, noise(20, 20, k))
    file, plain = pack('afhq_cat', '--data', tmp_path / 'afhq'), tmp_path / 'afhq'
    assert_equal(pictures(plain, name='afhq_cat'), pictures(file, name='afhq_cat'))
    file = pack(plain, '--split', 0.5)
    sides = pictures(plain, holdout=0.5).splits()
    cats = {side: [n for n in found if 'cat' in n] for side, found in sides.items()}
    try:
        assert pictures(file, name='afhq_cat').splits() == cats
    except ValueError as error:
        pytest.fail(str(error))


@pytest.mark.mutation('data.py', 'Packed(root) if is_packed(root) else Cifar(root)', 'Cifar(root)')
@pytest.mark.mutation('data.py', 'dict(label=dataset.labels, captions', 'dict(captions')
@pytest.mark.mutation('data.py', 'self.labels = [files.labels[n] for n in self.names]',
                      'self.labels = [*files.labels.values()]')
def test_cifar10_keeps_its_labels_and_split(pack, tmp_path):
    place = tmp_path / 'cifar' / 'cifar-10-batches-py'
    place.mkdir(parents=True)
    for b, name in enumerate(['test_batch', *(f'data_batch_{k}' for k in range(1, 6))]):
        values = np.stack([noise(32, 32, 4 * b + k).transpose(2, 0, 1).ravel() for k in range(4)])
        (place / name).write_bytes(pickle.dumps(dict(data=values, labels=[b, 7, 2, 9]), protocol=2))
    file = pack('cifar10', '--data', tmp_path / 'cifar')
    for split in ('train', 'test', 'all'):
        plain = pictures(tmp_path / 'cifar', split, 'cifar10')
        try:
            packed = pictures(file, split, 'cifar10')
        except ValueError as error:
            pytest.fail(str(error))
        assert_equal(plain, packed)
        assert packed.labels[:2] == [split == 'train', 7] and packed.item(3)['label'] == 9


@pytest.mark.mutation('data.py', 'label=dataset.labels, captions=dataset.captions',
                      'label=dataset.labels')
@pytest.mark.mutation('data.py', 'elif self.files.captions:', 'if self.files.captions:')
def test_captions_are_kept_unless_others_are_named(folder, pack, tmp_path):
    for k, text in enumerate(('first', 'second')):
        (tmp_path / f'{k}.csv').write_text(
            f'file,caption\na/p1.png,{text}\na/p1.png,again\nturned,{text} turned\n')
    file = pack(folder, '--captions', tmp_path / '0.csv')
    for split in ('train', 'all'):
        told = pictures(folder, split, captions=str(tmp_path / '0.csv'))
        assert_equal(told, pictures(file, split))
    told = pictures(folder, captions=str(tmp_path / '1.csv'))
    assert_equal(told, pictures(file, captions=str(tmp_path / '1.csv')))


def test_a_run_of_a_folder_goes_on_with_the_packed_file(folder, pack):
    (folder / 'a/p5.png').write_bytes(b'none')  # it stays in the split
    train = pictures(folder, 'train', seed=4)
    flags = dict(vars(data.PictureConfig()), dataset='image', data='gone', flip=True, seed=4,
                 resolution=16, captions='', scales=(1.0, 1.5, 2.0))
    info = dict(args=flags, splits=json.loads(json.dumps(train.splits())))
    file = pack(folder)
    for split in ('train', 'test'):
        assert_equal(pictures(folder, split, seed=4, flip=split == 'train'),
                     data.open_run_data(info, split, str(file)))
    assert pictures(file, 'train', seed=4).splits() == info['splits']


def test_other_readers_of_folders(folder, pack):
    args = SimpleNamespace(batch=4, reference='')
    found = [[x.numpy() for x in metrics.folder_pictures(place, args, 10, 9, 'real').read(range(9))]
             for place in (folder, pack(folder))]
    assert all(map(np.array_equal, *found))
    vae = SimpleNamespace(config=SimpleNamespace(resolution=16))
    names = [sample.encode_pictures(place, vae, {}, 'cpu')[0] for place in (folder, pack(folder))]
    assert names[0] == names[1] and len(names[0]) == 11


# ---- videos -------------------------------------------------------------------------------------

def clip(T=12, H=24, W=32, seed=0):
    """uint8 (T,H,W,3) of blocks in few colours, so that every format keeps it exactly."""
    blocks = np.random.default_rng(seed).integers(0, 4, (T, H // 8, W // 8, 3), 'uint8') * 80
    return blocks.repeat(8, 1).repeat(8, 2)


def write_frames(place, frames):
    for k, frame in enumerate(frames):
        write(place / f'{k}.png', frame)


@pytest.fixture
def clips(tmp_path):
    """Folders of frames, a GIF, a WebP and an array, of 12 to 15 frames of 24 x 32 pixels."""
    place = tmp_path / 'clips'
    for k in range(4):
        write_frames(place / f'v{k}', clip(12 + k, seed=k))
    for name, options in (('x.gif', {}), ('y.webp', dict(lossless=True))):
        first, *rest = map(Image.fromarray, clip(seed=ord(name[0])))
        write(place / name / name, first, save_all=True, append_images=rest, duration=50, **options)
    (place / 'arrays').mkdir()
    np.save(place / 'arrays/z.npy', clip(seed=9))
    write(place / 'still/one.gif', clip(1, seed=8)[0])
    return place


@pytest.mark.mutation('data.py', 'self.starts[name] + k * 3 * side ** 2', 'self.starts[name]')
@pytest.mark.mutation('data.py', "* e.get('frames', 1) for", "* 12 for")
@pytest.mark.mutation('data.py', '            start += values.nbytes\n', '')
@pytest.mark.mutation('data.py', 'rate=video.rate and str(video.rate))', 'rate=None)')
@pytest.mark.mutation('data.py', '    if files.clips is not None:\n', '    if False:\n')
def test_clips_come_out_equal(clips, pack):
    file = pack('video', '--data', clips, size=24)
    try:
        packed = videos(file)
    except (ValueError, OSError) as error:
        pytest.fail(str(error))
    plain = videos(clips)
    assert_equal(plain, packed)
    assert [(len(v), v.size, v.rate) for v in packed.videos] == [
        (len(v), (24, 24), v.rate) for v in plain.videos]
    assert len(packed) == 7 and packed.bad == plain.bad == [('still', 'only 1 frames')]
    for split in ('train', 'test'):
        assert_equal(videos(clips, split, holdout=0.4), videos(file, split, holdout=0.4))
    for place in (clips, file):  # as metrics.py reads them
        files = data.find_files(place, data.VIDEO_SUFFIXES)
        found = data.find_videos(files)
        assert [Path(v.frames[0]).suffix for v in found] == ['.npy', '.gif', *4 * ['.png'], '.gif',
                                                             '.webp']
        frames = [data.read_frames(files, v, [3, 4, 9], 20) for v in found if len(v) > 1]
        expected = [data.resize(data.square(im), 20) for v in plain.videos
                    for im in plain.files.frames(v, [3, 4, 9])]
        assert np.array_equal(np.concatenate(frames), expected)


def test_larger_frames_are_reduced_once(clips, pack):
    packed, plain = videos(pack('video', '--data', clips, size=18)), videos(clips)
    for i in range(len(plain)):
        frames = [data.resize(im, 18) for im in plain.squares(i)]
        assert np.array_equal(packed.read(i, range(12), 18), frames[:12])
    assert packed.largest(0) == 18


def test_skytimelapse_keeps_its_split(pack, tmp_path):
    for k, name in enumerate(('sky_train/a/a_1', 'sky_train/a/a_2', 'sky_test/b/b_1')):
        write_frames(tmp_path / 'sky' / name, clip(6, seed=k))
    file = pack('skytimelapse', '--data', tmp_path / 'sky', size=24)
    for split in ('train', 'test'):
        assert_equal(*(videos(place, split, 'skytimelapse') for place in (tmp_path / 'sky', file)))
    assert videos(file).splits() == videos(tmp_path / 'sky', name='skytimelapse').splits()


@pytest.mark.mutation('data.py', "'packed as videos, where pictures are needed'", "''")
@pytest.mark.mutation('data.py', 'return files.clips is not None or any(', 'return any(')
@pytest.mark.mutation('data.py', '        if self.clips is None:  # each is a picture\n',
                      '        if False:\n')
def test_frames_may_be_pictures_but_clips_are_none(clips, pack, tmp_path):
    """As of a folder: frames in folders are pictures unless they are called videos."""
    shutil.rmtree(clips / 'x.gif')
    shutil.rmtree(clips / 'y.webp')
    shutil.rmtree(clips / 'arrays')
    frames = pack(clips, size=24)
    assert not data.Videos.lies_at(frames) and len(pictures(frames)) == 12 + 13 + 14 + 15 + 1
    try:
        assert_equal(videos(clips), videos(frames))
    except (ValueError, IndexError) as error:
        pytest.fail(str(error))
    file = pack('video', '--data', clips, size=24)
    assert data.Videos.lies_at(file)
    with pytest.raises(ValueError, match='packed as videos, where pictures are needed'):
        pictures(file)


@pytest.mark.mutation('data.py', 'require(len(values) == entries', 'require(True or entries')
def test_clips_with_a_broken_or_another_frame_are_left_out(clips, pack, capsys):
    (clips / 'v0/7.png').write_bytes(b'none')
    write(clips / 'v2/13.png', clip(1, 16, 16)[0])
    with pytest.raises(pytest.fail.Exception, match='2 of 2 videos cannot be used'):
        for k in (1, 3):
            shutil.rmtree(clips / f'v{k}')
        for name in ('x.gif', 'y.webp', 'arrays', 'still'):
            shutil.rmtree(clips / name)
        pack('video', '--data', clips, size=24)
    write_frames(clips / 'v4', clip(4))
    packed = videos(pack('video', '--data', clips, size=24))
    assert packed.names == ['v4']
    assert np.array_equal(packed.read(0, range(4), 24), clip(4)[:, :, 4:28])
    assert [why for _, why in packed.bad] == [
        "not packed, OSError: no picture: it begins with b'none'",
        'not packed, ValueError: its frames differ in size']
    assert "skipped: v0: OSError: no picture" in capsys.readouterr().out


# ---- what is broken -----------------------------------------------------------------------------

@pytest.mark.mutation('data.py', 'return dataset.skip(i, reason(error))', 'return None')
@pytest.mark.mutation('data.py', 'require(name not in self.faults, self.faults.get(name))', 'pass')
def test_broken_pictures_are_listed_skipped_and_at_last_fatal(folder, pack, tmp_path, capsys):
    whole = (folder / 'a/p9.png').read_bytes()
    (folder / 'a/p9.png').write_bytes(whole[:-400])  # its header is sound
    (folder / 'b/none.png').write_bytes(b'none')
    file = pack(folder)
    printed = capsys.readouterr().out
    assert 'skipped: b/none.png: OSError: no picture' in printed
    assert 'skipped: a/p9.png: OSError: ' in printed and '10 pictures' in printed
    packed, plain = pictures(file), pictures(folder)
    assert packed.splits() == plain.splits() and [*dict(packed.bad)] == ['a/p9.png', 'b/none.png']
    assert 'not packed, OSError: ' in packed.bad[0][1]
    where = {n: i for i, n in enumerate(plain.names)}
    assert all(torch.equal(packed.truth(i, 16), plain.truth(where[n], 16))
               for i, n in enumerate(packed.names))
    before = file.read_bytes()
    (folder / 'a/p2.png').write_bytes((folder / 'a/p2.png').read_bytes()[:-400])
    with pytest.raises(pytest.fail.Exception, match='3 of 12 pictures cannot be used'):
        pack(folder)
    assert file.read_bytes() == before and not [*tmp_path.glob('*.tmp')]


@pytest.mark.mutation('data.py', 'common.replace(args.out, write)', 'write(Path(args.out))')
@pytest.mark.mutation('data.py', 'require(end < free, f', 'require(True, f')
def test_a_packed_file_is_complete_or_not_there(folder, pack, tmp_path, monkeypatch):
    pack(folder)
    decode, seen = data.FilePictures.decode, []

    def watched(self, i):
        seen.append((tmp_path / 'new').exists())
        return decode(self, i)
    monkeypatch.setattr(data.FilePictures, 'decode', watched)
    pack(folder, out=tmp_path / 'new')
    assert seen == [False] * 11 and (tmp_path / 'new').exists()

    monkeypatch.setattr(shutil, 'disk_usage', lambda place: SimpleNamespace(free=2 ** 14))
    with pytest.raises(pytest.fail.Exception, match='needs 0.1 MiB in .*try a smaller --size'):
        pack(folder, out=tmp_path / 'more')
    assert len(seen) == 11 and not [*tmp_path.glob('more*')]


@pytest.mark.mutation('data.py', 'require(last == PACKED and zlib.crc32(text) == checksum',
                      'require(last == PACKED')
@pytest.mark.mutation('data.py', "[-1] == end, 'something is missing')", "[-1] > 0, '')")
@pytest.mark.mutation('data.py', 'cut short or damaged; pack it', 'cut short or damaged, ')
@pytest.mark.mutation('data.py', 'if data.py packed it, pack it again', 'no')
def test_damaged_files_are_one_line_with_the_cure(folder, pack, tmp_path):
    file = pack(folder)
    whole, bad = file.read_bytes(), tmp_path / 'bad'
    size, checksum, _ = struct.unpack('<QI8s', whole[-20:])
    text = whole[-20 - size:-20]
    assert zlib.crc32(text) == checksum and json.loads(text)['size'] == SIZE
    damaged = [whole[:n] for n in (3, 8, 15, 500, len(whole) - size, len(whole) - 1)]
    damaged += [whole[:100] + whole[200:], whole.replace(b'a/p10.png', b'a/p19.png'),
                whole + b'x', b'something else']
    for content in damaged:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match='pack it again') as error:
            pictures(bad)
        assert '\n' not in str(error.value) and str(bad) in str(error.value)


@pytest.mark.mutation('data.py', 'require(not Path(args.out).exists() or', 'require(True or')
def test_no_other_file_is_written_over(folder, pack):
    picture = folder / 'deep.png'
    before = picture.read_bytes()
    with pytest.raises(pytest.fail.Exception, match='that data.py did not pack is there'):
        pack(folder, out=picture)
    assert picture.read_bytes() == before


@pytest.mark.mutation('data.py', 'computed, packing = True, None', 'computed = True')
@pytest.mark.mutation('data.py', 'require(base.packing, f', 'require(base, f')
def test_other_data_are_refused(tmp_path, pack):
    (tmp_path / 'shapes/chair/x').mkdir(parents=True)
    np.savez(tmp_path / 'shapes/chair/x/pointcloud.npz', points=np.zeros((9, 3)))
    for name in ('toy_image', 'toy_video', 'toy_nerf', 'srn_cars', tmp_path / 'shapes'):
        with pytest.raises(pytest.fail.Exception, match=': only pictures and videos in files are'):
            pack(name)
