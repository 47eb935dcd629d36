"The faster gradient is the same gradient, and is taken only where it was measured to pay."
import copy, math
import pytest, torch
from torch import nn
from deepcluster_nb.fast import small_maps
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.fast.features import autocast, fold_batchnorm
from deepcluster_nb.model import convnet
from deepcluster_nb.fast.feeding import same_bits, seconds
from deepcluster_nb.fast.small_maps import (AdaptiveMaxPool2d, Blocks, Conv2d, PatchGradient, block_conv,
                                            few_planes, with_fast_layers)
from deepcluster_nb.fit import Config, fit

def rand(*shape, scale=1., dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=generator(0, 'rand', *shape))).to(dtype)

@pytest.fixture(params=[False, True], ids=['no tiles', 'tiles'])
def tiles(request, monkeypatch): monkeypatch.setattr(small_maps, 'TILES', request.param); return request.param

def way(y): return y.grad_fn.name()                                              # how autograd will go back
def conv(*args, **kwargs):
    layer = Conv2d(*args, **kwargs)
    with torch.no_grad():
        layer.weight.copy_(rand(*layer.weight.shape, scale=.05))
        layer.bias.copy_(rand(len(layer.bias)))
    return layer

@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (2, 3, 1, 6), (3, 16, 4, 4), (2, 5, 6, 3), (64, 192, 4, 4)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_convolutions(shape, layout):
    x, w, b = (rand(*shape).contiguous(memory_format=layout),
               rand(24, shape[1], 3, 3, scale=.05).contiguous(memory_format=layout), rand(24))
    g = rand(shape[0], 24, *shape[2:])
    def both(f, dtype):
        args = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = f(*args)
        return y, *torch.autograd.grad(y, args, g.to(dtype))
    plain = lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1)
    for ours, theirs in zip(both(PatchGradient.apply, torch.float64), both(plain, torch.float64)):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs, exact in zip(both(PatchGradient.apply, torch.bfloat16), both(plain, torch.bfloat16),
                                   both(plain, torch.float64)):
        error = lambda t: float((t.detach() - exact.detach()).norm())
        assert error(ours) <= 1.1*error(theirs) + 1e-3*float(exact.detach().norm())       # rounded as often

def test_only_where_it_pays(tiles):
    small, large = rand(2, 8, 6, 6), rand(2, 8, 7, 6)
    layer = conv(8, 8, 3, 1, 1)
    with torch.autocast('cpu', torch.bfloat16):
        assert way(layer(small)).startswith('PatchGradient') == tiles
        assert way(layer(large)).startswith('Convolution')
        for other in (dict(padding=0), dict(stride=2), dict(kernel_size=5), dict(kernel_size=(3, 1)),
                      dict(dilation=2), dict(groups=2), dict(padding_mode='circular'), dict(bias=False)):
            kind = dict(kernel_size=3, padding=1) | other
            ours, theirs = Conv2d(8, 8, **kind), nn.Conv2d(8, 8, **kind)
            theirs.load_state_dict(ours.state_dict())
            assert not ours.pays(small) and torch.equal(ours(small), theirs(small))
        assert not layer.pays(small[0]) and layer(small[0]).shape == (8, 6, 6)
        assert layer.double()(small.double()).dtype == torch.float64
        layer.float()
        with torch.no_grad(): assert not layer.pays(small)
        frozen = copy.deepcopy(layer).requires_grad_(False)
        assert way(frozen(small.clone().requires_grad_())).startswith('Convolution')
    assert way(layer(small)).startswith('Convolution')                           # float32

def test_forwards_the_bits_are_the_same(monkeypatch):
    net, x = with_fast_layers(convnet('alexnet_small', 5, dropout=0.)), rand(8, 3, 32, 32)
    def out(tiles):
        monkeypatch.setattr(small_maps, 'TILES', tiles)
        with autocast('bfloat16', 'cpu'): return net(x)
    assert torch.equal(out(True), out(False))

