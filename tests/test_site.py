"""What a reader of the book would stumble over: dead links, figures that say nothing, stale outputs, \
pages that nobody finds. Quarto isn't needed:
`make docs` runs with a stand-in, so nbdev processes the notebooks as for the real one, and the \
processed ones are read. `python tests/test_site.py` prints the pages with their reading times, and \
every figure."""
import ast, io, json, os, re, shutil, subprocess, sys, tokenize
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path
import pytest, yaml
from filelock import FileLock
from PIL import Image
from outputs import MEASURED, differences

ROOT = Path(__file__).parent.parent
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
SITE = SETTINGS['doc_host'] + SETTINGS['doc_baseurl'] + '/'
REPO = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}/"

# STYLE's orders of size are 600 to 1,300 words, cells rarely over
# 25 lines, 1 MB. From here on a page or a cell is too large,
WORDS, LINES, BYTES = 2000, 40, 1_000_000
# but for these, which should become smaller and may not grow: (page, what) → how much it may be
TOO_LARGE = {('fast/19_images.ipynb', 'lines'): 47,
             ('17_runs.ipynb', 'lines'): 43,
             ('fast/26_packing.ipynb', 'lines'): 62,
             ('29_estimate.ipynb', 'lines'): 45}

# ---------------------------------------------------------------- reading a notebook

def source(cell): return ''.join(cell.get('source') or '')
def code_lines(cell):
    "Statements, each counted once however it is broken, a block of one with the line above it; and comments."
    code = re.sub(r'^([ \t]*)[%!].*$', r'\1pass', source(cell), flags=re.M)
    code = re.sub(r'^#\|.*$', '', code, flags=re.M)
    tokens, rows = list(tokenize.generate_tokens(io.StringIO(code).readline)), code.splitlines()
    blocks = [getattr(n, part, None) for n in ast.walk(ast.parse(code)) if not isinstance(n, ast.Module)
              for part in ('body', 'orelse', 'finalbody')]
    ones = [b[0] for b in blocks if isinstance(b, list) and len(b) == 1 and not hasattr(b[0], 'body')]
    return (sum(t.type == tokenize.NEWLINE for t in tokens)
            - sum(not rows[s.lineno - 1][:s.col_offset].strip() for s in ones)
            + sum(t.type == tokenize.COMMENT and t.line.lstrip().startswith('#') for t in tokens))
def without_blocks(md): return re.sub(r'^(```+|~~~+).*?^\1\s*$', '', md, flags=re.S | re.M)
def without_code(md): return re.sub(r'(`+)(?!`).+?(?<!`)\1(?!`)', '`', without_blocks(md))
def without_maths(md): return re.sub(r'\$\$.+?\$\$|\$(?=\S)[^$\n]+?(?<=\S)\$', 'x', md, flags=re.S)
def outputs(cell, *kinds):
    return [(k, ''.join(o['data'][k])) for o in cell.get('outputs', [])
            for k in o.get('data', {}) if k.startswith(kinds)]
def streams(cell): return ''.join(''.join(o.get('text', '')) for o in cell.get('outputs', []))
def option(cell, name): # of a line like `#| fig-cap: "..."`
    found = re.search(rf'^#\|\s*{name}:\s*(.*)$', source(cell), re.M)
    return yaml.safe_load(found[1]) if found and found[1].strip() else None

class Page:
    "A notebook of the site, as stored or as nbdev has processed it."
    def __init__(self, name, cells): # relative to nbs
        self.name, self.cells = name, cells
        self.head = next((yaml.safe_load(m[1]) for c in cells[:1] if c['cell_type'] == 'raw'
                          and (m := re.match(r'---\n(.*?)\n---', source(c), re.S))), {})
    @property
    def address(self): # as nbdev gives it
        return str(Path(self.name).with_name(self.head.get('output-file')
                                             or re.sub(r'^\d+\w?_', '', Path(self.name).stem) + '.html'))
    def texts(self, clean=without_code): # what Quarto reads as markdown
        for c in self.cells:
            if c['cell_type'] == 'markdown': yield clean(source(c))
            yield from (clean(t) for _,t in outputs(c, 'text/markdown', 'text/html'))
    def words(self):
        return sum(len(re.findall(r"\w[\w'’-]*", without_maths(without_code(source(c)))))
                   for c in self.cells if c['cell_type'] == 'markdown')
    def figures(self): return [c for c in self.cells if c['cell_type'] == 'code' and outputs(c, 'image/')]

def pages(folder):
    return {p.name: p for p in (Page(str(f.relative_to(folder)), json.loads(f.read_text())['cells'])
                                for f in sorted(folder.rglob('*.ipynb'))
                                if not any(x[0] in '._' for x in f.relative_to(folder).parts))}

