("Instance retrieval: regions, whitening, the judges' files, average precision with junk, "
 "and the experiment through the command.")
import json, shutil, warnings
from fractions import Fraction
from types import SimpleNamespace
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from PIL import Image
from torchvision.ops import roi_pool
from deepcluster_nb.sources import decode, read_images
from deepcluster_nb.experiments import main
from deepcluster_nb.fast.features import PCA
from deepcluster_nb.model import calibrate_bn, convnet
from deepcluster_nb.released import random_twin
from deepcluster_nb.retrieval import (BROKEN, aggregate, descriptors, learn_whitening, made_city, ranked_ap,
                                      read_oxford, read_queries, region_vectors, retrieval_map, rmac,
                                      rmac_regions, scaled, search)
import made_runs
from made_runs import same_format

pytestmark = pytest.mark.usefixtures('one_thread', 'in_process')

@pytest.fixture(scope='module')
def city(tmp_path_factory): return made_city(tmp_path_factory.mktemp('city'), landmarks=3, others=5)

@pytest.fixture(scope='module')
def net(): return convnet('alexnet_small', 5, dropout=0.).eval()

# --- regions

def regions_by_definition(h, w, levels):
    # all that the definition allows: where two numbers of
    # squares are equally near to an overlap of 40 %, both
    short = min(h, w)
    miss = {n: abs(1 - Fraction(abs(h - w), (n - 1)*short) - Fraction(2, 5)) for n in range(2, 8)}
    for extra in [n - 1 for n in miss if miss[n] == min(miss.values())] if h != w else [0]:
        out = []
        for l in range(1, levels + 1):
            side = 2*short // (l + 1)
            at = lambda length, n: np.floor(side//2 + (length - side)/max(1, n - 1)*np.arange(n)) - side//2
            out += [[x, y, side, side] for y in at(h, l + extra*(h > w)) for x in at(w, l + extra*(w > h))]
        yield out

def test_regions_of_all_maps():
    for h in range(2, 60):
        for w in range(2, 60):
            r = rmac_regions(h, w).numpy()
            assert r.tolist() in list(regions_by_definition(h, w, 3)), (h, w)
            assert ((r[:, 2] >= 1).all() and (r[:, :2] >= 0).all() and (r[:, 0] + r[:, 2] <= w).all()
                    and (r[:, 1] + r[:, 3] <= h).all())

def test_a_tie_goes_to_fewer_squares(): # 5 × 9: two squares overlap by .2, three by .6
    assert len(rmac_regions(5, 9, 1)) == 2

@pytest.mark.parametrize('h, w, counts', [
    (7, 7, (1, 4, 9)),
    (4, 6, (2, 6, 12)),
    (6, 4, (2, 6, 12)),
    (1, 1, (1, 4, 9))])
def test_numbers_of_regions_by_hand(h, w, counts):
    assert len(rmac_regions(h, w)) == sum(counts) and len(rmac_regions(h, w, 1)) == counts[0]

def test_squares_of_the_first_level_overlap_by_about_40_percent():
    for w in range(33, 64):
        (a, _, side, _), (b, *_) = rmac_regions(32, w, 1)[:2].tolist()
        assert .2 <= 1 - (b - a)/side <= 1            # two squares at least, however little there is to share

def test_region_maxima_are_torchvisions():
    a = torch.rand(6, 11, 19, generator=torch.Generator().manual_seed(0))
    x, y, w, h = rmac_regions(11, 19).float().unbind(1)
    pooled = roi_pool(a[None], torch.stack([0*x, x, y, x + w - 1, y + h - 1], 1), 1)[:, :, 0, 0]
    assert torch.allclose(rmac(a), pooled / pooled.norm(dim=1, keepdim=True), atol=1e-6)

# --- from images to vectors

@pytest.mark.parametrize('h, w, side', [(50, 80, 40), (80, 50, 40), (30, 45, 90), (64, 64, 64)])
def test_scaling_is_pillows(h, w, side):
    im = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
    size = round(w*side/max(h, w)), round(h*side/max(h, w))
    pillow = np.asarray(Image.fromarray(im.permute(1, 2, 0).numpy()).resize(size, Image.BILINEAR), np.float32)
    assert np.abs(scaled(im, side).permute(1, 2, 0).numpy() - pillow).max() <= 1

def test_box_is_cut_after_scaling():
    im = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    # 61 · ½ = 30.5 rounds to 30, as numpy does
    assert torch.equal(scaled(im, 40, (20, 10, 61, 50)), scaled(im, 40)[:, 5:25, 10:30])
    # the publisher's boxes may stick out a little
    assert torch.equal(scaled(im, 40, (-5, 0, 999, 999)), scaled(im, 40))
    with pytest.raises(ValueError, match='box: expected left < right'): scaled(im, 40, (50, 0, 50, 20))

def test_last_pool_is_left_out(net):
    im = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = {}
    hook = net.features[-2].register_forward_hook(lambda m, i, o: seen.update(map=o[0]))
    v, = region_vectors(net, im, (96,))
    hook.remove()
    assert (seen['map'].shape == (256, 8, 12) and torch.allclose(v, rmac(seen['map']), atol=1e-6)
            and v.shape == (len(rmac_regions(8, 12)), 256))
    with torch.device('meta'):                          # VGG-16 at 1,024 × 768: 64 × 48 without its last pool
        assert convnet('vgg16', 5).features[:-1](torch.empty(1, 2, 768, 1024)).shape == (1, 512, 48, 64)

def test_aggregate_step_by_step():
    g = torch.Generator().manual_seed(0)
    train, parts = torch.randn(200, 6, generator=g), [torch.randn(n, 6, generator=g) for n in (4, 7)]
    pca = PCA(4).fit(train)
    values, vectors = np.linalg.eigh(np.cov(train.numpy().T.astype(float), bias=True))
    w = vectors[:, ::-1][:, :4] / np.sqrt(values[::-1][:4])
    total = 0
    for v in parts:
        z = (v.numpy() - train.numpy().mean(0)) @ w
        s = (z / np.linalg.norm(z, axis=1, keepdims=True)).sum(0)
        total = total + s / np.linalg.norm(s)
    mine = aggregate(parts, pca).numpy()
    assert np.allclose(np.abs(mine), np.abs(total / np.linalg.norm(total)), atol=1e-5)  # an axis has no sign
    one = aggregate(parts[:1], pca)
    assert torch.allclose(one, aggregate([parts[0]]*2, pca), atol=1e-6)  # the same scale twice is that scale

def test_whitening_sees_every_region(net, city):
    paths = list(read_oxford(city)[0].values())[:4]
    pca = learn_whitening(net, paths, 16, sides=(64, 96))
    rows = torch.cat([v for p in paths for v in region_vectors(net, decode(p), (64, 96))])
    assert pca.count == len(rows) and torch.allclose(pca.mean, PCA(16).fit(rows).mean, atol=1e-6)
    z = pca.transform(rows)
    assert torch.allclose(torch.cov(z.T, correction=0), torch.eye(16), atol=1e-2)
    with pytest.raises(ValueError, match='paths: .*none'): learn_whitening(net, [])

def test_an_image_finds_itself_first(net, city):
    images, queries = read_oxford(city)
    pca = learn_whitening(net, list(images.values()), 32, sides=(96,))
    x = descriptors(net, list(images.values()), pca, sides=(96,))
    assert (torch.allclose(x.norm(dim=1), torch.ones(len(x)), atol=1e-5)
            and ((x @ x.T).argmax(1) == torch.arange(len(x))).all())
    whole = [type(q)(q.name, q.image, None, q.positive, q.junk) for q in queries]
    rankings = search(net, images, whole, pca, sides=(96,))
    assert all(r[0] == q.image and sorted(r) == sorted(images) for r,q in zip(rankings, whole))

# --- average precision

@pytest.mark.parametrize('ranked, positive, junk, ap', [
    ('abxy', 'ab', '', 1),
    ('axby', 'ab', '', 1/2 + 1/2*(1/2 + 2/3)/2),
    ('xa', 'a', '', (0 + 1/2)/2),
    ('ajxb', 'ab', 'j', 1/2 + 1/2*(1/2 + 2/3)/2),
    ('jja', 'a', 'j', 1),
    ('xyz', 'a', '', 0),
    ('ax', 'ab', '', 1/2),
    ('xab', 'ab', '', (1/2*(0 + 1/2) + 1/2*(1/2 + 2/3))/2),
    ('', 'a', '', 0)])
def test_ap_by_hand(ranked, positive, junk, ap):
    assert ranked_ap(ranked, set(positive), set(junk)) == pytest.approx(ap)

def official(ranked, positive, junk): # the publisher's sum over all ranks
    old_recall, old_precision, ap, hits, n = 0., 1., 0., 0, 0
    for name in ranked:
        if name in junk: continue
        n, hits = n + 1, hits + (name in positive)
        ap += (hits/len(positive) - old_recall) * (old_precision + hits/n) / 2
        old_recall, old_precision = hits/len(positive), hits/n
    return ap

def test_ap_is_the_official_sum():
    g = np.random.default_rng(0)
    for _ in range(200):
        n = int(g.integers(1, 40))
        names = [str(i) for i in g.permutation(n)]
        cut = sorted(g.integers(0, n + 1, 2))
        positive, junk = set(names[:cut[0]]) | {'not in the ranking'}, set(names[cut[0]:cut[1]])
        ranked = [names[i] for i in g.permutation(n)]
        assert ranked_ap(ranked, positive, junk) == pytest.approx(official(ranked, positive, junk))
        assert (ranked_ap([r for r in ranked if r not in junk], positive)
                == pytest.approx(ranked_ap(ranked, positive, junk)))

# --- files

def test_official_layout(tmp_path): # the publisher's files, written by hand
    (tmp_path/'lab').mkdir(); (tmp_path/'jpg'/'general').mkdir(parents=True)
    for n in ('all_souls_000013', 'all_souls_000026', 'general/oxford_000317'):
        Image.new('RGB', (768, 1024)).save(tmp_path/'jpg'/f'{n}.jpg')
    for kind, text in dict(query='oxc1_all_souls_000013 136.5 34.1 648.5 955.7\n',
                           good='all_souls_000013\nall_souls_000026\n', ok='all_souls_000099\n',
                           junk='oxford_000317\n').items():
        (tmp_path/'lab'/f'all_souls_1_{kind}.txt').write_text(text)
    with pytest.warns(match="1 of the images to be found are not in .*'all_souls_000099'"):
        images, (q,) = read_oxford(tmp_path)
    assert sorted(images) == ['all_souls_000013', 'all_souls_000026', 'oxford_000317']
    assert (q.name, q.image, q.box, q.junk) == ('all_souls_1', 'all_souls_000013',
                                                (136.5, 34.1, 648.5, 955.7), {'oxford_000317'})
    assert len(q.positive) == 3        # one that is not there counts as not found, as in the official program
    assert (ranked_ap(['all_souls_000013', 'all_souls_000026', 'oxford_000317'], q.positive, q.junk)
            == pytest.approx(2/3))
    (tmp_path/'lab'/'all_souls_1_query.txt').write_text('oxc1_all_souls_000077 1 2 3 4\n')
    with pytest.raises(ValueError, match="queries: expected the image of 'all_souls_1'"):
        read_oxford(tmp_path)
    (tmp_path/'lab'/'all_souls_1_query.txt').write_text('oxc1_all_souls_000013 1 2 3\n')
    with pytest.raises(ValueError, match='queries: expected an image and four numbers'): read_oxford(tmp_path)

def test_two_boxes_of_one_photograph_are_two_queries(tmp_path):
    _, queries = own(tmp_path, 'query,box,positive\na/1.png,1 2 30 40,a/2.png\na/1.png,5 6 50 60,b/1.png\n')
    assert [(q.name, q.image) for q in queries] == [('a/1.png', 'a/1.png'), ('a/1.png (2)', 'a/1.png')]
    ranking = ['a/1.png', 'a/2.png', 'b 2.png', 'b/1.png']
    score, aps = retrieval_map([ranking]*2, queries)
    first, second = (100*ranked_ap(ranking, q.positive, q.junk) for q in queries)
    assert aps == {'a/1.png': first, 'a/1.png (2)': second} and first > second
    assert score == pytest.approx((first + second)/2)

def test_broken_images_of_paris(tmp_path):
    assert len(BROKEN) == 20 and 'paris_louvre_000136' in BROKEN
    made_city(tmp_path, landmarks=1, others=0)
    (tmp_path/'jpg'/'paris_louvre_000136.jpg').write_bytes(b'broken')
    assert 'paris_louvre_000136' not in read_oxford(tmp_path)[0]

def test_missing_city_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='ROOT/jpg.*ROOT/lab'): read_oxford(tmp_path)

