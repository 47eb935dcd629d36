("The package held to the numbers of tests/golden, "
 "each derived by a formula or by hand that stands beside it; first the formulas themselves.")
import hashlib, inspect, math
from pathlib import Path
import numpy as np, pytest, torch, yaml
from torch import nn
from deepcluster_nb import probes, voc
from deepcluster_nb.clustering import ami, chance_nmi, faiss_draws, lloyd, nmi, repair_empty
from deepcluster_nb.fast.kmeans import kmeans
from deepcluster_nb.data import generator
from deepcluster_nb.model import convnet
from deepcluster_nb.pic import join_singletons, pic
from deepcluster_nb.probes import conv_activations, knn_accuracy, pool_activation
from deepcluster_nb.sampling import balanced_draws, loss_weights, released_sample, uniform_sample
from deepcluster_nb.sobel import MEAN, Sobel, normalize

GOLDEN = Path(__file__).parent/'golden'
NETWORKS, SOBEL, PROBES, SAMPLING, CLUSTERING = (
    yaml.safe_load((GOLDEN/f'{n}.yaml').read_text())
    for n in ('networks', 'sobel', 'probes', 'sampling', 'clustering'))
ARCHS = ['alexnet', 'vgg16', 'resnet18', 'resnet50']

pytestmark = pytest.mark.usefixtures('one_thread')

def close(got, expected, rel=1e-5, abs=1e-6): return got == pytest.approx(expected, rel=rel, abs=abs)

def derived(at, v): # (place, number, formula) of every number that has one
    if isinstance(v, dict):
        for k,x in v.items(): yield from derived(f'{at}.{k}', x)
    elif isinstance(v, list) and len(v) > 1 and isinstance(v[1], str): yield at, v[0], v[1]
    elif isinstance(v, list):
        for i,x in enumerate(v): yield from derived(f'{at}.{i}', x)

def test_formulas_give_the_numbers():
    found = [d for p in GOLDEN.glob('*.yaml') for d in derived(p.stem, yaml.safe_load(p.read_text()))]
    names = {n: getattr(math, n) for n in ('sqrt', 'log', 'exp', 'ceil')}
    wrong = [d for d in found if not close(eval(d[2], {'__builtins__': {}}, names), d[1], abs=0)]
    assert len(found) > 100 and not wrong

def test_every_file_says_how():
    for p in GOLDEN.glob('*.yaml'): assert p.read_text().startswith('# ') and ('how:' in p.read_text())

@pytest.fixture(scope='module', params=ARCHS)
def network(request):
    with torch.device('meta'): net = convnet(request.param, 10_000).eval()
    return request.param, net

def count(module): return sum(p.numel() for p in module.parameters())

def test_layers(network):
    arch, net = network
    seen = {}
    def note(name): return lambda m, x, out: seen.update({name: [count(m), *out.shape[1:]]})
    for name,m in net.named_modules():
        if name in NETWORKS[arch]['layers']: m.register_forward_hook(note(name))
    with torch.device('meta'), torch.inference_mode(): net(torch.empty(1, 3, 224, 224))
    assert seen == {name: [n, *shape] for name,(n, _, shape) in NETWORKS[arch]['layers'].items()}

def test_totals(network):
    arch, net = network
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert (count(net) - frozen, frozen) == (NETWORKS[arch]['total'][0], NETWORKS['frozen'][0])
    assert [n for n,p in net.named_parameters() if not p.requires_grad] == [
        'sobel.0.weight', 'sobel.0.bias', 'sobel.1.weight', 'sobel.1.bias']

@pytest.mark.parametrize('arch', ['alexnet', 'vgg16'])
def test_no_layer_is_left_out_of_the_table(arch):
    # batch norm stands behind every convolution: two numbers for each of its planes
    rows = NETWORKS[arch]['layers']
    norms = (sum(2*shape[0] for name,(n, _, shape) in rows.items() if n and name.startswith('features'))
             if arch == 'vgg16' else 0)
    assert sum(n for n,*_ in rows.values()) + norms == NETWORKS[arch]['total'][0]

def test_alexnet_without_sobel():
    with torch.device('meta'): net = convnet('alexnet', 10_000, sobel=False)
    assert count(net) == NETWORKS['alexnet']['with_rgb'][0]

