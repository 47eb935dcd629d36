"""Large images: how much memory fit and predict take, each in a process of its own.

A process says by how much its peak rises above what it holds when the package is imported; a small run
takes 0.25 GB of that: the network, its gradients and momentum, and libraries that are loaded on first
use. 128 images of 1500 × 2000 are 1.15 GB of bytes, so there is hardly room for copies of them: as float32
they would be 4.6 GB, in one grey plane 1.5. 14 files of 12 megapixels are 0.5 GB decoded: read at once,
brought together, batched and made grey they took six times that."""
import os, subprocess, sys, time
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from deepcluster_nb.fast.crops import both_ways, center_crop, random_resized_crop, resize_taps, ten_crop
from deepcluster_nb.fast.images import PackedImages, joined
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.experiments import predict_folder
from deepcluster_nb.fast.features import at_once
from deepcluster_nb.fast.features import compute_features
from deepcluster_nb.fast.features import pieces
from deepcluster_nb.fast.feeding import Ragged, fetch_ahead, pick_batch
from deepcluster_nb.model import convnet
from deepcluster_nb.fast.crops import network_input, to_grey
from deepcluster_nb.fit import Config, fit, load_run, predict

pytestmark = pytest.mark.usefixtures('one_thread')

MOST = 1.5e9                    # bytes above the import

def rise(code, *args): # bytes
    begin = ('import sys, torch\n'
             'from deepcluster_nb import experiments, fit as training\n'
             'from deepcluster_nb.fast.images import PackedImages\n'
             'from deepcluster_nb.sources import load_images\n'
             'import torch._dynamo\n'   # 0.13 GB, which PyTorch imports when the first optimizer takes a step
             'def peak(): return 1024 * int(next(l for l in open("/proc/self/status") '
             'if l.startswith("VmHWM")).split()[1])\n'
             'torch.set_num_threads(1); start = peak()\n')
    p = subprocess.run([sys.executable, '-c', begin + code + '\nprint(peak() - start)', *map(str, args)],
                       capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert p.returncode == 0, p.stderr
    return int(p.stdout.split()[-1])

def noise(*shape, stream='noise'):
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator(0, stream))

SMALL = dict(k=4, pca=4, epochs=1, passes=1, batch_size=16, device='cpu', precision='float32')

@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
    where = tmp_path_factory.mktemp('memory')/'run'
    fit(Config(**SMALL, n_images=64, run_dir=str(where)), echo=None)
    return where

linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')

@linux
@pytest.mark.parametrize('sobel', [True, False])
def test_fit_on_large_images_of_one_size(sobel):
    code = ('images = PackedImages(torch.full((128, 3, 1500, 2000), 7, dtype=torch.uint8))\n'
            f'training.fit(training.Config(**{SMALL}, sobel={sobel}), images, echo=None)')
    assert rise(code) < MOST # measured 1.49e9

@linux
def test_predict_on_large_photographs(run_dir, tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (14, 30, 40, 3), dtype=np.uint8)
    (tmp_path/'photos').mkdir()
    for i, im in enumerate(small):
        Image.fromarray(im).resize((4000, 3000), Image.NEAREST).save(tmp_path/'photos'/f'{i:02d}.jpg')
    code = 'rows, broken = experiments.predict_folder(*sys.argv[1:])\nassert (len(rows), broken) == (14, [])'
    assert rise(code, run_dir, tmp_path/'photos', tmp_path/'c.csv') < MOST

@linux
def test_reading_large_photographs(tmp_path): # 20 of 12 megapixels, 0.72 GB, which stood there twice
    for i in range(20): Image.new('RGB', (4000, 3000), (i, 2*i, 3*i)).save(tmp_path/f'{i}.bmp')
    assert rise('load_images("folder", sys.argv[1])', tmp_path) < 1.35e9

# ---------------------------------------------------------------- the same crops and clusters as before

def ragged(*sizes): # PackedImages, RGB
    shapes = [(3, h, w) for h,w in sizes]
    return PackedImages(noise(sum(3*h*w for h,w in sizes), stream='ragged'), shapes)

