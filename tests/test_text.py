"""Texts: CLIP's tokeniser and towers from the files of others, stored features, bytes."""
import gzip
import json
import math
import unicodedata
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import encoders
import inr
import ldm
import metrics

# ---- the tokeniser -----------------------------------------------------------------------------

MERGES = ['t h', 'th e</w>', 'c h', 'ch a', 'cha i', 'chai r</w>', 'r e', 're d</w>', 'e d</w>',
          'a t</w>', 'Ã ¯']


@pytest.fixture
def merges(tmp_path):
    """A vocabulary of the published length of which only the first merges can be met."""
    path = tmp_path / 'bpe_simple_vocab_16e6.txt.gz'
    filler = [f'\u4e00{k} \u4e00' for k in range(48894 - len(MERGES))]
    with gzip.open(path, 'wt', encoding='utf-8') as file:
        file.write('"header"\n' + '\n'.join(MERGES + filler) + '\nbeyond these\n')
    return path


def slow_bpe(word, merges):
    """Merge the leftmost-ranked pair, one occurrence after another, until none is left."""
    parts = [*word[:-1], word[-1] + '</w>']
    while True:
        ranks = [merges.index(f'{a} {b}') if f'{a} {b}' in merges else 10 ** 9
                 for a, b in zip(parts, parts[1:])]
        if not ranks or min(ranks) == 10 ** 9:
            return parts
        k = ranks.index(min(ranks))
        parts[k:k + 2] = [parts[k] + parts[k + 1]]


@pytest.mark.mutation('encoders.py', '*range(161, 173), *range(174, 256)', '*range(161, 256)')
@pytest.mark.mutation('encoders.py', "parts = [*word[:-1], word[-1] + '</w>']", "parts = [*word]")
@pytest.mark.mutation('encoders.py', 'best = min(pairs', 'best = max(pairs')
def test_tokens_equal_a_slow_merge(merges):
    tokenise = encoders.BPETokenizer(merges)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}
    words = [symbol[b] for b in printable + others]
    words += [w + '</w>' for w in words] + [m.replace(' ', '') for m in MERGES]
    for text in ('the red chair', 'cha chat', 'that-the; thee', 'na\u00efve', 'n\u00edche',
                 'reed at 12'):
        pieces = [w for w in encoders.BPETokenizer.pattern.findall(text)]
        slow = [words.index(p) for w in pieces
                for p in slow_bpe(''.join(symbol[b] for b in w.encode()), MERGES)]
        assert tokenise.encode(text) == slow
    assert tokenise.encode('the red chair') == [512 + 1, 512 + 7, 512 + 5]


@pytest.mark.mutation('encoders.py', 'html.unescape(html.unescape(fix_text(text)))',
                      'html.unescape(fix_text(text))')
@pytest.mark.mutation('encoders.py', '[:self.length - 2]', '[:self.length - 3]')
@pytest.mark.mutation('encoders.py', '.lower()', '')
def test_texts_are_cleaned_and_cut(merges):
    tokenise = encoders.BPETokenizer(merges)
    assert tokenise.encode("It's  <3 &amp;amp; UP") == tokenise.encode("it's <3 & up")
    assert [len(p) for p in tokenise.pattern.findall("it's 12 up!")] == [2, 2, 1, 1, 2, 1]
    tokens = tokenise(['the', '', 'the ' * 100])
    assert tokens.shape == (3, 77)
    assert tokens[0].tolist() == [49406, 513, 49407] + [0] * 74
    assert tokens[1].tolist() == [49406, 49407] + [0] * 75
    assert tokens[2].tolist() == [49406] + [513] * 75 + [49407]


@pytest.mark.mutation('encoders.py', "in 'Nl No')", "in 'Nl')")
@pytest.mark.mutation('encoders.py', "in 'Nl No')", "in 'No')")
@pytest.mark.mutation('encoders.py', '|[\\d{numbers}]|', '|[\\d{numbers}]+|')
def test_words_are_cut_by_the_kinds_of_unicode():
    """Letters (L*) join into words, each number (N*) stands alone, others join; all characters."""
    for c in filter(str.isprintable, map(chr, range(0x30000))):
        kind = unicodedata.category(c)[0]
        cut = {'L': [f'a{c}{c}a'], 'N': ['a', c, c, 'a']}.get(kind, ['a', c + c, 'a'])
        expected = ['a', 'a'] if c == ' ' else cut
        assert encoders.BPETokenizer.pattern.findall(f'a{c}{c}a') == expected, hex(ord(c))


