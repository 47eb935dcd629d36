"Several ranks: the same clusters bit for bit, gradients of the whole batch, and an end that is never a hang."
import json, os, signal, sys, threading, time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
import pytest, torch

HERE = str(Path(__file__).parent)                          # where the processes find rank_tasks
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (HERE, os.environ.get('PYTHONPATH'))))
import rank_tasks as tasks
from deepcluster_nb.model import ARCHS, SIZES
from rank_tasks import SMALL, made_images, sha256
from deepcluster_nb.data import generator
from deepcluster_nb.fast import distributed, features, kmeans, training
from deepcluster_nb.fast.distributed import bounds, in_ranks
from deepcluster_nb.fit import fit, load_run, network, optimizers, resolve

pytestmark = [pytest.mark.usefixtures('one_thread'),
              pytest.mark.skipif(not sys.platform.startswith('linux'), reason='gloo in forked processes')]

# -------------------------------------------------------------------------------- clustering

@pytest.fixture(autouse=True, scope='module')
def tiny_network(): # the ranks' own, and nobody else's
    tasks.register()
    yield
    del ARCHS['tiny'], SIZES['tiny']

def test_every_image_is_in_one_share():
    for n in (1, 7, 512, 513, 5000):
        for shares in (1, 2, 3, 4, 9):
            for unit in (1, 512):
                b = bounds(n, shares, unit)
                sizes = [j - i for i,j in zip(b, b[1:])]
                assert b[0] == 0 and b[-1] == n and len(sizes) == shares and sizes[0] > 0 and min(sizes) >= 0
                assert all(i % unit == 0 or i == n for i in b) and max(sizes) - min(sizes) < 2*unit

def cases():
    noise = torch.randn(1003, 24, generator=generator(0, 'ranks'))
    bad = noise[:40].clone()
    bad[20:] += 100                                             # nobody's: half of the clusters are empty
    sides = torch.cat([torch.randn(200, 4, generator=generator(1, 'ranks')) + 50*s for s in range(3)])
    uneven = {1: [0, 1003], 2: [0, 7, 1003], 3: [0, 900, 901, 1003], 4: [0, 1, 500, 502, 1003]}
    without = {1: [0, 1003], 2: [0, 1003, 1003], 3: [0, 0, 1003, 1003], 4: [0, 5, 5, 5, 1003]}
    few = torch.tensor([[0., -0.], [1., 0], [-0., 1]])
    return {'even shares': (noise, 40, None, {}),
            'uneven shares': (noise, 40, uneven, {}), 'a rank without points': (noise, 40, without, {}),
            'empty clusters': (noise, 40, None, dict(init=bad, niter=3)),
            "the paper's repair": (noise, 40, None, dict(init=bad, repair='paper')),
            'clusters on some ranks only': (sides, 30, None, {}),
            'as many clusters as points, fewer points than ranks': (few, 3, None, {}),
            'one cluster': (noise, 1, None, dict(seed=3, epoch=2))}

@pytest.fixture(scope='module')
def alone():
    found = {}
    for name,(x, k, _, more) in cases().items():
        c = kmeans.kmeans(x, k, **more)
        found[name] = sha256(c.assign, c.centroids), c.objective[-1], c.n_empty
    return found

@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_the_same_bits_for_any_number_of_ranks(world, alone):
    answers = in_ranks(world, tasks.kmeans, list(cases().values()))
    for found in answers:
        assert [f[0] for f in found] == [f[0] for f in alone.values()]
        assert [f[2] for f in found] == [f[2] for f in alone.values()]
        assert [f[1] for f in found] == pytest.approx([f[1] for f in alone.values()], rel=1e-9, abs=1e-9)

def test_refused_k_means():
    with pytest.raises(RuntimeError,
                       match='rank [01]: ValueError: k: expected 1 to 3, the number of points, got'):
        in_ranks(2, tasks.kmeans, [(torch.zeros(3, 2), 4, None, {})])

