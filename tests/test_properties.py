("What must hold for any input: hypothesis looks for one where it does not. "
 "The same examples every time; nothing is stored.")
import itertools, math, tempfile
from functools import partial
import numpy as np, pytest, torch
from PIL import Image
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.extra.numpy import arrays
from deepcluster_nb import augment
from deepcluster_nb.augment import crop_boxes
from deepcluster_nb.fast import crops as fast_crops
from deepcluster_nb.fast.crops import resample
from deepcluster_nb.fast.feeding import Ragged
from deepcluster_nb import clustering
from deepcluster_nb.clustering import ami, chance_nmi, entropy, nmi, repair_empty
from deepcluster_nb.fast.kmeans import contenders, kmeans, torch_kmeans
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.data import generator
from deepcluster_nb.fast.features import PCA, HalfFeatures
from deepcluster_nb.features import l2_normalize
from deepcluster_nb.fast.packing import PackedWriter, verify_packed
from deepcluster_nb.probes import cluster_accuracy, knn_accuracy, linear_probe
from deepcluster_nb.runs import load_checkpoint, save_checkpoint
from deepcluster_nb.sampling import (balanced_draws, loss_weights, released_sample, shuffled_sample,
                                     uniform_sample)

HOME = tempfile.TemporaryDirectory()                               # hypothesis' own files; gone at the end
set_hypothesis_home_dir(HOME.name)
settings.register_profile('kit', derandomize=True, deadline=None, database=None, max_examples=40,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.load_profile('kit')
few = settings(max_examples=15)

pytestmark = pytest.mark.usefixtures('one_thread')

seeds = st.integers(0, 2**32)
def noise(seed, *shape): return torch.randn(shape, generator=generator(seed, 'noise', *shape))

# --- sampling

assigns = st.lists(st.integers(0, 9), min_size=1, max_size=60).map(torch.tensor)
def cut(assign, n): # (clusters that are not empty, draws from each)
    m = len(assign.unique())
    return m, n//m + 1

@given(assigns, st.integers(1, 150), seeds)
def test_draws_are_balanced(assign, n, seed):
    m, s = cut(assign, n)
    drawn, sizes = balanced_draws(assign, n, generator(seed)), torch.bincount(assign)
    # every cluster that is not empty
    assert [assign[d].unique().tolist() for d in drawn] == [[j] for j in sizes.nonzero().flatten().tolist()]
    assert all(len(d) == s for d in drawn) and 0 < s*m - n <= m
    # nothing twice where there is enough
    assert all(len(d.unique()) == s for d in drawn if sizes[assign[d[0]]] > s)

@given(assigns, st.integers(1, 150), seeds, st.integers(0, 500))
def test_an_epoch_is_a_function_of_its_arguments(assign, n, seed, epoch):
    for sampler in (uniform_sample, released_sample, shuffled_sample):
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        idx = sampler(assign, n, seed, epoch)
        assert torch.equal(state, torch.random.get_rng_state())
        torch.manual_seed(2)
        assert (torch.equal(idx, sampler(assign.clone(), n, seed, epoch)) and len(idx) == n and 0 <= idx.min()
                and idx.max() < len(assign))

@given(assigns, st.integers(1, 150), seeds)
def test_how_the_samplers_are_related(assign, n, seed):
    m, s = cut(assign, n)
    N, k = len(assign), int(assign.max()) + 1
    uniform = uniform_sample(assign, n, seed)
    # an image number taken for a place
    assert torch.equal(released_sample(assign, n, seed), assign.argsort(stable=True)[uniform])
    counts = torch.bincount(assign[uniform], minlength=k)
    assert counts.max() <= s and counts[assign.unique()].min() >= max(0, s - (s*m - n))  # what the cut leaves
    often = torch.bincount(shuffled_sample(assign, n, seed), minlength=N)
    assert often.min() >= n//N and often.max() <= -(-n//N)
    share = loss_weights(assign, k) * torch.bincount(assign) / N  # of the loss, where every image comes once
    assert (share[assign.unique()].tolist() == pytest.approx([1/m]*m, rel=1e-5)
            and share.sum() == pytest.approx(1, rel=1e-5))
    ordered = assign.sort().values
    # no difference where the data set is in cluster order
    assert torch.equal(released_sample(ordered, n, seed), uniform_sample(ordered, n, seed))

# --- k-means

@st.composite
def clusterings(draw, most=40): # (x, k, seed): points on a coarse grid, so that many are equal, or anywhere
    n, d, seed = draw(st.integers(2, most)), draw(st.integers(1, 5)), draw(seeds)
    if draw(st.booleans()):
        x = torch.from_numpy(draw(arrays(np.float32, (n, d), elements=st.integers(-3, 3).map(float),
                                         fill=st.nothing())))
    else:
        x = noise(seed, n, d) * 10**draw(st.integers(-2, 2))
    return x, draw(st.one_of(st.integers(1, n), st.integers(max(1, n - 2), n))), seed

def distances(x, c):
    return torch.cdist(x.double(), c.double(), compute_mode='donot_use_mm_for_euclid_dist').pow(2)

def check_clustering(x, c, k):
    assert c.assign.shape == (len(x),) and c.centroids.shape == (k, x.shape[1])
    assert (c.centroids.isfinite().all() and all(map(math.isfinite, c.objective)) and 0 <= c.assign.min()
            and c.assign.max() < k)
    d, scale = distances(x, c.centroids), float(x.double().pow(2).sum(1).max())
    own = d.gather(1, c.assign[:, None])[:, 0]
    assert (own <= d.min(1).values + 1e-5*scale).all()                          # nobody has a nearer centroid
    assert c.objective[-1] == pytest.approx(float(own.sum()), rel=1e-3, abs=1e-5*scale*len(x))

EVERY = {'plain': clustering.kmeans, 'torch': kmeans, 'faiss': partial(kmeans, backend='faiss')}
every = pytest.mark.parametrize('backend', EVERY)

@every
@given(clusterings(), st.integers(0, 6))
def test_everybody_is_with_the_nearest(backend, case, niter):
    x, k, seed = case
    c = EVERY[backend](x, k, niter, seed)
    check_clustering(x, c, k)
    assert len(c.objective) == 1 + (niter if k < len(x) else 0)

@given(clusterings())
def test_the_objective_rises_only_after_a_repair(case):
    x, k, seed = case
    repaired = []
    def repair(centroids, sizes):
        repaired.append(bool((sizes == 0).any()))
        repair_empty(centroids, sizes)
    start, scale = x[torch.randperm(len(x), generator=generator(seed))[:k]], float(x.double().pow(2).sum())
    for run in (lambda: clustering.lloyd(x, start, 8, repair), lambda: torch_kmeans(x, 8, start, repair)):
        repaired.clear()
        c = run()
        assert all(after <= before + 1e-5*scale
                   for before,after,r in zip(c.objective, c.objective[1:], repaired) if not r)

@given(clusterings())
def test_one_cluster_is_the_mean(case):
    x, _, seed = case
    scale = float(x.double().pow(2).sum())
    for f in EVERY.values():
        c = f(x, 1, 2, seed)
        torch.testing.assert_close(c.centroids[0].double(), x.double().mean(0), rtol=1e-4,
                                   atol=1e-5*scale**.5)
        assert c.objective[-1] == pytest.approx(float((x.double() - x.double().mean(0)).pow(2).sum()),
                                                rel=1e-4, abs=1e-5*scale)

@given(clusterings())
def test_as_many_clusters_as_points(case):
    x, _, seed = case
    for backend,f in EVERY.items():
        c = f(x, len(x), 5, seed)
        assert c.objective == [pytest.approx(0, abs=1e-5*float(x.pow(2).sum()))]
        if len(x.unique(dim=0)) == len(x) and backend != 'faiss': check_clustering(x, c, len(x))

@given(st.integers(1, 6), st.integers(2, 8), st.integers(1, 4), st.data())
def test_copies(distinct, copies, d, data): # more clusters than different points, too
    x = noise(distinct, distinct, d).repeat(copies, 1)
    k = data.draw(st.integers(1, len(x)))
    for f in EVERY.values():
        c = f(x, k, 10, data.draw(st.integers(0, 3)))
        check_clustering(x, c, k)
        assert len(c.assign.unique()) <= distinct                                       # copies stay together

@given(st.integers(5, 40), st.integers(1, 4), st.integers(2, 6), seeds)
def test_neither_place_nor_order_matters(n, d, k, seed):
    # as long as no cluster was empty: a repair scales coordinates,
    # and its choice depends on numbers of clusters
    assume(k < n)
    x, order = noise(seed, n, d), torch.randperm(n, generator=generator(seed, 'order'))
    def none_empty(centroids, sizes): assume((sizes > 0).all())
    start = x[torch.randperm(n, generator=generator(seed, 'start'))[:k]]
    c = torch_kmeans(x, 6, start, none_empty)
    assume(c.n_empty == 0)
    moved, shuffled = (torch_kmeans(x + 3, 6, start + 3, none_empty),
                       torch_kmeans(x[order], 6, start, none_empty))
    assert torch.equal(moved.assign, c.assign) and torch.equal(shuffled.assign, c.assign[order])
    torch.testing.assert_close(moved.centroids - 3, c.centroids, rtol=0, atol=1e-4)
    assert (moved.objective == pytest.approx(c.objective, rel=1e-3)
            and shuffled.objective == pytest.approx(c.objective, rel=1e-4))

@few
@given(st.integers(3, 7), seeds)
def test_never_better_than_the_best_of_all_partitions(n, seed):
    x = noise(seed, n, 2)
    def cost(a):
        return sum(float((x[a == j] - x[a == j].mean(0)).pow(2).sum()) for j in range(2) if (a == j).any())
    best = min(cost(torch.tensor(a)) for a in itertools.product(range(2), repeat=n - 1) for a in [(0, *a)])
    assert kmeans(x, 2, 20, seed).objective[-1] >= best - 1e-4

@few
@given(st.sampled_from([1, 5, 16, 64, 127, 128, 256, 768, 1280, 5120]),
       st.sampled_from([torch.bfloat16, torch.float32]), st.floats(-2, 2), st.sampled_from([0., .01, 1.]),
       seeds)
def test_contenders_by_brute_force(k, dtype, shift, slack, seed):
    # rows of positive numbers, of negative ones, and of both
    scores = (noise(seed, 12, k) + shift + 2*noise(seed + 1, 12, 1)).to(dtype)
    scores[:, -1:] = scores[:, -1:] if k == 1 else -torch.inf       # as where centroids were added to fill up
    rows, cols = contenders(scores, torch.full((12,), slack))
    found = torch.zeros(12, k, dtype=torch.int).index_put_((rows, cols), torch.ones((), dtype=torch.int),
                                                           accumulate=True)
    top, wide = scores.float().amax(1, keepdim=True), 2*torch.finfo(dtype).eps
    # each once, none forgotten
    assert (found <= 1).all() and (found[scores.float() >= top - slack] == 1).all()
    # and few others
    assert (scores.float()[found == 1]
            >= (top - slack - wide*(top.abs() + slack)).expand(12, k)[found == 1]).all()

# --- NMI and AMI

@st.composite
def pairs(draw): # two partitions of the same points
    n = draw(st.integers(1, 60))
    return [torch.tensor(draw(st.lists(st.integers(0, draw(st.integers(0, 8))), min_size=n, max_size=n)))
            for _ in range(2)]

def renamed(a, seed): # other names, with gaps
    return (torch.randperm(20, generator=generator(seed)) * 3)[a]

@given(pairs(), seeds)
def test_agreement_of_partitions(pair, seed):
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    a, b = pair
    assert (0 <= nmi(a, b) <= 1 + 1e-9 and nmi(a, b) == pytest.approx(nmi(b, a), abs=1e-9)
            and ami(a, b) <= 1 + 1e-9 and ami(a, b) == pytest.approx(ami(b, a), abs=1e-6))
    assert (nmi(renamed(a, seed), b) == pytest.approx(nmi(a, b), abs=1e-9)
            and ami(renamed(a, seed), b) == pytest.approx(ami(a, b), abs=1e-6))
    assert nmi(a, a) == pytest.approx(1) and ami(a, renamed(a, seed)) == pytest.approx(1)
    assert nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b, average_method='geometric'),
                                      abs=1e-7)
    assert ami(a, b) == pytest.approx(adjusted_mutual_info_score(a, b, average_method='geometric'), abs=1e-7)
    assert 0 <= chance_nmi(a, b, seed) == chance_nmi(a, b, seed) <= 1 + 1e-9
    assert entropy(torch.bincount(a)) <= math.log(len(a.unique())) + 1e-9

