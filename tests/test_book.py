"""What Quarto, a browser or a newcomer would stumble over, found without them: options that stop the build,
boxes that don't close, links inside code, pale text, chapters out of order, notebooks without the kit."""
import os, re
from pathlib import Path
import numpy as np
import pytest, yaml
from test_site import built, processed  # noqa: F401 (fixtures)
from test_site import QUARTO, ROOT, SETTINGS, SITE, STORED
from test_site import Page, code, identifier, md, option, outputs, pages, script, sidebar, source

each = pytest.mark.parametrize("name", STORED)

# ---------------------------------------------------------------- 1: it builds

# options of a cell that this book uses, and what Quarto's schema takes for them
OPTIONS = {'code-fold': (True, False, 'show'), 'code-summary': str, 'echo': (True, False, 'fenced'),
           'output': (True, False, 'asis'), 'eval': (True, False), 'include': (True, False),
           'label': str, 'fig-cap': str, 'fig-alt': str}

def bad_options(cell):
    "What is wrong with the option lines of a processed code cell."
    lines = [l[2:].strip() for l in source(cell).splitlines() if l.startswith('#|')]
    try: pairs = [p for l in lines for p in yaml.safe_load(l).items()]
    except (yaml.YAMLError, AttributeError): return [f'no YAML: {lines}']
    names = [k for k, _ in pairs]
    found = [f'{k}: twice' for k in dict.fromkeys(names) if names.count(k) > 1]
    for k, v in pairs:
        allowed = OPTIONS.get(k, ())
        ok = isinstance(v, str) if allowed is str else any(type(v) is type(a) and v == a for a in allowed)
        if not ok: found.append(f'{k}: {v!r}')
    if {'fig-cap', 'fig-alt'} & {*names} and not outputs(cell, 'image/'):
        found.append('a caption without a figure')
    return found

FENCE = re.compile(r'^( {0,3})(`{3,}|~{3,})(.*)$')

def listings(text):
    "(language, code) of the fenced listings in a Markdown text, and whether the last one is closed."
    found, mark = [], None
    for line in text.splitlines():
        m = FENCE.match(line)
        if mark and m and m[2].startswith(mark) and not m[3].strip(): mark = None
        elif mark: found[-1][1].append(line)
        elif m: mark, _ = m[2], found.append((m[3].strip(), []))
    return [(language, '\n'.join(lines)) for language, lines in found], mark is None

def prose(text):
    "Markdown without its listings."
    kept, mark = [], None
    for line in text.splitlines():
        m = FENCE.match(line)
        if mark: mark = None if m and m[2].startswith(mark) and not m[3].strip() else mark
        elif m: mark = m[2]
        else: kept.append(line)
    return '\n'.join(kept)

def markdowns(page): # what Quarto reads as Markdown, in order
    for c in page.cells:
        if c['cell_type'] == 'markdown': yield source(c)
        yield from (t for _, t in outputs(c, 'text/markdown'))

def unbalanced(page):
    "Fences that don't close within their cell, and divs that don't close on their page."
    found = [f'a fence stays open: {t[:60]!r}' for t in markdowns(page) if not listings(t)[1]]
    depth = 0
    for t in markdowns(page):
        for line in prose(t).splitlines():
            if re.match(r':{3,}\s*$', line): depth -= 1
            elif re.match(r':{3,}\s*\S', line): depth += 1
            if depth < 0: return [*found, f'a div closes that was not open: {t[:60]!r}']
    return found + ([f'{depth} divs stay open'] if depth else [])

@each
def test_options_are_what_quarto_takes(processed, name):
    code_cells = [c for c in processed[name].cells if c['cell_type'] == 'code']
    assert {c['id']: bad for c in code_cells if (bad := bad_options(c))} == {}
@each
def test_divs_and_fences_close(processed, name): assert unbalanced(processed[name]) == []

PICTURE = dict(output_type='display_data', data={'image/png': ''})
@pytest.mark.parametrize('cell, bad', [
    # what stopped the build
    (code('#| code-fold: show\n#| code-summary: "Source"\n#| code-fold: true\nx'), ['code-fold: twice']),
    (code('#| code-fold: true\n#| echo: false\nx'), []),
    (code('#| code-fold: yess\nx'), ["code-fold: 'yess'"]),
    (code('#| code-fold: 1\nx'), ['code-fold: 1']),
    (code('#| fig-cap: "A bird"\nx', PICTURE), []),
    (code('#| fig-cap: "A bird"\nx'), ['a caption without a figure']),
    (code('#| fig-cap: A bird: on a wire\nx', PICTURE), ["no YAML: ['fig-cap: A bird: on a wire']"]),
    (code('#| fig-cap: 3\nx', PICTURE), ['fig-cap: 3']),
    (code('#| fig-capt: "A bird"\nx'), ["fig-capt: 'A bird'"])])
