"""The recorded step: on a CPU, where a tape replays operators in the same memory as a CUDA graph would; on a
GPU that isn't there; and, marked cuda, on one that is."""
import gc, math, os, signal, warnings, weakref
from dataclasses import replace
from functools import partial
import pytest, torch
from torch import Tensor, nn
from test_feeding import gpu, marks, network_there, there
from deepcluster_nb import fit as around, probes, training
from deepcluster_nb.data import digits, generator
from deepcluster_nb.fast import feeding, graph, training as eager
from deepcluster_nb.fast.crops import network_input
from deepcluster_nb.fast.features import feature_batches, folded
from deepcluster_nb.fast.graph import Parcel, taped
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.fit import Config, fit, network, optimizers, resolve
from deepcluster_nb.model import convnet, reset_top_layer
from deepcluster_nb.switches import resize_head
from deepcluster_nb.runs import Stopped, load_checkpoint
from deepcluster_nb.sources import load_images

pytestmark = pytest.mark.usefixtures('one_thread')
IMAGES = digits('train').subset(range(40))
SMALL = Config(dataset='digits', k=10, pca=16, epochs=2, passes=1, batch_size=16, min_scale=.5,
               precision='float32', device='cpu')

def tensors(run): # of a run: what would be in its checkpoint, but for momentum
    return [*run.net.state_dict().values(), run.clustering.assign, run.clustering.centroids]

def same(a, b): return len(a) == len(b) and all(torch.equal(p, q) for p,q in zip(a, b))

@pytest.fixture
def recordings(monkeypatch): # fit records on a tape; how often it does
    made = []
    def counted(f): made.append(1); return taped(f)
    parts = replace(around.PARTS['fast'], train_epoch=partial(graph.train_epoch, capture=counted))
    monkeypatch.setitem(around.PARTS, 'taped', parts)
    return made

# ---------------------------------------------------------------- a run is the same run

@pytest.mark.parametrize('more, times', [
    (dict(dropout=.5, lr_schedule='cosine'), 1), (dict(sobel=False, sampler='released', head_momentum=.9), 1),
    (dict(sampler='weighted', head='centroids', calibrate=True), 1), (dict(head='kept', head_momentum=.5), 1),
    (dict(jitter=.4, gray=.2), 1), (dict(sobel=False, jitter=.4, lr_schedule='last_quarter'), 1),
    (dict(recluster=1), 1), (dict(arch='resnet18', epochs=1), 1)])
def test_runs_are_the_same_bits(recordings, more, times):
    c = replace(SMALL, **more)
    plain, other = (fit(replace(c, parts=p), IMAGES, echo=None) for p in ('fast', 'taped'))
    assert [r['loss'] for r in plain.log] == [r['loss'] for r in other.log]
    assert same(tensors(plain), tensors(other)) and len(recordings) == times

def test_another_number_of_clusters_is_recorded_anew(recordings):
    c = replace(SMALL, clusterer='pic')
    plain, other = (fit(replace(c, parts=p), IMAGES, echo=None) for p in ('fast', 'taped'))
    ks = {r['ln_k'] for r in other.log}
    assert same(tensors(plain), tensors(other)) and len(recordings) == 2 >= len(ks)

def test_images_of_all_sizes(recordings):
    images = load_images('shapes', n_images=40)
    images = PackedImages(torch.cat([im[:, i % 3:].reshape(-1) for i,im in enumerate(images)]),
                          [(3, 32 - i % 3, 32) for i in range(40)], images.labels, images.classes)
    c = replace(SMALL, epochs=1, k=5)
    plain, other = (fit(replace(c, parts=p), images, echo=None) for p in ('fast', 'taped'))
    assert same(tensors(plain), tensors(other)) and len(recordings) == 1

def stopped_at(at, config, monkeypatch): # by a signal, in a step of an epoch
    after = around.Hooks.after_step
    def stop(self, done, *more):
        if (self.state.epoch, done) == at: os.kill(os.getpid(), signal.SIGTERM)
        after(self, done, *more)
    with monkeypatch.context() as m:
        m.setattr(around.Hooks, 'after_step', stop)
        with pytest.raises(Stopped): fit(config, IMAGES, echo=None)

