"""The fast features and PCA against the plain ones. Features agree to 1e-5 of the largest: the same products
in another order, and weights that batch norm was folded into round once more (a float32 step is 1.2e-7, a
feature a sum of about a thousand products through seven layers). Means and variances agree to 1e-10: float64
sums in another order. Directions agree with their signs where variances differ by more than that rounding."""
import copy
import pytest, torch
from torch import nn
from deepcluster_nb import features as plain
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.fast import features as fast
from deepcluster_nb.model import convnet
from deepcluster_nb.switches import with_switches

pytestmark = pytest.mark.usefixtures('one_thread')

def normal(*shape, name='x'): return torch.randn(shape, generator=generator(0, name, *shape))

def there(kind): # a few images
    g = generator(0, kind)
    if kind == 'ragged':
        cuts = [torch.randint(0, 256, (3, 33 + 5*i, 60 - 4*i), generator=g).byte() for i in range(11)]
        return PackedImages(torch.cat([c.flatten() for c in cuts]), [c.shape for c in cuts])
    planes, side = dict(grey=(1, 8), color=(3, 32), large=(3, 50))[kind]
    return PackedImages(torch.randint(0, 256, (11, planes, side, side), generator=g).byte())

def network(**how): # whose batch norm has something to fold
    net = convnet('alexnet_small', 5, seed=1, **how)
    for i,m in enumerate(net.modules()):
        if not isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): continue
        for t,low in ((m.running_mean, -.1), (m.running_var, .5), (m.weight.data, .5), (m.bias.data, -.1)):
            t.uniform_(low, low + 1, generator=generator(i, str(low)))
    return net

def same(a, b): # features
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape and not a.requires_grad
    assert (a - b).abs().max() < 1e-5 * b.abs().max()

@pytest.mark.parametrize('kind', ['grey', 'color', 'large', 'ragged'])
@pytest.mark.parametrize('how, switches', [(dict(), {}), (dict(sobel=False), {}),
                                           (dict(), dict(border='replicate', relu=True))], ids=str)
def test_features(kind, how, switches):
    net, images = with_switches(network(**how), **switches), there(kind)
    slow = plain.compute_features(net, images, 32, 4)
    for batch_size in (1, 4, 11, 512): same(fast.compute_features(net, images, 32, batch_size), slow)
    same(torch.cat(list(fast.feature_batches(net, images, 32, 4))), slow)

def test_compiled_features_are_features(monkeypatch): # PyTorch's tracing, without the compiler behind it
    real, compiled, seen = torch.compile, [], []
    def traced(f, **how):
        compiled.append(real(f, backend='aot_eager', **how))
        return lambda x: seen.append(len(x)) or compiled[-1](x)
    monkeypatch.setattr(torch, 'compile', traced)
    net, images = network(), there('color')
    same(torch.cat(list(fast.feature_batches(net, images, 32, 4, compile=True))),
         plain.compute_features(net, images, 32, 4))
    # tried, then two whole batches; the last has three
    assert len(compiled) == 1 and seen == [4, 4, 4]

def test_where_features_cannot_be_compiled_they_are_computed(monkeypatch):
    def broken(f, **how): raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', broken)
    net, images = network(), there('color')
    with pytest.warns(UserWarning, match="compile: torch.compile can't be used here.*no compiler"):
        f = torch.cat(list(fast.feature_batches(net, images, 32, 4, compile=True)))
    same(f, plain.compute_features(net, images, 32, 4))

@pytest.mark.parametrize('features', [plain.compute_features, fast.compute_features], ids=['plain', 'fast'])
@pytest.mark.parametrize('training', [True, False])
def test_the_network_comes_back_as_it_was(features, training):
    net, images = network().train(training), there('color')
    before = copy.deepcopy(net.state_dict())
    same(features(net, images, 32), plain.compute_features(copy.deepcopy(net).eval(), images, 32))
    assert all(m.training == training for m in net.modules())
    assert all(torch.equal(v, before[n]) for n,v in net.state_dict().items())

@pytest.mark.parametrize('features', [plain.compute_features, fast.compute_features], ids=['plain', 'fast'])
def test_the_same_errors_of_features(features):
    net, images = network(), there('grey')
    for contains, args in (('images: expected at least 1, got 0', (images.subset([]), 32)),
                           ('size: expected at least 1, got 0', (images, 0)),
                           ('batch_size: expected at least 1, got -1', (images, 32, -1))):
        with pytest.raises(ValueError, match=contains): features(net, *args)

def test_exact_crops_packed_beside_the_images_are_taken():
    images, net = there('large'), network()
    images.center = there('color')
    same(fast.compute_features(net, images, 32), plain.compute_features(net, there('color'), 32))

def spread(n, d, rank): # points whose variances differ by a factor of two from direction to direction
    turn = torch.linalg.qr(normal(d, d, name='turn').double())[0]
    return ((normal(n, d).double() * 2.**-torch.arange(d) * (torch.arange(d) < rank)) @ turn + 3).float()

