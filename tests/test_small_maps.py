"The faster gradient is the same gradient, and is taken only where it was measured to pay."
import copy, math
import pytest, torch
from torch import nn
from deepcluster_nb.fast import small_maps
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.fast.features import autocast
from deepcluster_nb.model import convnet
from deepcluster_nb.fast.small_maps import AdaptiveMaxPool2d, Conv2d, PatchGradient, with_small_maps
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
    net, x = with_small_maps(convnet('alexnet_small', 5, dropout=0.)), rand(8, 3, 32, 32)
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

@pytest.mark.parametrize('sides', [(4, 4), (4, 5), (8, 8), (16, 7)])
def test_pool_is_pytorchs(sides):
    outs = []
    for pool in (AdaptiveMaxPool2d(4), nn.AdaptiveMaxPool2d(4)):
        x = rand(2, 3, *sides).requires_grad_()
        y = pool(x)
        assert (y is x) == (sides == (4, 4) and isinstance(pool, AdaptiveMaxPool2d))
        outs.append((y, torch.autograd.grad(y, x, rand(*y.shape))[0]))
    assert all(map(torch.equal, *outs))

def test_compiled_too(monkeypatch):
    monkeypatch.setattr(small_maps, 'TILES', True)
    torch.compiler.reset()
    layer, x = conv(8, 8, 3, 1, 1), rand(2, 8, 4, 4)
    def gradient(f):
        with torch.autocast('cpu', torch.bfloat16): assert layer.pays(x); y = f(x)
        return torch.autograd.grad(y.float().pow(2).sum(), layer.weight)[0]
    torch.testing.assert_close(gradient(torch.compile(layer, backend='aot_eager', fullgraph=True)),
                               gradient(layer), rtol=.02, atol=.02)
