("Against the released code: malformed checkpoints, the central crop, gradient ascent and PIC, "
 "each value worked out beside the kit.")
import json, math, os
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch, yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from torch import nn
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf
from deepcluster_nb import pictures
from deepcluster_nb.switches import CENTER_BOXES, torchvision_center, with_switches
from deepcluster_nb.fast.crops import center_crop
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.data import generator
from deepcluster_nb.fast.features import center_input, compute_features
from deepcluster_nb.features import l2_normalize
from deepcluster_nb.model import convnet
from deepcluster_nb.pic import neighbor_graph, pic, power_iteration
from deepcluster_nb.released import load_released, released_state, tensors_sha256
from deepcluster_nb.pic import by_pic, by_released_pic
from deepcluster_nb.fit import Config, fit, load_run, predict, resolve
from test_released import authors_state, write

# -------------------------------------------------- load_released: one error for each kind of file

def with_(**tensors): return lambda s: s | {n.replace('__', '.'): t for n,t in tensors.items()}
def put(name, at, value): # one number of one tensor, which gets numbers of its own
    def change(s):
        t = s[name].clone(memory_format=torch.contiguous_format)
        t.view(-1)[at] = value
        return s | {name: t}
    return change
def of(name, f): return lambda s: s | {name: f(s[name])}
def trained_sobel(s): return s | {'sobel.0.weight': torch.tensor([.3, .6, .1]).view(1, 3, 1, 1)}

MALFORMED = {                    # what is done to the authors' tensors, and what load_released says of it
    'sparse head': (of('top_layer.weight', torch.Tensor.to_sparse),
                    'has top_layer.weight of layout torch.sparse_coo, expected dense numbers'),
    'sparse rows': (of('classifier.4.bias', lambda t: t[None].to_sparse_csr()),
                    'has classifier.4.bias of layout torch.sparse_csr, expected dense numbers'),
    'no numbers': (of('top_layer.weight', lambda t: t.to('meta')),
                   'has top_layer.weight on the device meta, expected its numbers'),
    'a head of 164 GB': (lambda s: s | {'top_layer.bias': s['top_layer.bias'][:1].expand(10_000_000),
                                        'top_layer.weight': s['top_layer.weight'][:1].expand(10_000_000, -1)},
                         r'with strides \(0,.*one number stands for many'),
    'a head of 41 GB in rows one number apart': (
        lambda s: s | {'top_layer.bias': torch.zeros(2_500_000),
                       'top_layer.weight': torch.zeros(2_504_095).as_strided((2_500_000, 4096), (1, 1))},
        r'has top_layer.weight of shape \(2500000, 4096\), 10,240,000,000 numbers, but holds 2,504,095'),
    'one number as a layer': (of('classifier.1.weight', lambda t: torch.zeros(1).expand_as(t)),
                              r'classifier.1.weight of shape \(4096, 9216\) with strides \(0, 0\)'),
    'NaN': (put('classifier.1.bias', 7, math.nan),
            'has classifier.1.bias with 1 NaN or infinite of 4,096 numbers'),
    'infinite': (put('features.0.bias', 0, -math.inf), 'has features.0.bias with 1 NaN or infinite of 96'),
    'too large for float32': (of('top_layer.bias', lambda t: torch.full_like(t, 1e300, dtype=torch.float64)),
                              'has top_layer.bias with 3 NaN or infinite of 3 numbers'),
    'negative variance': (put('features.5.running_var', 3, -.25),
                          'has features.5.running_var with a variance below zero, -0.25'),
    'another grey': (trained_sobel, 'has sobel.0.weight unlike the fixed filters of chapter 02, by 0.267'),
    'Sobel turned': (of('sobel.1.weight', lambda t: t.flip(0)), 'has sobel.1.weight unlike the fixed'),
    'Sobel with a bias': (of('sobel.1.bias', lambda t: t + 1), 'has sobel.1.bias unlike .* by 1'),
    'names that collide': (lambda s: s | {'features.module.4.bias': torch.zeros(256)},
                           "has features.4.bias twice, as 'features.4.bias' and 'features.module.4.bias'"),
    'integers': (of('classifier.4.bias', torch.Tensor.long), 'has classifier.4.bias of type torch.int64')}