def test_made_city(city):
    images, queries = read_oxford(city)
    assert len(images) == 3*6 + 5 and [(len(q.positive), len(q.junk)) for q in queries] == [(5, 1)]*3
    for q in queries:
        h, w = decode(images[q.image]).shape[1:]
        assert (q.image in q.positive and 0 <= q.box[0] < q.box[2] <= w + .1
                and 0 <= q.box[1] < q.box[3] <= h + .1)

def own(tmp_path, text):
    for n in ('a/1.png', 'a/2.png', 'b/1.png', 'b 2.png'):
        (tmp_path/n).parent.mkdir(exist_ok=True)
        Image.new('RGB', (90, 70)).save(tmp_path/n)
    (tmp_path/'q.csv').write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                # the list itself is no news
        return read_queries(tmp_path, tmp_path/'q.csv')

def test_list_of_queries(tmp_path):
    images, (p, q) = own(tmp_path, 'query,box,positive,junk\na/1.png,"1, 2, 30, '
                                   '40",a/2.png;b 2.png,b/1.png\nb/1.png,,b/1.png;a/1.png,\n')
    assert sorted(images) == ['a/1.png', 'a/2.png', 'b 2.png', 'b/1.png']
    # the query itself does not count
    assert (p.box == (1, 2, 30, 40) and p.positive == {'a/2.png', 'b 2.png'}
            and p.junk == {'b/1.png', 'a/1.png'})
    assert q.box is None and q.positive == {'b/1.png', 'a/1.png'} and not q.junk    # unless the list names it