@pytest.mark.parametrize('n, ends', [(300, None), (300, [0, 290, 300, 300]), (20, None),
                                     (20, [0, 19, 19, 20])])
def test_pca_of_all_features_on_every_rank(n, ends):
    x = (torch.randn(n, 32, generator=generator(n)) * torch.linspace(3, .1, 32) + 5).half()
    p = features.PCA(8)
    for b in x.split(64): p.add(b)
    p.solve()
    found = in_ranks(3, tasks.pca, x, 8, ends)
    assert len({sha256(*f) for f in found}) == 1
    assert torch.allclose(found[0][0], p.mean, rtol=1e-12)
    assert torch.allclose(found[0][1], p.axes, rtol=1e-6, atol=1e-9)

def test_pca_refuses_what_is_no_number_on_any_rank():
    x = torch.randn(40, 8, generator=generator(0))
    x[39, 3] = torch.nan
    with pytest.raises(RuntimeError, match='rank 0: ValueError: x: expected finite features, got 1 NaN'):
        in_ranks(2, tasks.pca, x, 4)

# -------------------------------------------------------------------------------- training

def flat(tensors): return torch.cat([t.flatten().float() for t in tensors])
def apart(a, b): return float((flat(a) - flat(b)).norm() / flat(b).norm())

def one_process(config, n, weights=None):
    c, net = resolve(config), network(config)
    opts, seen = optimizers(net, c), []
    def keep(*_): seen.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    idx, assign = torch.arange(n), torch.arange(60) % 6
    loss = training.train_epoch(net, made_images(), idx, assign, opts, c, 0, weights, keep)
    return loss, seen, [b.clone() for b in net.buffers()]

STILL = replace(SMALL, lr=1e-4, sync_bn=True)

# 23 images: of the last three, more than one rank gets some among two, not among four
@pytest.mark.parametrize('world, weights, more', [(2, None, {}), (4, None, {}), (2, None, dict(jitter=.4)),
                                                  (3, torch.linspace(.5, 1.5, 6), {})])
def test_gradients_of_the_whole_batch(world, weights, more):
    c = replace(STILL, **more)
    loss, grads, buffers = one_process(c, 23, weights)
    for other, g, b in in_ranks(world, tasks.gradients, c, 23, weights):
        assert other == pytest.approx(loss, rel=1e-6)
        assert [apart(x, y) < 2e-5 for x,y in zip(g, grads)] == [True, True]
        assert apart(b, buffers) < 1e-5

def test_batch_norm_of_each_rank_is_that_of_its_slice():
    c = replace(STILL, sync_bn=False)
    found = in_ranks(2, tasks.gradients, c, 20)
    net = network(resolve(c))
    parts = []
    for idx in torch.arange(20).split(10):
        g = generator(c.seed, 'step', 0, 0)
        images = made_images()
        boxes = distributed.crop_boxes(images.shapes[:20, 1:], g, (c.min_scale, 1.))[idx]
        flip = (torch.rand(20, generator=g) < .5)[idx]
        crop = lambda im: distributed.crop_inside(im, boxes, c.size, flip)
        x = distributed.training_input(images.batch(idx), crop, True, torch.float32)
        x = x.contiguous(memory_format=torch.channels_last)
        net.zero_grad()
        torch.nn.functional.cross_entropy(net.train()(x), idx % 6).backward()
        parts.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    mean = [(a + b)/2 for a,b in zip(*parts)]
    assert apart(found[0][1][0], mean) < 2e-5 and apart(found[1][1][0], mean) < 2e-5
    assert apart(found[0][1][0], one_process(c, 20)[1][0]) > .01     # and not that of the whole batch
    assert all(torch.equal(a, b) for a,b in zip(found[0][2], found[1][2]))  # rank 0's statistics, everywhere

