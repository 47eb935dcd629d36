"k-means: the plain version of the core and its fast twin find the same clusters."
import inspect, subprocess, sys
import pytest, torch
from deepcluster_nb import clustering as plain
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.fast import kmeans as fast
from deepcluster_nb.fast.features import PCA
from deepcluster_nb.features import l2_normalize

pytestmark = pytest.mark.usefixtures('one_thread')

def noise(*shape, key=0): return torch.randn(shape, generator=generator(0, 'noise', key, *shape))

def points(name): # N is at most 4,000, so that plain takes a second
    if name == 'digits': # as features are: whitened, of unit length
        images = load_images('digits')
        x = images.pixels.view(len(images), -1).float() / 255
        return l2_normalize(PCA(32).fit(x).transform(x))
    groups = noise(80, 64).repeat(50, 1) + .5*noise(4000, 64)
    return dict(groups=l2_normalize(groups), line=noise(1000, 1), large=1e6*groups, small=1e-6*groups,
                off=groups + 20)[name]

def compare(p, f, same, tolerance):
    assert p.assign.dtype == f.assign.dtype == torch.int64 and p.centroids.dtype == f.centroids.dtype
    assert p.centroids.shape == f.centroids.shape and len(p.objective) == len(f.objective)
    assert float((p.assign == f.assign).float().mean()) >= same
    assert f.objective[-1] == pytest.approx(p.objective[-1], rel=tolerance)

# 1e-5: the plain objective is a float32 sum of float32 squares. A point midway between
# two centroids may differ, since the plain sums are rounded, and may shift a few others
@pytest.mark.parametrize('seed, epoch', [(0, 0), (1, 0), (0, 7)])
@pytest.mark.parametrize('name, k', [('digits', 10), ('digits', 100), ('groups', 80), ('groups', 300),
                                     ('line', 20)])
def test_plain_and_fast_find_the_same_clusters(name, k, seed, epoch):
    x = points(name)
    first = [m.kmeans(x, k, 0, seed, epoch) for m in (plain, fast)]
    assert torch.equal(first[0].centroids, first[1].centroids)                          # the same draw
    compare(*first, same=1, tolerance=1e-5)
    compare(*(m.kmeans(x, k, 20, seed, epoch) for m in (plain, fast)), same=.995, tolerance=1e-5)

@pytest.mark.parametrize('name', ['large', 'small', 'off'])
def test_at_other_scales_and_places(name): # off the origin scores are large beside their differences
    p, f = (m.kmeans(points(name), 80) for m in (plain, fast))
    compare(p, f, same=.99, tolerance=1e-4 if name == 'off' else 1e-5)

def test_the_twin_takes_what_the_plain_version_takes():
    for name in ('nearest', 'kmeans'):
        p, f = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (plain, fast))
        assert [(a.name, a.default) for a in p] == [(a.name, a.default) for a in f[:len(p)]]
        assert all(a.default is not inspect.Parameter.empty for a in f[len(p):])
    x = torch.arange(24).view(12, 2) % 7
    for other in (x, x.double(), x.half()):
        compare(plain.kmeans(other, 3), fast.kmeans(other, 3), same=1, tolerance=1e-5)

def test_repairs_are_the_same(): # many, and from then on all depends on the donors
    x = noise(400, 8)
    start = x[:100].clone()
    start[50:] += 100
    for niter in (*range(6), 20):
        p, f = plain.lloyd(x, start, niter, plain.repair_empty), fast.torch_kmeans(x, niter, start)
        assert p.n_empty == f.n_empty and torch.equal(p.assign, f.assign)
        torch.testing.assert_close(p.centroids, f.centroids, rtol=0, atol=1e-5)
        assert p.objective == pytest.approx(f.objective, rel=1e-5)
    g = [generator(3) for _ in range(2)]
    p = plain.lloyd(x, start, 20, lambda c, sizes: plain.repair_random(c, sizes, g[0]))
    f = fast.torch_kmeans(x, 20, start, lambda c, sizes: plain.repair_random(c, sizes, g[1]))
    assert torch.equal(p.assign, f.assign)

@pytest.mark.parametrize('scale', [1e-3, 1e3])
def test_random_donors_and_a_step_as_the_points_are_large(scale):
    start, sizes = scale*noise(64, 8), torch.tensor([900.] + [4.]*31 + [0.]*32)
    c = start.clone()
    plain.repair_random(c, sizes, generator(1))
    distance, donor = torch.cdist(c[32:].double(), start[:32].double()).min(1)
    # any cluster gives, not the largest; a copy is moved by a thousandth of the points' size
    assert len(donor.unique()) > 12 and (donor == 0).sum() < 8 and torch.equal(c[:32], start[:32])
    assert ((distance > 1e-4*scale) & (distance < 2e-2*scale)).all()

