"""What a GPU must not wait for, on a GPU that isn't there: PyTorch's fake tensors give every order and \
compute nothing. PyTorch's own backward pass needs a real one and is left out.
And the flat batch against the list that it stands for."""
import threading, time, warnings
from contextlib import nullcontext
from dataclasses import replace
import pytest, torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from deepcluster_nb import probes
from deepcluster_nb.fast import crops, features, feeding, kmeans, training
from deepcluster_nb.fast.crops import (center_crop, crop_batch, crop_ragged, image_sizes, random_resized_crop,
                                       resample)
from deepcluster_nb.augment import crop_boxes
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.data import generator
from deepcluster_nb.sources import load_images
from deepcluster_nb.clustering import nmi
from deepcluster_nb.fast.feeding import Ragged, pick_batch, resident
from deepcluster_nb.model import convnet
from deepcluster_nb.sampling import loss_weights
from deepcluster_nb.fast.crops import network_input
from deepcluster_nb.fit import PARTS, Config, fit
from deepcluster_nb.training import sgd, trunk_parameters
from deepcluster_nb.fast.training import train_epoch

class FakeGPU(TorchDispatchMode):
    ("A device 'cuda' that takes every order. Counts the numbers that Python asks it for, "
     "and the copies that Python waits for; the CPU's own work is done as always.")
    def __init__(self):
        super().__init__()
        self.numbers, self.copies, self.orders, self.convolved, self.fake = (
            0, 0, 0, set(), FakeTensorMode(allow_non_fake_inputs=True))
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, given = kwargs or {}, [a for a in tree_leaves(args) if isinstance(a, Tensor)]
        if (not any(isinstance(t, FakeTensor) for t in given)
            and torch.device(kwargs.get('device') or 'cpu').type == 'cpu'):
            return op(*args, **kwargs)
        # a view is none
        self.orders += op.namespace == 'aten' and not any(r.alias_info and not r.alias_info.is_write
                                                          for r in op._schema.returns)
        if op is torch.ops.aten._local_scalar_dense.default: self.numbers += 1; return 0
        if op.name().startswith('aten::_fused_sgd_'): return                   # which fake tensors don't know
        with self.fake: out = op(*args, **kwargs)
        if op is torch.ops.aten.convolution.default: self.convolved.add(out.dtype)
        if op is torch.ops.aten._to_copy.default:
            self.copies += (given[0].device != out.device
                            and not (kwargs.get('non_blocking') and getattr(given[0], 'pinned', False)))
        if op is torch.ops.aten.copy_.default:
            self.copies += (given[0].device != given[1].device
                            and not (args[2:3] == (True,) and getattr(given[1], 'pinned', False)))
        # numbers that are brought over
        if op.name().startswith('aten::index') or op is torch.ops.aten.take.default:
            self.copies += len({t.device for t in given if t.ndim}) > 1
        return out

@pytest.fixture
def gpu(monkeypatch): # what is pinned for it gets a mark
    def pin(t): t = t.clone(); t.pinned = True; return t
    monkeypatch.setattr(Tensor, 'pin_memory', pin)
    monkeypatch.setattr(torch.cuda, '_lazy_init', lambda: None)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *args, **kwargs: True)
    monkeypatch.setattr(crops, 'crop_kernel', lambda: None)                     # which needs a real one
    try:
        with FakeTensorMode(): torch.empty(2, device='cuda').uniform_()
    except RuntimeError: pytest.skip('this PyTorch has no fake GPU without a driver')
    # torch.tensor(…, device='cuda') is made on the CPU and brought over, as fake tensors need it
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with FakeGPU() as fake: yield fake
    finally: torch._C._set_only_lift_cpu_tensors(False)

def there(ragged, channels=3, n=24): # images in the fake GPU's memory
    shapes = [(channels, 40 + i % 7, 50 - i % 5) for i in range(n)] if ragged else [(3, 32, 32)]*n
    images = PackedImages(torch.zeros(sum(c*h*w for c,h,w in shapes), dtype=torch.uint8), shapes)
    images.pixels = torch.empty(len(images.pixels), dtype=torch.uint8, device='cuda')
    return images

def network_there(sobel=True):
    with torch.device('cuda'): net = convnet('alexnet_small', 5, sobel, .5)
    assert net.top_layer.weight.is_cuda
    return net

