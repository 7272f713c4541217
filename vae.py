"""Stage 1, the D2C-VAE: discrete data -> latent planes -> continuous function.

    q(z|x) = N(mu, sigma^2)      encoder and posterior         Section 3.1; Section 3.2, Eq. 5
    Xi^1..Xi^n = D(z)            hierarchically-decomposed basis fields (HDBF), Section 3.1
    omega(c) = pi(gamma(c; Xi))  read-out, in inr.py
    L = mean |omega(c) - x| + (lambda_kl sum KL + lambda_sn SN) / N_ref          Eq. 9

`D2CVAE` is what all domains share. Below it stands one subclass a domain, side by side: how its
data become features on planes, at which coordinates its function is compared with the truth, and
what a whole signal is. `DOMAINS` at the foot of the file lists them.

The paper averages the reconstruction and the KL, the authors' code sums both; this is the code's
balance divided by the constant N_ref, the number of values of a full training signal, so the number
of coordinates drawn a step does not matter. `kl_mode='paper'` with `kl_weight=0.001` is Table 10,
but for the spectral term. Unlike the code there is no LPIPS (inert at its weight) and no
adversarial phase (not in the paper).
"""
import math
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from common import evenly_spaced, flag, require
from encoders import (Attention, ConvEncoder, JoinedPlanes, LocalPoolPointNet, PlaneAttention,
                      ResBlock, Upsample, VideoEncoder, across, conv3x3, norm, regroup)
from inr import (CFCMLP, Function, camera_rays, cell_centres, draw_mesh, extract_mesh, focal_length,
                 grid_scale, look_up, march, occupied_cells, orbit, pack, plane_sizes, sample_grid,
                 scattered, unpack, where_occupied, PLANES, UPWARDS)

LOSSES = dict(l1=F.l1_loss, l2=F.mse_loss, bce=F.binary_cross_entropy_with_logits)


def gradient_loss(values, truth):
    """Absolute error of differences between neighbours along y plus that along x, of (B,C,H,W).

    Not in the paper. Absolute errors alone leave edges soft.
    """
    error = values - truth
    return sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))


