("The notebooks to teach from: "
 "every question is in them, no answer is, and with the answers put back they run.")
import importlib.util, json, os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('make_exercises', ROOT/'exercises'/'make.py')
make = importlib.util.module_from_spec(spec); spec.loader.exec_module(make)

def cells(path):
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text())['cells']]
NOTEBOOKS = [*(ROOT/'nbs').glob('*.ipynb'), *(ROOT/'nbs'/'fast').glob('*.ipynb')]
CHAPTERS = [p for p in sorted(NOTEBOOKS, key=lambda p: p.name)
            if any('## Exercises' in s.splitlines() for _,s in cells(p))]

def test_every_chapter_with_exercises_is_found():
    assert len(CHAPTERS) >= 27 and make.chapters() == CHAPTERS

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_a_stub_has_the_questions_and_no_answers(path):
    chapter, stub = cells(path), make.stub(path)
    start = next(i for i,(kind, s) in enumerate(chapter) if '## Exercises' in s.splitlines())
    asked = re.findall(r'\*\*(?:\d\. )?(Predict|Break|Extend)\.\*\*',
                       '\n'.join(s for kind,s in chapter[start:] if kind == 'markdown'))
    questions = [i for i,c in enumerate(stub.cells) if c.source.startswith('## Question')]
    assert asked == ['Predict', 'Break', 'Extend'] and len(questions) == 3
    for i,name in zip(questions, asked):
        assert (f'{name}.**' in stub.cells[i].source and stub.cells[i+1].cell_type == 'code'
                and stub.cells[i+1].source == '')
    code = lambda part: {l.strip() for kind,s in part if kind == 'code' for l in s.splitlines()}
    answers = {l for l in code(chapter[start:]) - code(chapter[:start])
               if len(l) > 12 and not l.startswith('#|')}
    here = {l.strip() for c in stub.cells for l in c.source.splitlines()}
    tidy = {l.strip() for kind,s in chapter[start:] if '#| hide' in s for l in s.splitlines()}
    assert len(answers) > 5 and not answers & (here - tidy)
    # what is said about an answer
    after = [s.split('**')[0] for kind,s in chapter[start + 1:] if kind == 'markdown']
    assert not any(len(t.strip()) > 20 and t.strip() in c.source for t in after for c in stub.cells)

def solved(path): # the code of its exercises, with the answers
    cells = make.stub(path, solutions=True).cells
    return '\n'.join(c.source for c in cells if c.cell_type == 'code')

def ran(source, folder):
    (folder/'solved.py').write_text(source)
    return subprocess.run([sys.executable, 'solved.py'], cwd=folder, capture_output=True, text=True,
                          timeout=120, env=os.environ | dict(MPLBACKEND='agg'))

@pytest.mark.parametrize('name', ['06_sampling', '02_sobel'])
def test_with_the_answers_put_back_it_runs(name, tmp_path):
    source = solved(ROOT/'nbs'/f'{name}.ipynb')
    assert source.count('test_') > 5
    done = ran(source, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    broken = (source.replace('(1 - 1/100)**101', '(1 - 1/100)**51') if name == '06_sampling' else
              source.replace('-3*g_white', '-4*g_white'))
    assert broken != source                                         # the answers are really in it, and assert
    assert 'AssertionError' in ran(broken, tmp_path).stderr

def test_answers_about_a_twin_run_too(tmp_path): # its module is in a package of its own
    source = solved(ROOT/'nbs'/'fast'/'19_images.ipynb')
    done = ran(source, tmp_path)
    assert 'from deepcluster_nb.fast.images import' in source and done.returncode == 0, done.stderr[-2000:]

def test_answers_of_a_class_are_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make, 'chapters', lambda: [ROOT/'nbs'/'06_sampling.ipynb'])
    monkeypatch.setattr(sys, 'argv', ['make.py', '--out', str(tmp_path)])
    make.main(); made = (tmp_path/'06_sampling.ipynb').read_text()
    make.main(); assert (tmp_path/'06_sampling.ipynb').read_text() == made    # the same again: nothing to say
    (tmp_path/'06_sampling.ipynb').write_text(
        answered := made.replace('"source": []', '"source": ["my answer"]', 1))
    assert answered != made
    capsys.readouterr(); make.main()
    assert ((tmp_path/'06_sampling.ipynb').read_text() == answered
            and 'left as it is' in capsys.readouterr().out)