def test_alexnets_arithmetic(): # counted on the real layers by PyTorch
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device('meta'), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        convnet('alexnet', 10_000, sobel=False).eval()(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() == NETWORKS['alexnet']['flop'][0] + 2*96*11*11*55*55    # the third plane

def test_first_weights():
    net = nn.ModuleDict(dict(features=convnet('alexnet', 2).features))
    for name,(std, _) in [(n, v) for n,v in NETWORKS['init'].items() if n != 'how']:
        w = net.get_submodule(name).weight
        # five standard errors
        assert abs(w.std()/std - 1) < 5 / (2*w.numel())**.5 and abs(w.mean()) < 5*std / w.numel()**.5
        assert not net.get_submodule(name).bias.any()

def gradients(x): # (3, H, W) on the scale 0 to 255 → (2, H, W)
    return Sobel()(normalize(x.float()[None]))[0]

def test_sobel_at_the_border():
    expected = SOBEL['black'][0] * torch.tensor([SOBEL['border'][k] for k in 'xy'])
    torch.testing.assert_close(gradients(torch.zeros(3, 4, 4)), expected, rtol=1e-5, atol=1e-5)

def test_sobel_of_the_mean_color():
    image = 255 * torch.tensor(MEAN)[:, None, None].expand(3, 6, 5)
    torch.testing.assert_close(gradients(image), torch.zeros(2, 6, 5), rtol=0, atol=1e-5)

@pytest.mark.parametrize('channels', [(0,), (1,), (2,), (0, 1, 2)])
def test_sobel_of_a_point(channels):
    image = torch.zeros(3, 5, 5)
    image[list(channels), 2, 2] = 255
    step = sum(SOBEL['share'][c][0] for c in channels)
    added = gradients(image) - gradients(torch.zeros(3, 5, 5))
    torch.testing.assert_close(added[:, 1:4, 1:4], step * torch.tensor([SOBEL['point'][k] for k in 'xy']),
                               rtol=1e-5, atol=1e-5)
    assert added.count_nonzero() == 12                          # six numbers in each kernel, and nowhere else

def test_sobel_of_a_ramp():
    y, x = torch.meshgrid(torch.arange(6), torch.arange(7), indexing='ij')
    inside = gradients((10*x + 3*y).expand(3, 6, 7))[:, 1:-1, 1:-1]
    torch.testing.assert_close(
        inside, torch.tensor([SOBEL['ramp'][k][0] for k in 'xy'])[:, None, None].expand_as(inside),
        rtol=1e-5, atol=1e-5)
    assert SOBEL['step'][0] == pytest.approx(sum(s for s,_ in SOBEL['share']))

@pytest.mark.parametrize('arch', ['alexnet', 'resnet50'])
def test_probe_sizes(arch):
    with torch.device('meta'), torch.inference_mode():
        acts = conv_activations(convnet(arch, 7).eval(), torch.empty(1, 3, 224, 224))
    rows = {name: row for name,row in PROBES[arch].items() if name != 'source'}
    assert {name: pool_activation(name, a).shape[1] for name,a in acts.items()} == {
        name: row['size'][0] for name,row in rows.items()}
    for name,a in acts.items():
        x = torch.rand(1, *a.shape[1:], generator=generator(0, name))
        torch.testing.assert_close(pool_activation(name, x),
                                   nn.functional.avg_pool2d(x, *rows[name]['pool']).flatten(1))

def test_padding_counts_in_the_probes_pool():
    out = pool_activation('conv1', torch.ones(1, 96, 55, 55)).view(96, 10, 10)
    golden = PROBES['padding_counts']
    assert (close(out[:, 0, 0].tolist(), [golden['corner'][0]]*96)
            and close(out[0, 0, 1:9].tolist(), [golden['edge'][0]]*8)
            and close(out[0, 1:9, 1:9].flatten().tolist(), [golden['middle']]*64))

def test_where_two_neighbors_outvote_a_nearer_one():
    at = lambda s: torch.tensor([s, (1 - s*s)**.5])
    for T,(s, _) in zip(PROBES['knn']['turns_at']['T'], PROBES['knn']['turns_at']['s']):
        for near,winner in ((s - 1e-3, 0), (s + 1e-3, 1)):
            x, y = torch.stack([at(1.), at(near), at(near)]), torch.tensor([0, 1, 1])
            assert knn_accuracy(x, y, at(1.)[None], torch.tensor([winner]), k=3, T=T) == 100

@pytest.mark.parametrize('which', ['script', 'program'])
def test_learning_rates_of_the_released_probe(which):
    golden = PROBES['law'][which]
    assert [probes.probe_lr(.01, golden['wd'], t) for t in golden['t']] == pytest.approx(
        [lr for lr,_ in golden['lr']], rel=1e-6)

@pytest.mark.parametrize('what', ['fc6-8', 'all'])
def test_voc_learning_rates(what):
    golden = PROBES['voc'][what]
    assert [voc.learning_rate(what, t) for t in golden['t']] == pytest.approx(
        [lr for lr,_ in golden['lr']], rel=1e-6, abs=0)

def labels_of(sizes): return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

def test_seeds_of_the_streams(): # the first eight bytes of SHA-256, the lowest first
    digest = hashlib.sha256(b'[0, "crop", 1, 2]').digest()
    assert generator(0, 'crop', 1, 2).initial_seed() == sum(b << 8*i for i,b in enumerate(digest[:8]))

@pytest.mark.parametrize('case', SAMPLING['draws'], ids=lambda c: f"{c['sizes']} n={c['n']}")
def test_draws_of_a_cluster(case):
    assign = labels_of(case['sizes'])
    drawn = balanced_draws(assign, case['n'], generator(0, 'draws'))
    full = [j for j,size in enumerate(case['sizes']) if size]
    assert ([len(d) for d in drawn] == [case['s'][0]]*len(full)
            and [assign[d].unique().tolist() for d in drawn] == [[j] for j in full])
    # without replacement where there are enough
    for d,j in zip(drawn, full): assert case['sizes'][j] <= case['s'][0] or len(d.unique()) == len(d)
    assert len(uniform_sample(assign, case['n'])) == case['n']

def test_a_cluster_of_just_as_many_is_drawn_with_replacement(): # the released sampler's <=
    drawn, = balanced_draws(torch.zeros(50, dtype=torch.int64), 49, generator(0, 'draws'))
    assert len(drawn) == 50 > len(drawn.unique())

def test_an_epoch_of_imagenet():
    n, k, s = SAMPLING['imagenet'].values()
    # log-normal sizes that vary as much as FACTS': √(e^¼ − 1) = .53
    weights = torch.randn(k, generator=generator(0, 'sizes')).div(2).exp()
    assign = torch.cat([torch.arange(k),
                        torch.multinomial(weights, n - k, True, generator=generator(0, 'assign'))])
    drawn, released = (torch.bincount(assign[f(assign, n)], minlength=k).double()
                       for f in (uniform_sample, released_sample))
    sizes, golden = torch.bincount(assign).double(), SAMPLING['spread']['uniform'][0]
    spread = lambda x: float(x.std() / x.mean())
    assert abs(spread(drawn)/golden - 1) < 5 / (2*k)**.5 and drawn.max() <= s[0]
    # the released one follows the sizes, FACTS section 3
    assert (torch.corrcoef(torch.stack([released, sizes]))[0, 1] > .96
            and abs(spread(released)/spread(sizes) - 1) < .1)

def test_an_epoch_of_cifar10():
    n, k, s = SAMPLING['cifar10'].values()
    drawn = balanced_draws(torch.arange(n) % k, n, generator(0, 'draws'))
    assert {len(d) for d in drawn} == {s[0]} and len(drawn) == k

def test_what_the_released_sampler_draws():
    golden, n = SAMPLING['released'], 6000
    assign, order = torch.tensor(golden['assign']), torch.tensor(golden['order'])
    idx = released_sample(assign, n)
    assert torch.equal(idx, order[uniform_sample(assign, n)])
    share = torch.bincount(assign[idx]) / n
    assert share.tolist() == pytest.approx([v for v,_ in golden['shares']], abs=5 * (1/6*5/6/n)**.5)

def test_loss_weights():
    golden = SAMPLING['weights']
    assign = labels_of(golden['sizes'])
    w = loss_weights(assign, len(golden['sizes']))
    assert close(w.tolist(), [v for v,_ in golden['values']]) and close(float(w[assign].sum()), len(assign))

@pytest.mark.parametrize('backend', ['plain', 'torch', 'faiss'])
@pytest.mark.parametrize('case', ['line', 'repair'])
def test_kmeans_by_hand(case, backend):
    golden = CLUSTERING[case]
    x, start = (torch.tensor(golden[n]).float()[:, None] for n in ('points', 'start'))
    niter = len(golden['objective']) - 1
    c = (lloyd(x, start, niter, repair_empty) if backend == 'plain' else
         kmeans(x, len(start), niter, init=start, backend=backend))
    assert (close(c.objective, [o for o,_ in golden['objective']], rel=1e-4, abs=1e-4)
            and close(c.centroids[:, 0].tolist(), golden['centroids']))
    if case == 'line': assert c.assign.tolist() == golden['assign']

def test_draws_of_faiss():
    golden = []
    for v in CLUSTERING['faiss']['doubles']:
        high, low = divmod(int(v * 2**53), 2**26)
        golden += [high/2**27, low/2**26]
    assert [d for d,_ in zip(faiss_draws(), golden)] == pytest.approx(golden, abs=2**-23)     # it has 24 bits

@pytest.mark.parametrize('case', CLUSTERING['faiss']['donors'], ids=lambda c: str(c['sizes']))
def test_donors_of_faiss(case):
    sizes = torch.tensor(case['sizes']).float()
    repair_empty(torch.rand(len(sizes), 2, generator=generator(0, 'donors')), sizes)
    assert sizes.tolist() == case['after']

def test_halves_of_faiss():
    golden = CLUSTERING['faiss']['halves']
    centroids, sizes = torch.tensor(golden['centroids']).float(), torch.tensor(golden['sizes']).float()
    repair_empty(centroids, sizes)
    assert centroids.tolist() == golden['moved'] and sizes.tolist() == golden['after']
    assert 1025/1024 - 1 == CLUSTERING['faiss']['step'][0]

def test_constants_of_pic():
    assert set(CLUSTERING['pic']['constants']) <= {p.default
                                                   for p in inspect.signature(pic).parameters.values()}

def test_a_point_that_is_alone_joins_the_nearest_that_is_not(): # neighbors: nearest first
    assign, neighbors = np.array([0, 0, 1, 1, 2, 3]), np.array([[1, 2, 3]]*4 + [[5, 2, 0], [3, 0, 1]])
    assert join_singletons(assign, neighbors).tolist() == [0, 0, 1, 1, 1, 1]

@pytest.mark.parametrize('case', CLUSTERING['nmi'], ids=lambda c: f"{c['a']} {c['b']}")
def test_scores_by_hand(case):
    a, b = torch.tensor(case['a']), torch.tensor(case['b'])
    assert (close([nmi(a, b), nmi(b, a)], [case['nmi'][0]]*2)
            and close([ami(a, b), ami(b, a)], [case['ami'][0]]*2))

def floor_by_formula(n, k): # see `how` in clustering.yaml
    m, p, series = n/k**2, math.exp(-n/k**2), 0.
    for j in range(1, 200):
        p *= m/j                                                                # Poisson: P(j) = P(j − 1)·m/j
        series += p*j*math.log(j)
    ha, hab = math.log(k) - (k - 1)/(2*n), math.log(n) - series/m
    return (2*ha - hab) / ha

@pytest.mark.parametrize('case', CLUSTERING['chance_floor']['floors'], ids=lambda c: f"{c['n']} in {c['k']}")
def test_floor_of_chance(case):
    n, k = case['n'], case['k']
    # standard deviation where cells are full: a χ² with (k − 1)² degrees of freedom, over 2N ln k
    noise = 2**.5*(k - 1) / (2*n*math.log(k))
    assert abs(floor_by_formula(n, k) - case['nmi']) < 5*noise + .0005              # FACTS' figure is rounded
    a, b = (torch.randint(k, (n,), generator=generator(0, which)) for which in 'ab')
    assert (abs(nmi(a, b) - floor_by_formula(n, k)) < 5*noise + .0005
            and abs(chance_nmi(a, b) - floor_by_formula(n, k)) < 5*noise + .0005)