def test_what_a_recording_keeps_is_not_free(monkeypatch): # segments of two pools and two devices
    def segment(device, pool, total, active):
        return dict(device=device, segment_pool_id=pool, total_size=total, active_size=active)
    monkeypatch.setattr(torch.cuda, 'memory_snapshot', lambda: [
        segment(0, (0, 0), 100, 30), segment(0, (0, 0), 50, 50), segment(0, (0, 7), 1000, 10),
        segment(1, (0, 0), 9, 0)])
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (5000, 9000))
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    assert [feeding.free_there(d) for d in ('cuda', 'cuda:0', 'cuda:1')] == [5070, 5070, 5009]

@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize('sampler, precision', [('uniform', 'bfloat16'), ('weighted', 'float32')])
def test_training_asks_for_nothing_between_two_looks(gpu, monkeypatch, ragged, sampler, precision):
    images, net = there(ragged), network_there()
    c = Config(sampler=sampler, batch_size=4, precision=precision, device='cuda')
    opts = sgd(trunk_parameters(net), c, .9), sgd(net.top_layer.parameters(), c)
    def backward(loss):
        for p in net.parameters(): p.grad = torch.empty_like(p) if p.requires_grad else None
    monkeypatch.setattr(Tensor, 'backward', backward)
    monkeypatch.setitem(training.CHECK_EVERY, 'cuda', 4)
    gpu.numbers = gpu.copies = 0
    seen, labels = [], torch.arange(len(images)) % 5
    train_epoch(net, images, torch.arange(40) % len(images), labels, opts, c, 0,
                loss_weights(labels, 5) if sampler == 'weighted' else None,
                lambda done, n, total, check: seen.append((gpu.numbers, gpu.copies)))
    assert gpu.convolved == {getattr(torch, precision)}
    looked = [1, 1, 1, 1, 2, 2, 2, 2, 3, 4]                             # at steps 0, 4 and 8, and at the last
    start = seen[0][1]
    # and the epoch's mean loss
    assert ([n for n,_ in seen] == looked and all(copies == start for _,copies in seen)
            and start == 1 + (sampler == 'weighted') and gpu.numbers == 5)

def test_a_wait_is_seen(gpu):
    x = torch.empty(3, device='cuda')
    for wait in (lambda: float(x.sum()), lambda: bool((x > 0).any()), lambda: torch.zeros(3).to('cuda'),
                 lambda: torch.zeros(3).to('cuda', non_blocking=True), lambda: x.cpu(),
                 lambda: x[torch.tensor([0, 2])], lambda: x.copy_(torch.zeros(3))):
        before = gpu.numbers + gpu.copies
        wait()
        assert gpu.numbers + gpu.copies == before + 1
    before = gpu.numbers + gpu.copies
    torch.zeros(3).pin_memory().to('cuda', non_blocking=True)
    x.sum()
    x.copy_(torch.zeros(3).pin_memory(), non_blocking=True)
    x.index_select(0, torch.empty(2, dtype=torch.long, device='cuda'))
    torch.zeros(3).sum().item()
    assert gpu.numbers + gpu.copies == before

class Event: # made up: a mark of a GPU
    def __init__(self, enable_timing): assert enable_timing
    def synchronize(self): Event.waited = self.at
    def elapsed_time(self, end): assert end.at <= Event.waited; return 1000*(end.at - self.at)

@pytest.fixture
def marks(monkeypatch): # the times at which they are passed
    times, Event.waited = [], -1.
    class Stream:
        def record_event(self, event): event.at = times.pop(0) if times else 0.; return event
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: Stream())
    return times

@pytest.mark.filterwarnings("ignore:Accessing the data pointer")                # by deepcopy
@pytest.mark.parametrize('sobel, precision', [(False, 'float32'), (True, 'bfloat16')])
@pytest.mark.parametrize('ragged', [False, True])
def test_features_and_pca_ask_once(gpu, marks, monkeypatch, ragged, sobel, precision):
    images, net, seen = there(ragged, 1 if sobel else 3, n=1100), network_there(sobel), []
    def clusterer(x, c, epoch): seen.append((gpu.numbers, gpu.copies)); return Points(x)
    class Points:
        def __init__(self, x): self.assign, self.centroids, self.objective = self, self, []; self.x = x
        def cpu(self): assert self.x.is_cuda and self.x.shape == (1100, 4); return self
    monkeypatch.setitem(training.CLUSTERERS, 'kmeans', clusterer)
    monkeypatch.setattr(features, 'free_there', lambda device: 2**40)
    training.cluster(net, images, Config(pca=4, device='cuda', precision=precision), 0, None,
                     lambda done, n: seen.append((gpu.numbers, gpu.copies)))
    *batches, (numbers, copies) = seen
    assert gpu.convolved == {getattr(torch, precision)}
    # were all finite? `solve` wants to know
    assert (len(batches) == 3 and len(set(batches)) == 1
            and (numbers - batches[0][0], copies - batches[0][1]) == (1, 0))