@given(pairs(), seeds)
def test_clusters_as_classes(pair, seed):
    a, y = (torch.clamp(v, max=4) for v in pair)
    k = int(max(a.max(), y.max())) + 1
    best = max(sum(int(((a == j) & (y == name)).sum()) for j,name in enumerate(names))
               for names in itertools.permutations(range(k)))
    assert cluster_accuracy(a, y) == pytest.approx(100*best/len(y))
    assert (cluster_accuracy(renamed(a, seed), y) == pytest.approx(cluster_accuracy(a, y))
            and cluster_accuracy(y, y) == pytest.approx(100))

# --- PCA and unit length

@st.composite
def features(draw, wide=False): # (N, D) of different scales, directions mixed
    n, d, seed = draw(st.integers(2, 60)), draw(st.integers(1, 12)), draw(seeds)
    assume(wide or n > d + 1)
    scale = 10 ** torch.linspace(0, draw(st.floats(0, 1.5)), d)
    return noise(seed, n, d) * scale @ torch.linalg.qr(noise(seed + 1, d, d))[0] + draw(st.integers(-20, 20))

def gram(pca, x): # what does not depend on the directions' signs
    z = pca.transform(x)
    return z @ z.T

@given(features(), st.integers(1, 12))
def test_whitening(x, dim):
    z = PCA(dim).fit(x).transform(x)
    n, d = len(x), min(dim, x.shape[1])
    assert z.shape == (n, d)
    torch.testing.assert_close(z.T @ z / n, torch.eye(d), rtol=0, atol=2e-3)
    torch.testing.assert_close(z.mean(0), torch.zeros(d), rtol=0, atol=2e-3)
    plain = PCA(dim, whiten=False).fit(x)
    torch.testing.assert_close(plain.transform(x).pow(2).mean(0).double(), plain.variance, rtol=1e-3,
                               atol=1e-3)
    if dim >= x.shape[1]:  # a turn keeps distances
        torch.testing.assert_close(distances(plain.transform(x), plain.transform(x)), distances(x, x),
                                   rtol=1e-4, atol=1e-3)

