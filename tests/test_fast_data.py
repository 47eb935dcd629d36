("Images and PackedImages: the same images, batches and subsets, bit for bit, since both hold the bytes. "
 "Every function that needs the packed form takes the plain one.")
import errno, os
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from hypothesis import given, strategies as st
from deepcluster_nb.data import OUTLINES, Images, digits, generator, pick, shapes
from deepcluster_nb.fast.feeding import fetch_ahead, resident
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.sources import check_sizes, load_images

def made(sizes, seed, as_list): # (C, H, W) of each
    ims = [torch.randint(0, 256, s, generator=generator(seed, 'test', i), dtype=torch.uint8)
           for i,s in enumerate(sizes)]
    n = len(ims)
    return Images(ims if as_list else torch.stack(ims), [i % 3 for i in range(n)], 'abc',
                  [f'{i}.png' for i in range(n)])

def same(a, b):
    assert (len(a), a.classes, a.paths, a.size) == (len(b), b.classes, b.paths, b.size)
    assert (a.labels is None) == (b.labels is None) and (a.labels is None or a.labels.equal(b.labels))
    assert all(x.equal(y) for x,y in zip(a, b))

SIZE = st.tuples(st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))

@given(st.lists(SIZE, min_size=1, max_size=8), st.integers(0, 99), st.data())
def test_packed_and_plain_agree(sizes, seed, data):
    plain = made(sizes, seed, True)
    packed = PackedImages.of(plain)
    idx = data.draw(st.lists(st.integers(0, len(plain) - 1), min_size=1, max_size=9))
    same(plain, packed)
    for way in (idx, torch.tensor(idx), slice(None, None, 2), plain.labels == 1):
        same(plain.subset(way), packed.subset(way))
        assert all(x.equal(y) for x,y in zip(plain.batch(way), packed.batch(way)))
    same(plain.subset(idx).subset([0]), packed.subset(idx).subset([0]))

@given(SIZE, st.integers(1, 8), st.integers(0, 99), st.data())
def test_of_one_size(size, n, seed, data):
    plain = made([size]*n, seed, False)
    packed = PackedImages.of(plain)
    idx = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9)))
    assert packed.batch(idx).equal(plain.batch(idx))
    same(plain.subset(idx), packed.subset(idx))
    assert packed.pixels.data_ptr() == plain.pixels.data_ptr()         # nothing is copied

def test_packed_images_stay_as_they_are():
    packed = load_images('digits')
    assert PackedImages.of(packed) is packed and isinstance(packed, Images)
    assert PackedImages.of(Images([])).size is None and len(PackedImages.of(Images([]))) == 0

def test_large_images_of_one_size(): # the twin gives a list there, of the same images
    plain = Images(torch.randint(0, 256, (3, 3, 300, 300), generator=generator(0), dtype=torch.uint8))
    batch = PackedImages.of(plain).batch([2, 0])
    assert isinstance(batch, list) and torch.stack(batch).equal(plain.batch([2, 0]))

@pytest.mark.parametrize('pixels, more, why', [
    (torch.zeros(2, 3, 4, 4), {}, 'pixels: expected a uint8 tensor'),
    (torch.zeros(3, 4, 4, dtype=torch.uint8), {}, r'got torch.uint8 \(3, 4, 4\)'),
    ([torch.zeros(4, 4, dtype=torch.uint8)], {}, r'got torch.uint8 \(4, 4\)'),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), dict(labels=[1]), 'labels: expected 2'),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), dict(paths='abc'), 'paths: expected 2')])
def test_bad_images(pixels, more, why):
    with pytest.raises(ValueError, match=why): Images(pixels, **more)

@pytest.mark.parametrize('name, make', [('digits', digits), ('shapes', shapes)])
def test_names_and_functions_give_the_same(name, make):
    same(make('train'), load_images(name))
    same(make('train').subset(pick(len(make('train')), 9, 1)), load_images(name, n_images=9, seed=1))

