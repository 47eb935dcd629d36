"""How much there is to read on the way through the algorithm: `python tests/reading.py [CHECKOUT]`.

Of the core's modules: lines of code with signatures as they are broken, widths, the longest function, and
what they import from the rest of the package. Of chapters 00 to 10: words outside of code. An older commit
in a worktree is counted in the same way (`git worktree add /somewhere COMMIT`)."""
import ast, json, re, sys
from pathlib import Path

CORE = 'data augment sobel model features clustering sampling training'.split()

def code_rows(source): # without docstrings, comments and what nbdev writes
    docs = {i for n in ast.walk(ast.parse(source))
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
            for i in range(n.lineno, n.end_lineno + 1)}
    source = re.sub(r'^__all__ = \[[^]]*\]', lambda m: '\n'*m[0].count('\n'), source, flags=re.M)
    return [l for i,l in enumerate(source.splitlines(), 1) if i not in docs and l.split('#')[0].strip()]

def core(package):
    rows, functions, outside = {}, [], set()
    for m in CORE:
        source = (package/f'{m}.py').read_text('utf-8')
        nodes, rows[m] = list(ast.walk(ast.parse(source))), code_rows(source)
        functions += [(n.end_lineno - n.lineno + 1, f'{m}.{n.name}') for n in nodes
                      if isinstance(n, ast.FunctionDef)]
        outside |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level
                    and n.module.split('.')[0] not in CORE}
    widths = sorted(len(l) for r in rows.values() for l in r)
    return dict(lines={m: len(r) for m,r in rows.items()}, all=len(widths), widest=widths[-1],
                width_95=widths[int(.95*len(widths))], longest_function=max(functions),
                imports=sorted(outside))

def words(notebook):
    cells = json.loads(notebook.read_text('utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return len(re.sub(r'^```.*?^```', '', text, flags=re.S | re.M).split())

if __name__ == '__main__':
    root = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parent.parent)
    for name,value in core(root/'deepcluster_nb').items(): print(f'{name:18}', value)
    chapters = {p.stem: words(p) for p in sorted((root/'nbs').glob('[01][0-9]_*.ipynb'))
                if p.stem[:2] <= '10'}
    print(f"{'words':18}", chapters, sum(chapters.values()))