@given(features(wide=True), st.data())
def test_pca_in_any_batches_and_any_order(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(1, len(x) - 1), unique=True, max_size=8)))
    whole, stream, shuffled = PCA(12).fit(x), PCA(12), PCA(12)
    for b in x.tensor_split(cuts): stream.add(b)
    stream.solve()
    order = torch.randperm(len(x), generator=generator(len(x)))
    shuffled.fit(x[order], batch=data.draw(st.integers(1, 70)))
    # row i is point i
    assert (torch.equal(whole.transform(x)[order], whole.transform(x[order]))
            or torch.allclose(whole.transform(x)[order], whole.transform(x[order]), atol=1e-4))
    for other in (stream, shuffled):
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.variance, whole.variance, rtol=1e-7,
                                   atol=1e-7*float(whole.variance[0]))
        torch.testing.assert_close(gram(other, x), gram(whole, x), rtol=0, atol=2e-3*len(x))

@given(features(wide=True), st.integers(0, 4), st.integers(0, 4))
def test_dead_directions_become_zero(x, constant, copied):
    n, d = x.shape
    wide = torch.cat([x, torch.full((n, constant), 7.), x[:, :copied]], 1)
    pca = PCA(30).fit(wide)
    z = pca.transform(wide)
    alive = (pca.axes != 0).any(0)
    rank = min(n - 1, d)
    assert (z.isfinite().all() and z.shape == (n, min(30, wide.shape[1])) and not z[:, ~alive].any()
            and int(alive.sum()) <= rank)
    torch.testing.assert_close((z.T @ z / n).diagonal(), alive.float(), rtol=0, atol=2e-3)
    nothing = PCA(3).fit(torch.full((n, d), 2.5))                                           # all points equal
    assert not nothing.transform(torch.full((n, d), 2.5)).any()