def test_a_run_that_was_stopped_ends_in_the_same_bits(recordings, tmp_path, monkeypatch):
    c = replace(SMALL, parts='taped', dropout=.5)
    whole = fit(replace(c, run_dir=str(tmp_path/'whole')), IMAGES, echo=None)
    for at in ((0, 2), (1, 1), (1, 3)):           # in the first, before and after the small batch
        folder = tmp_path/str(at)
        stopped_at(at, replace(c, run_dir=str(folder)), monkeypatch)
        assert load_checkpoint(folder/'checkpoint')[:2] == at
        again = fit(replace(c, run_dir=str(folder)), IMAGES, echo=None)
        a, b = (load_checkpoint(f/'checkpoint')[2] for f in (tmp_path/'whole', folder))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)        # momentum, too
        assert [r['loss'] for r in whole.log] == [r['loss'] for r in again.log]

# ---------------------------------------------------------------- an epoch

def epoch(c, train_epoch, epochs=1, weights=None, labels=None, net=None, **how):
    "→ (network, optimizers, sums of the losses)"
    net, seen = net or network(c), []
    opts, idx = optimizers(net, c), torch.arange(40)
    labels = torch.arange(40) % 10 if labels is None else labels
    for i in range(epochs):
        train_epoch(net, IMAGES, idx, labels, opts, c, i, weights,
                    lambda done, n, total, check: seen.append(float(total)), **how)
    return net, opts, seen

def test_the_number_of_steps_brought_together_changes_nothing(monkeypatch):
    c, found = resolve(replace(SMALL, batch_size=8, dropout=.5)), []
    for many in (1, 3, 32):
        monkeypatch.setattr(graph, 'MANY', many)
        net, _, seen = epoch(c, graph.train_epoch, capture=taped)
        found.append([*net.state_dict().values(), torch.tensor(seen)])
    assert same(found[0], found[1]) and same(found[0], found[2])

def made_up_kernel(monkeypatch, images, grey): # → sizes of the tables that it got
    tables = []
    def cut(kernel, flat, table, size, planes, what, dtype):
        tables.append(len(table))
        assert (planes, what, dtype) == (images.size[0], 'grey' if grey else 'normal', torch.float32)
        at = table[:, 0].long() // math.prod(images.size)
        boxes = torch.cat([table[:, 3:5], (table[:, 5:7]*size).round()], 1).float()
        x = flat.view(-1, *images.size).index_select(0, at)
        return network_input(x, lambda im: graph.crop_inside(im, boxes, size, table[:, 7] > 0), grey)
    monkeypatch.setattr(graph, 'crops_cut_by', lambda images: 'kernel')
    monkeypatch.setattr(graph, 'crop_kernel', lambda: None)
    monkeypatch.setattr(graph, 'cut_crops', cut)
    return tables

@pytest.mark.parametrize('jitter', [0., .4])
@pytest.mark.parametrize('sobel', [True, False])
def test_a_table_of_crops_is_recorded_with_the_step(monkeypatch, sobel, jitter):
    c = resolve(replace(SMALL, sobel=sobel, jitter=jitter))
    plain = epoch(c, eager.train_epoch)
    # colors change before Sobel makes them grey
    tables = made_up_kernel(monkeypatch, IMAGES, grey=sobel and not jitter)
    other = epoch(c, graph.train_epoch, capture=lambda f: f)
    assert same(*[list(e[0].state_dict().values()) for e in (plain, other)]) and plain[2] == other[2]
    assert tables == [16, 16, 8]

@pytest.mark.parametrize('weights', [None, torch.linspace(.5, 1.5, 10)])
def test_an_epoch_in_bfloat16_is_the_same_bits(weights):
    c, found = replace(resolve(replace(SMALL, dropout=.5)), precision='bfloat16'), []
    for train_epoch, how in ((eager.train_epoch, {}), (graph.train_epoch, dict(capture=taped))):
        net, opts, seen = epoch(c, train_epoch, 2, weights, **how)
        found.append([*net.state_dict().values(), torch.tensor(seen)])
    assert same(*found)

@pytest.mark.parametrize('every', [1, 50])
def test_a_bad_step_is_named_and_updates_nothing(monkeypatch, every):
    monkeypatch.setitem(graph.CHECK_EVERY, 'cpu', every)
    c, weights, kept = resolve(replace(SMALL, batch_size=8)), torch.ones(10), []
    labels = torch.arange(40) % 9
    weights[9] = float('inf')
    labels[20] = 9                                                          # in step 2 of 0 to 4
    net = network(c)
    def after(*_): kept.append([p.detach().clone() for p in net.parameters()])
    with pytest.raises(FloatingPointError, match=r'epoch 0, step 2, images .16, 17, .*nothing was updated'):
        graph.train_epoch(net, IMAGES, torch.arange(40), labels, optimizers(net, c), c, 0, weights, after,
                          capture=taped)
    assert same(kept[1], list(net.parameters())) and len(kept) == (2 if every == 1 else 4)

