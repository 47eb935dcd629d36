("What the page `What is here` names is there: "
 "chapters, functions, settings, presets, experiments, commands and tests.")
import json, re
from importlib import import_module
from pathlib import Path
import pytest, yaml
from deepcluster_nb.experiments import main
from deepcluster_nb.fit import Config, resolve

ROOT = Path(__file__).parent.parent
NBS, PAGE = ROOT/'nbs', ROOT/'nbs'/'33_coverage.ipynb'

# module → chapter
MODULES = {m[1]: str(p.relative_to(NBS)) for p in sorted(NBS.rglob('[0-9]*.ipynb'))
           if (m := re.search(r'#\| default_exp ([\w.]+)', p.read_text()))}
DEFINITION = re.compile(r'((?:fast\.)?\w+)\.(\w+)')

def rows(): # (feature, here, held by), without the heads of the tables
    text = '\n'.join(''.join(c['source']) for c in json.loads(PAGE.read_text())['cells'])
    cells = [[c.strip() for c in l.strip('|').split('|')] for l in text.splitlines() if l.startswith('|')]
    return [r for r in cells if r[1] != 'here' and not set(r[0]) <= set('-')]

def named(text): # chapters that are linked and words in backticks
    return re.findall(r'\[\d\d\]\([^)]*\)|`[^`]+`', text)

def has_command(name):
    with pytest.raises(SystemExit) as e: main([name, '--help'])
    return e.value.code == 0

def has_setting(name, value):
    # the second is an error where the device lacks it
    if name == 'precision': return value in ('float32', 'bfloat16')
    try: resolve(Config(**{name: value}))
    except (TypeError, ValueError): return False
    return True

def there(name):
    if m := re.fullmatch(r'\[(\d\d)\]\(((?:fast/)?\1_\w+\.ipynb)\)', name): return (NBS/m[2]).is_file()
    name = name.strip('`')
    if m := re.fullmatch(r'(test_\w+)::(test_\w+)', name):
        return ((ROOT/'tests'/f'{m[1]}.py').is_file()
                and f'\ndef {m[2]}(' in (ROOT/'tests'/f'{m[1]}.py').read_text())
    if m := re.fullmatch(r'(\w+)\.yaml', name): return (NBS/'experiments'/'presets'/name).is_file()
    if name.startswith('experiments/'): return (NBS/name).is_file()
    if m := re.fullmatch(r'deepcluster-nb (\w+)', name): return has_command(m[1])
    if m := re.fullmatch(r'(\w+): ([\w.]+)', name): return has_setting(m[1], yaml.safe_load(m[2]))
    if m := DEFINITION.fullmatch(name):
        return m[1] in MODULES and hasattr(import_module(f'deepcluster_nb.{m[1]}'), m[2])
    return False

def test_everything_that_is_named_is_there(capsys):
    missing = sorted({name for _,here,held in rows()
                      for name in named(here) + named(held) if not there(name)})
    assert not missing, ', '.join(missing)

def test_what_is_not_there_is_found(): # the checks themselves
    wrong = ['[05](05_nothing.ipynb)', '[06](05_clustering.ipynb)', '`test_golden::test_nothing`',
             '`test_nothing::test_layers`', '`nothing.yaml`', '`experiments/nothing.ipynb`',
             '`sampler: fair`', '`nothing: 1`', '`model.nothing`', '`nothing.model`', '`nothing`',
             '`kmeans.kmeans`', '`fast.clustering.kmeans`']
    assert not any(there(name) for name in wrong)
    right = ['[05](05_clustering.ipynb)', '[23](fast/23_kmeans.ipynb)', '`test_golden::test_layers`',
             '`digits.yaml`', '`sampler: released`', '`model.alexnet`', '`fast.kmeans.kmeans`',
             '`deepcluster-nb run`']
    assert all(there(name) for name in right)

def test_every_row_says_where_and_what_holds_it_or_that_it_is_not_here():
    bad = [feature for feature,here,held in rows()
           if (held == '') != here.startswith('not here') or held and not named(held) or not here]
    assert len(rows()) > 40 and not bad

def test_every_chapter_with_a_module_is_in_the_table():
    text = PAGE.read_text()
    assert [c for c in MODULES.values() if f']({c})' not in text] == []

def strayed(row): # definitions that stand in a row without their chapter
    _, here, _ = row
    found = [DEFINITION.fullmatch(name.strip('`')) for name in named(here) if not name.endswith('.yaml`')]
    return [m[1] for m in found if m and m[1] in MODULES and f']({MODULES[m[1]]})' not in here]

def test_each_definition_stands_beside_its_chapter():
    assert {row[0]: found for row in rows() if (found := strayed(row))} == {}
    assert strayed(('x', '[05](05_clustering.ipynb) `fast.kmeans.kmeans`', '')) == ['fast.kmeans']