def misread(text):
    """UTF-8 read as Windows-1252, or byte by byte where that has no character."""
    return ''.join(bytes([b]).decode('cp1252', 'ignore') or chr(b) for b in text.encode())


CLEAN = {  # a text, and what ftfy.fix_text makes of it
    '\u201cThe boat\u2019s\u201d \u201asail\u2018': '"The boat\'s" \'sail\'',
    'cafe\u0301 a\u030angstro\u0308m': 'café ångström',
    'ｆｕｌｌ\u3000７ \uff76\uff9e': 'full 7 ガ',
    '\ufb01ne o\ufb03ce \u01c6 \u0133': 'fine office dž ij',
    misread('café — it’s 5€'): "café — it's 5€",
    misread('café') + ' ✓': 'café ✓',  # in part
    misread(misread('café Škoda')): 'café Škoda',
    misread('Привет 日本 🎉 ½'): 'Привет 日本 🎉 ½',
    'voilÃ le ' + misread('café'): 'voilà le café',
    '\x93red\x94 a\x00b\x1b[31m\ufeff': '"red" ab',
    '&amp;amp;amp;lt;': '<', '<b>&amp;amp;': '<b>&amp;amp;',
    '\ud83d\ude00 \ud83d': '\U0001f600 \ufffd'}
SOUND = ('« désolé… »', '«désolé…»', 'AMANHÃ…', 'Úžlabina', 'déjà\xa0»', 'MANHÃ SÓ', 'CAFÉ»', '3×½',
         'größe ÄÖÜ', '10²³ m²', 'Tiếng Việt', 'Привет', '日本')


@pytest.mark.mutation('encoders.py', "dict.fromkeys(range(0x201c, 0x2020), '\"')", '{}')
@pytest.mark.mutation('encoders.py', "unicodedata.normalize('NFC', text)", 'text')
@pytest.mark.mutation('encoders.py', '*range(0xff01, 0xfff0))}', ')}')
@pytest.mark.mutation('encoders.py', 'settled(without_mojibake, unescape(text))', 'unescape(text)')
@pytest.mark.mutation('encoders.py', 'as_utf8(match[0])', 'match[0]')
@pytest.mark.mutation('encoders.py', 'if MOJIBAKE.search(text) else text', '')
@pytest.mark.mutation('encoders.py', "'\\\\1\\xa0 '", "'\\\\1 '")
@pytest.mark.mutation('encoders.py', "str if '<' in text else html.unescape", 'html.unescape')
@pytest.mark.mutation('encoders.py', 'html.unescape(fix_text(text))', 'html.unescape(text)')
def test_texts_are_mended_as_by_ftfy(merges):
    for text, expected in CLEAN.items():
        assert encoders.fix_text(text) == expected, ascii(text)
    for text in SOUND:
        assert encoders.fix_text(text) == text, ascii(text)
    tokenise = encoders.BPETokenizer(merges)
    assert tokenise.encode('\uff54he\u2019s') == tokenise.encode("the's")
    assert tokenise.encode('<|endoftext|> the') == [tokenise.end, 513]


def test_other_vocabularies_are_refused(tmp_path, merges):
    with pytest.raises(ValueError, match='48894'):
        (tmp_path / 'merges.txt').write_text('#version\na b\n')
        encoders.BPETokenizer(tmp_path / 'merges.txt')
    plain = tmp_path / 'all.txt'
    plain.write_bytes(gzip.decompress(merges.read_bytes()))
    assert encoders.BPETokenizer(plain).encode('the') == [513]
    whole = merges.read_bytes()
    for damaged in (whole[:-100], whole[:500] + bytes(9) + whole[500:]):
        merges.write_bytes(damaged)
        with pytest.raises(ValueError, match='not the merges of a BPE vocabulary'):
            encoders.BPETokenizer(merges)


# ---- CLIP --------------------------------------------------------------------------------------