@pytest.mark.parametrize('text, message', [
    ('query,box,positive\n', 'queries: expected at least one'),
    ('name,box\na/1.png,\n', 'queries: expected the columns'),
    ('query,positive\na/1.png,a/9.png\n', "queries: expected paths inside .*'a/9.png'"),
    ('query,positive\nc.png,a/1.png\n', "queries: expected the image of 'c.png'"),
    ('query,positive\na/1.png,\n', 'queries: expected something to be found'),
    ('query,box,positive\na/1.png,1 2 3,a/2.png\n', 'queries: expected four numbers'),
    ('query,box,positive\na/1.png,left,a/2.png\n', 'queries: expected four numbers'),
    ('query,box,positive\na/1.png,nan 1 2 3,a/2.png\n', "box of 'a/1.png' .* inside 90 × 70 pixels"),
    ('query,box,positive\na/1.png,30 1 20 40,a/2.png\n', 'left < right'),
    ('query,box,positive\na/1.png,91 1 99 40,a/2.png\n', 'left < right')])
def test_wrong_lists(tmp_path, text, message):
    with pytest.raises(ValueError, match=message): own(tmp_path, text)

def test_a_list_as_excel_writes_it(tmp_path): # with a byte order mark
    assert len(own(tmp_path, '\ufeffquery,positive\na/1.png,a/2.png\n')[1]) == 1

