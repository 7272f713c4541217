"""Draw samples from a trained run, at any resolution: they are functions.

    python sample.py --res 512                        # newest run, or the bundled model
    python sample.py --run runs/NAME --sweep 64,128,512 --num 4 --seed 7
    python sample.py --res 1024 --box=-0.5,0,-0.5,0   # zoom: a quarter of the width and height
    python sample.py --zoom 0.3,-0.2,16 --num 1       # an animation towards a point
    python sample.py --export boat.pt --num 1         # one sample as a function: inr.load_function
    python sample.py --num 5 --interpolate 8          # between neighbouring seeds
    python sample.py --reconstruct PICTURE_OR_FOLDER --res 256x384
    python sample.py --run chairs --res 256 --text "a chair with four legs" --turntable
    python sample.py --run clips --frames 64 --res 512          # any number of frames, any size
    python sample.py --run clips --slow 4 --time=-0.5,0.5       # what lies between the frames
    python sample.py --run scenes --views 12 --elevation 30 --res 256 --turntable --mesh 128

Every size is rendered from the same latents, --batch of which are made and written at a time.
Pictures go to --out, a folder for each size with one PNG a sample, and a grid; surfaces likewise as
meshes, and the grid shows them; videos as folders of frames and as animations, and the grid has a
row of frames for each; radiance fields as folders of views with their depths and opacities, and the
grid has a row of views for each. `OUTPUTS` at the end says, for each domain, what is encoded, what
is written, and which flags it has.
"""
import math
import re
import signal
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Callable

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import torch
import torch.nn.functional as F

import common
import data
import ldm as stage2
from common import flag
from encoders import text_reader
from inr import draw_mesh, focal_length, orbit, save_function

DEMO = Path(__file__).parent / 'assets' / 'demo.pt'  # Fluent emoji, as in the README


def parse_sizes(text):
    """'512', '256x384' (height x width) or a list '64,128x96' -> [(h, w), ...]."""
    sizes = []
    for part in text.split(','):
        match = re.fullmatch(r'(\d+)(?:x(\d+))?', part.strip())
        if not match:
            raise ValueError(f'--res {text}: sizes look like 512 or 256x384')
        sizes.append((int(match[1]), int(match[2] or match[1])))
        common.require(1 <= min(sizes[-1]) and max(sizes[-1]) <= 65535,
                       f'--res {part}: each side must be 1 to 65535 pixels')
    return sizes


def parse_box(values):
    """(x_lo, x_hi, y_lo, y_hi) in [-1, 1] -> ((x_lo, x_hi), (y_lo, y_hi)); None for none."""
    if not values:
        return None
    good = len(values) == 4 and values[0] < values[1] and values[2] < values[3]
    common.require(good and min(values) >= -1 and max(values) <= 1, f'--box {values}: '
                   'x_lo,x_hi,y_lo,y_hi, each pair increasing and within -1..1')
    return (values[0], values[1]), (values[2], values[3])


def parse_zoom(values):
    """(x, y, factor) of --zoom; None for none."""
    if not values:
        return None
    good = len(values) == 3 and max(map(abs, values[:2])) <= 1 and 1 < values[2] <= 1000
    common.require(good, f'--zoom {values}: X,Y,FACTOR, a point within -1..1 and how much larger, '
                   'up to 1000')
    return values