def test_windows_take_as_many_orders_however_many_images_there_are(gpu):
    orders = []
    for n in (5, 200):
        images = there(True, n=n)
        batch, boxes, before = (pick_batch(images, torch.arange(n)),
                                torch.tensor([[1., 2, 30, 30]]).repeat(n, 1), gpu.orders)
        batch.cut(boxes, 32)
        orders.append(gpu.orders - before)
    assert orders == [14, 14]                                                    # as chapter 20 says

class Kernel: # made up: counts its launches
    def __init__(self): self.launches = []
    def __getitem__(self, grid): return lambda *args, **kwargs: self.launches.append((grid, args))

@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize('sobel, planes', [(True, 1), (False, 3)])
def test_crops_are_one_launch(gpu, monkeypatch, ragged, sobel, planes):
    images, kernel, counts = there(ragged), Kernel(), []
    monkeypatch.setattr(torch.cuda, 'device_of', nullcontext)
    crop = lambda im: random_resized_crop(im, 32, generator(0))
    for there_is in (None, kernel):
        monkeypatch.setattr(crops, 'crop_kernel', lambda: there_is)
        batch, before = pick_batch(images, torch.arange(12)), (gpu.orders, gpu.numbers, gpu.copies)
        x = network_input(batch, crop, sobel, torch.bfloat16)
        counts.append([now - then for now,then in zip((gpu.orders, gpu.numbers, gpu.copies), before)])
        assert x.is_cuda and x.shape == (12, planes, 32, 32) and x.dtype == torch.bfloat16
    (products, *_), (orders, *waits) = counts
    # the table's copy and the output's memory; nothing is asked for or waited for
    assert orders == 2 and waits == [0, 0] and products > 30
    (grid, (flat, table, out, *_)), = kernel.launches
    assert grid == (12*planes, 4, 1) and flat.ndim == 1 and table.shape == (12, 8) and out is x

def test_flat_batches_are_grey_and_cropped_as_lists_are():
    g = generator(0)
    images = [torch.randint(0, 256, (3, h, w), generator=g).byte() for h,w in ((40, 60), (61, 35), (33, 33))]
    for crop in (lambda im: center_crop(im, 32), lambda im: random_resized_crop(im, 32, generator(1))):
        for sobel in (False, True):
            a, b = (network_input(x, crop, sobel) for x in (images, Ragged.of(images)))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

@pytest.mark.parametrize('ragged', [False, True])
def test_a_gpu_multiplies_half_precision_in_rows_of_eights(gpu, monkeypatch, ragged): # and nothing else
    seen, real = [], torch.Tensor.__matmul__
    monkeypatch.setattr(Tensor, '__matmul__', lambda a, b: seen.append((a, b)) or real(a, b))
    images = pick_batch(there(ragged), torch.arange(6))
    out = resample(images, crop_boxes(image_sizes(images), generator(0)), 24, torch.arange(6) > 3)
    assert out.dtype == torch.float32 and out.is_cuda and len(seen) == 6
    assert all(t.dtype == torch.float16 and min(s for s in t.stride() if s > 1) % 8 == 0 for pair in seen
               for t in pair)

def test_a_gpu_multiplies_grey_windows_at_half_precision_too(gpu, monkeypatch): # floats by then
    seen, real = [], torch.Tensor.__matmul__
    monkeypatch.setattr(Tensor, '__matmul__', lambda a, b: seen.append((a, b)) or real(a, b))
    images = crops.to_grey(pick_batch(there(True), torch.arange(6)))
    resample(images, crop_boxes(image_sizes(images), generator(0)), 24)
    assert seen and all(t.dtype == torch.float16 for pair in seen for t in pair)