def test_a_checkpoint_is_never_made_after_a_bad_step(recordings, tmp_path, monkeypatch):
    c = replace(SMALL, parts='taped', sampler='weighted', run_dir=str(tmp_path/'r'), checkpoint_minutes=0)
    monkeypatch.setattr(around, 'loss_weights', lambda assign, k: torch.full((k,), float('nan')))
    monkeypatch.setitem(graph.CHECK_EVERY, 'cpu', 50)
    with pytest.raises(FloatingPointError, match='epoch 0, step 0'): fit(c, IMAGES, echo=None)
    assert load_checkpoint(tmp_path/'r'/'checkpoint') is None

class Asks(nn.Linear): # a head whose answer depends on a number that Python asks for
    def forward(self, x): return super().forward(x) * (2 if float(x.detach().sum()) > 1e9 else 1)

class AsksForSum(nn.Module): # a layer that depends on a number that Python asks for
    def forward(self, x): return x * (2 if float(x.sum()) > 1e9 else 1)

def test_what_cannot_be_recorded_runs_as_before_and_says_why():
    c, found = resolve(SMALL), []
    for train_epoch, how in ((eager.train_epoch, {}), (graph.train_epoch, dict(capture=taped))):
        net = network(c)
        net.top_layer.__class__ = Asks
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            found.append(epoch(c, train_epoch, 3, net=net, **how))
    assert same(*[list(f[0].state_dict().values()) for f in found]) and found[0][2] == found[1][2]
    assert ['asks for a number' in str(w.message) for w in said] == [True]        # once in three epochs

def test_a_hook_is_called_so_the_network_is_not_recorded():
    c, calls = resolve(SMALL), []
    net = network(c)
    net.features[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match='a hook of features.0 would not be called'):
        epoch(c, graph.train_epoch, net=net, capture=taped)
    assert len(calls) == 3

def test_a_hook_that_comes_after_the_recording():
    c, calls = resolve(SMALL), []
    net = epoch(c, graph.train_epoch, capture=taped)[0]
    extracted(net, graph.prepared_on('cpu', capture=taped))
    net.features[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match='a hook of features.0 would not be called'):
        epoch(c, graph.train_epoch, net=net, capture=taped)
    with pytest.warns(UserWarning, match='a hook of features.0 would not be called'):
        extracted(net, graph.prepared_on('cpu', capture=taped))
    with pytest.warns(UserWarning, match='a hook of features.0 would not be called'):
        probes.probe_features(net, IMAGES, 32, 16, capture=taped)
    assert len(calls) == 3 + 6 + 3

def test_rates_are_numbers_again_after_the_epoch():
    c = resolve(replace(SMALL, lr_schedule='cosine'))
    rates = [[o.param_groups[0]['lr'] for o in epoch(c, t, **how)[1]]
             for t,how in ((eager.train_epoch, {}), (graph.train_epoch, dict(capture=taped)))]
    assert rates[0] == rates[1] and all(type(r) is float for r in rates[1])

def test_one_recording_until_something_else_is_asked_for():
    c, made = resolve(SMALL), []
    def counted(f): made.append(1); return taped(f)
    net = epoch(c, graph.train_epoch, 2, capture=counted)[0]
    assert len(made) == 1
    epoch(c, graph.train_epoch, net=net, capture=counted)                 # new optimizers, the same constants
    assert len(made) == 1
    for i,other in enumerate([replace(c, weight_decay=.1), replace(c, batch_size=20), replace(c, jitter=.4),
                              replace(c, precision='bfloat16')]):
        epoch(other, graph.train_epoch, net=net, capture=counted)
        assert len(made) == 2 + i
    net.features[3].stride = 1
    resize_head(net, 11)                                                  # another head, elsewhere
    reset_top_layer(net, generator(0))
    epoch(replace(c, precision='bfloat16'), graph.train_epoch, net=net, capture=counted)
    assert len(made) == 6

def test_what_is_frozen_later_is_not_trained_by_the_old_recording():
    c = resolve(SMALL)
    net = epoch(c, graph.train_epoch, capture=taped)[0]
    still, moves = net.features[0].weight, net.features[4].weight
    still.requires_grad_(False)
    before = still.clone(), moves.detach().clone()
    epoch(c, graph.train_epoch, net=net, capture=taped)
    assert torch.equal(still, before[0]) and not torch.equal(moves, before[1])

