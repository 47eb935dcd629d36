("The home page's two pictures, drawn from what stands on it: "
 "`python images/draw.py` after its table has changed.")
import json
from pathlib import Path

HERE = Path(__file__).parent
BLUE, INK, GREY, DARK = '#0072b2', '#1f2937', '#9ca3af', '#4b5563'

def text(x, y, s, size=15, color=INK, anchor='middle', more=''):
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{more}>{s}</text>'

def card(width, height, title, inside): # light on every page, so that it can be read on a dark one
    return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                      f'width="{width}" height="{height}" '
                      'font-family="Helvetica, Arial, sans-serif" role="img">',
                      f'<title>{title}</title>',
                      f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" fill="#ffffff" '
                      'stroke="#d1d5db"/>',
                      *inside, '</svg>', ''])

def pipeline():
    "Three rows of three; the lower two are the loop."
    cols, rows, w, h = (14, 178, 342), (18, 112, 206), 124, 48
    steps = [('images', 0, 0), ('crops', 1, 0), ('Sobel', 2, 0), ('network', 2, 1), ('features', 1, 1),
             ('PCA, unit length', 0, 1), ('k-means', 0, 2), ('balanced sampling', 1, 2), ('training', 2, 2)]
    out = ['<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
           f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{DARK}"/></marker></defs>']
    for (_, c, r), (_, c2, r2) in zip(steps, steps[1:] + [steps[3]]):      # from side to side, or down, or up
        dx, dy = (c2 > c) - (c2 < c), (r2 > r) - (r2 < r)
        ends = [cols[c] + w/2 + dx*w/2, rows[r] + h/2 + dy*h/2, cols[c2] + w/2 - dx*(w/2 + 3),
                rows[r2] + h/2 - dy*(h/2 + 3)]
        out.append('<path d="M{:g} {:g}L{:g} {:g}" stroke="{}" stroke-width="1.6" fill="none" '
                   'marker-end="url(#tip)"/>'.format(*ends, DARK))
    for name, c, r in steps:
        fill, line = ('#fde68a', '#b45309') if name == 'k-means' else ('#f3f4f6', '#6b7280')
        out += [f'<rect x="{cols[c]}" y="{rows[r]}" width="{w}" height="{h}" rx="6" fill="{fill}" '
                f'stroke="{line}"/>', text(cols[c] + w/2, rows[r] + h/2 + 5, name, 14)]
    out.append(text(240, 187, 'once every epoch', 14, DARK, more=' font-style="italic"'))
    return card(480, 272, 'DeepCluster: cluster the features, train on the cluster numbers, repeat', out)

def table(markdown): # name → [(mean, standard deviation), …], and the columns
    rows = [[c.strip() for c in l.strip('|').split('|')] for l in markdown.splitlines() if l.startswith('|')]
    start = next(i for i,r in enumerate(rows) if r[0].startswith('test accuracy'))
    values = {r[0]: [tuple(map(float, c.split(' ± '))) for c in r[1:]] for r in rows[start + 2:start + 5]}
    return rows[start][1:], values

def gains(markdown):
    "The table of rung 2 as points with their spread."
    names, values = table(markdown)
    looks = {'random': GREY, 'random, batch norm calibrated': DARK, 'DeepCluster': BLUE}
    low, high, x, y = 30, 68, lambda i: 66 + 72*i, lambda v: 46 + (68 - v) * 6
    out = [text(16, 26, 'test accuracy, %: mean and standard deviation of three seeds', 14, anchor='start')]
    for v in range(low, high, 10):
        out += [f'<path d="M44 {y(v)}H462" stroke="#e5e7eb"/>', text(38, y(v) + 5, v, 13, DARK, 'end')]
    for shift, (name, color) in zip((-14, 0, 14), looks.items()):
        for i,(mean, sd) in enumerate(values[name]):
            if not low < mean - sd < mean + sd < high:
                raise ValueError(f'{name}, {names[i]}: {mean} ± {sd} is outside of the '
                                 f'picture, {low} to {high}')
            out += [f'<path d="M{x(i) + shift} {y(mean - sd):.1f}V{y(mean + sd):.1f}" stroke="{color}" '
                    'stroke-width="2"/>',
                    f'<circle cx="{x(i) + shift}" cy="{y(mean):.1f}" r="4.5" fill="{color}"/>']
            if name == 'DeepCluster':
                out.append(text(x(i) + shift, f'{y(mean + sd) - 8:.1f}', f'{mean:.0f}', 13, color,
                                more=' font-weight="bold"'))
    for i,name in enumerate(names): out.append(text(x(i), y(low) + 24, name, 14))
    for at, (name, color) in zip((24, 112, 340), looks.items()):
        out += [f'<circle cx="{at}" cy="{y(low) + 50}" r="4.5" fill="{color}"/>',
                text(at + 10, y(low) + 55, name, 14, anchor='start')]
    return card(480, 346,
                'Linear probes and neighbours on CIFAR-10: DeepCluster above random features on every layer',
                out)

def pictures():
    cells = json.loads((HERE.parent/'nbs'/'index.ipynb').read_text())['cells']
    return {'pipeline.svg': pipeline(),
            'gains.svg': gains('\n'.join(''.join(c['source'])
                                         for c in cells if c['cell_type'] == 'markdown'))}

if __name__ == '__main__':
    for name, svg in pictures().items(): (HERE/name).write_text(svg)
