("Pictures leave nothing behind: no open figures after an error, no settings, "
 "no work before bad input is refused; the same call draws the same.")
import io, json
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from PIL import Image
from deepcluster_nb import pictures as P
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.model import convnet
from deepcluster_nb.runs import log_curves

@pytest.fixture(scope='module')
def net(): return convnet('alexnet_small', 5, dropout=0.)

@pytest.fixture(scope='module')
def images(): return load_images('shapes', n_images=40)

@pytest.fixture(autouse=True)
def nothing_left_behind():
    settings = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == settings and not plt.get_fignums()

def pixels(fig):
    out = io.BytesIO()
    fig.savefig(out, dpi=50, format='png'); plt.close(fig)
    return np.asarray(Image.open(out))

def pictures_of(net, images): # name → a call that draws
    assign, feats = torch.arange(40) % 4, torch.randn(40, 6, generator=generator(0, 'feats'))
    log = [dict(epoch=e, loss=1., ln_k=1.6, nmi_prev=None, ami_prev=None, nmi_prev_chance=None, nmi_labels=.1,
                ami_labels=.1, n_empty=0, cluster_sizes=dict(min=1, median=2., max=3)) for e in range(2)]
    return dict(filters=lambda: P.filter_grid(net), planes=lambda: P.filter_grid(net, 'planes'),
                montage=lambda: P.cluster_montage(images, assign, 3, 4),
                top=lambda: P.top_images(net, images, 'conv2', [0, 3], 32),
                nearest=lambda: P.nearest_images(feats, images, [0, 5], 3),
                curves=lambda: P.training_curves(log))

@pytest.mark.parametrize('name', ['filters', 'planes', 'montage', 'top', 'nearest', 'curves'])
def test_one_figure_that_closes_and_is_the_same_again(name, net, images):
    draw = pictures_of(net, images)[name]
    fig = draw()
    assert plt.get_fignums() == [fig.number]
    first = pixels(fig)
    assert first.std() > 5 and (pixels(draw()) == first).all()

def test_style_comes_with_the_package():
    with plt.style.context(P.STYLE):
        assert matplotlib.colors.to_hex(plt.rcParams['axes.prop_cycle'].by_key()['color'][0]) == '#0072b2'
    setup = (P.Path(__file__).parent.parent/'setup.py').read_text()
    assert '*.mplstyle' in setup                                      # else an installed package has no style

def test_a_drawing_that_fails_leaves_no_figure():
    @P.styled
    def broken():
        plt.figure(); plt.rcParams['font.size'] = 3
        raise RuntimeError('half way')
    kept = plt.figure()
    with pytest.raises(RuntimeError): broken()
    assert plt.get_fignums() == [kept.number]
    plt.close(kept)

class Untouchable: # stands for a network: to look at it is too late for an error
    def __getattr__(self, name): raise AssertionError(f'{name} was used before the input was checked')

def test_errors_come_before_work(net, images):
    f = torch.zeros(40, 3)
    for call, message in [
        (lambda: P.filter_grid(Untouchable(), 'dx'), 'view: expected'),
        (lambda: P.top_images(Untouchable(), images.subset(range(8)), 'conv1', [0], 32),
         'images: expected at least nine'),
        (lambda: P.top_images(net, images, 'conv7', [0], 32), 'layer: expected one of conv1'),
        (lambda: P.top_images(net, images, 'conv1', [64], 32), 'channels: expected some of 0 to 63'),
        (lambda: P.gradient_ascent(net, 'conv1', [-1], 32), 'channels: expected some of'),
        (lambda: P.gradient_ascent(Untouchable(), 'conv1', [0], 4), 'size: expected at least 8'),
        (lambda: P.gradient_ascent(Untouchable(), 'conv1', [0], 32, decay=-1.), 'decay: expected at least 0'),
        (lambda: P.cluster_montage(images, torch.zeros(3)), 'assign: expected a cluster for each of the 40'),
        (lambda: P.cluster_montage([1] * 40, torch.zeros(40)), 'images: expected Images'),
        (lambda: P.cluster_montage(images, torch.zeros(40), [1]), 'clusters: expected'),
        (lambda: P.nearest_images(f[:5], images, [0]), 'feats: expected a row for each of the 40'),
        (lambda: P.nearest_images(f, images, [40]), 'rows: expected some of 0 to 39'),
        (lambda: P.nearest_images(f, images, [0], n=40), 'n: expected 1 to 39'),
        (lambda: P.umap_plot(f, images), 'feats: expected a dict'),
        (lambda: P.umap_plot(dict(a=f[:2]), images), "feats.'a'.: expected a row"),
        (lambda: P.lloyd_animation(f, f), 'x: expected .N, 2. points')]:
        with pytest.raises(ValueError, match=message): call()
    with pytest.raises(FileNotFoundError, match='run: no log.jsonl'): P.training_curves('nowhere')