def test_a_pass_learns_the_same(monkeypatch): # a second clustering would multiply what is rounded otherwise
    images, c = (load_images('shapes', n_images=200),
                 Config(arch='alexnet_small', size=32, k=5, pca=8, epochs=1, passes=3, batch_size=25, lr=.01,
                        precision='bfloat16', device='cpu'))
    # slow without, but the same
    monkeypatch.setattr('deepcluster_nb.fit.has_bfloat16', lambda device: True)
    def loss(tiles):
        monkeypatch.setattr(small_maps, 'TILES', tiles)
        return fit(c, images, echo=None).log[0]['loss']
    assert loss(True) == pytest.approx(loss(False), abs=.02) and loss(True) < math.log(5) - .1

def test_state_is_pytorchs():
    assert (list(conv(2, 3, 3).state_dict()) == ['weight', 'bias']
            and not list(AdaptiveMaxPool2d(4).state_dict()))

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('sides', [(4, 4), (4, 5), (8, 8), (16, 7), (12, 16)])
def test_pool_is_pytorchs(sides, dtype, layout): # to the bit
    outs = []                                    # many are equally large, as behind a ReLU
    for pool in (AdaptiveMaxPool2d(4), nn.AdaptiveMaxPool2d(4)):
        x = rand(2, 3, *sides).round().relu().to(dtype).contiguous(memory_format=layout).requires_grad_()
        y = pool(x)
        assert (y is x) == (sides == (4, 4) and isinstance(pool, AdaptiveMaxPool2d))
        outs.append((y, torch.autograd.grad(y, x, rand(*y.shape).to(dtype))[0]))
    assert all(map(torch.equal, *outs))
    assert outs[0][0].stride() == outs[1][0].stride()

def test_pool_of_other_kinds_is_pytorchs():
    x = rand(2, 3, 8, 8)
    for size in ((2, 4), (None, 4), 1):
        assert torch.equal(AdaptiveMaxPool2d(size)(x), nn.AdaptiveMaxPool2d(size)(x))
    assert len(AdaptiveMaxPool2d(4, return_indices=True)(x)) == 2

GEOMETRY = dict(alexnet=(2, 224, 224, 96, 11, 4, 2), smallest=(2, 223, 223, 8, 11, 4, 2),
                largest=(3, 254, 249, 8, 11, 4, 2), resnet=(3, 64, 61, 8, 7, 2, 3),
                no_padding=(1, 31, 20, 4, 5, 4, 0),
                whole_blocks=(4, 16, 24, 4, 8, 4, 3), unreached=(2, 19, 23, 4, 4, 4, 0))

@pytest.mark.parametrize('planes, h, w, width, kernel, stride, padding', GEOMETRY.values(), ids=GEOMETRY)
@pytest.mark.parametrize('bias', [False, True])
def test_blocks_are_the_convolution(planes, h, w, width, kernel, stride, padding, bias):
    given = [rand(2, planes, h, w), rand(width, planes, kernel, kernel), rand(width) if bias else None]
    def both(f): # output and gradients
        args = [t if t is None else t.double().requires_grad_() for t in given]
        y = f(*args, stride, padding)
        return y, *torch.autograd.grad((y*y).mean(), [t for t in args if t is not None])
    for ours, theirs in zip(both(block_conv), both(nn.functional.conv2d)):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()

def test_blocks_are_for_few_planes_and_long_strides():
    alexnet = dict(kernel_size=11, stride=4, padding=2)
    assert few_planes(nn.Conv2d(2, 8, **alexnet)) and few_planes(nn.Conv2d(3, 8, **alexnet, bias=False))
    for other in (dict(stride=2), dict(stride=(4, 2)), dict(kernel_size=(11, 3)), dict(padding=(2, 1)),
                  dict(padding='valid'), dict(dilation=2), dict(groups=2), dict(padding_mode='replicate')):
        assert not few_planes(nn.Conv2d(2, 8, **alexnet | other))
    assert not few_planes(nn.Conv2d(5, 8, **alexnet))
    for arch in ('alexnet_small', 'vgg16', 'resnet18'):
        assert not [m for m in with_fast_layers(convnet(arch, 5)).modules() if isinstance(m, Blocks)]

