"Every network, on inputs as small as it takes: shapes, the head, batch norm, probes, a run."
import copy
from dataclasses import fields
import pytest, torch, yaml
from torch import nn
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.experiments import experiments_folder, gather
from deepcluster_nb import model
from deepcluster_nb.model import ARCHS, SIZES, calibrate_bn, convnet, reset_top_layer
from deepcluster_nb.probes import conv_activations, pool_activation, probe_features
from deepcluster_nb.fit import Config, fit, load_run, predict, resolve
from deepcluster_nb.training import trunk_parameters

DIMS  = dict(alexnet=4096, alexnet_small=1024, vgg16=4096, resnet18=512, resnet50=2048)
CONVS = dict(alexnet=5, alexnet_small=5, vgg16=13, resnet18=5, resnet50=5)
# built with numbers in them; the others on `meta`, where tensors have sizes only
LIGHT = ['alexnet_small', 'resnet18']

pytestmark = pytest.mark.usefixtures('one_thread')

def test_every_network_is_here():
    assert set(ARCHS) == set(SIZES) == set(DIMS) and DIMS == model.DIMS

@pytest.mark.parametrize('sobel', [True, False])
@pytest.mark.parametrize('arch', ARCHS)
def test_shapes_at_both_ends_of_the_sizes(arch, sobel):
    with torch.device('meta'), torch.inference_mode():
        net = convnet(arch, 7, sobel).eval()
        assert net.dim == DIMS[arch] and net.top_layer.in_features == net.dim
        for size in SIZES[arch]:
            x = torch.empty(2, 3, size, size)
            assert net.embed(x).shape == (2, net.dim) and net(x).shape == (2, 7)
            acts = conv_activations(net, x)
            assert list(acts) == [f'conv{i+1}' for i in range(CONVS[arch])]
            assert all(pool_activation(n, a).shape[1] <= 10_000 for n,a in acts.items())
    first = next(m for m in net.features.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == (2 if sobel else 3) and (net.sobel is None) == (not sobel)

@pytest.mark.parametrize('arch', ['alexnet', 'alexnet_small', 'vgg16'])
def test_sizes_outside_are_errors(arch): # adaptive pools hide it in the others
    low, high = SIZES[arch]
    with torch.device('meta'): net = convnet(arch, 7)
    for size in (low - 1, high + 1):
        if arch == 'alexnet_small': continue
        with pytest.raises(ValueError, match=f'{size} × {size} pixels'):
            net.embed(torch.empty(1, 3, size, size, device='meta'))
    with pytest.raises(ValueError, match=f'size: expected {low} to {high}'):
        resolve(Config(arch=arch, size=high + 1))

@pytest.mark.parametrize('arch', ARCHS)
def test_the_trunk_is_everything_but_the_head(arch):
    with torch.device('meta'): net = convnet(arch, 7)
    learned = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(p.numel() for p in trunk_parameters(net)) == learned - 7*(net.dim + 1)

def test_published_pools_of_resnet50():
    with torch.device('meta'), torch.inference_mode():
        acts = conv_activations(convnet('resnet50', 7).eval(), torch.empty(1, 3, 224, 224))
    assert [tuple(a.shape[1:]) for a in acts.values()] == [(64, 112, 112), (256, 56, 56), (512, 28, 28),
                                                           (1024, 14, 14), (2048, 7, 7)]
    assert [pool_activation(n, a).shape[1] for n,a in acts.items()] == [9216, 9216, 8192, 9216, 8192]

# another map: the largest grid is 2 × 2
@pytest.mark.parametrize('name, channels, side, by_hand', [
    ('conv5', 2048, 7, lambda a: a[..., :6, :6].mean((2, 3))),  # the first of four windows of 6 × 6
    # 10 × 10 with a border of 4, whose zeros count
    ('conv1', 64, 112, lambda a: a[..., :6, :6].sum((2, 3))/100),
    ('conv5', 2048, 4, lambda a: a[..., :2, :2].mean((2, 3)))])
def test_first_window_by_hand(name, channels, side, by_hand):
    a = torch.rand(1, channels, side, side, generator=generator(0, 'pool'))
    grid = round((pool_activation(name, a).shape[1]/channels)**.5)
    torch.testing.assert_close(pool_activation(name, a).view(1, channels, grid, grid)[..., 0, 0], by_hand(a))

@pytest.mark.parametrize('arch', ['vgg16', 'resnet18'])
def test_activations_are_on_the_way_to_the_features(arch):
    with torch.inference_mode():
        net = convnet(arch, 7, seed=1).eval()
        x = torch.randn(1, 3, SIZES[arch][0], SIZES[arch][0], generator=generator(0, 'x'))
        acts = conv_activations(net, x)
        last = list(acts.values())[-1]
        pooled = nn.functional.max_pool2d(last, 2) if arch == 'vgg16' else last.mean((2, 3), keepdim=True)
        torch.testing.assert_close(net.classifier[:-1](pooled.flatten(1)), net.embed(x))
        assert all((a >= 0).all() for a in acts.values())

@pytest.mark.parametrize('arch', LIGHT)
def test_a_new_head_leaves_the_trunk_as_it_is(arch):
    net = convnet(arch, 7)
    before = copy.deepcopy(net.state_dict())
    reset_top_layer(net, generator(1, 'top_layer'))
    changed = {k for k,v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'top_layer.weight'}                     # its bias was zero and is again

@pytest.mark.parametrize('sobel', [True, False])
@pytest.mark.parametrize('arch', LIGHT)
def test_calibration_moves_statistics_only(arch, sobel):
    net, images = convnet(arch, 7, sobel), load_images('shapes', n_images=24)
    before = copy.deepcopy(net.state_dict())
    calibrate_bn(net, images, 32, batch_size=12)
    changed = {k for k,v in net.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {k for k in before if k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))}
    assert changed == statistics

