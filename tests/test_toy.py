"""What the toy runs must reach, measured on the runs in runs/; without one, trained anew.

    python -m pytest -m slow -s          # prints the figures
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import data
import inr
import ldm
import metrics

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def trained(name, folder, *scripts):
    """The folder of the finished run of a toy data set."""
    found = ROOT / 'runs' / name
    if (found / ('ldm.pt' if 'train_ldm.py' in scripts else 'vae.pt')).exists():
        return found
    for script in scripts:
        flags = ['--dataset', name] if script == 'train_vae.py' else []
        subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, check=True)
    return folder / 'runs' / name


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return trained('toy_image', tmp_path_factory.mktemp('toy'), 'train_vae.py', 'train_ldm.py')


@pytest.fixture(scope='module')
def shape_run(tmp_path_factory):
    return trained('toy_shape', tmp_path_factory.mktemp('toy'), 'train_vae.py', 'train_ldm.py')


@pytest.fixture(scope='module')
def video_run(tmp_path_factory):
    return trained('toy_video', tmp_path_factory.mktemp('toy'), 'train_vae.py')


def psnr(run, capsys, *flags):
    metrics.main(['psnr', str(run), *flags])
    out = capsys.readouterr().out.splitlines()
    with capsys.disabled():
        print(*flags, out[-2])
    return json.loads(out[-1])


def test_reconstructions_beat_enlargement(run, capsys):
    at_r, at_2r, enlarged = (psnr(run, capsys, *flags) for flags in (
        ('--res', '32'), ('--res', '64'), ('--res', '64', '--interpolated')))
    assert at_r['psnr'] >= 30 and at_2r['psnr'] >= enlarged['psnr'] + 0.5
    assert max(at_r['mean_picture'], at_r['white_picture']) < 20


def test_samples_are_as_near_to_the_truth_as_held_out_pictures(run, capsys):
    """Median distance to the nearest of 20,000 pictures that nobody has seen."""
    vae, model, _ = ldm.load(run)
    with torch.no_grad():
        z = ldm.generate(vae, model, range(500), batch=100)
        samples = data.to_float(data.to_uint8(vae.render(vae.decode(z), (32, 32))))
    seeds = [2 ** 31 + k for k in range(20_000)]
    fresh = torch.cat([data.toy_image(part, 32).flatten(1) for part in metrics.pieces(seeds, 500)])
    held_out = data.toy_image([data.TOY_SEEDS['test'][0] + k for k in range(500)], 32)
    near = [metrics.nearest_neighbours(x.flatten(1), fresh, 1)[0].median().item()
            for x in (samples, held_out)]
    with capsys.disabled():
        print(f'median distance of samples {near[0]:.3f}, of held-out pictures {near[1]:.3f}, '
              f'ratio {near[0] / near[1]:.3f}')
    assert near[0] <= 1.2 * near[1]


def test_shapes_overlap_with_the_truth(shape_run, capsys):
    """IoU of 500 held-out solids: all, and those with parts thinner than 1/20 of the box."""
    metrics.main(['iou', str(shape_run)])
    out = capsys.readouterr().out.splitlines()
    with capsys.disabled():
        print(out[-2])
    result = json.loads(out[-1])
    assert result['iou'] >= 0.95 and result['mean_shape'] < 0.3
    assert min(result['classes'][thin] for thin in ('table', 'lamp')) >= 0.85


def test_shapes_have_the_pieces_and_handles_of_the_truth(shape_run, capsys):
    """Closed meshes; components and Euler characteristic those of the closed form, 9 times of 10."""
    vae, _ = ldm.load_vae(shape_run)
    held_out, same = data.make_dataset('toy_shape', split='test', points=1000), []
    for i in range(100):
        with torch.no_grad():
            xi = vae.decode(vae.encode(held_out.item(i)['points'][None]).mean)
        (vertices, faces), = vae.signal(xi, 64)
        truth = inr.extract_mesh(lambda p: torch.from_numpy(-data.toy_distance(
            held_out.solids[i], p.double().numpy())).float(), 64)
        found, expected = metrics.topology(vertices, faces), metrics.topology(*truth)
        assert found[2] and expected[2]
        same.append(found == expected)
    with capsys.disabled():
        print(f'{sum(same)} of {len(same)} with the topology of the truth')
    assert sum(same) >= 0.9 * len(same)


def largest_share(vertices, faces):
    """Share of the largest connected component in the volume of a closed mesh; 0 of none."""
    if not len(faces):
        return 0.0
    corners, links = vertices.double().numpy()[faces.numpy()], faces[:, [0, 1, 1, 2]].numpy()
    graph = coo_matrix((np.ones(2 * len(faces)), links.reshape(-1, 2).T), 2 * (len(vertices),))
    _, part = connected_components(graph, directed=False)
    six = np.linalg.det(corners)  # six times the signed volume under each face
    volume = np.abs(np.bincount(part[faces[:, 0].numpy()], six))
    return volume.max() / volume.sum()


def test_largest_share_of_two_balls():
    def balls(p):
        near, far = ((p - c).norm(dim=1) for c in torch.tensor([[-0.5, 0, 0], [0.6, 0, 0]]))
        return torch.maximum(0.4 - near, 0.2 - far)
    assert largest_share(*inr.extract_mesh(balls, 64)) == pytest.approx(8 / 9, abs=2e-3)
    assert largest_share(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)) == 0


def test_samples_of_shapes_are_whole(shape_run, capsys):
    """At least 7 of 8 samples, at 64 cells a side, are one piece but for 1 % of their volume."""
    vae, model, _ = ldm.load(shape_run)
    with torch.no_grad():
        z = ldm.generate(vae, model, range(192), batch=64)
        shares = [largest_share(*vae.signal(vae.decode(own), 64)[0]) for own in z.split(1)]
    whole = sum(share > 0.99 for share in shares)
    with capsys.disabled():
        print(f'{whole} of {len(shares)} samples in one piece')
    assert whole >= 7 / 8 * len(shares)


@pytest.fixture(scope='module')
def field_run(tmp_path_factory):
    return trained('toy_nerf', tmp_path_factory.mktemp('toy'), 'train_vae.py', 'train_ldm.py')


def test_held_out_views_of_held_out_scenes(field_run, capsys):
    """PSNR where the object is, beside a white page's."""
    result = psnr(field_run, capsys)
    assert result['covered_psnr'] >= 24 and result['covered_white_picture'] < 12


