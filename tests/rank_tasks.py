"What the processes of test_distributed.py do: functions of a module, called with a Ranks."
import hashlib, os, signal, time
from dataclasses import replace
import sklearn.metrics, torch                # which a run imports at its first clustering
from torch import nn
from deepcluster_nb.data import generator
from deepcluster_nb.fast.images import PackedImages
import sys
from deepcluster_nb.fast import distributed
from deepcluster_nb.model import ARCHS, SIZES, conv_stack
from deepcluster_nb.fit import Config, fit, network, optimizers, resolve

def tiny(planes, dropout):
    features = conv_stack([(8, 3, 2, 1), nn.MaxPool2d(2), (16, 3, 1, 1), nn.AdaptiveMaxPool2d(4)], planes)
    return features, nn.Sequential(nn.Dropout(dropout), nn.Linear(256, 32), nn.BatchNorm1d(32),
                                   nn.ReLU(inplace=True))

def register(): ARCHS['tiny'], SIZES['tiny'] = tiny, (16, 64)

if 'pytest' not in sys.modules: register()     # a test's own process lets go of it afterwards
SMALL = Config(arch='tiny', size=16, k=6, pca=8, epochs=2, passes=1, batch_size=20,
               precision='float32', device='cpu', checkpoint_minutes=0.)

def made_images(n=60): # six patterns and noise
    g = generator(0, 'patterns')
    patterns, kinds = torch.rand(6, 1, 20, 20, generator=g), torch.arange(n) % 6
    pixels = patterns[kinds]*180 + 70*torch.rand(n, 1, 20, 20, generator=g)
    return PackedImages(pixels.to(torch.uint8), labels=kinds, classes=range(6))

def sha256(*tensors):
    return hashlib.sha256(b''.join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()

def share(x, ranks, ends=None): # of the rows; ends: where shares end, even ones where not given
    ends = ends or distributed.bounds(len(x), ranks.world)
    return x[ends[ranks.rank]:ends[ranks.rank + 1]]

def kmeans(ranks, cases):
    found = []
    for x,k,ends,more in cases:
        c = distributed.kmeans(share(x, ranks, ends and ends[ranks.world]), k, ranks=ranks, **more)
        found.append((sha256(c.assign, c.centroids), c.objective[-1], c.n_empty))
    return found

def pca(ranks, x, dim, ends=None):
    own, fitted = share(x, ranks, ends), distributed.PCA(dim)
    for b in own.split(64) if len(own) else (): fitted.add(b)
    p = distributed.pooled(fitted, x.shape[1], 'cpu', ranks)
    return p.mean, p.axes

def gradients(ranks, config, n, weights=None):
    "The gradients of one step on n images, the loss, and the network's statistics after it."
    c, net = resolve(config), network(config)
    opts, seen = optimizers(net, c), []
    def keep(*_): seen.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assign = torch.arange(60) % 6
    loss = distributed.train_epoch(net, made_images(), torch.arange(n), assign, opts, c, 0,
                                   weights, keep, ranks=ranks)
    return loss, seen, [b.clone() for b in net.buffers()]

def seeds(ranks, config):
    "What dropout draws from in each of two steps."
    found, real = [], torch.manual_seed
    torch.manual_seed = lambda s: found.append(s) or real(s)
    try: gradients(ranks, config, 40)
    finally: torch.manual_seed = real
    return found[-2:]

def rates(ranks, config):
    "The learning rate of each step of an optimizer, in an epoch of two."
    found, step = [], torch.optim.SGD.step
    def noted(self, *args): found.append(self.param_groups[0]['lr']); return step(self, *args)
    torch.optim.SGD.step = noted
    try: gradients(ranks, config, 40)
    finally: torch.optim.SGD.step = step
    return found

def clusterings(ranks, config):
    "What k-means is called with in a run, but for the points."
    found, kmeans = [], distributed.kmeans
    distributed.kmeans = lambda x, *args, **how: found.append(args) or kmeans(x, *args, **how)
    run(ranks, config)
    return found

def run(ranks, config, before=lambda epoch: None):
    "A whole run, of shares that consist of 16 images; before each clustering something may happen."
    cluster = distributed.cluster
    def of_few(net, images, c, epoch, *more, **kwargs):
        before(epoch)
        return cluster(net, images, c, epoch, *more, batch=16, **kwargs)
    distributed.cluster = of_few
    r = fit(config, made_images(), echo=None)
    return [l['loss'] for l in r.log], sha256(*r.net.state_dict().values()), sha256(r.clustering.assign)

# ---------------------------------------------------------------- what goes wrong, on one rank at one moment

def trouble(ranks, config, rank, at, what):
    "A run in which something happens on one rank: after a step (epoch, step), or at a clustering (epoch, 0)."
    from deepcluster_nb import fit as around
    here, note = ranks.rank == rank, os.path.join(os.path.dirname(config.run_dir), 'when')
    def happen():
        if not here: return
        with open(note, 'w') as f: f.write(str(time.time()))
        if what == 'raise': raise ValueError('something is wrong here')
        os.kill(os.getpid(), getattr(signal, what))
    cross_entropy = distributed.F.cross_entropy
    if what == 'SIGSTOP': distributed.PATIENCE, distributed.GRACE = 3., 1.
    class Spoilt(around.Hooks):
        def after_step(self, done, n, *more):
            if (self.state.epoch, done) == at and what != 'nan': happen()
            super().after_step(done, n, *more)
            if here and what == 'nan' and (self.state.epoch, done + 1) == at:
                distributed.F.cross_entropy = lambda *a, **k: cross_entropy(*a, **k) * float('nan')
    around.Hooks = Spoilt
    return run(ranks, config, lambda epoch: happen() if (epoch, 0) == at else None)

def other_clusters(ranks, config):
    "A rank that moves a centroid."
    lloyd = distributed.shared_lloyd
    def moved(*args):
        c = lloyd(*args)
        if ranks.rank == 1: c.centroids[0, 0] += 1e-6
        return c
    distributed.shared_lloyd = moved
    return run(ranks, config)

def broken_image(ranks, config, folder):
    "A rank whose copy of an image is damaged."
    return fit(replace(config, dataset='folder', root=f'{folder}/{ranks.rank}'), echo=None)

def full_disk(ranks, config):
    "Nothing more fits on rank 0's disk from the second epoch's assignments on."
    import errno
    from deepcluster_nb import runs
    write = runs.write_atomic
    def fails(path, data, sync=True):
        if 'epoch_001' in str(path) or os.path.exists(f'{config.run_dir}/full'):
            if not os.path.exists(f'{config.run_dir}/full'): open(f'{config.run_dir}/full', 'w').close()
            if os.path.exists(f'{config.run_dir}/checkpoint/reserve'):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, sync)
    runs.write_atomic = fails
    return run(ranks, config)

def timed(ranks, config):
    "Seconds that a run takes, without the start of its process."
    start = time.time()
    run(ranks, config)
    return time.time() - start

def killed(ranks, config, rank, after):
    "A run in which one rank is killed after some seconds, wherever it is then."
    import threading
    def kill():
        time.sleep(after)
        with open(os.path.join(os.path.dirname(config.run_dir), 'when'), 'w') as f: f.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == rank: threading.Thread(target=kill, daemon=True).start()
    return run(ranks, config)