def test_bad_options_are_found(cell, bad): assert bad_options(cell) == bad

@pytest.mark.parametrize('texts, n', [
    (['::: {.callout-tip}', 'x', ':::'], 0), (['::: a'], 1), ([':::'], 1), (['::: a', '```\n', ':::'], 1),
    (['```python\nx\n```'], 0), (['```python\nx'], 1), (['````\n```\n````'], 0), (['```\n:::\n```'], 0),
    (['::: a\n\n:::: b\n::::\n:::'], 0)])
def test_what_stays_open_is_found(texts, n):
    assert len(unbalanced(Page('a.ipynb', [md(t) for t in texts]))) == n

def test_the_book_is_built_for_every_pull_request():
    flow = yaml.safe_load((ROOT/'.github'/'workflows'/'docs.yml').read_text())
    on, jobs = flow[True], flow['jobs']                       # YAML reads "on" as true
    assert 'pull_request' in on and on['push'] == dict(branches=['main'])
    assert 'if' not in jobs['build'] and any('make docs' in s.get('run', '') for s in jobs['build']['steps'])
    for name in ('colab', 'deploy'): assert jobs[name]['if'] == "github.ref == 'refs/heads/main'"

# ---------------------------------------------------------------- 2: solutions

def open_answers(page):
    "Cells that follow a question and are in no box."
    from deepcluster_nb.book import BOX, QUESTION
    found, state = [], 'elsewhere'                       # elsewhere, asked, inside, answered
    for c in page.cells:
        text = source(c)
        is_text = c['cell_type'] == 'markdown'
        asked = [l for l in prose(text).splitlines() if is_text and QUESTION.match(l)]
        if asked:
            if len(asked) > 1 or not QUESTION.match(text): found.append(text[:60])
            state = 'asked'
        elif text == BOX: state = 'inside'
        elif text == ':::' and state == 'inside': state = 'answered'
        elif c['cell_type'] == 'markdown' and text.startswith('## '): state = 'elsewhere'
        elif state in ('asked', 'answered'): found.append(text[:60])
    return found

def test_solutions_are_closed(processed):
    from deepcluster_nb.book import BOX, QUESTION
    asked = boxes = 0
    for name, page in processed.items():
        assert open_answers(page) == [], name
        asked += sum(bool(QUESTION.match(l)) for c in page.cells if c['cell_type'] == 'markdown'
                     for l in prose(source(c)).splitlines())
        boxes += sum(source(c) == BOX for c in page.cells)
    assert boxes == asked >= 55

@pytest.mark.parametrize('cells, n', [
    ([md('**Predict.** x?'), md('BOX'), code('1'), md(':::'), md('## Remember'), code('2')], 0),
    ([md('**Predict.** x?'), code('1')], 1),
    ([md('**Predict.** x?'), md('BOX'), code('1'), md(':::'), md('It is 1.')], 1),
    ([md('Text.\n\n**Break.** x?')], 1)])
def test_open_answers_are_found(cells, n):
    from deepcluster_nb.book import BOX
    for c in cells: c['source'] = c['source'].replace('BOX', BOX)
    assert len(open_answers(Page('a.ipynb', cells))) == n

# ---------------------------------------------------------------- 3: code is code

def addresses_in_code(page):
    "Listings that hold an address of the site: links that nbdev has made inside code."
    shown = [text for t in markdowns(page) for _, text in listings(t)[0]]
    shown += [source(c) for c in page.cells if c['cell_type'] == 'code']
    return [text[:80] for text in shown if SITE in text]

@each
def test_no_links_inside_code(processed, name): assert addresses_in_code(processed[name]) == []

def test_links_inside_code_are_found():
    cells = [md(f'```python\nx  # [`f`]({SITE}a.html#f)\n```'), md(f'[f]({SITE}a.html)')]
    assert len(addresses_in_code(Page('a.ipynb', cells))) == 1

