"""The pages as a reader sees them, without Quarto: `python tests/pages.py` converts what nbdev has processed
(_proc) with pandoc under the site's own styles and layout, opens each page in a browser, and counts its
length, wrapped lines, low contrasts and overflow. Of Quarto's theme only sizes and colors are there.
Needs pandoc (pip install pypandoc_binary), the package playwright and some Chromium; see `make browser`."""
import argparse, base64, html, json, re, shutil, subprocess, sys
from pathlib import Path
import yaml
from browser import browser

ROOT = Path(__file__).parent.parent
GRID = {'sidebar-width': '250px', 'body-width': '800px', 'margin-width': '250px'}     # Quarto's own

# what Quarto and its themes set, and the site's styles build upon
BASE = '''
:root { font-size: 17px; }
body { margin: 0; font: 1rem/1.5 "Source Sans Pro", "Segoe UI", "DejaVu Sans", sans-serif; }
body { background: #fff; color: #373a3c; }
body.quarto-dark { background: #222; color: #fff; }
a { color: #2780e3; }
body.quarto-dark a { color: #00bc8c; }
h1, h2, h3 { line-height: 1.2; font-weight: 400; }
h2 { margin-top: 2rem; border-bottom: 1px solid #dee2e6; }
#quarto-content { display: grid; padding: 0 1.5rem; }
#sidebar, #margin { font-size: .875rem; padding: 1rem; overflow: hidden; }
main { min-width: 0; padding: 1rem 1.5rem 3rem; }
pre, code { font-family: SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace; }
code { font-size: .875em; white-space: pre; }
p code, li code, td code { white-space: pre-wrap; }
pre { margin: 0 0 1rem; }
div.sourceCode { background: #f1f3f5; margin: 0 0 1em; border-radius: .25rem; }
body.quarto-dark div.sourceCode { background: #343a40; }
div.sourceCode > pre { padding: .4em; margin: 0; }
pre > code { display: block; }
pre > code.sourceCode { white-space: pre-wrap; }
pre > code.sourceCode > span { display: inline-block; line-height: 1.25; }
pre > code.sourceCode > span:empty { height: 1.2em; }
.cell-output pre { padding: .4em; overflow-x: auto; }
.cell-output-display { overflow-x: auto; }
figure { margin: 0 0 1rem; }
figcaption { font-size: .9rem; color: #868e96; }
img { max-width: 100%; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .5rem; border-bottom: 1px solid #dee2e6; vertical-align: top; text-align: left; }
details.callout { border: 1px solid #dee2e6; border-left: 5px solid #198754; padding: .4em .8em; }
details.callout { margin: 1rem 0; }
math[display="block"] { overflow-x: auto; max-width: 100%; }
@media (max-width: 991px) { #sidebar, #margin { display: none; }
#quarto-content { grid-template-columns: 100%; padding: 0; }
main { padding: 1rem .8rem; } }
'''

MEASURE = '''() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const visible = e => e.textContent.trim() && e.getClientRects().length;
  const lines = all('pre > code.sourceCode > span').filter(visible);
  const height = s => s.getBoundingClientRect().height / parseFloat(getComputedStyle(s).lineHeight);
  const wrapped = lines.filter(s => height(s) > 1.6);
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4);
                       return .2126*r + .7152*g + .0722*b; };
  const mix = (a, top, below) => a*top + (1 - a)*below;
  const over = (top, below) => [0, 1, 2].map(i => mix(top[3] ?? 1, top[i], below[i]));
  const ground = e => { const c = rgb(getComputedStyle(e).backgroundColor);
    return c[3] === 0 ? (e.parentElement ? ground(e.parentElement) : [255, 255, 255])
                      : over(c, e.parentElement ? ground(e.parentElement) : [255, 255, 255]); };
  const low = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = 21;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    const seen = e.getClientRects().length && !e.closest('svg, script, style');
    if (!seen || !walk.currentNode.textContent.trim()) continue;
    const below = ground(e), text = over(rgb(getComputedStyle(e).color), below);
    const [x, y] = [light(text), light(below)].sort((p, q) => q - p);
    const ratio = (x + .05)/(y + .05);
    least = Math.min(least, ratio);
    const name = e.tagName + '.' + e.className;
    if (ratio < 4.5) low[name] = Math.min(low[name] || 21, Math.round(100*ratio)/100);
  }
  const clips = e => /auto|scroll|hidden/.test(getComputedStyle(e).overflowX);
  const scrolls = e => e && (clips(e) || scrolls(e.parentElement));
  const outside = e => e.getBoundingClientRect().right > innerWidth + 1;
  const wide = all('main *').filter(e => outside(e) && !scrolls(e.parentElement));
  return {height: document.documentElement.scrollHeight, lines: lines.length, wrapped: wrapped.length,
          least: Math.round(100*least)/100, low,
          wide: [...new Set(wide.map(e => e.tagName + '.' + e.className))]};
}'''

def source(cell): return ''.join(cell['source'])

def figure(data, options, folder, name):
    ext, kind = ('svg', 'image/svg+xml') if 'image/svg+xml' in data else ('png', 'image/png')
    content = ''.join(data[kind])
    path = folder/f'{name}.{ext}'
    path.write_bytes(content.encode() if ext == 'svg' else base64.b64decode(content))
    caption, alt = (html.escape(str(options.get(k, '')), quote=True) for k in ('fig-cap', 'fig-alt'))
    return f'<figure><img src="{path.name}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'