@pytest.mark.parametrize('counts', [[5., 0, 0, 0, 0], [2., 2, 1, 0, 0], [1., 4, 0, 0, 0], [6., 0, 2]])
def test_a_repair_always_ends(counts): # also with as many clusters as points: n − k would be 0
    for rule in (plain.repair_empty, lambda c, sizes: plain.repair_random(c, sizes, generator(1))):
        sizes = torch.tensor(counts)
        rule(noise(len(counts), 2), sizes)
        assert (sizes > 0).all() and sizes.sum() == sum(counts)

@pytest.mark.parametrize('k', [1, 2, 39, 40])
def test_edges(k):
    p, f = (m.kmeans(noise(40, 3), k) for m in (plain, fast))
    assert p.n_empty == f.n_empty == 0
    assert torch.equal(p.assign, f.assign) and p.objective == pytest.approx(f.objective, rel=1e-5, abs=1e-5)

@pytest.mark.parametrize('n, k', [(1, 1), (2, 1), (50, 4)])
def test_points_that_are_all_zero(n, k): # of a network that has collapsed
    c = fast.kmeans(torch.zeros(n, 8), k, 3)
    assert c.centroids.isfinite().all() and c.objective[-1] == pytest.approx(0, abs=1e-30)
    for n in (1, 1000, 1_281_167):    # a GPU multiplies by the inverse
        assert (1/torch.tensor(fast.whole_unit(0., n), dtype=torch.float32)).isfinite()

@pytest.mark.parametrize('x, k', [(torch.ones(20, 3), 5), (noise(10, 4).repeat(8, 1), 16)])
def test_more_clusters_than_different_points(x, k): # halves of a centroid are equally near: ids may differ
    different = len(x.unique(dim=0))
    for c in (plain.kmeans(x, k), fast.kmeans(x, k)):
        # a split centroid is a thousandth off
        assert len(c.sizes.nonzero()) <= different and c.objective[-1] <= 1e-4*float(x.pow(2).sum())

@pytest.mark.parametrize('x, k, niter', [
    (torch.zeros(3), 2, 20), (torch.zeros(3, 0), 2, 20),
    (torch.zeros(3, 2), 4, 20), (torch.zeros(3, 2), 0, 20),
    (torch.tensor([[0.], [torch.nan]]), 1, 20), (torch.tensor([[0.], [-torch.inf]]), 1, 20),
    (torch.tensor([[1e15], [0.]]), 1, 20), (torch.zeros(3, 2), 2, -1)])
def test_both_refuse_the_same(x, k, niter):
    said = []
    for m in (plain, fast):
        with pytest.raises(ValueError) as e: m.kmeans(x, k, niter)
        said.append(str(e.value))
    assert said[0] == said[1] and said[0].split(':')[0] in ('x', 'k', 'niter')

@pytest.mark.parametrize('rounded', ['centroids', 'point'])
def test_where_bfloat16_prefers_the_wrong_centroid(rounded): # large terms cancel, so that scores are near 0
    u, one, e = 2**-7, torch.ones(128), torch.tensor([1., -1.]).repeat(64)
    if rounded == 'centroids': # both become 1 + u, and the first is shorter
        x, a, b = torch.cat([2*one, -one]), (1 + .51*u)*one, (1 + 1.49*u)*one
    else: # all of it becomes 1, and the first is shorter
        x, a, b = torch.cat([one + .49*u*e, one]), -e*(1 - u*(torch.arange(128) < 115)), e
    c = torch.stack([torch.cat([a, one]), torch.cat([b, one])])
    assert (x.double() @ c.double().T - c.double().pow(2).sum(1)/2).argmax() == 1
    assert fast.nearest(x[None], c, low=torch.bfloat16).tolist() == [1]

def test_faiss_takes_all_points(): # by itself it draws 256 for each cluster
    x = noise(1000, 4)
    ours, theirs = (fast.kmeans(x, 2, 3, backend=b) for b in ('torch', 'faiss'))
    assert theirs.objective == pytest.approx(ours.objective, rel=1e-4)
    torch.testing.assert_close(theirs.centroids, ours.centroids, rtol=0, atol=1e-4)

# ---------------------------------------------------------------- the process' settings

SETTINGS = ["", "torch.set_float32_matmul_precision('medium')", "torch.set_float32_matmul_precision('high')",
            "torch.backends.cuda.matmul.allow_tf32 = True",
            "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False"]
if hasattr(torch.backends.mkldnn, 'matmul'):                                            # PyTorch ≥ 2.9
    SETTINGS += ["torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
                 "torch.backends.cuda.matmul.fp32_precision = 'tf32'"]

STATE = """
def state():
    at = [(torch.backends.cuda.matmul, n) for n in ('allow_bf16_reduced_precision_reduction',
                                                    'allow_fp16_reduced_precision_reduction')]
    at += [(torch.backends.cudnn, n) for n in ('deterministic', 'benchmark')]
    if hasattr(torch.backends.mkldnn, 'matmul'):
        at += [(m, 'fp32_precision') for m in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul,
                                               torch.backends.cudnn)]
    return [getattr(*a) for a in at], torch.get_num_threads(), torch.get_rng_state().tolist()
"""