@each
def test_links_do_not_nest(processed, name):
    lines = '\n'.join(prose(t) for t in markdowns(processed[name])).splitlines()
    assert [l for l in lines if re.search(r'\[\[`[^\]]*\]\(', l)] == []

def repeated_ids(page):
    "Anchors that a page has twice: those of headings, as pandoc makes them, and those that are given."
    found, made = [], {}
    for t in markdowns(page):
        for line in prose(t).splitlines():
            given = re.findall(r'\{#([\w.-]+)', line)
            heading = re.match(r'#{1,6}\s+(.+)', line)
            if heading and not re.search(r'\{#[\w.-]+\}\s*$', line):
                name = identifier(re.sub(r'\s*\{[^}]*\}\s*$', '', heading[1]))
                made[name] = made.get(name, 0) + 1
                given.append(name if made[name] == 1 else f'{name}-{made[name] - 1}')
            found += given
    return sorted({i for i in found if found.count(i) > 1})

@each
def test_anchors_are_unique(processed, name): assert repeated_ids(processed[name]) == []

def test_repeated_anchors_are_found():
    cells = [md('## Digits'), md('### digits {#digits}'), md('## Two\n## Two')]
    assert repeated_ids(Page('a.ipynb', cells)) == ['digits']

@each
def test_what_may_be_skipped_is_a_class_of_its_section(processed, name):
    marks = sum(t.splitlines().count('<!-- skip -->') for t in markdowns(STORED[name]))
    texts = [prose(t) for t in markdowns(processed[name])]
    assert sum(len(re.findall(r'^## .* \{\.optional\}$', t, re.M)) for t in texts) == marks
    assert not any('<!-- skip -->' in t.splitlines() for t in texts)

# ---------------------------------------------------------------- 4: code fits

CSS = (ROOT/'nbs'/'styles.css').read_text()

def test_code_of_110_columns_fits_into_the_page_at_1400_pixels():
    grid = {k: int(v.removesuffix('px')) for k, v in QUARTO['format']['html']['grid'].items()}
    rem, gutter = 17, 1.5*17                          # Quarto's text, and the space beside each column
    size = float(re.search(r'div\.sourceCode code, [^{]*\{ font-size: ([.\d]+)rem', CSS)[1])
    room = 1400 - 15 - grid['sidebar-width'] - grid['margin-width'] - 4*gutter     # 15: the scroll bar
    letter, padding = .602*size*rem, .4*size*rem      # of Menlo, a wide one; of Quarto's blocks of code
    assert .75 <= size <= .8 and 110*letter + 2*padding <= min(room, grid['body-width'] - 2*gutter)

def test_code_goes_on_indented_and_scrolls_on_a_phone():
    assert 'pre > code.sourceCode > span { padding-left: 4ch; text-indent: -4ch; }' in CSS
    phone = re.search(r'@media \(max-width: 767px\) \{(.*?)\n\}', CSS, re.S)[1]
    assert 'code.sourceCode { white-space: pre; }' in phone
    assert re.search(r'div\.sourceCode, [^{}]*\{ overflow-x: auto; \}', phone)

# ---------------------------------------------------------------- 5: contrast

def luminance(color):
    "Relative luminance, as the W3C's guidelines define it."
    parts = [int(color[i:i + 2], 16)/255 for i in (1, 3, 5)]
    linear = [v/12.92 if v <= .03928 else ((v + .055)/1.055)**2.4 for v in parts]
    return sum(weight*v for weight, v in zip((.2126, .7152, .0722), linear))

def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + .05)/(low + .05)

def colors(css):
    "The custom properties of the light page and of the dark one."
    parts = [re.search(rf'^{start} \{{(.*?)^\}}', css, re.S | re.M)[1]
             for start in ('body', r'body\.quarto-dark')]
    return [dict(re.findall(r'--([a-z]+): (#[0-9a-f]{6})', part)) for part in parts]

def pairs(css):
    "(text, ground) as the two parts of the style sheet say: rules on the page, rules on a block of code."
    for ground in ('page', 'block'):
        part = re.search(rf'/\* on --{ground}\b.*?\*/(.*?)/\*', css, re.S)[1]
        yield from ((text, ground) for text in re.findall(r'(?<![-\w])color: var\(--(\w+)\)', part))

def pale(css):
    return [(m[t], m[g]) for m in colors(css) for t, g in pairs(css) if contrast(m[t], m[g]) < 4.5]

def test_contrast_is_computed_right():
    assert round(contrast('#000000', '#ffffff'), 3) == 21 and round(contrast('#777777', '#ffffff'), 2) == 4.48

