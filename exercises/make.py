("A notebook for each chapter's exercises, to teach from: "
 "the questions, what they need of the chapter, and room for answers.")
import argparse, ast, builtins, re, symtable
from pathlib import Path
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
QUESTION = re.compile(r'^\*\*(?:\d\. )?(?:Predict|Break|Extend)\.\*\*', re.M)
LOOKS = re.compile(r'test_|show|print|display|plt\.|fig|ax')    # calls that change nothing a later cell needs

def flags(code): return re.findall(r'^#\|\s*(\S+)', code, re.M)
def bare(code): return re.sub(r'^#\|.*\n?', '', code, flags=re.M).strip()

def uses(code): # (names that a cell defines, names that it takes from outside)
    def outside(table):
        return ({s.get_name() for s in table.get_symbols() if s.is_global()}
                .union(*map(outside, table.get_children())))
    everything = {s.get_name() for s in symtable.symtable(code, 'cell', 'exec').get_symbols()
                  if s.is_assigned() or s.is_imported()}
    defined, read = set(), set()
    def visit(nodes):
        for node in nodes:
            inner = []
            # the head first, then the body, statement by statement
            if isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try)):
                for part in [node, *getattr(node, 'handlers', [])]:
                    for name in ('body', 'orelse', 'finalbody'):
                        if getattr(part, name, None):
                            inner += getattr(part, name)
                            setattr(part, name, [ast.Pass()])
            table = symtable.symtable(ast.unparse(node), 'cell', 'exec')
            here = ({s.get_name() for s in table.get_symbols() if s.is_referenced()}
                    .union(*map(outside, table.get_children())))
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name): here.add(node.target.id)
            read.update(here - (everything if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else defined))
            defined.update(s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported())
            visit(inner)
    visit(ast.parse(code).body)
    return defined, read - set(dir(builtins))

def changes(code, shows:bool):
    # names whose objects a cell changes: x[0] = …, x.add(…), fill(x, …);
    # `shows`: its last line is a value to look at
    found = set()
    def first(node): return next((n.id for n in ast.walk(node) if isinstance(n, ast.Name)), None)
    def visit(nodes):
        for node in nodes:
            for t in getattr(node, 'targets', [getattr(node, 'target', None)]):
                if isinstance(t, (ast.Subscript, ast.Attribute)): found.add(first(t))
            if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
                and not LOOKS.match(ast.unparse(node.value.func))):
                found.update(map(first, [node.value.func, *node.value.args[:1]]))
            if isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try)):
                visit(node.body + getattr(node, 'orelse', []))
    nodes = ast.parse(code).body
    visit(nodes[:-1] if shows else nodes)
    return found

def needed(cells, module, names):
    # code cells of a chapter, in order → (import cell, cells) that give these names
    names, imports, package, keep = {*names}, [], set(), []
    only_imports = lambda nodes: nodes and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
    imported = {(a.asname or a.name).split('.')[0] for c in cells for n in ast.parse(bare(c.source)).body
                if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    for c in reversed(cells):
        code, shows = bare(c.source), any(o.output_type == 'execute_result' for o in c.outputs)
        nodes, (defined, read) = ast.parse(code).body, uses(code)
        if only_imports(nodes):
            for node in nodes:
                node.names = [a for a in node.names
                              if a.name == '*' or (a.asname or a.name).split('.')[0] in names]
                if node.names and ast.unparse(node) != 'from nbdev.showdoc import *':
                    imports.append(ast.unparse(node))
        elif {'export', 'exports'} & {*flags(c.source)}:
            package |= defined & names
            names -= defined
        elif (defined | (changes(code, shows) - imported)) & names:
            names = (names - defined) | read
            keep.insert(0, code)
    if package: imports.append(f"from deepcluster_nb.{module} import {', '.join(sorted(package))}")
    return '\n'.join(sorted(dict.fromkeys(imports), key=lambda l: 'deepcluster_nb' in l)), keep

def questions(cells): # of the section "Exercises" → ([(question, [solution cells])], cells that tidy up)
    found, last = [], []
    for c in cells:
        if c.cell_type == 'markdown':
            # what stands before a question talks about the last answer
            at = [m.start() for m in QUESTION.finditer(c.source)]
            found += [(c.source[a:b].strip(), []) for a,b in zip(at, [*at[1:], None])]
        elif 'hide' in flags(c.source): last.append(c.source)
        else: found[-1][1].append(c.source); last = []
    return found, last

def stub(path, solutions:bool=False):
    # a chapter → a notebook of its exercises, with the solutions put back where asked for
    cells = nbformat.read(path, 4).cells
    start = next(i for i,c in enumerate(cells)
                 if c.cell_type == 'markdown' and re.search(r'^## Exercises', c.source, re.M))
    module = next((m[1] for c in cells if (m := re.match(r'#\|\s*default_exp ([\w.]+)', c.source))), None)
    asked, last = questions(cells[start:])
    names = set()
    for code in reversed([bare(s) for _,answer in asked for s in answer] + [bare(s) for s in last]):
        defined, read = uses(code)
        names = (names - defined) | read
    imports, lessons = needed([c for c in cells[:start] if c.cell_type == 'code'], module, names)
    title = re.match(r'# (.*)', cells[0].source)[1]
    how = ("Say the answer before you run anything. "
           "Run the cells down to the first question once; your own cells go below each question.")
    out = [new_markdown_cell(f"# Exercises: {title}\n> The questions of `{path.relative_to(ROOT)}`. {how}"),
           new_code_cell(imports)]
    if lessons: out += [new_markdown_cell("## From the chapter"), *map(new_code_cell, lessons)]
    for i,(question, answer) in enumerate(asked, 1):
        out += [new_markdown_cell(f"## Question {i}\n\n{question}"),
                *(new_code_cell(bare(s)) for s in (answer if solutions else ['']))]
    out += [new_code_cell(bare(s)) for s in last]
    for i,c in enumerate(out): c.id = f'cell-{i}'
    return new_notebook(cells=out, metadata=dict(kernelspec=dict(name='python3', display_name='python3',
                                                                 language='python')))

def chapters(): # the notebooks that have exercises, by number
    found = [*(ROOT/'nbs').glob('[0-9]*.ipynb'), *(ROOT/'nbs'/'fast').glob('[0-9]*.ipynb')]
    return [p for p in sorted(found, key=lambda p: p.name) if re.search(r'"## Exercises', p.read_text())]

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT/'exercises', help='folder for the notebooks')
    parser.add_argument('--solutions', action='store_true', help='with the solutions, for the teacher')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in chapters():
        file = args.out/(f'{path.stem}_solved.ipynb' if args.solutions else path.name)
        made = nbformat.writes(stub(path, args.solutions)) + '\n'
        if file.exists() and file.read_text() != made:
            print(f'{file} has answers in it, or its chapter has changed: left as it is; '
                  'move it away for a new one')
            continue
        file.write_text(made)
        print(file)

if __name__ == '__main__': main()