def test_a_recording_goes_with_its_network():
    net = epoch(resolve(SMALL), graph.train_epoch, capture=taped)[0]
    gone = weakref.ref(net)
    assert net in graph.STEPS
    del net
    gc.collect()
    assert gone() is None

def test_a_cpu_and_a_switched_off_graph_take_the_old_way(monkeypatch):
    seen = []
    monkeypatch.setattr(eager, 'train_epoch', lambda *args: seen.append(len(args)) or 0.)
    epoch(resolve(SMALL), graph.train_epoch)
    assert seen == [11]
    c = replace(resolve(SMALL), device='cuda', graph=False)
    with torch.device('meta'): net = convnet('alexnet_small', 10, dropout=0.)
    graph.train_epoch(net, IMAGES, torch.arange(40), torch.arange(40), (), c, 0)
    assert seen == [11, 11]

def test_compiled_inside_of_a_recording(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net, **how: real(net, backend='aot_eager', **how))
    c = resolve(replace(SMALL, lr=1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plain, other = (epoch(replace(c, compile=on), graph.train_epoch, capture=lambda f: f)[2]
                        for on in (False, True))
    assert torch.allclose(torch.tensor(plain), torch.tensor(other), rtol=1e-4)

# ---------------------------------------------------------------- an extraction

def warmed_up(f): # as a GPU is; what a call keeps for the next one would be missing on the tape
    f(); f()
    return taped(f)

@pytest.fixture
def extractions(monkeypatch): # fit replays them, too; how often they are recorded
    made = []
    def counted(f): made.append(1); return warmed_up(f)
    parts = replace(around.PARTS['fast'], cluster=partial(graph.cluster, capture=counted))
    monkeypatch.setitem(around.PARTS, 'replayed', parts)
    return made

def test_clusters_of_replayed_features_are_the_same_bits(extractions):
    c, images = replace(SMALL, epochs=1, batch_size=128, relu=True), digits('train').subset(range(600))
    plain, other = (fit(replace(c, parts=p), images, echo=None) for p in ('fast', 'replayed'))
    assert same(tensors(plain), tensors(other)) and len(extractions) == 1      # of twice 512 and 88
    assert other.net not in graph.EXTRACTIONS

def extracted(net, prepare=folded, **how):
    return torch.cat(list(feature_batches(net, IMAGES, 32, 8, prepare=prepare, **how)))

def moved(net): # to other weights and statistics, in place
    with torch.no_grad():
        for t in graph.all_tensors(net):
            if t.is_floating_point(): t.add_(.01)

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_an_extraction_takes_todays_weights_and_its_results_stay(precision):
    net, made, found = network(resolve(SMALL)), [], []
    def counted(f): made.append(1); return warmed_up(f)
    for _ in range(3):
        found.append([extracted(net, p, precision=precision)
                      for p in (folded, graph.prepared_on('cpu', capture=counted))])
        moved(net)
    assert all(torch.equal(*pair) for pair in found) and len(made) == 1
    assert not torch.equal(found[0][1], found[1][1])

def test_extractions_are_recorded_anew_where_they_must_be():
    net, made = network(resolve(SMALL)), []
    def counted(f): made.append(1); return taped(f)
    def extract(images=IMAGES, size=32, batch_size=8, precision='float32'):
        n = len(made)
        a, b = (torch.cat(list(feature_batches(net, images, size, batch_size, None, precision, prepare=p)))
                for p in (folded, graph.prepared_on('cpu', capture=counted)))
        assert torch.equal(a, b)
        return len(made) - n
    assert [extract(), extract(), extract(batch_size=10), extract(batch_size=10)] == [1, 0, 1, 0]
    assert [extract(IMAGES.subset(range(9))), extract(IMAGES.subset(range(7)))] == [1, 0]
    assert [extract(size=40), extract(size=40), extract(precision='bfloat16')] == [1, 0, 1]
    assert extract() == 1
    resize_head(net, 11)                                                  # which features don't see
    assert extract() == 0
    net.center_box = 'torchvision'
    assert extract() == 1

def test_an_extraction_that_is_compiled_and_recorded(monkeypatch): # traced, without the compiler behind it
    real, c, compiled = torch.compile, resolve(SMALL), []
    def traced(f, **how): compiled.append(1); return real(f, backend='aot_eager', **how)
    monkeypatch.setattr(torch, 'compile', traced)
    net = network(c)
    how = graph.prepared_on('cpu', capture=lambda f: f)
    for _ in range(2):
        a, b = extracted(net), extracted(net, how, compile=True)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        moved(net)
    assert compiled == [1]                                  # for both extractions

def test_a_hook_is_called_in_an_extraction():
    net, calls = network(resolve(SMALL)).eval(), []
    net.features[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match='a hook of features.0 would not be called'):
        a = extracted(net, graph.prepared_on('cpu', capture=taped))
    assert torch.equal(a, extracted(net)) and len(calls) == 12

def test_an_extraction_that_cannot_be_recorded_runs_as_before():
    net = network(resolve(SMALL)).eval()
    net.features.append(AsksForSum())
    with pytest.warns(UserWarning, match='asks for a number') as said:
        a = extracted(net, graph.prepared_on('cpu', capture=taped))
    assert torch.equal(a, extracted(net)) and len(said) == 1

def test_a_kept_extraction_goes_with_its_network():
    net = network(resolve(SMALL))
    extracted(net, graph.prepared_on('cpu', capture=taped))
    assert net in graph.EXTRACTIONS
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None

def test_a_cpu_and_a_switched_off_graph_extract_the_old_way():
    assert graph.prepared_on('cpu') is folded and graph.prepared_on('cuda', False) is folded
    assert graph.prepared_on('cuda').func is graph.recorded

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_features_of_the_probes_recorded(precision):
    net, made = network(resolve(SMALL)), []
    def counted(f): made.append(1); return warmed_up(f)
    how = dict(size=32, batch_size=16, precision=precision)
    a, b = (probes.probe_features(net, IMAGES, capture=capture, **how) for capture in (None, counted))
    assert a.keys() == b.keys() and all(torch.equal(a[m], b[m]) for m in a) and len(made) == 1

# ---------------------------------------------------------------- on a GPU that isn't there

@pytest.mark.filterwarnings('ignore:Accessing the data pointer')
def test_nothing_is_asked_for_and_little_is_pinned(gpu, marks, monkeypatch):
    images, net = there(False, n=24), network_there()
    c = Config(batch_size=4, precision='bfloat16', device='cuda')
    opts = training.sgd(training.trunk_parameters(net), c, .9), training.sgd(net.top_layer.parameters(), c)
    def backward(loss):
        for p in net.parameters(): p.grad = torch.empty_like(p) if p.requires_grad else None
    pins, pin = [], Tensor.pin_memory
    monkeypatch.setattr(Tensor, 'pin_memory', lambda t: pins.append(len(t)) or pin(t))
    monkeypatch.setattr(Tensor, 'backward', backward)
    monkeypatch.setattr(torch.cuda, 'device_of', lambda t: torch.autograd.profiler.record_function('none'))
    monkeypatch.setattr(torch.random, 'fork_rng', lambda *_: torch.autograd.profiler.record_function('none'))
    monkeypatch.setitem(graph.CHECK_EVERY, 'cuda', 1000)
    class Mark:
        def synchronize(self): pass
    class Stream:
        def record_event(self, *_): return Mark()
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: Stream())
    seen, labels = [], torch.arange(24) % 5
    graph.train_epoch(net, images, torch.arange(160) % 24, labels, opts, c, 0, None,
                      lambda done, n, total, check: seen.append((gpu.numbers, gpu.copies, pins.count(4))),
                      capture=lambda f: f)
    assert gpu.convolved == {torch.bfloat16} and len(seen) == 40
    # one look at step 0, one at the end; not one copy that is waited for
    assert len(set(seen[:-1])) == 1 and seen[-1][0] == seen[0][0] + 1
    # two blocks, and what today's crops of a batch bring over
    assert len([n for n in pins if n > 1000]) == 2

def test_blocks_take_turns_and_are_waited_for(monkeypatch):
    log = []
    class Mark:
        def __init__(self, n): self.n = n
        def synchronize(self): log.append(f'wait for {self.n}')
    class Stream:
        def record_event(self): log.append(f'copy {len(log)}'); return Mark(len(log) - 1)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: Stream())
    monkeypatch.setattr(Tensor, 'pin_memory', lambda t: log.append('pinned') or t)
    monkeypatch.setattr(Tensor, 'to', lambda t, device, non_blocking: t.clone())
    parcel = Parcel('cuda')
    for n in (3, 3, 3, 2, 4):
        rows = [(torch.arange(5) + i, torch.rand(2)) for i in range(n)]
        assert all(torch.equal(a, b) for row,there in zip(rows, parcel(rows)) for a,b in zip(row, there))
    assert log == ['pinned', 'copy 1', 'pinned', 'copy 3', 'wait for 1', 'copy 5', 'wait for 3', 'copy 7',
                   'wait for 5', 'pinned', 'copy 10']

