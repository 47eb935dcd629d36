"The authors' files: layout, checksums, what is refused, and a second implementation of their layers."
import collections, os, random, sys, warnings
from contextlib import nullcontext
import pytest, torch
from torch.nn import functional as F
from deepcluster_nb.data import generator
from deepcluster_nb.model import convnet
from deepcluster_nb.released import file_sha256, load_released, load_weights, random_twin, read_converted
from deepcluster_nb.fit import Config, fit

# position, stride, padding, pool behind
CONVS = dict(alexnet=[(0, 4, 2, (3, 2)), (4, 1, 2, (3, 2)), (8, 1, 1, None), (11, 1, 1, None),
                      (14, 1, 1, (3, 2))], vgg16=[])
at = 0
for stage in (2, 2, 3, 3, 3):            # configuration D: convolution, batch norm, ReLU; a pool ends a stage
    for i in range(stage): CONVS['vgg16'].append((at, 1, 1, (2, 2) if i == stage - 1 else None)); at += 3
    at += 1
HIDDEN = dict(alexnet=('classifier.1', 'classifier.4'), vgg16=('classifier.0', 'classifier.3'))

def authors_forward(arch, state, x): # → logits; nothing of the kit
    w = lambda name: (state[f'{name}.weight'], state[f'{name}.bias'])
    if 'sobel.0.weight' in state: x = F.conv2d(F.conv2d(x, *w('sobel.0')), *w('sobel.1'), padding=1)
    for conv, stride, pad, pool in CONVS[arch]:
        x = F.conv2d(x, *w(f'features.{conv}'), stride=stride, padding=pad)
        bn = f'features.{conv + 1}'
        x = F.relu(F.batch_norm(x, state[f'{bn}.running_mean'], state[f'{bn}.running_var'], *w(bn)))
        if pool: x = F.max_pool2d(x, *pool)
    x = x.flatten(1)
    for name in HIDDEN[arch]: x = F.relu(F.linear(x, *w(name)))
    return F.linear(x, *w('top_layer'))

def authors_state(arch, k=3, sobel=True):
    # small storages: a tensor's rows are windows into one row of numbers, each shifted by one
    planes, state = (2 if sobel else 3), collections.OrderedDict()
    def add(name, *shape):
        scale = (2 / torch.Size(shape[1:]).numel())**.5 if len(shape) > 1 else 1.
        state[name] = (scale * torch.randn(sum(shape),
                                           generator=generator(1, name))).as_strided(shape, [1]*len(shape))
        if name.startswith('top_layer'): state[name] = state[name].clone()   # of the head all is in the file
    if sobel:
        dx = torch.tensor([[1., 0, -1], [2, 0, -2], [1, 0, -1]])
        state |= {'sobel.0.weight': torch.full((1, 3, 1, 1), 1/3), 'sobel.0.bias': torch.zeros(1),
                  'sobel.1.weight': torch.stack([dx, dx.T])[:, None], 'sobel.1.bias': torch.zeros(2)}
    widths = dict(alexnet=[96, 256, 384, 384, 256], vgg16=[64]*2 + [128]*2 + [256]*3 + [512]*6)[arch]
    for (conv, *_), width, kernel in zip(CONVS[arch], widths,
                                         [11, 5, 3, 3, 3] if arch == 'alexnet' else [3]*13):
        add(f'features.{conv}.weight', width, planes, kernel, kernel); add(f'features.{conv}.bias', width)
        for p in ('weight', 'bias', 'running_mean', 'running_var'): add(f'features.{conv + 1}.{p}', width)
        state[f'features.{conv + 1}.running_var'] = state[f'features.{conv + 1}.running_var'].abs() + .5
        planes = width
    flat = dict(alexnet=9216, vgg16=25088)[arch]
    for name, a, b in zip((*HIDDEN[arch], 'top_layer'), (flat, 4096, 4096), (4096, 4096, k)):
        add(f'{name}.weight', b, a)
        add(f'{name}.bias', b)
    return state

def write(path, state, arch='alexnet', prefix='features.module.', **more):
    torch.save(dict(arch=arch, epoch=500,
                    state_dict=collections.OrderedDict((n.replace('features.', prefix), t)
                                                       for n,t in state.items()), **more),
               path, _use_new_zipfile_serialization=False)
    return path

@pytest.fixture(scope='module')
def alexnet(tmp_path_factory):
    return write(tmp_path_factory.mktemp('released')/'checkpoint.pth.tar', authors_state('alexnet'))