def alexnets(): # plain, and with all that is exchanged
    nets = [convnet('alexnet', 5, dropout=0.) for _ in range(2)]
    with_fast_layers(nets[1])
    return [net.to(memory_format=torch.channels_last) for net in nets]

def test_a_cpu_convolves_as_ever_and_the_state_is_the_same():
    (plain, twin), x = alexnets(), rand(2, 1, 224, 224)
    assert type(twin.features[0]) is Blocks and torch.equal(plain(x), twin(x))
    a, b = ([(k, v.shape) for k,v in net.state_dict().items()] for net in (plain, twin))
    assert a == b
    plain.load_state_dict(twin.state_dict())
    folded = fold_batchnorm(twin.eval())
    assert type(folded.features[0]) is Blocks and folded.features[0].weight.shape == (96, 2, 11, 11)

def gradients(net, x): return torch.autograd.grad(net(x).pow(2).mean(), net.features[0].weight)[0]

def test_a_network_over_blocks_learns_the_same(monkeypatch): # the way of a GPU, on the CPU
    (plain, twin), x = [net.double() for net in alexnets()], rand(2, 1, 224, 224).double()
    monkeypatch.setattr(Blocks, 'pays', lambda self, x: True)
    a, b = gradients(plain, x), gradients(twin, x)
    assert 0 < (a - b).abs().max() <= 1e-10 * a.abs().max()               # twelve layers lie behind

@pytest.mark.parametrize('arch, size', [('alexnet', 224), ('alexnet_small', 64)])
def test_one_layout_from_sobel_to_the_classifier(monkeypatch, arch, size): # nothing is converted on the way
    monkeypatch.setattr(Blocks, 'pays', lambda self, x: True)
    net, seen = with_fast_layers(convnet(arch, 5)).to(memory_format=torch.channels_last), []
    def look(m, given, out):
        if out.ndim == 4: seen.append((type(m), out.is_contiguous(memory_format=torch.channels_last)))
    for m in net.modules():
        if not list(m.children()): m.register_forward_hook(look)
    with autocast('bfloat16', 'cpu'):
        net.eval()(rand(2, 1, size, size).contiguous(memory_format=torch.channels_last))
    assert len(seen) > 15 and all(last for _,last in seen), seen

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_gpu_over_blocks():
    same_bits()
    (plain, twin), x = [net.cuda() for net in alexnets()], rand(64, 1, 224, 224).cuda()
    torch.testing.assert_close(twin.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)
    exact = gradients(plain.double(), x.double())
    a, b = (float((gradients(net.float(), x) - exact).norm()) for net in (plain, twin))
    assert b <= 1.1*a + 1e-5*float(exact.norm())
    maps = plain.sobel(x).bfloat16().contiguous(memory_format=torch.channels_last)
    def median(conv): # forward and backward
        conv = conv.bfloat16()
        def once(): torch.autograd.grad(conv(maps).float().sum(), conv.weight)
        return sorted((once(), seconds(once, 'cuda'))[1] for _ in range(11))[5]
    assert median(twin.features[0]) < median(plain.features[0])

def test_compiled_too(monkeypatch):
    monkeypatch.setattr(small_maps, 'TILES', True)
    torch.compiler.reset()
    layer, x = conv(8, 8, 3, 1, 1), rand(2, 8, 4, 4)
    def gradient(f):
        with torch.autocast('cpu', torch.bfloat16): assert layer.pays(x); y = f(x)
        return torch.autograd.grad(y.float().pow(2).sum(), layer.weight)[0]
    torch.testing.assert_close(gradient(torch.compile(layer, backend='aot_eager', fullgraph=True)),
                               gradient(layer), rtol=.02, atol=.02)