def test_how_a_gpu_records(monkeypatch): # made up, with a log: warm-up and recording in one side stream
    log = []
    class Stream:
        def __init__(self, name='side'): self.name = name
        def wait_stream(self, other): log.append(f'{self.name} waits for {other.name}')
    class Entered:
        def __init__(self, name): self.name = name
        def __enter__(self): log.append(f'in {self.name}')
        def __exit__(self, *_): log.append(f'out of {self.name}')
    class Graph:
        def replay(self): log.append('replay')
    monkeypatch.setattr(torch.cuda, 'Stream', lambda: log.append('new stream') or Stream())
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: Stream('main'))
    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', lambda mode: log.append(f'waiting is {mode}'))
    monkeypatch.setattr(torch.cuda, 'stream', lambda s: Entered(s.name))
    monkeypatch.setattr(torch.cuda, 'graph', lambda g, stream, capture_error_mode:
                        Entered(f'{capture_error_mode} graph in {stream.name}'))
    def f(): log.append('f' if not gc.isenabled() else 'garbage is collected')
    replay = graph.captured(f)
    replay()
    recording = ['side waits for main', 'in side', 'f', 'f', 'waiting is error', 'f', 'waiting is 0',
                 'in thread_local graph in side', 'f', 'out of thread_local graph in side', 'out of side',
                 'main waits for side']
    assert log == ['new stream', *recording, 'replay'] and gc.isenabled()
    log.clear()
    other = graph.captured(f)
    assert log == ['new stream', *recording]                 # the first one's is in use
    del replay, other
    log.clear()
    graph.captured(f)
    assert log == recording                                  # and now one is idle
    def broken(): f(); raise RuntimeError('waits')
    log.clear()
    with pytest.raises(RuntimeError, match='waits'): graph.captured(broken)
    assert log == ['side waits for main', 'in side', 'f', 'out of side', 'main waits for side']
    assert gc.isenabled()

