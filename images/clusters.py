"""The home page's photographs and the social card, from a finished run of the preset cifar10_small_32:
`python images/clusters.py RUN FOLDER`; FOLDER is the training folder of CIFAR-10 that the run has read."""
import csv, io, sys
from collections import Counter, defaultdict
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, torch
from PIL import Image
from deepcluster_nb.data import generator
from deepcluster_nb.pictures import STYLE

HERE = Path(__file__).parent
MOST = 16                                       # images of a cluster that are shown at most
TEXT = ('DeepCluster', 'explained, run and reproduced in notebooks',
        'clusters that a network found without labels')

def purest(run): # [(class, share, images by lot)], a cluster for each class, the purest first
    clusters, best = defaultdict(list), {}
    for row in csv.DictReader(open(run/'clusters.csv', encoding='utf-8', newline='')):
        clusters[int(row['cluster'])].append(row['path'])
    for c, paths in clusters.items():
        name, n = Counter(Path(p).parent.name for p in paths).most_common(1)[0]
        lot = torch.randperm(len(paths), generator=generator(0, 'shown', c))[:MOST]
        if n/len(paths) > best.get(name, (0,))[0]: best[name] = n/len(paths), [paths[i] for i in lot]
    return sorted(((name, *found) for name, found in best.items()), key=lambda found: -found[1])

def row_of(folder, paths, side=64, gap=4): # a strip of images, side by side
    strip = np.full((side, len(paths)*(side + gap) - gap, 3), 255, np.uint8)
    for i, p in enumerate(paths):
        tile, left = Image.open(folder/p).convert('RGB').resize((side, side), Image.BICUBIC), i*(side + gap)
        strip[:, left:left + side] = tile
    return strip

def save(fig, path, dpi=100):
    fig.savefig(picture := io.BytesIO(), dpi=dpi, facecolor='white')
    plt.close(fig)
    Image.open(picture).convert('RGB').quantize(256).save(path, optimize=True)

def rows(fig, found, folder, n, rect, fontsize=9.5):
    "A cluster a line, n images of each; rect: left, bottom, width and height as shares of the figure."
    left, bottom, width, height = rect
    grid = fig.add_gridspec(len(found), 1, left=left, bottom=bottom, right=left + width, top=bottom + height,
                            hspace=.06)
    for ax, (name, share, paths) in zip(grid.subplots().flat, found):
        ax.imshow(row_of(folder, paths[:n]), interpolation='antialiased')
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(f'{name}\n{share:.0%}', rotation=0, ha='right', va='center', fontsize=fontsize,
                      linespacing=1, color='.2')
        for s in ax.spines.values(): s.set_visible(False)

def main(run, folder):
    found = purest(run)
    with plt.style.context(STYLE):
        # narrow, to stand beside the commands; a phone shows six columns of it, larger
        fig = plt.figure(figsize=(3.8, 3.44))
        rows(fig, found, folder, 9, (.184, 0, .816, 1), fontsize=7.5)
        save(fig, HERE/'found.png', dpi=150)
        fig = plt.figure(figsize=(12, 6.3))
        for y, size, color, words in zip((.85, .77, .08), (44, 22, 17), ('#17497f', '.25', '.25'), TEXT):
            fig.text(.05, y, words, fontsize=size, color=color)
        rows(fig, found[:6], folder, 13, (.125, .15, .825, .56))
        save(fig, HERE/'card.png')

if __name__ == '__main__':
    if len(sys.argv) != 3: sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