# ---------------------------------------------------------------- links

def identifier(heading):
    ("Pandoc's auto_identifiers, which Quarto keeps: "
     "the text without its marks, words joined by hyphens, from the first letter on.")
    text = re.sub(r'!?\[([^\]]*)\](?:\([^)]*\))?(?:\{[^}]*\})?', r'\1', heading)
    text = re.sub(r'(?<!\w)_+|_+(?!\w)', '', text)
    text = '-'.join(re.sub(r'[^\w\-. ]', '', text).lower().split())
    return re.sub(r'^[\W\d_]+', '', text) or 'section'

def anchors(page):
    seen, found = {}, set()
    for text in page.texts(without_blocks):
        for heading in re.findall(r'^#{1,6}\s+(.+?)\s*#*$', text, re.M):
            if m := re.search(r'\{[^}]*#([\w:.-]+)[^}]*\}\s*$', heading): found.add(m[1]); continue
            name = identifier(re.sub(r'\{[^}]*\}\s*$', '', heading))
            found.add(f'{name}-{seen[name]}' if name in seen else name)
            seen[name] = seen.get(name, 0) + 1
        found |= set(re.findall(r'(?:\bid="|\{#)([\w:.-]+)', text))
    return found | labels(page)

def labels(page): # what @fig-… and the like can name
    texts = '\n'.join(page.texts())
    return ({l for c in page.cells if c['cell_type'] == 'code' and (l := option(c, 'label'))}
            | set(re.findall(r'\{#((?:fig|tbl|eq|sec|lst|thm|exr)-[\w-]+)', texts)))

def targets(page):
    for text in page.texts():
        yield from (m[1] or m[2] for m in re.finditer(r'\]\((?:<([^>]*)>|([^)\s]+))[^)]*\)', text))
        yield from re.findall(r'(?:href|src)="([^"]+)"', text)

def dead_links(page, site, folder):
    ("Links within the site and the repository that lead nowhere. "
     "`site`: name → Page; `folder`: where the pages and their files lie.")
    dead, by_address = [], {p.address: p for p in site.values()}
    for target in targets(page):
        where, _, anchor = target.partition('#')
        if target.startswith(REPO):
            file, line = ROOT/where[len(REPO):], re.match(r'L(\d+)', anchor)
            ok = file.exists() and (not line or int(line[1]) <= len(file.read_text().splitlines()))
        elif re.match(r'[a-z][a-z0-9+.-]*:', target) and not target.startswith(SITE):
            continue  # somebody else's
        else:
            here = (where[len(SITE):] if target.startswith(SITE) else
                    os.path.normpath(Path(page.name).parent/where) if where else page.name)
            to = site.get(here) or by_address.get(here or 'index.html')
            ok = anchor in anchors(to) if to and anchor else bool(to) or (folder/here).is_file()
        if not ok: dead.append(target)
    return dead

def dead_references(page, cited=()):
    ("@fig-… and the like without its label on the page (Quarto's websites have no others), "
     "and @names that references.bib doesn't have.")
    known = labels(page) | set(cited)
    return sorted({'@' + m for t in page.texts()
                   for m in re.findall(r'(?<![\w.@/])@([A-Za-z][\w-]*)', without_maths(t)) if m not in known})

# ---------------------------------------------------------------- figures, outputs, sizes

def bare_figures(page):
    bare = [f"{c.get('id', '?')}: {o}" for c in page.figures()
            for o in ('fig-cap', 'fig-alt') if not option(c, o)]
    return bare + [f'{m}: no text' for t in page.texts()
                   for m in re.findall(r'!\[\s*\]\([^)]*\)|<img(?![^>]*alt="[^"]+)[^>]*>', t)]

def debris(page):
    "Errors, warnings and the remains of progress bars."
    found = [f"{c.get('id', '?')}: {o.get('ename')}" for c in page.cells
             for o in c.get('outputs', []) if o['output_type'] == 'error' or o.get('name') == 'stderr']
    return found + [f"{c.get('id', '?')}: {m[0]!r}" for c in page.cells if (
        m := re.search(r'\r|\x1b\[|%\|[█▏▎▍▌▋▊▉ ]*\||\dit/s\b|\ds/it\b|\w*Warning:', streams(c)))]

