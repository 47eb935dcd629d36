("It learns: a small, safe margin over random features on real photographs. "
 "The measured gains are in the README.")
from deepcluster_nb.model import convnet
from deepcluster_nb.probes import evaluate, held_out
from deepcluster_nb.fit import Config, fit

def gains(config): # (conv3, conv4, conv5, kNN) in points over the same network with random weights
    run = fit(config, echo=None)
    c, splits = run.config, held_out(run.config, run.images)
    random, ours = [evaluate(net, *splits, c.size, c.device, c.precision, c.seed)
                    for net in (convnet(c.arch, c.k, c.sobel, c.dropout, c.seed).to(c.device), run.net)]
    return [ours['probes'][l]['last'] - random['probes'][l]['last']
            for l in ('conv3', 'conv4', 'conv5')] + [ours['knn'] - random['knn']], run.log

def test_cifar10_features_beat_random_ones(cifar_root):
    found, log = gains(Config(dataset='cifar10', root=cifar_root, n_images=2000, n_test=2000, k=100,
                              epochs=3))
    assert sum(found[:3]) / 3 > 1 and found[3] > 1, found
    assert log[-1]['loss'] < .9*log[-1]['ln_k'] and log[-1]['ami_prev'] > .2 and log[-1]['n_empty'] == 0

def test_the_loop_learns_on_shapes():
    run = fit(Config(dataset='shapes', n_images=500, k=25, pca=64, epochs=3, batch_size=50), echo=None)
    assert (run.log[-1]['loss'] < .9*run.log[-1]['ln_k']
            and run.log[-1]['nmi_prev'] > 1.5*run.log[-1]['nmi_prev_chance'])
