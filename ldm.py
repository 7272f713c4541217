"""Stage 2: a diffusion model of the latent planes, and everything that samples from it.

    z_t = sqrt(alpha_bar_t) z_0 + sigma_t eps,   sigma_t^2 = 1 - alpha_bar_t          Section 3.2
    minimise |eps - eps_theta(z_t, t)|^2                                    Eq. 10 with w(t) = 1
    eps_theta = (1 - s) sigma_t z_t + s F(z_t, t)           mixed prediction (LSGM), Appendix B.2
    eps_theta = sigma_t z_t + alpha_t s F(z_t, t)           --predict v, Salimans & Ho (2022)
    dz/dtau = -beta/2 z + beta/2 eps_theta / sigma          probability-flow ODE, Appendix D.1

A latent is one tensor (B, C, L), the planes flattened and concatenated; only the U-Net takes it
apart. One U-Net serves all planes and attends to the tokens of all of them at once (Appendix B.2).
The paper leaves the schedule of beta open: it is the "scaled linear" one of latent diffusion.
Departures: an embedding that tells the U-Net which plane it sees, since planes of one shape would
otherwise be all the same to it; latents normalised by channel, if wanted; DPM-Solver++.
"""
import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import (fitting, flag, load_checkpoint, load_weights, require, require_finite,
                    row_noise, the_checkpoint, torch_seeded)
from encoders import (GEGLU, Attention, ByteText, Downsample, PlaneAttention, ResBlock, Upsample,
                      across, conv3x3, norm, regroup, zeroed)
from inr import PLANES, pack, unpack

# ---- schedule --------------------------------------------------------------------------------

T = 1000
BETA_A, BETA_B = math.sqrt(0.0015), math.sqrt(0.0195)  # square roots of the first and last beta
BETA = (BETA_A + (BETA_B - BETA_A) * torch.arange(T, dtype=torch.float64) / (T - 1)) ** 2
LOG_ALPHA_BAR = torch.log1p(-BETA).cumsum(0)
TAU_END = 1e-3  # where the ODE ends: one discrete step; the network is not trained below it