def test_text_and_code_stand_out_in_light_and_dark():
    assert len(set(pairs(CSS))) >= 12 and pale(CSS) == []
    assert pale(CSS.replace('--comment: #57606a', '--comment: #8b949e'))     # what a pale comment would give
    used = {t for t, _ in pairs(CSS)} | {'page', 'block'}
    assert all(set(mode) == used for mode in colors(CSS))         # each is used, and none is missing
    assert not re.search(r'(?<![-\w])color: #', CSS)              # no color of a text escapes this test
    bootstrap = re.findall(r'--bs-link-color-rgb: (\d+), (\d+), (\d+)', CSS)
    as_hex = ['#' + ''.join(f'{int(v):02x}' for v in rgb) for rgb in bootstrap]
    assert as_hex == [mode['link'] for mode in colors(CSS)]
    bar = QUARTO['website']['navbar']
    assert contrast(bar['foreground'], bar['background']) >= 4.5

def specificity(selector):
    "(ids, classes, elements) of a CSS selector; :is and :not count as their most specific argument."
    total = [0, 0, 0]
    inner = re.findall(r':(?:is|not|has)\(([^()]*(?:\([^()]*\))?[^()]*)\)', selector)
    for arguments in inner:
        most = max(specificity(a) for a in arguments.split(','))
        total = [t + m for t, m in zip(total, most)]
    selector = re.sub(r':(?:is|not|has)\([^()]*(?:\([^()]*\))?[^()]*\)', '', selector)
    found = [r'#[\w-]+', r'\.[\w-]+|\[[^\]]*\]|(?<!:):(?!:)[\w-]+', r'(?:^|[\s>+~])[a-z][\w]*']
    return tuple(t + len(re.findall(f, selector)) for t, f in zip(total, found))

# rules of Quarto 1.9 and of its highlighting that ours have to outweigh: (theirs, ours, what both set)
OUTWEIGHED = [
    ('p code:not(.sourceCode)', 'main :is(p, li', 'background-color'),
    ('code span.co', 'code.sourceCode span:is(.co', 'color'),
    ('pre > code.sourceCode > span', 'pre > code.sourceCode > span', 'color'),
    ('div.sourceCode', 'div.sourceCode', 'background-color'),
    ('.sidebar nav[role="doc-toc"] ul > li > a.active', 'ul > li > a.active', 'color'),
    ('nav.sidebar.sidebar-navigation:not(.rollup)', 'nav.sidebar.sidebar-navigation', 'background-color'),
    ('div.sidebar-item-container .active', '.sidebar div.sidebar-item-container a.active', 'color')]

@pytest.mark.parametrize('theirs, ours, what', OUTWEIGHED)
def test_our_colors_outweigh_the_theme_s(theirs, ours, what):
    rules = re.findall(r'([^{}]+)\{([^{}]*)\}', re.sub(r'/\*.*?\*/', '', CSS, flags=re.S))
    selectors = [s.strip() for heads, body in rules if re.search(rf'(?<![-\w]){what}:', body)
                 for s in re.split(r',(?![^(]*\))', heads)]
    assert any(ours in s and specificity(s) >= specificity(theirs) for s in selectors)

@pytest.mark.parametrize('selector, is_', [
    ('p code:not(.sourceCode)', (0, 1, 2)), ('body main.content a:not(.btn)', (0, 2, 3)),
    ('#a .b > c', (1, 1, 1)),
    ('body main :is(p, h1) code:not(.x)', (0, 1, 4)), ('nav[role="doc-toc"] ul a.active', (0, 2, 3))])
def test_specificity_is_counted_right(selector, is_): assert specificity(selector) == is_

def svg_texts(svg):
    "(text, its color, the color below it) of a drawing made of rectangles and words."
    num = lambda tag, k: float(re.search(rf'\b{k}="([-.\d]+)"', tag)[1])
    fill = lambda tag: re.search('fill="(#[0-9a-f]{6})"', tag)[1]
    rects = [(*(num(t, k) for k in ('x', 'y', 'width', 'height')), fill(t))
             for t in re.findall('<rect [^>]*>', svg)]
    for tag, words in re.findall('(<text [^>]*>)([^<]*)', svg):
        x, y = num(tag, 'x'), num(tag, 'y')
        below = [ground for rx, ry, w, h, ground in rects if rx <= x <= rx + w and ry <= y <= ry + h]
        yield words, fill(tag), below[-1]