def random_clip(seed=0, width=64, vision=128):
    """Random tensors in OpenAI's layout: two layers, 64 channels a head, patches of 8 in 32."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(shape, generator=g) * 0.2

    def tower(prefix, w):
        block = {'attn.in_proj_weight': (3 * w, w), 'attn.in_proj_bias': (3 * w,),
                 'attn.out_proj.weight': (w, w), 'attn.out_proj.bias': (w,),
                 'ln_1.weight': (w,), 'ln_1.bias': (w,), 'ln_2.weight': (w,), 'ln_2.bias': (w,),
                 'mlp.c_fc.weight': (4 * w, w), 'mlp.c_fc.bias': (4 * w,),
                 'mlp.c_proj.weight': (w, 4 * w), 'mlp.c_proj.bias': (w,)}
        return {f'{prefix}transformer.resblocks.{k}.{n}': r(*s) for k in range(2)
                for n, s in block.items()}
    state = {'token_embedding.weight': r(49408, width), 'positional_embedding': r(77, width),
             'text_projection': r(width, 32), 'logit_scale': r(), 'ln_final.weight': r(width),
             'ln_final.bias': r(width), **tower('', width), **tower('visual.', vision)}
    for name, shape in {'conv1.weight': (vision, 3, 8, 8), 'class_embedding': (vision,),
                        'positional_embedding': (17, vision), 'proj': (vision, 32)}.items():
        state[f'visual.{name}'] = r(*shape)
    for name in ('ln_pre', 'ln_post'):
        state[f'visual.{name}.weight'], state[f'visual.{name}.bias'] = r(vision), r(vision)
    return state


def layer_norm(x, w, b):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False)
                                             + 1e-5).sqrt() * w + b


def slow_block(x, state, prefix, causal):
    """One block of one sequence (N,C), head by head and token by token."""
    s = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    h = layer_norm(x, s['ln_1.weight'], s['ln_1.bias'])
    q, k, v = (h @ s['attn.in_proj_weight'].T + s['attn.in_proj_bias']).chunk(3, dim=1)
    out = torch.zeros_like(x)
    for head in range(x.shape[1] // 64):
        part = slice(64 * head, 64 * head + 64)
        for i in range(len(x)):
            seen = i + 1 if causal else len(x)
            weights = (k[:seen, part] @ q[i, part] / 8).softmax(0)
            out[i, part] = weights @ v[:seen, part]
    x = x + out @ s['attn.out_proj.weight'].T + s['attn.out_proj.bias']
    h = layer_norm(x, s['ln_2.weight'], s['ln_2.bias'])
    h = h @ s['mlp.c_fc.weight'].T + s['mlp.c_fc.bias']
    h = h / (1 + (-1.702 * h).exp())
    return x + h @ s['mlp.c_proj.weight'].T + s['mlp.c_proj.bias']


def slow_text(state, tokens):
    """Last hidden states of one row of tokens, and the projected one at the end token."""
    x = state['token_embedding.weight'][tokens] + state['positional_embedding']
    for k in range(2):
        x = slow_block(x, state, f'transformer.resblocks.{k}.', causal=True)
    x = layer_norm(x, state['ln_final.weight'], state['ln_final.bias'])
    return x, x[tokens.tolist().index(49407)] @ state['text_projection']


def slow_picture(state, picture):
    """Features of one uint8 picture (3,32,32)."""
    mean, std = torch.tensor(metrics.CLIP_MEAN), torch.tensor(metrics.CLIP_STD)
    x = (picture / 255 - mean[:, None, None]) / std[:, None, None]
    kernel, corners = state['visual.conv1.weight'], range(0, 32, 8)
    patches = [(kernel * x[:, i:i + 8, j:j + 8]).sum((1, 2, 3)) for i in corners for j in corners]
    x = torch.stack([state['visual.class_embedding'], *patches])
    x = x + state['visual.positional_embedding']
    x = layer_norm(x, state['visual.ln_pre.weight'], state['visual.ln_pre.bias'])
    for k in range(2):
        x = slow_block(x, state, f'visual.transformer.resblocks.{k}.', causal=False)
    x = layer_norm(x[0], state['visual.ln_post.weight'], state['visual.ln_post.bias'])
    return x @ state['visual.proj']


def to_hugging_face(state):
    """The same tensors under Hugging Face's names."""
    out = {}
    for key, value in state.items():
        model = 'vision_model.' if key.startswith('visual.') else 'text_model.'
        key = key.removeprefix('visual.')
        if key in ('text_projection', 'proj'):
            out['text_projection.weight' if key != 'proj' else 'visual_projection.weight'] = value.T
            continue
        if key == 'logit_scale':
            out[key] = value
            continue
        for old, new in (('token_embedding', 'embeddings.token_embedding'),
                         ('positional_embedding', 'embeddings.position_embedding.weight'),
                         ('class_embedding', 'embeddings.class_embedding'),
                         ('conv1', 'embeddings.patch_embedding'), ('ln_pre', 'pre_layrnorm'),
                         ('ln_post', 'post_layernorm'), ('ln_final', 'final_layer_norm'),
                         ('transformer.resblocks', 'encoder.layers'), ('ln_1', 'layer_norm1'),
                         ('ln_2', 'layer_norm2'), ('c_fc', 'fc1'), ('c_proj', 'fc2'),
                         ('attn.', 'self_attn.')):
            key = key.replace(old, new)
        if 'in_proj' in key:
            for name, part in zip('qkv', value.chunk(3)):
                out[model + key.replace('in_proj_', f'{name}_proj.')] = part
        else:
            out[model + key] = value
    out['text_model.embeddings.position_ids'] = torch.arange(77)[None]
    out['vision_model.embeddings.position_ids'] = torch.arange(17)[None]
    return out