def build_parser():
    """Every flag, with its default and help."""
    parser = common.Parser(__doc__)
    parser.add_argument('--run', default='', help='run folder, its name, or a checkpoint file; '
                        'empty = the newest run, or the bundled model of emoji if there is none')
    parser.add_argument('--out', default='out', help='folder for the pictures')
    parser.add_argument('--res', default='', help='pictures: size N or HxW of the whole square '
                        'frame, stretched if they differ; empty = the training resolution. '
                        'Surfaces: cells along each side of the box; empty = 128. Radiance fields: '
                        'size of the views')
    parser.add_argument('--sweep', default='', help='several sizes of the same samples, 64,128,512')
    parser.add_argument('--num', type=common.at_least(1, int), default=16, help='samples')
    parser.add_argument('--seed', type=common.at_least(0, int), default=0,
                        help='seed of the first; the next count up')
    parser.add_argument('--sampler', default='', choices=stage2.SAMPLERS, help='solver of the '
                        f'reverse process; empty = {stage2.SAMPLER}, for --interpolate dpmpp')
    parser.add_argument('--steps', type=common.at_least(1, int, stage2.T), default=None,
                        help=f'network calls; default {stage2.STEPS}, for ddpm 1000')
    parser.add_argument('--eta', type=common.at_least(0, float, 100), default=None,
                        help='noise that sde-dpmpp puts back, '
                        f'0 = none, the ODE; default {stage2.ETA:g}')
    parser.add_argument('--tol', type=common.at_least(stage2.FINEST, float, 1), default=None,
                        help='rtol and atol of rk45; default 1e-3')
    parser.add_argument('--label', type=common.at_least(0, int), default=None,
                        help='class of a conditional run')
    parser.add_argument('--text', default='', help='what the samples of a text-conditional run '
                        'should be')
    parser.add_argument('--reader', default='', help="where the text encoder's files of a run that "
                        'reads CLIP or an .npz are now, if they have moved')
    parser.add_argument('--guidance', type=common.at_least(-1000, float, 1000), default=None,
                        help='weight w of classifier-free guidance, 1 = none; default 3 for '
                        '--text (Table 7), else 1')
    parser.add_argument('--export', default='', metavar='FILE', help='write the one sample to FILE '
                        'as a function, for inr.load_function')
    parser.add_argument('--interpolate', type=common.at_least(2, int), default=0, metavar='K',
                        help='K pictures from each seed to the next')
    parser.add_argument('--reconstruct', default='', metavar='PATH',
                        help='encode this instead of sampling: a picture or a folder of them; a '
                        'mesh or point cloud; an animated file or a folder of videos; a posed '
                        'scene or a folder of them')
    parser.add_argument('--amp', type=common.parse_bool, nargs='?', const=True, default=False,
                        help='the diffusion model in bfloat16')
    parser.add_argument('--batch', type=common.at_least(1, int), default=16,
                        help='samples denoised at a time')
    parser.add_argument('--device', default='auto', help='cpu, cuda, ...')
    for output in OUTPUTS.values():
        parser.add_config(output.flags)
    return parser


def condition(args, ldm, device):
    """What --label or --text ask of every sample, with a first axis of 1; None without."""
    if args.text:
        common.require(ldm.config.text, f'--text {args.text!r}: this run reads no text')
        c, size = ldm.config, len(args.text.encode())
        if c.text == 'bytes' and size > c.text_length:
            print(f'note: --text: this run reads {c.text_length} bytes, of these {size} the first')
        return text_reader(args.reader or c.text, device, c.text_length)([args.text])
    if args.label is None:
        return None
    common.require(args.label < ldm.config.num_classes, f'--label {args.label}: this run has '
                   f'{ldm.config.num_classes} classes')
    return torch.tensor([args.label])