@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'images').glob('*.svg')), ids=lambda p: p.stem)
def test_drawings_can_be_read(path):
    svg = path.read_text()
    texts = list(svg_texts(svg))
    assert len(texts) >= 3 and [t for t in texts if contrast(*t[1:]) < 4.5] == []
    width = float(re.search(r'viewBox="0 0 ([.\d]+)', svg)[1])
    smallest = min(map(float, re.findall(r'<text [^>]*font-size="([.\d]+)"', svg)))
    assert smallest * 362/width >= 9                          # pixels on a phone of 390

def test_no_mermaid(processed):
    assert [n for n, p in processed.items() for t in markdowns(p) if '{mermaid}' in t] == []

def test_diagrams_are_what_the_script_draws():
    shown = '\n'.join(t for p in STORED.values() for t in markdowns(p))
    for name, svg in script('diagrams').pictures().items():
        assert (ROOT/'nbs'/'images'/name).read_text() == svg, 'run python images/diagrams.py'
        assert f'images/{name}' in shown, f'{name}: on no page'

# ---------------------------------------------------------------- 6: each definition once

def definitions(page): # names in the headings of what is exported, and whether a signature stands below
    for t in markdowns(page):
        if not re.match(r'(---\s+)?\[source\]\(', t): continue     # nbdev's own begin with a rule
        for h in re.findall(r'^### ([^{\n]+?)(?: \{#\S+\})?$', prose(t), re.M):
            yield from ((n, '```python' in t) for n in h.split(', '))

def twice_defined(page):
    "Definitions with two headings, or with an open source below their signature."
    found = list(definitions(page))
    names = [n for n, _ in found]
    open_sources = [c for c in page.cells if c['cell_type'] == 'code' and option(c, 'code-fold') is not True]
    shown = {n for c in open_sources for n in re.findall(r'^(?:def|class) (\w+)', source(c), re.M)}
    twice = [n for n in dict.fromkeys(names) if names.count(n) > 1]
    return twice + [n for n, signed in found if signed and n in shown]

def test_each_definition_stands_once(processed):
    assert {name: t for name, page in processed.items() if (t := twice_defined(page))} == {}
    assert sum(len(list(definitions(p))) for p in processed.values()) > 300

LINKED = '[source](https://x){style="float:right"}\n\n### f'
@pytest.mark.parametrize('cells, n', [
    ([md(LINKED), code('def f(x): return x')], 0),
    ([md(LINKED + '\n\n```python\ndef f(x)\n```'), code('def f(x): return x')], 1),
    ([md(LINKED + '\n\n```python\ndef f(x)\n```'), code('#| code-fold: true\ndef f(x): return x')], 0),
    ([md(LINKED), md(LINKED)], 1)])
def test_definitions_twice_are_found(cells, n): assert len(twice_defined(Page('a.ipynb', cells))) == n

def test_definitions_say_what_they_do(processed):
    for name, page in processed.items():
        for t in markdowns(page):
            assert 'Call self as a function' not in t and ':NoneType' not in t, (name, t[:200])

def test_every_public_definition_has_a_docstring():
    import ast
    bare = []
    for path in sorted((ROOT/'deepcluster_nb').rglob('[a-z]*.py')):
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')
            if public and not ast.get_docstring(node): bare.append(f'{path.stem}.{node.name}')
    assert bare == []

# ---------------------------------------------------------------- 7: numbers of chapters

def number(name): # of a chapter, in whichever folder; None for pages without
    found = re.match(r'(\d\d)_', Path(name).name)
    return found and found[1]

NUMBERED = [n for n in sidebar(QUARTO['website']['sidebar']['contents']) if number(n)]

def test_chapters_are_numbered_in_reading_order():
    assert [number(n) for n in NUMBERED] == [f'{i:02}' for i in range(len(NUMBERED))]
    assert sorted(NUMBERED) == sorted(n for n in STORED if number(n))
    for name, page in STORED.items():
        title = re.match(r'# (.*)', source(page.cells[0]))[1]
        titled = re.match(r'(\d\d) · ', title)
        assert (titled and titled[1]) == number(name), title
        assert not re.match(r'\d', Path(page.address).name)