@pytest.mark.parametrize('ragged', [False, True])
def test_half_precision_is_within_half_a_grey_level(monkeypatch, ragged):
    images = load_images('shapes', n_images=40)
    images = (Ragged.of([im[:, i % 5:, i % 3:] for i,im in enumerate(images)]) if ragged else
              images.batch(torch.arange(40)))
    boxes, real = crop_boxes(image_sizes(images), generator(0)), crops.crop_batch
    plain = crops.crop_ragged(images, boxes, 24) if ragged else crop_batch(images, boxes, 24)
    monkeypatch.setattr(crops, 'crop_batch', lambda *args: real(*args[:5], torch.float16))
    half = (crops.crop_ragged(images, boxes, 24) if ragged else
            crops.crop_batch(images, boxes, 24, None, None))
    assert 0 < (half - plain).abs().max() < .44                                  # 3/16 + 2/8, chapter 01

def test_a_panorama_does_not_make_all_frames_wide():
    g = generator(0)
    images = [torch.randint(0, 256, (1, h, w), generator=g).byte()
              for h,w in ((40, 60), (30, 900), (33, 33), (50, 40), (35, 700))]
    boxes, flip, seen, cut = (torch.tensor([[0., 0, w, h] for _,h,w in (im.shape for im in images)]),
                              torch.tensor([True, False, False, True, False]), [], Ragged.cut)
    def watched(self, *args): seen.append(cut(self, *args)[0].numel()); return cut(self, *args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Ragged, 'cut', watched)
        parts = crop_ragged(images, boxes, 24, flip, room=110_000)
    assert len(seen) == 3 and max(seen) <= 110_000
    torch.testing.assert_close(parts, resample(images, boxes, 24, flip), rtol=0, atol=256*1e-5)
    # in frames of their own: sums of another length round otherwise
    torch.testing.assert_close(parts, crop_ragged(images, boxes, 24, flip, room=30_000), rtol=0,
                               atol=256*1e-5)

@pytest.mark.parametrize('ragged', [False, True])
def test_a_resident_run_is_the_same_run(monkeypatch, ragged): # the way of a GPU, on the CPU
    images = load_images('shapes', n_images=60)
    if ragged:
        images = PackedImages(torch.cat([im[:, i % 3:].reshape(-1) for i,im in enumerate(images)]),
                              [(3, 32 - i % 3, 32) for i in range(60)], images.labels, images.classes)
    c = Config(arch='alexnet_small', k=5, pca=8, epochs=1, passes=1, batch_size=16, precision='float32')
    plain = fit(c, images, echo=None)
    on_gpu = replace(PARTS['fast'], place=lambda images, device: resident(images, device, room=10**6))
    monkeypatch.setitem(PARTS, 'fast', on_gpu)
    for module in (training, features):
        monkeypatch.setattr(module, 'fetch_ahead', lambda images, batches, device:
                            ((idx, pick_batch(images, idx)) for idx in batches))
    other = fit(c, images, echo=None)
    assert other.images is images
    if not ragged:
        assert torch.equal(plain.clustering.assign, other.clustering.assign)
        assert all(torch.equal(a, b) for a,b in zip(plain.net.state_dict().values(),
                                                    other.net.state_dict().values()))
    # whole matrices round otherwise
    assert nmi(plain.clustering.assign,
               other.clustering.assign) > .9 and abs(plain.log[0]['loss'] - other.log[0]['loss']) < 1e-3

def test_half_of_what_is_free_may_be_images(monkeypatch): # activations need the rest
    monkeypatch.setattr(feeding, 'free_there', lambda device: 101)
    assert feeding.fits(50, 'cuda') and not feeding.fits(51, 'cuda') and not feeding.fits(1, 'cpu')

def test_the_center_comes_along():
    images = PackedImages(torch.arange(32).byte(), [(1, 4, 4)]*2)
    images.center = PackedImages(torch.arange(8).byte(), [(1, 2, 2)]*2)
    moved = resident(images.subset([1]), 'cpu', room=20)
    assert moved.pixels.tolist() == list(range(16, 32)) and moved.center.pixels.tolist() == [4, 5, 6, 7]
    assert resident(images, 'cpu', room=39) is images                            # both or none

def test_laps_by_the_devices_clock(marks):
    marks += [5., 7.5, 8., 8.5]
    timer = feeding.PhaseTimer('cuda')
    for phase in ('features', 'pca', 'features'): timer(phase)
    assert Event.waited < 0 and timer.seconds() == dict(features=3., pca=.5)

def test_reading_stops_when_nobody_asks_any_more():
    class Counting(PackedImages):
        def batch(self, idx): time.sleep(.05); read.append(idx.tolist()); return super().batch(idx)
    read, images = [], Counting(torch.zeros(100, 1, 4, 4, dtype=torch.uint8))
    batches = feeding.fetch_ahead(images, torch.arange(100).split(1), 'cpu', ahead=20, threads=1)
    next(batches); batches.close()
    assert len(read) <= 4                                                        # of the 21 that were ordered