def not_run(page):
    ("Outputs that can't be those of the code above them. "
     "Whether they are is found out by running it: see tests/outputs.py.")
    found = []
    for c in page.cells:
        if c['cell_type'] != 'code' or option(c, 'eval') is False: continue
        code = re.sub(r'^\s*[%!].*$', 'pass', source(c), flags=re.M)
        last = (ast.parse(code).body or [None])[-1]
        result = any(o['output_type'] == 'execute_result' for o in c['outputs'])
        shows = isinstance(last, ast.Expr) and not code.rstrip().endswith(';')
        if shows and not result and isinstance(last.value, (ast.Tuple, ast.List, ast.Dict, ast.BinOp,
                                                            ast.Compare, ast.JoinedStr)):
            found.append(f"{c.get('id', '?')}: never run")
        if result and not shows and 'display(' not in code:
            found.append(f"{c.get('id', '?')}: a result that nothing in it gives")
        if 'plt.show()' in code and not outputs(c, 'image/'):
            found.append(f"{c.get('id', '?')}: a figure that is not there")
    return found

def too_large(page, size, allowed=TOO_LARGE):
    ("Pages beyond the limits, or beyond what the list of large ones allows them; "
     "and those that need no place on the list any more.")
    is_ = dict(words=page.words(),
               lines=max([code_lines(c) for c in page.cells if c['cell_type'] == 'code'], default=0),
               bytes=size)
    limits = dict(words=WORDS, lines=LINES, bytes=BYTES)
    return ([f'{is_[w]:,} {w}, allowed are {max(n, allowed.get((page.name, w), 0)):,}'
             for w,n in limits.items() if is_[w] > max(n, allowed.get((page.name, w), 0))]
            + [f'{is_[w]:,} {w} are no longer too large: take it off the list'
               for w,n in limits.items() if (page.name, w) in allowed and is_[w] <= n])

