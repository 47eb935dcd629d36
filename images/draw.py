"Chapter 15's picture of the ladder's second rung, from the table beside it: `python images/draw.py`."
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

def table(markdown): # name → [(mean, standard deviation), …], and the columns
    rows = [[c.strip() for c in l.strip('|').split('|')] for l in markdown.splitlines() if l.startswith('|')]
    start = next(i for i,r in enumerate(rows) if r[0].startswith('test accuracy'))
    values = {r[0]: [tuple(map(float, c.split('±'))) for c in r[1:]] for r in rows[start + 2:start + 5]}
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
                'Linear probes and neighbors on CIFAR-10: DeepCluster above random features on every layer',
                out)

def pictures():
    (page,) = (HERE.parent/'nbs').glob('[0-9]*_experiments.ipynb')
    cells = json.loads(page.read_text())['cells']
    markdown = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return {'gains.svg': gains(markdown)}

if __name__ == '__main__':
    for name, svg in pictures().items(): (HERE/name).write_text(svg)