@pytest.mark.parametrize('kind', MALFORMED)
def test_a_malformed_checkpoint_is_one_error(tmp_path, kind):
    change, message = MALFORMED[kind]
    path = write(tmp_path/'c.pth.tar', change(authors_state('alexnet')), prefix='features.')
    with pytest.raises(ValueError, match=f"path: '.*c.pth.tar' .*{message}"): load_released(path)
    assert [p.name for p in tmp_path.iterdir()] == ['c.pth.tar']                 # nothing is left beside it

def test_nothing_is_allocated_for_a_head_that_is_not_there(): # numbers on the CPU beyond those of the file
    state = authors_state('alexnet')
    for kind in ('a head of 164 GB', 'a head of 41 GB in rows one number apart', 'sparse head'):
        saved = dict(arch='alexnet', state_dict=MALFORMED[kind][0](state))
        with torch.autograd.profiler.profile(profile_memory=True) as seen, pytest.raises(ValueError):
            released_state(saved, 'x')
        assert sum(max(0, e.cpu_memory_usage) for e in seen.function_events) < 1_000_000

def test_what_is_no_fault_still_loads(tmp_path): # parameters, halves, variances of zero, no Sobel
    state = authors_state('alexnet', sobel=False)
    state['features.0.weight'] = nn.Parameter(state['features.0.weight'])
    state['top_layer.weight'] = state['top_layer.weight'].half()
    state['features.1.running_var'] = torch.zeros(96)
    net = load_released(write(tmp_path/'c.pth.tar', state))
    assert net.sobel is None and torch.equal(net.features[0].weight, state['features.0.weight'])
    assert torch.equal(net.top_layer.weight, state['top_layer.weight'].float())

@pytest.mark.parametrize('name, value, message', [
    ('features.1.running_var', -1., 'a variance below zero'),
    ('top_layer.bias', math.nan, 'NaN or infinite'),
    ('sobel.0.bias', 1., 'unlike the fixed filters')])
def test_a_converted_file_is_checked_too(tmp_path, name, value, message): # its checksum may be right
    path = write(tmp_path/'c.pth.tar', authors_state('alexnet'))
    load_released(path)
    out = tmp_path/'c.pth.tar.safetensors'
    state = load_file(out)
    state[name] = torch.full_like(state[name], value)
    about = dict(arch='alexnet', k=3, sobel=True, epoch=1, sha256='0'*64, tensors=tensors_sha256(state))
    save_file(state, out, dict(released=json.dumps(about)))
    with pytest.raises(ValueError, match=message): load_released(out)
    load_released(path)                                        # beside its original: made again
    for broken in ({}, dict(about, tensors=None), [1]):
        save_file(state, tmp_path/'other.safetensors', dict(released=json.dumps(broken)))
        with pytest.raises(ValueError, match='no whole file of load_released|is damaged'):
            load_released(tmp_path/'other.safetensors')

# ---------------------------------------------------------------- the clustering view

def recipe(image, size=224): # what the released code's transforms make of an image
    pil = tv.Compose([tv.Resize(round(size * 8/7)), tv.CenterCrop(size)])(tvf.to_pil_image(image))
    return tvf.pil_to_tensor(pil).float()

def photograph(h, w, seed=0): # smooth and sharp parts
    g = np.random.default_rng([h, w, seed])
    x = gaussian_filter(g.normal(size=(3, h, w)), (0, 3, 3)) * 600 + g.normal(0, 25, (3, h, w)) + 128
    return torch.from_numpy(x.clip(0, 255).astype(np.uint8))

SHAPES = [(375, 500), (500, 375), (333, 500), (427, 640), (256, 256), (256, 257), (257, 256), (224, 224),
          (300, 301), (150, 100), (90, 700), (1000, 257), (281, 500)]