def without_place(syms, site):
    ("The API: what is exported and has no heading where nbdev sends its readers, "
     "or whose parameters are not below that.")
    by_address, missing = {p.address: p for p in site.values()}, []
    for module, names in syms.items():
        tree = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text())
        defined = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for full, (link, _) in names.items():
            name, (address, _, anchor) = full[len(module) + 1:], link.partition('#')
            if name.startswith('_') or name not in defined: continue                    # private, or a method
            page, node = by_address.get(address), defined[name]
            cells = page.cells if page else []
            texts = [source(c) for c in cells if c['cell_type'] == 'markdown']
            headed = any(re.search(rf'^#+ (?:\w+, )*{name}\b', t, re.M) for t in texts)
            if not headed or anchor not in anchors(page):
                missing.append(full)
                continue
            code = [source(c) for c in cells if c['cell_type'] == 'code']
            shown = [t for t in (*texts, *code) if re.search(rf'^(?:def|class) {name}\b', t, re.M)]
            wanted = [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else []
            if not any(all(re.search(rf'\b{a}\b', t) for a in wanted) for t in shown):
                missing.append(f'{full}: parameters')
    return missing

# ---------------------------------------------------------------- _quarto.yml

# what Quarto's schema has for the parts that it closes (and, for the open ones, what we use)
KEYS = {'': 'project lang bibliography nocite citation format website execute metadata-files',
        'project': 'type preview render output-dir resources',
        'format.html.grid': 'sidebar-width body-width margin-width gutter-width content-mode',
        'format.html': '''grid theme respect-user-color-scheme css toc toc-depth toc-expand code-tools \
code-fold code-overflow code-copy lightbox fig-format highlight-style syntax-highlighting
            include-after-body include-in-header link-external-newwindow''',
        'website': '''title description favicon site-url site-path repo-url repo-link-target \
repo-link-rel repo-subdir repo-branch issue-url repo-actions reader-mode google-analytics
            cookie-consent search navbar sidebar body-header body-footer margin-header margin-footer \
page-navigation back-to-top-navigation bread-crumbs page-footer image image-alt comments
            open-graph twitter-card other-links code-links drafts draft-mode announcement llms-txt''',
        'website.search': 'location type limit collapse-after copy-button keyboard-shortcut '
                          'show-item-context algolia',
        'website.navbar': 'title logo logo-alt logo-href background foreground search pinned collapse '
                          'collapse-below left right tools toggle-position tools-collapse',
        'website.sidebar': 'id title logo logo-alt logo-href search tools contents style type background '
                           'foreground border alignment collapse-level pinned header footer',
        'website.page-footer': 'left right center border background foreground',
        'citation': 'type title author container-title issued url doi publisher'}

def unknown_keys(quarto):
    found = []
    for path, names in KEYS.items():
        part = quarto
        for k in filter(None, path.split('.')): part = part.get(k, {}) if isinstance(part, dict) else {}
        if isinstance(part, dict):
            found += [f'{path}.{k}'.lstrip('.') for k in part if k not in names.split()]
    return found

def sidebar(contents): # the pages that it names, in order
    for item in contents:
        if isinstance(item, str): yield item
        elif 'href' in item: yield item['href']
        else: yield from sidebar(item['contents'])

def lost_pages(quarto, names):
    listed = list(sidebar(quarto['website']['sidebar']['contents']))
    return ([f'{n}: no such page' for n in dict.fromkeys(listed) if n not in names]
            + [f'{n}: twice in the sidebar' for n in dict.fromkeys(listed) if listed.count(n) > 1]
            + [f'{n}: not in the sidebar' for n in names if n not in listed])

def missing_files(quarto, folder):
    html = quarto['format']['html']
    return [f for f in (quarto.get('bibliography'), html.get('css')) if f and not (folder/f).is_file()]

def cited(folder): return re.findall(r'^@\w+\{([^,\s]+)', (folder/'references.bib').read_text(), re.M)

# ---------------------------------------------------------------- the book as it is

QUARTO = yaml.safe_load((ROOT/'_quarto.yml').read_text())
STORED = pages(ROOT/'nbs')
each = pytest.mark.parametrize('name', STORED)

FAKE = '''#!/usr/bin/env python3
"Stands in for Quarto: writes down how it was called, and makes the folder that a book would be in."
import os, sys
with open(os.environ['CALLS'], 'a') as f: print(os.getcwd(), *sys.argv[1:], file=f)
os.makedirs('_docs', exist_ok=True); open('_docs/index.html', 'w').close()
'''

def copy_of_the_tree(to, with_quarto):
    "With an environment that seems to be installed already, so that make doesn't."
    shutil.copytree(ROOT, to, symlinks=True,
                    ignore=shutil.ignore_patterns('.venv', '.git', 'runs', 'data', '_proc', '_docs',
                                                  '*.egg-info', '.ipynb_checkpoints', '__pycache__',
                                                  '.pytest_cache'))
    bin = to/'.venv'/'bin'; bin.mkdir(parents=True); (to/'.venv'/'.ready').touch()
    if with_quarto: (bin/'quarto').write_text(FAKE); (bin/'quarto').chmod(0o755)
    path = [str(Path(sys.executable).parent)] + [p for p in os.environ['PATH'].split(os.pathsep)
                                                 if with_quarto or not (Path(p)/'quarto').exists()]
    return dict(os.environ, PATH=os.pathsep.join(path), PYTHONPATH=str(to), CALLS=str(to.parent/'calls'),
                OMP_NUM_THREADS='1')

@pytest.fixture(scope='session')
def built(tmp_path_factory): # made once, whichever process of pytest needs it first
    "(the copy in which make docs ran, what Quarto was asked, what was printed)"
    if not shutil.which('make'): pytest.skip('no make')
    top = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: top = top.parent       # of all the processes
    to, said = top/'site'/'copy', top/'site'/'said'
    with FileLock(top/'site.lock'):
        if not said.exists():
            shutil.rmtree(to.parent, ignore_errors=True)
            to.parent.mkdir()
            env = copy_of_the_tree(to, True)
            os.utime(to/'README.md', (0, 0))                  # older than its notebook, as after a git clone
            out = subprocess.run(['make', 'docs'], cwd=to, env=env, capture_output=True, text=True)
            assert out.returncode == 0, out.stdout + out.stderr
            said.write_text(out.stdout + out.stderr)
    return to, (to.parent/'calls').read_text(), said.read_text()

@pytest.fixture(scope='session')
def processed(built): return pages(built[0]/'_proc')

def test_make_docs_builds_the_book(built):
    to, calls, _ = built
    # the book, and not README.md in Quarto's way
    assert calls.split('\n')[:-1] == [f"{to/'_proc'} render --no-cache"]
    assert (to/'_docs'/'index.html').exists()
    assert (to/'README.md').read_text() == (ROOT/'README.md').read_text()

def test_make_docs_says_how_to_get_quarto(tmp_path):
    if not shutil.which('make'): pytest.skip('no make')
    env = copy_of_the_tree(tmp_path/'copy', False)
    out = subprocess.run(['make', 'docs'], cwd=tmp_path/'copy', env=env, capture_output=True, text=True)
    said = [l for l in out.stdout.splitlines() if not l.startswith('make')]
    assert (out.returncode and len(said) == 1 and 'quarto.org/docs/get-started' in said[0]
            and 'make docs' in said[0]), out.stdout + out.stderr
    assert not (tmp_path/'copy'/'_proc').exists()

def test_processing_leaves_no_page_out(processed): assert set(processed) == set(STORED)
def test_every_page_has_a_title_and_says_what_it_is(processed):
    assert [n for n,p in processed.items() if not (p.head.get('title') and p.head.get('description'))] == []
def test_no_two_pages_have_one_address(processed):
    assert len({p.address for p in processed.values()}) == len(processed)

# where pages were that have moved: Quarto makes a page there that leads on
MOVED = {'feeding.html': 'fast/20_feeding.ipynb', 'small_maps.html': 'fast/24_small_maps.ipynb',
         'packing.html': 'fast/26_packing.ipynb'}

def aliases(page): return page.head.get('aliases', [])

def test_old_addresses_lead_to_the_pages_that_moved(processed):
    found = [(a, n) for n, p in processed.items() for a in aliases(p)]
    assert sorted(found) == sorted((f'/{a}', n) for a, n in MOVED.items())
    assert not set(MOVED) & {p.address for p in processed.values()}       # each leads on, and none is a page

@each
def test_links_lead_somewhere(processed, built, name):
    assert dead_links(processed[name], processed, built[0]/'_proc') == []
@each
def test_references_are_there(processed, built, name):
    assert dead_references(processed[name], cited(built[0]/'_proc')) == []
@each
def test_figures_have_caption_and_alt_text(processed, name): assert bare_figures(processed[name]) == []
@each
def test_outputs_are_clean(name): assert debris(STORED[name]) == []
@each
def test_outputs_could_be_those_of_the_code(name): assert not_run(STORED[name]) == []
@each
def test_sizes(name): assert too_large(STORED[name], (ROOT/'nbs'/name).stat().st_size) == []

def test_every_public_name_has_its_place_and_its_parameters(processed):
    from deepcluster_nb._modidx import d
    assert without_place(d['syms'], processed) == []

def test_sidebar_and_pages_are_the_same(): assert lost_pages(QUARTO, list(STORED)) == []
def test_only_keys_that_quarto_knows(): assert unknown_keys(QUARTO) == []
def test_files_that_the_site_uses_are_there(built): assert missing_files(QUARTO, built[0]/'_proc') == []
def test_the_paper_at_the_foot_of_every_page_is_in_the_bibliography():
    assert re.findall(r'@(\w+)', QUARTO['nocite']) == cited(ROOT/'nbs')

def script(name): # one of images/
    import importlib.util
    spec = importlib.util.spec_from_file_location(name, ROOT/'images'/f'{name}.py')
    spec.loader.exec_module(found := importlib.util.module_from_spec(spec))
    return found

def test_home_page_pictures_are_drawn_from_its_table():
    for name, svg in script('draw').pictures().items():
        assert (ROOT/'images'/name).read_text() == svg, 'run python images/draw.py'
        # the site and README.md show one file
        assert (ROOT/'nbs'/'images'/name).resolve() == ROOT/'images'/name

def test_a_picture_grows_through_the_chapters(tmp_path):
    story = script('story')
    story.main(tmp_path, story.pieces(48), replace(story.CONFIG, k=3, pca=8, epochs=1, passes=1))
    drawn, before = sorted(tmp_path.iterdir()), 0
    assert [p.name for p in drawn] == sorted(p.name for p in (ROOT/'images').glob('story_*.png'))
    for p in drawn:
        stored = Image.open(ROOT/'images'/p.name)
        # a row more than in the chapter before
        assert Image.open(p).size == stored.size and stored.height > before
        before = stored.height
        (page,) = [STORED[n] for n in STORED if n.startswith(p.stem[-2:] + '_')]
        assert [t for t in targets(page) if 'story_' in t] == [f'images/{p.name}']

def test_readme_shows_what_is_there(): # on GitHub, where paths start at the root
    readme = Page('README.md', [dict(cell_type='markdown', source=(ROOT/'README.md').read_text())])
    assert [t for t in targets(readme) if not re.match(r'[a-z]+:|#', t) and not (ROOT/t).exists()] == []

WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))
@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_are_pinned_and_may_do_little(path):
    flow = yaml.safe_load(path.read_text())
    assert flow['permissions'] == {'contents': 'read'}
    for name, job in flow['jobs'].items():
        may = {'contents'} if name == 'colab' else {'pages', 'id-token'}      # colab pushes a branch
        assert job['timeout-minutes'] and not job['runs-on'].endswith('latest')
        assert set(job.get('permissions', {})) <= may
        for step in job['steps']:
            assert 'run' in step or re.fullmatch(r'[\w./-]+@[0-9a-f]{40}', step['uses']), step

