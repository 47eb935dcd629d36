("nbdev_export and nbdev_clean must leave no diff; "
 "run from the root of the repository, on a copy, so that nothing here changes.")
import shutil, subprocess, sys, tempfile
from pathlib import Path

def contents(root): # relative path → bytes, of what the two commands may change
    files = [*root.glob('deepcluster_nb/*.py'), *root.glob('nbs/**/*.ipynb')]
    return {str(f.relative_to(root)): f.read_bytes() for f in files if '.ipynb_checkpoints' not in f.parts}

def main():
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        skip = shutil.ignore_patterns('.venv', '.git', 'runs', 'data', '_proc', '_docs', '*.egg-info')
        shutil.copytree(here, copy, symlinks=True, ignore=skip)
        for command in ('nbdev_export', 'nbdev_clean'): subprocess.run([command], cwd=copy, check=True)
        before, after = contents(here), contents(copy)
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    if changed:
        sys.exit('nbdev_export or nbdev_clean change these; run both and commit:\n  ' + '\n  '.join(changed))
    print(f'{len(before)} files unchanged by nbdev_export and nbdev_clean')

if __name__ == '__main__': main()