@pytest.mark.parametrize('h, w', SHAPES)
def test_torchvisions_box_is_torchvisions_view(h, w):
    im = photograph(h, w)
    for size in (224, 96):
        ours = center_crop([im], size, 'torchvision')[0]
        assert (ours.round() - recipe(im, size)).abs().max() <= 1
        # float32 places a pixel near 1,000 to 6e-5, and two neighbors differ by 255 at most
        assert (ours - center_crop(im[None], size, 'torchvision')[0]).abs().max() <= 6e-5 * 255

def test_the_exact_box_differs_where_torchvision_rounds():
    far = {hw: float((center_crop([im := photograph(*hw)], 224)[0].round() - recipe(im)).abs().max())
           for hw in ((400, 600), (375, 500))}
    assert far[400, 600] <= 1 and far[375, 500] > 10

def test_torchvisions_box_by_hand():
    # 500 × 375 → 341 × 256, cut from (58, 16), for Python rounds 58.5 to the even number
    box, = torchvision_center(torch.tensor([[375, 500]]), 224).tolist()
    expected = [58 * 500/341, 16 * 375/256, 224 * 500/341, 224 * 375/256]
    assert box == pytest.approx(expected, abs=1e-3)

def test_the_box_is_the_runs_in_all_that_sees_its_crops(tmp_path, monkeypatch):
    images = PackedImages(torch.stack([photograph(36, 50, s) for s in range(24)]))
    a, b = (with_switches(convnet('alexnet_small', 4, dropout=0.), center_box=box) for box in CENTER_BOXES)
    views = [center_input(net, images.batch(torch.arange(24)), 32) for net in (a, b)]
    assert (views[0] - views[1]).abs().mean() > .05
    images.center = PackedImages(center_crop(images.batch(torch.arange(24)), 32).round().byte())
    monkeypatch.setattr(images.center, 'batch', lambda *_, **__: pytest.fail('the exact crops were read'))
    assert torch.allclose(compute_features(b, images, 32), b.eval().embed(views[1]).detach(), atol=1e-4)
    images.center = None
    c = Config(size=32, k=4, pca=4, epochs=1, passes=1, batch_size=8, precision='float32', device='cpu',
               center_box='torchvision', run_dir=str(tmp_path/'r'))
    run = fit(c, images, echo=None)
    again = load_run(tmp_path/'r')
    assert run.net.center_box == again.net.center_box == 'torchvision'
    assert torch.equal(predict(run, images), predict(again, images))
    with pytest.raises(ValueError, match="center_box: 'torchvision' there, 'exact' now"):
        fit(replace(c, center_box='exact'), images, echo=None)

def test_impossible_boxes():
    with pytest.raises(ValueError, match="center_box: expected one of exact, torchvision, got 'pillow'"):
        resolve(Config(center_box='pillow'))
    with pytest.raises(ValueError, match="box: expected one of exact, torchvision, got 'pillow'"):
        center_crop(torch.zeros(1, 3, 40, 40), 32, 'pillow')

PRESETS = Path(__file__).parent.parent/'nbs'/'experiments'/'presets'

def test_released_has_torchvisions_box_and_lists_what_has_no_switch():
    text = (PRESETS/'released.yaml').read_text()
    assert yaml.safe_load(text)['center_box'] == 'torchvision' and Config().center_box == 'exact'
    for f in PRESETS.glob('*.yaml'):
        if f.name != 'released.yaml': assert 'torchvision' not in yaml.safe_load(f.read_text()).values()
    above = text[:text.index('\ndataset:')]
    assert all(what in above for what in ('float16', 'last image alone', 'ten test crops'))

@pytest.mark.skipif(not Path(os.environ.get('DEEPCLUSTER_DATA', 'nowhere'), 'imagenette').is_dir(),
                    reason='DEEPCLUSTER_DATA has no imagenette')