MIXED = ragged((40, 70), (300, 200), (64, 64), (500, 620), (33, 410))
CROPS = [lambda im, size: random_resized_crop(im, size, generator(1, 'crop'), (.2, 1.)), center_crop,
         lambda im, size: ten_crop(im, size).flatten(0, 1)]

@pytest.mark.parametrize('size', [32, 96, 224])
@pytest.mark.parametrize('crop', CROPS)
def test_grey_windows_are_windows_of_grey(crop, size):
    ims = MIXED.batch(torch.arange(len(MIXED)))
    greys = [to_grey(im[None])[0] for im in ims]                     # all of each image, as it was
    assert torch.equal(crop(to_grey(ims), size), crop(greys, size))
    assert all(torch.equal(a, b) for a,b in zip(to_grey(ims), greys, strict=True))

@pytest.mark.parametrize('side, listed', [(32, False), (224, False), (256, False), (300, True)])
def test_only_large_images_of_one_size_become_a_list(side, listed):
    images, idx = PackedImages(noise(3, 3, side, side)), torch.tensor([2, 0])
    batch = images.batch(idx)
    assert isinstance(batch, list) == images.listed == listed and images.size == (3, side, side)
    assert torch.equal(torch.stack(list(batch)), images.pixels.view(3, 3, side, side)[idx])
    assert not listed or batch[0].data_ptr() == images[2].data_ptr()                  # views, no copies
    assert isinstance(pick_batch(images, idx), Ragged) == listed

@pytest.mark.parametrize('crop', CROPS)
@pytest.mark.parametrize('sobel', [True, False])
@pytest.mark.parametrize('h, w', [(375, 500), (1500, 2000)])
def test_large_images_give_the_same_crops_either_way(crop, sobel, h, w): # but for the rounding of floats
    images = PackedImages(noise(2, 3, h, w))
    listed, stacked = (network_input(x, lambda im: crop(im, 64), sobel)
                       for x in (images.batch(torch.arange(2)), images.pixels.view(2, 3, h, w)))
    assert (listed - stacked).abs().max() < 1e-3 * stacked.std()

@pytest.mark.parametrize('room', [1, 3000, 40_000])
@pytest.mark.parametrize('then', [None, to_grey])
def test_strips_of_a_plane_give_the_same_bits(room, then):
    images, start, length = noise(3, 3, 130, 170), torch.tensor([1.5, 0, 20]), torch.tensor([90., 130, 77])
    down, across = (resize_taps(start, length, n, 32) for n in (130, 170))
    whole, strips = (both_ways(images, *across, *down, then, r) for r in (130*170, room))
    assert whole.shape == (3, 1 if then else 3, 32, 32) and torch.equal(whole, strips)

def test_features_are_the_same_in_parts(monkeypatch):
    net, images = convnet('alexnet_small', 5), MIXED.subset(torch.arange(20) % 5)
    done = []
    whole = compute_features(net, images, 32, 8)
    monkeypatch.setattr('deepcluster_nb.fast.features.pieces', lambda nbytes, most: [1]*len(nbytes))
    parts = compute_features(net, images, 32, 8, progress=lambda i, n: done.append((i, n)))
    assert torch.equal(whole, parts) and done == [(8, 20), (16, 20), (20, 20)]

@pytest.mark.parametrize('room, wanted', [(2**40, 8), (4e6, 4), (1, 1)])
def test_a_forward_pass_is_no_larger_than_memory(room, wanted):
    net, x = convnet('alexnet_small', 5).eval(), torch.zeros(8, 1, 64, 64)
    with torch.no_grad(): assert at_once(net, x, room) == wanted      # 0.52 MB each
    assert not any(m._forward_hooks for m in net.modules())

def test_features_of_a_small_forward_pass(monkeypatch):
    net, images = convnet('alexnet_small', 5), MIXED.subset(torch.arange(20) % 5)
    whole = compute_features(net, images, 32)
    monkeypatch.setattr('deepcluster_nb.fast.features.free_memory', lambda: 1e6)
    done = []
    parts = compute_features(net, images, 32, progress=lambda i, n: done.append((i, n)))
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-5) and done == [(20, 20)]  # one batch for the rest

