"What stops an installation is one clear line, before anything is made."
import os, shutil, subprocess
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent

@pytest.mark.skipif(not shutil.which('make'), reason='no make')
@pytest.mark.parametrize('pretend, line', [
    ("import sys; sys.version_info = (3, 9, 2, 'final', 0)",
     'is Python 3.9, but 3.10 or newer is needed: make PYTHON=/path/to/newer/python3'),
    ("import sys; sys.modules['ensurepip'] = None",
     'has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv) and run make again'),
    ("import shutil; shutil.disk_usage = lambda path: type('U', (), dict(free=2.5e9))",
     'the installation needs 9 GB of disk, but 2.5 GB are free here'),
])
def test_make_says_what_is_missing(tmp_path, pretend, line):
    for name in ('Makefile', 'settings.ini', 'setup.py', 'constraints.txt'):
        shutil.copy(ROOT/name, tmp_path/name)
    # Python reads this when it starts
    (tmp_path/'pretend').mkdir(); (tmp_path/'pretend'/'sitecustomize.py').write_text(pretend)
    out = subprocess.run(['make', 'demo'], cwd=tmp_path, capture_output=True, text=True,
                         env=dict(os.environ, PYTHONPATH=str(tmp_path/'pretend')))
    said = [l for l in (out.stdout + out.stderr).splitlines() if not l.startswith('make')]
    assert out.returncode and len(said) == 1 and line in said[0], said
    assert not (tmp_path/'.venv').exists()

def test_make_lists_its_commands():
    out = subprocess.run(['make'], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f'make {name}' in out for name in ('demo', 'test', 'lab', 'docs'))

def test_pins_hold_for_every_patch_release():
    "Debian 12 has Python 3.11.2: a pin of something that needs 3.11.5 would stop its `make`."
    from importlib.metadata import PackageNotFoundError, metadata
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    pins = [Requirement(l)
            for l in (ROOT/'constraints.txt').read_text().splitlines() if not l.startswith('#')]
    wrong = []
    for r in pins:
        try: m = metadata(r.name)
        except PackageNotFoundError: continue                  # another platform's
        if (r.specifier.contains(m['Version'])
            and not SpecifierSet(m['Requires-Python'] or '').contains('3.11.0')):
            wrong.append(f"{r} needs Python {m['Requires-Python']}")
    assert len(pins) > 100 and not wrong