def test_real_photographs(): # 224 × 168 and views of 98 pixels: the shape and the rounding of 500 × 375
    root = Path(os.environ['DEEPCLUSTER_DATA'])/'imagenette'
    files = sorted(f for f in root.rglob('*') if f.suffix.lower() in ('.jpeg', '.jpg', '.png'))[::80]
    images = [tvf.pil_to_tensor(Image.open(f).convert('RGB'))[:, 28:196] for f in files]
    theirs = torch.stack([recipe(im, 98) for im in images])
    ours, exact = center_crop(images, 98, 'torchvision'), center_crop(images, 98)
    assert (ours.round() - theirs).abs().max() <= 1
    assert 2 < (exact - theirs).abs().mean() < 10 and .3 < ((exact - theirs).abs() > 2).float().mean() < .8

# ---------------------------------------------------------------- gradient ascent

@pytest.fixture(scope='module')
def small(): return convnet('alexnet_small', 5, dropout=0., seed=1).double().eval()

def ascend(net, layer, channel, x, steps, lr=3., lam=1e-5, sigma=.3):
    # one image, as the script is described
    convs = [i for i,m in enumerate(net.features) if isinstance(m, nn.Conv2d)]
    at = convs[int(layer[4:]) - 1]
    for step in range(steps):
        z = x.clone().requires_grad_()
        conv = net.features[:at + 1](net.sobel(z))
        a = net.features[at + 1:at + 3](conv)                                # batch norm, ReLU
        assert isinstance(net.features[at + 2], nn.ReLU)
        if not a[0, channel].any(): a = conv
        (a.mean((2, 3)).log_softmax(1)[0, channel] - lam * (z**2).sum()).backward()
        x = x + lr * z.grad / z.grad.norm()
        if step % 5 == 0:
            x = torch.stack([torch.from_numpy(gaussian_filter(p.numpy(), sigma)) for p in x[0]])[None]
    return x

def released(net, layer, channels, **more): # in double, for many steps
    torch.set_default_dtype(torch.float64)
    try: return pictures.gradient_ascent(net, layer, channels, 32, **pictures.RELEASED | more)
    finally: torch.set_default_dtype(torch.float32)

def test_the_released_start_is_noise_of_128_and_20_in_three_colors(small):
    x = released(small, 'conv2', [0, 3], steps=0)
    assert x.shape == (2, 3, 32, 32) and abs(x.mean() - 128) < 1 and abs(x.std() - 20) < 1
    assert abs(torch.corrcoef(x.transpose(0, 1).flatten(1)) - torch.eye(3)).max() < .1

@pytest.mark.parametrize('lr', [3., 30.])
@pytest.mark.parametrize('decay', [0., 1e-5, 1.])
def test_every_released_step_has_the_length_of_the_rate(small, lr, decay):
    x = [released(small, 'conv2', [0, 3], steps=n, lr=lr, decay=decay, blur=0) for n in range(4)]
    for a,b in zip(x, x[1:]):
        assert torch.allclose((b - a).flatten(1).norm(dim=1), torch.tensor(lr, dtype=torch.float64))

def test_released_decay_turns_the_step(small): # alone it is toward zero
    x, y = (released(small, 'conv2', [0], steps=n, decay=1e6, blur=0) for n in (0, 1))
    assert torch.allclose(y - x, -3 * x / x.norm(), atol=1e-5)

@pytest.mark.parametrize('layer', ['conv1', 'conv3'])
def test_released_ascent_is_that_of_the_script(small, layer):
    x = released(small, layer, [2, 7], steps=0)
    found = released(small, layer, [2, 7], steps=12)
    expected = torch.cat([ascend(small, layer, c, x[i:i+1], 12) for i,c in enumerate((2, 7))])
    assert torch.allclose(found, expected, rtol=0, atol=1e-6) and (found - x).abs().max() > .05