def noise_between(first, numbers, K, shape):
    """z_T (B, *shape) of pictures with these numbers, of which K lead from a seed to the next."""
    weights = torch.linspace(0, 1, K)
    ends = [stage2.initial_noise([first + k // K, first + k // K + 1], shape) for k in numbers]
    return torch.stack([stage2.slerp(a, b, weights[k % K]) for (a, b), k in zip(ends, numbers)])


def draw(args, vae, ldm):
    """Names of the samples or interpolations asked for, and an iterator that makes the latents."""
    K, device = args.interpolate, ldm.z_mean.device
    names = [f'{args.seed + k:06d}' for k in range(args.num)]
    if K:
        names = [f'{name}_{k:03d}' for name in names[:-1] for k in range(K)]
    sampler = args.sampler or ('dpmpp' if K else stage2.SAMPLER)
    steps = args.steps or (stage2.T if sampler == 'ddpm' else stage2.STEPS)
    eta = stage2.ETA if args.eta is None else args.eta
    tol = args.tol or 1e-3
    guidance = args.guidance if args.guidance is not None else 3.0 if args.text else 1.0
    one = condition(args, ldm, device)

    def latents():
        nfe = []
        for start in range(0, len(names), args.batch):
            numbers = range(len(names))[start:start + args.batch]
            seeds = [args.seed + k for k in numbers]
            z_T = noise_between(args.seed, numbers, K, ldm.shape) if K else None
            cond = None if one is None else one.expand(len(seeds), *one.shape[1:])
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                z, calls = stage2.generate(vae, ldm, seeds, cond, guidance, sampler, steps,
                                           tol, tol, args.batch, z_T, return_nfe=True,
                                           progress=True, eta=eta)
            nfe += calls
            yield from z
        twice = ' of both branches' if guidance != 1 else ''
        common.tqdm.write(f'{len(names)} latents, {sampler}, {sum(nfe) / len(nfe):g} network '
                          f'calls{twice} each')
    return names, latents()


def file_name(name):
    """The name with all but letters, digits, _ and - replaced by _."""
    return re.sub(r'[^\w-]', '_', name)


def encode_items(items, vae, device):
    """Unique file names of the items that can be read, and an iterator over posterior means."""
    items.verify()
    good = items.readable(range(len(items)))
    encoded = {items.names[i] for i in good}  # some of which are doubtful
    doubtful = [f'{name}: {why}' for name, why in items.bad if name in encoded]
    common.list_notes([*items.notes, *doubtful],
                      [(name, why) for name, why in items.bad if name not in encoded])
    place = Path(items.place).resolve().name  # of a clip whose frames lie there: it has no name
    names = [file_name(items.names[i].replace('/', '__') or place) for i in good]
    ordered = sorted(names, key=lambda name: data.natural(f'{name}.png'))
    if len({*names}) < len(names) or ordered != names:  # numbered, they are unique and in order
        names = [f'{k:06d}_{n}' for k, n in enumerate(names)]
    return names, (vae.encode(items.view(i, 0)[vae.reads][None].to(device)).mean[0] for i in good)


# ---- pictures ----------------------------------------------------------------------------------

@dataclass
class FrameFlags:
    """Flags of runs that make pictures or videos."""
    box: tuple = flag((), 'x_lo,x_hi,y_lo,y_hi in -1..1: render this region only '
                      '(--box=-1,0,-1,0 is the upper left quarter)', low=-1)
    antialias: bool = flag(True, 'below the training resolution, average instead of point-sampling')


@dataclass
class PictureFlags(FrameFlags):
    """Flags of runs that make pictures."""
    zoom: tuple = flag((), 'X,Y,FACTOR: a GIF of each, from the whole to FACTOR times as large at '
                       'the point X,Y in -1..1', low=-1)


def check_pictures(args, sizes):
    """ValueError for an invalid --box or --zoom."""
    parse_box(args.box)
    parse_zoom(args.zoom)


def encode_pictures(path, vae, training, device):
    """Names and posterior means of a picture, or of all pictures of a folder or zip."""
    pictures = data.FilePictures(data.find_files(path), path, data.Selection('all', tolerant=True),
                                 resolution=vae.config.resolution)
    return *encode_items(pictures, vae, device), None


def zoom(vae, xi, size, args, octave=16):
    """Frames (3,h,w), uint8, of a zoom by --zoom, `octave` of them for each doubling."""
    x, y, factor = parse_zoom(args.zoom)
    count = math.ceil(octave * math.log2(factor))
    for k in common.tqdm(range(count + 1), desc='zoom', unit='frame'):
        half = factor ** (-k / count)  # of the frame's side; its middle keeps it inside the picture
        middle = (max(min(c, 1 - 1 / factor), 1 / factor - 1) * (1 - half) / (1 - 1 / factor)
                  for c in (x, y))
        box = [(m - half, m + half) for m in middle]
        yield data.to_uint8(vae.signal(xi, size, box, args.antialias)[0]).cpu()


def within(most, h, w):
    """The height and width, shrunk alike, if need be, to at most `most`."""
    shrink = min(1, most / max(h, w))
    return max(1, round(h * shrink)), max(1, round(w * shrink))


@torch.no_grad()
def write_pictures(vae, items, sizes, args, place):
    """Render each latent at each size to OUT/HxW/NAME.png, and thumbnails to OUT/grid_HxW.png.

    A grid holds the first 64 pictures, rendered anew where they are larger than 256.
    """
    out, box, shown = Path(args.out), parse_box(args.box), {size: [] for size in sizes}
    for latent, name in items:
        xi = vae.decode(latent[None])
        for (h, w), thumbnails in shown.items():
            small = within(256, h, w)
            picture = data.to_uint8(vae.signal(xi, (h, w), box, args.antialias)[0])
            data.save_png(out / f'{h}x{w}' / f'{name}.png', picture)
            if len(thumbnails) < 64:
                thumbnails.append(picture if small == (h, w) else
                                  data.to_uint8(vae.signal(xi, small, box, args.antialias)[0]))
        if args.zoom:
            data.save_animation(out / f'zoom_{name}.gif', zoom(vae, xi, sizes[0], args), 0.06)
    for (h, w), thumbnails in shown.items():
        data.save_grid(out / f'grid_{h}x{w}.png', torch.stack(thumbnails))


# ---- surfaces ----------------------------------------------------------------------------------

@dataclass
class SurfaceFlags:
    """Flags of runs that make surfaces."""
    format: str = flag('obj', 'of the meshes', choices=tuple(s[1:] for s in data.MESH_WRITERS))
    threshold: float = flag(0.0, "occupancy at which a surface lies; 0 = the run's own")
    coarse: int = flag(64, 'cells of the first grid, in which surface is looked for; as many as '
                       '--res find all', low=1)
    turntable: bool = flag(False, 'a GIF of what was made, turning, too')


def check_surfaces(args, sizes):
    """ValueError for an invalid --threshold or --res."""
    common.require(args.threshold < 1, f'--threshold {args.threshold}: must be below 1')
    common.require(all(h == w <= 4096 for h, w in sizes), f'--res {args.sweep or args.res}: this '
                   'run makes surfaces; give one number, the cells along each side of the box, up '
                   'to 4096')


@torch.no_grad()
def encode_shape(path, vae, training, device):
    """Name and posterior mean of a mesh or point cloud, and its place: old = new * scale + loc.

    It is seen as shapes are in training, whose flags `training` are: so many points, with noise,
    the longest side 1/1.1 of the box.
    """
    points, loc, scale = data.unit_cube(data.read_cloud(path, training['points']))
    noise = common.seeded('cloud noise').standard_normal(points.shape)
    cloud = points / data.HALF_BOX + noise * training['noise'] / vae.config.extent
    z = vae.encode(torch.from_numpy(cloud.astype('float32'))[None].to(device)).mean
    return [file_name(Path(path).stem)], z, (loc, scale * data.HALF_BOX / vae.config.extent)


def turntable(surfaces, frames=36):
    """Frames (3,H,W), uint8, of surfaces in [-1,1]^3 that turn, side by side in a grid."""
    for k in common.tqdm(range(frames), desc='turntable', unit='frame'):
        drawn = [draw_mesh(v, f, azimuth=30 + 360 * k / frames) for v, f in surfaces]
        yield data.image_grid(torch.stack(drawn))


@torch.no_grad()
def write_meshes(vae, items, sizes, args, place):
    """The surface of each latent at each resolution to OUT/R/NAME.obj, and a grid of the first 64.

    `place` = (loc, scale) of what was reconstructed: vertices go out as v * scale + loc.
    """
    (loc, scale), out, first = place or (0.0, 1.0), Path(args.out), []
    shown = {R: [] for R, _ in sizes}
    for latent, name in items:
        xi = vae.decode(latent[None])
        for resolution, drawn in shown.items():
            (vertices, faces), = vae.signal(xi, resolution, args.threshold or None, args.coarse)
            data.write_mesh(out / f'{resolution}' / f'{name}.{args.format}',
                            vertices.double().cpu().numpy() * scale + loc, faces.cpu(),
                            vae.normals(xi, vertices).cpu())
            surface = vertices.cpu() / vae.config.extent, faces.cpu()
            if len(drawn) < 64:
                drawn.append(draw_mesh(*surface, 256))
            if args.turntable and resolution == sizes[0][0] and len(first) < 16:
                first.append(surface)
    for resolution, drawn in shown.items():
        data.save_grid(out / f'grid_{resolution}.png', torch.stack(drawn))
    if args.turntable:
        data.save_animation(out / 'turntable.gif', turntable(first))


# ---- videos ------------------------------------------------------------------------------------

@dataclass
class VideoFlags(FrameFlags):
    """Flags of runs that make videos."""
    frames: int = flag(0, 'of a video, evenly spaced over its time; 0 = as many as in training',
                       high=10_000)
    slow: int = flag(1, 'slow motion: so many times as many frames, at the same frame rate',
                     high=1000)
    time: tuple = flag((), 'LO,HI in -1..1: this part of the time only', low=-1)
    fps: float = flag(8.0, 'frames a second of the animation', low=0.1)
    animation: str = flag('webp', 'webp and png (APNG) are exact', choices=('webp', 'png', 'gif'))


def check_videos(args, sizes):
    """ValueError for an invalid --box or --time."""
    parse_box(args.box)
    t = args.time
    common.require(args.animation != 'webp' or all(max(s) < 2 ** 14 for s in sizes), '--res: '
                   'webp ends at 16383 pixels; give --animation png')
    common.require(args.animation != 'gif' or args.fps <= 50, f'--fps {args.fps:g}: GIFs have 50 '
                   'at most')
    common.require(not t or len(t) == 2 and -1 <= t[0] < t[1] <= 1, f'--time {t}: LO,HI, '
                   'increasing and within -1..1')


def encode_videos(path, vae, training, device):
    """Names and posterior means of the videos of a folder, a zip or an animated file."""
    options = {k: training[k] for k in ('resolution', 'frames', 'interval')}
    files = data.find_files(path, data.VIDEO_SUFFIXES)
    videos = data.FileVideos(files, data.find_videos(files), path,
                             data.Selection('all', tolerant=True), **options)
    return *encode_items(videos, vae, device), None


def video_frames(vae, xi, size, args):
    """The frames (3,h,w), uint8, that --frames, --slow and --time ask for, one at a time."""
    count, box = (args.frames or vae.config.frames) * args.slow, parse_box(args.box)
    common.require(count <= 10_000, f'--frames and --slow: {count} frames, at most 10,000')
    ends = torch.linspace(*(args.time or (-1, 1)), count + 1).tolist()
    for part in zip(ends, ends[1:]):
        yield data.to_uint8(vae.signal(xi, size, box, args.antialias, 1, part)[0, :, 0]).cpu()


@torch.no_grad()
def write_videos(vae, items, sizes, args, place):
    """Each latent at each size to OUT/HxW/NAME/00000.png ... and OUT/HxW/NAME.webp.

    OUT/grid_HxW.png has eight frames, at most 256 high and wide, of each of the first 16, in a row.
    """
    out, shown = Path(args.out), {size: [] for size in sizes}
    for latent, name in items:
        xi = vae.decode(latent[None])
        for (h, w), rows in shown.items():
            frames = []
            for k, frame in enumerate(video_frames(vae, xi, (h, w), args)):
                data.save_png(out / f'{h}x{w}' / name / f'{k:05d}.png', frame)
                frames.append(frame)
            data.save_animation(out / f'{h}x{w}' / f'{name}.{args.animation}', frames, 1 / args.fps)
            if len(rows) < 8 * 16:
                eight = torch.stack([frames[i * len(frames) // 8] for i in range(8)]).float()
                rows += F.interpolate(eight, within(256, h, w), mode='area').round().byte()
    for (h, w), rows in shown.items():
        data.save_grid(out / f'grid_{h}x{w}.png', torch.stack(rows), 8)


# ---- radiance fields ---------------------------------------------------------------------------

@dataclass
class FieldFlags:
    """Flags of runs that make radiance fields."""
    views: int = flag(8, 'pictures of each, from a circle round it', high=10_000)
    azimuth: float = flag(30.0, 'degrees about the upward axis of the first camera', low=-360)
    elevation: float = flag(20.0, 'degrees of the cameras above the horizon', low=-90)
    distance: float = flag(4.0, 'of the cameras from the middle of the box, in half sides of it',
                           low=0.1)
    fov: float = flag(40.0, 'degrees that the shorter side of a view shows', low=1)
    turntable: bool = flag(False, 'a GIF of what was made, turning, too')
    mesh: int = flag(0, 'a coloured mesh (.ply), too, of so many cells along each side of the box',
                     high=4096)
    level: float = flag(10.0, "density, per half side of the box, at the mesh's surface", low=1e-3)


def check_fields(args, sizes):
    """ValueError for angles that no camera has."""
    common.require(args.fov < 180, f'--fov {args.fov}: must be below 180')
    common.require(args.elevation <= 90, f'--elevation {args.elevation}: from -90 to 90')
    common.require(args.mesh or args.level == FieldFlags.level, '--level: has no effect without '
                   '--mesh')


def encode_scenes(path, vae, training, device):
    """Names and posterior means of the scenes at a folder or .npz, in the box of the run."""
    options = {f.name: training[f.name] for f in fields(data.NerfConfig)}
    options['box'] = (*vae.config.centre, vae.config.extent)
    options['toy_views'] = data.NerfConfig.toy_views  # files have theirs
    scenes = data.FileScenes('nerf', Path(path), data.Selection('all', tolerant=True), **options)
    return *encode_items(scenes, vae, device), None


def poses(vae, args, count):
    """Poses (4,4), in the box, of `count` cameras all round a field."""
    return [orbit(args.azimuth + 360 * k / count, args.elevation, args.distance, vae.config.up)
            for k in range(count)]


def write_views(vae, xi, size, args, place, name):
    """Views of a field as PLACE/NAME/00.png, what else is known of them in views.npz beside them.

    That has depths, opacities and the cameras: poses (V,4,4), camera to world in OpenCV axes, and
    focal length in pixels. Places and depths are in the units of the data. Pictures of depths and
    opacities go to PLACE_depth and PLACE_opacity. Returns the views (V,3,h,w).
    """
    around, c = poses(vae, args, args.views), vae.config
    seen = vae.render_views(xi, around, size, args.fov)
    rgb, depth, opacity = (seen[k][0].cpu() for k in ('rgb', 'depth', 'opacity'))
    near = opacity * (1 - (depth - args.distance + math.sqrt(3)) / math.sqrt(12))  # 1: nearest
    for k, maps in enumerate(zip(rgb, near[:, None], opacity[:, None])):
        for kind, x in zip(('', '_depth', '_opacity'), maps):
            file = place.with_name(place.name + kind) / name / f'{k:02d}.png'
            data.save_png(file, x.expand(3, -1, -1) * 2 - 1)
    places = torch.stack(around)
    places[:, :3, 3] = vae.in_data(places[:, :3, 3])
    data.save_npz(place / name / 'views.npz', True, depth=depth * c.extent, opacity=opacity,
                  poses=places, focal=focal_length(args.fov, size))
    return rgb * 2 - 1


def turning(vae, shown, size, args, frames=36):
    """Frames (3,H,W), uint8, of fields (their xi) that turn, side by side in a grid."""
    occupied = [vae.occupied(xi) for xi in shown]
    for pose in common.tqdm(poses(vae, args, frames), desc='turntable', unit='frame'):
        drawn = [vae.render_views(xi, [pose], size, args.fov, occupied=cells)['rgb'][0, 0].cpu()
                 for xi, cells in zip(shown, occupied)]
        yield data.image_grid(data.to_uint8(torch.stack(drawn) * 2 - 1))


@torch.no_grad()
def write_fields(vae, items, sizes, args, place):
    """Views of each latent at each size to OUT/HxW/NAME/, and a grid with a row for each of 16.

    See `write_views` for what else there is.

    With --mesh, surfaces in the units of the data to OUT/NAME.ply.
    """
    out, shown, first = Path(args.out), {size: [] for size in sizes}, []
    for latent, name in items:
        xi = vae.decode(latent[None])
        if args.turntable and len(first) < 16:
            first.append(xi)
        for (h, w), rows in shown.items():
            pictures = write_views(vae, xi, (h, w), args, out / f'{h}x{w}', name)
            if len(rows) < 16:
                rows.append(F.interpolate(pictures[:8], within(128, h, w), mode='area'))
        if args.mesh:
            (vertices, faces, colours), = vae.surface(xi, args.mesh, args.level)
            data.write_mesh(out / f'{name}.ply', vertices.cpu(), faces.cpu(),
                            vae.normals(xi, vertices).cpu(), colours=colours.cpu())
    for (h, w), rows in shown.items():
        data.save_grid(out / f'grid_{h}x{w}.png', torch.cat(rows), len(rows[0]))
    if args.turntable:
        data.save_animation(out / 'turntable.gif', turning(vae, first, sizes[0], args))


# ---- the command line --------------------------------------------------------------------------

@dataclass(frozen=True)
class Output:
    """What a domain's samples become."""
    makes: str  # what its runs are said to make
    flags: type  # a dataclass; runs whose output does not have a flag refuse it
    check: Callable  # (args, sizes or []): raises ValueError for values that cannot be
    encode: Callable  # (path, vae, flags of stage 1, device) -> names, latents, place or None
    write: Callable  # (vae, iterable of (latent (C,L), name), sizes, args, place)
    side: Callable  # config -> the size by default


OUTPUTS = dict(
    image=Output('pictures', PictureFlags, check_pictures, encode_pictures, write_pictures,
                 lambda config: config.resolution),
    shape=Output('surfaces', SurfaceFlags, check_surfaces, encode_shape, write_meshes,
                 lambda config: 128),
    video=Output('videos', VideoFlags, check_videos, encode_videos, write_videos,
                 lambda config: config.resolution),
    nerf=Output('radiance fields', FieldFlags, check_fields, encode_scenes, write_fields,
                lambda config: config.side),
)


MOST = 1_000_000  # names of one call, and files of a folder
ONE = '--export: writes one sample; give --num 1, or one thing to --reconstruct'


SAMPLING = ('num', 'seed', 'batch', 'text', 'label', 'guidance', 'interpolate', 'sampler', 'steps',
            'eta', 'tol', 'amp')


def check_flags(args):
    """Refuse what no run can do."""
    asked = f'--num {args.num}' + f', --interpolate {args.interpolate}' * bool(args.interpolate)
    common.require(args.num * max(args.interpolate, 1) <= MOST, f'{asked}: at most {MOST:,} things '
                   'at once; repeat the command with another --seed')
    common.require(args.eta is None or args.sampler in ('', 'sde-dpmpp'),
                   f'--eta {args.eta}: for sde-dpmpp alone')
    common.require(args.tol is None or args.sampler == 'rk45', f'--tol {args.tol}: for rk45 alone')
    common.require(args.steps is None or args.sampler != 'rk45', f'--steps {args.steps}: rk45 '
                   'takes as many as --tol needs')
    common.require(not args.interpolate or args.num > 1 and args.eta is None and
                   args.sampler not in ('sde-dpmpp', 'ddpm'),
                   '--interpolate K: needs --num of at least 2 and a deterministic sampler')
    common.require(not args.export or args.reconstruct or args.num == 1, ONE)
    common.require(args.guidance in (None, 1) or args.label is not None or args.text,
                   f'--guidance {args.guidance}: has no effect without --label or --text')
    common.require(not (args.res and args.sweep), '--res and --sweep: give one of them')
    common.require(not (args.text and args.label is not None), '--text and --label: give one')
    usual = build_parser().get_default
    asked = [f'--{name}' for name in SAMPLING if getattr(args, name) != usual(name)]
    common.require(not (args.reconstruct and asked), '--reconstruct: nothing is sampled; leave '
                   f'{", ".join(asked)} out')
    common.require(not args.reader or args.text, '--reader: has no effect without --text')


def check_domain(args, output, sizes):
    """ValueError for flags that mean nothing for what the run makes."""
    own = [f.name for f in fields(output.flags)]
    for other in OUTPUTS.values():
        for f in [f for f in fields(other.flags) if f.name not in own]:
            common.require(getattr(args, f.name) == f.default, f'--{f.name}: is for {other.makes}; '
                           f'this run makes {output.makes}')
    output.check(args, sizes)


SIZE_FOLDER = r'\d+(x\d+)?'  # of results, in OUT


def refuse_overwriting(path, out, names):
    """ValueError if what is encoded, at `path`, is what results of these names replace in OUT."""
    path = Path(path).resolve()
    for there in Path(out).resolve().glob('*/*'):
        common.require(not re.fullmatch(SIZE_FOLDER, there.parent.name) or there.stem not in names
                       or not {path, *path.parents} & {there, there.parent},
                       f'--reconstruct {path}: would be written over; name another --out')


def note_leftovers(out, since):
    """Say which of the folders of sizes in OUT hold files that are older than `since`, too."""
    for folder in sorted(p for p in out.iterdir() if re.fullmatch(SIZE_FOLDER, p.name)):
        old = [p.stat().st_mtime < since for p in folder.rglob('*') if p.is_file()]
        if any(old) and not all(old):
            print(f'note: {folder} holds {sum(old)} older files, too, which metrics.py would '
                  'count; remove them or name another --out')


def main():
    """The command line: read the flags, then sample, interpolate or reconstruct."""
    args = build_parser().parse_args()
    check_flags(args)
    sizes = parse_sizes(args.sweep or args.res) if args.sweep or args.res else []
    files = ('ldm.pt', 'vae.pt') if args.run else ('ldm.pt',)
    files = ('vae.pt', 'ldm.pt') if args.reconstruct else files
    path = common.find_checkpoint(args.run, *files) or args.run
    if not path:
        print('no finished run in runs/: using the bundled model of emoji')
    elif not args.run:
        print(f'of the newest run: {path}')
    process = common.start_process(args.device)
    common.require(process.world == 1, 'sample.py is one process: give each another --seed and '
                   '--out, without torchrun')
    device = process.device
    load = stage2.load_vae if args.reconstruct else stage2.load
    vae, *ldm, info = load(path or DEMO, device)
    output, place = OUTPUTS[vae.domain], None
    check_domain(args, output, sizes)
    if args.reconstruct:
        names, z, place = output.encode(args.reconstruct, vae, info['args'], device)
        refuse_overwriting(args.reconstruct, args.out, names)
    else:
        names, z = draw(args, vae, *ldm)
    since = common.try_writing('--out', args.out)
    if args.export:
        common.require(len(names) == 1, ONE)
        common.try_checkpoint('--export', args.export)
        z = list(z)
    items = common.tqdm(zip(z, names), output.makes, len(names), unit='item')
    sizes = sizes or [(output.side(vae.config),) * 2]
    output.write(vae, items, sizes, args, place)
    at = ', '.join(f'{h} x {w}' for h, w in sizes)
    print(f'{len(names)} {output.makes} at {at}, and a grid of them, in {args.out}')
    if args.export:
        function = vae.function(vae.decode(z[0][None]))
        if place:  # of a mesh, in whose units its surface is written, too
            function.move(*place)
        save_function(args.export, function)
        print(f'{args.export}: {Path(args.export).stat().st_size / 2 ** 20:.2f} MiB')
    note_leftovers(Path(args.out), since)


if __name__ == '__main__':
    common.run(main, 'stopped; every file written so far is complete')