def test_a_command_that_takes_too_long_leaves_its_words():
    from gpu import command
    assert command('-c', 'print(1); print(2)', limit=60) == ['1', '2']
    with pytest.raises(RuntimeError, match='stopped after 1 s\nhalf way'):
        command('-uc', 'import time; print("half way"); time.sleep(60)', limit=1)
    with pytest.raises(RuntimeError, match='ZeroDivisionError'): command('-c', '1/0', limit=60)

def test_the_share_of_time_that_a_device_works():
    from gpu import covered, parts
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4 and covered([]) == 0
    assert list(parts(None))[0] == 'tests'                                          # the most important first

# ---------------------------------------------------------------- probes

def some_features(n, g=generator(0, 'features')):
    y = torch.arange(n) % 4
    return {m: (torch.randn(n, d, generator=g) + F[:, None]).half() for m,d in (('a', 40), ('b', 7))
            for F in (y.float(),)}, y

def test_probes_that_are_recorded_together_are_those_alone():
    (train, y), (test, t) = some_features(300), some_features(90)
    alone = {m: probes.linear_probe(train[m], y, test[m], t, epochs=5) for m in train}
    made = []
    def counted(f): made.append(1); return taped(f)
    together = probes.linear_probes(train, y, test, t, epochs=5, capture=counted)
    assert len(made) == 1 and together == alone and alone['a']['last'] > 40
    assert probes.linear_probes(train, y, test, t, epochs=5) == alone

@pytest.mark.parametrize('more', [{}, dict(head_norm=True, nesterov=True, schedule='steps'),
                                  dict(momentum=0.)])
def test_the_papers_probes_recorded(more, tmp_path):
    net = convnet('alexnet_small', 4, dropout=0., seed=1).eval()
    train, test = load_images('digits', n_images=49), load_images('digits', split='test', n_images=20)
    c = probes.resolve_probe(probes.ProbeConfig(size=32, epochs=2, batch_size=16, lr=.1, weight_decay=.01,
                                                device='cpu', precision='float32', **more))
    found = [probes.train_probes(net, train, test, c, tmp_path/name, capture=how)
             for name,how in (('a', None), ('b', taped))]
    a, b = (load_checkpoint(tmp_path/name)[2] for name in 'ab')
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6)   # one fused update, one not
    assert found[0] == found[1]

