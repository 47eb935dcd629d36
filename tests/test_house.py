"The rooms and what may stand in them: imports, layout, and the files that people rely on."
import ast, json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
ORDER = ['data', 'feeding', 'small_maps', 'augment', 'sobel', 'model', 'features', 'clustering', 'sampling', 'runs', 'training', 'probes', 'pictures', 'voc', 'retrieval', 'packing', 'pic', 'released', 'estimate', 'experiments']
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def imported(module): # the kit's modules that one imports anywhere, also inside functions
    tree = ast.parse((ROOT/'deepcluster_nb'/f'{module}.py').read_text())
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    return {n.module.split('.')[-1] for n in froms if n.level == 1 or n.module.startswith('deepcluster_nb.')}

@pytest.mark.parametrize('module', ORDER)
def test_modules_import_only_backwards(module):
    assert imported(module) <= set(ORDER[:ORDER.index(module)])

def test_every_module_is_in_the_order():
    assert {p.stem for p in (ROOT/'deepcluster_nb').glob('*.py')} - {'__init__', '_modidx'} == set(ORDER)

def test_public_functions_say_what_they_do():
    bare = []
    for m in ORDER:
        source = (ROOT/'deepcluster_nb'/f'{m}.py').read_text()
        for node in ast.parse(source).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            signature = source.splitlines()[node.lineno - 1:node.body[0].lineno]
            if not ast.get_docstring(node) and not any('#' in l for l in signature): bare.append(f'{m}.{node.name}')     # docments count
    assert not bare

def test_nothing_heavy_is_imported_at_the_start():
    code = f"import sys, {', '.join(f'deepcluster_nb.{m}' for m in ORDER)}; print([m for m in ('faiss', 'umap', 'sklearn', 'matplotlib', 'papermill') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_no_global_randomness_and_no_pickle():
    for m in ORDER:
        code = (ROOT/'deepcluster_nb'/f'{m}.py').read_text()
        assert not re.search(r'np\.random\.(seed|rand|choice|permutation)|weights_only=False|pickle\.load|allow_pickle=True', code), m

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_stored_notebooks(path):
    nb = json.loads(path.read_text())
    assert path.stat().st_size < 1_000_000
    kinds = [o['output_type'] for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    assert 'error' not in kinds
    text = ''.join(''.join(o.get('text', '')) for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs'])
    assert 'it/s]' not in text and 'Warning' not in text, 'progress bars or warnings in the stored outputs'

GUIDES = ['how_to_read', 'glossary', '21_own_images', '22_not_learning', '23_cost']     # pages beside the chapters: they lead to them and define nothing

@pytest.mark.parametrize('name', GUIDES)
def test_guides_define_nothing_and_lead_to_the_chapters(name):
    cells = json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']
    text, code = ('\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == kind) for kind in ('markdown', 'code'))
    assert re.match(r'# .+\n> .+\.\n', text) and not re.search(r'^#\| *(default_exp|exports?)\b', code, re.M)
    files = {l.split('#')[0] for l in re.findall(r'\]\(([^)\s]+)\)', text) if not l.startswith(('http', '#'))}
    assert len(files) >= 4 and all((ROOT/'nbs'/f).is_file() for f in files)
    drawn = [''.join(c['source']) for c in cells if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
    assert all(re.search(r'^#\| fig-cap: ".+"$', s, re.M) and re.search(r'^#\| fig-alt: ".+"$', s, re.M) for s in drawn)

def test_train_takes_the_names_of_config():
    from dataclasses import asdict
    from deepcluster_nb.experiments import experiments_folder, parameters
    from deepcluster_nb.training import Config
    assert parameters(experiments_folder()/'train.ipynb') == asdict(Config())

@pytest.mark.parametrize('preset', sorted((ROOT/'nbs'/'experiments'/'presets').glob('*.yaml')), ids=lambda p: p.stem)
def test_presets_are_possible(preset):
    from deepcluster_nb.experiments import check_parameters, gather
    says = re.match(r'# for (\w+):', preset.read_text())                              # whose it is, where it isn't train's
    notebook, given = gather(says[1] if says else 'train', preset.stem)
    check_parameters(notebook, given | dict(device='auto'), Path('nowhere'))                # there need be no GPU here

def test_readme_is_the_index_page():
    from nbconvert import MarkdownExporter
    assert MarkdownExporter().from_filename(str(ROOT/'nbs'/'index.ipynb'))[0].strip() == (ROOT/'README.md').read_text().strip(), 'run make readme'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_imports_stand_in_cells_of_their_own(path):
    "The book's build runs every cell that imports, and nothing else: mixed with code it stops."
    mixed = []
    for c in json.loads(path.read_text())['cells']:
        lines = [l for l in ''.join(c['source']).splitlines() if l.strip() and not l.startswith('#')] if c['cell_type'] == 'code' else []
        imports = [l for l in lines if re.match(r'(import|from) ', l)]
        if imports and len(imports) < len(lines): mixed.append(lines[0])
    assert not mixed
