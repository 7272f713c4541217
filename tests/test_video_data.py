"""Videos: a toy in closed form, every kind of file, clips and the pixels of them, bad files."""
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import inr
import metrics


def clip(T=20, H=24, W=32, seed=0):
    """uint8 (T,H,W,3) of 8 x 8 blocks in few colours, so that every format keeps it exactly."""
    blocks = np.random.default_rng(seed).integers(0, 4, (T, H // 8, W // 8, 3), 'uint8') * 80
    return blocks.repeat(8, 1).repeat(8, 2)


def write_frames(folder, frames, suffix='.png'):
    folder.mkdir(parents=True, exist_ok=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f'{k}{suffix}')  # 10 comes after 9


def write_animated(path, frames, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=rest, **options)


def opened(root, name='video', split='all', resolution=24, frames=4, **options):
    return data.make_dataset(name, root, split, resolution=resolution, frames=frames, **options)


def shown(video):
    """Float (3,T,H,W) -> uint8 (T,H,W,3)."""
    return data.to_uint8(video).permute(1, 2, 3, 0).numpy()


def centre(frames):
    """The middle square of frames that are 24 high and 32 wide."""
    return frames[:, :, 4:28]


@pytest.fixture
def folder(tmp_path):
    """Six videos v0 .. v5 of 20 frames of 24 x 32 pixels."""
    for k in range(6):
        write_frames(tmp_path / 'set' / f'v{k}', clip(seed=k))
    return tmp_path / 'set'


# ---- toy_video ----------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', '(2 * np.arange(frames) + 1) / frames - 1)[0]',
                      '2 * np.arange(frames) / frames - 1)[0]')
@pytest.mark.mutation('data.py', "np.tile(np.asarray(times, 'float32'), len(seeds))",
                      "np.asarray(times, 'float32').repeat(len(seeds))")
def test_toy_is_a_function_of_place_and_time():
    times = [-0.5, 0.1, 0.7]
    together = data.toy_video([3, 2 ** 30, 8], (20, 32), times)
    assert together.shape == (3, 3, 3, 20, 32) and together.abs().max() <= 1
    alone = [data.toy_video([seed], (20, 32), [t]) for seed in (3, 2 ** 30, 8) for t in times]
    alone = torch.cat(alone, 2).unflatten(2, (3, 3))[0].transpose(0, 1)
    assert torch.allclose(together, alone, atol=1e-5)
    toy = opened(None, 'toy_video', 'test', 16, 5)
    fine = toy.truth(7, 48, frames=15)
    assert torch.allclose(fine[:, 1::3, 1::3, 1::3], toy.truth(7, 16), atol=1e-4)
    assert torch.equal(toy.view(7, 0)['video'], toy.truth(7, 16))


@pytest.mark.mutation('data.py', 'x, y, t = points', 'y, x, t = points')
def test_toy_colours_are_those_of_the_clip():
    times = inr.cell_centres(6, torch.tensor([-1.0, 1.0]))
    clip = data.toy_video([5], (12, 9), times)[0]
    colours = data.toy_colours(5, inr.make_grid(6, 12, 9).reshape(-1, 3).numpy())
    assert torch.allclose(colours, clip.flatten(1).T, atol=1e-4)


def toy_parameters(seeds):
    values = data.toy_values('toy_video', seeds, data.TOY_RANGES | data.TOY_MOTION)
    return [{k: v[b, 0, 0] for k, v in vars(values).items()} for b in range(len(seeds))]


@pytest.mark.mutation('data.py', 'p.sun_y + p.sun_fall * t', 'p.sun_y - p.sun_fall * t')
@pytest.mark.mutation('data.py', 'p.hour + p.hours * t', 'p.hour - p.hours * t')
def test_toy_sun_sets_as_the_hour_goes_by():
    """The middle of the sun, unless something is before it, has the sunlight of its hour."""
    hits = []
    for seed, p in enumerate(toy_parameters(range(20))):
        for t in (-1, 0.5):
            x, y = p['sun_x'], p['sun_y'] + t * p['sun_fall']
            seen = data.toy_video([seed], 1, [t], [[x, x], [y, y]]).flatten()
            light = data.round_loop(data.TOY_HOURS, p['hour'][None] + t * p['hours'])[2].flatten()
            hits.append(np.abs(seen.numpy() - light).max() < 1e-4)
    assert np.mean(hits) > 0.6


def blank_shore(p, x, y, *light):
    return np.ones((len(p.hour), 3, 1, 1), 'float32') + 0 * x + 0 * y


@pytest.mark.mutation('data.py', 'p.boat_x + p.boat_speed * way', 'p.boat_x')
@pytest.mark.mutation('data.py', 'p.boat_y + 0.03 * np.sin(swell)', 'p.boat_y + 0.03 * t')
def test_toy_boat_looks_the_same_after_a_whole_swell_further_on(monkeypatch):
    monkeypatch.setattr(data, 'toy_shore', blank_shore)
    for seed, p in enumerate(toy_parameters(range(4))):
        way = -np.sign(p['heading']) * p['boat_speed'] * 2 * np.pi / p['swell']
        t = -np.pi / p['swell']
        before = data.toy_video([seed], 64, [t], [[-2, 2], [-1, 1]])
        after = data.toy_video([seed], 64, [-t], [[-2 + way, 2 + way], [-1, 1]])
        assert torch.allclose(before, after, atol=2e-3)


@pytest.mark.mutation('data.py', 'u = p.heading * (', 'u = (')
@pytest.mark.mutation('data.py', 'way, swell = -p.heading * t', 'way, swell = t')
def test_toy_boats_of_the_other_heading_are_mirrored(monkeypatch):
    monkeypatch.setattr(data, 'toy_shore', blank_shore)
    upright = dict(boat_x=(0, 0), boat_lean=(0, 0), swell=(0, 0), swell_phase=(np.pi / 2,) * 2)
    seen = []
    for heading in (1, -1):
        monkeypatch.setattr(data, 'TOY_MOTION', data.TOY_MOTION | upright
                            | dict(heading=(heading, heading)))
        seen.append(data.toy_video([3], 64, [-0.6, 0.5]))
    assert torch.allclose(seen[0], seen[1].flip(-1), atol=1e-4)


@pytest.mark.mutation('data.py', '+ p.wind * way', '- p.wind * way')
@pytest.mark.mutation('data.py', '0.8 * k + p.wind', '0.8 * k + 2 * p.wind')
def test_toy_clouds_go_with_the_boat(monkeypatch):
    seen = []
    monkeypatch.setattr(data, 'cloud', lambda x, y, r: seen.append(x) or 0 * (x + y))
    for seed, p in enumerate(toy_parameters(range(4))):
        seen.clear()
        data.toy_video([seed], 8, [-1, 1])
        moved = [x[0] - x[1] for x in seen]
        assert len(moved) == 3
        assert np.allclose(moved, -2 * np.sign(p['heading']) * p['wind'], atol=1e-5)


# ---- items --------------------------------------------------------------------------------------

def check_item(item, pixels):
    """coords are centres of different cells of the clip, and target is its colours there."""
    size = item['video'].shape[1:]
    assert item['coords'].shape == item['target'].shape == (pixels, 3)
    numbers = ((item['coords'].double() + 1) * torch.tensor(size).flip(0) - 1) / 2
    assert torch.allclose(numbers, numbers.round(), atol=1e-4)
    assert (numbers.round() < torch.tensor(size).flip(0)).all()
    x, y, t = numbers.round().long().T
    assert torch.equal(item['target'], item['video'][:, t, y, x].T)
    assert len({*zip(x.tolist(), y.tolist(), t.tolist())}) == pixels
    grid = inr.make_grid(*size)[t, y, x]
    assert torch.allclose(item['coords'], grid, atol=1e-6)


@pytest.mark.mutation('data.py', 'np.unravel_index(cells, size)[::-1], axis=1)',
                      'np.unravel_index(cells, size), axis=1)')
@pytest.mark.mutation('data.py', 'math.prod(size)), replace=False)', 'math.prod(size)))')
@pytest.mark.mutation('data.py', 'coords * torch.tensor([-1.0, 1.0, 1.0])', 'coords')
@pytest.mark.mutation('data.py', 'video, coords = video.flip(-1), coords',
                      'video, coords = video, coords')
@pytest.mark.mutation('data.py', 'dict(video=video.flip(-1) if mirrored else video)',
                      'dict(video=video.flip(-2) if mirrored else video)')
def test_pixels_agree_with_the_clip_and_flips_mirror_both(folder):
    for items in (opened(None, 'toy_video', pixels=300, flip=True),
                  opened(folder, pixels=300, clips=1, flip=True)):
        plain, seen = items.view(2, 0)['video'], set()
        assert items.views == 2
        assert torch.equal(items.view(2, 1)['video'], plain.flip(-1))
        for k in range(12):
            item = items.item(2, common.seeded('test', k))
            if not items.computed:
                check_item(item, 300)
            again = items.item(2, common.seeded('test', k))
            assert all(torch.equal(item[key], again[key]) for key in item)
            view = items.draw_view(common.seeded('test', k))
            seen.add(view)
            if items.computed:  # the views are all there is
                assert torch.equal(item['video'], items.view(2, view)['video'])
                places = item['coords'] * torch.tensor([1 - 2 * view, 1, 1])
                exact = data.toy_colours(items.numbers[2], places.numpy())
                assert torch.equal(item['target'], exact) and len(exact) == 300
        assert seen == {0, 1}


@pytest.mark.mutation('data.py', "common.seeded('video', self.names[i])", "common.seeded('video')")
@pytest.mark.mutation('data.py', '(0.5 + j / self.clips) % 1', '(j / self.clips) % 1')
def test_without_a_generator_it_is_the_middle_clip(folder):
    items = opened(folder, pixels=10 ** 9, flip=True)
    for i in range(3):
        item = items.item(i)
        check_item(item, 4 * 24 * 24)
        assert np.array_equal(shown(item['video']), centre(clip(seed=i))[8:12])
        assert torch.equal(item['video'], items.truth(i, 24))
        assert torch.equal(item['video'], items.view(i, 0)['video'])
    assert not torch.equal(items.item(0)['coords'], items.item(1)['coords'])


@pytest.mark.mutation('data.py', 'self.videos[i]) - self.span + 1', 'self.videos[i]) - self.span')
@pytest.mark.mutation('data.py', 'start = int(rng.integers(self.starts(i))) if rng else self',
                      'start = self')
@pytest.mark.mutation('data.py', 'min(self.clips, max(map(self.starts, range(len(self)))))',
                      'self.clips')
def test_clips_start_everywhere_and_views_evenly(folder):
    items, frames = opened(folder), centre(clip(seed=1))
    drawn = [items.item(1, common.seeded('test', k))['video'] for k in range(150)]
    assert {shown(x).tobytes() for x in drawn} == {frames[s:s + 4].tobytes() for s in range(17)}
    assert items.views == 4
    for k, start in enumerate((8, 12, 0, 4)):
        assert np.array_equal(shown(items.view(1, k)['video']), frames[start:start + 4])
    assert {items.draw_view(common.seeded('test', k)) for k in range(40)} == {0, 1, 2, 3}
    assert opened(folder, frames=20).views == 1 and opened(folder, frames=19, flip=True).views == 4


@pytest.mark.mutation('data.py', '(2 * np.arange(F) + 1) * self.span - F, 2 * F)',
                      '2 * np.arange(F) * self.span, 2 * F)')
@pytest.mark.mutation('data.py', 'F == self.frames or not rest.any()', 'True')
def test_every_third_frame_and_those_between(folder):
    items, frames = opened(folder, interval=3), centre(clip(seed=2))
    first = 4  # of the nine places at which 12 of 20 frames may start
    assert np.array_equal(shown(items.truth(2, 24)), frames[first + 1:first + 12:3])
    assert np.array_equal(shown(items.truth(2, 24, frames=12)), frames[first:first + 12])
    for count in (8, 24):
        with pytest.raises(ValueError, match='between its frames'):
            items.truth(2, 24, frames=count)
    with pytest.raises(ValueError, match='known at all times'):
        opened(None, 'toy_video', interval=3)


def test_flags_of_videos():
    flags = dict(dataset='toy_image', frames=8)
    with pytest.raises(ValueError, match='--frames: toy_image holds pictures'):
        data.options_of(flags)
    flags = dict(dataset='toy_video', frames=8, resolution=32, flip=True, seed=1)
    assert data.options_of(flags) == dict(frames=8, resolution=32, flip=True, seed=1)
    with pytest.raises(ValueError, match='at least 1'):
        opened(None, 'toy_video', frames=0)


# ---- files --------------------------------------------------------------------------------------

def write_every_kind(root):
    """A video of each kind that needs no other program, and its frames by name."""
    found = {}
    for seed, name in enumerate(('a/b/frames', 'gif/x.gif', 'webp/x.webp', 'png/x.png', 'x.apng',
                                 'npy/x.npy')):
        found[name] = clip(seed=seed)
        if name.endswith('frames'):
            write_frames(root / name, found[name], '.bmp')
        elif name.endswith('npy'):
            (root / name).parent.mkdir()
            np.save(root / name, found[name])
        else:
            options = dict(lossless=True) if 'webp' in name else {}
            shown = found[name]
            if name.endswith('png'):
                options['format'] = 'PNG'
            if name.endswith('apng'):  # with what viewers show that know of no animation
                options['default_image'], shown = True, np.concatenate([255 - shown[:1], shown])
            write_animated(root / name, shown, duration=40, **options)
    return found


@pytest.mark.mutation('data.py', 'start + 3 * width * height * k', 'start + 3 * width * height')
@pytest.mark.mutation('data.py', 'image.seek(k + first_frame(image))', 'image.seek(0)')
@pytest.mark.mutation('data.py', "getattr(image, 'default_image', False)", '0')
@pytest.mark.mutation('data.py', 'files.open(video.frames[k], to_rgb)',
                      'files.open(video.frames[0], to_rgb)')
@pytest.mark.mutation('data.py', 'Fraction(1000) / Fraction(duration)', 'Fraction(1000)')
@pytest.mark.mutation('data.py', "MOVING = ('.apng', '.npy', *FILMS)", "MOVING = ('.apng', *FILMS)")
def test_every_kind_of_file_gives_back_its_frames(tmp_path):
    written = write_every_kind(tmp_path / 'set')
    with zipfile.ZipFile(tmp_path / 'zipped.zip', 'w') as file:
        for path in (tmp_path / 'set').rglob('*.*'):
            file.write(path, path.relative_to(tmp_path / 'set'))
    for place in ('set', 'zipped.zip', 'zipped'):
        items = opened(tmp_path / place)
        assert sorted(items.names) == sorted(written) and not items.bad
        for i, name in enumerate(items.names):
            frames = centre(written[name])
            for start in range(17):
                assert np.array_equal(shown(items.clip(i, start)), frames[start:start + 4])
            assert np.array_equal(shown(items.truth(i, 24)), frames[8:12])
            whole = data.read_frames(items.files, items.videos[i], range(3, 20, 2))
            assert np.array_equal(whole, written[name][3::2])
        assert 'rates     25.0 min, 25.0 median, 25.0 max frames a second' in [*items.facts()]


@pytest.mark.mutation('metrics.py', "if self.args.fakes == 'reconstructions':", 'if False:')
@pytest.mark.mutation('metrics.py', 'dataset.truth(i, self.R, self.frames, start)',
                      'dataset.truth(i, self.R, self.frames)')
def test_real_clips_of_a_run_are_of_all_times(folder):
    """But those of which there are reconstructions."""
    items = opened(folder)
    run = metrics.VideoRun(SimpleNamespace(config=SimpleNamespace(frames=4, resolution=24)),
                           info=dict(args={}, step=1), args=SimpleNamespace(
                               fakes='samples', seed=0, batch=3, frames=0, res=0))
    run.data = lambda split: items
    source = run.reals('train', 50)
    assert len({*source.items}) == 50 and len({start for _, start in source.items}) > 10
    assert (source.about['used'], source.about['codec']) == (6, '.png')
    clips, = source.read(source.items[:3])
    for (i, start), x in zip(source.items, clips):
        frames = centre(clip(seed=int(items.names[i][1])))[start:start + 4]
        assert np.array_equal(x.permute(1, 2, 3, 0).numpy(), frames)
    name = items.names[source.items[0][0]]
    for file in (folder / name).iterdir():
        file.write_bytes(b'none')
    items.cache.kept.clear()
    with pytest.raises(ValueError, match='would lie between its frames'):
        run.frames = 3
        run.reals('train', 50)
    run.frames = 4
    assert len(source.read(source.items[:3])[0]) < 3 and all(
        bad.startswith(f'{name} from frame ') for bad in source.bad)
    run.args.fakes = 'reconstructions'
    assert list(run.reals('train', 50).items) == [*range(len(items))]


@pytest.mark.mutation('data.py', 'if n not in again]', ']')
@pytest.mark.mutation('data.py', 'and len(seen[n]) <= len(groups[stem]) + 2}', '}')
def test_an_animation_beside_its_frames_is_that_video_again(folder):
    """As sample.py writes them; metrics.py would count each of them twice."""
    for k in (0, 1):
        write_animated(folder / f'v{k}.webp', clip(seed=k)[:20 - k], lossless=True)
    write_animated(folder / 'more.webp', clip(seed=7), lossless=True)
    write_animated(folder / 'v2.webp', clip(30, seed=8), lossless=True)  # another
    items = opened(folder)
    assert items.names == ['more.webp', *(f'v{k}' for k in range(3)), 'v2.webp', 'v3', 'v4', 'v5']
    assert any('2 animations of the frames in a folder' in note for note in items.notes)


@pytest.mark.mutation('data.py', 'self.broken.share_memory_()', 'pass')
@pytest.mark.mutation('data.py', 'len(known) + len(others)', 'len(known)')
def test_broken_files_of_all_workers_count(folder):
    items = opened(folder)
    items.skip(0, 'broken')
    child = os.fork()
    if not child:
        try:
            items.skip(1, 'broken')
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(ValueError, match='3 of 6 videos cannot be used'):
        items.skip(2, 'broken')


@pytest.mark.mutation('data.py', 'kept.get((i, n, R))', 'kept.get((i, n, 24))')
def test_frames_are_read_once_for_each_size(folder, monkeypatch):
    items = opened(folder)
    kept = [items.truth(0, R) for R in (24, 12, 24, 12)]
    small = data.resize(Image.fromarray(centre(clip())[9]), 12)
    assert np.array_equal(shown(kept[1])[1], small)
    monkeypatch.setattr(items.files, 'open', None)
    assert all(torch.equal(items.truth(0, R), x) for R, x in zip((24, 12, 24, 12), kept))


@pytest.mark.mutation('data.py', 'len(others) - self.spared, self', 'len(others), self')
@pytest.mark.mutation('data.py', 'self.captions and [self.captions[k] for k in long]',
                      'self.captions')
@pytest.mark.mutation('data.py', 'if len(v) >= self.span]\n', ']\n')
def test_short_videos_are_listed_and_left_out_however_many(folder, tmp_path):
    for k in (0, 2, 3):
        write_frames(folder / f'short{k}', clip(k))
    table = tmp_path / 'captions.csv'
    table.write_text('file,caption\n' + ''.join(
        f'{p.name},about {p.name}\n' for p in folder.iterdir()))
    (folder / 'short2' / '0.png').write_bytes(b'none')
    try:
        items = opened(folder, captions=str(table))
    except ValueError as error:
        pytest.fail(str(error))
    assert items.names == [f'v{k}' for k in range(6)]
    assert [items.item(i)['text'] for i in (0, 5)] == ['about v0', 'about v5']
    assert ('short3', 'only 3 frames') in items.bad and len(items.bad) == 2  # no folder of none
    (folder / 'v0' / '19.png').write_bytes(b'none')
    try:
        items.clip(0, 16)
    except ValueError as error:
        pytest.fail(str(error))
    assert len(items.bad) == 3
    with pytest.raises(ValueError, match='no videos of 21 frames; train with a smaller --frames'):
        opened(folder, frames=21)


@pytest.mark.mutation('data.py', "return video.fault or 'its", "return '' or 'its")
@pytest.mark.mutation('data.py', 'if min(video.size) >= MIN_SIDE else', 'if video.size else')
def test_what_cannot_be_opened_is_listed(tmp_path):
    write_every_kind(tmp_path)
    (tmp_path / 'npy/x.npy').write_bytes(b'none')
    write_frames(tmp_path / 'tiny', clip()[:, :4, :4])
    items = opened(tmp_path, tolerant=True)
    known = dict(items.bad)
    assert len(items) == 5 and 'magic string' in known['npy/x.npy']
    assert known['tiny'] == 'only 4 x 4 pixels'
    np.save(tmp_path / 'npy/x.npy', clip().astype('float32'))
    known = dict(opened(tmp_path, tolerant=True).bad)
    assert 'float32 (20, 24, 32, 3) where uint8' in known['npy/x.npy']


@pytest.mark.mutation('data.py', '            if place in seen:\n', '            if False:\n')
@pytest.mark.mutation('data.py', 'found.setdefault(identity(path_of(name)), name)',
                      'found.setdefault(name, name)')
def test_a_video_with_several_names_is_used_once(folder):
    """A frame that is a link to another one stays: it has its place in time."""
    (folder / 'v1/3.png').unlink()
    (folder / 'v1/3.png').symlink_to('2.png')
    (folder / 'a').symlink_to('v0')
    write_animated(folder / 'x.gif', clip(seed=9))
    (folder / 'again.gif').symlink_to('x.gif')
    (folder / 'notes.txt').write_text('x')
    items = opened(folder, holdout=dict(train=['v0', 'v1', 'v9'], test=['x.gif', 'again.gif']))
    assert items.names == ['v0', 'v1', 'x.gif'] and items.bad == [('v9', 'not there')]
    assert opened(folder).names == [*(f'v{k}' for k in range(6)), 'x.gif']
    assert len(opened(folder).videos[1]) == 20
    assert 'passed over: 1 folders under a second name, 1 .txt' in opened(folder).notes


@pytest.mark.mutation('data.py', 'self.pick([*self.entries], suffixes)',
                      'self.pick(inside, suffixes)')
def test_frames_that_a_zip_lists_twice_are_one(folder):
    with zipfile.ZipFile(folder / 'set.zip', 'w') as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for k in [*range(20), 4, 5]:
            file.writestr(f'v0/{k}.png', (folder / f'v0/{k}.png').read_bytes())
    items = opened(folder / 'set.zip')
    assert [len(v) for v in items.videos] == [20]
    assert np.array_equal(shown(items.clip(0, 3)), centre(clip()[3:7]))


@pytest.mark.mutation('data.py', 'self.skip(i, reason(error))', 'pass')
@pytest.mark.mutation('data.py', 'if self.names[i] not in dict(self.bad):', 'if True:')
@pytest.mark.mutation('data.py', 'frames = self.source(i)\n', 'frames = self.source(i) + 1\n')
@pytest.mark.mutation('data.py', 'range(len(self.videos[i]))):\n', 'range(4)):\n')
def test_a_clip_that_cannot_be_read_gives_way_to_the_middle_one(folder, capsys):
    (folder / 'v1' / '19.png').write_bytes(b'none')
    items = opened(folder)
    for _ in range(2):
        assert np.array_equal(shown(items.clip(1, 16)), centre(clip(seed=1))[8:12])
    assert [name for name, why in items.bad] == ['v1']
    assert 'skipped: v1: OSError: no picture' in capsys.readouterr().out
    assert items.readable(range(6)) == [0, 1, 2, 3, 4, 5]
    fresh = opened(folder)
    assert not fresh.bad
    fresh.verify()
    assert [name for name, why in fresh.bad] == ['v1']
    (folder / 'v2' / '9.png').write_bytes(b'none')
    assert opened(folder).readable(range(6)) == [0, 1, 3, 4, 5]


def test_small_videos_are_enlarged_and_counted(folder):
    items = opened(folder, resolution=40)
    assert items.notes == ['6 videos smaller than 40 are enlarged']
    assert items.truth(0, 40).shape == (3, 4, 40, 40) and items.largest(0) == 24


# ---- films --------------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', "not films or shutil.which('ffmpeg') and", 'True or')
def test_films_without_ffmpeg_are_one_line_with_the_cure(folder, monkeypatch):
    (folder / 'film.mp4').write_bytes(b'none')
    monkeypatch.setenv('PATH', '')
    cure = 'film.mp4, are not on the PATH.*extract the frames'
    with pytest.raises(ValueError, match=cure) as error:
        opened(folder)
    assert '\n' not in str(error.value)
    assert len(data.find_files(folder).names) == 120  # as pictures the frames can be had


STAND_INS = dict(
    ffprobe="""
about = dict(width=16, height=8, avg_frame_rate='30000/1001', nb_read_packets='14',
             duration='0.4338')
known = 'broken' not in sys.argv[-1]
print(json.dumps(dict(streams=[about])) if known else '{}')
known or print('first', 'moov atom not found', sep=chr(10), file=sys.stderr)""",
    ffmpeg="""
argv = dict(zip(sys.argv, sys.argv[1:]))
assert argv['-vf'].startswith('fps=30000/1001')
first = math.ceil(float(argv['-ss']) * 30000 / 1001)
bits = 1 if argv.get('-pix_fmt') == 'rgb24' else 2  # it is a film of 10 bits
for k in range(first, min(first + int(argv['-frames:v']), 11)):
    most = str(256 ** bits - 1).encode()
    sys.stdout.buffer.write(b'P6\\n16 8\\n%s\\n' % most + bytes([k]) * 3 * 16 * 8 * bits)""")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Programs in the place of ffprobe and ffmpeg; of 13 frames 11 are there, that of k is k."""
    (tmp_path / 'bin').mkdir()
    for name, text in STAND_INS.items():
        path = tmp_path / 'bin' / name
        path.write_text(f'#!{sys.executable}\nimport json, math, sys{text}\n')
        path.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'), prepend=os.pathsep)


@pytest.mark.mutation('data.py', 'first - Fraction(1, 4)', 'first + Fraction(1, 4)')
@pytest.mark.mutation('data.py', "min(count, int(float(about['duration']) * rate + 0.01))",
                      'count')
@pytest.mark.mutation('data.py', "str(last - first + 1), '-f'", "str(len(numbers)), '-f'")
@pytest.mark.mutation('data.py', "'-pix_fmt', 'rgb24', '-']", "'-']")
@pytest.mark.mutation('data.py', "f'it ends before frame {k}'", "''")
@pytest.mark.mutation('data.py', "done.stderr.splitlines()] or ['no video in it'])[-1]",
                      "done.stderr.splitlines()] or ['no video in it'])[0]")
def test_films_are_read_by_ffmpeg(tmp_path, stand_ins):
    for name in ('a.mp4', 'broken.mkv'):
        (tmp_path / 'set' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'set' / name).write_bytes(b'none')
    items = opened(tmp_path / 'set', resolution=8, tolerant=True)
    video, = items.videos
    assert (len(video), video.size, round(float(video.rate), 2)) == (13, (16, 8), 29.97)
    assert items.bad == [('broken.mkv', 'ValueError: moov atom not found')]
    for numbers in ([0, 1, 2], [3, 6, 9], range(7, 11)):
        try:
            frames = data.read_frames(items.files, video, numbers)
        except Exception as error:
            pytest.fail(str(error))
        assert frames.shape[1:] == (8, 16, 3) and [*frames[:, 4, 4, 1]] == [*numbers]
    with pytest.raises(OSError, match='it ends before frame 11'):
        data.read_frames(items.files, video, range(8, 13))
    with zipfile.ZipFile(tmp_path / 'films.zip', 'w') as file:
        file.writestr('a.mp4', b'none')
    with pytest.raises(ValueError, match='unpack the zip'):
        opened(tmp_path / 'films.zip')


@pytest.mark.skipif(not (shutil.which('ffmpeg') and shutil.which('ffprobe')), reason='no ffmpeg')
def test_ffmpeg_gives_back_lossless_frames(tmp_path):
    frames = clip(50, seed=9)
    (tmp_path / 'set').mkdir()
    for name, codec, rate in (('a.mkv', 'ffv1', '30000/1001'), ('b.avi', 'ffv1', '12'),
                              ('c d:e.mkv', 'ffv1', '240')):
        subprocess.run(['ffmpeg', '-v', 'error', '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s',
                        '32x24', '-r', rate, '-i', '-', '-c:v', codec, '-pix_fmt', 'bgr0',
                        f'file:{tmp_path}/set/{name}'], input=frames.tobytes(), check=True)
    items = opened(tmp_path / 'set')
    assert [len(v) for v in items.videos] == [50, 50, 50]
    for i in range(3):
        for start in (0, 1, 17, 30, 46):
            assert np.array_equal(shown(items.clip(i, start)), centre(frames)[start:start + 4])
    items.verify()
    assert not items.bad


# ---- data sets ----------------------------------------------------------------------------------

@pytest.mark.mutation('data.py', "p & {'test', 'val'}", "p & {'test'}")
@pytest.mark.mutation('data.py', "p.removeprefix('sky_') for p", 'p for p')
def test_skytimelapse_layouts(tmp_path):
    for root, train, test in (('a', 'sky_train/id/id_', 'sky_test/id2/id2_'),
                              ('b', 'train/c', 'val/d'), ('c', 'x/train/c', 'x/test/d')):
        sides = dict(train=[f'{train}1'], test=[f'{test}{k}' for k in (1, 2, 10)])
        for name in sum(sides.values(), []):
            write_frames(tmp_path / root / name, clip(6), '.jpg')
        (tmp_path / root / train / '..' / 'z6Yr7KDZhm0').mkdir(parents=True)  # empty, as published
        for side, names in sides.items():
            items = opened(tmp_path / root, 'skytimelapse', side)
            assert items.names == names and items.splits() == sides
    for name in ('one', 'two'):  # without folders of the sides it is divided as other data are
        write_frames(tmp_path / 'd' / name, clip(6))
    assert len(opened(tmp_path / 'd', 'skytimelapse', 'train')) == 1


@pytest.mark.mutation('data.py', 'if image.format in ANIMATED else 1', '')
def test_previews_and_pages_are_no_animations(tmp_path):
    for name, kind in (('photo.jpg', 'MPO'), ('pages.tif', 'TIFF')):
        first, *others = [Image.new('RGB', (9, 8), (k, 9, 9)) for k in range(3)]
        first.save(tmp_path / name, kind, save_all=True, append_images=others)
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 3
    assert not data.Videos.lies_at(tmp_path)


@pytest.mark.mutation('data.py', 'len(glance(files, n)) > 1 for', 'len(glance(files, n)) > 0 for')
def test_folders_of_frames_are_pictures_unless_named_videos(tmp_path, folder):
    write_every_kind(tmp_path / 'kinds')
    for kind in ('gif', 'webp', 'png', 'npy'):
        assert data.Videos.lies_at(tmp_path / 'kinds' / kind)
    assert not data.Videos.lies_at(folder) and not data.Videos.lies_at(tmp_path / 'nothing')
    (tmp_path / 'x.zip').write_bytes(b'none')
    assert not data.Videos.lies_at(tmp_path / 'x.zip')


def check(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['data.py', 'check', *map(str, argv)])
    data.main()


@pytest.mark.mutation('data.py', ' // max(x.shape[3] // x.shape[2], 1)', '')
@pytest.mark.mutation('data.py', 'return shown.transpose(1, 2)',
                      'return shown.flip(1).transpose(1, 2)')
def test_check_prints_lengths_and_draws_strips(tmp_path, monkeypatch, capsys):
    for k in range(3):
        write_animated(tmp_path / f'set/{k}.gif', clip(20 + k, seed=k), duration=50)
    write_animated(tmp_path / 'set/short.gif', clip(7), duration=50)
    out = tmp_path / 'look.png'
    check(monkeypatch, tmp_path / 'set', '--out', out, '--res', 24)
    printed = capsys.readouterr().out.splitlines()
    assert f'video at {tmp_path / "set"}' in printed
    assert 'frames    20 min, 21 median, 22 max' in printed
    assert 'rates     20.0 min, 20.0 median, 20.0 max frames a second' in printed
    assert '  short.gif: only 7 frames' in printed
    strips = np.asarray(Image.open(out))
    assert strips.shape == (3 * 26 + 2, 8 * 24 + 4, 3)
    assert np.array_equal(strips[2:26, 2:-2][:, 24:48], centre(clip(20))[4])  # 2 + 2 of 2 .. 17


def test_check_of_the_toy(tmp_path, monkeypatch, capsys):
    check(monkeypatch, 'toy_video', '--out', tmp_path / 'toy.png', '--res', 16, '--frames', 4)
    assert 'toy_video: computed; train seeds 0 to 1999' in capsys.readouterr().out
    assert Image.open(tmp_path / 'toy.png').size == (2 * (4 * 16 + 2) + 2, 6 * 18 + 2)


def test_a_run_gets_its_split_back(folder):
    train = opened(folder, split='train')
    args = dict(vars(data.VideoConfig()), dataset='video', data=str(folder), flip=True, seed=0,
                resolution=24, captions='', frames=4)
    info = dict(args=args, splits=json.loads(json.dumps(train.splits())))
    again = [data.open_run_data(info, side) for side in ('train', 'test')]
    assert again[0].names == train.names and not {*again[1].names} & {*train.names}
    assert again[0].flip and not again[1].flip and again[0].frames == 4
