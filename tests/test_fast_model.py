"The plain networks and their twins: the same parameters, the same results, and who uses which."
import copy
import pytest, torch
from torch import nn
from deepcluster_nb.fast.crops import center_crop
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.fast import small_maps
from deepcluster_nb.fast.small_maps import AdaptiveMaxPool2d, Conv2d, with_fast_layers
from deepcluster_nb.fast.features import autocast, fold_batchnorm
from deepcluster_nb.model import ARCHS, calibrate_bn, convnet
from deepcluster_nb.sobel import normalize
from deepcluster_nb.fit import Config, network

FAST = Conv2d, AdaptiveMaxPool2d
EXCHANGED = dict(alexnet=[8, 11, 14], alexnet_small=[4, 8, 11, 14, 17],
                 vgg16=[0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40], resnet18=[], resnet50=[])

def fast(net): return [n for n,m in net.named_modules() if isinstance(m, FAST)]
def images(n=16): return torch.randn(n, 3, 32, 32, generator=generator(0, 'images'))

@pytest.mark.parametrize('arch', ARCHS)
def test_which_layers_are_exchanged(arch):
    with torch.device('meta'): net = convnet(arch, 5)
    assert fast(net) == []                                                  # the core builds PyTorch's own
    tensors, kinds = net.state_dict(keep_vars=True), [type(m) for m in net.modules()]
    names, printed = [n for n,_ in net.named_modules()], str(net)
    assert with_fast_layers(net) is net and fast(net) == [f'features.{i}' for i in EXCHANGED[arch]]
    assert with_fast_layers(net) is net and fast(net) == [f'features.{i}' for i in EXCHANGED[arch]]
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(tensors) and all(after[n] is t for n,t in tensors.items())
    assert [n for n,_ in net.named_modules()] == names and str(net) == printed
    if not EXCHANGED[arch]: assert [type(m) for m in net.modules()] == kinds

def test_everything_else_stays():
    net = convnet('alexnet_small', 5, dropout=0.).to(memory_format=torch.channels_last).eval()
    net.features[8].train()
    net.features[11].weight.data = net.features[11].weight.data.double()
    seen, opt = [], torch.optim.SGD(net.parameters(), .1)
    net.features[4].register_forward_hook(lambda *_: seen.append(1))
    modes = [m.training for m in net.modules()]
    with_fast_layers(net)
    assert [m.training for m in net.modules()] == modes and net.features[11].weight.dtype == torch.float64
    assert net.features[4].weight.is_contiguous(memory_format=torch.channels_last)
    net.features[11].float()
    net.eval().embed(images(2))
    assert seen == [1]
    assert [id(p) for p in opt.param_groups[0]['params']] == [id(p) for p in net.parameters()]

def test_what_can_not_gain_stays():
    frozen = convnet('alexnet_small', 5).requires_grad_(False)
    assert fast(with_fast_layers(frozen)) == ['features.17']                 # the pool has no weights
    class Mine(nn.Conv2d): pass
    net = nn.Sequential(Mine(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, bias=False),
                        nn.Conv2d(2, 2, 5, padding=2), nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3),
                        nn.Conv2d(2, 2, 3, padding=1, padding_mode='circular'), nn.AdaptiveAvgPool2d(4))
    assert fast(with_fast_layers(net)) == []
    assert type(with_fast_layers(nn.Conv2d(2, 2, 3, padding=1))) is Conv2d   # a layer alone is a network too

@pytest.mark.parametrize('size', [32, 48, 64])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_results_are_the_plain_ones(size, dtype, monkeypatch):
    monkeypatch.setattr(small_maps, 'TILES', True)
    plain = convnet('alexnet_small', 5, dropout=0.).to(memory_format=torch.channels_last)
    twin  = with_fast_layers(copy.deepcopy(plain))
    x = torch.randn(8, 3, size, size, generator=generator(0, 'x'))
    x = x.contiguous(memory_format=torch.channels_last)
    def run(net):
        with autocast(dtype, 'cpu'): y = net(x)
        trained = [p for p in net.parameters() if p.requires_grad]
        return y, torch.autograd.grad(y.float().pow(2).sum(), trained)
    (y, g), (z, h) = run(plain), run(twin)
    assert torch.equal(y, z)                                                # forward passes always
    if dtype == 'float32': assert all(map(torch.equal, g, h))
    else: # the products round as often, in another order; bfloat16 keeps eight bits
        for a, b in zip(g, h): assert float((a - b).norm()) <= .1*float(a.norm()) + 1e-3
    plain.eval(), twin.eval()
    with torch.inference_mode(): assert torch.equal(plain.embed(x), twin.embed(x))
    folded = fold_batchnorm(twin)
    torch.testing.assert_close(folded.embed(x), twin.embed(x), rtol=1e-3, atol=1e-4)

def test_who_trains_uses_the_twin():
    from deepcluster_nb.voc import transfer_net
    c = Config(arch='alexnet_small', size=32, k=5, device='cpu', precision='float32')
    plain = convnet('alexnet_small', 5).eval()
    assert len(fast(network(c))) == len(fast(transfer_net(plain, 3, 'all'))) == 5 and fast(plain) == []

def test_calibration_by_the_books_words():
    "The average of each batch's statistics, layer by layer, in plain terms; float32 rounding apart."
    digits, net = load_images('digits', n_images=96), convnet('alexnet_small', 5, dropout=.5, seed=2)
    state = torch.get_rng_state()
    twin = with_fast_layers(copy.deepcopy(net))
    calibrate_bn(net, digits, 32, 48); calibrate_bn(twin, digits, 32, 48)
    assert torch.equal(torch.get_rng_state(), state) and net.training       # no dropout was drawn
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))
    fresh, means = convnet('alexnet_small', 5, dropout=0., seed=2), []
    for idx in torch.arange(96).split(48):
        x = fresh.sobel(normalize(center_crop(digits.batch(idx), 32)))
        with torch.no_grad():
            means.append([])
            for m in fresh.features:
                if isinstance(m, nn.BatchNorm2d): means[-1].append(x.mean((0, 2, 3)))
                x = m(x)
    found = [m.running_mean for m in net.features if isinstance(m, nn.BatchNorm2d)]
    for got, *each in zip(found, *means):
        torch.testing.assert_close(got, torch.stack(each).mean(0), rtol=1e-4, atol=1e-4)

def test_calibration_takes_lists_and_rgb():
    shapes = load_images('shapes', n_images=6)
    class Listed: # the least that images must be
        def __len__(self): return 6
        def batch(self, idx): return [shapes.batch(i[None])[0] for i in idx]
    a, b = (convnet('alexnet_small', 5, sobel=False) for _ in range(2))
    calibrate_bn(a, Listed(), 32); calibrate_bn(b, shapes, 32)
    for n,t in a.state_dict().items(): torch.testing.assert_close(t, b.state_dict()[n])
