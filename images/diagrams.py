"The chapters' diagrams, in the look of the home page's: `python images/diagrams.py` after a change."
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE)) # a test loads this file by its path
from draw import DARK, card, text

WIDTH, HEIGHT = 124, 48 # of a box
PLAIN, BRIGHT = ('#f3f4f6', '#6b7280'), ('#fde68a', '#b45309') # ground and border
TIP = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
       f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{DARK}"/></marker></defs>')

def center(col, row): return 14 + 164*col + WIDTH/2, 18 + 94*row + HEIGHT/2

def border(at, toward, gap=0):
    "Where the line from the middle of one place toward another leaves the box."
    (x, y), (x2, y2) = center(*at), center(*toward)
    return x + ((x2 > x) - (x2 < x))*(WIDTH/2 + gap), y + ((y2 > y) - (y2 < y))*(HEIGHT/2 + gap)

def box(name, col, row, label=None, bright=False):
    "A box with one or two lines of text."
    (x, y), (fill, line) = center(col, row), BRIGHT if bright else PLAIN
    lines = (label or name).split('\n')
    shifts = (5,) if len(lines) == 1 else (-3, 14)
    place = f'x="{x - WIDTH/2:g}" y="{y - HEIGHT/2:g}" width="{WIDTH}" height="{HEIGHT}"'
    return [f'<rect {place} rx="6" fill="{fill}" stroke="{line}"/>',
            *(text(x, y + shift, s, 14) for shift, s in zip(shifts, lines))]

def arrow(start, end, taken, label=None):
    "From box to box: straight, or round a corner that no box stands on."
    (c, r), (c2, r2) = start, end
    bend = [] if c == c2 or r == r2 else [next(b for b in ((c2, r), (c, r2)) if b not in taken)]
    path = [start, *bend, end]
    points = [border(start, path[1]), *(center(*b) for b in bend), border(end, path[-2], 3)]
    line = 'L'.join(f'{x:g} {y:g}' for x, y in points)
    out = [f'<path d="M{line}" stroke="{DARK}" stroke-width="1.6" fill="none" marker-end="url(#tip)"/>']
    (x, y), (x2, y2) = points[-2:]
    if label and x == x2: out.append(text(f'{x + 8:g}', f'{(y + y2)/2 + 5:g}', label, 14, DARK, 'start'))
    elif label: out.append(text(f'{(x + x2)/2:g}', f'{y - 9:g}', label, 14, DARK))
    return out

def flow(title, nodes, edges, here=(), labels={}, epoch=None):
    "`nodes`: name → column, row[, text]. `edges`: 'a > b > c; d > b'. `epoch`: where to write how often."
    at, out = {name: node[:2] for name, node in nodes.items()}, [TIP]
    for way in [e.split(' > ') for e in edges.split('; ')]:
        for a, b in zip(way, way[1:]): out += arrow(at[a], at[b], at.values(), labels.get(f'{a} > {b}'))
    for name, node in nodes.items(): out += box(name, *node, bright=name in here)
    if epoch:
        x, y = center(*epoch)
        out.append(text(f'{x:g}', f'{y + 4:g}', 'once every epoch', 14, DARK, more=' font-style="italic"'))
    return card(480, 84 + 94*max(row for _, row in at.values()), title, out)

STEPS = {'images': (0, 0), 'crops': (1, 0), 'Sobel': (2, 0),
         'network': (2, 1), 'features': (1, 1), 'PCA, unit length': (0, 1),
         'k-means': (0, 2), 'balanced sampling': (1, 2), 'training': (2, 2)}

def loop(*here, title='DeepCluster: cluster the features, train on the cluster numbers, repeat',
         changed={}, back=(), more='', epoch=(1, 1.5)):
    "Three rows of three, the lower two the loop; the boxes `back` are on the way from training to network."
    return flow(title, STEPS | changed, ' > '.join([*STEPS, *back, 'network']) + more, here, epoch=epoch)

STATIONS = {'data': ['images'], 'augment': ['crops'], 'sobel': ['Sobel'], 'model': ['network'],
            'features': ['features', 'PCA, unit length'], 'clustering': ['k-means'],
            'sampling': ['balanced sampling'], 'training': ['training']}

def chapter(stem): return min((HERE.parent/'nbs').glob(f'[0-9]*_{stem}.ipynb')).name.split('_')[0]

def how_to_read():
    "The loop, with the chapter's number in each box."
    at = STEPS | {'pictures': (0, 3), 'probes': (2, 3)}
    stems = {name: stem for stem, names in STATIONS.items() for name in names}
    return loop('k-means', 'training', title='The steps of DeepCluster, each with the number of its chapter',
                changed={name: (*at[name], f'{name}\n{chapter(stems.get(name, name))}') for name in at},
                more='; k-means > pictures; training > probes')