def wrong_numbers(text, name='index.ipynb'):
    "Links on a page whose text begins with the number of another chapter, and words such as 'chapter 99'."
    numbers = {n: number(n) for n in NUMBERED} | {SITE + STORED[n].address: number(n) for n in NUMBERED}
    def of(target): return target if target.startswith(SITE) else os.path.normpath(Path(name).parent/target)
    links = re.finditer(r'\[(?:[Cc]hapter )?(\d\d)\b[^\]]*\]\(([^)#\s]+)[^)]*\)', text)
    found = [m[0] for m in links if numbers.get(of(m[2])) != m[1]]
    return found + [m[0] for m in re.finditer(r'[Cc]hapters? (\d\d)\b', text) if int(m[1]) >= len(NUMBERED)]

@each
def test_numbers_in_the_prose_are_those_of_the_chapters(name):
    assert [w for t in markdowns(STORED[name]) for w in wrong_numbers(prose(t), name)] == []

@pytest.mark.parametrize('text, n', [
    ('[05](05_clustering.ipynb)', 0), ('[06](05_clustering.ipynb)', 1), ('chapter 99', 1), ('chapter 05', 0),
    (f'[05 k-means]({SITE}clustering.html)', 0), (f'[Chapter 04]({SITE}clustering.html#x)', 1)])
def test_wrong_numbers_are_found(text, n): assert len(wrong_numbers(text)) == n

@pytest.mark.parametrize('text, n', [
    ('[05](../05_clustering.ipynb#x)', 0), ('[05](05_clustering.ipynb)', 1), ('[20](20_feeding.ipynb)', 0),
    ('[21](20_feeding.ipynb)', 1), (f'[20 feeding]({SITE}fast/feeding.html)', 0)])
def test_wrong_numbers_are_found_in_a_folder(text, n):
    assert len(wrong_numbers(text, 'fast/23_kmeans.ipynb')) == n

def test_no_two_pages_have_one_title():
    titles = [re.match(r'# (?:\d\d · )?(.*)', source(p.cells[0]))[1].lower() for p in STORED.values()]
    assert sorted({t for t in titles if titles.count(t) > 1}) == []

# ---------------------------------------------------------------- 8: the home page

HOME = [source(c) for c in STORED['index.ipynb'].cells if c['cell_type'] == 'markdown']

def test_home_page_begins_with_what_where_and_how():
    "What it is, the picture and the commands stand side by side (styles.css), the ladder below: one screen."
    first, ladder, *_ = '\n'.join(HOME).split('\n## ')
    what, found, commands = re.split('<div class="(?:found|commands)">', first.split('<div class="what">')[1])
    assert 'images/found.png' in found and 'make demo' in commands and 'make test' in commands
    assert len(re.findall(r'\w+', re.sub(r'\(http[^)]*\)', '', what))) <= 80
    assert max(map(len, listings(commands)[0][0][1].splitlines())) <= 62      # half of the page's width
    rungs = re.findall(r'^\| (\d.*)$', ladder, re.M)
    assert ladder.startswith('The ladder\n') and len(rungs) == 5 and max(map(len, rungs)) <= 80
    for part in ('what', 'found', 'commands'): assert f'.home > .{part} {{ grid-area: {part}; }}' in CSS

def test_a_phone_shows_whole_columns_of_the_picture():
    from PIL import Image
    width, height = map(int, re.search(r'found img {[^}]*aspect-ratio: (\d+) / (\d+)', CSS).groups())
    im = np.asarray(Image.open(ROOT/'images'/'found.png').convert('L'))
    assert im.shape[0] == height and (im[:, width] > 250).all() and not (im[:, width - 5] > 250).all()

def results(page, kind): # of all cells, one by one
    shown = [o.get('data', {}) for c in page.cells for o in c.get('outputs', [])]
    return [''.join(data[kind]) for data in shown if kind in data]

TABLES = 'sobel clustering training switches probes kmeans packing estimate'.split()
@pytest.mark.parametrize('name', [n for n in STORED if Path(n).stem[3:] in TABLES])
def test_results_are_no_dictionaries(name): # but tables, words or numbers
    assert [t[:60] for t in results(STORED[name], 'text/plain') if re.match(r'\(?\{', t)] == []