@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_call_what_there_is(path):
    text, presets = path.read_text(), ROOT/'nbs'/'experiments'/'presets'
    for target in re.findall(r'\bmake (\w+)', text):
        assert re.search(rf'^{target}:', (ROOT/'Makefile').read_text(), re.M), target
    for script in re.findall(r'\bpython ([\w./]+\.py)', text): assert (ROOT/script).exists(), script
    for name, preset in re.findall(r'deepcluster-nb (?:run )?(\w+)(?: --preset (\w+))?', text):
        assert name == 'estimate' or (presets.parent/f'{name}.ipynb').exists(), name
        assert not preset or (presets/f'{preset}.yaml').exists(), preset

# ---------------------------------------------------------------- each check on something broken

def md(text): return dict(cell_type='markdown', id='m', source=text)
def code(text, *outputs): return dict(cell_type='code', id='c', source=text, outputs=list(outputs))
def result(**data):
    return dict(output_type='execute_result', data={k.replace('_', '/'): v for k,v in data.items()})
def printed(text, name='stdout'): return dict(output_type='stream', name=name, text=text)
PICTURE = dict(output_type='display_data', data={'image/png': ''})
FIGURE = '#| fig-cap: "A bird"\n#| fig-alt: "A bird on a wire"\nplt.show()'
SECOND = Page('01_second.ipynb', [md('# Two'), md('## What `x` is\n## Twice\n## Twice'),
                                  code('show_doc(f)', result(text_markdown='### Sums\n\n> Sums (x)'))])