@given(features(wide=True), st.floats(1e-3, 1e3), st.data())
def test_unit_length(x, factor, data):
    x[data.draw(st.integers(0, len(x) - 1))] = 0
    z = l2_normalize(x)
    torch.testing.assert_close(z.norm(dim=1), (x != 0).any(1).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(l2_normalize(z), z, rtol=0, atol=1e-6)
    torch.testing.assert_close(l2_normalize(factor * x), z, rtol=0, atol=1e-5)

@given(features(wide=True), st.lists(st.integers(1, 60), max_size=5), st.booleans())
def test_half_features_come_back_as_they_were_added(x, cuts, in_file):
    half, parts = (HalfFeatures(len(x), room=0 if in_file else 2**20),
                   [b for b in x.tensor_split(sorted({min(c, len(x)) for c in cuts})) if len(b)])
    kept = [half.add(b) for b in parts]
    for _ in range(2): assert torch.equal(torch.cat(list(half)), x.half())
    assert torch.equal(torch.cat(kept), x.half()) and (half.file is not None) == in_file
    half.close()

# --- crops

both = pytest.mark.parametrize('m', [augment, fast_crops], ids=['plain', 'fast'])

@st.composite
def crops(draw): # (image, box, size): boxes in sixteenths of a pixel
    c, h, w, seed = (draw(st.sampled_from([1, 3])), draw(st.integers(1, 48)), draw(st.integers(1, 48)),
                     draw(seeds))
    if draw(st.booleans()):
        image = torch.randint(0, 256, (c, h, w), generator=generator(seed, 'image')).byte()
    else:
        # black and white stripes
        image = (255 * torch.rand(c, 1, w, generator=generator(seed, 'image')).round()).byte().repeat(1, h, 1)
    step = draw(st.sampled_from([1, 16]))
    sides = []
    for n in (w, h):
        length = draw(st.integers(step, n*step))
        sides.append((draw(st.integers(0, n*step - length))/step, length/step))
    (left, width), (top, height) = sides
    return image, torch.tensor([left, top, width, height]), draw(st.integers(1, 48))

def pillow(image, box, size): # channel by channel
    left, top, width, height = box.tolist()
    planes = [np.asarray(Image.fromarray(p.numpy()).resize(
        (size, size), Image.BILINEAR, (left, top, left + width, top + height))) for p in image]
    return torch.from_numpy(np.stack(planes)).float()

@both
@settings(max_examples=150)
@given(crops())
def test_crops_are_pillows(m, case):
    image, box, size = case
    assert (m.resample(image[None], box[None], size)[0].round() - pillow(*case)).abs().max() <= 1

@given(crops(), crops())
def test_matrices_are_taps(a, b):
    # whole matrices, windows of a flat buffer, against the pixels that count; two images of different sizes
    size, channels = a[2], min(len(a[0]), len(b[0]))
    images, boxes, flip = ([c[0][:channels] for c in (a, b)], torch.stack([c[1] for c in (a, b)]),
                           torch.tensor([False, True]))
    torch.testing.assert_close(resample(Ragged.of(images), boxes, size, flip),
                               resample(images, boxes, size, flip), rtol=0, atol=256*1e-5)

@both
@given(crops())
def test_crops_in_a_list_and_in_a_batch(m, case): # of the window alone, and of the whole image
    image, box, size = case
    flip = torch.tensor([True])
    torch.testing.assert_close(m.resample([image], box[None], size, flip),
                               m.resample(image[None], box[None], size, flip), rtol=0, atol=256*1e-5)

@both
@given(crops())
def test_mirrored_twice_and_bounds(m, case):
    image, box, size = case
    view, mirrored = (m.resample(image[None], box[None], size, torch.tensor([f])) for f in (False, True))
    torch.testing.assert_close(mirrored.flip(-1), view, rtol=0, atol=256*1e-5)
    torch.testing.assert_close(m.resample(mirrored, torch.tensor([[0., 0, size, size]]), size,
                                        torch.tensor([True])),
                               view, rtol=0, atol=256*1e-5)
    assert image.min() - .01 <= view.min() and view.max() <= image.max() + .01
    torch.testing.assert_close(m.resample(torch.full_like(image, 77)[None], box[None], size),
                               torch.full_like(view, 77.), rtol=0, atol=1e-3)

@both
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), seeds, st.data())
def test_a_window_of_the_output_size_is_a_copy(m, h, w, size, seed, data):
    size = min(h, w, size)
    left, top = data.draw(st.integers(0, w - size)), data.draw(st.integers(0, h - size))
    image = torch.randint(0, 256, (2, 3, h, w), generator=generator(seed, 'image')).byte()
    boxes = torch.tensor([[left, top, size, size]]).repeat(2, 1)
    copied, mirrored = m.resample(image, boxes, size, torch.tensor([False, True]))
    window = image[:, :, top:top + size, left:left + size].float()
    assert torch.equal(copied, window[0]) and torch.equal(mirrored, window[1].flip(-1))

