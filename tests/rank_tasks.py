"What the processes of test_distributed.py do: functions of a module, called with a Ranks."
import hashlib, os, signal, time
from dataclasses import replace
import torch
from deepcluster_nb.data import digits, generator
from deepcluster_nb.fast import distributed
from deepcluster_nb.fit import Config, fit, network, optimizers, resolve

SMALL = Config(dataset='digits', n_images=130, k=8, pca=16, epochs=2, passes=1, batch_size=40,
               precision='float32', device='cpu', checkpoint_minutes=0.)

def sha256(*tensors): return hashlib.sha256(b''.join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()

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
    for b in own.split(64): fitted.add(b)
    p = distributed.pooled(fitted, x.shape[1], 'cpu', ranks)
    return p.mean, p.axes

def gradients(ranks, config, n, weights=None):
    "The gradients of one step on n images, the loss, and the network's statistics after it."
    c, net = resolve(config), network(config)
    opts, seen = optimizers(net, c), []
    def keep(*_): seen.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assign = torch.arange(130) % 8
    loss = distributed.train_epoch(net, digits('train').subset(range(130)), torch.arange(n), assign, opts, c, 0,
                                   weights, keep, ranks=ranks)
    return loss, seen, [b.clone() for b in net.buffers()]

def run(ranks, config):
    r = fit(config, echo=None)
    return [l['loss'] for l in r.log], sha256(*r.net.state_dict().values()), sha256(r.clustering.assign)