@pytest.mark.mutation('encoders.py', '1.702 * h', 'h')
@pytest.mark.mutation('encoders.py', '.triu(1)', '.triu(2)')
@pytest.mark.mutation('encoders.py', 'return self.ln_final(x)', 'return x')
@pytest.mark.mutation('encoders.py', 'tokens.argmax(1)]', '0 * tokens.argmax(1)]')
def test_text_tower_equals_a_slow_one():
    state = random_clip()
    tower = encoders.clip_text(state, 'file')
    tokens = torch.zeros(2, 77, dtype=torch.long)
    tokens[0, :4] = torch.tensor([49406, 320, 1125, 49407])
    tokens[1, :2] = torch.tensor([49406, 49407])
    hidden, pooled = tower(tokens), tower.pooled(tokens)
    for k in range(2):
        slow, end = slow_text(state, tokens[k])
        torch.testing.assert_close(hidden[k], slow, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(pooled[k], end, rtol=1e-3, atol=1e-3)


@pytest.mark.mutation('metrics.py', "self.ln_post(x[:, 0])", "self.ln_post(x[:, 1])")
@pytest.mark.mutation(
    'metrics.py',
    'x = self.ln_pre(x + self.positional_embedding)',
    'x = x + self.positional_embedding')
@pytest.mark.mutation('encoders.py', "for part in 'qkv'", "for part in 'kqv'")
@pytest.mark.mutation(
    'encoders.py',
    "key.replace('visual_projection', 'visual.proj')[:-7], value.T",
    "key.replace('visual_projection', 'visual.proj')[:-7], value")
@pytest.mark.mutation('encoders.py', "act == 'quick_gelu' and (", 'True and (')
@pytest.mark.mutation('encoders.py', '(not heads or width == 64 * heads)', 'True')
@pytest.mark.mutation('metrics.py', '        require_clip(state, path)\n', '        pass\n')
@pytest.mark.mutation('encoders.py', '    require_clip(state, path)\n', '')
def test_clip_from_both_publishers(tmp_path, merges):
    """Whole files, OpenAI's and Hugging Face's names, pickled and as safetensors."""
    state = random_clip(width=64, vision=64)
    state['visual.proj'], state['text_projection'] = (state[k][:, :1].repeat(1, 64) + torch.randn(
        64, 64) * 0.1 for k in ('visual.proj', 'text_projection'))  # square: a lost transpose fits
    picture = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = slow_picture(state, picture[0])
    torch.save({**state, 'input_resolution': torch.tensor(32)}, tmp_path / 'ViT-B-32.pt')
    torch.save(to_hugging_face(state), tmp_path / 'pytorch_model.bin')
    config = tmp_path / 'config.json'
    for about in (dict(text_config=dict(hidden_act='gelu')),
                  dict(vision_config=dict(hidden_size=1280, num_attention_heads=16))):
        config.write_text(json.dumps(about))
        for load in (partial(metrics.load_network, 'clip'), encoders.CLIPReader):
            with pytest.raises(ValueError, match="OpenAI's has quick_gelu and 64"):
                load(tmp_path / 'pytorch_model.bin')
        try:
            metrics.load_network('clip', tmp_path / 'ViT-B-32.pt')  # of another publisher
        except ValueError as error:
            pytest.fail(str(error))
    config.write_text(json.dumps(dict(hidden_act='quick_gelu', text_config=None, vision_config=dict(
        hidden_size=768, num_attention_heads=12))))
    for name in ('ViT-B-32.pt', 'pytorch_model.bin'):
        net = metrics.load_network('clip', tmp_path / name)
        torch.testing.assert_close(net.encode_image(picture)[0], expected, rtol=1e-3, atol=1e-3)
        tokens = net.tokenise(['the chair'])
        torch.testing.assert_close(net.encode_text(['the chair'])[0],
                                   slow_text(state, tokens[0])[1], rtol=1e-3, atol=1e-3)


def write_safetensors(path, tensors):
    header, body = {}, b''
    for name, t in tensors.items():
        data = t.numpy().tobytes()
        kind = {torch.float32: 'F32', torch.float16: 'F16', torch.int64: 'I64'}[t.dtype]
        header[name] = dict(dtype=kind, shape=list(t.shape),
                            data_offsets=[len(body), len(body) + len(data)])
        body += data
    text = json.dumps({**header, '__metadata__': {}}).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + body)