# --- the experiment

TINY = ['-p', 'epochs=1', '-p', 'k=4', '-p', 'sides=[64]', '-p', 'dim=16', '-p', 'size=32']

def test_command_and_again(tmp_path):
    where = tmp_path/'run'
    for _ in range(2):
        assert main(['run', 'retrieval', '--preset', 'retrieval_small', '--out', str(where), *TINY]) == 0
        m = json.loads((where/'metrics.json').read_text())
        assert (set(m['mAP']) == {'random', 'random, calibrated', 'deepcluster', 'blind'}
                and all(0 <= v <= 100 for v in m['mAP'].values()))
        assert len(m['queries']['random']) == 6
        seconds = json.loads((where/'runs.json').read_text())['random']['seconds']
    assert (seconds == json.loads((where/'runs.json').read_text())['random']['seconds']
            and (where/'figures'/'retrieval.png').exists())
    assert 'machinery runs' in (where/'report.html').read_text()
    same_format(where, made_runs.retrieval(tmp_path/'made'))

def test_whitening_is_learned_on_the_other_city(tmp_path, city, monkeypatch):
    from deepcluster_nb import retrieval
    other, real = made_city(tmp_path/'other', landmarks=2, others=3, seed=7), retrieval.learn_whitening
    seen = []
    def spied(net, paths, *more, **how): seen.append(list(paths)); return real(net, paths, *more, **how)
    monkeypatch.setattr(retrieval, 'learn_whitening', spied)
    (tmp_path/'q.csv').write_text('query,positive\ncity0_000000.jpg,city0_000001.jpg\n')
    args = dict(epochs=0, data='folder', root=city/'jpg', queries=tmp_path/'q.csv', pca_root=other)
    assert main(['run', 'retrieval', '--out', str(tmp_path/'run'), *TINY,
                 *(x for pair in args.items() for x in ('-p', '='.join(map(str, pair))))]) == 0
    wanted = sorted((other/'jpg').iterdir())
    assert [sorted(map(str, s)) for s in seen] == [list(map(str, wanted))]*2              # two networks