def test_what_was_taken_makes_room_for_what_is_fetched():
    read, images = [], PackedImages(torch.zeros(40, 1, 4, 4, dtype=torch.uint8))
    class Counting(PackedImages):
        def batch(self, idx): read.append(int(idx[0])); return super().batch(idx)
    batches = feeding.fetch_ahead(Counting(images.pixels.view(40, 1, 4, 4)), torch.arange(40).split(1), 'cpu',
                                  ahead=10, threads=1, room=6*16)
    for i in range(20): next(batches)
    for _ in range(200): time.sleep(.01*(max(read) < 24))
    batches.close()
    assert max(read) >= 24                         # six batches have room, however many came before

@pytest.mark.parametrize('ragged', [False, True])
def test_copies_in_a_stream_of_their_own(monkeypatch, ragged):
    # made up, with a log: the batch's user waits for that batch's copy, and says that he uses it
    log, real = [], torch.empty
    class Stream:
        def __init__(self, device=None): pass
        def record_event(self): log.append('copied'); return f"copy {log.count('copied')}"
        def wait_event(self, event): log.append(f'wait for {event}')
        def __enter__(self): log.append('in'); return self
        def __exit__(self, *_): log.append('out')
    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda s: s)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: Stream())
    monkeypatch.setattr(Tensor, 'record_stream', lambda t, s: log.append(f'used, {t.numel()}'))
    monkeypatch.setattr(Tensor, 'new_empty',
                        lambda t, n, pin_memory: log.append('pinned') or real(n, dtype=t.dtype))
    monkeypatch.setattr(feeding.torch, 'empty',
                        lambda *size, dtype, pin_memory: log.append('pinned') or real(*size, dtype=dtype))
    monkeypatch.setattr(Tensor, 'pin_memory', lambda t: t)                       # as it is for what is pinned
    monkeypatch.setattr(Tensor, 'to', lambda t, device, non_blocking: log.append(f'to {device}') or t)
    feeding.side_stream.cache_clear()
    images = (PackedImages(torch.arange(24).byte(), [(1, 1, 2), (1, 2, 2)]*4) if ragged else
              PackedImages(torch.arange(24).byte().view(6, 1, 2, 2)))
    got = list(feeding.fetch_ahead(images, [torch.tensor([1, 0]), torch.tensor([3])], 'cuda', ahead=1,
                                   threads=1))
    feeding.side_stream.cache_clear()
    for i,x in got:
        if ragged:
            assert ([im.tolist() for im in (x.flat[s:s + int(n)] for s,n in zip(x.starts, x.shapes.prod(1)))]
                    == [images[j].flatten().tolist() for j in i])
        else:
            assert torch.equal(x, images.batch(i))
    for i,(_,x) in enumerate(got): 
        one = ['in', 'pinned', 'to cuda', 'copied', 'out']
        assert [e for e in log if e in one][5*i:5*i + 5] == one
        assert log.index(f'wait for copy {i + 1}') < log.index(f'used, {(x.flat if ragged else x).numel()}')

def test_a_copy_and_its_mark_are_in_one_stream(monkeypatch):
    # made up: streams that take a while to make, as a GPU's first ones do
    pairs, made, here, real = [], [], threading.local(), torch.empty
    class Stream:
        def __init__(self, device=None): time.sleep(.02); made.append(self)
        def __enter__(self): here.stream = self
        def __exit__(self, *_): pass
        def record_event(self): pairs.append((here.stream, self))
        def wait_event(self, event): pass
    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda s: s)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: made[0])
    monkeypatch.setattr(feeding.torch, 'empty', lambda *size, dtype, pin_memory: real(*size, dtype=dtype))
    monkeypatch.setattr(Tensor, 'pin_memory', lambda t: t)
    monkeypatch.setattr(Tensor, 'to', lambda t, device, non_blocking: t)
    feeding.side_stream.cache_clear()
    list(feeding.fetch_ahead(PackedImages(torch.zeros(32, 1, 4, 4, dtype=torch.uint8)),
                             torch.arange(32).split(2), 'cuda', threads=4))
    feeding.side_stream.cache_clear()
    assert len(pairs) == 16 and len(made) == 1 and all(copy is mark for copy,mark in pairs)