def in_python(code): # what it prints
    return subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True,
                          check=True).stdout.split()

@pytest.mark.parametrize('setting', SETTINGS)
def test_settings_do_not_matter_and_come_back(setting):
    code = f"""
import torch
from deepcluster_nb.fast.kmeans import full_precision, kmeans, nearest
{STATE}
x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
exact = torch.cdist(x.double(), x[:90].double()).argmin(1)
{setting}
before = state()
print(torch.equal(nearest(x, x[:90], low=torch.float32), exact), state() == before)
try:
    with full_precision():
        print(not torch.backends.cuda.matmul.allow_tf32)   # as cuBLAS asks: a mixture of names is an error
        raise KeyError
except KeyError: pass
kmeans(x, 9)
print(state() == before)
"""
    assert in_python(code) == ['True'] * 4

def test_the_core_changes_no_setting():
    code = f"""
import sys, torch
{STATE}
before = state()
import deepcluster_nb.clustering
deepcluster_nb.clustering.kmeans(torch.randn(99, 3), 9)
"""
    assert in_python(code + "print(state()[:2] == before[:2])") == ['True']

ROOMY = dict(noise=lambda g: (torch.randn(2000, 40, generator=g), 130),
             few=lambda g: (torch.randn(50, 3, generator=g), 3),
             alone=lambda g: (torch.randn(1, 2, generator=g), 1),
             unit=lambda g: (torch.nn.functional.normalize(torch.randn(2000, 64, generator=g)), 700),
             below_zero=lambda g: (.1*torch.nn.functional.normalize(torch.randn(500, 8, generator=g)), 40),
             pairs=lambda g: (torch.randn(200, 4, generator=g).repeat(2, 1), 60), # equal points and centroids
             many_tiles=lambda g: (torch.randn(5000, 16, generator=g), 3000))

@pytest.mark.parametrize('given', ROOMY.values(), ids=ROOMY)
@pytest.mark.parametrize('low', [torch.bfloat16, torch.float32])
def test_settled_without_a_question(monkeypatch, given, low): # the way of a GPU, on the CPU
    x, k = given(generator(0, 'settled'))
    start = x[torch.randperm(len(x), generator=generator(1, 'start'))[:k]]
    if x.abs().max() <= .1: start = 10*start                                   # all scores are negative
    monkeypatch.setattr(fast, 'rough_type', lambda x: low)
    assign, spilled = fast.settled(x, start)
    assert not spilled and torch.equal(assign, fast.nearest(x, start, low=low))

def test_where_the_room_was_too_little_the_other_way_is_taken(monkeypatch):
    seen, real = [], fast.nearest
    def counted(*args, **how): seen.append(1); return real(*args, **how)
    far = torch.randn(600, 4, generator=generator(0, 'far')) + 300              # all contend with all
    same = torch.ones(500, 3)
    for x in (far, same):
        assert fast.settled(x, x[:40])[1]
        plainly, before = fast.torch_kmeans(x, 3, x[:40]), len(seen)
        with monkeypatch.context() as m:
            m.setitem(fast.WAYS, 'cpu', (fast.settled, counted))
            other = fast.torch_kmeans(x, 3, x[:40])
        assert len(seen) > before and torch.equal(plainly.assign, other.assign)
        assert torch.equal(plainly.centroids, other.centroids) and plainly.objective == other.objective

@pytest.mark.parametrize('name, k', [('digits', 100), ('groups', 300)])
def test_the_way_of_a_gpu_gives_the_same_bits(monkeypatch, name, k):
    x = points(name)
    one = fast.kmeans(x, k)
    monkeypatch.setitem(fast.WAYS, 'cpu', (fast.settled, fast.nearest))
    other = fast.kmeans(x, k)
    assert torch.equal(one.assign, other.assign) and torch.equal(one.centroids, other.centroids)
    assert one.objective == other.objective

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_gpu_assigns_without_being_waited_for():
    x = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=generator(0))).cuda()
    start = x[:1000].clone()
    fast.settled(x, start)                                                     # libraries are loaded
    torch.cuda.set_sync_debug_mode('error')
    try: assign, spilled = fast.settled(x, start)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert not spilled and torch.equal(assign, fast.nearest(x, start))

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    for name, k in (('digits', 100), ('groups', 300)):
        x = points(name)
        p, f, there = plain.kmeans(x.cuda(), k), fast.kmeans(x.cuda(), k), fast.kmeans(x, k)
        compare(p.cpu(), f.cpu(), same=.99, tolerance=1e-5)
        assert torch.equal(f.assign.cpu(), there.assign)
    assert fast.kmeans(torch.zeros(4000, 8, device='cuda'), 3).centroids.isfinite().all()