@pytest.mark.parametrize('arch', LIGHT)
def test_a_last_image_alone_joins_the_batch_before(arch): # it has no variance
    images = load_images('shapes', n_images=25)
    many, one = (convnet(arch, 7) for _ in range(2))
    calibrate_bn(many, images, 32, batch_size=12)
    calibrate_bn(one, images, 32, batch_size=25)
    assert all(v.isfinite().all() for v in many.state_dict().values())
    name = next(n for n in many.state_dict() if n.endswith('num_batches_tracked'))
    assert (int(many.state_dict()[name]), int(one.state_dict()[name])) == (2, 1)

def test_batch_norm_of_a_resnet_by_hand():
    net, images = convnet('resnet18', 7), load_images('shapes', n_images=8)
    from deepcluster_nb.fast.crops import center_crop, normalize
    with torch.no_grad():
        first = net.features.conv1(net.sobel(normalize(center_crop(images.batch(torch.arange(8)), 32))))
    calibrate_bn(net, images, 32, batch_size=8)
    torch.testing.assert_close(net.features.bn1.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)

def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1); a = convnet('resnet18', 7)
    torch.manual_seed(2); b, c = convnet('resnet18', 9), convnet('resnet18', 7, seed=1)
    assert all(torch.equal(p, q) for p,q in zip(a.features.parameters(), b.features.parameters()))
    assert not torch.equal(a.features.conv1.weight, c.features.conv1.weight)

@pytest.mark.parametrize('arch', ARCHS)
def test_every_dropout_is_the_one_asked_for(arch):
    with torch.device('meta'): net = convnet(arch, 7, dropout=.3)
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {.3}

def test_dropout_of_a_resnet_is_in_front_of_its_head():
    net = convnet('resnet18', 7, dropout=.9).train()
    net.features.eval()
    x = torch.randn(2, 3, 32, 32, generator=generator(0, 'x'))
    with torch.no_grad():
        assert torch.equal(net.embed(x), net.embed(x))         # what is clustered has none
        assert not torch.equal(net(x), net(x))

def test_a_run_with_a_resnet(tmp_path):
    c = Config(dataset='shapes', n_images=48, arch='resnet18', k=6, pca=16, epochs=1, passes=1, batch_size=16,
               precision='float32', device='cpu', run_dir=str(tmp_path/'run'))
    run = fit(c, echo=None)
    assert len(run.log) == 1 and len(run.clustering.assign) == 48 and run.pca.axes.shape == (512, 16)
    assert torch.equal(predict(load_run(tmp_path/'run'), run.images), run.clustering.assign)
    assert [f.shape[0] for f in probe_features(run.net, run.images.subset(range(8)), 32).values()] == [8]*5

@pytest.mark.parametrize('preset',
                         sorted(p.stem for p in (experiments_folder()/'presets').glob('imagenet_*.yaml')))
def test_full_scale_presets(preset):
    notebook, given = gather('train', preset)
    c = resolve(Config(**given))
    assert (notebook.stem == 'train' and c.arch == preset.split('_')[1]
            and (c.k, c.pca, c.size, c.sobel) == (10_000, 256, 224, not preset.endswith('_rgb')))
    assert (set(given) <= {f.name for f in fields(Config)} and c.device in ('cpu', 'cuda')
            and c.precision in ('float32', 'bfloat16'))
    assert (experiments_folder()/'presets'/f'{preset}.yaml').read_text().startswith('# ')
    with torch.device('meta'): assert c.pca <= convnet(c.arch, c.k).dim

def test_the_papers_values():
    given = yaml.safe_load((experiments_folder()/'presets'/'imagenet_alexnet.yaml').read_text())
    assert ((given['epochs'], given['batch_size'], given['lr'], given['weight_decay'], given['momentum'])
            == (500, 256, .05, 1e-5, .9))