def test_networks_search_and_pictures_are_as_asked(tmp_path, city, monkeypatch):
    other = sorted((made_city(tmp_path/'other', landmarks=2, others=3, seed=7)/'jpg').iterdir())
    trained, fits, calls, maps, shown = convnet('alexnet_small', 4, dropout=0., seed=9).eval(), [], [], [], []
    names = [f'city0_{i:06d}.jpg' for i in range(23)]
    a, b, c, d, *rest = names
    ranking, judge = [d, b, rest[0], a, rest[1], c, *rest[2:]], retrieval_map
    def fit(config, images, echo):
        fits.append((config, images))
        return SimpleNamespace(net=trained)
    def whiten(net, paths, dim, progress, **how):
        calls.append((net, dim, how))
        return len(calls)
    def find(net, images, queries, pca, progress, **how):
        assert (net, pca, how) == (calls[-1][0], len(calls), calls[-1][2])
        return [ranking if net is trained else ranking[::-1]]
    def judged(rankings, queries):
        maps.append((rankings, judge(rankings, queries)[0]))
        return judge(rankings, queries)
    def show(images, **how):
        shown.append((images, draw(images, **how)))
        return shown[-1][1]
    from deepcluster_nb import data
    draw = data.show_images
    for name,f in {'fit.fit': fit, 'retrieval.learn_whitening': whiten, 'retrieval.search': find,
                   'retrieval.retrieval_map': judged, 'data.show_images': show}.items():
        monkeypatch.setattr(f'deepcluster_nb.{name}', f)
    (tmp_path/'q.csv').write_text(f'query,positive,junk\n{a},{b};{c},{d}\n')
    given = dict(data='folder', root=city/'jpg', queries=tmp_path/'q.csv', pca_root=tmp_path/'other',
                 levels=2, dim=7, sides=[64, 96], seed=3, epochs=1, k=4, size=32, device='cpu',
                 precision='float32')
    assert main(['run', 'retrieval', '--out', str(tmp_path/'run'),
                 *(x for pair in given.items() for x in ('-p', '='.join(map(str, pair))))]) == 0
    how = dict(sides=(64, 96), levels=2, device='cpu', precision='float32')
    nets = [net for net,*_ in calls]
    assert [more for _,*more in calls] == [[7, how]]*3 and nets[2] is trained
    (config, images), = fits
    assert (config.k, config.epochs, config.size, config.seed, len(images)) == (4, 1, 32, 3, 15)
    twin = random_twin(trained, 3)
    assert all(torch.equal(v, twin.state_dict()[n]) for n,v in nets[0].state_dict().items())
    calibrate_bn(twin, read_images(other), 32, 32)          # of the other city, and in any order
    assert all(torch.allclose(v, twin.state_dict()[n], atol=1e-5) for n,v in nets[1].state_dict().items())
    # d and a do not count: b is the first of the rest, c the fourth
    m = json.loads((tmp_path/'run'/'metrics.json').read_text())['mAP']
    assert m['deepcluster'] == pytest.approx(100*(1/2 + 1/2*(1/3 + 1/2)/2)) and m['random'] < 20
    blind = maps[3:]
    assert len(blind) == 100 and m['blind'] == pytest.approx(sum(v for _,v in blind)/100)
    assert len({tuple(r) for (r,),_ in blind}) == 100 and all(sorted(r) == names for (r,),_ in blind)
    ((pictures, fig),) = shown
    wanted = [decode(city/'jpg'/n) for n in (a, *ranking[:5])]
    assert len(pictures) == 6 and all(torch.equal(p, w) for p,w in zip(pictures, wanted))
    frames = [ax.spines['left'].get_edgecolor() for ax in fig.axes[1:]]
    assert frames == [plt.matplotlib.colors.to_rgba(c) for c in ('.5', 'C2', 'C3', '.5', 'C3')]