@pytest.mark.mutation('encoders.py', "offset=v['data_offsets'][0]", "offset=0")
def test_safetensors(tmp_path):
    tensors = dict(a=torch.randn(2, 3), b=torch.randn(4).half(), c=torch.arange(8),
                   d=torch.tensor(2.0))
    write_safetensors(tmp_path / 'x.safetensors', tensors)
    read = encoders.read_tensors(tmp_path / 'x.safetensors', '')
    assert {k: tuple(v.shape) for k, v in read.items()} == dict(a=(2, 3), b=(4,), c=(8,), d=())
    assert all(torch.equal(read[k], v.float() if v.is_floating_point() else v)
               for k, v in tensors.items())
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'x.safetensors').read_bytes()[:90])
    with pytest.raises(ValueError, match='truncated'):
        encoders.read_tensors(tmp_path / 'cut.safetensors', 'wanted')


def test_pictures_reach_clip_as_published():
    """Short side to 32 by Pillow's bicubic, centre square."""
    state = random_clip(vision=64)
    net = metrics.CLIP(state)
    net.load_state_dict(state)
    picture = torch.randint(256, (3, 50, 81), dtype=torch.uint8)
    im = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
        (int(81 * 32 / 50), 32), Image.Resampling.BICUBIC).crop((10, 0, 42, 32))
    assert torch.equal(net.prepare(picture), torch.from_numpy(np.array(im)).permute(2, 0, 1))


def test_clip_score_is_the_best_view():
    net = metrics.CLIP(random_clip(vision=64))
    net.tokenise = lambda texts: torch.full((len(texts), 77), 49407)
    net.load_state_dict(random_clip(vision=64))
    views = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    seen, said = net.encode_image(views), net.encode_text(['x'])[0]
    cosines = (seen @ said) / seen.norm(dim=1) / said.norm()
    best = 100 * cosines.max().item()
    assert metrics.clip_score(net, views, 'x') == pytest.approx(best, rel=1e-4)


def test_views_go_round_the_shape():
    """A ball at +x is seen on the right from azimuth 0 and on the left from behind."""
    centre = torch.tensor([0.3, 0, 0])
    vertices, faces = inr.extract_mesh(lambda p: 0.1 - (p - centre).norm(dim=1), 24)
    pictures = metrics.drawn_views((vertices, faces), 'even', 64)
    assert pictures.shape == (5, 3, 64, 64) and pictures.dtype == torch.uint8
    dark = [(255 - p[0].double()).sum(0) for p in pictures]
    columns = [(d * torch.arange(64)).sum() / d.sum() for d in dark]
    expected = [0.3 * math.cos(math.radians(72 * k)) for k in range(5)]
    assert all((c - 31.5) * e > 0.1 for c, e in zip(columns, expected))
    turned = metrics.drawn_views((vertices, faces), 'diffusion_sdf', 64)  # 10 to 50 degrees about y
    for degrees, picture in zip(range(10, 60, 10), turned):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        own = inr.render_mesh(vertices @ turn.T, faces, 64, 20, 20, 1.7, 60)['shade']
        assert (own - picture[0] / 255).abs().mean() < 0.01