@pytest.mark.parametrize('arch, sobel, prefix', [
    ('alexnet', True, 'features.module.'),
    ('alexnet', False, 'features.'),
    ('vgg16', True, 'features.module.')])
def test_the_same_numbers_as_the_authors_layers(tmp_path, arch, sobel, prefix):
    state = authors_state(arch, 5, sobel)
    path = write(tmp_path/'c.pth.tar', state, arch, prefix)
    net = load_released(path)
    assert load_weights(path)[1:] == (224, arch)
    x = torch.randn(2, 3, 224, 224, generator=generator(0, 'x'))
    with torch.inference_mode(): ours, theirs = net(x), authors_forward(arch, state, x)
    assert ours.shape == (2, 5) and (net.sobel is not None) == sobel and not net.training
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() and theirs.abs().max() > 0
    assert not any(p.requires_grad for p in net.sobel.parameters()) if sobel else True
    assert all(p.requires_grad for n,p in net.named_parameters() if not n.startswith('sobel'))
    os.remove(path)                                                    # the converted file alone will do
    again = load_released(f'{path}.safetensors')
    assert all(torch.equal(a, b) for a,b in zip(net.state_dict().values(), again.state_dict().values()))

def test_our_own_network_there_and_back(tmp_path):
    net = convnet('alexnet', 4, seed=3).eval()
    state = {n: t for n,t in net.state_dict().items() if not n.endswith('num_batches_tracked')}
    back = load_released(write(tmp_path/'c', state))
    assert all(torch.equal(t, back.state_dict()[n]) for n,t in net.state_dict().items())

def test_first_use_is_noted_and_another_file_refused(tmp_path, alexnet):
    path = tmp_path/'c.pth.tar'
    path.write_bytes(alexnet.read_bytes())
    first = file_sha256(path)
    load_released(path)
    assert ((tmp_path/'c.pth.tar.sha256').read_text() == f'{first}  c.pth.tar\n'
            and sorted(p.name for p in tmp_path.iterdir())
            == ['c.pth.tar', 'c.pth.tar.safetensors', 'c.pth.tar.sha256'])
    state = authors_state('alexnet'); state['top_layer.bias'] = torch.ones(3)
    write(path, state)
    second = file_sha256(path)
    before = ({p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix == '.sha256'},
              os.stat(f'{path}.safetensors').st_mtime_ns)
    with pytest.raises(ValueError, match=f'{second}.*{first}'): load_released(path)
    assert before == ({p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix == '.sha256'},
                      os.stat(f'{path}.safetensors').st_mtime_ns)
    # who pins it means it: noted and converted anew
    assert torch.equal(load_released(path, second).top_layer.bias, torch.ones(3))
    assert (read_converted(f'{path}.safetensors')['sha256'] == second
            and (tmp_path/'c.pth.tar.sha256').read_text().startswith(second))
    with pytest.raises(ValueError, match=f'{second}.*{first}'): load_released(f'{path}.safetensors', first)

def test_pinned(tmp_path, alexnet):
    sha, out = file_sha256(alexnet), tmp_path/'a'/'net.safetensors'
    with pytest.raises(ValueError, match=f'{sha}.*{"0"*64}'):
        load_released(alexnet, '0'*64, tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match='in a folder that exists'): load_released(alexnet, sha, out)
    with pytest.raises(ValueError, match='ends in .safetensors'): load_released(alexnet, sha, tmp_path/'x.pt')
    assert not list(tmp_path.iterdir())
    out.parent.mkdir()
    load_released(alexnet, sha.upper(), out)
    assert sorted(p.name for p in out.parent.iterdir()) == ['net.safetensors', 'net.sha256']