@dataclass
class VAEConfig:
    """Architecture and objective of the first stage; the defaults are Table 9's AFHQ at 256."""
    domain: str = 'image'
    channels: int = 3  # values of the signal at a point
    extent: float = 1.0  # half the side of the data's box, which [-1, 1] stands for
    centre: tuple = (0.0, 0.0, 0.0)  # of that box, in the data's units
    up: str = 'y'  # axis of the data that points upwards, one of inr.UPWARDS
    frames: int = 16  # of a clip
    side: int = 128  # of the pictures that rays come from, in pixels
    # How the authors' networks differ, see STRUCTURE.
    inner_channels: int = 0  # of the planes beside the latent ones; 0 = z_channels
    scale_channels: int = 0  # see inr.CFCMLP
    scale_frequencies: int = 32
    norm_groups: int = 0  # of all group norms; 0 = up to 32, of at least 4 channels
    joined: tuple = ()  # downsampling factors with encoders.JoinedPlanes, 0: in the middle
    mid_heads: int = 1  # of the decoder's attention within a plane
    wide_heads: bool = False  # heads of --across have the width of its input
    across_fields: tuple = ()  # sizes of fields over the latent after whose level that follows, too
    video_code: bool = False  # see encoders.VideoEncoder
    read_axes: dict = field(default_factory=dict)  # see inr.look_up; empty = inr.PLANES
    align_corners: bool = False  # see inr.sample_field
    mlp_block: str = 'post'  # see inr.CFCMLP
    out_slope: float = 1.0  # see inr.CFCMLP
    resolution: int = flag(256, 'r: pixels a side the encoder sees and the anchor s = 1; of point '
                           'clouds, cells a side of the planes they are pooled into')
    point_hidden: int = flag(32, 'width of the PointNet')
    point_blocks: int = flag(5, 'blocks of the PointNet')
    point_channels: int = flag(32, 'channels of the planes that the PointNet makes')
    point_local: bool = flag(False, 'tell the PointNet where in its cell a point lies')
    patch: int = flag(8, 'pixels a side of the patches that the video encoder sees')
    vit_width: int = flag(384, 'channels of the video encoder', low=8)
    vit_depth: int = flag(8, 'layers of the video encoder')
    vit_heads: int = flag(8, 'attention heads of the video encoder, of 64 channels each')
    plane_depth: int = flag(4, 'layers of each transformer that reduces tokens to a plane')
    plane_hidden: int = flag(512, 'width of their feed-forward layers')
    ch: int = flag(128, "encoder's base width")
    ch_mult: tuple = flag((1, 2, 4), 'encoder width of each level over the base, fine to coarse')
    num_res_blocks: int = flag(2, 'ResBlocks a level in the encoder; the decoder has one more')
    z_channels: int = flag(64, 'channels of the latent plane')
    decoder_ch: int = flag(64, "decoder's base width (Table 9: head channel)")
    decoder_mult: tuple = flag((4, 2, 1), 'decoder width of each level over the base, coarse first')
    fields: tuple = flag((1, 2, 4), 'sizes of the basis fields over the latent plane, coarse first')
    across: bool = flag(False, "attend across the planes after the decoder's middle")
    field_channels: int = flag(64, 'channels of each basis field')
    mlp_width: int = flag(256, 'w_pi: width of the MLP')
    mlp_blocks: int = flag(4, 'n_pi: residual blocks of the MLP')
    mlp_layers: int = flag(2, 'linear layers in a block of the MLP')
    conditioning: str = flag('cfc', 'which fields the MLP reads where (Table 8)',
                             choices=('cfc', 'concat', 'single'))
    cfc_merge: str = flag('concat', 'how CFC joins a field to the hidden state',
                          choices=('concat', 'sum'))
    plane_merge: str = flag('concat', 'how the look-ups in the planes of one field are joined '
                            '(no effect on one plane)',
                            choices=('concat', 'sum'))
    coord_input: bool = flag(False, "add the coordinate, linearly, after the MLP's first block")
    coord_octaves: int = flag(0, 'with the coordinate, its sines and cosines at so many octaves')
    scale_injection: bool = flag(True, 'modulate the MLP by the sampling period s, Eq. 13')
    ray_samples: int = flag(64, 'equal bins of a ray within the box, each read at one point')
    ray_importance: int = flag(0, 'more bins, where a first reading of the ray found density')
    density_scale: float = flag(25.0, 'density is so many times the softplus of a linear map',
                                low=1e-3)
    colour_width: int = flag(128, 'width of the layer that makes colour of features and direction')
    view_dirs: bool = flag(True, 'colour depends on the direction from which it is seen')
    view_octaves: int = flag(4, 'sines and cosines of the direction that enter, in octaves')
    colour_points: int = flag(0, "so many of the encoder's points are asked for their colour, too")
    loss: str = flag('l1', 'reconstruction loss; bce for occupancy', choices=('l1', 'l2', 'bce'))
    gradient_weight: float = flag(0.0, 'of the absolute errors of differences between neighbouring '
                                  'pixels, in the loss of pictures')
    threshold: float = flag(0.5, 'occupancy at which surfaces are drawn')
    n_ref: int = flag(0, 'N_ref, values of a full training signal; 0 = the usual of the domain')
    kl_weight: float = flag(0.5, 'lambda_kl at the end of its annealing')
    kl_start: float = flag(1e-4, 'lambda_kl at the start')
    kl_mode: str = flag('code', 'code: sum KL over N_ref; paper: mean KL (Table 10: with '
                        '--kl_weight 0.001)',
                        choices=('code', 'paper'))
    sn_start: float = flag(10.0, 'weight of the spectral regularisation at the start, 0 = off')
    sn_end: float = flag(0.1, 'the same at the end of its log-linear annealing')
    sn_scope: str = flag('all', 'whose convolutions it covers', choices=('all', 'encoder'))
    anneal: float = flag(0.9, 'share of the steps over which both weights are annealed', high=1)

    def __post_init__(self):
        top = 2 ** (len(self.decoder_mult) - 1)
        require(self.resolution >= 2 ** (len(self.ch_mult) - 1), f'--resolution {self.resolution}: '
                f'too small for {len(self.ch_mult)} encoder levels')
        require(self.fields and self.fields[-1] == top and all(
            f in [2 ** i for i in range(len(self.decoder_mult))] for f in self.fields)
            and list(self.fields) == sorted(set(self.fields)),
            f'--fields {self.fields}: increasing powers of two that end at {top}, '
            f'the factor of {len(self.decoder_mult)} decoder levels')
        require(0 < self.threshold < 1, f'--threshold {self.threshold}: between 0 and 1')
        require(self.coord_input or not self.coord_octaves,
                f'--coord_octaves {self.coord_octaves}: has no effect without --coord_input')
        require(self.view_dirs or self.view_octaves == VAEConfig.view_octaves,
                f'--view_octaves {self.view_octaves}: has no effect without --view_dirs')
        require(self.up in UPWARDS, f'up {self.up}: one of {", ".join(UPWARDS)}')
        DOMAINS[self.domain].check(self)
        self.n_ref = self.n_ref or DOMAINS[self.domain].values_of_signal(self)


# Fields that no flag sets: a network that goes on from a checkpoint has the checkpoint's.
STRUCTURE = ('inner_channels', 'scale_channels', 'scale_frequencies', 'norm_groups', 'joined',
             'mid_heads', 'wide_heads', 'across_fields', 'video_code', 'read_axes', 'align_corners',
             'mlp_block', 'out_slope')


def annealed(step, steps, config):
    """(lambda_kl, lambda_sn) of a step, numbers: linear, and log-linear."""
    p = min(max((step - 1e-4 * steps) / (config.anneal * steps), 0), 1)
    kl = config.kl_start + (config.kl_weight - config.kl_start) * p
    sn = 0.0
    if config.sn_start:
        p = min(step / (config.anneal * steps), 1)
        sn = math.exp((1 - p) * math.log(config.sn_start) + p * math.log(config.sn_end))
    return kl, sn