def test_dropout_is_another_one_on_every_rank():
    first, second = in_ranks(2, tasks.seeds, replace(SMALL, dropout=.5))
    assert len(first) == 2 and all(a != b for a,b in zip(first, second))

def test_every_rank_follows_the_schedule(): # two steps of the trunk's and the head's optimizer
    c = replace(SMALL, lr_schedule='cosine')
    for rates in in_ranks(2, tasks.rates, c): assert rates == pytest.approx([.05, .05, .025, .025])

def test_compressed_gradients_have_eight_binary_digits():
    exact = one_process(STILL, 20)[1][0]
    found = in_ranks(2, tasks.gradients, replace(STILL, compress_gradients=True), 20)
    assert 1e-4 < apart(found[0][1][0], exact) < 1e-2
    assert all(torch.equal(a, b) for a,b in zip(found[0][1][0], found[1][1][0]))

# -------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope='module')
def whole(tmp_path_factory): # undisturbed, of two ranks
    where = tmp_path_factory.mktemp('whole')/'run'
    return where, in_ranks(2, tasks.run, replace(SMALL, run_dir=str(where)))

def test_a_run_of_two_ranks_is_one_run(whole, tmp_path):
    where, (a, b) = whole
    assert a == b and len(a[0]) == 2
    run, log = load_run(where), [json.loads(l) for l in (where/'log.jsonl').read_text().splitlines()]
    assert sha256(*run.net.state_dict().values()) == a[1] and sha256(run.clustering.assign) == a[2]
    assert [r['loss'] for r in log] == a[0]
    assert {p.name for p in where.iterdir()} == {'params.yaml', 'data.json', 'log.jsonl', 'assignments',
                                                 'clusters.csv', 'checkpoint', 'figures'}
    alone = fit(replace(SMALL, sync_bn=True), made_images(), echo=None)
    (shared, *_), _ = in_ranks(2, tasks.run, replace(SMALL, sync_bn=True))
    assert [r['loss'] for r in alone.log] == pytest.approx(shared, rel=1e-3)

def test_ranks_cluster_as_one_process_does(monkeypatch): # 20 iterations, of the same draws
    asked, c = [], resolve(SMALL)
    monkeypatch.setattr(training, 'kmeans', lambda x, *args: asked.append(args))
    for epoch in range(3): training.by_kmeans(None, c, epoch)
    assert [a[:4] for a in asked] == [(6, 20, 0, epoch) for epoch in range(3)]
    assert in_ranks(2, tasks.clusterings, c) == [[a[:4] for a in asked]]*2

def test_a_checkpoint_of_every_second_epoch(tmp_path): # after the first the ranks agree that none is due
    config = replace(SMALL, epochs=3, checkpoint_minutes=100.)
    each, second = (in_ranks(2, tasks.run, replace(config, checkpoint_epochs=n, run_dir=str(tmp_path/str(n))))
                    for n in (1, 2))
    assert each == second and len(each[0][0]) == 3

def goes_on(config, whole): # in the same bits; what was logged before, rank 0 knows
    a, b = in_ranks(2, tasks.run, config)
    assert a == whole[1][0] and b[1:] == a[1:]

def ends(world, config, *args, task=tasks.trouble):
    "What the ranks say at the end, and how many seconds it took from what happened."
    with pytest.raises(RuntimeError) as e: in_ranks(world, task, config, *args)
    when = Path(config.run_dir).parent/'when'
    return str(e.value), time.time() - float(when.read_text()) if when.exists() else 0.

@pytest.mark.parametrize('rank, at', [(0, (0, 2)), (1, (1, 1)), (1, (1, 0))])
def test_a_signal_to_one_rank_stops_all_of_them_and_the_run_goes_on(tmp_path, whole, rank, at):
    c = replace(SMALL, run_dir=str(tmp_path/'r'))
    said, seconds = ends(2, c, rank, at, 'SIGTERM')
    assert 'rank 0: Stopped' in said and 'rank 1: Stopped' in said and f'SIGTERM came to rank {rank}' in said
    assert seconds < 20
    goes_on(c, whole)