FLOWS = {
    'probes': dict(
        title='Two tests of a frozen trunk: linear probes on its layers, neighbors in its features',
        nodes={'images': (0, 0), 'trunk': (1, 0, 'frozen trunk'), 'features': (2, 0, 'clustered\nfeatures'),
               'probe': (0, 1, 'linear probe'), 'layers': (1, 1, 'conv1 to conv5'),
               'neighbors': (2, 1, 'nearest\nneighbors')},
        edges='images > trunk > features > neighbors; trunk > layers > probe', here=['probe', 'neighbors']),
    'pictures': dict(
        title='Where the pictures come from: the features, the clusters of k-means, and the training',
        nodes={'images': (0, 0), 'features': (1, 0, 'features: maps,\nneighbors'), 'k-means': (1, 1),
               'training': (2, 1), 'montages': (1, 2, 'montages, film'),
               'filters': (2, 2, 'filters, channels,\ncurves')},
        edges='images > features > k-means > training > features; k-means > montages; training > filters',
        here=['features', 'montages', 'filters'], epoch=(1.5, .5)),
    'packing': dict(
        title='Files are packed once: central crops for the clustering, one mapped file for the training',
        nodes={'pack': (0, 0, 'pack the JPEG\nfiles once'), 'file': (2, 0, 'one mapped file'),
               'crops': (0, 1, 'central crops'), 'features': (1, 1), 'training': (2, 1),
               'k-means': (1, 2), 'pseudo-labels': (2, 2)},
        edges='pack > file > training > features > k-means > pseudo-labels > training; '
              'pack > crops > features', here=['pack'], epoch=(1.5, 1.5)),
    'voc': dict(
        title='From the trunk to the mAP on VOC 2007: a linear SVM on frozen features, or new top layers',
        nodes={'DeepCluster': (0, 0), 'trunk': (1, 0), 'frozen features': (2, 0),
               'top': (1, 1, 'new fc6, fc7, fc8'), 'SVM': (2, 1, 'linear SVM'),
               'mAP': (0, 2), 'AP': (1, 2, 'AP of each class')},
        edges='DeepCluster > trunk > frozen features > SVM > AP > mAP; trunk > top > AP',
        here=['top', 'SVM', 'mAP']),
    'retrieval': dict(
        title="From a photograph to a ranking: region maxima, whitened by the other city's PCA, summed",
        nodes={'photograph': (0, 0), 'maps': (1, 0, 'last maps of a\nfrozen trunk'),
               'maxima': (2, 0, 'region maxima'), 'ranking': (0, 1), 'sum': (1, 1),
               'whitening': (2, 1), 'mAP': (0, 2), 'city': (2, 2, 'PCA of the\nother city')},
        edges='photograph > maps > maxima > whitening > sum > ranking > mAP; city > whitening',
        here=['maxima', 'whitening', 'ranking']),
    'released': dict(
        title='A checkpoint becomes a network only if its checksum, names and shapes are as expected',
        nodes={'file': (0, 0, 'checkpoint\n.pth.tar'), 'checksum': (1, 0, 'sha256\nas before?'),
               'tensors only': (2, 0), 'error': (1, 1), 'names': (2, 1, 'names, shapes\nas expected?'),
               'network': (1, 2, 'DeepClusterNet'), 'safetensors': (2, 2)},
        edges='file > checksum > tensors only > names > safetensors > network; '
              'checksum > error; names > error', here=['tensors only'],
        labels={'checksum > tensors only': 'yes', 'checksum > error': 'no',
                'names > safetensors': 'yes', 'names > error': 'no'}),
    'few_labels': dict(
        title='With a few labels: the trunk learns on under a new head, or stays frozen under a probe',
        nodes={'DeepCluster': (0, 0), 'trunk': (1, 0), 'frozen': (2, 0, 'frozen layers'),
               'labels': (0, 1, 'a few labels'), 'head': (1, 1, 'new head,\nall layers learn'),
               'probe': (2, 1, 'linear probe'), 'accuracy': (1, 2)},
        edges='DeepCluster > trunk > frozen > probe > accuracy; trunk > head > accuracy; labels > head',
        here=['labels', 'head']),
    'feeding': dict(
        title='From the mapped file to the device: once as a whole, or in batches through pinned memory',
        nodes={'file': (0, 0, 'mapped file'), 'resident': (1, 0, 'resident on\nthe device'),
               'batch': (1, 1, 'flat batch\non the device'), 'crops': (2, 1),
               'pinned': (0, 2, 'pinned memory'), 'network': (2, 2)},
        edges='file > resident > batch > crops > network; file > pinned > batch',
        labels={'file > resident': 'once', 'file > pinned': 'threads', 'pinned > batch': 'its own stream'})}

def pictures():
    title = 'The steps of DeepCluster, with {} highlighted'
    quoted = lambda names: ' and '.join(f'"{name}"' for name in names)
    found = {stem: loop(*here, title=title.format(quoted(here))) for stem, here in STATIONS.items()}
    found['pic'] = loop('k-means', title='The steps of DeepCluster, with PIC in place of k-means',
                        changed={'k-means': (0, 2, 'PIC')})
    lower = {'k-means': (0, 3), 'balanced sampling': (1, 3), 'training': (2, 3), 'log, checkpoint': (2, 2)}
    found['runs'] = loop('log, checkpoint', title=title.format(quoted(['log, checkpoint'])),
                         changed=lower, back=['log, checkpoint'], epoch=(1, 2))
    found['how_to_read'] = how_to_read()
    found |= {stem: flow(**parts) for stem, parts in FLOWS.items()}
    return {f'diagram_{stem}.svg': svg for stem, svg in found.items()}

if __name__ == '__main__':
    for name, svg in pictures().items(): (HERE.parent/'nbs'/'images'/name).write_text(svg)