def test_a_silent_channel_is_scored_before_batch_norm():
    net = convnet('alexnet_small', 5, dropout=0., seed=1).double().eval()
    bn = [m for m in net.features if isinstance(m, nn.BatchNorm2d)][1]
    bn.bias.data[3] = -1e6                                     # its ReLU lets nothing through
    x = released(net, 'conv2', [3, 4], steps=0)
    found = released(net, 'conv2', [3, 4], steps=3)
    expected = torch.cat([ascend(net, 'conv2', c, x[i:i+1], 3) for i,c in enumerate((3, 4))])
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert ((found - x).flatten(1).norm(dim=1) > 1).all()

def test_our_own_ascent_is_what_it_was(small): # steps of root mean square lr, decay outside
    a, b = (pictures.gradient_ascent(small.float(), 'conv2', [1], 32, steps=n, blur=0, jitter=0)
            for n in (0, 1))
    small.double()
    assert (b - .99*a).pow(2).mean().sqrt() == pytest.approx(.1, rel=1e-4)

# ---------------------------------------------------------------- PIC where points are there several times

def pic_by_the_definition(x, neighbors=5, sigma=.2, alpha=.001):
    # dense loops; the first that is found is dropped
    d = torch.cdist(x.double(), x.double()).pow(2)
    d[d < 1e-9] = 0                                                              # twins are twins
    order = d.argsort(dim=1, stable=True)[:, :neighbors + 1]
    n, w = len(x), np.zeros((len(x), len(x)))
    for i in range(n):
        for j in order[i, 1:].tolist(): w[i, j] = math.exp(-float(d[i, j]) / sigma**2)
    w = w + w.T
    v = np.full(n, 1/n)
    for _ in range(200): v = (u := alpha * w @ v + (1 - alpha)/n) / u.sum()
    up = list(range(n))
    for i in range(n):
        gains = [w[i, j] * (v[j] - v[i]) for j in range(n)]
        if max(gains) > 0: up[i] = gains.index(max(gains))
    def top(i): return i if up[i] == i else top(up[i])
    summit = [top(i) for i in range(n)]
    out = list(summit)
    for i in range(n):
        if summit.count(summit[i]) == 1:
            out[i] = next((summit[j] for j in order[i, 1:].tolist() if summit.count(summit[j]) > 1),
                          summit[i])
    return out

def copies(points, n, d=16): return l2_normalize(torch.randn(points, d, generator=generator(0, 'copies'))
                                                 ).repeat_interleave(n, 0)

@pytest.mark.parametrize('points, n, there, here', [(50, 6, 50, 300), (20, 6, 20, 120), (30, 7, 30, None)])
def test_pic_on_duplicates(points, n, there, here):
    x = copies(points, n)
    a = by_released_pic(x, None, 0).assign
    assert len(a.unique()) == there and (a.view(points, n) == a.view(points, n)[:, :1]).all()
    if here: assert len(by_pic(x, None, 0).assign.unique()) == here

def test_pic_released_keeps_the_loops_that_its_deletion_leaves():
    w, found = neighbor_graph(copies(8, 6), first=True)
    ids = np.arange(48)
    assert ((found == ids[:, None]).any(1) == (w.diagonal() > 0)).all() and (w.diagonal() > 0).sum() == 8*5
    w, found = neighbor_graph(copies(8, 6))
    assert not (found == ids[:, None]).any() and not w.diagonal().any()

@pytest.mark.parametrize('x', [copies(50, 6), copies(12, 6), copies(40, 1, 4)],
                         ids=['50 × 6', '12 × 6', 'single'])
def test_pic_released_is_the_definitions(x):
    a, b = pic(x, flow=power_iteration, first=True).assign, torch.tensor(pic_by_the_definition(x))
    assert torch.equal(a[:, None] == a, b[:, None] == b)

def test_without_duplicates_nothing_is_changed():
    x = l2_normalize(torch.randn(300, 16, generator=generator(1, 'single')))
    assert torch.equal(pic(x, flow=power_iteration).assign, pic(x, flow=power_iteration, first=True).assign)
