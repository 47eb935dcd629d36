("An experiment's notebook without a kernel, whose process takes seconds to start. "
 "train and probe are tested with theirs; what the others compute and leave does not depend on it.")
import sys
from contextlib import contextmanager
import matplotlib.pyplot as plt, nbformat
from IPython.core.interactiveshell import InteractiveShell
from execnb.shell import CaptureShell
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from deepcluster_nb.experiments import experiments_folder
from deepcluster_nb.runs import Hold

@contextmanager
def as_before(): # what ends with a process: added networks, settings of figures, the main module
    main, shell, backend = sys.modules['__main__'], InteractiveShell._instance, plt.get_backend()
    tables = [(t, dict(t)) for name,m in [*sys.modules.items()] if name.startswith('deepcluster_nb')
              for n,t in vars(m).items() if n.isupper() and isinstance(t, dict)]
    try:
        with plt.rc_context(): yield
    finally:
        plt.close('all')
        plt.switch_backend(backend)
        for t,was in tables: t.clear(); t.update(was)
        sys.modules['__main__'], InteractiveShell._instance = main, shell

def execute(notebook, page, given): # as experiments.execute does
    nb = parameterize_notebook(load_notebook_node(str(notebook)), given, True, kernel_name='python3',
                               language='python')
    with as_before():
        shell = CaptureShell(mpl_format='png')
        try:
            for i,c in enumerate(nb.cells):
                if c.cell_type != 'code': continue
                c.outputs = [nbformat.from_dict(o) for o in shell.run(c.source)]
                for o in c.outputs:
                    if o.output_type == 'stream': print(''.join(o.text), end='')
                if e := shell.exc:
                    raise PapermillExecutionError(i, None, c.source, type(e).__name__, str(e), [])
        finally:
            for v in shell.user_ns.values():
                if isinstance(v, Hold): v.let_go()           # as the end of its process would
            page.write_text(nbformat.writes(nb), encoding='utf-8')

def names_of(experiment, *texts, **given): # by its imports, parameters, and the cells with these texts
    space = {}
    cells = [c for c in load_notebook_node(str(experiments_folder()/f'{experiment}.ipynb')).cells
             if c.cell_type == 'code']
    parts = ([c for c in cells if 'parameters' in c.metadata.tags],
             [c for c in cells if c.source.startswith(('import ', 'from '))],
             [c for c in cells if any(t in c.source for t in texts)])
    assert all(any(t in c.source for c in cells) for t in texts), texts
    for part in parts:
        if part is parts[2]: space |= given
        for c in part: exec(compile(c.source, experiment, 'exec'), space)
    return space