def check_same_pca(a, b, x):
    assert (a.mean - b.mean).abs().max() < 1e-10 * (1 + b.mean.abs().max())
    assert a.variance.shape == b.variance.shape and a.axes.shape == b.axes.shape
    assert (a.variance - b.variance).abs().max() <= 1e-10 * b.variance[0]
    alive = (b.axes != 0).any(0)
    assert torch.equal((a.axes != 0).any(0), alive)                     # dead directions are zero in both
    assert (a.axes - b.axes).abs().max() <= 1e-5 * b.axes.abs().max()                   # signs and all
    z, w = a.transform(x), b.transform(x)
    assert z.dtype == w.dtype == torch.float32 and (z - w).abs().max() < 2e-3 and not z[:, ~alive].any()

@pytest.mark.parametrize('whiten', [True, False])
@pytest.mark.parametrize('n, d, rank, dim', [
    (200, 8, 8, 8),         # all directions
    (200, 8, 8, 3),         # some
    (200, 8, 5, 8),         # three of them dead
    (6, 8, 8, 4),           # fewer points than features: the smaller matrix
    (6, 8, 8, 8),           # and more directions than such points have
    (8, 8, 8, 8),           # as many
    (2, 5, 5, 300),         # the fewest
    (40, 1, 1, 1)])
def test_pca(n, d, rank, dim, whiten):
    x = spread(n, d, rank)
    b = plain.PCA(dim, whiten).fit(x)
    for batch in (1, 7, 8192): check_same_pca(fast.PCA(dim, whiten).fit(x, batch), b, x)
    stream = fast.PCA(dim, whiten)
    for part in x.split(5): stream.add(part)
    check_same_pca(stream.solve(), b, x)

@pytest.mark.parametrize('scale', [1e-4, 1., 1e4])
def test_dead_is_what_is_small_beside_the_largest(scale): # in any unit; variances of 1, 1e-5 and 1e-8
    x = scale * normal(200, 3).double() * torch.tensor([1, 3e-3, 1e-4])
    for kind in (plain.PCA, fast.PCA):
        assert (kind(3).fit(x).axes != 0).any(0).tolist() == [True, True, False]

def test_pca_of_any_float_type_and_of_nothing():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = spread(50, 6, 6).to(dtype)
        check_same_pca(fast.PCA(4).fit(x), plain.PCA(4).fit(x), x)
    same_point = torch.full((50, 8), .1)
    for pca in (plain.PCA(4), fast.PCA(4)):
        assert torch.equal(pca.fit(same_point).transform(same_point), torch.zeros(50, 4))

@pytest.mark.parametrize('room', [0, 2**20], ids=['file', 'memory'])
def test_bfloat16_is_kept_as_it_came(room): # float16 has no number as small, or as large
    x = torch.tensor([[1e-9, 1e9], [3, -1]]).bfloat16()
    kept = fast.HalfFeatures(2, room=room)
    found = kept.add(x), *kept
    kept.close()
    assert len(found) == 2 and all(f.dtype == torch.bfloat16 and torch.equal(f, x) for f in found)

def test_pca_of_features_of_photographs_like_images():
    images, net = load_images('digits', n_images=300), network()
    x = plain.compute_features(net, images, 32)[:, :200]
    a, b = fast.PCA(32).fit(x), plain.PCA(32).fit(x)
    torch.testing.assert_close(a.axes, b.axes, rtol=0, atol=1e-8*float(b.axes.abs().max()))
    torch.testing.assert_close(a.transform(x), b.transform(x), rtol=0, atol=1e-4)

@pytest.mark.parametrize('PCA', [plain.PCA, fast.PCA], ids=['plain', 'fast'])
def test_the_same_errors_of_pca(PCA):
    toy = normal(6, 2)
    bad = toy.clone(); bad[1, 0], bad[2, 1] = torch.nan, torch.inf
    for contains, f in (('dim: expected at least 1, got 0', lambda: PCA(0)),
                        ('finite features, got 2 NaN or infinite values', lambda: PCA(2).fit(bad)),
                        ('at least 2 points, got 1', lambda: PCA(2).fit(toy[:1])),
                        (r'expected \(N, D\) features, got \(2,\)', lambda: PCA(2).fit(toy[0])),
                        ('expected fit before transform', lambda: PCA(2).transform(toy)),
                        (r'expected \(N, 2\) features, got \(6, 1\)',
                         lambda: PCA(2).fit(toy).transform(toy[:, :1])),
                        ('NaN or infinite values in 2 rows', lambda: PCA(2).fit(toy).transform(bad))):
        with pytest.raises(ValueError, match=contains): f()

def test_a_fast_pca_is_one():
    assert isinstance(fast.PCA(3), plain.PCA)
    x = normal(30, 4)
    a, b = fast.PCA(3), fast.PCA(3)
    a.fit(normal(9, 4, name='other'))                                   # a second fit forgets the first
    assert torch.equal(a.fit(x).axes, b.fit(x).axes)
