"""Which fields of a configuration a function reads, held against the group that its signature names.

A function that takes `config`, or `c`, names a dataclass for it, or a union of some. What it reads must be
fields of each of them; whoever gets the configuration from it must ask for no more; and no part of the
group may be enough. Read from the source, through aliases, copies by replace, nested functions and self."""
import ast, inspect
from dataclasses import fields, is_dataclass
from typing import get_args

PARAMETERS = 'config', 'c'

def groups(annotation): # dataclasses; () where it is something else
    kinds = get_args(annotation) or (annotation,)
    return kinds if all(isinstance(k, type) and is_dataclass(k) for k in kinds) else ()

def has(kinds, name): # a field or a method, of each
    return all(name in {f.name for f in fields(k)} or callable(getattr(k, name, None)) for k in kinds)

def enough(kinds, asked): # whether each of them is one of those
    return all(issubclass(k, asked) for k in kinds)

def arguments(function): return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]

def assigned(function): # (target, value) of each assignment, tuples taken apart
    for n in ast.walk(function):
        for target in n.targets if isinstance(n, ast.Assign) else ():
            both = isinstance(target, ast.Tuple) and isinstance(n.value, ast.Tuple)
            yield from zip(target.elts, n.value.elts) if both else [(target, n.value)]

class Reader(ast.NodeVisitor):
    "What functions do with a configuration."
    def __init__(self, space:dict, handed:dict): # as for disagreements
        self.space, self.handed, self.known = space, handed, set() # known: expressions that are it, as text
        self.reads, self.passes, self.lost = set(), [], []         # passes: (callee, groups it asks for)
        self.unseen = False                                        # some of what is read can't be seen here

    def is_config(self, e):
        copied = isinstance(e, ast.Call) and ast.unparse(e.func) == 'replace' and e.args
        return self.is_config(e.args[0]) if copied else ast.unparse(e) in self.known

    def read(self, function, known):
        self.known = set(known)
        for _ in range(2): # an alias of an alias, too
            self.known |= {ast.unparse(t) for t,v in assigned(function) if self.is_config(v)}
        for n in function.body if isinstance(function.body, list) else [function.body]: self.visit(n)

    def visit_nested(self, node): # its own parameters may have the same name
        before = self.known
        self.known = before - {a.arg for a in arguments(node)}
        self.generic_visit(node)
        self.known = before
    visit_FunctionDef = visit_Lambda = visit_nested

    def visit_Attribute(self, node):
        if self.is_config(node.value): self.reads.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node):
        for at,value in [*enumerate(node.args), *((k.arg, k.value) for k in node.keywords)]:
            if self.is_config(value): self.hand_on(node, at)
        self.generic_visit(node)

    def hand_on(self, node, at): # at: the argument's number, or its name
        name = ast.unparse(node.func)
        if name == 'replace': self.reads |= {k.arg for k in node.keywords if k.arg}
        elif name in ('fields', 'asdict'): self.unseen = True
        elif name in ('getattr', 'hasattr'):
            if not isinstance(node.args[1], ast.Constant): self.unseen = True
            elif name == 'getattr' and len(node.args) == 2: self.reads.add(node.args[1].value)
        else:
            for f in self.handed.get(name) or [self.found(name)]:
                sure = f and not any(isinstance(a, ast.Starred) for a in node.args)
                if asked := sure and asks(f, at): self.passes.append((name, asked))
                else: self.lost.append(name)

    def found(self, name):
        try: return eval(name, self.space)
        except (NameError, AttributeError): return None

def asks(f, at): # the groups that a callable's parameter names
    parameters = inspect.signature(f).parameters
    p = parameters.get(at) if isinstance(at, str) else [*parameters.values()][at]
    return groups(p and p.annotation)

def wrong(r:Reader, kinds): # what doesn't fit the groups
    return ([f'reads {n}' for n in sorted(r.reads) if not has(kinds, n)]
            + [f'hands {n} less than it asks for' for n,asked in r.passes if not enough(kinds, asked)]
            + [f'hands it to {n}, where no group is known' for n in r.lost])

def too_wide(r:Reader, kinds): # a part of the group that would do
    parts = [b for b in kinds[0].__mro__[1:] if is_dataclass(b)] if len(kinds) == 1 and not r.unseen else []
    return [f'could do with {b.__name__}' for b in parts if (r.reads or r.passes)
            and all(has([b], n) for n in r.reads) and all(enough([b], asked) for _,asked in r.passes)][:1]

def methods(c): return [f for f in c.body if isinstance(f, ast.FunctionDef)]

def functions(tree): # (function or lambda, the other methods of its class, its name)
    classes = {f: c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in methods(c)}
    for f in ast.walk(tree):
        if not isinstance(f, (ast.FunctionDef, ast.Lambda)): continue
        c, name = classes.get(f), getattr(f, 'name', 'lambda')
        yield (f, [g for g in methods(c) if g is not f], f'{c.name}.{name}') if c else (f, [], name)

def disagreements(source, # of a module
                  space,  # its names
                  names,  # fields by which a c without annotation is known as a configuration
                  handed, # text of a callee that is no name of the module → functions that it may be
                 ):       # what is wrong, as text
    tree, out = ast.parse(source), []
    of = lambda annotation: groups(eval(ast.unparse(annotation), space)) if annotation else ()
    for f,others,name in functions(tree):
        for a in (a for a in arguments(f) if a.arg in PARAMETERS):
            kinds, r = of(a.annotation), Reader(space, handed)
            r.read(f, {a.arg})
            for stored in {k for k in r.known if k.startswith('self.')}:
                for g in others: r.read(g, {stored})
            if kinds: out += [f'{name} {what}' for what in wrong(r, kinds) or too_wide(r, kinds)]
            elif a.arg == 'config' or (not a.annotation and r.reads & names):
                out.append(f'{name} names no group for {a.arg}')
    for c in (c for c in ast.walk(tree) if isinstance(c, ast.ClassDef)): # that holds one in a field
        for n in (n for n in c.body if isinstance(n, ast.AnnAssign) and n.target.id in PARAMETERS):
            r = Reader(space, handed)
            for f in methods(c): r.read(f, {f'self.{n.target.id}'})
            out += [f'{c.name} {what}' for what in wrong(r, kinds)] if (kinds := of(n.annotation)) else []
    return out