class Posterior:
    """Diagonal Gaussian q(z|x) from packed moments (B,2C,L); `sizes` names its planes."""

    def __init__(self, moments, sizes):
        mean, logvar = moments.float().chunk(2, dim=1)
        self.mean, self.logvar, self.sizes = mean, logvar.clamp(-30, 20), sizes

    def sample(self, noise=None):
        """mean + std * noise, (B,C,L); fresh standard normal noise if none is given."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over the latent, (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


def attention_across(width, config):
    """The attention across planes of --across, on features of this width."""
    require(config.wide_heads or width % 8 == 0, f'--across: has 8 heads, for which {width} '
            'channels, --decoder_ch times the first of --decoder_mult, are no multiple of 8')
    return Attention(width, 8, zero_init=True, head_channels=config.wide_heads * width)


class HDBFDecoder(nn.Module):
    """Latent planes (B,z,h,w) -> their basis fields, coarse to fine, each (B,field,f*h,f*w).

    The reverse of the encoder; wherever a level's factor f is in `fields`, a 1x1 convolution
    branches off a field. The finest one has its own norm, SiLU and 3x3 convolution, as in the
    authors' code.

    forward(xs, stretches, batch, middle) -> a list of lists like xs. xs has a tensor (B*P,z,h,w)
    for each shape of planes, the P planes of an item side by side, and stretches how much a level
    enlarges (height, width) of each; `middle` attends across all planes before the first level.
    """

    def __init__(self, config):
        super().__init__()
        c, width = config, config.decoder_ch * config.decoder_mult[0]
        # The ablation without HDBF has no coarse heads: they would get no gradient.
        self.fields = c.fields[-1:] if c.conditioning == 'single' else c.fields
        self.width = width  # of the stem
        self.stem = nn.Sequential(
            conv3x3(c.inner_channels or c.z_channels, width), ResBlock(width, width),
            PlaneAttention(width, c.mid_heads), ResBlock(width, width))
        if 0 in c.joined:
            self.stem.append(JoinedPlanes(width))
        self.levels, self.heads, self.ups = nn.ModuleList(), nn.ModuleDict(), nn.ModuleList()
        self.across = nn.ModuleDict()
        for i, mult in enumerate(c.decoder_mult):
            blocks = [ResBlock(width if j == 0 else c.decoder_ch * mult, c.decoder_ch * mult)
                      for j in range(c.num_res_blocks + 1)]
            width, last = c.decoder_ch * mult, i == len(c.decoder_mult) - 1
            if 2 ** (len(c.decoder_mult) - 1 - i) in c.joined:
                blocks.append(JoinedPlanes(width))
            self.levels.append(nn.Sequential(*blocks))
            if 2 ** i in c.across_fields:
                self.across[str(2 ** i)] = attention_across(width, c)
            if last:
                self.heads[str(2 ** i)] = nn.Sequential(
                    norm(width), nn.SiLU(inplace=True), conv3x3(width, c.field_channels))
            else:
                self.ups.append(Upsample(width))
                if 2 ** i in self.fields:
                    self.heads[str(2 ** i)] = nn.Conv2d(width, c.field_channels, 1)

    def forward(self, xs, stretches, batch, middle=None):
        xs, xi = [self.stem(x) for x in xs], []
        if middle is not None:
            xs = across(middle, xs, batch)
        for i, level in enumerate(self.levels):
            xs, name = [level(x) for x in xs], str(2 ** i)
            if name in self.across:
                xs = across(self.across[name], xs, batch)
            if 2 ** i in self.fields:
                xi.append([self.heads[name](x) for x in xs])
            if i < len(self.ups):
                xs = [self.ups[i](x, (h * x.shape[2], w * x.shape[3]))
                      for x, (h, w) in zip(xs, stretches)]
        return xi


class SpectralPenalty:
    """SN: sum of the largest singular values of all convolutions + sum of max |gamma| of all norms.

    As in LSGM and the authors' code. Convolutions of one shape share a batched power iteration,
    which goes on from call to call; its vectors are buffers of `owner`, so that checkpoints hold
    them. A new model needs one call of about 40 rounds to begin with.
    """

    def __init__(self, owner, modules):
        self.owner, self.groups = owner, {}
        layers = [m for module in modules for m in module.modules()]
        self.gammas = [m.weight for m in layers if isinstance(m, nn.GroupNorm)]
        for m in layers:
            if isinstance(m, nn.Conv2d):
                self.groups.setdefault(tuple(m.weight.flatten(1).shape), []).append(m.weight)
        generator = torch.Generator().manual_seed(0)
        for (rows, columns), weights in self.groups.items():
            u = F.normalize(torch.randn(len(weights), rows, 1, generator=generator), dim=1)
            owner.register_buffer(f'sn_u_{rows}x{columns}', u)

    def __call__(self, rounds=4):
        total = sum(g.float().abs().max() for g in self.gammas)
        for (rows, columns), weights in self.groups.items():
            w = torch.stack([p.flatten(1) for p in weights]).float()  # (n, rows, columns)
            u = getattr(self.owner, f'sn_u_{rows}x{columns}')
            with torch.no_grad():
                for _ in range(rounds):
                    v = F.normalize(w.mT @ u, dim=1)
                    u.copy_(F.normalize(w @ v, dim=1))
            total = total + (u.mT.clone() @ w @ v).sum()
        return total


def points_at_a_time(device):
    """How many points to read at once; on CPU, what leaves the activations in each core's cache."""
    return 2048 * torch.get_num_threads() if device.type == 'cpu' else 262144


def one_by_one(xi):
    """The basis fields of each sample of a batch."""
    for i in range(len(xi[0]['xy'])):
        yield [{name: f[i:i + 1] for name, f in level.items()} for level in xi]