@pytest.mark.mutation('metrics.py', 'patch, patch, bias=False)', 'patch, patch)')
def test_clip_has_the_published_counts():
    """ViT-B/32: 302 tensors, 151,277,313 parameters; L/14 by the same shapes."""
    def counts(width, vision, layers, patch):
        def names(prefix, n):
            return {f'{prefix}transformer.resblocks.{i}.ln_1.weight': None for i in range(n)}
        with torch.device('meta'):
            net = metrics.CLIP(names('', 12) | names('visual.', layers) | {
                'token_embedding.weight': torch.empty(49408, width),
                'positional_embedding': torch.empty(77, width),
                'text_projection': torch.empty(width, width),
                'visual.conv1.weight': torch.empty(vision, 3, patch, patch),
                'visual.positional_embedding': torch.empty((224 // patch) ** 2 + 1, vision),
                'visual.proj': torch.empty(vision, width)})
        return len(net.state_dict()), sum(p.numel() for p in net.parameters())
    assert counts(512, 768, 12, 32) == (302, 151_277_313)
    assert counts(768, 1024, 24, 14)[1] == 427_616_513


def test_other_files_are_no_clip(tmp_path, merges):
    with pytest.raises(ValueError, match='no weights there.*ViT-L-14'):
        encoders.text_reader(str(tmp_path))
    torch.save(dict(a=torch.zeros(2)), tmp_path / 'x.pt')
    with pytest.raises(ValueError, match='not the weights of a CLIP text tower'):
        encoders.text_reader(str(tmp_path / 'x.pt'))
    state = random_clip()
    del state['ln_final.bias']
    torch.save(state, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match='not the weights of a CLIP text tower'):
        encoders.text_reader(str(tmp_path / 'x.pt'))
    with pytest.raises(ValueError, match='neither bytes nor a file'):
        encoders.text_reader(str(tmp_path / 'none'))
    (tmp_path / 'alone').mkdir()
    torch.save(random_clip(), tmp_path / 'alone' / 'model.pt')
    with pytest.raises(ValueError, match='vocabulary beside the weights'):
        encoders.text_reader(str(tmp_path / 'alone'))
    torch.save(random_clip(), tmp_path / 'x.pt')
    reader = encoders.text_reader(str(tmp_path / 'x.pt'))
    assert reader.channels == 64 and reader(['the', '']).shape == (2, 77, 64)


class Captioned(data.Items):
    names, labels, groups = 'abcd', [1, 0, 0, 0], ['03001627', '04379243']
    captions = [['the', 'chair'], [], [], ['chair']]

    def __init__(self):
        pass


@pytest.mark.mutation('metrics.py', 'v * to_cube, f', 'v, f')
@pytest.mark.mutation('metrics.py', 'captions[i][0], range', 'captions[0][0], range')
@pytest.mark.mutation('metrics.py', 'enumerate(dataset.captions or ())', 'enumerate(dataset.captions)')
def test_metrics_of_text(tmp_path, merges, monkeypatch, capsys):
    """TMD, accuracy and CLIP-S of balls whose radius the caption decides, by CLIP's own parts."""
    torch.save(random_clip(vision=64), tmp_path / 'clip.pt')
    state = metrics.VoxelClassifier().state_dict()
    state['projection.7.weight'].zero_()
    state['projection.7.bias'].copy_(torch.arange(13) == 10)
    torch.save(dict(model=state), tmp_path / 'best.pt')
    balls = {'the': (0.3, 0.4), 'chair': (0.2, 0.0)}

    def field(xi, p):
        return (xi[0]['r'][:, None, None] - p.norm(dim=2, keepdim=True)).expand(-1, -1, 1)
    vae = SimpleNamespace(
        config=SimpleNamespace(extent=1.0, threshold=0.5, resolution=16), query=field,
        decode=lambda z: [dict(r=z)], parameters=lambda: iter([torch.zeros(1)]),
        signal=lambda xi, cells: [inr.extract_mesh(lambda p: r - p.norm(dim=1), cells)
                                  for r in xi[0]['r']])

    class Balls(metrics.ShapeRun):
        def data(self, split):
            return Captioned()

        def draw(self, seeds, guidance, cond):
            assert list(seeds) == list(range(7)) and guidance == 3 and len(cond) == 7
            return torch.tensor(list(balls.values())[cond[0]]), 20.0
    ldm = SimpleNamespace(config=SimpleNamespace(text='bytes', text_length=40))
    monkeypatch.setattr(metrics, 'open_run', lambda path, args, stage: Balls(
        vae, ldm, dict(step=7), 'run', args))
    read = []
    monkeypatch.setattr(metrics, 'text_reader', lambda *about: read.append(about) or (
        lambda captions: torch.tensor([list(balls).index(c) for c in captions])))
    metrics.main(['text', 'run', '--res', '16', '--classifier', str(tmp_path / 'best.pt'), '--clip',
                  '--weights', str(tmp_path / 'clip.pt'), '--views', 'even', '--device', 'cpu',
                  '--num', '2', '--sampler', 'rk45:1e-3', '--each', '7'])
    assert read == [('bytes', torch.device('cpu'), 40)]
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row['captions'], row['empty'], row['nfe'], row['forwards']) == (2, 1, 20, 40)
    assert row['accuracy'] == 50 and row['classifier_grid'] == 'ends' and row['each'] == 7
    small, large = (metrics.occupancy_grid(vae, [dict(r=torch.tensor([r]))], 16)
                    for r in balls['the'])
    overlap = (small & large).sum() / (small | large).sum()
    assert row['tmd'] == pytest.approx(overlap.item() / 2, abs=1e-6)  # a ball and none: 0
    clip, best = metrics.load_network('clip', tmp_path / 'clip.pt'), []
    for caption, radii in balls.items():
        meshes = vae.signal([dict(r=radii)], 64)
        pictures = torch.cat([metrics.drawn_views((0.55 * v, f), 'even') for v, f in meshes])
        best.append(metrics.clip_score(clip, pictures, caption))
    assert row['clip_s'] == pytest.approx(np.mean(best), abs=1e-4)
    monkeypatch.setattr(Captioned, 'captions', None)
    try:
        with pytest.raises(ValueError, match='no caption .* --captions'):
            metrics.main(['text', 'run', '--device', 'cpu'])
    except TypeError:
        pytest.fail('a traceback')


# ---- conditions --------------------------------------------------------------------------------

def test_stored_features(tmp_path):
    texts, features = np.array(['', 'a chair']), np.arange(24.0).reshape(2, 3, 4)
    np.savez(tmp_path / 'f.npz', texts=texts, features=features)
    reader = encoders.text_reader(str(tmp_path / 'f.npz'))
    assert reader.channels == 4
    assert torch.equal(reader(['a chair', '']), torch.tensor(features[[1, 0]]).float())
    with pytest.raises(ValueError, match='no features of'):
        reader(['a table'])
    np.savez(tmp_path / 'g.npz', texts=texts[1:], features=features[1:])
    with pytest.raises(ValueError, match='among them'):
        encoders.text_reader(str(tmp_path / 'g.npz'))


@pytest.mark.mutation('encoders.py', 'dtype=torch.long) + 1', 'dtype=torch.long)')
def test_bytes():
    network = encoders.ByteText(16, 1, 2, 8)
    tokens = network.tokenise(['ab', '', '\u00e9' * 9, '\0'])
    assert tokens[0].tolist() == [98, 99, 0, 0, 0, 0, 0, 0] and tokens[1].sum() == 0
    assert tokens[2].tolist() == [0xc3 + 1, 0xa9 + 1] * 4 and tokens[3, 0] == 1
    assert network(tokens).shape == (4, 8, 16)
    loss = network(tokens).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.mutation('encoders.py', 'key * 257 + F.pad', 'key * 256 + F.pad')
@pytest.mark.mutation('encoders.py', 'key = torch.full_like(tokens, n)',
                      'key = torch.zeros_like(tokens)')
@pytest.mark.mutation('encoders.py', '(self.hashed(tokens, n)) * (tokens > 0)[..., None]',
                      '(self.hashed(tokens, n))')
@pytest.mark.mutation('encoders.py', 'for back in reversed(range(n)):', 'for back in range(n):')
def test_groups_of_bytes_have_vectors_of_their_own():
    network = encoders.ByteText(16, layers=0, length=8, ngrams=3, rows=97)
    tokens = network.tokenise(['a fig', 'figs', ''])
    expected = network.embedding(tokens) + network.position
    for row, text in enumerate(tokens.tolist()):
        for end, token in enumerate(text):
            for n in (2, 3) if token else ():
                group = ([0, 0] + text)[end + 3 - n:end + 3]
                number = n
                for byte in group:  # digits of a number in base 257, first the length
                    number = 257 * number + byte
                expected[row, end] = expected[row, end] + network.groups.weight[number % 97]
    torch.testing.assert_close(network(tokens), network.norm(expected))


def model_of(**changes):
    config = dict(domain='shape', z_channels=3, planes={n: [4, 4] for n in ('xy', 'yz', 'xz')},
                  ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_factors=(1, 2), mixing_init=0.0)
    model = ldm.LDM(ldm.LDMConfig(**{**config, **changes}))
    torch.nn.init.normal_(model.unet.out.weight, std=0.1)
    return model


@pytest.mark.mutation('ldm.py', 'self.text(cond) if tokens', 'self.text(0 * cond) if tokens')
@pytest.mark.mutation('ldm.py', 'z, t, None if null is None else', 'z, t, None if True else')
@pytest.mark.mutation('ldm.py', "*(self.text.parameters() if self.text else ())", "")
def test_own_text_encoder_is_part_of_the_model():
    model = model_of(text='bytes', context_channels=128)
    for block in (*model.unet.down, *model.unet.middle, *model.unet.up):
        if getattr(block, 'attention', None) is not None:
            torch.nn.init.normal_(block.attention.proj_out.weight, std=0.1)
    reader = encoders.text_reader('bytes')
    z, t = torch.randn(2, 3, 48), torch.tensor([10, 500])
    tokens = reader(['a chair', ''])
    one, other = model.eps(z, t, tokens), model.eps(z, t, reader(['a table', '']))
    assert (one[0] - other[0]).abs().max() > 1e-5
    torch.testing.assert_close(one[1], other[1])
    torch.testing.assert_close(one[1], model.eps(z, t)[1])  # the empty text is no condition
    owned = {id(p) for g in model.param_groups(1e-3, 0.1) for p in g['params']}
    assert owned == {id(p) for p in model.parameters()}
    read = []
    model.text.register_forward_hook(lambda layer, args, out: read.append(len(out)))
    for cond, w, texts in ((tokens, 3.0, [1, 2]), (tokens, 1.0, [1, 2]), (None, 1.0, [1])):
        eps = model.guided(cond, w)
        torch.testing.assert_close(eps(z, t), eps(z, t))
        assert read == texts  # once, however many calls
        read.clear()
    torch.testing.assert_close(model.guided(None)(z, t), model.eps(z, t))
    guided = model.guided(tokens, 3.0)(z, t)
    torch.testing.assert_close(guided, model.eps(z, t) + 3 * (one - model.eps(z, t)), rtol=1e-4,
                               atol=1e-5)
    model(z, tokens).backward()
    assert all(p.grad is not None for p in model.parameters())
    for cond in (torch.zeros(2), torch.zeros(2, 5, 128)):
        with pytest.raises(ValueError, match='text_reader'):
            model.check_condition(cond)


@pytest.mark.mutation('encoders.py', 'return ByteReader(device, length)',
                      'return ByteReader(device, 96)')
@pytest.mark.mutation('ldm.py', 'length=config.text_length', 'length=96')
@pytest.mark.mutation('ldm.py', "self.text == 'bytes' or getattr(self, name) ==", 'True or')
@pytest.mark.mutation('ldm.py', 'ngrams=config.text_ngrams', 'ngrams=0')
@pytest.mark.mutation('ldm.py', 'self.text_ngrams != 1', 'True')
def test_so_many_bytes_are_read():
    model = model_of(text='bytes', context_channels=128, text_length=5)
    tokens = encoders.text_reader('bytes', length=5)(['a chair', 'a chain'])
    assert tokens.tolist() == [[98, 33, 100, 105, 98]] * 2
    assert model.text.position.shape == (5, 128)
    assert model.guided(tokens, 3.0)(torch.randn(2, 3, 48), torch.tensor([1, 2])).isfinite().all()
    with pytest.raises(ValueError, match='--text_length 5: has no effect without --text bytes'):
        model_of(text_length=5)
    with pytest.raises(ValueError, match='--text_ngrams 7: has no effect without --text bytes'):
        model_of(text_ngrams=7)
    with pytest.raises(ValueError, match='--text_ngrams 1: groups begin at 2'):
        model_of(text='bytes', context_channels=128, text_ngrams=1)
    assert model_of(text='bytes', context_channels=128, text_ngrams=7).text.ngrams == 7
    assert model.text.groups is None


@pytest.mark.mutation(
    'ldm.py',
    'z.reshape(batch, channels * self.joined, -1)',
    'z.unflatten(2, (self.joined, -1)).transpose(1, 2).reshape(batch, channels * self.joined, '
    '-1)')
def test_planes_as_channels():
    """Every output sees all planes at its place, by one ordinary U-Net of 3 C channels."""
    model = model_of(triplane='concat', attn_factors=())
    assert model.unet.stem.weight.shape[1] == 9 and model.unet.plane_time is None
    z, t = torch.randn(1, 3, 48), torch.tensor([300])
    flat = ldm.LDM(ldm.LDMConfig(z_channels=9, planes=dict(xy=[4, 4]), ch=16, ch_mult=(1, 2),
                                 num_res_blocks=1, attn_factors=(), mixing_init=0.0))
    flat.unet.load_state_dict(model.unet.state_dict())
    joined = torch.stack([z[:, :, 16 * p:16 * p + 16] for p in range(3)], 2).flatten(1, 2)
    out = flat.unet(joined, t).unflatten(1, (3, 3))
    torch.testing.assert_close(model.unet(z, t), torch.cat([out[:, :, p] for p in range(3)], 2))
    with pytest.raises(ValueError, match='different shapes'):
        model_of(triplane='concat', planes=dict(xy=[4, 4], yz=[4, 4], xz=[4, 8]))