@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20), seeds,
       st.floats(.01, 1))
def test_random_boxes(sizes, seed, low):
    sizes = torch.tensor(sizes)
    boxes = crop_boxes(sizes, generator(seed), (low, 1.))
    assert (torch.equal(boxes, crop_boxes(sizes, generator(seed), (low, 1.)))
            and torch.equal(boxes, boxes.round()))
    assert ((boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
            and (boxes[:, :2] + boxes[:, 2:] <= sizes.flip(1)).all())

@both
@few
@given(st.integers(8, 60), st.integers(8, 60), st.integers(4, 32), seeds)
def test_ten_views(m, h, w, size, seed):
    image = torch.randint(0, 256, (1, 3, h, w), generator=generator(seed, 'image')).byte()
    views = m.ten_crop(image, size)[0]
    torch.testing.assert_close(views[5:], views[:5].flip(-1), rtol=0, atol=256*1e-5)
    torch.testing.assert_close(views[4:5], m.center_crop(image, size), rtol=0, atol=256*1e-5)
    assert torch.equal(m.image_sizes(image), torch.tensor([[h, w]]))

# --- what is written and read again

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
          torch.bool]
text = st.text(st.characters(exclude_categories=['Cs']), max_size=12)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
                           lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3),
                           max_leaves=8)