@pytest.mark.parametrize('text, dead', [
    ('[a](01_second.ipynb)', 0),
    ('[a](03_third.ipynb)', 1),
    ('[a](second.html)', 0),
    ('[a](third.html)', 1),
    ('[a](01_second.ipynb#sums)', 0),
    ('[a](01_second.ipynb#sum)', 1),
    ('[a](01_second.ipynb#what-x-is)', 0),
    ('[a](01_second.ipynb#twice-1)', 0),
    ('[a](01_second.ipynb#twice-2)', 1),
    ('## Here\n[a](#here)', 0),
    ('[a](#there)', 1),
    ('![a](images/a.svg)', 0),
    ('![a](images/b.svg)', 1),
    ('<img src="images/b.svg" alt="b">', 1),
    ('<a id="spot"></a> [a](#spot)', 0),
    (f'[a]({SITE}second.html#sums)', 0),
    (f'[a]({SITE}second.html#sum)', 1),
    (f'[a]({SITE}third.html)', 1),
    (f'[a]({SITE})', 1),
    (f'[a]({REPO}LICENSE)', 0),
    (f'[a]({REPO}LICENCE)', 1),
    (f'[a]({REPO}LICENSE#L3)', 0),
    (f'[a]({REPO}LICENSE#L30000)', 1),
    ('[a](https://example.org/x)', 0),
    ('`[a](nowhere)`', 0),
    ('```\n[a](nowhere)\n```', 0),
    ('[a](../LICENSE)', 1),
    ('[a](<01_second.ipynb> "with a title")', 0),
])
def test_dead_links_are_found(tmp_path, text, dead):
    (tmp_path/'images').mkdir(); (tmp_path/'images'/'a.svg').touch()
    page = Page('00_first.ipynb', [md('# One'), md(text)])
    assert len(dead_links(page, {p.name: p for p in (page, SECOND)}, tmp_path)) == dead

def test_links_from_a_folder(tmp_path):
    page = Page('experiments/third.ipynb',
                [md('# Three'), md('[up](../01_second.ipynb) [beside](01_second.ipynb)')])
    assert dead_links(page, {p.name: p for p in (page, SECOND)}, tmp_path) == ['01_second.ipynb']

@pytest.mark.parametrize('heading, is_', [  # the examples of Pandoc's manual
    ('Heading identifiers in HTML', 'heading-identifiers-in-html'),
    ("Maître d'hôtel", 'maître-dhôtel'),
    ('*Dogs*?--in *my* house?', 'dogs--in-my-house'),
    ('[HTML], [S5], or [RTF]?', 'html-s5-or-rtf'),
    ('3. Applications', 'applications'),
    ('33', 'section')])
def test_identifiers_are_pandocs(heading, is_): assert identifier(heading) == is_

@pytest.mark.parametrize('cells, bad', [
    ([md('See @fig-bird.'), code('#| label: fig-bird\n' + FIGURE, PICTURE)], []),
    ([md('See @fig-bird.'), code(FIGURE, PICTURE)], ['@fig-bird']),
    ([md('$$x$$ {#eq-one}\nSee @eq-one and @eq-two.')], ['@eq-two']),
    ([md('[@caron2018deep] and [@nobody2020]')], ['@nobody2020']),
    ([md('`@fig-x`, me@example.org, $@a$')], [])])
