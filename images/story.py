("The way of eight pieces of photographs through the chapters, a row more in each: "
 "`python images/story.py` (a minute).")
import io
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt, torch
from PIL import Image
from sklearn.datasets import load_sample_images
from deepcluster_nb.fast.crops import random_resized_crop, resample
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.data import generator
from deepcluster_nb.fast.features import PCA, compute_features
from deepcluster_nb.features import l2_normalize
from deepcluster_nb.model import convnet
from deepcluster_nb.pictures import STYLE, nearest_rows
from deepcluster_nb.sampling import uniform_sample
from deepcluster_nb.sobel import Sobel, normalize
from deepcluster_nb.fit import Config, fit, resolve
from deepcluster_nb.fast.training import cluster

HERE = Path(__file__).parent
CONFIG = Config(arch='alexnet_small', size=32, k=12, pca=32, epochs=8, batch_size=64, min_scale=.3,
                device='cpu')
SHOWN = torch.arange(8)                                 # of the pieces

def pieces(n=1200, side=96): # windows on both photographs, drawn by chance, in 32 × 32 pixels
    photos = [torch.from_numpy(p.copy()).permute(2, 0, 1) for p in load_sample_images().images]
    u, which = torch.rand(2, n, generator=generator(0, 'pieces')), torch.arange(n) % 2
    boxes = torch.stack([u[0] * (photos[0].shape[2] - side), u[1] * (photos[0].shape[1] - side),
                         torch.full((n,), side), torch.full((n,), side)], 1)
    small = torch.cat([resample([photos[w]], b[None], 32) for w,b in zip(which, boxes)])
    return PackedImages(small.round().byte(), labels=which, classes=['palace', 'flower'])

def rows(images, config): # (chapter, title, eight pictures or numbers of clusters)
    i, x = SHOWN, images.batch(SHOWN)
    yield 0, 'pixels', list(x)
    views = random_resized_crop(x, 32, generator(0, 'views'), (config.min_scale, 1.))
    yield 1, 'a view', list(views.byte())
    edges = Sobel()(normalize(views)).square().sum(1).sqrt()
    yield 2, 'edges', list(1 - edges / edges.max())
    net = convnet(config.arch, config.k, dropout=0., seed=config.seed).eval()
    f = compute_features(net, images, 32)
    grid = lambda v: list((v[:, :64] / (3*v.std()) * .5 + .5).reshape(len(v), -1, 8))
    yield 3, 'features', grid(f[i])
    yield 4, 'whitened', grid(l2_normalize(PCA(config.pca).fit(f).transform(f))[i])
    first = cluster(net, images, config, 0)[0].assign
    yield 5, 'cluster', first[i].tolist()
    drawn = uniform_sample(first, config.passes*len(images), config.seed,
                           0).bincount(minlength=len(images)) / config.passes
    yield 6, 'drawn', [f'{v:.1f} ×' for v in drawn[i]]
    run = fit(config, images, echo=None)
    last = run.clustering.assign
    yield 7, 'cluster', last[i].tolist()
    f = compute_features(run.net, images, 32)
    yield 9, 'nearest', list(images.batch(nearest_rows(f, f[i], 1, but=i)[:, 0]))
    lot = torch.randperm(len(images), generator=generator(0, 'members'))
    others = torch.stack([lot[(last[lot] == last[j]) & (lot != j)][:3] for j in i])
    for title, shown in zip(('its cluster', '', ''), others.T): yield 10, title, list(images.batch(shown))

def luminance(color): # WCAG 2's relative luminance of an (R, G, B) in 0 … 1
    linear = [v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4 for v in color]
    return sum(w*v for w,v in zip((.2126, .7152, .0722), linear))

def contrast(a, b): # WCAG 2's ratio, 1 to 21; small text needs 4.5
    low, high = sorted((luminance(a), luminance(b)))
    return (high + .05) / (low + .05)

def readable(ground): # the text color that stands out more from it, at least 4.5 : 1 on any color
    return max(((0, 0, 0), (1, 1, 1)), key=lambda text: contrast(text, ground))

def draw(rows, path):
    colors, newest = plt.get_cmap('Paired').colors, rows[-1][0]
    fig, axs = plt.subplots(len(rows), len(SHOWN) + 1, figsize=(7.2, .68*len(rows)),
                            width_ratios=[1.8] + [1]*len(SHOWN), squeeze=False,
                            gridspec_kw=dict(wspace=.06, hspace=.06, left=0, right=.995, top=.99, bottom=.01))
    for line, (chapter, title, things) in zip(axs, rows):
        line[0].axis('off')
        line[0].text(.95, .5, title, ha='right', va='center', fontsize=10.5,
                     weight='bold' if chapter == newest else 'normal', transform=line[0].transAxes)
        line[0].text(.02, .5, f'{chapter:02}' if title else '', va='center', fontsize=9, color='.45',
                     transform=line[0].transAxes)
        for ax, t in zip(line[1:], things):
            ax.set(xticks=[], yticks=[], aspect='equal')
            if isinstance(t, torch.Tensor):
                ax.imshow((t.permute(1, 2, 0) if t.ndim == 3 else t).numpy(), cmap='gray', vmin=0, vmax=1)
            else:
                if isinstance(t, int): ax.set_facecolor(colors[t % len(colors)])
                ax.text(.5, .5, t, ha='center', va='center', fontsize=12, transform=ax.transAxes,
                        color=readable(ax.get_facecolor()[:3]))
            for s in ax.spines.values(): s.set(visible=chapter == newest, color='#0072B2', lw=1.5)
    fig.savefig(picture := io.BytesIO(), dpi=100, facecolor='white')
    plt.close(fig)
    Image.open(picture).convert('RGB').quantize(128).save(path, optimize=True)

def main(out=HERE, images=None, config=CONFIG):
    done = list(rows(images or pieces(), resolve(config)))
    with plt.style.context(STYLE):
        for chapter in sorted({r[0] for r in done}):
            draw([r for r in done if r[0] <= chapter], Path(out)/f'story_{chapter:02}.png')

if __name__ == '__main__': main()