@pytest.mark.parametrize('crops', ['window', 'resized'])
@pytest.mark.parametrize('sobel', [True, False])
def test_the_papers_probes_take_a_table_of_crops(monkeypatch, sobel, crops):
    net = convnet('alexnet_small', 4, sobel, dropout=0., seed=1).eval()
    c = probes.resolve_probe(probes.ProbeConfig(size=32, epochs=2, batch_size=16, lr=.1, crops=crops,
                                                sobel=sobel, device='cpu', precision='float32',
                                                ten_crops=False))
    images = PackedImages.of(load_images('digits', n_images=40))
    plain = probes.train_probes(net, images, images, c)
    tables = made_up_kernel(monkeypatch, images, grey=sobel)
    assert probes.train_probes(net, images, images, c, capture=lambda f: f) == plain
    assert tables == [16, 16, 8]*2

# ---------------------------------------------------------------- on a GPU that is there

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def launched(f): return f                             # the same function, launched kernel by kernel

def on_gpu(**more):
    return resolve(replace(SMALL, **dict(dict(device='cuda', precision='bfloat16', dropout=.5), **more)))

def epochs_there(c, images=IMAGES, capture=None, n=3, weights=None):
    "→ (all tensors, sums of the losses, recordings made)"
    made, how = [], capture or graph.captured
    def counted(f): # a recording that fails counts for nothing
        replay = how(f)
        made.append(1)
        return replay
    net, on_device, seen = network(c), feeding.resident(images, 'cuda'), []
    trunk, _ = optimizers(net, c)
    for i in range(n):
        reset_top_layer(net, generator(0, 'top_layer', i))
        opts = trunk, training.sgd(net.top_layer.parameters(), c, c.head_momentum)
        idx = torch.arange(150) % len(images)
        graph.train_epoch(net, on_device, idx, (torch.arange(len(images)) + i) % 10, opts, c, i, weights,
                          lambda done, n, total, check: seen.append(total.clone()), capture=counted)
    momentum = [trunk.state[p]['momentum_buffer'] for p in trunk.param_groups[0]['params']]
    return [*net.state_dict().values(), *momentum], torch.stack(seen).cpu(), len(made)

@pytest.mark.parametrize('more, weights', [
    (dict(), None), (dict(precision='float32', dropout=0.), None), (dict(sobel=False), None),
    (dict(sobel=False, jitter=.4, gray=.2), None), (dict(jitter=.4), None),
    (dict(lr_schedule='cosine', head_momentum=.9), torch.linspace(.5, 1.5, 10))])
@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.cuda
@NO_GPU
def test_replays_are_the_bits_of_launches(more, weights, ragged):
    images = IMAGES if not ragged else PackedImages(
        torch.cat([im[:, i % 3:].reshape(-1) for i,im in enumerate(IMAGES)]),
        [(1, 8 - i % 3, 8) for i in range(len(IMAGES))], IMAGES.labels)
    c = on_gpu(**more)
    a, b = (epochs_there(c, images, how, weights=weights) for how in (launched, None))
    assert b[2] == 1 and torch.equal(a[1], b[1]) and same(a[0], b[0])
    again = epochs_there(c, images, weights=weights)
    assert torch.equal(again[1], b[1]) and same(again[0], b[0])

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.cuda
@NO_GPU
def test_an_epoch_is_chapter_25s(precision): # whose rate is a double: the last digit of an update may differ
    c, on_device, found = on_gpu(precision=precision, lr=1e-4), feeding.resident(IMAGES, 'cuda'), []
    for train_epoch in (eager.train_epoch, graph.train_epoch):
        net, seen = network(c), []
        train_epoch(net, on_device, torch.arange(40), torch.arange(40) % 10, optimizers(net, c), c, 0, None,
                    lambda done, n, total, check: seen.append(total.clone()))
        found.append(torch.stack(seen).cpu())
    assert found[0][0] == found[1][0]                            # the first step has had no update yet
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)

@pytest.mark.cuda
@NO_GPU
def test_a_stopped_run_ends_in_the_same_bits_there(tmp_path, monkeypatch):
    c = replace(on_gpu(), passes=3)
    whole = fit(replace(c, run_dir=str(tmp_path/'whole')), IMAGES, echo=None)
    for at in ((0, 3), (1, 1)):
        folder = tmp_path/str(at)
        stopped_at(at, replace(c, run_dir=str(folder)), monkeypatch)
        again = fit(replace(c, run_dir=str(folder)), IMAGES, echo=None)
        a, b = (load_checkpoint(f/'checkpoint')[2] for f in (tmp_path/'whole', folder))
        assert [k for k in a if not torch.equal(a[k], b[k])] == []
        assert [r['loss'] for r in whole.log] == [r['loss'] for r in again.log]