def test_own_folder(tmp_path, city):
    (tmp_path/'q.csv').write_text('query,positive\ncity0_000000.jpg,city0_000001.jpg;city0_000002.jpg\n')
    args = ['-p', 'data=folder', '-p', f"root={city/'jpg'}", '-p', f"queries={tmp_path/'q.csv'}",
            '-p', 'epochs=0']
    assert main(['run', 'retrieval', '--out', str(tmp_path/'run'), *TINY, *args]) == 0
    m = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert (list(m['queries']['random']) == ['city0_000000.jpg']
            and set(m['mAP']) == {'random', 'random, calibrated', 'blind'})

def test_a_run_goes_on_with_the_files_it_began_with(tmp_path, city, capsys):
    shutil.copytree(city/'jpg', tmp_path/'a'); shutil.copytree(city/'jpg', tmp_path/'white')
    names = sorted(p.name for p in (tmp_path/'a').iterdir())
    asks = lambda *found: (tmp_path/'q.csv').write_text(f"query,positive\n{names[0]},{';'.join(found)}\n")
    def again():
        got = main(['run', 'retrieval', '--out', str(tmp_path/'run'), *TINY, '-p', 'data=folder',
                    '-p', 'epochs=0', '-p', f"root={tmp_path/'a'}", '-p', f"queries={tmp_path/'q.csv'}",
                    '-p', f"pca_root={tmp_path/'white'}"])
        return got, capsys.readouterr().err.strip()
    asks(names[1])
    assert again()[0] == 0
    kept = (tmp_path/'run'/'runs.json').read_bytes()
    def refused(what, why):
        got, err = again()
        assert got != 0 and f"root: expected the {what} images" in err and why in err
        assert len(err.splitlines()) == 1 and (tmp_path/'run'/'runs.json').read_bytes() == kept
    asks(names[1], names[2])
    refused('searched', "1 of 24 images have other contents, the first is 'q.csv'")
    asks(names[1])
    shutil.copy(tmp_path/'a'/names[2], tmp_path/'a'/names[3])
    refused('searched', f"1 of 24 images have other contents, the first is '{names[3]}'")
    shutil.copy(city/'jpg'/names[3], tmp_path/'a')
    (tmp_path/'white'/names[1]).unlink()
    refused('whitening', 'it had 23 images and now there are 22')
    shutil.copy(city/'jpg'/names[1], tmp_path/'white')
    assert again()[0] == 0

def test_missing_city_is_one_line_and_leaves_nothing(tmp_path, capsys):
    assert main(['run', 'retrieval', '--preset', 'retrieval_oxford5k', '-p', f'root={tmp_path}',
                 '--out', str(tmp_path/'run')]) != 0
    err = capsys.readouterr().err.strip()
    assert 'ROOT/lab' in err and len(err.splitlines()) == 1 and not (tmp_path/'run').exists()

def test_boxes_count_in_the_pixels_of_the_file(net, tmp_path): # whatever its EXIF note says
    exif = Image.Exif(); exif[0x112] = 6
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    im.save(tmp_path/'plain.png'); im.save(tmp_path/'turned.png', exif=exif)
    paths = [tmp_path/f'{n}.png' for n in ('plain', 'turned')]
    a, b = (learn_whitening(net, [p], 4, sides=(64,)) for p in paths)
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(*descriptors(net, paths, a, [(40, 10, 85, 50)]*2, sides=(64,)))

def test_fewer_levels_are_fewer_regions(net):
    im = torch.zeros(3, 64, 96, dtype=torch.uint8)
    for n in (1, 2): assert [len(v) for v in region_vectors(net, im, (96, 64), n)] == [
        len(rmac_regions(h, w, n)) for h,w in ((8, 12), (5, 8))]