def test_nothing_is_left_of_a_conversion_that_failed(tmp_path, alexnet, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('deepcluster_nb.released.os.replace', full)
    with pytest.raises(OSError): load_released(alexnet, None, tmp_path/'x.safetensors')
    assert not list(tmp_path.iterdir())

GOOD = authors_state('alexnet')
def without(*names): return {n: t for n,t in GOOD.items() if n not in names}
@pytest.mark.parametrize('content, message', [
    (dict(arch='alexnet', state_dict=without('features.9.running_mean')), 'lacks features.9.running_mean'),
    (dict(arch='alexnet', state_dict=without('sobel.1.bias', 'classifier.1.bias')),
     'lacks sobel.1.bias, classifier.1.bias'),
    (dict(arch='alexnet', state_dict={}), "no 'top_layer.bias'"),
    (dict(arch='alexnet', state_dict=[1]), 'no tensors'),
    (dict(arch='alexnet', state_dict=GOOD | {'fc.weight': torch.zeros(1)}), 'unexpected, fc.weight'),
    (dict(arch='alexnet', state_dict=GOOD | {'features.4.weight': torch.zeros(256, 48, 5, 5)}),
     r'features.4.weight of shape \(256, 48, 5, 5\), expected \(256, 96, 5, 5\)'),
    (dict(arch='alexnet', state_dict=GOOD | {'top_layer.bias': torch.zeros(4)}),
     r'top_layer.weight of shape \(3, 4096\), expected \(4, 4096\)'),
    (dict(arch='alexnet', state_dict=GOOD | {'features.0.bias': torch.zeros(96, dtype=torch.int64)}),
     'features.0.bias of type torch.int64'),
    (dict(arch='vgg16', state_dict=GOOD), r'lacks features.3.weight.*and \d+ more'),
    (dict(arch='resnet50', state_dict=GOOD), "'resnet50', expected 'alexnet' or 'vgg16'"),
    (dict(state_dict=GOOD), "expected the keys 'arch' and 'state_dict'"),
    ([1, 2], 'list, expected the keys'),
    (torch.zeros(3), 'Tensor, expected the keys')])
def test_what_is_no_released_file_is_said_and_leaves_nothing(tmp_path, content, message):
    torch.save(content, tmp_path/'c.pth.tar')
    with pytest.raises(ValueError, match=f'path: .*c.pth.tar.*{message}'): load_released(tmp_path/'c.pth.tar')
    assert [p.name for p in tmp_path.iterdir()] == ['c.pth.tar']

def test_damaged_files_are_one_error(tmp_path):
    small, g = tmp_path/'c', random.Random(0)
    torch.save(dict(arch='alexnet', epoch=1, state_dict={'top_layer.bias': torch.zeros(3)}), small,
               _use_new_zipfile_serialization=False)
    good = small.read_bytes()
    variants = ([good[:g.randrange(len(good))] for _ in range(20)]
                + [b'', b'GIF89a', b'\x80\x02', bytes(1000), b'PK\x03\x04' + bytes(100)])
    for _ in range(60):
        b = bytearray(good)
        for _ in range(g.randrange(1, 4)): b[g.randrange(len(b))] = g.randrange(256)
        variants.append(bytes(b))
    for v in variants:
        small.write_bytes(v)
        # an undamaged one lacks nearly all names
        with (warnings.catch_warnings(action='error') if sys.version_info >= (3, 11) else nullcontext(),
              pytest.raises(ValueError, match='^path: ')):
            load_released(small)

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_code_in_a_file_is_not_run(tmp_path):
    for where in (dict(arch='alexnet', state_dict=GOOD, more=Bomb(str(tmp_path/'boom'))),
                  Bomb(str(tmp_path/'boom'))):
        torch.save(where, tmp_path/'c')
        with pytest.raises(ValueError, match=f'{os.mkdir.__module__}.mkdir; only tensors are read'):
            load_released(tmp_path/'c')
        assert not (tmp_path/'boom').exists()

def test_other_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({'x': torch.zeros(2)}, tmp_path/'x.safetensors')
    (tmp_path/'y.safetensors').write_bytes(b'nothing')
    for n in 'xy':
        with pytest.raises(ValueError, match='no whole file of load_released'):
            load_released(tmp_path/f'{n}.safetensors')

def test_a_run_is_weights_too(tmp_path):
    run = fit(Config(dataset='digits', n_images=40, size=40, k=4, pca=8, epochs=0, device='cpu',
                     precision='float32', run_dir=str(tmp_path/'r')),
              echo=None)
    net, size, arch = load_weights(tmp_path/'r')
    assert ((size, arch, net.training) == (40, 'alexnet_small', False)
            and all(torch.equal(a, b)
                    for a,b in zip(net.state_dict().values(), run.net.state_dict().values())))
    with pytest.raises(FileNotFoundError, match='no run in'): load_weights(tmp_path)

def test_a_twin_begins_where_training_began(): # its batch norm, too
    net = convnet('alexnet_small', 5, seed=3)
    begun = {n: t.clone() for n,t in net.state_dict().items()}
    with torch.no_grad():
        for t in net.state_dict().values():
            if t.is_floating_point() and t.ndim < 4: t.add_(.5)             # batch norm and all biases moved
        net.sobel.load_state_dict({n[6:]: t for n,t in begun.items() if n.startswith('sobel')})
    twin = random_twin(net, 3).state_dict()
    assert all(torch.equal(t, begun[n]) for n,t in twin.items() if not n.startswith('top_layer'))