def test_compiled_runs_are_runs(monkeypatch):
    # PyTorch's tracing, without the compiler behind it; a last batch of another size
    real, tries = torch.compile, []
    monkeypatch.setattr(torch, 'compile',
                        lambda net, **how: tries.append(1) or real(net, backend='aot_eager', **how))
    images = load_images('digits', n_images=70)
    c = Config(arch='alexnet_small', k=5, pca=8, epochs=2, passes=1, batch_size=16, precision='float32')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        plain, fast = (fit(replace(c, compile=on), images, echo=None) for on in (False, True))
    assert (len(tries) == 2 and not [w for w in said if str(w.message).startswith('compile:')]
            and abs(plain.log[1]['loss'] - fast.log[1]['loss']) < .02)

@pytest.mark.parametrize('breaks', ['forwards', 'backwards', 'at the second size'])
def test_where_compiling_fails_the_run_is_the_plain_one(monkeypatch, breaks):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise RuntimeError('no ptxas')
    def broken(net, dynamic):
        def fast(x):
            y = net(x)
            if breaks == 'forwards' or breaks == 'at the second size' and len(x) != 16:
                raise RuntimeError('no ptxas')
            return Half.apply(y) if breaks == 'backwards' else y
        return fast
    monkeypatch.setattr(torch, 'compile', broken)
    images = load_images('digits', n_images=70)
    c = Config(arch='alexnet_small', k=5, pca=8, epochs=1, passes=1, batch_size=16, precision='float32',
               dropout=.5)
    plain = fit(c, images, echo=None)
    with pytest.warns(UserWarning, match="compile: torch.compile can't be used here.*no ptxas"):
        other = fit(replace(c, compile=True), images, echo=None)
    # what was tried has changed nothing
    assert all(torch.equal(a, b) for a,b in zip(plain.net.state_dict().values(),
                                                other.net.state_dict().values()))

def test_a_network_that_fails_fails_compiled_too():
    class Broken(nn.Module):
        def forward(self, x): raise ZeroDivisionError('mine')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ZeroDivisionError, match='mine'): feeding.compiled(Broken())(torch.zeros(1))

def test_k_means_asks_once_an_iteration(gpu, monkeypatch):
    told, asked = [], []
    monkeypatch.setattr(kmeans, 'free_there', lambda device: 2**24)              # several tiles
    def tolist(t): told.append(len(t)); return [0, 7, 0]        # nothing spilled, 7 moved, none empty
    monkeypatch.setattr(FakeTensor, 'tolist', tolist)
    for niter in (2, 5):
        x, before = torch.empty(3000, 16, device='cuda'), gpu.numbers + gpu.copies
        kmeans.torch_kmeans(x, niter, torch.empty(300, 16, device='cuda'))
        asked.append(gpu.numbers + gpu.copies - before)
    # besides the range of the points, before the first iteration; and the objective at the end
    assert asked == [2, 2] and told == [3]*3 + [3] + [3]*6 + [6]

@pytest.mark.parametrize('room', [True, False])
def test_a_linear_probe_asks_only_when_it_looks(gpu, monkeypatch, room):
    x, y = torch.zeros(300, 8).half(), torch.arange(300) % 3
    torch.empty(0, device='cuda')                                   # wakes the fake GPU
    monkeypatch.setattr(probes, 'fits', lambda nbytes, device: room)
    monkeypatch.setattr(Tensor, 'backward', lambda loss: None)
    found = probes.linear_probe(x, y, x[:20], y[:20], epochs=2, batch_size=32, device='cuda')
    # images, and in each of two epochs their order twice; or images for
    # mean and variance, then order, ten batches and the test images
    moved = 2 + 2*2 if room else 2 + 2*(1 + 10 + 1)
    # once for features that are not finite, and in each epoch for the accuracy; the labels are copied, too
    assert found.keys() == {'last', 'best'} and gpu.numbers == 1 + 2 and gpu.copies == 2 + moved

def test_what_a_container_uses_is_not_free(tmp_path):
    for name,text in dict(max='8000\n', current='7000\n',
                          stat='anon 4000\nactive_file 500\ninactive_file 2000\n').items():
        (tmp_path/f'memory.{name}').write_text(text)
    assert feeding.container_room(tmp_path) == 8000 - 7000 + 2500
    (tmp_path/'memory.max').write_text('max\n')
    with pytest.raises(ValueError): feeding.container_room(tmp_path)       # no limit