def test_ascent_leaves_the_network_and_global_randomness_alone(net):
    weights, rng = {k: v.clone() for k,v in net.state_dict().items()}, torch.random.get_rng_state()
    a, b, c = (P.gradient_ascent(net, 'conv2', [1, 2], 32, steps=5, seed=s) for s in (0, 0, 1))
    assert a.shape == (2, 1, 32, 32) and a.equal(b) and not a.equal(c)
    assert (all(v.equal(weights[k]) for k,v in net.state_dict().items())
            and torch.random.get_rng_state().equal(rng))
    assert all(p.grad is None for p in net.parameters())

@pytest.mark.parametrize('arch, layers', [('resnet18', 5), ('vgg16', 13)])
def test_other_networks(arch, layers):
    with torch.device('meta'): net = convnet(arch, 3).eval()
    assert P.layer_names(net) == [f'conv{i+1}' for i in range(layers)]
    with torch.inference_mode():
        assert P.responses(net, torch.empty(1, 3, 224, 224, device='meta'), 'conv2').shape[0] == 1

def test_own_photographs_of_all_sizes_without_labels():
    flat = [torch.randint(256, (3, 20 + i, 30), generator=generator(i)).byte() for i in range(12)]
    ragged = PackedImages(torch.cat([f.flatten() for f in flat]), [f.shape for f in flat])
    plt.close(fig := P.cluster_montage(ragged, torch.arange(12) % 3, n=5))
    # three clusters of four, a place left empty
    assert fig.axes[0].images[0].get_array().shape == (3*97 - 1, 5*97 - 1, 4)
    assert not fig.axes[0].images[0].get_array()[:96, -90:, 3].any()
    plt.close(P.nearest_images(torch.randn(12, 4, generator=generator(0)), ragged, [3], 2))

def test_curves_from_a_run_folder(tmp_path):
    row = dict(epoch=0, loss=2., ln_k=3., nmi_prev=None, ami_prev=None, nmi_prev_chance=None, nmi_labels=None,
               ami_labels=None, n_empty=1, cluster_sizes=dict(min=0, median=2., max=9))
    (tmp_path/'log.jsonl').write_text(json.dumps(row) + '\n')
    fig = P.training_curves(tmp_path); plt.close(fig)
    assert (list(fig.axes[0].lines[0].get_ydata()) == [2.]
            and [p.name for p in tmp_path.iterdir()] == ['log.jsonl'])

def test_film_has_a_frame_for_every_move():
    x = torch.cat([torch.randn(20, 2, generator=generator(0)),
                   torch.randn(20, 2, generator=generator(1)) + 6])
    init = torch.tensor([[0., 0], [1, 1], [90, 90]])
    film = Image.open(io.BytesIO(P.lloyd_animation(x, init, 2)))
    assert (film.format == 'PNG' and film.is_animated
            and film.n_frames == len(P.lloyd_steps(x, init, 2)) == 1 + 2*2 + 1)