def alpha_bar(t, table=LOG_ALPHA_BAR):
    """alpha_bar at t in [0, 999], number or tensor, as float64; its log is linear between integers.

    `table` is LOG_ALPHA_BAR, best on the device of t, where it need not be copied to it.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    table = table.to(t.device)
    i = t.long().clamp(0, T - 2)
    return torch.lerp(table[i], table[i + 1], t - i).exp()


def log_alpha_bar(tau):
    """ln alpha_bar of the continuous process at tau in [0, 1]: minus the integral of its beta."""
    slope = BETA_B - BETA_A
    return -T * ((BETA_A + slope * tau) ** 3 - BETA_A ** 3) / (3 * slope)


def matched_time(log_ab):
    """The t in [0, 999], with fractions, at which `alpha_bar` has this logarithm; a numpy array."""
    return np.interp(-log_ab, -LOG_ALPHA_BAR.numpy(), np.arange(T))


# ---- network ---------------------------------------------------------------------------------

@dataclass
class LDMConfig:
    """What a latent diffusion model is built from; ValueError for values that exclude one another.

    Fields without help are no flags: they follow from the VAE, from what reads texts, and those of
    STRUCTURE from the checkpoint that a run goes on from.
    """
    domain: str = 'image'
    z_channels: int = 64
    planes: dict = field(default_factory=lambda: {'xy': [64, 64]})  # plane name -> [H, W]
    ch: int = flag(256, 'base width of the U-Net')
    ch_mult: tuple = flag((1, 2, 3, 4), 'width of each level in units of ch')
    num_res_blocks: int = flag(2, 'residual blocks a level')
    attn_factors: tuple = flag((2, 4, 8), 'downsampling factors with attention over all planes')
    head_channels: int = flag(32, 'channels of an attention head, at least')
    plane_embed: bool = flag(True, 'tell the network which plane it sees (no effect on one plane)')
    num_classes: int = flag(0, 'class labels to condition on, 0 = none')
    text: str = flag('', 'what reads captions: bytes (a small transformer, trained along), a file '
                     "or folder of CLIP's weights, or an .npz of features; empty = none")
    text_length: int = flag(96, 'bytes of a caption that --text bytes reads', low=1)
    text_ngrams: int = flag(0, 'in --text bytes, groups of 2 to so many bytes have vectors of '
                            'their own; 0 = none')
    context_channels: int = 0  # width of the text features to condition on, 0 = none
    # How the authors' networks differ, see STRUCTURE.
    symmetric_pad: bool = False  # zeros on all sides before a convolution of stride 2
    norm_groups: int = 0  # of all group norms; 0 = up to 32, of at least 4 channels
    norm_eps: float = 1e-6
    mixing_planes: bool = False  # a mixing logit for each plane
    across_heads: int = 0  # see UNet
    triplane: str = flag('shared', 'planes through one U-Net with attention across them, or '
                         'concatenated as channels', choices=('shared', 'concat'))
    cond_dropout: float = flag(0.1, 'share of training items whose condition is left out',
                               high=1)
    t_mean: float = flag(0.0, 'mean of the logit of t / 1000 in training', low=-10)
    t_std: float = flag(0.0, 'its deviation; 0 = all times alike')
    mixed: bool = flag(True, 'mixed prediction eps = (1-s) sigma z + s F, of v: v = s F')
    predict: str = flag('eps', 'what the network gives and the loss compares: the noise, or '
                        'v = alpha eps - sigma z_0', choices=('eps', 'v'))
    mixing_init: float = flag(-6.0, 'initial logit of s; -3 or -1.5 for short runs', low=-100,
                               high=100)
    latent_norm: str = flag('none', 'bring each latent channel to mean 0, deviation 1',
                            choices=('none', 'channel'))

    def __post_init__(self):
        self.planes = {name: list(size) for name, size in self.planes.items()}
        require(list(self.planes) == list(PLANES[self.domain]),
                f'planes {", ".join(self.planes)} are not those of domain {self.domain}: '
                f'{", ".join(PLANES[self.domain])}')
        require(not (self.num_classes and self.context_channels),
                'condition on class labels (--num_classes) or text (--text), not both')
        require(self.t_std or not self.t_mean, f'--t_mean {self.t_mean:g}: has no effect without '
                '--t_std')
        for name in ('text_length', 'text_ngrams'):
            require(self.text == 'bytes' or getattr(self, name) == getattr(type(self), name),
                    f'--{name} {getattr(self, name)}: has no effect without --text bytes')
        require(self.text_ngrams != 1, '--text_ngrams 1: groups begin at 2 bytes')
        require(self.triplane != 'concat' or len({*map(tuple, self.planes.values())}) == 1,
                '--triplane concat: planes of different shapes cannot be concatenated')


# Fields that no flag sets: a network that goes on from a checkpoint has the checkpoint's.
STRUCTURE = 'symmetric_pad', 'norm_groups', 'norm_eps', 'mixing_planes', 'across_heads'


def time_embedding(t, channels):
    """Cosines and sines of t (B,), of periods from 2 pi to almost 20,000 pi: (B,channels)."""
    half = (channels + 1) // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :channels]


class TextAttention(nn.Module):
    """Self-attention, cross-attention to a text and a gated MLP, as in latent diffusion.

    x (B,C,N), context (B,M,context_channels) -> (B,C,N). Starts as the identity.
    """

    def __init__(self, channels, heads, context_channels):
        super().__init__()
        self.norm, self.proj_in = norm(channels), nn.Linear(channels, channels)
        self.self_attention = Attention(channels, heads)
        self.text = Attention(channels, heads, context_channels)
        self.ff_norm, self.ff = norm(channels), nn.Linear(channels, 8 * channels)
        self.gate, self.ff_out = GEGLU(), nn.Linear(4 * channels, channels)
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x, context):
        h = self.proj_in(self.norm(x).transpose(1, 2)).transpose(1, 2)
        h = self.text(self.self_attention(h), context)
        hidden = self.gate(self.ff(self.ff_norm(h).transpose(1, 2)))
        h = h.transpose(1, 2) + self.ff_out(hidden)  # (B, N, C)
        return x + self.proj_out(h).transpose(1, 2)


class Block(nn.Module):
    """ResBlock on each plane, then, if `attend`, attention over the tokens of all planes at once.

    With `across_heads`, see `UNet`, that attention is within each plane.

    forward(xs, embs, batch, context) -> list like xs. xs has a tensor (B*P,in_channels,H,W) for
    each shape of planes, the P planes of an item side by side, and embs an embedding (B*P,E) for
    each; batch is B and context is text features (B,M,context_channels) or None.
    """

    def __init__(self, in_channels, out_channels, config, attend):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, 4 * config.ch)
        self.attention = None
        most = max(out_channels // config.head_channels, 1)  # heads that divide the channels:
        heads = next(h for h in range(most, 0, -1) if out_channels % h == 0)
        if attend and config.context_channels:
            self.attention = TextAttention(out_channels, heads, config.context_channels)
        elif attend:
            kind = PlaneAttention if config.across_heads else Attention
            self.attention = kind(out_channels, heads, zero_init=True)

    def forward(self, xs, embs, batch, context=None):
        xs = [self.res(x, emb) for x, emb in zip(xs, embs)]
        if self.attention is None:
            return xs
        if isinstance(self.attention, PlaneAttention):
            return [self.attention(x) for x in xs]
        return across(self.attention, xs, batch, context)


class UNet(nn.Module):
    """F(z, t): latents (B,C,L), times (B,) and a condition -> (B,C,L).

    All planes go through the same weights, those of one shape as one batch, unless `triplane` is
    'concat': then they are the channels of a single plane. The condition is None, a label (B,),
    which is added to the time embedding, or text features (B,M,context_channels) for
    cross-attention. Planes may have any size: odd ones are rounded up on the way down. With
    `across_heads`, attention of so many heads over all planes follows every layer on the way down
    but the stem, the middle, and on the way up each block, behind its enlargement if it has one.
    """

    def __init__(self, config):
        super().__init__()
        ch = self.ch = config.ch
        self.sizes, channels = config.planes, config.z_channels
        self.joined = len(self.sizes) if config.triplane == 'concat' else 1
        if self.joined > 1:  # all planes as the channels of one
            channels *= self.joined
            self.sizes = {'+'.join(self.sizes): next(iter(self.sizes.values()))}
        self.groups = {}  # plane shape -> positions of the planes that have it
        for i, size in enumerate(self.sizes.values()):
            self.groups.setdefault(tuple(size), []).append(i)
        self.time = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        self.label = nn.Embedding(config.num_classes + 1, 4 * ch) if config.num_classes else None
        self.plane_time = self.plane_stem = None
        if config.plane_embed and len(self.sizes) > 1:
            self.plane_time = nn.Parameter(0.1 * torch.randn(len(self.sizes), 4 * ch))
            self.plane_stem = nn.Parameter(0.1 * torch.randn(len(self.sizes), ch))
        self.stem = conv3x3(channels, ch)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = ch, [ch]  # skips: the widths to be joined on the way up
        for level, mult in enumerate(config.ch_mult):
            if level:
                self.down.append(Downsample(width, config.symmetric_pad))
                skips.append(width)
            for _ in range(config.num_res_blocks):
                self.down.append(Block(width, ch * mult, config, 2 ** level in config.attn_factors))
                width = ch * mult
                skips.append(width)
        # Layer -> width of the attention that may follow it.
        follow = {f'down{i}': n for i, n in enumerate(skips[1:])} | dict(middle1=width)
        self.middle = nn.ModuleList([Block(width, width, config, a) for a in (True, False)])
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            attend = 2 ** level in config.attn_factors
            for j in range(config.num_res_blocks + 1):
                self.up.append(Block(width + skips.pop(), ch * mult, config, attend))
                width = ch * mult
                if level and j == config.num_res_blocks:
                    self.up.append(Upsample(width))
                follow[f'up{len(self.up) - 1}'] = width
        self.out_norm, self.out = norm(width), zeroed(conv3x3(width, channels))
        regroup(self, config.norm_groups, config.norm_eps)
        self.across = nn.ModuleDict({
            name: Attention(width, config.across_heads, zero_init=True)
            for name, width in follow.items() if config.across_heads})
        regroup(self.across, config.norm_groups, 1e-6)

    def forward(self, z, t, cond=None):
        batch, channels = z.shape[:2]
        z = z.reshape(batch, channels * self.joined, -1)  # (B, C, P*HW) -> (B, C*P, HW)
        emb = self.time(time_embedding(t, self.ch))  # (B, E)
        if self.label is not None:
            emb, cond = emb + self.label(cond), None
        xs, embs = self.split_planes(z, emb)
        skips = [xs]
        for i, layer in enumerate(self.down):
            if isinstance(layer, Downsample):
                xs = [layer(x) for x in xs]
            else:
                xs = layer(xs, embs, batch, cond)
            xs = self.attended(f'down{i}', xs, batch)
            skips.append(xs)
        for i, layer in enumerate(self.middle):
            xs = self.attended(f'middle{i}', layer(xs, embs, batch, cond), batch)
        for i, layer in enumerate(self.up):
            if isinstance(layer, Upsample):
                xs = [layer(x, skip.shape[2:]) for x, skip in zip(xs, skips[-1])]
            else:
                xs = [torch.cat([x, skip], dim=1) for x, skip in zip(xs, skips.pop())]
                xs = layer(xs, embs, batch, cond)
            xs = self.attended(f'up{i}', xs, batch)
        xs = [self.out(F.silu(self.out_norm(x), inplace=True)) for x in xs]
        planes = {}
        for group, x in zip(self.groups.values(), xs):
            planes.update(zip(group, x.unflatten(0, (batch, -1)).unbind(1)))
        return pack({i: planes[i] for i in sorted(planes)}).reshape(batch, channels, -1)

    def attended(self, name, xs, batch):
        """What the attention that follows the layer of this name makes of xs, if there is one."""
        return across(self.across[name], xs, batch) if name in self.across else xs

    def split_planes(self, z, emb):
        """Latents (B,C,L) and emb (B,E) -> the lists xs (after the stem) and embs of `Block`."""
        planes, xs, embs = list(unpack(z, self.sizes).values()), [], []
        for group in self.groups.values():
            x = torch.stack([planes[i] for i in group], dim=1)  # (B, P, C, H, W)
            e = emb[:, None].expand(-1, len(group), -1)
            x = self.stem(x.flatten(0, 1))
            if self.plane_time is not None:
                e = e + torch.stack([self.plane_time[i] for i in group])
                stem = torch.stack([self.plane_stem[i] for i in group]).repeat(len(z), 1)
                x = x + stem[:, :, None, None]
            xs.append(x)
            embs.append(e.flatten(0, 1))
        return xs, embs


class LDM(nn.Module):
    """The diffusion model of latents z (B,C,L): loss, noise prediction, guidance.

    A condition is None, class labels (B,) or text: features (B,M,context_channels) or, for a model
    with its own text encoder, tokens (B,M). For no condition the network gets label `num_classes`,
    `null_context` (M or 1, context_channels), which training sets to the features of the empty
    text, or the tokens of the empty text.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.unet = UNet(config)
        self.text = None
        if config.text == 'bytes':
            self.text = ByteText(config.context_channels, length=config.text_length,
                                 ngrams=config.text_ngrams)
        c = config.z_channels
        self.shape = c, sum(h * w for h, w in config.planes.values())  # (C, L) of one latent
        logits = 1, c, len(config.planes) if config.mixing_planes else 1
        self.mixing_logit = (nn.Parameter(torch.full(logits, float(config.mixing_init)))
                             if config.mixed else None)
        self.cells = [h * w for h, w in config.planes.values()]
        self.register_buffer('z_mean', torch.zeros(c, 1))
        self.register_buffer('z_std', torch.ones(c, 1))
        self.register_buffer('null_context', torch.zeros(1, max(config.context_channels, 1)))
        self.register_buffer('log_alpha_bar', LOG_ALPHA_BAR.clone(), persistent=False)
        self.to(memory_format=torch.channels_last)

    def _load_from_state_dict(self, state, prefix, *args):
        # The empty text may have any number of tokens, so the buffer gets the stored one's shape.
        if prefix + 'null_context' in state:
            self.set_null_context(state[prefix + 'null_context'])
        super()._load_from_state_dict(state, prefix, *args)

    def set_null_context(self, features):
        """Set the text features (M,context_channels) that stand for no condition."""
        self.null_context = features.detach().clone().to(self.null_context)

    def set_latent_stats(self, mean, std):
        """Set mean and standard deviation, C values each, of the channels of training latents."""
        self.z_mean.copy_(torch.as_tensor(mean).reshape(-1, 1))
        self.z_std.copy_(torch.as_tensor(std).reshape(-1, 1))

    def normalise(self, z):
        """Latents of the VAE -> latents of the diffusion, the same unless latent_norm is on."""
        return z if self.config.latent_norm == 'none' else (z - self.z_mean) / self.z_std

    def denormalise(self, z):
        """Inverse of `normalise`."""
        return z if self.config.latent_norm == 'none' else z * self.z_std + self.z_mean

    def param_groups(self, lr, weight_decay, mixing_lr_mult=1.0):
        """Optimiser groups: the networks; the mixing logit, no decay, at lr * mixing_lr_mult."""
        networks = [*self.unet.parameters(), *(self.text.parameters() if self.text else ())]
        groups = [dict(params=networks, lr=lr, weight_decay=weight_decay)]
        if self.mixing_logit is not None:
            groups.append(dict(params=[self.mixing_logit], lr=lr * mixing_lr_mult,
                               weight_decay=0.0, lr_mult=mixing_lr_mult))
        return groups

    def null(self, batch):
        """What stands for no condition, (batch, ...); None for a model without conditions."""
        if self.config.num_classes:
            return torch.full((batch,), self.config.num_classes, device=self.z_mean.device)
        if self.text is not None:
            length = len(self.text.position)  # the empty text has no bytes
            return torch.zeros(batch, length, dtype=torch.long, device=self.z_mean.device)
        return self.null_context.expand(batch, -1, -1) if self.config.context_channels else None

    def read(self, cond, batch):
        """What the U-Net gets for a condition: features of tokens; for None, `null` of a batch."""
        cond = self.null(batch) if cond is None else cond
        tokens = self.text is not None and not cond.is_floating_point()
        return self.text(cond) if tokens else cond

    def eps(self, z_t, t, cond=None):
        """eps_theta: the noise predicted in z_t (B,C,L) at times t (B,), (B,C,L) float32.

        cond is a condition, or what `read` made of it.
        """
        z_t = z_t.float()
        out = self.unet(z_t, t, self.read(cond, len(z_t))).float()
        alpha, sigma = self.scales(t)
        share = self.mixing()
        if self.config.predict == 'v':  # sigma z_t + alpha v = eps
            return sigma * z_t + alpha * share * out
        return torch.lerp(sigma * z_t, out, share)

    def scales(self, t):
        """alpha and sigma of z_t at times t (B,), (B,1,1) float32."""
        ab = alpha_bar(t, self.log_alpha_bar)[:, None, None]
        return ab.sqrt().float(), (1 - ab).sqrt().float()

    def mixing(self):
        """The share s of the network in mixed prediction, (1,C,L) or to be broadcast to it."""
        if self.mixing_logit is None:
            return self.z_mean.new_ones(1)
        share = self.mixing_logit.sigmoid()
        if not self.config.mixing_planes:
            return share
        return torch.cat([s.expand(-1, -1, n) for s, n in zip(share.split(1, 2), self.cells)], 2)

    def draw(self, positions, *key):
        """The random numbers of rows, each from `key` and its stream position alone.

        Noise (B,C,L) for the posterior, and a dict for `forward`: `noise` (B,C,L), times `t` (B,)
        and whether the condition is left out, `drop` (B,).
        """
        noise, u = row_noise(positions, key, self.z_mean.device, (2, *self.shape), 2)
        return noise[:, 0], dict(noise=noise[:, 1], t=self.times(u[:, 0]),
                                 drop=u[:, 1] < self.config.cond_dropout)

    def times(self, u):
        """Times of training, integers in [0, 999], of which a share u (B,) is earlier.

        With t_std, t / 1000 is the sigmoid of a normal number (Esser et al., 2024).
        """
        c = self.config
        if c.t_std:
            u = (c.t_mean + c.t_std * torch.special.ndtri(u.double())).sigmoid()
        return (T * u).long().clamp(max=T - 1)  # a sigmoid may be 1

    def forward(self, z0, cond=None, noise=None, t=None, drop=None, posterior=None):
        """The loss: mean of |eps - eps_theta|^2 for latents z0 (B,C,L) of the VAE, a scalar.

        Of a model that predicts v, the mean of |v - v_theta|^2, which is |eps error|^2 / alpha_bar.
        noise (B,C,L), t (B,), integers, and drop (B,), bool, are what `draw` returns; without them,
        noise and times are drawn here, and no condition is left out. `posterior`: mean and
        deviation (B,C,L) of the q(z|x) that z0 was drawn from, by which the noise is replaced with
        `expected_noise`.
        """
        noise = torch.randn_like(z0) if noise is None else noise
        t = torch.randint(T, (len(z0),), device=z0.device) if t is None else t
        if cond is not None and drop is not None:
            drop = drop.view(-1, *[1] * (cond.ndim - 1))
            cond = torch.where(drop, self.null(len(z0)), cond)
        alpha, sigma = self.scales(t)
        z_t = alpha * self.normalise(z0.float()) + sigma * noise
        target = self.expected_noise(z_t, t, *posterior) if posterior else noise
        return (self.error_scale(t) * (self.eps(z_t, t, cond) - target)).square().mean()

    def error_scale(self, t):
        """What errors of eps are multiplied with in the loss: 1, or 1 / alpha for those of v."""
        return 1 / self.scales(t)[0] if self.config.predict == 'v' else 1.0

    def expected_noise(self, z_t, t, mean, std):
        """E[eps | z_t, x] of z_0 ~ q(z|x) = N(mean, std^2), all (B,C,L) and of the VAE but z_t.

        As a target it has the optimum of eps itself, E[eps | z_t], and less variance: of z_t, given
        x, N(alpha mean, alpha^2 std^2 + sigma^2), it is - sigma times the score.
        """
        alpha, sigma = self.scales(t)
        std = std / self.z_std if self.config.latent_norm == 'channel' else std
        variance = (alpha * std).square() + sigma.square()
        return sigma * (z_t - alpha * self.normalise(mean)) / variance

    def check_condition(self, cond):
        """ValueError if this model cannot read the condition `cond`."""
        classes, width = self.config.num_classes, self.config.context_channels
        if cond is None:
            return
        require(classes or width, 'this model is unconditional: give it no label and no text')
        if classes:
            require(cond.ndim == 1 and cond.min() >= 0 and cond.max() < classes,
                    f'class labels must be integers in 0..{classes - 1}')
        elif self.text is not None:
            require(cond.ndim == 2 and not cond.is_floating_point(), 'this model reads the tokens '
                    'of its own text encoder, (batch, length): make them with encoders.text_reader')
        else:
            require(cond.ndim == 3 and cond.shape[2] == width, f'text features {tuple(cond.shape)} '
                    f'where (batch, tokens, {width}) is needed: use the text encoder the model was '
                    'trained with')

    def guided(self, cond, w=1.0):
        """A function eps(z, t) with classifier-free guidance: e_null + w (e_cond - e_null).

        Both run as one batch of twice the size; without condition or for w = 1, only one runs.
        """
        self.check_condition(cond)
        null = self.read(None, 1)  # texts are read here, once, not in every call
        if cond is None:
            return lambda z, t: self.eps(
                z, t, None if null is None else null.expand(len(z), *null.shape[1:]))
        cond = self.read(cond, len(cond))
        if w == 1:
            return lambda z, t: self.eps(z, t, cond)
        both = torch.cat([null.expand_as(cond), cond])

        def eps_fn(z, t):
            e_null, e_cond = self.eps(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
            return torch.lerp(e_null, e_cond, w)
        return eps_fn


# ---- samplers --------------------------------------------------------------------------------

SAMPLERS = 'sde-dpmpp', 'dpmpp', 'ddim', 'ddpm', 'rk45'
SAMPLER, STEPS, ETA = 'sde-dpmpp', 20, 1.5  # chosen by FID, see RESULTS.md
FINEST = 2e-6  # tolerance of rk45 in float32; below it, step sizes follow the rounding of z


@torch.no_grad()
def sample(eps_fn, z_T, sampler=SAMPLER, steps=STEPS, rtol=1e-3, atol=1e-3, generator=None,
           eta=ETA):
    """Latents z_0 from noise z_T (B,C,L): (z_0, nfe), where nfe is the number of calls of eps_fn.

    `eps_fn(z, t (B,))` is any noise prediction, t in 0..999, with fractions for 'rk45'. All other
    samplers are cases of `multistep` with `steps` calls at `even_times`; `eta`, of 'sde-dpmpp', is
    how much noise it puts back. 'rk45' solves the probability-flow ODE to the tolerances `rtol` and
    `atol` and denoises once. `generator`, for noise that is put back, is one generator or a list of
    B, with which sample k does not depend on its batch. z_0 is float64 if z_T is, float32
    otherwise. ValueError for settings out of range.
    """
    require(sampler in SAMPLERS, f'sampler {sampler!r}: unknown; one of {", ".join(SAMPLERS)}')
    require(1 <= steps <= T, f'{steps} sampling steps: must be from 1 to {T}')
    require(eta >= 0, f'eta {eta}: must be at least 0')
    z, nfe = z_T if z_T.dtype == torch.float64 else z_T.float(), 0
    finest = FINEST * torch.finfo(z.dtype).eps / torch.finfo(torch.float32).eps
    require(rtol >= finest and atol >= finest, f'tolerances rtol {rtol:g}, atol {atol:g}: must be '
            f'at least {finest:.1g}; below it there is rounding alone')

    def eps(z, t):
        nonlocal nfe
        nfe += 1
        dtype = torch.long if isinstance(t, int) else z.dtype
        return eps_fn(z, torch.full((len(z),), t, dtype=dtype, device=z.device)).to(z.dtype)

    if sampler == 'rk45':
        z = probability_flow(eps, z, rtol, atol)
    else:
        order, eta = {'ddpm': (1, 1), 'ddim': (1, 0), 'dpmpp': (2, 0)}.get(sampler, (2, eta))
        z = multistep(eps, z, even_times(steps), order, eta, generator)
    return z, nfe


def even_times(steps):
    """Evenly spaced integers from 999 down to T / steps - 1; one more would be -1, the data."""
    return [T * i // steps - 1 for i in range(steps, 0, -1)]


def multistep(eps, z, times, order, eta, generator=None):
    """SDE-DPM-Solver++ of first or second order, Lu et al. (2022): z_0 (B,C,L) of the last call.

    With lambda = ln(alpha / sigma), which a step from one of `times` to the next raises by h,

        z' = sigma' / sigma e^(-eta h) z + alpha' (1 - e^(-(1 + eta) h)) D
             + sigma' sqrt(1 - e^(-2 eta h)) noise

    where D is the z_0 predicted or, in second order, what it will be at half of the step by the
    line through it and the previous one. With the true eps, z keeps its distribution for any eta: 0
    is the ODE (first order: DDIM, Song et al., 2021; second: DPM-Solver++(2M)), 1 the reverse SDE
    (first order: the posterior of DDPM, Ho et al., 2020).
    """
    ab = alpha_bar(torch.tensor(times)).tolist()
    knots = [math.log(a / (1 - a)) / 2 for a in ab]
    previous = h = None
    for i, t in enumerate(times):
        z_0 = (z - math.sqrt(1 - ab[i]) * eps(z, t)) / math.sqrt(ab[i])
        if i == len(times) - 1:
            return z_0
        h, last_h = knots[i + 1] - knots[i], h
        direction = z_0
        if order == 2 and previous is not None:
            direction = z_0 + h / (2 * last_h) * (z_0 - previous)
        alpha, sigma = math.sqrt(ab[i + 1]), math.sqrt(1 - ab[i + 1])
        z = (sigma / math.sqrt(1 - ab[i]) * math.exp(-eta * h) * z
             - alpha * math.expm1(-(1 + eta) * h) * direction)
        if eta:
            z = z + sigma * math.sqrt(-math.expm1(-2 * eta * h)) * randn_like(z, generator)
        previous = z_0


def randn_like(z, generator):
    """Noise like z (B, ...) from a generator, a list of B or, for None, torch's own generator."""
    if not isinstance(generator, (list, tuple)):
        device = generator.device if generator else z.device
        return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=device).to(z.device)
    noise = torch.empty_like(z, device=generator[0].device)
    for row, g in zip(noise, generator):
        row.normal_(generator=g)
    return noise.to(z.device)


def probability_flow(eps, z, rtol, atol):
    """RK45 on dz/dtau = -beta/2 z + beta/2 eps/sigma from tau = 1 to 1e-3, then the z_0 predicted.

    The network is given the t, with a fraction, that has the same noise level as tau.
    """
    def predict(tau, z):
        log_ab = log_alpha_bar(tau)
        return eps(z, float(matched_time(log_ab))), math.sqrt(-math.expm1(log_ab)), log_ab

    def velocity(tau, z):
        e, sigma, _ = predict(tau, z)
        beta = T * (BETA_A + (BETA_B - BETA_A) * tau) ** 2
        return beta / 2 * (e / sigma - z)

    z, _ = rk45(velocity, z, 1.0, TAU_END, rtol, atol)
    e, sigma, log_ab = predict(TAU_END, z)
    return (z - sigma * e) / math.exp(log_ab / 2)


# Dormand & Prince (1980): times of the stages; weights of the stages before each (the last row
# gives the fifth-order solution, whose derivative is the next step's first stage); weights of the
# fifth-order solution minus those of the fourth-order one.
RK_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
RK_A = ((1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
RK_E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


MOST_CALLS = 10_000  # of one integration; a tolerance of 1e-5 takes some hundred


def largest_rms(x):
    """The largest of the root mean squares of the rows of x (B, ...), a float."""
    return x.flatten(1).square().mean(1).max().sqrt().item()


def rk45(f, y, t0, t1, rtol, atol):
    """y(t1) of dy/dt = f(t, y) with y(t0) = y (B, ...), and the number of calls of f: (y, nfe).

    Dormand-Prince with the step control of Hairer, Norsett & Wanner (1993), Section II.4: safety
    0.9, factors 0.2 to 10. The error is that of the row with the largest, so that the row which is
    hardest to integrate sets the steps of its batch. ValueError if a step shrinks to rounding, as
    it does if f is not finite, or after MOST_CALLS.
    """
    t, k, nfe = t0, f(t0, y), 2
    h, grow = initial_step(f, y, k, t0, t1, rtol, atol), 10.0
    while t != t1:
        require(nfe < MOST_CALLS, f'rk45: only at t = {t:g} after {nfe} calls: rounding in the '
                'network exceeds rtol and atol; choose larger ones')
        require(abs(h) > 10 * np.spacing(abs(t)), f'rk45: step below rounding at t = {t:g}: the '
                'derivative is not finite, or rtol and atol are too small')
        h = h if abs(h) < abs(t1 - t) else t1 - t
        stages = [k]
        for c, a in zip(RK_C, RK_A):
            proposal = y + h * sum(w * s for w, s in zip(a, stages) if w)
            stages.append(f(t + c * h, proposal))
        nfe += 6
        scale = atol + rtol * torch.maximum(y.abs(), proposal.abs())
        error = largest_rms(h * sum(w * s for w, s in zip(RK_E, stages) if w) / scale)
        factor = min(grow, max(0.2, 0.9 * error ** -0.2)) if error else grow
        grow = 10.0 if error < 1 else 1.0  # no growth right after a rejection
        if error < 1:
            t, y, k = (t1 if h == t1 - t else t + h), proposal, stages[-1]
        h = h * factor
    return y, nfe


def initial_step(f, y, k, t0, t1, rtol, atol):
    """The first step of `rk45`, with its sign; calls f once. Hairer et al. (1993), page 169."""
    scale, span = atol + rtol * y.abs(), abs(t1 - t0)
    sign = math.copysign(1.0, t1 - t0)
    d0, d1 = largest_rms(y / scale), largest_rms(k / scale)
    if not math.isfinite(d1):
        return math.nan  # which rk45 refuses
    h0 = min(1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1, span)
    d2 = largest_rms((f(t0 + sign * h0, y + sign * h0 * k) - k) / scale) / h0
    h1 = max(1e-6, 1e-3 * h0) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2
    return sign * min(100 * h0, h1, span)


# ---- from noise to latents -------------------------------------------------------------------

def initial_noise(seeds, shape):
    """z_T (B, *shape) on the CPU, row k from seeds[k] alone."""
    return torch.stack([torch.randn(*shape, generator=torch_seeded('z_T', s)) for s in seeds])


def slerp(a, b, w):
    """Noises (..., C, L) between a (w = 0) and b (w = 1), on the sphere: of the same norm."""
    cosine = F.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)[..., None, None]
    angle = cosine.clamp(-1, 1).arccos().clamp(min=1e-4)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


@torch.no_grad()
def generate(vae, ldm, seeds, cond=None, guidance=1.0, sampler=SAMPLER, steps=STEPS,
             rtol=1e-3, atol=1e-3, batch=16, z_T=None, return_nfe=False, progress=False, eta=ETA):
    """Latents (B,C,L) for `vae.decode`, one for each seed, made `batch` at a time.

    `cond` has a row for each seed: labels (B,) or text features (B,M,C), with guidance weight
    `guidance`. z_T is the same on every device; noise that a sampler puts back comes from the
    device's own generator, one for each seed. Sample k depends on seeds[k], not on its batch;
    'rk45' alone shares step sizes in a batch, so there it does within the tolerance. `z_T` (B,C,L)
    replaces the seeds' own noise.
    With `return_nfe`, (z, nfe): network calls by batch; a guided call counts as one.
    """
    device, seeds = ldm.z_mean.device, list(seeds)
    require(seeds, 'no seeds: nothing to generate')
    z_T = initial_noise(seeds, ldm.shape) if z_T is None else z_T
    for name, rows in (('conditions', cond), ('initial noises', z_T)):
        if rows is not None and len(rows) != len(seeds):
            raise ValueError(f'{len(rows)} {name} for {len(seeds)} seeds: give one for each')
    out, nfe = [], []
    calls = None if sampler == 'rk45' else steps * math.ceil(len(seeds) / batch)
    bar = tqdm(total=calls, desc='sampling', unit='call', disable=not progress, leave=False)

    def counted(z, t):
        bar.update()
        return eps_fn(z, t)

    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        eps_fn = ldm.guided(None if cond is None else cond[part].to(device), guidance)
        generators = [torch_seeded('posterior noise', s, device=device) for s in seeds[part]]
        z, calls = sample(counted, z_T[part].to(device), sampler, steps, rtol, atol, generators,
                          eta)
        out.append(ldm.denormalise(z))
        nfe.append(calls)
    bar.close()
    z = torch.cat(out).to(next(vae.parameters()).device)
    require_finite(z, 'what the model generates')
    return (z, nfe) if return_nfe else z


# ---- checkpoints of the authors' code ----------------------------------------------------------

# The names of layers there and here, within a residual block, an attention, or the read-out.
LAYERS = {'in_layers.0': 'norm1', 'in_layers.2': 'conv1', 'emb_layers.1': 'emb',
          'out_layers.0': 'norm2', 'out_layers.3': 'conv2', 'skip_connection': 'skip',
          'nin_shortcut': 'skip', 'proj_out': 'out', 'k': 'kv', 'v': 'kv',
          'fc_0': 'fc0', 'fc_1': 'fc1', 'shortcut': 'skip'}
PUBLISHED_BOX = 0.550005  # half the side of the box of shapes: (1 + 0.1 + 1e-5) / 2


def part_of(state, prefix):
    """The entries whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def numbered(state, pattern, first=0):
    """How many numbers follow one another in the names: 'down.{}.' is in .. as down.0., down.1."""
    return next(n for n in range(len(state) + 1)
                if not any(k.startswith(pattern.format(first + n)) for k in state))


def translated_block(state, old, new, heads=1):
    """{name here: tensor} of one residual block, attention or layer, named `old` and `new`.

    In an attention, 1x1 convolutions are linear layers, and the rows of `qkv` are ordered by head.
    """
    found = {}
    for key, value in part_of(state, f'{old}.').items():
        layer, _, kind = key.rpartition('.')
        if layer == 'qkv':
            rows = value.flatten(1) if kind == 'weight' else value
            q, *kv = rows.unflatten(0, (heads, 3, -1)).unbind(1)
            found |= {f'q.{kind}': q.flatten(0, 1), f'kv.{kind}': torch.cat(kv).flatten(0, 1)}
        else:
            linear = layer in ('q', 'k', 'v', 'proj_out') and kind == 'weight'
            name = f'{LAYERS.get(layer, layer)}.{kind}'.removeprefix('.')
            value = value.flatten(1) if linear else value
            found[name] = torch.cat([found[name], value]) if layer == 'v' else value
    return {f'{new}.{name}': value for name, value in found.items()}


def translated_unet(state, head_channels):
    """Weights and fields of the `LDMConfig` of a U-Net in the layout of ADM."""
    found, levels, blocks = {}, [[]], 0

    def put(old, new):
        qkv = state.get(f'{old}.qkv.weight')
        heads = 1 if qkv is None else qkv.shape[1] // head_channels
        found.update(translated_block(state, old, new, heads))

    def put_block(old, new):
        put(f'{old}.0', f'{new}.res')
        put(f'{old}.1', f'{new}.attention')
    put('mid_attn', 'across.middle1')
    for old, new in (('time_embed.', 'time.'), ('input_blocks.0.0.', 'stem.'),
                     ('out.0.', 'out_norm.'), ('out.2.', 'out.')):
        found |= {new + k: v for k, v in part_of(state, old).items()}
    for k in range(1, numbered(state, 'input_blocks.{}.')):
        old, new = f'input_blocks.{k}', f'down.{k - 1}'
        put(f'input_attns.{k}', f'across.down{k - 1}')
        if f'{old}.0.op.weight' in state:
            levels.append([])
            put(f'{old}.0.op', f'{new}.conv')
        else:
            levels[-1].append((state[f'{old}.0.in_layers.2.weight'].shape[0],
                               f'{old}.1.qkv.weight' in state))
            put_block(old, new)
    put_block('middle_block', 'middle.0')
    put('middle_block.2', 'middle.1.res')
    for k in range(numbered(state, 'output_blocks.{}.')):
        put(f'output_blocks.{k}.0', f'up.{blocks}.res')
        for j in (1, 2):
            if f'output_blocks.{k}.{j}.conv.weight' in state:
                blocks += 1
                put(f'output_blocks.{k}.{j}.conv', f'up.{blocks}.conv')
            else:
                put(f'output_blocks.{k}.{j}', f'up.{blocks}.attention')
        put(f'output_attns.{k}', f'across.up{blocks}')
        blocks += 1
    ch = found['stem.weight'].shape[0]
    return found, dict(
        ch=ch, ch_mult=tuple(level[0][0] // ch for level in levels), num_res_blocks=len(levels[0]),
        attn_factors=tuple(2 ** i for i, level in enumerate(levels) if level[0][1]),
        head_channels=head_channels, plane_embed=False, symmetric_pad=True, norm_groups=32,
        norm_eps=1e-5, across_heads=16 if 'mid_attn.q.weight' in state else 0)


MIDDLE = 'mid.block_1', 'mid.attn_1', 'mid.block_2'
JOINED_MIDDLE = 'mid.block_3', 'mid_attn', 'mid.block_4'  # as JoinedPlanes: three layers
# The planes there and here: their names of those over time say which axis a plane lacks.
PLANES_THERE = {'': 'xy', '_xy': 'xy', '_yz': 'yz', '_xz': 'xz', '_yt': 'xt', '_xt': 'yt'}


def translated_layers(state, old, layers, new):
    """Weights of layers of encoder or decoder, numbered here; tuples are layers within a layer."""
    found = {}
    for n, layer in enumerate(layers):
        if isinstance(layer, tuple):
            found |= translated_layers(state, old, layer, f'{new}.{n}')
        else:
            found |= translated_block(state, f'{old}.{layer}', f'{new}.{n}')
    return found


def translated_encoder(state):
    """Weights and fields of the `VAEConfig` of an encoder of pictures or planes."""
    levels, blocks = (numbered(state, f'encoder.down.{k}') for k in ('{}.', '0.block.{}.'))
    joined = [i for i in range(levels) if part_of(state, f'encoder.down.{i}.inter_attn.')]
    middle = [JOINED_MIDDLE] * bool(part_of(state, 'encoder.mid.block_3.'))
    layers = ['conv_in']
    for i in range(levels):
        layers += [f'down.{i}.block.{j}' for j in range(blocks)]
        layers += [tuple(f'down.{i}.inter_attn.{n}' for n in range(3))] * (i in joined)
        layers += [f'down.{i}.downsample'] * (i < levels - 1)
    layers += [*MIDDLE, *middle, 'norm_out', 'SiLU', 'conv_out']
    ch, channels = state['encoder.conv_in.weight'].shape[:2]
    return translated_layers(state, 'encoder', layers, 'encoder.net'), dict(
        channels=channels, ch=ch, joined=(*[0] * len(middle), *(2 ** i for i in joined)),
        ch_mult=tuple(state[f'encoder.down.{i}.block.0.conv1.weight'].shape[0] // ch
                      for i in range(levels)))


def translated_decoder(state):
    """Weights and fields of the `VAEConfig` of a decoder and of the convolutions at the latent."""
    levels, blocks = (numbered(state, f'decoder.up.{k}') for k in ('{}.', '0.block.{}.'))
    ups = [f'decoder.up.{i}' for i in reversed(range(levels))]  # theirs are fine to coarse
    video = 'decoder.mid_attn.q.weight' in state and not part_of(state, 'decoder.mid.block_3.')
    stem, level = ['conv_in', *MIDDLE], [f'block.{j}' for j in range(blocks)]
    if not video:
        stem.append(JOINED_MIDDLE)
        level.append(tuple(f'inter_attn.{n}' for n in range(3)))
    found = translated_layers(state, 'decoder', stem, 'decoder.stem')
    found |= translated_block(state, 'decoder.mid_attn', 'across') if video else {}
    for i, old in enumerate(ups):
        found |= translated_layers(state, old, level, f'decoder.levels.{i}')
        found |= translated_block(state, f'{old}.inter_attn.0',
                                  f'decoder.across.{2 ** i}') if video else {}
        found |= translated_block(state, f'{old}.upsample', f'decoder.ups.{i}')
        found |= translated_block(state, f'{old}.hdbf.0', f'decoder.heads.{2 ** i}')
    found |= translated_layers(state, 'decoder', ['norm_out', 'SiLU', 'conv_out'],
                               f'decoder.heads.{2 ** (levels - 1)}')
    for old, new in dict(quant_conv='quant', pre='quant', post_quant_conv='post_quant',
                         post='post_quant').items():
        for there, here in PLANES_THERE.items():
            found |= translated_block(state, old + there, f'{new}.{here}')
    widths = [state[f'{old}.block.0.conv1.weight'].shape[0] for old in ups]
    inner, z_channels = found['post_quant.xy.weight'].shape[:2]
    return found, dict(
        decoder_ch=math.gcd(*widths), decoder_mult=tuple(w // math.gcd(*widths) for w in widths),
        num_res_blocks=blocks - 1, z_channels=z_channels, inner_channels=inner,
        field_channels=state['decoder.conv_out.weight'].shape[0], norm_groups=32,
        across=video, wide_heads=video, mid_heads=16 if video else 1,
        across_fields=tuple(2 ** i for i, old in enumerate(ups)
                            if video and part_of(state, f'{old}.inter_attn.')),
        fields=tuple(2 ** i for i, old in enumerate(ups)
                     if i == levels - 1 or part_of(state, f'{old}.hdbf.0.')))


def translated_tokens(state, old, new):
    """Weights of a transformer's layer, attention or feed-forward network, `old` and `new`."""
    names = {'norm': 'norm', 'fn.to_qkv': 'qkv', 'fn.to_out.0': 'out'}
    if f'{old}.fn.net.0.weight' in state:
        names = {'norm': '0', 'fn.net.0': '1', 'fn.net.3': '3'}
    return {f'{new}.{here}.{kind}': value for there, here in names.items()
            for kind, value in part_of(state, f'{old}.{there}.').items()}


def translated_clips(state):
    """Weights and fields of the `VAEConfig` of an encoder of clips, and how its planes are read.

    They are read along other axes than they are made: a field's rows, which are times to encoder
    and decoder, are places to the read-out, and its columns times. It is what the weights learned.
    """
    found = translated_block(state, 'encoder.to_patch_embedding', 'encoder.embed')
    depth, plane_depth = (numbered(state, k)
                          for k in ('encoder.layers.{}.', 'xy_quant_attn.layers.{}.'))
    for i in range(depth):
        for n, layer in enumerate(('time', 'space', 'mlp')):
            name = f'encoder.layers.{i}'
            found |= translated_tokens(state, f'{name}.{n}', f'{name}.{layer}')
    for there in ('xy', 'yt', 'xt'):
        name = f'encoder.planes.{PLANES_THERE["_" + there]}'
        *cells, last = state[f'{there}_pos_embedding'][0]
        found |= {f'{name}.position': torch.stack(cells),
                  f'{name}.summary': state[f'{there}_token'][0, 0] + last}
        for i in range(2 * plane_depth):
            found |= translated_tokens(state, f'{there}_quant_attn.layers.{i // 2}.{i % 2}',
                                       f'{name}.layers.{i}')
    width, pixels = found['encoder.embed.weight'].shape
    patch = math.isqrt(pixels // 3)
    return found, dict(
        domain='video', resolution=patch * len(found['encoder.planes.yt.position']), patch=patch,
        frames=len(found['encoder.planes.xy.position']), vit_width=width, vit_depth=depth,
        plane_depth=plane_depth, plane_hidden=found['encoder.planes.xy.layers.1.1.bias'].shape[0],
        video_code=True, read_axes=dict(xy=[0, 1], xt=[2, 1], yt=[2, 0]))


def translated_read_out(state):
    """Weights and fields of the `VAEConfig` of a read-out with scale injection.

    There the learning rate is equalised: weights are divided by the root of their inputs.
    """
    width = state['time_mlp.3.weight'].shape[0]
    found = {f'mlp.style.net.{n}.{kind}': state[f'time_mlp.{n + 1}.{kind}']
             for n in (0, 2) for kind in ('weight', 'bias')}

    def put(old, new, bias):
        weight = state[f'{old}.weight'][0, :, :, 0, 0]
        found.update({f'{new}.weight': weight / weight.shape[1] ** 0.5, f'{new}.bias': bias,
                      f'{new}.affine.weight': state[f'{old}.modulation.weight'] / width ** 0.5,
                      f'{new}.affine.bias': state[f'{old}.modulation.bias']})
    blocks = [f'net_res{n}' for n in (1, 2, 3, 4)]
    layers = numbered(state, 'net_res1.conv{}.', 1)
    for n, block in enumerate(blocks):
        for j in range(layers):
            put(f'{block}.conv{j + 1}.conv', f'mlp.blocks.{n}.layers.{j}',
                state[f'{block}.conv{j + 1}.activate.bias'])
        if f'{block}.skip.0.weight' in state:
            weight = state[f'{block}.skip.0.weight'][:, :, 0, 0]
            found[f'mlp.blocks.{n}.skip.weight'] = weight / weight.shape[1] ** 0.5
    put('torgb.conv', 'mlp.out', state['torgb.bias'].flatten())
    return found, dict(mlp_width=width, mlp_layers=layers, scale_channels=2,
                       scale_frequencies=state['time_mlp.1.weight'].shape[1] // 2)


def translated_plain_read_out(mlp):
    """Weights and fields of the `VAEConfig` of a read-out without scale injection."""
    found = translated_block(mlp, 'net_out', 'mlp.out')
    for n in range(4):
        found |= translated_block(mlp, f'net_res{n + 1}', f'mlp.blocks.{n}')
    video = mlp['net_out.weight'].shape[0] == 3
    return found, dict(
        scale_injection=False, align_corners=True, mlp_block='pre', out_slope=0.2 if video else 1.0,
        mlp_width=mlp['net_out.weight'].shape[1])


def translated_solid(points, mlp):
    """Weights and fields of the `VAEConfig` of point network and read-out of shapes.

    Places there are in units of the data, whose box here is [-1, 1].
    """
    found, fields = translated_plain_read_out(mlp)
    found |= translated_block(mlp, 'net_p', 'mlp.coords')
    blocks = numbered(points, 'blocks.{}.')
    for old, new in [('fc_pos', 'proj_in'), ('fc_c', 'proj_out'),
                     *((f'blocks.{n}', f'blocks.{n}') for n in range(blocks))]:
        found |= translated_block(points, old, f'points.{new}')
    for name in ('points.proj_in.weight', 'mlp.coords.weight'):
        found[name] = found[name] * PUBLISHED_BOX
    return found, fields | dict(
        domain='shape', channels=1, loss='bce', coord_input=True, plane_merge='sum',
        extent=PUBLISHED_BOX, threshold=0.2, point_hidden=points['fc_c.weight'].shape[1],
        point_blocks=blocks, point_channels=points['fc_c.weight'].shape[0])


def side_by_side(x, order=('xy', 'xz', 'yz')):
    """Channels (3 C,...), plane by plane in this order -> (C,3,...), in the order of `PLANES`."""
    return x.unflatten(0, (3, -1))[[order.index(name) for name in PLANES['shape']]].transpose(0, 1)


def by_channel(weights):
    """Weights of a U-Net of joined planes, whose channels become those of `UNet`."""
    stem = side_by_side(weights['stem.weight'].transpose(0, 1)).flatten(0, 1).transpose(0, 1)
    return weights | {'stem.weight': stem} | {
        name: side_by_side(weights[name]).flatten(0, 1) for name in ('out.weight', 'out.bias')}


def setting(args, group, name, default):
    """A number of the authors' configuration, or the default if the file has none."""
    content = getattr(getattr(args, group, None), '_content', None) or {}
    value = content.get(name, default)
    return int(getattr(value, '_val', value))


def buffers(network, config, weights):
    """The weights, and those buffers of network(config) that they lack, as it begins."""
    with torch.device('meta'):
        state = network(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    made = {name: F.normalize(torch.randn(x.shape, generator=generator), dim=1)
            if name.startswith('sn_u') else torch.full(x.shape, float(name == 'z_std'))
            for name, x in state.items() if name not in weights}
    lost = [name for name in made if not name.startswith(('sn_u', 'z_', 'null_'))]
    require(not lost, f'it lacks {", ".join(lost[:3])}')
    return made | weights


def translated(state, path):
    """A checkpoint of the authors' code, of pictures, shapes or videos, as one of ours.

    A dict of the kind 'ldm' or, without a second stage, 'vae'. ValueError for other domains and
    files. The noise is left out that the read-out of pictures adds to its layers, by which it is no
    function of the coordinate.
    """
    from data import CONFIGS
    from vae import D2CVAE, VAEConfig
    args, planes, points = state.get('args'), state['vaemodel'], state.get('pointnet')
    places = (points or {}).get('fc_pos.weight')
    require(places is None or places.shape[1] == 3, f'{path}: a radiance field of the authors\' '
            'code, whose read-out is linear; train anew')
    video = 'encoder.to_patch_embedding.weight' in planes
    with fitting(path):
        if video:
            domain, read_out = translated_clips(planes), translated_plain_read_out(state['mlp'])
        elif points:
            domain, read_out = translated_encoder(planes), translated_solid(points, state['mlp'])
        else:
            domain, read_out = translated_encoder(planes), translated_read_out(state['mlp'])
        weights, fields = (a | b | c for a, b, c in zip(
            translated_decoder(planes), domain, read_out))
        fields.setdefault('resolution', setting(args, 'ddconfig', 'resolution',
                                                64 if points else 256))
        config = VAEConfig(**fields)
        vae = buffers(D2CVAE, config, weights)
        preset = ('skytimelapse_code' if video else 'shapenet_chair_code' if points else
                  'celebahq_code' if config.num_res_blocks == 3 else 'afhq_cat_code')
        step = int(state.get('current_iters', 0))
        flags = {f.name: f.default for c in CONFIGS for f in dataclasses.fields(c)} | dict(
            dataset=config.domain, preset=preset, data='', flip=False, steps=step,
            resolution=config.resolution, frames=config.frames)
        found = dict(kind='vae', step=step, args=flags, vae_config=vars(config), vae=vae,
                     splits=dict(train=[], test=[]))
        process = part_of(state.get('ema', {}), 'ema_model.') or state.get('diffusion')
        return found | translated_diffusion(process, args, config, found) if process else found


def translated_diffusion(state, args, config, first):
    """What a checkpoint of both stages has beside those of the first, a dict."""
    from vae import D2CVAE
    weights, fields = translated_unet(part_of(state, 'model.'), setting(
        args, 'unetconfig', 'num_head_channels', 64 if config.domain == 'video' else 32))
    with torch.device('meta'):
        planes = D2CVAE(config).latent_sizes()
    logit = state['mixing_logit'].flatten()
    if config.domain == 'shape':
        weights, logit = by_channel(weights), side_by_side(logit)
        fields |= dict(triplane='concat', mixing_planes=True)
    weights = {f'unet.{k}': v for k, v in weights.items()}
    weights['mixing_logit'] = logit.reshape(1, config.z_channels, -1)
    about = LDMConfig(domain=config.domain, z_channels=config.z_channels, planes=planes, **fields)
    return dict(kind='ldm', vae_args=first['args'], args=dict(preset=first['args']['preset']),
                ldm_config=vars(about), ema=buffers(LDM, about, weights))


def open_checkpoint(path, kind=None):
    """`common.load_checkpoint` also of files of the authors' code, `translated`.

    Of files with both stages, `kind` 'vae' takes the first.
    """
    state = load_checkpoint(path)
    if state['kind'] == 'published':
        state = translated(state, path)
        if kind != 'ldm' and state['vae_config']['scale_injection']:  # else it was said of stage 1
            tqdm.write(f'note: {path}: the noise of its read-out is left out')
    if kind == 'vae' and state['kind'] == 'ldm':
        args = state['vae_args']
        state |= dict(kind='vae', args=args, step=state.get('vae_step', args['steps']))
    if kind and state['kind'] != kind:
        raise ValueError(f'{path}: holds a {state["kind"]} checkpoint where {kind} is needed')
    return state


def restore(make, weights, device, path):
    """The network `make()` with these weights, frozen, in evaluation mode; ValueError if not."""
    with fitting(path):
        network = make()
    load_weights(network, weights, path)
    return network.to(device).eval().requires_grad_(False)


def first_stage(state, device, path):
    """(vae, info) of a checkpoint of either kind, see `load_vae`."""
    from vae import D2CVAE, VAEConfig  # here: the diffusion itself needs no VAE
    require(state['kind'] in ('vae', 'ldm'),
            f'{path} holds a {state["kind"]} checkpoint; give a run folder or ldm.pt')
    vae = restore(lambda: D2CVAE(VAEConfig(**state['vae_config'])), state['vae'], device, path)
    return vae, dict(args=state.get('vae_args', state['args']), step=state['step'],
                     splits=state['splits'], vae_config=vars(vae.config))


def load_vae(path, device='cpu'):
    """The first stage of a run or checkpoint (see `common.find_checkpoint`): (vae, info), frozen.

    info: `args`, the flags of stage 1, its `step` and `vae_config`, and the data set's `splits`.
    ValueError or FileNotFoundError, one line, for anything else.
    """
    path = the_checkpoint(path, 'vae.pt', 'ldm.pt')
    return first_stage(open_checkpoint(path, 'vae'), device, path)


def load(path, device='cpu'):
    """A trained model from a run or checkpoint: (vae, ldm, info), frozen, with the EMA weights.

    info: that of `load_vae`, but `step` is that of stage 2, and `ldm_args`, its flags. ValueError
    or FileNotFoundError, one line, for anything that is not a finished or running second stage.
    """
    path = the_checkpoint(path, 'ldm.pt', 'vae.pt')
    state = open_checkpoint(path)
    require(state['kind'] != 'vae', f'{path} holds stage 1 only; train stage 2 with: '
            f'python train_ldm.py --vae {path.parent if path.name == "vae.pt" else path}')
    vae, info = first_stage(state, device, path)
    ldm = restore(lambda: LDM(LDMConfig(**state['ldm_config'])), state['ema'], device, path)
    return vae, ldm, dict(info, step=state['step'], ldm_args=state['args'])
