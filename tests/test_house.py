"The rooms and what may stand in them: imports, layout, and the files that people rely on."
import ast, io, json, re, subprocess, sys, tokenize
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
import pytest
from groups import disagreements

ROOT = Path(__file__).parent.parent
CORE = ['data', 'augment', 'sobel', 'model', 'features', 'clustering', 'sampling', 'training']
ORDER = [*CORE, 'switches',
         'fast.images', 'fast.feeding', 'fast.crops', 'fast.small_maps', 'fast.features', 'fast.kmeans',
         'pic', 'fast.training', 'fast.graph', 'sources', 'runs', 'fast.packing', 'fast.distributed', 'fit',
         'probes', 'pictures', 'voc', 'retrieval', 'released', 'few_labels', 'estimate', 'report',
         'experiments', 'book']
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def code_cells(path):
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']

def source(module): # of one of ORDER
    return (ROOT/'deepcluster_nb'/f"{module.replace('.', '/')}.py").read_text()

def imported(module): # the kit's modules that one imports anywhere, also inside functions
    froms = [n for n in ast.walk(ast.parse(source(module))) if isinstance(n, ast.ImportFrom) and n.module]
    inside = 'fast.' if module.startswith('fast.') else ''
    return {inside*(n.level == 1) + n.module.removeprefix('deepcluster_nb.') for n in froms
            if n.level or n.module.startswith('deepcluster_nb.')}

@pytest.mark.parametrize('module', ORDER)
def test_modules_import_only_backwards(module):
    assert imported(module) <= set(ORDER[:ORDER.index(module)])

@pytest.mark.parametrize('module', CORE)
def test_the_core_knows_nothing_but_itself(module): # and has no case for a kind of device or precision
    assert imported(module) <= set(CORE)
    assert not re.search('cuda|bfloat16|float16|autocast|torch.backends', source(module))

def test_every_module_is_in_the_order():
    folder = ROOT/'deepcluster_nb'
    there = {'.'.join(p.relative_to(folder).with_suffix('').parts) for p in folder.rglob('[a-z]*.py')}
    assert there == set(ORDER)

def test_public_functions_say_what_they_do():
    bare = []
    for m in ORDER:
        text = source(m)
        for node in ast.parse(text).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            signature = text.splitlines()[node.lineno - 1:node.body[0].lineno]
            if not ast.get_docstring(node) and not any('#' in l for l in signature):  # docments count
                bare.append(f'{m}.{node.name}')
    assert not bare