def test_dead_references_are_found(cells, bad):
    assert dead_references(Page('a.ipynb', cells), ['caron2018deep']) == bad

@pytest.mark.parametrize('check, cell, n', [
    (bare_figures, code(FIGURE, PICTURE), 0),
    (bare_figures, code('plt.show()', PICTURE), 2),
    (bare_figures, code('#| fig-cap: "A bird"\n#| fig-alt: ""\nplt.show()', PICTURE), 1),
    (bare_figures, md('![](images/a.svg)'), 1),
    (bare_figures, md('![A bird](images/a.svg)'), 0),
    (bare_figures, md('<img src="a.svg">'), 1),
    (debris, code('x', result(text_plain='1')), 0),
    (debris, code('f()', dict(output_type='error', ename='ValueError')), 1),
    (debris, code('f()', printed('50%|█████     | 5/10 [00:01<00:01,  4.2it/s]')), 1),
    (debris, code('f()', printed('step 1\rstep 2')), 1),
    (debris, code('f()', printed('x.py:3: UserWarning: no', 'stderr')), 2),
    (debris, code('f()', printed('epoch 1, loss 2.3')), 0),
    (not_run, code('x, y', result(text_plain='(1, 2)')), 0),
    (not_run, code('x, y'), 1),
    (not_run, code('x = 1', result(text_plain='1')), 1),
    (not_run, code('x;', result(text_plain='1')), 1),
    (not_run, code('ax.plot(x)\nplt.show()'), 1),
    (not_run, code('%time x\nf(x)'), 0),
    (not_run, code('#| eval: false\nx, y'), 0),
    (not_run, code('# nothing'), 0),
    (lambda p: too_large(p, 1000), md('word ' * WORDS), 0),
    (lambda p: too_large(p, 1000), md('word ' * (WORDS + 1)), 1),
    (lambda p: too_large(p, 1000), code('#| hide\n' + 'x = 1\n\n' * LINES), 0),
    (lambda p: too_large(p, 1000), code('x = 1\n' * (LINES + 1)), 1),
    (lambda p: too_large(p, 1000), code('f(1,\n  2)\n' * LINES), 0),
    (lambda p: too_large(p, 1000), code('if x:\n    f(1,\n      2)\n' * LINES), 0),
    (lambda p: too_large(p, 1000), code('%time x\n# y\n' * (LINES//2) + '!ls'), 1),
    (lambda p: too_large(p, BYTES + 1), md('word'), 1),
    (lambda p: too_large(p, 1000, {('page.ipynb', 'lines'): LINES + 5}), code('x = 1\n' * (LINES + 5)), 0),
    (lambda p: too_large(p, 1000, {('page.ipynb', 'lines'): LINES + 5}), code('x = 1\n' * (LINES + 6)), 1),
    (lambda p: too_large(p, 1000, {('page.ipynb', 'lines'): LINES + 5}), code('x = 1'), 1),
])
def test_bad_cells_are_found(check, cell, n): assert len(check(Page('page.ipynb', [cell]))) == n

def in_sidebar(*contents): return dict(website=dict(sidebar=dict(contents=list(contents))))
@pytest.mark.parametrize('quarto, bad', [
    (in_sidebar('a.ipynb', dict(section='S', contents=['b.ipynb'])), []),
    (in_sidebar('a.ipynb'), ['b.ipynb: not in the sidebar']),
    (in_sidebar('a.ipynb', dict(text='B', href='b.ipynb'), dict(section='S', contents=['c.ipynb'])),
     ['c.ipynb: no such page']),
    (in_sidebar('a.ipynb', 'b.ipynb', dict(section='S', contents=['b.ipynb'])),
     ['b.ipynb: twice in the sidebar'])])
def test_lost_pages_are_found(quarto, bad): assert lost_pages(quarto, ['a.ipynb', 'b.ipynb']) == bad

@pytest.mark.parametrize('quarto, bad', [
    (dict(website=dict(search=dict(location='navbar'))), []),
    (dict(website=dict(serach=True)), ['website.serach']),
    (dict(website=dict(sidebar=dict(content=[]))), ['website.sidebar.content']),
    (dict(websites={}), ['websites']),
    (dict(website=dict(search=True)), [])])
def test_unknown_keys_are_found(quarto, bad): assert unknown_keys(quarto) == bad

SHOWN = '### fetch_ahead {#fetch_ahead}'
@pytest.mark.parametrize('cells, bad', [
    ([], ['']),
    ([md('### x')], ['']),
    ([md(SHOWN + '\n\n```python\ndef fetch_ahead(\n    batches, # indices\n)\n```')], [': parameters']),
    ([md(SHOWN), code('def fetch_ahead(ARGUMENTS): pass')], []),
    ([md('### load, fetch_ahead {#load}\n\n[]{#fetch_ahead}'), code('def fetch_ahead(ARGUMENTS): pass')],
     [])])
def test_names_without_a_place_are_found(cells, bad):
    from inspect import signature
    from deepcluster_nb.fast.feeding import fetch_ahead
    parameters = ', '.join(signature(fetch_ahead).parameters)
    for c in cells: c['source'] = c['source'].replace('ARGUMENTS', parameters)
    syms = {'deepcluster_nb.fast.feeding': {'deepcluster_nb.fast.feeding.fetch_ahead': (
        'fast/feeding.html#fetch_ahead', 'deepcluster_nb/fast/feeding.py')}}
    name = 'fast/20_feeding.ipynb'
    assert without_place(syms, {name: Page(name, cells)}) == [
        f'deepcluster_nb.fast.feeding.fetch_ahead{b}' for b in bad]

def picture(shade):
    import base64, io
    from PIL import Image
    Image.new('L', (40, 30), shade).save(b := io.BytesIO(), 'png')
    return dict(output_type='display_data', data={'image/png': base64.b64encode(b.getvalue()).decode()})

@pytest.mark.parametrize('stored, fresh, n', [
    (code('x', result(text_plain='loss 2.31 after 3')), code('x', result(text_plain='loss 2.33 after 3')), 0),
    (code('x', result(text_plain='loss 2.31')), code('x', result(text_plain='loss 3.31')), 1),
    (code('x', result(text_plain='loss 2.31')), code('x', result(text_plain='cost 2.31')), 1),
    (code('x', result(text_plain='1')), code('x'), 1),
    (code('x', result(text_plain='[1, 2]')), code('x', result(text_plain='[1, 2, 3]')), 1),
    (code('time.time() - t', result(text_plain='2.31')), code('time.time() - t', result(text_plain='9.1')),
     0),
    (code('time.time() - t', result(text_plain='2.31')), code('time.time() - t', result(text_plain='None')),
     1),
    (code('plot(x)', picture(200)), code('plot(x)', picture(203)), 0),
    (code('plot(x)', picture(200)), code('plot(x)', picture(90)), 1),
    (code('plot(x)', picture(200)), code('plot(x)'), 1),
    (code('f()', printed('a\n'), printed('b\n')), code('f()', printed('a\nb\n')), 0),
    (code('f()', printed('a\n')), code('f()', printed('a\nb\n')), 1),
    (code('f()'), code('f()', dict(output_type='error', ename='E', evalue='')), 1),
])
def test_stale_outputs_are_found(stored, fresh, n): assert len(differences([stored], [fresh])) == n

def test_measured_pages_show_the_same_kinds_of_outputs():
    stored = code('fit()', result(text_plain='[3, 4]'))
    assert [len(differences([stored], [code('fit()', *f)], kinds_only=True))
            for f in ([result(text_plain='[90, 1]')], [],
                      [dict(output_type='error', ename='E', evalue='')])] == [0, 1, 1]
    for name in MEASURED: assert (ROOT/'nbs'/name).exists(), name

# ---------------------------------------------------------------- by hand

def minutes(page): # at 200 words and 20 lines of code a minute
    return page.words() / 200 + sum(code_lines(c) for c in page.cells if c['cell_type'] == 'code'
                                    and not re.search(r'#\|\s*(hide|export|default_exp)\b(?!s)',
                                                      source(c))) / 20

if __name__ == '__main__':
    order = [n for n in sidebar(QUARTO['website']['sidebar']['contents']) if n in STORED]
    print('page'.ljust(34), 'words', 'longest cell', 'figures', 'minutes', 'kB', sep='  ')
    for n in order:
        p = STORED[n]
        longest = max([code_lines(c) for c in p.cells if c['cell_type'] == 'code'], default=0)
        print(n.ljust(34), f'{p.words():5,}', f'{longest:12}', f'{len(p.figures()):7}', f'{minutes(p):7.0f}',
              f"{(ROOT/'nbs'/n).stat().st_size // 1000:4}", sep='  ')
    print(f'\ntogether {sum(minutes(STORED[n]) for n in order):.0f} minutes, '
          'at 200 words and 20 lines of code a minute\n\nfigures: page, cell, caption')
    for n in order:
        for c in STORED[n].figures(): print(n, c['id'], option(c, 'fig-cap') or '-', sep='  ')
    print('00 to 10    images/story.py  story_00.png to story_10.png')