@pytest.mark.parametrize('rank, at', [(0, (0, 2)), (1, (1, 1)), (0, (1, 0)), (1, (1, 0))])
def test_a_killed_rank_ends_the_run_and_it_goes_on_in_the_same_bits(tmp_path, whole, rank, at):
    c = replace(SMALL, run_dir=str(tmp_path/'r'))
    said, seconds = ends(2, c, rank, at, 'SIGKILL')
    assert f'rank {rank}: it ended with status -9' in said
    assert f'rank {1 - rank}: Lost: rank {rank}: it is gone' in said and seconds < 20
    goes_on(c, whole)

@pytest.mark.parametrize('at', [(0, 2), (1, 0)])
def test_an_error_on_one_rank_is_told_by_all(tmp_path, at):
    said, seconds = ends(3, replace(SMALL, run_dir=str(tmp_path/'r')), 1, at, 'raise')
    why = 'ValueError: something is wrong here'
    assert said == f'rank 0: Lost: rank 1: {why}; rank 1: {why}; rank 2: Lost: rank 1: {why}' and seconds < 20

def test_a_rank_that_stands_still(tmp_path, monkeypatch): # as on a machine that has lost its network
    monkeypatch.setattr(distributed, 'PATIENCE', 3.)
    monkeypatch.setattr(distributed, 'GRACE', 1.)
    said, seconds = ends(2, replace(SMALL, run_dir=str(tmp_path/'r')), 1, (0, 2), 'SIGSTOP')
    assert said == 'rank 0: it ended with status 1; rank 1: it ended with status -9' and seconds < 40

def served(answer): # a process with a store, as torchrun's on the first machine
    store = torch.distributed.TCPStore('localhost', 0, 1, True, timeout=timedelta(seconds=60))
    answer.send(store.port)
    time.sleep(60)

@pytest.fixture
def far_store(): # (a connection to the store of another process, that process)
    answers, answer = get_context('spawn').Pipe()
    p = get_context('spawn').Process(target=served, args=(answer,), daemon=True)
    p.start()
    yield torch.distributed.TCPStore('localhost', answers.recv(), 1, False, timeout=timedelta(seconds=3)), p
    p.kill(); p.join()

def test_signs_of_life_while_a_connection_waits(far_store):
    def wait():
        with suppress(torch.distributed.DistError): far_store[0].get('what nobody says')
    waiting = threading.Thread(target=wait)
    notes = distributed.Notes(distributed.own_connection(far_store[0]), 1, 2)
    waiting.start()
    time.sleep(.2)
    notes.beat(1)
    assert notes.sign(1) == '1' and waiting.is_alive()
    waiting.join()

def test_a_store_that_does_not_answer(far_store, monkeypatch): # the cable to its machine is cut
    monkeypatch.setattr(distributed, 'PATIENCE', 1.)
    notes, ended = distributed.Notes(distributed.own_connection(far_store[0]), 1, 2), []
    watch = distributed.Watch(distributed.Ranks(1, 2), notes)
    monkeypatch.setattr(watch, 'finish', ended.append)
    notes.beat(0)
    os.kill(far_store[1].pid, signal.SIGSTOP)
    watch.start(); watch.join(30)
    assert ended == [dict(rank=0, text='no answer from its machine for 1 s')]

def test_not_a_number_on_one_rank_stops_all_before_the_update(tmp_path):
    c = replace(SMALL, run_dir=str(tmp_path/'r'))
    said, _ = ends(2, c, 1, (1, 2), 'nan')
    assert said.count('FloatingPointError: loss or gradient is not finite in epoch 1, step 1, images [') == 2
    run = load_run(c.run_dir)
    assert all(t.isfinite().all() for t in run.net.state_dict().values())