def test_nothing_heavy_is_imported_at_the_start():
    code = (f"import sys, {', '.join(f'deepcluster_nb.{m}' for m in ORDER)}; print([m for m in ('faiss', "
            "'umap', 'sklearn', 'matplotlib', 'papermill') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          check=True).stdout.strip() == '[]'

def test_no_global_randomness_and_no_pickle():
    for m in ORDER:
        code = source(m)
        assert not re.search(
            r'np\.random\.(seed|rand|choice|permutation)|weights_only=False|pickle\.load|allow_pickle=True',
            code), m

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_stored_notebooks(path):
    nb = json.loads(path.read_text())
    assert path.stat().st_size < 1_000_000
    kinds = [o['output_type'] for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    assert 'error' not in kinds
    text = ''.join(''.join(o.get('text', '')) for c in nb['cells'] if c['cell_type'] == 'code'
                   for o in c['outputs'])
    assert 'it/s]' not in text and 'Warning' not in text, 'progress bars or warnings in the stored outputs'

# pages beside the chapters: they lead to them and define nothing
GUIDES = ['how_to_read', 'glossary', '30_own_images', '31_not_learning', '32_cost']

@pytest.mark.parametrize('name', GUIDES)
def test_guides_define_nothing_and_lead_to_the_chapters(name):
    cells = json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']
    text, code = ('\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == kind)
                  for kind in ('markdown', 'code'))
    assert re.match(r'# .+\n> .+\.\n', text) and not re.search(r'^#\| *(default_exp|exports?)\b', code, re.M)
    files = {l.split('#')[0] for l in re.findall(r'\]\(([^)\s]+)\)', text) if not l.startswith(('http', '#'))}
    assert len(files) >= 4 and all((ROOT/'nbs'/f).is_file() for f in files)
    drawn = [''.join(c['source'])
             for c in cells if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
    assert all(re.search(r'^#\| fig-cap: ".+"$', s, re.M) and re.search(r'^#\| fig-alt: ".+"$', s, re.M)
               for s in drawn)

def test_train_takes_the_names_of_config():
    from dataclasses import asdict
    from papermill import inspect_notebook
    from deepcluster_nb.experiments import experiments_folder, explained, parameters
    from deepcluster_nb.fit import Config
    page = experiments_folder()/'train.ipynb'
    assert parameters(page) == asdict(Config())         # so what the page shows has Config's defaults
    assert len(inspect_notebook(str(page))) == 10
    assert all(about for _,about in explained(page).values())

@pytest.mark.parametrize('preset', sorted((ROOT/'nbs'/'experiments'/'presets').glob('*.yaml')),
                         ids=lambda p: p.stem)
def test_presets_are_possible(preset):
    from deepcluster_nb.experiments import check_parameters, gather
    says = re.match(r'# for (\w+):', preset.read_text())                 # whose it is, where it isn't train's
    notebook, given = gather(says[1] if says else 'train', preset.stem)
    check_parameters(notebook, given | dict(device='auto'), Path('nowhere'))       # there need be no GPU here

def test_readme_is_the_index_page():
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    hidden = Config(RegexRemovePreprocessor=dict(patterns=[r'#\| hide']))      # as in the Makefile
    page = MarkdownExporter(config=hidden).from_filename(str(ROOT/'nbs'/'index.ipynb'))[0]
    assert page.strip() == (ROOT/'README.md').read_text().strip(), 'run make readme'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_imports_stand_in_cells_of_their_own(path):
    "The book's build runs every cell that imports, and nothing else: mixed with code it stops."
    mixed = []
    for code in code_cells(path):
        nodes = ast.parse(re.sub(r'^[ \t]*[%!].*$', 'pass', code, flags=re.M)).body
        imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        if imports and len(imports) < len(nodes): mixed.append(ast.unparse(imports[0]))
    assert not mixed

# ---------------------------------------------------------------- lines that can be read, also in a diff

WIDE = 110
OURS = [p for folder in ('deepcluster_nb', 'tests', 'exercises', 'data_scripts', 'images')
        for p in sorted((ROOT/folder).rglob('[a-z]*.py'))]
# a field of an f-string can't be broken before Python 3.12
ONE_FIELD = ("f\"{', '.join(map(repr, list(saved)[:5]))",
             "f\"{', '.join(str(f.relative_to(root)) for f in again")

def too_wide(code, generated=False): # `generated`: but for what nbdev writes: title, names, origins of cells
    if generated: code = re.sub(r'\A""".*"""|^# %% .*|^__all__ = \[[^]]*\]', '', code, flags=re.M)
    return [l for l in code.split('\n') if len(l) > WIDE and not l.lstrip().startswith(ONE_FIELD)]

def exported(code): return bool(re.search(r'^#\| *exports?\b', code, re.M))

def comments(code): # without the directives
    code = re.sub(r'^[ \t]*(#\||[%!]).*$', '', code, flags=re.M)
    return [t.string for t in tokenize.generate_tokens(io.StringIO(code).readline)
            if t.type == tokenize.COMMENT]

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_code_cells_are_no_wider_than_the_page(path):
    # options, magics, shell lines, and the help behind a parameter, which papermill reads, can't be broken
    assert [l for c in code_cells(path) for l in too_wide(c)
            if not re.match(r"#\||\s*[%!]|\w+: str = '\w*' +# ", l)] == []

@pytest.mark.parametrize('path', [*OURS, ROOT/'setup.py'], ids=lambda p: f'{p.parent.name}/{p.name}')
def test_python_files_are_no_wider_than_the_page(path):
    assert too_wide(path.read_text(), ROOT/'deepcluster_nb' in path.parents) == []

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_comments_of_exported_cells_hold_no_backticks(path): # nbdev makes links of them, inside the code
    assert [x for c in code_cells(path) if exported(c) for x in comments(c) if '`' in x] == []

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_sources_that_are_shown_are_not_folded(path): # nbdev folds them itself; the key twice stops Quarto
    assert [c for c in code_cells(path)
            if re.search(r'^#\| *exports\b', c, re.M) and re.search(r'^#\| *code-fold', c, re.M)] == []

def test_the_tests_of_situations_are_there():
    rows = re.findall(r'^\| (\d+) \|.*', (ROOT/'tests'/'situations.md').read_text(), re.M)
    named = re.findall(r'`(test_\w+)`', (ROOT/'tests'/'situations.md').read_text())
    code = '\n'.join(p.read_text() for p in (ROOT/'tests').glob('test_*.py'))
    assert rows == [str(i) for i in range(1, 20)] and len(named) > 40
    assert [n for n in named if not re.search(rf'^def {n}\(', code, re.M)] == []

def test_names_say_what_they_hold(): # and not where it is, or how much of it there is
    vague = {'near', 'few', 'then', 'space', 'sound', 'learnt', 'put_back', 'LOOK', 'FREE'}
    def name(n): return getattr(n, 'id', None) or getattr(n, 'arg', None) or getattr(n, 'name', None)
    found = {m: vague & {name(n) for n in ast.walk(ast.parse(source(m)))} for m in ORDER}
    assert {m: names for m,names in found.items() if names} == {}

# ---------------------------------------------------------------- a function names the fields that it reads

@cache
def configurations(): # (names of all fields, what the loop's parts may be)
    from deepcluster_nb.fast.training import CLUSTERERS
    from deepcluster_nb.fit import PARTS, Config
    from deepcluster_nb.probes import ProbeConfig
    return ({f.name for kind in (Config, ProbeConfig) for f in fields(kind)},
            {'parts.cluster': [p.cluster for p in PARTS.values()],
             'parts.train_epoch': [p.train_epoch for p in PARTS.values()],
             'CLUSTERERS[config.clusterer]': [*CLUSTERERS.values()]})

@pytest.mark.parametrize('module', ORDER)
def test_functions_ask_for_the_group_that_they_read(module):
    space = vars(import_module(f'deepcluster_nb.{module}'))
    assert disagreements(source(module), space, *configurations()) == []

def test_what_is_read_by_a_variable_name_is_in_the_group_too(): # which the source does not show
    from deepcluster_nb.fast.training import Training
    from deepcluster_nb.fit import ONLY_FAST, WITH_RANKS
    assert {*ONLY_FAST, *WITH_RANKS} <= {f.name for f in fields(Training)}

@dataclass
class Files:
    root:str = ''

@dataclass
class Steps:
    lr:float = .1

@dataclass
class Both(Steps, Files): pass

def files(config:Files): pass
def steps(x, config:Steps): pass
def takes_steps(config:Steps): pass

@pytest.mark.parametrize('code,bad', [
    ('def f(config:Steps): return config.lr', []),
    ('def f(config:Steps): return config.root', ['f reads root']),
    ('def f(c:Steps): return c.root', ['f reads root']),
    ('def f(config:Steps): x, c = 1, config; return c.root', ['f reads root']),
    ('def f(config:Steps): a = config; b = a; return b.root', ['f reads root']),
    ('def f(config:Steps):\n    def g(): return config.root', ['f reads root']),
    ('def f(config:Steps): return lambda: config.root', ['f reads root']),
    ('def f(config:Steps):\n    def g(config:Files): return config.root', []),
    ('def f(config:Steps):\n    def g(config:Files): return config.lr', ['g reads lr']),
    ('def f(config:Steps): return getattr(config, "root")', ['f reads root']),
    ('def f(config:Steps): return getattr(config, "root", "")', []),
    ('def f(config:Steps): return replace(config, root="")', ['f reads root']),
    ('def f(config:Steps|Files): return config.lr', ['f reads lr']),
    ('def f(config:Both): return config.lr, config.root', []),
    ('def f(config:Both): return config.lr', ['f could do with Steps']),
    ('def f(config:Both): files(config)', ['f could do with Files']),
    ('def f(config:Both): files(config); return config.lr', []),
    ('def f(config:Steps): files(config)', ['f hands files less than it asks for']),
    ('def f(config:Steps): steps(1, config)', []),
    ('def f(config:Files): steps(1, config)', ['f hands steps less than it asks for']),
    ('def f(config:Files): steps(config=config, x=1)', ['f hands steps less than it asks for']),
    ('def f(config:Steps): steps(1, replace(config, lr=0))', []),
    ('def f(config:Steps, part): part(config)', ['f hands it to part, where no group is known']),
    ('def f(config:Files, out): out.step(config)', ['f hands out.step less than it asks for']),
    ('def f(config): return 1', ['f names no group for config']),
    ('def f(c): return c.lr', ['f names no group for c']),
    ('def f(c): return c.sum()', []),
    ('class A:\n    def __init__(self, config:Steps): self.c = config\n    def f(self): self.c.root',
     ['A.__init__ reads root']),
    ('class A:\n    config:Steps\n    def f(self): self.config.root', ['A reads root'])])
def test_disagreements_are_found(code, bad):
    assert disagreements(code, globals(), {'lr', 'root'}, {'out.step': [takes_steps]}) == bad