@pytest.mark.cuda
@NO_GPU
def test_a_bad_step_is_named_there():
    c, weights = on_gpu(batch_size=8, dropout=0.), torch.ones(10)
    weights[9], labels = float('inf'), torch.arange(40) % 9
    labels[20] = 9
    net, kept = network(c), []
    def after(*_): kept.append([p.detach().clone() for p in net.parameters()])
    with pytest.raises(FloatingPointError, match=r'epoch 0, step 2, images .16, 17, .*nothing was updated'):
        graph.train_epoch(net, feeding.resident(IMAGES, 'cuda'), torch.arange(40), labels,
                          optimizers(net, c), c, 0, weights, after)
    assert same(kept[1], list(net.parameters())) and not same(kept[0], kept[1])

@pytest.mark.cuda
@NO_GPU
def test_what_cannot_be_recorded_there_runs_as_before():
    c, on_device, found = on_gpu(dropout=.5), feeding.resident(IMAGES, 'cuda'), []
    for capture in (launched, None):
        net = network(c)
        net.top_layer.__class__ = Asks
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            for i in range(2):
                graph.train_epoch(net, on_device, torch.arange(40), torch.arange(40) % 10,
                                  optimizers(net, c), c, i, capture=capture)
        found.append(list(net.state_dict().values()))
    assert same(*found) and len([w for w in said if "can't be recorded" in str(w.message)]) == 1
    assert float(torch.ones(2, device='cuda').sum()) == 2        # and the GPU is as usable as before

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.cuda
@NO_GPU
def test_extractions_there(precision): # the same kernels, so the same bits; with weights that change
    net, on_device = network(on_gpu(precision=precision)), feeding.resident(IMAGES, 'cuda')
    for _ in range(3):
        a, b = (torch.cat(list(feature_batches(net, on_device, 32, 8, precision=precision, prepare=p)))
                for p in (folded, graph.prepared_on('cuda')))
        assert torch.equal(a, b)
        moved(net)
    a, b = (probes.probe_features(net, IMAGES, 32, 16, 'cuda', precision, capture=how)
            for how in (launched, None))
    assert all(torch.equal(a[m], b[m]) for m in a)

@pytest.mark.cuda
@NO_GPU
def test_compiled_and_recorded_there():
    c = on_gpu(compile=True, lr=1e-4)
    a, b = (epochs_there(c, capture=how) for how in (launched, None))
    assert torch.equal(a[1], b[1]) and same(a[0], b[0])

@pytest.mark.cuda
@NO_GPU
def test_probes_there():
    (train, y), (test, t) = some_features(2000), some_features(500)
    together = probes.linear_probes(train, y, test, t, epochs=15, device='cuda')
    alone = probes.linear_probes(train, y, test, t, epochs=15, device='cuda', capture=launched)
    assert together == alone
    cpu = probes.linear_probes(train, y, test, t, epochs=15)
    assert all(abs(together[m]['last'] - cpu[m]['last']) < 2 for m in cpu)
    net = network(on_gpu(dropout=0.)).eval()
    images = load_images('digits', n_images=49)
    c = probes.resolve_probe(probes.ProbeConfig(size=32, epochs=2, batch_size=16, device='cuda'))
    found = [probes.train_probes(net, images, images, c, capture=how) for how in (launched, None)]
    assert found[0] == found[1]

@pytest.mark.cuda
@NO_GPU
def test_the_core_with_weights_there():
    c = Config(dataset='digits', n_images=60, k=6, pca=8, epochs=1, passes=1, batch_size=20,
               precision='float32')
    losses = [fit(replace(c, parts=parts, sampler='weighted', device='cuda'), echo=None).log[0]['loss']
              for parts in ('plain', 'fast')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

@pytest.mark.cuda
@NO_GPU
def test_a_replayed_epoch_launches_little():
    from gpu import profiled
    c = on_gpu(batch_size=8)
    net, on_device = network(c), feeding.resident(IMAGES, 'cuda')
    opts, idx = optimizers(net, c), torch.arange(400) % 40
    def run(c): return graph.train_epoch(net, on_device, idx, torch.arange(40) % 10, opts, c, 0)
    slow, fast = (profiled(lambda: run(replace(c, graph=on)), 50) for on in (False, True))
    assert fast['launches'] < slow['launches'] / 4