def test_ranks_with_other_clusters_are_named(tmp_path):
    said, _ = ends(3, SMALL, task=tasks.other_clusters)
    assert said.count('RuntimeError: clusters: rank 1 found others than rank 0') == 3

@pytest.mark.parametrize('i', [0, 30, 59])
def test_other_pixels_are_other_images(monkeypatch, i): # the first, the middle and the last are looked at
    images, other, held = made_images(), made_images(), []
    other[i][0, 3, 4] ^= 1
    monkeypatch.setattr(distributed, 'differing', lambda ranks, data: held.append(data))
    for some in (images, made_images(), other): distributed.same_images(some, None)
    assert held[0] == held[1] != held[2]

def test_a_broken_image_on_one_rank(tmp_path):
    from PIL import Image
    for r in range(2):
        (tmp_path/str(r)/'a').mkdir(parents=True)
        for i in range(12): Image.new('RGB', (24, 24), (20*i, 100, 50)).save(tmp_path/str(r)/'a'/f'{i}.png')
    broken = tmp_path/'1'/'a'/'7.png'
    broken.write_bytes(broken.read_bytes()[:60])
    said, _ = ends(2, replace(SMALL, k=2, pca=4, batch_size=8), str(tmp_path), task=tasks.broken_image)
    assert 'rank 0: Lost: rank 1: Unreadable: ' in said and '7.png' in said

def test_a_full_disk_on_rank_0_loses_nothing(tmp_path, whole):
    c = replace(SMALL, run_dir=str(tmp_path/'r'))
    said, _ = ends(2, c, task=tasks.full_disk)
    assert 'rank 0: Stopped: the disk is full' in said and 'rank 1: Stopped' in said
    (tmp_path/'r'/'full').unlink()
    goes_on(c, whole)

def test_checkpoints_know_no_number_of_ranks(tmp_path, whole):
    c = replace(SMALL, sync_bn=True, run_dir=str(tmp_path/'r'))
    ends(3, c, 2, (0, 2), 'SIGTERM')
    with pytest.warns(UserWarning, match='saved by 3 and goes on with 1 ranks: the last digits will differ'):
        alone = fit(c, made_images(), echo=None)
    undisturbed = fit(replace(c, run_dir=''), made_images(), echo=None)
    assert [r['loss'] for r in alone.log] == pytest.approx([r['loss'] for r in undisturbed.log], rel=1e-3)
    again = in_ranks(2, tasks.run, c)                             # finished: only the clusters are computed
    assert again[0][1:] == again[1][1:] and again[0][1] == sha256(*alone.net.state_dict().values())

@pytest.mark.parametrize('more, says', [
    (dict(parts='plain'), "parts: expected 'fast' with several ranks"),
    (dict(clusterer='pic'), "clusterer: expected 'kmeans' with several ranks"),
    (dict(batch_size=3), 'batch_size: expected at least 4, two images for each of 2')])
def test_what_ranks_can_not_do_is_refused(more, says):
    with pytest.raises(RuntimeError, match=says): in_ranks(2, tasks.run, replace(SMALL, **more))

# -------------------------------------------------------------------------------- the model

def test_the_estimate_of_ranks():
    from deepcluster_nb.estimate import Estimate, on_ranks, rank_table
    c = resolve(replace(SMALL, k=50, pca=16))
    samples = dict(features=[1e-3], pca=[1e-4], axes=[.5], kmeans=[1e-3], training=[1e-2], books=[1e-5],
                   packing=[0.], saving=[0.])
    e = Estimate(c, samples, dict(n=10_000, dim=64, classes=0, network=3*4e6, gradients=4e6,
                                  checkpoint=2*4e6))
    for world in (1, 4):
        found = on_ranks(e, world, float('inf'))
        assert {p: w for p,(_,w) in found.items()} == dict.fromkeys(found, 0.)
        assert found['features'][0] == pytest.approx(10/world)
        assert found['pca'][0] == pytest.approx(1/world + .5)
    slow = on_ranks(e, 2, 1e6)          # a megabyte a second; a ring of two sends once
    assert slow['kmeans'][1] == pytest.approx(21*8*50*16/1e6)
    assert slow['training'][1] == pytest.approx(500*4 - 2/3*50)      # 500 steps of 20 images
    half = on_ranks(replace(e, config=replace(c, compress_gradients=True)), 2, 1e6)
    assert half['training'][1] == pytest.approx(500*2 - 2/3*50)
    assert 'in all' in rank_table(e, 2, 1e6) and '1 MB a second' in rank_table(e, 2, 1e6)