def output(o, options, folder, name):
    data = o.get('data', {})
    if 'text' in o: return f"```\n{''.join(o['text'])}\n```"
    if 'image/png' in data or 'image/svg+xml' in data: return figure(data, options, folder, name)
    if 'text/html' in data: return f"```{{=html}}\n{''.join(data['text/html'])}\n```"
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    return f"```\n{''.join(data.get('text/plain', ''))}\n```"

def markdown(nb, folder):
    "A processed notebook → (front matter, Markdown as Quarto hands it to pandoc)."
    front, parts = {}, []
    for n, c in enumerate(nb['cells']):
        text = source(c)
        if c['cell_type'] == 'raw': front |= yaml.safe_load(text.strip().strip('-'))
        elif text.startswith('::: {.callout') and '\n' not in text.strip():
            title = m[1] if (m := re.search(r'title="(.*?)"', text)) else 'Note'
            parts.append(f'```{{=html}}\n<details class="callout"><summary>{title}</summary>\n```')
        elif text == ':::': parts.append('```{=html}\n</details>\n```')
        elif c['cell_type'] == 'markdown': parts.append(text)
        else:
            lines = text.splitlines()
            options = yaml.safe_load('\n'.join(l[2:].strip() for l in lines if l.startswith('#|'))) or {}
            code = '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')
            parts.append('::: {.cell}')
            folded = options.get('code-fold') is True
            summary = options.get('code-summary', 'Code')
            if folded: parts.append(f'```{{=html}}\n<details><summary>{summary}</summary>\n```')
            if options.get('echo', True) and code: parts.append(f'````{{.python .cell-code}}\n{code}\n````')
            if folded: parts.append('```{=html}\n</details>\n```')
            for i, o in enumerate(c.get('outputs', [])):
                asis = options.get('output') == 'asis'
                shown = output(o, options, folder, f'{folder.name}_{n}_{i}')
                parts.append(shown if asis else f':::: {{.cell-output .cell-output-display}}\n{shown}\n::::')
            parts.append(':::')
    return front, '\n\n'.join(parts)

def layout(quarto):
    grid = GRID | quarto['format']['html'].get('grid', {})
    side, body, margin = (grid[f'{k}-width'] for k in ('sidebar', 'body', 'margin'))
    columns = f'{side} minmax(500px, {body}) {margin}'
    return f'#quarto-content {{ grid-template-columns: {columns}; justify-content: center; }}'

def write_pages(root, out, names):
    "HTML of the processed pages, with the styles of the site; → paths."
    pandoc = shutil.which('pandoc')
    try: import pypandoc; pandoc = pypandoc.get_pandoc_path()
    except ImportError: pass
    if not pandoc: sys.exit('pages: no pandoc: pip install pypandoc_binary')
    quarto, proc = yaml.safe_load((root/'_quarto.yml').read_text()), root/'_proc'
    script = quarto['format']['html']['include-after-body'][0]['text']
    styles = BASE.replace('@media', layout(quarto) + '\n@media') + (root/'nbs'/'styles.css').read_text()
    made = []
    for path in sorted(proc.rglob('*.ipynb')):
        if names and path.stem not in names: continue
        folder = out/path.stem
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, out): shutil.copytree(proc/'images', place/'images', dirs_exist_ok=True)
        front, text = markdown(json.loads(path.read_text()), folder)
        command = [pandoc, '-f', 'markdown', '-t', 'html5', '--mathml', '--wrap=preserve', '--section-divs']
        body = subprocess.run(command, input=text, text=True, capture_output=True, check=True).stdout
        title = html.escape(front.get('title', path.stem))
        (folder/'index.html').write_text(
            '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>{title}</title><style>{styles}</style><body class="quarto-light">'
            f'<div id="quarto-content"><nav id="sidebar"></nav><main class="content"><h1>{title}</h1>'
            f'<p class="lead">{html.escape(front.get("description", ""))}</p>{body}</main>'
            f'<nav id="margin"></nav></div>{script}')
        made.append(folder/'index.html')
    return made

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('pages', nargs='*', help='stems of notebooks; all where none is given')
    parser.add_argument('--root', type=Path, default=ROOT, help='the checkout whose _proc is shown')
    parser.add_argument('--out', type=Path, default=ROOT/'runs'/'pages', help='for pages and screenshots')
    parser.add_argument('--widths', type=int, nargs='+', default=[1400, 390], help='of the window, in pixels')
    parser.add_argument('--shots', action='store_true', help='a screenshot of each page')
    a = parser.parse_args()
    if not (a.root/'_proc').is_dir(): sys.exit(f'pages: no {a.root}/_proc: run make docs first')
    pages = write_pages(a.root, a.out, a.pages)
    print('page'.ljust(20), 'width', 'mode ', 'height', ' lines', 'wrapped', 'lowest contrast', sep='  ')
    with browser() as b:
        for path in pages:
            for width in a.widths:
                for mode in ('light', 'dark'):
                    page = b.new_page(viewport=dict(width=width, height=900))
                    page.goto(path.resolve().as_uri())
                    if mode == 'dark': page.evaluate("document.body.className = 'quarto-dark'")
                    m = page.evaluate(MEASURE)
                    name = path.parent.name
                    print(name.ljust(20), f'{width:5}', mode.ljust(5), f"{m['height']:6}", f"{m['lines']:6}",
                          f"{m['wrapped']:7}", f"{m['least']:5}", m['low'] or '', m['wide'] or '', sep='  ')
                    if a.shots: page.screenshot(path=a.out/f'{name}_{width}_{mode}.png', full_page=True)
                    page.close()

if __name__ == '__main__': main()