def test_depths_are_those_of_the_closed_form(field_run, capsys):
    """Median error where the object is seen, in half sides of the box."""
    vae, info = ldm.load_vae(field_run)
    held_out, errors = data.open_run_data(info, 'test'), []
    for i in range(32):
        views = held_out.held_out(i)
        truth = held_out.render(i, 32, views)
        with torch.no_grad():
            xi = vae.decode(vae.encode(held_out.view(i, 0)['points'][None]).mean)
        rays = (r[None] for r in held_out.rays(i, 32, views))
        depth = vae.render_pictures(xi, *rays)['depth'][0].numpy()
        errors.append(np.abs(depth - truth['depth'])[truth['opacity'] > 0.99])
    error = np.median(np.concatenate(errors))
    with capsys.disabled():
        print(f'median error of depth {error:.4f} half sides')
    assert error < 0.05


@pytest.mark.parametrize('finer', [('--frames', '16'), ('--res', '64')])
def test_reconstructions_of_videos_beat_interpolation(video_run, capsys, finer):
    """At the training grid 28 dB, and between its frames and pixels 0.5 dB more than it gives."""
    at_r, fine, between = (psnr(video_run, capsys, *flags) for flags in (
        (), finer, (*finer, '--interpolated')))
    assert at_r['psnr'] >= 28 and fine['psnr'] >= between['psnr'] + 0.5
    assert max(at_r[k] for k in ('mean_clip', 'first_frame', 'middle_frame')) < 20
