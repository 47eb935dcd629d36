"""Run folders as the experiments write them, with numbers that nobody measured, for `report`; \
each experiment's own tests hold one of its runs against them."""
import json
import yaml
from deepcluster_nb.experiments import experiments_folder, parameters
from deepcluster_nb.report import LAYERS, read_finished

NETS = 'random', 'random_calibrated', 'supervised', 'deepcluster'

def made(path, name, metrics=None, log=(), **params): # a run folder as the experiment `name` writes it
    known = parameters(experiments_folder()/f'{name}.ipynb')
    assert params.keys() <= known.keys()
    path.mkdir(parents=True)
    (path/'params.yaml').write_text(yaml.safe_dump(known | params))
    if metrics: (path/'metrics.json').write_text(json.dumps(metrics))
    if log: (path/'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in log))
    return path

def levels(nets, columns, first=10.): return {n: {c: first + 10*i + j for j,c in enumerate(columns)}
                                              for i,n in enumerate(nets)}

def epochs(*nmi): # lines of a log
    return [dict(epoch=i, loss=2., ln_k=4., nmi_prev=v if i else None, nmi_prev_chance=.01 if i else None,
                 nmi_labels=v/2, seconds=dict(features=1., pca=1., kmeans=1., training=6.))
            for i,v in enumerate(nmi)]

IMAGENET = dict(n_images=1_281_167, n_test=50_000)

def probe(path, columns=LAYERS, metrics={}, crops='ten', **params):
    keys = ['probes', 'probes_best'] + ['probes_center', 'probes_center_best'] * (crops == 'ten')
    found = {k: levels(NETS, columns, 10. + i/10) for i,k in enumerate(keys)}
    found |= dict(arch='alexnet', size=224, crops=crops, protocol='paper',
                  knn={n: 30. + i for i,n in enumerate(NETS)}) | IMAGENET | metrics
    return made(path, 'probe', found, **dict(dataset='packed', arch='alexnet', n_bank=0) | params)

def train(path, metrics={}, log=epochs(.3, .5), **params):
    found = dict(classes=1000, probes=levels(NETS[:2] + NETS[3:], LAYERS),
                 knn=dict(random=1., random_calibrated=2., deepcluster=3.), n_images=1_281_167) | metrics
    given = dict(dataset='packed', arch='alexnet', size=224, k=10_000, epochs=500)
    return made(path, 'train', found, log, **given | params)

def voc(path, **params):
    nets = 'random', 'random, calibrated', 'deepcluster'
    rules = lambda v: dict(step=v, interpolated=v + 1, **{'11-point': v + 2}, classes={})
    found = {part: {n: rules(20.*i + j) for i,n in enumerate(nets)}
             for j,part in enumerate(('SVM conv5', 'fc6-8', 'all'))}
    found['low-shot conv5'] = {n: {str(k): dict(mean=5., std=1., best=6. + i, cost=1.) for k in (1, 96)}
                               for i,n in enumerate(nets)}
    given = dict(data='voc2007', size=224, arch='alexnet')
    found |= dict(blind=7., arch='alexnet', size=224, n_images=5011, n_test=4952)
    return made(path, 'voc', found, **given | params)

def tuned(path, **params):
    shares, nets = ('0.01', '0.1'), ('random', 'deepcluster')
    found = {part: levels(nets, shares, 20. + i) for i,part in enumerate(('top1', 'top5', 'frozen'))}
    found |= dict(arch='resnet50', size=224, classes=1000) | IMAGENET
    return made(path, 'finetune', found, **dict(dataset='packed', batch_size=256) | params)

def retrieval(path, **params):
    return made(path, 'retrieval', dict(arch='vgg16', mAP=dict(random=5., blind=1.)), **params)

def shape(value): # keys and types, without what a run is about
    if isinstance(value, dict): return {k: shape(v) for k,v in value.items()}
    return type(value) if not isinstance(value, int) else float

def same_format(run, made, but=()): # of a real run and a made one → the metrics of both
    true, mine = read_finished(run), read_finished(made)
    assert true.kind == mine.kind and true.params.keys() == mine.params.keys()
    assert mine.metrics.keys() - set(but) <= true.metrics.keys()
    assert set(mine.log[0] if mine.log else ()) <= set(true.log[0] if true.log else ())
    return true.metrics, mine.metrics