def test_bytes_are_those_of_the_formula():
    for world in (2, 3):
        for sent,_ in in_ranks(world, distributed.measure_sum, 4_000_000):
            assert sent == pytest.approx(distributed.ring_bytes(4_000_000, world), rel=.02)

# -------------------------------------------------------------------------------- the command

def test_the_command_says_in_one_line_who_ended(tmp_path, capsys, monkeypatch):
    from types import SimpleNamespace as Fake
    from deepcluster_nb.experiments import ended, told_end
    killed = Fake(failures={0: Fake(timestamp=3, exitcode=1), 1: Fake(timestamp=2, exitcode=-9)})
    assert told_end(killed, tmp_path/'end', tmp_path/'words') == 1
    assert capsys.readouterr().err == 'deepcluster-nb: rank 1 was killed by SIGKILL\n'
    monkeypatch.setenv('DEEPCLUSTER_END', str(tmp_path/'end'))
    assert (ended('deepcluster-nb: k: expected 2', 2), ended('deepcluster-nb: stopped', 143)) == (2, 143)
    assert capsys.readouterr().err == ''                          # the process that started them says it
    failed = Fake(failures={0: Fake(timestamp=3, exitcode=143), 1: Fake(timestamp=2, exitcode=2)})
    assert told_end(failed, tmp_path/'end', tmp_path/'words') == 2
    assert capsys.readouterr().err == 'deepcluster-nb: k: expected 2\n'
    (tmp_path/'end').unlink()
    (tmp_path/'words').write_text('rank 1: it is gone')           # of a rank that was ended by force
    assert told_end(failed, tmp_path/'end', tmp_path/'words') == 1
    assert capsys.readouterr().err == 'deepcluster-nb: rank 1: it is gone\n'

# -------------------------------------------------------------------------------- a start again

def parts_of(store, world, within=5.): # by rank: the keys of the part of the store that they agree on
    found = {}
    def meet(rank):
        time.sleep(.1*((rank*7) % world))
        try: found[rank] = distributed.own_part_of(store, rank, world, within)
        except distributed.Lost as e: found[rank] = e
    threads = [threading.Thread(target=meet, args=(r,), daemon=True) for r in range(world)]
    for t in threads: t.start()
    for t in threads: t.join(20)
    return found

def test_after_a_restart_nothing_is_left_of_the_ranks_before(monkeypatch):
    monkeypatch.setattr(distributed, 'BEAT', .02)
    store = torch.distributed.HashStore()                  # which outlives its ranks, as torchrun's does
    for start in range(3):
        parts = parts_of(store, 4)
        assert sorted(parts) == [0, 1, 2, 3] and not any(p.check(['end']) for p in parts.values())
        parts[start].set('end', f'of start {start}')       # a note, of whichever rank
        assert all(p.get('end') == f'of start {start}'.encode() for p in parts.values())

def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(distributed, 'BEAT', .02)
    store = torch.distributed.HashStore()
    parts_of(store, 4)                                     # of whom 1 and 3 are gone
    later = threading.Thread(target=distributed.own_part_of, args=(store, 2, 4), daemon=True)
    later.start()
    with pytest.raises(distributed.Lost, match='^ranks 1, 3: not here within 1 s'):
        distributed.own_part_of(store, 0, 4, 1.)
    later.join(5)
    assert not later.is_alive()