def test_tables_give_room_to_the_longest_column():
    for name, page in STORED.items():
        texts = [source(c) for c in page.cells if c['cell_type'] == 'markdown']
        for t in texts + results(page, 'text/markdown'):
            tables = re.findall(r'^(\|.*\|)\n(\|[-:| ]+\|)\n((?:\|.*\|\n?)+)', prose(t), re.M)
            for head, dashes, body in tables:
                lines = [head, *body.splitlines()]
                if max(map(len, lines)) <= 72: continue     # pandoc takes the widths of the words themselves
                widths = [len(d.strip(' :')) for d in dashes.strip('|').split('|')]
                columns = list(zip(*(re.sub(r'\]\([^)]*\)', '', l).strip('|').split('|') for l in lines)))
                longest = [max(map(len, c)) for c in columns]
                most = longest.index(max(longest))
                assert widths[most] == max(widths) and len(set(widths)) > 1, (name, head)

@each
def test_listings_have_a_language_and_fit(name):
    for c in STORED[name].cells:
        if c['cell_type'] != 'markdown': continue
        for language, text in listings(source(c))[0]:
            assert language, text[:80]
            assert max(map(len, text.splitlines() or ['']), default=0) <= 110, text[:110]

def test_home_page_listings_fit_a_phone_or_scroll():
    for t in HOME:
        for language, text in listings(t)[0]: assert language and max(map(len, text.splitlines())) <= 88, text

# ---------------------------------------------------------------- 9: citation

def test_every_page_has_its_own_citation(processed):
    common = QUARTO['citation']
    assert common['author'] == [dict(name=dict(literal='The deepcluster-nb authors'))]
    cited = [p.head['citation'] for p in processed.values()]
    keys = [c['id'] for c in cited]
    assert len(set(keys)) == len(keys) and all(re.fullmatch(r'deepcluster-nb(-[a-z_]+)*', k) for k in keys)
    for title in [common['container-title'], *(c['title'] for c in cited)]:    # capitals stay, no numbers
        assert re.fullmatch(r'<span class="nocase">(?!\d)[^<>]+</span>', title), title

# ---------------------------------------------------------------- 10: Colab

def installs(page): # the cells that install the kit
    return [i for i, c in enumerate(page.cells)
            if c['cell_type'] == 'code' and source(c).startswith('#| hide\n# on Colab')]

def test_every_notebook_installs_the_kit_where_it_is_missing(processed):
    cells = set()
    for name, page in STORED.items():
        code_cells = [i for i, c in enumerate(page.cells) if c['cell_type'] == 'code']
        if not code_cells: continue
        assert installs(page) == code_cells[:1], name
        cells.add(source(page.cells[code_cells[0]]))
        assert 'git clone -q' not in '\n'.join(source(c) for c in processed[name].cells), name
    assert len(cells) == 1

def test_the_cell_installs_only_where_the_kit_is_missing(monkeypatch):
    import importlib.util
    text = next(source(p.cells[i]) for p in STORED.values() for i in installs(p))
    asked = []
    class Shell:
        def system(self, line): asked.append(line)
        def run_line_magic(self, magic, line): asked.append(f'%{magic} {line}')
    exec(text, dict(get_ipython=Shell))
    assert asked == []
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    exec(text, dict(get_ipython=Shell))
    assert len(asked) == 3 and asked[0].startswith(f"git clone -q {SETTINGS['git_url']} ")
    assert asked[1:] == ['%pip install -q ./deepcluster-nb', '%cd -q deepcluster-nb/nbs']

def test_notebooks_can_be_pinned_to_a_commit(tmp_path):
    from deepcluster_nb.book import pin_notebooks
    with_code = [n for n, p in STORED.items() if installs(p)]
    for name in with_code:
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text((ROOT/'nbs'/name).read_text())
    assert len(pin_notebooks(tmp_path, 40*'7')) == len(with_code) > 30
    for name, page in pages(tmp_path).items():
        assert f"'{40*'7'}'\n" in source(page.cells[installs(page)[0]]), name

def test_chapters_need_nothing_that_the_kit_does_not_bring():
    "Colab installs what setup.py requires, not the tools of those who write the book."
    for name, page in STORED.items():
        if name.endswith('_book.ipynb'): continue             # it is about those tools
        text = '\n'.join(source(c) for c in page.cells if c['cell_type'] == 'code')
        assert not re.search(r'^(from|import) (nbdev|execnb)\b', text, re.M), name

# ---------------------------------------------------------------- 11: other things seen

def test_the_social_card_is_a_png_of_the_usual_size():
    from PIL import Image
    site = QUARTO['website']
    assert site['image-alt'] and site['open-graph'] and site['twitter-card']
    assert Image.open(ROOT/'nbs'/site['image']).size == (1200, 630)