@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    t = (100 * noise(draw(seeds), *shape)).to(draw(st.sampled_from(DTYPES)))
    return t.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else t                # not contiguous

def equal_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))

@given(st.dictionaries(text, tensors(), max_size=5), st.dictionaries(text, json_values, max_size=3),
       st.integers(0, 99_999), st.integers(0, 9_999_999))
def test_checkpoints_come_back(named, state, epoch, step):
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, epoch, named, state, step)
        e, s, back, st_ = load_checkpoint(folder)
    assert ((e, s, st_) == (epoch, step, state) and back.keys() == named.keys()
            and all(equal_bits(back[n], t) for n,t in named.items()))

@few
@given(st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 9_999_999)), min_size=1, max_size=6,
                unique=True))
def test_the_newest_checkpoint_counts(when):
    with tempfile.TemporaryDirectory() as folder:
        for at in sorted(when):
            save_checkpoint(folder, at[0], dict(x=torch.tensor(at)), {}, at[1])
            assert load_checkpoint(folder)[:2] == at and load_checkpoint(folder)[2]['x'].tolist() == list(at)

@st.composite
def image_lists(draw): # images of any sizes, labels or none, names
    sizes = draw(st.lists(st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
                          min_size=1, max_size=8))
    if draw(st.booleans()): sizes = [sizes[0]] * len(sizes)
    images = [torch.randint(0, 256, s, generator=generator(i, 'pixels')).byte() for i,s in enumerate(sizes)]
    labels = draw(st.none() | st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    return (images, labels, draw(st.lists(text, max_size=6)),
            draw(st.lists(text, min_size=len(sizes), max_size=len(sizes))))

def check_packed(packed, images, labels, classes, paths):
    assert (all(torch.equal(a, b) for a,b in zip(packed, images, strict=True)) and packed.paths == paths
            and packed.classes == classes)
    assert packed.labels is None if labels is None else packed.labels.tolist() == labels
    assert packed.size == (tuple(images[0].shape) if len({im.shape for im in images}) == 1 else None)

@given(image_lists(), st.data())
def test_packed_images_come_back(case, data):
    images, labels, classes, paths = case
    packed = PackedImages(torch.cat([im.flatten() for im in images]), [im.shape for im in images], labels,
                          classes, paths)
    check_packed(packed, *case)
    with tempfile.TemporaryDirectory() as folder:
        packed.save(f'{folder}/a'); check_packed(PackedImages.load(f'{folder}/a'), *case)
        rows = data.draw(st.lists(st.integers(0, len(images) - 1), min_size=1, max_size=8))
        packed.subset(torch.tensor(rows)).save(f'{folder}/b')
        taken = ([images[i] for i in rows], labels and [labels[i] for i in rows], classes,
                 [paths[i] for i in rows])
        check_packed(PackedImages.load(f'{folder}/b'), *taken)
        batch = packed.batch(torch.tensor(rows))
        assert (all(torch.equal(a, b) for a,b in zip(batch, taken[0], strict=True))
                and isinstance(batch, list) == (packed.size is None))

@few
@given(image_lists())
def test_what_the_writer_packs(case):
    import json, zlib
    images, labels, classes, paths = case
    with tempfile.TemporaryDirectory() as folder:
        w = PackedWriter(f'{folder}/x', dict(classes=json.dumps(classes)))
        for im in images: w.add(im.numpy().tobytes(), [im.shape], [zlib.crc32(im.numpy().tobytes())])
        w.finish(labels, paths); w.rename()
        check_packed(PackedImages.load(f'{folder}/x'), *case)
        assert verify_packed(f'{folder}/x') == []

# --- neighbors and probes

@given(st.integers(3, 30), st.integers(1, 10), st.integers(2, 4), st.data(), seeds)
def test_neighbors_by_brute_force(n, m, classes, data, seed):
    x, y, tx, ty = (noise(seed, n, 4), torch.arange(n) % classes, noise(seed + 1, m, 4),
                    torch.arange(m) % classes)
    k, T = data.draw(st.integers(1, n)), data.draw(st.sampled_from([.07, .1, 1.]))
    right = 0
    for q,truth in zip(tx, ty):
        cosine = [float(q @ p / (q.norm() * p.norm())) for p in x]
        votes = [0.]*classes
        for i in sorted(range(n), key=lambda i: -cosine[i])[:k]: votes[y[i]] += math.exp(cosine[i]/T)
        right += max(range(classes), key=votes.__getitem__) == truth
    assert knn_accuracy(x, y, tx, ty, k, T) == pytest.approx(100*right/m)
    assert knn_accuracy(5*x, y, .2*tx, ty, k, T) == pytest.approx(100*right/m)         # only directions count

@settings(max_examples=6)
@given(seeds)
def test_a_probe_sees_neither_scale_nor_place_nor_order(seed):
    y = torch.arange(60) % 3
    x = noise(seed, 60, 8) + 2*torch.nn.functional.one_hot(y, 8)
    def accuracy(f): return linear_probe(f[:40], y[:40], f[40:], y[40:], epochs=3, batch_size=20)['last']
    plain, order = accuracy(x), torch.randperm(8, generator=generator(seed))
    # one of 20 may lie on the border
    assert (accuracy(x[:, order]) == pytest.approx(plain, abs=5.1)
            and accuracy(4*x + 3) == pytest.approx(plain, abs=5.1))
    assert plain > 50