class D2CVAE(nn.Module):
    """The first stage. `forward` is the whole training step, so that DDP sees one call.

    One encoder and one decoder serve all planes (Appendix A); only the 1x1 convolutions at the
    latent are a plane's own, as in the authors' code. A domain is a subclass with

        domain, reads       its name, and the key of an item that the encoder reads
        build_encoder(c)    the modules in front of the latent planes
        features(x)         data -> {plane: (B, 2 z_channels, h, w)}
        predict(xi, batch)  the function's values and the truth they are compared with
        signal(xi, R)       the whole signal: pictures R pixels, surfaces R cells a side
        show(xi, size=...)  what an item's preview shows, of it: (B,3,size,W) in [-1,1]
        values_of_signal(c) N_ref where the preset gives none
        feature_channels(c) channels of `features`, 2 z_channels if nothing else is said
        head(c)             arguments of the MLP that say what its last layer is

    and, as class attributes, `stretch`, how much a level of the decoder enlarges (height, width) of
    a plane where that is not (2, 2): yt=(1, 2) keeps t; `allowed`, the values that a flag may have;
    `own_flags`, flags that domains without them refuse.
    """

    stretch, allowed, own_flags = {}, {}, ()

    def __new__(cls, config=None):
        """D2CVAE(config) is an instance of the subclass of the config's domain."""
        return super().__new__(DOMAINS[config.domain] if cls is D2CVAE else cls)

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        axes = PLANES[self.domain]
        self.build_encoder(c)
        z, features = c.z_channels, self.feature_channels(c)
        self.quant, self.post_quant = (nn.ModuleDict({name: nn.Conv2d(n, m, 1) for name in axes})
                                       for n, m in ((features, 2 * z), (z, c.inner_channels or z)))
        self.decoder = HDBFDecoder(c)
        self.across = attention_across(self.decoder.width, c) if c.across else None
        looked_up = c.field_channels * (len(axes) if c.plane_merge == 'concat' else 1)
        self.read_out = dict(
            pe_channels=[looked_up] * len(self.decoder.fields), out_channels=c.channels,
            width=c.mlp_width, blocks=c.mlp_blocks, layers=c.mlp_layers,
            conditioning=c.conditioning, merge=c.cfc_merge, scale_injection=c.scale_injection,
            resolution=c.resolution,
            coord_features=1 + max(map(max, axes.values())) if c.coord_input else 0,
            coord_octaves=c.coord_octaves, scale_channels=c.scale_channels,
            scale_frequencies=c.scale_frequencies, block=c.mlp_block, out_slope=c.out_slope,
            **self.head(c))
        self.mlp = CFCMLP(**self.read_out)
        scope = [self.encoder, self.quant]
        if c.sn_scope == 'all':
            scope += [self.post_quant, self.decoder]
        self.spectral = SpectralPenalty(self, scope)
        regroup(self, c.norm_groups, 1e-6)
        self.to(memory_format=torch.channels_last)  # about twice the speed of NCHW on CPU

    @classmethod
    def check(cls, config):
        """ValueError where a flag has a value that this domain does not take."""
        for name, values in cls.allowed.items():
            value = getattr(config, name)
            require(value in values, f'--{name} {value}: {cls.domain} data take '
                    f'{" or ".join(map(str, values))}')
        default = {f.name: f.default for f in fields(config)}
        for other in DOMAINS.values():
            for name in {*other.own_flags} - {*cls.own_flags}:
                require(getattr(config, name) == default[name],
                        f'--{name}: is for {other.domain} data')

    @staticmethod
    def feature_channels(c):
        return 2 * (c.inner_channels or c.z_channels)

    @staticmethod
    def head(c):
        return {}

    def latent_cells(self):
        """Cells of the latent along x, y, z or t, for a signal of the training resolution.

        The same along all; for an axis that is not reduced, such as t, a subclass says otherwise.
        """
        return [-(-self.config.resolution // 2 ** (len(self.config.ch_mult) - 1))] * 3

    def latent_sizes(self):
        """Plane name -> (h, w) of that latent."""
        return plane_sizes(self.domain, self.latent_cells())

    def on_planes(self, network, planes):
        """`network`, (xs, stretches, batch) -> list of lists like xs, on planes: a list of dicts.

        Planes of one shape and stretch are one of xs, (B*P,C,H,W), the P planes of an item side by
        side.
        """
        groups, batch = {}, len(next(iter(planes.values())))
        for name, plane in planes.items():
            groups.setdefault((plane.shape, self.stretch.get(name, (2, 2))), []).append(name)
        xs = [torch.stack([planes[n] for n in names], dim=1).flatten(0, 1).contiguous(
            memory_format=torch.channels_last) for names in groups.values()]
        found = []
        for ys in network(xs, [stretch for _, stretch in groups], batch):
            level = {}
            for names, y in zip(groups.values(), ys):
                level.update(zip(names, y.unflatten(0, (batch, -1)).unbind(1)))
            found.append({name: level[name] for name in planes})
        return found

    def encode_planes(self, planes):
        """`self.encoder` on each of a dict of planes."""
        features, = self.on_planes(lambda xs, *_: [[self.encoder(x) for x in xs]], planes)
        return features

    def encode(self, batch):
        """Data, as a batch of items or the tensor itself that the encoder reads -> Posterior."""
        features = self.features(batch[self.reads] if isinstance(batch, dict) else batch)
        moments = {name: self.quant[name](h) for name, h in features.items()}
        return Posterior(pack(moments), {name: tuple(m.shape[2:]) for name, m in moments.items()})

    def decode(self, z, sizes=None):
        """z (B,C,L) -> xi, a list coarse to fine of dicts plane name -> (B,C,H,W)."""
        planes = unpack(z, sizes or self.latent_sizes())
        planes = {name: self.post_quant[name](p) for name, p in planes.items()}
        return self.on_planes(partial(self.decoder, middle=self.across), planes)

    def look_up(self, xi, points):
        """p^1..p^n at points (B,N,D): a list of (B,N,C)."""
        axes = self.config.read_axes or PLANES[self.domain]
        return look_up(xi, points, axes, self.config.plane_merge, self.config.align_corners)

    def function(self, xi):
        """The `inr.Function` of one sample, which takes (...,D) and nothing of this network."""
        about = dict(domain=self.domain, extent=self.config.extent, centre=self.config.centre,
                     plane_merge=self.config.plane_merge, read_out=self.read_out,
                     axes=self.config.read_axes, align_corners=self.config.align_corners)
        return Function(about, xi, self.mlp)

    def query(self, xi, coords, scale=None):
        """omega(c) at any points: coords (N,D), (B,N,D) or grids (H,W,D), (B,H,W,D) -> (B,...,C).

        C are the channels of the signal: colours, the logit of occupancy, ... Three dimensions of
        which the first is 1 or B are a batch of points, so a grid of B rows must come as (1,H,W,D).
        `scale` is s, a float or (B,); None derives it from a regular grid and takes the training
        period 1 for scattered points.
        """
        batch = len(xi[0]['xy'])
        batched = coords.dim() > 2 and coords.shape[0] in (1, batch)
        coords = coords if batched else coords[None]
        shape = coords.shape[1:-1]
        points = coords.expand(batch, *coords.shape[1:]).flatten(1, -2)  # (B, N, D)
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=torch.float32, device=coords.device).reshape(-1)
        values = self.mlp(self.look_up(xi, points), points, scale)
        return values.unflatten(1, shape)

    @torch.no_grad()
    def render(self, xi, size, box=None, antialias=True, chunk=None, at=()):
        """The function on a grid of `size` (h, w) over x and y: (B,C,h,w).

        box: ((x_lo,x_hi),(y_lo,y_hi)), default everything. at: further coordinates, z or t, that
        all pixels share. Where the grid is coarser than r, the function is evaluated on `fold`
        times as many pixels, at least r, and averaged, since the MLP never saw s > 1 and point
        samples would alias; `antialias=False` gives the raw values. About `chunk` points are
        evaluated at a time, so that the memory beyond the result does not grow with `size`.
        """
        field, size, planes = xi[0]['xy'], tuple(size), PLANES[self.config.domain].values()
        require(len(size) == 2 and len(at) == max(map(max, planes)) - 1, f'cannot render {size} '
                f'pixels of x and y, {len(at)} other coordinates fixed; see signal')
        box = [(-1.0, 1.0)] * 2 if box is None else box
        box = torch.as_tensor(box, dtype=torch.float32, device=field.device)
        if min(size) < 1 or (box[:, 0] >= box[:, 1]).any():
            raise ValueError(f'cannot render {size} pixels over the box {box.tolist()}')
        fold = self.oversampling(size, box) if antialias else (1, 1)
        fine = [n * f for n, f in zip(size, fold)]
        mlp = self.mlp.fixed_scale(grid_scale(self.config.resolution, fine, box)[None])
        xs, ys = cell_centres(fine[1], box[0]), cell_centres(fine[0], box[1])
        samples, rows, columns = self.tiling(size, fold, chunk or points_at_a_time(field.device))
        result = field.new_empty(len(field), self.config.channels, *size)
        for i in range(0, len(field), samples):
            part = [{k: f[i:i + samples] for k, f in level.items()} for level in xi]
            for top, left in product(range(0, size[0], rows), range(0, size[1], columns)):
                y = ys[top * fold[0]:(top + rows) * fold[0]]
                x = xs[left * fold[1]:(left + columns) * fold[1]]
                points = torch.cartesian_prod(y, x).flip(1)  # (N, 2), x first
                points = torch.cat([points, points.new_tensor([*at]).expand(len(points), -1)], 1)
                points = points.expand(len(part[0]['xy']), -1, -1)
                tile = mlp(self.look_up(part, points), points).mT.unflatten(2, (-1, len(x)))
                tile = F.avg_pool2d(tile, fold) if max(fold) > 1 else tile
                result[i:i + samples, :, top:top + rows, left:left + columns] = tile
        return result

    def oversampling(self, size, box):
        """Samples for each pixel along (height, width) that make a grid of `size` as fine as r."""
        shares = ((box[:, 1] - box[:, 0]) / 2).tolist()[::-1]  # of the full height, width
        return [max(1, math.ceil(self.config.resolution * share / n - 1e-6))
                for n, share in zip(size, shares)]

    @staticmethod
    def tiling(size, fold, chunk):
        """(samples, rows, columns) of pixels to evaluate at once; parts of a row only if one is
        longer than `chunk`."""
        each = fold[0] * fold[1]
        columns = min(size[1], max(1, chunk // each))
        return (max(1, chunk // (size[0] * size[1] * each)), max(1, chunk // (columns * each)),
                columns)

    def forward(self, batch, weights=None, noise=None, penalty=1.0):
        """Losses of a batch of items (see data.py) as a dict of scalars.

        `weights` (2,) is (lambda_kl, lambda_sn), see `annealed`, and by default what they end at;
        `noise` (B,C,L) fixes the posterior sample; `penalty` multiplies the spectral term, which
        0 leaves out. Key 'total' is what to minimise; 'kl' is in nats a sample.
        """
        c = self.config
        posterior = self.encode(batch)
        xi = self.decode(posterior.sample(noise), posterior.sizes)
        values, truth = self.predict(xi, batch)
        if weights is None:
            weights = torch.tensor([c.kl_weight, c.sn_end], device=values.device)
        with torch.autocast(values.device.type, enabled=False):
            reconstruction = LOSSES[c.loss](values.float(), truth)
            kl = posterior.kl().mean()
            n = c.n_ref if c.kl_mode == 'code' else posterior.mean[0].numel()
            total = reconstruction + weights[0] * kl / n
            losses = dict(reconstruction=reconstruction, kl=kl)
            if c.gradient_weight:
                losses['gradient'] = gradient_loss(values.float(), truth)
                total = total + c.gradient_weight * losses['gradient']
            if c.sn_start and penalty:
                losses['sn'] = penalty * self.spectral()
                total = total + weights[1] * losses['sn'] / c.n_ref
        return dict(total=total, **losses)


# ---- one class a domain ------------------------------------------------------------------------

class PictureVAE(D2CVAE):
    """Pictures (B,3,H,W) in [-1,1]: colour is a function of (x, y); one plane."""

    domain, reads = 'image', 'image'
    allowed = dict(loss=('l1', 'l2'), coord_input=(False,), across=(False,))
    own_flags = 'ch', 'ch_mult', 'gradient_weight'

    @staticmethod
    def values_of_signal(c):
        """Those of an r x r picture."""
        return c.channels * c.resolution ** 2

    def build_encoder(self, c):
        self.encoder = ConvEncoder(c.channels, c.ch, c.ch_mult, c.num_res_blocks,
                                   c.inner_channels or c.z_channels)

    def features(self, x):
        """Pictures of any size."""
        return self.encode_planes(dict(xy=x))

    def predict(self, xi, batch):
        """Colours on each target's own grid, (B,3,h,w), and the targets."""
        h, w = batch['target'].shape[2:]
        xs, ys = cell_centres(w, batch['box'][:, 0]), cell_centres(h, batch['box'][:, 1])
        pe = [sample_grid(level['xy'], xs, ys) for level in xi]
        values = self.mlp(pe, scale=batch['scale']).mT.unflatten(2, (h, w))
        return values, batch['target']

    def signal(self, xi, R, box=None, antialias=True):
        """Pictures (B,3,R,R) or, for R = (h, w), (B,3,h,w), in [-1,1]; the rest as for `render`."""
        size = (R, R) if isinstance(R, int) else R
        return self.render(xi, size, box, antialias).clamp_(-1, 1)  # in place: it may be large

    def show(self, xi, size=None):
        """`signal`, by default at the training resolution."""
        return self.signal(xi, size or self.config.resolution)


class ShapeVAE(D2CVAE):
    """Point clouds (B,N,3) in [-1,1]: occupancy is a function of (x, y, z); three planes."""

    domain, reads, point_features = 'shape', 'points', 3
    allowed = dict(loss=('bce',), scale_injection=(False,))
    own_flags = ('ch', 'ch_mult', 'point_hidden', 'point_blocks', 'point_channels', 'point_local',
                 'threshold')

    @staticmethod
    def values_of_signal(c):
        """The 2,048 points at which the authors' code asks for occupancy."""
        return 2048

    def build_encoder(self, c):
        self.points = LocalPoolPointNet(PLANES[self.domain], self.point_features, c.resolution,
                                        c.point_hidden, c.point_blocks, c.point_channels,
                                        c.point_local)
        self.encoder = ConvEncoder(c.point_channels, c.ch, c.ch_mult, c.num_res_blocks,
                                   c.inner_channels or c.z_channels, c.joined)

    def features(self, x):
        """Points pooled on three planes, each of which the encoder then reads."""
        return self.encode_planes(self.points(x))

    def predict(self, xi, batch):
        """Logits at the items' coordinates, (B,M), and their occupancy."""
        return self.inside(xi, batch['coords']), batch['target']

    def inside(self, xi, points):
        """What is higher inside of the surfaces, (B,N), at points (B,N,3): the logit."""
        return self.query(xi, points)[..., 0]

    def in_data(self, points):
        """Points (N,3) of the box [-1, 1] in the units of the data."""
        return points * self.config.extent + points.new_tensor(self.config.centre)

    def in_box(self, points):
        """The inverse of `in_data`."""
        return (points - points.new_tensor(self.config.centre)) / self.config.extent

    def signal(self, xi, R, threshold=None, coarse=64):
        """The surfaces where the occupancy is `threshold`, in the units of the data.

        A list of (vertices (V,3), faces (F,3)), one for each sample; R is cells along each side of
        the box; `coarse` as for `inr.extract_mesh`.
        """
        threshold = threshold or self.config.threshold
        return self.meshes(xi, R, math.log(threshold / (1 - threshold)), coarse)

    def meshes(self, xi, R, level, coarse):
        """(vertices, faces) of each sample where `inside` is `level`, in the units of the data."""
        found, device = [], xi[0]['xy'].device
        for own in one_by_one(xi):
            vertices, faces = extract_mesh(
                lambda p: self.inside(own, p[None]), R, level, None, coarse,
                points_at_a_time(device), device)
            found.append((self.in_data(vertices), faces))
        return found

    def show(self, xi, size=128, cells=64):
        """The surfaces, drawn; `cells` along each side of the box."""
        drawn = [draw_mesh(self.in_box(vertices), faces, size)
                 for vertices, faces in self.signal(xi, cells, coarse=32)]
        return torch.stack(drawn)

    @torch.enable_grad()
    def normals(self, xi, vertices):
        """Unit normals (V,3) at points of one sample's surface, against its field's gradient."""
        parts = []
        for part in vertices.split(points_at_a_time(vertices.device)):
            points = self.in_box(part).requires_grad_()
            slope, = torch.autograd.grad(self.inside(xi, points[None]).sum(), points)
            parts.append(F.normalize(-slope, dim=1))
        return torch.cat(parts)


class FieldVAE(ShapeVAE):
    """Coloured points (B,N,6), positions and colours in [-1,1]: a radiance field; three planes.

    Density and colour are functions of (x, y, z), colour also of the direction of sight, and what
    is compared with the truth are rays of cameras, which are rendered.
    """

    domain, point_features = 'nerf', 6
    allowed = dict(loss=('l1', 'l2'), scale_injection=(False,))
    own_flags = ('ch', 'ch_mult', 'point_hidden', 'point_blocks', 'point_channels', 'point_local',
                 'ray_samples', 'ray_importance', 'density_scale', 'colour_width', 'view_dirs',
                 'view_octaves', 'colour_points')

    @staticmethod
    def values_of_signal(c):
        """Those of the 5,000 pixels that the authors' code draws."""
        return 15000

    @staticmethod
    def head(c):
        return dict(radiance=dict(hidden=c.colour_width, scale=c.density_scale,
                                  octaves=c.view_octaves if c.view_dirs else None))

    def predict(self, xi, batch):
        """Colours of the items' rays, (B,R,3) in [-1,1], and the targets.

        In training a ray is read at random places of its bins, otherwise at their centres, and the
        colours of the first `colour_points` points follow: through a ray, a colour is learned only
        where there is density already.
        """
        c, rays_d, place = self.config, batch['rays_d'], 0.5
        if self.training:
            place = scattered(rays_d, c.ray_samples + c.ray_importance)
        seen = march(partial(self.field, xi), batch['rays_o'], rays_d, c.ray_samples,
                     c.ray_importance, place)
        rgb, target = seen['rgb'], batch['target']
        if self.training and c.colour_points:
            points, colours = batch['points'][:, :c.colour_points].split(3, dim=2)
            rgb = torch.cat([rgb, self.field(xi, points)[1]], dim=1)
            target = torch.cat([target, colours], dim=1)
        return 2 * rgb - 1, target

    def field(self, xi, points, dirs=None):
        """Density (B,...) and colours (B,...,3) in [0,1] at points (B,...,3), seen along dirs.

        dirs (B,...,3) are unit vectors, as many as points or one for each row (B,R,1,3) of points
        (B,R,S,3); None gives the mean over six directions.
        """
        flat, dirs = points.flatten(1, -2), None if dirs is None else dirs.flatten(1, -2)
        values = self.mlp(self.look_up(xi, flat), flat, dirs=dirs)
        values = values.unflatten(1, points.shape[1:-1])
        return values[..., 0], values[..., 1:]

    def density(self, xi, points):
        """Density (B,N) at points (B,N,3), without the work for colours."""
        return self.mlp.density(self.look_up(xi, points), points)

    def inside(self, xi, points):
        """log(1 + density), which is smoother than the density, (B,N), at points (B,N,3)."""
        return self.density(xi, points).log1p()

    def read_some(self, xi, points, dirs=None):
        """`field` of one sample at points (...,3) of any number, some at a time: (...), (...,3)."""
        n, flat = points_at_a_time(points.device), points.reshape(1, -1, 3)
        dirs = [None] * flat.shape[1] if dirs is None else dirs.reshape(1, -1, 3).split(n, 1)
        sigma, rgb = zip(*[self.field(xi, p, d) for p, d in zip(flat.split(n, 1), dirs)])
        return torch.cat(sigma, 1).view(points.shape[:-1]), torch.cat(rgb, 1).view(points.shape)

    @torch.no_grad()
    def occupied(self, xi):
        """The cells of each sample's finest field that hold density: (B,G,G,G) bools, (z, y, x)."""
        device, cells = xi[0]['xy'].device, max(xi[-1]['xy'].shape[2:])
        return torch.stack([occupied_cells(
            lambda p: self.density(own, p[None])[0], cells, chunk=points_at_a_time(device),
            device=device) for own in one_by_one(xi)])

    @torch.no_grad()
    def render_rays(self, xi, rays_o, rays_d, occupied=None, skip=True, chunk=4096):
        """Pictures along rays (B,R,3): dict(rgb (B,R,3) in [0,1], depth (B,R), opacity (B,R)).

        Rays begin at rays_o, in the box's coordinates, along rays_d, of length 1; those that miss
        the box are white. `chunk` of them are rendered at a time, so that memory beyond the result
        does not grow with R. Bins in cells that are not `occupied`, by default as the method of
        this name has it, are not evaluated; `skip=False` evaluates all within the box.
        """
        c, result = self.config, []
        if not skip:
            occupied = torch.ones(len(rays_o), 1, 1, 1, dtype=torch.bool, device=rays_o.device)
        elif occupied is None:
            occupied = self.occupied(xi)
        for i, own in enumerate(one_by_one(xi)):
            field = where_occupied(partial(self.read_some, own), occupied[i])
            parts = [march(field, o, d, c.ray_samples, c.ray_importance)
                     for o, d in zip(rays_o[i].split(chunk), rays_d[i].split(chunk))]
            result.append({k: torch.cat([p[k] for p in parts]) for k in parts[0]})
        return {k: torch.stack([r[k] for r in result]) for k in result[0]}

    def render_views(self, xi, poses, size, fov=40.0, **options):
        """Pictures from poses (V,4,4), see `inr.orbit`, in the box's coordinates.

        dict(rgb (B,V,3,h,w) in [0,1], depth, opacity (B,V,h,w)) for size (h, w); `fov` degrees fill
        the shorter side. The options are those of `render_rays`.
        """
        rays = [camera_rays(pose, focal_length(fov, size), size) for pose in poses]
        return self.render_pictures(xi, *(torch.stack(r)[None].expand(len(xi[0]['xy']), *[-1] * 4)
                                          for r in zip(*rays)), **options)

    def render_pictures(self, xi, rays_o, rays_d, **options):
        """The same along given rays of all pixels, (B,V,h,w,3)."""
        flat = (r.to(xi[0]['xy'].device).flatten(1, 3) for r in (rays_o, rays_d))
        seen = {k: v.unflatten(1, rays_d.shape[1:4])
                for k, v in self.render_rays(xi, *flat, **options).items()}
        return dict(seen, rgb=seen['rgb'].movedim(-1, 2))

    def signal(self, xi, R, views=8, azimuth=30.0, elevation=20.0, distance=4.0, fov=40.0):
        """Views (B,V,3,R,R) or, for R = (h, w), (B,V,3,h,w), in [-1,1], from a circle of cameras.

        They look at the centre of the box from `distance`, in half sides of it, with the first at
        `azimuth`; see `inr.orbit` for the angles.
        """
        size = (R, R) if isinstance(R, int) else tuple(R)
        poses = [orbit(azimuth + 360 * k / views, elevation, distance, self.config.up)
                 for k in range(views)]
        return self.render_views(xi, poses, size, fov)['rgb'] * 2 - 1

    def show(self, xi, size=None, views=4):
        """So many views side by side: (B,3,size,views size), by default of the training's size."""
        return torch.cat(self.signal(xi, size or self.config.side, views).unbind(1), dim=3)

    @torch.no_grad()
    def surface(self, xi, cells, level=10.0):
        """Where the density, per half side of the box, is `level`: a coloured mesh of each sample.

        A list of (vertices (V,3), faces (F,3), colours (V,3) in [0,1]), in the units of the data;
        colours are those of `field` without a direction.
        """
        meshes = self.meshes(xi, cells, math.log1p(level), 64)
        return [(vertices, faces, self.read_some(own, self.in_box(vertices))[1]
                 if len(vertices) else torch.zeros_like(vertices))
                for own, (vertices, faces) in zip(one_by_one(xi), meshes)]


class VideoVAE(D2CVAE):
    """Clips (B,3,T,H,W) in [-1,1]: colour is a function of (x, y, t); three planes."""

    domain, reads = 'video', 'video'
    stretch = dict(yt=(1, 2), xt=(1, 2))  # t is not reduced
    allowed = dict(loss=('l1', 'l2'), scale_injection=(False,))
    own_flags = 'patch', 'vit_width', 'vit_depth', 'vit_heads', 'plane_depth', 'plane_hidden'

    @staticmethod
    def values_of_signal(c):
        """Those of a clip of r x r pixels."""
        return c.channels * c.frames * c.resolution ** 2

    @staticmethod
    def feature_channels(c):
        return c.vit_width

    def latent_cells(self):
        return [math.ceil(self.config.resolution / self.config.patch)] * 2 + [self.config.frames]

    def build_encoder(self, c):
        self.encoder = VideoEncoder(c.channels, self.latent_cells(), c.patch, c.vit_width,
                                    c.vit_depth, c.vit_heads, plane_depth=c.plane_depth,
                                    plane_hidden=c.plane_hidden, code=c.video_code)

    def features(self, x):
        """Clips of any height, width and length."""
        return self.encoder(x)

    def predict(self, xi, batch):
        """Colours at the items' coordinates, (B,M,3), and the targets."""
        return self.query(xi, batch['coords']), batch['target']

    def signal(self, xi, R, box=None, antialias=True, frames=None, times=(-1.0, 1.0)):
        """Clips (B,3,T,h,w) in [-1,1] of T = `frames`, by default as many as in training.

        They lie evenly within `times`, a part of [-1, 1]; the rest as for `render`.
        """
        size = (R, R) if isinstance(R, int) else R
        at = cell_centres(frames or self.config.frames, torch.tensor(times)).tolist()
        return torch.stack([self.render(xi, size, box, antialias, at=(t,)) for t in at],
                           dim=2).clamp_(-1, 1)

    def show(self, xi, size=None, frames=8):
        """Up to so many frames, evenly spaced, side by side: (B,3,size,frames size)."""
        size, cells = size or self.config.resolution, self.config.frames
        ends = torch.linspace(-1, 1, cells + 1).tolist()
        return torch.cat([self.signal(xi, size, frames=1, times=ends[k:k + 2])[:, :, 0]
                          for k in evenly_spaced(cells, frames)], dim=3)


DOMAINS = dict(
    image=PictureVAE,
    shape=ShapeVAE,
    nerf=FieldVAE,
    video=VideoVAE,
)