def test_a_notebooks_first_figure_still_switches_showing_on():
    @P.styled
    def first(): # what a notebook's backend does when it wakes
        matplotlib.interactive(True)
        return plt.figure()
    plt.close(first())
    assert plt.isinteractive()
    matplotlib.interactive(False)

def test_every_curve_shows_what_it_says():
    row = dict(epoch=0, loss=1., ln_k=2., nmi_prev=.3, ami_prev=.4, nmi_prev_chance=.5, nmi_labels=.6,
               ami_labels=.7, n_empty=8, cluster_sizes=dict(min=1, median=9., max=20))
    axes = log_curves([row]).axes
    plt.close()
    found = [[float(l.get_ydata()[0]) for l in ax.lines] for ax in axes]
    assert found == [[1, 2], [.3, .4, .5], [.6, .7], [9, 8]]

@pytest.fixture
def cut(monkeypatch): # image numbers of every row of crops
    seen, real = [], P.crops
    def crops(images, idx, size=0): seen.append(torch.as_tensor(idx).tolist()); return real(images, idx, size)
    monkeypatch.setattr(P, 'crops', crops)
    yield seen
    plt.close('all')

def test_the_nine_are_those_that_excite_most(net, images, cut):
    P.top_images(net, images, 'conv2', [0, 3], 32)
    scores = P.excitement(net, images, 'conv2', 32)
    assert cut == [scores[:, c].sort(descending=True).indices[:9].tolist() for c in (0, 3)]

def test_frames_and_neighbors_by_hand(images, cut):
    feats = torch.randn(40, 6, generator=generator(0, 'feats'))
    ax = P.nearest_images(feats, images, [0, 5], 3).axes[0]
    cosine = torch.nn.functional.cosine_similarity(feats[:, None], feats[None], dim=2).fill_diagonal_(-2)
    near = [cosine[r].sort(descending=True).indices[:3].tolist() for r in (0, 5)]
    assert cut == [[0, 5], *near]
    same = [bool(images.labels[r] == images.labels[q]) for q,row in zip((0, 5), near) for r in row]
    assert 0 < sum(same) < 6
    assert [matplotlib.colors.to_hex(p.get_edgecolor()) == '#0072b2' for p in ax.patches] == same
    assert [p.get_linestyle() in ('-', 'solid') for p in ax.patches] == same

def test_purity_stands_beside_that_of_shuffled_labels(images):
    title = P.cluster_montage(images, images.labels, 3, 4).get_suptitle(); plt.close()
    whole, shuffled = [float(t.split('%')[0]) for t in title.split(': ')[1:]]
    assert whole == 100 and 20 <= shuffled < 70                      # five classes

def test_members_are_drawn_by_lot(images, cut):
    P.cluster_montage(images, images.labels, [0, 1, 2], 4)
    members = [(images.labels == c).nonzero().flatten().tolist() for c in range(3)]
    shown = [sorted(row) for row in cut]
    assert len(shown) == 3 and all(set(s) <= set(m) for s,m in zip(shown, members))
    assert shown != [m[:4] for m in members]

def test_an_image_is_not_its_own_neighbor(images, monkeypatch): # among the ten that are alike or not
    class Flat:
        def __init__(self, **how): pass
        def fit_transform(self, x): return x[:, :2]
    monkeypatch.setattr('umap.UMAP', Flat)
    feats = torch.randn(40, 6, generator=generator(1, 'feats'))
    cosine = torch.nn.functional.cosine_similarity(feats[:, None], feats[None], dim=2).fill_diagonal_(-2)
    alike = float((images.labels[cosine.topk(10).indices] == images.labels[:, None]).float().mean())
    title = P.umap_plot(dict(random=feats), images).axes[0].get_title(loc='left'); plt.close()
    assert title == f'random: {alike:.0%} of ten neighbors alike' and alike < .5