# ---------------------------------------------------------------- the plain form everywhere

PLAIN, PACKED = shapes('train', 60), PackedImages.of(shapes('train', 60))
RAGGED = Images([im[:, :16 + i % 9] for i,im in enumerate(PLAIN)], PLAIN.labels, PLAIN.classes)

@pytest.mark.parametrize('images', [PLAIN, RAGGED], ids=['tensor', 'list'])
def test_where_images_are_read(images):
    from deepcluster_nb.runs import fingerprint
    packed = PackedImages.of(images)
    batches = [torch.tensor([3, 1]), torch.tensor([2])]
    for (i, x), (j, y) in zip(fetch_ahead(images, batches, 'cpu'), fetch_ahead(packed, batches, 'cpu')):
        assert i.equal(j) and all(a.equal(b) for a,b in zip(x, y))
    same(resident(images, 'cpu'), images)
    same(resident(images, 'cpu', 2**30), packed)                       # as a GPU's memory would hold them
    assert fingerprint(images) == fingerprint(packed)
    check_sizes(images)
    with pytest.raises(ValueError, match='too small'): check_sizes(images, 99)

@pytest.mark.parametrize('images', [PLAIN, RAGGED], ids=['tensor', 'list'])
def test_a_run_and_its_judges(images):
    from deepcluster_nb.pictures import cluster_montage, crops, nearest_images
    from deepcluster_nb.probes import evaluate
    from deepcluster_nb.fit import Config, fit, predict
    packed = PackedImages.of(images)
    c = Config(dataset='shapes', arch='alexnet_small', size=32, k=4, pca=8, epochs=1, passes=1, batch_size=30,
               device='cpu')
    a, b = fit(c, images, echo=None), fit(c, packed, echo=None)
    assert a.clustering.assign.equal(b.clustering.assign) and a.log[0]['loss'] == b.log[0]['loss']
    assert predict(a, images).equal(predict(b, packed))
    if images is PLAIN: # a list is fed to the network image by image, so only there may the last bits differ
        assert evaluate(a.net, images, images, 32) == evaluate(b.net, packed, packed, 32)
    assert crops(images, [4, 2]).equal(crops(packed, [4, 2]))
    cluster_montage(images, a.clustering.assign, 2, 3)
    nearest_images(torch.randn(60, 8, generator=generator(0)), images, [0, 1], 3)
    plt.close('all')

# ---------------------------------------------------------------- the shapes are what their names say

def moment(im): # (3, H, W) uint8 → second moment / area², which no place, size or turn changes
    im = im.double()
    paper = im[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    d = (im.mean(0) - paper.mean()).abs()
    yx = (d > d.quantile(.99)/2).nonzero().double()
    return float((yx - yx.mean(0)).pow(2).sum() / len(yx)**2)

def test_outlines_have_the_moments_of_their_figures():
    def bar(a, b): return 4*a*b, 4*a*b*(a*a + b*b)/3            # area and moment; half sides a and b
    (A1, I1), (A2, I2) = bar(.9, .27), bar(.27, .27)
    R, r = .95, .55
    by_hand = dict(disc=1/(2*np.pi), square=1/6, triangle=3**.5/9,
                   ring=(R*R + r*r) / (2*np.pi*(R*R - r*r)), cross=(2*I1 - I2) / (2*A1 - A2)**2)
    measured = np.array([moment(im) for im in shapes('train', 50, 128)]).reshape(10, 5)
    # a pixel is 1/26 of the smallest radius, and an error at the edge a small part of it
    assert abs(measured / [by_hand[name] for name in OUTLINES] - 1).max() < .02

def test_a_packed_file_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    images = PackedImages.of(made([(1, 4, 4)]*3, 0, True))
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): images.save(tmp_path/'x.safetensors')
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    images.save(tmp_path/'x.safetensors')
    same(PackedImages.load(tmp_path/'x.safetensors'), images)