def test_batches_ahead_are_counted_in_bytes():
    read, images = [], PackedImages(torch.zeros(12, 3, 10, 10, dtype=torch.uint8))
    class Noted(PackedImages):
        def batch(self, idx): read.append(idx.tolist()); return super().batch(idx)
    images.__class__ = Noted
    for room, ahead in ((600, 2), (1, 1), (2**31, 6)):
        read.clear()
        batches = fetch_ahead(images, torch.arange(12).split(1), 'cpu', ahead=6, threads=1, room=room)
        assert next(batches)[0].tolist() == [0]
        time.sleep(.1)
        assert len(read) == ahead + 1 and [i.tolist() for i,_ in batches] == [[i] for i in range(1, 12)]

@linux
def test_a_packed_file_is_written_image_by_image(tmp_path): # 0.58 GB that stood there three times
    code = ('images = PackedImages(torch.full((64, 3, 1500, 2000), 7, dtype=torch.uint8))\n'
            'images.subset(torch.arange(63, -1, -1)).save(sys.argv[1])')
    assert rise(code, tmp_path/'p') < .65e9

@pytest.mark.parametrize('labels', [None, [1, 0, 1, 1, 0]])
def test_what_is_written_safetensors_reads(tmp_path, labels):
    images = PackedImages(MIXED.pixels, MIXED.shapes, labels, ['a', 'b'] if labels else (),
                          [f'{i} ü\udcff.jpg' for i in range(5)])
    images.recipe = dict(grey=False, upright=True)
    images.save(tmp_path/'p')
    t, back = load_file(tmp_path/'p'), PackedImages.load(tmp_path/'p')
    assert set(t) == {'pixels', 'shapes', 'paths', *(['labels'] if labels else [])}
    assert torch.equal(t['pixels'], images.pixels) and torch.equal(t['shapes'], images.shapes)
    assert (back.paths, back.classes) == (images.paths, images.classes) and back.recipe['upright']
    assert labels is None and back.labels is None or back.labels.tolist() == labels
    with pytest.raises(ValueError, match='images: expected at least one to save'):
        images.subset([]).save(tmp_path/'none')
    assert not list(tmp_path.glob('*none*'))

@pytest.mark.parametrize('nbytes, most, room, wanted', [
    ([], 4, 10, []), ([1]*9, 4, 10, [4, 4, 1]), ([6, 4, 1, 9, 3], 4, 10, [2, 2, 1]),
    ([50, 1, 1, 50], 4, 10, [1, 2, 1]), ([0]*5, 2, 10, [2, 2, 1])])
def test_pieces_by_bytes(nbytes, most, room, wanted): assert pieces(nbytes, most, room) == wanted

def test_images_are_joined_in_their_order():
    ims = [noise(3, 4, 5, stream=str(i)) for i in range(7)]
    flat = torch.cat([im.flatten() for im in ims])
    assert torch.equal(joined(ims), flat) and not ims

@pytest.fixture(scope='module')
def mixed(tmp_path_factory): # photographs of several sizes and kinds, one of them broken
    folder = tmp_path_factory.mktemp('mixed')
    for i, im in enumerate(MIXED):
        Image.fromarray(im.permute(1, 2, 0).numpy()).save(folder/f'{i}.png')
        Image.fromarray(im[0].numpy()).save(folder/f'{i}g.jpg')
    return folder

def test_clusters_do_not_depend_on_the_pieces(run_dir, mixed, tmp_path, monkeypatch):
    wanted = predict(load_run(run_dir), load_images('folder', mixed)).tolist()
    for room in (2e8, 4e5, 1):
        monkeypatch.setattr('deepcluster_nb.experiments.room_for', lambda files, nbytes: room)
        rows, broken = predict_folder(run_dir, mixed, tmp_path/f'{room}.csv')
        assert not broken and [c for _,c in rows] == wanted

def test_an_image_too_large_for_the_memory_is_named_before_any_work(run_dir, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr('deepcluster_nb.experiments.free_memory', lambda: 4e6)
    monkeypatch.setattr('deepcluster_nb.experiments.read_some', lambda *a: pytest.fail('decoded'))
    with pytest.raises(ValueError, match=r"folder: '.*3g?\.(png|jpg)' needs about .* of memory while"):
        predict_folder(run_dir, mixed, tmp_path/'c.csv')
    assert not list(tmp_path.iterdir())
